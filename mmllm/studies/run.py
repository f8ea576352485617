"""`mmllm study run`: what a study costs is said first; then its runs, here or elsewhere, until they are done.

`--minutes` bounds the whole: arms are run seed by seed, so that one seed of every arm comes first; what does not fit is
left out of the report, and named.
"""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmllm import paths
from mmllm.data.executors.stages import Executor, Stage
from mmllm.data.executors.task import Work
from mmllm.quickstart.processes import Processes, terminated_as_interrupt
from mmllm.studies.at_once import run_at_once
from mmllm.studies.lengths import Length, check_recipe, check_training, write_training
from mmllm.studies.runs import RESULT, Runner
from mmllm.studies.settings import Base, filled
from mmllm.studies.shared import forget, shared_keys, would_wait
from mmllm.studies.study import Arm, Data, Measure, Study, load_study, study_of

STUDY = "study.json"
"""In a study's folder: what it was begun with."""
RUNNER = "mmllm.studies.runs:make_runner"
MARGIN = 1.15
"""A run is begun if the time left is so many times that of the longest run so far."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Item:
    """An arm, as an executor's item has it."""

    arm: Arm

    def to_json(self) -> Any:
        """Its fields."""
        return vars(self.arm)


def run_study(
    study: str,
    out: str,
    minutes: float | None = None,
    executor: Executor | None = None,
    num_threads: int = 1,
    data: str | None = None,
) -> Iterator[str]:
    """Runs what of a study is not done yet; gives lines to print while it goes on.

    Args:
        study: its YAML, or the name of a shipped one.
        out: the study's folder.
        minutes: bound of the whole study, making its data apart; only where runs are here.
        executor: where runs are; None: here, one at a time.
        num_threads: of each run's processes.
        data: a folder that is there, such as a quickstart's, in the place of the study's own.

    Raises:
        ValueError: the study or an arm of it can't be; said before anything runs.
        RunFailed: a command of a run failed.
    """
    executor = executor or Executor()
    if minutes is not None and (minutes <= 0 or not executor.is_here):
        raise ValueError(f"--minutes is {minutes}; it must be positive, and bounds runs on this machine alone")
    plan, folder = _begun(study, Path(out), data)
    yield f"{plan.title}: {plan.question}"
    yield f"expected: {plan.expected}"
    place = Path(plan.data.folder)
    yield from make_data(plan.data, "study")
    yield from costs(plan, place, folder, max(1, executor.workers))
    arms = [arm for arm in plan.arms() if not (folder / "runs" / arm.name / RESULT).is_file()]
    if executor.is_here:
        yield from _run_here(plan, place, folder, arms, max(1, executor.workers), num_threads, minutes)
    else:
        yield from _run_elsewhere(plan, place, folder, arms, executor, num_threads)


def plan_study(study: str, out: str, num_at_once: int = 1, data: str | None = None) -> Iterator[str]:
    """Says what a study costs, and checks every arm; its data must be there. See `run_study`.

    Raises:
        FileNotFoundError: it isn't.
        ValueError: the study or an arm of it can't be.
    """
    plan, folder = _begun(study, Path(out), data)
    place = Path(plan.data.folder)
    if not place.exists():
        raise FileNotFoundError(f"{place}: the study's data isn't there; a run makes it, or give --data DIR")
    yield from costs(plan, place, folder, num_at_once)


def _begun(study: str, folder: Path, data: str | None = None) -> tuple[Study, Path]:
    """The study, which must be the one that the folder was begun with."""
    path = paths.find_config(study)
    load_study(path)  # names the file where something is wrong
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if data is not None:
        values["data"] = {"folder": data}
    plan = study_of(values)
    values = json.loads(json.dumps(values))  # as it is kept: keys are texts
    kept = folder / STUDY
    if kept.is_file() and any(folder.glob(f"runs/*/{RESULT}")):
        before = json.loads(kept.read_text(encoding="utf-8"))
        # More seeds, or more levels, only add runs.
        (base, now), (levels, more) = ([of(each) for each in (before, values)] for of in (_base_of, _levels_of))
        differ = sorted(key for key in base.keys() | now.keys() if base.get(key) != now.get(key))
        others = sorted(level for level in levels.keys() & more.keys() if levels[level] != more[level])
        for what, changed in (("base", differ), ("levels", others)):
            if changed:
                raise ValueError(
                    f"{folder} holds runs of this study with another {what} ({', '.join(changed)}); runs of both can't "
                    f"be compared: give another folder, or remove it"
                )
    folder.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return plan, folder


