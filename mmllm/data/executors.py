"""Where the heavy stages run: in this process and its workers, or by datatrove's executors here, on Slurm or on Ray.

A stage is a function of many items. Elsewhere, they are cut into tasks; a task reads its items from the work folder and
writes what became of them there, so one that is done is not done again. On Slurm the jobs run on after the command has
ended: the same command, run again, goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

EXECUTORS = ("local", "datatrove", "slurm", "ray")
_PLAN, _JOB, _LOGS = "plan.txt", "job.txt", "logs"


class UnfinishedError(ValueError):
    """Tasks aren't done yet. The message says what to do."""


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
    """Folder of tasks and logs; all machines must see it, and the inputs and outputs, under the same path."""
    options: dict[str, Any] = field(default_factory=dict)
    """More of the executor's own, e.g. Slurm's `partition` and `time`."""

    def __post_init__(self) -> None:
        if self.name not in EXECUTORS:
            raise ValueError(f"executor is {self.name!r}; it must be one of {', '.join(EXECUTORS)}")
        if self.workers < 0 or (self.tasks is not None and self.tasks < 1):
            raise ValueError(f"workers is {self.workers}, tasks {self.tasks}; they must be >= 0 and >= 1")
        if self.name == "local" and (self.tasks is not None or self.options):
            raise ValueError("tasks and options are for the executors datatrove, slurm and ray; this one is local")
        if self.name != "local" and self.work is None:
            raise ValueError(f"executor {self.name} needs a work folder")
        if self.name == "slurm" and not {"partition", "time"} <= self.options.keys():
            raise ValueError("executor slurm needs the options partition=NAME and time=HH:MM:SS")

    @property
    def is_here(self) -> bool:
        """Whether stages run in this process and its workers, without datatrove."""
        return self.name == "local"

    def forget(self) -> None:
        """Removes the tasks of all stages; their logs stay."""
        if self.work is not None:
            for stage in self.work.glob("*/"):
                for path in (*stage.glob("*-*.pkl"), *stage.glob("*-*.json"), stage / _PLAN, stage / _JOB):
                    path.unlink(missing_ok=True)
                shutil.rmtree(stage / _LOGS / "completions", ignore_errors=True)


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


def run_tasks(
    stage: str,
    function: Callable[[Sequence[Any]], list[Any]],
    items: Sequence[Any],
    executor: Executor,
    settings: dict[str, Any],
) -> list[Any]:
    """What became of each item, by one of datatrove's executors.

    Args:
        stage: Its folder's name in the work folder.
        function: Takes some of the items, returns a JSON value for each; picklable.
        items: Picklable; their `repr` tells them apart.
        executor: Which isn't local.
        settings: All else that results depend on, as JSON. A task done under other settings is refused.

    Raises:
        ModuleNotFoundError: datatrove isn't installed.
        UnfinishedError: Tasks aren't done yet.
        ValueError: The folder holds the work of other items or settings.
    """
    assert executor.work is not None
    folder = (executor.work / stage).absolute()
    num_tasks = max(1, min(executor.tasks or executor.workers, len(items)))
    _prepare(folder, items, settings, num_tasks)
    if not all(path.is_file() for path in _outputs(folder, num_tasks)):
        _check_queue(folder)
        _run(executor, _Task(str(folder), function), num_tasks, folder)
    missing = [path for path in _outputs(folder, num_tasks) if not path.is_file()]
    if missing:
        raise UnfinishedError(
            f"{len(missing)} of {num_tasks} tasks of the stage {stage!r} aren't done ({missing[0].name} …); run the "
            f"same command again when they are. Their logs lie in {folder / _LOGS}"
        )
    return [found for path in _outputs(folder, num_tasks) for found in json.loads(path.read_text(encoding="utf-8"))]


def _outputs(folder: Path, num_tasks: int) -> list[Path]:
    return [folder / f"output-{rank:05d}.json" for rank in range(num_tasks)]


def _prepare(folder: Path, items: Sequence[Any], settings: dict[str, Any], num_tasks: int) -> None:
    """Writes the tasks' items and what tells this work from other work, which is refused."""
    digest = hashlib.sha256(json.dumps([settings, num_tasks], sort_keys=True, default=str).encode())
    for item in items:
        digest.update(repr(item).encode("utf-8", "surrogatepass"))
    plan = folder / _PLAN
    if plan.is_file():
        if plan.read_text(encoding="utf-8") != digest.hexdigest():
            raise ValueError(
                f"{folder}: holds the work of other rows, settings or tasks, not yet ended; name another folder by "
                f"--work, or remove this one"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(num_tasks):
        start, stop = rank * len(items) // num_tasks, (rank + 1) * len(items) // num_tasks
        (folder / f"input-{rank:05d}.pkl").write_bytes(pickle.dumps(list(items[start:stop])))
    plan.write_text(digest.hexdigest(), encoding="utf-8")


class _Task:
    """What a datatrove task does: a pipeline of this one step. It is pickled."""

    def __init__(self, folder: str, function: Callable[[Sequence[Any]], list[Any]]) -> None:
        self._folder, self._function = folder, function

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        folder = Path(self._folder)
        output = folder / f"output-{rank:05d}.json"
        if output.is_file():
            return
        items = pickle.loads((folder / f"input-{rank:05d}.pkl").read_bytes())
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # tasks share a machine
        try:
            found = self._function(items)
        finally:
            torch.set_num_threads(num_threads)
        unfinished = output.with_suffix(".partial")
        unfinished.write_text(json.dumps(found), encoding="utf-8")
        unfinished.replace(output)


def _check_queue(folder: Path) -> None:
    """Refuses to submit what Slurm still has."""
    with suppress(OSError):
        job = (folder / _JOB).read_text(encoding="utf-8")
        queue = subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, text=True, check=False)
        if queue.returncode == 0 and queue.stdout.strip():
            raise UnfinishedError(f"Slurm's job {job} is still in the queue; run the same command again when it ends")


def _run(executor: Executor, task: Callable, num_tasks: int, folder: Path) -> None:
    try:
        from datatrove import executor as found  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"executor {executor.name} needs datatrove ({error}); pip install 'mmllm[datatrove]', or use the executor "
            f"local"
        ) from error
    for rank, output in enumerate(_outputs(folder, num_tasks)):
        if not output.is_file():  # whatever datatrove has noted
            (folder / _LOGS / "completions" / f"{rank:05d}").unlink(missing_ok=True)
    common = {
        "pipeline": [task],
        "tasks": num_tasks,
        "workers": max(1, min(executor.workers, num_tasks)),
        "logging_dir": str(folder / _LOGS),
    }
    match executor.name:
        case "datatrove":
            found.LocalPipelineExecutor(**{**common, "start_method": "spawn", **executor.options}).run()
        case "ray":
            found.RayPipelineExecutor(**{**common, **executor.options}).run()
        case _:
            here = f"export PATH={Path(sys.executable).parent}{os.pathsep}$PATH"
            has_own = {"env_command", "venv_path", "condaenv"} & executor.options.keys()
            own = {} if has_own else {"env_command": here}
            slurm = found.SlurmPipelineExecutor(**{**common, **own, **executor.options})
            slurm.run()
            (folder / _JOB).write_text(str(slurm.job_id), encoding="utf-8")
