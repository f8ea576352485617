"""What the files of options share: how a command is added to the parser, paths that aren't there, and JSON to print.

Nothing heavy is imported before a command runs, so that `mmllm --help` is quick; a command looks at its paths before it
imports anything, so that a misspelt one is named at once.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

DATA_FORMS = (
    "manifest", "csv", "folder", "llava", "coco", "librispeech", "commonvoice", "obelics", "mmc4", "text", "flan",
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
    parser.set_defaults(run=run, parser=parser)
    return parser


def check_there(what: str, *paths: str | None, hint: str = "check the path") -> None:
    """Looks whether the files and folders that a command will read are there.

    Args:
        what: they are: "manifest".
        paths: where; None and "" are options that weren't given. Patterns and addresses are left to what reads them.
        hint: what to do.

    Raises:
        FileNotFoundError: one isn't there.
    """
    for path in paths:
        if path and "://" not in path and not set(path) & set("*?[{") and not Path(path).exists():
            raise FileNotFoundError(f"{path}: no such {what}{_near_path(Path(path))}; {hint}")


def near(word: str, known: Iterable[str]) -> str:
    """What may have been meant by a word: " (did you mean …?)", or nothing."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def _near_path(path: Path) -> str:
    """As `near`, of a file or folder that isn't there but whose folder is."""
    try:
        names = [each.name for each in path.parent.iterdir()]
    except OSError:
        return ""
    found = difflib.get_close_matches(path.name, names, n=1)
    return f" (did you mean {path.parent / found[0]}?)" if found else ""


def check_model(folder: str) -> None:
    """As `check_there`, for `--model`."""
    check_there("model folder", folder, hint="give the folder that `mmllm fit` wrote")


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
