"""Stage `incremental` of the tour: its questions against the scenes, and its tables from stand-ins of commands."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from mmllm.checkpoints.files import ADAPTERS
from mmllm.evaluation.results import TaskResult, save_result
from mmllm.quickstart.scenes import make_scenes
from mmllm.quickstart.tour import stage_incremental as stage
from mmllm.quickstart.tour.question_types import TYPES, make_questions
from mmllm.quickstart.tour.stage import Tour

NUM = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("demo")
    make_scenes(home / "data" / "scenes", 360, 240, 1, seed=0, image_size=32)
    (home / "data" / "speech").mkdir()
    for split in ("train", "test"):
        (home / "data" / "speech" / f"{split}.jsonl").write_text("")
    return home


def scene_of(data: Path, split: str, picture: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (data / "data/scenes" / f"{split}.jsonl").read_text().splitlines()]
    return next(row for row in rows if (data / "data/scenes" / row["image"]).resolve() == picture.resolve())


def right_answer(row: dict[str, Any], scene: dict[str, Any]) -> str:
    """Told from the question's words and the scene's row, in another way than the question was made."""
    things, words = scene["objects"], row["question"].rstrip("?").split()
    match row["asks"]:
        case "count":
            return ("one", "two", "three")[len(things) - 1]
        case "there":
            return "yes" if any(words[3] in thing.values() for thing in things) else "no"
        case "colour" | "size":
            shape = words[-1] if row["asks"] == "colour" else words[2]
            (thing,) = [thing for thing in things if thing["shape"] == shape]
            return thing[row["asks"]]
        case "shape":
            (thing,) = [thing for thing in things if thing["colour"] == words[-1]]
            return thing["shape"]
        case "end":
            is_first = words[-1] in ("left", "top")
            assert (scene["relations"][0][1] == "left of") == (words[-1] in ("left", "right"))
            return things[0 if is_first else -1]["shape"]
    assert row["asks"] == "beside"
    (place,) = [n for n, thing in enumerate(things) if thing["shape"] == words[-1]]
    side = " ".join(words[5:-2])
    assert (scene["relations"][0][1] == "left of") == (side in ("left of", "right of"))
    return things[place - 1 if side in ("left of", "above") else place + 1]["colour"]


@pytest.mark.parametrize("asks", TYPES)
def test_a_questions_answer_is_what_its_scene_shows(data: Path, tmp_path: Path, asks: str) -> None:
    rows = make_questions(data / "data", asks, "test", NUM, 0, tmp_path)
    for row in rows:
        picture = tmp_path / row["segments"][1]["image"]
        assert row["answer"] == right_answer(row, scene_of(data, "test", picture)), row
    assert len({(row["segments"][1]["image"], row["question"]) for row in rows}) == NUM
    assert len({row["answer"] for row in rows}) > 1
    assert rows == make_questions(data / "data", asks, "test", NUM, 0, tmp_path)
    first = make_questions(data / "data", asks, "test", NUM // 2, 0, tmp_path)
    assert rows[: NUM // 2] == first  # fewer rows are the first of more


class Commands:
    """Stands in for the commands, and counts what they are asked to do."""

    def __init__(self) -> None:
        self.lines: list[list[str]] = []

    def __call__(self, command: Sequence[str]) -> int:
        self.lines.append(list(command))
        option = {flag: value for flag, value in itertools.pairwise(command) if flag.startswith("-")}
        match command[0]:
            case "data" if command[1] == "build":
                shards = Path(option["--out"])
                shards.mkdir(exist_ok=True)
                (shards / "shards.json").write_text("{}")
            case "fit":
                config = yaml.safe_load(Path(option["-c"]).read_text())["model"]["init_args"]
                self.save(Path(config["out"]), config)
            case "eval":
                key = {"caption": "exact_match", "interleaved": "answer_accuracy"}[option["--task"]]
                save_result(
                    TaskResult(option["--task"], {key: 0.9 if "start" in option["--json"] else 0.8}), option["--json"]
                )
            case "reason":
                Path(option["--json"]).write_text(json.dumps({"scores": [{"accuracy": 0.25}]}))
            case "incremental":
                out = Path(option["--out"])
                out.mkdir(exist_ok=True)
                told = {"matrix": [], "average": 0.6, "backward_transfer": -0.1, "forward_transfer": 0.0,
                        "forgetting": 0.1, "points_lost": {"captions": 2.0, "transcripts": 3.5}}  # fmt: skip
                (out / "matrix.json").write_text(json.dumps(told))
        return 0

    def save(self, folder: Path, config: dict[str, Any]) -> None:
        folder.mkdir(parents=True)
        save_file({"weight": torch.zeros(10, 4)}, folder / "model.safetensors")
        if config.get("adapter") is not None:
            adapter = folder / ADAPTERS / config["adapter_name"]
            adapter.mkdir(parents=True)
            save_file({"lora": torch.zeros(3, 2)}, adapter / "adapter_model.safetensors")


def test_its_tables_come_of_plain_commands(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    for name, value in (("NUM_ROWS", 12), ("NUM_TEST", 8), ("PICK_ROWS", (3, 6)), ("FEW_ROWS", (1, 2))):
        monkeypatch.setattr(stage, name, value)
    (data / "manifests").mkdir(exist_ok=True)
    (data / "manifests" / "test.jsonl").write_text("")
    sources = [{"name": "text", "kind": "text", "shards": "x", "weight": 1.0}]
    (data / "recipe.yaml").write_text(yaml.safe_dump({"tokenizer": "t", "sequence_length": 64, "sources": sources}))
    model = tmp_path / "model"
    model.mkdir()
    ran = Commands()
    tour = Tour(model, data, tmp_path / "out", run_command=ran, limit=5)
    found = stage.STAGE.run(tour)
    assert found["forgetting_points"] == 3.5 and found["average"] == 0.6
    assert set(found["reptile"]) == {"1", "2"}
    assert found["reptile"]["1"] == {"plain": 0.8, "reptile": 0.8, "joint": 0.8, "in_context": 0.25}
    table = {(row["method"], row["rows"]): row for row in found["pick"]}
    assert set(table) == {*((method, rows) for method in stage.METHODS for rows in (3, 6)),
                          *(("in_context", shots) for shots in stage.SHOTS)}  # fmt: skip
    assert table["full", 3]["trained_parameters"] == 40 and table["lora", 3]["trained_parameters"] == 6
    assert table["lora", 6]["forgetting_points"] == pytest.approx(10) and table["lora", 6]["minutes"] == 0.7
    assert table["in_context", 8] == {"method": "in_context", "rows": 8, "score": 0.25, "minutes": 0.0,
                                      "trained_parameters": 0, "forgetting_points": 0.0}  # fmt: skip
    plan = yaml.safe_load((tmp_path / "out/configs/incremental_plan.yaml").read_text())
    assert [task["name"] for task in plan["tasks"]] == list(stage.TASKS) and plan["start"] == str(model)
    fitted = [yaml.safe_load(Path(line[2]).read_text()) for line in ran.lines if line[0] == "fit"]
    steps = {config["trainer"]["max_steps"] for config in fitted if "_rows" in config["model"]["init_args"]["out"]}
    assert steps == {stage.ADAPT_STEPS} and len(fitted) == 2 + 2 * 3 + 2 * len(stage.METHODS)
    starts = [c["model"]["init_args"]["init_from"] for c in fitted if "_1_rows" in c["model"]["init_args"]["out"]]
    assert starts == [str(model), str(tmp_path / "out/models/reptile"), str(tmp_path / "out/models/joint")]
    before = len(ran.lines)
    assert stage.STAGE.run(tour) == found and len(ran.lines) == before  # nothing is done twice
