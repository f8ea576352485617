"""Texts under constraints: random rows write nothing else, and all that they may be is allowed."""

import json
import random
import re
import sys
import time

import pytest
import torch

from mmllm.inference import constraints, grammars
from mmllm.inference.json_schemas import MAX_DEPTH, schema_text
from mmllm.interop.tokenizers import read_tokenizer
from mmllm_tokenizers.folder import TokenizerFolder
from tests.inference_fixtures import make_tokenizer
from tests.pretrained_fixtures import saved_kind

KINDS = ("ours", "byte_level", "byte_fallback", "unigram")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    found = {"ours": make_tokenizer()}
    for kind in KINDS[1:]:
        folder = tmp_path_factory.mktemp(kind)
        theirs = saved_kind(kind, folder)
        found[kind] = TokenizerFolder(read_tokenizer(folder, len(theirs) + 7).text)
    yield found
    grammars.close()


@pytest.fixture
def ours(tokenizers):
    return tokenizers["ours"]


def write(tokenizer, maker, seed, most=400):
    """What a row writes that draws any id it may, each as likely; None: it goes on and on."""
    state, ends, ids = maker.begin(), tokenizer.text.end_ids, []
    random_ = random.Random(seed)
    for _ in range(most):
        allowed_V = state.allowed()
        assert allowed_V.dtype == torch.bool and len(allowed_V) == tokenizer.vocabulary.num_text
        allowed = allowed_V.nonzero()[:, 0].tolist()
        token_id = random_.choice(allowed)
        if any(end in allowed for end in ends) and random_.random() < 0.3:
            token_id = ends[0]
        if token_id in ends:
            return tokenizer.text.decode(ids)
        assert token_id not in tokenizer.text.hidden_ids and token_id < tokenizer.text.num_tokens
        ids.append(token_id)
        state.accept(token_id)
    return None


def follows(tokenizer, maker, ids):
    """Whether a row may write these ids and end."""
    state = maker.begin()
    for token_id in ids:
        if not state.allowed()[token_id]:
            return False
        state.accept(token_id)
    return bool(state.allowed()[list(tokenizer.text.end_ids)].all())


TEXTS = ["red", "redder", "a red circle", "two blue squares", "one, two", " leading", "one"]


@pytest.mark.parametrize("kind", KINDS)
def test_one_of_the_choices_is_written_in_any_tokens(tokenizers, kind):
    tokenizer = tokenizers[kind]
    texts = TEXTS if kind in ("ours", "byte_level", "byte_fallback") else TEXTS[:5]
    maker = constraints.choices(tokenizer, texts)
    assert {write(tokenizer, maker, seed) for seed in range(150)} == set(texts)
    for text in texts:
        ids = tokenizer.text.encode(text)
        if tokenizer.text.decode(ids) == text:
            assert follows(tokenizer, maker, ids), text
    assert not follows(tokenizer, maker, tokenizer.text.encode("red circle"))
    assert not follows(tokenizer, maker, tokenizer.text.encode("a red"))


@pytest.mark.parametrize("kind", ["ours", "byte_level", "byte_fallback"])
def test_choices_of_several_bytes_and_of_nothing(tokenizers, kind):
    tokenizer = tokenizers[kind]
    texts = ["你好", "你们", "é", "👩‍👩‍👧‍👦", "", "<|end|>", "x\n"]
    maker = constraints.choices(tokenizer, texts)
    assert {write(tokenizer, maker, seed) for seed in range(150)} == set(texts)


def test_what_no_tokens_spell_is_refused_by_name(tokenizers):
    tokenizer = tokenizers["unigram"]
    with pytest.raises(ValueError, match="spell the choice 'red \U00012345'"):
        constraints.choices(tokenizer, ["red", "red \U00012345"])


@pytest.mark.parametrize(
    "texts", [[], "red", ["red", 3], ["\ud800"], ["a"] * 10_001, ["a" * 600_000, "b" * 600_000], 5]
)
def test_choices_that_are_none(ours, texts):
    with pytest.raises(ValueError, match="choice"):
        constraints.choices(ours, texts)


