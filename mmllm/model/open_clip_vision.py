"""Image encoders of open_clip: built, their weights found, cut at a layer, and asked for its features.

Apart from `mmllm.model.vision`, so that a model with another tower doesn't import open_clip, which takes longer than
all else together.

Shapes: N images, C channels, h and w features a side, H and W pixels.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import open_clip
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from open_clip.pretrained import get_pretrained_cfg
from open_clip.timm_model import TimmModel
from open_clip.transformer import Attention, AttentionalPooler, TextTransformer, VisionTransformer
from torch import Tensor, nn

from mmllm.model.roles import Role, mark, mark_all
from mmllm.model.standardized import StandardizedConv2d, group_norm
from mmllm.model.vision import OPENAI_MEAN, OPENAI_STD, VisionConfig, chosen_depths, pixel_statistics

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ROLES: tuple[tuple[type[nn.Module], dict[str, Role]], ...] = (
    (CLIP, {"positional_embedding": "embedding", "text_projection": "head"}),
    (TextTransformer, {"positional_embedding": "embedding", "text_projection": "head"}),
    (VisionTransformer, {"positional_embedding": "embedding", "proj": "head"}),
    (AttentionPool2d, {"positional_embedding": "embedding"}),
    (AttentionalPooler, {"query": "embedding"}),
    (Attention, {"in_proj_weight": "hidden", "logit_scale": "vector", "head_scale": "vector"}),
)
"""What open_clip's own parameters are to the optimizer; the layers of torch in it tell by their types."""


def build_clip(config: VisionConfig, load: bool = True) -> nn.Module:
    """The whole open_clip model: both towers.

    Args:
        config: `layer` and `trainable` do not matter here.
        load: read the weights that `pretrained` or `checkpoint` name; without them, or if False, they are random.

    Raises:
        ValueError: for a name or tag that open_clip does not know, weights of another model, or a checkpoint without
            `mean` and `std` where the model's known weights differ in them.
        FileNotFoundError: for weights that are not on this machine: nothing is downloaded.
    """
    path = _weights_path(config) if load else None
    name, model_config = config.open_clip, open_clip_config(config)
    custom_text = model_config.pop("custom_text", False) or "hf_model_name" in model_config["text_cfg"]
    if "multimodal_cfg" in model_config:
        raise ValueError(f"vision.open_clip is {name!r}, a CoCa model; choose a CLIP or SigLIP model")
    model = (CustomTextCLIP if custom_text else open_clip.CLIP)(**model_config)
    if config.norm == "group" and any(isinstance(part, nn.BatchNorm2d) for part in model.modules()):
        _use_group_norm(model)
    _mark_roles(model)
    if path is not None:
        try:
            open_clip.load_checkpoint(model, path, strict=True, weights_only=True)  # pyright: ignore
        except RuntimeError as error:
            last = str(error).splitlines()[-1].strip()
            raise ValueError(f"{path} does not hold weights of vision.open_clip {name!r}: {last}") from error
    return model


def open_clip_config(config: VisionConfig) -> dict[str, Any]:
    """open_clip's own config of the model, with the activation that the tag's weights were trained with."""
    name = config.open_clip
    if name is None:
        given = "vision.transformers" if config.transformers is not None else "vision.whitened"
        raise ValueError(f"{given} is given, but this needs a whole model of open_clip; give vision.open_clip")
    if isinstance(name, str):
        model_config = open_clip.get_model_config(name)
        if model_config is None:
            raise ValueError(
                f"vision.open_clip is {name!r}, which open_clip does not know; see open_clip.list_models()"
            )
    else:
        model_config = copy.deepcopy(name)
    tag = get_pretrained_cfg(name, config.pretrained) if isinstance(name, str) and config.pretrained else None
    if tag:  # weights of one activation fit into a model of the other, and give wrong features
        model_config["quick_gelu"] = tag.get("quick_gelu", False)
    model_config["vision_cfg"] = dict(model_config["vision_cfg"])
    if "timm_model_name" in model_config["vision_cfg"]:
        model_config["vision_cfg"]["timm_model_pretrained"] = False
    return model_config


