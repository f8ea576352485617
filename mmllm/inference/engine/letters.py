"""Where rows that speak are in their texts, and how they move on.

Shapes: B rows, L letters, J advances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm.data.samples.pointers import Pointer
from mmllm.inference.pacing import Pace
from mmllm_tokenizers.alignment import text_words


@dataclass(frozen=True)
class Letters:
    """Of B rows; all tensors on the device."""

    num_letters_B: Tensor
    max_frames_B: Tensor
    """Frames that a letter lasts at most."""
    variations_B: Tensor
    """Of the rows' paces."""
    begun_words_BL: Tensor
    """How many words begin up to each letter."""
    ended_words_BL: Tensor
    """How many words end before each letter, and before the place behind the last one."""
    places_B: Tensor
    ages_B: Tensor
    """Frames before the one that is drawn now that said the same letter."""
    num_bounded_B: Tensor
    said_B: Tensor
    """The letter that the frame which was drawn last says."""
    quantiles_B: Tensor
    log_stay_B: Tensor
    """Log-probability of having stayed since the letter began."""
    log_step_B: Tensor
    """The least log-probability of staying one frame longer since the letter began."""

    @staticmethod
    def of(pointer: Pointer, pace: Pace, frame_rate: float, device: torch.device) -> Letters:
        """One row, where its prompt ends."""
        letters_L = pointer.letters_L[pointer.letters_L >= 0]
        begun_L, ended_L = _word_counts(letters_L)
        zeros_B = torch.zeros(1, dtype=torch.int64, device=device)
        return Letters(
            num_letters_B=zeros_B + len(letters_L),
            max_frames_B=zeros_B + max(1, math.ceil(pace.max_letter_seconds * frame_rate)),
            variations_B=zeros_B.double() + pace.variation,
            begun_words_BL=torch.from_numpy(begun_L)[None].to(device),
            ended_words_BL=torch.from_numpy(ended_L)[None].to(device),
            places_B=zeros_B + int(pointer.places_T[-1]),
            ages_B=zeros_B,
            num_bounded_B=zeros_B,
            said_B=zeros_B,
            quantiles_B=zeros_B.double(),
            log_stay_B=zeros_B.double(),
            log_step_B=zeros_B.double(),
        )

    @staticmethod
    def join(parts: Sequence[Letters]) -> Letters:
        """The rows of all parts, in order."""
        values = {}
        for each in fields(Letters):
            tensors = [getattr(part, each.name) for part in parts]
            if tensors[0].ndim == 2:
                width = max(tensor.shape[1] for tensor in tensors)
                tensors = [F.pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors]
            values[each.name] = torch.cat(tensors)
        return Letters(**values)

    def keep(self, rows: list[int]) -> Letters:
        """These rows alone."""
        return Letters(**{each.name: getattr(self, each.name)[rows] for each in fields(Letters)})

    @property
    def has_ended_B(self) -> Tensor:
        """Whether the pointer has passed the last letter."""
        return self.places_B >= self.num_letters_B

    @property
    def spoken_B(self) -> Tensor:
        """The letter of the frame that is drawn next; behind the last one it goes on."""
        return torch.where(self.has_ended_B, self.said_B, self.places_B)

    def moved(self, logits_BJ: Tensor, uniforms_B: Tensor) -> Letters:
        """Each pointer moved on if its letter has lasted long enough, and pushed where it must move.

        A letter lasts until the probability of having moved on has passed its `quantiles_B`. The longer it has lasted,
        the likelier it ends, as the lengths of speech's sounds have it: a sound that the model missed the end of is
        longer than any that it has learnt from, and what it predicts then is no reason to go on.
        """
        log_BJ = logits_BJ.double().log_softmax(dim=-1)
        is_new_B = self.ages_B == 0
        quantiles_B = torch.where(is_new_B, 0.5 + self.variations_B * (uniforms_B - 0.5), self.quantiles_B)
        step_B = torch.minimum(log_BJ[:, 0], torch.where(is_new_B, 0.0, self.log_step_B))
        stay_B = torch.where(is_new_B, 0.0, self.log_stay_B) + step_B
        lasted_B, places_B1 = self.ages_B + 1, self.places_B.clamp(max=self.begun_words_BL.shape[1] - 1)[:, None]
        is_bounded_B = lasted_B >= self.max_frames_B
        had_ended_B = self.has_ended_B
        wants_B = -torch.expm1(stay_B) > quantiles_B
        moves_B = (wants_B | is_bounded_B) & ~had_ended_B  # behind the end are the later codebooks' last codes
        places_B = self.places_B + torch.where(moves_B, self._steps(log_BJ, places_B1), 0)
        goes_on_B = moves_B & (places_B < self.num_letters_B)
        return replace(
            self,
            places_B=places_B,
            ages_B=torch.where(goes_on_B, 0, lasted_B),
            num_bounded_B=self.num_bounded_B + (is_bounded_B & ~wants_B & ~had_ended_B),
            said_B=torch.where(had_ended_B, self.said_B, self.places_B),
            quantiles_B=quantiles_B,
            log_stay_B=stay_B,
            log_step_B=step_B,
        )

    def _steps(self, log_BJ: Tensor, places_B1: Tensor) -> Tensor:
        """How many letters each moves by, if it moves: the most probable number that passes no whole word."""
        steps_1J = torch.arange(1, log_BJ.shape[1], device=log_BJ.device)[None]
        reached_BJ = torch.minimum(places_B1 + steps_1J, self.num_letters_B[:, None])
        num_lost_BJ = self.ended_words_BL.gather(1, reached_BJ) - self.begun_words_BL.gather(1, places_B1)
        return 1 + log_BJ[:, 1:].masked_fill(num_lost_BJ > 0, -torch.inf).argmax(dim=-1)


def longest_speech(pointer: Pointer, pace: Pace, frame_rate: float) -> int:
    """Frames that a text may last from where its prompt ends, if each letter lasts as long as it may."""
    num_letters = int((pointer.letters_L >= 0).sum()) - int(pointer.places_T[-1])
    return num_letters * max(1, math.ceil(pace.max_letter_seconds * frame_rate))


def _word_counts(letters_L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many words have begun at each letter [L], and have ended before it, [L + 1]; of those that can be said."""
    begun_L = np.zeros(len(letters_L), dtype=np.int64)
    ended_L = np.zeros(len(letters_L) + 1, dtype=np.int64)
    for before, after in pairwise(np.flatnonzero(letters_L == ord(" ")).tolist()):
        word = bytes(letters_L[before + 1 : after].tolist()).decode()
        if text_words(word):  # a dash between two words may be passed: nothing is said there
            begun_L[before + 1 :] += 1
            ended_L[after:] += 1
    return begun_L, ended_L
