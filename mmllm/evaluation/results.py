"""What an evaluation hands on: scores by name and one record a row; read and written as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

TASKS = ("caption", "transcribe", "speak", "interleaved", "chat", "text")
"""In the order in which reports show them."""
KIND_OF_TASK = {
    "caption": "caption", "transcribe": "audio", "speak": "audio", "interleaved": "interleaved", "chat": "interleaved",
    "text": "text",
}  # fmt: skip
"""Which rows of a manifest a task is scored on."""
SHOT_TASKS = ("caption", "transcribe", "interleaved")
"""Whose rows can be shown with their answers in front of others."""
ANCHORED_TASKS = (*SHOT_TASKS, "chat")
"""Whose prompts can have an anchor in front."""


@dataclass(frozen=True)
class Prediction:
    """One row's prediction beside its reference."""

    id: str
    reference: str
    prediction: str
    score: float
    """1 is right, 0 is wrong; galleries sort by it. May be below 0 (a word error rate above 1)."""
    correct: bool
    group: str = "test"
    """"test", or the set that is scored apart: "heldout_pairs", "heldout_voices"."""
    blind: str | None = None
    """What the same model says without the image or sound."""
    question: str | None = None
    image: str | None = None
    """Path of the picture that was seen."""
    audio: str | None = None
    """Path of the sound that was heard, or the real speech beside a synthesized one."""
    written: str | None = None
    """Path of the WAV that the model spoke."""
    segments: list[dict[str, str]] = field(default_factory=list)
    """A prompt in pieces: `{"text": …}`, `{"image": path}`, `{"audio": path}` in order."""
    voted: str | None = None
    """What most of several sampled answers say; `prediction` stays the greedy one. None: nobody voted."""
    agreement: float | None = None
    """Share of the votes that say so."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it; `voted` and `agreement` are there only where somebody voted."""
        values = asdict(self)
        return values if self.voted is not None else {k: v for k, v in values.items() if k not in _OF_VOTES}


_OF_VOTES = ("voted", "agreement")


@dataclass(frozen=True)
class TaskResult:
    """The scores of one task (keys as in report.json) and the rows that they come from."""

    task: str
    scores: dict[str, Any]
    predictions: list[Prediction] = field(default_factory=list)
    prompt: dict[str, Any] = field(default_factory=dict)
    """What is in front of the rows' prompts: `anchor`, and `shots` with their manifest, number and seed."""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}; choose one of {', '.join(TASKS)}")

    def to_dict(self) -> dict[str, Any]:
        """`{"task", TASK: scores, "prompt", "predictions"}`: the scores lie where report.json has them.

        `prompt` is there only where something is in front of the rows' own.
        """
        prompt = {"prompt": self.prompt} if self.prompt else {}
        predictions = [p.to_dict() for p in self.predictions]
        return {"task": self.task, self.task: self.scores, **prompt, "predictions": predictions}


def save_result(result: TaskResult, path: str | Path) -> Path:
    """Writes a result as JSON; creates the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result.to_dict(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return path


def load_result(path: str | Path) -> TaskResult:
    """Reads what `save_result` wrote.

    Raises:
        ValueError: the file isn't a result of `mmllm eval`.
    """
    path = Path(path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        known = {f.name for f in fields(Prediction)}
        predictions = [Prediction(**{k: v for k, v in p.items() if k in known}) for p in raw["predictions"]]
        return TaskResult(raw["task"], raw[raw["task"]], predictions, raw.get("prompt", {}))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no result of `mmllm eval --json` ({error}); run `mmllm eval` again") from error
