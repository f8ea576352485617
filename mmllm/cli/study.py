"""`mmllm study`: whether a method is worth its cost on one's own data, by trainings that have one budget alike."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmllm.cli.command import add_command, add_group, check_there

_EXECUTORS = ("local", "datatrove", "slurm", "ray")


def add_study(commands: Any) -> None:
    """Adds `mmllm study run`, `report` and `efficiency`."""
    actions = add_group(commands, "study", "what a method is worth: runs of one budget, tests, samples for equal score")
    parser = add_command(actions, "run", "run what of a study is not done yet, and report it", _run)
    parser.add_argument("study", help="its YAML, or a shipped one by name: studies/experts.yaml")
    parser.add_argument("--out", required=True, metavar="DIR", help="where runs and the report go")
    parser.add_argument(
        "--minutes", type=float, metavar="N",
        help="bound of the whole study, but for making its data: one seed of every arm comes first",
    )  # fmt: skip
    parser.add_argument("--executor", choices=_EXECUTORS, default="local", help="where runs are")
    parser.add_argument("--workers", type=int, default=1, help="runs at once")
    parser.add_argument("--tasks", type=int, help="into how many tasks the runs are cut; not for local")
    parser.add_argument("--work", metavar="DIR", help="of the executor: items, results and logs")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the executor's own")
    parser.add_argument("--threads", type=int, default=1, help="of each run's processes")
    parser.add_argument("--dry_run", action="store_true", help="say what it costs, and check every config, alone")
    parser = add_command(actions, "report", "report.json and report.html of a study's folder", _report)
    parser.add_argument("folder", metavar="DIR")
    parser = add_command(actions, "efficiency", "one page of many studies' reports", _efficiency)
    parser.add_argument("folder", metavar="DIR", help="of report.json files, each under its study's name")
    parser.add_argument("--scaling", action="append", default=[], metavar="FIT", help="of `mmllm scaling fit`")
    parser.add_argument("--out", required=True, metavar="FILE.md")


def _run(args: argparse.Namespace) -> Iterable[str]:
    from mmllm.data.executors.stages import Executor, parse_options
    from mmllm.studies.run import plan_study, run_study

    if args.dry_run:
        yield from plan_study(args.study, args.out, max(1, args.workers))
        return
    work = None if args.work is None else Path(args.work)
    executor = Executor(args.executor, args.workers, args.tasks, work, parse_options(args.option))
    yield from run_study(args.study, args.out, args.minutes, executor, args.threads)
    yield from _lines(args.out)


def _report(args: argparse.Namespace) -> Iterable[str]:
    return _lines(args.folder)


def _lines(folder: str) -> Iterable[str]:
    from mmllm.studies.report import PAGE, report, report_lines

    values = report(Path(folder))
    yield from report_lines(values)
    yield f"{Path(folder) / PAGE}"


def _efficiency(args: argparse.Namespace) -> Iterable[str]:
    check_there("folder", args.folder)
    check_there("fit", *args.scaling)
    from mmllm.studies.efficiency import write_efficiency

    return write_efficiency(Path(args.folder), Path(args.out), [Path(fit) for fit in args.scaling])
