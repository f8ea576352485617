"""How large, and how long, by a scaling law: where compute pays for training, or for training and inference together.

Training costs 6·N·D operations, inference 2·N for each token (of experts, N is what a token passes). Hoffmann et al.
2022 (arXiv:2203.15556), equation 4, gives the first in closed form; the second is that of Sardana et al. 2023
(arXiv:2401.00448) at a given budget: the model becomes smaller, and is trained on more.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmllm.studies.scaling import NAMES, Law

_TRAINING, _INFERENCE = 6, 2
_FAR = 3.0
"""A size, or length, so many times beyond those that were measured is told."""


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
        ValueError: a number is not positive, or nothing is left to train with.
    """
    if not 0 < flops < math.inf:
        raise ValueError(f"flops is {flops}; it must be positive")
    if not 0 <= inference_tokens < math.inf:
        raise ValueError(f"inference_tokens is {inference_tokens}; it must be 0 or more")
    if min(law.A, law.B, law.alpha, law.beta) <= 0:
        raise ValueError(f"the law {law} has no optimum; A, B, alpha and beta must be positive")
    if not inference_tokens:
        ratio = law.alpha * law.A / (law.beta * law.B)
        power = 1 / (law.alpha + law.beta)
        parameters = ratio**power * (flops / _TRAINING) ** (law.beta * power)
    else:
        parameters = _with_inference(law, flops, inference_tokens)
    tokens = (flops / parameters - _INFERENCE * inference_tokens) / _TRAINING
    return Optimum(parameters, tokens, law.loss(parameters, tokens))


def _with_inference(law: Law, flops: float, inference_tokens: float) -> float:
    """Where the loss along the budget has no slope: one place, since its slope in log N grows from below to above 0."""
    log_largest = math.log(flops / (_INFERENCE * inference_tokens))  # nothing is left for training there

    def slope(log_n: float) -> float:
        """Sign of the loss's slope: the gain of tokens lost against that of parameters won, in logarithms."""
        left = math.expm1(log_largest - log_n) * _INFERENCE * inference_tokens / _TRAINING
        lost = math.log(law.beta * law.B) - (law.beta + 1) * math.log(left) + math.log(flops / _TRAINING) - log_n
        won = math.log(law.alpha * law.A) - law.alpha * log_n
        return lost - won

    high = log_largest - 1e-12 * max(1.0, abs(log_largest))
    low = high - 1.0
    while slope(low) > 0:
        low -= 2 * (high - low)
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return math.exp(0.5 * (low + high))


def plan(path: str | Path, flops: float, inference_tokens: float = 0.0) -> Optimum:
    """The optimum by a fit that `mmllm scaling fit` wrote, with warnings of its own and of the fit.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no fit.
    """
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    missing = [name for name in NAMES if not isinstance(values, dict) or not isinstance(values.get(name), int | float)]
    if missing:
        raise ValueError(f"{path} has no number {missing[0]!r}; give what `mmllm scaling fit … --json` wrote")
    best = optimum(Law(*(float(values[name]) for name in NAMES)), flops, inference_tokens)
    warnings = [f"of the fit: {warning}" for warning in values.get("warnings") or []]
    for name, (low, high) in (values.get("ranges") or {}).items():
        value = getattr(best, name)
        if name != "loss" and not low / _FAR <= value <= high * _FAR:
            side, bound = ("largest", high) if value > high else ("smallest", low)
            times = max(value / bound, bound / value)
            warnings.append(
                f"{value:.3g} {name} lie {times:,.3g} times beyond the {side} that was measured, {bound:.3g}"
            )
    return Optimum(best.parameters, best.tokens, best.loss, warnings)
