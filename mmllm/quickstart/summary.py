"""The report and the model card of a quickstart's folder, from what its stages have left there."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from mmllm.checkpoints.card import ModelInfo
from mmllm.checkpoints.folder import write_card
from mmllm.data.plan.plan import open_plan
from mmllm.data.plan.recipe import Recipe, load_recipe
from mmllm.evaluation.charts import Points
from mmllm.evaluation.curves import read_curves, trained_curves
from mmllm.evaluation.report import REPORT_JSON, ReportInfo, Stage, now, write_report
from mmllm.evaluation.results import TASKS, load_result
from mmllm.evaluation.routing import load_routing
from mmllm.quickstart.budget import scored_rows
from mmllm.quickstart.plan import OUTPUT_OF_STAGE, STATE_FILE, evaluation_tasks, read_contents, read_json


def summarize(out: Path) -> Path:
    """Writes `report.html`, `report.json` and the model's card; gives the page's path.

    Args:
        out: A quickstart's folder with a trained and evaluated model.

    Raises:
        ValueError: There is no trained model in it.
    """
    state = read_json(out / STATE_FILE)
    stages = state.get("stages", [])
    trained = next((stage for stage in stages if stage["name"] == "fit decoder"), None)
    if trained is None:
        raise ValueError(f"{out} holds no quickstart with a trained model; run `mmllm quickstart --out {out}` first")
    contents = read_contents(out / "manifests")
    tasks, _ = evaluation_tasks(out / "manifests" / "test.jsonl", contents)
    results = [load_result(path) for task in tasks if (path := out / "eval" / f"{task}.json").is_file()]
    logs = {name: out / "logs" / name / "metrics.csv" for name in OUTPUT_OF_STAGE}
    curves = {
        name: trained_curves(read_curves(path), _loss_weights(_config(out, name)))
        for name, path in logs.items()
        if path.is_file()
    }
    routing_file = out / "logs" / "decoder" / "routing.json"
    recipe = load_recipe(out / "recipe.yaml")
    info = ReportInfo(
        summary=f"{contents.num_rows:,} training rows of {', '.join(contents.kinds)}",
        seconds=round(state["seconds"], 1),
        tokens_per_second=_tokens_per_second(curves.get("decoder", {})),
        peak_rss_bytes=state["peak_rss_bytes"],
        recipe_hash=open_plan(recipe, 1).hash,
        commit=trained.get("commit"),
        made_at=now(),
        machine=f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        stages=tuple(Stage(stage["name"], stage["seconds"], stage["command"]) for stage in stages),
        evaluation_limits=evaluation_limits(tasks, stages),
    )
    routing = load_routing(routing_file) if routing_file.is_file() else None
    page = write_report(out, results, curves, routing, info)
    report = read_json(out / REPORT_JSON)
    scores = {task: report[task] for task in TASKS if task in report}
    data = source_lines(recipe, _num_steps(_config(out, "decoder"), curves.get("decoder", {})))
    write_card(
        out / "model",
        ModelInfo(recipe_hash=info.recipe_hash, commit=info.commit, data=data, scores=scores),
    )
    return page


def evaluation_limits(
    tasks: Mapping[str, Sequence[int]], stages: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, int]]:
    """Of each task that was scored on fewer rows than there are: how many were scored, of how many.

    Args:
        tasks: the number of rows of each set of a task, as `plan.evaluation_tasks` gives it.
        stages: those that are done, with their `name` and `command`.
    """
    limits = {}
    for task, sets in tasks.items():
        command = next((stage["command"] for stage in stages if stage["name"] == f"eval {task}"), "")
        words = shlex.split(command)
        limit = int(words[words.index("--limit") + 1]) if "--limit" in words else None
        if (num_scored := scored_rows(limit, sets)) < sum(sets):
            limits[task] = {"scored": num_scored, "of": sum(sets)}
    return limits


def _config(out: Path, stage: str) -> dict[str, Any]:
    """A training's config as it was written; none where it is not there any more."""
    path = out / "configs" / f"{stage}.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _loss_weights(config: Mapping[str, Any]) -> dict[str, Any]:
    """What each loss weighs in a training's config, where it says so."""
    model = config.get("model", {}).get("init_args", {})
    return model.get("losses") or model.get("loss") or {}


def _num_steps(config: Mapping[str, Any], curves: Mapping[str, Points]) -> int:
    """Steps that the decoder has trained: those that were asked for, or, by the clock, those that its log tells of."""
    asked = int(config.get("trainer", {}).get("max_steps", -1))
    logged = max((step for points in curves.values() for step, _ in points), default=0.0)
    return asked if asked > 0 else int(logged) + 1


def _tokens_per_second(curves: Mapping[str, Points]) -> float | None:
    """The median of the decoder's log."""
    values = sorted(value for _, value in curves.get("train/tokens_per_second", ()))
    return round(values[len(values) // 2], 1) if values else None


def source_lines(recipe: Recipe, num_steps: int) -> tuple[str, ...]:
    """A line for each source of a recipe: its share, on average over the steps where weights change with them."""
    changes = any(source.weight_schedule is not None for source in recipe.sources)
    steps = range(num_steps) if changes else (0,)
    shares = np.mean([recipe.shares(step) for step in steps], axis=0)
    over = f", on average over {num_steps:,} steps" if changes else ""
    return tuple(
        f"{source.name} ({source.kind}): {share:.0%} of the {recipe.mixture.unit}{over}"
        for source, share in zip(recipe.sources, shares, strict=True)
    )
