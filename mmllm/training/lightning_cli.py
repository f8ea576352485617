"""`mmllm fit / validate / test`: LightningCLI on YAML, quiet, with one-line errors."""

from __future__ import annotations

import contextlib
import csv
import itertools
import logging
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.warnings import PossibleUserWarning

SUBCOMMANDS = ("fit", "validate", "test")

TRAINER_DEFAULTS: dict[str, Any] = {"max_epochs": -1, "num_sanity_val_steps": 0, "enable_model_summary": False}
"""A run ends by steps or seconds, not by epochs."""

_EXPECTED_WARNINGS = (
    r".*no last checkpoint available.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*modules in eval mode.*",
    r".*module\(s\) in eval mode.*",
    r".*lr_scheduler.step.*",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*`max_epochs` was not set.*",
    r".*Experiment logs directory .* exists and is not empty.*",
    r".*The number of training batches .* is smaller than the logging interval.*",
    r".*does not have many workers.*",
    r".*functional\.all_gather is deprecated.*",  # open_clip's gather_features calls it
    r"Total length of `list` across ranks is zero.*",  # no val_recipe
    r"\s+By default only one JsonargparseDeprecationWarning.*",
    r"\s+\S+( parameter)? was deprecated in v[\d.]+ and will be removed in v5.*",
)


class ConfigError(ValueError):
    """A key or value that the config can't have."""


class _Parser(LightningArgumentParser):
    """Raises instead of printing usage and quitting."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ConfigError(message) from ex


class MmllmCLI(LightningCLI):
    """LightningCLI that takes its arguments as a list and reads checkpoints without unpickling."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Without `predict`: inference works on model folders."""
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name in SUBCOMMANDS}

    def before_instantiate_classes(self) -> None:
        """Scores are printed alone: Lightning would delete the training's metrics.csv and write its config anew."""
        if self.subcommand in ("validate", "test"):
            self.config[self.subcommand].trainer.logger = False
            self.save_config_callback = None

    def before_fit(self) -> None:
        """Resumed runs keep their metrics."""
        self.trainer.callbacks.insert(0, _KeepMetrics(self.trainer))  # pyright: ignore[reportAttributeAccessIssue]

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses `args` alone; `sys.argv` is another program's when this runs in-process."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """The YAML alone says what is trained; hyper-parameters in a checkpoint are not read."""

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}


class _KeepMetrics(pl.Callback):
    """Lightning's CSV logger deletes an earlier metrics.csv; a resumed run goes on with its rows instead."""

    def __init__(self, trainer: pl.Trainer) -> None:
        """Reads the rows; Lightning starts its loggers before any hook."""
        self._earlier: dict[Path, list[dict[str, str]]] = {}
        for logger in _csv_loggers(trainer):
            path = Path(logger.log_dir) / "metrics.csv"
            if path.is_file():
                with path.open(newline="", encoding="utf-8") as file:
                    self._earlier[path] = list(csv.DictReader(file))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes those up to the checkpoint's step; a run that starts at step 0 has none."""
        if not trainer.global_step:
            return
        for logger in _csv_loggers(trainer):
            path, writer = Path(logger.log_dir) / "metrics.csv", logger.experiment
            rows = [row for row in self._earlier.get(path, []) if float(row.get("step") or 0) <= trainer.global_step]
            if rows:
                writer.metrics = [*rows, *writer.metrics]
                writer.save()


def _csv_loggers(trainer: pl.Trainer) -> list[CSVLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, CSVLogger) and trainer.is_global_zero]


def build_cli(argv: list[str], run: bool = True) -> MmllmCLI:
    """Parses `argv`, instantiates trainer, module and data, and (with `run`) runs the subcommand.

    Args:
        argv: the subcommand and its options: `["fit", "-c", "decoder.yaml"]`; without `run`: options alone.
        run: False: only instantiate.

    Raises:
        ValueError: a wrong key or value; the message names it.
    """
    options = {"allow_abbrev": False}
    return MmllmCLI(
        model_class=pl.LightningModule,
        datamodule_class=pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_class=_Parser,
        parser_kwargs={**options, **{name: dict(options) for name in SUBCOMMANDS}} if run else options,
        trainer_defaults=TRAINER_DEFAULTS,
        seed_everything_default=0,
        save_config_callback=SaveConfigCallback if run else None,
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        args=argv,
        run=run,
    )


def run_lightning(argv: list[str]) -> MmllmCLI:
    """Runs `fit`, `validate` or `test` and leaves the process as it was.

    Args:
        argv: the subcommand and its options.

    Raises:
        ValueError: a wrong key or value, or a file that the config names and does not exist.
    """
    _check_config_files(argv)
    with quiet_lightning(), _restored_environment():
        try:
            return build_cli(argv)
        except ValueError as error:
            hint = f"; `mmllm {argv[0]} --help` says how to list all keys" if isinstance(error, ConfigError) else ""
            raise ValueError(one_line(str(error)) + hint) from error


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silences Lightning's informative logs and the warnings that this project's runs are known to raise."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        for pattern in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", pattern)
        try:
            for logger in loggers:
                logger.setLevel(logging.WARNING)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def _restored_environment() -> Iterator[None]:
    """Undoes what `seed_everything` and Lightning's strategies leave in the environment, and grad mode."""
    names = [name for name in os.environ if name.startswith("PL_")]
    before = {name: os.environ[name] for name in names}
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("PL_")]:
            del os.environ[name]
        os.environ.update(before)
        torch.set_grad_enabled(True)


_NOISE = re.compile(r"^(- )?(Subtypes: |Errors$|Expected a <class 'NoneType'>|Given value( type)?: )")
_UNION = "Does not validate against any of the Union subtypes"


def one_line(message: str) -> str:
    """A parser's message as one line: the keys and what is wrong, without what only its authors need."""
    kept = []
    for line in message.splitlines():
        line = line.strip().removeprefix("- ")
        line = re.sub(r"^Parser key \"([^\"]+)\":", r"\1:", line).replace(_UNION, "").strip().rstrip(":")
        if line and not _NOISE.match(line):
            kept.append(re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", line))
    return ": ".join(kept)


def _check_config_files(argv: list[str]) -> None:
    for flag, value in itertools.pairwise(argv):
        if flag in ("-c", "--config") and not Path(value).is_file():
            raise FileNotFoundError(f"no config file at {value}; `mmllm configs ls` lists those that are shipped")
