"""Speaks: the units that follow prompts, many at once.

Where the model has a pointer into what is said, it moves on frame by frame from the first letter to the last, and the
speech ends when it has passed that one: nothing is lost or said twice, and a letter lasts so many frames at most.
Without one, speech ends where the model draws its end.

Shapes: B rows, D width, V ids, K codebooks, F frames, P positions of units (frames under the pattern), L letters, J
advances, N prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm.batch import Modality
from mmllm.checkpoints.settings import Sampling
from mmllm.data.samples.documents import Document
from mmllm.inference.generate import Decoding, batches, draw, evaluating, kept_rows, uniforms
from mmllm.inference.pacing import Pace
from mmllm.inference.prompts import SpokenLetters
from mmllm.model.multimodal import MultimodalModel
from mmllm_tokenizers.alignment import text_words
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.patterns import invert_pattern, num_positions
from mmllm_tokenizers.vocab import AUDIO_END

_FIRST_ROOM = 8
"""Frames a letter for which memory is reserved at first."""


@dataclass(frozen=True)
class SpokenUnits:
    """What was said."""

    codes_KF: Tensor
    """int64 on the CPU: the folder's K codebooks, pattern undone."""
    pointer_F: Tensor | None = None
    """int64, which letter of `Spelling.of(text)` each frame says; None: the model has no pointer."""
    num_bounded: int = 0
    """Letters that lasted as long as they may."""
    is_whole: bool = True
    """False: it was stopped, or ran into the bound of frames, before its end."""


def generate_units(
    model: MultimodalModel,
    tokenizer: TokenizerFolder,
    prompts: Sequence[Document],
    sampling: Sampling | Sequence[Sampling],
    max_frames: int | None,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
    pace: Pace | None = None,
    stop: Callable[[], bool] | None = None,
) -> list[SpokenUnits]:
    """Codes of the speech that follows each prompt.

    At every position each codebook can draw its own units alone. Without a pointer the sound ends where codebook 0
    draws `<|audio_end|>`, or under the delay pattern its filler: then the other codebooks finish their last frames. A
    sound has one frame at least.

    Args:
        model: in any mode; it is run in eval mode and left as it was.
        tokenizer: of the model.
        prompts: as `mmllm.data.samples.documents.build_prompt` writes them, or with the frames of a recording behind,
            as many in all prompts, as `mmllm.inference.voices.begin` does: these are gone on from, and left out.
        sampling: how units are drawn, or of each codebook; the first one's seed counts.
        max_frames: at most; None, with a pointer alone: as many as the letters may last.
        batch_size: rows at once; prompts of like length go together.
        progress: called with the number of prompts of each batch that is done.
        pace: how pointers move; its rate and pauses are of the sound (`mmllm.inference.pacing.paced`), not of units.
            None: as the model expects.
        stop: asked before each frame; True ends all that is still spoken.

    Returns:
        For each prompt, in order.

    Raises:
        ValueError: the tokenizer has no audio, or a bound or the number of samplings is wrong.
    """
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames is {max_frames}; it must be at least 1")
    if tokenizer.vocabulary.num_codebooks == 0:
        raise ValueError("the model has no audio units, so it cannot speak; train it with a tokenizer that has a codec")
    samplings = _samplings(sampling, tokenizer.vocabulary.num_codebooks)
    sounds: list[SpokenUnits] = [SpokenUnits(torch.empty(0))] * len(prompts)
    with evaluating(model):
        for rows in batches(prompts, batch_size):
            chosen = [prompts[row] for row in rows]
            letters = _letters(model, chosen, pace or Pace(), tokenizer)
            bound = _bound(letters, max_frames)
            rules = _UnitRules(tokenizer, bound + _num_begun(chosen), model.pointer is not None)
            draws_BPR = _draws(rows, rules, samplings)
            decoding = Decoding(model, chosen, rules.room(letters))
            speech = _Speech(decoding, rows, chosen, rules, samplings, draws_BPR, letters, stop)
            for row, sound in speech.run().items():
                sounds[row] = sound
            if progress:
                progress(len(rows))
    return sounds


