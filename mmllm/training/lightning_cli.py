"""`mmllm fit / validate / test`: LightningCLI on YAML, quiet, with one-line errors."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
import yaml
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.warnings import PossibleUserWarning

from mmllm.model.earlier_names import current_key, current_keys
from mmllm.training.earlier_runs import KeepMetrics, ReplaceEarlierRun, checkpoint_to_load, find_earlier_run
from mmllm.training.strategy import AnyCheckpointIO

log = logging.getLogger(__name__)

SUBCOMMANDS = ("fit", "validate", "test")
_READING = threading.Lock()

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
    r"FSDP2-wrapped module .* returned a view tensor.*",  # nothing is done to it in place
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

    def __init__(self, *args: Any, overwrite: bool = False, **kwargs: Any) -> None:
        """Runs the subcommand, as LightningCLI does.

        Args:
            args: LightningCLI's.
            overwrite: an earlier run may be written over.
            kwargs: LightningCLI's.
        """
        self._overwrite = overwrite
        super().__init__(*args, **kwargs)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Lightning's trainer, which also reads checkpoints that were written by sharded runs."""
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AnyCheckpointIO()
        return trainer

    def before_instantiate_classes(self) -> None:
        """Scores are printed alone: Lightning would delete the training's metrics.csv and write its config anew.

        Without a logger it would write the config to the folder in which it was started, over a `config.yaml` there.
        """
        if self.subcommand in ("validate", "test"):
            self.config[self.subcommand].trainer.logger = False
        if self.subcommand and self.config[self.subcommand].trainer.logger in (False, []):
            self.save_config_callback = None

    def before_fit(self) -> None:
        """Refuses to write over an earlier run unless it is told to, or goes on with it.

        Raises:
            FileExistsError: an earlier run's model, logs or checkpoints lie where this one's would go.
            FileNotFoundError: `ckpt_path` names no checkpoint.
        """
        callbacks: list[pl.Callback] = self.trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        if self._checkpoint(TrainerFn.FITTING) is None and (earlier := find_earlier_run(self.trainer, self.model)):
            if not self._overwrite:
                raise FileExistsError(
                    f"fit would write over an earlier run: {earlier}; --overwrite replaces it, --ckpt_path last goes "
                    f"on with it, or give this run other folders"
                )
            callbacks.insert(0, ReplaceEarlierRun(earlier))
        callbacks.insert(0, KeepMetrics(self.trainer))

    def after_fit(self) -> None:
        """Raises ValueError where nothing was trained: Lightning ends well then, and writes no model."""
        if not self.trainer.fit_loop.epoch_loop.batch_progress.total.ready:
            raise ValueError(
                f"nothing was trained: {type(self.datamodule).__name__} gives no batch; give it more rows, a smaller "
                f"batch_size, or a trainer.limit_train_batches above 0"
            )

    def before_validate(self) -> None:
        """Raises FileNotFoundError where `ckpt_path` names no checkpoint."""
        self._checkpoint(TrainerFn.VALIDATING)

    def before_test(self) -> None:
        """Raises FileNotFoundError where `ckpt_path` names no checkpoint."""
        self._checkpoint(TrainerFn.TESTING)

    def after_validate(self) -> None:
        """Raises ValueError where there was nothing to score: Lightning ends well then, and prints nothing."""
        self._check_scored(self.trainer.num_val_batches)

    def after_test(self) -> None:
        """Raises ValueError where there was nothing to score."""
        self._check_scored(self.trainer.num_test_batches)

    def _checkpoint(self, command: TrainerFn) -> str | None:
        return checkpoint_to_load(self.trainer, command, self._get(self.config_init, "ckpt_path"))

    def _check_scored(self, num_batches: list[int | float]) -> None:
        if not sum(num_batches):
            raise ValueError(
                f"{self.subcommand} has nothing to score: {type(self.datamodule).__name__} gives no validation data; "
                f"set its val_recipe or val_shards (`--data.init_args.KEY`) to some"
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses `args` alone; `sys.argv` is another program's when this runs in-process."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """The YAML alone says what is trained; hyper-parameters in a checkpoint are not read."""

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}


