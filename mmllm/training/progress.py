"""The progress line of a run: share done, step, time left, losses."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks.progress import ProgressBar

from mmllm.ticker import FILE_SECONDS, TERMINAL_SECONDS, clock, draw_line
from mmllm.training.staged import StagedModule

BAR_WIDTH = 24


class Progress(ProgressBar):
    """One line that is redrawn on a terminal, and a plain line now and then in a file.

    Unlike Lightning's bars it knows the end of a run that is bounded by seconds.
    """

    def __init__(self, terminal_seconds: float = TERMINAL_SECONDS, file_seconds: float = FILE_SECONDS) -> None:
        """Keeps the settings.

        Args:
            terminal_seconds: between redraws on a terminal.
            file_seconds: between lines elsewhere.
        """
        super().__init__()
        self.terminal_seconds = terminal_seconds
        self.file_seconds = file_seconds
        self._enabled = True
        self._drawn_at = 0.0
        self._began = 0.0
        self._began_progress = 0.0

    def disable(self) -> None:
        """Lightning calls this on ranks above 0."""
        self._enabled = False

    def enable(self) -> None:
        """Undoes `disable`."""
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._began = self._drawn_at = time.monotonic()
        self._began_progress = _progress(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draws when it is time."""
        is_terminal = sys.stderr.isatty()
        now = time.monotonic()
        if self._enabled and now - self._drawn_at >= (self.terminal_seconds if is_terminal else self.file_seconds):
            self._drawn_at = now
            draw_line(sys.stderr, self._line(trainer, pl_module), is_terminal)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws the last state and ends the line."""
        if self._enabled:
            draw_line(sys.stderr, self._line(trainer, pl_module), sys.stderr.isatty())
            if sys.stderr.isatty():
                sys.stderr.write("\n")

    def message(self, text: str) -> None:
        """Writes lines above the progress line, for example samples."""
        if self._enabled:
            if sys.stderr.isatty():
                sys.stderr.write("\r\033[K")
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def _line(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
        done = _progress(pl_module)
        seconds = time.monotonic() - self._began
        gained = done - self._began_progress
        left = f"{clock(seconds / gained * (1 - done))} left" if gained > 0 else ""
        filled = round(done * BAR_WIDTH)
        metrics = self.get_metrics(trainer, pl_module)
        values = "  ".join(
            f"{name} {value:.3f}" for name, value in metrics.items() if isinstance(value, float) and name != "v_num"
        )
        bar = "#" * filled + "-" * (BAR_WIDTH - filled)
        return f"[{bar}] {done:4.0%}  step {trainer.global_step}  {clock(seconds)} gone  {left}  {values}".rstrip()


def _progress(module: pl.LightningModule) -> float:
    return module.progress if isinstance(module, StagedModule) else 0.0
