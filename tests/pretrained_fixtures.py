"""Small tokenizers of the three kinds that checkpoints have, saved by transformers, and strings in twenty scripts."""

import random

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram
from tokenizers.trainers import BpeTrainer, UnigramTrainer

SCRIPTS = {
    "latin": (0x41, 0x17F), "greek": (0x391, 0x3C9), "cyrillic": (0x410, 0x44F), "armenian": (0x531, 0x586),
    "hebrew": (0x5D0, 0x5EA), "arabic": (0x621, 0x64A), "devanagari": (0x905, 0x94D), "bengali": (0x985, 0x9CD),
    "gurmukhi": (0xA05, 0xA4D), "gujarati": (0xA85, 0xACD), "tamil": (0xB85, 0xBCD), "telugu": (0xC05, 0xC4D),
    "thai": (0xE01, 0xE4E), "georgian": (0x10D0, 0x10FF), "hangul": (0xAC00, 0xD7A3), "hiragana": (0x3041, 0x3096),
    "katakana": (0x30A1, 0x30FA), "han": (0x4E00, 0x9FA5), "ethiopic": (0x1200, 0x1248), "emoji": (0x1F300, 0x1F64F),
}  # fmt: skip
ODD = (
    "", " ", "  two  spaces ", "\n\n", "\ttabs\t", "a\u0301 combining", "e\u200dmoji 👩‍👩‍👧‍👦", "naïve café", 
    "1234567890", "3.14,15", "don't I'll we've", "http://x.y/z?q=1&r=2", "\u00a0nbsp", "ﬁ ligature", "Ａ wide", 
    "\u0000 null", "\ufeffbom", "x\r\ny",
    "<s>", "</s>", "<unk>", "<|im_start|>user", "<|im_end|>", "<|end|>", "<|image|>", "<0x41>", "▁underscore", "[INST]",
)  # fmt: skip
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")


def strings(count, seed=0):
    """So many strings in all the scripts, mixed, spaced and punctuated."""
    random_ = random.Random(seed)
    names = list(SCRIPTS)
    made = list(ODD)
    for number in range(count - len(ODD)):
        words = []
        for _ in range(random_.randrange(1, 7)):
            script = names[number % len(names)] if random_.random() < 0.8 else random_.choice(names)
            first, last = SCRIPTS[script]
            words.append("".join(chr(random_.randint(first, last)) for _ in range(random_.randrange(1, 9))))
        spaces = [random_.choice((" ", " ", " ", "  ", "\n", ", ", ". ", "-", "")) for _ in words]
        made.append("".join(word + space for word, space in zip(words, spaces, strict=True)))
        if random_.random() < 0.05:
            made[-1] += random_.choice(ODD)
    return made


def _corpus():
    english = "the quick brown fox jumps over the lazy dog and says that it's one of 12 things it can't do. " * 20
    return [english, *strings(400, seed=1)]


def byte_level(special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), plain=("<think>",), vocab_size=700):
    """As GPT-2's, Llama 3's and Qwen's."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(vocab_size=vocab_size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    trainer.show_progress = False
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return tokenizer


def byte_fallback(vocab_size=700):
    """As Llama 2's and Mistral's: SentencePiece's BPE with a token for each byte."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(_corpus()[:60], trainer)
    content = tokenizer.to_str()
    tokenizer = Tokenizer.from_str(_without_added(content, special[4:]))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def unigram(vocab_size=500):
    """As T5's and XLM-R's: SentencePiece's Unigram."""
    tokenizer = Tokenizer(Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = UnigramTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(_corpus()[:60], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return tokenizer


def _without_added(serialized, names):
    import json

    content = json.loads(serialized)
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in names]
    return json.dumps(content)


CHATML = (
    "{%- if tools %}{{ '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}"
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + "
    "'<|im_end|>' + '\\n' }}{% endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA2 = (
    "{%- set ns = namespace(system='') %}{%- for message in messages %}{% if message.role == 'system' %}"
    "{% set ns.system = '<<SYS>>\\n' ~ message.content ~ '\\n<</SYS>>\\n\\n' %}{% elif message.role == 'user' %}"
    "{{ bos_token + '[INST] ' + ns.system + message.content.strip() + ' [/INST]' }}{% set ns.system = '' %}"
    "{% elif message.role == 'assistant' %}{% generation %}{{ ' ' + message.content + ' ' + eos_token }}"
    "{% endgeneration %}{% else %}{{ raise_exception('role ' ~ message.role) }}{% endif %}{% endfor %}"
)


def saved(tokenizer, folder, chat_template=None, **special):
    """Saves a tokenizer as transformers does; gives transformers' own."""
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    if chat_template is not None:
        theirs.chat_template = chat_template
    theirs.save_pretrained(str(folder))
    return theirs


def saved_kind(kind, folder):
    """One of the three, as transformers saves it."""
    match kind:
        case "byte_level":
            return saved(byte_level(), folder, CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")
        case "byte_fallback":
            return saved(
                byte_fallback(), folder, LLAMA2, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
            )
        case "unigram":
            chat = CHATML.replace("<|im_end|>", "</s>")
            return saved(unigram(), folder, chat, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    raise ValueError(kind)
