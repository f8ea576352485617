"""Candidates that a model drew for the rows of a manifest: JSON, a row a line, with what they were drawn for.

Shapes: K codebooks, F frames, T samples.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from mmllm.evaluation.rewards import Answer

TASKS = ("caption", "chat", "question", "transcribe", "speak")


@dataclass(frozen=True)
class Candidate:
    """An answer that was drawn, once or several times.

    Attributes:
        text: that was written; of speech the text that is said.
        num_tokens: that were drawn, the end included; of speech its frames.
        logprob: of all of them together under the model at temperature 1, in nats; None: not known.
        count: how often it was drawn.
        is_whole: False: it ran into its bound before its end.
        codes: of speech: a `.npz` of its codes, relative to the file of candidates.
        sound: of speech: the same as sound, a `.wav`.
    """

    text: str
    num_tokens: int
    logprob: float | None = None
    count: int = 1
    is_whole: bool = True
    codes: str | None = None
    sound: str | None = None


@dataclass(frozen=True)
class CandidateRow:
    """A row of a manifest with its candidates, all of them different.

    Attributes:
        id: of the row.
        task: for which they were drawn.
        prompt: as messages in TRL's form; paths are relative to the file of candidates.
        candidates: in the order in which they were first drawn.
        row: the manifest's own keys, which rewards look at.
        error: why the row has no candidates; None: it has.
        place: number of its line in the file, from 0.
        digest: CRC-32 of its line, which labels carry.
    """

    id: str
    task: str
    prompt: list[dict[str, Any]]
    candidates: tuple[Candidate, ...]
    row: dict[str, Any]
    error: str | None = None
    place: int = 0
    digest: str = ""

    @property
    def num_drawn(self) -> int:
        """Answers that were drawn, equal ones counted each time."""
        return sum(candidate.count for candidate in self.candidates)

    def to_line(self) -> str:
        """As a line of the file."""
        value = {
            "id": self.id,
            "task": self.task,
            "prompt": self.prompt,
            "candidates": [_without_none(asdict(candidate)) for candidate in self.candidates],
            "row": self.row,
        }
        return json.dumps(value if self.error is None else {**value, "error": self.error}, ensure_ascii=False) + "\n"

    @classmethod
    def from_line(cls, line: bytes, place: int, name: str) -> CandidateRow:
        """The inverse of `to_line`.

        Raises:
            ValueError: the line is of another form; the message says what it lacks.
        """
        where = f"{name}:{place + 1}"
        try:
            value = json.loads(line)
            known = {field.name for field in fields(Candidate)}
            candidates = []
            for number, one in enumerate(value["candidates"]):
                if unknown := set(one) - known:
                    raise ValueError(f"{where}: candidate {number} has the unknown key {min(unknown)!r}")
                candidates.append(Candidate(**one))
                if not isinstance(candidates[-1].text, str):
                    raise TypeError(f"the text of candidate {number} is {candidates[-1].text!r}")
            task, prompt, row = value["task"], value["prompt"], value["row"]
            if task not in TASKS:
                raise ValueError(f"{where}: the task is {task!r}; wanted one of {', '.join(TASKS)}")
            if not isinstance(row, dict) or not isinstance(prompt, list):
                raise TypeError(f"its row is {type(row).__name__}, its prompt {type(prompt).__name__}")
            for message in prompt:
                for part in message["content"] if isinstance(message["content"], list) else ():
                    if not isinstance(part[part["type"]], str):
                        raise TypeError(f"a part of its prompt is {part!r}")
            wrong = next((key for key in ("image", "audio") if not isinstance(row.get(key, ""), str)), None)
            if wrong is not None:
                raise TypeError(f"its {wrong} is {row[wrong]!r}")
            return cls(
                value["id"], task, prompt, tuple(candidates), row, value.get("error"), place,
                f"{zlib.crc32(line.strip()):08x}",
            )  # fmt: skip
        except (
            KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError,
        ) as error:  # fmt: skip
            raise ValueError(
                f"{where} is no row of candidates ({type(error).__name__}: {error}); give the file that "
                f"`mmllm prefer sample` wrote"
            ) from None


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def read_candidates(path: str | Path) -> list[CandidateRow]:
    """All rows of a file of candidates, those without any left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or nothing.
    """
    path = Path(path)
    lines = path.read_bytes().splitlines()
    rows = [CandidateRow.from_line(line, place, path.name) for place, line in enumerate(lines)]
    rows = [row for row in rows if row.error is None]
    if not rows:
        raise ValueError(f"{path} holds no candidates; draw some: mmllm prefer sample … --out {path}")
    return rows


@dataclass(frozen=True)
class SpokenCandidate:
    """A candidate of speech as rewards take it (`mmllm.evaluation.rewards.SpokenAnswer`)."""

    text: str
    codes_KF: Tensor
    wave_T: Tensor
    sample_rate: int


def answers_of(row: CandidateRow, folder: Path) -> list[Answer]:
    """A row's candidates as rewards take them: texts, or of speech their codes and sound.

    Args:
        row: with its candidates.
        folder: in which the file of candidates lies.

    Raises:
        FileNotFoundError: a file of speech is gone.
    """
    if row.task != "speak":
        return [candidate.text for candidate in row.candidates]
    return [_spoken(candidate, folder, row) for candidate in row.candidates]


def _spoken(candidate: Candidate, folder: Path, row: CandidateRow) -> SpokenCandidate:
    if candidate.codes is None or candidate.sound is None:
        raise ValueError(f"line {row.place + 1} ({row.id}): a candidate of speech has no codes or no sound; draw again")
    with np.load(folder / candidate.codes, allow_pickle=False) as arrays:
        codes_KF = torch.from_numpy(arrays["codes"].astype(np.int64))
    samples_T, rate = soundfile.read(folder / candidate.sound, dtype="float32")
    return SpokenCandidate(candidate.text, codes_KF, torch.from_numpy(samples_T), rate)


def moved_prompt(prompt: Sequence[dict[str, Any]], move: Callable[[str], str]) -> list[dict[str, Any]]:
    """A prompt whose pictures and sounds have other paths: those that `move` gives for them."""
    moved = []
    for message in prompt:
        content = message["content"]
        if not isinstance(content, str):
            content = [
                part if part["type"] == "text" else {**part, part["type"]: move(part[part["type"]])} for part in content
            ]
        moved.append({**message, "content": content})
    return moved
