"""What the files of options share: how a command is added to the parser, and JSON to print.

Nothing heavy is imported before a command runs, so that `mmllm --help` is quick.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from typing import Any

DATA_FORMS = (
    "manifest", "csv", "folder", "llava", "coco", "librispeech", "commonvoice", "obelics", "mmc4", "text",
)  # fmt: skip
Run = Callable[[argparse.Namespace], Iterable[str]]
"""Runs a command and gives the lines to print."""


def add_group(commands: Any, name: str, help_text: str) -> Any:
    """Adds a command that has commands of its own and gives their subparsers."""
    parser = commands.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
    return parser.add_subparsers(metavar="ACTION", dest="action", required=True, parser_class=type(parser))


def add_command(commands: Any, name: str, help_text: str, run: Run) -> argparse.ArgumentParser:
    """Adds a command to subparsers and gives its parser, for its options."""
    parser = commands.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
    parser.set_defaults(run=run, prog=parser.prog)
    return parser


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """Adds how rows are read that aren't in our own form."""
    parser.add_argument(
        "--format", choices=("auto", *DATA_FORMS), default="auto", help="of the inputs; auto: told from each"
    )
    parser.add_argument(
        "--columns", action="append", default=[], metavar="OURS=THEIRS:TYPE", help="what columns are called here, and "
        "their types (text, int, float, bool), e.g. image=filepath,text=title,score:float",
    )  # fmt: skip


def column_names(args: argparse.Namespace) -> Any:
    """What `--columns` says."""
    from mmllm.data.rows.column_names import ColumnNames

    return ColumnNames.parse(args.columns)


def as_json(values: Any) -> list[str]:
    """The lines to print for a result."""
    return [json.dumps(values, indent=2, ensure_ascii=False, default=str)]
