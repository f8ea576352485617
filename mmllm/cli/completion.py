"""`mmllm completion`: a script with which a shell completes commands, options and file names on TAB.

By shtab, which writes it once: nothing of Python starts when TAB is pressed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mmllm.cli.command import add_command

_HINT = 'add to ~/.bashrc: eval "$(mmllm completion bash)"; to ~/.zshrc: eval "$(mmllm completion zsh)"'
_FILES = ("FILE", "IMAGE", "SOUND", "PART", "INPUT", "WAV", "OUT", "JSON")


def add_completion(commands: Any, make_parser: Callable[[], argparse.ArgumentParser]) -> None:
    """Adds `mmllm completion`; `make_parser` gives the parser of all commands."""

    def run(args: argparse.Namespace) -> Iterable[str]:
        return [script(make_parser(), args.shell)]

    parser = add_command(commands, "completion", f"a script for TAB in a shell; {_HINT}", run)
    parser.add_argument("shell", choices=("bash", "zsh"))


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script.

    Raises:
        ModuleNotFoundError: shtab is missing.
    """
    try:
        import shtab
    except ModuleNotFoundError:
        raise ModuleNotFoundError("completion needs shtab; pip install 'mmllm[completion]'") from None
    for action in _actions(parser):
        if action.metavar == "DIR":
            action.complete = shtab.DIRECTORY  # pyright: ignore[reportAttributeAccessIssue]
        elif action.metavar in _FILES:
            action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
    return shtab.complete(parser, shell)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Of a parser and all commands in it."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in dict.fromkeys(action.choices.values()):
                yield from _actions(command)
