"""`mmllm quickstart`, and its parts that are of use alone: `demo-data` and `report`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mmllm.cli.command import add_command, add_input_options, as_json, check_there, column_names

RunCommand = Callable[[Sequence[str]], int]


def add_quickstart(commands: Any, run_command: RunCommand) -> None:
    """Adds `mmllm demo-data`, `mmllm report` and `mmllm quickstart`.

    Args:
        commands: subparsers of `mmllm`.
        run_command: runs a command line in this process and gives its exit code; quickstart's stages are commands.
    """
    _add_demo_data(commands)
    _add_report(commands)
    _add_run(commands, run_command)


def _add_demo_data(commands: Any) -> None:
    parser = add_command(commands, "demo-data", "the scenes, speech, documents and prose of the demo", _demo_data)
    parser.add_argument("--out", required=True, metavar="DIR", help="where the manifests go")
    parser.add_argument("--share", type=float, default=1.0, help="of the demo's rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="processes that synthesize; 0: this one alone")


def _demo_data(args: argparse.Namespace) -> Iterable[str]:
    from mmllm.quickstart.demo_data import DemoSizes, make_demo_data

    sizes = DemoSizes().scaled(args.share)
    return as_json(make_demo_data(args.out, args.seed, sizes, max(1, args.workers)))


def _add_report(commands: Any) -> None:
    parser = add_command(commands, "report", "a quickstart's report and model card again, from its folder", _report)
    parser.add_argument("--out", required=True, metavar="DIR", help="the quickstart's folder")


def _report(args: argparse.Namespace) -> Iterable[str]:
    check_there("run", args.out, hint=f"`mmllm quickstart --out {args.out}` makes one")
    from mmllm.quickstart.summary import summarize

    return [str(summarize(Path(args.out)))]


def _add_run(commands: Any, run_command: RunCommand) -> None:
    def run(args: argparse.Namespace) -> Iterable[str]:
        if not Path(args.out).exists():  # a run that goes on may need them no longer
            check_there("manifest", *args.train, *args.test)
        from mmllm.quickstart.run import quickstart

        column_names(args)  # a misspelt one is said now
        quickstart(
            run_command, args.out, args.train, args.test, args.holdout, args.minutes, args.seed, args.max_steps,
            args.max_bad_fraction, args.format, args.media, args.columns, args.preset, args.data_only,
        )  # fmt: skip
        return []

    from mmllm.quickstart.presets import DEMO, PRESETS

    parser = add_command(commands, "quickstart", "the whole way on one machine, from data to report", run)
    parser.add_argument(
        "--preset", choices=tuple(PRESETS), default=DEMO.name,
        help="; ".join(f"{preset.name}: {preset.about}" for preset in PRESETS.values()),
    )  # fmt: skip
    parser.add_argument("--train", action="append", default=[], metavar="MANIFEST", help="your data; may be repeated")
    parser.add_argument("--test", action="append", default=[], metavar="MANIFEST", help="may be repeated")
    parser.add_argument("--holdout", metavar="KEY=VALUE", help="rows to hold out where there is no --test")
    add_input_options(parser)
    parser.add_argument("--media", metavar="DIR", help="what paths are relative to; by default each input's folder")
    parser.add_argument(
        "--minutes", type=float, metavar="N",
        help="wall time that the run aims at, for everything: making and building data, training, evaluation, report; "
        "by how much it took longer is said at the end; a run that goes on may get more until its decoder is trained",
    )  # fmt: skip
    parser.add_argument("--max_steps", type=int, metavar="N", help="steps of each training at most")
    parser.add_argument("--data_only", action="store_true", help="end before the decoder is trained")
    parser.add_argument("--max_bad_fraction", type=float, help="more unusable rows are an error")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--out", required=True, metavar="DIR", help="where everything goes")
