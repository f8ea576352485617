"""Ids that are guessed cheaply, for the model to verify several at once.

Looked up: what followed the last few ids where they stood before, in the prompt or the text so far (prompt look-up
decoding, Saxena 2023; LLMA, arXiv 2304.04487). Or written by a smaller model, under each row's own sampling.

Shapes: N rows, T drafted ids, D width, V ids, M convolutions, J inputs that each keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mmllm.batch import Modality
from mmllm.inference.engine.pieces import Pieces
from mmllm.inference.engine.prepared import Prepared
from mmllm.inference.engine.prompts import PromptInputs, embed_prompts, with_prompt_embeddings
from mmllm.inference.engine.rows import Row
from mmllm.inference.engine.sampling import may_draw
from mmllm.model.multimodal import MultimodalModel
from mmllm.model.row_cache import CachedRow, Chunk, PromptStep

_LOOKED_UP = (4, 3, 2)
"""How many last ids are looked up, the longest first."""
_NO_TEXT = -1
_LEVELS = 16
_HOPE = 0.95
_HOPED = 4
"""What is thought of guesses before any was verified counts like so many."""
_MEMORY = 0.99
_LEAST_CHANCE = 0.3
"""That a draft model's guess and all before it are right; one that is less likely isn't made."""
_LONGER_STEP, _EACH_GUESS = 0.5, 0.12
"""What verifying costs beside a row's plain step, in such steps: at all, and for each guess (two CPU cores, the demo's
model). Their relation is kept, their size is measured."""
_NEWEST = 0.1
_ROOM = 128
"""New positions for which a row has room at once."""
_LONGEST_PAUSE = 32
_LEAST_SCALE = 0.5


class Drafter(Protocol):
    """Something that guesses."""

    times: StepTimes
    """Of steps, which it is told."""

    def draft(self, rows: Sequence[Row], most: Sequence[int]) -> list[list[int]]:
        """Guesses for rows, of each so many ids at most."""
        ...

    def verified(self, rows: Sequence[Row], num_accepted: Sequence[int]) -> None:
        """How many of its last guesses were right."""
        ...

    def leave(self, row: Row) -> None:
        """A row has ended."""
        ...


class Agreement:
    """How often guesses were right, by levels of how sure their drafter was: as it is hoped first, then as it was.

    Args:
        chances: that guesses of each level are right, before any was verified.
    """

    def __init__(self, chances: Sequence[float]) -> None:
        self._right = [chance * _HOPED for chance in chances]
        self._all = [float(_HOPED) for _ in chances]

    def of(self, level: int) -> float:
        """Share of guesses of this level that are right, those before them being so."""
        return self._right[level] / self._all[level]

    def note(self, level: int, is_right: bool) -> None:
        """Takes in one that was verified; long ago counts less."""
        self._right[level] = _MEMORY * self._right[level] + is_right
        self._all[level] = _MEMORY * self._all[level] + 1


class StepTimes:
    """How long it takes to guess and to verify, beside plain steps: as it is thought first, then as it was."""

    def __init__(self) -> None:
        self._plain: dict[int, float] = {}
        self._scale = 1.0

    def cost(self, num_guesses: int) -> float:
        """Of a step that verifies so many, in plain steps."""
        return self._scale * (1 + _LONGER_STEP + _EACH_GUESS * num_guesses)

    def note_plain(self, num_rows: int, seconds: float) -> None:
        """Takes in a plain step."""
        self._plain[num_rows] = _nearer(self._plain.get(num_rows, seconds), seconds)

    def note_verified(self, num_rows: int, num_guesses: int, seconds: float) -> None:
        """Takes in a step that verified so many guesses at most of each row."""
        plain = self._plain.get(num_rows)
        if plain is not None:
            self._scale = max(
                _LEAST_SCALE, _nearer(self._scale, self._scale * seconds / plain / self.cost(num_guesses))
            )


def _nearer(before: float, now: float) -> float:
    """A mean that forgets; one step that something held up counts for little."""
    return before + _NEWEST * (min(now, 2 * before) - before)


def best_length(chances: Sequence[float], times: StepTimes) -> int:
    """How many guesses are worth verifying: 0, or so many that a step gives the most ids by its time.

    Args:
        chances: of each that it and all before it are right.
        times: of steps.
    """
    best, best_rate, expected = 0, 1.0, 1.0
    for count, chance in enumerate(chances, start=1):
        expected += chance
        rate = expected / times.cost(count)
        if rate > best_rate:
            best, best_rate = count, rate
    return best


class LookedUp:
    """A row's ids, and where each few of them stood last."""

    def __init__(self, row: Row) -> None:
        prompt = row.request.prompt
        is_text_T = prompt.modality_T == Modality.TEXT
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self._num_own = 0
        for token_id, is_text in zip(prompt.token_ids_T.tolist(), is_text_T.tolist(), strict=True):
            self._append(token_id if is_text else _NO_TEXT)

    def extend(self, own_ids: Sequence[int]) -> None:
        """Takes in what was drawn since."""
        for token_id in own_ids[self._num_own :]:
            self._append(token_id)
        self._num_own = len(own_ids)

    def _append(self, token_id: int) -> None:
        ids = self._ids
        for count in _LOOKED_UP:  # what the ids before this one are followed by
            if len(ids) >= count:
                self._after[tuple(ids[-count:])] = len(ids)
        ids.append(token_id)

    def last(self, count: int, guessed: Sequence[int] = ()) -> list[int]:
        """The last ids, guessed ones among them; those that are no text are negative."""
        return [*self._ids[-count:], *guessed][-count:]

    def next(self, guessed: Sequence[int] = ()) -> tuple[int, int] | None:
        """What followed the longest few last ids that stood before, and how many these are."""
        last = self.last(_LOOKED_UP[0], guessed)
        for count in _LOOKED_UP:
            place = self._after.get(tuple(last[-count:])) if len(last) >= count else None
            if place is not None and place < len(self._ids) and self._ids[place] != _NO_TEXT:
                return self._ids[place], count
        return None


