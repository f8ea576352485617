"""How large, and how long, by a scaling law: where compute pays for training, or for training and inference together.

Training costs 6·N·D operations, inference 2·N for each token (of experts, N is what a token passes). Hoffmann et al.
2022 (arXiv:2203.15556), equation 4, gives the first in closed form; the second is that of Sardana et al. 2023
(arXiv:2401.00448) at a given budget: the model becomes smaller, and is trained on more.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmllm.studies.scaling import EXPONENTS, NAMES, Law

ACTIVE = "parameters"
"""Key of points: those that a token passes, of which operations are 6 for each token."""
_TRAINING, _INFERENCE = 6, 2
_FAR = 3.0
"""A size, or length, so many times beyond those that were measured is told."""
_AT_BOUND = 1e-3
"""An exponent as near to its bound, as a share of it, is at it."""


@dataclass(frozen=True)
class Optimum:
    """The best size and length.

    Attributes:
        parameters: N.
        tokens: D, that it is trained on.
        loss: that the law tells.
        warnings: where it goes far beyond what was measured.
    """

    parameters: float
    tokens: float
    loss: float
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return vars(self)


def optimum(law: Law, flops: float, inference_tokens: float = 0.0) -> Optimum:
    """The size and length of the lowest loss.

    Args:
        law: of the loss.
        flops: that there are, for training and inference together.
        inference_tokens: that the model will read and write after training; 0: training has all operations.

    Raises:
        ValueError: a number is not positive or not finite, or the best model has less than one parameter or token.
    """
    if not 0 < flops < math.inf:
        raise ValueError(f"flops is {flops}; it must be a positive number")
    if not 0 <= inference_tokens < math.inf:
        raise ValueError(f"inference_tokens is {inference_tokens}; it must be 0 or more")
    if not all(0 < value < math.inf for value in (law.A, law.B, law.alpha, law.beta)) or not 0 <= law.E < math.inf:
        raise ValueError(f"the law {law} has no optimum; A, B, alpha and beta must be positive, and E 0 or more")
    if not inference_tokens:
        log_ratio = math.log(law.alpha) + math.log(law.A) - math.log(law.beta) - math.log(law.B)
        log_compute = math.log(flops) - math.log(_TRAINING)
        log_n = (log_ratio + law.beta * log_compute) / (law.alpha + law.beta)
        log_d = log_compute - log_n
    elif flops <= _INFERENCE * inference_tokens:  # one parameter has no operation left for its training
        log_n = log_d = -math.inf
    else:
        log_n, log_d = _with_inference(law, flops, inference_tokens)
    if min(log_n, log_d) < 0:
        used, lower = f" with {inference_tokens:.3g} tokens of inference", ", or lower inference_tokens"
        raise ValueError(
            f"{flops:.3g} FLOPs{used if inference_tokens else ''} pay for less than one parameter, or one token to "
            f"train it on, by {law}; raise flops{lower if inference_tokens else ''}, or fit the law to more points"
        )
    parameters, tokens = math.exp(log_n), math.exp(log_d)
    return Optimum(parameters, tokens, law.loss(parameters, tokens))


def _with_inference(law: Law, flops: float, inference_tokens: float) -> tuple[float, float]:
    """Logarithms of N and D where the loss along the budget has no slope, N at least 1.

    That is one place, since its slope in log N grows from below to above 0.
    """
    log_inference = math.log(_INFERENCE) + math.log(inference_tokens)
    log_compute = math.log(flops) - math.log(_TRAINING)
    log_largest = math.log(flops) - log_inference  # nothing is left for training there

    def log_tokens(log_n: float) -> float:
        left = log_largest - log_n
        return left + math.log(-math.expm1(-left)) + log_inference - math.log(_TRAINING)

    def slope(log_n: float) -> float:
        """Sign of the loss's slope: the gain of tokens lost against that of parameters won, in logarithms."""
        lost = math.log(law.beta) + math.log(law.B) - (law.beta + 1) * log_tokens(log_n) + log_compute - log_n
        won = math.log(law.alpha) + math.log(law.A) - law.alpha * log_n
        return lost - won

    low, high = 0.0, log_largest
    for _ in range(200):
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    log_n = 0.5 * (low + high)
    if log_n >= log_largest or (low == 0.0 and slope(0.0) > 0):
        return -math.inf, -math.inf
    return log_n, log_tokens(log_n)


