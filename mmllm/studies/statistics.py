"""What runs with several seeds prove: intervals over seeds and rows, paired tests, samples for an equal score.

Shapes: S seeds, R rows of a test set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

CLAIM_P = 0.05
MIN_SEEDS = 3
"""A claim needs so many."""


def said_p(p: float | None) -> str:
    """A p value as it is printed: three digits, and never 0."""
    return "–" if p is None else "<0.001" if p < 0.0005 else f"{p:.3f}"


def interval_of(scores: Sequence[float], rows: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """A 95% interval of the mean score of a training with another seed on other rows.

    Where each run's score is the mean of its rows, it is the root of two half widths' squares: Student's over seeds,
    and that over rows of their means over seeds. (A bootstrap of three seeds never leaves the range of their scores,
    which holds the mean three times in four.) Otherwise, or with rows that differ, it is over seeds alone. One seed
    tells nothing of seeds: the interval is then over rows.

    Args:
        scores: of each seed.
        rows: of each seed, a row's part of the score by the row's name; empty where the score is no mean.
    """
    names = sorted(set.intersection(*(set(each) for each in rows))) if rows and all(rows) else []
    if not names:
        return student_interval(scores)
    table_SR = np.array([[each[name] for name in names] for each in rows])
    mean, (low, high) = float(table_SR.mean()), student_interval(table_SR.mean(axis=1).tolist())
    over_rows = student_interval(table_SR.mean(axis=0).tolist())
    half = math.hypot(high - low, over_rows[1] - over_rows[0]) / 2
    return mean - half, mean + half


def student_interval(scores: Sequence[float]) -> tuple[float, float]:
    """Of a mean, over seeds; with one seed there is none, and both ends are the score."""
    mean = float(np.mean(scores))
    if len(scores) < 2:
        return mean, mean
    half = _student_quantile(len(scores) - 1) * float(np.std(scores, ddof=1)) / math.sqrt(len(scores))
    return mean - half, mean + half


def paired_p(scores: Mapping[int, float], others: Mapping[int, float]) -> float | None:
    """Two-sided p, over the seeds that both have, of no difference: Student's paired t-test.

    None with fewer than two such seeds, or differences without spread.
    """
    seeds = sorted(scores.keys() & others.keys())
    differences = np.array([scores[seed] - others[seed] for seed in seeds])
    if len(differences) < 2 or not np.ptp(differences) > 0:
        return None
    return float(_stats().ttest_1samp(differences, 0.0).pvalue)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjustment of several p values, of which none below 0.05 is by chance in 19 of 20 such families.

    Sture Holm, 1979. None stays, and counts as no test.
    """
    found: list[float | None] = list(values)
    tested = sorted((p, place) for place, p in enumerate(values) if p is not None)
    highest = 0.0
    for rank, (p, place) in enumerate(tested):
        highest = max(highest, min(1.0, p * (len(tested) - rank)))
        found[place] = highest
    return found


def said_chance(tests: Sequence[float | None]) -> str:
    """How many of so many tests would be below 0.05 where nothing differs."""
    count = sum(p is not None for p in tests)
    if not count:
        return "no tests"
    tests_told = f"{count} test{'s' * (count > 1)}"
    return f"{tests_told}, of which {count * CLAIM_P:.1f} would have p < {CLAIM_P} by chance if nothing differed"


def _student_quantile(freedom: int) -> float:
    return float(_stats().t.ppf(0.975, freedom))


def _stats() -> Any:
    try:
        from scipy import stats
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a study's tests need scipy; pip install 'mmllm[studies]'") from error
    return stats


def samples_for(curve: Sequence[tuple[float, float]], target: float, lower_is_better: bool = False) -> float | None:
    """Samples at which a learning curve first reaches a score, between its points by the logarithm of samples.

    Args:
        curve: (samples, score).
        target: the score.
        lower_is_better: scores are errors.

    Returns:
        None where it never does: nothing is extrapolated. At its first point already: that point's samples, so that
        the truth may be fewer.
    """
    sign = -1.0 if lower_is_better else 1.0
    points = [(samples, sign * score) for samples, score in sorted(curve)]
    wanted = sign * target
    if not points:
        return None
    if points[0][1] >= wanted:
        return points[0][0]
    for (before, low), (after, high) in pairwise(points):
        if high >= wanted:
            part = (wanted - low) / (high - low)
            return math.exp(math.log(before) + part * (math.log(after) - math.log(before)))
    return None
