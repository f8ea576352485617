"""`mmllm incremental`: its measures, which commands it runs, how it goes on, and a whole run in small."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from mmllm.checkpoints.folder import save_model
from mmllm.cli.main import main
from mmllm.data import commands
from mmllm.data.plan.recipe import load_recipe
from mmllm.evaluation.results import TaskResult, save_result
from mmllm.training.posttraining.incremental import CommandFailed, incremental, load_plan
from mmllm.training.posttraining.score_matrix import ScoreMatrix, as_lines, as_page
from tests.data_fixtures import write_manifest, write_picture
from tests.inference_fixtures import make_model, make_tokenizer

torch.set_num_threads(1)

# --- the matrix ------------------------------------------------------------------------------------------------------


def test_the_measures_are_their_definitions() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random((5, 6))
    matrix = ScoreMatrix(("a", "b", "c", "d"), ("x", "y"), tuple(map(tuple, scores.tolist())))
    num = 4
    wanted_backward = wanted_forward = wanted_forgetting = 0.0
    for j in range(1, num):  # tasks 1 … T−1, numbered as in the papers
        wanted_backward += (scores[num, j - 1] - scores[j, j - 1]) / (num - 1)
        best = max(scores[step, j - 1] for step in range(1, num))
        wanted_forgetting += (best - scores[num, j - 1]) / (num - 1)
    for j in range(2, num + 1):
        wanted_forward += (scores[j - 1, j - 1] - scores[0, j - 1]) / (num - 1)
    assert matrix.average == pytest.approx(scores[4, :4].mean())
    assert matrix.backward_transfer == pytest.approx(wanted_backward)
    assert matrix.forward_transfer == pytest.approx(wanted_forward)
    assert matrix.forgetting == pytest.approx(wanted_forgetting)
    assert matrix.points_lost == pytest.approx({"x": 100 * (scores[0, 4] - scores[4, 4]),
                                                "y": 100 * (scores[0, 5] - scores[4, 5])})  # fmt: skip


def test_what_few_tasks_do_not_tell_is_none() -> None:
    begun = ScoreMatrix(("a", "b"), (), ((0.1, 0.2),))
    assert (begun.average, begun.backward_transfer, begun.forward_transfer, begun.forgetting) == (None,) * 4
    one = ScoreMatrix(("a", "b"), (), ((0.1, 0.2), (0.9, 0.3)))
    assert one.average == 0.9 and one.forgetting is one.backward_transfer is one.forward_transfer is None
    with pytest.raises(ValueError, match="2 tasks and 0 others have 3 rows of 2 scores"):
        ScoreMatrix(("a", "b"), (), ((0.1,),))


def test_it_is_shown_with_names_escaped() -> None:
    matrix = ScoreMatrix(("a<b", "c"), ("x",), ((0.1, 0.2, 0.9), (0.8, 0.3, 0.7), (0.5, 0.9, 0.6)))
    page = as_page(matrix, "R & D")
    assert "a&lt;b" in page and "R &amp; D" in page and "a<b" not in page and page.count("<td class=") == 2
    assert ">0.800<" in page and "points lost" in page
    lines = as_lines(matrix)
    assert lines[0].split() == ["after", "a<b", "c", "x"] and lines[2].split() == ["a<b", "0.800", "0.300", "0.700"]
    assert "forgetting: 0.300" in lines and "x, points lost: 30.0" in lines


# --- the commands ----------------------------------------------------------------------------------------------------

BASE = {
    "trainer": {
        "devices": 2,
        "callbacks": [
            {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}},
            {"class_path": "mmllm.training.callbacks.RoutingLog", "init_args": {"directory": "elsewhere"}},
        ],
        "logger": [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"version": ""}}],
    },
    "model": {"class_path": "mmllm.training.decoder_module.DecoderModule", "init_args": {"optimizer": {"lr": 0.1}}},
    "data": {"class_path": "mmllm.data.loading.datamodules.PackedDataModule"},
}


def scored(score: str = "answer_accuracy", **more: Any) -> dict[str, Any]:
    return {"task": "interleaved", "manifest": "test.jsonl", "score": score, **more}


def plan_file(folder: Path, **changes: Any) -> Path:
    replay = folder / "replay"
    replay.mkdir(exist_ok=True)
    (replay / "text-000000.tar").touch()
    sources = [
        {"name": "early", "kind": "text", "shards": "text-*.tar", "weight_schedule": [[0, 1.0], [9, 0.0]]},
        {"name": "late", "kind": "text", "shards": "text-*.tar", "weight_schedule": [[0, 0.0], [9, 3.0]]},
        {"name": "other", "kind": "text", "shards": str(replay / "text-*.tar"), "weight": 1.0},
    ]
    values = {"tokenizer": "start", "sequence_length": 128, "sources": sources, "packing": {"window": 32}}
    (replay / "recipe.yaml").write_text(yaml.safe_dump(values))
    tasks = [
        {"name": "one", "rows": "one.jsonl", "eval": scored(limit=7)},
        {"name": "two", "recipe": str(replay / "recipe.yaml"), "eval": scored(), "minutes": 2.0,
         "set": {"model.init_args.adapter": {"r": 4}, "model.init_args.optimizer.lr": 0.5}},
    ]  # fmt: skip
    plan = {
        "start": "start", "base": BASE, "tasks": tasks, "minutes": 0.5,
        "also": {"heard": {"task": "transcribe", "manifest": "old.jsonl", "score": "wer", "lower_is_better": True}},
        "replay": {"recipe": str(replay / "recipe.yaml"), "share": 0.25}, **changes,
    }  # fmt: skip
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(plan))
    return path


class Commands:
    """Stands in for the commands: `eval` writes a score that tells which it was, others write nothing."""

    def __init__(self, out: Path, fails: str = "") -> None:
        self.out, self.fails, self.lines, self.alone = out, fails, list[str](), list[bool]()

    def __call__(self, command: Sequence[str], alone: bool) -> int:
        self.lines.append(shlex.join(command))
        self.alone.append(alone)
        if self.fails and self.fails in self.lines[-1]:
            return 2
        options = dict(zip(command[1::2], command[2::2], strict=False))
        if command[0] == "data" and command[1] == "build":
            folder = Path(command[command.index("--out") + 1])
            folder.mkdir(parents=True)
            for name in ("interleaved-000000.tar", "interleaved-000001.tar", "caption-000000.tar"):
                (folder / name).touch()
        if command[0] == "eval":
            count = sum(line.startswith("eval") for line in self.lines)
            key = "wer" if options["--task"] == "transcribe" else "answer_accuracy"
            save_result(TaskResult(options["--task"], {key: count / 100, "n": 3}), options["--json"])
        return 0


@pytest.fixture
def no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmllm.training.posttraining.incremental.write_card", lambda *_: None)


def run(folder: Path, fails: str = "", **changes: Any) -> tuple[ScoreMatrix, Commands]:
    ran = Commands(folder / "out", fails)
    return incremental(load_plan(plan_file(folder, **changes)), folder / "out", ran, lambda _: None), ran


@pytest.mark.usefixtures("no_cards")
def test_each_task_goes_on_from_the_one_before_and_all_are_scored_after_each(tmp_path: Path) -> None:
    matrix, ran = run(tmp_path)
    out = tmp_path / "out"
    kinds = [line.split()[0] for line in ran.lines]
    assert kinds == [*["eval"] * 3, "data", "data", "fit", *["eval"] * 3, "fit", "adapter", *["eval"] * 3]
    assert ran.alone == [kind == "fit" for kind in kinds]
    assert "--limit 7" in ran.lines[0] and "--limit" not in ran.lines[1]
    np.testing.assert_allclose(matrix.rows, [[0.01, 0.02, 0.97], [0.04, 0.05, 0.94], [0.07, 0.08, 0.91]])
    told = json.loads((out / "matrix.json").read_text())
    assert [row["after"] for row in told["matrix"]] == ["start", "one", "two"] and told["points_lost"]["heard"] > 0
    assert "heard" in (out / "matrix.html").read_text()

    first, second = (yaml.safe_load((out / "configs" / f"{name}.yaml").read_text()) for name in ("01_one", "02_two"))
    model = first["model"]["init_args"]
    assert model["init_from"] == "start" and model["out"] == str(out / "models/01_one") and model["max_seconds"] == 30
    assert model["optimizer"] == {"lr": 0.1} and "adapter" not in model
    model = second["model"]["init_args"]
    assert model["init_from"] == str(out / "models/01_one") and model["max_seconds"] == 120
    assert model["adapter"] == {"r": 4} and model["optimizer"] == {"lr": 0.5}
    assert model["out"] == str(out / "models/02_two_adapter")
    merge = next(line for line in ran.lines if line.startswith("adapter merge"))
    assert merge.endswith(f"--out {out / 'models/02_two'}") and f"--adapter {model['adapter_name']}" in merge
    assert f"--model {out / 'models/02_two'} " in ran.lines[-1]
    saving, routing = first["trainer"]["callbacks"]
    assert saving["init_args"] == {"save_last": True, "dirpath": str(out / "checkpoints/01_one")}
    assert routing["init_args"] == {"directory": str(out / "logs/01_one")}
    assert first["trainer"]["logger"][0]["init_args"]["name"] == "01_one"


@pytest.mark.usefixtures("no_cards")
def test_a_tasks_rows_and_what_is_rehearsed_have_their_shares(tmp_path: Path) -> None:
    run(tmp_path)
    path = tmp_path / "out" / "recipes"
    recipe = load_recipe(path / "01_one.yaml")
    weights = {source.name: source.weight for source in recipe.sources}
    assert weights == pytest.approx(
        {"interleaved": 0.375, "caption": 0.375, "replay_late": 0.1875, "replay_other": 0.0625}
    )
    assert recipe.sequence_length == 128 and recipe.packing.window == 32 and recipe.mixture.on_exhausted == "repeat"
    assert {str(shards) for source in recipe.sources[2:] for shards in source.shards} == {
        str(tmp_path / "replay" / "text-*.tar")
    }
    recipe = load_recipe(path / "02_two.yaml")
    assert [source.name for source in recipe.sources] == ["late", "other", "replay_late", "replay_other"]
    assert [source.weight for source in recipe.sources] == pytest.approx([0.5625, 0.1875, 0.1875, 0.0625])


@pytest.mark.usefixtures("no_cards")
def test_it_goes_on_where_it_stopped_and_with_more_tasks(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match=r"02_two\.yaml --overwrite` failed"):
        run(tmp_path, fails="fit -c " + str(tmp_path / "out/configs/02_two"))
    assert len(json.loads((tmp_path / "out/matrix.json").read_text())["matrix"]) == 2
    _, ran = run(tmp_path)
    assert [line.split()[0] for line in ran.lines] == ["fit", "adapter", *["eval"] * 3]
    _, ran = run(tmp_path)
    assert not ran.lines
    tasks = yaml.safe_load((tmp_path / "plan.yaml").read_text())["tasks"]
    more = [*tasks, {"name": "three", "rows": "three.jsonl", "eval": scored()}]
    matrix, ran = run(tmp_path, tasks=more)
    # The new task's column is scored for all models that are there, then it is learnt.
    assert [line.split()[0] for line in ran.lines] == [*["eval"] * 3, "data", "data", "fit", *["eval"] * 4]
    assert len(matrix.rows) == 4 and {len(row) for row in matrix.rows} == {4}
    assert not run(tmp_path, tasks=more, also={})[1].lines
    changed: list[tuple[dict[str, Any], str]] = [({"minutes": 1.0}, "minutes"), ({"tasks": more[1:]}, "task one")]
    for changes, what in changed:
        with pytest.raises(ValueError, match=f"begun with another plan: {what} differs"):
            run(tmp_path, **{"tasks": more, **changes})


@pytest.mark.usefixtures("no_cards")
def test_a_training_that_was_stopped_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    saved = tmp_path / "out/checkpoints/01_one/last.ckpt"
    saved.parent.mkdir(parents=True)
    saved.touch()
    _, ran = run(tmp_path)
    fits = [line for line in ran.lines if line.startswith("fit")]
    assert fits[0].endswith("--ckpt_path last") and fits[1].endswith("--overwrite")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tasks": []}, "tasks is empty"),
    ({"tasks": [{"name": "a", "eval": scored()}]}, "task a: give rows"),
    ({"tasks": [{"name": "a/b", "rows": "x", "eval": scored()}]}, "'a/b'; use letters"),
    ({"tasks": [{"name": "heard", "rows": "x", "eval": scored()}]}, "two tasks are called 'heard'"),
    ({"minutes": -1.0}, "minutes is -1"),
    ({"replay": {"recipe": "r.yaml", "share": 1.0}}, r"replay\.share is 1\.0"),
    ({"steps": 3}, "steps"),
    ({"base": {"trainer": {}}}, "base has no model"),
    ({"base": "nowhere.yaml"}, "nowhere.yaml: no such file"),
    ({"also": {"x": scored("acuracy")}}, "no score 'acuracy'; it has answer_accuracy, n"),
]


@pytest.mark.usefixtures("no_cards")
@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_bad_plans_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(tmp_path, **changes)


def test_an_adapter_that_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    task = {"name": "one", "rows": "one.jsonl", "eval": scored(),
            "set": {"model.init_args.adapter": {"kind": "prompt_tuning"}}}  # fmt: skip
    with pytest.raises(ValueError, match=r"adapter\.kind is prompt_tuning, which can't be merged"):
        run(tmp_path, tasks=[task])


@pytest.mark.usefixtures("no_cards")
def test_what_is_wrong_with_the_last_task_is_said_before_the_first_is_learnt(tmp_path: Path, capsys: Any) -> None:
    tasks = [{"name": "one", "rows": "one.jsonl", "eval": scored()},
             {"name": "two", "rows": "two.jsonl", "eval": scored(), "set": {"trainer.logger.a": 1}}]  # fmt: skip
    ran = Commands(tmp_path / "out")
    with pytest.raises(ValueError, match=r"task two: set names trainer\.logger\.a, and logger in it"):
        incremental(load_plan(plan_file(tmp_path, tasks=tasks)), tmp_path / "out", ran, lambda _: None)
    assert not ran.lines
    (tmp_path / "start").mkdir()
    (tmp_path / "one.jsonl").touch()
    tasks = [{**task, "rows": str(tmp_path / task["rows"]), "set": {}} for task in tasks]
    plan = plan_file(tmp_path, tasks=tasks, start=str(tmp_path / "start"))
    assert main(["incremental", str(plan), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "file of task two" in said and "two.jsonl" in said


# --- a whole run -----------------------------------------------------------------------------------------------------


def questions(folder: Path, name: str, colour: str, num: int) -> str:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(len(name))
    rows = []
    for number in range(num):
        write_picture(folder / f"{name}{number}.png", rng)
        segments = [{"text": "look"}, {"image": f"{name}{number}.png"}]
        rows.append({"id": f"{name}{number}", "segments": segments, "question": f"which {name}?", "answer": colour})
    return str(write_manifest(folder, rows, f"{name}.jsonl"))


def test_two_tasks_are_learnt_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft", reason="needs the adapt extra")
    tokenizer = make_tokenizer()
    start = save_model(tmp_path / "start", make_model(tokenizer, tie_word_embeddings=False), tokenizer)
    base = {
        "trainer": {"accelerator": "cpu", "max_steps": 2, "logger": False, "enable_checkpointing": False,
                    "enable_progress_bar": False},
        "model": {"class_path": "mmllm.training.decoder_module.DecoderModule",
                  "init_args": {"optimizer": {"lr": 1e-2}}},
        "data": {"class_path": "mmllm.data.loading.datamodules.PackedDataModule", "init_args": {"batch_size": 2}},
    }  # fmt: skip
    tasks = []
    for name, colour, changes in (("shape", "red", {}), ("size", "blue", {"model.init_args.adapter": {"r": 2}})):
        rows = questions(tmp_path / "rows", name, colour, 3)
        measure = {"task": "interleaved", "manifest": rows, "score": "answer_accuracy", "limit": 2}
        tasks.append({"name": name, "rows": rows, "eval": measure, "set": changes})
    plan = {"start": str(tmp_path / "start"), "base": base, "tasks": tasks, "sequence_length": 128}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    out = tmp_path / "out"
    said: list[str] = []
    matrix = incremental(load_plan(tmp_path / "plan.yaml"), out, lambda command, _: main(list(command)), said.append)
    assert matrix.num_learnt == 2 and any(line.startswith("$ mmllm fit") for line in said)
    card = (out / "models/02_size/README.md").read_text()
    assert "after size" in card and "- shape: " in card and "Task 2 of 2, `size`" in card
    assert not (out / "models/02_size/adapters").exists()
    assert start is not None and commands is not None
    assert not [line for line in capsys.readouterr().err.splitlines() if line.startswith("mmllm: error")]
