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
from mmllm.quickstart.plan import EVALUATION_SECONDS, Contents, choose, recipe_dict
from mmllm.quickstart.run import START_SECONDS, _Run

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


def test_evaluations_run_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    settings = {"train": ["x"], "max_steps": None, "minutes": 10.0}
    run = _Run(tmp_path / "run", settings, lambda command: 0)
    tasks = {"transcribe": [500], "speak": [500], "caption": [100, 100]}
    costs = [
        EVALUATION_SECONDS["transcribe"] * 500,
        EVALUATION_SECONDS["speak"] * 500,
        EVALUATION_SECONDS["caption"] * 200,
    ]
    assert run._scoring_seconds(tasks) == pytest.approx(max(sum(costs) / 2, costs[1]))
    assert run._scoring_seconds({"caption": [100]}) == pytest.approx(EVALUATION_SECONDS["caption"] * 100)
    assert run._overhead_seconds(tasks) - run._overhead_seconds({"caption": [100]}) == pytest.approx(START_SECONDS)
