"""The language model that `pretrained.py` starts from. Nothing of mmllm is in this file: it stands for somebody else.

`python benchmarks/pretrained_text.py train TRAIN.jsonl --out DIR --seconds S [--max_steps N] [--seed N]`
    a byte-level BPE of its own by the tokenizers library, with special tokens and a chat template; a Llama by
    transformers from nothing; both saved by `save_pretrained`.
`python benchmarks/pretrained_text.py bits HELDOUT.jsonl --model DIR --json OUT`
    what that model needs for held-out texts, in bits a byte.

Shapes: B rows, T positions of a row, S tokens of the whole text.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

BEGIN, END, ROLE, ROLE_END = SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NUM_IDS = 2048
SIZES: dict[str, Any] = {
    "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "intermediate_size": 704, "max_position_embeddings": 1024,
}  # fmt: skip
ROW, NUM_ROWS = 256, 16
"""Tokens a row, rows a step."""
PEAK_LR, WARMUP_STEPS, MIN_SHARE = 2e-3, 50, 0.05
SCORED_BEHIND = "\n\n"
"""What a held-out text stands behind, since its first token follows something too: the end of a paragraph."""


def read_texts(path: Path) -> list[str]:
    """The texts of a manifest."""
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose special tokens lie behind its words, as Llama 3's do."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=NUM_IDS - len(SPECIAL), initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    begin = (BEGIN, tokenizer.token_to_id(BEGIN))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[begin]
    )
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=END)
    theirs.chat_template = CHAT_TEMPLATE
    return theirs


def rows_of(ids_S: Tensor, seed: int) -> Iterator[Tensor]:
    """Batches [B, T] of rows cut out of the whole text at random places, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(max(1, len(ids_S) - ROW), (NUM_ROWS,), generator=generator)
        yield torch.stack([ids_S[start : start + ROW] for start in starts.tolist()])


def train(texts: Sequence[str], out: Path, seconds: float, max_steps: int | None, seed: int) -> None:
    """Trains and saves tokenizer and model; what was reached goes to `out`/../text_model.json."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(texts)
    ids_S = torch.tensor([i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
    config = LlamaConfig(
        vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None, **SIZES,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_LR, (0.9, 0.98), weight_decay=0.1, fused=True)
    began, step, loss = time.monotonic(), 0, torch.zeros(())
    for step, ids_BT in enumerate(rows_of(ids_S, seed), start=1):
        gone = (time.monotonic() - began) / seconds if max_steps is None else (step - 1) / max_steps
        if gone >= 1:
            break
        decay = MIN_SHARE + (1 - MIN_SHARE) * 0.5 * (1 + math.cos(math.pi * gone))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(step / WARMUP_STEPS, 1.0) * decay
        loss = model(input_ids=ids_BT, labels=ids_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}  {time.monotonic() - began:.0f} s  loss {loss.item():.3f}", flush=True)
    model.eval().save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))
    told = {
        "family": "llama", "parameters": model.num_parameters(), "ids": len(tokenizer), "steps": step - 1,
        "tokens": (step - 1) * ROW * NUM_ROWS, "tokens_of_text": len(ids_S), "last_loss": loss.item(),
        "seconds": time.monotonic() - began, "seed": seed,
    }  # fmt: skip
    print(f"{out}: {told['parameters']:,} parameters, {told['steps']} steps, {told['tokens']:,} tokens")
    write_json(out.with_suffix(".json"), told)


@torch.no_grad()
def bits_per_byte(folder: Path, texts: Sequence[str]) -> float:
    """Negative log2 likelihood of the texts' tokens behind `SCORED_BEHIND`, over their UTF-8 bytes."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    model = LlamaForCausalLM.from_pretrained(str(folder)).eval()
    nats = 0.0
    for text in texts:
        before, ids = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (SCORED_BEHIND, text))
        logits = model(torch.tensor([before + ids])).logits[0, len(before) - 1 : -1].double()
        nats -= logits.log_softmax(dim=-1).gather(1, torch.tensor(ids)[:, None]).sum().item()
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def write_json(path: Path, values: Any) -> None:
    """Writes a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """One of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "bits"))
    parser.add_argument("texts", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--max_steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    disable_progress_bar()
    if args.command == "train":
        train(read_texts(args.texts), args.out, args.seconds, args.max_steps, args.seed)
    else:
        found = bits_per_byte(args.model, read_texts(args.texts))
        print(f"{args.model}: {found:.4f} bits a byte")
        write_json(args.json, {"bits_per_byte": found})


if __name__ == "__main__":
    main()
