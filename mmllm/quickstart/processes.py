"""Commands as processes that do not outlive the one that started them.

Short commands that follow one another share a process, for which the imports are made once. It is ended before one
that needs a process of its own: a training has the memory for itself then.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any

import psutil

GRACE_SECONDS = 20.0
"""How long a process that is told to end may take: the ranks of a training can wait for one another."""


class Processes:
    """The commands that run at the moment."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[bytes]] = []
        self._shared: _Shared | None = None
        self._lock = threading.Lock()

    def run_shared(self, command: Sequence[str]) -> int:
        """Runs `mmllm COMMAND` in the process that such commands share and gives its exit code; one at a time."""
        if self._shared is None:
            self._shared = _Shared()
            self._running.append(self._shared.process)
        shared = self._shared
        code = shared.run(command)
        if shared.process.poll() is not None:
            self._end_shared()
        return code

    def run(self, command: Sequence[str], num_threads: int) -> int:
        """Runs `mmllm COMMAND` with so many threads and gives its exit code."""
        self._end_shared()
        with self._started(command, num_threads) as process:
            return process.wait()

    def run_beside(self, command: Sequence[str], num_threads: int, say: Callable[[str], None]) -> tuple[int, str]:
        """As `run`, for a command that others run beside: what they print must not be mixed.

        Args:
            command: of `mmllm`.
            num_threads: of the process.
            say: called with each line of its standard error as it comes, from another thread.

        Returns:
            The exit code, and its whole standard output.
        """
        self._end_shared()
        with self._started(command, num_threads, is_piped=True) as process:
            assert process.stdout is not None and process.stderr is not None
            reader = threading.Thread(target=_each_line, args=(process.stderr, say), daemon=True)
            reader.start()
            printed = process.stdout.read().decode(errors="replace")
            code = process.wait()
            reader.join()
        return code, printed

    @contextmanager
    def _started(
        self, command: Sequence[str], num_threads: int, is_piped: bool = False
    ) -> Iterator[subprocess.Popen[bytes]]:
        """`mmllm COMMAND` as a process, which is ended with the block."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
        pipe = subprocess.PIPE if is_piped else None
        line = [sys.executable, "-m", "mmllm.cli", *command]
        process = subprocess.Popen(line, env=environment, stdout=pipe, stderr=pipe)
        self._running.append(process)
        try:
            yield process
        finally:
            if process.poll() is None:
                _end(process)
            self._running.remove(process)
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()

    def end_all(self) -> None:
        """Ends what still runs, from another thread too."""
        for process in list(self._running):
            _end(process)
        self._end_shared()

    def _end_shared(self) -> None:
        with self._lock:
            shared, self._shared = self._shared, None
        if shared is not None:
            shared.end()
            self._running.remove(shared.process)


def _each_line(stream: IO[bytes], say: Callable[[str], None]) -> None:
    """Hands on the lines of a stream until it ends."""
    with suppress(ValueError):  # closed with its process
        for line in stream:
            say(line.decode(errors="replace").rstrip())


class _Shared:
    """A process of `mmllm.cli.worker`."""

    def __init__(self) -> None:
        answers, fd = os.pipe()
        command = [sys.executable, "-m", "mmllm.cli.worker", str(fd)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(fd,))
        os.close(fd)
        self._answers = os.fdopen(answers, "rb")

    def run(self, command: Sequence[str]) -> int:
        """Gives the command's exit code, or the process's where that ended before it."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(list(command)).encode() + b"\n")
            self.process.stdin.flush()
        answer = self._answers.readline()
        return int(answer) if answer else self.process.wait() or 1

    def end(self) -> None:
        """Waits until it has seen that nothing more comes."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self._answers.close()


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
