"""Speech at the user's pace: how pointers move, how fast the sound is, and where it rests.

The model speaks at the pace that it has learnt; faster and slower speech is its sound, stretched in time, and a rest is
silence between two words: neither asks the model for what it never heard.

Shapes: F frames, L letters, T samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mmllm_tokenizers.alignment import WordTime, stretched
from mmllm_tokenizers.pointer import Spelling
from mmllm_tokenizers.tempo import at_rate

MIN_RATE, MAX_RATE = 0.25, 4.0
_FADE_SECONDS = 0.005
"""Before and behind a rest, so that nothing clicks."""
_QUIET_SECONDS = 0.01
"""A rest begins in the middle of the quietest such piece between two words."""


@dataclass(frozen=True)
class Pace:
    """How a text is paced.

    Attributes:
        rate: 2 speaks twice as fast as the model would: the sound is stretched, its pitch stays.
        pauses: seconds of silence put in behind words, by their number from 0 (of `text.split()`), -1: before the
            first. They are as long at any rate.
        max_letter_seconds: a letter lasts so long at most, at the model's own rate; how often it would have lasted
            longer is counted.
        variation: how much the time that a letter takes is left to chance: 0, the median of what the model expects; 1,
            drawn from it.
    """

    rate: float = 1.0
    pauses: Mapping[int, float] = field(default_factory=dict)
    max_letter_seconds: float = 0.6
    variation: float = 0.0

    def __post_init__(self) -> None:
        if not MIN_RATE <= self.rate <= MAX_RATE:
            raise ValueError(f"rate is {self.rate}; give {MIN_RATE} to {MAX_RATE:g}")
        if not (math.isfinite(self.max_letter_seconds) and self.max_letter_seconds > 0):
            raise ValueError(f"max_letter_seconds is {self.max_letter_seconds}; it must be positive")
        if not 0 <= self.variation <= 1:
            raise ValueError(f"variation is {self.variation}; give 0 to 1")
        for word, seconds in self.pauses.items():
            if not (math.isfinite(seconds) and seconds >= 0):
                raise ValueError(f"pauses[{word}] is {seconds}; give seconds, 0 or more")

    def check(self, text: str) -> None:
        """Raises ValueError if a pause stands behind no word of a text."""
        num_words = len(text.split())
        for word in self.pauses:
            if not -1 <= word < num_words:
                raise ValueError(
                    f"pauses[{word}] stands behind no word; the text {text!r} has words 0 to {num_words - 1}"
                )


@dataclass(frozen=True)
class Said:
    """Which word each frame says.

    Attributes:
        words_F: int64, of `text.split()`; a space: the word before it.
        is_letter_F: False where a space is said.
        frame_rate: frames a second.
        is_whole: whether the text is said to its end.
    """

    words_F: np.ndarray
    is_letter_F: np.ndarray
    frame_rate: float
    is_whole: bool

    @staticmethod
    def of(pointer_F: np.ndarray, text: str, num_before: int, frame_rate: float, is_whole: bool) -> Said:
        """What a pointer into a text says, whose first `num_before` words are no part of it."""
        spelling = Spelling.of(text)
        is_letter_L = spelling.letters_L != ord(" ")
        return Said(spelling.words_L[pointer_F] - num_before, is_letter_L[pointer_F], frame_rate, is_whole)

    def word(self, number: int) -> tuple[float, float] | None:
        """When a word is said, in seconds; None: it isn't."""
        frames = np.flatnonzero((self.words_F == number) & self.is_letter_F)
        if not len(frames):
            return None
        return frames[0].item() / self.frame_rate, (frames[-1].item() + 1) / self.frame_rate

    def border(self, number: int) -> tuple[float, float] | None:
        """From the last frame of a word to the end of the first one of the next, in seconds; None: that isn't said.

        Before the first word it is the beginning of the sound, behind the last one its end.
        """
        end = len(self.words_F) / self.frame_rate
        before = np.flatnonzero((self.words_F <= number) & self.is_letter_F)
        after = np.flatnonzero((self.words_F > number) & self.is_letter_F)
        if not len(after):
            return (end, end) if self.is_whole else None
        if not len(before) or number < 0:
            return 0.0, 0.0
        return before[-1].item() / self.frame_rate, (after[0].item() + 1) / self.frame_rate