def plan(path: str | Path, flops: float, inference_tokens: float = 0.0) -> Optimum:
    """The optimum by a fit that `mmllm scaling fit` wrote, with warnings of its own and of the fit.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no fit, its exponents are at their bounds, or `optimum` refuses the budget.
    """
    law, values = read_fit(Path(path))
    for name in ("alpha", "beta"):
        low, high = EXPONENTS
        if not low * (1 + _AT_BOUND) < values[name] < high * (1 - _AT_BOUND):
            raise ValueError(
                f"{path} has {name} {values[name]:.3g}, at or beyond the bounds of fits, {low:g} and {high:g}: its "
                f"points don't tell it, and no plan can be made; fit more points, or wider ranges of them"
            )
    best = optimum(law, flops, inference_tokens)
    warnings = [f"of the fit: {warning}" for warning in values.get("warnings") or []]
    size = values.get("size", ACTIVE)
    if size != ACTIVE:
        warnings.append(
            f"the fit is of {size}, and C is 6·N·D of the parameters that a token passes: of experts it pays for a "
            f"larger model; fit with --size {ACTIVE}"
        )
    for name, (low, high) in (values.get("ranges") or {}).items():
        value = {"parameters": best.parameters, "tokens": best.tokens}.get(name)
        if value is not None and not low / _FAR <= value <= high * _FAR:
            side, bound = ("largest", high) if value > high else ("smallest", low)
            times = max(value / bound, bound / value)
            warnings.append(
                f"{value:.3g} {name} lie {times:,.3g} times beyond the {side} that was measured, {bound:.3g}"
            )
    return Optimum(best.parameters, best.tokens, best.loss, warnings)


def read_fit(path: Path) -> tuple[Law, dict[str, Any]]:
    """The law of a fit's file, and all that is in it, checked.

    Raises:
        ValueError: it is no fit.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    again = "give what `mmllm scaling fit … --json` wrote"
    values = values if isinstance(values, dict) else {}
    missing = [name for name in NAMES if not _is_number(values.get(name))]
    if missing:
        raise ValueError(f"{path} has {missing[0]} {values.get(missing[0])!r}, wanted a finite number; {again}")
    warnings, ranges = values.get("warnings") or [], values.get("ranges") or {}
    if not isinstance(warnings, list) or not isinstance(values.get("size", ""), str):
        raise ValueError(f"{path} has a size that is no text, or warnings that are no list; {again}")
    if not isinstance(ranges, dict):
        raise ValueError(f"{path} has ranges {ranges!r}, wanted an object; {again}")
    for name, between in ranges.items():
        if not _are_numbers(between, 2) or not 0 < between[0] <= between[1]:
            raise ValueError(f"{path} has ranges.{name} {between!r}, wanted two positive numbers, in order; {again}")
    intervals, checks = values.get("intervals") or {}, values.get("check") or []
    if not isinstance(intervals, dict) or not all(_are_numbers(between, 2) for between in intervals.values()):
        raise ValueError(f"{path} has intervals {intervals!r}, wanted two numbers of each name; {again}")
    keys = ("parameters", "tokens", "predicted", "measured", "error")
    if not isinstance(checks, list) or not all(
        isinstance(check, dict) and _are_numbers([check.get(key) for key in keys], len(keys)) for check in checks
    ):
        raise ValueError(f"{path} has check {checks!r}, wanted objects with {', '.join(keys)}; {again}")
    if any(key in values and not _is_number(values[key]) for key in ("points", "error")):
        raise ValueError(f"{path} has points or an error that are no numbers; {again}")
    return Law(*(float(values[name]) for name in NAMES)), values


def _are_numbers(values: Any, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(_is_number(value) for value in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