def build_cli(
    argv: list[str], run: bool = True, overwrite: bool = False, cli_class: type[MmllmCLI] = MmllmCLI
) -> MmllmCLI:
    """Parses `argv`, instantiates trainer, module and data, and (with `run`) runs the subcommand.

    Args:
        argv: the subcommand and its options: `["fit", "-c", "decoder.yaml"]`; without `run`: options alone.
        run: False: only instantiate.
        overwrite: `fit` may write over an earlier run.
        cli_class: what instantiates.

    Raises:
        ValueError: a wrong key or value; the message names it.
    """
    options = {"allow_abbrev": False}
    return cli_class(
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
        args=_with_folder_keys(_with_current_names(argv)),
        run=run,
        overwrite=overwrite,
    )


class _UnbuiltCLI(MmllmCLI):
    """Parses all and instantiates module and data alone: a trainer for other devices than these can't be made here."""

    def instantiate_classes(self) -> None:
        """Keeps the trainer's settings as they are in `config`."""
        parts = self.config.clone()
        self.trainer_settings: dict[str, Any] = parts.pop("trainer").as_dict()
        made: Any = self.parser.instantiate_classes(parts)
        self.model, self.datamodule = made.model, made.data


def unbuilt(argv: list[str]) -> tuple[Any, Any, dict[str, Any]]:
    """A config's module and data module, nothing of them built, and the trainer's settings; all keys are checked.

    One thread at a time: while jsonargparse reads a config, the process's working directory is the config's folder.
    Threads beside it must use absolute paths.

    Args:
        argv: options of `fit`, without the command.

    Raises:
        ValueError: a wrong key or value; the message names it.
    """
    with _READING, quiet_lightning(), _restored_environment():
        try:
            cli: Any = build_cli(argv, run=False, cli_class=_UnbuiltCLI)
        except ValueError as error:
            raise ValueError(one_line(str(error))) from error
    return cli.model, cli.datamodule, cli.trainer_settings


def print_estimate(
    argv: list[str], flops_per_second: float | None = None, sequence_length: int | None = None
) -> dict[str, Any]:
    """What a config needs, as `mmllm fit --print_estimate` prints it.

    Args:
        argv: options of `fit`, without the command.
        flops_per_second: of each device, for `days`.
        sequence_length: in the place of the recipe's.

    Raises:
        ValueError: a wrong key or value, or a config of which nothing is estimated.
    """
    from mmllm.data.loading.datamodules import PackedDataModule
    from mmllm.data.loading.preferences import PreferenceDataModule
    from mmllm.data.loading.prompts import PromptDataModule
    from mmllm.training.decoder_module import DecoderModule
    from mmllm.training.estimate import estimate
    from mmllm.training.layout import Layout

    module, data, trainer = unbuilt(argv)
    with quiet_lightning(), _restored_environment():
        try:
            known = PackedDataModule, PreferenceDataModule, PromptDataModule
            if not isinstance(module, DecoderModule) or not isinstance(data, known):
                raise ValueError(
                    f"--print_estimate knows DecoderModule and what is made of it, with "
                    f"{', '.join(each.__name__ for each in known)}, and the config has {type(module).__name__} with "
                    f"{type(data).__name__}; time one step of it instead"
                )
            layout = Layout.of(trainer)
            return dataclasses.asdict(estimate(module, data, layout, flops_per_second, sequence_length))
        except ValueError as error:
            raise ValueError(one_line(str(error))) from error


def _with_current_names(argv: list[str]) -> list[str]:
    """Options and config files with today's names for keys that had others; each file that has such is named.

    A config file so changed is given to the parser as its text.
    """
    argv = list(argv)
    for place, argument in enumerate(argv):
        key, equals, value = argument.partition("=")
        if key in ("-c", "--config") and (equals or place + 1 < len(argv)):
            path = Path(value if equals else argv[place + 1])
            text = _current_yaml(path) if path.is_file() else None
            if text is not None:
                argv[place if equals else place + 1] = f"{key}={text}" if equals else text
        elif argument.startswith("--"):
            argv[place] = current_key(key) + equals + value
    return argv


def _current_yaml(path: Path) -> str | None:
    """The config with today's names; None where it has no earlier one, or is no mapping (the parser says so)."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return None
    if not isinstance(values, dict):
        return None
    current = current_keys(values)
    if current == values:
        return None
    log.warning("%s has earlier names of keys (mmllm/model/earlier_names.py lists both); they are still read", path)
    return yaml.safe_dump(current, sort_keys=False)


_INIT_FROM = "--model.init_args.init_from"
_WITH_FOLDER_KEYS = ("DecoderModule", "PreferenceModule", "ReptileModule", "RewardModule", "RolloutModule")
"""Modules whose settings are those of the model in `init_from` where they aren't given."""


