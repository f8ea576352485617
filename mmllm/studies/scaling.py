"""Fits a scaling law, L(N, D) = E + A / N^alpha + B / D^beta, to trainings of several sizes and lengths.

Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models" (arXiv:2203.15556), approach 3: the Huber loss
(delta 1e-3) of log L is minimized by L-BFGS from a grid of starts, the three terms added in logarithms. The loss is
summed over points, not averaged: of averaged ones L-BFGS believes that it has arrived long before (Besiroglu et al.
2024, arXiv:2404.10102, which also shows how narrow honest intervals are not).

Two things differ. Starts are a grid over alpha, beta and E alone; A and B of each come by least squares. Logarithms of
N and D are taken from their means, so that A and alpha don't go together, and L-BFGS finds its way.

Shapes: P points, R resamples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmllm.studies.scaling_points import Points

DELTA = 1e-3
NAMES = ("E", "A", "B", "alpha", "beta")
_LEAST_POINTS = 6
"""One more than the law has numbers."""
EXPONENTS = (0.01, 3.0)
"""Bounds of alpha and beta."""
_LEAST_DISTINCT = 3
"""Of sizes and of lengths: a power of two values fits any exponent."""
_SAME_COMPUTE = 0.05
"""N·D that differ by less are one budget."""
_SAME_LEVEL = 0.03
"""Sizes, or lengths, whose logarithms differ by less are one: a length is a whole number of steps."""
_SAME_LINE = 0.02
"""Points whose logarithms of N and D lie no farther from a line, in the mean, are on it."""
_TOGETHER = 0.95
"""Correlations of log N and log D above it are told."""
_SHARES = (1e-3, 0.9999)
"""Bounds of E as a share of the smallest loss."""
_WIDE = 0.5
"""An interval wider than this share of its value is told."""
_NARROW_RANGE = 4.0
"""Sizes, or lengths, that differ by a smaller factor are told."""
_OUTLIER = 10.0
"""Errors of so many times the median one are told."""
_FIRST_STEPS, _KEPT_STARTS, _MOST_STEPS = 40, 10, 500
"""Steps of L-BFGS from each start, from how many of them it goes on, and how many steps at most."""
_RESAMPLED_STEPS = 100
"""Of each resample: from the best law on fewer are enough, but where points tell nothing, and none are."""
_ALIKE = 0.01
"""Optima of a loss higher by no more than this share fit alike."""


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: Any, tokens: Any) -> Any:
        """Of sizes and lengths."""
        return self.E + self.A * parameters**-self.alpha + self.B * tokens**-self.beta


@dataclass(frozen=True)
class FitConfig:
    """How a law is fitted.

    Attributes:
        num_resamples: of the bootstrap; 0: no intervals.
        seed: of the bootstrap.
        delta: of the Huber loss.
    """

    num_resamples: int = 200
    seed: int = 0
    delta: float = DELTA

    def __post_init__(self) -> None:
        if self.num_resamples and self.num_resamples < 20:
            raise ValueError(
                f"resamples is {self.num_resamples}, too few for intervals; give 20 or more, or 0 for none"
            )
        if not self.delta > 0:
            raise ValueError(f"delta is {self.delta}; it must be positive")


@dataclass(frozen=True)
class Fit:
    """A law that was fitted.

    Attributes:
        law: the best.
        intervals: 95%, of each of its numbers, by the bootstrap over points.
        warnings: why it is to be doubted.
        ranges: of the points: smallest and largest parameters, tokens and loss.
        num_points: that it was fitted to.
        error: root of the mean squared error of log loss.
    """

    law: Law
    intervals: dict[str, tuple[float, float]]
    warnings: list[str]
    ranges: dict[str, tuple[float, float]]
    num_points: int
    error: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        rest = {"intervals": self.intervals, "warnings": self.warnings, "points": self.num_points}
        return {**vars(self.law), **rest, "error": self.error, "ranges": self.ranges}


# ---- points


def levels(values: Sequence[float] | np.ndarray) -> list[int]:
    """Of sizes or lengths, which number in growing order each is: those that are nearly the same have one."""
    log_P = np.log(np.asarray(values, dtype=float))
    found, level, first = [0] * len(log_P), -1, -math.inf
    for place in np.argsort(log_P):
        if log_P[place] - first > _SAME_LEVEL:
            level, first = level + 1, log_P[place]
        found[place] = level
    return found


def check_points(parameters: Sequence[float] | np.ndarray, tokens: Sequence[float] | np.ndarray) -> None:
    """Refuses sizes and lengths that no law can be told from, before anything is trained or fitted.

    Raises:
        ValueError: there are too few pairs of size and length, sizes or lengths, one budget alone, or N and D are
            powers of each other.
    """
    sizes, lengths = levels(parameters), levels(tokens)
    count, num_pairs = len(sizes), len(set(zip(sizes, lengths, strict=True)))
    if num_pairs < _LEAST_POINTS:
        pairs = "" if num_pairs == count else f" of {num_pairs} different pairs of size and number of tokens"
        raise ValueError(f"{count} points{pairs} can't tell a law of 5 numbers; give {_LEAST_POINTS} pairs or more")
    for name, found in (("sizes", sizes), ("numbers of tokens", lengths)):
        distinct = len(set(found))
        if distinct < _LEAST_DISTINCT:
            raise ValueError(
                f"the points have {distinct} different {name}, from which no exponent can be told; give "
                f"{_LEAST_DISTINCT} or more"
            )
    log_2P = np.log(np.array([parameters, tokens], dtype=float))
    compute = log_2P.sum(axis=0)
    if compute.max() - compute.min() < _SAME_COMPUTE:
        raise ValueError(
            "all points have one budget of compute (N·D), from which no law can be told; vary it, tenfold at least"
        )
    spread_2, directions_22 = np.linalg.eigh(np.cov(log_2P, bias=True))
    if math.sqrt(max(float(spread_2[0]), 0.0)) < _SAME_LINE:
        slope = float(directions_22[1, 1] / directions_22[0, 1])
        raise ValueError(
            f"tokens are a power of the size in all points (D ~ N^{slope:.2f}), so that A and alpha can't be told from "
            f"B and beta; train each size on several numbers of tokens"
        )


# ---- the fit


def fit_law(points: Points, config: FitConfig | None = None) -> Fit:
    """Fits the law.

    Raises:
        ValueError: the points can't tell a law; see `check_points`.
        ModuleNotFoundError: scipy isn't installed.
    """
    _scipy()
    config = config or FitConfig()
    check_points(points.parameters_P, points.tokens_P)
    optima = _optima(points, config.delta)
    (value, best), *others = optima
    law = best.law
    warnings = _doubts(points, best)
    alike = [other for other_value, other in others if other_value <= value * (1 + _ALIKE) and _differs(law, other.law)]
    if alike:
        other = alike[0].law
        warnings.append(
            f"another law fits as well: E {other.E:.4g}, alpha {other.alpha:.3g}, beta {other.beta:.3g}; the points "
            f"can't tell them apart"
        )
    intervals = _intervals(points, best, config)
    for name, (low, high) in intervals.items():
        middle = getattr(law, name)
        if name in ("E", "alpha", "beta") and high - low > _WIDE * middle:
            warnings.append(
                f"{name} is {middle:.4g}, but anything from {low:.4g} to {high:.4g} is likely: more points, or wider "
                f"ranges of them, are needed"
            )
    errors_P = np.log(law.loss(points.parameters_P, points.tokens_P)) - np.log(points.loss_P)
    far = np.abs(errors_P) > _OUTLIER * max(float(np.median(np.abs(errors_P))), 1e-4)
    if far.any():
        place = int(np.argmax(np.abs(errors_P)))
        warnings.append(
            f"{int(far.sum())} points lie far from the law, most of all {points.parameters_P[place]:.3g} parameters "
            f"with {points.tokens_P[place]:.3g} tokens, by {-errors_P[place]:+.1%}: look at their trainings"
        )
    columns = {"parameters": points.parameters_P, "tokens": points.tokens_P, "loss": points.loss_P}
    ranges = {name: (float(values.min()), float(values.max())) for name, values in columns.items()}
    return Fit(law, intervals, warnings, ranges, len(points), float(np.sqrt(np.mean(errors_P**2))))


@dataclass(frozen=True)
class _State:
    """A law as L-BFGS has it: logarithms of A, B and E at the means of log N and log D, and the exponents."""

    values: np.ndarray
    means: tuple[float, float]
    largest_e: float
    """Upper bound of log E."""

    @property
    def law(self) -> Law:
        a, b, e, alpha, beta = map(float, self.values)
        return Law(math.exp(e), math.exp(a + alpha * self.means[0]), math.exp(b + beta * self.means[1]), alpha, beta)


def huber_sum(values: np.ndarray, log_n_P: np.ndarray, log_d_P: np.ndarray, log_loss_P: np.ndarray, delta: float
              ) -> tuple[float, np.ndarray]:  # fmt: skip
    """The summed Huber loss of log L, and its gradient.

    Args:
        values: a, b, e, alpha, beta: log L = log(exp(a - alpha log N) + exp(b - beta log D) + exp(e)).
        log_n_P: log N.
        log_d_P: log D.
        log_loss_P: log L.
        delta: of the Huber loss.
    """
    a, b, e, alpha, beta = values
    terms_3P = np.stack([a - alpha * log_n_P, b - beta * log_d_P, np.full_like(log_n_P, e)])
    most_P = terms_3P.max(axis=0)
    powers_3P = np.exp(terms_3P - most_P)
    total_P = powers_3P.sum(axis=0)
    error_P = most_P + np.log(total_P) - log_loss_P
    size_P = np.abs(error_P)
    losses_P = np.where(size_P <= delta, 0.5 * error_P**2, delta * (size_P - 0.5 * delta))
    slope_3P = np.clip(error_P, -delta, delta) * powers_3P / total_P
    of_a, of_b, of_e = slope_3P.sum(axis=1)
    gradient = np.array([of_a, of_b, of_e, -(slope_3P[0] * log_n_P).sum(), -(slope_3P[1] * log_d_P).sum()])
    return float(losses_P.sum()), gradient


def _optima(points: Points, delta: float) -> list[tuple[float, _State]]:
    """What L-BFGS finds from a grid of starts, the best first: some steps from each, and to the end from the best."""
    log_n_P, log_d_P = np.log(points.parameters_P), np.log(points.tokens_P)
    means = float(log_n_P.mean()), float(log_d_P.mean())
    largest_e = math.log(points.loss_P.min())
    starts = (_State(start, means, largest_e) for start in _starts(points, means))
    first = sorted((_descend(start, points, delta, _FIRST_STEPS) for start in starts), key=lambda each: each[0])
    found = [_descend(state, points, delta) for _, state in first[:_KEPT_STARTS]]
    return sorted(found, key=lambda each: each[0])


def _starts(points: Points, means: tuple[float, float]) -> list[np.ndarray]:
    """A grid over alpha, beta and E; A and B are those of least squares of L - E, neither below nothing."""
    x_P, y_P = np.log(points.parameters_P) - means[0], np.log(points.tokens_P) - means[1]
    starts = []
    smallest = float(points.loss_P.min())
    for alpha, beta, share in itertools.product(
        (0.1, 0.3, 0.5, 0.8, 1.2), (0.1, 0.3, 0.5, 0.8, 1.2), (0.1, 0.5, 0.8, 0.95)
    ):
        columns_P2 = np.stack([np.exp(-alpha * x_P), np.exp(-beta * y_P)], axis=1)
        rest_P = points.loss_P - share * smallest
        factors, *_ = np.linalg.lstsq(columns_P2, rest_P, rcond=None)
        least = 1e-3 * float(rest_P.mean())
        a, b = np.log(np.maximum(factors, least))
        starts.append(np.array([a, b, math.log(share * smallest), alpha, beta]))
    return starts


def _descend(start: _State, points: Points, delta: float, num_steps: int = _MOST_STEPS) -> tuple[float, _State]:
    """L-BFGS within bounds from a start."""
    optimize = _scipy()
    log_n_P = np.log(points.parameters_P) - start.means[0]
    log_d_P = np.log(points.tokens_P) - start.means[1]
    log_loss_P = np.log(points.loss_P)
    bounds = [
        (-30, 30),
        (-30, 30),
        tuple(start.largest_e + math.log(share) for share in _SHARES),
        EXPONENTS,
        EXPONENTS,
    ]
    values = start.values
    for _ in range(3):  # begun anew where it stopped: its memory of curvature may be what stopped it
        result = optimize.minimize(
            huber_sum, values, (log_n_P, log_d_P, log_loss_P, delta), "L-BFGS-B", jac=True, bounds=bounds,
            options={"maxiter": num_steps, "maxfun": 2 * num_steps, "ftol": 1e-14, "gtol": 1e-10, "maxcor": 20},
        )  # fmt: skip
        is_done = num_steps < _MOST_STEPS or np.allclose(result.x, values, rtol=1e-6)
        values = result.x
        if is_done:
            break
    return float(result.fun), _State(values, start.means, start.largest_e)


def _intervals(points: Points, best: _State, config: FitConfig) -> dict[str, tuple[float, float]]:
    """The bootstrap over points: each resample is fitted from the best law on."""
    if not config.num_resamples:
        return {}
    rng = np.random.default_rng(config.seed)
    laws = []
    while len(laws) < config.num_resamples:
        sample = points.pick(rng.integers(0, len(points), len(points)))
        if min(len(np.unique(sample.parameters_P)), len(np.unique(sample.tokens_P))) < 2:
            continue  # no law has anything to say of it
        largest_e = math.log(sample.loss_P.min())
        values = best.values.copy()
        values[2] = min(values[2], largest_e + math.log(_SHARES[1]))
        state = _State(values, best.means, largest_e)
        laws.append(vars(_descend(state, sample, config.delta, _RESAMPLED_STEPS)[1].law))
    return {
        name: (float(np.percentile([law[name] for law in laws], 2.5)),
               float(np.percentile([law[name] for law in laws], 97.5)))
        for name in NAMES
    }  # fmt: skip


def _doubts(points: Points, best: _State) -> list[str]:
    """What of the points and the optimum is not as it should be."""
    warnings = []
    for name, value in (("alpha", best.values[3]), ("beta", best.values[4])):
        if any(math.isclose(value, bound, rel_tol=1e-3) for bound in EXPONENTS):
            warnings.append(f"{name} is {value:.3g}, at its bound: the points don't tell it")
    low, high = (best.largest_e + math.log(share) for share in _SHARES)
    if best.values[2] <= low + 1e-6:
        warnings.append(
            "E is at its lower bound, nearly 0: the points are too far from what can't be learnt to tell it"
        )
    if best.values[2] >= high - 1e-6:
        warnings.append("E is as large as the smallest loss: the points don't tell how far it could fall")
    for name, values in (("sizes", points.parameters_P), ("numbers of tokens", points.tokens_P)):
        factor = values.max() / values.min()
        if factor < _NARROW_RANGE:
            warnings.append(
                f"the {name} differ by a factor of {factor:.3g} at most; exponents of so little are guesses"
            )
    together = float(np.corrcoef(np.log(points.parameters_P), np.log(points.tokens_P))[0, 1])
    if abs(together) > _TOGETHER:
        warnings.append(
            f"tokens go with sizes (the correlation of log N and log D is {together:.3f}), so that A and alpha are "
            f"hardly told from B and beta: train each size on several numbers of tokens"
        )
    return warnings


def _differs(law: Law, other: Law) -> bool:
    return any(
        abs(getattr(law, name) - getattr(other, name)) > 0.1 * getattr(law, name) for name in ("E", "alpha", "beta")
    )


def _scipy() -> Any:
    try:
        from scipy import optimize
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("fitting a scaling law needs scipy: pip install 'mmllm[studies]'") from error
    return optimize
