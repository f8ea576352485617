"""Tokenizers of checkpoints, against transformers' own."""

import io
import json
import pickle
import sys

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaTokenizer, Qwen2Tokenizer

from mmllm.cli.main import main
from mmllm.interop.tokenizers import read_tokenizer
from mmllm_tokenizers.folder import TokenizerConfig, TokenizerFolder
from mmllm_tokenizers.text import ForeignText, TextTokenizer
from mmllm_tokenizers.vocab import SPECIAL_TOKENS
from tests.pretrained_fixtures import CHATML, LLAMA2, byte_fallback, byte_level, saved, saved_kind, strings, unigram

KINDS = ("byte_level", "byte_fallback", "unigram")


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    theirs = saved_kind(request.param, folder)
    return request.param, folder, theirs, read_tokenizer(folder, len(theirs) + 7)


def test_ten_thousand_strings_in_twenty_scripts_are_encoded_as_transformers_does(kind, tmp_path, monkeypatch, capsys):
    _, folder, _, imported = kind
    texts = [text for text in strings(10_000) if "\n" not in text]
    texts += [text.replace("\n", " ") for text in strings(10_000) if "\n" in text]
    wanted = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)(texts)["input_ids"]
    assert len(texts) == 10_000 and len({i for ids in wanted for i in ids}) > 350
    assert [imported.text.encode_as_transformers(text) for text in texts] == wanted
    TokenizerFolder(imported.text).save(tmp_path / "ours")
    lines = "\n".join(texts).encode()
    for tokenizer in (folder, tmp_path / "ours"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
        assert main(["tokenizer", "encode", "--tokenizer", str(tokenizer)]) == 0
        assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == wanted


def test_lines_of_files_are_encoded_and_what_is_no_text_is_named(kind, tmp_path, capsys):
    _, folder, theirs, _ = kind
    (tmp_path / "a.txt").write_bytes(b"one\r\n\ntwo  ")
    assert main(["tokenizer", "encode", "--tokenizer", str(folder), str(tmp_path / "a.txt")]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found == [theirs(text)["input_ids"] for text in ("one\r", "", "two  ")]
    (tmp_path / "b.txt").write_bytes(b"fine\n\xff\xfe\n")
    assert main(["tokenizer", "encode", "--tokenizer", str(folder), str(tmp_path / "b.txt")]) == 2
    assert "b.txt:2 is no UTF-8" in capsys.readouterr().err


def test_no_text_gives_a_special_token_of_either(kind):
    name, _, theirs, imported = kind
    text = imported.text
    spelt = [*SPECIAL_TOKENS, *(each.content for each in theirs.added_tokens_decoder.values() if each.special)]
    unknown = theirs.unk_token_id
    for words in [*spelt, "".join(spelt), " ".join(spelt), *(f"a{token}b" for token in spelt), *strings(500, seed=5)]:
        ids = text.encode(words)
        assert not (set(ids) & text.hidden_ids) - {unknown}, words
    for token in spelt[len(SPECIAL_TOKENS) :]:
        assert theirs.convert_tokens_to_ids(token) in text.encode_as_transformers(f"a {token} b"), "the test can fail"
    assert text.decode(text.encode("<|end|></s><|im_end|>")) == "<|end|></s><|im_end|>"
    forged = "\ufdd0</s>"
    if name == "unigram":
        with pytest.raises(ValueError, match="would give the special token"):
            text.encode(forged)


def test_words_are_those_of_transformers_and_come_back(kind):
    _, _, theirs, imported = kind
    for words in strings(500, seed=7):
        if any(token.content in words for token in theirs.added_tokens_decoder.values()):
            continue
        assert imported.text.encode(words) == theirs(words, add_special_tokens=False)["input_ids"]
    assert imported.text.decode(imported.text.encode("hello two  words")).split() == ["hello", "two", "words"]


def test_our_tokens_lie_behind_the_padding_and_are_written_only_by_templates(kind):
    _, _, theirs, imported = kind
    text = imported.text
    assert text.num_tokens == len(theirs)
    assert sorted(text.special_ids.values()) == list(range(len(theirs) + 7, len(theirs) + 7 + len(SPECIAL_TOKENS)))
    assert text.vocab_size == len(theirs) + 7 + len(SPECIAL_TOKENS) and imported.shared == ()
    ids = text.encode_template(f"<|image|>{theirs.eos_token}<|caption|>")
    assert ids == [text.id("<|image|>"), theirs.eos_token_id, text.id("<|caption|>")]
    assert text.end_ids == (text.id("<|end|>"), theirs.eos_token_id)
    assert text.decode([text.id("<|end|>"), theirs.eos_token_id, text.vocab_size - 1, len(theirs) + 3]) == ""
    again = pickle.loads(pickle.dumps(text))
    assert again.special_ids == text.special_ids and again.hash == text.hash
    assert again.encode("<|end|></s>") == text.encode("<|end|></s>")


def test_a_folder_keeps_tokenizer_json_to_the_letter_and_all_ids(kind, tmp_path):
    _, folder, _, imported = kind
    templates = imported.templates
    made = TokenizerFolder(imported.text, None, TokenizerConfig(), templates, imported.chat_template)
    made.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    read = TokenizerFolder.load(tmp_path)
    assert read.hash == made.hash and read.chat_template == imported.chat_template
    assert read.text.foreign == imported.text.foreign and read.vocabulary.size == imported.text.vocab_size
    assert read.text.encode_template("<|speak|>a<|end|>") == imported.text.encode_template("<|speak|>a<|end|>")
    other = TokenizerFolder(imported.text, None, TokenizerConfig(), templates, None)
    assert other.hash != made.hash


def test_texts_begin_and_end_as_the_checkpoints_own(kind):
    name, _, theirs, imported = kind
    begin = "<s>" if name == "byte_fallback" else ""
    assert imported.templates["text"] == {"prompt": begin, "target": "{text}" + theirs.eos_token}
    assert imported.templates["caption"]["prompt"] == begin + "{image}<|caption|>"
    assert imported.templates["caption"]["target"] == "{text}<|end|>"


def test_a_special_token_of_the_same_name_is_ours_too(tmp_path):
    theirs = saved(byte_level(("<|endoftext|>", "<|end|>", "<|user|>"), ("<|image|>",)), tmp_path, eos_token="<|end|>")
    imported = read_tokenizer(tmp_path, len(theirs))
    assert set(imported.shared) == {"<|end|>", "<|user|>"}
    assert imported.text.id("<|end|>") == theirs.eos_token_id
    assert imported.text.id("<|image|>") >= len(theirs), "theirs is an ordinary token, which any text may hold"
    assert theirs.convert_tokens_to_ids("<|image|>") in imported.text.encode("<|image|>")
    assert imported.text.encode_template("<|image|>") == [imported.text.id("<|image|>")]


def test_a_token_for_pictures_is_our_image(tmp_path):
    theirs = saved(byte_level(("<|endoftext|>", "<image>")), tmp_path, eos_token="<|endoftext|>")
    image = theirs.convert_tokens_to_ids("<image>")
    imported = read_tokenizer(tmp_path, len(theirs), image)
    assert imported.text.id("<|image|>") == image
    assert imported.text.encode_template("<|image|><image>") == [image, image]
    assert image not in imported.text.encode("<image><|image|>")
    with pytest.raises(ValueError, match="image_token_id 5, which is no special token"):
        read_tokenizer(tmp_path, len(theirs), 5)


@pytest.mark.parametrize("cls", [LlamaTokenizer, Qwen2Tokenizer])
def test_classes_that_transformers_builds_anew_are_encoded_as_it_does(tmp_path, cls):
    """They take vocabulary and merges of the file, and another pipeline than it has."""
    made = byte_fallback() if cls is LlamaTokenizer else byte_level()
    content = json.loads(made.to_str())["model"]
    theirs = cls(vocab=content["vocab"], merges=[tuple(merge) for merge in content["merges"]])
    theirs.save_pretrained(str(tmp_path))
    theirs = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    assert type(theirs).__name__ == cls.__name__
    imported = read_tokenizer(tmp_path, len(theirs))
    texts = strings(2000, seed=3)
    assert [imported.text.encode_as_transformers(text) for text in texts] == theirs(texts)["input_ids"]


def test_a_file_with_another_pipeline_than_its_class_is_read_as_transformers_reads_it(tmp_path):
    content = json.loads(byte_fallback().to_str())["model"]
    theirs = LlamaTokenizer(vocab=content["vocab"], merges=[tuple(merge) for merge in content["merges"]])
    theirs.save_pretrained(str(tmp_path))
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    file["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    theirs = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    imported = read_tokenizer(tmp_path, len(theirs))
    assert imported.text.encode_as_transformers("Hello THERE") == theirs("Hello THERE")["input_ids"]


def test_truncation_and_padding_of_a_file_are_those_of_a_training_run(tmp_path):
    theirs = saved(byte_level(), tmp_path, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    made.enable_truncation(4)
    made.enable_padding(length=9)
    made.save(str(tmp_path / "tokenizer.json"))
    imported = read_tokenizer(tmp_path, len(theirs))
    assert (
        imported.text.encode_as_transformers("a longer text than four tokens")
        == theirs("a longer text than four tokens")["input_ids"]
    )


def test_what_is_no_tokenizer_of_the_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json doesn't exist"):
        read_tokenizer(tmp_path, 10)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"tokenizer in tokenizer\.model alone; wanted tokenizer\.json"):
        read_tokenizer(tmp_path, 10)
    theirs = saved(byte_level(), tmp_path, eos_token="<|im_end|>")
    with pytest.raises(ValueError, match=rf"id {len(theirs) - 1} .*embedding has {len(theirs) - 1} rows"):
        read_tokenizer(tmp_path, len(theirs) - 1)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 99_999}))
    with pytest.raises(ValueError, match="eos_token_id 99999"):
        read_tokenizer(tmp_path, len(theirs))
    (tmp_path / "config.json").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoTokenizer": ["a.B", None]}})
    )
    with pytest.raises(ValueError, match=r"auto_map .* never run"):
        read_tokenizer(tmp_path, len(theirs))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="can't be read as a tokenizer"):
        read_tokenizer(tmp_path, len(theirs))


