"""How many are answered at once, and what happens when the server is told to stop."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mmllm.serving.errors import ApiError

MAX_RETRY_SECONDS = 30
_TOLERATED_SECONDS = 0.05
"""That a listener's own buffer covers."""
_SHARE = 0.1
"""Of the newest answer in the mean of how long answers take."""


class Admission:
    """Who is let in: so many run, so many wait, and who comes then is told when to come again.

    Args:
        max_running: rows that are answered at once.
        max_queue: rows that may wait beside them.
        what: rows of it, for errors.
    """

    def __init__(self, max_running: int, max_queue: int, what: str = "requests") -> None:
        self.max_running = max_running
        self._max_queue = max_queue
        self._what = what
        self._mean_seconds = 1.0
        self.num_rows = 0
        self.num_refused = 0

    @contextmanager
    def enter(self, num_rows: int = 1) -> Iterator[None]:
        """Keeps places for rows.

        Raises:
            ApiError: 429, there are none.
        """
        most = self.max_running + self._max_queue
        if self.num_rows and self.num_rows + num_rows > most:
            self.num_refused += 1
            raise self.full(f"{self.num_rows} {self._what} are being answered or wait, of {most}")
        started = time.monotonic()
        self.num_rows += num_rows
        try:
            yield
        finally:
            self.num_rows -= num_rows
            self._mean_seconds += _SHARE * (time.monotonic() - started - self._mean_seconds)

    def full(self, why: str) -> ApiError:
        """A 429 that says when to come again."""
        seconds = math.ceil(self._mean_seconds * self.num_rows / self.max_running)
        wait = min(max(1, seconds), MAX_RETRY_SECONDS)
        message = f"{why}; try again in {wait} s"
        return ApiError(429, message, code="queue_full", headers={"Retry-After": str(wait)})


class ListeningClock:
    """Whether a stream of sound is made as fast as it is listened to, from its first sound on.

    What counts is the time that is spent waiting for sound to be made, not that of a client that reads slowly.
    """

    def __init__(self) -> None:
        self._made_seconds = 0.0
        self._waited_seconds = 0.0
        self._waiting_since: float | None = None
        self.was_late = False
        """Whether a listener has heard a gap."""
        self.most_streams = 1
        """That there were at once while this one was."""

    def wait(self) -> None:
        """More sound is waited for from now on; of the first nothing is told."""
        if self._made_seconds:
            self._waiting_since = time.monotonic()

    def add(self, seconds: float) -> None:
        """So much more sound is there."""
        self.was_late |= bool(self._made_seconds) and self.is_late
        self._waited_seconds += self._waiting
        self._made_seconds += seconds
        self._waiting_since = None

    @property
    def _waiting(self) -> float:
        return 0.0 if self._waiting_since is None else time.monotonic() - self._waiting_since

    @property
    def is_late(self) -> bool:
        """Whether a listener would have heard a gap by now."""
        return self._waited_seconds + self._waiting > self._made_seconds + _TOLERATED_SECONDS


class Lifecycle:
    """Whether a server takes requests, and when the last of them must end."""

    def __init__(self) -> None:
        self.is_draining = False
        self.num_requests = 0
        """That are being answered, health checks and metrics apart."""
        self._ended: asyncio.Event | None = None

    @property
    def has_ended(self) -> asyncio.Event:
        """Set when what still runs must end; of the loop that asks first."""
        if self._ended is None:
            self._ended = asyncio.Event()
        return self._ended

    def drain(self) -> None:
        """Takes no more requests."""
        self.is_draining = True

    def end(self) -> None:
        """Ends what still runs; from the server's own loop."""
        self.is_draining = True
        self.has_ended.set()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Counts one.

        Raises:
            ApiError: 503, the server is stopping.
        """
        if self.is_draining:
            raise stopping()
        self.num_requests += 1
        try:
            yield
        finally:
            self.num_requests -= 1


def stopping() -> ApiError:
    """A 503."""
    return ApiError(503, "this server is stopping; ask another one", code="draining", headers={"Retry-After": "1"})
