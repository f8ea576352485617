"""Tasks by datatrove's executors: processes of this machine, jobs of Slurm, workers of Ray."""

from __future__ import annotations

import inspect
import json
import multiprocessing
import os
import pickle
import re
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

ERRORS = "errors"
"""Folder of a run: what its tasks failed of."""
OWN_OPTIONS = (
    "pipeline", "tasks", "workers", "logging_dir", "skip_completed", "depends", "local_tasks", "local_rank_offset",
    "start_method", "job_id_position", "job_id_retriever",
)  # fmt: skip
"""Options of datatrove's executors that are set here."""
_JOBS = "jobs.txt"
_POLL_SECONDS = 1.0


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that others see whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
    try:
        unfinished.write_bytes(data)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


class Task:
    """The one step of datatrove's pipeline: each rank does its share of the items.

    It is pickled for each rank, so it holds names alone.

    Args:
        folder: Of items and results.
        run: Folder of the function and of errors.
        shares: Each rank's keys.
    """

    FUNCTION = "function.pkl"

    def __init__(self, folder: str, run: str, shares: Sequence[Sequence[str]]) -> None:
        self._folder, self.run, self._shares = folder, run, shares

    @property
    def num_ranks(self) -> int:
        """Ranks that share the items."""
        return len(self._shares)

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        """What datatrove calls; `data` is what a step before this one would give."""
        try:
            self._do(rank)
        except BaseException as error:
            write_whole(Path(self.run, ERRORS, f"{rank:05d}.txt"), _named(error))
            raise

    def _do(self, rank: int) -> None:
        torch.set_num_threads(1)  # tasks share a machine
        function = pickle.loads(Path(self.run, self.FUNCTION).read_bytes())
        for key in self._shares[rank]:
            result = Path(self._folder, f"{key}.json")
            if not result.is_file():
                item = pickle.loads(Path(self._folder, f"{key}.pkl").read_bytes())
                write_whole(result, json.dumps(function(item, key)).encode())


def _named(error: BaseException) -> bytes:
    return f"{type(error).__name__}: {error}".encode("utf-8", "backslashreplace")


def launch(
    executor: str, task: Task, name: str, workers: int, options: dict[str, Any], tick: Callable[[], None]
) -> None:
    """Runs a task's ranks; on Slurm, submits them.

    Args:
        executor: `datatrove`, `slurm` or `ray`.
        task: What they do.
        name: Of the job.
        workers: Ranks that run at a time.
        options: The executor's own.
        tick: Called now and then while ranks run on this machine.

    Raises:
        ModuleNotFoundError: datatrove isn't installed, or ray.
        ValueError: The executor has no such option, or Slurm takes no job.
    """
    try:
        from datatrove import executor as found  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"executor {executor} needs datatrove ({error}); pip install 'mmllm[datatrove]', or use the executor local"
        ) from error
    kinds = {"datatrove": "LocalPipelineExecutor", "slurm": "SlurmPipelineExecutor", "ray": "RayPipelineExecutor"}
    kind = getattr(found, kinds[executor])
    known = inspect.signature(kind).parameters
    for key in options:
        if key not in known:
            has = ", ".join(name for name in known if name not in OWN_OPTIONS)
            raise ValueError(f"executor {executor} has no option {key!r}; it has {has}")
    given = {"pipeline": [task], "tasks": task.num_ranks, "logging_dir": task.run, **options}
    match executor:
        case "datatrove":
            _run_here(kind, given, workers, tick)
        case "ray":
            _run_ray(kind, {"workers": workers, **given})
        case _:
            _submit(kind, {"workers": workers, "job_name": name, **given}, Path(task.run))


def _run_here(kind: type, given: dict[str, Any], workers: int, tick: Callable[[], None]) -> None:
    """A process a rank: datatrove's own pool would wait for ever for one that was killed."""
    context = multiprocessing.get_context("spawn")
    waiting = list(range(given["tasks"]))
    running: dict[int, Any] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                rank = waiting.pop(0)
                running[rank] = context.Process(target=_run_rank, args=(kind, given, rank))
                running[rank].start()
            wait([process.sentinel for process in running.values()], timeout=_POLL_SECONDS)
            for rank in [rank for rank, process in running.items() if not process.is_alive()]:
                _note_end(given["logging_dir"], rank, running.pop(rank).exitcode)
            tick()
    finally:
        for process in running.values():
            process.kill()
            process.join()


def _run_rank(kind: type, given: dict[str, Any], rank: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with Path(given["logging_dir"], _stderr(rank)).open("w") as stream:
        os.dup2(stream.fileno(), 2)  # datatrove tells each rank's story there as well as in its logs
    kind(**given, workers=1)._run_for_rank(rank, rank)  # its `run` would start a process that outlives a killed rank


def _stderr(rank: int) -> str:
    return f"stderr-{rank:05d}.txt"


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _note_end(run: str, rank: int, exit_code: int) -> None:
    """Writes down why a rank ended that could not do it itself."""
    path = Path(run, ERRORS, f"{rank:05d}.txt")
    if exit_code and not path.is_file():
        killed = f"it was killed by signal {-exit_code} (lack of memory, perhaps: try fewer --workers)"
        write_whole(path, (killed if exit_code < 0 else f"what {_stderr(rank)} among its logs says").encode())


def _run_ray(kind: type, given: dict[str, Any]) -> None:
    try:
        kind(**given).run()
    except ImportError as error:
        raise ModuleNotFoundError(f"executor ray needs ray ({error}); pip install ray") from error


def _submit(kind: type, given: dict[str, Any], run: Path) -> None:
    if not {"env_command", "venv_path", "condaenv"} & given.keys():
        here = shlex.quote(str(Path(sys.executable).parent))
        given["env_command"] = f'export PATH={here}{os.pathsep}"$PATH"'
    slurm = kind(**{"qos": "", "job_id_retriever": _NoteJob(str(run)), **given})
    slurm.launch_merge_stats = _nothing  # a job more, which would wait for ever behind one that failed
    try:
        slurm.run()
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        raise ValueError(f"Slurm took no job: {error}; what sbatch says of it stands above; logs: {run}") from error


def _nothing() -> None:
    pass


class _NoteJob:
    """Notes the id of a job as soon as sbatch has said it."""

    def __init__(self, run: str) -> None:
        self._run = run

    def __call__(self, said: str) -> str:
        found = re.search(r"job (\d+)", said)
        if found is None:
            raise ValueError(f"sbatch said {said!r}, which names no job")
        job = found[1]
        with Path(self._run, _JOBS).open("a", encoding="utf-8") as stream:
            stream.write(f"{job}\n")
        return job


def jobs_of(run: Path) -> list[str]:
    """Ids of the jobs that a run submitted."""
    path = run / _JOBS
    return path.read_text(encoding="utf-8").split() if path.is_file() else []


def in_queue(job: str) -> str:
    """Why a job must be taken for one that Slurm still has; "" if it has ended."""
    try:
        queue = subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"squeue can't be asked for job {job} ({error})"
    if queue.returncode == 0:
        return f"Slurm's job {job} is still in the queue" if queue.stdout.strip() else ""
    said = queue.stderr.strip()
    return "" if "Invalid job id" in said else f"squeue can't tell of job {job} ({said})"
