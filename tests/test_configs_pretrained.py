"""The shipped configs that start from pretrained models, each stepped in small on random weights of the same families.

What docs/guides/pretrained.md does with folders of Qwen3, SigLIP, EnCodec and Llama is done here with small ones, by
its own commands and YAML.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mmllm import paths
from mmllm.cli.main import main
from mmllm.data import commands
from mmllm.interop.importing import read_options
from mmllm.model.multimodal import LossConfig
from tests.data_fixtures import make_folder, mixed_manifest
from tests.interop_fixtures import randomize
from tests.pretrained_fixtures import CHATML, byte_level, saved

transformers = pytest.importorskip("transformers", reason="needs the transformers extra")
pytest.importorskip("peft", reason="needs the adapt extra")
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

GUIDE = (Path(__file__).parents[1] / "docs" / "guides" / "pretrained.md").read_text(encoding="utf-8")
STEPS, SAVED = 2, 1
PLACES = ("one_gpu", "eight_gpus")
SENSES = ("decoder", "vision", "image_projector", "audio", "loss")


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0, arguments


def text_model(folder: Path, family: str, **values: Any) -> None:
    """A small language model with a tokenizer, as transformers saves both."""
    tokenizer = saved(byte_level(), folder, CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer) + 5, intermediate_size=40, head_dim=8, **sizes, **values
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    randomize(model)
    model.save_pretrained(str(folder))


def siglip(folder: Path) -> None:
    """A small SigLIP, with its image processor."""
    vision = {
        "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 14,
        "patch_size": 7,
    }  # fmt: skip
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.SiglipConfig(vision_config=vision, text_config={**text, "vocab_size": 20})
    transformers.SiglipModel(config).save_pretrained(str(folder))
    transformers.SiglipImageProcessor(size={"height": 14, "width": 14}).save_pretrained(str(folder))


def shards(home: Path, kinds: tuple[str, ...] = ("c", "a", "t", "i")) -> None:
    """Rows of some kinds in the ids of the model folder."""
    for split in ("train", "val"):
        manifest = mixed_manifest(home / "data" / split, num=8, seed=len(split))
        rows = [line for line in manifest.read_text().splitlines() if json.loads(line)["id"].startswith(kinds)]
        manifest.write_text("\n".join(rows))
        commands.build(manifest, home / "shards" / split, home / "base")
        commands.index(home / "shards" / split, home / "base")


def shipped(name: str) -> dict[str, Any]:
    return yaml.safe_load((paths.configs_dir() / name).read_text())


def narrow(name: str, into: Path) -> Path:
    """The config with its switches, for one process on a CPU; sizes are those of the folder that it starts from."""
    config = shipped(name)
    trainer, model, data = config["trainer"], config["model"]["init_args"], config["data"]["init_args"]
    trainer |= {"accelerator": "cpu", "devices": 1, "precision": "32-true", "max_steps": STEPS, "log_every_n_steps": 1}
    trainer.pop("strategy", None)
    trainer["accumulate_grad_batches"] = 2
    if "val_check_interval" in trainer:
        trainer["val_check_interval"] = 2 * SAVED
    for callback in trainer["callbacks"]:
        if callback["class_path"].endswith("ModelCheckpoint"):
            callback["init_args"]["every_n_train_steps"] = SAVED
    for section in SENSES:
        model.pop(section, None)
    model["decoder"] = {"gradient_checkpointing": "full"}
    for key in (key for key in ("recipe", "val_recipe", "replay_recipe") if key in data):
        recipe = yaml.safe_load(paths.config_path(data[key]).read_text())
        recipe |= {"sequence_length": 128, "packing": {**recipe["packing"], "window": 16}}
        path = into / f"{key}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(recipe))
        data[key] = str(path)
    small = {"num_val_sequences": 2, "batch_size": 2, "num_workers": 0, "sequence_length": 128}
    data |= {key: value for key, value in small.items() if key in data}
    if "rollout" in model:
        model["rollout"]["max_new_tokens"] = 8
    path = into / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def check_steps(logs: Path) -> None:
    with (logs / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert len(rows) == STEPS and all(float(row["train/grad_norm"]) > 0 for row in rows)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("place", PLACES)
def test_a_language_model_gets_senses_is_aligned_and_adapted(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    home = Path("runs/llava_4b")
    text_model(home / "text", "Qwen3", tie_word_embeddings=True)
    siglip(home / "siglip")
    make_folder(home / "sound", num_codebooks=8)
    parts = guides_parts()
    parts["audio_projector"] |= {"hidden_size": 16, "num_hidden_layers": 2}
    (home / "parts.yaml").write_text(yaml.safe_dump(parts))
    run("import", home / "text", "--vision", home / "siglip", "--codec", home / "sound/codec", "--parts",
        home / "parts.yaml", "--out", home / "base")  # fmt: skip
    shards(home)
    run("fit", "-c", narrow(f"{place}/llava_4b_align.yaml", home / "align"))
    check_steps(home / "logs" / "aligned")
    base, aligned = weights(home / "base"), weights(home / "aligned")
    num_base_ids = json.loads((home / "base" / "config.json").read_text())["model"]["decoder"]["num_base_ids"]
    rows = "decoder.embed_tokens.weight"
    for name in base:
        is_frozen = name.startswith(("decoder.", "vision."))
        if name == rows:
            assert torch.equal(base[name][:num_base_ids], aligned[name][:num_base_ids])
            assert not torch.equal(base[name][num_base_ids:], aligned[name][num_base_ids:])
        elif is_frozen:
            assert torch.equal(base[name], aligned[name]), name
    projector = [name for name in base if name.startswith("image_projector.") and base[name].ndim == 2]
    assert projector and not any(torch.equal(base[name], aligned[name]) for name in projector)
    run("fit", "-c", narrow(f"{place}/llava_4b_lora.yaml", home / "lora"))
    check_steps(home / "logs" / "tuned")
    run("adapter", "merge", "--model", home / "tuned", "--adapter", "senses", "--out", home / "merged")
    tuned, merged = weights(home / "tuned"), weights(home / "merged")
    name = "decoder.layers.0.mlp.up_proj.weight"
    assert torch.equal(tuned[name], aligned[name]) and not torch.equal(merged[name], aligned[name])
    run("export", "--model", home / "merged", "--out", home / "out")
    llava = transformers.AutoModelForImageTextToText.from_pretrained(str(home / "out"), local_files_only=True)
    assert torch.equal(llava.model.language_model.layers[0].mlp.up_proj.weight, merged[name])
    run("adapter", "export", "--model", home / "tuned", "--adapter", "senses", "--out", home / "adapter")
    assert (home / "adapter" / "adapter_model.safetensors").is_file()
    if place == "one_gpu":
        learns_from_rewards(home)
    assert not any(line.startswith("mmllm: error") for line in capsys.readouterr().err.splitlines())


def learns_from_rewards(home: Path) -> None:
    """GRPO on questions about pictures, from the merged model."""
    rows = [
        {"id": f"q{number}", "segments": [{"text": "look"}, {"image": f"train/{number}.png"}],
         "question": "which colour?", "answer": "red"}
        for number in range(4)
    ]  # fmt: skip
    (home / "data" / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run("fit", "-c", narrow("one_gpu/llava_4b_grpo.yaml", home / "grpo"))
    check_steps(home / "logs" / "rewarded")
    assert (home / "rewarded" / "adapters" / "rewarded" / "adapter_model.safetensors").is_file()


def test_a_language_model_is_instructed_and_prefers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    home = Path("runs/qwen3_4b")
    text_model(home / "text", "Qwen3", tie_word_embeddings=True)
    run("import", home / "text", "--out", home / "base")
    for split in ("train", "val"):
        turns = [{"text": "which colour?", "role": "user"}, {"text": "the red one", "role": "assistant"}]
        chats = [{"id": f"c{number}", "segments": turns} for number in range(6)]
        texts = [{"id": f"t{number}", "text": "one red square above the circle"} for number in range(6)]
        (home / split).mkdir()
        (home / split / "rows.jsonl").write_text("\n".join(map(json.dumps, [*chats, *texts])))
        commands.build(home / split / "rows.jsonl", home / "shards" / split, home / "base")
        commands.index(home / "shards" / split, home / "base")
        (home / "pairs").mkdir(exist_ok=True)
        asked = {"role": "user", "content": "which colour?"}
        sides = {"chosen": "red", "rejected": "a blue square"}
        said = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
        (home / "pairs" / f"{split}.jsonl").write_text("\n".join([json.dumps({"prompt": [asked], **said})] * 4))
    run("fit", "-c", narrow("one_gpu/qwen3_4b_sft.yaml", home / "sft"))
    check_steps(home / "logs" / "instructed")
    run("adapter", "merge", "--model", home / "instructed", "--adapter", "instructed", "--out", home / "merged")
    run("fit", "-c", narrow("one_gpu/qwen3_4b_dpo.yaml", home / "dpo"))
    check_steps(home / "logs" / "preferred")
    assert (home / "preferred" / "adapters" / "preferred" / "adapter_model.safetensors").is_file()
    assert not any(line.startswith("mmllm: error") for line in capsys.readouterr().err.splitlines())


@pytest.mark.parametrize("place", PLACES)
def test_a_dense_model_is_upcycled_and_trained_on(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    home = Path("runs/upcycle_1b")
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    text_model(home / "text", "Llama", tie_word_embeddings=True, rope_parameters=rope)
    run("import", home / "text", "--out", home / "dense")
    moe = shipped(f"{place}/upcycle_1b.yaml")["model"]["init_args"]["decoder"]["moe"]
    run("upcycle", "--model", home / "dense", "--experts", moe["num_experts"], "--top_k", moe["num_experts_per_tok"],
        "--out", home / "base")  # fmt: skip
    made = json.loads((home / "base" / "config.json").read_text())["model"]["decoder"]["moe"]
    assert {key: made[key] for key in moe if key not in ("moe_intermediate_size", "router_aux_loss_coef")} == {
        key: value for key, value in moe.items() if key not in ("moe_intermediate_size", "router_aux_loss_coef")
    }
    shards(home, kinds=("t",))
    run("fit", "-c", narrow(f"{place}/upcycle_1b.yaml", home / "fit"))
    check_steps(home / "logs" / "model")
    name = "decoder.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(weights(home / "base")[name], weights(home / "model")[name])
    run("export", "--model", home / "model", "--out", home / "out")
    transformers.AutoModelForCausalLM.from_pretrained(str(home / "out"), local_files_only=True)
    assert not any(line.startswith("mmllm: error") for line in capsys.readouterr().err.splitlines())


# --- the guide --------------------------------------------------------------------------------------------------------


def guides_parts() -> dict[str, Any]:
    """The guide's `parts.yaml`."""
    found = re.search(r"^cat > parts.yaml <<'YAML'\n(.*?)^YAML$", GUIDE, re.MULTILINE | re.DOTALL)
    assert found, "the guide writes no parts.yaml"
    return yaml.safe_load(found[1])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["llava_4b_align", "llava_4b_lora"])
