"""A text's letters as labels, where they lie in a sound, and from when to when its words last.

Shapes: S steps of a spectrum (100 a second), M mel bands, F frames (50 a second), L labels (0 blank, 1 space, then
characters).
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torchaudio
from torch import Tensor

from mmllm_tokenizers.alignment import text_words
from mmllm_tokenizers.lexicon import BLANK, SPACE

FRAME_SECONDS = 0.02
SILENCE_DB = 40.0
"""What lies so far below a sound's loudest frame is silent; in a noisy one, what hardly rises above its quietest."""
_PAUSE_SECONDS = 0.09
"""Shorter silences between two words are no pause: lips and tongue are closed before a p, t or k."""
_REACH_SECONDS = 0.4
"""How far beyond its outer letters a word reaches at most, where no other word is near."""


def spelled(word: str, characters: str) -> list[tuple[int, int]]:
    """The labels of a word's characters that are known: (place in the word, label); nothing of punctuation."""
    return [
        (place, characters.index(folded) + SPACE + 1)
        for place, character in enumerate(word)
        for folded in character.casefold()
        if folded in characters
    ]


def said_characters(text: str) -> list[str]:
    """The casefolded letters, digits and marks (accents, vowel signs) of a text, in order."""
    return [folded for folded in text.casefold() if unicodedata.category(folded)[0] in "LNM"]


def frames_needed(labels: Sequence[int]) -> int:
    """Frames that a sound must have for its text: one a label, one more between two equal ones."""
    return len(labels) + sum(one == other for one, other in itertools.pairwise(labels))


def text_labels(text: str, characters: str) -> list[int]:
    """The labels of a text: those of its words, with a space between two of them.

    Raises:
        ValueError: there is no word, or one of them has a character that isn't known.
    """
    unknown = sorted(set(said_characters(text)) - set(characters))
    if unknown:
        raise ValueError(f"its text has {', '.join(map(repr, unknown[:8]))}, which this aligner was not trained on")
    words = [[label for _, label in spelled(word, characters)] for word in text_words(text)]
    if not words:
        raise ValueError("its text has no word that could be said")
    return [label for number, word in enumerate(words) for label in ([SPACE] if number else []) + word]


@dataclass(frozen=True)
class Peak:
    """Where a label of a text lies on the likeliest path."""

    first: int
    last: int
    """Frames."""
    probability: float
    """The highest of its frames."""

    @property
    def middle(self) -> float:
        """Seconds."""
        return (self.first + self.last + 1) / 2 * FRAME_SECONDS


def path_peaks(
    log_probs_FL: Tensor, labels: Sequence[int], blank: int = BLANK, frame_seconds: float = FRAME_SECONDS
) -> list[Peak]:
    """Where each label lies on the likeliest path through all of them.

    Args:
        log_probs_FL: of labels at each frame.
        labels: of the text.
        blank: the label of nothing.
        frame_seconds: that a frame lasts.

    Raises:
        ValueError: the sound is too short for them.
    """
    wanted, num_frames = frames_needed(labels), len(log_probs_FL)
    if num_frames < wanted:
        raise ValueError(f"it lasts {num_frames * frame_seconds:.2f} s; its text needs {wanted * frame_seconds:.2f} s")
    path_1F, scores_1F = torchaudio.functional.forced_align(
        log_probs_FL[None].contiguous(), torch.tensor([list(labels)], dtype=torch.int32), blank=blank
    )
    path, probabilities = path_1F[0].tolist(), scores_1F[0].exp().tolist()
    peaks: list[Peak] = []
    for frame, (label, probability) in enumerate(zip(path, probabilities, strict=True)):
        if label == blank:
            continue
        if frame and path[frame - 1] == label:
            peaks[-1] = Peak(peaks[-1].first, frame, max(peaks[-1].probability, probability))
        else:
            peaks.append(Peak(frame, frame, probability))
    assert len(peaks) == len(labels)
    return peaks


def silent_frames(mel_SM: Tensor) -> np.ndarray:
    """Which frames are silent, bool [F]."""
    power_S = (10 ** (mel_SM.float() / 10)).sum(dim=1)
    level_F = 10 * (power_S.reshape(-1, 2).amax(dim=1) + 1e-10).log10()
    loudest, quiet = float(level_F.max()), float(level_F.quantile(0.05))
    return (level_F < max(loudest - SILENCE_DB, min(quiet + 6, loudest - 15))).numpy()


def word_bounds(
    words: Sequence[Sequence[Peak]], silent_F: np.ndarray, lag_seconds: float = 0.0
) -> list[tuple[float, float]]:
    """(start, end) of each word in seconds.

    Words reach to the pauses around them; where there is none, two words meet halfway between the last letter of one
    and the first letter of the other, `lag_seconds` earlier.

    Args:
        words: the peaks of each one's letters.
        silent_F: which frames are silent.
        lag_seconds: by how much letters are told too late.
    """
    num_frames = len(silent_F)
    starts, ends = [], []
    for number in range(len(words) + 1):
        before = words[number - 1][-1] if number else None
        after = words[number][0] if number < len(words) else None
        first, last = before.last if before else 0, after.first if after else num_frames - 1
        silent = np.flatnonzero(silent_F[first : last + 1]) + first
        if before and after and len(silent) * FRAME_SECONDS < _PAUSE_SECONDS:
            end = start = min(max((before.middle + after.middle) / 2 - lag_seconds, before.middle), after.middle)
        else:
            end = float(silent[0] if len(silent) else num_frames) * FRAME_SECONDS
            start = float(silent[-1] + 1 if len(silent) else 0) * FRAME_SECONDS
        if before:
            ends.append(max(min(end, before.middle + _REACH_SECONDS), before.middle))
        if after:
            starts.append(min(max(start, after.middle - _REACH_SECONDS), after.middle))
    return list(zip(starts, ends, strict=True))


def letter_times(
    word: str, places: Sequence[tuple[int, int]], peaks: Sequence[Peak], start: float, end: float, lag_seconds: float
) -> tuple[float, ...]:
    """When each character of a word begins: halfway between peaks; what is not spelled, with what follows it."""
    begins = [start]
    for one, other in itertools.pairwise(peaks):
        begins.append(min(max((one.middle + other.middle) / 2 - lag_seconds, begins[-1]), end))
    times: list[float] = []
    for place in range(len(word)):
        number = next((number for number, (own, _) in enumerate(places) if own >= place), None)
        times.append(end if number is None else begins[number])
    return tuple(times)