def _samplings(sampling: Sampling | Sequence[Sampling], num_codebooks: int) -> list[Sampling]:
    samplings = [sampling] * num_codebooks if isinstance(sampling, Sampling) else list(sampling)
    if len(samplings) != num_codebooks:
        raise ValueError(
            f"there are {len(samplings)} samplings (or temperatures) but the model speaks with {num_codebooks} "
            f"codebooks; give one for all, or one for each"
        )
    return samplings


def _num_begun(prompts: Sequence[Document]) -> int:
    """Positions of units at the end of the prompts: what was said before."""
    counts = set()
    for prompt in prompts:
        is_other_T = prompt.modality_T[::-1] != Modality.UNITS
        counts.add(int(is_other_T.argmax()))
    assert len(counts) == 1, f"prompts go on from {sorted(counts)} frames; batch those alike"
    return counts.pop()


def _bound(letters: _Letters | None, max_frames: int | None) -> int:
    if letters is not None:
        return letters.max_frames if max_frames is None else min(max_frames, letters.max_frames)
    if max_frames is None:
        raise ValueError("the model has no pointer into what it says, so that max_frames must bound its speech")
    return max_frames


def _draws(rows: Sequence[int], rules: _UnitRules, samplings: Sequence[Sampling]) -> Tensor:
    """Numbers in [0, 1) for each codebook and the pointer, [B, P, K + 1], from a row's number and the seed alone."""
    num_draws = rules.num_rows + 1
    drawn = uniforms(rows, rules.max_positions * num_draws, samplings[0].seed)
    return drawn.view(len(rows), rules.max_positions, num_draws)


