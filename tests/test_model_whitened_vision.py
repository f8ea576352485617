"""The whitened tower against a slow one that is written out, and its filters against their definition."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmllm.interop.clip_names import ClipTower
from mmllm.model import whitened_vision
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.flops import ModelFlops
from mmllm.model.image_projectors import ImageProjector, ImageProjectorConfig
from mmllm.model.multimodal import ModelConfig, MultimodalModel
from mmllm.model.open_clip_vision import build_clip
from mmllm.model.roles import parameter_roles
from mmllm.model.standardized import NORM_GROUPS, STANDARDIZED_EPS
from mmllm.model.vision import VisionConfig, VisionTower
from mmllm.model.whitened_vision import (
    COLOR_CORRELATION,
    PIXEL_CORRELATION,
    WHITENING_EPS,
    WhitenedConfig,
    WhitenedTower,
    assumed_covariance,
    patch_covariance,
    whitening_filters,
)
from mmllm.training.clip_module import with_text_tokens

EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
SIZES = [  # image_size, widths, fold; sides and width of the features
    (64, (64, 128), 2, 4, 512),
    (32, (24,), 2, 4, 96),
    (32, (12, 20), 1, 4, 20),
    (128, (8, 12, 16), 2, 4, 64),
    (64, (12,), 4, 4, 192),
]


def _images(num: int, size: int, seed: int = 0) -> Tensor:
    """Smooth ones, of few colours."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num, 3, 4, 4, generator=generator) + torch.rand(num, 1, 4, 4, generator=generator)
    return (F.interpolate(coarse, (size, size), mode="bilinear") * 127).to(torch.uint8)


def _tower(size: int = 64, widths: tuple[int, ...] = (12, 16), fold: int = 2, **settings: Any) -> Any:
    torch.manual_seed(0)
    return VisionTower(VisionConfig(whitened=WhitenedConfig(size, widths, fold), **settings))


# ------------------------------------------------------------------------------------------------ the slow tower
def _slow_conv(x_NCHW: Tensor, weight_OIHW: Tensor) -> Tensor:
    """3 x 3, zeros around, with filters of mean 0 and norm 1."""
    rows_OI = torch.stack([row - row.mean() for row in weight_OIHW.flatten(1)])
    fan_in = rows_OI.shape[1]
    rows_OI = rows_OI / (rows_OI.square().mean(dim=1, keepdim=True) * fan_in + STANDARDIZED_EPS).sqrt()
    weight_OIHW = rows_OI.view_as(weight_OIHW)
    height, width = x_NCHW.shape[2:]
    padded = F.pad(x_NCHW, (1, 1, 1, 1))
    out = torch.zeros(len(x_NCHW), len(weight_OIHW), height, width, dtype=x_NCHW.dtype)
    for dy in range(3):
        for dx in range(3):
            seen = padded[:, :, dy : dy + height, dx : dx + width]
            out = out + torch.einsum("nihw,oi->nohw", seen, weight_OIHW[:, :, dy, dx])
    return out


def _slow_norm(x_NCHW: Tensor, norm: Any) -> Tensor:
    groups = []
    for group in x_NCHW.chunk(math.gcd(NORM_GROUPS, x_NCHW.shape[1]), dim=1):
        mean = group.mean(dim=(1, 2, 3), keepdim=True)
        groups.append((group - mean) / (group.var(dim=(1, 2, 3), keepdim=True, correction=0) + norm.eps).sqrt())
    return torch.cat(groups, dim=1) * norm.weight[:, None, None] + norm.bias[:, None, None]


def _gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def _slow_tower(tower: Any, pixels_N3HW: Tensor, fold: int) -> Tensor:
    corners = [pixels_N3HW[:, :, dy::2, dx::2] for dy in range(2) for dx in range(2)]
    patches_N3Qhw = torch.stack(corners, dim=2)
    x = _gelu(torch.einsum("ncqhw,fcq->nfhw", patches_N3Qhw, tower.filters.double().flatten(2)))
    for stage in tower.stages:
        x = _slow_conv(x, stage.conv.weight)
        x = torch.stack([x[:, :, dy::2, dx::2] for dy in range(2) for dx in range(2)]).amax(dim=0)
        x = _gelu(_slow_norm(x, stage.norm))
    x = x + _gelu(_slow_norm(_slow_conv(x, tower.block.conv.weight), tower.block.norm))
    # of each channel the fold x fold neighbours, rows first
    shifted = [x[:, :, dy::fold, dx::fold] for dy in range(fold) for dx in range(fold)]
    return torch.stack(shifted, dim=2).flatten(1, 2)


