"""What of Gradio's server the page lets through: its own routes, its own files, nothing from elsewhere.

Gradio serves more than a page needs: a proxy, an API of every function, editors of its own source. It also takes paths
and addresses of files in a request's body, and reads them for the client, where the application is mounted and not
launched by itself. All of that is shut here, in one place before it, rather than route by route.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_READ = re.compile(
    r"/|/(?:config|theme\.css|manifest\.json|favicon\.ico|robots\.txt)|/(?:assets|static)/[\w./@+-]+"
    r"|/gradio_api/(?:queue/data|upload_progress|startup-events|theme\.css|heartbeat/\w+)"
)
_WRITE = re.compile(r"/gradio_api/(?:queue/join|upload|cancel|reset)/?")
_FILE = "/gradio_api/file="
_JOIN = "/gradio_api/queue/join"
_OUTSIDE_META = re.compile(r"<meta\s[^>]*(?:property|name)=\"(?:og|twitter):[^>]*>", re.DOTALL)
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

CONTENT_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",  # Gradio's page has scripts in it, and compiles templates
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "frame-ancestors 'none'",
        "base-uri 'self'",
        "form-action 'self'",
    )
)
"""Browsers ask nobody but this server, whatever stands in the page."""


@dataclass(frozen=True)
class PageLimits:
    """How much a client may send.

    Attributes:
        upload_bytes: a file.
        request_bytes: what a button sends: texts, and names of files that were uploaded before.
    """

    upload_bytes: int = 32 * 2**20
    request_bytes: int = 2**20

    def __post_init__(self) -> None:
        for name in ("upload_bytes", "request_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


class ClosedRoutes:
    """ASGI middleware around a mounted Gradio application.

    Args:
        app: what is inside.
        folder: the only one whose files are served, and may be named in requests.
        host: that is listened on. On this machine's own (127.0.0.1, ::1, localhost) requests must name it as such: a
            website whose name was made to point here (DNS rebinding) does not.
        limits: of what is sent.
    """

    def __init__(self, app: ASGIApp, folder: Path, host: str, limits: PageLimits | None = None) -> None:
        self._app, self._folder = app, folder.resolve()
        self._is_local = host in _LOOPBACK
        self._limits = limits or PageLimits()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        path, method = scope["path"], scope["method"]
        if method == "POST":
            body = await _Body.read(receive, self._limit(path))
            if body is None:
                too_large = PlainTextResponse(f"more than {self._limit(path)} bytes were sent; send less", 413)
                await too_large(scope, receive, send)
                return
            if path.rstrip("/") == _JOIN and (wrong := self._wrong_request(body.content)) is not None:
                await PlainTextResponse(wrong, 400)(scope, receive, send)
                return
            receive = body.receive
        page = _Page(send, is_page=path == "/" and method == "GET")
        await self._app(page.request(scope), receive, page.send)

    def _limit(self, path: str) -> int:
        return self._limits.request_bytes if path.rstrip("/") == _JOIN else self._limits.upload_bytes + 2**16

    def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        headers, path, method = Headers(scope=scope), scope["path"], scope["method"]
        host = urlsplit(f"//{headers.get('host', '')}")
        if self._is_local and _hostname(host.netloc) not in _LOOPBACK:
            return PlainTextResponse("this page answers to localhost alone", 403)
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host.netloc:
            return PlainTextResponse("this page answers to itself alone, not to other websites", 403)
        if path.startswith(_FILE):
            is_ours = method in ("GET", "HEAD") and self._is_ours(path[len(_FILE) :])
            return None if is_ours else PlainTextResponse("no such file", 404)
        pattern = {"GET": _READ, "HEAD": _READ, "POST": _WRITE}.get(method)
        if pattern is None or not pattern.fullmatch(path) or ".." in path:
            return PlainTextResponse("no such page", 404)
        return None

    def _is_ours(self, path: str) -> bool:
        try:
            file = Path(path)
            return file.is_absolute() and file.resolve().is_relative_to(self._folder) and file.is_file()
        except (OSError, ValueError):  # a null byte, or too long
            return False

    def _wrong_request(self, content: bytes) -> str | None:
        try:
            values = json.loads(content)
        except (ValueError, RecursionError):
            return "the request is no JSON"
        for path in _named_files(values):
            if not self._is_ours(path):
                return "the request names a file that was not uploaded here; upload it first"
        return None


def _hostname(netloc: str) -> str | None:
    try:
        return urlsplit(f"//{netloc}").hostname
    except ValueError:
        return None


def _named_files(values: Any) -> list[str]:
    """Each `path` in a request, and what stands for it: Gradio takes any such object for a file's description."""
    found, waiting = [], [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            found += [value["path"]] if isinstance(value.get("path"), str) else []
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return found


class _Body:
    """A request's body, read whole."""

    def __init__(self, content: bytes, receive: Receive) -> None:
        self.content = content
        self._receive = receive
        self._is_given = False

    @staticmethod
    async def read(receive: Receive, max_bytes: int) -> _Body | None:
        """None: it is larger."""
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                break
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > max_bytes:
                return None
            more = message.get("more_body", False)
        return _Body(b"".join(parts), receive)

    async def receive(self) -> Message:
        """The body first, then what else comes (that the client has gone)."""
        if self._is_given:
            return await self._receive()
        self._is_given = True
        return {"type": "http.request", "body": self.content, "more_body": False}


class _Page:
    """A response with our headers; of the page itself without what points elsewhere."""

    def __init__(self, send: Send, is_page: bool) -> None:
        self._send, self._is_page = send, is_page
        self._start: Message | None = None
        self._parts: list[bytes] = []

    def request(self, scope: Scope) -> Scope:
        """The page is asked for uncompressed, so that it can be read here."""
        if not self._is_page:
            return scope
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"accept-encoding"]
        return {**scope, "headers": headers}

    async def send(self, message: Message) -> None:
        """Passes a message on; a page's once it is whole."""
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["content-security-policy"] = CONTENT_POLICY
            headers["x-content-type-options"] = "nosniff"
            headers["referrer-policy"] = "no-referrer"
            if self._is_page:
                self._start = message
                return
        if self._start is None or message["type"] != "http.response.body":
            await self._send(message)
            return
        self._parts.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        page = _OUTSIDE_META.sub("", b"".join(self._parts).decode()).encode()
        MutableHeaders(scope=self._start)["content-length"] = str(len(page))
        await self._send(self._start)
        await self._send({"type": "http.response.body", "body": page})