@pytest.mark.parametrize("named", ["generation_config.json", "config.json"])
def test_what_ends_a_text_is_an_id_or_several(tmp_path, named):
    theirs = saved(byte_level(), tmp_path, eos_token="<|im_end|>")
    for wrong in (99_999, -1, "</s>", [1, "x"], [[1]], True, 1.5, {"a": 1}):
        (tmp_path / named).write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(ValueError, match=rf"/{named} has eos_token_id .*; wanted the id of one"):
            read_tokenizer(tmp_path, len(theirs))
    (tmp_path / named).write_text(json.dumps({"eos_token_id": [5, 7], "text_config": "x"}))
    text = read_tokenizer(tmp_path, len(theirs)).text
    assert text.end_ids == (text.id("<|end|>"), 5, 7, theirs.eos_token_id)


PRECOMPILED = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
FRAMED = {"type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {}}
FRAMED["single"] = [{"SpecialToken": {"id": "z", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]


@pytest.mark.parametrize("damage", [{"normalizer": PRECOMPILED}, {"post_processor": FRAMED}])
def test_a_file_over_which_the_library_panics_is_refused(tmp_path, damage):
    theirs = saved(byte_level(), tmp_path, eos_token="<|im_end|>")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(ValueError, match=r"tokenizer.json.* can't be read as a tokenizer"):
        read_tokenizer(tmp_path, len(theirs))
    if "normalizer" in damage:
        with pytest.raises(ValueError, match="is not a Hugging Face tokenizer"):
            TextTokenizer.load(path)


def test_what_frames_a_text_has_rows_too(tmp_path):
    theirs = saved(byte_level(), tmp_path, eos_token="<|im_end|>")
    path = tmp_path / "tokenizer.json"
    framed = {**FRAMED, "special_tokens": {"z": {"id": "z", "ids": [99_999], "tokens": ["z"]}}}
    path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": framed}))
    with pytest.raises(ValueError, match=r"id 99999 .*don't belong together"):
        read_tokenizer(tmp_path, len(theirs))


def test_texts_that_never_hold_special_tokens_are_refused_by_the_fields_name(tmp_path):
    theirs = saved(byte_level(), tmp_path, eos_token="<|im_end|>")
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "split_special_tokens": True}))
    with pytest.raises(ValueError, match=r"tokenizer_config.json has split_special_tokens true"):
        read_tokenizer(tmp_path, len(theirs))