def test_thousands_of_choices_are_quick(ours):
    texts = [f"the choice number {number}" for number in range(5000)]
    start = time.perf_counter()
    maker = constraints.choices(ours, texts)
    assert constraints.choices(ours, texts) is maker
    assert all(write(ours, maker, seed) in texts for seed in range(5))
    assert time.perf_counter() - start < 3


xgrammar = pytest.mark.skipif("not __import__('importlib').util.find_spec('xgrammar')", reason="needs xgrammar")
PATTERNS = {
    r"(red|blue) [0-9]{3}": ["red 123", "blue 000"],
    r"a.c": ["abc", "a你c", "a.c"],
    r"[.\]]+\.": ["..", "]."],
    r"^\d+(\.\d+)?$": ["1", "22.5"],
    r" ?x+": [" x", "xx"],
    r"(你|é)*": ["", "你é"],
    r"": [""],
}


@xgrammar
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_pattern_matches_all_of_what_is_written(tokenizers, kind, pattern):
    tokenizer = tokenizers[kind]
    if kind == "unigram" and ("你" in pattern or "." in pattern or "[0" in pattern):
        pytest.skip("it has no tokens for some of these characters")
    maker = constraints.regex(tokenizer, pattern)
    written = [text for text in (write(tokenizer, maker, seed, most=60) for seed in range(25)) if text is not None]
    assert len(written) > 5 and all(re.fullmatch(pattern, text) for text in written)
    for text in PATTERNS[pattern]:
        ids = tokenizer.text.encode(text)
        if tokenizer.text.decode(ids) == text:
            assert follows(tokenizer, maker, ids), text
    assert not follows(tokenizer, maker, tokenizer.text.encode("red\n"))


@xgrammar
@pytest.mark.parametrize("pattern, said", [
    ("(a", "parenthesis is not closed"), ("(?=a)b", "Lookahead"), (r"(a)\1", "Backreference"), ("a$b", "should be at"),
    (r"\bword", "boundary"), ("a" * 9000, "characters"), (5, "wanted text"), ("\ud800", "surrogate"),
])  # fmt: skip
def test_patterns_that_are_none(ours, pattern, said):
    for _ in range(2):
        with pytest.raises(ValueError, match=f"(?s)the regular expression.*{said}"):
            constraints.regex(ours, pattern)