def test_the_guides_parts_make_what_the_configs_say(place: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "parts.yaml").write_text(yaml.safe_dump(guides_parts()))
    options, model = read_options(tmp_path / "parts.yaml"), shipped(f"{place}/{name}.yaml")["model"]["init_args"]
    assert {"pool": options.audio_pool, **options.audio_projector} == model["audio"]["projector"]
    assert options.vision_layer == model["vision"]["layer"]
    assert options.image_projector is None and model["image_projector"] == {"kind": "llava"}
    trained = LossConfig(**model["loss"])  # weights may differ, but not whether there are parts for them
    assert bool(trained.ctc) == bool(options.loss.ctc) and bool(trained.word_dropout) == bool(options.loss.word_dropout)


def test_commands_and_configs_that_the_guide_names_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    named = set(re.findall(r"(?:one_gpu|eight_gpus)/\w+\.yaml", GUIDE))
    assert {f"one_gpu/{name}.yaml" for name in ("llava_4b_align", "llava_4b_lora", "upcycle_1b")} <= named
    assert named <= set(paths.list_configs())
    lines = [line.partition("#")[0].split() for line in GUIDE.replace("\\\n", " ").splitlines()]
    for words in (words[1:] for words in lines if words[:1] == ["mmllm"]):
        start = words[: 2 if words[0] in ("adapter", "data", "tokenizer") else 1]
        assert main([*start, "--help"]) == 0, words
        told = capsys.readouterr().out
        assert not [word for word in words if word.startswith("--") and word not in told], words
