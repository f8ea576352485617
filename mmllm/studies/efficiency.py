"""docs/EFFICIENCY.md, made from what studies reported: one table a study, its question, and what was expected of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmllm.studies.report import said_commit, said_interval, said_machine, said_samples, uneven_notes
from mmllm.studies.scaling_optimum import read_fit
from mmllm.studies.statistics import holm, said_chance, said_p, verdict_of

_HEAD = """# What methods are worth here

Made by

    mmllm study efficiency {folder}{scaling} --out {out}

from the reports of `mmllm study run` and fits of `mmllm scaling fit`; nothing in it is written by hand. Every table
holds one budget equal for all its runs. Intervals are 95%, over seeds and test rows unless told, and may leave a
score's range; p is that of a test paired by seed. Here are {chance}.
So the column after p has it adjusted by Holm's method for the levels that share a baseline and a measure, and by that a
level is called better or worse: below 0.05 over three seeds or more; else it is unproved.
"Samples for equal score" is how many training documents a level needs to score as the baseline does with all of its
own, read off its learning curve where it stays there; "≤" where the fewest that were measured do; a dash where it was
not measured or never does. Where a curve is flat within its intervals, which report.json has, that number is noise.
"""


def write_efficiency(folder: Path, out: Path, scaling: Sequence[Path] = ()) -> list[str]:
    """Writes the page; gives lines that say what it holds.

    Args:
        folder: of studies' report.json files, each under its study's name.
        out: the page.
        scaling: fits of `mmllm scaling fit`.

    Raises:
        ValueError: the folder has no report, or a file in it is none.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(f"{folder}: no report is in it; copy there the report.json of studies, each under its name")
    reports = [(path.stem, _read(path)) for path in files]
    chance = said_chance([row["p"] for _, values in reports for row in values["rows"]])
    fits = "".join(f" --scaling {path}" for path in scaling)
    text = _HEAD.format(folder=folder, out=out, chance=chance, scaling=fits)
    text += "".join(_section(name, values) for name, values in reports)
    text += "".join(_scaling(path) for path in scaling)
    out.write_text(text, encoding="utf-8")
    claims = sum(row["verdict"] in ("better", "worse") for _, values in reports for row in values["rows"])
    return [f"{out}: studies: {len(reports)}, proved differences: {claims}"]


def _read(path: Path) -> dict[str, Any]:
    values = _object(path)
    if not isinstance(values.get("rows"), list):
        raise ValueError(f"{path} is no report of `mmllm study report`; it has no rows")
    _check_types(values, _REPORT, str(path))
    for number, row in enumerate(values["rows"]):
        if isinstance(row, dict) and ("p_holm" not in row or "pairs" not in row):
            raise ValueError(f"{path} was made by an earlier mmllm; run `mmllm study report` of its folder again")
        _check_types(row, _ROW, f"{path}: row {number}")
    _check_verdicts(path, values["rows"])
    return values


_NUMBER = (int, float)
_REPORT: dict[str, tuple[type, ...]] = {
    "title": (str,), "question": (str,), "expected": (str,), "budget": (dict,), "runs": (int,),
    "runs_left_out": (list,), "commit": (str, list), "machine": (dict, list),
}  # fmt: skip
_ROW: dict[str, tuple[type, ...]] = {
    "factor": (str,), "level": (str,), "measure": (str,), "score": _NUMBER, "interval": (list,),
    "interval_over": (str,), "seeds": (int,), "pairs": (int,), "p": (*_NUMBER, type(None)),
    "p_holm": (*_NUMBER, type(None)),
    "difference": (*_NUMBER, type(None)), "samples_for_equal_score": (*_NUMBER, type(None)), "flops": _NUMBER,
    "minutes": _NUMBER, "verdict": (str,), "lower_is_better": (bool,), "samples_is_bound": (bool,),
}  # fmt: skip


def _object(path: Path) -> dict[str, Any]:
    """What a JSON file holds, if it is an object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, wanted an object")
    return values


def _check_types(values: Any, wanted: Mapping[str, tuple[type, ...]], where: str) -> None:
    """Raises ValueError where a key is missing, or its value is of another type."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {type(values).__name__}, wanted an object; run `mmllm study report` again")
    for key, types in wanted.items():
        value = values.get(key)
        is_right = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        if key not in values or not is_right:
            raise ValueError(f"{where} has {key} {value!r}, which no report has; run `mmllm study report` again")


