"""`mmllm incremental`: tasks learnt one after the other, with what each does to the others."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from mmllm.cli.command import add_command, check_there


def add_incremental(commands: Any) -> None:
    """Adds `mmllm incremental`."""
    parser = add_command(
        commands,
        "incremental",
        "learn tasks one after the other; score all of them after each: transfer and forgetting",
        _incremental,
    )
    parser.add_argument("plan", metavar="PLAN", help="YAML: start, base, tasks; docs/guides/finetune.md shows one")
    parser.add_argument("--out", required=True, metavar="DIR", help="where models, scores and the matrix go")


def _incremental(args: argparse.Namespace) -> Iterable[str]:
    check_there("plan", args.plan)
    from mmllm.quickstart.processes import Processes, terminated_as_interrupt
    from mmllm.training.posttraining.incremental import incremental, load_plan

    plan = load_plan(args.plan)
    check_there("model folder", plan.start, hint="start is the folder that the first task goes on from")
    for task in plan.tasks:  # those of the last one too, before the first is learnt
        replay = task.replay or plan.replay
        files = (task.rows, task.recipe, None if replay is None else replay.recipe)
        check_there(f"file of task {task.name}", *files)
    processes = Processes()

    def run(command: Sequence[str], alone: bool) -> int:
        return processes.run(command, 1) if alone else processes.run_shared(command)

    with terminated_as_interrupt():
        try:
            incremental(plan, args.out, run, _say)
        finally:
            processes.end_all()
    return []


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
