"""Rounds that take turns, and rows with the interval that the rounds leave: of inference.py and serve.py."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmllm.checkout import commit

Clock = Literal["wall", "cpu"]
CLOCKS: dict[Clock, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""`cpu`: the process's own time, for a machine that others use, too; with one thread, or threads are added up."""
RESAMPLES, LEVEL = 2000, 95.0
_SAME = ("measure", "case", "unit", "peer")


def alternate(
    functions: Mapping[str, Callable[[], Any]], rounds: int, clock: Clock = "wall", warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each function in rounds in which they take turns, each round in an order of its own.

    Args:
        functions: by name.
        rounds: that count.
        clock: what is read.
        warm_up: rounds before them that don't.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    shuffle, now = random.Random(0).shuffle, CLOCKS[clock]
    order = list(functions)
    gc.collect()
    gc.freeze()  # so that collecting is quick
    gc.disable()
    try:
        for number in range(warm_up + rounds):
            shuffle(order)
            for name in order:
                gc.collect()  # so that the garbage of one isn't collected in another's turn
                began = now()
                functions[name]()
                if number >= warm_up:
                    seconds[name].append(now() - began)
    finally:
        gc.enable()
        gc.unfreeze()
    return seconds


def ratio_interval(values: Sequence[float], peer_values: Sequence[float] | None) -> list[float] | None:
    """95% of a median (without a peer), or of the ratio of two whose rounds are pairs, by resampling rounds.

    None: there are fewer than three rounds, or not as many of the peer.
    """
    if len(values) < 3 or (peer_values is not None and len(peer_values) != len(values)):
        return None
    rng = np.random.default_rng(0)
    chosen = rng.integers(len(values), size=(RESAMPLES, len(values)))
    medians = np.median(np.asarray(values)[chosen], axis=1)
    if peer_values is not None:
        medians = medians / np.median(np.asarray(peer_values)[chosen], axis=1)
    low, high = np.percentile(medians, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return [float(low), float(high)]


@dataclass
class Report:
    """Rows of a file. What is in it already is kept, but for rows that are measured again.

    A row is `{measure, case, value, unit, peer, peer_value, ratio, interval, rounds, machine, commit}`: medians over
    rounds, ours / peer, and the interval of the ratio, or of the value where there is no peer.
    """

    path: Path | None
    machine: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """What was not measured, and why."""

    def __post_init__(self) -> None:
        self.commit = commit()
        if self.path is not None and self.path.exists():
            self.rows = json.loads(self.path.read_text())

    def add(
        self,
        measure: str,
        case: str,
        unit: str,
        values: Sequence[float],
        peers: Mapping[str, Sequence[float]] | None = None,
        interval: list[float] | None = None,
    ) -> None:
        """A row for each peer; without any, one row.

        Args:
            measure: as the issue calls it.
            case: on what.
            unit: of the values.
            values: ours, one a round.
            peers: likewise.
            interval: of a value of one round; None: that of the rounds, if there are enough.
        """
        value = statistics.median(values)
        for peer, peer_values in (peers or {None: None}).items():
            peer_value = None if peer_values is None else statistics.median(peer_values)
            row = {
                "measure": measure, "case": case, "value": value, "unit": unit, "peer": peer, "peer_value": peer_value,
                "ratio": value / peer_value if peer_value else None,
                "interval": interval or ratio_interval(values, peer_values), "rounds": len(values),
                "machine": self.machine, "commit": self.commit,
            }  # fmt: skip
            self.rows = [each for each in self.rows if any(each[name] != row[name] for name in _SAME)]
            self.rows.append(row)
            print(line(row), flush=True)
        self.write()

    def write(self) -> None:
        """Writes the file, if there is one."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.rows, indent=1) + "\n")

    def finish(self) -> None:
        """Prints all rows, and what was not measured."""
        print()
        for row in self.rows:
            print(line(row))
        for name, reason in self.missing.items():
            print(f"not run: {name}: {reason}")
        self.write()


def line(row: Mapping[str, Any]) -> str:
    """A row for people."""
    text = f"{row['measure']:24}{row['case']:52}{row['value']:12.5g} {row['unit']:18}"
    if row["peer"] is not None:
        text += f"{row['peer']} {row['peer_value']:.5g}; {row['ratio']:.3f}×"
    if row["interval"] is not None:
        text += " [{:.4g}, {:.4g}]".format(*row["interval"])
    return text


def machine(threads: int | None) -> str:
    """Of the rows: what it is, and how busy it is with other things."""
    used = "" if threads is None else f", {threads} threads"
    return f"{platform.machine()}, {os.cpu_count()} cores{used}, load {os.getloadavg()[0]:.1f} at the start"


def versions(*packages: str) -> str:
    """Of Python and packages, those that aren't there named as such."""
    found = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)
