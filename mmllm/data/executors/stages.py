"""Where the heavy stages run: in this process and its workers, or by datatrove's executors here, on Slurm or on Ray.

A stage is a function of items. Elsewhere, each item and what became of it are files of JSON in the work folder, named
by a digest of all that the result depends on. So a result is never another item's, and none is made twice: tasks are
only how the items that lack one are shared out. On Slurm the jobs run on after the command has ended; the same command,
run again, goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from mmllm.data.executors.launching import OWN_OPTIONS, in_queue, jobs_of, launch
from mmllm.data.executors.task import (
    ERRORS,
    Part,
    Task,
    Work,
    item_lines,
    item_path,
    result_path,
    write_whole,
)

EXECUTORS = ("local", "datatrove", "slurm", "ray")
Progress = Callable[[int, int], None]
"""Takes how much is done and how much there is in all."""

_OUT = "out.txt"
_logger = logging.getLogger(__name__)


class UnfinishedError(Exception):
    """Tasks aren't done yet. The message says what to do."""

    exit_code = os.EX_TEMPFAIL


class TaskError(ValueError):
    """A task failed. The message has its error."""


@dataclass(frozen=True)
class Executor:
    """Where stages run."""

    name: str = "local"
    """`local`: this process and its workers. `datatrove`, `slurm`, `ray`: datatrove's executors."""
    workers: int = 0
    """Processes, or tasks that run at a time (0: one)."""
    tasks: int | None = None
    """Into how many tasks a stage is cut; by default as many as workers."""
    work: Path | None = None
    """Folder of items, results and logs; all machines must see it, and inputs and outputs, under the same path."""
    options: dict[str, Any] = field(default_factory=dict)
    """More of the executor's own, e.g. Slurm's `partition` and `time`."""

    def __post_init__(self) -> None:
        if self.name not in EXECUTORS:
            raise ValueError(f"executor is {self.name!r}; it must be one of {', '.join(EXECUTORS)}")
        if self.workers < 0 or (self.tasks is not None and self.tasks < 1):
            raise ValueError(f"workers is {self.workers}, tasks {self.tasks}; they must be >= 0 and >= 1")
        if self.is_here and (self.tasks is not None or self.options or self.work is not None):
            raise ValueError("tasks, work and options are for the executors datatrove, slurm and ray, not for local")
        if not self.is_here and self.work is None:
            raise ValueError(f"executor {self.name} needs a work folder")
        if self.name == "slurm" and not {"partition", "time"} <= self.options.keys():
            raise ValueError("executor slurm needs the options partition=NAME and time=HH:MM:SS")
        for key in self.options:
            if key in OWN_OPTIONS:
                raise ValueError(f"executor option {key!r} is not to be set; there are --tasks, --workers and --work")

    @property
    def is_here(self) -> bool:
        """Whether stages run in this process and its workers, without datatrove."""
        return self.name == "local"

    def claim(self, out: Path) -> None:
        """Takes the work folder for what is built into `out`.

        Raises:
            ValueError: It is another's.
        """
        if self.work is not None:
            mark, wanted = self.work / _OUT, os.fsencode(out.absolute())
            found = mark.read_bytes() if mark.is_file() else wanted
            if found != wanted:
                raise ValueError(f"{self.work}: is where {os.fsdecode(found)} is built; name another by --work")
            self.work.mkdir(parents=True, exist_ok=True)
            write_whole(mark, wanted)


def parse_options(items: Sequence[str]) -> dict[str, Any]:
    """Options from `KEY=VALUE`; values that are JSON (`4`, `{"account": "lab"}`) are read as such.

    Raises:
        ValueError: One has no `=`.
    """
    options = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ValueError(f"executor option {item!r}: it must be KEY=VALUE")
        options[key] = text
        with suppress(ValueError):
            options[key] = json.loads(text)
    return options


