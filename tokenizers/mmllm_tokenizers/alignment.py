"""When each word of a text is said: the `words` of a row of speech.

They come from a synthesizer's own events, from `mmllm data align`, or from whoever wrote the manifest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

_KEYS = ("word", "start", "end", "letters", "confidence")
LATE_SECONDS = 0.1
"""By so much words may end behind their sound: codecs drop part of a frame, and aligners round."""


@dataclass(frozen=True)
class WordTime:
    """A word and when it is said, in seconds from the sound's start as it lies in its file."""

    word: str
    start: float
    end: float
    letters: tuple[float, ...] | None = None
    """When each character of the word begins, as the word stands in the text, punctuation included; None: not known."""
    confidence: float | None = None
    """From 0 to 1; None: not known."""

    def letter_starts(self, num_letters: int) -> tuple[float, ...]:
        """When each of so many characters begins: `letters`, or evenly spread where they aren't known."""
        if self.letters is not None and len(self.letters) == num_letters:
            return self.letters
        return tuple(self.start + (self.end - self.start) * i / num_letters for i in range(num_letters))

    def to_json(self) -> dict[str, Any]:
        """What a manifest holds: times in milliseconds' precision, nothing that isn't known."""
        value: dict[str, Any] = {"word": self.word, "start": round(self.start, 3), "end": round(self.end, 3)}
        if self.letters is not None:
            value["letters"] = [round(start, 3) for start in self.letters]
        if self.confidence is not None:
            value["confidence"] = round(self.confidence, 3)
        return value


def text_words(text: str) -> list[str]:
    """The words of a text that are said: what stands between spaces and has a letter or a digit."""
    return [word for word in text.split() if any(map(str.isalnum, word))]


def moved(words: Sequence[WordTime], seconds: float, duration: float) -> list[WordTime]:
    """Words so much later, kept within a sound that lasts `duration` seconds."""
    return [_timed(word, lambda time: min(max(time + seconds, 0.0), duration)) for word in words]


def stretched(words: Sequence[WordTime], factor: float) -> list[WordTime]:
    """Words of a sound that lasts so many times as long."""
    return [_timed(word, lambda time: time * factor) for word in words]


def _timed(word: WordTime, change: Callable[[float], float]) -> WordTime:
    letters = None if word.letters is None else tuple(map(change, word.letters))
    return replace(word, start=change(word.start), end=change(word.end), letters=letters)


def check_end(words: Sequence[WordTime], seconds: float) -> None:
    """Raises ValueError if a word ends more than `LATE_SECONDS` behind a sound that lasts so long."""
    for place, word in enumerate(words):
        if word.end > seconds + LATE_SECONDS:
            raise ValueError(
                f"words[{place}] ({word.word!r}) ends at {word.end:g} s, but the sound lasts {seconds:g} s; give times "
                f"in seconds from the beginning of this sound"
            )


def read_words(value: Any, text: str, name: str, seconds: float | None = None) -> list[WordTime]:
    """The word times of a row, checked against its text.

    There must be as many entries as the text has words (`text_words`), in order. Starts never fall and lie at 0 or
    later, no word ends before it starts, and all times are finite. `letters`, where they are given, are as many as the
    text's word has characters, never fall, and lie within the word.

    Args:
        value: a row's `words`: `[{"word": "red", "start": 0.12, "end": 0.4}, …]`.
        text: the row's text.
        name: how errors call the row.
        seconds: how long the sound lasts, behind which no word may end; None: that isn't looked at.

    Raises:
        ValueError: says what is wrong, and in which row.
    """
    wanted = text_words(text)
    if not isinstance(value, list):
        raise ValueError(f"{name}: 'words' is {_shown(value)}; it must be a list of objects with word, start and end")
    if len(value) != len(wanted):
        raise ValueError(
            f"{name}: 'words' has {len(value)} entries but the text has {len(wanted)} words ({_shown(text)}); give one "
            f"for each word with a letter or a digit, or leave 'words' out (`mmllm data align` finds them)"
        )
    words = [
        _word_time(item, word, f"{name}: words[{place}]")
        for place, (item, word) in enumerate(zip(value, wanted, strict=True))
    ]
    for place in range(1, len(words)):
        if words[place].start < words[place - 1].start:
            raise ValueError(
                f"{name}: words[{place}] starts at {words[place].start} s, before the word in front of it "
                f"({words[place - 1].start} s); give them in the order in which they are said"
            )
    if seconds is not None:
        try:
            check_end(words, seconds)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return words


def _word_time(item: Any, word: str, name: str) -> WordTime:
    if not isinstance(item, dict) or not {"word", "start", "end"} <= item.keys():
        raise ValueError(f"{name} is {_shown(item)}; it must have word, start and end")
    unknown = [key for key in item if key not in _KEYS]
    if unknown:
        raise ValueError(f"{name} has the key {unknown[0]!r}; it may have {', '.join(_KEYS)}")
    if not isinstance(item["word"], str):
        raise ValueError(f"{name} has the word {_shown(item['word'])}; it must be a string")
    start, end = (_number(item[key], key, name) for key in ("start", "end"))
    if start < 0 or end < start:
        raise ValueError(f"{name} lasts from {start} to {end} s; it must start at 0 or later and not end before that")
    confidence = None if item.get("confidence") is None else _number(item["confidence"], "confidence", name)
    if confidence is not None and not 0 <= confidence <= 1:
        raise ValueError(f"{name} has confidence {confidence}; it must lie in [0, 1]")
    letters = None if item.get("letters") is None else _letters(item["letters"], word, start, end, name)
    return WordTime(item["word"], start, end, letters, confidence)


def _letters(value: Any, word: str, start: float, end: float, name: str) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != len(word):
        got = f"{len(value)} letters" if isinstance(value, list) else f"the letters {_shown(value)}"
        raise ValueError(
            f"{name} has {got}; the text's word {word!r} has {len(word)} characters: give a start for each"
        )
    letters = tuple(_number(item, "letter", name) for item in value)
    steps: Sequence[float] = (start, *letters, end)
    if any(later < earlier for earlier, later in itertools.pairwise(steps)):
        raise ValueError(f"{name} has letters at {_shown(value)}; they must rise, within [{start}, {end}]")
    return letters


def _number(value: Any, key: str, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} has the {key} {_shown(value)}; it must be a finite number")
    return float(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
