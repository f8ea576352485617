"""Image encoders of other libraries: features and pixels against those libraries' own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import transformers
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmllm.data.samples.decode import ImageTransform
from mmllm.data.samples.stored import features_hash
from mmllm.interop.library import quiet
from mmllm.interop.towers import ImportedTower, read_tower
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.flops import ModelFlops
from mmllm.model.image_projectors import ImageProjectorConfig
from mmllm.model.multimodal import ModelConfig, MultimodalModel
from mmllm.model.open_clip_vision import build_clip
from mmllm.model.roles import parameter_roles
from mmllm.model.vision import VisionTower

SIDE, PATCH, NUM_LAYERS, WIDTH = 28, 7, 3, 32
SHAPE = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "patch_size": PATCH,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SIZED, PATCHED = SHAPE | {"image_size": SIDE}, SHAPE | {"num_patches": 16}
FAMILIES = {
    "clip": ("CLIP", SIZED, {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}),
    "siglip": ("Siglip", SIZED, {"size": {"height": SIDE, "width": SIDE}}),
    "siglip2": ("Siglip2", PATCHED, {"patch_size": PATCH, "max_num_patches": 16}),
}
SIZES = [(SIDE, SIDE), (90, 90), (29, 28), (61, 40), (33, 95), (300, 211), (20, 13), (9, 31)]
OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": SIDE, "layers": NUM_LAYERS, "width": WIDTH, "head_width": 16, "patch_size": PATCH},
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
}


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 5 + 2, width // 5 + 2, 3), dtype=np.uint8))
    noise = rng.integers(-20, 20, (height, width, 3))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Norms and biases too: those that libraries start with would hide that one is missing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def saved(family: str, folder: Path, alone: bool = False, **options) -> torch.nn.Module:
    """A model of transformers, saved by it, with its image processor."""
    prefix, shape, processor = FAMILIES[family]
    torch.manual_seed(0)
    with quiet(transformers):
        if alone:
            config = getattr(transformers, f"{prefix}VisionConfig")(**shape)
            model = getattr(transformers, f"{prefix}VisionModel")(config)
        else:
            config = getattr(transformers, f"{prefix}Config")(vision_config=shape, text_config=TEXT)
            model = getattr(transformers, f"{prefix}Model")(config)
        randomized(model).save_pretrained(folder, **options)
        getattr(transformers, f"{prefix}ImageProcessor")(**processor).save_pretrained(folder)
    return model


def loaded(imported: ImportedTower) -> VisionTower:
    tower = VisionTower(imported.vision)
    state = {name.removeprefix("vision."): tensor for name, tensor in imported.tensors()}
    assert {f"vision.{name}" for name in state} == set(imported.specs)
    tower.load_state_dict(state)
    for name, tensor in state.items():
        assert (tensor.dtype, tuple(tensor.shape)) == dataclasses.astuple(imported.specs[f"vision.{name}"])
    return tower.eval()


@torch.no_grad()
def their_features(
    model: torch.nn.Module, folder: Path, pictures: list[Image.Image]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Of all layers as they are, and of the last as the library gives it; patches alone."""
    with quiet(transformers):
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
    inputs = processor(pictures, return_tensors="pt")
    vision = getattr(model, "vision_model", model)
    output = vision(**inputs, output_hidden_states=True)
    first = 1 if "CLIP" in type(vision).__name__ else 0
    return tuple(x[:, first:] for x in output.hidden_states[1:]), output.last_hidden_state[:, first:]


