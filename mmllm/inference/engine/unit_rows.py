"""Rows that speak: which units each frame has, and where each speech ends.

Where the model has a pointer into what is said, it moves on frame by frame from the first letter to the last, and the
speech ends when it has passed that one: nothing is lost or said twice, and a letter lasts so many frames at most.
Without one, speech ends where the model draws its end: codebook 0 draws `<|audio_end|>`, or under the delay pattern its
filler, and the other codebooks finish their last frames. A sound has one frame at least.

Shapes: B rows, D width, V ids, K codebooks, R of them at one position (1 when flat), F frames, P positions of units
(frames under the pattern), L letters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm.batch import LETTER_GAP, Modality
from mmllm.checkpoints.settings import Sampling
from mmllm.data.samples.document import Document
from mmllm.inference.engine.filters import Filters, draw_each
from mmllm.inference.engine.letters import Letters, longest_speech
from mmllm.inference.engine.requests import SpeechRequest, SpokenUnits, UnitsUpdate
from mmllm.model.multimodal import MultimodalModel
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.patterns import invert_pattern, num_positions
from mmllm_tokenizers.vocab import AUDIO_END


class UnitRules:
    """Which codes may stand at which position of units: `mmllm.data.samples.documents` turned round."""

    def __init__(self, tokenizer: TokenizerFolder, has_pointer: bool) -> None:
        vocabulary = tokenizer.vocabulary
        self.pattern = tokenizer.pattern
        self.num_codebooks = tokenizer.num_codebooks
        self.num_rows = vocabulary.num_codebooks  # 1 when flat
        self.filler = vocabulary.filler
        self.starts = [vocabulary.codebook_start(codebook) for codebook in range(self.num_rows)]
        self.delay = self.num_rows - 1 if self.pattern == "delay" else 0
        self.step = self.num_codebooks if self.pattern == "flatten" else 1
        self.end_id = self.starts[0] + self.filler if self.delay else tokenizer.id(AUDIO_END)
        self.frame_rate = tokenizer.frame_rate
        self.has_pointer = has_pointer

    def block(self, phase: int) -> tuple[int, int]:
        """First id, and number, of the units that the first row may have: when flat the codebooks take turns."""
        size = self.filler // self.step
        return self.starts[0] + phase * size, size


def samplings_of(request: SpeechRequest, num_codebooks: int) -> tuple[Sampling, ...]:
    """One for each codebook.

    Raises:
        ValueError: there are neither one nor as many.
    """
    given = request.samplings
    if len(given) == 1:
        return given * num_codebooks
    if len(given) != num_codebooks:
        raise ValueError(
            f"there are {len(given)} samplings (or temperatures) but the model speaks with {num_codebooks} "
            f"codebooks; give one for all, or one for each"
        )
    return given


def num_begun(prompt: Document) -> int:
    """Positions of units at a prompt's end: what was said before."""
    return int((prompt.modality_T[::-1] != Modality.UNITS).argmax())