def have_equal_inputs(model: MultimodalModel, draft: MultimodalModel) -> bool:
    """Whether two models have the same embeddings, tower and projectors: all weights beside the decoder's layers."""
    own, others = (
        {
            name: weight
            for name, weight in each.state_dict().items()
            if not name.startswith("decoder.") or name.startswith("decoder.embed_tokens.")
        }
        for each in (model, draft)
    )
    same = [(tower.mean, tower.std) for tower in (model.vision, draft.vision) if tower is not None]
    return (
        own.keys() == others.keys()
        and all(len(same) != 2 or one == same[0] for one in same)
        and all(
            weight.dtype == others[name].dtype
            and weight.device == others[name].device
            and torch.equal(weight, others[name])
            for name, weight in own.items()
        )
    )


class _Guesses:
    """What is guessed of one row, as long as it is likely enough to be right.

    Whether a place is guessed is decided before its id is drawn, and what was drawn is verified: else a row's draws
    would have another distribution. A greedy row has none.
    """

    def __init__(self, row: Row, most: int, agreement: Agreement, times: StepTimes) -> None:
        self._most, self._agreement, self._times = most, agreement, times
        self._is_greedy = row.written.sampler.filters is None  # pyright: ignore[reportOptionalMemberAccess]
        self._ids: list[int] = []
        self._levels: list[int] = []
        self._chances: list[float] = []
        self.is_open = most > 0
        """Whether more is guessed."""

    def look(self, chance: float) -> None:
        """How likely, to the draft model, the likeliest id of the next place is."""
        level = min(_LEVELS - 1, int(chance * _LEVELS))
        chance = self._agreement.of(level) * (self._chances[-1] if self._chances else 1.0)
        self.is_open = self.is_open and len(self._ids) < self._most and chance >= _LEAST_CHANCE
        if self.is_open:
            self._levels.append(level)
            self._chances.append(chance)

    def add(self, token_id: int) -> None:
        """The guess for the place that was looked at."""
        if self.is_open:
            self._ids.append(token_id)

    def worth_verifying(self) -> list[int]:
        """The guesses that are worth a longer step."""
        return self._ids[: best_length(self._chances, self._times)] if self._is_greedy else self._ids

    def verified(self, num_accepted: int) -> None:
        """Learns from how many were right: of those behind the first wrong one nothing is known."""
        for place, level in enumerate(self._levels[: num_accepted + 1]):
            self._agreement.note(level, place < num_accepted)


