"""Requests on their way through the engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmllm.batch import Modality
from mmllm.inference.engine.beams import BeamRow, Beams
from mmllm.inference.engine.prefixes import PrefixKeys
from mmllm.inference.engine.prompts import PromptInputs
from mmllm.inference.engine.requests import Request, Result, TextUpdate, UnitsUpdate
from mmllm.inference.engine.text_rows import TextRow
from mmllm.inference.engine.unit_rows import ParkedUnits, UnitRow
from mmllm.model.row_cache import CachedRow, RowCache

OnUpdate = Callable[[TextUpdate | UnitsUpdate], None]


class Ticket:
    """A request that was given to an engine.

    Args:
        request: what was asked for.
        on_update: called, by the thread that steps, with what is new.
    """

    def __init__(self, request: Request, on_update: OnUpdate | None = None) -> None:
        self.request = request
        self.on_update = on_update
        self._result: Result | None = None
        self._error: Exception | None = None
        self._done = threading.Event()

    @property
    def is_done(self) -> bool:
        """Whether there is a result, or an error."""
        return self._done.is_set()

    @property
    def error(self) -> Exception | None:
        """What went wrong; None: nothing, so far."""
        return self._error

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until another thread's steps have brought it to its end; False: that took too long."""
        return self._done.wait(timeout)

    def result(self) -> Result:
        """What came of it.

        Raises:
            Exception: what went wrong with this request.
        """
        assert self._done.is_set(), "the request is still being answered"
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def close(self, result: Result | None, error: Exception | None = None) -> None:
        """Gives it its end: the engine's to call."""
        self._result, self._error = result, error
        self._done.set()


@dataclass
class EngineCounts:
    """What an engine has done since it was made."""

    requests: int = 0
    errors: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompts' tokens, those that were found in the cache."""
    new_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    drafted: int = 0
    """Ids that were guessed and verified."""
    accepted: int = 0
    """Of these, those that the model agreed with."""


class Row:
    """A request, from when it waits to its end.

    Args:
        ticket: whose.
        keys: by which its prompt's blocks are found; None: they are not shared.
        written: of a request to write.
        spoken: of a request to speak.
        searched: of a request to write by beam search.
    """

    def __init__(
        self,
        ticket: Ticket,
        keys: PrefixKeys | None,
        written: TextRow | None = None,
        spoken: UnitRow | None = None,
        searched: BeamRow | None = None,
    ) -> None:
        self.ticket = ticket
        self.keys = keys
        self.written = written
        self.spoken = spoken
        self.searched = searched
        self.submitted = time.perf_counter()
        self.first_seconds = 0.0
        self.num_cached = 0
        """Of the prompt's positions, those that were found in the cache when it began."""
        self.num_found = 0
        """The same, when it was placed last."""
        self.whole_inputs: PromptInputs | None = None
        """Of its prompt from the beginning, for a draft model that has the same; it lets go of them."""
        self.inputs: PromptInputs | None = None
        """What is still to be computed of its prompt."""
        self.cached: CachedRow | None = None
        self.hidden_D: Tensor | None = None
        """Behind its prompt, until it runs."""
        self.is_cancelled = False
        self.is_stopping = False
        """It is cancelled as soon as it has a frame."""
        self.has_drawn = False
        self.since_prompt: list[Tensor] = []
        """Embeddings of the positions that were computed since its prompt, where it may have to begin again."""
        self.parked: ParkedUnits | None = None
        """Of a row that speaks, while it is taken out."""

    @property
    def request(self) -> Request:
        """What was asked for."""
        return self.ticket.request

    @property
    def width(self) -> int:
        """How many of the cache's rows it takes."""
        return 1 if self.searched is None else self.searched.request.num_beams

    @property
    def all_cached(self) -> list[CachedRow]:
        """The cache's rows that it has now."""
        if self.cached is None:
            return []
        if self.searched is None:
            return [self.cached]
        return [*(self.searched.cached.rows or [self.cached]), *self.searched.cached.spare]

    @property
    def most_new(self) -> int:
        """Positions behind its prompt at most."""
        text = self.written or self.searched
        if text is not None:
            return text.request.max_new_tokens
        assert self.spoken is not None
        return self.spoken.max_positions - self.spoken.begun

    @property
    def modality(self) -> Modality:
        """Of what it draws."""
        return Modality.TEXT if self.spoken is None else Modality.UNITS

    def next_id(self, cached: CachedRow) -> int:
        """The id that the next position of one of its rows holds; 0: it speaks."""
        if self.searched is not None:
            return self.searched.next_ids[self.searched.cached.rows.index(cached)]
        return 0 if self.written is None else self.written.next_id

    def free(self, cache: RowCache) -> None:
        """Gives back its rows of the cache."""
        for cached in self.all_cached:
            cache.free(cached)
        self.cached = None
        if self.searched is not None:
            self.searched.cached = Beams()

    def note_first(self) -> None:
        """Notes when it drew first."""
        if not self.has_drawn:
            self.has_drawn = True
            self.first_seconds = time.perf_counter() - self.submitted

    def tell(self) -> None:
        """Tells its listener what is new."""
        on_update = self.ticket.on_update
        if on_update is None:
            return
        drawn = self.written or self.searched or self.spoken
        assert drawn is not None
        with torch.inference_mode(False):  # what it is told is the listener's, who may do with it what he likes
            update = drawn.update()
            if update is not None:
                on_update(update)

    def result(self, num_bounded: int) -> tuple[Result, int]:
        """What came of it, and how many tokens that took."""
        with torch.inference_mode(False):
            text = self.written or self.searched
            if text is not None:
                made: Result = text.result(self.is_cancelled)
                num_new = text.num_new
            else:
                assert self.spoken is not None
                made, num_new = self.spoken.result(num_bounded), self.spoken.num_new
        cost = replace(
            made.cost, num_prompt_tokens=self.request.prompt.num_tokens, num_cached_tokens=self.num_cached,
            num_new_tokens=num_new, first_seconds=self.first_seconds, seconds=time.perf_counter() - self.submitted,
        )  # fmt: skip
        return replace(made, cost=cost), num_new