def _with_folder_keys(argv: list[str]) -> list[str]:
    """Config files in which `DecoderModule`'s keys that aren't given are those of the model in `init_from`.

    They are given to the parser as one text, in the place of the first.

    Raises:
        FileNotFoundError, ValueError: that folder is no model.
    """
    places = [place for place, word in enumerate(argv) if word.partition("=")[0] in ("-c", "--config", _INIT_FROM)]
    options: dict[int, tuple[str, str]] = {}
    for place in places:
        key, equals, value = argv[place].partition("=")
        if equals or place + 1 < len(argv):
            options[place] = key, value if equals else argv[place + 1]
    files = {place: _as_mapping(value) for place, (key, value) in options.items() if key != _INIT_FROM}
    merged: dict[str, Any] = {}
    for values in files.values():
        if values is None:  # the parser says what is wrong with it
            return argv
        merged = _merged(merged, values)
    model = merged.get("model")
    init_args = model.get("init_args") if isinstance(model, dict) else None
    if not isinstance(init_args, dict) or not str(merged["model"].get("class_path")).endswith(_WITH_FOLDER_KEYS):
        return argv
    given = [value for key, value in options.values() if key == _INIT_FROM]
    init_from = given[-1] if given else init_args.get("init_from")
    if not init_from or str(init_from) == "null":
        return argv
    from mmllm.training.init_source import with_folder_keys

    merged["model"]["init_args"] = with_folder_keys(init_args, init_from)
    text = yaml.safe_dump(merged, sort_keys=False)
    left_out = {place + offset for place in files for offset in range(1 if "=" in argv[place] else 2)}
    first = min(files)
    return (
        [word for place, word in enumerate(argv) if place < first]
        + [f"--config={text}"]
        + [word for place, word in enumerate(argv) if place > first and place not in left_out]
    )


def _as_mapping(value: str) -> dict[str, Any] | None:
    """A config file, or its text; None where it is no mapping."""
    try:
        is_file = "\n" not in value and Path(value).is_file()
        values = yaml.safe_load(Path(value).read_text(encoding="utf-8") if is_file else value)
    except (yaml.YAMLError, UnicodeDecodeError):
        return None
    return values if isinstance(values, dict) else None


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """As the parser merges config files: the second's keys over the first's; another class has none of its settings."""
    merged = dict(first)
    for key, value in second.items():
        own = merged.get(key)
        if isinstance(own, dict) and isinstance(value, dict):
            is_other = "class_path" in value and value["class_path"] != own.get("class_path")
            value = value if is_other else _merged(own, value)
        merged[key] = value
    return merged


def run_lightning(argv: list[str]) -> MmllmCLI:
    """Runs `fit`, `validate` or `test` and leaves the process as it was.

    Args:
        argv: the subcommand and its options. `fit --overwrite` is none of the config's keys, so that the config
            that is saved with the logs, run again, is asked anew.

    Raises:
        ValueError: a wrong key or value, a run that is over, or nothing to score.
        FileNotFoundError: the config or `ckpt_path` names a file that isn't there.
        FileExistsError: an earlier run would be written over.
    """
    overwrite = argv[:1] == ["fit"] and "--overwrite" in argv
    argv = [argument for argument in argv if not (overwrite and argument == "--overwrite")]
    with quiet_lightning(), _restored_environment():
        try:
            return build_cli(argv, overwrite=overwrite)
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


_NOISE = re.compile(r"^(- )?(Subtypes: |Errors$|Expected a <class 'NoneType'>|Given value( type: |: [\[{<(]))")
_UNION = "Does not validate against any of the Union subtypes"


def one_line(message: str) -> str:
    """A parser's message as one line: the keys and what is wrong, without what only its authors need."""
    kept = []
    for line in message.splitlines():
        line = line.strip().removeprefix("- ")
        line = re.sub(r"^Parser key \"([^\"]+)\":", r"\1:", line).replace(_UNION, "").strip().rstrip(":")
        if line and not _NOISE.match(line):
            kept.append(re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", line))
    # Of a union's alternatives, the one that says more than what type it wanted is the one that was meant.
    is_bare = [re.fullmatch(r"Expected an? [\w.]+", line) is not None for line in kept]
    if any(not bare and re.match(r"[\w.]+ is |.*Option ", line) for bare, line in zip(is_bare, kept, strict=True)):
        kept = [line for bare, line in zip(is_bare, kept, strict=True) if not bare]
    return ": ".join(kept)
