"""The report and the model card of a quickstart's folder, from what its stages have left there."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path

import torch

from mmllm.checkpoints.card import ModelInfo
from mmllm.checkpoints.folder import write_card
from mmllm.data.plan.plan import open_plan
from mmllm.data.plan.recipe import Recipe, load_recipe
from mmllm.evaluation.charts import Points
from mmllm.evaluation.curves import read_curves
from mmllm.evaluation.report import REPORT_JSON, ReportInfo, Stage, now, write_report
from mmllm.evaluation.results import TASKS, load_result
from mmllm.evaluation.routing import load_routing
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
    curves = {name: read_curves(path) for name, path in logs.items() if path.is_file()}
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
    )
    routing = load_routing(routing_file) if routing_file.is_file() else None
    page = write_report(out, results, curves, routing, info)
    report = read_json(out / REPORT_JSON)
    scores = {task: report[task] for task in TASKS if task in report}
    write_card(
        out / "model",
        ModelInfo(recipe_hash=info.recipe_hash, commit=info.commit, data=_sources(recipe), scores=scores),
    )
    return page


def _tokens_per_second(curves: Mapping[str, Points]) -> float | None:
    """The median of the decoder's log."""
    values = sorted(value for _, value in curves.get("train/tokens_per_second", ()))
    return round(values[len(values) // 2], 1) if values else None


def _sources(recipe: Recipe) -> tuple[str, ...]:
    """A line for each source of a recipe."""
    return tuple(
        f"{source.name} ({source.kind}): {share:.0%} of the {recipe.mixture.unit}"
        for source, share in zip(recipe.sources, recipe.shares(), strict=True)
    )
