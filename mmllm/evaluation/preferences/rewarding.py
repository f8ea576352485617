"""Labels candidates by a reward: a function from answers and their rows to numbers (`mmllm.evaluation.rewards`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmllm.evaluation.preferences.candidates import CandidateRow, answers_of, moved_prompt
from mmllm.evaluation.preferences.labels import RewardLabel, append_labels, read_labels
from mmllm.evaluation.rewards import Reward, checked

_ROWS_AT_ONCE = 64


def label_by_reward(
    rows: Sequence[CandidateRow],
    folder: Path,
    reward: Reward,
    name: str,
    out: str | Path,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Gives each candidate that has none a label by a reward.

    Args:
        rows: with candidates.
        folder: in which their file lies.
        reward: see `mmllm.evaluation.rewards.load_reward`.
        name: of it, with its settings, by which its labels are told from others.
        out: the file of labels, which is gone on with.
        progress: called with the numbers of rows that are done, and in all.

    Returns:
        How many labels are new.

    Raises:
        ValueError: the reward fails, gives a wrong number of values, or one that is no number.
    """
    by = f"reward {name}"
    known = {
        (label.place, label.candidate)
        for label in read_labels(out, rows)
        if isinstance(label, RewardLabel) and label.by == by
    }
    left = [row for row in rows if any((row.place, n) not in known for n in range(len(row.candidates)))]
    num_new = 0
    for start in range(0, len(left), _ROWS_AT_ONCE):
        group = left[start : start + _ROWS_AT_ONCE]
        answers = [answer for row in group for answer in answers_of(row, folder)]
        owners = [(row, number) for row in group for number in range(len(row.candidates))]
        told = {row.place: rewarded_row(row, folder) for row in group}
        values = checked(name, reward, answers, [told[row.place] for row, _ in owners])
        labels = [
            RewardLabel(row.place, row.digest, by, number, value)
            for (row, number), value in zip(owners, values, strict=True)
        ]
        append_labels(out, labels)
        num_new += len(labels)
        if progress is not None:
            progress(len(rows) - len(left) + start + len(group), len(rows))
    return num_new


def rewarded_row(row: CandidateRow, folder: Path) -> dict[str, Any]:
    """The manifest's keys with the task and the prompt, as rewards take them; their paths are absolute."""

    def absolute(path: str) -> str:
        return str((folder / path).absolute())

    files = {key: absolute(row.row[key]) for key in ("image", "audio") if key in row.row}
    prompt = moved_prompt(row.prompt, absolute)
    return {"id": row.id, **row.row, **files, "task": row.task, "prompt": prompt}