@dataclass
class _Letters:
    """Where rows are in their texts; all tensors on the device."""

    num_letters_B: Tensor
    max_letter_frames: int
    """Frames that a letter lasts at most."""
    begun_words_BL: Tensor
    """How many words begin up to each letter."""
    ended_words_BL: Tensor
    """How many words end before each letter, and before the place behind the last one."""
    variation: float
    """Of the pace."""
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

    @property
    def max_frames(self) -> int:
        """Of the row that may last longest from here on."""
        return self.max_letter_frames * int((self.num_letters_B - self.places_B).max())

    @property
    def has_ended_B(self) -> Tensor:
        """Whether the pointer has passed the last letter."""
        return self.places_B >= self.num_letters_B

    def move(self, logits_BJ: Tensor, uniforms_B: Tensor) -> None:
        """Moves each pointer on if its letter has lasted long enough, and pushes it where it must move.

        A letter lasts until the probability of having moved on has passed its `quantiles_B`. The longer it has lasted,
        the likelier it ends, as the lengths of speech's sounds have it: a sound that the model missed the end of is
        longer than any that it has learnt from, and what it predicts then is no reason to go on.
        """
        log_BJ = logits_BJ.double().log_softmax(dim=-1)
        is_new_B = self.ages_B == 0
        self.quantiles_B = torch.where(is_new_B, 0.5 + self.variation * (uniforms_B - 0.5), self.quantiles_B)
        step_B = torch.minimum(log_BJ[:, 0], torch.where(is_new_B, 0.0, self.log_step_B))
        stay_B = torch.where(is_new_B, 0.0, self.log_stay_B) + step_B
        lasted_B, places_B1 = self.ages_B + 1, self.places_B.clamp(max=self.begun_words_BL.shape[1] - 1)[:, None]
        is_bounded_B = lasted_B >= self.max_letter_frames
        had_ended_B = self.has_ended_B
        wants_B = -torch.expm1(stay_B) > self.quantiles_B
        moves_B = (wants_B | is_bounded_B) & ~had_ended_B  # behind the end are the later codebooks' last codes
        self.log_stay_B, self.log_step_B = stay_B, step_B
        self.said_B = torch.where(had_ended_B, self.said_B, self.places_B)
        self.num_bounded_B = self.num_bounded_B + (is_bounded_B & ~wants_B & ~had_ended_B)
        self.places_B = self.places_B + torch.where(moves_B, self._steps(log_BJ, places_B1), 0)
        self.ages_B = torch.where(moves_B & ~self.has_ended_B, 0, lasted_B)

    def _steps(self, log_BJ: Tensor, places_B1: Tensor) -> Tensor:
        """How many letters each moves by, if it moves: the most probable number that passes no whole word."""
        steps_1J = torch.arange(1, log_BJ.shape[1], device=log_BJ.device)[None]
        reached_BJ = torch.minimum(places_B1 + steps_1J, self.num_letters_B[:, None])
        num_lost_BJ = self.ended_words_BL.gather(1, reached_BJ) - self.begun_words_BL.gather(1, places_B1)
        return 1 + log_BJ[:, 1:].masked_fill(num_lost_BJ > 0, -torch.inf).argmax(dim=-1)

    def keep(self, rows: list[int]) -> None:
        """Drops all other rows."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[rows])


def _letters(
    model: MultimodalModel, prompts: Sequence[Document], pace: Pace, tokenizer: TokenizerFolder
) -> _Letters | None:
    """The rows at the beginning of their texts; None: the model has no pointer."""
    if model.pointer is None:
        return None
    device = model.decoder.head_weight_VD.device
    num_letters, places, begun, ended = [], [], [], []
    for prompt in prompts:
        assert prompt.pointer is not None, "the tokenizer folder of a model with a pointer has one"
        letters_L = prompt.pointer.letters_L[prompt.pointer.letters_L >= 0]
        places.append(int(prompt.pointer.places_T[-1]))
        num_letters.append(len(letters_L))
        begun_L, ended_L = _word_counts(letters_L)
        begun.append(torch.from_numpy(begun_L))
        ended.append(torch.from_numpy(ended_L))
    zeros_B = torch.zeros(len(prompts), dtype=torch.int64, device=device)
    return _Letters(
        num_letters_B=torch.tensor(num_letters, device=device),
        max_letter_frames=max(1, math.ceil(pace.max_letter_seconds * tokenizer.frame_rate)),
        begun_words_BL=torch.nn.utils.rnn.pad_sequence(begun, batch_first=True).to(device),
        ended_words_BL=torch.nn.utils.rnn.pad_sequence(ended, batch_first=True).to(device),
        variation=pace.variation,
        places_B=torch.tensor(places, device=device),
        ages_B=zeros_B,
        num_bounded_B=zeros_B,
        said_B=zeros_B,
        quantiles_B=zeros_B.double(),
        log_stay_B=zeros_B.double(),
        log_step_B=zeros_B.double(),
    )


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


class _UnitRules:
    """Which codes may stand at which position of units: `mmllm.data.samples.documents` turned round."""

    def __init__(self, tokenizer: TokenizerFolder, max_frames: int, has_pointer: bool) -> None:
        vocabulary = tokenizer.vocabulary
        self.pattern = tokenizer.pattern
        self.num_codebooks = tokenizer.num_codebooks
        self.num_rows = vocabulary.num_codebooks  # 1 when flat
        self.filler = vocabulary.filler
        self.starts = [vocabulary.codebook_start(codebook) for codebook in range(self.num_rows)]
        self.delay = self.num_rows - 1 if self.pattern == "delay" else 0
        self.step = self.num_codebooks if self.pattern == "flatten" else 1
        self.num_first = max_frames * self.step  # positions at which codebook 0 may have a unit
        self.max_positions = num_positions(max_frames, self.num_codebooks, self.pattern)
        self.end_id = self.starts[0] + self.filler if self.delay else tokenizer.id(AUDIO_END)
        self.has_pointer = has_pointer

    def room(self, letters: _Letters | None) -> int:
        """Positions to reserve at first: with a pointer few of those that there may be."""
        if letters is None:
            return self.max_positions
        return min(self.max_positions, _FIRST_ROOM * int(letters.num_letters_B.max()))

    def block(self, position: int) -> tuple[int, int]:
        """First id, and number, of the units that the first row may have: when flat the codebooks take turns."""
        size = self.filler // self.step
        return self.starts[0] + position % self.step * size, size

    def first_logits(self, hidden_BD: Tensor, head_VD: Tensor, position: int) -> Tensor:
        """Logits [B, units + 1] of the first row; the last is that of the end."""
        start, size = self.block(position)
        rows = torch.cat([head_VD[start : start + size], head_VD[self.end_id : self.end_id + 1]])
        logits_BV = F.linear(hidden_BD, rows).float()
        if self.has_pointer or position == 0 or position % self.step:
            logits_BV[:, -1] = -torch.inf
        elif position >= self.num_first:
            logits_BV[:, :-1] = -torch.inf
        return logits_BV


class _Speech:
    """Rows of one batch while they are spoken."""

    def __init__(
        self,
        decoding: Decoding,
        rows: Sequence[int],
        prompts: Sequence[Document],
        rules: _UnitRules,
        samplings: Sequence[Sampling],
        draws_BPR: Tensor,
        letters: _Letters | None,
        stop: Callable[[], bool] | None,
    ) -> None:
        self.decoding = decoding
        self.rows = list(rows)
        self.rules = rules
        self.samplings = samplings
        self.draws_BPR = draws_BPR
        self.letters = letters
        self.stop = stop
        self.first_letters_B: Tensor | None = None
        if letters is not None and decoding.pointer_B is not None:
            self.first_letters_B = decoding.pointer_B - letters.places_B
        self.begun = begun = _num_begun(prompts)
        # A row's positions, each the codes of its codebooks; and the letter that each frame says.
        self.columns: list[list[list[int]]] = [
            prompt.codes_TK[prompt.num_tokens - begun :].tolist() for prompt in prompts
        ]
        self.places: list[list[int]] = [[-1] * begun for _ in rows]
        self.ends: list[int | None] = [None] * len(self.rows)  # how many positions have a unit of codebook 0
        self.done: dict[int, SpokenUnits] = {}

    def run(self) -> dict[int, SpokenUnits]:
        """Speaks to the end of all rows; by the rows' numbers."""
        for position in range(self.begun, self.rules.max_positions):
            is_stopped = self.stop is not None and self.stop()
            if is_stopped and position > self.begun + self.rules.delay:
                break
            codes_BK = self._draw(position)
            is_going = [self._take(place, position, codes) for place, codes in enumerate(codes_BK.tolist())]
            if not any(is_going):
                return self.done
            codes_BK = self._drop(is_going, codes_BK)
            ids_B = codes_BK[:, 0] + self.rules.starts[0]
            self.decoding.advance(ids_B, codes_BK, Modality.UNITS, self._spoken())
        for place, row in enumerate(self.rows):  # the bound, or stopped
            if row not in self.done:
                self._finish(place, is_whole=False)
        return self.done

    def _draw(self, position: int) -> Tensor:
        """The codes [B, K] at one position, fillers where the pattern has them; moves the pointers, notes the ends."""
        rules, hidden_BD = self.rules, self.decoding.hidden_BD
        head_VD = self.decoding.model.decoder.head_weight_VD
        draws_BR = self.draws_BPR[:, position - self.begun].to(hidden_BD.device)
        start, size = rules.block(position)
        first_B = draw(rules.first_logits(hidden_BD, head_VD, position), self.samplings[0], draws_BR[:, 0])
        is_end_B = first_B == size
        has_ended_B = torch.tensor([end is not None for end in self.ends], device=first_B.device) | is_end_B
        columns = [torch.where(has_ended_B, rules.filler, first_B + start - rules.starts[0])]
        for codebook in range(1, rules.num_rows):
            block_start = rules.starts[codebook]
            logits_BV = F.linear(hidden_BD, head_VD[block_start : block_start + rules.filler]).float()
            codes_B = draw(logits_BV, self.samplings[codebook], draws_BR[:, codebook])
            if rules.delay:
                is_filler = [position < codebook or (end is not None and position >= end + codebook)
                             for end in self.ends]  # fmt: skip
                codes_B = codes_B.masked_fill(torch.tensor(is_filler, device=codes_B.device), rules.filler)
            columns.append(codes_B)
        self._note_ends(position, is_end_B, draws_BR[:, -1])
        return torch.stack(columns, dim=1)

    def _note_ends(self, position: int, is_end_B: Tensor, draws_B: Tensor) -> None:
        """Rows whose last frame was before this position, or is this one's where the pointer passes the last letter."""
        if self.letters is None:
            is_end, end = is_end_B.tolist(), position
        else:
            for place, (letter, ended) in enumerate(zip(self.letters.places_B.tolist(), self.ends, strict=True)):
                if ended is None:
                    self.places[place].append(letter)
            pointer = self.decoding.model.pointer
            assert pointer is not None
            self.letters.move(pointer.advance_head(self.decoding.hidden_BD), draws_B)
            is_end, end = self.letters.has_ended_B.tolist(), position + 1
        self.ends = [end if was is None and ends else was for was, ends in zip(self.ends, is_end, strict=True)]

    def _take(self, place: int, position: int, codes: list[int]) -> bool:
        """Appends a row's codes; whether it goes on."""
        if self.rows[place] in self.done:
            return False
        end = self.ends[place]
        num_columns = self.rules.max_positions if end is None else end + self.rules.delay
        if position < num_columns:
            self.columns[place].append(codes)
        if len(self.columns[place]) == num_columns:
            self._finish(place, is_whole=end is not None and (self.letters is not None or end < self.rules.num_first))
            return False
        return True

    def _finish(self, place: int, is_whole: bool) -> None:
        rules = self.rules
        codes_KF = invert_pattern(torch.tensor(self.columns[place]).T, rules.pattern, rules.filler, rules.num_codebooks)
        pointer_F, num_bounded = None, 0
        if self.letters is not None:
            pointer_F = torch.tensor(self.places[place][self.begun : codes_KF.shape[1]])
            num_bounded = int(self.letters.num_bounded_B[place])
        codes_KF = codes_KF[:, self.begun :]
        self.done[self.rows[place]] = SpokenUnits(codes_KF, pointer_F, num_bounded, is_whole)

    def _drop(self, is_going: Sequence[bool], codes_BK: Tensor) -> Tensor:
        """Drops rows that have ended, where there are enough of them; the codes of the others."""
        kept = kept_rows(is_going)
        if kept is None:
            return codes_BK
        self.decoding.keep(kept)
        self.draws_BPR = self.draws_BPR[kept]
        self.rows, self.columns = [self.rows[place] for place in kept], [self.columns[place] for place in kept]
        self.ends, self.places = [self.ends[place] for place in kept], [self.places[place] for place in kept]
        if self.letters is not None and self.first_letters_B is not None:
            self.letters.keep(kept)
            self.first_letters_B = self.first_letters_B[kept]
        return codes_BK[kept]

    def _spoken(self) -> SpokenLetters | None:
        """What is said by the frame that is drawn next; behind the last one its letter goes on."""
        if self.letters is None or self.first_letters_B is None:
            return None
        places_B = torch.where(self.letters.has_ended_B, self.letters.said_B, self.letters.places_B)
        return SpokenLetters(self.decoding.letters_L, self.first_letters_B + places_B, self.letters.ages_B)
