"""`evolve`: a merge's numbers searched by scores: budgets, resuming, what is written, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import mmllm.training.merging_search as search
from mmllm.evaluation.results import TaskResult
from mmllm.inference.api import Model
from tests.merging_fixtures import merge, models, save, weights

pytest.importorskip("cma")
torch.set_num_threads(1)
NAME = "decoder.layers.0.self_attn.q_proj.weight"
GOAL = (0.8, 0.2)
"""Weights at which the scores below are best."""


@pytest.fixture
def parents(tmp_path: Path) -> list[Path]:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "t", "text": "a red circle"}) + "\n")
    return [save(tmp_path / name, seed) for seed, name in enumerate(("base", "one", "two"))]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, parents: list[Path]) -> list[Model]:
    """Scores that are best at GOAL; gives the models that were scored."""
    base, one, two = (weights(folder)[NAME] for folder in parents)
    wanted = base + GOAL[0] * (one - base) + GOAL[1] * (two - base)
    models_asked: list[Model] = []

    def evaluate(model: Model, task: str, rows: Sequence[Any], limit: int, seed: int) -> TaskResult:
        models_asked.append(model)
        distance = (model.model.state_dict()[NAME] - wanted).norm() / (one - base).norm()
        return TaskResult("text", {"bits_per_byte": float(distance), "n": 1})

    monkeypatch.setattr(search, "evaluate", evaluate)
    return models_asked


def config_of(parents: list[Path], **changes: Any) -> dict[str, Any]:
    tasks = [{"task": "text", "manifest": str(parents[0].parent / "rows.jsonl")}]
    return {"merge_method": "task_arithmetic", "base_model": str(parents[0]), "models": models(*parents[1:]),
            "evolve": {"tasks": tasks, "budget": 60, "seed": 1, **changes}}  # fmt: skip


def trace(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.with_name(f"{out.name}.evolve.jsonl").read_text().splitlines()][1:]


def test_it_finds_the_best_weights(
    parents: list[Path], asked: list[Model], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = merge(capsys, tmp_path / "out", config_of(parents))
    tried = trace(tmp_path / "out")
    best = max(tried, key=lambda each: each["objective"])
    assert tried[0]["point"] == [0.5, 0.5] and len(tried) <= 60 == len(asked)
    found = [value for *_, value in best["parameters"]]
    assert found == pytest.approx(GOAL, abs=0.03)
    assert "best of 60" in said
    base, one, two = (weights(folder) for folder in parents)
    for name, tensor in weights(tmp_path / "out").items():
        if tensor.is_floating_point():
            wanted = base[name] + found[0] * (one[name] - base[name]) + found[1] * (two[name] - base[name])
            torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=1e-6)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "validation 0 text bits_per_byte" in card and "candidates: 60" in card and "weight:" in card


def test_it_goes_on_where_it_ended(
    parents: list[Path], asked: list[Model], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    merge(capsys, tmp_path / "whole", config_of(parents, budget=20))
    scored, whole = search.Scorer.scores, trace(tmp_path / "whole")
    left = [11]

    def killed(self: search.Scorer, config: Any) -> dict[str, float]:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return scored(self, config)

    monkeypatch.setattr(search.Scorer, "scores", killed)
    merge(capsys, tmp_path / "out", config_of(parents, budget=20), code=130)
    file = tmp_path / "out.evolve.jsonl"
    file.write_text(file.read_text() + '{"candidate": 11, "scores": {"text": 1.0}')  # as a killed process may leave it
    monkeypatch.setattr(search.Scorer, "scores", scored)
    asked.clear()
    torch.manual_seed(5)
    said = merge(capsys, tmp_path / "out", config_of(parents, budget=20))
    assert "11 candidates were scored before" in said and len(asked) == 9
    resumed = trace(tmp_path / "out")
    assert [each["point"] for each in resumed] == [each["point"] for each in whole]
    assert [each["objective"] for each in resumed] == [each["objective"] for each in whole]


def test_budgets_end_it(
    parents: list[Path], asked: list[Model], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge(capsys, tmp_path / "short", config_of(parents, budget=3))
    assert len(trace(tmp_path / "short")) == 3
    merge(capsys, tmp_path / "brief", config_of(parents, budget=None, minutes=1e-9))
    assert len(trace(tmp_path / "brief")) == 1


def test_groups_of_layers_and_other_numbers(
    parents: list[Path], asked: list[Model], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = config_of(parents, budget=8, layer_groups=2, parameters=["weight", "density"])
    merge(capsys, tmp_path / "out", {**values, "merge_method": "ties", "parameters": {"weight": 0.7, "density": 1}})
    first = trace(tmp_path / "out")[0]
    assert [(key, value) for key, _, _, value in first["parameters"]] == [("weight", 0.7)] * 4 + [("density", 1.0)] * 4
    slerp = config_of(parents, budget=3, layer_groups=2)
    slerp |= {"merge_method": "slerp", "models": models(parents[1])}
    merge(capsys, tmp_path / "slerp", slerp)
    assert {key for key, *_ in trace(tmp_path / "slerp")[0]["parameters"]} == {"t"}
    said = merge(capsys, tmp_path / "check", slerp, "--check")
    assert "2 numbers would be searched: t" in said


def test_objectives() -> None:
    tasks = (search.ScoredTask("caption", manifest="x", start=0.1, goal=0.6), search.ScoredTask("transcribe", "x"))
    assert tasks[0].worth(0.5) == pytest.approx(0.8) and tasks[1].worth(0.25) == -0.25
    errors = search.ScoredTask("transcribe", "x", start=1.0, goal=0.2)
    assert errors.worth(0.4) == pytest.approx(0.75)


def test_a_real_score(parents: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing replaced: what the trace says of the best is what the written folder scores."""
    from mmllm.evaluation.tasks import evaluate
    from mmllm.inference.api import load

    merge(capsys, tmp_path / "out", config_of(parents, budget=4))
    best = max(trace(tmp_path / "out"), key=lambda each: each["objective"])
    result = evaluate(load(tmp_path / "out", "cpu"), "text", parents[0].parent / "rows.jsonl")
    assert result.scores["bits_per_byte"] == pytest.approx(-best["objective"], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"tasks": []}, "evolve.tasks is empty"),
        ({"tasks": [{"task": "text"}]}, "lacks manifest"),
        ({"tasks": [{"task": "sing", "manifest": "x"}]}, "task 'sing'"),
        ({"tasks": [{"task": "text", "manifest": "x", "start": 1.0}]}, "give both"),
        ({"budget": None}, "neither budget"),
        ({"budget": 0}, "evolve.budget is 0"),
        ({"population": 1}, "evolve.population is 1"),
        ({"objective": "most"}, "evolve.objective is 'most'"),
        ({"generations": 3}, "has the key 'generations'"),
        ({"parameters": ["density"]}, "evolve.parameters names density; task_arithmetic has weight, lambda"),
        ({"max_weight": -1}, "evolve.max_weight is -1"),
    ],
)
def test_what_is_refused(
    parents: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], wanted: str
) -> None:
    assert wanted in merge(capsys, tmp_path / "out", config_of(parents, **changes), code=2)
    assert not list(tmp_path.glob("out.evolve*"))


def test_more_that_is_refused(
    parents: list[Path], asked: list[Model], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = {**config_of(parents), "models": models(parents[1])}
    assert "one number to find" in merge(capsys, tmp_path / "out", one, code=2)
    measure = config_of(parents)
    measure["evolve"]["tasks"][0]["measure"] = "exact"
    assert "text has bits_per_byte" in merge(capsys, tmp_path / "out", measure, code=2)
    (tmp_path / "out.evolve.jsonl").unlink()
    merge(capsys, tmp_path / "out", config_of(parents, budget=1))
    (tmp_path / "out").rename(tmp_path / "kept")
    other = merge(capsys, tmp_path / "out", config_of(parents, budget=2, seed=9), code=2)
    assert "is the trace of another search" in other
    stock = {**config_of(parents), "merge_method": "model_stock"}
    assert "model_stock has no numbers" in merge(capsys, tmp_path / "else", stock, code=2)
