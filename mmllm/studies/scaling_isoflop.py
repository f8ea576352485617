"""IsoFLOP fits: at each budget of compute the best size, and how it grows with the budget.

Hoffmann et al. 2022 (arXiv:2203.15556), approach 2: of each budget a parabola in log N through the losses, whose lowest
point is the best size; lines through the logarithms of these give N ~ C^a and D ~ C^b. C is 6·N·D.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mmllm.studies.scaling_points import Points

FLOPS_A_TOKEN = 6
"""Of training, for each parameter: 2 forward, 4 backward."""
_SAME_BUDGET = 0.1
"""Budgets whose logarithms differ by less are one."""
_LEAST_SIZES = 3


@dataclass(frozen=True)
class Curve:
    """The losses of one budget.

    Attributes:
        flops: 6·N·D, in the mean.
        parameters: the best size.
        tokens: that the budget has for it.
        loss: there.
        is_inside: whether the best size is among those that were tried; else the parabola only points to it.
    """

    flops: float
    parameters: float
    tokens: float
    loss: float
    is_inside: bool


def isoflop_fit(points: Points) -> dict[str, Any] | None:
    """The best sizes of all budgets that have three sizes or more; None: fewer than two budgets have them.

    Returns:
        `curves`; `parameters` and `tokens`, each with the `exponent` and `factor` of a power of C; `warnings`.
    """
    curves, warnings = [], []
    for group in _budgets(points):
        found = _curve(group)
        if found is None:
            warnings.append(
                f"at {_flops(group).mean():.3g} FLOPs the losses have no lowest point in between: no best size is told"
            )
        elif not found.is_inside:
            warnings.append(f"at {found.flops:.3g} FLOPs the best size lies outside of those tried; it isn't used")
            curves.append(found)
        else:
            curves.append(found)
    inside = [curve for curve in curves if curve.is_inside]
    if len(inside) < 2:
        return None
    result: dict[str, Any] = {"curves": [asdict(curve) for curve in curves]}
    x = np.log([curve.flops for curve in inside])
    for name in ("parameters", "tokens"):
        exponent, constant = np.polyfit(x, np.log([getattr(curve, name) for curve in inside]), 1)
        result[name] = {"exponent": float(exponent), "factor": float(math.exp(constant))}
    if len(inside) == 2:
        warnings.append("two budgets alone tell the exponents; a third one would check them")
    return {**result, "warnings": warnings}


def _flops(points: Points) -> np.ndarray:
    return FLOPS_A_TOKEN * points.parameters_P * points.tokens_P


def _budgets(points: Points) -> list[Points]:
    """Points of like compute, of three sizes or more; of each size the mean loss."""
    log_c_P = np.log(_flops(points))
    order_P = np.argsort(log_c_P)
    groups: list[list[int]] = []
    for place in order_P:
        if groups and log_c_P[place] - log_c_P[groups[-1][0]] < _SAME_BUDGET:
            groups[-1].append(int(place))
        else:
            groups.append([int(place)])
    picked = [points.pick(np.array(group)) for group in groups]
    return [group for group in picked if len(np.unique(group.parameters_P)) >= _LEAST_SIZES]


def _curve(points: Points) -> Curve | None:
    x_P = np.log(points.parameters_P)
    middle = float(x_P.mean())
    square, slope, constant = np.polyfit(x_P - middle, points.loss_P, 2)
    if square <= 0:
        return None
    lowest = -slope / (2 * square)
    x = middle + lowest
    flops = float(_flops(points).mean())
    parameters = math.exp(x)
    loss = float(constant + slope * lowest + square * lowest**2)
    inside = bool(x_P.min() <= x <= x_P.max())
    return Curve(flops, parameters, flops / (FLOPS_A_TOKEN * parameters), loss, inside)
