"""`mmllm fit`, `validate` and `test`: LightningCLI, which has a parser of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmllm.cli.command import check_there

TRAINING = {
    "fit": "train a codec, a CLIP tower or a decoder: -c FILE",
    "validate": "validation losses of a checkpoint: -c FILE --ckpt_path CKPT",
    "test": "test losses of a checkpoint: -c FILE --ckpt_path CKPT",
}

_HELP = """usage: mmllm {command} -c FILE [--ckpt_path last|FILE]{options} [--KEY VALUE ...]

Runs a LightningCLI config: YAML with `model`, `data` and `trainer`. Any key can be set on the command line:
  mmllm {command} -c configs/quickstart/decoder.yaml --trainer.max_steps 100 --model.init_args.optimizer.lr 3e-4
  mmllm {command} -c FILE --print_config          the whole config with all defaults
`mmllm configs ls` lists the configs that are shipped, `mmllm configs cp NAME FILE` copies one."""

_FIT_HELP = """

A fit that finds the model, logs or checkpoints of an earlier run where its own would go is refused:
  --ckpt_path last     goes on with that run
  --overwrite          replaces its model, its logs and its last checkpoint"""


def add_training(commands: Any) -> None:
    """Adds the names of the commands, for the list of all; `run_training` parses what follows them."""
    for name, help_text in TRAINING.items():
        commands.add_parser(name, help=help_text, allow_abbrev=False)


def run_training(arguments: list[str]) -> Iterable[str]:
    """Runs a command of `TRAINING` and gives the lines to print.

    Args:
        arguments: the command and its options.

    Raises:
        ValueError: there is no config, or something is wrong with it.
        OSError: a file that is named isn't there, or one would be written over.
    """
    if len(arguments) == 1 or not {"-h", "--help"}.isdisjoint(arguments):
        yield from _help_lines(arguments[0])
        if len(arguments) == 1:
            raise ValueError(f"{arguments[0]} needs -c FILE")
        return
    _check_files(arguments)
    from mmllm.training.lightning_cli import run_lightning

    run_lightning(arguments)


def _help_lines(command: str) -> list[str]:
    is_fit = command == "fit"
    text = _HELP.format(command=command, options=" [--overwrite]" if is_fit else "")
    return (text + _FIT_HELP if is_fit else text).splitlines()


def _check_files(arguments: list[str]) -> None:
    """Names a config or checkpoint that isn't there before Lightning is imported."""
    for flag, value in itertools.pairwise(arguments):
        if flag in ("-c", "--config") and not Path(value).is_file():
            raise FileNotFoundError(f"no config file at {value}; `mmllm configs ls` lists those that are shipped")
        if flag == "--ckpt_path" and Path(value).suffix:  # others are words: `last`
            check_there("checkpoint", value, hint="give its file, or last")
