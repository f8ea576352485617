"""`mmllm incremental PLAN.yaml --out DIR`: tasks learnt one after the other, all of them scored after each.

Each step is a command that can be run alone (`mmllm data build`, `data index`, `fit`, `adapter merge`, `eval`); those
that are done are noted in `DIR/incremental.json`, and a run that was stopped goes on with the first that is not, as one
does whose plan has got more tasks. What is read off the scores: `mmllm.training.posttraining.score_matrix`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from mmllm.checkpoints.card import ModelInfo
from mmllm.checkpoints.folder import write_card
from mmllm.data.plan.recipe import load_recipe
from mmllm.data.shards.find import find_shards
from mmllm.evaluation.results import load_result
from mmllm.training.lightning_cli import one_line
from mmllm.training.posttraining.score_matrix import ScoreMatrix, as_lines, as_page

STATE = "incremental.json"
ADAPTER = "learnt"
"""Name of a task's adapter, before it is merged."""

RunCommand = Callable[[Sequence[str], bool], int]
"""Runs `mmllm COMMAND` and gives its exit code; true: it wants a process of its own."""


class CommandFailed(ValueError):
    """A command ended with an error, which it has printed itself."""


@dataclass(frozen=True)
class Measure:
    """A score of `mmllm eval`.

    Attributes:
        task: of `mmllm eval`.
        manifest: of held-out rows.
        score: its name among the task's scores.
        lower_is_better: it is an error rate; the matrix then has 1 − score.
        limit: at most so many rows.
        options: more options of `mmllm eval`.
    """

    task: str
    manifest: str
    score: str
    lower_is_better: bool = False
    limit: int | None = None
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Replay:
    """What is rehearsed while a task is learnt.

    Attributes:
        recipe: its sources, by their last weights.
        share: of the tokens.
    """

    recipe: str
    share: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"replay.share is {self.share}; it is a share of the tokens, above 0 and below 1")


@dataclass(frozen=True)
class LearntTask:
    """A task to learn.

    Attributes:
        name: in the matrix, and of its files.
        eval: how it is scored.
        rows: a manifest, which is built and indexed; or else
        recipe: a recipe of shards that are there.
        set: keys of the base config by their dotted names, with this task's values.
        minutes: of the training; None: the plan's.
        replay: in the place of the plan's; a share of it may differ from task to task.
    """

    name: str
    eval: Measure
    rows: str | None = None
    recipe: str | None = None
    set: dict[str, Any] = field(default_factory=dict)
    minutes: float | None = None
    replay: Replay | None = None

    def __post_init__(self) -> None:
        if not self.name or not _is_file_name(self.name):
            raise ValueError(f"a task is called {self.name!r}; use letters, digits, - and _ (it names files)")
        if (self.rows is None) == (self.recipe is None):
            raise ValueError(f"task {self.name}: give rows (a manifest), or recipe (of shards that are built)")


def _is_file_name(name: str) -> bool:
    """Whether a name may be a file's."""
    return all(letter.isalnum() or letter in "-_" for letter in name)


@dataclass(frozen=True)
class IncrementalPlan:
    """Tasks in their order.

    Attributes:
        start: the model folder that the first task goes on from.
        base: a fit config, or its file: of each training. `init_from`, `out`, the recipe, and the folders of logs and
            checkpoints are set here.
        tasks: what is learnt, at least one.
        also: scored after each task, and never trained: by name.
        minutes: of each training; None: as the config ends.
        replay: rehearsed in each training; None: nothing is.
        sequence_length: of the recipes that are written; None: that of `replay`'s, or 512.
    """

    start: str
    base: str | dict[str, Any]
    tasks: list[LearntTask]
    also: dict[str, Measure] = field(default_factory=dict)
    minutes: float | None = None
    replay: Replay | None = None
    sequence_length: int | None = None

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks] + list(self.also)
        if not self.tasks:
            raise ValueError("tasks is empty; give at least one")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two tasks are called {twice!r}; give each its own name")
        for task in self.tasks:
            minutes = task.minutes if task.minutes is not None else self.minutes
            if minutes is not None and not minutes > 0:
                raise ValueError(f"minutes is {minutes}; give a positive number, or leave it out")

    @property
    def measures(self) -> dict[str, Measure]:
        """How the matrix's columns are scored, in their order."""
        return {**{task.name: task.eval for task in self.tasks}, **self.also}


