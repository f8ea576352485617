"""report.json and report.html: what was measured, and enough of the rows behind it to judge by eye and ear."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from mmllm.evaluation.charts import Points, routing_maps
from mmllm.evaluation.curves import stage_charts
from mmllm.evaluation.galleries import TASK_NAMES, build_galleries
from mmllm.evaluation.media import MediaBudget
from mmllm.evaluation.results import TASKS, TaskResult

REPORT_JSON = "report.json"
REPORT_HTML = "report.html"


@dataclass(frozen=True)
class Stage:
    """One stage of a run, for the list at the report's end."""

    name: str
    seconds: float
    command: str = ""


@dataclass(frozen=True)
class ReportInfo:
    """What a report says beside the scores. What is None is left out."""

    title: str = "mmllm: one model that sees, hears, reads and speaks"
    summary: str = ""
    seconds: float | None = None
    """Wall time of the whole run."""
    tokens_per_second: float | None = None
    peak_rss_bytes: int | None = None
    """Largest resident memory of the process tree."""
    recipe_hash: str | None = None
    commit: str | None = None
    machine: str = ""
    made_at: str = ""
    stages: tuple[Stage, ...] = ()
    evaluation_limits: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Of tasks for whose rows the time did not suffice: how many were `scored`, `of` how many."""


@dataclass(frozen=True)
class Measure:
    """How one score is shown."""

    key: str
    label: str
    note: str
    kind: str = "percent"
    """"percent" (on a bar from 0 to 100) or "number"."""
    higher_is_better: bool | None = True
    """None: neither is, nought is best."""
    controls: tuple[tuple[str, str], ...] = ()
    """(key, name) of the scores beside which it is to be read."""
    rows: str = "n"
    """Key of its number of rows."""
    clusters: tuple[str, str] | None = None
    """(key of their number, name) of what its rows fall into, which the interval draws whole."""


_GREY = "grey picture"
_SILENCE = "silence"
_OTHER_PICTURE = "other pictures"
MEASURES: dict[str, tuple[Measure, ...]] = {
    "caption": (
        Measure("exact_match", "Exact match", "all of the scene, or all words", controls=(
            ("blind_exact_match", _GREY), ("shuffled_exact_match", _OTHER_PICTURE))),
        Measure("attribute_accuracy", "Attributes right", "size, colour, shape, place", controls=(
            ("blind_attribute_accuracy", _GREY), ("shuffled_attribute_accuracy", _OTHER_PICTURE))),
        Measure("cider", "CIDEr-D", "n-grams shared with the reference, 0 to 10", "number", controls=(
            ("blind_cider", _GREY), ("shuffled_cider", _OTHER_PICTURE))),
        Measure("heldout_pairs_accuracy", "Pairs never trained on", "shape and colour both right", controls=(
            ("blind_heldout_pairs_accuracy", _GREY),), rows="heldout_pairs_n",
            clusters=("num_heldout_pairs", "pairs")),
        Measure("order_accuracy_2", "Order of two objects", "where both are named right; by chance 50%",
                rows="order_n_2"),
        Measure("order_accuracy_3", "Order of three objects", "where all are named right; by chance 17%",
                rows="order_n_3"),
    ),
    "transcribe": (
        Measure("wer", "Word error rate", "over all words", "percent", False, (
            ("blind_wer", _SILENCE), ("shuffled_wer", "other sounds"))),
        Measure("cer", "Character error rate", "over all characters", "percent", False, (
            ("blind_cer", _SILENCE),)),
        Measure("exact_match", "Exact match", "all words of a row", controls=(
            ("blind_exact_match", _SILENCE),)),
        Measure("heldout_voices_wer", "Word error rate, new voices", "voices never trained on", "percent", False, (
            ("blind_heldout_voices_wer", _SILENCE),), rows="heldout_voices_n",
            clusters=("num_heldout_voices", "voices")),
        Measure("joined_wer", "Word error rate, two joined", "two recordings of a voice as one", "percent", False,
            rows="joined_n"),
    ),
    "speak": (
        Measure("round_trip_wer", "Round-trip word error rate", "spoken, then transcribed back", "percent", False, (
            ("shuffled_wer", "other words"), ("resynthesis_wer", "codec alone"))),
        Measure("judge_wer", "Word error rate by another judge", "a recognizer that shares nothing with the model",
                "percent", False, (
            ("judge_shuffled_wer", "other words"), ("judge_resynthesis_wer", "codec alone"))),
        Measure("length_correlation", "Length, correlation", "of what is spoken with the recordings", "number"),
        Measure("own_voice_length_correlation", "Length, correlation, own voice", "with recordings of the same voice",
                "number", rows="own_voice_n"),
        Measure("at_bound", "Stopped at the bound", "did not end by itself", "percent", False),
        Measure("level_db", "Level, dB", "of the codec's sound against the recording's", "number", None),
        Measure("mel_error", "Log-mel error", "of the codec's sound, voiced frames", "number", False),
    ),
    "interleaved": (
        Measure("answer_accuracy", "Answers right", "all words of the answer", controls=(
            ("shuffled_accuracy", "other rows' media"), ("blind_accuracy", "grey and silent"))),
        Measure("ordinal_accuracy", "First, second, third", "questions that ask for one of several by its place",
                controls=(("shuffled_ordinal_accuracy", "other rows' media"),
                          ("blind_ordinal_accuracy", "grey and silent")), rows="ordinal_n"),
    ),
    "chat": (
        Measure("answer_accuracy", "Last answers right", "from the turns before", controls=(
            ("shuffled_accuracy", "other rows' media"), ("blind_accuracy", "grey and silent"))),
    ),
    "text": (
        Measure("bits_per_byte", "Bits a byte", "of held-out text", "number", False),
    ),
}  # fmt: skip


_ARROWS = {True: "↑", False: "↓", None: "→ 0"}


def write_report(
    out_dir: str | Path,
    results: Mapping[str, TaskResult] | Sequence[TaskResult],
    curves: Mapping[str, str | Path | Mapping[str, Points]] | None = None,
    routing: Mapping[str, Any] | None = None,
    info: ReportInfo | None = None,
) -> Path:
    """Writes `report.json` and the self-contained `report.html` (below 6 MB) to a folder.

    Args:
        out_dir: the folder; it is made.
        results: of any of the tasks; sections of absent ones are left out.
        curves: for each training stage, by the name to show, its metrics.csv (Lightning's CSVLogger) or the curves
            themselves; files that don't exist are left out.
        routing: from `mmllm.evaluation.routing.routing_summary`.
        info: what else to say.

    Returns:
        The path of report.html.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    info = info or ReportInfo()
    given = results.values() if isinstance(results, Mapping) else results
    by_task = {task: result for task in TASKS for result in given if result.task == task}
    summary = report_dict(by_task, routing, info)
    (out_dir / REPORT_JSON).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (out_dir / REPORT_HTML).write_text(_render(by_task, curves or {}, routing, info), encoding="utf-8")
    return out_dir / REPORT_HTML


def report_dict(
    results: Mapping[str, TaskResult], routing: Mapping[str, Any] | None, info: ReportInfo
) -> dict[str, Any]:
    """What report.json holds: scores by task, `train`, `routing`, `recipe_hash`, `commit`, `evaluation_limits`.

    Absent parts are left out.
    """
    train = {
        "seconds": info.seconds,
        "tokens_per_second": info.tokens_per_second,
        "peak_rss_bytes": info.peak_rss_bytes,
    }
    parts: dict[str, Any] = {task: results[task].scores for task in TASKS if task in results}
    parts["train"] = {key: value for key, value in train.items() if value is not None}
    parts["routing"] = dict(routing) if routing else None
    parts["recipe_hash"] = info.recipe_hash
    parts["commit"] = info.commit
    parts["evaluation_limits"] = {task: dict(limits) for task, limits in info.evaluation_limits.items()}
    return {key: value for key, value in parts.items() if value}


# --------------------------------------------------------------------------------------------------------- the page
def _render(
    results: Mapping[str, TaskResult],
    curves: Mapping[str, str | Path | Mapping[str, Points]],
    routing: Mapping[str, Any] | None,
    info: ReportInfo,
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mmllm.evaluation", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    galleries = build_galleries(results, MediaBudget())
    charts = stage_charts(curves)
    maps = routing_maps(routing) if routing else []
    measures = _measure_rows(results)
    contents = [("scores", "Scores")] if measures else []
    contents += [(g.anchor, g.heading) for g in galleries if g.heading]
    contents += [
        (anchor, name)
        for anchor, name, there in (
            ("curves", "Training curves", charts),
            ("routing", "Routing", maps),
            ("stages", "Stages", info.stages),
        )
        if there
    ]
    return environment.get_template("report.html.j2").render(
        info=info,
        facts=_facts(info),
        contents=contents,
        measures=measures,
        cuts=[(TASK_NAMES[task], cut["scored"], cut["of"]) for task, cut in info.evaluation_limits.items()],
        has_bars=any(row["bar"] is not None for row in measures),
        galleries=galleries,
        charts=charts,
        maps=maps,
        routing=routing,
        stages=_stage_rows(info.stages),
    )


def _facts(info: ReportInfo) -> list[tuple[str, str, bool]]:
    facts: list[tuple[str, str, bool]] = []
    if info.seconds is not None:
        facts.append(("wall time", _duration(info.seconds), False))
    if info.peak_rss_bytes is not None:
        facts.append(("peak memory", f"{info.peak_rss_bytes / 1e9:.1f} GB", False))
    if info.tokens_per_second is not None:
        facts.append(("training speed", f"{info.tokens_per_second:,.0f} tokens/s", False))
    if info.recipe_hash:
        facts.append(("recipe", info.recipe_hash[:12], True))
    if info.commit:
        digest, *dirty = info.commit.partition("-")
        facts.append(("commit", digest[:12] + "".join(dirty), True))
    return facts


def _measure_rows(results: Mapping[str, TaskResult]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for task, result in results.items():
        shown = [measure for measure in MEASURES[task] if measure.key in result.scores]
        for measure in shown:
            row = _measure_row(measure, result.scores)
            rows.append({**row, "task": TASK_NAMES[task] if measure is shown[0] else ""})
    return rows


def _measure_row(measure: Measure, scores: Mapping[str, Any]) -> dict[str, Any]:
    interval = scores.get(f"{measure.key}_ci")
    percent = measure.kind == "percent"
    controls = [(name, scores[key]) for key, name in measure.controls if key in scores]
    band = None
    if percent and interval:
        start, stop = _place(interval[0]), _place(interval[1])
        band = (start, max(stop - start, 1.5))
    return {
        "label": f"{measure.label} {_ARROWS[measure.higher_is_better]}",
        "note": measure.note,
        "value": _score(scores[measure.key], percent),
        "bar": _place(scores[measure.key]) if percent else None,
        "is_beyond": percent and scores[measure.key] > 1,  # word error rates can be
        "band": band,
        "interval": f"{_score(interval[0], percent)} – {_score(interval[1], percent)}" if interval else "",
        "controls": [(name, _score(value, percent)) for name, value in controls],
        "control_marks": [_place(value) for _, value in controls] if percent else [],
        "rows": f"{scores[measure.rows]:,}" if measure.rows in scores else "",
        "inside": _inside(measure, scores),
    }


def _inside(measure: Measure, scores: Mapping[str, Any]) -> str:
    """What the rows fall into, behind their number: "in 12 pairs"."""
    key, name = measure.clusters or ("", "")
    return f"in {scores[key]:,} {name}" if key in scores and measure.rows in scores else ""


def _place(value: float) -> float:
    """Where a fraction lies on the score table's bar, in its 200 units, clear of the ends."""
    return round(5 + 190 * min(max(value, 0.0), 1.0), 1)


def _score(value: float, percent: bool) -> str:
    return f"{100 * value:.1f}%" if percent else f"{value:.2f}"


def _stage_rows(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    longest = max((stage.seconds for stage in stages), default=0.0) or 1.0
    return [
        {
            "name": stage.name,
            "time": _duration(stage.seconds),
            "percent": round(100 * stage.seconds / longest, 1),
            "command": stage.command,
        }
        for stage in stages
    ]


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60:02d} s"


def now() -> str:
    """Today's date and time for `ReportInfo.made_at`, in UTC."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
