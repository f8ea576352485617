"""What the machine has, and how much of it a run takes. Nothing here imports torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

MAX_WORKERS = 4
"""Processes that make and build data."""
MAX_RANKS = 4
RANK_BYTES = 2 * 2**30
"""Free memory that a training of more than two ranks needs for each."""
NVIDIA_GPU = Path("/dev/nvidia0")
"""Asked for in place of torch, which quickstart's process does not import: it would take memory beside trainings."""

_ASK_GPU = "import torch; print(torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0)"


def gpu_bytes() -> int:
    """Memory of the GPU that a training would take, by torch in a process of its own; 0: torch can't use one.

    Raises:
        ValueError: torch can't be asked.
    """
    asked = subprocess.run([sys.executable, "-c", _ASK_GPU], capture_output=True, text=True, check=False)
    if asked.returncode:
        raise ValueError(f"torch can't be asked for the GPU's memory; it says: {asked.stderr.strip()[-500:]}")
    return int(asked.stdout.split()[-1])


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_ranks(minutes: float | None, max_steps: int | None) -> int:
    """Ranks of each training: two of one thread each do almost twice as much on two cores as one of two threads.

    Without `minutes` always two where there are two cores, so that everybody's demo is the same run; with them as
    many as there are cores and memory for. A power of two, which every stage's batch can be shared by.
    """
    if max_steps is not None:
        return 1
    if minutes is None:
        return min(os.cpu_count() or 1, 2)
    has_memory = psutil.virtual_memory().available >= MAX_RANKS * RANK_BYTES
    return MAX_RANKS if num_cores() >= MAX_RANKS and has_memory else min(num_cores(), 2)
