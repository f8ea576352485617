"""Which stages a run has, what its presets choose, and what is printed where commands run side by side."""

from __future__ import annotations

import dataclasses
import json
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from PIL import Image

from mmllm.cli.main import main
from mmllm.quickstart import machine, plan, run
from mmllm.quickstart.budget import ALIGN_SHARE, ALIGN_STEPS, CODEC_SHARE, MIN_TRAINING_SECONDS, Budget
from mmllm.quickstart.plan import Choices, Contents, choose, recipe_dict
from mmllm.quickstart.presets import DEMO, ONE_GPU, PRESETS, TINY, Preset
from mmllm.quickstart.processes import Processes
from mmllm.quickstart.stages import StageList, Step

CONTENTS = Contents(
    kinds=("audio", "caption", "interleaved", "text"), has_images=True, has_sounds=True, num_rows=100,
    num_characters=1000, audio_seconds=100.0, names_sides=True, is_single_words=False, num_captions=50,
    long_seconds=2.0,
)  # fmt: skip
TEXTS = dataclasses.replace(CONTENTS, kinds=("text",), has_images=False, has_sounds=False)
CHOICES = Choices(640, perturb=0, sequence_length=512, batch_size=4, decoder={})


def steps_of(contents: Contents, choices: Choices = CHOICES, preset: Preset = DEMO) -> dict[str, Step]:
    steps = StageList(Path("run"), contents, choices, preset, seed=3, num_workers=2).steps()
    assert len({step.name for step in steps}) == len(steps)
    return {step.name: step for step in steps}


def test_a_run_has_the_stages_that_its_rows_need():
    codec = ["sound shards", "fit codec"]
    built = ["tokenizer", "shards", "index"]
    assert list(steps_of(CONTENTS)) == ["text tokenizer", *codec, *built, "fit decoder"]
    assert list(steps_of(TEXTS)) == ["text tokenizer", *built, "fit decoder"]
    pictures = dataclasses.replace(TEXTS, kinds=("caption",), has_images=True)
    assert list(steps_of(pictures)) == ["text tokenizer", *built, "fit decoder"]
    documents = dataclasses.replace(TEXTS, kinds=("interleaved",), has_images=True)
    assert list(steps_of(documents)) == ["text tokenizer", *built, "fit decoder"]
    assert list(steps_of(CONTENTS, preset=ONE_GPU)) == ["text tokenizer", "codec", *built, "fit decoder"]
    aligned = dataclasses.replace(CHOICES, align=True, pointer=2)
    assert list(steps_of(CONTENTS, aligned)) == ["text tokenizer", "align", *codec, *built, "fit decoder"]
    assert list(steps_of(TEXTS, aligned)) == ["text tokenizer", *built, "fit decoder"]


def test_what_a_run_lacks_is_taken_out_of_the_decoder():
    overrides = steps_of(TEXTS)["fit decoder"].overrides
    gone = {"vision", "image_projector", "audio", "codebook_weights"}
    assert {key.rpartition(".")[2] for key, value in overrides.items() if value is None} == gone
    documents = dataclasses.replace(TEXTS, kinds=("interleaved",), has_images=True)
    overrides = steps_of(documents)["fit decoder"].overrides
    assert not [key for key in overrides if "clip" in key or "vision" in key], "its tower is learnt with it"


def test_speech_that_is_aligned_is_built_with_its_words():
    aligned = steps_of(CONTENTS, dataclasses.replace(CHOICES, align=True, pointer=2))
    command = " ".join(aligned["align"].command)
    assert command == "data align run/manifests/train-audio.jsonl --out run/aligned --seed 3"
    assert "run/aligned/train-audio.jsonl" in aligned["shards"].command
    assert "run/manifests/train-caption.jsonl" in aligned["shards"].command
    assert "--pointer 2" in " ".join(aligned["tokenizer"].command)
    plain = steps_of(CONTENTS)
    assert "run/manifests/train-audio.jsonl" in plain["shards"].command
    assert "--pointer" not in plain["tokenizer"].command