def _largest_chances(logits_NV: Tensor) -> list[float]:
    return (logits_NV.amax(dim=-1) - logits_NV.logsumexp(dim=-1)).exp().tolist()


class DraftModel:
    """A smaller model with the same ids, whose rows go along with those of the large one.

    Args:
        prepared: the smaller model.
        has_equal_inputs: what a prompt's positions hold is the same for both models: see `have_equal_inputs`.
    """

    def __init__(self, prepared: Prepared, has_equal_inputs: bool = False) -> None:
        self.prepared = prepared
        self.times = StepTimes()
        self._has_equal_inputs = has_equal_inputs
        self._cache = prepared.model.decoder.make_row_cache()
        self._cached: dict[Row, CachedRow] = {}
        self._rows: dict[CachedRow, Row] = {}
        self._order: list[Row] = []
        self._lengths: list[int] = []
        self._states: list[Tensor] = []
        self._agreement = Agreement([_HOPE] * _LEVELS)
        self._guesses: list[_Guesses] = []
        self._pause = 0
        """Steps in which nothing is guessed, since it was not worth it; the next one is longer."""
        self._next_pause = 1

    def draft(self, rows: Sequence[Row], most: Sequence[int]) -> list[list[int]]:
        """See `Drafter`."""
        if self._pause:
            self._pause -= 1
            return [[] for _ in rows]
        new = [row for row in rows if row not in self._cached]
        if new:
            self._begin(new)
        count = max(most)
        num_missing = max(len(self._missing(row)) for row in rows)
        for row in rows:
            self._cache.make_room(self._cached[row], num_missing + count)
        if len(self._cache.slabs) != 1 or self._cache.slabs[0].num_rows != len(rows):
            return [[] for _ in rows]
        (slab,) = self._cache.slabs
        self._order = [self._rows[cached] for cached in slab.rows]
        hidden_ND = self._catch_up(num_missing)
        self._lengths, self._states = slab.lengths, []
        if slab.conv_state_MSJD is not None:
            self._states.append(slab.conv_state_MSJD[:, : slab.num_rows].clone())
        most_of = dict(zip(rows, most, strict=True))
        self._guesses = guesses = [_Guesses(row, most_of[row], self._agreement, self.times) for row in self._order]
        samplers = [row.written.sampler for row in self._order]  # pyright: ignore[reportOptionalMemberAccess]
        for ahead in range(count):
            logits_NV = self.prepared.text_logits(hidden_ND)
            for own, chance in zip(guesses, _largest_chances(logits_NV), strict=True):
                own.look(chance)
            if not any([own.is_open for own in guesses]):
                break
            # the most probable one also where ids are drawn: what a row draws by its own number is then what it draws
            # without guesses, however many there are
            ids = may_draw(logits_NV, samplers, self.prepared.rules).argmax(dim=-1).tolist()
            for own, token_id in zip(guesses, ids, strict=True):
                own.add(token_id)
            if ahead + 1 < count:
                hidden_ND = self._step(ids)
                if slab.conv_state_MSJD is not None:
                    self._states.append(slab.conv_state_MSJD[:, : slab.num_rows].clone())
        place_of = {row: place for place, row in enumerate(self._order)}
        drafts = [guesses[place_of[row]].worth_verifying() for row in rows]
        if not any(drafts):  # nobody verifies nothing
            self._guesses = []
            self.verified(rows, [0] * len(rows))
            self._pause = self._next_pause
            self._next_pause = min(_LONGEST_PAUSE, 2 * self._next_pause)
        else:
            self._next_pause = 1
        return drafts

    def verified(self, rows: Sequence[Row], num_accepted: Sequence[int]) -> None:
        """See `Drafter`."""
        (slab,) = self._cache.slabs
        accepted = dict(zip(rows, num_accepted, strict=True))
        for row, own in zip(self._order, self._guesses, strict=False):
            own.verified(accepted[row])
        counts = []
        for row, length in zip(self._order, self._lengths, strict=True):
            # positions that were computed: what was missing before, and all guesses but the last
            cached = self._cached[row]
            kept = min(cached.length, length + accepted[row])
            counts.append(kept - length)
            cached.length = kept
        if self._states:
            stacked = torch.stack(self._states)  # behind each of the steps
            at_N = torch.tensor(counts, device=stacked.device)
            rows_N = torch.arange(len(counts), device=stacked.device)
            assert slab.conv_state_MSJD is not None
            slab.conv_state_MSJD[:, : len(counts)] = stacked[at_N, :, rows_N].transpose(0, 1)

    def leave(self, row: Row) -> None:
        """See `Drafter`."""
        cached = self._cached.pop(row, None)
        if cached is not None:
            del self._rows[cached]
            self._cache.free(cached)

    def _begin(self, rows: Sequence[Row]) -> None:
        """Computes the rows' prompts."""
        prepared, model = self.prepared, self.prepared.model
        inputs = [with_prompt_embeddings(model, own) for own in self._inputs(rows)]
        chunks = []
        for row, own in zip(rows, inputs, strict=True):
            cached = self._cache.allocate(len(own.x_TD) + min(row.most_new, _ROOM) + 2)
            self._cached[row], self._rows[cached] = cached, row
            chunks.append(Chunk(cached, len(own.x_TD)))
        spans = [own.spans_T for own in inputs if own.spans_T is not None]
        step = PromptStep(chunks, torch.cat(spans) if spans else None, model.config.decoder.attention_backend)
        model.decoder.continue_rows(
            torch.cat([own.x_TD for own in inputs]),
            torch.cat([torch.arange(len(own.x_TD), device=prepared.device) for own in inputs]),
            torch.cat([own.modality_T for own in inputs]),
            step,
        )
        for row in rows:
            self._cache.start(self._cached[row])

    def _inputs(self, rows: Sequence[Row]) -> list[PromptInputs]:
        """Of the rows' prompts: those that the large model had, if they are the same."""
        made = {row: row.whole_inputs for row in rows if self._has_equal_inputs}
        left = [row for row in rows if made.get(row) is None]
        if left:
            prompts = [row.request.prompt for row in left]
            made |= dict(zip(left, embed_prompts(self.prepared.model, prompts, [0] * len(left)), strict=True))
        for row in rows:
            row.whole_inputs = None
        return [own for own in (made[row] for row in rows) if own is not None]

    def _missing(self, row: Row) -> list[int]:
        """Ids of a row that are not computed yet: at least the last one."""
        ids = row.written.sampler.ids  # pyright: ignore[reportOptionalMemberAccess]
        num_prompt = row.request.prompt.num_tokens + self.prepared.num_virtual
        return ids[self._cached[row].length - num_prompt :]

    def _catch_up(self, most: int) -> Tensor:
        """Computes what was drawn since, of each row 1 to `most` ids; hidden states behind the last ones, [N, D]."""
        (slab,) = self._cache.slabs
        prepared = self.prepared
        missing = [self._missing(row) for row in self._order]
        if most == 1:
            return self._step([own[0] for own in missing])
        padded = [[*own, *[own[-1]] * (most - len(own))] for own in missing]
        pieces = Pieces(prepared.model.decoder, prepared.fast, slab, most)
        ids_N = torch.tensor(padded, device=prepared.device).flatten()
        hidden_ND = pieces.step(prepared.model.decoder.embed(ids_N), torch.zeros_like(ids_N))
        pieces.keep([len(own) for own in missing])
        last_N = torch.tensor([most * place + len(own) - 1 for place, own in enumerate(missing)])
        return hidden_ND[last_N.to(hidden_ND.device)]

    def _step(self, ids: Sequence[int]) -> Tensor:
        """One position more of each row."""
        (slab,) = self._cache.slabs
        prepared = self.prepared
        pieces = Pieces(prepared.model.decoder, prepared.fast, slab, 1) if prepared.fast is None else None
        ids_N = torch.tensor(ids, device=prepared.device)
        x_ND, text_N = prepared.model.decoder.embed(ids_N), torch.zeros_like(ids_N)
        if pieces is not None:
            hidden_ND = pieces.step(x_ND, text_N)
            pieces.keep([1] * len(ids))
        else:
            assert prepared.fast is not None
            hidden_ND = prepared.fast.step(x_ND, slab.lengths_N, text_N, slab)
            for cached in slab.rows:
                cached.length += 1
        return hidden_ND
