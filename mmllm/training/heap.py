"""Gives memory back between training steps: see `mmllm.heap`."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl

from mmllm.heap import trim_heap

log = logging.getLogger(__name__)


class TrimHeap(pl.Callback):
    """Trims the heap every few training steps.

    Args:
        every_steps: between trims. What was given back is asked for again, page by page: every fifth step took a tenth
            of the demo's time.

    Raises:
        ValueError: `every_steps` is not positive.
    """

    def __init__(self, every_steps: int = 25) -> None:
        if every_steps < 1:
            raise ValueError(f"every_steps is {every_steps}; give 1 or more")
        self.every_steps = every_steps

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says where it can do nothing."""
        if not trim_heap():
            log.warning("TrimHeap does nothing: this system's C library has no malloc_trim")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Trims, if it is time."""
        if (batch_idx + 1) % self.every_steps == 0:
            trim_heap()