def _check_verdicts(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError where a row claims what its own numbers don't say."""
    for name, measure in dict.fromkeys((row["factor"], row["measure"]) for row in rows):
        levels = [row for row in rows if (row["factor"], row["measure"]) == (name, measure)]
        if sum(row["verdict"] == "baseline" for row in levels) != 1:
            raise ValueError(f"{path}: {name} has not one baseline in {measure}; run `mmllm study report` again")
        for row, p_holm in zip(levels, holm([row["p"] for row in levels]), strict=True):
            is_same = (p_holm is None) == (row["p_holm"] is None)
            if not is_same or (p_holm is not None and not math.isclose(p_holm, row["p_holm"], abs_tol=1e-9)):
                raise ValueError(
                    f"{path}: {name}: {row['level']} has p_holm {row['p_holm']} in {measure}, and by the others' p it "
                    f"is {p_holm}; run `mmllm study report` of its folder again"
                )
            verdict = verdict_of(row["difference"], p_holm, row["pairs"], row["lower_is_better"])
            if row["verdict"] != "baseline" and row["verdict"] != verdict:
                raise ValueError(
                    f"{path}: {name}: {row['level']} is called {row['verdict']} in {measure}, and its numbers say "
                    f"{verdict}; run `mmllm study report` of its folder again"
                )


def _section(name: str, values: Mapping[str, Any]) -> str:
    kind, amount = next(iter(values["budget"].items()))
    left_out = f" Not run: {len(values['runs_left_out'])}." if values["runs_left_out"] else ""
    lines = [
        f"\n## {values['title']}\n",
        f"{values['question']} (`configs/studies/{name}.yaml`)\n",
        f"Expected: {values['expected']}\n",
        f"{values['runs']} runs of {amount:,.6g} {kind} each, {said_machine(values['machine'])}, "
        f"commit {said_commit(values['commit'])}.{left_out}\n",
        *(f"{note}.\n" for note in uneven_notes(values)),
        "| factor | level | measure | score | 95% interval | difference | p | Holm | seeds "
        "| samples for equal score | FLOPs | min | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(_row(row) for row in values["rows"]),
    ]
    return "\n".join(lines) + "\n"


def _row(row: Mapping[str, Any]) -> str:
    difference = row["difference"]
    is_baseline = row["verdict"] == "baseline"
    told = "–" if is_baseline or difference is None else f"{round(difference, 4) + 0.0:+.4f}"
    cells = (
        row["factor"], row["level"], row["measure"], f"{row['score']:.4f}", said_interval(row), told,
        said_p(row["p"]), said_p(row["p_holm"]), str(row["seeds"]), said_samples(row), f"{row['flops']:.3g}",
        f"{row['minutes']:.1f}", row["verdict"],
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _scaling(path: Path) -> str:
    law, values = read_fit(path)
    lines = [
        f"\n## Scaling law: {path.stem}\n",
        f"L(N, D) = E + A / N^alpha + B / D^beta, N parameters, D tokens, L nats a token{_told_points(values)}.\n",
        "| | value | 95% interval |",
        "|---|---|---|",
    ]
    for key, value in vars(law).items():
        interval = (values.get("intervals") or {}).get(key)
        told = "–" if interval is None else f"{interval[0]:.4g} – {interval[1]:.4g}"
        lines.append(f"| {key} | {value:.4g} | {told} |")
    lines += [
        f"\nCheck, no part of the fit: {check['parameters']:,.4g} parameters, {check['tokens']:,.4g} tokens: "
        f"{check['predicted']:.4f} predicted, {check['measured']:.4f} measured ({check['error']:+.1%})."
        for check in values.get("check") or ()
    ]
    lines += [f"\nWarning: {warning}" for warning in values.get("warnings") or ()]
    return "\n".join(lines) + "\n"


def _told_points(values: Mapping[str, Any]) -> str:
    """How many trainings a law was fitted to, and how well; a fit that was made elsewhere may not say."""
    if "points" not in values or "error" not in values:
        return ""
    return f"; {values['points']} trainings, root mean squared error of log L {values['error']:.1%}"