def test_a_chat_template_is_kept_with_its_line_breaks_as_files_have_them(tmp_path):
    theirs = saved(byte_level(), tmp_path / "theirs", eos_token="<|im_end|>")
    path = tmp_path / "theirs" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    lines = "{{ 'a' }}\r\n{% for m in messages %}\r{{ m.content }}\r\n{% endfor %}"
    path.write_text(json.dumps({**config, "chat_template": lines}))
    imported = read_tokenizer(tmp_path / "theirs", len(theirs))
    made = TokenizerFolder(imported.text, None, TokenizerConfig(), imported.templates, imported.chat_template)
    made.save(tmp_path / "ours")
    assert TokenizerFolder.load(tmp_path / "ours").hash == made.hash
    for wrong in (5, ["x"], "\ud83d"):
        path.write_text(json.dumps({**config, "chat_template": wrong}))
        with pytest.raises(ValueError, match=r"chat_template|can't be read as a tokenizer"):
            read_tokenizer(tmp_path / "theirs", len(theirs))


def test_ids_that_do_not_fit_the_tokenizer_are_refused():
    made = byte_level()
    ids = {name: made.get_vocab_size() + number for number, name in enumerate(SPECIAL_TOKENS)}
    size = made.get_vocab_size() + len(ids)
    TextTokenizer(made, ForeignText(size, ids))
    for wrong in ({**ids, "<|end|>": 5}, {**ids, "<|end|>": size}, {**ids, "<|end|>": ids["<|pad|>"]}, {}):
        with pytest.raises(ValueError, match="special token"):
            TextTokenizer(made, ForeignText(size, wrong))
    with pytest.raises(ValueError, match="text ends with id"):
        TextTokenizer(made, ForeignText(size, ids, (size,)))
    with pytest.raises(ValueError, match="must have the keys"):
        ForeignText.from_dict({"size": 3}, "tokenizer_config.json")


