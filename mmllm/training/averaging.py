"""The mean of a training's last weights, which is exported in their place (LAWA, arXiv 2209.14981)."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

log = logging.getLogger(__name__)


class AverageLast(pl.Callback):
    """Keeps the weights of the last few times, and puts their mean in place when training ends.

    The weights that training ends with are the last of them. Unlike `EMA` it changes nothing before the end, and its
    mean is uniform: that of model folders saved at the same steps, which `mmllm merge` (linear) makes as well. Copies
    are kept on the CPU and in checkpoints, so that a resumed run goes on exactly. Not for sharded weights.
    """

    def __init__(self, num: int = 5, every_steps: int = 100, last_out: str | None = None) -> None:
        """Keeps the settings.

        Args:
            num: how many times are averaged.
            every_steps: steps between them.
            last_out: model folder to which the weights of the end go as they were trained, to compare; None: nowhere.

        Raises:
            ValueError: there is nothing to average, or a number is out of range.
        """
        if num < 2 or every_steps < 1:
            raise ValueError(
                f"AverageLast has num {num} and every_steps {every_steps}; wanted 2 or more times, some steps apart"
            )
        self.num, self.every_steps, self.last_out = num, every_steps, last_out
        self._kept: deque[tuple[int, dict[str, Tensor]]] = deque(maxlen=num)

    @property
    def steps(self) -> list[int]:
        """Whose weights are kept."""
        return [step for step, _ in self._kept]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks at the weights, and at what a checkpoint brought.

        Raises:
            ValueError: weights are sharded, or others than those of the checkpoint are trained, or `last_out` is given
                for a module that exports nothing.
        """
        weights = _trained(pl_module)
        if self.last_out is not None:
            if getattr(pl_module, "export", None) is None:
                raise ValueError(f"last_out is given, but {type(pl_module).__name__} exports nothing; leave it out")
            if trainer.is_global_zero and (check := getattr(pl_module, "check_export", None)) is not None:
                check(Path(self.last_out))
        if any(isinstance(weight, DTensor) for weight in weights.values()):
            raise ValueError(
                "AverageLast keeps whole weights, and the strategy shards them; take mmllm.training.ema.EMA, or save "
                "model folders and average them with `mmllm merge`"
            )
        for _, kept in self._kept:
            if changed := sorted(kept.keys() ^ weights.keys()):
                raise ValueError(
                    f"the checkpoint's weights to average and those that are trained now differ in {changed[0]}; train "
                    f"the same parts of the model as before, or leave AverageLast out"
                )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the weights when it is time."""
        step = trainer.global_step
        if step and step % self.every_steps == 0:
            self._keep(pl_module, step)

    @torch.no_grad()
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Exports the weights as they are, if asked to, and puts the mean in their place."""
        self._keep(pl_module, trainer.global_step)
        if self.last_out is not None and trainer.is_global_zero:
            module: Any = pl_module
            module.export(Path(self.last_out))
        if len(self._kept) < self.num:
            log.warning("AverageLast averages %d weights, not %d: the run was short", len(self._kept), self.num)
        for name, weight in _trained(pl_module).items():
            mean = torch.stack([kept[name].to(_wide(weight)) for _, kept in self._kept]).mean(dim=0)
            weight.copy_(mean)
        log.info("the weights are the mean of those of steps %s", self.steps)

    def state_dict(self) -> dict[str, Any]:
        """All that is kept."""
        return {"kept": [{"step": step, "weights": kept} for step, kept in self._kept]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores it."""
        self._kept = deque(((each["step"], each["weights"]) for each in state_dict["kept"]), maxlen=self.num)

    def _keep(self, pl_module: pl.LightningModule, step: int) -> None:
        if not self._kept or self._kept[-1][0] != step:
            weights: Mapping[str, Tensor] = _trained(pl_module)
            self._kept.append((step, {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}))


def _trained(module: pl.LightningModule) -> dict[str, Tensor]:
    return {name: weight.data for name, weight in module.named_parameters() if weight.requires_grad}


def _wide(weight: Tensor) -> torch.dtype:
    """What a mean is made in."""
    return torch.promote_types(weight.dtype, torch.float32)
