from __future__ import annotations

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file

from mmllm.model.open_clip_vision import build_clip
from mmllm.model.standardized import StandardizedConv2d
from mmllm.model.vision import OPENAI_MEAN, OPENAI_STD, VisionConfig, VisionTower, pixel_statistics

TEXT_CFG = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
VIT = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": TEXT_CFG,
}
RESNET = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 32, "patch_size": None},
    "text_cfg": TEXT_CFG,
}
TIMM = {
    "embed_dim": 16,
    "vision_cfg": {"timm_model_name": "test_vit2", "timm_pool": "", "timm_proj": "linear", "image_size": 64},
    "text_cfg": TEXT_CFG,
}


def _images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _normalized(images: torch.Tensor) -> torch.Tensor:
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN)[:, None, None]
    return (images / 255 - mean) / torch.tensor(open_clip.OPENAI_DATASET_STD)[:, None, None]


@pytest.mark.parametrize("layer", [-1, 0, 1])
def test_vit_features_equal_open_clips(layer):
    torch.manual_seed(0)
    clip = build_clip(VisionConfig(VIT)).eval()
    tower = VisionTower(VisionConfig(VIT, layer=layer)).eval().from_clip(clip)
    images = _images()
    expected = clip.visual.forward_intermediates(
        _normalized(images), indices=[layer % 3], normalize_intermediates=layer == -1, output_fmt="NLC"
    )["image_intermediates"][0]
    torch.testing.assert_close(tower(images), expected, rtol=1e-5, atol=1e-5)
    assert (tower.grid, tower.width, tower.image_size) == ((8, 8), 32, 64)
    if layer == -1:
        clip.visual.output_tokens = True
        torch.testing.assert_close(tower(images), clip.visual(_normalized(images))[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "index", "grid", "width"), [("layer2", 2, 8, 256), ("layer3", 3, 4, 512), (-1, 4, 2, 1024)]
)
def test_resnet_features_equal_open_clips(layer, index, grid, width):
    torch.manual_seed(0)
    clip = build_clip(VisionConfig(RESNET)).eval()
    tower = VisionTower(VisionConfig(RESNET, layer=layer)).from_clip(clip)  # not eval: BatchNorm must be so anyway
    output = clip.visual.forward_intermediates(_normalized(_images()), indices=[index], intermediates_only=True)
    expected = output["image_intermediates"][0]
    torch.testing.assert_close(tower(_images()), expected.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)
    assert (tower.grid, tower.width) == ((grid, grid), width)


@pytest.mark.parametrize("layer", [-1, 0])
def test_timm_features_equal_timms(layer):
    torch.manual_seed(0)
    clip = build_clip(VisionConfig(TIMM)).eval()
    size = clip.visual.image_size[0]
    tower = VisionTower(VisionConfig(TIMM, layer=layer)).eval().from_clip(clip)
    expected = clip.visual.trunk.forward_intermediates(
        _normalized(_images()), indices=[layer], intermediates_only=True, norm=False
    )[0]
    assert size == tower.image_size == 64
    torch.testing.assert_close(tower(_images()), expected.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("clip_config", "layers"), [(VIT, (0, 2)), (VIT, (-1, 0)), (VIT, (1, 0)), (TIMM, (0, -1)), (TIMM, (-1, 0))]
)
def test_features_of_several_layers_are_those_of_each(clip_config, layers):
    torch.manual_seed(0)
    clip = build_clip(VisionConfig(clip_config)).eval()
    tower = VisionTower(VisionConfig(clip_config, layer=layers)).eval().from_clip(clip)
    each = [VisionTower(VisionConfig(clip_config, layer=layer)).eval().from_clip(clip) for layer in layers]
    expected = torch.cat([one(_images()) for one in each], dim=-1)
    torch.testing.assert_close(tower(_images()), expected, rtol=1e-5, atol=1e-5)
    assert (tower.grid, tower.width) == (each[0].grid, sum(one.width for one in each))
    swapped = VisionTower(VisionConfig(clip_config, layer=layers[::-1])).from_clip(clip)
    assert len({tower.hash, swapped.hash, *(one.hash for one in each)}) == 4


def test_layers_that_cannot_be_concatenated_are_named():
    with pytest.raises(ValueError, match=r"vision.layer is \['layer2', 'layer3'\], whose grids are 8 x 8, 4 x 4"):
        VisionTower(VisionConfig(RESNET, layer=("layer2", "layer3")))
    with pytest.raises(ValueError, match=r"vision.layer is \[2, -1\], which names a layer twice"):
        VisionTower(VisionConfig(VIT, layer=(2, -1)))
    with pytest.raises(ValueError, match=r"vision.layer is 'layer5'; a ModifiedResNet has layer1"):
        VisionTower(VisionConfig(RESNET, layer=("layer1", "layer5")))
    for layer in ((), (1, 1)):
        with pytest.raises(ValueError, match="name one layer, or several different ones"):
            VisionConfig(VIT, layer=layer)


@pytest.mark.parametrize(
    ("clip_config", "layer"),
    [(VIT, -1), (VIT, 0), (RESNET, "layer2"), (RESNET, -1), (TIMM, 0), (VIT, (0, -1)), (TIMM, (0, 1))],
)
def test_every_parameter_of_a_tower_gets_a_gradient(clip_config, layer):
    torch.manual_seed(0)
    tower = VisionTower(VisionConfig(clip_config, layer=layer))
    tower(_images()).square().sum().backward()
    assert not [name for name, parameter in tower.named_parameters() if parameter.grad is None]


