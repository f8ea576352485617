"""What a checkpoint says of the run's place: where the last optimizer step ended, wherever it is written.

Between the batches of one step, the gradients so far are each rank's own and in no checkpoint. The weights don't change
until the step is made, so a run that goes on with the step's first batch does exactly what the one that was stopped
would have done. At the end of an epoch, Lightning's own counters, saved after the epoch is closed, make a resumed run
take the next epoch's first batch as one more of the last (lightning 2.6); those of the last batch's end don't.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn


class StepStart:
    """The counters, the data's place and the buffers from which the batches of the next optimizer step begin.

    Args:
        module: The module that is trained, attached to its trainer.
        resumed: Of the checkpoint that it goes on from, the counters and the data's place. (Lightning has changed its
            own by the time that training starts.)
    """

    def __init__(self, module: pl.LightningModule, resumed: dict[str, Any] | None = None) -> None:
        self._module = module
        saved = module.state_dict().keys()
        self._owners: dict[str, tuple[nn.Module, str]] = {}
        for path, owner in module.named_modules():
            names = {f"{path}.{name}" if path else name: (owner, name) for name in owner._buffers}
            self._owners |= {path: place for path, place in names.items() if path in saved}
        self._buffers: dict[str, Tensor] = {}
        self.note()
        self._fit_loop = resumed or self._fit_loop

    @property
    def is_over(self) -> bool:
        """Whether the optimizer has made its step since."""
        return self._module.trainer.global_step != self._global_step

    @torch.no_grad()
    def note(self) -> None:
        """Keeps the state as it is now: no batch of the next step has been taken."""
        self._global_step = self._module.trainer.global_step
        self._fit_loop = self._module.trainer.fit_loop.state_dict()
        buffers = {path: getattr(owner, name) for path, (owner, name) in self._owners.items()}
        if self._buffers:
            torch._foreach_copy_(list(self._buffers.values()), list(buffers.values()))
        else:
            self._buffers = {path: buffer.detach().clone() for path, buffer in buffers.items()}

    def rewind(self, checkpoint: dict[str, Any]) -> None:
        """Puts the kept state into a checkpoint, if it is still the last step's.

        Args:
            checkpoint: As Lightning's `on_save_checkpoint` gets it.
        """
        if not self.is_over:
            checkpoint["loops"]["fit_loop"] = self._fit_loop
            weights = checkpoint["state_dict"]
            weights |= {path: buffer for path, buffer in self._buffers.items() if path in weights}