def test_a_stage_that_is_left_out_leaves_its_time_to_those_behind_it():
    """Played with a clock that goes on by what each training is given."""
    budget = Budget(minutes=10.0, max_steps=None, is_demo=False, num_processes=2)
    given: dict[bool, dict[str, float]] = {}
    for align in (True, False):
        left, lengths = 600.0, {}
        for step in steps_of(CONTENTS, dataclasses.replace(CHOICES, align=align)).values():
            if step.training is not None:
                length = budget.training_length(step.training, {"text": [50]}, left, step.share)
                lengths[step.name] = length["model.init_args.max_seconds"]
            elif step.share is not None:
                flag, seconds = budget.command_length({"text": [50]}, left, step.share)
                assert flag == "--seconds"
                lengths[step.name] = float(seconds)
            left -= lengths.get(step.name, 0.0)
        assert left > 0
        given[align] = lengths
    full, plain = given.values()
    assert full["align"] / ALIGN_SHARE == pytest.approx(plain["fit codec"] / CODEC_SHARE, rel=0.01)
    assert full["fit codec"] == pytest.approx(plain["fit codec"] * (1 - ALIGN_SHARE), rel=0.01)
    spared = full["align"] + full["fit codec"] - plain["fit codec"]
    assert plain["fit decoder"] - full["fit decoder"] == pytest.approx(spared, abs=1)


def test_the_length_of_a_command_that_learns():
    tasks = {"text": [50]}
    assert Budget(None, 2, True, 1).command_length(tasks, None, 0.1) == ["--steps", "2"]
    assert Budget(None, None, True, 2).command_length(tasks, None, 0.1) == ["--steps", str(ALIGN_STEPS)]
    assert Budget(5.0, None, True, 2).command_length(tasks, 0.0, 0.1) == ["--seconds", str(MIN_TRAINING_SECONDS)]


# --------------------------------------------------------------------------------------------------------- presets
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--preset", "one_gpu"], "--preset one_gpu is for rows of your own; give --train"),
        (["--preset", "one_gpu", "--train", "rows.jsonl"], "/dev/absent is not there; give --preset demo"),
    ],
)
def test_presets_say_what_they_need(arguments: list[str], message: str, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "NVIDIA_GPU", Path("/dev/absent"))
    Path("rows.jsonl").write_text('{"id": "a", "text": "words"}\n')
    assert main(["quickstart", "--out", "run", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("has", "message"), [(48e9, "the GPU here has 48 GB"), (0, "torch can't use the GPU"), (80e9, "")]
)
def test_a_gpu_that_is_too_small_is_refused_before_anything_is_built(has, message, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(machine, "NVIDIA_GPU", tmp_path)
    monkeypatch.setattr(machine, "gpu_bytes", lambda: int(has))
    monkeypatch.setattr(run._Run, "all_stages", lambda self, data_only: {})
    rows, out = tmp_path / "rows.jsonl", tmp_path / "run"
    rows.write_text('{"id": "a", "text": "words"}\n')
    assert main(["quickstart", "--preset", "one_gpu", "--train", str(rows), "--out", str(out)]) == (2 if message else 0)
    told = capsys.readouterr().err
    assert message in told and ("takes about 58 GB" in told) is bool(message)
    assert out.exists() != bool(message)


def test_the_gpu_is_asked_for_its_memory():
    has_gpu = torch.cuda.is_available()
    assert machine.gpu_bytes() == (torch.cuda.get_device_properties(0).total_memory if has_gpu else 0)


def test_presets_choose_minutes_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def ended(self: run._Run, data_only: bool) -> dict[str, Any]:
        self.state.save()
        commands = []
        monkeypatch.setattr(self, "stage", lambda name, *command, **options: commands.append(command))
        (self.out / "data").mkdir()
        (self.out / "data" / "manifests.json").write_text(json.dumps({"train": ["a"], "test": ["b"], "left_out": []}))
        self._data()
        share = commands[0][commands[0].index("--share") + 1] if "--share" in commands[0] else "1"
        return {"minutes": self.settings["minutes"], "share": float(share), "processes": self.num_processes}

    monkeypatch.setattr(machine, "num_cores", lambda: 2)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(run._Run, "all_stages", ended)

    def go(name: str, **options: Any) -> dict[str, Any]:
        return run.quickstart(lambda command: 1, str(tmp_path / name), **options)

    assert go("demo") == {"minutes": None, "share": 1, "processes": 2}
    assert go("tiny", preset="tiny") == {"minutes": 2.0, "share": TINY.data_share, "processes": 1}
    assert go("longer", preset="tiny", minutes=3.0)["minutes"] == 3.0
    assert go("tried", preset="tiny", max_steps=1) == {"minutes": None, "share": 0.01, "processes": 1}
    saved = json.loads((tmp_path / "tiny" / "quickstart.json").read_text())
    assert (
        saved["settings"]["preset"] == "tiny"
        and "preset" not in json.loads((tmp_path / "demo" / "quickstart.json").read_text())["settings"]
    )


def test_a_run_of_another_preset_is_not_gone_on_with(tmp_path: Path):
    plain = {"train": [], "minutes": 2.0, "max_steps": None, "seed": 0}
    settings = {**plain, "preset": "tiny"}
    (tmp_path / "quickstart.json").write_text(json.dumps({"settings": settings, "stages": [{"name": "split"}]}))
    with pytest.raises(ValueError, match=r"other settings \(preset differ"):
        run._Run(tmp_path, plain, lambda command: 0)


def test_one_gpu_has_the_sizes_of_real_photos_and_speech(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    choices = choose(CONTENTS, is_demo=False, preset=ONE_GPU)
    assert (choices.image_size, choices.image_tokens, choices.vocab_size) == (224, 49, 32_768)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_dict(tmp_path, CONTENTS, choices, 0, None)))
    sizes = {"decoder.vocab_size": 32_768 + 8 * 1025, "audio.num_codebooks": 8, "audio.codebook_size": 1024,
             "audio.codebook_dim": 128}  # fmt: skip
    given = [word for key, size in sizes.items() for word in (f"--model.init_args.{key}", str(size))]
    config = plan.config_path("quickstart/one_gpu.yaml")
    command = ["fit", "--print_estimate", "-c", str(config), "--data.init_args.recipe", str(recipe), *given]
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert 0.29e9 < told["parameters"]["active"] < 0.35e9
    gigabytes = round(told["memory_bytes"]["total"] / 1e9)
    assert f"{gigabytes} GB with 32 pictures" in " ".join(config.read_text().split()) and gigabytes < 80
    assert ONE_GPU.gpu_gigabytes == gigabytes and f"of which it takes about {gigabytes}" in ONE_GPU.about


NARROW = {
    "vocab_size": 0, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1,
    "moe": {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 16},
}  # fmt: skip
NARROW_TOWER = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 40, "width": 16, "heads": 2, "layers": 1},
}


