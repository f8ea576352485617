"""What an earlier run left where a fit would write, and the checkpoint from which a run goes on."""

from __future__ import annotations

import csv
import io
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn

from mmllm.training.callbacks import RoutingLog, Samples
from mmllm.training.posttraining.costs import RewardHackingStop, TaskScores


@dataclass(frozen=True)
class EarlierRun:
    """What is there already. A run that failed before its first step left nothing that counts."""

    model: Path | None
    """The folder to which the fit would export."""
    logs: tuple[Path, ...]
    """Files of metrics, routing, samples and held-out scores."""
    checkpoints: tuple[Path, ...]
    """Files, and the folders that sharded strategies write."""

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.model or self.logs or self.checkpoints)

    def __str__(self) -> str:
        """The model, and the first of the others."""
        shown = [f"the model {self.model}"] if self.model else []
        for what, paths in (("the log", self.logs), ("the checkpoint", self.checkpoints)):
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            shown += [f"{what} {path}{more}" for path in paths[:1]]
        return ", ".join(shown)


def find_earlier_run(trainer: pl.Trainer, module: pl.LightningModule) -> EarlierRun:
    """What lies where `trainer.fit(module)` would write its model, its logs and its checkpoints."""
    export_dir = getattr(module, "export_dir", None)
    folders = _checkpoint_folders(trainer)
    checkpoints = [path for folder in folders for path in sorted(folder.glob(f"*{ModelCheckpoint.FILE_EXTENSION}"))]
    return EarlierRun(_finished_model(export_dir), tuple(_logs(trainer)), tuple(checkpoints))


def checkpoint_to_load(trainer: pl.Trainer, command: TrainerFn, ckpt_path: str | None) -> str | None:
    """The checkpoint that a command begins with; None: none.

    Args:
        trainer: with its callbacks.
        command: what is run.
        ckpt_path: a file, or `last`; None: none, but for a job that Slurm has queued again.

    Raises:
        FileNotFoundError: it isn't there.
    """
    found = trainer._checkpoint_connector._select_ckpt_path(command, ckpt_path, True, False)
    if ckpt_path == "last" and found is None:
        folders = ", ".join(str(folder) for folder in _checkpoint_folders(trainer)) or "no folder: none are saved"
        is_fit = command == TrainerFn.FITTING
        instead = "leave --ckpt_path out to begin anew" if is_fit else "give the file of a checkpoint"
        raise FileNotFoundError(f"--ckpt_path is last, but there is no last checkpoint in {folders}; {instead}")
    if found is not None and not get_filesystem(found).exists(str(found)):
        raise FileNotFoundError(f"--ckpt_path is {found}, but no checkpoint is there; give its file, or last")
    return None if found is None else str(found)


class KeepMetrics(pl.Callback):
    """Lightning's CSV logger deletes an earlier metrics.csv; a resumed run goes on with its rows instead."""

    def __init__(self, trainer: pl.Trainer) -> None:
        """Reads the files; Lightning starts its loggers before any hook."""
        self._earlier: dict[Path, bytes] = {}
        for logger in _csv_loggers(trainer):
            path = Path(logger.log_dir) / "metrics.csv"
            if path.is_file():
                self._earlier[path] = path.read_bytes()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the rows up to the checkpoint's step; a run that starts at step 0 has none."""
        earlier, self._earlier = self._earlier, {}
        if not trainer.global_step:
            return
        for logger in _csv_loggers(trainer):
            path, writer = Path(logger.log_dir) / "metrics.csv", logger.experiment
            rows: list[Any] = list(csv.DictReader(io.StringIO(earlier.get(path, b"").decode(), newline="")))
            rows = [row for row in rows if float(row.get("step") or 0) <= trainer.global_step]
            if rows:
                writer.metrics = [*rows, *writer.metrics]
                writer.save()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Puts the files back as they were where training did not begin: the checkpoint was refused, or the data."""
        self.on_fit_end(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As above: there was nothing to train on."""
        for path, content in self._earlier.items():
            path.write_bytes(content)


class ReplaceEarlierRun(pl.Callback):
    """Removes what an earlier run would be mistaken for the new one by, once the new one has begun.

    Its metrics.csv, routing.csv and samples.csv are begun anew by those that write them, and its model is replaced
    when training ends. Checkpoints but the last have a step in their names and stay.
    """

    def __init__(self, earlier: EarlierRun) -> None:
        """Keeps what was there before Lightning starts its loggers."""
        last = ModelCheckpoint.CHECKPOINT_NAME_LAST
        events = [path for path in earlier.logs if path.name.startswith(_EVENTS)]
        self._paths = [*events, *(path for path in earlier.checkpoints if path.name.startswith(last))]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Removes them."""
        for path in self._paths if trainer.is_global_zero else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


_EVENTS = "events.out.tfevents"


def _finished_model(export_dir: str | None) -> Path | None:
    """The folder, if files lie in it; folders alone are no model's mark, since some runs keep their logs there."""
    if export_dir and Path(export_dir).is_dir() and any(path.is_file() for path in Path(export_dir).iterdir()):
        return Path(export_dir)
    return None


def _csv_loggers(trainer: pl.Trainer) -> list[CSVLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, CSVLogger) and trainer.is_global_zero]


def _logs(trainer: pl.Trainer) -> Iterator[Path]:
    """Log files in which an earlier run wrote something."""
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            yield from (path for path in [Path(logger.log_dir) / "metrics.csv"] if path.is_file())
        elif isinstance(logger, TensorBoardLogger):
            yield from (path for path in sorted(Path(logger.log_dir).glob(f"{_EVENTS}*")) if _has_events(path))
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(callback, (RoutingLog, Samples, TaskScores, RewardHackingStop)):
            yield from (path for path in callback.files if path.is_file())


def _has_events(path: Path) -> bool:
    """Whether a TensorBoard file holds more than the record with its version, which every file begins with.

    A record is its length in 8 bytes, a checksum of 4, the data and a checksum of 4.
    """
    with path.open("rb") as file:
        head = file.read(8)
    if len(head) < 8:
        return bool(head)
    return path.stat().st_size > 8 + 4 + struct.unpack("<Q", head)[0] + 4


def _checkpoint_folders(trainer: pl.Trainer) -> list[Path]:
    """Where checkpoints go: Lightning puts them beside the first logger's files unless it is told."""
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    beside = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
    folders = [Path(callback.dirpath) if callback.dirpath else beside for callback in callbacks]
    return list(dict.fromkeys(folders))
