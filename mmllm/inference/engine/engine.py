"""The engine: one scheduler over rows that write and rows that speak, a position of each at every step.

A request waits, has its prompt computed (in pieces beside the rows that run, and not at all as far as the cache holds
it), runs, and leaves. What it draws depends on its prompt, its number and its seed alone. Everything that generates
calls this: the Python API, the command line, the server, evaluation.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from mmllm.inference.engine.beams import BeamRow
from mmllm.inference.engine.drafting import Drafter, DraftModel, have_equal_inputs
from mmllm.inference.engine.ngrams import LookUp, NGrams
from mmllm.inference.engine.prefilling import Prefilling, shares_prefixes
from mmllm.inference.engine.prefixes import PrefixCache, prefix_keys
from mmllm.inference.engine.prepared import Prepared, eval_mode, trained_modules, weights_of
from mmllm.inference.engine.requests import EngineConfig, Request, Result, TextRequest
from mmllm.inference.engine.rows import EngineCounts, OnUpdate, Row, Ticket
from mmllm.inference.engine.running import Running
from mmllm.inference.engine.text_rows import TextRow
from mmllm.inference.engine.unit_rows import UnitRow
from mmllm.model.multimodal import MultimodalModel
from mmllm.model.row_cache import RowCache, capacity_of
from mmllm_tokenizers.folder import TokenizerFolder

_ROOM = 128
"""New positions for which a row has room at once, if it may have so many."""


class Engine:
    """Answers requests of any kinds together.

    Args:
        model: in any mode; it runs in eval mode and is left as it was. Its weights may change while nothing runs.
        tokenizer: of the model.
        config: bounds.
        draft: a smaller model with the same ids, where `config.speculation` is "draft"; a table where it is "ngram".

    Raises:
        ValueError: there is a draft and none is asked for, or the other way round, or its ids are others.
    """

    def __init__(
        self,
        model: MultimodalModel,
        tokenizer: TokenizerFolder,
        config: EngineConfig | None = None,
        draft: MultimodalModel | NGrams | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config or EngineConfig()
        self.draft = draft
        _check_draft(self.config, draft, model.config.num_text)
        self.counts = EngineCounts()
        self._lock = threading.RLock()
        self._is_stepping = False
        self._rows: dict[Ticket, Row] = {}
        self._waiting: deque[Row] = deque()
        self._prefilling: list[Row] = []
        self._weights: tuple[object, ...] = ()

    @property
    def num_waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that are being answered."""
        return len(self._rows) - len(self._waiting)

    @property
    def num_positions(self) -> int:
        """That running requests have room for in the cache."""
        return self._cache.num_positions if self._weights else 0

    @property
    def prefix_bytes(self) -> int:
        """Of blocks that are kept for prompts which begin alike."""
        return self._prefixes.num_bytes if self._weights else 0

    # ---- requests

    def submit(self, request: Request, on_update: OnUpdate | None = None) -> Ticket:
        """Takes a request; some thread must `step` for it to be answered.

        Args:
            request: what is asked for.
            on_update: called, by the thread that steps and under the engine's lock, with what is new of it: it may
                submit and cancel, but neither step nor wait.

        Raises:
            ValueError: it can't be answered: too long, or settings that the model has nothing for.
        """
        ticket = Ticket(request, on_update)
        with self._lock:
            self._look_at_weights()
            prepared, shares = self._prepared, self._prefixes.max_bytes > 0
        row = self._row(ticket, prepared, shares)  # not under the lock: digests, grammars and stop strings take time
        with self._lock:
            if self._prepared is not prepared:
                row = self._row(ticket, self._prepared, self._prefixes.max_bytes > 0)
            self.counts.requests += 1
            self._rows[ticket] = row
            self._waiting.append(row)
        return ticket

    def submit_all(self, requests: Sequence[Request]) -> list[Ticket]:
        """As `submit`, of all or none; the longest prompts come first, so that memory fails early."""
        order = sorted(range(len(requests)), key=lambda place: -requests[place].prompt.num_tokens)
        tickets: dict[int, Ticket] = {}
        try:
            for place in order:
                tickets[place] = self.submit(requests[place])
        except Exception:
            for ticket in tickets.values():
                self.cancel(ticket)
            raise
        return [tickets[place] for place in range(len(requests))]

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request: its result is what there is so far. Nothing happens to one that is done."""
        with self._lock:
            row = self._rows.get(ticket)
            if row is None:
                return
            row.is_cancelled = True
            if not self._is_stepping:  # else it is ended when the step is
                self._drop_cancelled()

    def stop(self, ticket: Ticket) -> None:
        """As `cancel`, but speech goes on until it has a frame."""
        with self._lock:
            row = self._rows.get(ticket)
            if row is not None and row.spoken is not None and not row.spoken.has_frame:
                row.is_stopping = True
                return
        self.cancel(ticket)

    # ---- answers

    def run(
        self,
        requests: Sequence[Request],
        progress: Callable[[int], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> list[Result]:
        """Answers requests.

        Args:
            requests: all that are to be answered.
            progress: called with the number of those that have become done.
            stop: asked before each step; True ends all that is not done.

        Returns:
            A result for each request, in order.

        Raises:
            ValueError: a request can't be answered; then none is.
        """
        tickets = self.submit_all(requests)
        try:
            self.finish(tickets, progress, stop)
            return [ticket.result() for ticket in tickets]
        finally:
            for ticket in tickets:
                self.cancel(ticket)

    def finish(
        self,
        tickets: Sequence[Ticket],
        progress: Callable[[int], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        """Steps until all of these are done; other threads' requests move on with them. See `run`."""
        left = [ticket for ticket in tickets if not ticket.is_done]
        while left:
            if stop is not None and stop():
                for ticket in left:
                    self.stop(ticket)
            self.step()
            num_before = len(left)
            left = [ticket for ticket in left if not ticket.is_done]
            if progress is not None and len(left) < num_before:
                progress(num_before - len(left))

    def step(self) -> bool:
        """Computes one position of each row that runs, and prompts beside them; whether there is more to do."""
        with self._lock:
            if self._is_stepping:
                raise RuntimeError("a listener steps the engine that calls it; let it submit, or cancel, and return")
            if not self._rows:
                return False
            self._is_stepping = True
            try:
                with eval_mode(self._trained), torch.inference_mode():
                    self._step()
            except Exception as error:  # the cache may be half written: no row of it can go on
                self._fail(error)
            except BaseException as interrupt:  # Ctrl-C
                self._fail(RuntimeError(f"the engine was interrupted: {type(interrupt).__name__}"))
                raise
            finally:
                self._is_stepping = False
            self._drop_cancelled()
            return bool(self._rows)

    def _step(self) -> None:
        self.counts.steps += 1
        self._admit()
        ready = self._prompts.compute(self._prefilling)
        if ready:
            is_ready = set(map(id, ready))
            self._prefilling = [row for row in self._prefilling if id(row) not in is_ready]
        self._make_room(ready)
        for ended in self._running.advance(ready):
            self._close(ended.row, ended.num_bounded, ended.error)

    # ---- the weights

    def _look_at_weights(self) -> None:
        """Where nothing runs: what was made of other weights is made anew."""
        if self._rows:
            return
        self._trained = trained_modules(self.model)  # looking for them in each step would take a fifth of it
        kind = self.model.decoder.embed_tokens.weight.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        weights = (*weights_of(self.model), autocast)
        if weights != self._weights:
            kv_dtype = self.config.kv_dtype
            is_plain = kv_dtype == "auto" or getattr(torch, kv_dtype) == self.model.decoder.embed_tokens.weight.dtype
            # Quick layers compute in the weights' dtype, whatever autocast says, as it does within a training step.
            is_plain = is_plain and autocast is None
            # They also add in another order than the model's own, whose bits training sees.
            self._prepared = Prepared.of(self.model, self.tokenizer, is_plain and not self.config.deterministic)
            self._clear()
            self._weights = weights

    def _clear(self) -> None:
        """Begins with an empty cache."""
        config, prepared = self.config, self._prepared
        num_bytes = config.prefix_cache_bytes if shares_prefixes(config, prepared) else 0
        kv_dtype = None if config.kv_dtype == "auto" else getattr(torch, config.kv_dtype)
        self._cache: RowCache = self.model.decoder.make_row_cache(kv_dtype)
        self._prefixes = PrefixCache(num_bytes, config.block_size)
        self._prompts = Prefilling(prepared, self._cache, self._prefixes, config)
        drafter: Drafter | None = LookUp() if config.speculation == "lookup" else None
        if isinstance(self.draft, NGrams):
            drafter = LookUp(self.draft)
        elif self.draft is not None:
            self.draft.eval()
            drafter = DraftModel(Prepared.of(self.draft, self.tokenizer), have_equal_inputs(self.model, self.draft))
        self._running = Running(prepared, self._cache, config, drafter, self.counts)

    # ---- rows in and out

    def _row(self, ticket: Ticket, prepared: Prepared, shares: bool) -> Row:
        request = ticket.request
        if not request.prompt.num_tokens:
            raise ValueError("the prompt has no token; give it some")
        keys = None
        if shares and not (isinstance(request, TextRequest) and request.prompt_logprobs):
            keys = prefix_keys(request.prompt, self.config.block_size)
        if isinstance(request, TextRequest):
            request = self._bounded(request)
            if request.num_beams > 1:
                row = Row(ticket, keys, searched=BeamRow(request, prepared.rules, self.tokenizer))
            else:
                written = TextRow(request, prepared.rules, self.tokenizer, ticket.on_update is not None)
                row = Row(ticket, keys, written)
        elif prepared.unit_rules is None:
            raise ValueError(
                "the model has no audio units, so it cannot speak; train it with a tokenizer that has a codec"
            )
        else:
            row = Row(ticket, keys, spoken=UnitRow(request, prepared.unit_rules))
        most, least = self.config.max_cached_tokens, request.prompt.num_tokens + prepared.num_virtual + 1
        if most is not None and row.width * capacity_of(least) > most:
            beams = "" if row.width == 1 else f" of {row.width} beams"
            raise ValueError(
                f"the prompt has {request.prompt.num_tokens} tokens, which with an answer{beams} take "
                f"{row.width * capacity_of(least)} of the cache's {most}; shorten it, or raise max_cached_tokens"
            )
        return row

    def _bounded(self, request: TextRequest) -> TextRequest:
        """With as many new tokens at most as there is room for behind the prompt."""
        most = self.config.max_length
        if most is None:
            return request
        room = most - request.prompt.num_tokens
        if room < 1:
            raise ValueError(
                f"the prompt has {request.prompt.num_tokens} tokens; this model takes {most} at most, its answer "
                f"included, as training's sequences held no more: shorten it"
            )
        if room >= request.max_new_tokens:
            return request
        return replace(request, max_new_tokens=room, min_new_tokens=min(room, request.min_new_tokens))

    def _admit(self) -> None:
        """Lets requests in, as far as there is room."""
        if not self._waiting:
            return
        config, new, put_off = self.config, [], []
        most_rows = 1 if config.deterministic else config.max_rows
        budget = config.prefill_tokens - sum(len(row.inputs.x_TD) for row in self._prefilling if row.inputs)
        begun = {row.keys.whole for row in self._prefilling if row.keys is not None}
        num_rows = sum(row.width for row in [*self._running.rows, *self._prefilling])
        while self._waiting and num_rows < most_rows:
            row = self._waiting[0]
            if num_rows and num_rows + row.width > most_rows:  # one that is wider than all runs alone
                break
            if (budget <= 0 and (new or self._prefilling)) or not self._has_room(row, num_rows):
                break
            self._waiting.popleft()
            if row.keys is not None and row.keys.whole in begun:  # the same prompt is being computed: once is enough
                put_off.append(row)
                continue
            num_rows += row.width
            self._prompts.place(row, self._room_for(row))
            if row.searched is not None:
                more = range(row.width - 1)
                row.searched.cached.spare = [self._cache.allocate(self._room_for(row)) for _ in more]
            if not row.has_drawn:
                self.counts.prompt_tokens += row.request.prompt.num_tokens
                self.counts.cached_tokens += row.num_cached
            if row.hidden_D is None:
                budget -= row.request.prompt.num_tokens - row.num_found
                if row.keys is not None:
                    begun.add(row.keys.whole)
            new.append(row)
        self._waiting.extendleft(reversed(put_off))
        self._prompts.embed([row for row in new if row.hidden_D is None], self._refuse)
        self._prefilling += [row for row in new if not row.ticket.is_done]

    def _room_for(self, row: Row) -> int:
        """Positions with which a row begins."""
        most = self.config.max_cached_tokens
        num_prompt = row.request.prompt.num_tokens + self._prepared.num_virtual + len(row.since_prompt)
        wanted = num_prompt + min(row.most_new, _ROOM)
        return wanted if most is None or row.width * capacity_of(wanted) <= most else num_prompt + 1

    def _has_room(self, row: Row, num_rows: int) -> bool:
        most = self.config.max_cached_tokens
        if most is None or not num_rows:
            return True
        return self._cache.num_positions + row.width * capacity_of(self._room_for(row)) <= most

    def _make_room(self, ready: list[Row]) -> None:
        """Moves rows that have grown out of their slabs; where memory is bounded the youngest ones make room."""
        most = self.config.max_cached_tokens
        for row in self._running.rows:
            cached = row.cached
            if cached is None or cached.length < cached.slab.capacity:
                continue
            needed = row.width * capacity_of(cached.length + 1)
            if most is not None and needed > most:
                self._end_at_length(row)
                continue
            more = needed - row.width * cached.slab.capacity
            while most is not None and row.cached is not None and self._cache.num_positions + more > most:
                self._take_out_youngest(ready)
            if row.cached is not None:
                for each in row.all_cached:
                    self._cache.make_room(each, cached.length + 1 - each.length)

    def _take_out_youngest(self, ready: list[Row]) -> None:
        """The row that was submitted last waits, before all others, to begin again where it was."""
        begun = [*self._running.rows, *self._prefilling, *ready]
        youngest = max(begun, key=lambda each: each.submitted)
        self.counts.preemptions += 1
        if youngest in self._prefilling or youngest in ready:
            (ready if youngest in ready else self._prefilling).remove(youngest)
            youngest.free(self._cache)
            youngest.inputs = youngest.hidden_D = None
        else:
            self._running.take_out(youngest)
        self._waiting.appendleft(youngest)

    def _end_at_length(self, row: Row) -> None:
        text = row.written or row.searched
        error = None
        if text is not None:
            text.stop_at_length()
            try:
                row.tell()
            except Exception as raised:  # the listener's: of this row alone
                error = raised
        self._close(row, self._running.remove(row), error)

    def _refuse(self, row: Row, error: Exception) -> None:
        row.free(self._cache)
        self._close(row, error=error)

    @torch.inference_mode()
    def _drop_cancelled(self) -> None:
        cancelled = [row for row in self._rows.values() if row.is_cancelled]
        for row in cancelled:
            self.counts.cancelled += 1
            num_bounded = 0
            if row in self._waiting:
                self._waiting.remove(row)
                self._running.forget(row)
            elif row in self._prefilling:
                self._prefilling.remove(row)
                row.free(self._cache)
            elif row.cached is not None:
                num_bounded = self._running.remove(row)
            self._close(row, num_bounded)

    def _close(self, row: Row, num_bounded: int = 0, error: Exception | None = None) -> None:
        """Gives a row its end."""
        del self._rows[row.ticket]
        if error is not None:
            self.counts.errors += 1
            row.ticket.close(None, error)
            return
        result, num_new = row.result(num_bounded)
        self.counts.new_tokens += num_new
        row.ticket.close(result)

    def _fail(self, error: Exception) -> None:
        """Ends all rows that have begun with an error; those that wait go on."""
        waiting = set(map(id, self._waiting))
        for row in [row for row in self._rows.values() if id(row) not in waiting]:
            self._close(row, error=error)
        self._prefilling.clear()
        self._clear()


def _check_draft(config: EngineConfig, draft: MultimodalModel | NGrams | None, num_text: int) -> None:
    got = "none" if draft is None else "ngram" if isinstance(draft, NGrams) else "draft"
    if (got != "none" or config.speculation in ("draft", "ngram")) and got != config.speculation:
        named = {"none": "no draft model", "ngram": "a table of n-grams", "draft": "a draft model"}[got]
        raise ValueError(
            f"speculation is {config.speculation!r} and there is {named}; give a draft model with speculation draft, a "
            f"table with ngram, and neither with another"
        )
    if draft is None:
        return
    own = draft.num_text if isinstance(draft, NGrams) else draft.config.num_text
    if own != num_text:
        raise ValueError(
            f"the draft model has {own} ids of text, the model {num_text}; take one that `mmllm draft` has made of it"
        )
