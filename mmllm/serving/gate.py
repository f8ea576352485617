"""What every request passes before the server looks into it: key, origin, size; and who is refused while it stops."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmllm.serving.config import ServeConfig
from mmllm.serving.errors import ApiError
from mmllm.serving.limits import Lifecycle
from mmllm.serving.metrics import Metrics

_OPEN = ("/health",)
"""Answered without a key, and while the server stops."""
_UNCOUNTED = ("/health", "/metrics")
_DISCARDED_TIMES, _DISCARD_SECONDS = 8, 10.0
"""Of a body that is too large so much more is read and thrown away, so that the client gets to read why."""


class Gate:
    """Lets requests in.

    Args:
        app: what is behind it.
        config: keys, origins and sizes.
        lifecycle: whether the server takes requests.
        metrics: where answers are counted.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, lifecycle: Lifecycle, metrics: Metrics) -> None:
        self._app = app
        self._config = config
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._digests = [_digest(key) for key in config.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._answer(scope, receive, noted)
        finally:
            self._metrics.note_answer(scope, status, time.monotonic() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, headers = scope["path"], Headers(scope=scope)
        try:
            self._check_origin(headers)
            if path not in _OPEN and scope["method"] != "OPTIONS":
                self._check_key(headers)
            if path in _UNCOUNTED:
                await self._app(scope, receive, send)
                return
            with self._lifecycle.request():
                await self._check_length(headers, receive)
                await self._app(scope, _Bounded(receive, self._config.max_body_bytes), send)
        except ApiError as error:
            await error.response()(scope, receive, send)

    def _check_key(self, headers: Headers) -> None:
        if not self._digests:
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip()) if kind.lower() == "bearer" else b""
        found = [hmac.compare_digest(given, digest) for digest in self._digests]  # all of them, whichever fits
        if not any(found):
            what = "is wrong" if given else "is missing"
            raise ApiError(
                401,
                f"the API key {what}; send the header Authorization: Bearer KEY, with a key of this server's",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_origin(self, headers: Headers) -> None:
        """Refuses web pages that aren't allowed: a browser sends their origin, and lets pages post to any address."""
        origin, allowed = headers.get("origin"), self._config.cors_origins
        if origin is not None and origin not in allowed and "*" not in allowed:
            raise ApiError(
                403, f"pages of {origin[:100]} may not ask this server; start it with --cors", code="origin_not_allowed"
            )

    async def _check_length(self, headers: Headers, receive: Receive) -> None:
        length = headers.get("content-length", "")
        most = self._config.max_body_bytes
        if length.isascii() and length.isdigit() and int(length[:18]) > most:
            await _discard(receive, _DISCARDED_TIMES * most)
            raise _too_large(most)


class _Bounded:
    """Reads a body up to a size."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._size = 0

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            if self._size > self._max_bytes:
                if message.get("more_body"):
                    await _discard(self._receive, _DISCARDED_TIMES * self._max_bytes)
                raise _too_large(self._max_bytes)
        return message


async def _discard(receive: Receive, max_bytes: int) -> None:
    """Reads on, up to a size and for a time, and keeps nothing."""
    try:
        async with asyncio.timeout(_DISCARD_SECONDS):
            while max_bytes > 0:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
                max_bytes -= len(message.get("body", b""))
    except TimeoutError:
        return


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"the request has more than {max_bytes} bytes; send smaller pictures and sounds, or fewer",
        code="request_too_large",
        headers={"Connection": "close"},
    )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
