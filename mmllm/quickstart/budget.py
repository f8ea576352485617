"""How a run's wall time is shared: what trainings may take, what evaluation and report are kept back, how many rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DEMO_STEPS = {"codec": 300, "decoder": 1250}
"""Training steps of the demo on its own data. Fixed, so that everybody's demo is the same run."""

ALIGN_SHARE, CODEC_SHARE = 0.1, 0.08
"""With `--minutes`: share of what is left that a stage before the decoder may take."""
ALIGN_STEPS = 1000
"""Of the aligner, without `--minutes`."""

EVALUATION_SECONDS = {"caption": 0.04, "transcribe": 0.03, "speak": 0.12, "interleaved": 0.06, "text": 0.05}
"""About what one row costs, all controls included."""
EVALUATION_SHARE = 0.25
"""Of `--minutes`, at most, that are kept back for evaluation and report."""
MIN_EVALUATED = 20
"""Rows of each set, however little time is left."""

MIN_TRAINING_SECONDS = 5.0
MARGIN_SHARE = 0.03
"""Of `--minutes`, that the last training leaves unused."""
REPORT_SECONDS = 8.0
START_SECONDS = 6.0
"""What a command's process needs before it works."""
FIT_START_SECONDS = 20.0
"""What a training's processes need before their first step, and for the export."""

Sets = Mapping[str, Sequence[int]]
"""Of each task, the number of rows of each set that is scored apart."""


@dataclass(frozen=True)
class Budget:
    """What bounds a run."""

    minutes: float | None
    """Wall time to aim at, evaluation included; None: fixed steps."""
    max_steps: int | None
    """Of each training, whatever the time."""
    is_demo: bool
    num_processes: int
    """Evaluations that may run at once."""

    def training_length(
        self, stage: str, tasks: Sets, seconds_left: float | None, share: float | None
    ) -> dict[str, Any]:
        """How long a stage trains: fixed steps in the demo, seconds where `--minutes` bounds the run.

        Args:
            stage: `codec` or `decoder`.
            tasks: that are evaluated afterwards.
            seconds_left: of the minutes; None without them.
            share: of what evaluation leaves; None: all.

        Returns:
            Keys of the stage's config, see `plan.stage_config`.
        """
        if self.max_steps is not None:
            fixed = {"trainer.max_steps": self.max_steps, "trainer.log_every_n_steps": 1}
            return {**fixed, "model.init_args.max_seconds": None}
        if self.minutes is None or seconds_left is None:
            steps = DEMO_STEPS[stage] if self.is_demo else 2 * DEMO_STEPS[stage]
            return {"trainer.max_steps": steps, "model.init_args.max_seconds": None}
        spare = self._spare_seconds(tasks, seconds_left)
        seconds = spare - MARGIN_SHARE * 60 * self.minutes if share is None else spare * share
        return {"trainer.max_steps": -1, "model.init_args.max_seconds": round(max(MIN_TRAINING_SECONDS, seconds), 1)}

    def command_length(self, tasks: Sets, seconds_left: float | None, share: float) -> list[str]:
        """The option that bounds a command which learns something small beside its work; see `training_length`."""
        if self.max_steps is not None:
            return ["--steps", str(self.max_steps)]
        if self.minutes is None or seconds_left is None:
            return ["--steps", str(ALIGN_STEPS)]
        seconds = share * self._spare_seconds(tasks, seconds_left)
        return ["--seconds", f"{max(MIN_TRAINING_SECONDS, seconds):.1f}"]

    def _spare_seconds(self, tasks: Sets, seconds_left: float) -> float:
        """What evaluation leaves to a training."""
        return seconds_left - self.evaluation_seconds(tasks) - FIT_START_SECONDS

    def evaluation_seconds(self, tasks: Sets) -> float:
        """What is kept back for evaluation and report of a run by minutes."""
        assert self.minutes is not None
        return min(self.scoring_seconds(tasks) + self.overhead_seconds(tasks), EVALUATION_SHARE * 60 * self.minutes)

    def num_lanes(self, tasks: Sets) -> int:
        """How many tasks are evaluated at once."""
        return max(1, min(self.num_processes, len(tasks)))

    def scoring_seconds(self, tasks: Sets) -> float:
        """About how long all rows of the tasks take."""
        costs = [task_seconds(task, sets) for task, sets in tasks.items()]
        return max(sum(costs) / self.num_lanes(tasks), *costs, 0.0)

    def overhead_seconds(self, tasks: Sets) -> float:
        """The starts of the evaluations' processes, and the report."""
        return REPORT_SECONDS + START_SECONDS * -(-len(tasks) // self.num_lanes(tasks))

    def limits(self, tasks: Sets, seconds_left: float | None) -> dict[str, int]:
        """How many rows of each set of a task there is time for; tasks of which all are scored are left out."""
        if seconds_left is None:
            return {}
        share = (seconds_left - self.overhead_seconds(tasks)) / self.scoring_seconds(tasks)
        if share >= 1:
            return {}
        return {task: max(MIN_EVALUATED, int(share * max(sets))) for task, sets in tasks.items()}


def scored_rows(limit: int | None, sets: Sequence[int]) -> int:
    """How many rows of a task are scored where it is bounded to so many of each set; None: all."""
    return sum(sets) if limit is None else sum(min(limit, count) for count in sets)


def task_seconds(task: str, sets: Sequence[int]) -> float:
    """About how long a task takes."""
    return EVALUATION_SECONDS[task] * sum(sets)
