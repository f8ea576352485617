"""Timing in interleaved rounds, the table, and the JSON file; used by moe.py and nearest_code.py."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SLEEP_CYCLES = 2_000_000
"""About a millisecond, before each timing on a GPU."""


def interleaved_ms(functions: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of each function, one call a round, after two rounds to warm up; what fails is left out.

    Rounds interleave the functions, so that a busy machine or a falling clock hits all alike, each in an order of its
    own, so that none always finds the caches and the allocator as the same other one left them.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    shuffle = random.Random(0).shuffle
    for number in range(rounds + 2):
        order = list(times)
        shuffle(order)
        for name in order:
            try:
                elapsed = _once_ms(functions[name], device)
            except Exception as error:
                del times[name]
                print(f"not run: {name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
                continue
            if number >= 2:
                times[name].append(elapsed)
    return times


def _once_ms(function: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(SLEEP_CYCLES)  # the device begins late, with launches already waiting for it
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    start_seconds = time.perf_counter()
    function()
    return (time.perf_counter() - start_seconds) * 1e3


def saved_bytes(function: Callable[[], Any], parameters: list[torch.Tensor]) -> int:
    """Bytes that backward keeps after `function`, each storage once, without the parameters."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = function()
    for parameter in parameters:
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    del kept
    return sum(storages.values())


def relative_error(value: torch.Tensor, wanted: torch.Tensor) -> float:
    """The norm of the difference over the norm of what is wanted."""
    wanted = wanted.float()
    return float((value.float() - wanted).norm() / wanted.norm().clamp(min=1e-30))


@dataclass
class Report:
    """Rows of {measure, case, value, unit, peer, peer_value, ratio}; ratio is ours / peer.

    Rows already in the file are kept (but for those measured again), so that several processes can write one file,
    one after the other.
    """

    path: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path is not None and self.path.exists():
            self.rows = json.loads(self.path.read_text())

    def write(self) -> None:
        """Writes the file, if there is one: call it after every shape, so that a later failure loses nothing."""
        if self.path is not None:
            self.path.write_text(json.dumps(self.rows, indent=1) + "\n")

    def add(self, measure: str, case: str, unit: str, ours: float, peers: dict[str, float]) -> None:
        """One row a peer; without any, one row with peer null."""
        for peer, value in peers.items() or [(None, None)]:
            ratio = ours / value if value else None
            row = {"measure": measure, "case": case, "value": ours, "unit": unit}
            same = {"measure": measure, "case": case, "unit": unit, "peer": peer}
            self.rows = [each for each in self.rows if any(each[name] != same[name] for name in same)]
            self.rows.append({**row, "peer": peer, "peer_value": value, "ratio": ratio})

    def add_times(
        self, measure: str, case: str, times: dict[str, list[float]], unit: str, scale: Callable[[float], float]
    ) -> None:
        """Prints minimum and median of all, and adds the rows: medians, since one lucky round decides a minimum."""
        print(f"\n{measure} · {case}")
        for name, each in times.items():
            if each:
                print(f"  {name:32} min {min(each):10.3f} ms  median {statistics.median(each):10.3f} ms", end="")
                print(f"  {scale(statistics.median(each)):10.3f} {unit}" if unit != "ms" else "")
        values = {name: scale(statistics.median(each)) for name, each in times.items() if each}
        if "ours" in values:
            self.add(measure, case, unit, values.pop("ours"), values)

    def finish(self) -> None:
        """Prints the ratios and writes the file."""
        print(f"\n{'measure':18}{'case':62}{'ours':>12} {'unit':12}{'peer':34}{'ratio':>7}")
        for row in self.rows:
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
            print(
                f"{row['measure']:18}{row['case']:62}{row['value']:12.4g} {row['unit']:12}"
                f"{row['peer'] or '':34}{ratio:>7}"
            )
        self.write()


def describe(device: str, packages: tuple[str, ...]) -> None:
    """Versions and the device."""
    versions = []
    for package in ("torch", "triton", *packages):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    print(f"{device}: {name}; Python {platform.python_version()}; {'; '.join(versions)}")
    if device == "cuda":
        print(
            "times: before each, ours and peers' alike, the device sleeps about 1 ms, so that as much of Python's "
            "launching is not in them"
        )
