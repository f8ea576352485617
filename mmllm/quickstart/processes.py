"""Commands as processes that do not outlive the one that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psutil

GRACE_SECONDS = 20.0
"""How long a process that is told to end may take: the ranks of a training can wait for one another."""


class Processes:
    """The commands that run at the moment."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[bytes]] = []

    def run(self, command: Sequence[str], num_threads: int) -> int:
        """Runs `mmllm COMMAND` with so many threads and gives its exit code."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
        process = subprocess.Popen([sys.executable, "-m", "mmllm.cli", *command], env=environment)
        self._running.append(process)
        try:
            return process.wait()
        finally:
            if process.poll() is None:
                _end(process)
            self._running.remove(process)

    def end_all(self) -> None:
        """Ends what still runs, from another thread too."""
        for process in list(self._running):
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and those that it started (DDP's other ranks): politely, then not."""
    try:
        parent = psutil.Process(process.pid)
        family = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.terminate()
    for member in psutil.wait_procs(family, timeout=GRACE_SECONDS)[1]:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


@contextmanager
def terminated_as_interrupt() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that no process is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_signal: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
