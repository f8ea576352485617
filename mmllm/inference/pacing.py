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
from mmllm_tokenizers.tempo import Stretch

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

    def earliest(self, number: int) -> float:
        """The first second at which that border may begin, whatever is said next."""
        before = np.flatnonzero((self.words_F <= number) & self.is_letter_F)
        return before[-1].item() / self.frame_rate if len(before) and number >= 0 else 0.0


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
    stream = PacedStream(sample_rate, pace)
    first_T = stream.push(wave_T, said)
    return np.concatenate([first_T, stream.finish(said)]), stream.times(words)


class PacedStream:
    """A sound at a rate, with its rests, as it comes: pieces of any size make the sound that the whole makes.

    Args:
        sample_rate: samples a second.
        pace: whose rate and pauses count.
    """

    def __init__(self, sample_rate: int, pace: Pace):
        self._sample_rate, self._pace = sample_rate, pace
        self._stretch = Stretch(sample_rate, pace.rate)
        self._num_fade = round(_FADE_SECONDS * sample_rate)
        silences = {word: round(pace.pauses[word] * sample_rate) for word in sorted(pace.pauses)}
        self._pending = [(word, num_silent) for word, num_silent in silences.items() if num_silent]
        self._rests: list[_Rest] = []
        self._held_T = np.zeros(0, dtype=np.float32)
        """What is held back of the piece behind the last rest, since it may be faded, or a rest put into it."""
        self._num_given = 0
        """Samples of that piece that went before."""
        self._num_samples = 0

    def push(self, wave_T: np.ndarray, said: Said | None) -> np.ndarray:
        """More of the sound; float32 samples that are final.

        Args:
            wave_T: float32 samples, as the model speaks.
            said: which word each frame says, up to these samples or further; None: nobody knows, and no rest is made.
        """
        return self._with_rests(self._stretch.push(wave_T), said, is_end=False)

    def finish(self, said: Said | None) -> np.ndarray:
        """What remains.

        Args:
            said: which word each frame says, of all frames.
        """
        return self._with_rests(self._stretch.finish(), said, is_end=True)

    def times(self, words: Mapping[int, WordTime]) -> list[WordTime]:
        """When words are said that were at these times before, as far as rests are made.

        Args:
            words: by their number, in order.
        """
        times = dict(zip(words, stretched(list(words.values()), 1 / self._pace.rate), strict=True))
        return _moved(times, self._rests, self._sample_rate) if self._rests else list(times.values())

    def _with_rests(self, wave_T: np.ndarray, said: Said | None, is_end: bool) -> np.ndarray:
        self._held_T = np.concatenate([self._held_T, wave_T])
        self._num_samples += len(wave_T)
        if said is None:
            self._pending.clear()
        elif not is_end:
            said = replace(said, is_whole=False)
        pieces: list[np.ndarray] = []
        while self._pending and said is not None:
            word, num_silent = self._pending[0]
            place = self._place(said, word, is_end)
            if place is None and not is_end:
                break
            del self._pending[0]
            if place is not None:
                pieces += [self._close(place), np.zeros(num_silent, dtype=np.float32)]
                self._rests.append(_Rest(word, place, num_silent))
        return np.concatenate([*pieces, self._open(said, is_end)])

    @property
    def _first_held(self) -> int:
        return self._num_samples - len(self._held_T)

    def _sample(self, second: float) -> int:
        return round(second / self._pace.rate * self._sample_rate)

    def _place(self, said: Said, word: int, is_end: bool) -> int | None:
        """Where a rest is put behind a word; None: that isn't known yet, or the word isn't said."""
        border = said.border(word)
        if border is None or (self._sample(border[1]) >= self._num_samples and not is_end):
            return None
        low, high = (min(self._sample(second), self._num_samples) for second in border)
        low = max(low, self._rests[-1].place if self._rests else 0)
        first = self._first_held
        return first + _quietest(self._held_T, low - first, max(low, high) - first, self._sample_rate)

    def _close(self, place: int) -> np.ndarray:
        """The piece up to a rest, faded out if sound follows."""
        count = place - self._first_held
        num_fade = min(self._num_fade, self._num_given + count)
        piece_T = self._taken(count, num_fade)
        if place < self._num_samples and num_fade:
            assert num_fade <= count, "what is faded out is held back"
            piece_T[-num_fade:] *= _ramp(num_fade)[::-1]
        self._num_given = 0
        return piece_T

    def _open(self, said: Said | None, is_end: bool) -> np.ndarray:
        """What no rest will change of the piece behind the last one."""
        end = self._num_samples
        if self._pending and said is not None:
            word, _ = self._pending[0]
            end = min(end, self._sample((said.border(word) or (said.earliest(word),))[0]) - self._num_fade)
        count = max(0, end - self._first_held)
        is_long = self._num_given + count >= self._num_fade  # so the fade behind a rest is as long as it may be
        if not (is_long or is_end):
            return self._held_T[:0]
        return self._taken(count, min(self._num_fade, self._num_given + count))

    def _taken(self, count: int, num_fade: int) -> np.ndarray:
        """The next samples of the piece, faded in if sound and a rest go before it."""
        piece_T, self._held_T = self._held_T[:count].copy(), self._held_T[count:]
        num_faded = min(max(0, num_fade - self._num_given), count)
        if num_faded and self._rests and self._rests[-1].place > 0:
            piece_T[:num_faded] *= _ramp(num_fade)[self._num_given : self._num_given + num_faded]
        self._num_given += count
        return piece_T


def _ramp(num_samples: int) -> np.ndarray:
    return np.linspace(0.0, 1.0, num_samples, dtype=np.float32)


def _quietest(wave_T: np.ndarray, low: int, high: int, sample_rate: int) -> int:
    """The middle of the quietest piece among samples `[low, high)`; of equals the one in the middle."""
    size = min(round(_QUIET_SECONDS * sample_rate), high - low)
    if size <= 0:
        return low
    powers = np.cumsum(np.r_[0.0, np.square(wave_T[low:high], dtype=np.float64)])
    powers = powers[size:] - powers[:-size]
    quiet = np.flatnonzero(powers <= powers.min() + 1e-12)
    return low + int(quiet[len(quiet) // 2]) + size // 2


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
