"""A study: one base, what is varied about it, and a budget that all its trainings have alike.

A factor's levels are changes of the base's config, of its recipe, or the commands that lead to its model; any key of
either may be named. Arms are one level each, the base being every factor's baseline; a level may be given less of the
data as well, for a curve.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmllm.parsing import parse, read_yaml
from mmllm.studies.measures import Measure, Prompt

Kind = Literal["seconds", "flops", "samples"]
MODEL = "model"
"""Folder, in that of a run, of the model that is scored."""
_OF_BUDGET = ("trainer.max_steps", "trainer.max_epochs", "trainer.max_time", "model.init_args.max_seconds")
_TRAINS = (
    "fit", "quickstart", "draft", "incremental", "posttrain-tour", "study run", "study score", "scaling sweep",
)  # fmt: skip
"""Commands that train."""
_OF_RUN = ("seed_everything", "seed", "model.init_args.out", "data.init_args.recipe", "trainer.logger")
"""Dotted keys that each run sets itself, whatever a level says."""


@dataclass(frozen=True)
class Budget:
    """What every run has as much of as every other; exactly one is given.

    Attributes:
        seconds: of training.
        flops: of training, counted from shapes: products of the model that a token passes.
        samples: documents that are trained on, repeated ones each time.
    """

    seconds: float | None = None
    flops: float | None = None
    samples: int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                f"budget has {' and '.join(given) or 'nothing'}; give exactly one of seconds, flops and samples, which "
                f"all arms then have alike"
            )
        for name, value in given.items():
            if not 0 < value < math.inf:
                raise ValueError(f"budget.{name} is {value}; it must be positive")

    @property
    def kind(self) -> Kind:
        """Which of them is given."""
        return "seconds" if self.seconds is not None else "flops" if self.flops is not None else "samples"

    @property
    def amount(self) -> float:
        """How much of it."""
        return float(self.seconds or self.flops or self.samples or 0)


@dataclass(frozen=True)
class Step:
    """A part of a run.

    Attributes:
        fit: keys of the config for this training alone; None: this is no training.
        recipe: keys of the recipe, likewise.
        command: of `mmllm`; `{run}` is the run's folder, `{data}` the study's data, `{seed}` the seed.
        files: of a command, what is written before it as YAML: names in the run's folder to values, in which `{run}`,
            `{data}` and `{seed}` are replaced too.
        out: folder in the run's for what a training makes.
        share: of the budget.
    """

    fit: dict[str, Any] | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    command: str | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    out: str = MODEL
    share: float = 1.0

    def __post_init__(self) -> None:
        if (self.fit is None) == (self.command is None):
            raise ValueError("a step has either `fit` (keys of a training's config, perhaps none) or `command`")
        if not 0 < self.share <= 1:
            raise ValueError(f"a step's share is {self.share}; it is of the budget, above 0 and at most 1")
        if self.files and self.command is None:
            raise ValueError(
                f"a training has the files {', '.join(self.files)}; give them to the command that reads them"
            )
        if self.command is not None and (self.recipe or self.share != 1):
            raise ValueError(f"the step `{self.command}` is no training, and has neither a recipe nor a share")
        words = [word for word in shlex.split(self.command or "") if word != "--debug"]
        if any(words[: len(each.split())] == each.split() for each in _TRAINS):
            raise ValueError(
                f"the step `{self.command}` trains, and would do so outside of the budget; give a training as `fit`, "
                f"or what all runs share to data.commands"
            )
        for name in (self.out, *self.files):
            if not name or Path(name).is_absolute() or ".." in Path(name).parts or Path(name) == Path("."):
                raise ValueError(f"a step writes {name!r}; it must be a name in the run's folder")


@dataclass(frozen=True)
class Level:
    """One setting of a factor.

    Attributes:
        config: dotted keys of the training's config and their values; null takes a key out.
        recipe: likewise of the recipe; a source is named by its name: `sources.caption.weight`.
        steps: what a run consists of; by default one training. In a YAML an item may be a list of steps itself, as an
            anchor of several gives it. Trainings in it have the keys above, and then their own.
        options: more options of `mmllm eval`, of this level's runs.
        measures: shots and an anchor of single measures, by their names, for this level's model.
        shares: of the data that the curve's sources have, which is a share itself where `set_recipe` has one; by
            default all of it. Each makes runs of its own.
    """

    config: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    options: tuple[str, ...] = ()
    measures: dict[str, Prompt] = field(default_factory=dict)
    shares: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        shares = [step.share for step in self.steps if step.fit is not None]
        if shares and abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"the shares of a level's trainings are {shares}; together they must be the budget, 1")
        if self.steps and not shares:
            raise ValueError("a level's steps have no training; a study compares trainings")
        if not self.shares or any(not 0 < share <= 1 for share in self.shares) or 1.0 not in self.shares:
            raise ValueError(f"a level's shares are {list(self.shares)}; they must be in (0, 1], with 1 among them")

    @property
    def parts(self) -> list[Step]:
        """Its steps, or the one that it has unless told."""
        return self.steps or [Step(fit={})]


@dataclass(frozen=True)
class Factor:
    """What is varied.

    Attributes:
        levels: by name.
        baseline: that others are compared with.
    """

    levels: dict[str, Level]
    baseline: str

    def __post_init__(self) -> None:
        if self.baseline not in self.levels:
            raise ValueError(f"a factor's baseline is {self.baseline!r}; its levels are {', '.join(self.levels)}")
        if len(self.levels) < 2:
            raise ValueError(f"a factor has the one level {self.baseline!r}; give another to compare it with")


@dataclass(frozen=True)
class Data:
    """What all runs read.

    Attributes:
        folder: of the data, for studies that share it; relative to where the command is run.
        commands: of `mmllm`, which make it where the folder isn't there; `{data}` is the folder.
    """

    folder: str
    commands: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """The whole study.

    Attributes:
        title: of reports.
        question: what is asked.
        expected: what is published of it, and where: written before anything is measured.
        data: what all runs read.
        config: of the base: a config of `mmllm fit`; `{data}` and `{run}` in its values are replaced.
        recipe: of the base.
        measures: the first is what factors are judged by.
        budget: of each run.
        factors: by name.
        set: dotted keys of the base's config, for all arms.
        set_recipe: dotted keys of its recipe, for all arms.
        seeds: of weights and order.
        curve_sources: of the recipe, whose documents are fewer where a level has shares; none: all sources.
    """

    title: str
    question: str
    expected: str
    data: Data
    config: str
    recipe: str
    measures: list[Measure]
    budget: Budget
    factors: dict[str, Factor]
    set: dict[str, Any] = field(default_factory=dict)
    set_recipe: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    curve_sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.measures:
            raise ValueError("measures is empty; give what arms are judged by")
        if not self.factors:
            raise ValueError("factors is empty; give what is varied")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds is {list(self.seeds)}; give each once, and at least one")
        names = [measure.name for measure in self.measures]
        if len(set(names)) != len(names):
            raise ValueError(f"measures have the names {names}; give each its own")
        self._check_prompts()
        self._check_keys()
        arms = [arm.name for arm in self.arms()]
        twice = next((name for name in arms if arms.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two runs would have the folder {twice}; give factors and levels names that differ more")

    def _check_prompts(self) -> None:
        """Raises ValueError where a level asks in a measure that there isn't, or with what its task has not."""
        measures = {measure.name: measure for measure in self.measures}
        for name, factor in self.factors.items():
            for level, values in factor.levels.items():
                for measure in values.measures:
                    where = f"factors.{name}.levels.{level}.measures"
                    if measure not in measures:
                        raise ValueError(f"{where} has {measure!r}; the study's measures are {', '.join(measures)}")
                    try:
                        measures[measure].of(values.measures)
                    except ValueError as error:
                        raise ValueError(f"{where}: {error}") from error

    def _check_keys(self) -> None:
        """Raises ValueError where a key is given that would be ignored."""
        given = {"set": self.set, "set_recipe": self.set_recipe}
        for name, factor in self.factors.items():
            for level, values in factor.levels.items():
                where = f"factors.{name}.levels.{level}"
                given |= {f"{where}.config": values.config, f"{where}.recipe": values.recipe}
                for number, step in enumerate(values.steps):
                    given |= {f"{where}.steps[{number}].fit": step.fit or {}}
                    given |= {f"{where}.steps[{number}].recipe": step.recipe}
        check_keys(given, "budget")

    def arms(self) -> list[Arm]:
        """All that is run, first one seed of every arm with all its data, then the other seeds, then less data."""
        found = []
        for seed in self.seeds:
            found += [Arm(name, level, seed, 1.0) for name, factor in self.factors.items() for level in factor.levels]
        for seed in self.seeds:
            found += [
                Arm(name, level, seed, share)
                for name, factor in self.factors.items()
                for level, setting in factor.levels.items()
                for share in sorted(set(setting.shares) - {1.0}, reverse=True)
            ]
        return found

    def level(self, arm: Arm) -> Level:
        """That an arm has."""
        return self.factors[arm.factor].levels[arm.level]