@pytest.mark.parametrize("alone", [False, True], ids=["whole", "alone"])
@pytest.mark.parametrize("family", FAMILIES)
def test_features_and_pixels_are_transformers_own(family, alone, tmp_path):
    model = saved(family, tmp_path, alone)
    sizes = SIZES[:2] if family == "siglip2" else SIZES  # of NaFlex those of squares alone
    pictures = [picture(*size) for size in sizes]
    layers, last = their_features(model, tmp_path, pictures)
    imported = read_tower(tmp_path)
    pixels = torch.from_numpy(np.stack([imported.transform(each) for each in pictures]))
    tower = loaded(imported)
    assert (tower.image_size, tower.grid, tower.width) == (SIDE, (4, 4), WIDTH)
    torch.testing.assert_close(tower(pixels), last, rtol=1e-5, atol=1e-5)
    for layer in range(-NUM_LAYERS, NUM_LAYERS):
        tower = loaded(read_tower(tmp_path, layer, post_layernorm=False))
        torch.testing.assert_close(tower(pixels), layers[layer], rtol=1e-5, atol=1e-5)
        assert len(tower.blocks) == layer % NUM_LAYERS + 1
    normed = getattr(model, "vision_model", model).post_layernorm(layers[-1])
    torch.testing.assert_close(loaded(read_tower(tmp_path, -1, True))(pixels), normed, rtol=1e-5, atol=1e-5)
    several = loaded(read_tower(tmp_path, (-1, 0), post_layernorm=True))
    torch.testing.assert_close(several(pixels), torch.cat([normed, layers[0]], dim=-1), rtol=1e-5, atol=1e-5)


