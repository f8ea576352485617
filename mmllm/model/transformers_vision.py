"""The image encoders of transformers' CLIP, SigLIP and SigLIP2, cut behind the chosen layer.

The modules, and so the names of the weights, are that library's; which of their layers are given is decided here.

Shapes: N images, S patches (rows first), C channels, H and W pixels, h and w rows and columns of patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.model.roles import mark

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "patch_size",
)
_SHARED = (*_SIZES, "hidden_act", "layer_norm_eps", "attention_dropout")


@dataclass(frozen=True)
class Family:
    """What tells one of the encoders from the others.

    Attributes:
        config: its config's class in transformers.
        model: its own.
        keys: of its config, all that decides the features.
        has_class_token: a token comes before those of the patches.
        is_naflex: it takes patches, of pictures of any proportions; here they are square.
    """

    config: str
    model: str
    keys: tuple[str, ...]
    has_class_token: bool = False
    is_naflex: bool = False


FAMILIES: dict[str, Family] = {
    "clip_vision_model": Family("CLIPVisionConfig", "CLIPVisionModel", (*_SHARED, "image_size"), has_class_token=True),
    "siglip_vision_model": Family("SiglipVisionConfig", "SiglipVisionModel", (*_SHARED, "image_size")),
    "siglip2_vision_model": Family(
        "Siglip2VisionConfig", "Siglip2VisionModel", (*_SHARED, "num_patches"), is_naflex=True
    ),
}
"""By the `model_type` of their configs."""


def check_config(values: Mapping[str, Any], where: str = "vision.transformers.") -> None:
    """Makes sure that a tower can be built of these values.

    Args:
        values: the config.
        where: what stands before a key in messages.

    Raises:
        ValueError: another model type, a key that is missing or has no meaning here, or a size that can't be.
    """
    family = family_of(values, where)
    wanted = ("model_type", *family.keys)
    for key in wanted:
        if key not in values:
            raise ValueError(f"{where}{key} is missing; a {values['model_type']} needs {', '.join(wanted)}")
    for key in values:
        if key not in wanted:
            raise ValueError(f"{where}{key} has no meaning; a {values['model_type']} has {', '.join(wanted)}")
    for key in (*_SIZES, "num_patches" if family.is_naflex else "image_size"):
        if isinstance(values[key], bool) or not isinstance(values[key], int) or values[key] < 1:
            raise ValueError(f"{where}{key} is {values[key]!r}; it must be a whole number, 1 or more")
    if values["num_channels"] != 3:
        raise ValueError(f"{where}num_channels is {values['num_channels']}; pictures here have 3")
    if values["hidden_size"] % values["num_attention_heads"]:
        raise ValueError(
            f"{where}num_attention_heads is {values['num_attention_heads']}, which doesn't divide hidden_size "
            f"{values['hidden_size']}"
        )
    if family.is_naflex and math.isqrt(values["num_patches"]) ** 2 != values["num_patches"]:
        raise ValueError(
            f"{where}num_patches is {values['num_patches']}, which is no square number; pictures are squares here"
        )


def family_of(values: Mapping[str, Any], where: str = "vision.transformers.") -> Family:
    """By `model_type`.

    Raises:
        ValueError: it is none of these.
    """
    kind = values.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"{where}model_type is {kind!r}; it can be {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def num_sides(values: Mapping[str, Any]) -> int:
    """Rows of patches, and columns."""
    if family_of(values).is_naflex:
        return math.isqrt(values["num_patches"])
    return values["image_size"] // values["patch_size"]


def image_side(values: Mapping[str, Any]) -> int:
    """Pixels of a picture's side."""
    return num_sides(values) * values["patch_size"] if family_of(values).is_naflex else values["image_size"]


def build_encoder(values: Mapping[str, Any]) -> nn.Module:
    """The encoder with random weights, without a pooling head.

    Raises:
        ModuleNotFoundError: without transformers.
        ValueError: transformers refuses a value.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "vision.transformers needs transformers; pip install 'mmllm[transformers]'"
        ) from error
    family = family_of(values)
    given = {key: values[key] for key in family.keys}
    if not family.has_class_token:
        given["vision_use_head"] = False
    config: Any = getattr(transformers, family.config)(**given)
    config._attn_implementation = "sdpa"
    model: Any = getattr(transformers, family.model)(config)
    encoder = getattr(model, "vision_model", model)  # earlier versions have the encoder one level deeper
    if family.is_naflex:  # a convolution, written as a matrix
        mark(encoder.embeddings.patch_embedding, weight="filters")
    else:  # places are told by the weights: numbers that no state dict has would be lost on the meta device
        encoder.embeddings.position_ids = None
    return encoder


def cut_encoder(encoder: Any, depth: int, keeps_norm: bool) -> None:
    """Takes off, in place, the layers behind `depth`, and the last norm where it isn't kept."""
    del encoder.encoder.layers[depth + 1 :]
    if not keeps_norm:
        encoder.post_layernorm = nn.Identity()


def encoder_layers(encoder: Any) -> list[nn.Module]:
    """Its layers, in the order in which they run."""
    return list(encoder.encoder.layers)


def encoder_features(
    encoder: Any, values: Mapping[str, Any], pixels_N3HW: Tensor, depths: Sequence[int], normed_depth: int | None
) -> list[Tensor]:
    """What layers give for the patches, [N, C, h, w] each.

    Args:
        encoder: cut behind the deepest of the layers.
        values: the config that it was built from.
        pixels_N3HW: normalized.
        depths: of the layers.
        normed_depth: of the layer whose features pass the last norm; None: none's do.
    """
    family, sides = family_of(values), num_sides(values)
    x_NSC = _embed(encoder.embeddings, family, values["patch_size"], pixels_N3HW)
    if family.has_class_token:
        x_NSC = encoder.pre_layrnorm(x_NSC)
    found: dict[int, Tensor] = {}
    for depth, layer in enumerate(encoder.encoder.layers):
        x_NSC = layer(x_NSC, attention_mask=None)
        x_NSC = x_NSC[0] if isinstance(x_NSC, tuple) else x_NSC  # of versions that give weights of attention too
        if depth in depths:
            found[depth] = encoder.post_layernorm(x_NSC) if depth == normed_depth else x_NSC
    patches = (found[depth][:, int(family.has_class_token) :] for depth in depths)
    return [x_NSC.transpose(1, 2).unflatten(2, (sides, sides)) for x_NSC in patches]


def _embed(embeddings: Any, family: Family, patch_size: int, pixels_N3HW: Tensor) -> Tensor:
    """Patches with their places, the class token first where there is one, [N, S, C]."""
    if family.is_naflex:
        rows_N3hpwp = pixels_N3HW.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
        x_NSC = embeddings.patch_embedding(rows_N3hpwp.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
    else:
        x_NSC = embeddings.patch_embedding(pixels_N3HW).flatten(2).transpose(1, 2)
    if family.has_class_token:
        x_NSC = torch.cat([embeddings.class_embedding.expand(len(x_NSC), 1, -1), x_NSC], dim=1)
    return x_NSC + embeddings.position_embedding.weight
