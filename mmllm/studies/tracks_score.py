"""`mmllm study score`: one run of a track, trained here or by somebody else, scored as `score.json`.

DIR/rows     what the track trains and tests on, with their digest
DIR/run      of the baseline: `mmllm quickstart` on the training rows, on two cores
DIR/judge    of speech: an aligner that has learnt on the training rows, with one seed and number of steps
DIR/eval     what each test row scored
DIR/score.json
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmllm.checkout import commit
from mmllm.evaluation.commands import run_eval
from mmllm.evaluation.results import TaskResult
from mmllm.quickstart.machine import num_cores
from mmllm.quickstart.processes import Processes, terminated_as_interrupt
from mmllm.studies.machine import machine
from mmllm.studies.tracks import ROWS, Track, TrackSizes, track_of, write_rows

SCORE = "score.json"
MINUTES = 10.0
"""Of a track."""
NUM_CORES = 2
"""That a run of a track trains on."""
JUDGE_SEED = 0
SCORING_SEED = 0
"""Of sampling and of intervals: all are scored alike, whatever seed they were trained with."""
_COMMIT = "commit"
"""In the baseline's folder: which code began it."""
Tick = Callable[[int, int], None]


def score_track(
    name: str,
    out: str | Path,
    model: str | None = None,
    seed: int | None = None,
    minutes: float | None = None,
    judge: str | None = None,
    max_steps: int | None = None,
    sizes: TrackSizes | None = None,
    progress: Tick | None = None,
) -> Iterator[str]:
    """Scores one run of a track; gives lines to print while it goes on. The same call goes on where it was stopped.

    Args:
        name: of the track.
        out: folder of the score.
        model: a model's folder that was trained on the track's rows; None: the baseline is trained.
        seed: that the model was trained with, by which scores are paired; None: 0 for the baseline, else unknown.
        minutes: that the baseline trains for (None: the track's 10), or that the model was trained for.
        judge: an aligner's folder, of a track that has a judge; None: one is trained.
        max_steps: a try-out of the baseline with so many steps of each training; its score means nothing.
        sizes: of rows that are made; None: the track's own.
        progress: called with how much of the scoring is done, and of how much.

    Raises:
        ValueError: an unknown track, rows that aren't to be had, a model that lacks the sense, options that contradict
            each other, or a folder that holds another's score.
    """
    track, folder = track_of(name), Path(out)
    sizes = sizes or TrackSizes()
    _check_options(track, model, minutes, judge, max_steps)
    if model is not None:
        check_sense(track, Path(model))
    elif seed is None:
        seed = 0
    rows = write_rows(track, folder, sizes)
    yield rows_line(rows, folder)
    _check_earlier(folder, track, seed, model)
    cores = None
    if model is None:
        minutes = MINUTES if minutes is None else minutes
        command = baseline_command(folder, seed or 0, minutes, max_steps)
        yield f"$ {shlex.join(['mmllm', *command])}"
        cores = _train(folder, command)
        if cores < NUM_CORES:
            yield f"warning: trained on {cores} core; a track has {NUM_CORES}"
        report = json.loads((folder / "run" / "report.json").read_text(encoding="utf-8"))
        minutes = round(report["train"]["seconds"] / 60, 2)
    trained = folder / "run" / "model" if model is None else Path(model)
    if track.is_judged and judge is None:
        command = judge_command(folder, sizes.judge_steps)
        yield f"$ {shlex.join(['mmllm', *command])}"
        judge = str(_judge(folder, command))
    result = run_eval(
        str(trained), track.task, str(folder / ROWS / "test.jsonl"), str(folder / "eval" / f"{track.task}.json"),
        seed=SCORING_SEED, max_bad_fraction=0.0, progress=progress, judge=judge,
    )  # fmt: skip
    scores = {
        **_scores(track, result),
        "seed": seed,
        "minutes": minutes,
        "rows": result.scores["n"],
        "rows_sha256": rows["rows_sha256"],
        "model_sha256": weights_digest(trained),
        "judge_sha256": None if judge is None else weights_digest(Path(judge)),
        "is_baseline": model is None,
        "max_steps": max_steps,
        "commit": commit(),
        "machine": {**machine(), "training_cores": cores},
        "date": datetime.now(UTC).date().isoformat(),
    }
    _write(folder / SCORE, scores)
    yield from score_lines(scores)
    yield str(folder / SCORE)


def rows_line(rows: Mapping[str, Any], folder: Path) -> str:
    """What a track's rows are, in a line."""
    return (
        f"{rows['track']}: {rows['train']:,} rows to train on, {rows['test']:,} to test on, in {folder / ROWS} "
        f"(sha256 {rows['rows_sha256'][:12]})"
    )


def score_lines(values: Mapping[str, Any]) -> Iterator[str]:
    """What a `score.json` says, a measure each."""
    for told in (values, *values["also"]):
        low, high = told["interval"]
        better = "lower" if told["lower_is_better"] else "higher"
        yield f"{told['measure']:<28}{told['score']:>9.4f}  [{low:.4f}, {high:.4f}]  ({better} is better)"