def test_pixels_are_told_apart_from_neighbours():
    """The tests above could not pass with another transform."""
    one = ImageTransform(SIDE, library="transformers", mode="crop")
    for other in (
        dataclasses.replace(one, mode="squash"),
        dataclasses.replace(one, resample="bilinear"),
        dataclasses.replace(one, resized=SIDE + 1),
        dataclasses.replace(one, library="open_clip"),
        ImageTransform(SIDE, mode="crop"),
    ):
        assert any((one(picture(*size)) != other(picture(*size))).any() for size in SIZES), other


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("CLIPImageProcessor", {}, {"mode": "crop"}),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 32}, "resample": 2}, {"resized": 32, "resample": "bilinear"}),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 20}}, {"resized": 20}),
        ("CLIPImageProcessor", {"size": 32, "crop_size": SIDE}, {"resized": 32}),
        ("CLIPImageProcessor", {"size": {"height": 31, "width": 31}, "resample": 0}, {"mode": "squash", "resized": 31}),
        ("CLIPImageProcessor", {"resample": 1}, {"resample": "lanczos"}),
        ("LlavaImageProcessor", {"do_pad": True}, {"mode": "pad", "fill": (122, 116, 104)}),
        ("LlavaImageProcessor", {"do_pad": True, "size": {"height": 33, "width": 33}}, {"mode": "pad", "resized": 33}),
        ("LlavaImageProcessor", {"do_pad": False}, {"mode": "crop", "fill": None}),
        ("SiglipImageProcessor", {"size": {"height": SIDE, "width": SIDE}}, {"mode": "squash", "resized": None}),
        ("CLIPImageProcessor", {"do_normalize": False}, {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}),
    ],
)  # fmt: skip
def test_image_processors_to_the_pixel(name, options, expected, tmp_path):
    options = FAMILIES["clip"][2] | options
    if name == "SiglipImageProcessor":
        options.pop("crop_size")
    processor = getattr(transformers, name)(**options)
    saved("clip", tmp_path, alone=True)
    with quiet(transformers):
        processor.save_pretrained(tmp_path)
    transform = read_tower(tmp_path).transform
    assert transform.library == "transformers" and {key: getattr(transform, key) for key in expected} == expected
    for size in SIZES:
        theirs = processor(picture(*size), do_normalize=False, do_rescale=False, return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(transform(picture(*size)), theirs)
        if options.get("do_normalize", True):
            normalized = processor(picture(*size), return_tensors="np")["pixel_values"][0]
            mean, std = (np.array(each, np.float32)[:, None, None] for each in (transform.mean, transform.std))
            np.testing.assert_allclose((theirs / 255 - mean) / std, normalized, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_open_clip_folders_features_and_pixels(mode, interpolation, tmp_path):
    model = randomized(open_clip.CLIP(**OPEN_CLIP))
    preprocess = {
        "size": SIDE, "mode": "RGB", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4],
        "interpolation": interpolation, "resize_mode": mode, "fill_color": 9,
    }  # fmt: skip
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": preprocess}))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    theirs = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
    pixels = torch.stack([theirs(picture(*size)) for size in SIZES])
    imported = read_tower(tmp_path)
    ours = torch.from_numpy(np.stack([imported.transform(picture(*size)) for size in SIZES]))
    mean, std = (torch.tensor(each)[:, None, None] for each in (imported.transform.mean, imported.transform.std))
    assert torch.equal((pixels * std + mean).mul(255).round().to(torch.uint8), ours)
    for layer in range(NUM_LAYERS):
        for normed in (False, True):
            with torch.no_grad():
                expected = model.visual.forward_intermediates(
                    pixels, indices=[layer], normalize_intermediates=normed and layer == NUM_LAYERS - 1,
                    intermediates_only=True, output_fmt="NLC",
                )["image_intermediates"][0]  # fmt: skip
            tower = loaded(read_tower(tmp_path, layer, post_layernorm=normed))
            torch.testing.assert_close(tower(ours), expected, rtol=1e-4, atol=1e-5)
    model.visual.output_tokens = True
    with torch.no_grad():
        torch.testing.assert_close(loaded(imported)(ours), model.visual(pixels)[1], rtol=1e-4, atol=1e-5)
    assert imported.report.left_out["transformer"] and imported.report.left_out["logit_scale"] == 1


def test_open_clip_by_name_tag_and_file(tmp_path, monkeypatch):
    small = dict(OPEN_CLIP, custom_text=False)
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {"ViT-B-32": small, "ViT-B-16-SigLIP": small})
    imported = read_tower("ViT-B-32")
    assert "random" in imported.report.notes[0] and imported.transform.mode == "crop"
    assert loaded(imported).hash == loaded(imported).hash
    model = randomized(open_clip.CLIP(**OPEN_CLIP))
    weights = {name: value.half() for name, value in model.state_dict().items()}
    save_file(weights, tmp_path / "some.safetensors")
    by_file = read_tower(f"ViT-B-32:{tmp_path / 'some.safetensors'}")
    assert {spec.dtype for spec in by_file.specs.values()} == {torch.float16}
    tower = loaded(by_file)
    assert torch.equal(tower.visual.conv1.weight.half(), weights["visual.conv1.weight"])
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(tmp_path / "some.safetensors"))
    by_tag = read_tower("ViT-B-32:openai")
    assert by_tag.vision.open_clip["quick_gelu"] is True and by_tag.vision.pretrained is None
    assert loaded(by_tag).hash != tower.hash, "another activation"
    with monkeypatch.context() as cache:
        torch.save({}, tmp_path / "open_clip_pytorch_model.bin")
        found = {"open_clip_pytorch_model.bin": str(tmp_path / "open_clip_pytorch_model.bin")}
        cache.setattr("huggingface_hub.try_to_load_from_cache", lambda _, name: found.get(name))
        with pytest.raises(ValueError, match=r"open_clip_pytorch_model.bin is a pickle or TorchScript"):
            read_tower("ViT-B-32:openai")
        found.clear()
        cache.setenv("HOME", str(tmp_path))
        with pytest.raises(FileNotFoundError, match="not in Hugging Face's cache as safetensors"):
            read_tower("ViT-B-32:openai")
    siglip = read_tower("ViT-B-16-SigLIP:webli")
    assert (siglip.transform.mode, siglip.transform.mean) == ("squash", (0.5, 0.5, 0.5)) == (
        "squash", siglip.vision.mean
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"of ViT-B-16-SigLIP webli wants mean \(0.5, 0.5, 0.5\).*open_clip_config.json"
    ):
        read_tower(f"ViT-B-16-SigLIP:{tmp_path / 'some.safetensors'}")


