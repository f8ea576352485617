"""Stage `merge` of the tour: its rows, and which commands it runs with what. Commands are stood in for."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmllm.quickstart.tour import stage_merge
from mmllm.quickstart.tour.merge_rows import PARTS, Skill, make_skills
from mmllm.quickstart.tour.stage import Tour

SCORES = {"start_model": 0.1, "merge_list": 0.9, "merge_colours": 0.7}
"""Of models; a merge has what its method keeps."""
KEPT = {"ties": 0.9, "evolved": 0.95, "cat": 0.85}


class Commands:
    """Stands for `mmllm`: notes each command line and writes what it would."""

    def __init__(self) -> None:
        self.lines: list[list[str]] = []

    def __call__(self, command: Sequence[str]) -> int:
        self.lines.append(list(command))
        given = dict(itertools.pairwise(command))
        match command[0]:
            case "data" if command[1] == "build":
                Path(given["--out"]).mkdir(parents=True, exist_ok=True)
                (Path(given["--out"]) / "shards.json").write_text("{}")
            case "fit":
                write_model(Path(yaml.safe_load(Path(given["-c"]).read_text())["model"]["init_args"]["out"]))
            case "merge":
                write_model(Path(given["--out"]))
            case "eval":
                key = {"caption": "exact_match", "interleaved": "answer_accuracy"}[given["--task"]]
                path = Path(given["--json"])
                path.parent.mkdir(parents=True, exist_ok=True)
                values = {"task": given["--task"], given["--task"]: {key: score(given)}, "predictions": []}
                path.write_text(json.dumps(values))
        return 0


def score(given: dict[str, str]) -> float:
    name = Path(given["--model"]).name
    start, best = SCORES["start_model"], SCORES["merge_list" if given["--task"] == "caption" else "merge_colours"]
    if name in SCORES:
        return SCORES[name]
    kept = next((share for method, share in KEPT.items() if method in name), 0.5)
    return start + kept * (best - start) - (0.05 if "_val" in given["--json"] else 0.0)


def write_model(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")


def scene(name: str, **more: Any) -> dict[str, Any]:
    objects = [{"shape": "ring", "colour": "red"}, {"shape": "star", "colour": "blue"}]
    return {"id": name, "image": f"{name}.png", "text": "x", "objects": objects, **more}


@pytest.fixture
def tour(tmp_path: Path) -> Tour:
    demo = tmp_path / "demo"
    (demo / "manifests").mkdir(parents=True)
    train = [scene(f"a{number}") for number in range(5)] + [scene("worded", plain=False)]
    test = [scene(f"t{number}") for number in range(10)] + [scene("pair", heldout_pairs=[["red", "ring"]])]
    for name, rows in (("train-caption", train), ("test", test)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (demo / "manifests" / f"{name}.jsonl").write_text(lines)
    sources = [{"name": "plain", "kind": "caption", "shards": "c/*.tar", "weight": 0.8},
               {"name": "asked", "kind": "interleaved", "shards": "i/*.tar", "weight": 0.2}]  # fmt: skip
    recipe = {"seed": 0, "tokenizer": "t", "sequence_length": 64, "sources": sources}
    (demo / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_model(demo / "start_model")
    return Tour(demo / "start_model", demo, tmp_path / "out", minutes=0.5, run_command=Commands())


def test_rows_are_apart_and_a_small_demo_has_all_parts(tour: Tour) -> None:
    skills = make_skills(tour)
    assert [(skill.name, skill.task) for skill in skills] == [("list", "caption"), ("colours", "interleaved")]
    for rows in skills.values():
        ids = {part: {row["id"].partition("_")[0] for row in rows[part]} for part in PARTS}
        assert [len(ids[part]) for part in PARTS] == [5, 2, 8]
        assert not ids["val"] & ids["test"] and "pair" not in ids["val"] | ids["test"] and "worded" not in ids["train"]
    (captions, questions) = skills.values()
    assert captions["test"][0]["text"] == "2: red ring, blue star" and questions["test"][0]["answer"] == "blue and red"
    assert (tour.out / "data" / captions["test"][0]["image"]).resolve() == tour.data / "manifests" / "t9.png"


def test_drawings_of_one_person_are_asked_for_a_tone_that_was_not_shown(tour: Tour, tmp_path: Path) -> None:
    """Of each person one tone to test and the next to choose by; drawings of nobody and of two people are left out."""
    tones = {"1f3fb": "light", "1f3fc": "medium-light", "1f3fd": "medium", "1f3fe": "medium-dark", "1f3ff": "dark"}
    drawings = [{"id": f"emoji_{base}_{code}", "image": "x.png", "text": f"{base} with {name} skin tone"}
                for base in ("runner", "judge") for code, name in tones.items()]  # fmt: skip
    others = (("emoji_tile", "tile"), ("emoji_pair_1f3fb_1f3ff", "pair with two tones skin tone"))
    drawings += [{"id": name, "image": "x.png", "text": text} for name, text in others]
    for name, rows in (("emoji", drawings), ("cifar10", [{"id": "p", "image": "p.jpg", "text": "a photo of a cat"}])):
        (tmp_path / "sets" / name).mkdir(parents=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "sets" / name / "manifest.jsonl").write_text(lines)
    skills = make_skills(replace(tour, media=tmp_path / "sets"))
    assert [(skill.name, skill.task) for skill in skills] == [("emoji", "interleaved"), ("photos", "interleaved")]
    found = next(iter(skills.values()))
    assert [len(found[part]) for part in PARTS] == [6, 2, 2]
    for base in ("runner", "judge"):
        answers = [row["answer"] for part in PARTS for row in found[part] if base in row["id"]]
        assert sorted(answers) == sorted(tones.values()), "each tone once"
        assert sum(base in row["id"] for row in found["test"]) == 1


def test_what_is_chosen_by_some_rows_is_judged_by_others(tour: Tour) -> None:
    found = stage_merge.STAGE.run(tour)
    assert found["best_method"] == "ties" and found["best_share_of_gain"] == pytest.approx(0.9)
    assert found["evolved_share_of_gain"] == pytest.approx(0.95)
    assert found["evolved_points"] == pytest.approx(100 * 0.05 * (0.8 + 0.6) / 2)
    assert set(found["methods"]) == {*stage_merge.SHOWN, "evolved"} and found["settings"]["ties"] == "merge_ties_1"
    commands: Any = tour.run_command
    fits = [yaml.safe_load(Path(line[2]).read_text()) for line in commands.lines if line[0] == "fit"]
    assert [fit["model"]["init_args"]["max_seconds"] for fit in fits] == [30.0, 30.0]  # a tenth of the usual 5 minutes
    assert all(fit["model"]["init_args"]["adapter"] == stage_merge.ADAPTER for fit in fits)
    for fit, name in zip(fits, ("list", "colours"), strict=True):
        sources = yaml.safe_load(Path(fit["data"]["init_args"]["recipe"]).read_text())["sources"]
        assert [(each["name"], each["weight"]) for each in sources] == [(name, 0.6), ("asked", 0.4)]
    search = yaml.safe_load((tour.out / "configs" / "merge_evolved.yaml").read_text())
    assert search["merge_method"] == "ties" and search["evolve"]["minutes"] == pytest.approx(0.4)
    assert [task["goal"] for task in search["evolve"]["tasks"]] == [0.9, 0.7]
    assert all("_val" in task["manifest"] for task in search["evolve"]["tasks"])
    before = len(commands.lines)
    assert stage_merge.STAGE.run(tour) == found and len(commands.lines) == before  # nothing is done twice


@pytest.mark.parametrize("method", ["slerp", "linear", "ties"])
def test_a_search_begins_at_the_best_merge(tour: Tour, method: str) -> None:
    skills = [Skill("one", "caption", "caption", "exact_match"), Skill("two", "caption", "caption", "exact_match")]
    parents = {skill: tour.out / "models" / skill.name for skill in skills}
    for folder in parents.values():
        write_model(folder)
    values = next(v for name, v in stage_merge.recipes(tour, parents) if name == f"merge_{method}_1")
    manifests = {skill: {"val": tour.out / "v"} for skill in skills}
    stage_merge.evolve(tour, values, manifests, {"one": 0.1, "two": 0.2}, {"one": 0.9, "two": 0.2})
    search = yaml.safe_load((tour.out / "configs" / "merge_evolved.yaml").read_text())
    assert [each["model"] for each in search["models"]] == [f"{folder}+{s.name}" for s, folder in parents.items()]
    assert search["base_model"] == str(tour.model)
    assert search["merge_method"] == ("ties" if method == "ties" else "task_arithmetic")
    assert ("goal" in search["evolve"]["tasks"][0], "goal" in search["evolve"]["tasks"][1]) == (True, False)
