"""Training curves: from the columns of a metrics.csv to the report's charts."""

from __future__ import annotations

import csv
import logging
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmllm.evaluation.charts import Chart, Points, line_chart

_logger = logging.getLogger(__name__)

_CHARTS: tuple[tuple[str, str], ...] = (
    (r"(?:train|val)/loss/(?P<line>text|units|ctc|advance)", "Loss by modality"),
    (r"val/(?P<line>text|units|advance)", "Loss by modality"),
    (r"train/loss/source/(?P<line>.+)", "Loss by source"),
    (r"(?:train|val)/(?P<line>loss)", "Loss"),
    (r"(?:train|val)/(?P<line>mel|log_spectrum|l1|level|pitch|commit|ctc)", "Losses"),
    (r"(?:samples|val|train)/(?P<line>\w*(?:exact_match|accuracy|wer|cer|word_errors))", "Scores while training"),
    (r"train/loss/(?P<line>balance|z)", "Routing losses"),
    (r"train/loss/(?P<line>.+)", "Other losses"),
    (r"train/(?P<line>tokens_per_second)", "Tokens a second"),
    (r"(?:train/)?(?P<line>lr)(?:-\w+)?", "Learning rate"),
    (r"routing/(?P<line>mutual_information_bits)", "Expert and modality: mutual information, bits"),
    (r"routing/max_violation/(?P<line>mean|max)", "Busiest expert: load over the mean, less 1"),
    (r"routing/router_entropy_bits/(?P<line>text|image|audio|units)", "Entropy of the router, bits"),
)
"""For each column of a metrics.csv the first pattern that matches names its chart; columns without one are left out.

Charts are shown in this order.
"""

_WEIGHT_OF = {"commit": "commitment"}
"""The weight of a loss, where it is called otherwise in the log."""


def trained_curves(columns: Mapping[str, Points], weights: Mapping[str, Any]) -> dict[str, Points]:
    """The columns of a metrics.csv without those of losses that have no weight: nothing learns from them.

    Args:
        columns: by name.
        weights: of the losses, as the stage's config has them (`losses` of a codec, `loss` of a decoder); one that is
            not there has a weight.
    """
    kept = {}
    for name, points in columns.items():
        match = re.fullmatch(r"(?:train|val)/(?:loss/)?(?P<loss>\w+)", name)
        weight = weights.get(_WEIGHT_OF.get(match["loss"], match["loss"])) if match else None
        if weight != 0:
            kept[name] = points
    return kept


def read_curves(path: str | Path) -> dict[str, Points]:
    """The numeric columns of a Lightning CSVLogger's metrics.csv, each as (step, value) pairs; empty cells skipped."""
    curves: dict[str, Points] = defaultdict(list)
    with Path(path).open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = _number(row.get("step"))
            if step is None:
                continue
            for name, cell in row.items():
                value = _number(cell)
                if name not in (None, "step", "epoch") and value is not None:
                    curves[name].append((step, value))
    return dict(curves)


def group_curves(columns: Mapping[str, Points]) -> dict[str, dict[str, Points]]:
    """Columns of a metrics.csv as charts of named lines, in the order in which they are shown.

    What was measured on validation data is named "val …"; columns with a single point are left out, and losses that are
    0 throughout.
    """
    charts: dict[str, dict[str, Points]] = {}
    for name, points in sorted(columns.items()):
        for pattern, chart in _CHARTS:
            match = re.fullmatch(pattern, name)
            if match is None:
                continue
            split = "val " if name.startswith("val/") else ""
            is_idle = "oss" in chart and not any(value for _, value in points)
            if len(points) > 1 and not is_idle:
                charts.setdefault(chart, {})[split + match["line"].replace("_", " ")] = points
            break
    return {chart: charts[chart] for chart in dict.fromkeys(chart for _, chart in _CHARTS) if chart in charts}


def stage_charts(curves: Mapping[str, str | Path | Mapping[str, Points]]) -> list[tuple[str, list[Chart]]]:
    """The charts of each training stage; files that don't exist and stages without curves are left out."""
    stages = []
    for stage, source in curves.items():
        if isinstance(source, Mapping):
            columns = dict(source)
        elif Path(source).is_file():
            columns = read_curves(source)
        else:
            _logger.warning("no training curves at %s; the report leaves them out", source)
            continue
        charts = [line_chart(title, lines, "oss" in title) for title, lines in group_curves(columns).items()]
        if charts:
            stages.append((stage, charts))
    return stages


def _number(cell: str | None) -> float | None:
    try:
        value = float(cell) if cell else math.nan
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None