def test_shards_and_earlier_names(tmp_path):
    saved("siglip", tmp_path / "one")
    saved("siglip", tmp_path / "many", max_shard_size="20KB")
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
    whole, cut = read_tower(tmp_path / "one"), read_tower(tmp_path / "many")
    assert dict(whole.specs) == dict(cut.specs)
    assert all(torch.equal(whole.read(name), cut.read(name)) for name in whole.specs)
    alone = tmp_path / "alone"
    saved("clip", alone, alone=True)
    state = load_file(alone / "model.safetensors")
    before = loaded(read_tower(alone)).hash
    earlier = {f"vision_model.{name}": value for name, value in state.items()}
    earlier["vision_model.embeddings.position_ids"] = torch.arange(17)[None]  # as versions before 4.31 saved it
    save_file(earlier, alone / "model.safetensors", metadata={"format": "pt"})
    imported = read_tower(alone)
    assert loaded(imported).hash == before
    assert imported.report.left_out == {"vision_model.embeddings": 1, "vision_model.post_layernorm": 2}


def test_what_stays_behind_is_named(tmp_path):
    saved("siglip2", tmp_path)
    report = read_tower(tmp_path, -2).report
    assert report.left_out["text_model"] > 10 and report.left_out["logit_scale"] == 1
    assert report.left_out["vision_model.encoder.layers.2"] == 16
    assert any(name.startswith("vision_model.head") for name in report.left_out)
    assert "squares of 28 pixels (16 patches)" in report.notes[0]
    assert report.features == "layer -2: 4 x 4 features of 32 channels"
    assert "through the norm" in read_tower(tmp_path).report.features
    (tmp_path / "open_clip_config.json").write_text("{}")
    assert "is there too, and not used" in read_tower(tmp_path).report.notes[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_trains_and_is_counted_as_others_are(family, tmp_path):
    saved(family, tmp_path)
    imported = read_tower(tmp_path, (0, -2))
    tower = loaded(imported)
    images = torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tower.train()(images).square().sum().backward()
    assert not [name for name, parameter in tower.named_parameters() if parameter.grad is None]
    roles = parameter_roles(tower)
    assert roles["visual.embeddings.position_embedding.weight"] == "embedding"
    assert roles["visual.embeddings.patch_embedding.weight"] == "filters"
    assert roles["visual.encoder.layers.0.self_attn.q_proj.weight"] == "hidden"
    frozen = dataclasses.replace(imported.vision, trainable=False)
    assert not VisionTower(frozen).train()(images).requires_grad
    one = read_tower(tmp_path, 0).vision
    config = ModelConfig(DecoderConfig(40, hidden_size=16), imported.vision, ImageProjectorConfig("mlp", 16))
    flops, fewer = ModelFlops.of(config), ModelFlops.of(dataclasses.replace(config, vision=one))
    assert flops.per_image > 1.5 * fewer.per_image > 0
    assert flops.backward.per_image == 2 * flops.per_image
    tokens = 17 if family == "clip" else 16
    per_layer = 2 * tokens * WIDTH * (4 * WIDTH + 2 * SHAPE["intermediate_size"] + 2 * tokens)
    assert flops.per_image == 2 * per_layer + 2 * 16 * 3 * PATCH**2 * WIDTH
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with torch.device("meta"):
        model = MultimodalModel(config)
    assert set(imported.specs) == {name for name in model.state_dict() if name.startswith("vision.")}
    assert not list(model.vision.buffers())
    other = dict(imported.vision.transformers, hidden_act="gelu")
    assert tower.hash == loaded(imported).hash
    changed = VisionTower(dataclasses.replace(imported.vision, transformers=other))
    changed.load_state_dict(tower.state_dict())
    assert changed.hash != tower.hash


def test_transforms_are_stored_and_hashed_as_before_where_nothing_is_new():
    plain = ImageTransform(64, mode="pad")
    assert plain.to_dict() == {key: getattr(plain, key) for key in ("size", "mean", "std", "mode")}
    assert features_hash("tower", plain)[:12] == "1ca06303fe38"
    theirs = ImageTransform(64, resample="bilinear", library="transformers", resized=70, fill=(1, 2, 3))
    for transform in (plain, theirs):
        assert ImageTransform.from_dict(json.loads(json.dumps(transform.to_dict()))) == transform
    assert features_hash("tower", theirs) != features_hash("tower", dataclasses.replace(theirs, resized=71))
    for values in (None, {}, {"size": 3}, plain.to_dict() | {"colour": 1}):
        with pytest.raises(ValueError, match="wanted an object with the keys size, mean, std, mode, resample, library"):
            ImageTransform.from_dict(values)
    for wrong, said in [
        ({"resample": "cubic"}, "resample is 'cubic'; it must be one of 'bicubic', 'bilinear', 'nearest', 'lanczos'"),
        ({"library": "timm"}, "library is 'timm'; it must be one of null, 'open_clip', 'transformers'"),
        ({"resized": 70}, "resized is 70 without a library"),
        ({"resized": 70, "library": "open_clip"}, "open_clip cuts nothing off"),
        ({"mean": (1.0,)}, "mean is .* three numbers"),
    ]:
        with pytest.raises(ValueError, match=said):
            ImageTransform(64, **wrong)
    with pytest.raises(ValueError, match=r"strip.jpg: the picture is 4000x1 pixels and would be 1024000x256"):
        ImageTransform(256, mode="crop", library="open_clip")(Image.new("RGB", (4000, 1)), "strip.jpg")


def _edit(path: Path, **values) -> None:
    read = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (read | values).items() if value is not ...}))


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("config.json", {"model_type": "dinov2"}, r"config.json: model_type is 'dinov2'; vision models of clip, "),
        ("config.json", {"auto_map": {"AutoModel": "x.Y"}}, r"config.json: auto_map is .*code of its own.*never run"),
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, r"quantization_config is of method 'gptq'"),
        ("config.json", {"image_size": [28, 35]}, r"config.json: image_size is \[28, 35\]; only squares"),
        ("config.json", {"hidden_act": "mish2"}, r"config.json: hidden_act is 'mish2'"),
        ("config.json", {"hidden_size": "wide"}, r"config.json: no config of a clip_vision_model: .*hidden_size"),
        ("config.json", {"num_channels": 4}, r"num_channels is 4"),
        ("config.json", {"patch_size": 14}, r"embeddings.patch_embedding.weight has shape \[32, 3, 7, 7\], its config"),
        ("config.json", {"num_hidden_layers": 4}, r"lacks the tensor encoder.layers.3."),
        ("config.json", {"image_size": 35}, r"crop_size makes pictures of 28 pixels.*image_size is 35"),
        ("config.json", {"format": "mmllm"}, r"config.json is of a model of mmllm"),
        ("preprocessor_config.json", {"rescale_factor": 0.5}, r"config.json: rescale_factor is 0.5; only 1/255"),
        ("preprocessor_config.json", {"do_resize": False}, r"do_resize is False; only true"),
        ("preprocessor_config.json", {"resample": 5}, r"resample is 5; wanted one of 0 \(nearest\)"),
        ("preprocessor_config.json", {"crop_size": {"height": 28, "width": 30}}, r"crop_size is 28 x 30; only squares"),
        ("preprocessor_config.json", {"do_center_crop": False}, r"do_center_crop false.*only squares"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 9, "longest_edge": 30}}, r"size is .*longest_edge"),
        ("preprocessor_config.json", {"do_pad": True}, r"do_pad is true; only a LlavaImageProcessor's"),
        ("preprocessor_config.json", {"image_processor_type": "ViltImageProcessor"}, r"image_processor_type is 'Vilt"),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "x.Y"}}, r"auto_map is"),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_is_refused_by_name(file, values, said, tmp_path):
    saved("clip", tmp_path, alone=True)
    _edit(tmp_path / file, **values)
    with pytest.raises(ValueError, match=said):
        read_tower(tmp_path)


