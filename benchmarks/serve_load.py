"""A served model as a process of its own, and clients that ask it, listen to it and press it: of serve.py."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

MODEL = "bench"
"""The name that the model is served under."""
START_SECONDS, STOP_SECONDS = 120.0, 60.0
REQUEST_SECONDS = 120.0
GAP_SECONDS = 0.1
"""A piece of sound that comes later than this after the one before it has ended is a gap."""


class ServerProcess:
    """`mmllm serve` on a free port; a context manager starts and ends it.

    Args:
        model: folder of the model.
        work: folder for what it prints.
        threads: of PyTorch.
        options: more of the command.
    """

    def __init__(self, model: Path, work: Path, threads: int, options: Sequence[str] = ()) -> None:
        command = [sys.executable, "-m", "mmllm.cli", "serve", "--model", f"{MODEL}={model.resolve()}", "--port", "0"]
        self._log = work / "serve.log"
        self._command = [*command, *options]
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    def __enter__(self) -> ServerProcess:
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=log, text=True, env=self._environment
            )
        try:
            self.url = self._wait_for_url()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def memory(self) -> int:
        """Bytes that are resident."""
        assert self._process is not None
        return psutil.Process(self._process.pid).memory_info().rss

    def stop(self) -> None:
        """Tells it to end, and ends it if it doesn't."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stdout is not None:
            process.stdout.close()

    def _wait_for_url(self) -> str:
        assert self._process is not None and self._process.stdout is not None
        deadline, stdout = time.monotonic() + START_SECONDS, self._process.stdout
        while time.monotonic() < deadline:
            if not select.select([stdout], [], [], 0.2)[0]:
                if self._process.poll() is not None:
                    break
                continue
            line = stdout.readline()
            if found := re.search(r"http://[^\s/]+:\d+", line):
                return found[0]
            if not line:
                break
        told = self._log.read_text().strip().splitlines()
        raise RuntimeError(f"mmllm serve told no address: {told[-1] if told else 'it printed nothing'}")


@dataclass(frozen=True)
class Ask:
    """A request.

    Attributes:
        path: of the route.
        body: JSON.
    """

    path: str
    body: dict[str, Any]

    def encoded(self) -> bytes:
        """The body."""
        return json.dumps(self.body).encode()


@dataclass(frozen=True)
class Outcome:
    """What came of a request.

    Attributes:
        status: of HTTP; 0: there was no answer.
        first_seconds: to the first content, or to the end where there was none.
        text: all content.
        error: what went wrong; None: the answer came whole, or it was refused by its status.
    """

    status: int
    first_seconds: float
    text: str = ""
    error: str | None = None

    @property
    def is_good(self) -> bool:
        """Whether it was answered, to the end."""
        return self.status == 200 and self.error is None


async def stream(client: httpx.AsyncClient, ask: Ask) -> Outcome:
    """Sends a request whose answer is a stream of events, and reads it to its end."""
    began, first, status = time.perf_counter(), None, 0
    pieces: list[str] = []
    is_done, error = False, None
    try:
        async with client.stream("POST", ask.path, json=ask.body) as reply:
            status = reply.status_code
            if status != 200:
                return Outcome(status, time.perf_counter() - began, (await reply.aread()).decode())
            async for value in _events(reply):
                if value == "[DONE]":
                    is_done = True
                    break
                if "error" in value:
                    error = str(value["error"])
                    break
                piece = _content(value)
                if piece:
                    first = first or time.perf_counter() - began
                    pieces.append(piece)
    except (httpx.HTTPError, OSError, ValueError) as failed:
        error = f"{type(failed).__name__}: {failed}"
    if error is None and not is_done:
        error = "the stream ended before [DONE]"
    return Outcome(status, first or time.perf_counter() - began, "".join(pieces), error)


async def _events(reply: httpx.Response) -> AsyncIterator[Any]:
    async for line in reply.aiter_lines():
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


def _content(value: dict[str, Any]) -> str:
    """Of a chunk: text, or sound in base64."""
    if not value.get("choices"):
        return ""
    choice = value["choices"][0]
    if "delta" not in choice:
        return choice["text"]
    sound = (choice["delta"].get("audio") or {}).get("data")
    return sound or choice["delta"].get("content") or ""


async def whole(client: httpx.AsyncClient, ask: Ask) -> Outcome:
    """Sends a request whose answer comes at once."""
    began = time.perf_counter()
    try:
        reply = await client.post(ask.path, json=ask.body)
        if reply.status_code != 200:
            return Outcome(reply.status_code, time.perf_counter() - began, reply.text)
        choice = reply.json()["choices"][0]
    except (httpx.HTTPError, OSError, ValueError, LookupError) as failed:
        return Outcome(0, time.perf_counter() - began, error=f"{type(failed).__name__}: {failed}")
    message = choice.get("message")
    text = choice["text"] if message is None else (message.get("audio") or {}).get("data") or message["content"]
    return Outcome(reply.status_code, time.perf_counter() - began, text)