def test_whole_words_that_are_looked_up_forge_nothing():
    """`ignore_merges` looks words up in the vocabulary, where a special token may stand too."""
    content = json.loads(byte_level().to_str())
    content["model"]["ignore_merges"] = True
    content["model"]["vocab"]["stop"] = len(content["model"]["vocab"]) + 4
    content["added_tokens"].append(
        {**content["added_tokens"][0], "id": content["model"]["vocab"]["stop"], "content": "stop"}
    )
    made = Tokenizer.from_str(json.dumps(content))
    stop = made.token_to_id("stop")
    ids = {name: stop + 1 + number for number, name in enumerate(SPECIAL_TOKENS)}
    text = TextTokenizer(made, ForeignText(stop + 1 + len(ids), ids))
    assert stop in text.hidden_ids and stop not in text.encode("stop") and text.decode(text.encode("stop")) == "stop"
    assert text.encode_as_transformers("stop") == [stop]


def test_long_texts_are_cut_only_where_each_piece_is_encoded_alike(kind):
    _, _, _, imported = kind
    words = " ".join(strings(60, seed=9))
    ids, pieces = imported.text.encode_pieces(words, 40)
    assert ids == imported.text.encode(words)
    for (start, begin), (stop, end) in zip(pieces, [*pieces[1:], (len(ids), None)], strict=True):
        assert imported.text.encode(words.encode()[begin:end].decode()) == ids[start:stop]


def test_templates_are_those_of_the_fixture():
    assert "im_start" in CHATML and "INST" in LLAMA2 and unigram().get_vocab_size() > 300