def load_plan(path: str | Path) -> IncrementalPlan:
    """A plan from its YAML.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it isn't YAML, or a key is unknown, missing or has a wrong value.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such plan; docs/guides/finetune.md shows one")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("tasks", []), list):
        raise ValueError(f"{path}: a plan is a mapping of keys, its tasks a list; docs/guides/finetune.md shows one")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--plan", type=IncrementalPlan, required=True)
    base, changes = values.get("base"), [_taken(task, "set") for task in values.get("tasks") or ()]
    # What `base` and `set` hold are settings of `fit`: the parser would make objects of their class paths.
    stripped = {**values, "base": "" if base is not None else None}
    try:
        plan: Any = parser.instantiate(parser.parse_object({"plan": stripped})).plan
    except Exception as error:  # jsonargparse's own kinds, whose message names the key
        raise ValueError(f"{path}: {one_line(str(error))}") from error
    tasks = [dataclasses.replace(task, set=change or {}) for task, change in zip(plan.tasks, changes, strict=True)]
    return dataclasses.replace(plan, base=base, tasks=tasks)


def _taken(values: Any, key: str) -> Any:
    """A key's value, which is taken out."""
    return values.pop(key, None) if isinstance(values, dict) else None


def incremental(
    plan: IncrementalPlan, out: str | Path, run_command: RunCommand, say: Callable[[str], None]
) -> ScoreMatrix:
    """Learns the tasks of a plan, and scores all of them after each.

    Args:
        plan: the tasks.
        out: where everything goes: `models/`, `eval/`, `matrix.json`, `matrix.html` and what leads to them.
        run_command: runs a command line.
        say: is given each command line, and lines that tell how far it is.

    Returns:
        The whole matrix.

    Raises:
        ValueError: `out` was begun with another plan; or the config can't be trained so.
        CommandFailed: a command ended with an error.
    """
    return _Run(plan, Path(out), run_command, say).all_tasks()