INT, TEXT = {"type": "integer"}, {"type": "string"}
KEYWORDS = [
    ("const", {"const": 5}, 5, 6), ("enum", {"enum": ["a", 1]}, "a", "b"), ("type", INT, -5, "a"),
    ("type list", {"type": ["integer", "null"]}, None, "a"),
    ("minimum", {"type": "integer", "minimum": 5}, 7, 3), ("maximum", {"type": "integer", "maximum": 5}, 3, 7),
    ("exclusiveMinimum", {"type": "integer", "exclusiveMinimum": 5}, 6, 5),
    ("exclusiveMaximum", {"type": "integer", "exclusiveMaximum": 5}, 4, 5),
    ("multipleOf", {"type": "integer", "multipleOf": 5}, 10, 7),
    ("minLength", {"type": "string", "minLength": 2}, "ab", "a"),
    ("maxLength", {"type": "string", "maxLength": 2}, "ab", "abc"),
    ("pattern", {"type": "string", "pattern": "^a+$"}, "aa", "b"),
    ("format", {"type": "string", "format": "date"}, "2020-01-01", "x"),
    ("items", {"type": "array", "items": INT}, [1], ["a"]),
    ("minItems", {"type": "array", "items": INT, "minItems": 2}, [1, 2], [1]),
    ("maxItems", {"type": "array", "items": INT, "maxItems": 2}, [1, 2], [1, 2, 3]),
    ("prefixItems", {"type": "array", "prefixItems": [INT, TEXT]}, [1, "a"], ["a", 1]),
    ("unevaluatedItems", {"type": "array", "prefixItems": [INT], "unevaluatedItems": False}, [1], [1, 2]),
    ("properties", {"type": "object", "properties": {"a": INT}}, {"a": 1}, {"a": "x"}),
    ("required", {"type": "object", "properties": {"a": INT, "b": INT}, "required": ["a"]}, {"a": 1}, {"b": 1}),
    ("additionalProperties", {"type": "object", "properties": {"a": INT}, "additionalProperties": TEXT},
     {"a": 1, "c": "x"}, {"c": 1}),
    ("nothing else", {"type": "object", "properties": {"a": INT}}, {"a": 1}, {"c": 1}),
    ("unevaluatedProperties", {"type": "object", "properties": {"a": INT}, "unevaluatedProperties": False}, {},
     {"b": 1}),
    ("propertyNames", {"type": "object", "propertyNames": {"type": "string", "pattern": "^a+$"}}, {"aa": 1}, {"b": 1}),
    ("minProperties", {"type": "object", "properties": {"a": INT}, "minProperties": 1}, {"a": 1}, {}),
    ("maxProperties", {"type": "object", "properties": {"a": INT, "b": INT}, "maxProperties": 1}, {"a": 1},
     {"a": 1, "b": 2}),
    ("anyOf", {"anyOf": [INT, TEXT]}, 1, True), ("oneOf", {"oneOf": [INT, TEXT]}, 1, True),
    ("allOf", {"allOf": [INT]}, 1, "a"), ("$ref", {"$defs": {"x": INT}, "$ref": "#/$defs/x"}, 1, "a"),
    ("definitions", {"definitions": {"x": INT}, "type": "array", "items": {"$ref": "#/definitions/x"}}, [1], ["a"]),
    ("recursion", {"type": "object", "properties": {"c": {"$ref": "#"}}}, {"c": {"c": {}}}, {"c": 1}),
    ("false", {"type": "array", "items": False}, [], [1]), ("true", {"type": "array", "items": True}, [None], 5),
]  # fmt: skip


@xgrammar
@pytest.mark.parametrize("name, schema, good, bad", KEYWORDS, ids=[each[0] for each in KEYWORDS])
def test_each_keyword_is_followed(ours, name, schema, good, bad):
    maker = constraints.json_schema(ours, schema)
    good_ids, bad_ids = (ours.text.encode(json.dumps(value)) for value in (good, bad))
    assert follows(ours, maker, good_ids) and not follows(ours, maker, bad_ids)


