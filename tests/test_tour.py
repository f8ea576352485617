"""`mmllm posttrain-tour`: commands, going on, settings, bad input, report. Commands are stood in for."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

from mmllm.data.plan.recipe import load_recipe
from mmllm.evaluation.scenes import SHAPES
from mmllm.quickstart.scenes import make_scenes
from mmllm.quickstart.tour import run as tour_run
from mmllm.quickstart.tour import stage_sft
from mmllm.quickstart.tour.report import TARGETS, Target, target_rows
from mmllm.quickstart.tour.run import STAGES, check_model, check_run, posttrain_tour
from mmllm.quickstart.tour.stage import CommandFailed, Tour
from mmllm.quickstart.tour.stage_lora import LoraStage
from mmllm.quickstart.tour.stage_sft import SftStage

SOURCES = [
    {"name": "plain", "kind": "caption", "shards": "c.tar", "weight_schedule": [[0, 0.4], [70, 0.1]]},
    {"name": "gone", "kind": "caption", "shards": "c.tar", "weight_schedule": [[0, 0.4], [70, 0.0]]},
    {"name": "heard", "kind": "audio", "shards": "a.tar", "weight": 0.3, "tasks": ["transcribe"]},
]


class Commands:
    """Stands for `mmllm`: notes each command line and writes what it would."""

    def __init__(self, right: float = 0.5) -> None:
        self.lines: list[list[str]] = []
        self.fails_at: str | None = None
        self.right = right

    def __call__(self, command: Sequence[str]) -> int:
        self.lines.append(list(command))
        given = dict(itertools.pairwise(command))
        if self.fails_at is not None and self.fails_at in " ".join(command):
            return 2
        match command[0]:
            case "data":
                if command[1] == "build":
                    folder = Path(given["--out"])
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / "shards.json").write_text("{}")
            case "fit":
                config = yaml.safe_load(Path(given["-c"]).read_text())
                model = Path(config["model"]["init_args"]["out"])
                model.mkdir(parents=True, exist_ok=True)
                (model / "model.safetensors").write_bytes(b"")
            case "eval":
                self._eval(given)
        return 0

    def _eval(self, given: dict[str, str]) -> None:
        task = given["--task"]
        is_start = given["--model"].endswith("start_model")
        scores = {"chat": {"answer_accuracy": 0.0 if is_start else self.right, "blind_accuracy": 0.1},
                  "caption": {"exact_match": 0.9 if is_start else 0.88},
                  "transcribe": {"wer": 0.02 if is_start else 0.05}}[task]  # fmt: skip
        rows = (
            [json.loads(line) for line in Path(given["--manifest"]).read_text().splitlines()] if task == "chat" else []
        )
        predictions = [{"id": row["id"], "reference": row["segments"][-1]["text"], "prediction": "two", "blind": "two",
                        "correct": row["segments"][-1]["text"] == "two", "segments": []} for row in rows]  # fmt: skip
        path = Path(given["--json"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"task": task, task: scores, "predictions": predictions}))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the demo as far as the tour reads it."""
    folder = tmp_path_factory.mktemp("tour") / "demo"
    make_scenes(folder / "data" / "scenes", 600, 200, 3, seed=1)
    (folder / "data" / "speech").mkdir()
    for split in ("train", "test"):
        lines = []
        for number, shape in enumerate(SHAPES):
            soundfile.write(folder / "data" / "speech" / f"{split}{number}.wav", np.full(400, 0.1), 8000)
            lines.append({"audio": f"{split}{number}.wav", "text": f"the {shape}"})
        (folder / "data" / "speech" / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "manifests").mkdir()
    (folder / "manifests" / "test.jsonl").write_text("{}\n")
    (folder / "tokenizer").mkdir()
    recipe = {"seed": 0, "tokenizer": str(folder / "tokenizer"), "sequence_length": 512, "sources": SOURCES,
              "curriculum": {"metric": "num_tokens", "steps": 5, "sources": ["heard"]}}  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    model = folder / "start_model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model": {"vision": {"a": 1}, "audio": {"a": 1}}}))
    (model / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    monkeypatch.setattr(stage_sft, "NUM_TEST", 24)
    monkeypatch.setattr(stage_sft, "NUM_TRAIN", 40)
    monkeypatch.setattr("mmllm.quickstart.tour.stage_lora.NUM_TRAIN", 40)
    monkeypatch.setattr("mmllm.quickstart.tour.stage_lora.parameter_share", lambda folder, adapter: 0.02)
    for name in ("QUESTION_SHARE", "MINUTES"):
        values = getattr(stage_sft, name)
        monkeypatch.setattr(stage_sft, name, {300: values[300], 40: values[3000]})
    return Commands()


def tour(demo: Path, out: Path, commands: Commands, **changes: Any) -> Tour:
    return Tour(demo / "start_model", demo, out, run_command=commands, **changes)


# ------------------------------------------------------------------------------------------------------------ frame
def test_replay_has_the_last_weights_and_no_schedules(demo: Path, tmp_path: Path, commands: Commands) -> None:
    one = tour(demo, tmp_path, commands)
    assert [(s["name"], s["weight"]) for s in one.replay_sources(0.8)] == [("plain", 0.2), ("heard", 0.6)]
    recipe = load_recipe(one.replay_recipe())
    assert recipe.curriculum is None and [s.weight for s in recipe.sources] == [0.25, 0.75]


def test_make_goes_on_where_it_stopped(demo: Path, tmp_path: Path, commands: Commands) -> None:
    one = tour(demo, tmp_path, commands)
    source = tmp_path / "rows.jsonl"
    source.write_text("a")
    make = lambda *more: one.make(  # noqa: E731
        "build x", tmp_path / "x" / "shards.json", "data", "build", "--out", str(tmp_path / "x"), *more, inputs=[source]
    )
    make()
    make()
    assert len(commands.lines) == 1, "made before"
    make("--seed", "1")
    assert len(commands.lines) == 2, "another command"
    source.write_text("b")
    os.utime(source, (2e9, 2e9))
    make("--seed", "1")
    assert len(commands.lines) == 3, "other rows"
    (tmp_path / "x" / "shards.json").unlink()
    make("--seed", "1")
    assert len(commands.lines) == 4, "what it made is gone"


def test_an_interrupted_command_is_run_again(demo: Path, tmp_path: Path, commands: Commands) -> None:
    one = tour(demo, tmp_path, commands)
    commands.fails_at = "build"
    made = tmp_path / "y" / "shards.json"
    made.parent.mkdir()
    made.write_text("half of it")
    line = ("data", "build", "--out", str(made.parent))
    with pytest.raises(CommandFailed, match="failed"):
        one.make("y", made, *line)
    commands.fails_at = None
    one.make("y", made, *line)
    assert len(commands.lines) == 2
    with pytest.raises(CommandFailed, match="without writing"):
        one.make("z", tmp_path / "z", "data", "index")


def test_a_training_is_as_long_as_the_tour_says(demo: Path, tmp_path: Path, commands: Commands) -> None:
    for minutes, wanted in ((5.0, 240.0), (0.5, 24.0)):
        one = tour(demo, tmp_path / str(minutes), commands, minutes=minutes)
        config = one.training("n", "M", {"optimizer": {"lr": 1}}, "D", {"recipe": "r"}, minutes=4)
        assert config["model"]["init_args"]["max_seconds"] == pytest.approx(wanted)
        assert config["model"]["init_args"]["init_from"] == str(demo / "start_model")
        assert config["trainer"]["devices"] == 1 and "strategy" not in config["trainer"]
    config = one.training("n", "M", {}, "D", {}, num_ranks=2)
    assert config["trainer"]["strategy"] == "ddp"


def test_an_unchanged_config_is_not_trained_again(demo: Path, tmp_path: Path, commands: Commands) -> None:
    one = tour(demo, tmp_path, commands)
    for lr, runs in ((1.0, 1), (1.0, 1), (2.0, 2)):
        config = one.training("n", "M", {"optimizer": {"lr": lr}}, "D", {"recipe": "r"})
        assert one.fit("n", config) == tmp_path / "models" / "n"
        assert len(commands.lines) == runs


# ----------------------------------------------------------------------------------------------------------- stages
def test_sft_and_lora_as_plain_commands(
    demo: Path, tmp_path: Path, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    report = posttrain_tour(demo / "start_model", demo, tmp_path, ["lora", "sft"], run_command=commands)
    assert [line[:2] for line in commands.lines].count(["fit", "-c"]) == 3, "the full training is shared"
    shown = [line.removeprefix("$ ") for line in capsys.readouterr().out.splitlines() if line.startswith("$ mmllm")]
    assert [line.split()[1:] for line in shown] == commands.lines
    assert report["sft"]["accuracy_300"] == report["lora"]["accuracy"] == 0.5
    assert report["sft"]["forgetting_points"] == pytest.approx(3.0), "transcripts lost more than captions"
    assert report["lora"]["gain_share"] == 1.0 and report["lora"]["parameter_share"] == 0.02
    assert report["minutes"].keys() == {"sft", "lora", "total"}
    assert "examples" not in report["sft"]
    test = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert len(test) == 24
    share = sum(row["segments"][-1]["text"] == "two" for row in test if row["kind"] == "count") / 6
    assert report["sft"]["kinds_300"]["count"]["accuracy"] == pytest.approx(share, abs=1e-3)
    recipe = load_recipe(tmp_path / "recipes" / "sft_300.yaml")
    assert sum(source.weight for source in recipe.sources) == pytest.approx(1.0)
    assert recipe.sources[0].tasks == ["chat"]
    page = (tmp_path / "report.html").read_text()
    assert "sft.accuracy_300" in page and "Supervised fine-tuning" in page and "mmllm fit -c" in page


def test_a_tour_that_stopped_goes_on(demo: Path, tmp_path: Path, commands: Commands) -> None:
    commands.fails_at = "sft_40.yaml"
    run = lambda **more: posttrain_tour(demo / "start_model", demo, tmp_path, ["sft"], run_command=commands, **more)  # noqa: E731
    with pytest.raises(CommandFailed, match="sft_40"):
        run()
    num_before, commands.fails_at = len(commands.lines), None
    run()
    again = commands.lines[num_before:]
    assert again[0][0] == "fit" and not any("sft_300" in " ".join(line) for line in again)
    num_done = len(commands.lines)
    run()
    assert len(commands.lines) == num_done
    with pytest.raises(ValueError, match="seed"):
        run(seed=1)


def test_full_training_without_gain_gives_no_share(demo: Path, tmp_path: Path, commands: Commands) -> None:
    commands.right = 0.0
    assert LoraStage().run(tour(demo, tmp_path, commands))["gain_share"] is None


def test_forgetting_is_the_largest_loss() -> None:
    before, after = {"caption": 98.0, "transcribe": 99.0}, {"caption": 98.5, "transcribe": 97.0}
    assert stage_sft.points_lost(before, after) == {"caption": -0.5, "transcribe": 2.0}


# -------------------------------------------------------------------------------------------------------- bad input
def test_bad_input_is_named(demo: Path, tmp_path: Path, commands: Commands) -> None:
    run = lambda stages: posttrain_tour(demo / "start_model", demo, tmp_path / "o", stages, run_command=commands)  # noqa: E731
    with pytest.raises(ValueError, match=r"'stf'; choose among sft, lora"):
        run(["sft", "stf"])
    with pytest.raises(ValueError, match="names none"):
        run([])
    with pytest.raises(FileNotFoundError, match=r"lacks recipe.yaml, manifests/test.jsonl"):
        check_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="no model folder"):
        check_model(tmp_path)
    for parts, message in (({"audio": {}}, "not see and does not hear"), ({"vision": {"a": 1}}, "does not hear")):
        (tmp_path / "config.json").write_text(json.dumps({"model": parts}))
        with pytest.raises(ValueError, match=message):
            check_model(tmp_path)
    assert not commands.lines


def test_a_stage_that_is_not_there_is_named(
    demo: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mmllm.quickstart.tour.stage_trap", None)
    with pytest.raises(ValueError, match="'trap' is not in this version"):
        posttrain_tour(demo / "start_model", demo, tmp_path, ["trap"], run_command=commands)


def test_what_a_stage_lacks_itself_is_not_hidden(
    demo: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacks(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'cma'", name="cma")

    monkeypatch.setattr(tour_run.importlib, "import_module", lacks)
    with pytest.raises(ModuleNotFoundError, match="cma"):
        posttrain_tour(demo / "start_model", demo, tmp_path, ["merge"], run_command=commands)


# ----------------------------------------------------------------------------------------------------------- report
@pytest.mark.parametrize(
    ("target", "value", "verdict", "shown"),
    [
        (Target("a", "", 0.45, 0.65), 0.44, "missed", "44.0%"),
        (Target("a", "", 0.45, 0.65), 0.45, "passed", "45.0%"),
        (Target("a", "", 0.45, 0.65), 0.65, "reached", "65.0%"),
        (Target("a", "", 5, 1, "points", False), 5.1, "missed", "+5.1"),
        (Target("a", "", 5, 1, "points", False), -0.3, "reached", "-0.3"),
        (Target("a", "", -0.25, -0.35, "change", False), -0.30, "passed", "-30.0%"),
        (Target("a", "", 100, None, "number", False), 40, "passed", "40"),
        (Target("a", "", 100, None, "number", False), None, "not measured", "–"),
        (Target("a", "", None, 2, "points"), -1.0, "not reached", "-1.0"),
        (Target("a", "", None, 2, "points"), 2.0, "reached", "+2.0"),
    ],
)
def test_verdicts(target: Target, value: float | None, verdict: str, shown: str) -> None:
    assert (target.verdict(value), target.shown(value)) == (verdict, shown)


def test_the_table_has_the_stages_that_are_done() -> None:
    rows = list(target_rows({"sft": {"accuracy_300": 0.5}, "incremental": {}}))
    assert [row["verdict"] for row in rows] == ["passed", "not measured", "not measured"]
    assert set(TARGETS) < set(STAGES)


def test_plots_and_notes_are_on_the_page(demo: Path, tmp_path: Path, commands: Commands, monkeypatch: Any) -> None:
    result = {"noticed_at_step": 40, "notes": ["reward <rose>"], "plots": [{"title": "both", "curves": {
        "reward": [[0, 0.1], [10, 0.9]], "truth": [[0, 0.9], [10, 0.2]]}}]}  # fmt: skip
    stage = SimpleNamespace(name="trap", run=lambda one: result)
    monkeypatch.setattr(tour_run, "_stage", lambda name: stage)
    report = posttrain_tour(demo / "start_model", demo, tmp_path, ["trap"], run_command=commands)
    assert report["trap"] == {"noticed_at_step": 40}
    page = (tmp_path / "report.html").read_text()
    assert "reward &lt;rose&gt;" in page and page.count("<polyline") == 2


def test_sft_examples_show_what_was_asked(demo: Path, tmp_path: Path, commands: Commands) -> None:
    result = SftStage().run(tour(demo, tmp_path, commands))
    first = result["examples"][0]
    assert first["answers"] == {"300 questions": "two", "40 questions": "two"} and first["wanted"]
