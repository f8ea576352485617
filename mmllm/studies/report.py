"""`mmllm study report`: what a study's runs say, as report.json and a page with curves."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, select_autoescape

from mmllm.evaluation.charts import Chart, line_chart
from mmllm.studies.machine import machine
from mmllm.studies.measures import Measure
from mmllm.studies.run import study_in
from mmllm.studies.runs import RESULT
from mmllm.studies.statistics import (
    Interval,
    Over,
    Verdict,
    holm,
    interval_of,
    paired_p,
    said_chance,
    said_p,
    samples_for,
    verdict_of,
)
from mmllm.studies.study import Arm, Study

REPORT = "report.json"
PAGE = "report.html"
UNEVEN = 0.05
"""Levels whose FLOPs differ by a larger share, under a budget of samples or seconds, are told."""
Results = Mapping[Arm, Mapping[str, Any]]


@dataclass(frozen=True)
class Line:
    """One level of a factor under one measure.

    Attributes:
        factor: its name.
        level: its name.
        score: mean over seeds.
        interval: 95%.
        interval_over: what it is over.
        seeds: how many.
        pairs: of them, that the baseline has too.
        p: of no difference from the factor's baseline, over paired seeds; None: it is the baseline, or can't be told.
        p_holm: p adjusted by Holm for the factor's other levels under the measure.
        samples_for_equal_score: documents from which on it scores as the baseline does with all of them; None: it
            never does, there is no curve, or the baseline has learnt nothing (0, where more is better).
        samples_is_bound: it does with the fewest that were measured: it may need fewer.
        flops: of training, a run's.
        minutes: a run's.
        measure: the score's name.
        difference: from the baseline, in the score's unit; None: no seed has both.
        lower_is_better: it counts errors.
        verdict: "baseline"; "better" or "worse" where p_holm is below 0.05 with three seeds or more; else "unproved".
        steps: of the optimizer.
        tokens: trained on.
        joules: a run's; None: nothing counted them.
        curve: [documents, score, low, high] at each share of the data.
    """

    factor: str
    level: str
    score: float
    interval: tuple[float, float]
    interval_over: Over
    seeds: int
    pairs: int
    p: float | None
    p_holm: float | None
    samples_for_equal_score: float | None
    samples_is_bound: bool
    flops: float
    minutes: float
    measure: str
    lower_is_better: bool
    difference: float | None
    verdict: Verdict
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
    # Results of an earlier mmllm don't say what they were measured on: the report then says where it was made.
    told = [result.get("machine") or machine() for result in results.values()]
    machines = [each for place, each in enumerate(told) if each not in told[:place]]
    values = {
        "title": study.title,
        "question": study.question,
        "expected": study.expected,
        "budget": {study.budget.kind: study.budget.amount},
        "rows": [asdict(line) for line in lines],
        "runs": len(results),
        "runs_left_out": [arm.name for arm in study.arms() if arm not in results],
        "commit": commits[0] if len(commits) == 1 else commits,
        "machine": machines[0] if len(machines) == 1 else machines,
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
        told = said_samples(row)
        samples = "" if told == "–" else f"  {told} samples for the baseline's score"
        low, high = row["interval"]
        lines.append(
            f"{row['factor'] + ': ' + row['level']:<36} {row['measure']:<16} {row['score']:8.4f} "
            f"[{low:.4f}, {high:.4f}]  p {p}  {row['seeds']} seeds  {row['verdict']}{samples}"
        )
    return [*lines, *uneven_notes(values), said_chance([row["p"] for row in values["rows"]])]


def said_samples(row: Mapping[str, Any]) -> str:
    """A line's samples for an equal score: "≤" where its curve is there at its first point."""
    count = row["samples_for_equal_score"]
    return "–" if count is None else f"{'≤ ' * row['samples_is_bound']}{count:,.0f}"


def said_interval(row: Mapping[str, Any]) -> str:
    """A line's interval, with what it is over where that isn't seeds and rows."""
    (low, high), over = row["interval"], row["interval_over"]
    if over == "nothing":
        return "–"
    return f"{low:.4f} – {high:.4f}{'' if over == 'seeds and rows' else f' ({over})'}"


def uneven_notes(values: Mapping[str, Any]) -> list[str]:
    """Of each factor whose levels have an equal budget and very unequal FLOPs, how many the least and the most have."""
    if "flops" in values["budget"]:
        return []
    notes = []
    for factor in dict.fromkeys(row["factor"] for row in values["rows"]):
        flops = {row["level"]: row["flops"] for row in values["rows"] if row["factor"] == factor}
        least, most = min(flops, key=flops.__getitem__), max(flops, key=flops.__getitem__)
        if flops[most] > (1 + UNEVEN) * flops[least]:
            notes.append(
                f"{factor}: {next(iter(values['budget']))} are equal, and FLOPs are not: {most} has {flops[most]:.3g}, "
                f"{least} {flops[least]:.3g}"
            )
    return notes