def tag_statistics(config: VisionConfig) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and standard deviation of pixels that open_clip knows of the config's tag; None: it says nothing."""
    tag = get_pretrained_cfg(str(config.open_clip), config.pretrained or "")
    return tag.get("mean"), tag.get("std")


def _check_statistics(config: VisionConfig) -> None:
    """A local file says nothing of its pixels: they must be told where the model's known weights don't share OpenAI's.

    Raises:
        ValueError: they are not told.
    """
    name = config.open_clip
    if config.mean is not None or not isinstance(name, str):
        return
    tags = {tag: pixel_statistics(VisionConfig(name, tag)) for tag in open_clip.list_pretrained_tags_by_model(name)}
    others = [tag for tag, known in tags.items() if known != (OPENAI_MEAN, OPENAI_STD)]
    if others:
        mean, std = (list(values) for values in tags[others[0]])
        raise ValueError(
            f"vision.checkpoint is {config.checkpoint!r} without vision.mean and vision.std, and not all weights of "
            f"{name} take OpenAI's ({others[0]} takes mean {mean} and std {std}); give those of these weights"
        )


def _mark_roles(clip: nn.Module) -> None:
    """Tells the optimizer what the parameters of open_clip's and timm's modules are."""
    for module in clip.modules():
        for kind, roles in _ROLES:
            if isinstance(module, kind):
                there: dict[str, Role] = {name: role for name, role in roles.items() if name in module._parameters}
                mark(module, **there)
        match module:
            case AttentionPool2d():  # so wide that orthogonalizing it would take longer than the rest of a small CLIP
                mark_all(module, "head")
            case CLIP() | TextTransformer() if isinstance(module.text_projection, nn.Linear):
                mark_all(module.text_projection, "head")
            case TimmModel():
                trunk: Any = module.trunk
                for part in (module.head, trunk.get_classifier()):
                    if isinstance(part, nn.Module):
                        mark_all(part, "head")
                _mark_bare(module.trunk)


def _mark_bare(trunk: nn.Module) -> None:
    """What timm's modules hold beside torch's layers is added or multiplied: positions, tokens, scales, tables."""
    for module in trunk.modules():
        if type(module).__module__.startswith("timm.") and not isinstance(module, _LAYERS):
            bare = [name for name, p in module._parameters.items() if p is not None and p.ndim >= 2]
            roles: dict[str, Role] = dict.fromkeys(bare, "embedding")
            mark(module, **roles)


def _use_group_norm(module: nn.Module) -> None:
    """Replaces BatchNorm by GroupNorm (arXiv 1803.08494) and standardizes the filters, in place.

    GroupNorm alone takes out of each picture what filters with a mean let through, and learns many times slower;
    together they learn as BatchNorm does (arXiv 1912.11370).
    """
    for name, child in module.named_children():
        match child:
            case nn.BatchNorm2d():
                setattr(module, name, group_norm(child.num_features))
            case nn.Conv2d():
                child.__class__ = StandardizedConv2d  # the same parameters, under the same names
            case _:
                _use_group_norm(child)


def _weights_path(config: VisionConfig) -> str | None:
    """The file that the config names: local, or where open_clip or Hugging Face have stored a tag's."""
    if config.checkpoint is not None:
        if not Path(config.checkpoint).is_file():
            raise FileNotFoundError(
                f"vision.checkpoint is {config.checkpoint!r}, which is no file; give the path of open_clip weights"
            )
        _check_statistics(config)
        return config.checkpoint
    if config.pretrained is None:
        return None
    if not isinstance(config.open_clip, str):
        raise ValueError(f"vision.pretrained is {config.pretrained!r}, a tag, but vision.open_clip is no model name")
    tag = get_pretrained_cfg(config.open_clip, config.pretrained)
    if not tag:
        tags = open_clip.list_pretrained_tags_by_model(config.open_clip)
        raise ValueError(
            f"vision.pretrained is {config.pretrained!r}; open_clip knows {', '.join(tags) or 'none'} for "
            f"{config.open_clip}"
        )
    cached = Path("~/.cache/clip").expanduser() / Path(tag.get("url", "")).name
    if tag.get("url") and cached.is_file():
        return str(cached)
    repository, filename = (tag.get("hf_hub") or "/").rsplit("/", 1)
    from huggingface_hub import try_to_load_from_cache
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    for candidate in [filename] if filename else [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]:
        found = try_to_load_from_cache(repository, candidate) if repository else None
        if isinstance(found, str):
            return found
    raise FileNotFoundError(
        f"the weights of {config.open_clip} {config.pretrained} are not in the cache of open_clip or Hugging Face; "
        f"download them there, or give vision.checkpoint"
    )