def check_sense(track: Track, model: Path) -> None:
    """Looks whether a model can be scored on a track at all, before time goes into it.

    Raises:
        FileNotFoundError, ValueError: there is no model, or it lacks the sense.
    """
    from mmllm.checkpoints.folder import read_config

    config = read_config(model)
    if track.sense and config["model"].get(track.sense) is None:
        raise ValueError(
            f"{model} has no {track.sense}, which the track {track.name} needs ({track.about}); train it on the "
            f"track's rows, or choose another track"
        )


def weights_digest(folder: Path) -> str:
    """Of a model's or an aligner's weights: by it a score tells which model it is of, and who judged it."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------ commands
def baseline_command(folder: Path, seed: int, minutes: float, max_steps: int | None) -> list[str]:
    """The baseline entry: `mmllm quickstart` as anybody runs it on rows of their own."""
    rows = folder / ROWS
    command = ["quickstart", "--train", str(rows / "train.jsonl"), "--test", str(rows / "test.jsonl"), "--seed",
               str(seed), "--out", str(folder / "run")]  # fmt: skip
    return [*command, *(["--minutes", f"{minutes:g}"] if max_steps is None else ["--max_steps", str(max_steps)])]


def judge_command(folder: Path, steps: int) -> list[str]:
    """Trains the judge: on what the track trains on, so that it has heard no test sentence; by steps, one thread."""
    return ["data", "align", str(folder / ROWS / "train.jsonl"), "--out", str(folder / "judge.unfinished"), "--steps",
            str(steps), "--seed", str(JUDGE_SEED)]  # fmt: skip


def _train(folder: Path, command: Sequence[str]) -> int:
    """Trains the baseline on two cores, in processes of its own; gives the number of cores that there were."""
    run, now = folder / "run", commit() or "unknown"
    note = folder / _COMMIT
    if run.exists() and note.is_file() and (began := note.read_text(encoding="utf-8").strip()) != now:
        raise ValueError(f"{run} was begun by commit {began}, and this is {now}; a score must be of one: give another "
                         f"--out, or remove {run}")  # fmt: skip
    note.write_text(now + "\n", encoding="utf-8")
    with _cores(NUM_CORES) as cores:
        _call(command, cores, f"the baseline's run failed; mend what it says above, and run this again: {run} goes on")
    return cores


def _judge(folder: Path, command: Sequence[str]) -> Path:
    """Trains the judge, unless it is there; gives its folder."""
    made = folder / "judge"
    if not made.exists():
        _call(command, 1, "the judge could not be trained; mend what it says above, and run this again")
        (folder / "judge.unfinished").replace(made)
    return made / "aligner"


def _call(command: Sequence[str], num_threads: int, failed: str) -> None:
    """Runs a command of `mmllm` as a process that does not outlive this one."""
    processes = Processes()
    with terminated_as_interrupt():
        try:
            code = processes.run(command, num_threads)
        finally:
            processes.end_all()
    if code in (130, -2):
        raise KeyboardInterrupt
    if code:
        raise ValueError(failed)


@contextmanager
def _cores(most: int) -> Iterator[int]:
    """Bounds the cores of the processes that a block starts; gives their number."""
    if not hasattr(os, "sched_setaffinity"):
        yield min(most, num_cores())  # macOS has no such bound: quickstart's ranks are the bound there
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:most])
    try:
        yield min(most, len(before))
    finally:
        os.sched_setaffinity(0, before)


# -------------------------------------------------------------------------------------------------------------- values
def _scores(track: Track, result: TaskResult) -> dict[str, Any]:
    """The measure that ranks, and those beside it."""
    told = [
        {
            "measure": f"{track.task}.{measure.key}",
            "score": float(result.scores[measure.key]),
            "interval": list(result.scores[f"{measure.key}_ci"]),
            "lower_is_better": measure.lower_is_better,
        }
        for measure in track.measures
    ]
    return {"track": track.name, **told[0], "also": told[1:]}


def _check_options(
    track: Track, model: str | None, minutes: float | None, judge: str | None, max_steps: int | None
) -> None:
    if judge is not None and not track.is_judged:
        raise ValueError(f"--judge is given, but the track {track.name} has no judge; leave it out")
    if model is not None and max_steps is not None:
        raise ValueError("--max_steps is of the baseline's training, but --model is given; leave one out")
    if minutes is not None and not minutes > 0:
        raise ValueError(f"--minutes is {minutes}; give a positive number")


def _check_earlier(folder: Path, track: Track, seed: int | None, model: str | None) -> None:
    """A folder holds one score: another's is not written over."""
    file = folder / SCORE
    if not file.is_file():
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    is_same = before["seed"] == seed and before["is_baseline"] == (model is None)
    if model is not None and is_same:
        is_same = before["model_sha256"] == weights_digest(Path(model))
    if not is_same:
        what = "the baseline" if before["is_baseline"] else "another model"
        raise ValueError(
            f"{file} holds the score of {what} with the seed {before['seed']}; give another --out, or remove it"
        )


def _write(path: Path, values: Mapping[str, Any]) -> None:
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)
