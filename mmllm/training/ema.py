"""An exponential moving average of the weights, used for validation, samples and export."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed.checkpoint
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmllm.parallel.deferred import fill
from mmllm.training.matrix_exchange import local
from mmllm.training.strategy import MeshStrategy

IN_WEIGHTS = "ema."
"""Begins the averages' names among the weights of a distributed checkpoint."""


class EMA(pl.Callback):
    """Keeps averaged weights beside the trained ones; they take their place in validation and at the end.

    The decay warms up as min(decay, (1 + step) / (10 + step)), so that short runs are not held back by the random
    start. Checkpoints hold both, so a resumed run goes on exactly. Give it `every_steps` above 1 to make it cheaper.

    Where weights are sharded, so is the average. It is saved in this callback's state, by `MeshStrategy` in shards;
    Lightning's own distributed checkpoint, which knows shards of weights alone, has it among them as `ema.NAME`. Either
    is restored on any number of ranks, sharded or not.
    """

    def __init__(self, decay: float = 0.999, every_steps: int = 1) -> None:
        """Keeps the settings.

        Args:
            decay: of the average for each step.
            every_steps: steps between updates; the decay is raised to this power.

        Raises:
            ValueError: a setting is out of range.
        """
        if not 0 < decay < 1:
            raise ValueError(f"EMA's decay is {decay}; it must be between 0 and 1")
        if every_steps < 1:
            raise ValueError(f"EMA's every_steps is {every_steps}; it must be at least 1")
        self.decay = decay
        self.every_steps = every_steps
        self._average: dict[str, Tensor] | None = None
        self._trained: dict[str, Tensor] | None = None
        self._last_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the average, unless a checkpoint brought one."""
        weights = _weights(pl_module)
        if self._average is None:
            self._average = {name: weight.clone() for name, weight in weights.items()}
        _check_names(self._average, weights)
        self._average = {name: self._average[name].to(weight.device) for name, weight in weights.items()}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the average towards the weights."""
        step = trainer.global_step
        if step == self._last_step or step % self.every_steps:
            return
        self._last_step = step
        assert self._average is not None
        decay = min(self.decay, (1 + step) / (10 + step)) ** self.every_steps
        torch._foreach_lerp_(_parts(self._average), _parts(_weights(pl_module)), 1 - decay)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the average in place."""
        if self._average is not None and self._trained is None:
            weights = _weights(pl_module)
            _check_names(self._average, weights)
            self._trained = {name: weight.clone() for name, weight in weights.items()}
            torch._foreach_copy_(_parts(weights), [local(self._average[name]) for name in weights])

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the trained weights back."""
        if self._trained is not None:
            torch._foreach_copy_(_parts(_weights(pl_module)), _parts(self._trained))
            self._trained = None

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As in validation."""
        self.on_validation_start(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As in validation."""
        self.on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the average in place, for the export that follows; checkpoints that are still saved hold both."""
        self.on_validation_start(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leaves the average in the module."""
        self._trained = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Saves the average; and the trained weights, also while the average is in their place. A collective call."""
        weights = checkpoint["state_dict"]
        is_distributed = any(isinstance(weight, DTensor) for weight in weights.values())
        if self._trained is not None:
            trained = _saved(self._trained, is_distributed)
            if weights:  # where one file is written, only the rank that writes it has them
                weights |= trained
        if self._average is None:
            return
        state = checkpoint["callbacks"][self.state_key]
        if isinstance(trainer.strategy, MeshStrategy):
            state["average"] = dict(self._average)
            return
        average = _saved(self._average, is_distributed)
        if is_distributed:
            weights |= {f"{IN_WEIGHTS}{name}": value for name, value in average.items()}
            state["is_in_weights"] = True
        elif weights:
            state["average"] = average

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restores the average: from the callback's state, or from among the weights."""
        state = checkpoint["callbacks"].get(self.state_key, {})
        weights, average = _weights(pl_module), state.get("average")
        if average is None and not state.get("is_in_weights"):
            return
        if isinstance(average, list):  # as it was saved before it was sharded
            _check_names(range(len(average)), range(len(weights)))
            average = dict(zip(weights, average, strict=True))
        path = Path(str(trainer.ckpt_path))
        if average is None and path.is_dir():
            self._average = {name: torch.empty_like(weight) for name, weight in weights.items()}
            named = {f"{IN_WEIGHTS}{name}": value for name, value in self._average.items()}
            torch.distributed.checkpoint.load({"state_dict": named}, checkpoint_id=path)
            return
        if average is None:  # a distributed checkpoint that was made one file
            saved = torch.load(path, mmap=True, map_location="cpu", weights_only=True)["state_dict"]
            average = {n.removeprefix(IN_WEIGHTS): value for n, value in saved.items() if n.startswith(IN_WEIGHTS)}
        _check_names(average, weights)
        self._average = {name: _sharded_like(weight, average[name]) for name, weight in weights.items()}

    def state_dict(self) -> dict[str, Any]:
        """The step of the last update; `on_save_checkpoint` adds the average."""
        return {"last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the step."""
        self._last_step = state_dict["last_step"]


def without_averages(weights: dict[str, Tensor]) -> None:
    """Takes the averages out of the weights of a distributed checkpoint that was made one file."""
    for name in [name for name in weights if name.startswith(IN_WEIGHTS)]:
        del weights[name]


@torch.no_grad()
def _weights(module: pl.LightningModule) -> dict[str, Tensor]:
    return {name: parameter.data for name, parameter in module.named_parameters() if parameter.requires_grad}


def _parts(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """What this rank holds of them."""
    return [local(tensor) for tensor in tensors.values()]


def _saved(tensors: Mapping[str, Tensor], is_distributed: bool) -> dict[str, Tensor]:
    """On the CPU, whole unless each rank writes its own part."""
    values = tensors.items()
    if is_distributed:
        return {name: value.cpu() for name, value in values}
    return {name: value.full_tensor().cpu() if isinstance(value, DTensor) else value for name, value in values}


@torch.no_grad()
def _sharded_like(weight: Tensor, whole: Tensor) -> Tensor:
    """This rank's part of a whole tensor, sharded as the weight is, unless it is so already."""
    if isinstance(whole, DTensor):
        return whole
    value = torch.empty_like(weight)
    fill(value, whole)
    return value


def _check_names(average: Iterable[Any], weights: Iterable[Any]) -> None:
    missing = sorted(set(weights) - set(average), key=str) or sorted(set(average) - set(weights), key=str)
    if missing:
        raise ValueError(
            f"the checkpoint's moving average and the weights that are trained now differ in {missing[0]}; train the "
            f"same parts of the model as before, or leave the EMA callback out"
        )
