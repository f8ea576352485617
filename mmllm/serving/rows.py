"""Rows of an engine as a coroutine sees them: what is new comes from the engine's thread, and who leaves frees them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import asynccontextmanager
from functools import partial

from mmllm.inference.engine.engine import Ticket
from mmllm.inference.engine.requests import Request, Result, TextUpdate, UnitsUpdate
from mmllm.inference.engine.thread import EngineThread
from mmllm.serving.errors import ApiError, internal_error

Update = TextUpdate | UnitsUpdate
_logger = logging.getLogger(__name__)


class Rows:
    """Requests that an engine answers together; made by `running`."""

    def __init__(self, thread: EngineThread, executor: Executor) -> None:
        self._thread = thread
        self._executor = executor
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[tuple[int, Update | None]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self._is_cancelled = False

    async def updates(self) -> AsyncIterator[tuple[int, Update | None]]:
        """What is new, with the row's number; None once a row is done. Ends when all are."""
        num_left = len(self._tickets)
        while num_left:
            number, update = await self._news.get()
            num_left -= update is None
            yield number, update

    async def results(self) -> list[Result]:
        """All rows' results, when all are done.

        Raises:
            ApiError: a row failed.
        """
        async for _ in self.updates():
            pass
        return [self.result(number) for number in range(len(self._tickets))]

    def result(self, number: int) -> Result:
        """Of a row that is done.

        Raises:
            ApiError: it failed.
        """
        try:
            return self._tickets[number].result()
        except Exception as error:
            if isinstance(error, ApiError):
                raise
            _logger.error("a row failed", exc_info=error)
            raise internal_error() from error

    async def _submit(self, requests: Sequence[Request]) -> None:
        """Submits in another thread, since the engine's lock is held while it computes."""
        future = self._executor.submit(self._submit_all, requests)
        try:
            await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:
            future.add_done_callback(self._cancel_late)
            raise

    def _submit_all(self, requests: Sequence[Request]) -> None:
        try:
            for number, request in enumerate(requests):
                ticket = self._thread.submit(request, partial(self._tell, number), partial(self._tell_done, number))
                self._tickets.append(ticket)
        except BaseException:
            self._cancel_all()
            raise

    def _tell(self, number: int, update: Update | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._news.put_nowait, (number, update))
        except RuntimeError:  # the loop has ended, and nobody listens
            return

    def _tell_done(self, number: int, ticket: Ticket) -> None:
        self._tell(number, None)

    def _cancel_late(self, future: Future[None]) -> None:
        self._cancel_all()

    def _cancel_all(self) -> None:
        for ticket in self._tickets:
            if not ticket.is_done:
                self._thread.cancel(ticket)

    def cancel(self) -> None:
        """Ends what isn't done, in another thread, without waiting."""
        if not self._is_cancelled and any(not ticket.is_done for ticket in self._tickets):
            self._is_cancelled = True
            self._executor.submit(self._cancel_all)


@asynccontextmanager
async def running(thread: EngineThread, executor: Executor, requests: Sequence[Request]) -> AsyncIterator[Rows]:
    """Has requests answered; whatever isn't done when the context is left is ended.

    Args:
        thread: of an engine.
        executor: whose threads may wait for the engine.
        requests: that are answered together.

    Raises:
        ValueError: one can't be answered; then none is.
    """
    rows = Rows(thread, executor)
    try:
        await rows._submit(requests)
        yield rows
    finally:
        rows.cancel()