class UnitRow:
    """One row that speaks, as far as the host knows it.

    Args:
        request: what is to be said.
        rules: of the model's units.

    Raises:
        ValueError: samplings and codebooks differ in number, or nothing bounds the speech.
    """

    def __init__(self, request: SpeechRequest, rules: UnitRules) -> None:
        prompt = request.prompt
        self.request = request
        self.rules = rules
        samplings = samplings_of(request, rules.num_rows)
        self.filters = [Filters.of(sampling) for sampling in samplings]
        bound = request.max_frames
        if rules.has_pointer:
            assert prompt.pointer is not None, "the tokenizer folder of a model with a pointer has one"
            longest = longest_speech(prompt.pointer, request.pace, rules.frame_rate)
            bound = longest if bound is None else min(bound, longest)
        if bound is None:
            raise ValueError("the model has no pointer into what it says, so that max_frames must bound its speech")
        self.begun = num_begun(prompt)
        max_frames = bound + self.begun
        self.num_first = max_frames * rules.step  # positions at which codebook 0 may have a unit
        self.max_positions = num_positions(max_frames, rules.num_codebooks, rules.pattern)
        self.draws_PR = _draws(request.number, self.max_positions, rules.num_rows + 1, samplings[0].seed)
        self.columns: list[list[int]] = prompt.codes_TK[prompt.num_tokens - self.begun :].tolist()
        """Its positions, each the codes of its codebooks."""
        self.places: list[int] = [-1] * self.begun
        """The letter that each frame says."""
        self.logprobs: list[float] = []
        """Of the positions that were drawn, where they are asked for."""
        self.end: int | None = None
        """How many positions have a unit of codebook 0."""
        self.position = self.begun
        self._num_told = self.begun

    @property
    def num_new(self) -> int:
        """Positions that were drawn."""
        return self.position - self.begun

    @property
    def has_frame(self) -> bool:
        """Whether a frame is whole."""
        return len(self.columns) - self.begun >= self.rules.delay + self.rules.step

    def take(self, codes: list[int]) -> bool:
        """Appends the codes of a position; whether the row goes on."""
        end, position = self.end, self.position
        num_columns = self.max_positions
        if end is not None:  # the pointer may pass the last letter too late for the later codebooks' codes
            num_columns = min(num_columns, end + self.rules.delay)
        if position < num_columns:
            self.columns.append(codes)
        self.position += 1
        return len(self.columns) < num_columns

    def update(self) -> UnitsUpdate | None:
        """The frames that have become whole since the last one; None: there are none."""
        rules = self.rules
        num_whole = (len(self.columns) - rules.delay) // rules.step
        if num_whole <= self._num_told:
            return None
        columns = self.columns[self._num_told * rules.step : num_whole * rules.step + rules.delay]
        codes_KF = invert_pattern(torch.tensor(columns).T, rules.pattern, rules.filler, rules.num_codebooks)
        pointer_F = torch.tensor(self.places[self._num_told : num_whole]) if rules.has_pointer else None
        self._num_told = num_whole
        return UnitsUpdate(codes_KF, pointer_F)

    def result(self, num_bounded: int) -> SpokenUnits:
        """What was said."""
        rules = self.rules
        columns_KP = torch.tensor(self.columns, dtype=torch.int64).view(-1, rules.num_rows).T
        codes_KF = invert_pattern(columns_KP, rules.pattern, rules.filler, rules.num_codebooks)
        is_ended = self.end is not None and len(self.columns) == self.end + rules.delay
        is_whole = is_ended and (rules.has_pointer or self.end < self.num_first)  # pyright: ignore
        pointer_F = None
        if rules.has_pointer:
            pointer_F = torch.tensor(self.places[self.begun : codes_KF.shape[1]], dtype=torch.int64)
        logprobs = None
        if self.request.logprobs:  # behind an end may lie positions that were drawn in vain
            logprobs = tuple(self.logprobs[: len(self.columns) - self.begun])
        return SpokenUnits(codes_KF[:, self.begun :], pointer_F, num_bounded, is_whole, logprobs)


@dataclass(frozen=True)
class UnitInputs:
    """What rows' new positions hold."""

    codes_BK: Tensor
    letters_L: Tensor | None
    """As `PackedBatch.letters_L`, of all rows; None: the model has no pointer."""
    places_B: Tensor | None
    ages_B: Tensor | None


@dataclass(frozen=True)
class ParkedUnits:
    """A row that was taken out while it speaks."""

    row: UnitRow
    letters: Letters | None
    codes_1K: Tensor


