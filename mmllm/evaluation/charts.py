"""Geometry of the report's drawings: curves, waveforms and the routing heat map, as numbers that SVG takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PALETTE = ("#2563a8", "#c2571a", "#2f8f5b", "#8a4fa3", "#b8860b", "#0e8a94", "#a83254", "#5b6770")
MODALITY_COLORS = {"text": "#2563a8", "image": "#c2571a", "audio": "#2f8f5b", "units": "#8a4fa3"}
MAX_POINTS = 240

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One curve of a chart, ready for `<polyline points=…>`."""

    name: str
    colour: str
    points: str
    last: str
    """The last value, which the legend shows."""
    dashed: bool


@dataclass(frozen=True)
class Chart:
    """A line chart in a box of `width` x `height` with the plot inside the four margins."""

    title: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int


@dataclass(frozen=True)
class Cell:
    """One layer's one expert in a heat map."""

    x: float
    y: float
    colour: str
    ink: str
    label: str
    title: str


@dataclass(frozen=True)
class HeatMap:
    """Layers down, experts across, for one modality."""

    title: str
    colour: str
    cells: list[Cell]
    rows: list[tuple[float, str]]
    columns: list[tuple[float, str]]
    width: float
    height: float
    cell_width: float
    cell_height: float


def line_chart(
    title: str, curves: Mapping[str, Points], clips_top: bool = False, width: int = 460, height: int = 230
) -> Chart:
    """A chart of curves over training steps; long ones are averaged in bins.

    Args:
        title: of the chart.
        curves: (step, value) pairs by the line's name.
        clips_top: let the highest 2% of values, mostly a first spike, leave the plot at the top; the page clips them.
        width: of the box, in SVG units.
        height: of the box.

    Raises:
        ValueError: there is no point to draw.
    """
    curves = {name: _binned(points) for name, points in curves.items() if points}
    if not curves:
        raise ValueError(f"chart {title!r} has no points; leave it out")
    left, right, top, bottom = 48, 10, 10, 26
    xs = [x for points in curves.values() for x, _ in points]
    low, high = _value_range([y for points in curves.values() for _, y in points], clips_top)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)

    def place_x(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (width - left - right)

    def place_y(y: float) -> float:
        return height - bottom - (y - low) / (high - low) * (height - top - bottom)

    colours = _line_colours(list(curves))
    lines = []
    for name, points in curves.items():
        text = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in points)
        if len(points) == 1:
            text += f" {place_x(points[0][0]) + 2:.1f},{place_y(points[0][1]):.1f}"
        lines.append(Line(name, colours[name], text, _legend_label(points[-1][1]), name.startswith("val")))
    return Chart(
        title=title,
        lines=lines,
        x_ticks=[(place_x(x), _tick_label(x)) for x in _nice_ticks(x_low, x_high, 5)],
        y_ticks=[(place_y(y), _tick_label(y)) for y in _nice_ticks(low, high, 4)],
        width=width,
        height=height,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
    )


def waveform(samples_T: np.ndarray, width: int = 240, height: int = 36) -> str:
    """The envelope of a sound as an SVG path that is filled: full scale spans the height, so that loudness is seen."""
    samples_T = np.abs(np.asarray(samples_T, dtype=np.float32).reshape(-1))
    if not len(samples_T):
        return ""
    num_bins = min(width // 2, len(samples_T))
    peaks = np.array([part.max() for part in np.array_split(samples_T, num_bins)])
    peaks = np.clip(peaks, 0.03, 1.0) * (height / 2 - 1)
    xs = np.linspace(0, width, num_bins)
    upper = [f"{x:.0f} {height / 2 - p:.1f}" for x, p in zip(xs, peaks, strict=True)]
    lower = [f"{x:.0f} {height / 2 + p:.1f}" for x, p in zip(xs[::-1], peaks[::-1], strict=True)]
    return "M" + "L".join(upper + lower) + "Z"


def routing_maps(routing: Mapping[str, Any]) -> list[HeatMap]:
    """A heat map for each modality of `routing_summary`: colour and number say load over an even share."""
    num_experts = routing["num_experts"]
    cell_width = max(8.0, min(34.0, 300.0 / num_experts))
    cell_height = 24.0
    left, top = 34.0, 16.0
    maps = []
    for m, modality in enumerate(routing["modalities"]):
        cells = []
        for row, layer in enumerate(routing["layers"]):
            dead = set(routing["dead_experts"][row])
            for expert, share in enumerate(routing["load_by_modality"][row][m]):
                ratio = share * num_experts
                strength = min(ratio / 3.0, 1.0) ** 0.75
                cells.append(
                    Cell(
                        x=left + expert * cell_width,
                        y=top + row * cell_height,
                        colour=_blend(MODALITY_COLORS[modality], strength),
                        ink="#ffffff" if strength > 0.55 else "#3a3f47",
                        label=("×" if expert in dead else f"{ratio:.1f}") if cell_width >= 24 else "",
                        title=f"layer {layer}, expert {expert}: {share:.1%} of {modality}, {ratio:.2f} x an even share",
                    )
                )
        every = max(1, math.ceil(16.0 / cell_width))
        maps.append(
            HeatMap(
                title=modality,
                colour=MODALITY_COLORS[modality],
                cells=cells,
                rows=[(top + (r + 0.5) * cell_height, str(layer)) for r, layer in enumerate(routing["layers"])],
                columns=[(left + (e + 0.5) * cell_width, str(e)) for e in range(0, num_experts, every)],
                width=left + num_experts * cell_width + 2,
                height=top + len(routing["layers"]) * cell_height + 2,
                cell_width=cell_width - 1.5,
                cell_height=cell_height - 1.5,
            )
        )
    return maps


def _binned(points: Points) -> Points:
    points = sorted(points)
    if len(points) <= MAX_POINTS:
        return points
    return [(float(b[:, 0].mean()), float(b[:, 1].mean())) for b in np.array_split(np.array(points), MAX_POINTS)]


def _value_range(values: Sequence[float], clips_top: bool) -> tuple[float, float]:
    low = min(values)
    high = float(np.quantile(values, 0.98)) if clips_top else max(values)
    if high == low:
        high = low + max(abs(low), 1.0) * 0.1
    margin = 0.05 * (high - low)
    return (0.0 if 0 <= low < 0.4 * high else low - margin), high + margin


def _nice_ticks(low: float, high: float, num_wanted: int) -> list[float]:
    raw = (high - low) / num_wanted
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw)
    first = math.ceil(low / step)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _tick_label(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:g}"


def _legend_label(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _line_colours(names: Sequence[str]) -> dict[str, str]:
    """A modality's own colour, also for its validation curve; other names share the palette's rest."""
    words = {name: name.rsplit(" ", 1)[-1] for name in names}
    taken = {MODALITY_COLORS[word] for word in words.values() if word in MODALITY_COLORS}
    free = [colour for colour in PALETTE if colour not in taken]
    others = list(dict.fromkeys(name.removeprefix("val ") for name in names if words[name] not in MODALITY_COLORS))
    chosen = {name: free[i % len(free)] for i, name in enumerate(others)}
    return {name: MODALITY_COLORS.get(words[name]) or chosen[name.removeprefix("val ")] for name in names}


def _blend(colour: str, strength: float) -> str:
    channels = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(246 + (c - 246) * strength):02x}" for c in channels)
