import dataclasses
import json
import math

import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image

from mmllm.cli import main
from mmllm.data.manifest import read_manifest
from mmllm.quickstart.budget import (
    DEMO_STEPS,
    EVALUATION_SECONDS,
    FIT_START_SECONDS,
    MIN_EVALUATED,
    MIN_TRAINING_SECONDS,
    START_SECONDS,
    Budget,
)
from mmllm.quickstart.plan import Contents, choose, recipe_dict

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230)}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Sixty rows of somebody's own: captions, sounds, texts and documents with questions."""
    folder = tmp_path_factory.mktemp("own")
    rows = []
    for i in range(24):
        colour = list(COLOURS)[i % 3]
        Image.new("RGB", (20 + i, 20), COLOURS[colour]).save(folder / f"{i}.png")
        rows.append({"id": f"c{i}", "image": f"{i}.png", "text": f"a {colour} square"})
        seconds = np.arange(2000 + 40 * i) / 8000
        soundfile.write(folder / f"{i}.wav", 0.3 * np.sin(2 * math.pi * (200 + 50 * (i % 3)) * seconds), 8000)
        rows.append({"id": f"a{i}", "audio": f"{i}.wav", "text": colour, "speaker": "bob" if i % 4 else "ann"})
        rows.append({"id": f"t{i}", "text": f"Number {i} is {colour}."})
        segments = [{"text": "See:"}, {"image": f"{i}.png"}]
        rows.append({"id": f"i{i}", "segments": segments, "question": "which colour?", "answer": colour})
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_quickstart_goes_the_whole_way_and_continues(manifest, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["quickstart", "--train", str(manifest), "--out", str(out), "--max_steps", "2", "--holdout", "0.3"]
    assert main(command) == 0, capsys.readouterr().err
    report = json.loads((out / "report.json").read_text())
    assert {"caption", "transcribe", "speak", "interleaved", "text", "train", "routing", "recipe_hash"} <= set(report)
    assert report["caption"]["n"] >= 4
    assert 0 <= report["caption"]["exact_match"] <= 1
    assert report["train"]["peak_rss_bytes"] > 1e8
    assert report["train"]["tokens_per_second"] > 0
    page = (out / "report.html").read_text()
    assert "data:image/" in page
    assert "data:audio/" in page
    assert (out / "recipe.yaml").is_file()
    assert {path.name for path in (out / "configs").iterdir()} == {"codec.yaml", "clip.yaml", "decoder.yaml"}
    assert "$ mmllm fit -c" in capsys.readouterr().out
    before = (out / "model" / "model.safetensors").read_bytes()
    assert main(command) == 0
    assert "done before: mmllm fit -c" in capsys.readouterr().out
    assert (out / "model" / "model.safetensors").read_bytes() == before
    assert main([*command, "--seed", "5"]) == 2
    assert "other settings (seed differ)" in capsys.readouterr().err


def test_documents_with_pictures_but_no_captions_and_no_questions(tmp_path, capsys):
    rows = []
    for i, colour in enumerate(list(COLOURS) * 10):
        Image.new("RGB", (16, 16), COLOURS[colour]).save(tmp_path / f"{i}.png")
        rows.append(
            {"id": f"i{i}", "segments": [{"text": "See:"}, {"image": f"{i}.png"}, {"text": f"It is {colour}."}]}
        )
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    assert (
        main(["quickstart", "--train", str(manifest), "--out", str(out), "--max_steps", "1", "--holdout", "0.3"]) == 0
    )
    assert "no test row can be scored" in capsys.readouterr().out
    assert (out / "model" / "model.safetensors").is_file() and (out / "report.html").is_file()


def test_a_quickstart_by_minutes_trains_as_two_ranks(tmp_path):
    """Without --max_steps trainings run as two DDP ranks, in processes of their own."""
    rows = [{"id": f"t{i}", "text": f"Row {i} says that {i} and {i} make {2 * i}."} for i in range(120)]
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    assert main(["quickstart", "--train", str(manifest), "--out", str(out), "--minutes", "0.7"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["text"]["n"] >= 4
    config = yaml.safe_load((out / "configs" / "decoder.yaml").read_text())
    assert (config["trainer"]["devices"], config["trainer"]["strategy"]) == (2, "ddp")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--holdout", "speaker=bob"], "need --train"),
        (["--minutes", "0"], "--minutes is 0"),
        (["--train", "nowhere.jsonl"], "nowhere.jsonl: no such manifest"),
    ],
)
def test_quickstart_says_what_is_wrong(arguments, message, tmp_path, capsys):
    assert main(["quickstart", "--out", str(tmp_path / "run"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_choices_follow_the_rows(manifest, tmp_path):
    contents = Contents.of(read_manifest(manifest))
    assert contents.kinds == ("audio", "caption", "interleaved", "text")
    assert contents.has_images
    assert contents.has_sounds
    assert contents.is_single_words
    assert not contents.names_sides
    recipe = recipe_dict(tmp_path, contents, choose(contents, is_demo=False), seed=3, curriculum_steps=10)
    assert [source["name"] for source in recipe["sources"]] == ["caption", "interleaved", "text", "heard", "spoken"]
    assert "curriculum" not in recipe


def test_pictures_are_not_mirrored_where_an_answer_says_left(manifest):
    rows = read_manifest(manifest)
    asked = next(row for row in rows if row.kind == "interleaved")
    sided = dataclasses.replace(asked, metadata={"question": "on which side?", "answer": "Left"})
    assert Contents.of([*rows, sided]).names_sides and not Contents.of(rows).names_sides


@pytest.mark.parametrize(("seconds", "length", "batch"), [(2.0, 512, 4), (12.0, 1024, 2), (300.0, 2048, 2)])
def test_sequences_are_as_long_as_the_speech_that_they_hold(manifest, seconds, length, batch):
    contents = dataclasses.replace(Contents.of(read_manifest(manifest)), long_seconds=seconds)
    choices = choose(contents, is_demo=False)
    assert (choices.sequence_length, choices.batch_size) == (length, batch)


TASKS = {"transcribe": [500], "speak": [500], "caption": [100, 100]}


def test_evaluations_run_side_by_side():
    budget = Budget(minutes=10.0, max_steps=None, is_demo=False, num_processes=2)
    costs = [
        EVALUATION_SECONDS["transcribe"] * 500,
        EVALUATION_SECONDS["speak"] * 500,
        EVALUATION_SECONDS["caption"] * 200,
    ]
    assert budget.scoring_seconds(TASKS) == pytest.approx(max(sum(costs) / 2, costs[1]))
    assert budget.scoring_seconds({"caption": [100]}) == pytest.approx(EVALUATION_SECONDS["caption"] * 100)
    assert budget.overhead_seconds(TASKS) - budget.overhead_seconds({"caption": [100]}) == pytest.approx(START_SECONDS)


def test_trainings_and_evaluations_share_the_minutes():
    by_clock = Budget(minutes=10.0, max_steps=None, is_demo=False, num_processes=2)
    decoder = by_clock.training_length("decoder", TASKS, 400.0, None)
    assert decoder["trainer.max_steps"] == -1
    kept = by_clock.evaluation_seconds(TASKS) + FIT_START_SECONDS
    assert decoder["model.init_args.max_seconds"] == pytest.approx(400 - kept - 18, abs=0.1)
    codec = by_clock.training_length("codec", TASKS, 400.0, 0.2)
    assert codec["model.init_args.max_seconds"] == pytest.approx(0.2 * (400 - kept), abs=0.1)
    assert by_clock.training_length("codec", TASKS, 0.0, 0.2)["model.init_args.max_seconds"] == MIN_TRAINING_SECONDS
    assert by_clock.limits(TASKS, 1000.0) == {}
    half = by_clock.overhead_seconds(TASKS) + by_clock.scoring_seconds(TASKS) / 2
    assert by_clock.limits(TASKS, half) == {"transcribe": 250, "speak": 250, "caption": 50}
    assert set(by_clock.limits(TASKS, 0.0).values()) == {MIN_EVALUATED}


def test_the_demo_trains_for_fixed_steps():
    demo = Budget(minutes=None, max_steps=None, is_demo=True, num_processes=2)
    assert demo.training_length("clip", TASKS, None, 0.15)["trainer.max_steps"] == DEMO_STEPS["clip"]
    assert demo.limits(TASKS, None) == {}
