"""Joules that a machine used, by its own counters: powercap's (processors) and NVML's (GPUs). No service is asked.

The counters are of whole packages and devices: what else runs there is counted too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """A block's joules.

    Args:
        is_on: whether to measure.
        powercap: folder of the kernel's zones.
    """

    def __init__(self, is_on: bool = True, powercap: Path = POWERCAP) -> None:
        self.joules: float | None = None
        """After the block; None: nothing here counts them, or it is off."""
        self._counters = [*_processors(powercap), *_gpus()] if is_on else []
        self._before: list[float] = []

    def __enter__(self) -> EnergyMeter:
        self._before = [read() for read, _ in self._counters]
        return self

    def __exit__(self, *exception: object) -> None:
        if self._counters:
            pairs = zip(self._counters, self._before, strict=True)
            self.joules = sum(_since(read(), before, around) for (read, around), before in pairs)


Counter = tuple[Callable[[], float], float]
"""What reads it, in joules, and where it begins again at 0."""


def _since(now: float, before: float, around: float) -> float:
    return now - before if now >= before else now - before + around


def _processors(powercap: Path) -> list[Counter]:
    """Packages; zones in them are counted by them."""
    found = []
    for zone in sorted(powercap.glob("*-rapl:*")):
        if zone.name.count(":") != 1:
            continue
        with contextlib.suppress(OSError, ValueError):  # readable by root alone on many machines
            energy, most = zone / "energy_uj", float((zone / "max_energy_range_uj").read_text()) / 1e6
            _joules(energy)
            found.append((lambda energy=energy: _joules(energy), most))
    return found


def _joules(path: Path) -> float:
    return float(path.read_text()) / 1e6


def _gpus() -> list[Counter]:
    try:
        import pynvml  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        return []
    nvml: Any = pynvml
    found: list[Counter] = []
    with contextlib.suppress(nvml.NVMLError):
        nvml.nvmlInit()
        for number in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(number)
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            found.append((lambda handle=handle: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, 0.0))
    return found
