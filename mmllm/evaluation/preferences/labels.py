"""What is said of candidates: rewards, and which of two is better. One JSON object a line, appended at once.

A file of labels may hold those of several labellers; each is told by its name. Of the same thing the last label counts.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mmllm.evaluation.preferences.candidates import CandidateRow

Choice = Literal["first", "second", "tie", "skip"]
HAND = "hand"


@dataclass(frozen=True)
class RewardLabel:
    """A number that a candidate has.

    Attributes:
        place: of the row in the file of candidates.
        digest: of the row, so that labels of other candidates are never taken for these.
        by: who says so, such as "reward caption_attributes".
        candidate: its number.
        reward: more is better.
    """

    place: int
    digest: str
    by: str
    candidate: int
    reward: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return vars(self)


@dataclass(frozen=True)
class Comparison:
    """Which of two candidates is better.

    Attributes:
        place: of the row in the file of candidates.
        digest: of the row.
        by: who says so: "hand", or "judge NAME".
        first: number of a candidate, the smaller one of the two.
        second: of the other.
        choice: the better one, a tie, or none (skip).
        note: why it is no choice; None: nothing is to be said.
    """

    place: int
    digest: str
    by: str
    first: int
    second: int
    choice: Choice
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {key: value for key, value in vars(self).items() if value is not None}


Label = RewardLabel | Comparison


def labels_path(candidates: str | Path) -> Path:
    """Where the labels of a file of candidates lie unless it is told: `answers.labels.jsonl` of `answers.jsonl`."""
    return Path(candidates).with_suffix(".labels.jsonl")


def read_labels(path: str | Path, rows: Sequence[CandidateRow]) -> list[Label]:
    """The labels of these candidates, of each thing the last one.

    A last line that was cut off, as a process that is killed leaves it, is no label.

    Raises:
        ValueError: a line is no label, or is of other candidates.
    """
    path = Path(path)
    if not path.exists():
        return []
    by_place = {row.place: row for row in rows}
    found: dict[Any, Label] = {}
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        label = _label(line, f"{path.name}:{number}", by_place)
        key = label.candidate if isinstance(label, RewardLabel) else (label.first, label.second)
        found[label.by, label.place, key] = label
    return list(found.values())


def _label(line: bytes, where: str, rows: dict[int, CandidateRow]) -> Label:
    try:
        value = json.loads(line)
        label = RewardLabel(**value) if "reward" in value else Comparison(**value)
        numbers = [label.candidate] if isinstance(label, RewardLabel) else [label.first, label.second]
        if not all(isinstance(number, int) for number in (label.place, *numbers)):
            raise TypeError("its place and its candidates must be whole numbers")
        if not isinstance(label.by, str):
            raise TypeError(f"by is {label.by!r}; wanted a name")
        reward = label.reward if isinstance(label, RewardLabel) else 0.0
        if not isinstance(reward, int | float) or not abs(reward) <= sys.float_info.max:
            raise TypeError(f"its reward is {reward!r}; wanted a finite number")
    except (TypeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is no label ({error}); mend the line, or remove it") from None
    row = rows.get(label.place)
    if row is None or row.digest != label.digest:
        raise ValueError(
            f"{where} is of other candidates than row {label.place + 1} has now; they were drawn anew: label them anew"
        )
    if not all(0 <= number < len(row.candidates) for number in numbers):
        raise ValueError(
            f"{where} names candidate {max(numbers)} of row {label.place + 1}, {len(row.candidates)} exist"
        )
    if isinstance(label, Comparison) and label.choice not in get_args(Choice):
        raise ValueError(f"{where}: the choice is {label.choice!r}; wanted one of {', '.join(get_args(Choice))}")
    return label


def append_labels(path: str | Path, labels: Iterable[Label]) -> None:
    """Appends labels and waits until they are on the disk; what an earlier process left half written goes first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as stream:
        stream.seek(0)
        before = stream.read()
        if before and not before.endswith(b"\n"):
            stream.truncate(before.rfind(b"\n") + 1)
        stream.write("".join(json.dumps(label.to_dict(), ensure_ascii=False) + "\n" for label in labels).encode())
        stream.flush()
        os.fsync(stream.fileno())


@dataclass(frozen=True)
class Question:
    """Two candidates of a row that are to be compared; `is_swapped`: the second one is shown first."""

    row: CandidateRow
    first: int
    second: int
    is_swapped: bool

    @property
    def key(self) -> tuple[int, int, int]:
        """What tells it from others."""
        return self.row.place, self.first, self.second

    def label(self, by: str, choice: Choice, note: str | None = None) -> Comparison:
        """Its answer; the choice is between `first` and `second`, however they were shown."""
        return Comparison(self.row.place, self.row.digest, by, self.first, self.second, choice, note)


def questions(rows: Sequence[CandidateRow], pairs_per_row: int, seed: int = 0) -> list[Question]:
    """Which candidates are to be compared: so many pairs a row, a pair of every row before the second of any.

    Which pairs, and which candidate is shown first, is left to chance, by the seed and the row alone.

    Raises:
        ValueError: no row has two candidates.
    """
    if pairs_per_row < 1:
        raise ValueError(f"pairs_per_row is {pairs_per_row}; it must be at least 1")
    rounds: list[list[Question]] = [[] for _ in range(pairs_per_row)]
    for row in rows:
        chance = random.Random(f"{seed} {row.place} {row.digest}")
        count = len(row.candidates)
        pairs = [(first, second) for second in range(count) for first in range(second)]
        for number, (first, second) in enumerate(chance.sample(pairs, min(pairs_per_row, len(pairs)))):
            rounds[number].append(Question(row, first, second, chance.random() < 0.5))
    asked = [question for one in rounds for question in one]
    if not asked:
        raise ValueError(
            f"none of {len(rows)} rows has two different candidates, so there is nothing to compare; draw more, or at "
            f"a higher temperature"
        )
    return asked
