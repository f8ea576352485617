from __future__ import annotations

import dataclasses
import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import mmllm
from mmllm.checkpoints.card import ModelInfo
from mmllm.checkpoints.folder import _self_contained, load_model, save_model
from mmllm.checkpoints.settings import GenerationConfig, Sampling
from mmllm.data.samples.decode import ImageTransform
from mmllm.model.multimodal import MultimodalModel
from mmllm.model.open_clip_vision import open_clip_config
from mmllm.model.vision import VisionConfig
from tests.inference_fixtures import images, make, make_model, make_tokenizer, sounds


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    info = ModelInfo("Tiny", "abc123", "deadbeef", ("captions: 45%",), {"caption": {"exact_match": 0.4321}}, "A note.")
    return save_model(folder, model.model, model.tokenizer, info, generation=model.generation)


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_round_trip_is_exact(model, saved, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("loading must not unpickle")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads")):
        monkeypatch.setattr(module, name, refuse)
    state = torch.get_rng_state()
    loaded = mmllm.load(saved, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    before, after = model.model.state_dict(), loaded.model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loaded.model.config == model.model.config
    assert loaded.tokenizer.hash == model.tokenizer.hash
    assert loaded.generation == model.generation
    assert loaded.caption(images(3)) == model.caption(images(3))
    assert loaded.transcribe(sounds(3)) == model.transcribe(sounds(3))
    first, second = loaded.speak("one two"), model.speak("one two")
    assert (first.samples == second.samples).all()


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_kinds_round_trip(tmp_path, tie_word_embeddings, dtype):
    tokenizer = make_tokenizer(sound=False)
    model = make_model(tokenizer, sight=False, tie_word_embeddings=tie_word_embeddings).to(dtype)
    save_model(tmp_path / "model", model, tokenizer, generation=GenerationConfig(text=Sampling(0.5, seed=4)))
    loaded = load_model(tmp_path / "model")
    before, after = model.state_dict(), loaded.model.state_dict()
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == dtype for name in before)
    assert loaded.image_transform is None
    assert loaded.generation.text == Sampling(0.5, seed=4)
    assert not (tmp_path / "model" / "codec").exists()
    assert next(mmllm.load(tmp_path / "model", dtype="bfloat16").model.parameters()).dtype == torch.bfloat16


def test_weights_from_elsewhere_are_not_needed_again(tmp_path):
    tokenizer = make_tokenizer(sound=False)
    config = make_model(tokenizer).config
    assert config.vision is not None
    vision = dataclasses.replace(config.vision, checkpoint="gone.pt")
    model = MultimodalModel(dataclasses.replace(config, vision=vision))
    assert model.vision is not None
    model.vision.mean = (0.5, 0.25, 0.125)
    save_model(tmp_path / "model", model, tokenizer)
    assert "gone.pt" not in (tmp_path / "model" / "config.json").read_text()
    loaded = load_model(tmp_path / "model")
    assert loaded.model.vision is not None and loaded.model.vision.mean == (0.5, 0.25, 0.125)
    assert loaded.image_transform == ImageTransform(16, (0.5, 0.25, 0.125), model.vision.std)  # type: ignore[arg-type]


def test_pixels_and_activation_stay_as_in_training(tmp_path):
    """Also where the data module's transform, which makes pictures square, knows nothing of the tower's numbers."""
    tokenizer = make_tokenizer(sound=False)
    config = make_model(tokenizer).config
    assert config.vision is not None
    tagged = dataclasses.replace(config, vision=VisionConfig("ViT-L-14", pretrained="laion2b_s32b_b82k"))
    stored = _self_contained(tagged).vision
    assert stored is not None and (stored.pretrained, stored.mean, stored.std) == (None, (0.5,) * 3, (0.5,) * 3)
    quick = _self_contained(dataclasses.replace(config, vision=VisionConfig("ViT-B-32", pretrained="openai"))).vision
    assert quick is not None and open_clip_config(quick)["quick_gelu"], "its weights are for another activation"
    told = dataclasses.replace(config.vision, mean=(0.5, 0.25, 0.125), std=(0.5, 0.5, 0.5))
    model = MultimodalModel(dataclasses.replace(config, vision=told))
    save_model(tmp_path / "model", model, tokenizer, image_transform=ImageTransform(16))
    tower = load_model(tmp_path / "model").model.vision
    assert tower is not None and (tower.mean, tower.std) == (told.mean, told.std)


def test_saving_replaces_models_alone(model, saved, folder, tmp_path):
    other = make(num_codebooks=2)
    save_model(folder, other.model, other.tokenizer)
    assert load_model(folder).tokenizer.hash == other.tokenizer.hash != model.tokenizer.hash
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("...")
    with pytest.raises(ValueError, match="holds other files"):
        save_model(precious, model.model, model.tokenizer)
    with pytest.raises(ValueError, match="it is a file"):
        save_model(precious / "thesis.txt", model.model, model.tokenizer)
    with pytest.raises(ValueError, match=r"decoder.vocab_size is \d+ but the tokenizer has \d+ ids"):
        save_model(tmp_path / "mixed", other.model, model.tokenizer)
    with pytest.raises(ValueError, match="gives images of 32 pixels but the image tower sees 16"):
        save_model(tmp_path / "mixed", model.model, model.tokenizer, image_transform=ImageTransform(32))
    assert not (tmp_path / "mixed").exists()


def test_card_says_what_was_given(saved):
    card = (saved / "README.md").read_text()
    for fact in ("# Tiny", "abc123", "deadbeef", "captions: 45%", "caption exact_match: 0.4321", "A note."):
        assert fact in card


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "templates.json", "codec"],
)
def test_missing_file_is_named(folder, name):
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_model(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "notes.docx"])
def test_foreign_file_is_named(folder, name):
    (folder / name).write_bytes(b"?")
    with pytest.raises(ValueError, match=f"holds {name}, which is no part of a model.*move it"):
        load_model(folder)


