"""Block shapes: a shipped table, timed lazily where it has no entry, and one switch that stops the timing.

An entry is keyed on the kernel, the dtype, the widths and the tokens per expert (rounded up to a power of
two): how many rows a product has decides its shape, and it changes with the batch. BLOCK_M follows from the
tokens per expert alone, because all kernels of a call share one map of tiles.

Timing waits for the device, so it happens at most once a key in a process, never while a CUDA graph is
captured, and never with `set_autotune(False)` or MMLLM_KERNELS_AUTOTUNE=0. Another shape may sum a router
gradient's parts in another order: switch timing off where two processes must agree bit for bit.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable
from dataclasses import astuple, dataclass
from importlib import resources

import torch

from mmllm_kernels.backends import interpreted

_log = logging.getLogger(__name__)
SLEEP_CYCLES = 2_000_000
"""About a millisecond."""
CACHE_BYTES = 2**27
"""More than any GPU's cache holds."""


@dataclass(frozen=True)
class Blocks:
    """One way to launch a product. `m` is used where the tile map does not set it."""

    m: int
    n: int
    k: int
    group: int = 8
    """Tiles that are worked on together, so that they find each other's weights in the cache."""
    warps: int = 8
    stages: int = 3
    """Depth of the software pipeline."""


@dataclass(frozen=True)
class Key:
    """What an entry of the table is for."""

    kernel: str
    dtype: str
    depth: int
    width: int
    tokens_per_expert: int

    def __str__(self) -> str:
        return f"{self.kernel} {self.dtype} {self.depth}x{self.width} {self.tokens_per_expert}"


_tuned: dict[str, Blocks] = {}
_autotune: bool | None = None


def set_autotune(enabled: bool | None) -> None:
    """Whether shapes without an entry are timed; None leaves it to MMLLM_KERNELS_AUTOTUNE (on unless 0)."""
    global _autotune
    _autotune = enabled


def tuned() -> dict[str, list[int]]:
    """What this process has timed, in the form of the table's `measured`."""
    return {key: list(astuple(blocks)) for key, blocks in sorted(_tuned.items())}


def add_measured(entries: dict[str, list[int]]) -> None:
    """Takes entries of an earlier `tuned()` for the table's; they are not timed again."""
    _table()["measured"].update(entries)


def bucket(num_pairs: int, num_groups: int) -> int:
    """Mean rows an expert, rounded up to a power of two from 16 to 4096."""
    return min(max(_power_of_two(-(-num_pairs // num_groups)), 16), 4096)


def tile_rows(tokens_per_expert: int) -> int:
    """BLOCK_M of the kernels that share a tile map."""
    return min(tokens_per_expert, 64 if interpreted() else 128)


def blocks(key: Key, launch: Callable[[Blocks], None], device: torch.device) -> Blocks:
    """The block shapes for a key; `launch` runs the kernel with given ones (it may run more than once)."""
    if interpreted():
        return Blocks(32, 32, 32, group=2)  # small, so that small inputs still have several
    name = f"{_device_name(device)} {key}"
    if name in _tuned:
        return _tuned[name]
    table = _table()["measured"]
    if name in table:
        return Blocks(*table[name])
    if not _may_time():
        return guesses(key)[0]
    times = {each: _milliseconds(launch, each, cold=_is_few(key)) for each in guesses(key)}
    best = min(times, key=times.__getitem__)
    if times[best] == float("inf"):
        raise RuntimeError(
            f"none of the {len(times)} block shapes for {name} can be launched on this device; "
            f"add one that can to gpu/blocks.json, or use backend='cpu'"
        )
    _tuned[name] = best
    return best


def guesses(key: Key) -> list[Blocks]:
    """Shapes worth timing, the likeliest first; what a key without an entry gets when nothing is timed."""
    rows = tile_rows(key.tokens_per_expert)
    if key.dtype == "float32":  # no tensor cores at full precision: registers are the limit
        return [Blocks(min(rows, 64), 64, 32, warps=8, stages=2), Blocks(min(rows, 64), 64, 32, warps=4, stages=2)]
    entries = _table()["guesses"]
    few = "few" if _is_few(key) else "many"
    return [Blocks(*(rows if size == 0 else size for size in entry)) for entry in entries[f"{key.kernel} {few}"]]


def _is_few(key: Key) -> bool:
    """Whether reading the weights takes most of the time."""
    return key.tokens_per_expert <= 32


def _may_time() -> bool:
    enabled = os.environ.get("MMLLM_KERNELS_AUTOTUNE", "1") != "0" if _autotune is None else _autotune
    return enabled and not torch.cuda.is_current_stream_capturing()


def _milliseconds(launch: Callable[[Blocks], None], candidate: Blocks, cold: bool, repeats: int = 5) -> float:
    """Best of a few runs; infinity for what cannot be compiled for the device or launched on it.

    `cold` empties the cache first, so that weights come from memory, as they do where a layer has few tokens.
    """
    from triton.runtime.errors import OutOfResources, PTXASError

    best = float("inf")
    try:
        launch(candidate)
        other_data = torch.empty(CACHE_BYTES, dtype=torch.uint8, device="cuda") if cold else None
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if other_data is not None:
                other_data.zero_()
            torch.cuda._sleep(SLEEP_CYCLES)  # Python's part of the launch is over before the device begins
            start.record()
            launch(candidate)
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end))
    except (OutOfResources, PTXASError) as error:
        _log.info("block shape %s: %s", candidate, str(error).partition("\n")[0])
        return float("inf")
    return best


@functools.cache
def _table() -> dict[str, dict[str, list]]:
    return json.loads(resources.files("mmllm_kernels.gpu").joinpath("blocks.json").read_text())


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()
