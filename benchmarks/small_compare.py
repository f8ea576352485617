"""Two files of `small.py` side by side: differences paired by seed and by row, with p-values.

Over seeds: Student's t-test of the differences, which asks whether other trainings would differ too. Over rows: a test
that flips the signs of rows' differences (each averaged over the seeds that both have), which asks whether other rows
would. A claim needs p < 0.05 over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NUM_FLIPS = 20_000
CLAIM_P = 0.05

Rows = Mapping[tuple[str, str, int], Mapping[str, float]]
"""Of (name, measure, seed): what each held-out row scores."""


@dataclass(frozen=True)
class Comparison:
    """One measure of two files, over the seeds that both have.

    Attributes:
        name: of the run.
        measure: of it.
        seeds: that both have.
        means: of either file.
        difference: the second's mean less the first's.
        p_seeds: of the paired t-test; None with fewer than two seeds, or differences that are all alike.
        p_rows: of the sign flips; None where rows' scores are not there.
        num_rows: rows that both have.
        is_better: the second is; None: neither.
    """

    name: str
    measure: str
    seeds: tuple[int, ...]
    means: tuple[float, float]
    difference: float
    p_seeds: float | None
    p_rows: float | None
    num_rows: int
    is_better: bool | None

    @property
    def verdict(self) -> str:
        """In words."""
        if self.is_better is None:
            return "equal"
        word = "better" if self.is_better else "worse"
        return word if self.p_seeds is not None and self.p_seeds < CLAIM_P else f"{word}, unproved"


def compare(
    first: Sequence[Mapping[str, Any]],
    second: Sequence[Mapping[str, Any]],
    errors: set[str],
    rows: tuple[Rows, Rows] | None = None,
) -> list[Comparison]:
    """Every measure that both files have with a seed in common, in the order of the first.

    Args:
        first: rows of `small.py --json`.
        second: likewise.
        errors: names of measures of which less is better.
        rows: what either file's held-out rows score, where that is there.
    """
    tables = [{(row["name"], row["measure"], row["seed"]): row["score"] for row in file} for file in (first, second)]
    found = []
    for name, measure in dict.fromkeys((row["name"], row["measure"]) for row in first):
        seeds = sorted(seed for n, m, seed in tables[0] if (n, m) == (name, measure) and (n, m, seed) in tables[1])
        if not seeds:
            continue
        scores = [np.array([table[name, measure, seed] for seed in seeds]) for table in tables]
        differences = scores[1] - scores[0]
        by_row = None if rows is None else row_differences(rows, name, measure, seeds)
        change = float(differences.mean())
        is_error = measure.rpartition(": ")[2] in errors
        found.append(
            Comparison(
                name, measure, tuple(seeds), (float(scores[0].mean()), float(scores[1].mean())), change,
                paired_t_test(differences), None if by_row is None else sign_flip_test(by_row),
                0 if by_row is None else len(by_row), None if change == 0 else (change < 0) == is_error,
            )
        )  # fmt: skip
    return found


def row_differences(rows: tuple[Rows, Rows], name: str, measure: str, seeds: Sequence[int]) -> np.ndarray | None:
    """The second's score less the first's of each row that both have, averaged over seeds; None: there is none."""
    gathered: dict[str, list[float]] = {}
    for seed in seeds:
        old, new = (table.get((name, measure, seed), {}) for table in rows)
        for row in old.keys() & new.keys():
            gathered.setdefault(row, []).append(new[row] - old[row])
    if not gathered:
        return None
    return np.array([np.mean(gathered[row]) for row in sorted(gathered)])


# ------------------------------------------------------------------------------------------------------------- p-values
def paired_t_test(differences: np.ndarray) -> float | None:
    """Two-sided p of a mean of zero; None with fewer than two differences, or without spread."""
    count = len(differences)
    if count < 2 or not np.ptp(differences) > 0:
        return None
    t = float(differences.mean() / (differences.std(ddof=1) / math.sqrt(count)))
    return student_two_sided(t, count - 1)


def student_two_sided(t: float, freedom: int) -> float:
    """P(|T| > |t|) of Student's distribution with a whole number of degrees of freedom.

    The finite sums of Abramowitz and Stegun, 26.7.3 (odd) and 26.7.4 (even).
    """
    theta = math.atan(abs(t) / math.sqrt(freedom))
    cosine, sine = math.cos(theta), math.sin(theta)
    term, total = 1.0, 0.0
    if freedom % 2:
        term = cosine
        for power in range(1, freedom - 1, 2):
            total += term
            term *= cosine**2 * (power + 1) / (power + 2)
        inside = 2 / math.pi * (theta + sine * total)
    else:
        for power in range(0, freedom, 2):
            total += term
            term *= cosine**2 * (power + 1) / (power + 2)
        inside = sine * total
    return max(0.0, 1.0 - inside)


def sign_flip_test(differences: np.ndarray, num_flips: int = NUM_FLIPS, seed: int = 0) -> float:
    """Two-sided p of a mean of zero, by flipping signs at random (Fisher's randomization test).

    The unflipped sum counts as one of the flips, so p is never 0.
    """
    values = differences[differences != 0]
    if not len(values):
        return 1.0
    generator = np.random.default_rng(seed)
    observed, at_least = abs(values.sum()) - 1e-12 * np.abs(values).sum(), 1
    for start in range(0, num_flips, 1000):
        signs = generator.choice((-1.0, 1.0), size=(min(1000, num_flips - start), len(values)))
        at_least += int((np.abs(signs @ values) >= observed).sum())
    return at_least / (num_flips + 1)


def table(comparisons: Sequence[Comparison]) -> list[str]:
    """Lines to print."""
    lines = [f"{'name':<12} {'measure':<34} {'seeds':>5} {'first':>9} {'second':>9} {'change':>9} {'p, seeds':>9} "
             f"{'p, rows':>9} {'rows':>6}  verdict"]  # fmt: skip
    for one in comparisons:
        p_seeds, p_rows = (f"{p:.4f}" if p is not None else "–" for p in (one.p_seeds, one.p_rows))
        lines.append(f"{one.name:<12} {one.measure:<34} {len(one.seeds):>5} {one.means[0]:>9.4f} {one.means[1]:>9.4f} "
                     f"{one.difference:>+9.4f} {p_seeds:>9} {p_rows:>9} {one.num_rows or '–':>6}  "
                     f"{one.verdict}")  # fmt: skip
    return lines
