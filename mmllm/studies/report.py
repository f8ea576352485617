"""`mmllm study report`: what a study's runs say, as report.json and a page with curves."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, select_autoescape

from mmllm.evaluation.charts import Chart, line_chart
from mmllm.quickstart.machine import num_cores
from mmllm.studies.measures import Measure
from mmllm.studies.run import study_in
from mmllm.studies.runs import RESULT
from mmllm.studies.statistics import (
    CLAIM_P,
    MIN_SEEDS,
    holm,
    interval_of,
    paired_p,
    said_chance,
    said_p,
    samples_for,
)
from mmllm.studies.study import Arm, Study

REPORT = "report.json"
PAGE = "report.html"
Results = Mapping[Arm, Mapping[str, Any]]


@dataclass(frozen=True)
class Line:
    """One level of a factor under one measure.

    Attributes:
        factor: its name.
        level: its name.
        score: mean over seeds.
        interval: 95%, over seeds and rows.
        seeds: how many.
        p: of no difference from the factor's baseline, over paired seeds; None: it is the baseline, or can't be told.
        p_holm: p adjusted by Holm for the factor's other levels under the measure.
        samples_for_equal_score: documents with which it scores as the baseline does with all of them; None: it never
            does, or there is no curve.
        flops: of training, a run's.
        minutes: a run's.
        measure: the score's name.
        difference: from the baseline, in the score's unit; None: no seed has both.
        verdict: "baseline"; "better" or "worse" where p is below 0.05 with three seeds or more; else "unproved".
        steps: of the optimizer.
        tokens: trained on.
        joules: a run's; None: nothing counted them.
        curve: [documents, score, low, high] at each share of the data.
    """

    factor: str
    level: str
    score: float
    interval: tuple[float, float]
    seeds: int
    p: float | None
    p_holm: float | None
    samples_for_equal_score: float | None
    flops: float
    minutes: float
    measure: str
    difference: float | None
    verdict: str
    steps: float
    tokens: float
    joules: float | None
    curve: list[tuple[float, float, float, float]]


def report(folder: Path) -> dict[str, Any]:
    """Writes a study's report.json and report.html.

    Raises:
        FileNotFoundError: the folder is no study's.
        ValueError: none of its runs is done.
    """
    study = study_in(folder)
    results = read_results(study, folder)
    if not results:
        raise ValueError(f"{folder}: no run is done yet; `mmllm study run` goes on with it")
    lines = [
        line
        for measure in study.measures
        for name in study.factors
        for line in factor_lines(study, name, measure, results)
    ]
    commits = sorted({str(result["commit"]) for result in results.values()})
    values = {
        "title": study.title,
        "question": study.question,
        "expected": study.expected,
        "budget": {study.budget.kind: study.budget.amount},
        "rows": [asdict(line) for line in lines],
        "runs": len(results),
        "runs_left_out": [arm.name for arm in study.arms() if arm not in results],
        "commit": commits[0] if len(commits) == 1 else commits,
        "machine": machine(),
    }
    text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / REPORT).write_text(text, encoding="utf-8")
    (folder / PAGE).write_text(page(study, lines, values), encoding="utf-8")
    return values


def report_lines(values: Mapping[str, Any]) -> list[str]:
    """A report as lines to print: a level each, under each measure."""
    lines = []
    for row in values["rows"]:
        p = f"{said_p(row['p']):>6} (Holm {said_p(row['p_holm']):>6})"
        equal = row["samples_for_equal_score"]
        samples = "" if equal is None else f"  {equal:,.0f} samples for the baseline's score"
        low, high = row["interval"]
        lines.append(
            f"{row['factor'] + ': ' + row['level']:<36} {row['measure']:<16} {row['score']:8.4f} "
            f"[{low:.4f}, {high:.4f}]  p {p}  {row['seeds']} seeds  {row['verdict']}{samples}"
        )
    return [*lines, said_chance([row["p"] for row in values["rows"]])]


def said_commit(commit: str | Sequence[str]) -> str:
    """A report's commit, or those that its runs are of, as far as they need to be read."""
    return commit[:10] if isinstance(commit, str) else ", ".join(each[:10] for each in commit)


def read_results(study: Study, folder: Path) -> dict[Arm, dict[str, Any]]:
    """Of the runs that are done."""
    found = {}
    for arm in study.arms():
        path = folder / "runs" / arm.name / RESULT
        if path.is_file():
            found[arm] = json.loads(path.read_text(encoding="utf-8"))
    return found