class _Run:
    """One run's folder, and the commands that are done in it."""

    def __init__(
        self, plan: IncrementalPlan, out: Path, run_command: RunCommand, say: Callable[[str], None]
    ) -> None:  # fmt: skip
        self.plan, self.out, self.run_command, self.say = plan, out, run_command, say
        self.base = _config(plan.base)
        self._state = json.loads(json.dumps({"plan": {**dataclasses.asdict(plan), "base": self.base}, "done": []}))
        path = out / STATE
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = _changed(before["plan"], self._state["plan"])
            if changed is not None:
                raise ValueError(
                    f"{out} was begun with another plan: {changed} differs (tasks may be added at the end); give "
                    f"another --out, or remove that folder"
                )
            self._state["done"] = before["done"]

    def all_tasks(self) -> ScoreMatrix:
        """Everything, in order."""
        for number, task in enumerate(self.plan.tasks, start=1):  # wrong keys are named before anything is learnt
            self._fit_config(self._name(number), task, Path(self.plan.start), Path(task.recipe or ""))
        rows = [self._scores(0, Path(self.plan.start))]
        matrix = self._written(rows)
        for number, task in enumerate(self.plan.tasks, start=1):
            self.say(f"task {number} of {len(self.plan.tasks)}: {task.name}")
            before = Path(self.plan.start) if number == 1 else self._model(number - 1)
            self._learn(number, task, before)
            rows.append(self._scores(number, self._model(number)))
            matrix = self._written(rows)
            self._write_card(number, task, before, rows[-1])
        for line in as_lines(matrix):
            self.say(line)
        return matrix

    # ---------------------------------------------------------------------------------------------------- one task
    def _model(self, number: int) -> Path:
        return self.out / "models" / self._name(number)

    def _name(self, number: int) -> str:
        return "start" if not number else f"{number:02d}_{self.plan.tasks[number - 1].name}"

    def _learn(self, number: int, task: LearntTask, before: Path) -> None:
        """The training of a task, from its rows to a model folder."""
        name = self._name(number)
        recipe = self._recipe(name, task, before)
        config = self._fit_config(name, task, before, recipe)
        path = _write_yaml(self.out / "configs" / f"{name}.yaml", config)
        checkpoint = self.out / "checkpoints" / name / "last.ckpt"
        begun = ["--ckpt_path", "last"] if checkpoint.is_file() else ["--overwrite"]
        alone = config["trainer"].get("devices", 1) != 1
        self._do(f"fit {name}", "fit", "-c", str(path), *begun, alone=alone)
        if _has_adapter(config):
            trained = config["model"]["init_args"]["out"]
            self._do(
                f"merge {name}", "adapter", "merge", "--model", trained, "--adapter", ADAPTER, "--out",
                str(self._model(number)),
            )  # fmt: skip

    def _recipe(self, name: str, task: LearntTask, before: Path) -> Path:
        """The task's recipe, with what is rehearsed."""
        replay = task.replay or self.plan.replay
        if task.recipe is not None and replay is None:
            return Path(task.recipe)
        if task.rows is not None:
            shards = self.out / "shards" / name
            tokenizer = ["--tokenizer", str(before)]
            self._do(f"build {name}", "data", "build", task.rows, "--out", str(shards), *tokenizer)
            self._do(f"index {name}", "data", "index", str(shards), *tokenizer)
            sources = [_source(path) for path in sorted(shards.glob("*.tar"))]
            sources = list({source["kind"]: source for source in sources}.values())
            recipe: dict[str, Any] = {"sources": _scaled(sources, 1.0)}
        else:
            recipe = _recipe_of(Path(task.recipe or ""))
        if replay is not None:
            rehearsed = _recipe_of(Path(replay.recipe))
            own = _scaled(recipe["sources"], 1 - replay.share)
            more = [
                {**source, "name": f"replay_{source['name']}"}
                for source in _scaled(rehearsed["sources"], replay.share)
            ]  # fmt: skip
            recipe = {**{key: rehearsed[key] for key in ("sequence_length", "packing") if key in rehearsed}, **recipe}
            recipe["sources"] = [*own, *more]
        length = self.plan.sequence_length or recipe.get("sequence_length", 512)
        recipe |= {
            "tokenizer": str(before), "sequence_length": length,
            "mixture": {"unit": "tokens", "on_exhausted": "repeat"},
        }  # fmt: skip
        return _write_yaml(self.out / "recipes" / f"{name}.yaml", recipe)

    def _fit_config(self, name: str, task: LearntTask, before: Path, recipe: Path) -> dict[str, Any]:
        """The base config, of this task."""
        config = json.loads(json.dumps(self.base))
        for dotted, value in task.set.items():
            *parents, last = dotted.split(".")
            place = config
            for key in parents:
                place = place.setdefault(key, {})
                if not isinstance(place, dict):
                    raise ValueError(
                        f"task {task.name}: set names {dotted}, and {key} in it is {place!r}, which has no keys"
                    )
            place[last] = value
        model, trainer = config["model"]["init_args"], config["trainer"]
        out = self._model(int(name[:2]))
        if _has_adapter(config):
            kind = model["adapter"].get("kind", "lora")
            if kind != "lora":
                raise ValueError(
                    f"task {task.name}: adapter.kind is {kind}, which can't be merged into the weights that the next "
                    f"task goes on from; give lora, or train the whole model"
                )
            model["adapter_name"], out = ADAPTER, out.with_name(f"{out.name}_adapter")
        model |= {"init_from": str(before), "out": str(out), "name": f"after {task.name}"}
        minutes = task.minutes if task.minutes is not None else self.plan.minutes
        if minutes is not None:
            model["max_seconds"] = 60 * minutes
        config["data"]["init_args"]["recipe"] = str(recipe)
        for callback in trainer.get("callbacks", ()):
            given = callback.setdefault("init_args", {})
            if callback["class_path"].endswith("ModelCheckpoint"):
                given["dirpath"] = str(self.out / "checkpoints" / name)
            elif "directory" in given:
                given["directory"] = str(self.out / "logs" / name)
        for logger in _each_logger(trainer):
            logger.setdefault("init_args", {}).update(save_dir=str(self.out / "logs"), name=name)
        return config

    # ------------------------------------------------------------------------------------------------------ scores
    def _scores(self, number: int, model: Path) -> tuple[float, ...]:
        """A row of the matrix."""
        row = []
        for column, measure in self.plan.measures.items():
            path = self.out / "eval" / self._name(number) / f"{column}.json"
            limit = [] if measure.limit is None else ["--limit", str(measure.limit)]
            self._do(
                f"eval {self._name(number)} {column}", "eval", "--model", str(model), "--task", measure.task,
                "--manifest", measure.manifest, "--json", str(path), *limit, *measure.options,
            )  # fmt: skip
            scores = load_result(path).scores
            score = scores.get(measure.score)
            if not isinstance(score, int | float) or isinstance(score, bool):
                numbers = [key for key, value in scores.items() if isinstance(value, int | float)]
                raise ValueError(f"{column}: eval gives no score {measure.score!r}; it has {', '.join(numbers)}")
            row.append(1.0 - score if measure.lower_is_better else float(score))
        return tuple(row)

    def _written(self, rows: Sequence[tuple[float, ...]]) -> ScoreMatrix:
        """The matrix so far, in `matrix.json` and `matrix.html`."""
        matrix = ScoreMatrix(tuple(task.name for task in self.plan.tasks), tuple(self.plan.also), tuple(rows))
        _replace(self.out / "matrix.json", json.dumps(matrix.to_dict(), indent=1) + "\n")
        _replace(self.out / "matrix.html", as_page(matrix, "Tasks learnt one after the other"))
        return matrix

    def _write_card(self, number: int, task: LearntTask, before: Path, row: Sequence[float]) -> None:
        """Says in a model folder's card what it is, and its scores."""
        if f"card {self._name(number)}" in self._done:
            return
        scores = dict(zip(self.plan.measures, row, strict=True))
        data = (task.rows or task.recipe or "",)
        replay = task.replay or self.plan.replay
        if replay is not None:
            data = (*data, f"replay of {replay.recipe}: {replay.share:.0%} of the tokens")
        notes = (
            f"Task {number} of {len(self.plan.tasks)}, `{task.name}`, learnt from `{before}` by `mmllm incremental`."
        )
        write_card(self._model(number), ModelInfo(f"after {task.name}", data=data, scores=scores, notes=notes))
        self._note(f"card {self._name(number)}")

    # ---------------------------------------------------------------------------------------------------- commands
    @property
    def _done(self) -> list[str]:
        return self._state["done"]

    def _do(self, name: str, *command: str, alone: bool = False) -> None:
        """Runs a command unless it is done."""
        line = shlex.join(["mmllm", *command])
        if name in self._done:
            return
        self.say(f"$ {line}")
        code = self.run_command(command, alone)
        if code in (130, -2):
            raise KeyboardInterrupt
        if code:
            raise CommandFailed(f"`{line}` failed; mend what it says above and run the same command again to go on")
        self._note(name)

    def _note(self, name: str) -> None:
        self._done.append(name)
        _replace(self.out / STATE, json.dumps(self._state, indent=1) + "\n")


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What of a plan that was begun is another now; more tasks, and other things scored beside them, are no change."""
    for key in ("start", "base", "minutes", "replay", "sequence_length"):
        if before[key] != now[key]:
            return key
    for old, new in zip(before["tasks"], now["tasks"], strict=False):
        if old != new:
            return f"task {old['name']}"
    return next((f"also.{name}" for name, one in before["also"].items() if now["also"].get(name, one) != one), None)


# --------------------------------------------------------------------------------------------------------------- files
def _config(base: str | Mapping[str, Any]) -> dict[str, Any]:
    """The base config, with the sections that a fit has."""
    config = dict(base) if isinstance(base, Mapping) else _yaml(Path(base))
    for section in ("trainer", "model", "data"):
        if not isinstance(config.get(section), dict):
            raise ValueError(f"base has no {section}; give a config of `mmllm fit`, or its file")
    for section in ("model", "data"):
        if "class_path" not in config[section]:
            raise ValueError(f"base's {section} has no class_path; give a config of `mmllm fit`, or its file")
        config[section].setdefault("init_args", {})
    return config


def _yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the plan names it")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path} is no mapping of keys")
    return values


def _has_adapter(config: Mapping[str, Any]) -> bool:
    return config["model"]["init_args"].get("adapter") is not None


def _each_logger(trainer: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    logger = trainer.get("logger")
    for one in logger if isinstance(logger, list) else [logger]:
        if isinstance(one, dict):
            yield one


def _source(shard: Path) -> dict[str, Any]:
    """A recipe's source of the shards of one kind in a folder (`caption-000000.tar`)."""
    kind = shard.name.partition("-")[0]
    return {"name": kind, "kind": kind, "shards": str(shard.with_name(f"{kind}-*.tar"))}


