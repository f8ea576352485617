"""Runs the page, from a port that is told when it listens to the signal that ends it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn

from mmllm.serving.page import PageConfig, page_app, page_folder
from mmllm.serving.page_answers import Asker
from mmllm.serving.run import told_to_stop

_START_SECONDS = 60.0
_TICK = 0.02
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve_page(
    askers: Sequence[Asker], host: str = "127.0.0.1", port: int = 0, config: PageConfig | None = None
) -> Iterator[str]:
    """Serves the page until the process is told to stop; lines to print, the first one once it listens.

    Args:
        askers: as of `page_app`.
        host: address to listen at.
        port: 0: any that is free.
        config: what the page allows.

    Raises:
        OSError: the address can't be listened at.
    """
    with told_to_stop() as (stopping, _), running_page(askers, host, port, config) as url:
        yield f"{url} shows the page; Ctrl-C ends it"
        if host not in _LOOPBACK:
            yield "whoever reaches this address can use the page: it asks for no password, and is not encrypted"
        while not stopping.wait(0.5):  # a signal must find the main thread awake
            pass


@contextmanager
def running_page(
    askers: Sequence[Asker], host: str = "127.0.0.1", port: int = 0, config: PageConfig | None = None
) -> Iterator[str]:
    """The page in a thread of its own, which listens within; gives its URL.

    Raises:
        OSError: the address can't be listened at.
    """
    listening = listen(host, port)
    with listening, page_folder() as folder:
        app = page_app(askers, folder, host, config)
        server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=3)
        )
        thread = threading.Thread(target=server.run, args=([listening],), name="mmllm-page", daemon=True)
        thread.start()
        try:
            wait_for(server, thread)
            name = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, f"[{host}]" if ":" in host else host)
            yield f"http://{name}:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def wait_for(server: Any, thread: threading.Thread) -> None:
    """Waits until a server that runs in a thread has started.

    Raises:
        RuntimeError: it hasn't.
    """
    deadline = time.monotonic() + _START_SECONDS
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise RuntimeError("the page did not start; the log says why")
        time.sleep(_TICK)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        OSError: the address can't be listened at.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise OSError(f"can't listen at {host}, port {port}: {error.strerror or error}; give another one") from error
