"""`mmllm fit`, `validate` and `test`: LightningCLI, which has a parser of its own."""

from __future__ import annotations

import itertools
import json
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
  --overwrite          replaces its model, its logs and its last checkpoint

Of a decoder, without running anything:
  --print_estimate               parameters, operations a token and memory of a device, as JSON
  --flops_per_second NUMBER      and the days, where each device reaches so many
  --sequence_length NUMBER       where the recipe is not there yet"""

_ESTIMATE = "--print_estimate"
_ESTIMATE_OPTIONS = {"--flops_per_second": float, "--sequence_length": int}


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
    if arguments[0] == "fit" and _ESTIMATE in arguments:
        yield _estimate(arguments[1:])
        return
    from mmllm.training.lightning_cli import run_lightning

    run_lightning(arguments)


def _estimate(arguments: list[str]) -> str:
    """The JSON of `--print_estimate`."""
    options: dict[str, Any] = {}
    rest: list[str] = []
    words = iter(argument for argument in arguments if argument != _ESTIMATE)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag not in _ESTIMATE_OPTIONS:
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        try:
            options[flag.removeprefix("--")] = number = _ESTIMATE_OPTIONS[flag](value)
        except ValueError:
            number = 0
        if not 0 < number < float("inf"):
            raise ValueError(f"{flag} is {value!r}; give a positive number")
    from mmllm.training.lightning_cli import print_estimate

    return json.dumps(print_estimate(rest, **options), indent=1)


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
