"""A thread that steps an engine while there is work: for servers and pages, whose own threads must not wait."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType

from mmllm.heap import trim_heap
from mmllm.inference.engine.engine import Engine
from mmllm.inference.engine.requests import Request
from mmllm.inference.engine.rows import OnUpdate, Ticket

_logger = logging.getLogger(__name__)
_TRIM_IDLE, _TRIM_BUSY = 2.0, 20.0
"""Seconds from one trim of the heap to the next; it takes some 10 ms."""
OnDone = Callable[[Ticket], None]


class EngineThread:
    """Answers requests in the background, from `start` to `stop`; a context manager does both.

    Args:
        engine: which other threads may step as well.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._wake = threading.Condition()
        self._is_open = False
        self._tickets: dict[Ticket, OnDone | None] = {}
        """Those that are not told to be done."""
        self._thread: threading.Thread | None = None
        self._trimmed = time.monotonic()

    def __enter__(self) -> EngineThread:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def is_alive(self) -> bool:
        """Whether it answers: after `stop`, or where its own code has failed, it doesn't."""
        return self._is_open

    def start(self) -> None:
        """Begins to answer."""
        assert self._thread is None, "it has begun"
        self._is_open = True
        self._thread = threading.Thread(target=self._run, name="mmllm-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Cancels what is not done, tells it, and waits for the thread."""
        with self._wake:
            self._is_open = False
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def submit(self, request: Request, on_update: OnUpdate | None = None, on_done: OnDone | None = None) -> Ticket:
        """See `Engine.submit`.

        Args:
            request: what is asked for.
            on_update: called by the thread with what is new.
            on_done: called by the thread when there is a result, or an error.

        Raises:
            ValueError: the request can't be answered.
            RuntimeError: the thread isn't running.
        """
        if not self._is_open:
            raise RuntimeError("the engine's thread isn't running; call start first")
        ticket = self.engine.submit(request, on_update)  # not under our lock: a listener holds the engine's
        with self._wake:
            self._tickets[ticket] = on_done
            is_late = not self._is_open
            self._wake.notify()
        if is_late:  # it was stopped meanwhile
            self._cancel(ticket)
            self._tell_done()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """See `Engine.cancel`."""
        self.engine.cancel(ticket)

    def _run(self) -> None:
        try:
            while self._wait():
                self.engine.step()
                self._tell_done()
                self._trim()
        except Exception:
            _logger.exception("the engine's thread has failed; it answers nothing any more")
        finally:
            with self._wake:
                self._is_open = False
                left = list(self._tickets)
            for ticket in left:
                self._cancel(ticket)
            self._tell_done()

    def _trim(self) -> None:
        """Gives freed memory back where nothing waits for it, and now and then where something does."""
        seconds = time.monotonic() - self._trimmed
        if seconds > _TRIM_BUSY or (seconds > _TRIM_IDLE and not self._tickets):
            trim_heap()
            self._trimmed = time.monotonic()

    def _wait(self) -> bool:
        """Waits until there is something to do; False: for the end."""
        with self._wake:
            while self._is_open and not self._tickets:
                self._wake.wait()
            return self._is_open

    def _cancel(self, ticket: Ticket) -> None:
        try:
            self.engine.cancel(ticket)
        except Exception as error:  # nobody else will end it
            _logger.exception("a request could not be cancelled")
            if not ticket.is_done:
                ticket.close(None, error)

    def _tell_done(self) -> None:
        with self._wake:
            done = [(ticket, on_done) for ticket, on_done in self._tickets.items() if ticket.is_done]
            for ticket, _ in done:
                del self._tickets[ticket]
        for ticket, on_done in done:
            if on_done is None:
                continue
            try:
                on_done(ticket)
            except Exception:  # the listener's own fault must not end the thread
                _logger.exception("on_done failed")
