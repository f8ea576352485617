"""What `mmllm scaling fit` gives: the law, isoFLOP curves, the check on larger trainings, as JSON and as lines."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.studies.scaling import NAMES, FitConfig, fit_law, levels
from mmllm.studies.scaling_isoflop import isoflop_fit
from mmllm.studies.scaling_points import ONE_EPOCH, Points, read_points

_CHECKED = 0.02
"""A loss predicted within this share of the measured one is right."""


def fit_points(
    path: str | Path, config: FitConfig, size: str = "parameters", loss: str = "loss",
    only: Mapping[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The law of a file of points, its isoFLOP curves, and how far it is right on larger trainings.

    Points whose `check` is true are no part of the fit: on these it is checked. Points of more than one epoch are left
    out too, and counted. Where a size and length was trained at several learning rates or batch sizes, the law is that
    of the best: the mean over seeds is the lowest (the losses of 2203.15556 are those of rates that were tuned).

    Args:
        path: of the points.
        config: of the fit.
        size: key of N.
        loss: key of L.
        only: rows that have these keys alone.

    Raises:
        ValueError: the points can't tell a law, or are of several variants.
    """
    rows: list[Mapping[str, Any]] = []
    seen: set[str] = set()

    def is_repeated(row: Mapping[str, Any]) -> bool:
        seen.add(str(row.get("variant")))
        return not row.get("check") and _is_repeated(row)

    def is_fitted(row: Mapping[str, Any]) -> bool:
        is_meant = not row.get("check") and not _is_repeated(row)
        rows.extend([row] if is_meant else [])
        return is_meant

    repeated = read_points(path, size, loss, only, is_repeated, is_needed=False)
    points = read_points(path, size, loss, only, is_fitted, is_needed=not len(repeated))
    if not len(points):
        raise ValueError(
            f"{path} has points of more than {ONE_EPOCH} epochs alone, {len(repeated)} of them, which no law is fitted "
            f"to; give a sweep more documents, or fewer tokens"
        )
    variants = sorted(seen)
    if len(variants) > 1:
        raise ValueError(
            f"{path} has points of {', '.join(variants)}, of which each has a law of its own; choose one: "
            f"--only variant={variants[0]}"
        )
    best = _best_settings(points, rows)
    fit = fit_law(points.pick(best), config)
    fit.warnings.extend(_mixed(points, rows))
    values = {**fit.to_dict(), "isoflop": isoflop_fit(points.pick(best)), "size": size, "loss_key": loss}
    values |= {"only": dict(only or {}), "not_best": len(points) - len(best)}
    values["repeated"] = [
        {"parameters": n, "tokens": d, "loss": measured, "as_new": float(fit.law.loss(n, d))}
        for n, d, measured in repeated.rows()
    ]
    checked = read_points(path, size, loss, only, lambda row: bool(row.get("check")), is_needed=False)
    values["check"] = []
    for n, d, measured in checked.rows():
        predicted = float(fit.law.loss(n, d))
        error = predicted / measured - 1
        values["check"].append({
            "parameters": n, "tokens": d, "predicted": predicted, "measured": measured, "error": error,
            "times_larger": n / fit.ranges["parameters"][1], "is_right": abs(error) <= _CHECKED,
        })  # fmt: skip
    return values


def _is_repeated(row: Mapping[str, Any]) -> bool:
    return row.get("epochs", 1) > ONE_EPOCH


def _pairs(points: Points) -> dict[tuple[int, int], list[int]]:
    """Places of the points by size and length."""
    pairs: dict[tuple[int, int], list[int]] = defaultdict(list)
    for place, pair in enumerate(zip(levels(points.parameters_P), levels(points.tokens_P), strict=True)):
        pairs[pair].append(place)
    return pairs


def _best_settings(points: Points, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Places of the points that have the best learning rate and batch of their size and length, all seeds of it."""
    best: list[int] = []
    for places in _pairs(points).values():
        groups: dict[tuple[str, str], list[int]] = defaultdict(list)
        for place in places:
            row = rows[place]  # a sweep's lr differs with the size, by its rule; its rate is the rule's multiple
            groups[str(row.get("rate", row.get("lr"))), str(row.get("batch_size"))].append(place)
        best += min(groups.values(), key=lambda group: float(points.loss_P[group].mean()))
    return np.array(sorted(best))


def _mixed(points: Points, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys in which points differ although not every size and length was trained with all of their values."""
    warnings = []
    for key in ("rate", "batch_size", "share"):
        offered = [{str(rows[place].get(key)) for place in places} for places in _pairs(points).values()]
        values = sorted(set().union(*offered))
        if key == "share" and len(values) > 1:
            warnings.append(f"the points are of share {', '.join(values)}, other documents each: choose one, by --only")
        elif any(each != offered[0] for each in offered):
            warnings.append(
                f"the points are of {key} {', '.join(values)}, and not all sizes and lengths have each of them, so "
                f"that the law may be that of {key}: choose one, by --only {key}={values[0]}"
            )
    return warnings


def fit_lines(values: Mapping[str, Any]) -> list[str]:
    """To print."""
    lines = [f"L(N, D) = E + A / N^alpha + B / D^beta, of {values['points']} points, error {values['error']:.2%}"]
    for name in NAMES:
        interval = values["intervals"].get(name)
        between = "" if interval is None else f"  [{interval[0]:.4g}, {interval[1]:.4g}]"
        lines.append(f"{name:<8}{values[name]:>12.5g}{between}")
    isoflop = values["isoflop"]
    if isoflop is not None:
        told = (f"{name} ~ C^{isoflop[name]['exponent']:.3f}" for name in ("parameters", "tokens"))
        lines.append(f"best at each budget: {', '.join(told)}")
        lines += [f"warning: {warning}" for warning in isoflop["warnings"]]
    if values["repeated"]:
        lines.append(f"left out: {len(values['repeated'])} points of more than one epoch")
    if values["not_best"]:
        lines.append(
            f"left out: {values['not_best']} points whose rate or batch isn't the best of their size and length"
        )
    for row in values["check"]:
        lines.append(
            f"check at {row['parameters']:,.4g} parameters, {row['tokens']:,.4g} tokens: {row['predicted']:.4f} "
            f"predicted, {row['measured']:.4f} measured ({row['error']:+.1%})"
        )
    return lines + [f"warning: {warning}" for warning in values["warnings"]]


def write_json(values: Mapping[str, Any], path: str | Path) -> None:
    """Writes a result."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