@xgrammar
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_json_that_follows_the_schema(tokenizers, kind, caplog):
    tokenizer = tokenizers[kind]
    schema = {
        "type": "object", "title": "A thing", "required": ["name", "count"], "properties": {
            "name": {"enum": ["red", "two"], "description": "its name"}, "count": {"type": "integer", "minimum": 0,
            "maximum": 99}, "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}},
    }  # fmt: skip
    if kind == "unigram":  # there is no token for a brace
        assert write(tokenizer, constraints.json_schema(tokenizer, schema), 0) == ""
        assert "no token for" in caplog.text
        return
    maker = constraints.json_schema(tokenizer, schema)
    assert constraints.json_schema(tokenizer, schema) is maker
    written = [write(tokenizer, maker, seed) for seed in range(30)]
    values = [json.loads(text) for text in written if text is not None]
    assert len(values) > 20 and any("tags" in value for value in values)
    for value in values:
        assert value["name"] in ("red", "two") and 0 <= value["count"] <= 99
        assert set(value) <= {"name", "count", "tags"} and all(isinstance(tag, bool) for tag in value.get("tags", []))
    assert follows(tokenizer, maker, tokenizer.text.encode('{"name": "red", "count": 5}'))


@xgrammar
def test_any_object(ours):
    maker = constraints.json_object(ours)
    for text in ("{}", '{"a": [1, {"b": null}], "c": "\\n你"}', '{\n  "a": 1\n}'):
        assert follows(ours, maker, ours.text.encode(text)), text
    for text in ("[1]", '{"a": 1,}', "{}x", '{"a": "\n"}', "5"):
        assert not follows(ours, maker, ours.text.encode(text)), text


def deep(depth):
    schema = INT
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize("schema, said", [
    ({"type": "array", "items": INT, "uniqueItems": True}, r"'uniqueItems' at \$,"), ({"not": INT}, "'not'"),
    ({"type": "object", "properties": {"a": {"if": INT}}}, r"'if' at \$\.properties\.a"),
    ({"$ref": "#/$defs/x", "minimum": 5, "$defs": {"x": INT}}, r"minimum beside \$ref"),
    ({"minimum": 3}, "say its type"),
    ({"anyOf": [INT], "type": "object"}, "type beside anyOf"), ({"enum": [1], "minimum": 3}, "only a type goes"),
    ({"$ref": "http://x.y/z"}, "those within it"), ({"anyOf": [INT, 5]}, r"5 at \$\.anyOf\[1\]"),
    ({"type": "string", "format": "date", "pattern": "x"}, "choose"), ([INT], "must be a mapping"), ("{}", "mapping"),
    ({"enum": [float("nan")]}, "no JSON"), ({"enum": [{1, 2}]}, "no JSON|at"), ({"enum": ["x" * 70_000]}, "at most"),
    (deep(MAX_DEPTH), "deep"), (deep(100_000), "deep"), ({"const": 1, "enum": [1]}, "only a type"),
])  # fmt: skip
def test_schemas_that_could_not_be_followed_are_refused_before_they_are_compiled(schema, said):
    with pytest.raises(ValueError, match=said):
        schema_text(schema)
    assert json.loads(schema_text(deep(MAX_DEPTH - 1))) == deep(MAX_DEPTH - 1)


@xgrammar
@pytest.mark.parametrize("schema, said", [
    ({"type": "objec"}, "Unsupported type"), ({"$ref": "#/nope"}, "Cannot find field 'nope'"),
    ({"$ref": "#"}, "Circular"),
    ({"allOf": [{"type": "integer", "minimum": 1}, {"type": "integer", "maximum": 5}]}, "allOf with multiple"),
    ({"oneOf": [{"type": "integer", "minimum": 0}, {"type": "integer", "maximum": 5}]}, "oneOf with overlapping"),
    ({"type": "string", "pattern": "^a+$", "maxLength": 2}, "pattern combined with"),
    ({"type": "number", "multipleOf": 0.5}, "multipleOf is not supported"),
])  # fmt: skip
def test_what_the_compiler_would_leave_out_is_refused(ours, schema, said):
    with pytest.raises(ValueError, match=f"the JSON schema can't be followed: .*{said}"):
        constraints.json_schema(ours, schema)


@xgrammar
def test_compiling_ends_in_time_and_the_next_is_compiled(ours):
    slow = {"type": "object", "properties": {f"property {n}": {"type": "string"} for n in range(900)}}
    constraints.regex(ours, "warm")
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"was not compiled within 0.5 seconds|too much memory"):
        constraints.json_schema(ours, slow, seconds=0.5)
    assert time.perf_counter() - start < 3
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"was not compiled within 0.5 seconds|too much memory"):
        constraints.json_schema(ours, slow, seconds=0.5)
    assert time.perf_counter() - start < 0.2  # it isn't tried again
    assert follows(ours, constraints.regex(ours, "[a-c]+"), ours.text.encode("abc"))


@xgrammar
def test_a_compiler_that_breaks_down_harms_one_request(ours):
    constraints.regex(ours, "begin")
    process = grammars._PROCESS._process
    assert process is not None
    process.kill()
    process.wait()
    assert follows(ours, constraints.regex(ours, "again"), ours.text.encode("again"))


def test_without_xgrammar_the_extra_is_named(ours, monkeypatch):
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    grammars.compiler_of.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mmllm\[constraints\]'"):
        constraints.regex(ours, "a")
    assert follows(ours, constraints.choices(ours, ["red"]), ours.text.encode("red"))