def _base_of(values: dict[str, Any]) -> dict[str, Any]:
    """All that every run depends on."""
    told = ("title", "question", "expected", "seeds", "factors")
    return {key: value for key, value in values.items() if key not in told}


def _levels_of(values: dict[str, Any]) -> dict[str, Any]:
    """Each level but for its shares, which only add runs."""
    return {
        f"{name}.{level}": {key: value for key, value in (setting or {}).items() if key != "shares"}
        for name, factor in values["factors"].items()
        for level, setting in factor["levels"].items()
    }


def make_data(wanted: Data, what: str) -> Iterator[str]:
    """Runs the commands that make the data, where it isn't there or was not made to its end; gives lines to print.

    Args:
        wanted: the data.
        what: it is of: "study".

    Raises:
        FileNotFoundError: there is none, and no command makes it.
        ValueError: a command failed.
    """
    yield from run_once(Path(wanted.folder), wanted.commands, {"data": wanted.folder}, what)


def run_once(made: Path, commands: Sequence[str], places: Mapping[str, str], what: str) -> Iterator[str]:
    """Runs commands that make a folder, where it isn't there or was not made to its end; gives lines to print.

    Args:
        made: the folder.
        commands: of `mmllm`.
        places: what stands for `{name}` in them.
        what: it is of: "study".

    Raises:
        FileNotFoundError: there is none, and no command makes it.
        ValueError: a command failed.
    """
    unfinished = made.with_name(f"{made.name}.unfinished")
    if made.exists() and not unfinished.exists():
        return
    if not commands:
        raise FileNotFoundError(f"{made}: no such data, and the {what} has no commands that make it")
    made.parent.mkdir(parents=True, exist_ok=True)
    unfinished.touch()
    processes = Processes()
    with terminated_as_interrupt():
        try:
            for command in commands:
                line = filled(command, places)
                yield f"$ mmllm {line}"
                code = processes.run(shlex.split(line), 1)
                if code:
                    raise ValueError(f"`mmllm {line}` failed; mend what it says above, and run the {what} again")
        finally:
            processes.end_all()
    unfinished.unlink()


# --------------------------------------------------------------------------------------------------------------- costs
def costs(study: Study, data: Path, folder: Path, num_at_once: int) -> Iterator[str]:
    """What each arm will train on, and how long it was so far; every config and recipe is checked.

    Raises:
        ValueError: a level names an unknown key, or the arms can't have one budget.
    """
    levels = [level for factor in study.factors.values() for level in factor.levels.values()]
    check_shots([*study.measures, *(each.of(level.measures) for each in study.measures for level in levels)], data)
    base, budget = Base.read(study, data), study.budget
    arms = [arm for arm in study.arms() if arm.seed == study.seeds[0]]
    trial = folder / "checked"
    for arm in arms:
        known, length, is_made = True, Length(), False
        for step in study.level(arm).parts:
            if step.fit is None:
                is_made = True  # perhaps what the next training reads
                continue
            settings = base.settings(arm, step, folder / "runs" / arm.name)
            starts = settings.config.get("model", {}).get("init_args", {}).get("init_from")
            try:
                if budget.kind != "seconds":
                    check_recipe(settings)
                if is_made or (starts and not Path(starts).exists()):
                    known = False  # made by a step before this one
                    check_training(settings, budget.kind, trial / arm.name, step.out)
                else:
                    length = length + write_training(study, settings, step.share, trial / arm.name, step.out).length
            except ValueError as error:
                raise ValueError(f"factors.{arm.factor}.levels.{arm.level}: {error}") from error
        told = f"{budget.amount:,.4g} {budget.kind}"
        if known and budget.kind != "seconds":
            counted = (f"{value:,} {name}" for name, value in vars(length).items() if name != "flops")
            told = f"{', '.join(counted)}, {length.flops:.3g} flops"
        elif not known:
            told += ", counted when what it starts from is there"
        share = "" if arm.share == 1 else f" with {arm.share:.0%} of the data"
        yield f"  {arm.factor}: {arm.level}{share}: {told}"
    all_arms = study.arms()
    done = _minutes_done(folder, all_arms)
    left = len(all_arms) - len(done)
    line = f"{len(all_arms)} runs, {len(done)} done"
    if budget.kind == "seconds":
        line += f"; the rest train for {left * budget.amount / 60 / num_at_once:,.0f} minutes, scoring apart"
    elif done:
        line += f"; the rest take about {left * sum(done) / len(done) / num_at_once:,.0f} minutes"
    elif left:
        line += "; how long they take is told after the first"
    if len(study.seeds) < 3:
        line += f"; {len(study.seeds)} seed{'s' * (len(study.seeds) > 1)}: nothing can be claimed of so few"
    yield line