def test_what_is_not_there_is_named(tmp_path):
    saved("clip", tmp_path / "clip", alone=True)
    folder = tmp_path / "clip"
    (folder / "preprocessor_config.json").rename(folder / "kept")
    with pytest.raises(FileNotFoundError, match=r"has no preprocessor_config.json.*nothing says how its pictures"):
        read_tower(folder)
    (folder / "kept").rename(folder / "preprocessor_config.json")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: value.to(torch.float8_e4m3fn) for name, value in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"class_embedding is torch.float8_e4m3fn; wanted float32, bfloat16 or float16"
    ):
        read_tower(folder)
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin alone, a pickle"):
        read_tower(folder)
    with pytest.raises(FileNotFoundError, match=r"neither config.json nor open_clip_config.json"):
        read_tower(tmp_path)
    with pytest.raises(ValueError, match="no folder, nor a name of open_clip"):
        read_tower("ViT-Z")
    with pytest.raises(FileNotFoundError, match="neither a file nor a tag; open_clip knows openai, laion400m_e31"):
        read_tower("ViT-B-32:nonsense")
    _, shape, processor = FAMILIES["siglip2"]
    saved("siglip2", tmp_path / "naflex")
    _edit(tmp_path / "naflex" / "preprocessor_config.json", max_num_patches=processor["max_num_patches"] * 2)
    with pytest.raises(ValueError, match=r"max_num_patches is 32 of patch_size 7.*vision model's are 16"):
        read_tower(tmp_path / "naflex")
    _edit(tmp_path / "naflex" / "config.json", vision_config=shape | {"num_patches": 15})
    with pytest.raises(ValueError, match="num_patches is 15, which is no square number"):
        read_tower(tmp_path / "naflex")


