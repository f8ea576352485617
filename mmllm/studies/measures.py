"""What a study's models are judged by: scores of `mmllm eval`, and what is in front of their prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mmllm.data.expressions import compile_filter
from mmllm.evaluation.results import ANCHORED_TASKS, SHOT_TASKS, TASKS


@dataclass(frozen=True)
class Shots:
    """Rows that a measure shows with their answers in front of each row.

    Attributes:
        manifest: of training rows.
        number: of shots.
        max_length: positions of a prompt and its answer; by default those of training's sequences.
        filter: which rows of the manifest.
    """

    manifest: str
    number: int
    max_length: int | None = None
    filter: str | None = None

    def __post_init__(self) -> None:
        if self.number < 1:
            raise ValueError(
                f"shots of {self.manifest} have the number {self.number}; give at least 1, or leave shots out"
            )
        if self.filter is not None:
            compile_filter(self.filter)

    @property
    def options(self) -> list[str]:
        """Of `mmllm eval`."""
        more = {"max_length": self.max_length, "shots_filter": self.filter}
        given = [f"--{name}={value}" for name, value in more.items() if value is not None]
        return [f"--shots={self.manifest}", f"--num_shots={self.number}", *given]


@dataclass(frozen=True)
class Prompt:
    """What a level's model is asked with in one measure, in the place of what the measure says.

    Attributes:
        shots: as a measure's.
        anchor: likewise.
    """

    shots: Shots | None = None
    anchor: str | None = None


@dataclass(frozen=True)
class Measure:
    """A score of `mmllm eval`.

    Attributes:
        name: in reports.
        task: of `mmllm eval`.
        manifest: of held-out rows.
        key: of the task's scores.
        limit: at most so many rows of each set.
        lower_is_better: it counts errors.
        options: more options of `mmllm eval`.
        shots: rows that are shown with their answers in front of each row; None: none are.
        anchor: text in front of each prompt; None: nothing.
    """

    name: str
    task: str
    manifest: str
    key: str
    limit: int | None = None
    lower_is_better: bool = False
    options: tuple[str, ...] = ()
    shots: Shots | None = None
    anchor: str | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"measure {self.name} has the task {self.task!r}; choose one of {', '.join(TASKS)}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"measure {self.name} has the limit {self.limit}; give at least 1, or leave it out")
        for what, given, having in (("shots", self.shots, SHOT_TASKS), ("anchor", self.anchor, ANCHORED_TASKS)):
            if given is not None and self.task not in having:
                raise ValueError(
                    f"measure {self.name} has {what}, and the task {self.task} has none; {', '.join(having)} have"
                )
        if self.anchor is not None and not self.anchor.strip():
            raise ValueError(f"measure {self.name} has an empty anchor; give a text, or leave it out")

    def of(self, prompts: Mapping[str, Prompt]) -> Measure:
        """As a level's model is asked, which has prompts of its own by measures' names."""
        prompt = prompts.get(self.name, Prompt())
        anchor = self.anchor if prompt.anchor is None else prompt.anchor
        return replace(self, shots=prompt.shots or self.shots, anchor=anchor)

    def command(self, model: str, out: str, more: Sequence[str] = ()) -> list[str]:
        """Of `mmllm`, which scores a model.

        Args:
            model: its folder.
            out: where the evaluation goes, as JSON.
            more: options of a level.
        """
        limit = [] if self.limit is None else ["--limit", str(self.limit)]
        return ["eval", "--model", model, "--task", self.task, "--manifest", self.manifest, "--json", out,
                *limit, *self.options, *self.prompt_options, *more]  # fmt: skip

    @property
    def prompt_options(self) -> list[str]:
        """Of `mmllm eval`, for shots and anchor."""
        shots = [] if self.shots is None else self.shots.options
        return shots if self.anchor is None else [*shots, f"--anchor={self.anchor}"]