@pytest.mark.parametrize(("size", "widths", "fold"), [(32, (12, 16), 2), (16, (10,), 1), (32, (8,), 4)])
def test_features_and_gradients_equal_a_slow_towers(size, widths, fold):
    tower = WhitenedTower(WhitenedConfig(size, widths, fold)).double()
    for parameter in tower.parameters():
        nn.init.normal_(parameter)
    pixels_N3HW = torch.randn(3, 3, size, size, dtype=torch.float64, requires_grad=True)
    fast, slow = tower(pixels_N3HW), _slow_tower(tower, pixels_N3HW, fold)
    torch.testing.assert_close(fast, slow, **EXACT)
    weights = torch.randn_like(slow)
    of = [pixels_N3HW, *tower.parameters()]
    gradients = (torch.autograd.grad((each * weights).sum(), of) for each in (fast, slow))
    for ours, theirs in zip(*gradients, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize(("size", "widths", "fold", "sides", "width"), SIZES)
def test_sizes_follow_from_the_config_and_fit_projectors(size, widths, fold, sides, width):
    tower = _tower(size, widths, fold)
    features_NSC = tower(_images(2, size))
    assert features_NSC.shape == (2, sides**2, width)
    assert (tower.image_size, tower.grid, tower.width) == (size, (sides, sides), width)
    for projector in (ImageProjectorConfig("mlp"), ImageProjectorConfig("average", num_tokens=4)):
        assert ImageProjector(projector, tower.grid, tower.width, 24)(features_NSC).shape[2] == 24
    torch.testing.assert_close(tower(_images(2, size))[1:], tower(_images(2, size)[1:]))  # no norm over a batch


def test_a_feature_is_of_its_own_place():
    tower = _tower().eval()
    images = torch.full((1, 3, 64, 64), 90, dtype=torch.uint8)
    marked = images.clone()
    marked[:, 0, 34:38, 50:54] = 255  # in row 2, column 3 of the grid of 4 x 4
    changes = (tower(marked) - tower(images)).square().sum(dim=2)[0]
    assert int(changes.argmax()) == 2 * 4 + 3


# ------------------------------------------------------------------------------------------------ filters
def test_filters_whiten_the_pictures_that_they_were_computed_from():
    images = _images(40, 16)
    tower = _tower(16, (8,), 1)
    assert tower.needs_pictures
    assert tower.whiten([images[:7], images[7:]]) == 40
    assert not tower.needs_pictures and int(tower.visual.num_pictures) == 40
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (tower.mean, tower.std))
    pixels_N3HW = (images / 255.0 - mean) / std
    filters_FP = tower.visual.filters.double().flatten(1)
    assert filters_FP.shape == (24, 12) and torch.equal(filters_FP[:12], -filters_FP[12:])
    patches = [
        pixels_N3HW[n, :, y : y + 2, x : x + 2].flatten() for n in range(40) for y in range(15) for x in range(15)
    ]
    patches_MP = torch.stack(patches)
    covariance_PP = patches_MP.T @ patches_MP / len(patches_MP)
    values_P = torch.linalg.eigvalsh(covariance_PP).flip(0)
    answers_MP = patches_MP @ filters_FP[:12].T
    expected = torch.diag(values_P / (values_P + WHITENING_EPS))
    torch.testing.assert_close(answers_MP.T @ answers_MP / len(answers_MP), expected, rtol=1e-4, atol=1e-4)
    assert values_P[0] > 100 * values_P[-1], "a test of whitening needs pictures that aren't white"
    again = _tower(16, (8,), 1)
    again.whiten([images])
    torch.testing.assert_close(again.visual.filters, tower.visual.filters, rtol=1e-4, atol=1e-5)
    assert tower.whiten([]) == 0 and int(tower.visual.num_pictures) == 40


@pytest.mark.parametrize(("num", "height", "width"), [(7, 6, 9), (1, 40, 3), (5, 2, 2)])
@pytest.mark.parametrize("chunk_pixels", [1, 110, whitened_vision.CHUNK_PIXELS])
def test_covariance_is_of_all_patches_however_they_are_split(monkeypatch, num, height, width, chunk_pixels):
    monkeypatch.setattr(whitened_vision, "CHUNK_PIXELS", chunk_pixels)
    pixels_N3HW = torch.randn(num, 3, height, width)
    patches_MP = torch.stack(
        [
            image[:, y : y + 2, x : x + 2].flatten()
            for image in pixels_N3HW.double()
            for y in range(height - 1)
            for x in range(width - 1)
        ]
    )
    expected_PP = patches_MP.T @ patches_MP / len(patches_MP)
    torch.testing.assert_close(patch_covariance(pixels_N3HW), expected_PP, rtol=1e-12, atol=1e-12)


class _LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that is made."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else [made]:
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float64:
                self.num_bytes = max(self.num_bytes, tensor.numel() * 8)
        return made