class UnitRows:
    """All rows that speak now, each at its own position.

    Args:
        model: whose.
        rules: of its units.
        head_VD: the head's rows.
    """

    def __init__(self, model: MultimodalModel, rules: UnitRules, head_VD: Tensor) -> None:
        self.model = model
        self.rules = rules
        self.head_VD = head_VD
        self._first_weights: dict[int, Tensor] = {}
        self.rows: list[UnitRow] = []
        self.letters: Letters | None = None
        self._codes_BK: Tensor | None = None
        """What was drawn last."""
        self._letters_L: Tensor | None = None
        self._first_letters_B: Tensor | None = None

    def add(self, rows: Sequence[UnitRow]) -> None:
        """Rows whose prompts are computed, behind the others."""
        self.rows += rows
        if self.rules.has_pointer:
            device = self.head_VD.device
            new = [
                Letters.of(row.request.prompt.pointer, row.request.pace, self.rules.frame_rate, device)  # pyright: ignore
                for row in rows
            ]
            self.letters = Letters.join(new if self.letters is None else [self.letters, *new])
            self._lay_out_letters()

    def keep(self, places: list[int]) -> None:
        """Drops all other rows."""
        self.rows = [self.rows[place] for place in places]
        self._codes_BK = self._codes_BK[places] if self._codes_BK is not None and places else None
        if self.letters is not None:
            self.letters = self.letters.keep(places) if places else None
            self._lay_out_letters()

    def take_out(self, place: int) -> ParkedUnits:
        """Drops one row, which can be put back."""
        assert self._codes_BK is not None
        letters = None if self.letters is None else self.letters.keep([place])
        parked = ParkedUnits(self.rows[place], letters, self._codes_BK[place : place + 1])
        self.keep([each for each in range(len(self.rows)) if each != place])
        return parked

    def put_back(self, parked: ParkedUnits) -> None:
        """A row that was taken out, behind the others."""
        self.rows.append(parked.row)
        codes = [parked.codes_1K] if self._codes_BK is None else [self._codes_BK, parked.codes_1K]
        self._codes_BK = torch.cat(codes)
        if parked.letters is not None:
            parts = [parked.letters] if self.letters is None else [self.letters, parked.letters]
            self.letters = Letters.join(parts)
            self._lay_out_letters()

    def _lay_out_letters(self) -> None:
        """All rows' letters one behind the other, apart, so that none has another text's for a neighbour."""
        if self.letters is None:
            self._letters_L = self._first_letters_B = None
            return
        parts, firsts, used = [], [], 0
        for row in self.rows:
            letters_L = torch.from_numpy(row.request.prompt.pointer.letters_L)  # pyright: ignore
            parts.append(F.pad(letters_L, (0, LETTER_GAP), value=-1))
            firsts.append(used)
            used += len(parts[-1])
        device = self.head_VD.device
        self._letters_L = torch.cat(parts).to(device)
        self._first_letters_B = torch.tensor(firsts, device=device)

    def num_bounded(self, place: int) -> int:
        """Letters of a row that lasted as long as they may."""
        return 0 if self.letters is None else int(self.letters.num_bounded_B[place])

    def draw(self, hidden_BD: Tensor) -> Tensor:
        """The codes [B, R] at each row's next position, fillers where the pattern has them.

        Moves the pointers and notes which rows end.
        """
        rules, rows, device = self.rules, self.rows, hidden_BD.device
        draws_BR = torch.stack([row.draws_PR[row.position - row.begun] for row in rows]).to(device)
        logprobs_B = None
        if any(row.request.logprobs for row in rows):
            logprobs_B = torch.zeros(len(rows), dtype=torch.float64, device=device)
        first_B, is_end_B = self._draw_first(hidden_BD, draws_BR[:, 0], logprobs_B)
        columns = [first_B]
        for codebook in range(1, rules.num_rows):
            start = rules.starts[codebook]
            logits_BV = F.linear(hidden_BD, self.head_VD[start : start + rules.filler]).float()
            filters = [row.filters[codebook] for row in rows]
            codes_B = draw_each(logits_BV, filters, draws_BR[:, codebook])
            if rules.delay:
                is_filler = [
                    row.position < codebook or (row.end is not None and row.position >= row.end + codebook)
                    for row in rows
                ]
                codes_B = codes_B.masked_fill(torch.tensor(is_filler, device=device), rules.filler)
            if logprobs_B is not None:
                logprobs_B += _log_probabilities(logits_BV, torch.where(codes_B < rules.filler, codes_B, -1))
            columns.append(codes_B)
        if logprobs_B is not None:
            for row, logprob in zip(rows, logprobs_B.tolist(), strict=True):
                row.logprobs.append(logprob)
        self._note_ends(hidden_BD, is_end_B, draws_BR[:, -1])
        self._codes_BK = torch.stack(columns, dim=1)
        return self._codes_BK

    def _draw_first(
        self, hidden_BD: Tensor, draws_B: Tensor, logprobs_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Codes of codebook 0 (of a flat stream: of the codebook whose turn it is), and which rows end here.

        Where there are `logprobs_B`, those of what was drawn are added to them.
        """
        rules, rows = self.rules, self.rows
        phases = [row.position % rules.step for row in rows]
        codes_B = torch.empty(len(rows), dtype=torch.int64, device=hidden_BD.device)
        is_end_B = torch.zeros(len(rows), dtype=torch.bool, device=hidden_BD.device)
        for phase in sorted(set(phases)):
            places = [place for place, each in enumerate(phases) if each == phase]
            chosen = [rows[place] for place in places]
            here = slice(None) if len(places) == len(rows) else torch.tensor(places, device=hidden_BD.device)
            start, size = rules.block(phase)
            logits_BV = self._first_logits(hidden_BD[here], chosen, phase)
            drawn_B = draw_each(logits_BV, [row.filters[0] for row in chosen], draws_B[here])
            is_end_B[here] = drawn_B == size
            has_ended = torch.tensor([row.end is not None for row in chosen], device=hidden_BD.device)
            codes_B[here] = torch.where(has_ended | (drawn_B == size), rules.filler, drawn_B + start - rules.starts[0])
            if logprobs_B is not None:
                logprobs_B[here] += _log_probabilities(logits_BV, torch.where(has_ended, -1, drawn_B))
        return codes_B, is_end_B

    def _first_logits(self, hidden_BD: Tensor, rows: Sequence[UnitRow], phase: int) -> Tensor:
        """Logits [B, units + 1]; the last is that of the end."""
        rules = self.rules
        start, size = rules.block(phase)
        if phase not in self._first_weights:
            ends_1D = self.head_VD[rules.end_id : rules.end_id + 1]
            self._first_weights[phase] = torch.cat([self.head_VD[start : start + size], ends_1D])
        weight_VD = self._first_weights[phase]
        logits_BV = F.linear(hidden_BD, weight_VD).float()
        for place, row in enumerate(rows):
            if rules.has_pointer or row.position == 0 or phase:
                logits_BV[place, -1] = -torch.inf
            elif row.position >= row.num_first:
                logits_BV[place, :-1] = -torch.inf
        return logits_BV

    def _note_ends(self, hidden_BD: Tensor, is_end_B: Tensor, draws_B: Tensor) -> None:
        """Rows whose last frame was before this position, or is this one's where the pointer passes the last letter."""
        if self.letters is None:
            for row, ends in zip(self.rows, is_end_B.tolist(), strict=True):
                if row.end is None and ends:
                    row.end = row.position
            return
        for row, letter in zip(self.rows, self.letters.places_B.tolist(), strict=True):
            if row.end is None:
                row.places.append(letter)
        pointer = self.model.pointer
        assert pointer is not None
        self.letters = self.letters.moved(pointer.advance_head(hidden_BD), draws_B)
        for row, ends in zip(self.rows, self.letters.has_ended_B.tolist(), strict=True):
            if row.end is None and ends:
                row.end = row.position + 1

    def inputs(self) -> UnitInputs:
        """The rows' next positions: what was drawn last, and where in their texts they are now."""
        codes_BK = self._codes_BK
        assert codes_BK is not None
        if self.letters is None or self._first_letters_B is None:
            return UnitInputs(codes_BK, None, None, None)
        places_B = self._first_letters_B + self.letters.spoken_B
        return UnitInputs(codes_BK, self._letters_L, places_B, self.letters.ages_B)


def _log_probabilities(logits_BV: Tensor, drawn_B: Tensor) -> Tensor:
    """Of what was drawn, in nats, float64 [B]; 0 where that is -1: it was forced."""
    log_BV = logits_BV.log_softmax(dim=-1)
    own_B = log_BV.gather(1, drawn_B.clamp(min=0)[:, None])[:, 0]
    return torch.where(drawn_B >= 0, own_B, 0.0).double()


def _draws(number: int, num_positions: int, num_draws: int, seed: int) -> Tensor:
    """Numbers in [0, 1) for each position's codebooks and the pointer, from a row's number and the seed alone."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**64)
    return torch.rand(num_positions * num_draws, generator=generator).view(num_positions, num_draws)
