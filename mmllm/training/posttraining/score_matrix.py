"""Tasks learnt one after the other: the matrix of their scores, and what is read off it.

R[i, j] is the score on task j after task i was learnt, higher is better; row 0 is the start, before any. With T tasks:

- average accuracy     1/T · Σⱼ R[T, j]
- backward transfer    1/(T−1) · Σ_{j<T} R[T, j] − R[j, j]
- forward transfer     1/(T−1) · Σ_{j>1} R[j−1, j] − b[j]
- forgetting           1/(T−1) · Σ_{j<T} max_{1≤l<T} R[l, j] − R[T, j]

The first three are of Lopez-Paz & Ranzato 2017 (https://arxiv.org/abs/1706.08840), the last of Chaudhry et al. 2018
(https://arxiv.org/abs/1801.10112).

b is the score before anything was learnt: theirs is that of random weights, ours row 0, since a training here goes on
from a model. Columns behind the T tasks are of what is never trained: how far they fall from row 0 is `points_lost`.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

INK_BELOW = 0.45
"""Scores from here on are written in white on their colour."""


@dataclass(frozen=True)
class ScoreMatrix:
    """Scores of tasks while they are learnt.

    Attributes:
        tasks: names of those that are learnt, in order.
        also: names of those that are scored beside them.
        rows: row 0, then one for each task that was learnt so far; a score for each task, then for each of `also`.
    """

    tasks: tuple[str, ...]
    also: tuple[str, ...] = ()
    rows: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        width = len(self.tasks) + len(self.also)
        if not 1 <= len(self.rows) <= len(self.tasks) + 1 or any(len(row) != width for row in self.rows):
            raise ValueError(
                f"{len(self.tasks)} tasks and {len(self.also)} others have {len(self.tasks) + 1} rows of {width} "
                f"scores, and {[len(row) for row in self.rows]} are given"
            )

    @property
    def num_learnt(self) -> int:
        """Tasks that were learnt so far."""
        return len(self.rows) - 1

    @property
    def average(self) -> float | None:
        """Mean over the tasks that were learnt; None: none was yet."""
        return None if not self.num_learnt else float(np.mean(self.rows[-1][: self.num_learnt]))

    @property
    def backward_transfer(self) -> float | None:
        """What later tasks did to earlier ones since each was learnt; below 0: they were forgotten. None: one task."""
        changes = [self.rows[-1][j] - self.rows[j + 1][j] for j in range(self.num_learnt - 1)]
        return float(np.mean(changes)) if changes else None

    @property
    def forward_transfer(self) -> float | None:
        """What earlier tasks did to later ones before each was learnt. None: one task."""
        changes = [self.rows[j][j] - self.rows[0][j] for j in range(1, self.num_learnt)]
        return float(np.mean(changes)) if changes else None

    @property
    def forgetting(self) -> float | None:
        """How far earlier tasks lie below their best since training began. None: one task."""
        best = [max(row[j] for row in self.rows[1:-1]) for j in range(self.num_learnt - 1)]
        return float(np.mean([best[j] - self.rows[-1][j] for j in range(len(best))])) if best else None

    @property
    def points_lost(self) -> dict[str, float]:
        """Of what is never trained, by name: points of 100 that the last row lies below row 0."""
        first = len(self.tasks)
        return {
            name: 100 * (self.rows[0][first + n] - self.rows[-1][first + n]) for n, name in enumerate(self.also)
        }  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
        names = ["start", *self.tasks[: self.num_learnt]]
        return {
            "tasks": list(self.tasks),
            "also": list(self.also),
            "matrix": [{"after": name, "scores": list(row)} for name, row in zip(names, self.rows, strict=True)],
            "average": self.average,
            "backward_transfer": self.backward_transfer,
            "forward_transfer": self.forward_transfer,
            "forgetting": self.forgetting,
            "points_lost": self.points_lost,
        }


def as_lines(matrix: ScoreMatrix) -> list[str]:
    """The matrix and its measures as a terminal shows them."""
    names = [*matrix.tasks, *matrix.also]
    after = ["start", *matrix.tasks[: matrix.num_learnt]]
    widths = [max(7, len(name)) for name in names]
    first = max(len(name) for name in ("after", *after))
    lines = ["  ".join([f"{'after':<{first}}", *(f"{name:>{w}}" for name, w in zip(names, widths, strict=True))])]
    for name, row in zip(after, matrix.rows, strict=True):
        shown = (f"{score:>{w}.3f}" for score, w in zip(row, widths, strict=True))
        lines.append("  ".join([f"{name:<{first}}", *shown]))
    for name, value in _measures(matrix):
        lines.append(f"{name}: {value}")
    return lines


def as_page(matrix: ScoreMatrix, title: str) -> str:
    """The matrix as a page of HTML, which needs nothing else."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in [*matrix.tasks, *matrix.also])
    body = []
    for number, row in enumerate(matrix.rows):
        name = "start" if not number else matrix.tasks[number - 1]
        cells = [_cell(score, is_own=place == number - 1) for place, score in enumerate(row)]
        body.append(f"<tr><th>{html.escape(name)}</th>{''.join(cells)}</tr>")
    told = "".join(f"<tr><th>{html.escape(name)}</th><td>{value}</td></tr>" for name, value in _measures(matrix))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1>"
        f"<p>Each row: the scores after a task was learnt. Each column: a task; framed where it was the one learnt.</p>"
        f'<div class="wide"><table class="matrix"><tr><th>after</th>{head}</tr>{"".join(body)}</table></div>'
        f"<table>{told}</table></html>\n"
    )


def _measures(matrix: ScoreMatrix) -> Sequence[tuple[str, str]]:
    values = {
        "average accuracy": matrix.average,
        "backward transfer": matrix.backward_transfer,
        "forward transfer": matrix.forward_transfer,
        "forgetting": matrix.forgetting,
    }
    told = [(name, f"{value:.3f}") for name, value in values.items() if value is not None]
    return [*told, *((f"{name}, points lost", f"{points:.1f}") for name, points in matrix.points_lost.items())]


def _cell(score: float, is_own: bool) -> str:
    share = min(max(score, 0.0), 1.0)
    ink = "#fff" if share > INK_BELOW else "#222"
    own = ' class="own"' if is_own else ""
    return f'<td{own} style="background:rgba(37,99,168,{share:.2f});color:{ink}">{score:.3f}</td>'


_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;color:#222}"
    "h1{font-size:1.4rem}.wide{overflow-x:auto}table{border-collapse:collapse;margin:1rem 0}"
    "th,td{padding:.35rem .7rem;text-align:right;font-variant-numeric:tabular-nums}th{font-weight:600;text-align:left}"
    ".matrix td{border:2px solid #fff;text-align:center}.matrix td.own{border:2px solid #c2571a}"
)
