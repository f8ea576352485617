"""Which letter a frame of speech says: a pointer into the text that only moves on.

A text is spelt as the bytes of its casefolded words with one space between them, before the first and behind the last,
so that silence at both ends has a letter too. What is stored with a sound is when words (or letters) begin, in
seconds; a codec's frames get their letters from that, so one alignment serves codecs of any frame rate.

Given alignments in place of learnt ones: FastSpeech (https://arxiv.org/abs/1905.09263) stretches the text by durations;
here the decoder predicts, frame by frame, how far to advance.

Shapes: L letters, F frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmllm_tokenizers.alignment import WordTime, check_end, text_words

NUM_LETTERS = 256
"""Values of a byte."""


@dataclass(frozen=True)
class PointerRule:
    """How a pointer may move.

    Attributes:
        max_advance: letters that it passes between two frames, at most.
    """

    max_advance: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.max_advance <= 16:
            raise ValueError(f"pointer.max_advance is {self.max_advance}; give 1 to 16 letters a frame")


@dataclass(frozen=True)
class Spelling:
    """The letters of a text.

    Attributes:
        letters_L: int64, bytes.
        words_L: int64, which word of `text.split()` each belongs to, from 0; a space: the word before it, -1 at the
            beginning.
    """

    letters_L: np.ndarray
    words_L: np.ndarray

    @staticmethod
    def of(text: str) -> Spelling:
        """Spells a text.

        Raises:
            ValueError: it says nothing.
        """
        words = _words(text)
        letters, owners = list(b" "), [-1]
        for number, word in enumerate(words):
            spelt = word.casefold().encode() + b" "
            letters += spelt
            owners += [number] * len(spelt)
        return Spelling(np.array(letters, dtype=np.int64), np.array(owners, dtype=np.int64))


def letter_starts(text: str, times: Sequence[WordTime], num_seconds: float) -> np.ndarray:
    """When each letter of `Spelling.of(text)` begins, float64 [L] in seconds, ascending from 0.

    A word's letters are as its time says, or share it evenly; what isn't spoken (a dash between two words) takes none.

    Args:
        text: what is said.
        times: of each word of it that has a letter or a digit.
        num_seconds: of the whole sound.

    Raises:
        ValueError: there are more or fewer times than words, or a word ends behind the sound.
    """
    check_end(times, num_seconds)
    words = _words(text)
    num_spoken = sum(map(_is_spoken, words))
    if num_spoken != len(times):
        raise ValueError(f"the text has {num_spoken} words, but {len(times)} have times; align it again")
    starts, end, rest = [0.0], 0.0, iter(times)
    for word in words:
        characters = (end,) * len(word)
        if _is_spoken(word):
            time = next(rest)
            characters, end = time.letter_starts(len(word)), time.end
        for start, stop, character in zip(characters, [*characters[1:], end], word, strict=True):
            num_bytes = len(character.casefold().encode())  # ß is said as ss
            starts += [start + (stop - start) * i / num_bytes for i in range(num_bytes)]
        starts.append(end)
    return np.maximum.accumulate(np.clip(starts, 0.0, num_seconds))


def _words(text: str) -> list[str]:
    """A text's words, as it has them."""
    if not text_words(text):
        raise ValueError(f"the text {text!r} has no word that can be said; give one with letters or digits")
    return text.split()


def _is_spoken(word: str) -> bool:
    return bool(text_words(word))


def follow(starts_L: np.ndarray, num_frames: int, frame_rate: float, rule: PointerRule) -> np.ndarray:
    """The letter that each frame says, int64 [F]: from the first to the last, never back, never too far at once.

    It is the one that is being said at the middle of the frame, wherever the rule allows that.

    Args:
        starts_L: when each letter begins, in seconds.
        num_frames: of the sound.
        frame_rate: frames a second.
        rule: how it may move.

    Raises:
        ValueError: so few frames can't pass so many letters.
    """
    last = len(starts_L) - 1
    reach = rule.max_advance * (num_frames - 1)
    if last > reach:
        raise ValueError(
            f"{len(starts_L)} letters are said in {num_frames} frames, but a pointer passes {rule.max_advance} a frame "
            f"at most; see whether text and sound belong together, or make the tokenizer folder with a larger "
            f"pointer.max_advance"
        )
    middles_F = (np.arange(num_frames) + 0.5) / frame_rate
    wanted_F = np.searchsorted(starts_L, middles_F, side="right") - 1
    least_F = last - rule.max_advance * np.arange(num_frames - 1, -1, -1)  # or the end is out of reach
    pointer_F = np.zeros(num_frames, dtype=np.int64)
    for frame in range(1, num_frames):
        before = pointer_F[frame - 1]
        pointer_F[frame] = max(least_F[frame], min(max(wanted_F[frame], before), before + rule.max_advance))
    return pointer_F


def ages(pointer_F: np.ndarray) -> np.ndarray:
    """How many frames before it each frame's letter had already been said for, int64 [F]."""
    frames_F = np.arange(len(pointer_F))
    moved_F = np.r_[True, pointer_F[1:] != pointer_F[:-1]] if len(pointer_F) else np.zeros(0, dtype=bool)
    return frames_F - np.maximum.accumulate(np.where(moved_F, frames_F, 0)) if len(pointer_F) else frames_F
