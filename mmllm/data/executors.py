"""Where rows are measured: in this process and its workers, or by datatrove's executors here, on Slurm or on Ray.

A datatrove task measures every n-th row and writes `measures-00000.jsonl` into the work folder; a task that is done is
not done again. On Slurm the jobs run on after the command has ended: the same command, run again, goes on from there.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmllm.data.chunks import in_chunks
from mmllm.data.cleaning import CleaningConfig, measure
from mmllm.data.manifest import Row

EXECUTORS = ("local", "datatrove", "slurm", "ray")
_CHUNK = 256
_logger = logging.getLogger(__name__)


def measure_rows(
    rows: Sequence[Row],
    config: CleaningConfig,
    executor: str = "local",
    workers: int = 0,
    work: str | Path | None = None,
    options: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Each row's measures.

    Args:
        rows: The rows.
        config: What is measured.
        executor: `local`: this process and its workers. `datatrove`, `slurm`, `ray`: datatrove's executors.
        workers: Processes, or tasks that run at a time; at least one task.
        work: Folder of datatrove's tasks and logs.
        options: More of the executor's own, e.g. Slurm's `partition` and `time`.

    Raises:
        ModuleNotFoundError: datatrove isn't installed.
        ValueError: The executor is unknown, or the tasks aren't done yet.
    """
    if executor not in EXECUTORS:
        raise ValueError(f"executor is {executor!r}; it must be one of {', '.join(EXECUTORS)}")
    if executor == "local":
        chunks = in_chunks(partial(_measured, config=config), rows, _CHUNK, workers)
        return [found for _, chunk in chunks for found in chunk]
    if work is None:
        raise ValueError(f"executor {executor} needs a work folder")
    folder, tasks = Path(work), max(1, workers)
    folder.mkdir(parents=True, exist_ok=True)
    _check_plan(folder, rows, config, tasks)
    paths = [folder / f"measures-{rank:05d}.jsonl" for rank in range(tasks)]
    if not all(path.is_file() for path in paths):
        _executor(executor, _Task(list(rows), config, str(folder)), tasks, folder / "logs", options or {}).run()
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} of {tasks} tasks aren't done ({missing[0]} …); run the same command again when "
            f"they are"
        )
    found: list[dict[str, Any]] = [{} for _ in rows]
    for rank, path in enumerate(paths):
        for place, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
            found[rank + place * tasks] = json.loads(line)
    return found


def _check_plan(folder: Path, rows: Sequence[Row], config: CleaningConfig, tasks: int) -> None:
    """Refuses a work folder of other rows or another configuration."""
    plan = json.dumps({"rows": [row.where for row in rows], "config": str(config), "tasks": tasks})
    path = folder / "plan.json"
    if path.is_file() and path.read_text(encoding="utf-8") != plan:
        raise ValueError(f"{folder}: holds the work of other rows, settings or workers; name another folder")
    path.write_text(plan, encoding="utf-8")


def _measured(rows: Sequence[Row], config: CleaningConfig) -> list[dict[str, Any]]:
    return [measure(row, config) for row in rows]


class _Task:
    """What a datatrove task does: a pipeline of this one step. It is pickled, so it holds plain values alone."""

    def __init__(self, rows: list[Row], config: CleaningConfig, folder: str) -> None:
        self._rows, self._config, self._folder = rows, config, folder

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        path = Path(self._folder) / f"measures-{rank:05d}.jsonl"
        unfinished = path.with_suffix(".partial")
        with unfinished.open("w", encoding="utf-8") as stream:
            for row in self._rows[rank::world_size]:
                stream.write(json.dumps(measure(row, self._config)) + "\n")
        unfinished.replace(path)


def _executor(name: str, task: Callable, tasks: int, logs: Path, options: dict[str, Any]) -> Any:
    try:
        from datatrove import executor as found  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"executor {name} needs datatrove ({error}); pip install 'mmllm[datatrove]', or use the executor local"
        ) from error
    common = {"pipeline": [task], "tasks": tasks, "logging_dir": str(logs.absolute()), **options}
    match name:
        case "datatrove":
            return found.LocalPipelineExecutor(workers=tasks, start_method="spawn", **common)
        case "ray":
            return found.RayPipelineExecutor(workers=tasks, **common)
    if "partition" not in options or "time" not in options:
        raise ValueError("executor slurm needs the options partition=NAME and time=HH:MM:SS")
    return found.SlurmPipelineExecutor(workers=tasks, **common)
