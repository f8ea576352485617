"""LLaVA in and out, against transformers' own with small random weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from mmllm.batch import IGNORE, Modality, PackedBatch
from mmllm.checkpoints.weights import Checkpoint, TensorSpec, write_weights
from mmllm.data.samples.decode import ImageTransform
from mmllm.interop.decoder_names import LLAVA
from mmllm.interop.decoders import DecoderReader, DecoderWriter
from mmllm.interop.family_configs import family_config, family_for
from mmllm.interop.library import quiet
from mmllm.interop.llava import ImportedLlava, read_llava
from mmllm.interop.llava_export import LlavaWriter
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.image_projectors import ImageProjector, ImageProjectorConfig
from mmllm.model.multimodal import ModelConfig, MultimodalModel
from mmllm.model.vision import VisionConfig

SIDE, PATCH, NUM_LAYERS, IMAGE, VOCABULARY = 28, 7, 3, 60, 64
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "patch_size": PATCH,
    "image_size": SIDE,
}
TEXT = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SQUARE = {"height": SIDE, "width": SIDE}
TOWERS = {
    "clip": (
        "CLIPVisionConfig",
        "CLIPImageProcessor",
        {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE},
        "default",
    ),
    "siglip": ("SiglipVisionConfig", "SiglipImageProcessor", {"size": SQUARE}, "full"),
}


def picture(number: int) -> Image.Image:
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (40 + 7 * number, 61, 3), dtype=np.uint8))


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, VOCABULARY)}
    words = {word: number for word, number in words.items() if number != IMAGE} | {"<image>": IMAGE}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip


def saved(folder: Path, tower: str = "clip", text: str = "Llama", text_options: dict | None = None, **options) -> Any:
    """A LLaVA that transformers saved, with its processor."""
    vision_class, processor_class, processor, strategy = TOWERS[tower]
    vision = VISION | ({"vision_use_head": False} if tower == "siglip" else {})
    torch.manual_seed(0)
    with quiet(transformers):
        config = transformers.LlavaConfig(
            vision_config=getattr(transformers, vision_class)(**vision),
            text_config=getattr(transformers, f"{text}Config")(**(TEXT | (text_options or {}))),
            image_token_index=IMAGE,
            **({"vision_feature_select_strategy": strategy} | options),
        )
        model = transformers.LlavaForConditionalGeneration(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
        model.eval().save_pretrained(folder)
        transformers.LlavaProcessor(
            getattr(transformers, processor_class)(**processor), tokenizer(), patch_size=PATCH,
            vision_feature_select_strategy=strategy, num_additional_image_tokens=int(tower == "clip"),
        ).save_pretrained(folder)  # fmt: skip
    return model


def imported(folder: Path) -> tuple[MultimodalModel, ImportedLlava]:
    """The whole model, as `mmllm import` puts it together."""
    checkpoint = Checkpoint.open(folder)
    llava = read_llava(folder, checkpoint)
    decoder = DecoderReader(checkpoint, llava.parts.text_config, llava.elsewhere)
    model = MultimodalModel(ModelConfig(decoder.config, llava.vision, llava.parts.projector))
    state = dict(llava.tensors()) | {f"decoder.{name}": tensor for name, tensor in decoder.tensors()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"decoder.lm_head.weight"}
    assert {name: TensorSpec(x.dtype, tuple(x.shape)) for name, x in llava.tensors()} == llava.specs
    return model.eval(), llava


def prompt(num_image_tokens: int) -> list[int]:
    return [1, 5, *[IMAGE] * num_image_tokens, 7, 8, *[IMAGE] * num_image_tokens, 9, 10, 11]


@torch.no_grad()
def our_logits(model: MultimodalModel, transform: ImageTransform, pictures: list[Image.Image]) -> Tensor:
    ids = torch.tensor(prompt(model.num_image_tokens))[None]
    is_slot = ids == IMAGE
    images = torch.from_numpy(np.stack([transform(each) for each in pictures]))
    empty = torch.zeros(0, 0, dtype=torch.int64)
    codes = torch.full((*ids.shape, 0), -1)
    batch = PackedBatch(
        token_ids_BT=ids, labels_BT=torch.full_like(ids, IGNORE), positions_BT=torch.arange(ids.shape[1])[None],
        document_ids_BT=torch.zeros_like(ids), source_BT=torch.zeros_like(ids),
        modality_BT=torch.where(is_slot, int(Modality.IMAGE), int(Modality.TEXT)),
        audio_codes_BTK=codes, audio_labels_BTK=codes, images_NCHW=images,
        image_slots_NS=is_slot[0].nonzero()[:, 0].view(len(pictures), -1),
        clip_codes_CFK=torch.zeros(0, 0, 0, dtype=torch.int64), clip_slots_CS=empty, clip_targets_CL=empty,
    )  # fmt: skip
    return model.logits(batch.with_metadata())


@torch.no_grad()
def their_logits(model: Any, folder: Path, pictures: list[Image.Image]) -> Tensor:
    """By the processor that is loaded from the folder, which puts in as many tokens as a picture has features."""
    with quiet(transformers):
        processor = transformers.AutoProcessor.from_pretrained(folder)
    inputs = processor(images=pictures, text="<s> w5 <image> w7 w8 <image> w9 w10 w11", return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == prompt(16)
    return model(**inputs).logits


def written(
    folder: Path, model: MultimodalModel, transform: ImageTransform, llava: ImportedLlava | None = None
) -> LlavaWriter:
    """As `mmllm export --format llava` puts it together; of an imported one, as it came."""
    state = model.state_dict()
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    decoder = {name.removeprefix("decoder."): spec for name, spec in specs.items()}
    family = family_for(model.config.decoder)
    text = DecoderWriter(model.config.decoder, family, decoder, LLAVA)
    base = None if llava is None else json.loads((Path(llava.report.source) / "config.json").read_text())
    text_config = family_config(model.config.decoder, family) if base is None else base["text_config"]
    writer = LlavaWriter(
        model.config, specs, transform, text_config, IMAGE, None if llava is None else llava.rest, base
    )
    folder.mkdir()
    tensors = [*text.tensors(lambda name: state[f"decoder.{name}"])]
    tensors += writer.tensors(state.__getitem__, None if llava is None else llava.read_rest)
    write_weights(folder, text.specs | writer.specs, tensors)
    (folder / "config.json").write_text(json.dumps(writer.config))
    (folder / "processor_config.json").write_text(json.dumps(writer.processor))
    tokenizer().save_pretrained(folder)
    return writer


def loaded(folder: Path) -> Any:
    with quiet(transformers):
        model, info = transformers.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model) is transformers.LlavaForConditionalGeneration
    return model.eval()


@pytest.mark.parametrize(
    ("tower", "text", "options"),
    [
        ("clip", "Llama", {}),
        ("clip", "Mistral", {"vision_feature_layer": -1}),
        ("clip", "Llama", {"vision_feature_layer": 2, "multimodal_projector_bias": False}),
        ("siglip", "Qwen2", {"vision_feature_layer": -1, "text_options": {"tie_word_embeddings": True}}),
        ("siglip", "Llama", {"vision_feature_layer": [-1, 1]}),
        ("clip", "Qwen2", {"vision_feature_layer": [-3, -2]}),
    ],
)
def test_logits_of_pictures_are_equal_and_it_goes_out_as_it_came(tower, text, options, tmp_path):
    theirs = saved(tmp_path / "in", tower, text, **options)
    pictures = [picture(1), picture(2)]
    expected = their_logits(theirs, tmp_path / "in", pictures)
    model, llava = imported(tmp_path / "in")
    assert (llava.parts.image_token_id, llava.parts.num_image_tokens, llava.image_token) == (IMAGE, 16, "<image>")
    torch.testing.assert_close(our_logits(model, llava.transform, pictures), expected, rtol=1e-4, atol=1e-5)
    other = our_logits(model, llava.transform, pictures[::-1])
    assert (other - expected).abs().max() > 1e-2, "pictures matter"

    writer = written(tmp_path / "out", model, llava.transform, llava)
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("in", "out"))
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((tmp_path / each / "config.json").read_text()) for each in ("in", "out")]
    processors = [json.loads((tmp_path / each / "processor_config.json").read_text()) for each in ("in", "out")]
    assert configs[1] == configs[0]
    assert processors[0] == processors[1] and not writer.notes
    torch.testing.assert_close(their_logits(loaded(tmp_path / "out"), tmp_path / "out", pictures), expected)

    written(tmp_path / "cut", model, llava.transform)  # as if it had been trained here: without what lies behind
    cut = loaded(tmp_path / "cut")
    assert cut.config.vision_config.num_hidden_layers == len(model.vision.blocks) and cut.config.image_seq_length == 16
    torch.testing.assert_close(their_logits(cut, tmp_path / "cut", pictures), expected, rtol=1e-4, atol=1e-5)
    again, more = imported(tmp_path / "cut")
    torch.testing.assert_close(our_logits(again, more.transform, pictures), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("layer", [-2, (0, -1)])
def test_a_vit_of_open_clip_goes_out_as_clip(layer, quick_gelu, tmp_path):
    clip = {
        "embed_dim": 16,
        "quick_gelu": quick_gelu,
        "vision_cfg": {"image_size": SIDE, "layers": 3, "width": 32, "head_width": 16, "patch_size": PATCH},
        "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    vision = VisionConfig(clip, layer=layer, post_layernorm=False)
    decoder = DecoderConfig(VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=4)
    model = MultimodalModel(ModelConfig(decoder, vision, ImageProjectorConfig("llava"))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    transform = ImageTransform(SIDE, mode="crop", library="transformers")
    writer = written(tmp_path / "out", model, transform)
    assert writer.config["vision_config"]["hidden_act"] == ("quick_gelu" if quick_gelu else "gelu") and not writer.notes
    pictures = [picture(1), picture(2)]
    theirs = their_logits(loaded(tmp_path / "out"), tmp_path / "out", pictures)
    torch.testing.assert_close(theirs, our_logits(model, transform, pictures), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["published", "nested", "whole model"])
def test_names_of_earlier_versions_are_read(layout, tmp_path):
    theirs = saved(tmp_path)
    expected = their_logits(theirs, tmp_path, [picture(1), picture(2)])
    state = load_file(tmp_path / "model.safetensors")
    renamed = {}
    for name, value in state.items():
        if layout == "published":  # as those of llava-hf
            name = name.replace("vision_tower.", "vision_tower.vision_model.")
        if layout == "nested":  # as in memory since 4.52
            name = name.replace("language_model.lm_head", "lm_head").replace("language_model.model.", "language_model.")
            name = name if name.startswith("lm_head") else f"model.{name}"
        renamed[name] = value
    if layout == "published":
        renamed["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(renamed, tmp_path / "model.safetensors")
    model, llava = imported(tmp_path)
    torch.testing.assert_close(our_logits(model, llava.transform, [picture(1), picture(2)]), expected)
    wanted = {name for name in state if name.startswith(("vision_tower.encoder.layers.2", "vision_tower.post"))}
    assert set(llava.rest) == wanted
    assert sorted(llava.report.left_out.values()) == [2, 16]


def test_padding_to_a_square_comes_too(tmp_path):
    theirs = saved(tmp_path / "in")
    with quiet(transformers):
        image_processor = transformers.LlavaImageProcessor(do_pad=True, size={"shortest_edge": SIDE}, crop_size=SQUARE)
        transformers.LlavaProcessor(
            image_processor, tokenizer(), patch_size=PATCH, vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        ).save_pretrained(tmp_path / "in")  # fmt: skip
    pictures = [picture(1), picture(2)]
    model, llava = imported(tmp_path / "in")
    assert llava.transform.mode == "pad"
    expected = their_logits(theirs, tmp_path / "in", pictures)
    torch.testing.assert_close(our_logits(model, llava.transform, pictures), expected, rtol=1e-4, atol=1e-5)
    assert not written(tmp_path / "out", model, llava.transform).notes
    torch.testing.assert_close(
        their_logits(loaded(tmp_path / "out"), tmp_path / "out", pictures), expected, rtol=1e-4, atol=1e-5
    )


def test_what_is_not_quite_so_is_said(tmp_path):
    saved(tmp_path / "in")
    model, _ = imported(tmp_path / "in")
    for mode, library in (("squash", None), ("crop", "open_clip"), ("pad", None)):
        transform = ImageTransform(SIDE, mode=mode, library=library)
        writer = written(tmp_path / mode, model, transform)
        assert f"makes with mode '{mode}': levels differ" in writer.notes[0]
        with quiet(transformers):
            processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / mode)
        smooth = picture(3).resize((4, 3)).resize((90, 60), Image.Resampling.BICUBIC)
        theirs = processor(smooth, do_normalize=False, do_rescale=False, return_tensors="np")["pixel_values"][0]
        assert np.abs(theirs.astype(int) - transform(smooth)).mean() < 3


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "llava_next"}, r"config.json: model_type is 'llava_next'; wanted 'llava'"),
        ({"vision_feature_select_strategy": "full"}, r"select_strategy is 'full'; of a clip_vision_model"),
        ({"vision_feature_layer": 0}, r"vision_feature_layer is 0; wanted layers from 1 to 3, or from -3 to -1"),
        ({"vision_feature_layer": -4}, r"vision_feature_layer is -4"),
        ({"vision_feature_layer": []}, r"vision_feature_layer is \[\]"),
        ({"vision_feature_layer": [-1, -1]}, r"vision.layer is \[-1, -1\]; name one layer, or several different"),
        ({"projector_hidden_act": "relu"}, r"projector_hidden_act is 'relu'; only 'gelu'"),
        ({"image_token_index": None}, r"image_token_index is None"),
        ({"vision_config": {"model_type": "siglip2_vision_model"}}, r"vision_config.model_type is 'siglip2"),
        ({"vision_config": None}, r"vision_config is None; wanted an object"),
        ({"auto_map": {"AutoModel": "x.Y"}}, r"auto_map is"),
        ({"multimodal_projector_bias": False}, r"has the tensor multi_modal_projector.linear_\d.bias, but its config"),
        ({"text_config": TEXT | {"hidden_size": 32}}, r"has shape \[24, 32\], its config says \[32, 32\]"),
        ({"vision_config": VISION | {"num_hidden_layers": 5}}, r"lacks the tensor vision_tower"),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_is_refused_by_name(values, said, tmp_path):
    saved(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(ValueError, match=said):
        read_llava(tmp_path)


def test_siglip_without_its_first_patch_is_refused(tmp_path):
    saved(tmp_path, "siglip", vision_feature_select_strategy="default")
    with pytest.raises(ValueError, match=r"'default'; of a siglip_vision_model .*leaves out the first patch"):
        read_llava(tmp_path)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"image_projector": ImageProjectorConfig("mlp")}, "kind is 'mlp', which LLaVA doesn't compute"),
        ({"image_projector": ImageProjectorConfig("llava", max_tiles=4)}, "image_projector.max_tiles is 4"),
        ({"image_projector": ImageProjectorConfig("llava", max_number=4)}, "image_projector.max_number is 4"),
        ({"image_projector": ImageProjectorConfig("llava", hidden_size=7)}, "image_projector.hidden_size is 7"),
        ({"layer": -1, "post_layernorm": True}, r"vision.post_layernorm is true and vision.layer \[-1\] has the last"),
        ({"layer": 2, "post_layernorm": True}, r"vision.post_layernorm is true and vision.layer \[2\] has the last"),
        ({"vision": None}, "has no image tower"),
        ({"open_clip": "RN50"}, "vision_cfg is of a ResNet, which transformers' CLIP isn't"),
        ({"open_clip": "ViT-B-16-SigLIP"}, "vision_cfg is of a timm model"),
        ({"open_clip": "ViT-B-32", "vision_cfg": {"ls_init_value": 0.1}}, "ls_init_value is 0.1; transformers"),
        ({"open_clip": "ViT-B-32", "vision_cfg": {"new": 1}}, "vision_cfg.new is 1, which transformers"),
    ],
)  # fmt: skip
def test_what_llava_does_not_compute_does_not_go_out(values, said, tmp_path):
    import open_clip

    from mmllm.interop.llava_export import check_llava

    saved(tmp_path)
    llava = read_llava(tmp_path)
    config = ModelConfig(
        DecoderConfig(VOCABULARY, hidden_size=24, num_attention_heads=2), llava.vision, llava.parts.projector
    )
    changed = {key: value for key, value in values.items() if key in ("image_projector", "vision")}
    if "layer" in values:
        changed["vision"] = dataclasses.replace(llava.vision, **values)
    if "open_clip" in values:
        named = open_clip.get_model_config(values["open_clip"])
        assert named is not None
        named["vision_cfg"] |= values.get("vision_cfg", {})
        changed["vision"] = VisionConfig(named, layer=-2)
    with pytest.raises(ValueError, match=said):
        check_llava(dataclasses.replace(config, **changed))


def test_the_projector_is_the_mlp_alone():
    torch.manual_seed(0)
    projector = ImageProjector(ImageProjectorConfig("llava"), (4, 4), 32, 24)
    theirs = transformers.models.llava.modeling_llava.LlavaMultiModalProjector(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**VISION), text_config=transformers.LlamaConfig(**TEXT)
        )
    )
    assert sum(p.numel() for p in projector.parameters()) == sum(p.numel() for p in theirs.parameters())
    theirs.load_state_dict(
        {
            name.replace("project.0", "linear_1").replace("project.2", "linear_2"): value
            for name, value in projector.state_dict().items()
        }
    )
    x = torch.randn(2, 16, 32)
    assert torch.equal(projector(x), theirs(x))
    with pytest.raises(ValueError, match=r"image_projector.bias is false with kind 'mlp'"):
        ImageProjectorConfig("mlp", bias=False)
    tiled = ImageProjector(ImageProjectorConfig("llava", max_tiles=2), (4, 4), 32, 24)
    assert tiled(x, torch.tensor([[0, 0], [1, 2]])).shape == (2, 16, 24)