def encodec_of_random_weights(hub: Path) -> None:
    """EnCodec's file in torch hub's cache, made by its own package."""
    from encodec.model import EncodecModel

    from mmllm_tokenizers.encodec_tokenizer import RELEASES

    (hub / "checkpoints").mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the package uses torch's old weight_norm
        model = EncodecModel.encodec_model_24khz(pretrained=False)
    torch.save(model.state_dict(), hub / "checkpoints" / RELEASES["encodec_24khz"].checkpoint)


def test_one_gpu_goes_the_whole_way_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """All switches of the preset, narrow, on a CPU: sizes alone are changed, and the weights, which aren't here."""
    encodec_of_random_weights(tmp_path / "hub")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    shipped, chosen = run.stage_config, run.choose

    def narrow(stage: str, out: Path, overrides: dict[str, Any]) -> dict[str, Any]:
        config = shipped(stage, out, overrides)
        model = config["model"]["init_args"]
        assert stage == "one_gpu" and config["trainer"]["precision"] == "bf16-mixed"
        assert set(NARROW["moe"]) == set(model["decoder"]["moe"])
        model["decoder"] |= NARROW
        model["vision"] |= {"open_clip": NARROW_TOWER, "pretrained": None}
        model["image_projector"]["num_tokens"] = 4
        model["audio"]["projector"] |= {"num_hidden_layers": 2}
        config["data"]["init_args"]["num_workers"] = 0
        return config

    def small(*given: Any) -> Choices:
        sizes = {"vocab_size": 300, "image_size": 16, "image_tokens": 4, "sequence_length": 512, "batch_size": 2}
        return dataclasses.replace(chosen(*given), **sizes, perturb=0)

    monkeypatch.setattr(run, "stage_config", narrow)
    monkeypatch.setattr(run, "choose", small)
    monkeypatch.setattr(machine, "NVIDIA_GPU", tmp_path / "absent")
    rows = []
    for i in range(12):
        Image.new("RGB", (20 + i, 20), (20 * i, 40, 200)).save(tmp_path / f"{i}.png")
        soundfile.write(tmp_path / f"{i}.wav", 0.3 * np.sin(np.arange(2400 + 40 * i) / (5 + i)), 16_000)
        part = {"part": "test" if i % 4 == 0 else "train"}
        rows += [{"id": f"c{i}", "image": f"{i}.png", "text": f"photo {i}", **part},
                 {"id": f"a{i}", "audio": f"{i}.wav", "text": f"number {i}", **part}]  # fmt: skip
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    command = ["quickstart", "--preset", "one_gpu", "--train", str(manifest), "--holdout", "part=test", "--out",
               str(out), "--max_steps", "2"]  # fmt: skip
    assert main(command) == 0, capsys.readouterr().err
    report = json.loads((out / "report.json").read_text())
    assert report["caption"]["n"] == report["transcribe"]["n"] == report["speak"]["n"] == 3
    names = [stage["name"] for stage in json.loads((out / "quickstart.json").read_text())["stages"]]
    assert names[:9] == ["split", "text tokenizer", "align", "codec", "tokenizer", "shards", "index",
                         "estimate decoder", "fit decoder"]  # fmt: skip
    assert '"active"' in capsys.readouterr().out, "what it needs is told before it trains"
    assert yaml.safe_load((out / "recipe.yaml").read_text())["packing"]["max_images"] == 32