def test_frozen_towers_and_batch_norm_do_not_move():
    tower = VisionTower(VisionConfig(RESNET, layer="layer1", trainable=False)).train()
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    assert not tower(_images()).requires_grad
    tower = VisionTower(VisionConfig(RESNET, layer="layer1")).train()
    before = {name: value.clone() for name, value in tower.named_buffers()}
    assert tower(_images()).requires_grad
    assert all(torch.equal(value, before[name]) for name, value in tower.named_buffers())


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_are_read_from_a_checkpoint(tmp_path, suffix):
    torch.manual_seed(1)
    clip = build_clip(VisionConfig(VIT))
    path = tmp_path / f"clip.{suffix}"
    state = {name: value.clone() for name, value in clip.state_dict().items()}
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    config = VisionConfig(VIT, checkpoint=str(path))
    tower = VisionTower(config)
    assert not torch.equal(tower.visual.conv1.weight, clip.visual.conv1.weight)
    tower.load_pretrained()
    assert torch.equal(tower.visual.conv1.weight, clip.visual.conv1.weight)
    assert torch.equal(build_clip(config).logit_scale, clip.logit_scale)
    other = VIT | {"vision_cfg": VIT["vision_cfg"] | {"width": 48}}
    with pytest.raises(ValueError, match=r"does not hold weights of vision.open_clip"):
        build_clip(VisionConfig(other, checkpoint=str(path)))


def test_pixels_are_normalized_as_told(tmp_path):
    torch.manual_seed(0)
    told = VisionConfig(VIT, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    clip = build_clip(told).eval()
    tower = VisionTower(told).eval().from_clip(clip)
    expected = clip.visual.forward_intermediates(
        (_images() / 255 - 0.5) / 0.25, indices=[2], normalize_intermediates=True, output_fmt="NLC"
    )["image_intermediates"][0]
    torch.testing.assert_close(tower(_images()), expected, rtol=1e-5, atol=1e-5)
    halves = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert pixel_statistics(VisionConfig("ViT-L-14", "laion2b_s32b_b82k")) == halves
    (tmp_path / "siglip.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"without vision.mean and vision.std.*webli takes mean \[0.5, 0.5, 0.5\]"):
        build_clip(VisionConfig("ViT-B-16-SigLIP", checkpoint=str(tmp_path / "siglip.pt")))
    with pytest.raises(ValueError, match="give both or neither"):
        VisionConfig(VIT, mean=(0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="each must be positive"):
        VisionConfig(VIT, mean=(0.5, 0.5, 0.5), std=(0.5, 0.0, 0.5))


def test_a_tags_activation_is_the_models():
    for tag, activation in (("openai", QuickGELU), ("laion2b_e16", torch.nn.GELU)):
        clip = build_clip(VisionConfig("ViT-B-32", pretrained=tag), load=False)
        block = clip.visual.transformer.resblocks[0]
        assert type(block.mlp.gelu) is activation


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match="'ViT-Z', which open_clip does not know"):
        VisionTower(VisionConfig("ViT-Z"))
    with pytest.raises(ValueError, match="open_clip knows openai, laion400m_e31"):
        build_clip(VisionConfig("ViT-B-32", pretrained="nonsense"))
    with pytest.raises(FileNotFoundError, match="not in the cache of open_clip or Hugging Face"):
        build_clip(VisionConfig("ViT-B-32", pretrained="laion400m_e31"))
    with pytest.raises(FileNotFoundError, match="which is no file"):
        build_clip(VisionConfig(VIT, checkpoint=str(tmp_path / "absent.pt")))
    with pytest.raises(ValueError, match="give one of them"):
        VisionConfig("ViT-B-32", pretrained="openai", checkpoint="x")
    with pytest.raises(ValueError, match="lacks 'text_cfg'"):
        VisionConfig({"embed_dim": 3, "vision_cfg": {}})
    for config, layer in [(VIT, 3), (VIT, "layer1"), (RESNET, "layer5"), (TIMM, 99)]:
        with pytest.raises(ValueError, match=f"vision.layer is {layer!r}"):
            VisionTower(VisionConfig(config, layer=layer))
    with pytest.raises(ValueError, match=r"this tower takes uint8 \[N, 3, 64, 64\]"):
        VisionTower(VisionConfig(VIT))(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_group_norm_keeps_pictures_apart() -> None:
    torch.manual_seed(0)
    tower = VisionTower(VisionConfig(RESNET, norm="group")).train()
    assert not [module for module in tower.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    images = torch.randint(0, 256, (6, 3, tower.image_size, tower.image_size), dtype=torch.uint8)
    assert torch.allclose(tower(images)[:2], tower(images[:2]), atol=1e-5)
    clip = build_clip(VisionConfig(RESNET, norm="group"))
    assert torch.allclose(tower.from_clip(clip)(images), tower(images))


def test_group_norm_comes_with_standardized_filters() -> None:
    tower = VisionTower(VisionConfig(RESNET, norm="group"))
    filters = [module for module in tower.modules() if isinstance(module, torch.nn.Conv2d)]
    assert filters and all(isinstance(module, StandardizedConv2d) for module in filters)
    images = torch.rand(2, 3, tower.image_size, tower.image_size)
    stem = filters[0]
    flat = stem.weight.detach().flatten(1)
    plain = (flat - flat.mean(dim=1, keepdim=True)) / (flat - flat.mean(dim=1, keepdim=True)).norm(dim=1, keepdim=True)
    expected = torch.nn.functional.conv2d(images, plain.view_as(stem.weight), stride=stem.stride, padding=stem.padding)
    assert torch.allclose(stem(images), expected, rtol=1e-3, atol=1e-4)
    vit = VisionTower(VisionConfig(VIT, norm="group"))
    assert not [module for module in vit.modules() if isinstance(module, StandardizedConv2d)], "it has no BatchNorm"


def test_pixels_of_nothing_else_are_openais():
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    assert (OPENAI_MEAN, OPENAI_STD) == (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
