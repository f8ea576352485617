"""A plan whose steps hold one task at a time: some steps of one, then of the next, as meta-learning asks for.

A task is a source of the recipe, or a source's documents with one value of a column. Which task comes next is drawn by
the recipe's weights, a pure function of (seed, number of the turn); a task's steps are planned as if its source
alone had a weight, so that ranks, workers and a resume change nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmllm.data.plan.plan import Plan, StepPlan, open_sources
from mmllm.data.plan.recipe import Recipe, SourceConfig
from mmllm.data.plan.source import Source
from mmllm_tokenizers.folder import TokenizerFolder

_TURNS = 8
"""What random numbers are for; see `mmllm.data.plan.source`."""
_NEVER = float(2**53)
"""A step that no training reaches."""


@dataclass(frozen=True)
class TaskConfig:
    """Steps of one task at a time.

    Attributes:
        steps: that a task has before another is drawn: of meta-learning, the batches of its inner loop.
        column: of the rows, such as `asks`: each of its values in a source is a task; None: each source is one.
    """

    steps: int
    column: str | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"tasks.steps is {self.steps}; a task has at least one step at a time")


class TaskPlan(Plan):
    """The stream of steps of a recipe, `config.steps` of one source, then of another.

    Args:
        recipe: Its sources are the tasks.
        sources: Them, opened.
        batch_size: Sequences a step, of all ranks together.
        tokenizer_hash: The tokenizer folder's.
        config: How many steps.
    """

    def __init__(
        self, recipe: Recipe, sources: list[Source], batch_size: int, tokenizer_hash: str, config: TaskConfig
    ) -> None:
        super().__init__(recipe, sources, batch_size, tokenizer_hash)
        self._steps = config.steps
        self._plans = [
            Plan(_only(recipe, number), sources, batch_size, tokenizer_hash) for number in range(len(sources))
        ]

    def task_of(self, turn: int) -> int:
        """Which source the steps of a turn are of."""
        shares_S = self.recipe.shares(turn * self._steps)
        return int(np.random.default_rng([self.recipe.seed, _TURNS, turn]).choice(len(shares_S), p=shares_S))

    def initial_state(self) -> dict[str, Any]:
        """As `Plan`'s, with the states of the tasks."""
        state = {**super().initial_state(), "num_task_steps": self._steps}
        return {**state, "tasks": [plan.initial_state() for plan in self._plans]}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """As `Plan.check_state`; each task must go on as it was."""
        self._check_tasks(state)
        for plan, own in zip(self._plans, state["tasks"], strict=True):
            plan.check_state(own)

    def _check_tasks(self, state: Mapping[str, Any]) -> None:
        if state.get("num_task_steps") != self._steps or len(state.get("tasks", ())) != len(self._plans):
            raise ValueError(
                f"the saved data state has {state.get('num_task_steps')} steps at a time of each of "
                f"{len(state.get('tasks', ()))} tasks, this run {self._steps} of each of {len(self._plans)}; resume "
                f"with the same data.init_args.tasks"
            )
        self._check_keys(state)

    def steps(self, state: Mapping[str, Any] | None = None) -> Iterator[StepPlan]:
        """Steps from a state on; ends when a task that is drawn has no document left."""
        state = dict(state) if state is not None else self.initial_state()
        self._check_tasks(state)
        step, tasks = int(state["step"]), list(state["tasks"])
        base, streams = self.initial_state(), dict[int, Iterator[StepPlan]]()
        while True:
            task = self.task_of(step // self._steps)
            if task not in streams:
                streams[task] = self._plans[task].steps(tasks[task])
            planned = next(streams[task], None)
            if planned is None:
                return
            step, tasks = step + 1, [*tasks[:task], planned.state, *tasks[task + 1 :]]
            after = {**base, "step": step, "window": step, "tasks": tasks}
            yield StepPlan(step - 1, planned.sequences, after, self.batch_size)

    def state_before(self, step: int) -> dict[str, Any]:
        """The state before a step, planned from the start.

        Raises:
            ValueError: the stream ends before it.
        """
        state = self.initial_state()
        for planned in self.steps(state):
            if planned.step >= step:
                return state
            state = planned.state
        raise ValueError(f"step is {step}; the recipe's documents last for {state['step']} steps")


def _only(recipe: Recipe, number: int) -> Recipe:
    """The recipe with one source at work; the others keep their places, and rest for ever."""
    rests: list[list[float]] = [[0, 0.0], [_NEVER, 0.0], [_NEVER, 1.0]]
    sources = [
        dataclasses.replace(source, weight=1.0, weight_schedule=None if place == number else rests)
        for place, source in enumerate(recipe.sources)
    ]
    return dataclasses.replace(recipe, sources=sources)


def _check_no_tell(recipe: Recipe) -> None:
    if recipe.tell is not None:
        raise ValueError(
            "the recipe has tell, which mixes a task with others, and data.init_args.tasks has steps of one task at a "
            "time; leave one of them out"
        )


def split_sources(recipe: Recipe, folder: TokenizerFolder, column: str) -> Recipe:
    """The recipe with each source taken apart by a column's values; they share its weight equally.

    Raises:
        ValueError: A source's documents have no such column, or the recipe has `tell`.
    """
    _check_no_tell(recipe)
    parts: list[SourceConfig] = []
    for config, source in zip(recipe.sources, open_sources(recipe, folder.hash, folder), strict=True):
        values = sorted(source.values(column))
        if not values:
            raise ValueError(
                f"tasks.column is {column!r}, which no document of source {config.name!r} has; leave it out, and each "
                f"source is a task, or name a column that its rows have"
            )
        columns = [index.columns[column] for index in source.indices if column in index.columns]
        typed = {str(value): value for found in columns for value in found}  # a filter compares numbers with numbers
        for value in values:
            is_one = f"{column} == {typed[value]!r}"
            kept = is_one if config.filter is None else f"({config.filter}) and {is_one}"
            weight = config.weight / len(values)
            schedule = config.weight_schedule and [
                [step, share / len(values)] for step, share in config.weight_schedule
            ]
            name = f"{config.name}:{value}"
            parts.append(
                dataclasses.replace(config, name=name, filter=kept, weight=weight, weight_schedule=schedule)
            )  # fmt: skip
    return dataclasses.replace(recipe, sources=parts)


def open_task_plan(recipe: Recipe, batch_size: int, folder: TokenizerFolder, config: TaskConfig) -> TaskPlan:
    """The plan of a recipe whose sources are tasks, with its shards looked up; see `split_sources` for a column.

    Raises:
        FileNotFoundError, ValueError: As `open_sources`; or there is one task alone.
    """
    _check_no_tell(recipe)
    if len(recipe.sources) < 2:
        raise ValueError(
            f"the recipe has one task, {recipe.sources[0].name!r}; meta-learning is over several: give more sources, "
            f"or tasks.column"
        )
    return TaskPlan(recipe, open_sources(recipe, folder.hash, folder), batch_size, folder.hash, config)
