from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmllm_tokenizers.text import MIN_VOCAB_SIZE, TextTokenizer, train_text_tokenizer
from mmllm_tokenizers.vocab import SPECIAL_TOKENS, TEMPLATES

TEXTS = ["two red squares above a blue circle", "a small green star, left of a large ring", "hello, hello world"] * 5


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(TEXTS, MIN_VOCAB_SIZE + 50)


def test_a_pickled_tokenizer_takes_no_special_tokens_from_users() -> None:
    tokenizer = TextTokenizer.train(["a red circle"] * 3, vocab_size=300)
    twin = pickle.loads(pickle.dumps(tokenizer))
    assert twin.encode("<|end|>") == tokenizer.encode("<|end|>") and len(twin.encode("<|end|>")) > 1
    assert twin.hash == tokenizer.hash


def test_special_tokens_have_the_first_ids(tokenizer):
    assert [tokenizer.id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert tokenizer.vocab_size == MIN_VOCAB_SIZE + 50


@given(text=st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_unicode_text_comes_back(text, tokenizer):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["", " ", "\0", "\r\n\t  x", "é e\u0301", "日本語 العربية", "👩🏽‍🚀", "  two  spaces  ", "\ufeff"]
)
def test_awkward_text_comes_back(text, tokenizer):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(parts=st.lists(st.sampled_from([*SPECIAL_TOKENS, " ", "red", "<|", "|>", "\n"]), max_size=12))
@settings(max_examples=200, deadline=None)
def test_user_text_cannot_forge_special_tokens(parts, tokenizer):
    text = "".join(parts)
    ids = tokenizer.encode(text)
    assert all(token_id >= len(SPECIAL_TOKENS) for token_id in ids)
    assert tokenizer.decode(ids) == text


def test_templates_give_special_tokens(tokenizer):
    for parts in TEMPLATES.values():
        for template in parts.values():
            ids = tokenizer.encode_template(template)
            assert [i for i in ids if i < len(SPECIAL_TOKENS)] == [tokenizer.id(token) for token in _in_order(template)]
    ids = tokenizer.encode_template("<|user|>hi<|assistant|>")
    assert ids == [tokenizer.id("<|user|>"), *tokenizer.encode("hi"), tokenizer.id("<|assistant|>")]


def _in_order(template: str) -> list[str]:
    found = [(template.index(token), token) for token in SPECIAL_TOKENS if token in template]
    return [token for _, token in sorted(found)]


def test_decode_drops_special_tokens_and_units(tokenizer):
    ids = [tokenizer.id("<|text|>"), *tokenizer.encode("red ring"), tokenizer.id("<|end|>"), tokenizer.vocab_size + 7]
    assert tokenizer.decode(ids) == "red ring"


def test_training_is_deterministic():
    first, second = (train_text_tokenizer(TEXTS, MIN_VOCAB_SIZE + 30).to_str() for _ in range(2))
    assert first == second


def test_save_load_and_hash(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = TextTokenizer.load(tmp_path / "tokenizer.json")
    text = "two blue stars <|end|> ☃"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.encode_template(text) == tokenizer.encode_template(text)
    assert loaded.hash == tokenizer.hash
    assert TextTokenizer.train(TEXTS, MIN_VOCAB_SIZE + 20).hash != tokenizer.hash


def test_errors_say_what_to_do(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="vocab_size is 100; it must be at least 270"):
        TextTokenizer.train(TEXTS, 100)
    with pytest.raises(FileNotFoundError, match="train-text"):
        TextTokenizer.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json is not a Hugging Face tokenizer"):
        TextTokenizer.load(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        tokenizer.encode("broken \ud83d text")
    with pytest.raises(ValueError, match=r"no token '<\|video\|>'"):
        tokenizer.id("<|video|>")


def test_a_foreign_tokenizer_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"][3]["content"] = "<|picture|>"
    content["model"]["vocab"]["<|picture|>"] = content["model"]["vocab"].pop("<|image|>")
    (tmp_path / "foreign.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"no special token <\|image\|>"):
        TextTokenizer.load(tmp_path / "foreign.json")
