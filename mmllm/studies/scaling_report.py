"""What `mmllm scaling fit` gives: the law, isoFLOP curves, the check on larger trainings, as JSON and as lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmllm.studies.scaling import NAMES, FitConfig, fit_law, read_points
from mmllm.studies.scaling_isoflop import isoflop_fit

_CHECKED = 0.02
"""A loss predicted within this share of the measured one is right."""
_ONE_EPOCH = 1.05
"""Documents that come again teach less than new ones: those points are left out."""


def fit_points(
    path: str | Path, config: FitConfig, size: str = "parameters", loss: str = "loss",
    only: Mapping[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The law of a file of points, its isoFLOP curves, and how far it is right on larger trainings.

    Points whose `check` is true are no part of the fit: on these it is checked. Points of more than one epoch are left
    out too, and counted.

    Args:
        path: of the points.
        config: of the fit.
        size: key of N.
        loss: key of L.
        only: rows that have these keys alone.

    Raises:
        ValueError: the points can't tell a law.
    """
    variants: set[str] = set()

    def is_fitted(row: Mapping[str, Any]) -> bool:
        is_meant = not row.get("check") and row.get("epochs", 1) <= _ONE_EPOCH
        variants.update([str(row.get("variant"))] if is_meant else [])
        return is_meant

    points = read_points(path, size, loss, only, is_fitted)
    fit = fit_law(points, config)
    if len(variants) > 1:
        fit.warnings.append(
            f"the points are of {', '.join(sorted(variants))}, of which each may have a law of its own: choose one, by "
            f"--only variant=NAME"
        )
    values = {**fit.to_dict(), "isoflop": isoflop_fit(points), "size": size, "loss_key": loss}
    repeated = read_points(
        path, size, loss, only, lambda row: not row.get("check") and row.get("epochs", 1) > _ONE_EPOCH, is_needed=False
    )
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
