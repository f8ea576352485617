"""One run of a study: its trainings and commands, then its scores. A function of an item, so that any executor runs it.

A run is a folder. `result.json` in it says that it is done; a run that was ended begins anew, or, if its model was
there already, with its scores.
"""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mmllm.checkout import commit
from mmllm.quickstart.plan import write_yaml
from mmllm.quickstart.processes import Processes
from mmllm.studies.commands import RunFailed, call, measured
from mmllm.studies.energy import EnergyMeter
from mmllm.studies.lengths import Length, length_of, write_training
from mmllm.studies.machine import machine
from mmllm.studies.measures import Measure
from mmllm.studies.settings import Base, filled
from mmllm.studies.shared import Cost, bring, key_of, shared_keys
from mmllm.studies.study import MODEL, Arm, Step, Study, study_of

RESULT = "result.json"
_TRAINED = "trained.json"
"""In a run's folder: that its steps are done, and what they took."""


def make_runner(settings: dict[str, Any]) -> Callable[[Sequence[Any], str], dict[str, Any]]:
    """What an executor's task calls with each item: one arm as JSON.

    Args:
        settings: of the study: `study` (its YAML's values), `data`, `out`, `threads`, `meters`.
    """
    study, data, out = study_of(settings["study"]), Path(settings["data"]), Path(settings["out"])

    def run(item: Sequence[Any], _key: str) -> dict[str, Any]:
        return Runner(study, data, out, settings["threads"], settings["meters"]).run(Arm(**item[0]))

    return run


