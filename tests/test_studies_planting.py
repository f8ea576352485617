"""What is planted in manifests is what cleaning finds; rows are ranked by a model's loss; steps of a run read both."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmllm.cli.main import main
from mmllm.data.rows.cleaning import CleaningConfig, choose, measure
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.rows import Row
from mmllm.evaluation.results import TaskResult, save_result
from mmllm.studies.planting import COPIED_SHARE, Planting, plant, plant_rows
from mmllm.studies.ranking import row_losses
from mmllm.studies.runs import Runner
from mmllm.studies.study import Arm, Step, study_of
from tests.inference_fixtures import make
from tests.test_studies import base_of, changed

WORDS = ("red", "blue", "green", "circle", "square", "above", "left", "of", "two", "one")


def texts(count: int) -> list[Row]:
    """Rows with a text each, of which no two are equal."""
    rng = np.random.default_rng(0)
    return [
        Row(f"r{n}", "text", f"f:{n}", f"{n} {' '.join(rng.choice(WORDS, 8))}", metadata={"n": n}) for n in range(count)
    ]


def kept(rows: Sequence[Row], **config: Any) -> list[Row]:
    cleaning = CleaningConfig(**config)
    return choose(rows, [measure(row, facts=True) for row in rows], cleaning)[0]


def test_copies_are_those_that_deduplication_finds():
    rows = texts(300)
    planted = plant_rows(rows, Planting(copies=2.0))
    copies = [row for row in planted if row.metadata.get("planted") == "copy"]
    assert len(planted) == 900 and len(copies) == 600 and len({row.id for row in planted}) == 900
    assert [row for row in planted if row not in copies] == rows  # as they were, in order
    originals = {row.text for row in copies}
    assert len(originals) == round(COPIED_SHARE * 300) and originals <= {row.text for row in rows}
    assert 0 < planted.index(copies[0]) < 300 and planted[-5:] != copies[-5:]  # they lie among the others
    assert sorted(row.text for row in kept(planted, dedup="exact")) == sorted(row.text for row in rows)


def test_garbled_texts_are_those_that_the_quality_filter_finds():
    rows = texts(200)
    planted = plant_rows(rows, Planting(garbled=0.3, wrong=0.1))
    marks = [row.metadata.get("planted") for row in planted]
    assert (marks.count("garbled"), marks.count("wrong")) == (60, 20)
    right = [row for row in planted if row.metadata.get("planted") != "garbled"]
    assert kept(planted, quality="symbols < 0.5") == right
    for before, after in zip(rows, planted, strict=True):
        match after.metadata.get("planted"):
            case "garbled":
                assert len(after.text) == len(before.text)
            case "wrong":
                assert after.text != before.text and after.text in {row.text for row in rows}
            case _:
                assert after == before
    assert plant_rows(rows, Planting(garbled=0.3, seed=1)) != plant_rows(rows, Planting(garbled=0.3, seed=2))
    assert plant_rows(rows, Planting(garbled=0.3, seed=1)) == plant_rows(rows, Planting(garbled=0.3, seed=1))


def test_a_limit_draws_rows_by_the_seed(tmp_path: Path):
    manifest = tmp_path / "texts.jsonl"
    manifest.write_text("".join(json.dumps({"id": row.id, "text": row.text}) + "\n" for row in texts(50)))
    drawn = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / f"{number}.jsonl"
        assert "20 rows; planted: 5 wrong" in plant(manifest, out, Planting(wrong=0.25, limit=20, seed=seed))[0]
        drawn.append([row.id for row in read_rows(out)])
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(ids == sorted(ids, key=lambda name: int(name[1:])) for ids in drawn)  # in the manifest's order
    assert "50 rows" in plant(manifest, tmp_path / "all.jsonl", Planting(limit=80))[0]


def test_a_manifest_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    manifest = tmp_path / "texts.jsonl"
    manifest.write_text(before := json.dumps({"id": "a", "text": "one circle"}) + "\n")
    for command in (["plant"], ["ask"], ["date", "--words", "one,two"]):
        assert main(["study", *command, str(manifest), "--out", f"{tmp_path}/../{tmp_path.name}/texts.jsonl"]) == 2
        assert "which is read; give another file" in capsys.readouterr().err
    assert manifest.read_text() == before


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"wrong": 1.5}, "wrong is 1.5"), ({"wrong": 0.6, "garbled": 0.6}, "at most all rows"),
        ({"copies": -1.0}, "copies is -1.0"), ({"filter": "import os"}, "import os"),
        ({"limit": 0}, "limit is 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_planted_is_named(settings: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        Planting(**settings)


def test_a_row_without_a_text_is_named():
    rows = [*texts(3), Row("d", "interleaved", "f:9", segments=({"text": "a"},))]
    with pytest.raises(ValueError, match="f:9 has no text of its own"):
        plant_rows(rows, Planting(garbled=1.0))


def pictures(folder: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    lines = []
    for n in range(count):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{n}.png")
        row = {"id": f"p{n}", "image": f"{n}.png", "text": f"a {WORDS[n % 3]} circle", "plain": n % 2 == 0}
        lines.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


def test_plant_writes_a_manifest_whose_pictures_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    manifest, out = pictures(tmp_path, 10), tmp_path / "deep" / "planted.jsonl"
    command = ["study", "plant", str(manifest), "--out", str(out), "--filter", "plain", "--wrong", "0.4"]
    assert main([*command, "--seed", "3"]) == 0
    assert "5 rows; planted: 2 wrong" in capsys.readouterr().out
    rows = read_rows(out)
    assert [row.id for row in rows] == ["p0", "p2", "p4", "p6", "p8"]
    assert all(isinstance(row.image, Path) and row.image.resolve().is_file() for row in rows)
    assert main([*command[:-4], "--filter", "plain and not plain"]) != 0
    assert "no row passes the filter" in capsys.readouterr().err


def test_rows_are_ranked_by_their_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, manifest = make(), pictures(tmp_path, 5)
    monkeypatch.setattr("mmllm.studies.ranking.BATCH_SIZE", 2)
    monkeypatch.setattr("mmllm.inference.api.load", lambda folder: model)
    assert main(["study", "rank", str(manifest), "--model", "m", "--out", str(tmp_path / "ranked.jsonl")]) == 0
    for row in read_rows(tmp_path / "ranked.jsonl"):
        assert isinstance(row.image, Path)
        told = model.score(model.caption_prompt(str(row.image)), row.text)
        assert row.metadata["loss"] == pytest.approx(-told / len(model.tokenizer.text.encode(row.text)), abs=1e-3)
    with pytest.raises(ValueError, match="is of the kind text"):
        (tmp_path / "texts.jsonl").write_text(json.dumps({"id": "t", "text": "one two"}))
        from mmllm.studies.ranking import rank

        rank("m", tmp_path / "texts.jsonl", tmp_path / "out.jsonl")
    assert list(row_losses(model, [])) == []


def test_measures_of_one_evaluation_share_it_and_commands_have_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shared = {"task": "caption", "manifest": "{data}/m", "options": ["--judge", "{data}/j"]}
    measures = [
        {**shared, "name": name, "key": key, **more}
        for name, key, more in (
            ("a", "x", {}),
            ("b", "y", {}),
            ("c", "x", {"limit": 3}),
            ("d", "x", {"manifest": "{run}/q"}),
        )
    ]
    base_of(tmp_path)  # writes the base's files
    runner = Runner(study_of(changed(measures=measures)), tmp_path, tmp_path / "out")
    called: list[list[str]] = []

    def call(self: Runner, command: Sequence[str], folder: Path, arm: Arm) -> None:
        called.append(list(command))
        if command[0] == "eval":
            save_result(TaskResult("caption", {"x": 0.5, "y": 0.25, "n": 1}), command[command.index("--json") + 1])

    monkeypatch.setattr(Runner, "_call", call)
    arm, run = Arm("experts", "dense", 7), tmp_path / "run"
    run.mkdir()
    scores = runner._scores(arm, run)
    assert {name: each["score"] for name, each in scores.items()} == {"a": 0.5, "b": 0.25, "c": 0.5, "d": 0.5}
    assert len(called) == 3 and called[0][-2:] == ["--judge", f"{tmp_path}/j"]
    manifests = [command[command.index("--manifest") + 1] for command in called]
    assert manifests == [f"{tmp_path}/m", f"{tmp_path}/m", f"{run}/q"], "of the data, or made by the run's own steps"
    step = Step(command="merge {run}/m.yaml --out {run}/x", files={"m.yaml": {"models": ["{run}/a", "{data}/b"]}})
    runner._step(arm, step, run)
    assert called[-1] == ["merge", f"{run}/m.yaml", "--out", f"{run}/x"]
    assert f"- {run}/a\n- {tmp_path}/b" in (run / "m.yaml").read_text()
    with pytest.raises(ValueError, match=r"a training has the files m.yaml"):
        Step(fit={}, files={"m.yaml": {}})
