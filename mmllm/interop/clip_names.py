"""Image towers by the names of transformers' vision models: its own as they are, and ViTs of open_clip as its CLIP."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmllm.checkpoints.weights import TensorSpec
from mmllm.model.open_clip_vision import open_clip_config
from mmllm.model.transformers_vision import family_of
from mmllm.model.vision import VisionConfig

_PLAIN_VIT: dict[str, tuple[Any, ...]] = {
    "ls_init_value": (None,),
    "attentional_pool": (False, None),
    "input_patchnorm": (False, None),
    "no_ln_pre": (False,),
    "pos_embed_type": ("learnable",),
    "norm_kwargs": (None, {}),
    "act_kwargs": (None, {}),
    "block_type": (None, "default"),
    "qk_norm": (False,),
    "scaled_cosine_attn": (False,),
    "scale_heads": (False,),
    "scale_attn_inner": (False,),
    "scale_attn": (False,),
    "scale_fc": (False,),
}
"""Switches of open_clip's ViT, each with the values under which it computes what CLIP does."""
_WITHOUT_EFFECT = ("pool_type", "final_ln_after_pool", "output_tokens", "patch_dropout", "attn_pooler_queries",
                   "attn_pooler_heads", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias",
                   "timm_drop", "timm_drop_path")  # fmt: skip
"""What decides heads that are cut off, or training from nothing."""
_SIZES = ("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size")
_NAMES = {
    "conv1.weight": "embeddings.patch_embedding.weight",
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
}
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_LAYER_PARTS = (
    *(f"{norm}.{kind}" for norm in ("layer_norm1", "layer_norm2") for kind in ("weight", "bias")),
    *(f"self_attn.{each}_proj.{kind}" for each in ("q", "k", "v", "out") for kind in ("weight", "bias")),
    *(f"mlp.{each}.{kind}" for each in ("fc1", "fc2") for kind in ("weight", "bias")),
)


@dataclass(frozen=True)
class Piece:
    """One of their tensors: one of ours, or some rows of it."""

    ours: str
    spec: TensorSpec
    rows: slice | None = None

    def of(self, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor."""
        tensor = read(self.ours)
        return tensor if self.rows is None else tensor[self.rows]


class ClipTower:
    """A tower as transformers' CLIP or SigLIP.

    Args:
        vision: the tower's config.

    Attributes:
        values: as `VisionConfig.transformers`.

    Raises:
        ValueError: it is of another kind, or has a switch that these don't; the message names it.
    """

    def __init__(self, vision: VisionConfig):
        if vision.whitened is not None:
            raise ValueError(
                "vision.whitened is given, a tower that LLaVA doesn't have; train with CLIP or SigLIP to export "
                "pictures, or export as decoder"
            )
        if vision.transformers is not None:
            if family_of(vision.transformers).is_naflex:
                raise ValueError(
                    f"vision.transformers.model_type is {vision.transformers['model_type']!r}, which LLaVA doesn't "
                    f"have; train with CLIP or SigLIP to export pictures, or export as decoder"
                )
            self.values, self._is_converted = vision.transformers, False
        else:
            self.values, self._is_converted = _values_of_vit(vision), True

    def pieces(self, ours: Mapping[str, TensorSpec]) -> dict[str, Piece]:
        """Their tensors, by their names.

        Args:
            ours: the tower's tensors ("visual.…"), as far as it reaches.
        """
        if not self._is_converted:
            return {name.removeprefix("visual."): Piece(name, spec) for name, spec in ours.items()}
        found: dict[str, Piece] = {}
        for name, spec in ours.items():
            found |= _of_vit(name, spec)
        return found

    def names_behind(self, depth: int) -> list[str]:
        """Tensors of a whole vision model behind a layer, the last norm included."""
        layers = range(depth + 1, self.values["num_hidden_layers"])
        names = [f"encoder.layers.{layer}.{part}" for layer in layers for part in _LAYER_PARTS]
        return [*names, "post_layernorm.weight", "post_layernorm.bias"]


def _values_of_vit(vision: VisionConfig) -> dict[str, Any]:
    """The config of the CLIP that a ViT of open_clip is."""
    config = open_clip_config(vision)
    given: dict[str, Any] = config["vision_cfg"]
    where = "vision.open_clip.vision_cfg"
    if "timm_model_name" in given or not isinstance(given.get("layers", 12), int):
        kind = "timm model" if "timm_model_name" in given else "ResNet"
        raise ValueError(
            f"{where} is of a {kind}, which transformers' CLIP isn't; train with a ViT of open_clip, or with CLIP or "
            f"SigLIP of transformers, to export pictures"
        )
    for key, value in given.items():
        if key in _PLAIN_VIT and value not in _PLAIN_VIT[key]:
            raise ValueError(f"{where}.{key} is {value!r}; transformers' CLIP computes {_PLAIN_VIT[key][0]!r} alone")
        if key not in (*_PLAIN_VIT, *_WITHOUT_EFFECT, *_SIZES):
            raise ValueError(f"{where}.{key} is {value!r}, which transformers' CLIP doesn't know; it can't be exported")
    width = given.get("width", 768)
    heads = width // given.get("head_width", 64)
    return {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": int(width * given.get("mlp_ratio", 4.0)),
        "num_hidden_layers": given.get("layers", 12),
        "num_attention_heads": heads,
        "num_channels": 3,
        "patch_size": given.get("patch_size", 16),
        "hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "image_size": given.get("image_size", 224),
    }


def _of_vit(name: str, spec: TensorSpec) -> dict[str, Piece]:
    """One of open_clip's tensors, as those of transformers that it is."""
    inner = name.removeprefix("visual.")
    match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", inner)
    if match is None:
        module, _, kind = inner.rpartition(".")
        theirs = _NAMES.get(inner) or f"{_NAMES[module]}.{kind}"
        return {theirs: Piece(name, spec)}
    layer, part = f"encoder.layers.{match[1]}.", match[2]
    if part.startswith("attn.in_proj_"):
        kind, width = part.removeprefix("attn.in_proj_"), spec.shape[0] // 3
        third = TensorSpec(spec.dtype, (width, *spec.shape[1:]))
        rows = {each: slice(at * width, (at + 1) * width) for at, each in enumerate("qkv")}
        return {f"{layer}self_attn.{each}_proj.{kind}": Piece(name, third, rows[each]) for each in rows}
    module, _, kind = part.rpartition(".")
    return {f"{layer}{_IN_BLOCK[module]}.{kind}": Piece(name, spec)}
