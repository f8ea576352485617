"""`mmllm study run`: what a study costs is said first; then its runs, here or elsewhere, until they are done.

`--minutes` bounds the whole: arms are run seed by seed, so that one seed of every arm comes first; what does not fit is
left out of the report, and named.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mmllm import paths
from mmllm.data.executors.stages import Executor, Stage
from mmllm.data.executors.task import Work
from mmllm.parsing import read_yaml
from mmllm.quickstart.processes import Processes, terminated_as_interrupt
from mmllm.studies.at_once import run_at_once
from mmllm.studies.lengths import Length, check_recipe, check_training, write_training
from mmllm.studies.runs import RESULT, Runner
from mmllm.studies.settings import Base, filled
from mmllm.studies.shared import forget, shared_keys, would_wait
from mmllm.studies.study import Arm, Data, Measure, Step, Study, load_study, study_of

STUDY = "study.json"
"""In a study's folder: what it was begun with."""
RUNNER = "mmllm.studies.runs:make_runner"
MARGIN = 1.15
"""A run is begun if the time left is so many times that of the longest run so far."""
CheckCommand = Callable[[Sequence[str]], None]
"""Raises ValueError where a command of `mmllm` has an unknown word or option."""
_PLACE = re.compile(r"\{[a-z_]+\}")
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
    check: CheckCommand | None = None,
) -> Iterator[str]:
    """Runs what of a study is not done yet; gives lines to print while it goes on.

    Args:
        study: its YAML, or the name of a shipped one.
        out: the study's folder.
        minutes: bound of the whole study, making its data apart; only where runs are here.
        executor: where runs are; None: here, one at a time.
        num_threads: of each run's processes.
        data: a folder that is there, such as a quickstart's, in the place of the study's own.
        check: of the commands that runs have.

    Raises:
        ValueError: the study or an arm of it can't be, or another process is at the folder; said before anything runs.
        RunFailed: commands of runs failed; all other runs are done then.
    """
    executor = executor or Executor()
    if minutes is not None and not (0 < minutes < math.inf and executor.is_here):
        raise ValueError(f"--minutes is {minutes}; it must be positive, and bounds runs on this machine alone")
    plan, folder, values = _begun(study, Path(out), data)
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder, "study run"):
        (folder / STUDY).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        yield f"{plan.title}: {plan.question}"
        yield f"expected: {plan.expected}"
        place = Path(plan.data.folder)
        yield from make_data(plan.data, "study")
        yield from costs(plan, place, folder, max(1, executor.workers), check)
        arms = [arm for arm in plan.arms() if not (folder / "runs" / arm.name / RESULT).is_file()]
        if executor.is_here:
            yield from _run_here(plan, place, folder, arms, max(1, executor.workers), num_threads, minutes)
        else:
            yield from _run_elsewhere(plan, place, folder, arms, executor, num_threads)


def plan_study(
    study: str, out: str, num_at_once: int = 1, data: str | None = None, check: CheckCommand | None = None
) -> Iterator[str]:
    """Says what a study costs, and checks every arm; its data must be there. Nothing is left. See `run_study`.

    Raises:
        FileNotFoundError: it isn't.
        ValueError: the study or an arm of it can't be.
    """
    plan, folder, _ = _begun(study, Path(out), data)
    place = Path(plan.data.folder)
    if not place.exists():
        raise FileNotFoundError(f"{place}: the study's data isn't there; a run makes it, or give --data DIR")
    yield from costs(plan, place, folder, num_at_once, check)


@contextmanager
def alone(folder: Path, command: str) -> Iterator[None]:
    """Refuses a folder that another process is at: both would run the same arms into the same folders.

    Args:
        folder: of a study or a sweep.
        command: that is at it.

    Raises:
        ValueError: another process is.
    """
    with (folder / ".lock").open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder}: another `mmllm {command}` is at it; wait for its end") from error
        yield


def _begun(study: str, folder: Path, data: str | None = None) -> tuple[Study, Path, dict[str, Any]]:
    """The study, which must be the one that the folder was begun with, and its values as they are kept."""
    path = paths.find_config(study)
    load_study(path)  # names the file where something is wrong
    values = read_yaml(path)
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
        seeds = set(study_of(before).seeds) - set(plan.seeds)
        gone = [*sorted(levels.keys() - more.keys()), *(f"seed {seed}" for seed in sorted(seeds))]
        if gone:
            raise ValueError(
                f"{folder} holds runs of a study that has {', '.join(gone)} too, which its report would lose: give "
                f"another folder"
            )
    return plan, folder, values


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
def costs(study: Study, data: Path, folder: Path, num_at_once: int, check: CheckCommand | None = None) -> Iterator[str]:
    """What each arm will train on, and how long it was so far; every config, recipe and command is checked.

    Raises:
        FileNotFoundError: a measure's manifest isn't there, or what a training starts from.
        ValueError: a level names an unknown key, or the arms can't have one budget.
    """
    levels = [level for factor in study.factors.values() for level in factor.levels.values()]
    measures = [*study.measures, *(each.of(level.measures) for each in study.measures for level in levels)]
    check_manifests(measures, data, study.seeds)
    base, budget = Base.read(study, data), study.budget
    check_curve_sources(base)
    arms = [arm for arm in study.arms() if arm.seed == study.seeds[0]]
    with TemporaryDirectory() as trial:
        for arm in arms:
            where = f"factors.{arm.factor}.levels.{arm.level}"
            try:
                length = _length_of_arm(base, arm, folder / "runs" / arm.name, Path(trial) / arm.name, check)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{where}: {error}") from error
            yield _told_length(study, arm, length)
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


