"""The best learning rate, or batch, of small trainings, and what it will be for a larger one.

Of each size and length a parabola in the logarithm of the rate goes through the losses; its lowest point is the best
rate. A line through the logarithms of these tells the best of other sizes (Bi et al. 2024, arXiv:2401.02954, section
3.1, do so in compute).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.studies.scaling_points import number_in, read_rows

_LEAST_RATES = 3


def fit_rates(
    path: str | Path, key: str = "lr", parameters: float | None = None, only: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The best rates of a sweep.

    Args:
        path: points of a sweep of `rates` (or of `batch_sizes`: key `batch_size`).
        key: what is sought.
        parameters: a size whose rate is told.
        only: keys and values; points that have others are left out.

    Returns:
        `best`: of each variant, size and length the best rate and its loss; `exponent` and `factor` of a power of
        parameters, null where one size alone has a best rate, or several variants have; `predicted` for `parameters`;
        `warnings`.

    Raises:
        ValueError: no size has three rates or more with a lowest loss in between, or a row is no point.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for where, row in read_rows(path, only):
        size, tokens, _ = (number_in(row, name, where) for name in ("parameters", "tokens", "loss"))
        if not row.get("check"):
            groups[row.get("variant"), size, _rounded(tokens)].append(row)
    best, warnings = [], []
    for (variant, size, _), rows in sorted(groups.items(), key=lambda item: (str(item[0][0]), item[0][1:])):
        found = _lowest(rows, key)
        name = f"{'' if variant is None else f'{variant}, '}{size:,.0f} parameters, {rows[0]['tokens']:,} tokens"
        if isinstance(found, str):
            warnings.append(f"{name}: {found}")
        else:
            best.append({"variant": variant, "parameters": size, "tokens": rows[0]["tokens"], **found})
    if not best:
        raise ValueError(f"{path}: no best {key} is told ({'; '.join(warnings) or 'there are no points'})")
    result: dict[str, Any] = {"key": key, "best": best, "exponent": None, "factor": None, "predicted": None}
    sizes = np.log([row["parameters"] for row in best])
    variants = sorted({str(row["variant"]) for row in best})
    if len(variants) > 1:
        warnings.append(
            f"{', '.join(variants)} have a best {key} each, so that none is told for other sizes: choose one, by "
            f"--only variant={variants[0]}"
        )
    elif len(set(sizes)) > 1:
        exponent, constant = np.polyfit(sizes, np.log([row[key] for row in best]), 1)
        result |= {"exponent": float(exponent), "factor": float(math.exp(constant))}
        if parameters is not None:
            result["predicted"] = {"parameters": parameters, key: float(math.exp(constant) * parameters**exponent)}
    elif parameters is not None:
        warnings.append(f"one size alone has a best {key}, so that none is told for {parameters:,.0f} parameters")
    return {**result, "warnings": warnings}


def _lowest(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, float] | str:
    """The best value and its loss, or why there is none."""
    losses: dict[float, list[float]] = defaultdict(list)
    for row in rows:
        value = row.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            return f"{key} is {value!r}; it must be a positive number"
        losses[float(value)].append(float(row["loss"]))
    if len(losses) < _LEAST_RATES:
        return f"{len(losses)} different {key} can't tell a lowest point; try {_LEAST_RATES} or more"
    values = sorted(losses)
    means = [sum(losses[value]) / len(losses[value]) for value in values]
    place = means.index(min(means))
    if place in (0, len(values) - 1):
        return f"the lowest loss is at {key} {values[place]:.3g}, at the end of those tried; try further ones"
    near = slice(place - 1, place + 2)  # a parabola is right near the lowest point alone
    x = np.log(values[near])
    square, slope, constant = np.polyfit(x - x[1], means[near], 2)
    lowest = -slope / (2 * square)
    return {key: float(math.exp(x[1] + lowest)), "loss": float(constant + slope * lowest + square * lowest**2)}


def _rounded(tokens: float) -> float:
    """Lengths that are the same but for a last step."""
    return round(math.log(tokens), 1)
