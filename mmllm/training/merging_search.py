"""`evolve` of `mmllm merge`: a merge's numbers, searched by validation scores within a budget.

Weights, densities or a position are searched by CMA-ES (`cma`), as in "Evolutionary Optimization of Model Merging
Recipes" (arXiv 2403.13187): each candidate is merged in memory and scored on held-out rows. What every candidate
scored stands in a trace, a line each. A search that is started again draws the same candidates, takes from the trace
those that were scored before, and goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from mmllm.checkpoints.folder import load_model
from mmllm.data.rows.bad_rows import BadRows
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.rows import Row
from mmllm.evaluation.results import KIND_OF_TASK, TASKS
from mmllm.evaluation.tasks import evaluate
from mmllm.inference.api import Model
from mmllm.interop.merging.experts import AlignExperts
from mmllm.interop.merging.folder import check_new, is_merged, merge_folders, merged_tensor, open_merge
from mmllm.interop.merging.parsing import parse_config
from mmllm.interop.merging.settings import MergeConfig

START = 0.5
SIGMA = 1 / 6
"""Where numbers begin, as a share of their range, and how widely they are drawn (arXiv 2403.13187)."""
_MEASURES = {
    "caption": "exact_match", "transcribe": "wer", "speak": "round_trip_wer", "interleaved": "answer_accuracy",
    "text": "bits_per_byte",
}  # fmt: skip
_ERRORS = ("wer", "cer", "bits_per_byte", "error")
"""Ends of measures of which less is better."""
_SMALLEST_DENSITY = 0.05


@dataclass(frozen=True)
class ScoredTask:
    """A task of `evolve.tasks`.

    Attributes:
        task: as `mmllm eval --task` has it.
        manifest: held-out rows; not those by which the merged model is judged later.
        measure: of the task's scores; None: its main one.
        start: what the base scores; with `goal` the score counts as the share of the way between them.
        goal: what the task's specialist scores.
    """

    task: str
    manifest: str
    measure: str | None = None
    start: float | None = None
    goal: float | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"evolve.tasks has the task {self.task!r}; choose one of {', '.join(TASKS)}")
        if (self.start is None) != (self.goal is None) or (self.start is not None and self.start == self.goal):
            raise ValueError(
                f"evolve.tasks has start {self.start} and goal {self.goal} of {self.task}; give both, and "
                f"not equal, or neither"
            )

    @property
    def key(self) -> str:
        """The measure."""
        return self.measure or _MEASURES[self.task]

    def worth(self, score: float) -> float:
        """A score as what is to be made large."""
        if self.start is not None and self.goal is not None:
            return (score - self.start) / (self.goal - self.start)
        return -score if self.key.endswith(_ERRORS) else score


@dataclass(frozen=True)
class Evolution:
    """`evolve` of a merge's YAML.

    Attributes:
        tasks: whose scores count.
        objective: the tasks' "mean", or the "least" of them.
        limit: rows of each task at most.
        budget: evaluations at most; one is all tasks of one candidate.
        minutes: at most, those of earlier starts included.
        seed: of the search and of the rows that are drawn.
        population: candidates a generation; None: 4 + ⌊3 ln n⌋ for n numbers.
        parameters: which are searched; None: weight, or t of slerp.
        layer_groups: numbers a parameter has, interpolated over the layers as mergekit's gradients are.
        max_weight: upper bound of weights and lambda.
        trace: file of what was tried; None: beside the folder that is written.
    """

    tasks: tuple[ScoredTask, ...]
    objective: str = "mean"
    limit: int = 100
    budget: int | None = None
    minutes: float | None = None
    seed: int = 0
    population: int | None = None
    parameters: tuple[str, ...] | None = None
    layer_groups: int = 1
    max_weight: float = 1.0
    trace: str | None = None

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("evolve.tasks is empty; give a list of {task: …, manifest: …}")
        if self.objective not in ("mean", "least"):
            raise ValueError(f"evolve.objective is {self.objective!r}; choose mean or least")
        if self.budget is None and self.minutes is None:
            raise ValueError("evolve has neither budget (evaluations) nor minutes; give one, so that it ends")
        for key, least in (("limit", 1), ("budget", 1), ("population", 2), ("layer_groups", 1), ("seed", 0)):
            value = getattr(self, key)
            if value is not None and (type(value) is not int or value < least):
                raise ValueError(f"evolve.{key} is {value!r}; give a whole number, {least} or more")
        for key in ("minutes", "max_weight"):
            value = getattr(self, key)
            if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise ValueError(f"evolve.{key} is {value!r}; give a positive number")

    @staticmethod
    def parse(values: Any) -> Evolution:
        """The YAML's keys.

        Raises:
            ValueError: an unknown key, or a value that can't be.
        """
        values = _known("evolve", values, Evolution)
        tasks = values.get("tasks")
        if not isinstance(tasks, list):
            raise ValueError(f"evolve.tasks is {tasks!r}; give a list of {{task: …, manifest: …}}")
        listed = tuple(ScoredTask(**_known("evolve.tasks", each, ScoredTask)) for each in tasks)
        if isinstance(values.get("parameters"), str):
            values["parameters"] = [values["parameters"]]
        parameters = None if values.get("parameters") is None else tuple(values["parameters"])
        return Evolution(**{**values, "tasks": listed, "parameters": parameters})


def _known(where: str, values: Any, kind: type) -> dict[str, Any]:
    names = [each.name for each in fields(kind)]
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is {values!r}; wanted the keys {', '.join(names)}")
    unknown = [key for key in values if key not in names]
    if unknown:
        raise ValueError(f"{where} has the key {unknown[0]!r}; known are {', '.join(names)}")
    missing = [key for key in ("task", "manifest", "tasks") if key in names and key not in values]
    if missing:
        raise ValueError(f"{where} lacks {missing[0]}; wanted the keys {', '.join(names)}")
    return dict(values)


# --- numbers that are searched ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gene:
    """A number that is searched: which parameter, of which model (None: all), and of which group of layers."""

    parameter: str
    model: str | None
    group: int
    low: float
    high: float

    def value(self, x: float) -> float:
        """In its range, of a share of it."""
        return self.low + (self.high - self.low) * min(max(x, 0.0), 1.0)


def genes_of(config: MergeConfig, evolution: Evolution) -> list[Gene]:
    """The numbers of a search, in order.

    Raises:
        ValueError: the method has no such parameters, or there is only one number, which CMA-ES can't search.
    """
    rule = config.rule
    numeric = [*rule.of_models, *(key for key, default in rule.shared.items() if not isinstance(default, bool))]
    chosen = evolution.parameters or tuple(key for key in ("weight", "t") if key in numeric)
    unknown = [key for key in chosen if key not in numeric]
    if unknown or not chosen:
        raise ValueError(
            f"evolve.parameters names {unknown[0] if unknown else 'nothing'}; {config.method} has "
            f"{', '.join(numeric) or 'no numbers'}"
        )
    genes = []
    for key in chosen:
        low, high = 0.0, 1.0
        if key in ("weight", "lambda"):
            low, high = (0.01 if config.method == "linear" else 0.0), evolution.max_weight
        elif key == "density":
            epsilon = float(rule.of_models.get("epsilon") or 0.0)
            low, high = max(_SMALLEST_DENSITY, epsilon + 0.01), 1.0 - (epsilon + 0.01 if epsilon else 0.0)
        elif key == "epsilon":
            raise ValueError("evolve.parameters names epsilon, whose range hangs on the density; search density")
        for model in config.parents if key in rule.of_models else (None,):
            genes += [Gene(key, model, group, low, high) for group in range(evolution.layer_groups)]
    if len(genes) < 2:
        raise ValueError(f"evolve has one number to find, {chosen[0]}; CMA-ES wants two: set layer_groups: 2 or more")
    return genes


def first_point(config: MergeConfig, genes: Sequence[Gene]) -> list[float]:
    """Where the search begins: what the YAML gives as a plain number, else the middle of the range."""
    part, point = config.parts[0], []
    for gene in genes:
        given = config.parameters.get(gene.parameter)
        if gene.model is not None:
            given = part.models[gene.model].get(gene.parameter, given)
        is_plain = isinstance(given, (int, float)) and not isinstance(given, bool)
        share = (float(given) - gene.low) / (gene.high - gene.low) if is_plain else START  # pyright: ignore[reportArgumentType]
        point.append(min(max(share, 0.0), 1.0))
    return point


def candidate(config: MergeConfig, genes: Sequence[Gene], point: Sequence[float]) -> MergeConfig:
    """The merge that a point of the search stands for, without `evolve`."""
    values = yaml.safe_load(config.text)
    del values["evolve"]
    found: dict[tuple[str, str | None], list[float]] = {}
    for gene, x in zip(genes, point, strict=True):
        found.setdefault((gene.parameter, gene.model), []).append(round(gene.value(float(x)), 6))
    for (parameter, model), numbers in found.items():
        setting = numbers[0] if len(numbers) == 1 else numbers
        owner = values
        if model is not None:
            owner = next(each for each in values["models"] if str(each["model"]).rstrip("/") == model)
        owner["parameters"] = {**(owner.get("parameters") or {}), parameter: setting}
    return parse_config(values)


# --- the search -------------------------------------------------------------------------------------------------------


class Scorer:
    """Scores merged models in memory: one model is built, and gets each candidate's weights.

    Args:
        config: of the merge.
        evolution: tasks and rows.
        align: orders experts by activations.

    Raises:
        FileNotFoundError, ValueError: as `open_merge`, or a manifest can't be read.
    """

    def __init__(self, config: MergeConfig, evolution: Evolution, align: AlignExperts | None = None) -> None:
        self.evolution = evolution
        self.rows = [_rows(task) for task in evolution.tasks]
        parents = open_merge(candidate_like(config), align)
        self.digests = [parent.digest for parent in parents]
        self.num_layers = parents[0].parts.config.decoder.num_hidden_layers
        self.tensors: dict[str, list[Tensor]] = {}
        self.loaded = load_model(parents[0].folder)
        self.state = self.loaded.model.state_dict()
        for name in parents[0].specs:
            tensors = [parent.read(name) for parent in parents]
            if is_merged(tensors):
                self.tensors[name] = tensors
            elif parents[0].lora is not None:  # the folder's own weights lack it
                self.state[name].copy_(tensors[0])

    def scores(self, config: MergeConfig) -> dict[str, float]:
        """A candidate's score in each task, in the order of the tasks."""
        with torch.no_grad():
            for name, tensors in self.tensors.items():
                self.state[name].copy_(merged_tensor(config, name, tensors, self.num_layers))
        loaded, scores = self.loaded, {}
        for number, (task, rows) in enumerate(zip(self.evolution.tasks, self.rows, strict=True)):
            model = Model(loaded.model, loaded.tokenizer, loaded.image_transform, loaded.generation)
            result = evaluate(model, task.task, rows, limit=self.evolution.limit, seed=self.evolution.seed)
            if task.key not in result.scores:
                numbers = [key for key, value in result.scores.items() if isinstance(value, float)]
                raise ValueError(f"evolve.tasks has the measure {task.key!r}; {task.task} has {', '.join(numbers)}")
            scores[f"{number} {task.task} {task.key}"] = float(result.scores[task.key])
        return scores

    def objective(self, scores: Mapping[str, float]) -> float:
        """What the search makes large."""
        worths = [task.worth(score) for task, score in zip(self.evolution.tasks, scores.values(), strict=True)]
        return min(worths) if self.evolution.objective == "least" else sum(worths) / len(worths)