def _told_length(study: Study, arm: Arm, length: Length | None) -> str:
    told = f"{study.budget.amount:,.4g} {study.budget.kind}"
    if length is None:
        told += ", counted when what it starts from is there"
    elif study.budget.kind != "seconds":
        counted = (f"{value:,} {name}" for name, value in vars(length).items() if name != "flops")
        told = f"{', '.join(counted)}, {length.flops:.3g} flops"
    share = "" if arm.share == 1 else f" with {arm.share:.0%} of the data"
    return f"  {arm.factor}: {arm.level}{share}: {told}"


def _length_of_arm(base: Base, arm: Arm, run: Path, trial: Path, check: CheckCommand | None) -> Length | None:
    """Checks an arm's steps; gives how long its trainings are, None where one reads what a step before it makes."""
    budget, is_known, length = base.study.budget, True, Length()
    is_made, models = False, set[str]()
    for step in base.study.level(arm).parts:
        if step.fit is None:
            _check_command(step, {"data": str(base.data), "run": str(run), "seed": str(arm.seed)}, check)
            is_made = True  # perhaps what the next training reads
            continue
        settings = base.settings(arm, step, run)
        starts = settings.config.get("model", {}).get("init_args", {}).get("init_from")
        if starts and not is_made and not Path(starts).exists() and Path(starts) not in {run / one for one in models}:
            raise FileNotFoundError(f"model.init_args.init_from is {starts}, which isn't there and no step makes")
        if budget.kind != "seconds":
            check_recipe(settings)
        if is_made or (starts and not Path(starts).exists()):
            is_known = False
            check_training(settings, budget.kind, trial, step.out)
        else:
            length = length + write_training(base.study, settings, step.share, trial, step.out).length
        models.add(step.out)
    if check is not None:
        level = base.study.level(arm)
        for measure in base.study.measures:
            _check(check, measure.of(level.measures).command("MODEL", "OUT", level.options), f"measure {measure.name}")
    return length if is_known else None


def _check_command(step: Step, places: Mapping[str, str], check: CheckCommand | None) -> None:
    """Raises ValueError where a step's command names a place that there isn't, or what `mmllm` doesn't know."""
    assert step.command is not None
    if unknown := sorted(set(_PLACE.findall(step.command)) - {f"{{{name}}}" for name in places}):
        known = ", ".join(f"{{{name}}}" for name in places)
        raise ValueError(f"the step `{step.command}` has {unknown[0]}; a command may have {known}")
    if check is not None:
        _check(check, shlex.split(filled(step.command, places)), f"the step `{step.command}`")


def _check(check: CheckCommand, command: Sequence[str], what: str) -> None:
    """Raises ValueError that says what a command is of."""
    try:
        check(command)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def check_curve_sources(base: Base) -> None:
    """Refuses names that no training's recipe has: their share of the data would be all of it.

    Raises:
        ValueError: there is one.
    """
    wanted, found = set(base.study.curve_sources), set[str]()
    for arm in base.study.arms():
        steps = [step for step in base.study.level(arm).parts if step.fit is not None]
        recipes = [base.settings(arm, step, Path("/run")).recipe for step in steps]
        names = {source["name"] for recipe in recipes for source in recipe["sources"]}
        found |= names
        if arm.share < 1 and wanted and not wanted & names:
            raise ValueError(
                f"factors.{arm.factor}.levels.{arm.level} has shares, and none of the curve_sources "
                f"{', '.join(sorted(wanted))}, of which they are"
            )
    if unknown := sorted(wanted - found):
        raise ValueError(f"curve_sources has {unknown[0]!r}; the recipes' sources are {', '.join(sorted(found))}")


def check_manifests(measures: Sequence[Measure], data: Path, seeds: Sequence[int]) -> None:
    """Refuses manifests that aren't there, of rows or shots, which would be found out after the first training.

    One in a run's folder is made by the run's own steps.

    Raises:
        FileNotFoundError: there is one; the message names the measure.
    """
    for measure in measures:
        shots = "" if measure.shots is None else measure.shots.manifest
        for manifest, use in ((measure.manifest, "score"), (shots, "draw shots from")):
            for seed in seeds if manifest and "{run}" not in manifest else ():
                path = Path(filled(manifest, {"data": str(data), "seed": str(seed)}))
                if not path.exists():
                    raise FileNotFoundError(f"measure {measure.name}: no manifest {path} to {use}; mend its path")


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

    # Absolute: a thread that reads a config changes the working directory of all, and their processes begin in it.
    data, folder = data.absolute(), folder.absolute()

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
