"""What runs with several seeds prove: intervals over seeds and rows, paired tests, samples for an equal score.

Shapes: S seeds, R rows of a test set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

CLAIM_P = 0.05
MIN_SEEDS = 3
"""A claim needs so many."""
_ROUNDING = 1e-9
"""Differences that differ by a smaller share of the scores are equal: what parts them is how floats are rounded."""
Over = Literal["seeds and rows", "seeds", "rows", "nothing"]


class Interval(NamedTuple):
    """A 95% interval of a mean score.

    Attributes:
        low: its lower end.
        high: its upper end.
        over: what it is over, that is, what would be drawn anew.
    """

    low: float
    high: float
    over: Over


def said_p(p: float | None) -> str:
    """A p value as it is printed: three digits, more where it would seem to be 0.05 and is below, and never 0."""
    if p is None:
        return "–"
    if p < 0.0005:
        return "<0.001"
    return f"<{CLAIM_P}" if p < CLAIM_P and f"{p:.3f}" == f"{CLAIM_P:.3f}" else f"{p:.3f}"


def interval_of(
    scores: Sequence[float],
    rows: Sequence[Mapping[str, float]],
    of_rows: Sequence[Sequence[float] | None] = (),
) -> Interval:
    """A 95% interval of the mean score of a training with another seed on other rows.

    It is the root of two half widths' squares: Student's over seeds, and that over rows. Where each run's score is the
    mean of its rows, the latter is of their means over seeds. (A bootstrap of three seeds never leaves the range of
    their scores, which holds the mean three times in four.) Where it is a ratio, such as a word error rate, it is the
    mean of the runs' own, which is right where all seeds err on the same rows, and too wide otherwise. One seed tells
    nothing of seeds: the interval is then over rows; and where rows tell nothing either, over nothing.

    Args:
        scores: of each seed.
        rows: of each seed, a row's part of the score by the row's name; empty where the score is no mean.
        of_rows: of each seed, the interval over rows that the evaluation gave; None: it gave none.
    """
    half_of_rows = _half_of_rows(rows, of_rows)
    low, high = student_interval(scores)
    mean, half_of_seeds = float(np.mean(scores)), (high - low) / 2
    half = math.hypot(half_of_seeds, half_of_rows or 0.0)
    has_seeds = len(scores) > 1
    over: Over = "nothing"
    if half_of_rows is not None:
        over = "seeds and rows" if has_seeds else "rows"
    elif has_seeds:
        over = "seeds"
    return Interval(mean - half, mean + half, over)


def _half_of_rows(rows: Sequence[Mapping[str, float]], of_rows: Sequence[Sequence[float] | None]) -> float | None:
    """Half the width of the interval over rows; None: nothing tells it."""
    widths = [each[1] - each[0] for each in of_rows if each is not None]
    half_given = sum(widths) / len(widths) / 2 if widths and len(widths) == len(of_rows) else None
    names = sorted(set.intersection(*(set(each) for each in rows))) if rows and all(rows) else []
    means_R = np.array([[each[name] for name in names] for each in rows]).mean(axis=0) if names else np.zeros(0)
    if len(means_R) < 2 or not np.ptp(means_R) > 0:  # all wrong, say: no spread, though other rows may be right
        return half_given
    low, high = student_interval(means_R.tolist())
    return (high - low) / 2


def student_interval(scores: Sequence[float]) -> tuple[float, float]:
    """Of a mean, over seeds; with one seed there is none, and both ends are the score."""
    mean = float(np.mean(scores))
    if len(scores) < 2:
        return mean, mean
    half = _student_quantile(len(scores) - 1) * float(np.std(scores, ddof=1)) / math.sqrt(len(scores))
    return mean - half, mean + half


def paired_p(scores: Mapping[int, float], others: Mapping[int, float]) -> float | None:
    """Two-sided p, over the seeds that both have, of no difference: Student's paired t-test.

    None with fewer than two such seeds, or differences without spread: one row more in each seed, say, where the
    floats differ in their last digit alone, proves nothing.
    """
    seeds = sorted(scores.keys() & others.keys())
    differences = np.array([scores[seed] - others[seed] for seed in seeds])
    if len(differences) < 2:
        return None
    largest = max(abs(side[seed]) for side in (scores, others) for seed in seeds)
    if not np.ptp(differences) > _ROUNDING * largest:
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


class Samples(NamedTuple):
    """Where a learning curve reaches a score.

    Attributes:
        count: of samples.
        is_bound: the curve is there at its first point already: it may be fewer.
    """

    count: float
    is_bound: bool


def samples_for(curve: Sequence[tuple[float, float]], target: float, lower_is_better: bool = False) -> Samples | None:
    """Samples from which on a learning curve is at a score, between its points by the logarithm of samples.

    Curves of few seeds are not monotone: a point that is there by luck, before another that isn't, doesn't count.

    Args:
        curve: (samples, score).
        target: the score.
        lower_is_better: scores are errors.

    Returns:
        None where its last point isn't there: nothing is extrapolated.
    """
    sign = -1.0 if lower_is_better else 1.0
    points = [(samples, sign * score) for samples, score in sorted(curve)]
    wanted = sign * target
    below = [place for place, (_, score) in enumerate(points) if score < wanted]
    if not points or (below and below[-1] == len(points) - 1):
        return None
    if not below:
        return Samples(points[0][0], is_bound=True)
    (before, low), (after, high) = points[below[-1] : below[-1] + 2]
    part = (wanted - low) / (high - low)
    return Samples(math.exp(math.log(before) + part * (math.log(after) - math.log(before))), is_bound=False)


Verdict = Literal["baseline", "better", "worse", "unproved"]


def verdict_of(difference: float | None, p_holm: float | None, num_pairs: int, lower_is_better: bool) -> Verdict:
    """What is claimed of a level: to differ from its baseline with an adjusted p below 0.05 over three seeds or more.

    Args:
        difference: from the baseline.
        p_holm: adjusted for all levels that share the baseline and the measure.
        num_pairs: seeds that both have.
        lower_is_better: the score counts errors.
    """
    if difference is None or p_holm is None or p_holm >= CLAIM_P or num_pairs < MIN_SEEDS:
        return "unproved"
    return "better" if (difference < 0) == lower_is_better else "worse"