def candidate_like(config: MergeConfig) -> MergeConfig:
    """The config of any candidate: what is searched may be left out of the YAML."""
    genes = genes_of(config, Evolution.parse(config.evolve))
    return candidate(config, genes, first_point(config, genes))


def _rows(task: ScoredTask) -> list[Row]:
    rows = [row for row in read_rows(task.manifest, BadRows(0.05)) if row.kind == KIND_OF_TASK[task.task]]
    if not rows:
        raise ValueError(f"{task.manifest} has no rows for {task.task}; give another manifest or task")
    return rows


class Trace:
    """What a search has tried, a line each; the first says which search it is.

    Args:
        path: of the file.
        search: what tells this search from others.

    Raises:
        ValueError: the file is of another search, or damaged.
    """

    def __init__(self, path: Path, search: Mapping[str, Any]) -> None:
        self.path, self.known = path, list[dict[str, Any]]()
        head = json.loads(json.dumps(dict(search)))
        if path.is_file():
            lines = path.read_text(encoding="utf-8").split("\n")
            whole = lines[:-1]  # a killed process may leave half a line behind the last break
            try:
                found = [json.loads(line) for line in whole]
            except ValueError as error:
                raise ValueError(f"{path} is no trace of a search: {error}; remove it") from error
            if not found or found[0] != head:
                raise ValueError(
                    f"{path} is the trace of another search (its parents, tasks or numbers differ); remove it, or give "
                    f"evolve.trace another name"
                )
            self.known = found[1:]
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = [json.dumps(head, ensure_ascii=False)]
        path.write_text("".join(line + "\n" for line in whole), encoding="utf-8")

    @property
    def seconds(self) -> float:
        """That scoring took so far."""
        return sum(each["seconds"] for each in self.known)

    def add(self, values: dict[str, Any]) -> None:
        """Writes one more line."""
        self.known.append(values)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def evolve(config: MergeConfig, out: str | Path, align: AlignExperts | None = None) -> Iterator[str]:
    """Searches a merge's numbers, and writes the model folder of the best.

    Args:
        config: with `evolve`.
        out: model folder to write; it is new or empty.
        align: orders experts by activations; needed where the config says so.

    Yields:
        A line for each candidate that is scored, and those of the merge.

    Raises:
        FileNotFoundError, ValueError: as `merge_folders` and `Scorer`.
        ModuleNotFoundError: without `cma`.
    """
    evolution, out = Evolution.parse(config.evolve), check_new(out)
    genes = genes_of(config, evolution)
    search = _strategy(config, evolution, genes)
    scorer = Scorer(config, evolution, align)
    trace = Trace(Path(evolution.trace or f"{out}.evolve.jsonl"), _identity(config, evolution, scorer))
    num_known, place, best = len(trace.known), 0, None
    if num_known:
        yield f"{trace.path}: {num_known} candidates were scored before"
    points: list[Any] = [first_point(config, genes)]
    while True:
        objectives = []
        for point in points:
            if _is_spent(evolution, trace, place):
                break
            if place >= len(trace.known):
                trace.add(_tried(config, scorer, genes, point, place))
                yield _line(trace.known[place])
            found = trace.known[place]
            place += 1
            objectives.append(found["objective"])
            if best is None or found["objective"] > best["objective"]:
                best = found
        else:
            if place > 1:  # the first point is no draw of the strategy's
                search.tell(points, [-each for each in objectives])
            if search.stop():
                break
            points = search.ask()
            continue
        break
    assert best is not None
    chosen = candidate(config, genes, best["point"])
    yield f"best of {place}: objective {best['objective']:.4f}, {_said(best['parameters'])}"
    validation = {"validation": dict(best["scores"]), "candidates": place}
    yield from merge_folders(chosen, out, align, validation).lines()