# ---------------------------------------------------------------------------------------------- what is said, and where
def test_what_commands_print_side_by_side_stands_below_each(tmp_path: Path, monkeypatch, capsys):
    """Two that run at once and print in turns; lines of standard error carry their command's name as they come."""
    (tmp_path / "quickstart.json").write_text("{}")
    settings = {"train": ["x"], "minutes": None, "max_steps": None, "seed": 0}
    going = run._Run(tmp_path, settings, lambda command: 0)
    turns = threading.Barrier(2)

    def run_beside(command, num_threads, say) -> tuple[int, str]:
        turns.wait()
        say(f"{command[0]} is half done")
        turns.wait()
        return 0, f"{command[0]} scores 1\n{command[0]} scores 2\n"

    monkeypatch.setattr(going.processes, "run_beside", run_beside)
    threads = [threading.Thread(target=going.stage, args=(f"eval {name}", name), kwargs={"is_beside": True})
               for name in ("red", "blue")]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = capsys.readouterr().out.splitlines()
    for name in ("red", "blue"):
        place = lines.index(f"$ mmllm {name}")
        assert lines[place + 1 : place + 3] == [f"{name} scores 1", f"{name} scores 2"]
        assert lines[place - 1].startswith(f"eval {name} (")
        assert f"eval {name}: {name} is half done" in lines
    assert {stage["name"] for stage in going.state.stages} == {"eval red", "eval blue"}


def test_a_process_beside_others_hands_over_what_it_prints(tmp_path: Path):
    processes, said = Processes(), []
    code, printed = processes.run_beside(["configs", "ls"], 1, said.append)
    assert code == 0 and "quickstart/decoder.yaml" in printed and not said
    code, printed = processes.run_beside(["report", "--out", str(tmp_path)], 1, said.append)
    assert code == 2 and not printed
    assert "holds no quickstart with a trained model" in said[-1]
    assert not processes._running


def test_building_that_leaves_the_decoder_little_time_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    settings = {"train": ["x"], "minutes": 10.0, "max_steps": None, "seed": 0}
    for seconds, is_told in ((60.0, False), (500.0, True)):
        (tmp_path / "quickstart.json").write_text(json.dumps({"seconds": seconds}))
        going = run._Run(tmp_path, settings, lambda command: 0)
        going._write_recipe(CONTENTS, CHOICES)
        told = capsys.readouterr().out
        assert ("give more minutes" in told) is is_told
        assert (tmp_path / "recipe.yaml").is_file()
    assert "took 8:20 of --minutes 10: the decoder trains for" in told


def test_every_preset_is_told_by_the_help(capsys: pytest.CaptureFixture[str]):
    assert main(["quickstart", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert all(f"{preset.name}: {preset.about}" in told for preset in PRESETS.values())
