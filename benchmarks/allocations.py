"""Peak of what PyTorch's allocator holds: of the CPU's by the profiler's record of each allocation, exact."""

from __future__ import annotations

from typing import Any

import torch

_MARK = "allocations: from here"


class AllocationPeak:
    """Live bytes at the highest point above those at `start` (or at the beginning), within a `with` block.

    Allocations inside of operators count too, also of those that are registered in Python, and what they give back.

        with AllocationPeak("cpu") as memory:
            loss().backward()
        print(memory.peak)
    """

    def __init__(self, device: str) -> None:
        self.peak = 0
        self._device = device
        self._profiler: Any = None
        self._is_active = False
        self._before = 0

    def start(self) -> None:
        """Counts from here; what was allocated before counts as nothing. Outside of the block: does nothing."""
        if not self._is_active:
            return
        if self._device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            with torch.profiler.record_function(_MARK):
                pass

    def __enter__(self) -> AllocationPeak:
        self._is_active = True
        if self._device != "cuda":
            activities = [torch.profiler.ProfilerActivity.CPU]
            self._profiler = torch.profiler.profile(activities=activities, profile_memory=True)
            self._profiler.__enter__()
        self.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._is_active = False
        if self._device == "cuda":
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated() - self._before
            return
        self._profiler.__exit__(*error)
        events = self._profiler.profiler.kineto_results.events()
        began = max(event.start_ns() for event in events if event.name() == _MARK)
        changes = [event for event in events if event.name() == "[memory]" and event.start_ns() >= began]
        live = self.peak = 0
        for event in sorted(changes, key=lambda event: event.start_ns()):
            live += event.nbytes()
            self.peak = max(self.peak, live)
