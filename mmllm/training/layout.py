"""How a run is spread over devices: read from its trainer's settings, since those devices may be elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

HALF: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "16": torch.float16}


@dataclass(frozen=True)
class Layout:
    """How a run is spread over devices, as its trainer says.

    Attributes:
        num_devices: all, of all machines.
        is_gpu: whether they are GPUs.
        num_batch_ranks: devices with sequences of their own.
        num_shards: devices that share one copy's weights, gradients and optimizer state.
        is_replicated: several copies exchange whole gradients (DDP).
        precision: the trainer's.
        accumulated: batches of an optimizer step.
        max_steps: None: not bounded by steps.
        keeps_average: an `EMA` holds the weights once more.
    """

    num_devices: int = 1
    is_gpu: bool = False
    num_batch_ranks: int = 1
    num_shards: int = 1
    is_replicated: bool = False
    precision: str = "32-true"
    accumulated: int = 1
    max_steps: int | None = None
    keeps_average: bool = False

    @property
    def autocast(self) -> torch.dtype | None:
        """What products are in, if not in the weights' dtype."""
        return HALF[self.precision.split("-")[0]] if self.precision.endswith("-mixed") else None

    @property
    def dtype(self) -> torch.dtype:
        """What each rank computes with: gathered weights are in autocast's dtype."""
        kind, _, how = self.precision.partition("-")
        if self.num_shards > 1 and self.autocast is not None:
            return self.autocast
        if how == "true":
            return {"32": torch.float32, "64": torch.float64, **HALF}[kind]
        return torch.float32

    @staticmethod
    def of(trainer: Mapping[str, Any]) -> Layout:
        """Of a config's `trainer`.

        Raises:
            ValueError: a strategy or a precision whose memory is not known here.
        """
        precision = {"bf16": "bf16-mixed", "16": "16-mixed", "32": "32-true", "64": "64-true", "None": "32-true"}.get(
            str(trainer.get("precision")), str(trainer.get("precision"))
        )
        if precision not in ("bf16-mixed", "16-mixed", "bf16-true", "16-true", "32-true", "64-true"):
            raise ValueError(f"trainer.precision is {precision}, whose memory --print_estimate does not know")
        is_gpu = trainer.get("accelerator") in ("gpu", "cuda") or (
            trainer.get("accelerator") in (None, "auto") and torch.cuda.is_available()
        )
        num_devices = _count(trainer.get("devices"), is_gpu) * int(trainer.get("num_nodes") or 1)
        num_batch_ranks, num_shards, is_replicated = _axes(trainer.get("strategy"), num_devices)
        max_steps = trainer.get("max_steps")
        names = [str(each.get("class_path")) for each in trainer.get("callbacks") or ()]
        return Layout(
            num_devices,
            is_gpu,
            num_batch_ranks,
            num_shards,
            is_replicated,
            precision,
            int(trainer.get("accumulate_grad_batches") or 1),
            None if max_steps in (None, -1) else int(max_steps),
            any(name.endswith(".EMA") for name in names),
        )


def _count(devices: Any, is_gpu: bool) -> int:
    match devices:
        case list() | tuple():
            return len(devices)
        case str() if "," in devices:
            return len([each for each in devices.split(",") if each.strip()])
        case None | "auto" | -1 | "-1":
            return max(1, torch.cuda.device_count()) if is_gpu else 1
    return int(devices)


def _axes(strategy: Any, num_devices: int) -> tuple[int, int, bool]:
    """Ranks with batches of their own, ranks that share a copy, and whether copies exchange gradients."""
    settings: Mapping[str, Any] = {}
    if isinstance(strategy, Mapping):
        settings, strategy = strategy.get("init_args") or {}, strategy["class_path"]
    name = str(strategy).rpartition(".")[2]
    if name in ("None", "auto", "SingleDeviceStrategy") or name.lower().startswith("ddp"):
        return num_devices, 1, num_devices > 1
    if name == "ModelParallelStrategy":
        tensor = settings.get("tensor_parallel_size", 1)
        tensor = 1 if tensor == "auto" else int(tensor)
        return num_devices // tensor, num_devices, False
    if name == "MeshStrategy":
        one_copy = num_devices // int(settings.get("data") or 1)
        together = int(settings.get("tensor") or 1) * int(settings.get("context") or 1)
        return num_devices // together, one_copy, False
    if name.lower().startswith("fsdp"):
        return num_devices, num_devices, False
    raise ValueError(
        f"trainer.strategy is {name}, whose memory --print_estimate does not know; it knows auto, ddp, "
        f"ModelParallelStrategy and MeshStrategy"
    )
