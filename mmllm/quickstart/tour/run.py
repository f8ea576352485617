"""`mmllm posttrain-tour`: what can be done with a trained model, stage by stage, each as plain commands.

What a stage has given is kept in `OUT/stages/NAME.json`; run again, the tour goes on with the first that is not there,
and in a stage with the first command whose output is not.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmllm.quickstart.processes import terminated_as_interrupt
from mmllm.quickstart.tour.report import write_report
from mmllm.quickstart.tour.stage import FULL_MINUTES, RunCommand, Stage, Tour

DEFAULT_STAGES = ("sft", "lora", "dpo", "grpo", "trap")
STAGES = (*DEFAULT_STAGES, "speech", "merge", "ppo", "kto", "rm", "incremental")
"""In the order in which they run."""
_NEEDED = ("recipe.yaml", "manifests/test.jsonl", "data/scenes/train.jsonl", "data/speech/train.jsonl")
"""Of the demo's run."""


def posttrain_tour(
    model: Path,
    data: Path,
    out: Path,
    stages: Sequence[str] = DEFAULT_STAGES,
    seed: int = 0,
    minutes: float = FULL_MINUTES,
    media: Path | None = None,
    limit: int | None = None,
    run_command: RunCommand | None = None,
) -> dict[str, Any]:
    """Runs stages that are not done.

    Args:
        model: the folder of a model that sees and hears.
        data: the folder of the run that trained it.
        out: where everything goes.
        stages: which, by name; they run in the order of `STAGES`.
        seed: of questions, order and sampling.
        minutes: of a usual training, to which the others are in proportion.
        media: folder of data sets, for stages that use them.
        limit: rows of each evaluation at most.
        run_command: runs a command line in this process, for tests.

    Returns:
        What report.json holds.

    Raises:
        ValueError: an unknown stage, a model or a run that won't do, or `out` holds a tour with other settings.
        CommandFailed: a command ended with an error.
    """
    unknown = [name for name in stages if name not in STAGES]
    if unknown or not stages:
        said = f"stages names {unknown[0]!r}" if unknown else "stages names none"
        raise ValueError(f"{said}; choose among {', '.join(STAGES)}")
    if not minutes > 0:
        raise ValueError(f"minutes is {minutes}; give a positive number")
    check_model(model)
    check_run(data)
    tour = Tour(model, data, out, seed, minutes, media, run_command, limit)
    _check_settings(tour)
    with terminated_as_interrupt():
        try:
            for name in (name for name in STAGES if name in stages):
                _run_stage(tour, name)
        except KeyboardInterrupt:
            tour.say("stopped; run the same command again to go on")
            raise
        finally:
            tour.processes.end_all()
    report = read_report(out)
    tour.say(f"\nReport: {out / 'report.html'}")
    return report


def _run_stage(tour: Tour, name: str) -> None:
    """Runs a stage unless it is done, and writes the report anew."""
    path = tour.out / "stages" / f"{name}.json"
    if path.is_file():
        tour.say(f"{name}: done before; to do it again, remove {path}")
        return
    tour.title(name)
    begun = time.monotonic()
    before = tour.seconds_of(name)
    try:
        result = _stage(name).run(tour)
    finally:
        seconds = tour.note_seconds(name, before + time.monotonic() - begun)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"seconds": seconds, "result": result}, indent=1) + "\n", encoding="utf-8")
    for line in write_report(tour.out, tour.seed):
        tour.say(line)


def _stage(name: str) -> Stage:
    """A stage by its name; its code is imported when it is run."""
    module = f"mmllm.quickstart.tour.stage_{name}"
    try:
        return importlib.import_module(module).STAGE
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ValueError(f"the stage {name!r} is not in this version of mmllm; leave it out of --stages") from None


def read_report(out: Path) -> dict[str, Any]:
    """report.json of a tour."""
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------- checks
def check_model(folder: Path) -> None:
    """Refuses a folder that is no model, or a model that lacks a sense.

    Raises:
        FileNotFoundError: there is no model folder.
        ValueError: it neither sees nor hears, or lacks one of the two.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no model folder; give the one that `mmllm quickstart` or `mmllm fit` wrote")
    model = json.loads(path.read_text(encoding="utf-8")).get("model", {})
    lacking = [verb for verb, part in (("see", "vision"), ("hear", "audio")) if not model.get(part)]
    if lacking:
        raise ValueError(
            f"{folder} does not {' and does not '.join(lacking)}, and the tour asks about pictures and sounds; give a "
            f"model that does, such as `mmllm quickstart --out runs/demo` makes"
        )


def check_run(folder: Path) -> None:
    """Refuses a folder that isn't the demo's run.

    Raises:
        FileNotFoundError: something of it isn't there.
    """
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}; give the folder of a run of `mmllm quickstart` on its own data"
        )


def _check_settings(tour: Tour) -> None:
    """Notes what the tour is run with.

    Raises:
        ValueError: it was begun with something else.
    """
    settings = {"model": str(tour.model.resolve()), "data": str(tour.data.resolve()), "seed": tour.seed,
                "minutes": tour.minutes, "limit": tour.limit}  # fmt: skip
    before = tour.noted_settings(settings)
    changed = [key for key, value in settings.items() if before.get(key) != value]
    if changed:
        raise ValueError(f"{tour.out} holds a tour with other settings ({', '.join(changed)} differ); give another "
                         f"--out, or remove it")  # fmt: skip
