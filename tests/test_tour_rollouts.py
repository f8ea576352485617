"""What the tour says of a training from rewards: errors cut, row by row, and whether that is chance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmllm.quickstart.tour import rollout_runs
from mmllm.quickstart.tour.stage import Tour
from mmllm.quickstart.tour.stage_grpo import mended
from mmllm.quickstart.tour.stage_speech import sentences


def test_errors_are_compared_row_by_row() -> None:
    before = {f"row {n}": n >= 40 for n in range(400)}  # 40 wrong
    after = {**before, **{f"row {n}": True for n in range(20)}, "row 100": False, "row 101": False}
    found = rollout_runs.error_cut(before, after, seed=0)
    assert (found["n"], found["errors_before"], found["errors_after"]) == (400, 40, 22)
    assert (found["mended"], found["broken"]) == (20, 2)
    assert found["error_cut"] == pytest.approx(18 / 40)
    low, high = found["error_cut_ci"]
    assert 0.2 < low < 0.45 < high < 0.7
    assert found["p"] == pytest.approx(2 * (1 + 22 + 231) / 2**22)
    assert rollout_runs.cut(0.2, 0.15) == pytest.approx(0.25)
    assert rollout_runs.cut(0.0, 0.0) == 0
    assert rollout_runs.cut(0.0, 3.0) == -3
    nothing = rollout_runs.error_cut(before, before, seed=0)
    assert nothing["error_cut"] == 0
    assert nothing["p"] == 1


def test_a_split_is_as_probable_as_coins_have_it() -> None:
    assert rollout_runs.sign_test(0, 0) == 1
    assert rollout_runs.sign_test(5, 5) == 1
    assert rollout_runs.sign_test(10, 0) == rollout_runs.sign_test(0, 10) == 2 / 1024


def test_scenes_of_training_have_two_objects_or_three_and_none_is_a_test_scene(tmp_path: Path) -> None:
    tour = Tour(tmp_path / "model", tmp_path / "data", tmp_path / "out", limit=3)
    made = rollout_runs.scenes(tour)
    rows = {split: [json.loads(line) for line in path.read_text().splitlines()] for split, path in made.items()}
    assert [len(row["objects"]) for row in rows["train"]] == [2, 3] * 3
    assert len(rows["test"]) == len(rows["heldout"]) == 9
    assert all(row["heldout_pairs"] for row in rows["heldout"])
    assert not any(row["heldout_pairs"] for row in rows["test"])
    for path in made.values():
        assert all((path.parent / json.loads(line)["image"]).is_file() for line in path.read_text().splitlines())


def test_examples_are_pictures_that_one_model_alone_says_right() -> None:
    def said(name: str, correct: bool, text: str) -> dict[str, Any]:
        return {"id": name, "image": "x.png", "reference": "r", "prediction": text, "correct": correct}

    before = [said("a", False, "wrong"), said("b", True, "right"), said("c", True, "right")]
    after = [said("c", False, "wrong"), said("a", True, "right"), said("b", True, "right")]
    found = mended(before, after)
    assert [(each["group"], each["answers"]) for each in found] == [
        ("mended by GRPO", {"before": "wrong", "after GRPO": "right"}),
        ("broken by GRPO", {"before": "right", "after GRPO": "wrong"}),
    ]


def test_sentences_keep_their_sounds(tmp_path: Path) -> None:
    manifests = tmp_path / "data" / "manifests"
    manifests.mkdir(parents=True)
    levels = ["word", "sentence"]
    rows = [{"id": n, "text": "hi", "audio": f"../sounds/{n}.wav", "level": levels[n]} for n in range(2)]
    (manifests / "train-audio.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = sentences(Tour(tmp_path / "model", tmp_path / "data", tmp_path / "out"))
    (row,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert (path.parent / row["audio"]).resolve() == (tmp_path / "data" / "sounds" / "1.wav").resolve()