@pytest.mark.parametrize("suffix", ["pt", "bin"])
def test_nothing_that_could_execute_code_is_opened(suffix, tmp_path, monkeypatch):
    path = tmp_path / f"ViT-B-32.{suffix}"
    torch.save({}, path)
    for module, name in ((torch, "load"), (torch.jit, "load")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(ValueError, match=r"can execute code and is never read.*save_file.*give ViT-B-32:ViT-B-32.safe"):
        read_tower(f"ViT-B-32:{path}")
    with pytest.raises(ValueError, match="a file, which doesn't say of what model"):
        read_tower(path)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": {}}))
    with pytest.raises(ValueError, match="can execute code and is never read"):
        read_tower(tmp_path)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"transformers": None}, "none is given; give one"),
        ({"open_clip": "ViT-B-32"}, r"vision.open_clip and vision.transformers are given"),
        ({"mean": None, "std": None}, "without vision.mean and vision.std"),
        ({"checkpoint": "x.safetensors"}, "vision.checkpoint is 'x.safetensors' beside vision.transformers"),
        ({"transformers": {"model_type": "vit"}}, "model_type is 'vit'; it can be clip_vision_model, siglip"),
        ({"transformers": {"model_type": "clip_vision_model"}}, "vision.transformers.hidden_size is missing"),
    ],
)
def test_vision_configs_say_what_is_wrong(values, said, tmp_path):
    saved("clip", tmp_path, alone=True)
    vision = read_tower(tmp_path).vision
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(vision, **values)
    for key, wrong in (("hidden_size", 0), ("num_attention_heads", 5), ("colour", 1)):
        with pytest.raises(ValueError, match=key):
            dataclasses.replace(vision, transformers=vision.transformers | {key: wrong})
    with pytest.raises(ValueError, match="whole model of open_clip"):
        build_clip(vision)


def test_what_training_clip_here_wrote_comes_in(tmp_path):
    from mmllm.model.vision import VisionConfig
    from mmllm.training.clip_module import save_clip, with_text_tokens

    values = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 3, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 40, "width": 16, "heads": 2, "layers": 1},
    }
    config = with_text_tokens(VisionConfig(values), 40, 1, 0)
    torch.manual_seed(0)
    save_clip(tmp_path, build_clip(config), config)
    imported = read_tower(tmp_path, -2)
    tower = VisionTower(imported.vision)
    tower.load_state_dict({name.removeprefix("vision."): tensor for name, tensor in imported.tensors()})
    trained = VisionTower(dataclasses.replace(config, layer=-2, checkpoint=str(tmp_path / "model.safetensors")))
    trained.load_pretrained()
    pixels = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(tower(pixels), trained(pixels))
    assert imported.transform == ImageTransform(16) and "squashed" in imported.report.notes[0]
    assert imported.report.left_out["visual.transformer.resblocks.2"] == 12
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "nrom": "batch"}))
    with pytest.raises(ValueError, match=r"unknown key 'nrom' of .*config\.json"):
        read_tower(tmp_path)
