"""`mmllm merge`: several models, or several adapters of one, as one."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from mmllm.cli.command import add_command, check_there


def add_merging(commands: object) -> None:
    """Adds `mmllm merge`."""
    parser = add_command(commands, "merge", "several models, or adapters, as one, by mergekit's YAML", _merge)
    parser.add_argument("config", metavar="CONFIG.yaml", help="methods and keys: docs/guides/merge.md")
    parser.add_argument("--out", required=True, metavar="DIR", help="model folder to write; new or empty")
    parser.add_argument("--check", action="store_true", help="read and compare the parents, say what would be done")


def _merge(args: argparse.Namespace) -> Iterable[str]:
    check_there("file of a merge", args.config)
    from mmllm.interop.merging.folder import MergeReport, check_new
    from mmllm.interop.merging.parsing import read_config

    config = read_config(args.config)
    check_new(args.out)
    from mmllm.training.merging import run_merge

    for told in run_merge(config, args.out, args.check):
        if isinstance(told, MergeReport):
            yield from told.lines()
        else:
            yield told
    if args.check:
        yield "nothing was written (--check)"
