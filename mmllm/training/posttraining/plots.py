"""The page of what a training costs: scores by step, reward beside the true score, how far it moved."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Protocol

from mmllm.evaluation.charts import Chart, Points, line_chart

_GREY = "#8b929c"
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;color:#22262b;max-width:960px;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse}td,th{padding:.2rem .8rem;text-align:right}th:first-child,td:first-child"
    "{text-align:left}tr+tr{border-top:1px solid #eceef0}.charts{display:flex;flex-wrap:wrap;gap:1.5rem}"
    ".legend span{margin-right:1rem;font-size:13px}.legend i{display:inline-block;width:12px;height:3px;"
    "margin-right:5px;vertical-align:middle}h2{font-size:1.05rem;margin:1.5rem 0 .3rem}"
)


class Looked(Protocol):
    """What is drawn of a look."""

    step: int
    scores: dict[str, float]
    kl: float | None
    entropy: float | None
    length: float | None
    reward: float | None


def costs_page(looks: Sequence[Looked], last_step: int) -> str:
    """All looks as one HTML page that needs no other file.

    Args:
        looks: from the start on.
        last_step: of the training so far.
    """
    names = list(looks[0].scores)
    parts = [f"<!doctype html><meta charset=utf-8><title>What it costs</title><style>{_STYLE}</style>"]
    parts.append(f"<h1>What it costs</h1><p>{len(looks)} looks up to step {last_step:,}. Higher scores are better.</p>")
    parts.append(_table(looks, names))
    scores = {name: [(float(look.step), look.scores[name]) for look in looks] for name in names}
    charts = [_figure(line_chart("Held-out tasks", scores))]
    rewards = [(float(look.step), look.reward) for look in looks if look.reward is not None]
    if rewards:
        charts.append(_two_axes("Reward and true score", names[0], scores[names[0]], rewards))
    for name, title in (
        ("kl", "KL to the start, nats a sequence"), ("entropy", "Entropy, nats a token"),
        ("length", "Tokens an answer"),
    ):  # fmt: skip
        points = [(float(look.step), value) for look in looks if (value := getattr(look, name)) is not None]
        if points:
            charts.append(_figure(line_chart(title, {name: points})))
    return "\n".join([*parts, f"<div class=charts>{''.join(charts)}</div>"]) + "\n"


def _table(looks: Sequence[Looked], names: Sequence[str]) -> str:
    start, end = looks[0], looks[-1]
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{start.scores[name]:.4f}</td><td>{end.scores[name]:.4f}</td>"
        f"<td>{100 * (start.scores[name] - end.scores[name]):+.2f}</td></tr>"
        for name in names
    )
    return f"<table><tr><th>task</th><th>start</th><th>now</th><th>points lost</th></tr>{rows}</table>"


def _two_axes(title: str, truth: str, scores: Points, rewards: Points) -> str:
    """Both over one range of steps: the score by the left axis, the reward by the right one."""
    both = [step for step, _ in (*scores, *rewards)]
    ends = (min(both), max(both))
    left, right = (_spanned(title, name, points, ends) for name, points in ((truth, scores), ("reward", rewards)))
    return _figure(left, right)


def _spanned(title: str, name: str, points: Points, ends: tuple[float, float]) -> Chart:
    """A chart whose steps reach from end to end, so that two of them have one axis of steps."""
    values = [value for _, value in points]
    chart = line_chart(title, {name: points, " ": [(end, values[0]) for end in ends]})
    lines = [line for line in chart.lines if line.name == name]
    return Chart(**{**vars(chart), "lines": lines})


def _figure(chart: Chart, right: Chart | None = None) -> str:
    """A chart as SVG with its legend; `right` is drawn over it, its values on the right-hand side."""
    margin = 0 if right is None else 44
    width, height = chart.width + margin, chart.height
    marks = [
        f'<path d="M{chart.left} {y:.1f}H{chart.width - chart.right}" stroke="#eceef0"/>'
        f"{_text(chart.left - 6, y + 3.5, label, 'end')}"
        for y, label in chart.y_ticks
    ]
    marks += [_text(x, height - 8, label, "middle") for x, label in chart.x_ticks]
    marks.append(f'<path d="M{chart.left} {height - chart.bottom}H{chart.width - chart.right}" stroke="#c9cdd2"/>')
    lines = [(line.name, line.colour, line.points, line.last, "") for line in chart.lines]
    if right is not None:
        marks += [_text(chart.width - chart.right + 6, y + 3.5, label, "start") for y, label in right.y_ticks]
        lines += [(f"{line.name} (right)", "#c2571a", line.points, line.last, "5 3") for line in right.lines]
    drawn = "".join(
        f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.7" stroke-dasharray="{dash}"/>'
        for _, colour, points, _, dash in lines
    )
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{html.escape(name)} <b>{last}</b></span>'
        for name, colour, _, last, _ in lines
    )
    return (
        f'<div><h2>{html.escape(chart.title)}</h2><svg viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="{html.escape(chart.title)} by step">{"".join(marks)}{drawn}</svg>'
        f"<div class=legend>{legend}</div></div>"
    )


def _text(x: float, y: float, label: str, anchor: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="10.5" fill="{_GREY}">'
        f"{html.escape(label)}</text>"
    )