@dataclass(frozen=True)
class _Rest:
    """Silence behind a word."""

    word: int
    place: int
    """Which sample it is put in before."""
    num_silent: int


def paced(
    wave_T: np.ndarray, sample_rate: int, words: Mapping[int, WordTime], said: Said, pace: Pace
) -> tuple[np.ndarray, list[WordTime]]:
    """A sound at a rate, with its rests, and when its words are said then.

    What is heard up to a rest belongs to the word before it, what is heard behind it to the next.

    Args:
        wave_T: float32 samples, as the model speaks.
        sample_rate: samples a second.
        words: when words are said in it, by their number of `text.split()`, in order.
        said: which word each of its frames says.
        pace: whose rate and pauses count.
    """
    wave_T = at_rate(wave_T, sample_rate, pace.rate)
    times = dict(zip(words, stretched(list(words.values()), 1 / pace.rate), strict=True))
    rests = _rests(wave_T, sample_rate, said, pace)
    if not rests:
        return wave_T, list(times.values())
    pieces: list[np.ndarray] = []
    begins = [0, *(rest.place for rest in rests)]
    for rest, begin in zip(rests, begins, strict=False):
        pieces += [
            _faded(wave_T[begin : rest.place], sample_rate, begin > 0, rest.place < len(wave_T)),
            np.zeros(rest.num_silent, dtype=wave_T.dtype),
        ]
    pieces.append(_faded(wave_T[begins[-1] :], sample_rate, begins[-1] > 0, False))
    return np.concatenate(pieces), _moved(times, rests, sample_rate)


def _rests(wave_T: np.ndarray, sample_rate: int, said: Said, pace: Pace) -> list[_Rest]:
    rests: list[_Rest] = []
    for word in sorted(pace.pauses):
        border, num_silent = said.border(word), round(pace.pauses[word] * sample_rate)
        if border is not None and num_silent:
            low, high = (min(round(second / pace.rate * sample_rate), len(wave_T)) for second in border)
            low = max([low, *(rest.place for rest in rests)])
            rests.append(_Rest(word, _quietest(wave_T, low, max(low, high), sample_rate), num_silent))
    return rests


def _quietest(wave_T: np.ndarray, low: int, high: int, sample_rate: int) -> int:
    """The middle of the quietest piece among samples `[low, high)`; of equals the one in the middle."""
    size = min(round(_QUIET_SECONDS * sample_rate), high - low)
    if size <= 0:
        return low
    powers = np.cumsum(np.r_[0.0, np.square(wave_T[low:high], dtype=np.float64)])
    powers = powers[size:] - powers[:-size]
    quiet = np.flatnonzero(powers <= powers.min() + 1e-12)
    return low + int(quiet[len(quiet) // 2]) + size // 2


def _faded(wave_T: np.ndarray, sample_rate: int, at_beginning: bool, at_end: bool) -> np.ndarray:
    ramp = np.linspace(0.0, 1.0, min(round(_FADE_SECONDS * sample_rate), len(wave_T)), dtype=wave_T.dtype)
    wave_T = wave_T.copy()
    if at_beginning:
        wave_T[: len(ramp)] *= ramp
    if at_end and len(ramp):
        wave_T[-len(ramp) :] *= ramp[::-1]
    return wave_T


def _moved(times: Mapping[int, WordTime], rests: Sequence[_Rest], sample_rate: int) -> list[WordTime]:
    """Words behind rests later by them; those beside a rest reach up to it."""
    numbers, moved = list(times), []
    for before, number, after in zip([-2, *numbers], numbers, [*numbers[1:], math.inf], strict=False):
        time = times[number]
        ahead = [rest.place / sample_rate for rest in rests if before <= rest.word < number]
        behind = [rest.place / sample_rate for rest in rests if number <= rest.word < after]
        start, end = (ahead or [time.start])[-1], (behind or [time.end])[0]
        later = sum(rest.num_silent for rest in rests if rest.word < number) / sample_rate
        moved.append(replace(time, start=start + later, end=end + later))
    return moved
