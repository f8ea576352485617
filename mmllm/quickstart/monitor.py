"""Resident memory of this process and its children, sampled while a run goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable

import psutil


class MemoryMonitor:
    """Samples the process tree's resident memory in a thread; use as a context manager.

    Args:
        on_sample: called after each sample, in that thread.
        every_seconds: between samples.

    Attributes:
        peak_rss_bytes: the largest sum seen so far.
    """

    def __init__(self, on_sample: Callable[[], None], every_seconds: float = 0.5) -> None:
        self.peak_rss_bytes = 0
        self._on_sample = on_sample
        self._every_seconds = every_seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-monitor", daemon=True)

    def __enter__(self) -> MemoryMonitor:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            self.peak_rss_bytes = max(self.peak_rss_bytes, tree_rss_bytes(process))
            self._on_sample()
            if self._stopped.wait(self._every_seconds):
                return


def tree_rss_bytes(process: psutil.Process) -> int:
    """Resident memory of a process and all its descendants, in bytes."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            total += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total
