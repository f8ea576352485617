"""Runs a server: on its own thread, from a port that is told when it listens to the last answer of a drain."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import FrameType, TracebackType
from typing import Any

import uvicorn
from fastapi import FastAPI

from mmllm.inference.engine.requests import SpokenUnits, TextRequest
from mmllm.inference.speaking import speech_options
from mmllm.inference.streaming_sound import sound_of
from mmllm.serving.app import create_app
from mmllm.serving.config import ServeConfig
from mmllm.serving.served import ServedModel
from mmllm.serving.state import ServerState

_START_SECONDS = 60.0
_END_SECONDS = 5.0
"""For answers that are ended to be told so, and for connections to be closed."""
_TICK = 0.02
_TRIED_TEXT = "one two three four five six seven"
_TRIED_ROWS, _TRIED_SECONDS, _TRIES, _TRYING_SECONDS = 6, 0.5, 4, 2.0
"""What is spoken to see how fast that is: the first try is slower, since much is made once, and others may be, too."""
_SPEAKING_SHARE, _LEAST_STREAMS = 0.7, 4
"""Of the time, for sounds that are streamed; and how many they are at first, however busy the machine is then."""
_BACKLOG = 2048


class Server:
    """A server that runs in a thread of its own; a context manager starts and drains it.

    Args:
        app: as `create_app` makes it.
        host: address to listen at.
        port: 0: any that is free.
        drain_seconds: that running requests may take once it is told to stop.

    Raises:
        OSError: the address can't be listened at.
    """

    def __init__(self, app: FastAPI, host: str = "127.0.0.1", port: int = 0, drain_seconds: float = 30.0) -> None:
        state: ServerState = app.state.server
        self._lifecycle = state.lifecycle
        self._drain_seconds = drain_seconds
        self._socket = _listening(host, port)
        self.port: int = self._socket.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.port}"
        self._server = uvicorn.Server(
            uvicorn.Config(
                app, log_config=None, access_log=False, lifespan="on", server_header=False, http="h11", ws="none",
                timeout_graceful_shutdown=int(_END_SECONDS),
            )
        )  # fmt: skip
        self._loop: Any = None
        self._thread = threading.Thread(target=self._run, name="mmllm-server", daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        deadline = time.monotonic() + _START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the server did not start; the log says why")
            time.sleep(_TICK)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self, now: threading.Event | None = None) -> None:
        """Takes no more requests, lets those that run end, then ends.

        Args:
            now: once set, what runs is ended at once.
        """
        self._lifecycle.drain()
        deadline = time.monotonic() + self._drain_seconds
        while self._lifecycle.num_requests and time.monotonic() < deadline and not (now and now.is_set()):
            time.sleep(_TICK)
        if self._lifecycle.num_requests and self._loop is not None:
            self._loop.call_soon_threadsafe(self._lifecycle.end)
            deadline = time.monotonic() + _END_SECONDS
            while self._lifecycle.num_requests and time.monotonic() < deadline:
                time.sleep(_TICK)
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            await self._server.serve(sockets=[self._socket])

        asyncio.run(serve())


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Its protocol is named: else asyncio leaves Nagle's algorithm on, and each answer on a connection that is kept waits
    for the client's acknowledgement of its head, some 40 ms.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with ExitStack() as stack:
            listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(_BACKLOG)
            stack.pop_all()
        return listener
    except OSError as error:
        raise OSError(f"can't listen at {host}, port {port}: {error.strerror or error}; give another one") from error


@contextmanager
def told_to_stop() -> Iterator[tuple[threading.Event, threading.Event]]:
    """Two events: the first SIGTERM or SIGINT sets the first, the next one the second. In the main thread alone."""
    events = threading.Event(), threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        events[1 if events[0].is_set() else 0].set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield events
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def serve(models: Mapping[str, ServedModel], config: ServeConfig, host: str, port: int) -> Iterator[str]:
    """Serves until the process is told to stop; lines to print, the first one once it listens.

    Args:
        models: by name.
        config: bounds.
        host: address to listen at.
        port: 0: any that is free.
    """
    for served in models.values():
        warm_up(served)
    with told_to_stop() as (stopping, now):
        server = Server(create_app(models, config), host, port, config.drain_seconds)
        with server:
            yield f"{_listed(list(models))} at {server.url}/v1"
            for served in models.values():
                if served.speaks:
                    yield f"{served.name} streams up to {served.speaking.max_running} sounds at once"
            while not stopping.wait(0.5):  # a signal must find the main thread awake
                pass
            yield "stopping: no more requests are taken; running ones end first"
            server.stop(now)
        yield "stopped"


def warm_up(served: ServedModel) -> None:
    """Has the model write and speak, so that the first client doesn't wait for what is made once.

    Where no bound is given, as many sounds are streamed at once as would all be made faster than they are listened to,
    with a share of the time left for what else is asked. `ServedModel.streaming` goes on from there.
    """
    prompt = served.prompter.continuation(["a"])
    served.engine.run([TextRequest(prompt, max_new_tokens=1)])
    if served.speaks:
        factor = _real_time_factor(served)
        if served.config.max_speaking is None:
            num_streams = max(_LEAST_STREAMS, int(_SPEAKING_SHARE / factor))
            served.speaking.max_running = min(num_streams, served.engine.config.max_rows)


def _real_time_factor(served: ServedModel) -> float:
    """Seconds that a second of speech takes, units and sound, of several at once; the best of a few tries."""
    model, has_pointer = served.model, served.model.model.pointer is not None
    options = speech_options({"max_seconds": _TRIED_SECONDS}, model.generation, has_pointer)
    (request,) = model.speaker.requests(_TRIED_TEXT, None, options)
    rate, factors = model.tokenizer.require_audio().sample_rate, []
    begun = time.monotonic()
    while len(factors) < _TRIES and (len(factors) < 2 or time.monotonic() - begun < _TRYING_SECONDS):
        started, num_samples = time.monotonic(), 0
        for each in served.engine.run([replace(request, number=number) for number in range(_TRIED_ROWS)]):
            assert isinstance(each, SpokenUnits)
            samples_T, _ = sound_of(each.codes_KF, model.tokenizer, each.pointer_F, _TRIED_TEXT)
            num_samples += len(samples_T)
        factors.append((time.monotonic() - started) * rate / max(1, num_samples))
    return min(factors)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