def _recipe_of(path: Path) -> dict[str, Any]:
    """A recipe as its YAML has it, with shards that are found from elsewhere too."""
    recipe = _yaml(path)
    load_recipe(path)  # what is wrong with it is said now
    for source in recipe["sources"]:
        patterns = source["shards"] if isinstance(source["shards"], list) else [source["shards"]]
        source["shards"] = [_found(pattern, path.parent) for pattern in patterns]
    return recipe


def _found(pattern: str, folder: Path) -> str:
    """A pattern of shards, which a recipe has relative to the working directory or to its own folder."""
    try:
        find_shards(pattern)
    except FileNotFoundError:
        return str(folder / pattern)
    return pattern


def _scaled(sources: Sequence[Mapping[str, Any]], total: float) -> list[dict[str, Any]]:
    """Sources at their last weights, which sum to `total`; those that rest then are left out."""
    weights = [
        source["weight_schedule"][-1][1] if source.get("weight_schedule") else source.get("weight", 1.0)
        for source in sources
    ]
    return [
        {**{key: value for key, value in source.items() if key != "weight_schedule"},
         "weight": total * weight / sum(weights)}
        for source, weight in zip(sources, weights, strict=True) if weight > 0
    ]  # fmt: skip


def _write_yaml(path: Path, values: Mapping[str, Any]) -> Path:
    _replace(path, "# Written by `mmllm incremental`.\n" + yaml.safe_dump(dict(values), sort_keys=False, width=110))
    return path


def _replace(path: Path, text: str) -> None:
    """Writes a file as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)