def _tried(config: MergeConfig, scorer: Scorer, genes: Sequence[Gene], point: Any, place: int) -> dict[str, Any]:
    begun = time.monotonic()
    scores = scorer.scores(candidate(config, genes, point))
    return {
        "candidate": place,
        "point": [float(x) for x in point],
        "parameters": [[g.parameter, g.model, g.group, round(g.value(float(x)), 6)] for g, x in
                       zip(genes, point, strict=True)],
        "scores": scores,
        "objective": scorer.objective(scores),
        "seconds": round(time.monotonic() - begun, 3),
    }  # fmt: skip


def _is_spent(evolution: Evolution, trace: Trace, place: int) -> bool:
    """Whether no further candidate may be scored; the first always is."""
    if place == 0 or place < len(trace.known):
        return place > 0 and evolution.budget is not None and place >= evolution.budget
    by_number = evolution.budget is not None and place >= evolution.budget
    return by_number or (evolution.minutes is not None and trace.seconds >= 60 * evolution.minutes)


def _strategy(config: MergeConfig, evolution: Evolution, genes: Sequence[Gene]) -> Any:
    """CMA-ES over shares of the numbers' ranges, drawing from a generator of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Could not import matplotlib")
        try:
            import cma
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "evolve needs the package cma, which is not installed; pip install 'mmllm[merge]'"
            ) from error
    generator = np.random.default_rng(evolution.seed)
    population = evolution.population or 4 + int(3 * math.log(len(genes)))
    options = {
        "bounds": [0, 1], "popsize": population, "seed": math.nan, "randn": lambda *shape: generator.normal(size=shape),
        "verbose": -9, "verb_log": 0, "verb_filenameprefix": os.devnull,
    }  # fmt: skip
    return cma.CMAEvolutionStrategy(first_point(config, genes), SIGMA, options)


def _identity(config: MergeConfig, evolution: Evolution, scorer: Scorer) -> dict[str, Any]:
    """What must be the same for a trace to be gone on with: all but the budget."""
    values = yaml.safe_load(config.text)
    for key in ("budget", "minutes", "trace"):
        values["evolve"].pop(key, None)
    rows = [hashlib.sha256(Path(task.manifest).read_bytes()).hexdigest() for task in evolution.tasks]
    return {"config": values, "parents": scorer.digests, "manifests": rows}


def _line(tried: Mapping[str, Any]) -> str:
    scores = ", ".join(f"{key.partition(' ')[2]} {value:.4f}" for key, value in tried["scores"].items())
    return (
        f"candidate {tried['candidate']}: objective {tried['objective']:.4f} ({scores}), "
        f"{_said(tried['parameters'])}, {tried['seconds']:.1f} s"
    )


def _said(parameters: Sequence[Sequence[Any]]) -> str:
    return " ".join(f"{key}{'' if model is None else f'[{Path(model).name}]'}={value:.3f}" for key, model, _, value in
                    parameters)  # fmt: skip
