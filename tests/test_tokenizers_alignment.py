import copy
import json
import re

import pytest

from mmllm_tokenizers.alignment import WordTime, moved, read_words, text_words

TEXT = "Put — 2 red, stars"
WORDS = [
    {"word": "put", "start": 0, "end": 0.25},
    {"word": "two", "start": 0.25, "end": 0.25, "confidence": 0.5},
    {"word": "red", "start": 0.4, "end": 0.8, "letters": [0.4, 0.5, 0.6, 0.8]},
    {"word": "stars", "start": 0.7, "end": 1.5, "letters": None, "confidence": None},
]


def test_words_are_what_has_a_letter_or_a_digit():
    assert text_words(TEXT) == ["Put", "2", "red,", "stars"]
    assert text_words(" … ,\n-- ") == [] and text_words("né 它") == ["né", "它"]


def test_words_are_read_and_written():
    words = read_words(WORDS, TEXT, "row 3")
    assert words[0] == WordTime("put", 0.0, 0.25, None, None)
    assert words[1].confidence == 0.5 and words[2].letters == (0.4, 0.5, 0.6, 0.8)
    assert read_words(json.loads(json.dumps([word.to_json() for word in words])), TEXT, "row 3") == words
    assert WordTime("a", 1 / 3, 2 / 3, (1 / 3,), 0.12345).to_json() == {
        "word": "a", "start": 0.333, "end": 0.667, "letters": [0.333], "confidence": 0.123
    }  # fmt: skip
    assert read_words([], " … ", "row 1") == []


def test_letters_that_are_not_known_are_spread():
    word = WordTime("Stars", 1.0, 2.0)
    assert word.letter_starts(5) == pytest.approx((1.0, 1.2, 1.4, 1.6, 1.8))
    assert WordTime("ab", 1.0, 2.0, (1.0, 1.9)).letter_starts(2) == (1.0, 1.9)
    assert word.letter_starts(0) == ()


def test_words_are_moved_within_their_sound():
    red = WordTime("red", 0.1, 0.5, (0.1, 0.2, 0.4), 0.7)
    assert moved([red, WordTime("a", 0.3, 0.4)], -0.2, 0.25) == [
        WordTime("red", 0.0, 0.25, (0.0, 0.0, 0.2), 0.7), WordTime("a", 0.3 - 0.2, 0.2)
    ]  # fmt: skip


def changed(place, **values):
    words = copy.deepcopy(WORDS)
    words[place] |= values
    return words


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"red": 1}, "row 3: 'words' is {'red': 1}; it must be a list"),
        (WORDS[:3], "row 3: 'words' has 3 entries but the text has 4 words"),
        ([*WORDS, WORDS[3]], "row 3: 'words' has 5 entries but the text has 4 words"),
        ([*WORDS[:3], {"word": "stars", "start": 1}], "words[3] is {'word': 'stars', 'start': 1}; it must have"),
        ([*WORDS[:3], "stars"], "words[3] is 'stars'; it must have word, start and end"),
        (changed(1, ends=2), "words[1] has the key 'ends'; it may have word, start, end, letters, confidence"),
        (changed(1, word=2), "words[1] has the word 2; it must be a string"),
        (changed(2, start=0.2), "words[2] starts at 0.2 s, before the word in front of it (0.25 s)"),
        (changed(0, start=-0.1), "words[0] lasts from -0.1 to 0.25 s"),
        (changed(3, end=0.6), "words[3] lasts from 0.7 to 0.6 s"),
        (changed(3, end=float("nan")), "words[3] has the end nan; it must be a finite number"),
        (changed(3, end=float("inf")), "words[3] has the end inf"),
        (changed(3, start="0.7"), "words[3] has the start '0.7'"),
        (changed(3, start=True), "words[3] has the start True"),
        (changed(1, confidence=1.5), "words[1] has confidence 1.5; it must lie in [0, 1]"),
        (changed(2, letters=[0.4, 0.5, 0.6]), "words[2] has 3 letters; the text's word 'red,' has 4 characters"),
        (changed(2, letters="red,"), "words[2] has the letters 'red,'; the text's word"),
        (changed(2, letters=[0.4, 0.6, 0.5, 0.8]), "words[2] has letters at [0.4, 0.6, 0.5, 0.8]; they must rise"),
        (changed(2, letters=[0.3, 0.5, 0.6, 0.8]), "they must rise, within [0.4, 0.8]"),
        (changed(2, letters=[0.4, 0.5, 0.6, 0.9]), "they must rise, within [0.4, 0.8]"),
    ],
)
def test_wrong_words_are_refused_and_the_row_is_named(value, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_words(value, TEXT, "row 3")
    assert str(error.value).startswith("row 3")


def test_no_word_ends_behind_its_sound():
    assert read_words(WORDS, TEXT, "row 3", seconds=1.4) == read_words(WORDS, TEXT, "row 3")
    message = "row 3: words[3] ('stars') ends at 1.5 s, but the sound lasts 1.39 s; give times in seconds"
    with pytest.raises(ValueError, match=re.escape(message)):
        read_words(WORDS, TEXT, "row 3", seconds=1.39)
