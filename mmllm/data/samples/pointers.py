"""Which letter of its text each position of a document speaks of.

Shapes: T tokens, F frames, P positions of frames under the codebook pattern, L letters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmllm.batch import IGNORE, LETTER_GAP
from mmllm_tokenizers.pointer import ages

NO_LETTERS = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Pointer:
    """Which letter of a text each of T positions speaks of; L letters, of one text or of several."""

    letters_L: np.ndarray
    """int64 bytes."""
    places_T: np.ndarray
    """int64: an index into the letters, of the frame that is predicted here; -1: none."""
    ages_T: np.ndarray
    """int64: frames before that one which said the same letter."""
    advances_T: np.ndarray
    """int64: how many letters further the frame behind that one is, at the speech's last frame its end; `IGNORE`."""

    @staticmethod
    def none(num_tokens: int) -> Pointer:
        """Of tokens that speak of nothing."""
        nothing_T = np.full(num_tokens, -1, dtype=np.int64)
        return Pointer(NO_LETTERS, nothing_T, np.zeros_like(nothing_T), np.full_like(nothing_T, IGNORE))

    @staticmethod
    def join(pointers: Sequence[Pointer]) -> Pointer:
        """One after the other: their texts are kept apart, so that no letter has another text's for a neighbour."""
        gap = np.full(LETTER_GAP, -1, dtype=np.int64)
        letters, places, used = [], [], 0
        for pointer in pointers:
            places.append(np.where(pointer.places_T >= 0, pointer.places_T + used, -1))
            if len(pointer.letters_L):
                letters += [pointer.letters_L, gap]
                used += len(pointer.letters_L) + LETTER_GAP
        return Pointer(
            np.concatenate(letters) if letters else NO_LETTERS,
            np.concatenate(places),
            np.concatenate([pointer.ages_T for pointer in pointers]),
            np.concatenate([pointer.advances_T for pointer in pointers]),
        )


def spoken_pointer(letters_L: np.ndarray, pointer_F: np.ndarray, num_positions: int) -> Pointer:
    """The pointer of the positions that predict a sound's frames.

    Args:
        letters_L: of its text.
        pointer_F: the letter that each frame says.
        num_positions: that its frames take under the pattern. Behind the last frame its letter goes on: there the
            later codebooks' codes of earlier frames are predicted.
    """
    num_frames = len(pointer_F)
    places_P = np.pad(pointer_F, (0, num_positions - num_frames), mode="edge")
    advances_P = np.full(num_positions, IGNORE, dtype=np.int64)
    advances_P[:num_frames] = np.diff(pointer_F, append=len(letters_L))
    return Pointer(letters_L, places_P, ages(places_P), advances_P)
