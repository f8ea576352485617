"""One engine for all that is asked of a model, by however many threads; results, or what went wrong, one by one."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from mmllm.checkpoints.settings import GenerationConfig
from mmllm.inference.engine.engine import Engine, Ticket
from mmllm.inference.engine.ngrams import NGrams
from mmllm.inference.engine.requests import EngineConfig, Request, Result, TextUpdate, UnitsUpdate
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.multimodal import MultimodalModel
from mmllm_tokenizers.folder import TokenizerFolder

Update = TextUpdate | UnitsUpdate


def bounded(engine: EngineConfig, generation: GenerationConfig, decoder: DecoderConfig) -> EngineConfig:
    """With the model's own bound of prompts and their texts, where there is none.

    Where no layer sees beyond a window, a text may be of any length.
    """
    sees_windows = all(decoder.rule(layer).window is not None for layer in range(decoder.num_hidden_layers))
    if engine.max_length is not None or sees_windows:
        return engine
    return replace(engine, max_length=generation.max_length)


class Runner:
    """A model's engine, made when it is first needed.

    Args:
        model: in any mode.
        tokenizer: of the model.
        config: the engine's.
        draft: a smaller model that drafts for it.
    """

    def __init__(
        self,
        model: MultimodalModel,
        tokenizer: TokenizerFolder,
        config: EngineConfig,
        draft: MultimodalModel | NGrams | None = None,
    ) -> None:
        self._model, self._tokenizer, self._config, self._draft = model, tokenizer, config, draft
        self._lock = threading.Lock()
        self._engine: Engine | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What copies and other processes get: each has an engine of its own."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_engine")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The inverse of `__getstate__`."""
        self.__dict__.update(state, _lock=threading.Lock(), _engine=None)

    @property
    def engine(self) -> Engine:
        """The one engine of all threads."""
        with self._lock:
            if self._engine is None:
                self._engine = Engine(self._model, self._tokenizer, self._config, self._draft)
            return self._engine

    def change(self, change: Callable[[], None]) -> None:
        """Changes what the model computes; the engine forgets what it knows of before.

        Raises:
            ValueError: something is being answered.
        """
        with self._lock:
            engine = self._engine
            num_asked = 0 if engine is None else engine.num_running + engine.num_waiting
            if num_asked:
                raise ValueError(f"{num_asked} requests are being answered; wait for them, then change the model")
            change()

    def complete(
        self,
        requests: Sequence[Request],
        stop: Callable[[], bool] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Result | Exception]:
        """Answers requests, beside those of other threads.

        Args:
            requests: any number of them.
            stop: asked before each step; True ends those that aren't done, whose results are what there is so far.
            progress: called with the number of those that have become done.

        Returns:
            A result for each request, in order, or what went wrong with it.
        """
        engine = self.engine
        asked: dict[int, Ticket | Exception] = {}
        waiting: list[Ticket] = []
        order = sorted(range(len(requests)), key=lambda place: -requests[place].prompt.num_tokens)  # memory fails early
        try:
            for place in order:
                try:
                    asked[place] = ticket = engine.submit(requests[place])
                except ValueError as error:
                    asked[place] = error
                else:
                    waiting.append(ticket)
            engine.finish(waiting, progress, stop)
        finally:
            for ticket in waiting:
                engine.cancel(ticket)
        return [_outcome(asked[place]) for place in range(len(requests))]

    def stream(self, request: Request) -> Updates:
        """Begins to answer a request, piece by piece.

        Raises:
            ValueError: it can't be answered.
        """
        return Updates(self.engine, request)


class Updates(Iterator[Update]):
    """What comes of a request, while it comes; the engine moves on when the next piece is asked for."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine = engine
        self._waiting: deque[Update] = deque()
        self._ticket = engine.submit(request, self._waiting.append)
        weakref.finalize(self, engine.cancel, self._ticket)  # where nobody reads to its end

    def __next__(self) -> Update:
        """The next piece.

        Raises:
            StopIteration: there is none.
            Exception: what went wrong.
        """
        while not self._waiting:
            if self._ticket.is_done and not self._waiting:  # another thread's step may have brought both
                self._ticket.result()
                raise StopIteration
            self._engine.step()
        return self._waiting.popleft()

    def close(self) -> None:
        """Ends the request if it isn't done; from any thread."""
        self._engine.cancel(self._ticket)

    def result(self) -> Result:
        """What came of it, after the last piece, or so far after `close`."""
        return self._ticket.result()


def _outcome(asked: Ticket | Exception) -> Result | Exception:
    if isinstance(asked, Exception):
        return asked
    try:
        return asked.result()
    except Exception as error:
        return error
