"""Answers that end when their client goes, or when the server must stop: whole ones, and streams of events."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mmllm.serving.errors import ApiError, as_api_error
from mmllm.serving.limits import Lifecycle, stopping
from mmllm.serving.metrics import Metrics

DONE = b"data: [DONE]\n\n"
_Value = TypeVar("_Value")
_logger = logging.getLogger(__name__)


class ClientGone(Exception):
    """Nobody waits for the answer."""


def event(value: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def while_wanted(work: Coroutine[Any, Any, _Value], request: Request, lifecycle: Lifecycle) -> _Value:
    """The result of some work, which is cancelled when the client goes or the server must stop.

    Args:
        work: what is done.
        request: of the client, whose body was read.
        lifecycle: of the server.

    Raises:
        ClientGone: the client has gone.
        ApiError: 503, the server stops.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    ended = asyncio.ensure_future(lifecycle.has_ended.wait())
    try:
        await asyncio.wait({task, gone, ended}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientGone
        raise stopping()
    finally:
        await _cancel(task, gone, ended)


class Stream(Response):
    """A body that comes piece by piece.

    Args:
        pieces: of the body. What they raise becomes an error event where `is_events`, or else cuts the body short.
        stack: what is held until the end.
        lifecycle: of the server.
        metrics: where clients that go are counted.
        media_type: of the body.
        headers: more of them.
        is_events: whether the body is of server-sent events; each such stream ends with `[DONE]` or an error.
    """

    def __init__(
        self,
        pieces: AsyncIterator[bytes],
        stack: AsyncExitStack,
        lifecycle: Lifecycle,
        metrics: Metrics,
        media_type: str = "text/event-stream",
        headers: Mapping[str, str] | None = None,
        is_events: bool = True,
    ) -> None:
        self.status_code = 200
        self.media_type = media_type
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        self._pieces = pieces
        self._stack = stack
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._is_events = is_events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
        async with self._stack:
            sending = asyncio.ensure_future(self._send(send))
            gone = asyncio.ensure_future(_gone(receive))
            ended = asyncio.ensure_future(self._lifecycle.has_ended.wait())
            try:
                await asyncio.wait({sending, gone, ended}, return_when=asyncio.FIRST_COMPLETED)
                if sending.done():
                    sending.result()
                elif gone.done():
                    self._metrics.note_gone()
                else:
                    await _cancel(sending)
                    await self._end(send, stopping())
            finally:
                await _cancel(sending, gone, ended)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for piece in self._pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except Exception as error:
            await self._end(send, as_api_error(error))
        else:
            await send({"type": "http.response.body", "body": DONE if self._is_events else b"", "more_body": False})

    async def _end(self, send: Send, error: ApiError) -> None:
        if not self._is_events:  # an end without the last chunk is how a client is told
            raise error
        await send({"type": "http.response.body", "body": event(error.to_dict()), "more_body": False})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancels tasks and waits until they have ended; nothing of them is raised."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