def test_harmless_files_are_welcome(folder):
    (folder / ".gitattributes").write_text("")
    (folder / "LICENSE").write_text("")
    (folder / "README.md").unlink()
    load_model(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 99}, "has format_version 99; this mmllm reads 1"),
        ({"format": None, "architectures": ["LlamaForCausalLM"]}, "describes a transformers model.*mmllm import"),
        ({"tokenizer_hash": "0" * 64}, "has hash .* but the model was trained with 0000"),
        ({"surprise": 1}, r"has keys .*surprise"),
        ({"model": {"decodr": {}}}, "unknown key 'decodr'"),
        ({"image_transform": {"size": 16}}, "image_transform is"),
    ],
)
def test_bad_config_is_explained(folder, changes, message):
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_broken_json_is_named(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_model(folder)


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"\xff" * 100])
def test_broken_weights_are_named(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors can't be read"):
        load_model(folder)


def test_truncated_weights_are_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.safetensors has \d+ bytes, its header speaks of"):
        load_model(folder)


def test_wrong_tensors_are_named(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    norm = tensors.pop("decoder.norm.weight")
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"lacks decoder\.norm\.weight; got \d+ tensors"):
        load_model(folder)
    save_file(tensors | {"decoder.norm.weight": norm, "decoder.extra": norm.clone()}, path)
    with pytest.raises(ValueError, match=r"has unexpected decoder\.extra"):
        load_model(folder)
    save_file(tensors | {"decoder.norm.weight": norm[:-1].clone()}, path)
    with pytest.raises(ValueError, match=r"decoder\.norm\.weight .* has shape \(31,\).* wants \(32,\)"):
        load_model(folder)


def test_foreign_tokenizer_is_refused(folder, tmp_path):
    make_tokenizer(num_codebooks=2).save(folder)
    with pytest.raises(ValueError, match=r"the tokenizer in .* has hash"):
        load_model(folder)


def test_no_folder_and_no_dtype(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match="no model folder at"):
        mmllm.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a file; a model is a folder"):
        mmllm.load(saved / "config.json")
    with pytest.raises(ValueError, match="dtype is 'int8'; it must be one of float32"):
        mmllm.load(saved, dtype="int8")
