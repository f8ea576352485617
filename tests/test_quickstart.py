import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import soundfile
import torch
import yaml
from PIL import Image

from mmllm.cli.main import main
from mmllm.data.expressions import compile_filter
from mmllm.data.index.columns import Column
from mmllm.data.plan.filter import kept_documents
from mmllm.data.plan.recipe import load_recipe
from mmllm.data.rows.forms import read_rows
from mmllm.evaluation.curves import group_curves, read_curves
from mmllm.quickstart import machine, plan, run, summary
from mmllm.quickstart import state as run_state
from mmllm.quickstart.budget import (
    DEMO_STEPS,
    EVALUATION_SECONDS,
    FIT_START_SECONDS,
    MIN_EVALUATED,
    MIN_TRAINING_SECONDS,
    START_SECONDS,
    Budget,
)
from mmllm.quickstart.plan import Contents, choose, evaluation_tasks, recipe_dict
from mmllm.quickstart.presets import DEMO
from mmllm.quickstart.processes import Processes
from mmllm.quickstart.stages import StageList
from mmllm.training.decoder_module import DecoderModule

COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230)}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Ninety-six rows of somebody's own: captions, sounds, texts and documents with questions; `part` parts them."""
    folder = tmp_path_factory.mktemp("own")
    rows = []
    for i in range(24):
        colour = list(COLORS)[i // 2 % 3]
        Image.new("RGB", (20 + i, 20), COLORS[colour]).save(folder / f"{i}.png")
        part = {"part": "test" if i % 3 == 0 else "train"}
        seen = [{"size": "small", "colour": colour, "shape": "square"}]
        pairs = [["square", colour]] if i % 2 else []
        rows.append({"id": f"c{i}", "image": f"{i}.png", "text": f"a small {colour} square in the centre",
                     "objects": seen, "relations": [[0, "at", "centre"]], "heldout_pairs": pairs, **part})  # fmt: skip
        seconds = np.arange(2000 + 40 * i) / 8000
        soundfile.write(folder / f"{i}.wav", 0.3 * np.sin(2 * math.pi * (200 + 50 * (i % 3)) * seconds), 8000)
        rows.append({"id": f"a{i}", "audio": f"{i}.wav", "text": colour, "speaker": "bob" if i % 4 else "ann",
                     "heldout_voice": i % 2 == 1, **part})  # fmt: skip
        rows.append({"id": f"t{i}", "text": f"Number {i} is {colour}.", **part})
        segments = [{"text": "See:"}, {"image": f"{i}.png"}]
        rows.append({"id": f"i{i}", "segments": segments, "question": "which colour?", "answer": colour, **part})
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


REPORT_KEYS = {
    "caption": {
        "exact_match", "attribute_accuracy", "cider", "n", "blind_exact_match", "heldout_pairs_accuracy",
    },
    "transcribe": {"wer", "cer", "n", "blind_wer", "heldout_voices_wer"},
    "speak": {"round_trip_wer", "shuffled_wer", "resynthesis_wer", "n"},
    "interleaved": {"answer_accuracy", "shuffled_accuracy", "n"},
    "text": {"bits_per_byte", "n"},
    "train": {"seconds", "tokens_per_second", "peak_rss_bytes"},
}  # fmt: skip
"""What report.json promises, where the rows have all modalities and say which voices and pairs are held out."""


def test_quickstart_goes_the_whole_way_and_continues(manifest, tmp_path, capsys):
    out = tmp_path / "run[a]"
    command = ["quickstart", "--train", str(manifest), "--out", str(out), "--max_steps", "2", "--holdout", "part=test"]
    assert main(command) == 0, capsys.readouterr().err
    report = json.loads((out / "report.json").read_text())
    in_checkout = (Path(__file__).parents[1] / ".git").exists()
    assert list(report) == [*REPORT_KEYS, "routing", "recipe_hash", *(["commit"] if in_checkout else [])]
    for part, keys in REPORT_KEYS.items():
        assert keys <= set(report[part]), part
    assert (report["caption"]["n"], report["caption"]["heldout_pairs_n"]) == (4, 4)
    assert 0 <= report["caption"]["exact_match"] <= 1
    assert re.fullmatch(r"[0-9a-f]{64}", report["recipe_hash"])
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", report.get("commit", "0" * 40))
    card = (out / "model" / "README.md").read_text()
    assert report["recipe_hash"] in card and report.get("commit", "not recorded") in card
    assert f"- text bits_per_byte: {report['text']['bits_per_byte']:.4g}\n" in card
    assert "- heard (audio): " in card and "Not measured" not in card
    assert report["train"]["peak_rss_bytes"] > 1e8
    assert report["train"]["tokens_per_second"] > 0
    losses = [name for name in read_curves(out / "logs" / "decoder" / "metrics.csv") if name.startswith("train/loss")]
    assert {"train/loss/text", "train/loss/units", "train/loss/ctc", "train/loss/advance"} <= set(losses)
    for name in losses:
        assert group_curves({name: [(0.0, 1.0), (1.0, 0.5)]}), f"{name} is in no chart"
    page = (out / "report.html").read_text()
    assert "data:image/" in page
    assert "data:audio/" in page
    assert (out / "recipe.yaml").is_file()
    assert {path.name for path in (out / "configs").iterdir()} == {"codec.yaml", "decoder.yaml"}
    printed = capsys.readouterr().out
    assert f"$ mmllm fit -c '{out}/configs/decoder.yaml'" in printed and f"Report: {out}/report.html" in printed
    before = (out / "model" / "model.safetensors").read_bytes()
    state = json.loads((out / "quickstart.json").read_text())
    for stage in state["stages"]:
        stage["commit"] = "0" * 40 if stage["name"] == "fit decoder" else "1" * 40
    (out / "quickstart.json").write_text(json.dumps(state))
    assert main(command) == 0
    assert "done before: mmllm fit -c" in capsys.readouterr().out
    assert (out / "model" / "model.safetensors").read_bytes() == before
    again = json.loads((out / "report.json").read_text())
    assert again.pop("commit") == "0" * 40, "of the code that trained the decoder, not of the code that reports"
    report.pop("commit", None)
    assert again == report, "what a finished run took does not grow when it is reported again"
    os.utime(out / "model" / "model.safetensors", ns=(1, 1))  # trained again by hand
    capsys.readouterr()
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "it is evaluated again" in printed and "done before: mmllm fit -c" in printed
    assert "done before: mmllm eval" not in printed
    assert main([*command, "--seed", "5"]) == 2
    assert "other settings (seed differ)" in capsys.readouterr().err


def test_documents_with_pictures_but_no_captions_and_no_questions(tmp_path, capsys):
    rows = []
    for i, colour in enumerate(list(COLORS) * 10):
        Image.new("RGB", (16, 16), COLORS[colour]).save(tmp_path / f"{i}.png")
        rows.append(
            {"id": f"i{i}", "segments": [{"text": "See:"}, {"image": f"{i}.png"}, {"text": f"It is {colour}."}]}
        )
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    command = ["quickstart", "--train", str(manifest), "--out", str(out), "--max_steps", "1", "--holdout", "0.3"]
    assert main([*command, "--data_only"]) == 0
    assert (out / "recipe.yaml").is_file() and (out / "configs" / "decoder.yaml").is_file()
    assert not (out / "model").exists() and not (out / "report.json").exists()
    assert main(command) == 0  # goes on there
    printed = capsys.readouterr().out
    assert "no test row can be scored" in printed
    assert re.search(r"\d+ interleaved rows are not scored: they have no question", printed)
    assert (out / "model" / "model.safetensors").is_file() and (out / "report.html").is_file()


def test_a_quickstart_by_minutes_trains_as_two_ranks(tmp_path, monkeypatch):
    """Without --max_steps trainings run as two DDP ranks, in processes of their own."""
    rows = [{"id": f"t{i}", "text": f"Row {i} says that {i} and {i} make {2 * i}."} for i in range(120)]
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(machine, "num_cores", lambda: 2)
    out = tmp_path / "run"
    assert main(["quickstart", "--train", str(manifest), "--out", str(out), "--minutes", "0.7"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["train"]["seconds"] < 120, "0.7 minutes, and twice as much again for a machine that is busy"
    assert report["text"]["n"] >= 4
    config = yaml.safe_load((out / "configs" / "decoder.yaml").read_text())
    assert (config["trainer"]["devices"], config["trainer"]["strategy"]) == (2, "ddp")


def test_the_process_that_waits_for_trainings_imports_no_torch():
    check = "import sys, mmllm.cli.main, mmllm.quickstart.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_short_commands_share_a_process_that_ends_before_a_training(tmp_path, capfd):
    processes = Processes()
    try:
        assert processes.run_shared(["configs", "ls"]) == 0
        assert "quickstart/decoder.yaml" in capfd.readouterr().out
        assert processes._shared is not None
        first = processes._shared.process
        assert processes.run_shared(["report", "--out", str(tmp_path)]) == 2
        assert "holds no quickstart with a trained model" in capfd.readouterr().err
        assert processes._shared.process is first and first.poll() is None
        assert processes.run(["--version"], 1) == 0
        assert first.poll() == 0, "its memory is free"
        assert processes.run_shared(["--version"]) == 0
        second = processes._shared.process
        second.kill()
        assert processes.run_shared(["--version"]) == -signal.SIGKILL, "no answer: it is gone"
        assert processes.run_shared(["--version"]) == 0, "another one is started"
    finally:
        processes.end_all()
    assert not processes._running


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--holdout", "speaker=bob"], "need --train"),
        (["--minutes", "0"], "--minutes is 0"),
        (["--max_steps", "0"], "--max_steps is 0"),
        (["--train", "nowhere.jsonl"], "nowhere.jsonl: no such manifest"),
    ],
)
def test_quickstart_says_what_is_wrong(arguments, message, tmp_path, capfd):
    assert main(["quickstart", "--out", str(tmp_path / "run"), *arguments]) == 2
    assert message in capfd.readouterr().err


def test_choices_follow_the_rows(manifest, tmp_path):
    contents = Contents.of(read_rows(manifest))
    assert contents.kinds == ("audio", "caption", "interleaved", "text")
    assert contents.has_images
    assert contents.has_sounds
    assert contents.is_single_words
    assert not contents.names_sides
    recipe = recipe_dict(tmp_path, contents, choose(contents, is_demo=False), seed=3, num_steps=20)
    assert [source["name"] for source in recipe["sources"]] == ["caption", "interleaved", "text", "heard", "spoken"]
    assert "curriculum" not in recipe
    assert not any("filter" in source for source in recipe["sources"] if source["name"] == "heard")


def test_joined_sounds_are_heard_alone_and_others_only_learnt_to_speak_from(manifest, tmp_path):
    rows = read_rows(manifest)
    sound = next(row for row in rows if row.kind == "audio")
    marked = [dataclasses.replace(sound, metadata={mark: True}) for mark in ("joined", "spoken_only")]
    kept = {}
    for name, some in {"none": rows, "joined": [*rows, marked[0]], "spoken_only": [*rows, marked[1]]}.items():
        contents = Contents.of(some, is_demo=True)
        assert (contents.has_joined, contents.has_spoken_only) == (name == "joined", name == "spoken_only")
        recipe = recipe_dict(tmp_path, contents, choose(contents, is_demo=True), seed=3, num_steps=20)
        filters = {source["name"]: source.get("filter") for source in recipe["sources"]}
        for source in ("heard", "spoken"):
            keeps = compile_filter(filters[source]) if filters[source] else bool
            speaker = choose(contents, is_demo=True).voices[0]
            row = {"kind": "audio", "aligned": True, "speaker": speaker}
            kept[name, source] = [keeps(row), keeps({**row, "joined": True}), keeps({**row, "spoken_only": True})]
    assert kept["none", "heard"] == kept["joined", "heard"] == [True, True, True]
    assert kept["spoken_only", "heard"] == [True, True, False]
    assert kept["joined", "spoken"] == [True, False, True]
    assert kept["none", "spoken"] == kept["spoken_only", "spoken"] == [True, True, True]


def test_columns_of_others_that_are_called_like_the_demos_marks_are_no_marks(manifest, tmp_path):
    rows = read_rows(manifest)
    named = {"plain": True, "joined": True, "spoken_only": True}
    marked = [dataclasses.replace(row, metadata={**row.metadata, **named}) for row in rows]
    own, demo = (Contents.of(marked, is_demo) for is_demo in (False, True))
    assert own == Contents.of(rows) and (demo.has_plain, demo.has_joined, demo.has_spoken_only) == (True, True, True)
    recipe = recipe_dict(tmp_path, own, choose(own, is_demo=False), seed=3, num_steps=20)
    filters = " ".join(source.get("filter", "") for source in recipe["sources"])
    assert "plain" not in filters and "joined" not in filters and "spoken_only" not in filters


@pytest.mark.parametrize("names", [(7, 3, 11, 5, 2, 9), ("7", "3", "11", "5", "2", "9")])
def test_speakers_may_be_numbers(manifest, tmp_path, names):
    """Four of six are learnt, those that are heard longest; sounds are a bit longer from row to row."""
    sounds = [row for row in read_rows(manifest) if row.kind == "audio"]
    rows = [dataclasses.replace(row, metadata={"speaker": names[i // 4]}) for i, row in enumerate(sounds)]
    rows[0] = dataclasses.replace(rows[0], metadata={"speaker": True})  # whatever that means: it is no speaker
    contents = Contents.of(rows)
    assert contents.speakers == names[::-1]
    recipe = recipe_dict(tmp_path, contents, choose(contents, is_demo=False), seed=3, num_steps=20)
    (spoken,) = (source["filter"] for source in recipe["sources"] if source["name"] == "spoken")
    keeps = compile_filter(spoken)
    assert [keeps({"aligned": True, "speaker": name}) for name in names] == [False, False, True, True, True, True]
    arrays, told = Column.arrays(names, "speaker")
    column = Column(arrays.__getitem__, "speaker", 6, **told)
    kept = kept_documents(spoken, {"aligned": np.ones(6, dtype=np.int64), "speaker": column}, 6)
    assert kept.tolist() == [False, False, True, True, True, True]


def test_speakers_of_two_sorts_are_refused_where_some_are_chosen(manifest):
    sounds = [row for row in read_rows(manifest) if row.kind == "audio"]
    few, many = (
        [
            dataclasses.replace(row, metadata={"speaker": i if i % 2 else f"s{i}"})
            for i, row in enumerate(sounds[:count])
        ]
        for count in (4, 5)
    )
    assert len(Contents.of(few).speakers) == 4
    with pytest.raises(ValueError, match=r"a text in some rows .* and a number in others"):
        Contents.of(many)


def test_each_sound_is_measured_once(manifest, monkeypatch):
    measured = []
    monkeypatch.setattr(plan, "sound_seconds", lambda media: measured.append(media) or 1.0)
    assert Contents.of(read_rows(manifest)).audio_seconds == len(measured) == len(set(measured)) == 24


def test_pictures_are_not_mirrored_where_an_answer_says_left(manifest):
    rows = read_rows(manifest)
    asked = next(row for row in rows if row.kind == "interleaved")
    sided = dataclasses.replace(asked, metadata={"question": "on which side?", "answer": "Left"})
    assert Contents.of([*rows, sided]).names_sides and not Contents.of(rows).names_sides


def test_a_gpu_that_is_not_used_is_mentioned(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine, "NVIDIA_GPU", tmp_path)
    assert main(["quickstart", "--out", str(tmp_path), "--train", "nowhere.jsonl"]) == 2
    assert "trainings run on the CPU" in capsys.readouterr().out


@pytest.mark.parametrize(("seconds", "length", "batch"), [(2.0, 512, 4), (12.0, 1024, 2), (300.0, 2048, 2)])
def test_sequences_are_as_long_as_the_speech_that_they_hold(manifest, seconds, length, batch):
    contents = dataclasses.replace(Contents.of(read_rows(manifest)), long_seconds=seconds)
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
    assert demo.training_length("codec", TASKS, None, 0.15)["trainer.max_steps"] == DEMO_STEPS["codec"]
    assert demo.limits(TASKS, None) == {}


def played(out, monkeypatch, model=None, **saved):
    """A run of which only the evaluations are left, and which rows each of them is given."""
    out.mkdir(exist_ok=True)
    (out / "model").mkdir(exist_ok=True)
    (out / "model" / "model.safetensors").write_bytes(b"weights" if model is None else model)
    saved_run(out, saved.pop("stages", ["fit decoder"]), **saved)
    going_on = run._Run(out, SETTINGS, lambda command: 0)
    going_on.tasks = {"caption": [100, 50]}
    commands = []

    def stage(name, *command, **options):
        commands.append(" ".join(command))
        going_on.state.add({"name": name, "seconds": 1.0, "command": " ".join(["mmllm", *command])})

    monkeypatch.setattr(going_on, "stage", stage)
    return going_on, commands


def test_rows_that_there_is_no_time_for_are_told_and_reported(manifest, tmp_path, monkeypatch, capsys):
    going_on, commands = played(tmp_path, monkeypatch, seconds=601.0)
    contents = Contents.of(read_rows(manifest))
    evaluations = StageList(tmp_path, contents, choose(contents, is_demo=False), DEMO, seed=0, num_workers=1)
    going_on._forget_scores_of_another_model()
    going_on._evaluate(evaluations)
    assert len(commands) == 1 and commands[0].endswith(f"--limit {MIN_EVALUATED}")
    assert "time is short: caption is scored on 40 of 150 rows" in capsys.readouterr().out
    assert summary.evaluation_limits(going_on.tasks, going_on.state.stages) == {"caption": {"scored": 40, "of": 150}}
    (tmp_path / "model" / "model.safetensors").write_bytes(b"trained again, by hand")
    going_on._forget_scores_of_another_model()
    going_on._evaluate(evaluations)
    assert len(commands) == 2 and "--limit" not in commands[1], "the run's time has nothing to do with it"
    printed = capsys.readouterr().out
    assert "it is evaluated again" in printed and "time is short" not in printed
    assert summary.evaluation_limits(going_on.tasks, going_on.state.stages) == {}
    again = run._Run(tmp_path, SETTINGS, lambda command: 0)  # it was stopped before it was evaluated
    assert again.state.is_rescored


def test_a_limit_above_a_set_cuts_the_others():
    evaluated = [{"name": "eval caption", "command": "mmllm eval --task caption --limit 60"}]
    assert summary.evaluation_limits({"caption": [100, 50]}, evaluated) == {"caption": {"scored": 110, "of": 150}}
    assert summary.evaluation_limits({"caption": [60, 50], "text": [9]}, evaluated) == {}


@pytest.mark.parametrize(("seconds", "told"), [(725.0, "the run took 2:05 longer than the 10 minutes"), (590.0, "")])
def test_a_run_that_took_longer_than_it_aimed_at_says_by_how_much(tmp_path, monkeypatch, capsys, seconds, told):
    going_on, _ = played(tmp_path, monkeypatch, seconds=seconds)
    monkeypatch.setattr(going_on, "_run", lambda command: 0)
    going_on.tasks, going_on.state.is_finished = {}, True
    going_on._report()
    printed = capsys.readouterr().out
    assert told in printed and ("longer than" in printed) is bool(told)


def test_the_cards_shares_are_those_of_all_steps(tmp_path):
    scenes = {"kind": "caption", "shards": "a.tar"}
    sources = [
        {"name": "plain", **scenes, "weight_schedule": [[0, 0.8], [50, 0.2], [100, 0.2]]},
        {"name": "caption", **scenes, "weight_schedule": [[0, 0.0], [50, 0.6], [100, 0.6]]},
        {"name": "text", "kind": "text", "shards": "b.tar", "weight": 0.2},
    ]
    written = {"seed": 0, "tokenizer": "t", "sequence_length": 64, "sources": sources}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(written))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    lines = summary.source_lines(recipe, 100)
    # By hand: over the first half 0.5 on average, over the second 0.2; the rest of 0.8 is the other's.
    assert lines == (
        "plain (caption): 35% of the tokens, on average over 100 steps",
        "caption (caption): 45% of the tokens, on average over 100 steps",
        "text (text): 20% of the tokens, on average over 100 steps",
    )
    assert summary.source_lines(recipe, 1)[1].startswith("caption (caption): 0%")
    constant = dataclasses.replace(recipe, sources=recipe.sources[2:])
    assert summary.source_lines(constant, 100) == ("text (text): 100% of the tokens",)
    assert summary._num_steps({"trainer": {"max_steps": 1150}}, {}) == 1150
    assert summary._num_steps({"trainer": {"max_steps": -1}}, {"train/loss": [(19.0, 1.0), (39.0, 1.0)]}) == 40


KILLED = """
import os, signal, sys, time
from pathlib import Path
from mmllm.cli.main import main
from mmllm.quickstart import run, state
from mmllm.training.decoder_module import DecoderModule

state.SAVE_SECONDS = 0.1
shipped, end_of_batch = run.stage_config, DecoderModule.on_train_batch_end


def stage_config(stage, out, overrides):
    config = shipped(stage, out, overrides)
    for callback in config["trainer"]["callbacks"]:
        if callback["class_path"].endswith("ModelCheckpoint"):
            del callback["init_args"]["train_time_interval"]
            callback["init_args"]["every_n_train_steps"] = 1
    return config


def on_train_batch_end(module, *args):
    end_of_batch(module, *args)
    if module.trainer.global_step == 2:
        out, deadline = Path(module.out).parent, time.monotonic() + 20
        saved, checkpoint = out / "quickstart.json", out / "checkpoints" / "decoder" / "last.ckpt"
        while saved.stat().st_mtime <= checkpoint.stat().st_mtime and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)


run.stage_config, DecoderModule.on_train_batch_end = stage_config, on_train_batch_end
main(sys.argv[1:])
"""


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the killed run saves more often
def test_a_run_that_is_killed_while_it_trains_goes_on_from_its_checkpoint(tmp_path, monkeypatch, capsys):
    rows = [{"id": f"t{i}", "text": f"Row {i} says that {i} and {i} make {2 * i}."} for i in range(60)]
    manifest, out = tmp_path / "manifest.jsonl", tmp_path / "run"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["quickstart", "--train", str(manifest), "--out", str(out), "--max_steps", "3"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr[-2000:]
    state, checkpoint = out / "quickstart.json", out / "checkpoints" / "decoder" / "last.ckpt"
    before = json.loads(state.read_text())
    assert state.stat().st_mtime > checkpoint.stat().st_mtime, "the clock is saved while a stage runs"
    assert "fit decoder" not in {stage["name"] for stage in before["stages"]}
    steps = []
    one_step = DecoderModule.training_step

    def training_step(module, batch, batch_idx):
        steps.append(module.trainer.global_step)
        return one_step(module, batch, batch_idx)

    monkeypatch.setattr(DecoderModule, "training_step", training_step)
    assert main(command) == 0, capsys.readouterr().err
    assert steps == [2]
    after = json.loads(state.read_text())
    report = json.loads((out / "report.json").read_text())
    own = [stage["seconds"] for stage in after["stages"][len(before["stages"]) :]]
    assert report["train"]["seconds"] >= round(before["seconds"] + sum(own), 1)
    assert report["train"]["peak_rss_bytes"] >= before["peak_rss_bytes"] > 0


SETTINGS = {"train": ["x"], "test": [], "holdout": None, "minutes": 10.0, "seed": 0, "max_steps": None,
            "max_bad_fraction": None}  # fmt: skip


def saved_run(out, stages, seconds=0.0):
    out.mkdir(exist_ok=True)
    done = [{"name": name, "seconds": 1.0, "command": ""} for name in stages]
    (out / run_state.STATE_FILE).write_text(json.dumps({"settings": SETTINGS, "seconds": seconds, "stages": done}))


def test_a_training_by_minutes_that_goes_on_gets_what_is_left_beside_what_it_had(tmp_path, monkeypatch):
    saved_run(tmp_path, ["split"], seconds=300.0)
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / "val.jsonl").write_text("")
    checkpoint = tmp_path / "checkpoints" / "decoder" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    torch.save({"mmllm_elapsed_seconds": 100.0}, checkpoint)
    commands = []
    going_on = run._Run(tmp_path, SETTINGS, lambda command: 0)
    monkeypatch.setattr(going_on, "stage", lambda name, *command, **options: commands.append(command))
    going_on._fit("decoder", {})
    assert commands[0][-2:] == ("--ckpt_path", str(checkpoint))
    config = yaml.safe_load((tmp_path / "configs" / "decoder.yaml").read_text())
    left = going_on.budget.training_length("decoder", {}, 300.0, None)["model.init_args.max_seconds"]
    assert config["model"]["init_args"]["max_seconds"] == pytest.approx(100 + left, abs=5)


@pytest.mark.parametrize("left", ["nothing", "logs", "model", "checkpoint", "last checkpoint"])
def test_a_training_that_was_stopped_goes_on_or_over_what_it_left(tmp_path, left):
    """`fit` refuses to write over a run; a stage that isn't done is this run's own."""
    saved_run(tmp_path, ["split"])
    going_on = run._Run(tmp_path, SETTINGS, lambda command: 0)
    checkpoint = tmp_path / "checkpoints" / "codec" / "last.ckpt"
    places = {"logs": tmp_path / "logs" / "codec", "model": tmp_path / "codec", "nothing": tmp_path / "logs" / "other"}
    places.get(left, checkpoint.parent).mkdir(parents=True)
    if "checkpoint" in left:
        torch.save({"global_step": 30 if left == "last checkpoint" else 29}, checkpoint)
    wanted = {"nothing": [], "checkpoint": ["--ckpt_path", str(checkpoint)]}.get(left, ["--overwrite"])
    assert going_on._begun("codec", {"trainer.max_steps": 30, "model.init_args.max_seconds": None}) == wanted


def test_minutes_may_grow_until_the_decoder_is_trained(tmp_path):
    more, less = {**SETTINGS, "minutes": 12.0}, {**SETTINGS, "minutes": 9.0}
    saved_run(tmp_path, ["split"])
    assert run_state.RunState(tmp_path, more).seconds_left == pytest.approx(720, abs=5)
    for settings in (less, {**more, "seed": 1}, {**SETTINGS, "minutes": None}):
        with pytest.raises(ValueError, match=r"other settings \((minutes|minutes, seed) differ"):
            run_state.RunState(tmp_path, settings)
    saved_run(tmp_path, ["split", "fit decoder"])
    with pytest.raises(ValueError, match="only until the decoder is trained"):
        run_state.RunState(tmp_path, more)


def test_ranks_follow_cores_and_memory_where_minutes_count(monkeypatch):
    memory = SimpleNamespace(available=16 * 2**30)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    for cores, ranks in ((1, 1), (2, 2), (3, 2), (4, 4), (16, 4)):
        monkeypatch.setattr(machine, "num_cores", lambda cores=cores: cores)
        assert machine.num_ranks(10.0, None) == ranks
        assert machine.num_ranks(None, None) == 2, "the demo is the same run everywhere"
    memory.available = 6 * 2**30
    assert machine.num_ranks(10.0, None) == 2
    assert machine.num_ranks(10.0, 3) == 1


def test_no_rank_is_without_a_sequence(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "num_ranks", lambda minutes, max_steps: 4)
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / "val.jsonl").write_text("")
    long_speech = run._Run(tmp_path, SETTINGS, lambda command: 0)
    monkeypatch.setattr(long_speech, "stage", lambda *command, **options: None)
    for batch_size, ranks in ((2, 2), (8, 4)):
        long_speech._fit("decoder", {"data.init_args.batch_size": batch_size})
        trainer = yaml.safe_load((tmp_path / "configs" / "decoder.yaml").read_text())["trainer"]
        assert (trainer["devices"], trainer["strategy"]) == (ranks, "ddp")


def test_the_demo_makes_its_data_with_several_processes(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(machine, "num_cores", lambda: 3)
    demo = run._Run(tmp_path, {**SETTINGS, "train": [], "minutes": None}, lambda command: 0)
    monkeypatch.setattr(demo, "stage", lambda name, *command, **options: commands.append(command))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifests.json").write_text(json.dumps({"train": ["a"], "test": ["b"], "left_out": []}))
    demo._data()
    assert "--workers 3" in " ".join(commands[0])


def test_what_is_not_scored_is_named(manifest, tmp_path):
    lines = [line for line in manifest.read_text().splitlines() if json.loads(line)["id"][0] in "ci"]
    asked = json.loads(lines[1])
    del asked["question"], asked["answer"]
    test = manifest.parent / "some.jsonl"
    test.write_text("".join(line + "\n" for line in [*lines, json.dumps({**asked, "id": "unasked"})]))
    tasks, left_out = evaluation_tasks(test, Contents.of(read_rows(manifest)))
    assert set(tasks) == {"caption", "interleaved"} and tasks["interleaved"] == [24]
    assert left_out == [
        "transcribe is not scored: no audio row is held out",
        "speak is not scored: no audio row is held out",
        "1 interleaved rows are not scored: they have no question",
        "text is not scored: no text row is held out",
    ]
    texts = Contents.of([row for row in read_rows(manifest) if row.kind == "text"])
    _, left_out = evaluation_tasks(test, texts)
    assert left_out[0] == "caption is not scored on 24 caption rows: no training row teaches it"


def test_rows_of_any_form_are_handed_to_split(tmp_path):
    """From there on all is manifests."""
    commands: list[list[str]] = []

    def run_command(command) -> int:
        commands.append(list(command))
        return main(command) if command[1] == "split" else 1

    rows = "".join(f"file{n}.png;words {n}\n" for n in range(12))
    (tmp_path / "m.csv").write_text("photo;words\n" + rows)
    for n in range(12):
        Image.new("RGB", (8 + n, 8)).save(tmp_path / f"file{n}.png")
    out = tmp_path / "run"
    given = {"columns": ["image=photo", "text=words"], "form": "csv", "max_steps": 1}
    with pytest.raises(run.StageFailed, match="text tokenizer"):
        run.quickstart(run_command, str(out), [str(tmp_path / "m.csv")], **given)
    split, _ = commands
    assert split[split.index("--format") + 1] == "csv" and split.count("--columns") == 2
    manifest = read_rows(out / "manifests" / "train-caption.jsonl")
    assert len(manifest) > 6 and manifest[0].text.startswith("words ")
    with pytest.raises(ValueError, match="other settings"):
        run.quickstart(run_command, str(out), [str(tmp_path / "m.csv")], max_steps=1)