def cut_visual(visual: Any, config: VisionConfig) -> tuple[nn.Module, tuple[int, ...]]:
    """Takes off, in place, what lies behind the deepest layer, so that every parameter left gets a gradient.

    Returns:
        What is left, and each layer's depth.
    """
    layers = config.layers
    if isinstance(visual, ModifiedResNet):
        stages = ("layer1", "layer2", "layer3", "layer4")
        names = ["layer4" if layer == -1 else layer for layer in layers]
        unknown = [name for name in names if name not in stages]
        if unknown:
            raise ValueError(f"vision.layer is {unknown[0]!r}; a ModifiedResNet has {', '.join(stages)}")
        depths = tuple(stages.index(str(name)) for name in names)
        for stage in stages[max(depths) + 1 :]:
            setattr(visual, stage, nn.Identity())
        visual.attnpool = None  # pyright: ignore[reportAttributeAccessIssue]
        return visual, depths
    if isinstance(visual, TimmModel):
        trunk: Any = visual.trunk
        depths = chosen_depths(layers, len(trunk.feature_info))
        trunk.prune_intermediate_layers([max(depths)], prune_norm=True, prune_head=True)
        visual.head = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
        return visual, depths
    if not isinstance(visual, VisionTransformer):
        raise ValueError(
            f"vision.open_clip gives a {type(visual).__name__}; ViT, ModifiedResNet and timm are supported"
        )
    num_blocks = len(visual.transformer.resblocks)
    depths = chosen_depths(layers, num_blocks)
    keeps_norm = config.post_layernorm and max(depths) == num_blocks - 1
    visual.prune_intermediate_layers([max(depths)], prune_norm=not keeps_norm, prune_head=True)
    visual.attn_pool = None
    return visual, depths


def is_resnet(visual: nn.Module) -> bool:
    """Whether an encoder is CLIP's own ResNet, which runs faster with channels last."""
    return isinstance(visual, ModifiedResNet)


def encoder_blocks(visual: Any) -> list[nn.Module]:
    """Its repeated blocks, in the order in which they run; each is called as a module."""
    if isinstance(visual, ModifiedResNet):
        return [
            block for name in ("layer1", "layer2", "layer3", "layer4") for block in getattr(visual, name).children()
        ]
    if isinstance(visual, TimmModel):
        trunk: Any = visual.trunk
        return list(getattr(trunk, "blocks", None) or getattr(trunk, "stages", None) or [])
    return list(visual.transformer.resblocks)


def spatial_features(visual: Any, pixels_N3HW: Tensor, chosen: tuple[int, ...], post_layernorm: bool) -> list[Tensor]:
    """[N, C, h, w] of each of the layers of an encoder that `cut_visual` has cut.

    Args:
        visual: the encoder.
        pixels_N3HW: normalized.
        chosen: depths of the layers.
        post_layernorm: see `VisionConfig`.
    """
    if isinstance(visual, ModifiedResNet):
        x: Any = visual.stem(pixels_N3HW)
        stages = []
        for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            x = stage(x)
            stages.append(x)
        return [stages[depth] for depth in chosen]
    depths = sorted(chosen)
    if isinstance(visual, TimmModel):
        trunk: Any = visual.trunk
        found = trunk.forward_intermediates(
            pixels_N3HW, indices=depths, intermediates_only=True, norm=False, output_fmt="NCHW"
        )
    else:
        is_one = len(depths) == 1
        output = visual.forward_intermediates(
            pixels_N3HW, indices=depths, normalize_intermediates=is_one and post_layernorm, intermediates_only=True
        )
        found = output["image_intermediates"]
        if not is_one and post_layernorm:  # the last block's features alone, as where they are the only ones
            found[-1] = visual.ln_post(found[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return [found[depths.index(depth)] for depth in chosen]