@dataclass(frozen=True)
class Arm:
    """One run: a level of a factor, with a seed and a share of the data."""

    factor: str
    level: str
    seed: int
    share: float = 1.0

    @property
    def name(self) -> str:
        """Of its folder."""
        share = "" if self.share == 1 else f"-{self.share:g}"
        return f"{self.factor}-{self.level}{share}-seed{self.seed}".replace("/", "_").replace(" ", "_")


def check_keys(given: Mapping[str, Mapping[str, Any]], bound: str) -> None:
    """Refuses keys that each run sets itself, whatever is given.

    Args:
        given: dotted keys with their values, by where they stand.
        bound: what says how long a run is.

    Raises:
        ValueError: there is such a key; the message names it.
    """
    for where, keys in given.items():
        for key, value in keys.items():
            if value is not None and key in (*_OF_BUDGET, *_OF_RUN):
                why = f"{bound} says how long a run is" if key in _OF_BUDGET else "every run has its own"
                raise ValueError(f"{where} has {key}: {value!r}, but {why}; leave it out")


def load_study(path: str | Path) -> Study:
    """A study from its YAML.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it isn't YAML, or a key is unknown, missing, or has a wrong value.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such study; `mmllm configs ls` lists those that are shipped")
    values = read_yaml(path)
    try:
        return study_of(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def study_of(values: Any) -> Study:
    """A study from plain dicts and lists, checked.

    Raises:
        ValueError: a key is unknown, missing, or has a wrong value; the message names it.
    """
    return parse(Study, _flattened(values), what="the study")


def _flattened(values: Any) -> Any:
    """The values, with the steps of each level in one list: YAML has no way to join lists that anchors name."""
    match values:
        case {"factors": dict(factors)}:
            return {**values, "factors": {name: _flattened(factor) for name, factor in factors.items()}}
        case {"levels": dict(levels)}:
            return {**values, "levels": {name: _flattened(level) for name, level in levels.items()}}
        case {"steps": list(steps)}:
            return {**values, "steps": list(_leaves(steps))}
    return values


def _leaves(steps: list[Any]) -> Iterator[Any]:
    for step in steps:
        if isinstance(step, list):
            yield from _leaves(step)
        else:
            yield step
