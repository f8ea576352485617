"""Held-out tasks that a training is measured by, and what one look at them found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmllm.evaluation.results import TASKS, TaskResult

PROMPT_OF = {"caption": "caption", "transcribe": "transcribe", "interleaved": "question", "chat": "chat"}
"""What the prompts of a task are called where preferences are made of them; speech and plain text aren't drawn."""


@dataclass(frozen=True)
class HeldOutTask:
    """A task to score, as `mmllm eval` does.

    Attributes:
        task: caption, transcribe, speak, interleaved, chat or text.
        manifest: of held-out rows.
        limit: at most so many rows of each set, drawn at random by the callback's seed.
        name: under which it is reported; None: `task`.
        judge: of `speak`: the folder of an aligner, whose word error rate is then the score.
    """

    task: str
    manifest: str
    limit: int = 64
    name: str | None = None
    judge: str | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}; choose one of {', '.join(TASKS)}")
        if self.limit < 1:
            raise ValueError(f"limit of the held-out task {self.label} is {self.limit}; it must be at least 1")
        if self.judge is not None and self.task != "speak":
            raise ValueError(f"the held-out task {self.label} has a judge, which only speak has; leave it out")

    @property
    def label(self) -> str:
        """Its name in scores and plots."""
        return self.name or self.task

    def score(self, scores: Mapping[str, Any]) -> float:
        """Of an evaluation the one number that is followed; higher is better.

        Captions: exact match. Answers: those that are right. Transcripts and speech: 1 − word error rate. Text: bits a
        byte, negative.
        """
        match self.task:
            case "caption":
                return float(scores["exact_match"] if "exact_match" in scores else scores["heldout_pairs_accuracy"])
            case "transcribe":
                return 1.0 - float(scores["wer"] if "wer" in scores else scores["heldout_voices_wer"])
            case "speak":
                return 1.0 - float(scores["judge_wer" if self.judge else "round_trip_wer"])
            case "text":
                return -float(scores["bits_per_byte"])
            case _:
                return float(scores["answer_accuracy"])

    def values(self, result: TaskResult) -> tuple[float, ...]:
        """Of each row, in an order that is always the same."""
        is_right = self.task in ("caption", "interleaved", "chat")
        return tuple(float(row.correct) if is_right else row.score for row in result.predictions)


@dataclass
class Look:
    """What was found at one step; a checkpoint keeps it."""

    step: int
    seconds: float
    scores: dict[str, float]
    values: dict[str, list[float]]
    kl: float | None = None
    """KL(now‖start), nats a sequence."""
    entropy: float | None = None
    length: float | None = None
    reward: float | None = None
    """Mean over the steps since the look before."""
    num_rewards: int = 0
    """Steps with a reward until now, of the whole run."""

    def points_lost(self, start: Look) -> dict[str, float]:
        """100 times what each task's score lost since the start; negative: gained."""
        return {name: 100 * (start.scores[name] - score) for name, score in self.scores.items()}
