"""`mmllm configs`: the configs that are shipped."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from mmllm.cli.command import add_command, add_group


def add_configs(commands: Any) -> None:
    """Adds `mmllm configs`."""
    actions = add_group(commands, "configs", "list and copy the configs that are shipped")
    add_command(actions, "ls", "names of all", _list)
    parser = add_command(actions, "cp", "copy one", _copy)
    parser.add_argument("name", help="as `mmllm configs ls` shows it")
    parser.add_argument("destination", nargs="?", default=".", help="file or folder; by default here")


def _list(_: argparse.Namespace) -> Iterable[str]:
    from mmllm import paths

    return paths.list_configs()


def _copy(args: argparse.Namespace) -> Iterable[str]:
    from mmllm import paths

    return [str(paths.copy_config(args.name, args.destination))]
