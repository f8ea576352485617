"""Texts told piece by piece, against `decode` of all ids, for tokenizers of all kinds."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordLevel

from mmllm.inference.engine.text_stream import MAX_STOP_CHARACTERS, TextStream
from mmllm.inference.engine.token_texts import TokenTexts, token_texts
from mmllm.interop.tokenizers import read_tokenizer
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.text import ForeignText, TextTokenizer
from mmllm_tokenizers.vocab import SPECIAL_TOKENS
from tests.inference_fixtures import make_tokenizer
from tests.pretrained_fixtures import saved_kind, strings

WORDS = (
    "▁", "▁▁", "a", "▁a", "b", "ab", "▁red", "<0x20>", "<0xE4>", "<0xBD>", "<0xA0>", "<0xFF>", "<0xff>", "é", "##b",
    ".", "", " ", "Ġa", "你", "▁▁b", "n't",
)  # fmt: skip
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
MADE = {
    "llama": decoders.Sequence([*LLAMA, decoders.Strip(" ", 1, 0)]),
    "gemma": decoders.Sequence(LLAMA),
    "two spaces": decoders.Sequence([*LLAMA, decoders.Strip(" ", 2, 0)]),
    "metaspace": decoders.Metaspace(),
    "never": decoders.Metaspace(prepend_scheme="never"),
    "bytes and metaspace": decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback()]),
    "word pieces": decoders.WordPiece(),
    "byte level": decoders.ByteLevel(),
    "no decoder": None,
}


def made(decoder) -> TokenizerFolder:
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="a"))
    if decoder is not None:
        tokenizer.decoder = decoder
    num = len(WORDS)
    foreign = ForeignText(num + len(SPECIAL_TOKENS), {name: num + n for n, name in enumerate(SPECIAL_TOKENS)})
    return TokenizerFolder(TextTokenizer(tokenizer, foreign))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    found = {"ours": make_tokenizer(), **{name: made(decoder) for name, decoder in MADE.items()}}
    for kind in ("byte_level", "byte_fallback", "unigram"):
        folder = tmp_path_factory.mktemp(kind)
        theirs = saved_kind(kind, folder)
        found[f"imported {kind}"] = TokenizerFolder(read_tokenizer(folder, len(theirs) + 7).text)
    return found


KINDS = ["ours", *MADE, "imported byte_level", "imported byte_fallback", "imported unigram"]


def cut(text, stop):
    """Before the string that is whole first; of several that end there the longest."""
    for end in range(len(text) + 1):
        ended = [each for each in stop if text[:end].endswith(each)]
        if ended:
            longest = max(ended, key=len)
            return text[: end - len(longest)], longest
    return text, None


@st.composite
def pushes(draw, tokenizer):
    """Random ids, bytes and what a text gives, in random parts."""
    num = tokenizer.vocabulary.size
    random_ids = st.lists(st.integers(-1, num + 2), max_size=12)
    text_ids = st.sampled_from(strings(60, seed=2)).map(tokenizer.text.encode)
    few = st.lists(st.sampled_from(draw(st.lists(st.integers(0, num - 1), min_size=1, max_size=3))), max_size=10)
    ids = [i for part in draw(st.lists(st.one_of(random_ids, text_ids, few), max_size=4)) for i in part]
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    if draw(st.booleans()):
        cuts = list(range(len(ids)))
    return ids, [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_pieces_are_the_text_before_its_first_stop(tokenizers, kind, data):
    tokenizer = tokenizers[kind]
    ids, parts = data.draw(pushes(tokenizer))
    whole = tokenizer.text.decode(ids)
    inside = st.tuples(st.integers(0, max(len(whole) - 1, 0)), st.integers(1, 4)).map(
        lambda p: whole[p[0] : p[0] + p[1]]
    )
    stop = tuple(data.draw(st.lists(st.one_of(inside.filter(bool), st.text(min_size=1, max_size=3)), max_size=4)))
    stop = stop if whole else ()
    stream = TextStream(tokenizer, stop)
    pieces = [stream.push(part) for part in parts]
    so_far = "".join(pieces)
    assert stream.text == so_far
    pieces.append(stream.finish())
    wanted, stopped = cut(whole, stop)
    assert ("".join(pieces), stream.text, stream.stopped) == (wanted, wanted, stopped)
    assert stream.finish() == "" and "".join(pieces) == wanted


@pytest.mark.parametrize("kind", ["ours", "imported byte_level", "imported byte_fallback", "imported unigram"])
def test_what_is_certain_is_told_at_once(tokenizers, kind):
    tokenizer = tokenizers[kind]
    stream = TextStream(tokenizer, ("ooo",))
    given = ""
    ids = tokenizer.text.encode("a red circle he said: one, two")
    for number, token_id in enumerate(ids):
        given += stream.push([token_id])
        wanted = tokenizer.text.decode(ids[: number + 1])
        assert given == (wanted if not wanted.endswith("o") else wanted[:-1])
    assert stream.finish() == "o"


def test_characters_are_whole_and_stops_are_held_back():
    tokenizer = make_tokenizer()
    ids = tokenizer.text.encode("a 你!")
    assert len(ids) >= 5
    stream = TextStream(tokenizer)
    pieces = [stream.push([i]) for i in ids]
    assert "".join(pieces) == "a 你!" and "你" in pieces and "" in pieces
    broken = TextStream(tokenizer)
    assert broken.push(ids[:-2]).rstrip() == "a" and broken.finish() == "\ufffd"
    stream = TextStream(tokenizer, ("one, two",))
    assert stream.push(tokenizer.text.encode("he said one, ")) == "he said "
    assert stream.push(tokenizer.text.encode("one")) == "one, "
    assert stream.push(tokenizer.text.encode(", two, three")) == "" and stream.stopped == "one, two"
    assert stream.push(tokenizer.text.encode("more")) == "" and stream.finish() == "" and stream.text == "he said one, "


def test_a_stop_within_the_beginning_of_another_is_met():
    tokenizer = make_tokenizer()
    ids = tokenizer.text.encode("a red circle two")
    for stop in (
        ("red circle above", "circle"),
        ("circle", "red circle above"),
        ("ircle", "red circle", "red circlet"),
    ):
        stream = TextStream(tokenizer, stop)
        text = "".join([stream.push([i]) for i in ids]) + stream.finish()
        assert (text, stream.stopped) == cut("a red circle two", stop)


def test_thousands_of_stops_and_long_texts_cost_little():
    tokenizer = make_tokenizer()
    stop = tuple(f"stop number {number:05d}!" for number in range(3000))
    ids = tokenizer.text.encode("stop number 0299 a red circle " * 700)
    assert len(ids) > 5000

    def seconds(ids, stop):
        start = time.perf_counter()
        stream = TextStream(tokenizer, stop)
        for token_id in ids:
            stream.push([token_id])
        stream.finish()
        return time.perf_counter() - start

    assert seconds(ids, stop) < 2
    held = tokenizer.text.encode("a" * 4000)
    assert seconds(held, ("a" * 60_000, "b")) < 2
    with pytest.raises(ValueError, match="stop strings have"):
        TextStream(tokenizer, ("a" * MAX_STOP_CHARACTERS, "b"))
    with pytest.raises(ValueError, match="empty"):
        TextStream(tokenizer, ("a", ""))


@pytest.mark.parametrize("kind", KINDS)
def test_first_and_later_ids_add_what_decode_says(tokenizers, kind):
    tokenizer = tokenizers[kind]
    texts = token_texts(tokenizer.text)
    assert token_texts(tokenizer.text) is texts
    letter = next(i for i in range(texts.num_tokens) if tokenizer.text.decode([i]) == "a")
    for token_id in range(tokenizer.vocabulary.num_text):
        if kind != "byte level" and not texts.is_byte(token_id):
            assert texts.first(token_id).decode(errors="replace") == tokenizer.text.decode([token_id])
            assert "a" + texts.middle(token_id).decode(errors="replace") == tokenizer.text.decode([letter, token_id])
        if texts.is_dropped(token_id):
            assert texts.first(token_id) == texts.middle(token_id) == b""


@pytest.mark.parametrize("decoder", [
    decoders.BPEDecoder(), decoders.CTC(), decoders.Sequence([*LLAMA, decoders.Strip(" ", 1, 1)]),
    decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
    decoders.Sequence([decoders.ByteFallback(), decoders.Replace(" ", "_")]),
])  # fmt: skip
def test_texts_that_change_behind_are_refused_by_name(decoder):
    with pytest.raises(ValueError, match="can't be told piece by piece"):
        TokenTexts(made(decoder).text)


def test_a_byte_level_token_beyond_its_letters_is_its_characters():
    tokenizer = Tokenizer(BPE({"Ġ你": 0, "é": 1, "a": 2}, []))
    tokenizer.decoder = decoders.ByteLevel()
    text = TextTokenizer(
        tokenizer, ForeignText(3 + len(SPECIAL_TOKENS), {n: 3 + i for i, n in enumerate(SPECIAL_TOKENS)})
    )
    texts = token_texts(text)
    assert (texts.middle(0).decode(), texts.middle(1)) == ("Ġ你", b"\xe9") and text.decode([0, 2]) == "Ġ你a"