def check_shots(measures: Sequence[Measure], data: Path) -> None:
    """Refuses shots of a manifest that isn't there, which would be found out after the first training.

    One in a run's folder is made by the run's own steps.

    Raises:
        FileNotFoundError: there is one; the message names the measure.
    """
    for measure in measures:
        if measure.shots is not None and "{run}" not in measure.shots.manifest:
            path = Path(filled(measure.shots.manifest, {"data": str(data)}))
            if not path.exists():
                raise FileNotFoundError(f"measure {measure.name}: no manifest {path} to draw shots from; mend its path")


def _minutes_done(folder: Path, arms: Sequence[Arm]) -> list[float]:
    """What runs took themselves, without steps that another had run for them."""
    results = [folder / "runs" / arm.name / RESULT for arm in arms]
    done = [json.loads(path.read_text(encoding="utf-8")) for path in results if path.is_file()]
    return [each.get("minutes_here", each["minutes"]) for each in done]


# ---------------------------------------------------------------------------------------------------------------- runs
def _run_here(
    study: Study,
    data: Path,
    folder: Path,
    arms: Sequence[Arm],
    num_at_once: int,
    num_threads: int,
    minutes: float | None,
) -> Iterator[str]:
    """So many at once; with a bound, none that would probably pass it, and in their order.

    Without one, an arm whose first steps another is at lets others begin before it.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    before = max(_minutes_done(folder, study.arms()), default=0.0)

    def may_begin(longest: float) -> bool:
        return deadline is None or time.monotonic() + MARGIN * 60 * max(before, longest) <= deadline

    def make() -> Runner:
        return Runner(study, data, folder, num_threads, meters=num_at_once == 1)

    keys = shared_keys(Base.read(study, data)) if minutes is None else {}

    def must_wait(arm: Arm, running: Sequence[Arm]) -> bool:
        return minutes is None and would_wait(arm, running, keys, folder)

    left_out = []
    for arm, result in run_at_once(arms, make, num_at_once, may_begin, must_wait):
        if result is None:
            left_out.append(arm.name)
        else:
            yield _told(study, arm, result)
    if left_out:
        yield f"time is over: {len(left_out)} runs are left out ({', '.join(left_out)})"
    else:
        forget(folder)


def _told(study: Study, arm: Arm, result: dict[str, Any]) -> str:
    scores = ", ".join(f"{measure.name} {result['scores'][measure.name]['score']:.4f}" for measure in study.measures)
    return f"  {arm.name}: {scores} ({result['steps']:,} steps, {result['minutes']:.1f} min)"


def _run_elsewhere(
    study: Study, data: Path, folder: Path, arms: Sequence[Arm], executor: Executor, num_threads: int
) -> Iterator[str]:
    """As tasks of datatrove's executors, Slurm's jobs or Ray's workers; see `mmllm.data.executors`."""
    values = json.loads((folder / STUDY).read_text(encoding="utf-8"))
    settings = {"study": values, "data": str(data.absolute()), "out": str(folder.absolute()),
                "threads": num_threads, "meters": False}  # fmt: skip
    executor.claim(folder)
    stage = Stage("study", executor, settings)
    items = [[_Item(arm)] for arm in arms]
    keys = [stage.key(item, []) for item in items]
    for arm, result in zip(arms, stage.run(Work(RUNNER, settings), items, keys, [1] * len(items)), strict=True):
        yield _told(study, arm, result)
    forget(folder)


def study_in(folder: Path) -> Study:
    """The study that a folder was begun with.

    Raises:
        FileNotFoundError: the folder is no study's.
    """
    kept = folder / STUDY
    if not kept.is_file():
        raise FileNotFoundError(f"{folder}: no study's folder, {STUDY} is missing; `mmllm study run` makes one")
    return study_of(json.loads(kept.read_text(encoding="utf-8")))
