"""Tasks by datatrove's executors: processes of this machine, jobs of Slurm, workers of Ray.

datatrove's Slurm executor would leave itself in the work folder as a pickle, for its jobs to load. Here a job makes it
anew from JSON: `python -m mmllm.data.executors.launching RUN` is what a job's script calls.
"""

from __future__ import annotations

import inspect
import json
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from mmllm.data.executors.task import ERRORS, Task, write_whole

OWN_OPTIONS = (
    "pipeline", "tasks", "workers", "logging_dir", "skip_completed", "depends", "local_tasks", "local_rank_offset",
    "start_method", "job_id_position", "job_id_retriever",
)  # fmt: skip
"""Options of datatrove's executors that are set here."""
_JOBS, _OPTIONS, _RANKS, _SCRIPT = "jobs.txt", "slurm.json", "ranks_to_run.json", "launch_script.slurm"
_POLL_SECONDS = 1.0


def launch(
    executor: str,
    run: Path,
    num_ranks: int,
    name: str,
    workers: int,
    options: dict[str, Any],
    tick: Callable[[], None],
) -> None:
    """Runs the ranks that `Task.describe` told of; on Slurm, submits them.

    Args:
        executor: `datatrove`, `slurm` or `ray`.
        run: Folder of the description and of logs.
        num_ranks: That share the items.
        name: Of the job.
        workers: Ranks that run at a time.
        options: The executor's own.
        tick: Called now and then while ranks run on this machine.

    Raises:
        ModuleNotFoundError: datatrove isn't installed, or ray.
        ValueError: The executor has no such option, or Slurm takes no job.
    """
    kind = _kind(executor)
    known = inspect.signature(kind).parameters
    for key in options:
        if key not in known:
            has = ", ".join(name for name in known if name not in OWN_OPTIONS)
            raise ValueError(f"executor {executor} has no option {key!r}; it has {has}")
    given = {"tasks": num_ranks, "logging_dir": str(run), **options}
    match executor:
        case "datatrove":
            _run_here(kind, given, workers, tick)
        case "ray":
            _run_ray(kind, {"pipeline": [Task(str(run))], "workers": workers, **given})
        case _:
            _submit(kind, {"workers": workers, "job_name": name, "qos": "", **given}, run)


def _kind(executor: str) -> type:
    """The executor's class in datatrove.

    Raises:
        ModuleNotFoundError: It isn't installed.
    """
    try:
        from datatrove import executor as found  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"executor {executor} needs datatrove ({error}); pip install 'mmllm[datatrove]', or use the executor local"
        ) from error
    kinds = {"datatrove": "LocalPipelineExecutor", "slurm": "SlurmPipelineExecutor", "ray": "RayPipelineExecutor"}
    return getattr(found, kinds[executor])


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
    executor = kind(pipeline=[Task(given["logging_dir"])], **given, workers=1)
    executor._run_for_rank(rank, rank)  # its `run` would start a process that outlives a killed rank


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
    """As datatrove's own `launch_job`, but for the pickle, and for a job that merges statistics in the end.

    That job would wait for ever behind one that failed.
    """
    python = "python"
    if not {"env_command", "venv_path", "condaenv"} & given.keys():
        here = shlex.quote(str(Path(sys.executable).parent))
        given["env_command"] = f'export PATH={here}{os.pathsep}"$PATH"'
        python = shlex.quote(sys.executable)
    try:
        told = json.dumps(given)
    except TypeError as error:
        raise ValueError(f"the options of executor slurm must be JSON, got {given}: {error}") from error
    slurm = kind(pipeline=[Task(str(run))], **given)
    num_jobs = -(-slurm.tasks // slurm.tasks_per_job)
    size = num_jobs if slurm.max_array_size == -1 else min(num_jobs, slurm.max_array_size)
    command = f"{python} -m {__name__} {shlex.quote(str(run))}"
    if slurm.with_srun:
        more = "".join(f" --{key}={value}" for key, value in (slurm.srun_args or {}).items())
        command = f"srun{more} -l -n {slurm.nodes_per_task} {command}"
    script = run / _SCRIPT
    write_whole(script, slurm.get_launch_file_contents(slurm.get_sbatch_args(size), command).encode())
    write_whole(run / _OPTIONS, told.encode())
    write_whole(run / _RANKS, json.dumps(list(range(slurm.tasks))).encode())
    slurm.save_executor_as_json()  # for datatrove's own tools, which tell of jobs
    for number in range(-(-num_jobs // size)):
        if number and slurm.max_array_launch_parallel:
            time.sleep(max(0, slurm.stagger_max_array_jobs))
        options = [f"--export=ALL,RUN_OFFSET={number}"]
        if slurm.dependency:
            options.append(f"--dependency={slurm.dependency}")
        slurm.job_id = _sbatch([*options, str(script)], run)


def _sbatch(arguments: list[str], run: Path) -> str:
    """The id of the job that is submitted; it is noted in the run's folder as soon as sbatch has said it."""
    try:
        said = subprocess.run(["sbatch", *arguments], stdout=subprocess.PIPE, text=True, check=True).stdout
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        raise ValueError(f"Slurm took no job: {error}; what sbatch says of it stands above; logs: {run}") from error
    found = re.search(r"job (\d+)", said)
    if found is None:
        raise ValueError(f"sbatch said {said!r}, which names no job")
    with (run / _JOBS).open("a", encoding="utf-8") as stream:
        stream.write(f"{found[1]}\n")
    return found[1]


def run_job(run: Path) -> None:
    """What a job of Slurm does: its ranks of a run."""
    given = json.loads((run / _OPTIONS).read_bytes())
    _kind("slurm")(pipeline=[Task(str(run))], **given).run()  # takes its rank from the job's environment


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


if __name__ == "__main__":
    run_job(Path(sys.argv[1]))
