"""Every shipped config is found, parsed and built; those for a CPU run their stages on data made here."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from mmllm import paths
from mmllm.cli.main import main
from mmllm.data import commands
from mmllm.data.plan.recipe import load_recipe
from mmllm.model.earlier_names import KEYS
from mmllm.model.multimodal import MultimodalModel
from mmllm.training.clip_module import ClipModule, with_text_tokens
from mmllm.training.codec_module import CodecModule
from mmllm.training.decoder_module import DecoderModule
from mmllm.training.lightning_cli import build_cli, quiet_lightning
from mmllm_tokenizers.folder import TokenizerConfig, TokenizerFolder
from tests.data_fixtures import make_folder, mixed_manifest

torch.set_num_threads(1)

CONFIGS = sorted(path for path in paths.configs_dir().rglob("*.yaml") if path.parent.name not in ("studies", "scaling"))
"""Studies and sweeps are no configs of one training: tests/test_configs_studies.py has them."""
FROM_NOTHING = {"one_gpu/decoder_1b.yaml": (1041, 337), "eight_gpus/decoder_7b.yaml": (6971, 1535)}
PRETRAINED = {
    "one_gpu/llava_4b_align.yaml": (4495, 4495), "eight_gpus/llava_4b_align.yaml": (4495, 4495),
    "one_gpu/llava_4b_lora.yaml": (4495, 4495), "eight_gpus/llava_4b_lora.yaml": (4495, 4495),
    "one_gpu/upcycle_1b.yaml": (3652, 2041), "eight_gpus/upcycle_1b.yaml": (6873, 2041),
    "one_gpu/qwen3_4b_sft.yaml": (4023, 4023), "one_gpu/qwen3_4b_dpo.yaml": (4023, 4023),
    "one_gpu/llava_4b_grpo.yaml": (4495, 4495),
}  # fmt: skip
"""Stepped in tests/test_configs_pretrained.py."""
MILLION_PARAMETERS = {**FROM_NOTHING, **PRETRAINED}
"""In all and active."""


def _name(path: Path) -> str:
    return path.relative_to(paths.configs_dir()).as_posix()


def _built(path: Path, *extra: str) -> Any:
    on_cpu = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.strategy", "auto"]
    with quiet_lightning():
        return build_cli(["-c", str(path), *on_cpu, "--trainer.logger", "false", *extra], run=False)


def test_all_configs_are_found() -> None:
    names = {_name(path) for path in CONFIGS}
    assert {f"quickstart/{stage}.yaml" for stage in ("codec", "clip", "decoder")} | set(MILLION_PARAMETERS) <= names
    assert len(CONFIGS) == len(names) >= 5
    assert names <= set(paths.list_configs())


@pytest.mark.parametrize("path", CONFIGS, ids=_name)
def test_a_config_says_what_it_needs_and_gives_and_is_short(path: Path) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = " ".join(header)
    assert "Hardware:" in text and "Time:" in text and "Expected result:" in text
    assert len(path.read_text().splitlines()) < 80


@pytest.mark.parametrize("path", CONFIGS, ids=_name)
def test_a_config_builds(path: Path) -> None:
    module = _built(path).model
    with torch.device("meta"):
        match module:
            case DecoderModule():
                module.tokenizer = module.clip = None
                if module.audio is not None and module.audio.num_codebooks == 0:
                    pytest.skip("its sizes come from a tokenizer: built by test_the_quickstart_configs_step")
                model = MultimodalModel(module.resolved_config())
                total, active = MILLION_PARAMETERS[_name(path)]
                assert round(model.num_parameters() / 1e6) == total
                assert round(model.num_active_parameters() / 1e6) == active
            case ClipModule():
                config = with_text_tokens(module.clip_config, 512, 1, 0)
                assert isinstance(config.open_clip, dict) and config.open_clip["text_cfg"]["vocab_size"] == 512
            case CodecModule():
                assert math.prod(module.codec_config.ratios) == 160


OLD_DATA_MODULES = "mmllm.data.datamodule."
"""What class paths of data modules began with before the data engine had rooms."""


@pytest.mark.parametrize("path", [path for path in CONFIGS if "loading.datamodules." in path.read_text()], ids=_name)
def test_class_paths_of_older_configs_load(path: Path, tmp_path: Path) -> None:
    text = path.read_text()
    older = tmp_path / "older.yaml"
    older.write_text(text.replace("mmllm.data.loading.datamodules.", OLD_DATA_MODULES))
    assert older.read_text() != text
    assert type(_built(older).datamodule) is type(_built(path).datamodule)


@pytest.mark.parametrize("path", CONFIGS, ids=_name)
def test_a_config_keeps_a_few_checkpoints(path: Path) -> None:
    (saving,) = _built(path).trainer.checkpoint_callbacks
    assert saving.save_last and 0 <= saving.save_top_k <= 2
    assert saving.save_top_k == 0 or (saving.monitor, saving.mode) == ("step", "max")


@pytest.mark.parametrize("path", CONFIGS, ids=_name)
def test_a_config_logs_for_people_and_for_tensorboard(path: Path) -> None:
    loggers = yaml.safe_load(path.read_text())["trainer"]["logger"]
    kinds = {logger["class_path"].rpartition(".")[2]: logger["init_args"] for logger in loggers}
    assert set(kinds) == {"CSVLogger", "TensorBoardLogger"}
    assert kinds["CSVLogger"]["save_dir"] == kinds["TensorBoardLogger"]["save_dir"]


@pytest.mark.parametrize("path", [path for path in CONFIGS if _name(path) in MILLION_PARAMETERS], ids=_name)
def test_a_large_config_validates_when_it_saves(path: Path) -> None:
    """`val_check_interval` counts batches, `every_n_train_steps` the steps that they are accumulated to."""
    trainer = yaml.safe_load(path.read_text())["trainer"]
    if path.stem.endswith("_grpo"):
        assert "val_check_interval" not in trainer  # it has no validation loss: its reward is measured as it trains
        return
    (saving,) = (c["init_args"] for c in trainer["callbacks"] if c["class_path"].endswith("ModelCheckpoint"))
    batches = saving["every_n_train_steps"] * trainer["accumulate_grad_batches"]
    assert trainer["val_check_interval"] == batches


def test_the_quickstart_configs_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    _write_data(tmp_path / "runs/demo/data")
    for stage in ("codec", "clip", "decoder"):
        assert main(["configs", "cp", f"quickstart/{stage}.yaml", f"{stage}.yaml"]) == 0
    demo = "runs/demo"
    image = ["--image_tokens", "16", "--image_size", "64"]
    short = ["--trainer.max_steps", "2", "--trainer.log_every_n_steps", "1"]
    _run("data", "build", f"{demo}/data/train.jsonl", "--out", f"{demo}/shards")
    text = ["--out", f"{demo}/text_tokenizer", "--vocab_size", "300"]
    _run("tokenizer", "train-text", f"{demo}/data/train.jsonl", *text)
    sounds, pictures = f"{demo}/shards/audio-*.tar", f"{demo}/shards/caption-*.tar"
    data = "--data.init_args."
    given = {
        "codec": [f"{data}shards", sounds, f"{data}val_shards", sounds, f"{data}batch_size", "2"],
        "clip": [f"{data}shards", pictures, f"{data}val_shards", pictures, f"{data}batch_size", "4"],
        "decoder": [f"{data}batch_size", "1"],
    }
    _run("fit", "-c", "codec.yaml", *short, *given["codec"])
    _run(
        "tokenizer", "assemble", "--text", f"{demo}/text_tokenizer", "--codec", f"{demo}/codec",
        "--out", f"{demo}/tokenizer", "--pointer", *image,
    )  # fmt: skip
    _run("data", "index", f"{demo}/shards", "--tokenizer", f"{demo}/tokenizer")
    _run("fit", "-c", "clip.yaml", *short, *given["clip"])
    Path(f"{demo}/recipe.yaml").write_text(RECIPE)
    _run("fit", "-c", "decoder.yaml", *short, *given["decoder"])
    logs = ("routing.json", "routing.csv", "samples.csv", "metrics.csv")
    models = ("codec/model.safetensors", "clip/model.safetensors", "model/config.json")
    for written in (*models, *(f"logs/decoder/{name}" for name in logs)):
        assert Path(demo, written).is_file(), written
    for stage, column in (("codec", "val/mel"), ("clip", "train/loss"), ("decoder", "train/loss/text")):
        assert column in Path(f"{demo}/logs/{stage}/metrics.csv").read_text().splitlines()[0], stage
    for stage in ("codec", "clip", "decoder"):  # and each goes on from what it saved
        first = torch.load(f"{demo}/checkpoints/{stage}/last.ckpt", weights_only=True)
        _run("fit", "-c", f"{stage}.yaml", *short, *given[stage], "--trainer.max_steps", "3", "--ckpt_path", "last")
        then = torch.load(f"{demo}/checkpoints/{stage}/last.ckpt", weights_only=True)
        assert (first["global_step"], then["global_step"]) == (2, 3), stage
    assert not any(line.startswith("mmllm: error") for line in capsys.readouterr().err.splitlines())


def test_a_shipped_recipe_bounds_pictures_and_is_named_by_its_config() -> None:
    for path in (path for path in CONFIGS if _name(path) in MILLION_PARAMETERS):
        data = yaml.safe_load(path.read_text())["data"]["init_args"]
        assert "replay_recipe" in data or {"recipe", "val_recipe"} <= set(data)
        if "replay_recipe" in data:
            assert load_recipe(paths.config_path(data["replay_recipe"])).packing.max_images is not None
        for key in (key for key in ("recipe", "val_recipe") if key in data):
            recipe = load_recipe(paths.config_path(data[key]))
            kinds = {source.kind for source in recipe.sources}
            assert recipe.packing.max_images is not None or kinds == {"text"}
            assert kinds == {"caption", "interleaved", "text", "audio"} or _name(path) in PRETRAINED
            assert recipe.tokenizer == yaml.safe_load(path.read_text())["model"]["init_args"]["tokenizer"]


@pytest.mark.parametrize("name", MILLION_PARAMETERS)
def test_a_large_config_fits_the_devices_that_it_names(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = paths.configs_dir() / name
    assert main(["fit", "--print_estimate", "-c", str(path)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert round(told["parameters"]["total"] / 1e6) == MILLION_PARAMETERS[name][0]
    assert told["days"] is None  # no rate was given
    gigabytes = round(told["memory_bytes"]["total"] / 1e9)
    text = path.read_text()
    assert f"{gigabytes} GB" in text and gigabytes < 80 and "of 80 GB" in text


def test_the_guide_tells_earlier_and_present_names() -> None:
    guide = Path(__file__).resolve().parents[1] / "docs" / "guides" / "training.md"
    told = guide.read_text().partition("## Names that keys had earlier")[2]
    for earlier, present in (pair for table in KEYS.values() for pair in table.items()):
        assert f"`{earlier}`" in told and f"`{present}`" in told, earlier


NARROW_DECODER = {
    "vocab_size": 0, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1,
    "moe": {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 16},
}  # fmt: skip
NARROW_TOWER = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 40, "width": 16, "heads": 2, "layers": 1},
}
STEPS, SAVED = 4, 2


def _narrow(path: Path, run: str) -> dict[str, Any]:
    """The config with all its switches, narrow, for one process on a CPU: sizes alone are changed, and devices."""
    config = yaml.safe_load(path.read_text())
    trainer, model, data = config["trainer"], config["model"]["init_args"], config["data"]["init_args"]
    trainer |= {"accelerator": "cpu", "devices": 1, "max_steps": STEPS, "log_every_n_steps": 1}
    trainer.pop("strategy", None)
    trainer["val_check_interval"] = SAVED * trainer["accumulate_grad_batches"]
    for callback in trainer["callbacks"]:
        if callback["class_path"].endswith("ModelCheckpoint"):
            callback["init_args"]["every_n_train_steps"] = SAVED
        if callback["class_path"].endswith(("RoutingLog", "Samples")):
            callback["init_args"]["every_steps"] = SAVED
    assert set(NARROW_DECODER["moe"]) == set(model["decoder"]["moe"])
    model["decoder"] |= NARROW_DECODER
    model["vision"] |= {"open_clip": NARROW_TOWER, "pretrained": None}  # its weights aren't here
    model["image_projector"]["num_tokens"] = 4
    model["audio"] |= {"num_codebooks": 0, "codebook_size": 0, "codebook_dim": 0}
    model["audio"]["projector"] |= {"num_hidden_layers": 2}
    for split in ("recipe", "val_recipe"):
        recipe = yaml.safe_load(paths.config_path(data[split]).read_text())
        recipe |= {"sequence_length": 160, "packing": {**recipe["packing"], "window": 16, "max_images": 8}}
        data[split] = f"runs/{run}/{split}.yaml"
        Path(data[split]).write_text(yaml.safe_dump(recipe))
    data |= {"num_val_sequences": 4, "batch_size": 2, "num_workers": 0}
    return config


@pytest.mark.parametrize("name", FROM_NOTHING)
def test_a_large_config_steps_in_small_and_resumes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = paths.configs_dir() / name
    run = yaml.safe_load(path.read_text())["model"]["init_args"]["out"].split("/")[1]
    home = Path("runs", run)
    made = make_folder(home / "codec", num_codebooks=8)
    TokenizerFolder(made.text, made.audio, TokenizerConfig(4, 16, audio_pool=4)).save(home / "tokenizer")
    for split in ("train", "val"):
        manifest = mixed_manifest(home / "data" / split, num=8, seed=len(split))
        rows = [json.loads(line) for line in manifest.read_text().splitlines()]
        commands.build(manifest, home / "shards" / split, home / "tokenizer")
        commands.index(home / "shards" / split, home / "tokenizer")
    looked_at = [{**row, **{kind: f"data/val/{row[kind]}" for kind in ("image", "audio") if kind in row}}
                 for row in rows if row.get("image") or row.get("audio")][:2]  # fmt: skip
    (home / "val.jsonl").write_text("\n".join(map(json.dumps, looked_at)))
    Path("narrow.yaml").write_text(yaml.safe_dump(_narrow(path, run)))
    _run("fit", "-c", "narrow.yaml")
    with (home / "logs" / "decoder" / "metrics.csv").open(newline="") as file:
        metrics = list(csv.DictReader(file))
    assert sum(bool(row["train/loss"]) for row in metrics) == STEPS
    assert all(float(row["train/grad_norm"]) > 0 for row in metrics if row["train/loss"])
    assert any(math.isfinite(float(row["val/loss"])) for row in metrics if row["val/loss"])
    (saved,) = (home / "checkpoints").glob(f"*step={SAVED}.ckpt")
    whole = load_file(home / "model" / "model.safetensors")
    resumed = ["--ckpt_path", str(saved), "--model.init_args.out", "again"]
    _run("fit", "-c", "narrow.yaml", *resumed)
    again = load_file(Path("again", "model.safetensors"))
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[key], again[key]) for key in whole)


RECIPE = """
tokenizer: runs/demo/tokenizer
sequence_length: 192
sources:
  - {name: pictures, kind: caption, shards: "runs/demo/shards/caption-*.tar"}
  - {name: sounds, kind: audio, shards: "runs/demo/shards/audio-*.tar"}
"""


def _run(*arguments: str) -> None:
    assert main(list(arguments)) == 0, arguments


def _write_data(folder: Path) -> None:
    folder.mkdir(parents=True)
    rows = []
    for number, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (64, 64), colour).save(folder / f"{number}.png")
        rows.append({"id": f"picture-{number}", "image": f"{number}.png", "text": f"a {colour} square"})
        wave = 0.3 * np.sin(np.arange(9000) * 0.05 * (number + 1)) + 0.01 * np.cos(np.arange(9000) * 1.7)
        soundfile.write(folder / f"{number}.wav", wave, 8000)
        words = [{"word": "tone", "start": 0.1, "end": 0.5}, {"word": str(number), "start": 0.6, "end": 1.0}]
        rows.append({"id": f"sound-{number}", "audio": f"{number}.wav", "text": f"tone {number}", "words": words})
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    looked_at = folder.parent / "manifests" / "val.jsonl"
    looked_at.parent.mkdir()
    for row in rows:
        row |= {kind: f"../{folder.name}/{row[kind]}" for kind in ("image", "audio") if kind in row}
    looked_at.write_text("\n".join(json.dumps(row) for row in rows))