def factor_lines(study: Study, name: str, measure: Measure, results: Results) -> list[Line]:
    """A factor's levels that have a run, under one measure.

    Args:
        study: whose.
        name: of the factor.
        measure: the score.
        results: of all runs.
    """
    factor, lines = study.factors[name], []
    curves = {level: _curve(name, level, measure, results) for level in factor.levels}
    whole = {level: _of_seeds(name, level, 1.0, measure, results) for level in factor.levels}
    base = whole[factor.baseline]
    for level, runs in whole.items():
        if not runs:
            continue
        scores = {seed: run["scores"][measure.name]["score"] for seed, run in runs.items()}
        base_scores = {seed: run["scores"][measure.name]["score"] for seed, run in base.items()}
        p = None if level == factor.baseline else paired_p(scores, base_scores)
        shared = sorted(scores.keys() & base_scores.keys())
        difference = float(np.mean([scores[seed] - base_scores[seed] for seed in shared])) if shared else None
        equal = None
        if len(curves[level]) > 1 and base_scores:
            target = float(np.mean(list(base_scores.values())))
            equal = samples_for([point[:2] for point in curves[level]], target, measure.lower_is_better)
        joules = [run["joules"] for run in runs.values()]
        lines.append(
            Line(
                factor=name,
                level=level,
                score=float(np.mean(list(scores.values()))),
                interval=interval_of(list(scores.values()), _rows(runs.values(), measure)),
                seeds=len(scores),
                p=p,
                p_holm=None,
                samples_for_equal_score=equal,
                flops=float(np.mean([run["flops"] for run in runs.values()])),
                minutes=float(np.mean([run["minutes"] for run in runs.values()])),
                measure=measure.name,
                difference=difference,
                verdict=_verdict(level == factor.baseline, difference, p, len(shared), measure.lower_is_better),
                steps=float(np.mean([run["steps"] for run in runs.values()])),
                tokens=float(np.mean([run["tokens"] for run in runs.values()])),
                joules=None if None in joules else float(np.mean(joules)),
                curve=curves[level],
            )
        )
    return [replace(line, p_holm=p) for line, p in zip(lines, holm([line.p for line in lines]), strict=True)]


def _verdict(
    is_baseline: bool, difference: float | None, p: float | None, num_seeds: int, lower_is_better: bool
) -> str:
    if is_baseline:
        return "baseline"
    if difference is None or p is None or p >= CLAIM_P or num_seeds < MIN_SEEDS:
        return "unproved"
    return "better" if (difference < 0) == lower_is_better else "worse"


def _of_seeds(name: str, level: str, share: float, measure: Measure, results: Results) -> dict[int, Mapping[str, Any]]:
    return {
        arm.seed: result
        for arm, result in results.items()
        if (arm.factor, arm.level, arm.share) == (name, level, share) and measure.name in result["scores"]
    }


def _rows(runs: Any, measure: Measure) -> list[dict[str, float]]:
    """Each run's rows, where their mean is its score: by rightness, or by score."""
    found = []
    for run in runs:
        score, rows = run["scores"][measure.name]["score"], run["scores"][measure.name]["rows"]
        table: dict[str, float] = {}
        for column in (0, 1):
            values = {row: float(pair[column]) for row, pair in rows.items()}
            if values and abs(np.mean(list(values.values())) - score) < 1e-6:
                table = values
                break
        found.append(table)
    return found


def _curve(name: str, level: str, measure: Measure, results: Results) -> list[tuple[float, float, float, float]]:
    shares = sorted({arm.share for arm in results if (arm.factor, arm.level) == (name, level)})
    points = []
    for share in shares:
        runs = _of_seeds(name, level, share, measure, results)
        scores = [run["scores"][measure.name]["score"] for run in runs.values()]
        if scores:
            low, high = interval_of(scores, _rows(runs.values(), measure))
            documents = float(np.mean([run["documents"] for run in runs.values()]))
            points.append((documents, float(np.mean(scores)), low, high))
    return points


def machine() -> dict[str, Any]:
    """What the runs were measured on."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"processor": _processor(), "cores": num_cores(), "gpu": gpu, "torch": torch.__version__}


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


# ---------------------------------------------------------------------------------------------------------------- page
def page(study: Study, lines: Sequence[Line], values: Mapping[str, Any]) -> str:
    """The report as HTML, with nothing that is loaded from elsewhere."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["j2"]), trim_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        study=study, values=values, tables=_tables(study, lines), charts=_charts(study, lines), said_p=said_p,
        chance=said_chance([line.p for line in lines]), commit=said_commit(values["commit"]),
    )  # fmt: skip


def _tables(study: Study, lines: Sequence[Line]) -> list[tuple[str, Measure, list[Line]]]:
    return [
        (name, measure, found)
        for name in study.factors
        for measure in study.measures
        if (found := [line for line in lines if (line.factor, line.measure) == (name, measure.name)])
    ]


def _charts(study: Study, lines: Sequence[Line]) -> list[Chart]:
    charts = []
    for name, measure, found in _tables(study, lines):
        curves = {line.level: [point[:2] for point in line.curve] for line in found if len(line.curve) > 1}
        if curves:
            charts.append(line_chart(f"{name}: {measure.name} by documents", curves))
    return charts
