"""Rows that run: a position of each at every step, and what is drawn behind it.

Shapes: N rows, B of them of one kind, D width, V ids.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmllm.batch import Modality
from mmllm.inference.engine.beams import Beams
from mmllm.inference.engine.drafting import Drafter
from mmllm.inference.engine.pieces import Pieces
from mmllm.inference.engine.prepared import Prepared
from mmllm.inference.engine.requests import EngineConfig
from mmllm.inference.engine.rows import EngineCounts, Row
from mmllm.inference.engine.sampling import choose
from mmllm.inference.engine.speculation import accept_drafts
from mmllm.inference.engine.unit_rows import UnitRows
from mmllm.model.row_cache import CachedRow, RowCache, RunningStep


@dataclass(frozen=True)
class Ended:
    """A row that has left."""

    row: Row
    num_bounded: int = 0
    """Letters of its speech that lasted as long as they may."""
    error: Exception | None = None


class Running:
    """Rows whose prompts are computed.

    Args:
        prepared: the model.
        cache: where rows are.
        config: the engine's.
        drafter: guesses ids; None: nothing is guessed.
        counts: of the engine, where guesses are counted.
    """

    def __init__(
        self,
        prepared: Prepared,
        cache: RowCache,
        config: EngineConfig,
        drafter: Drafter | None,
        counts: EngineCounts,
    ) -> None:
        self.prepared = prepared
        self.cache = cache
        self.config = config
        self._drafter = drafter
        self._counts = counts
        self._keeps_inputs = config.max_cached_tokens is not None
        self._rows: dict[CachedRow, Row] = {}
        self._speaking: list[Row] = []
        """In the order of `_units`."""
        self._units: UnitRows | None = None
        if prepared.unit_rules is not None:
            self._units = UnitRows(prepared.model, prepared.unit_rules, prepared.head_VD)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> list[Row]:
        """All of them, those that began first before the others."""
        return list(dict.fromkeys(self._rows.values()))

    def remove(self, row: Row) -> int:
        """Takes a row out for good; how many letters of its speech lasted as long as they may."""
        assert row.cached is not None
        num_bounded = 0
        if row in self._speaking and self._units is not None:
            place = self._speaking.index(row)
            num_bounded = self._units.num_bounded(place)
            self._units.keep([each for each in range(len(self._speaking)) if each != place])
            self._speaking.pop(place)
        self._free(row)
        if self._drafter is not None:
            self._drafter.leave(row)
        return num_bounded

    def forget(self, row: Row) -> None:
        """A row that was taken out will not come back."""
        if self._drafter is not None:
            self._drafter.leave(row)

    def take_out(self, row: Row) -> None:
        """Takes a row out, to begin again where it is."""
        if row in self._speaking and self._units is not None:
            place = self._speaking.index(row)
            row.parked = self._units.take_out(place)
            self._speaking.pop(place)
        if row.searched is not None:
            row.searched.restart()
        if self._drafter is not None:
            self._drafter.leave(row)
        self._free(row)

    def _free(self, row: Row) -> None:
        for cached in row.all_cached:
            self._rows.pop(cached, None)
        row.free(self.cache)

    def advance(self, ready: Sequence[Row]) -> list[Ended]:
        """One new position of each row, and what is drawn behind it and behind prompts that have become whole."""
        places = [cached for slab in self.cache.slabs for cached in slab.rows]
        rows = [self._rows[cached] for cached in places]
        ended: list[Ended] = []
        begun = time.perf_counter()
        drafts = self._drafts(rows)
        drafted = time.perf_counter()
        num_before, is_plain = len(rows), drafts is None and not ready
        if drafts is not None:
            ended, rows, places = self._verify(rows, drafts), [], []
            if self._drafter is not None:
                most = max(map(len, drafts))
                self._drafter.times.note_verified(num_before, most, time.perf_counter() - begun)
        hidden = [self._forward(rows, places)] if rows else []
        resumed = []
        for row in ready:
            assert row.cached is not None and row.hidden_D is not None
            self.cache.start(row.cached)
            self._rows[row.cached] = row
            if row.has_drawn and row.searched is None:  # it was taken out, and has its next position already
                resumed.append(row)
            else:
                rows.append(row)
                places.append(row.cached)
                hidden.append(row.hidden_D[None])
            row.hidden_D = None
        if rows:
            ended += self._draw(rows, places, hidden[0] if len(hidden) == 1 else torch.cat(hidden))
        if self._drafter is not None and is_plain:
            self._drafter.times.note_plain(num_before, time.perf_counter() - drafted)
        ended = [Ended(each.row, self.remove(each.row), each.error) for each in ended]
        for row in resumed:
            if row.parked is not None and self._units is not None:
                self._speaking.append(row)
                self._units.put_back(row.parked)
                row.parked = None
        return ended

    def _forward(self, rows: Sequence[Row], cached_rows: Sequence[CachedRow]) -> Tensor:
        """Hidden states of the next position of all rows, slab by slab."""
        x_ND, modality_N = self._inputs(rows, cached_rows)
        if self._keeps_inputs:
            for row, x_D in zip(rows, x_ND.unbind(), strict=True):
                if row.searched is None:  # a search that is taken out begins anew
                    row.since_prompt.append(x_D.clone())  # not a view of all rows'
        fast, decoder = self.prepared.fast, self.prepared.model.decoder
        hidden, used = [], 0
        for slab in self.cache.slabs:
            here = slice(used, used + slab.num_rows)
            used += slab.num_rows
            if fast is None:
                step = RunningStep(slab)
                hidden.append(decoder.continue_rows(x_ND[here], step.lengths_N, modality_N[here], step))
                continue
            hidden.append(fast.step(x_ND[here], slab.lengths_N, modality_N[here], slab))
            for cached in slab.rows:
                cached.length += 1
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden)

    def _drafts(self, rows: Sequence[Row]) -> list[list[int]] | None:
        """What is guessed for each row; None: nothing for any, or it would not be worth it."""
        if self._drafter is None or not 0 < len(rows) <= self.config.speculative_rows or len(self.cache.slabs) != 1:
            return None
        (slab,) = self.cache.slabs
        room = min(self.config.most_drafts, slab.capacity - slab.max_length - 1)
        most = []
        for row in rows:
            if row.written is None:
                return None
            left = row.most_new - row.written.num_new - 1
            most.append(max(0, min(room, left)))
        if not any(most):
            return None
        drafts = self._drafter.draft(rows, most)
        return drafts if any(drafts) else None

    def _verify(self, rows: Sequence[Row], drafts: Sequence[list[int]]) -> list[Ended]:
        """The next position of each row and those of its guesses at once; those that the model agrees with stay."""
        prepared, (slab,) = self.prepared, self.cache.slabs
        most = 1 + max(map(len, drafts))
        padded = []
        for row, each in zip(rows, drafts, strict=True):
            ids = [row.written.next_id, *each]  # pyright: ignore[reportOptionalMemberAccess]
            padded.append(ids + [ids[-1]] * (most - len(ids)))
        ids_N = torch.tensor(padded, device=prepared.device).flatten()
        x_ND = prepared.model.decoder.embed(ids_N)
        pieces = Pieces(prepared.model.decoder, prepared.fast, slab, most)
        logits_NV = prepared.text_logits(pieces.step(x_ND, torch.zeros_like(ids_N)))
        counts, all_accepted, errors = [], [], []
        for row, each, own_TV in zip(rows, drafts, logits_NV.unflatten(0, (len(rows), most)), strict=True):
            assert row.written is not None
            accepted, error = None, None
            try:
                accepted = accept_drafts(own_TV[: len(each) + 1], each, row.written.sampler)
            except Exception as raised:  # a constraint's
                error = raised
            counts.append(1 if accepted is None else 1 + accepted.num_drafts)
            all_accepted.append(accepted)
            errors.append(error)
        pieces.keep(counts)
        if self._drafter is not None:
            self._drafter.verified(rows, [count - 1 for count in counts])
        ended = []
        for place, (row, accepted, error) in enumerate(zip(rows, all_accepted, errors, strict=True)):
            if self._keeps_inputs:
                row.since_prompt += [x_D.clone() for x_D in x_ND[place * most : place * most + counts[place]]]
            self._counts.drafted += len(drafts[place])
            self._counts.accepted += counts[place] - 1
            goes_on = False
            try:
                if accepted is not None:
                    goes_on = row.written.take_accepted(accepted)  # pyright: ignore[reportOptionalMemberAccess]
                    row.tell()
            except Exception as raised:  # the listener's
                error = raised
            if error is not None or not goes_on:
                ended.append(Ended(row, error=error))
        return ended

    def _inputs(self, rows: Sequence[Row], cached_rows: Sequence[CachedRow]) -> tuple[Tensor, Tensor]:
        """Embeddings of the positions that follow, and their modalities."""
        model, device = self.prepared.model, self.prepared.device
        ids = [row.next_id(cached) for row, cached in zip(rows, cached_rows, strict=True)]
        x_ND = model.decoder.embed(torch.tensor(ids, device=device))
        modality_N = torch.full((len(rows),), int(Modality.TEXT), device=device)
        if not self._speaking:
            return x_ND, modality_N
        assert self._units is not None
        place_of = {id(row): place for place, row in enumerate(rows)}
        places_B = torch.tensor([place_of[id(row)] for row in self._speaking], device=device)
        units = self._units.inputs()
        frames_BD = model.unit_embedding(units.codes_BK)
        if units.letters_L is not None:
            assert model.pointer is not None
            frames_BD = frames_BD + model.pointer(units.letters_L, units.places_B, units.ages_B)
        x_ND = x_ND.index_copy(0, places_B, frames_BD.to(x_ND.dtype))
        return x_ND, modality_N.index_fill(0, places_B, int(Modality.UNITS))

    def _draw(self, rows: Sequence[Row], cached_rows: Sequence[CachedRow], hidden_ND: Tensor) -> list[Ended]:
        """Draws what follows each row; those that end leave."""
        places = [place for place, row in enumerate(rows) if row.written is not None]
        ended = []
        if places:
            hidden_BD = hidden_ND if len(places) == len(rows) else hidden_ND[places]
            ended += self._draw_text([rows[place] for place in places], hidden_BD)
        searched = list(dict.fromkeys(row for row in rows if row.searched is not None))
        if searched:
            ended += self._search(searched, cached_rows, hidden_ND)
        if any(row.spoken is not None for row in rows):
            ended += self._draw_units(rows, hidden_ND)
        return ended

    def _search(self, rows: Sequence[Row], cached_rows: Sequence[CachedRow], hidden_ND: Tensor) -> list[Ended]:
        """Goes on with the beams of each row."""
        place_of = {cached: place for place, cached in enumerate(cached_rows)}
        ended = []
        for row in rows:
            searched = row.searched
            assert searched is not None and row.cached is not None
            beams = searched.cached
            beams.rows = beams.rows or [row.cached]
            logits_kV = self.prepared.text_logits(hidden_ND[[place_of[each] for each in beams.rows]])
            row.note_first()
            try:
                parents = searched.take(logits_kV)
                if parents is None:
                    row.tell()
                    ended.append(Ended(row))
            except Exception as error:  # a constraint's, or the listener's: of this row alone
                ended.append(Ended(row, error=error))
            else:
                if parents is not None:
                    self._fork(row, beams, parents)
        return ended

    def _fork(self, row: Row, beams: Beams, parents: Sequence[int]) -> None:
        """Gives each beam that runs now a row of the cache: its parent's, or a copy of it."""
        before = beams.rows
        beams.spare += [cached for place, cached in enumerate(before) if place not in parents]
        taken: set[int] = set()
        beams.rows = []
        for parent in parents:
            if parent not in taken:
                taken.add(parent)
                beams.rows.append(before[parent])
                continue
            source = before[parent]
            cached = beams.spare.pop() if beams.spare else self.cache.allocate(source.slab.capacity)
            if not cached.is_running:
                self.cache.start(cached)
                self._rows[cached] = row
            cached.slab.copy(source, cached.slot)
            cached.length = source.length
            beams.rows.append(cached)
        for cached in [each for each in beams.spare if each.is_running]:  # no beam is left for it
            beams.spare.remove(cached)
            del self._rows[cached]
            self.cache.free(cached)
        row.cached = beams.rows[0]

    def _draw_text(self, rows: Sequence[Row], hidden_BD: Tensor) -> list[Ended]:
        logits_BV = self.prepared.text_logits(hidden_BD)
        samplers = [row.written.sampler for row in rows]  # pyright: ignore[reportOptionalMemberAccess]
        chosen = choose(logits_BV, samplers, self.prepared.rules)
        ended = []
        for row, token_id, logprob, top in zip(rows, chosen.ids, chosen.logprobs, chosen.top_logprobs, strict=True):
            assert row.written is not None
            row.note_first()
            try:
                goes_on = row.written.take(token_id, logprob, top)
                row.tell()
            except Exception as error:  # a constraint's, or the listener's: of this row alone
                ended.append(Ended(row, error=error))
                continue
            if not goes_on:
                ended.append(Ended(row))
        return ended

    def _draw_units(self, rows: Sequence[Row], hidden_ND: Tensor) -> list[Ended]:
        units = self._units
        assert units is not None
        new = [row for row in rows if row.spoken is not None and not row.has_drawn]
        if new:
            units.add([row.spoken for row in new if row.spoken is not None])
            self._speaking += new
        place_of = {id(row): place for place, row in enumerate(rows)}
        places = [place_of[id(row)] for row in self._speaking]
        hidden_BD = hidden_ND if places == list(range(len(rows))) else hidden_ND[places]
        ended = []
        for row, codes in zip(self._speaking, units.draw(hidden_BD).tolist(), strict=True):
            assert row.spoken is not None
            goes_on = row.spoken.take(codes) and not (row.is_stopping and row.spoken.has_frame)
            row.note_first()
            try:
                row.tell()
            except Exception as error:
                ended.append(Ended(row, error=error))
                continue
            if not goes_on:
                ended.append(Ended(row))
        return ended
