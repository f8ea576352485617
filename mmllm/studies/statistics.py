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
NUM_DRAWS = 2000
MIN_SEEDS = 3
"""A claim needs so many."""


def interval_of(scores: Sequence[float], rows: Sequence[Mapping[str, float]], seed: int = 0) -> tuple[float, float]:
    """A 95% interval of the mean score of a training with another seed on other rows.

    Where each run's score is the mean of its rows, seeds and rows are drawn anew together (both with replacement, the
    rows alike for all seeds). Otherwise, or with rows that differ, it is Student's interval over seeds alone. One seed
    tells nothing of seeds: the interval is then over rows.

    Args:
        scores: of each seed.
        rows: of each seed, a row's part of the score by the row's name; empty where the score is no mean.
        seed: of the draws.
    """
    names = sorted(set.intersection(*(set(each) for each in rows))) if rows and all(rows) else []
    if not names:
        return student_interval(scores)
    table_SR = np.array([[each[name] for name in names] for each in rows])
    generator = np.random.default_rng(seed)
    means = []
    for _ in range(NUM_DRAWS):
        seeds = generator.integers(len(table_SR), size=len(table_SR))
        places = generator.integers(len(names), size=len(names))
        means.append(table_SR[np.ix_(seeds, places)].mean())
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


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