@contextlib.asynccontextmanager
async def clients_of(url: str, count: int) -> AsyncIterator[httpx.AsyncClient]:
    """A client with so many connections."""
    limits = httpx.Limits(max_connections=count, max_keepalive_connections=count)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=REQUEST_SECONDS, trust_env=False) as client:
        yield client


async def closed_loop(client: httpx.AsyncClient, asks: Iterator[Ask], num_clients: int, count: int) -> list[Outcome]:
    """So many clients, each of which asks again as soon as it is answered, until all have asked `count` times."""
    outcomes: list[Outcome] = []
    left = itertools.repeat(None, count)

    async def one() -> None:
        for _ in left:
            outcomes.append(await stream(client, next(asks)))

    await asyncio.gather(*(one() for _ in range(num_clients)))
    return outcomes


# --- listeners -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heard:
    """What a client heard of a sound that was streamed to it.

    Attributes:
        status: of HTTP; 0: there was no answer.
        seconds: of sound.
        late_seconds: of the piece that came latest, after all that was there had been heard.
        error: what went wrong.
    """

    status: int
    seconds: float = 0.0
    late_seconds: float = 0.0
    error: str | None = None

    @property
    def is_smooth(self) -> bool:
        """Whether it was served, and without a gap."""
        return self.status == 200 and self.error is None and self.seconds > 0 and self.late_seconds <= GAP_SECONDS


def latest(pieces: Sequence[tuple[float, float]]) -> float:
    """By how much a listener waits for the piece that comes latest, who begins with the first one.

    Args:
        pieces: when each comes, and how many seconds of sound it has.
    """
    worst, runs_out = 0.0, pieces[0][0] if pieces else 0.0
    for arrival, seconds in pieces:
        late = arrival - runs_out
        worst = max(worst, late)
        runs_out += max(late, 0.0) + seconds  # who waits hears the rest later
    return worst


async def listen(client: httpx.AsyncClient, ask: Ask) -> Heard:
    """Plays a sound (`pcm`) in real time while it comes."""
    pieces: list[tuple[float, float]] = []
    status = 0
    try:
        async with client.stream("POST", ask.path, json=ask.body) as reply:
            status = reply.status_code
            if status != 200:
                await reply.aread()
                return Heard(status)
            bytes_a_second = 2 * int(reply.headers["X-Sample-Rate"])
            async for piece in reply.aiter_raw():
                pieces.append((time.perf_counter(), len(piece) / bytes_a_second))
    except (httpx.HTTPError, OSError) as failed:
        return Heard(status, error=f"{type(failed).__name__}: {failed}")
    return Heard(status, sum(seconds for _, seconds in pieces), latest(pieces))


# --- pressure --------------------------------------------------------------------------------------------------------


async def press(url: str, asks: Sequence[Ask], rate: float, seconds: float, connections: int) -> Counter[str]:
    """Sends so many requests a second, whatever comes of them, as far as this machine can; counts the answers.

    Args:
        url: of the server.
        asks: are sent in turn.
        rate: requests a second.
        seconds: how long.
        connections: on which they are sent.

    Returns:
        How often each status came, and what went wrong otherwise.
    """
    counts: Counter[str] = Counter()
    where = urlsplit(url)
    assert where.hostname is not None and where.port is not None
    messages = [_message(where.netloc, ask) for ask in asks]
    began = time.perf_counter()
    numbers = itertools.count()

    async def one(host: str, port: int) -> None:
        connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        while True:
            number = next(numbers)
            due = number / rate
            if due >= seconds or time.perf_counter() - began >= seconds:
                break
            await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
            try:
                connection = connection or await asyncio.open_connection(host, port)
                status, stays = await asyncio.wait_for(
                    _exchange(*connection, messages[number % len(messages)]), REQUEST_SECONDS
                )
                counts[str(status)] += 1
            except (OSError, EOFError, ValueError, TimeoutError) as failed:
                counts[type(failed).__name__] += 1
                stays = False
            if not stays and connection is not None:
                connection[1].close()
                connection = None
        if connection is not None:
            connection[1].close()

    await asyncio.gather(*(one(where.hostname, where.port) for _ in range(connections)))
    return counts


def _message(host: str, ask: Ask) -> bytes:
    body = ask.encoded()
    head = f"POST {ask.path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, message: bytes) -> tuple[int, bool]:
    """The status of an answer, all of which is read, and whether the connection stays.

    httpx would take more of the machine than the server that is to be pressed.
    """
    writer.write(message)
    await writer.drain()
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
    await reader.readexactly(int(headers["content-length"]))
    return int(lines[0].split()[1]), headers.get("connection") != "close"