def said_commit(commit: str | Sequence[str]) -> str:
    """A report's commit, or those that its runs are of, as far as they need to be read."""
    each = [commit] if isinstance(commit, str) else commit
    return ", ".join(one[:10] + "-dirty" * one.endswith("-dirty") for one in each)


def said_machine(machine: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> str:
    """A report's machine, or those that its runs were measured on."""
    each = [machine] if isinstance(machine, Mapping) else machine
    return " and ".join(f"{one['processor']}, {one['cores']} cores" for one in each)


def read_results(study: Study, folder: Path) -> dict[Arm, dict[str, Any]]:
    """Of the runs that are done.

    Raises:
        ValueError: a result is of another run than its folder says.
    """
    found = {}
    for arm in study.arms():
        path = folder / "runs" / arm.name / RESULT
        if path.is_file():
            result = json.loads(path.read_text(encoding="utf-8"))
            if any(result.get(key) != value for key, value in vars(arm).items()):
                told = ", ".join(f"{key} {result.get(key)}" for key in vars(arm))
                raise ValueError(f"{path} is the result of another run ({told}); remove its folder, and run the study")
            found[arm] = result
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
        shared = sorted(scores.keys() & base_scores.keys())
        equal = None
        if len(curves[level]) > 1 and base_scores:
            target = float(np.mean(list(base_scores.values())))
            if target or measure.lower_is_better:
                equal = samples_for([point[:2] for point in curves[level]], target, measure.lower_is_better)
        joules = [run["joules"] for run in runs.values()]
        low, high, over = _interval(runs.values(), measure)
        lines.append(
            Line(
                factor=name,
                level=level,
                score=float(np.mean(list(scores.values()))),
                interval=(low, high),
                interval_over=over,
                seeds=len(scores),
                pairs=len(shared),
                p=None if level == factor.baseline else paired_p(scores, base_scores),
                p_holm=None,
                samples_for_equal_score=None if equal is None else equal.count,
                samples_is_bound=equal is not None and equal.is_bound,
                flops=float(np.mean([run["flops"] for run in runs.values()])),
                minutes=float(np.mean([run["minutes"] for run in runs.values()])),
                measure=measure.name,
                lower_is_better=measure.lower_is_better,
                difference=float(np.mean([scores[seed] - base_scores[seed] for seed in shared])) if shared else None,
                verdict="baseline" if level == factor.baseline else "unproved",
                steps=float(np.mean([run["steps"] for run in runs.values()])),
                tokens=float(np.mean([run["tokens"] for run in runs.values()])),
                joules=None if None in joules else float(np.mean(joules)),
                curve=curves[level],
            )
        )
    return [_judged(line, p) for line, p in zip(lines, holm([line.p for line in lines]), strict=True)]


def _judged(line: Line, p_holm: float | None) -> Line:
    if line.verdict == "baseline":
        return line
    verdict = verdict_of(line.difference, p_holm, line.pairs, line.lower_is_better)
    return replace(line, p_holm=p_holm, verdict=verdict)


def _of_seeds(name: str, level: str, share: float, measure: Measure, results: Results) -> dict[int, Mapping[str, Any]]:
    return {
        arm.seed: result
        for arm, result in results.items()
        if (arm.factor, arm.level, arm.share) == (name, level, share) and measure.name in result["scores"]
    }


def _interval(runs: Collection[Mapping[str, Any]], measure: Measure) -> Interval:
    """Of the mean score of runs that differ in their seeds."""
    scored = [run["scores"][measure.name] for run in runs]
    return interval_of(
        [each["score"] for each in scored], [_rows(each) for each in scored],
        [each.get("interval") for each in scored],
    )  # fmt: skip


def _rows(scored: Mapping[str, Any]) -> dict[str, float]:
    """A run's rows, where their mean is its score: by rightness, or by score; else none."""
    for column in (0, 1):
        values = {row: float(pair[column]) for row, pair in scored["rows"].items()}
        if values and abs(np.mean(list(values.values())) - scored["score"]) < 1e-6:
            return values
    return {}


def _curve(name: str, level: str, measure: Measure, results: Results) -> list[tuple[float, float, float, float]]:
    shares = sorted({arm.share for arm in results if (arm.factor, arm.level) == (name, level)})
    points = []
    for share in shares:
        runs = _of_seeds(name, level, share, measure, results)
        scores = [run["scores"][measure.name]["score"] for run in runs.values()]
        if scores:
            low, high, _ = _interval(runs.values(), measure)
            documents = float(np.mean([run["documents"] for run in runs.values()]))
            points.append((documents, float(np.mean(scores)), low, high))
    return points


# ---------------------------------------------------------------------------------------------------------------- page
def page(study: Study, lines: Sequence[Line], values: Mapping[str, Any]) -> str:
    """The report as HTML, with nothing that is loaded from elsewhere."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["j2"]), trim_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        study=study, values=values, tables=_tables(study, lines), charts=_charts(study, lines), said_p=said_p,
        said_samples=said_samples, said_interval=said_interval, notes=uneven_notes(values),
        chance=said_chance([line.p for line in lines]), commit=said_commit(values["commit"]),
        machine=said_machine(values["machine"]),
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
