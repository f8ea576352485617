"""Commands of `mmllm` that a run consists of: as processes, with what they say in the run's log; and their scores."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from mmllm.evaluation.results import TaskResult, load_result
from mmllm.quickstart.processes import Processes
from mmllm.studies.measures import Measure

LOG = "log.txt"
"""In a run's folder: its commands, and what they said."""


class RunFailed(ValueError):
    """A command of a run ended with an error. The message names the run and the log."""


def call(processes: Processes, command: Sequence[str], folder: Path, name: str, num_threads: int) -> None:
    """Runs a command of `mmllm`.

    Args:
        processes: that it belongs to.
        command: without `mmllm`.
        folder: of the run, which has its log.
        name: of the run, for errors.
        num_threads: of the process.

    Raises:
        RunFailed: it ended with an error.
        KeyboardInterrupt: it was interrupted.
    """
    with (folder / LOG).open("a", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(['mmllm', *command])}\n")
        code, printed = processes.run_beside(command, num_threads, lambda line: _note(log, line))
        log.write(printed)
    if code in (130, -2):
        raise KeyboardInterrupt
    if code:
        said = (folder / LOG).read_text(encoding="utf-8").strip().splitlines()[-1]
        raise RunFailed(f"run {name}: `mmllm {command[0]}` failed: {said}; {folder / LOG} has all that it said")


def measured(measure: Measure, path: Path) -> tuple[float, TaskResult]:
    """A measure's score in what an evaluation wrote, and all of that.

    Raises:
        RunFailed: the task has no such score.
    """
    result = load_result(path)
    if measure.key not in result.scores:
        keys = ", ".join(key for key in result.scores if not key.endswith("_ci"))
        raise RunFailed(
            f"measure {measure.name} has the key {measure.key!r}, and the task {measure.task} scores {keys}"
        )
    return float(result.scores[measure.key]), result


def _note(log: IO[str], line: str) -> None:
    log.write(f"{line}\n")
    log.flush()