class Stage:
    """A stage that runs elsewhere.

    Args:
        name: Names its folder in the work folder.
        executor: Which isn't local.
        settings: All that every result depends on besides its item, as JSON.
    """

    def __init__(self, name: str, executor: Executor, settings: dict[str, Any]) -> None:
        assert executor.work is not None
        self._name, self._executor = name, executor
        self._folder = executor.work.absolute() / name
        self._settings = json.dumps(settings, sort_keys=True)

    def key(self, item: Sequence[Part], files: Sequence[Path]) -> str:
        """Names the result of an item: a digest of the settings, its lines, and its files' sizes and times."""
        digest = hashlib.sha256(self._settings.encode())
        digest.update(item_lines(item))
        for path in files:
            with suppress(OSError):
                found = path.stat()
                digest.update(f"{found.st_size} {found.st_mtime_ns};".encode())
        return digest.hexdigest()[:32]

    def run(
        self,
        work: Work,
        items: Sequence[Sequence[Part]],
        keys: Sequence[str],
        sizes: Sequence[int],
        progress: Progress | None = None,
        still_holds: Callable[[str], bool] | None = None,
    ) -> list[Any]:
        """What becomes of each item.

        Args:
            work: What is done with an item.
            items: Each in parts.
            keys: Their names.
            sizes: How much of `progress` each is.
            progress: Called while tasks of this machine run.
            still_holds: Whether the result of a key can still be used.

        Raises:
            ModuleNotFoundError: datatrove isn't installed.
            UnfinishedError: Tasks aren't done yet.
            TaskError: One failed.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        missing = [
            number
            for number, key in enumerate(keys)
            if not result_path(self._folder, key).is_file() or (still_holds is not None and not still_holds(key))
        ]
        if missing:
            self._check_last_run()
            for number in missing:
                result_path(self._folder, keys[number]).unlink(missing_ok=True)
                write_whole(item_path(self._folder, keys[number]), item_lines(items[number]))
            pending = {keys[number]: sizes[number] for number in missing}

            def tick() -> None:
                for key in [key for key in pending if result_path(self._folder, key).is_file()]:
                    del pending[key]
                if progress:
                    progress(sum(sizes) - sum(pending.values()), sum(sizes))

            run = self._submit(work, list(pending), tick)
            tick()
            if pending:
                self._complain(
                    run, f"the stage {self._name!r} lacks {len(pending)} of {len(keys)} results; logs: {run}"
                )
        return [json.loads(result_path(self._folder, key).read_bytes()) for key in keys]

    def forget(self) -> None:
        """Removes all items and results of the stage; logs stay."""
        for path in self._folder.glob("*"):
            if re.fullmatch(r"[0-9a-f]{32}\.(json|jsonl|pkl)", path.name):  # earlier versions pickled items
                path.unlink(missing_ok=True)

    def _submit(self, work: Work, keys: Sequence[str], tick: Callable[[], None]) -> Path:
        """Runs tasks for these keys, or on Slurm submits them."""
        executor, run = self._executor, self._new_run()
        num_tasks = max(1, min(executor.tasks or executor.workers, len(keys)))
        bounds = [rank * len(keys) // num_tasks for rank in range(num_tasks + 1)]
        shares = [list(keys[start:stop]) for start, stop in pairwise(bounds)]
        Task.describe(run, self._folder, work, shares)
        name, workers = f"mmllm-{self._name}", max(1, executor.workers)
        launch(executor.name, run, len(shares), name, workers, executor.options, tick)
        return run

    def _new_run(self) -> Path:
        """A folder for what one command submits: datatrove's logs and notes, and tasks' errors."""
        number = len(self._runs())
        while True:
            run = self._folder / f"run-{number:04d}"
            with suppress(FileExistsError):
                run.mkdir()
                (run / ERRORS).mkdir()
                return run
            number += 1

    def _runs(self) -> list[Path]:
        return sorted(self._folder.glob("run-*"))

    def _complain(self, run: Path, where: str) -> None:
        errors, jobs = _errors(run), jobs_of(run)
        if errors:
            raise TaskError(f"{len(errors)} tasks failed, the first of {errors[0]}; {where}")
        if not jobs:
            raise TaskError(f"tasks ended without results; {where}")
        raise UnfinishedError(f"submitted job {', '.join(jobs)}; run the same command again when it has ended; {where}")

    def _check_last_run(self) -> None:
        """Refuses to submit what Slurm still has, and says what jobs that have ended failed of."""
        for run in self._runs()[-1:]:
            for job in jobs_of(run):
                why = in_queue(job)
                if why:
                    raise UnfinishedError(f"{why}; run the same command again when job {job} has ended")
            for error in _errors(run):
                _logger.warning("a task of %s failed and is tried again: %s", run, error)


def _errors(run: Path) -> list[str]:
    """What tasks of a run failed of."""
    return [path.read_text(encoding="utf-8") for path in sorted((run / ERRORS).glob("*"))]