def test_memory_for_the_covariance_does_not_grow_with_the_pictures():
    largest = []
    for num in (32, 128):
        pixels_N3HW = torch.zeros(num, 3, 64, 64)
        with _LargestTensor() as mode:
            patch_covariance(pixels_N3HW)
        largest.append(mode.num_bytes)
    assert largest[0] == largest[1] == 8 * 32 * 63 * 63 * 12


def test_signs_of_filters_are_not_left_to_rounding():
    covariance_PP = patch_covariance(torch.randn(4, 3, 8, 8))
    filters_FP = whitening_filters(covariance_PP).flatten(1)
    nudged = whitening_filters(covariance_PP * (1 + 1e-12)).flatten(1)
    torch.testing.assert_close(filters_FP, nudged)
    first_12P = filters_FP[:12]
    assert (first_12P.gather(1, first_12P.abs().argmax(dim=1, keepdim=True)) > 0).all()


def test_the_assumed_pictures_are_smooth_and_hardly_coloured():
    places = [(color, y, x) for color in range(3) for y in range(2) for x in range(2)]
    expected = [
        [
            (1.0 if a[0] == b[0] else COLOR_CORRELATION) * PIXEL_CORRELATION ** (abs(a[1] - b[1]) + abs(a[2] - b[2]))
            for b in places
        ]
        for a in places
    ]
    torch.testing.assert_close(assumed_covariance(), torch.tensor(expected, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------ as any other tower
def test_it_is_a_tower_as_others_are():
    tower = _tower()
    tower(_images(2, 64)).square().sum().backward()
    assert not [name for name, parameter in tower.named_parameters() if parameter.grad is None]
    assert set(parameter_roles(tower).values()) == {"filters", "vector"}
    assert len(tower.blocks) == 3
    frozen = _tower(trainable=False).train()
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not frozen(_images(1, 64)).requires_grad
    before = tower.hash
    tower.whiten([_images(8, 64)])
    assert tower.hash != before, "filters decide features"
    other = _tower()
    other.load_state_dict(tower.state_dict())
    assert other.hash == tower.hash and not other.needs_pictures
    assert torch.equal(other(_images(2, 64)), tower(_images(2, 64)))
    half = _tower().bfloat16()
    torch.testing.assert_close(half(_images(2, 64)).float(), _tower()(_images(2, 64)), rtol=0.1, atol=0.2)


def test_its_shapes_are_known_without_computing():
    vision = VisionConfig(whitened=WhitenedConfig(32, (8,), 2))
    config = ModelConfig(DecoderConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1), vision)
    assert ModelConfig.from_dict(config.to_dict()) == config
    filters, conv, block = 16 * 16 * 24 * 12, 16 * 16 * 8 * 24 * 9, 8 * 8 * 8 * 8 * 9
    assert ModelFlops.of(config).per_image == 2 * (filters + conv + block)
    with torch.device("meta"):
        model = MultimodalModel(config)
        assert model.image_embedding(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 16, 16)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 60}, r"image_size is 60, but a feature of 2 widths and fold 2 is of 16 pixels a side"),
        ({"image_size": 0}, r"image_size is 0"),
        ({"image_size": 64, "widths": ()}, r"widths is \[\]; give each stage at least 1 channel"),
        ({"image_size": 64, "widths": (8, 0)}, r"widths is \[8, 0\]"),
        ({"image_size": 64, "fold": 0}, r"fold is 0"),
    ],
)
def test_sizes_that_cannot_be_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        WhitenedConfig(**values)


def test_what_it_does_not_have_is_refused_by_name():
    whitened = WhitenedConfig(64)
    with pytest.raises(ValueError, match=r"vision.open_clip and vision.whitened are given; give one"):
        VisionConfig("ViT-B-32", whitened=whitened)
    other: dict[str, Any] = {"layer": "layer3", "norm": "group", "pretrained": "openai", "post_layernorm": False}
    for key, value in other.items():
        with pytest.raises(ValueError, match=rf"vision.{key} is {value!r} beside vision.whitened"):
            VisionConfig(whitened=whitened, **{key: value})
    config = VisionConfig(whitened=whitened)
    with pytest.raises(ValueError, match=r"vision.whitened is given, but this needs a whole model of open_clip"):
        build_clip(config)
    with pytest.raises(ValueError, match=r"clip.whitened is given, which has no text tower to train with here"):
        with_text_tokens(config, 40, 1, 0)
    with pytest.raises(ValueError, match=r"vision.whitened is given, a tower that LLaVA doesn't have"):
        ClipTower(config)
    with pytest.raises(ValueError, match=r"vision.open_clip and vision.whitened are given"):
        dataclasses.replace(config, open_clip="RN50")
