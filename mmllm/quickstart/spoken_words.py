"""When espeak-ng says each word of a text, from the events that come with its samples.

Events: https://github.com/espeak-ng/espeak-ng/blob/1.52.0/src/include/espeak-ng/speak_lib.h
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from mmllm_tokenizers.alignment import WordTime


class Phoneme(NamedTuple):
    """A phoneme, or a pause, as espeak-ng says it."""

    name: str
    """Of a pause it begins with an underscore."""
    text_place: int
    """Where its word begins in the text, in characters from 0; several words that are pronounced together (as "of the")
    have the first one's."""
    start: float
    """Seconds from the start of espeak-ng's samples."""

    @property
    def is_pause(self) -> bool:
        """Whether nothing is said."""
        return self.name.startswith("_")


class _Group(NamedTuple):
    """Words that are pronounced together, mostly one, and when each of their phonemes starts and the last one ends."""

    words: list[str]
    times: list[float]


def word_times(text: str, phonemes: Sequence[Phoneme]) -> list[WordTime]:
    """When each word of a text is said, words being what stands between spaces.

    A word lasts from its first phoneme to where the next one, or a pause, begins. Its letters share out its phonemes
    evenly: the third of six letters begins with the fourth of nine phonemes. So do words that are pronounced together.

    Raises:
        ValueError: A word has no phoneme of its own, as a dash.
    """
    return [time for group in _groups(text, phonemes) for time in _group_times(group, text)]


def _groups(text: str, phonemes: Sequence[Phoneme]) -> list[_Group]:
    groups: list[_Group] = []
    words = list(re.finditer(r"\S+", text))
    spoken = [phoneme.text_place for phoneme in phonemes if not phoneme.is_pause]
    for word in words:
        own = any(word.start() <= place < word.end() for place in spoken)
        if own or not groups:
            times = [
                (phoneme.start, later.start)
                for phoneme, later in itertools.pairwise(phonemes)
                if not phoneme.is_pause and word.start() <= phoneme.text_place < word.end()
            ]
            groups.append(_Group([], [start for start, _ in times] + [end for _, end in times[-1:]]))
        groups[-1].words.append(word.group())
    return groups


def _group_times(group: _Group, text: str) -> list[WordTime]:
    num_phonemes, num_letters = len(group.times) - 1, sum(map(len, group.words))
    if num_phonemes < len(group.words):
        raise ValueError(f"{' '.join(group.words)!r} in {text!r} has {max(num_phonemes, 0)} phonemes; each word needs "
                         f"one: leave out what is not said")  # fmt: skip
    found, letters_before, first = [], 0, 0
    for place, word in enumerate(group.words):
        letters_before += len(word)
        left = len(group.words) - place - 1
        last = min(max(round(num_phonemes * letters_before / num_letters), first + 1), num_phonemes - left)
        times = group.times[first : last + 1]
        letters = tuple(_between(times, i * (last - first) / len(word)) for i in range(len(word)))
        found.append(WordTime(word, times[0], times[-1], letters))
        first = last
    return found


def _between(times: Sequence[float], place: float) -> float:
    """The time at a place between two of them."""
    before = int(place)
    return times[before] + (times[before + 1] - times[before]) * (place - before)