class Runner:
    """Runs arms of one study.

    Args:
        study: whose.
        data: the folder that all runs read.
        out: the study's folder.
        num_threads: of each process.
        meters: measure joules too, of the whole machine: only where one run has it alone.
    """

    def __init__(self, study: Study, data: Path, out: Path, num_threads: int = 1, meters: bool = False) -> None:
        self.study, self.out, self.num_threads, self.meters = study, out, num_threads, meters
        self.base = Base.read(study, data)
        self.places = {"data": str(data)}
        self._processes, self._is_stopped = Processes(), False

    def stop(self) -> None:
        """Ends what runs, from another thread; what waits for another run's steps begins nothing then."""
        self._is_stopped = True
        self._processes.end_all()

    def folder(self, arm: Arm) -> Path:
        """Where an arm's run lies."""
        return self.out / "runs" / arm.name

    def run(self, arm: Arm) -> dict[str, Any]:
        """Trains and scores one arm, unless that is done; gives what `result.json` holds.

        Raises:
            RunFailed: a command of it failed.
        """
        folder = self.folder(arm)
        result = folder / RESULT
        if result.is_file():
            return json.loads(result.read_text(encoding="utf-8"))
        try:
            cost, minutes_here = self._trained(arm, folder)
            scores = self._scores(arm, folder)
        finally:
            self._processes.end_all()
        values = {
            **asdict(arm),
            **asdict(cost.length),
            "documents": cost.documents,
            "minutes": cost.minutes,
            "minutes_here": minutes_here,
            "joules": cost.joules,
            "scores": scores,
            "commit": commit(),
            "machine": machine(),
        }
        _write(result, values)
        for name in {step.out for step in self.study.level(arm).parts if step.fit is not None} - {MODEL}:
            shutil.rmtree(folder / name, ignore_errors=True)  # a model that another was made of
        return values

    def _trained(self, arm: Arm, folder: Path) -> tuple[Cost, float]:
        """Runs an arm's steps, unless that is done; gives what they took, and the minutes without what others ran."""
        key, kept = f"{key_of(self.base, arm)} {commit()}", folder / _TRAINED
        if kept.is_file():
            told = json.loads(kept.read_text(encoding="utf-8"))
            if told["key"] == key:
                return Cost.of(told["cost"]), told["minutes_here"]
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        parts, keys = self.study.level(arm).parts, shared_keys(self.base)[arm]

        def run(steps: Sequence[Step], place: Path) -> Cost:
            return self._run_steps(arm, steps, place)

        begun = time.monotonic()
        cost = bring(keys, parts[: len(keys)], self.out, folder, run) + run(parts[len(keys) :], folder)
        minutes_here = (time.monotonic() - begun) / 60
        _write(kept, {"key": key, "cost": asdict(cost), "minutes_here": minutes_here})
        return cost, minutes_here

    def _run_steps(self, arm: Arm, steps: Sequence[Step], folder: Path) -> Cost:
        """Runs steps one after the other; gives what they took."""
        begun, cost = time.monotonic(), Cost()
        with EnergyMeter(self.meters) as meter:
            for step in steps:
                length, documents = self._step(arm, step, folder)
                cost = cost + Cost(length, documents)
        return replace(cost, minutes=(time.monotonic() - begun) / 60, joules=meter.joules)

    def _step(self, arm: Arm, step: Step, folder: Path) -> tuple[Length, int]:
        """One training or command; gives how long the training was, and the number of documents that it had."""
        if step.command is not None:
            places = self._places(arm, folder)
            for name, values in step.files.items():
                write_yaml(folder / name, filled(values, places), "Written by `mmllm study run`.")
            self._call(shlex.split(filled(step.command, places)), folder, arm)
            return Length(), 0
        settings = self.base.settings(arm, step, folder)
        training = write_training(self.study, settings, step.share, folder, step.out)
        self._call(["fit", "-c", str(training.config)], folder, arm)
        metrics = folder / f"{step.out}.logs" / "metrics.csv"
        steps = _steps_done(metrics)
        if training.seconds is None:
            if metrics.is_file() and steps != training.length.steps:
                raise RunFailed(
                    f"run {arm.name}: its training ended after {steps:,} of {training.length.steps:,} steps, so that "
                    f"it has another budget; take out what ends it, such as a callback"
                )
            return training.length, training.documents
        return length_of(training.config, steps), training.documents

    def _scores(self, arm: Arm, folder: Path) -> dict[str, Any]:
        """All measures; those that differ in their key alone are of one evaluation."""
        evaluated: dict[tuple[Any, ...], Path] = {}
        scores = {}
        for each in self.study.measures:
            measure = each.of(self.study.level(arm).measures)
            asked = (measure.task, measure.manifest, measure.limit, measure.options, measure.shots, measure.anchor)
            if asked not in evaluated:
                evaluated[asked] = self._evaluated(arm, measure, folder)
            scores[measure.name] = _score(measure, evaluated[asked])
        return scores

    def _evaluated(self, arm: Arm, measure: Measure, folder: Path) -> Path:
        """What `mmllm eval` wrote for a measure, as the arm's level asks it."""
        path = folder / f"{measure.name}.json"
        command = measure.command(str(folder / MODEL), str(path), self.study.level(arm).options)
        self._call(filled(command, self._places(arm, folder)), folder, arm)
        return path

    def _places(self, arm: Arm, folder: Path) -> dict[str, str]:
        """What stands for `{data}`, `{run}` and `{seed}`."""
        return {**self.places, "run": str(folder), "seed": str(arm.seed)}

    def _call(self, command: Sequence[str], folder: Path, arm: Arm) -> None:
        if self._is_stopped:
            raise KeyboardInterrupt
        call(self._processes, command, folder, arm.name, self.num_threads)


def _write(path: Path, values: dict[str, Any]) -> None:
    """Whole, or not at all."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _score(measure: Measure, path: Path) -> dict[str, Any]:
    """A measure, its interval over rows, and each row's share of it where the score is their mean."""
    score, result = measured(measure, path)
    rows = {p.id: (float(p.correct), p.score) for p in result.predictions if p.group == "test"}
    return {"score": score, "interval": result.scores.get(f"{measure.key}_ci"), "rows": rows}


def _steps_done(metrics: Path) -> int:
    """The last step that a training logged."""
    if not metrics.is_file():
        return 0
    with metrics.open(newline="", encoding="utf-8") as file:
        return max((int(row["step"]) for row in csv.DictReader(file) if row.get("step")), default=0)
