"""An exponential moving average of the weights, used for validation, samples and export."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor


class EMA(pl.Callback):
    """Keeps averaged weights beside the trained ones; they take their place in validation and at the end.

    The decay warms up as min(decay, (1 + step) / (10 + step)), so that short runs are not held back by the random
    start. Checkpoints hold both, so a resumed run goes on exactly. Give it `every_steps` above 1 to make it cheaper.
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
        self._average: list[Tensor] | None = None
        self._trained: list[Tensor] | None = None
        self._last_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the average, unless a checkpoint brought one."""
        weights = _weights(pl_module)
        if self._average is None:
            self._average = [weight.clone() for weight in weights]
        self._average = [old.to(new.device) for old, new in zip(self._average, weights, strict=True)]

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
        torch._foreach_lerp_(self._average, _weights(pl_module), 1 - decay)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the average in place."""
        if self._average is not None and self._trained is None:
            weights = _weights(pl_module)
            self._trained = [weight.clone() for weight in weights]
            torch._foreach_copy_(weights, self._average)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the trained weights back."""
        if self._trained is not None:
            torch._foreach_copy_(_weights(pl_module), self._trained)
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
        """Saves the trained weights also while the average is in their place."""
        if self._trained is not None:
            names = [name for name, parameter in pl_module.named_parameters() if parameter.requires_grad]
            checkpoint["state_dict"] |= dict(zip(names, self._trained, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The average."""
        return {"average": self._average, "last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the average."""
        self._average = state_dict["average"]
        self._last_step = state_dict["last_step"]


@torch.no_grad()
def _weights(module: pl.LightningModule) -> list[Tensor]:
    return [parameter.data for parameter in module.parameters() if parameter.requires_grad]
