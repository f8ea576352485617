"""Emergence: one sweep under an exact score and under a continuous one, side by side.

Schaeffer et al. 2023, "Are Emergent Abilities of Large Language Models a Mirage?" (arXiv:2304.15004): an ability that
seems to come all at once under a score that counts whole answers grows evenly under one that counts their parts.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmllm.studies.scaling_points import number_in, read_rows

_LEAST_SIZES = 3


def emergence(path: str | Path, exact: str, continuous: str, only: Mapping[str, str] | None = None) -> dict[str, Any]:
    """How each of two scores grows with compute.

    Args:
        path: points of a sweep with scores.
        exact: key of a score that counts whole answers, such as `exact_match`.
        continuous: key of one that counts parts, such as `attribute_accuracy`, or `loss`.
        only: keys and values; points that have others are left out.

    Returns:
        `rows`: FLOPs and both scores, in the mean over seeds, by growing compute; `sharpness` of each score: the
        largest step between neighbours as a share of the whole change (1: all at once; 1 / (rows - 1): evenly);
        `warnings`.

    Raises:
        ValueError: a point lacks a score, there are fewer than three, or they are of several variants.
    """
    points = list(read_rows(path, only))
    variants = sorted({str(row.get("variant")) for _, row in points})
    if len(variants) > 1:
        raise ValueError(f"{path} has points of {', '.join(variants)}; choose one: --only variant={variants[0]}")
    sums: dict[tuple[Any, ...], list[list[float]]] = defaultdict(list)
    for where, row in points:
        found = [_score(row, key, where) for key in (exact, continuous)]
        size, tokens = (number_in(row, name, where) for name in ("parameters", "tokens"))
        flops = number_in(row, "flops", where) if "flops" in row else 6 * size * tokens
        swept = (row.get(key) for key in ("share", "rate", "batch_size"))
        sums[size, round(math.log(tokens), 1), *swept].append([flops, *found])
    means = [[sum(column) / len(group) for column in zip(*group, strict=True)] for group in sums.values()]
    rows = [{"flops": flops, exact: one, continuous: other} for flops, one, other in sorted(means)]
    if len(rows) < _LEAST_SIZES:
        raise ValueError(f"{path} has {len(rows)} trainings; give {_LEAST_SIZES} or more, of growing compute")
    warnings = []
    sharpness = {}
    for key in (exact, continuous):
        values = [row[key] for row in rows]
        change = values[-1] - values[0]
        steps = [after - before for before, after in itertools.pairwise(values)]
        if abs(change) < 1e-12:
            warnings.append(f"{key} is the same at both ends, so that nothing is told of how it grows")
            sharpness[key] = None
            continue
        sharpness[key] = max(step / change for step in steps)
        if any(step * change < 0 for step in steps):
            warnings.append(f"{key} does not grow with each step of compute; its sharpness is above what it would be")
    return {"rows": rows, "sharpness": sharpness, "warnings": warnings}


def _score(row: dict[str, Any], key: str, where: str) -> float:
    value = (row.get("scores") or {}).get(key, row.get(key))
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        names = ", ".join(row.get("scores") or {}) or "none"
        raise ValueError(f"{where} has {key} {value!r}; its scores are {names}: name one, or measure it in the sweep")
    return float(value)


def emergence_lines(values: dict[str, Any]) -> list[str]:
    """To print: both scores side by side, as bars over FLOPs."""
    keys = list(values["sharpness"])
    lines = [f"{'FLOPs':>10}  " + "  ".join(f"{key:<30}" for key in keys)]
    for row in values["rows"]:
        cells = []
        for key in keys:
            column = [other[key] for other in values["rows"]]
            low, high = min(column), max(column)
            length = 0 if high == low else round(18 * (row[key] - low) / (high - low))
            cells.append(f"{row[key]:<10.4g}{'█' * length:<20}")
        lines.append(f"{row['flops']:>10.3g}  " + "  ".join(cells).rstrip())
    for key, sharpness in values["sharpness"].items():
        lines.append(f"sharpness of {key}: {'–' if sharpness is None else f'{sharpness:.2f}'}")
    return lines + [f"warning: {warning}" for warning in values["warnings"]]
