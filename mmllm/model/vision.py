"""The image tower: spatial features of chosen layers of an image encoder of open_clip or transformers, or its own.

Shapes: N images, S features an image (rows first), C channels, H and W pixels.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from open_clip.pretrained import get_pretrained_cfg
from open_clip.timm_model import TimmModel
from open_clip.transformer import Attention, AttentionalPooler, TextTransformer, VisionTransformer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmllm.model.roles import Role, mark, mark_all
from mmllm.model.standardized import StandardizedConv2d, group_norm
from mmllm.model.transformers_vision import (
    build_encoder,
    check_config,
    cut_encoder,
    encoder_features,
    encoder_layers,
    image_side,
    num_sides,
)
from mmllm.model.whitened_vision import WhitenedConfig, WhitenedTower

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
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


@dataclass(frozen=True)
class VisionConfig:
    """Which image encoder, which of its layers, and whether it learns.

    Attributes:
        open_clip: a model name of open_clip ("ViT-B-32"), or a model's config as a dict with
            `embed_dim`, `vision_cfg` and `text_cfg`, as open_clip's own JSON files. None: see `transformers`.
        pretrained: a tag of open_clip ("laion2b_s34b_b79k") whose weights lie in open_clip's or
            Hugging Face's cache. Read by `load_pretrained`, never by a constructor.
        checkpoint: a local file of open_clip weights (`.safetensors`, `.pt`), instead of `pretrained`.
        mean: of red, green and blue in [0, 1], by which pixels are normalized; None: the tag's, or else OpenAI's.
            `transformers` needs it told.
        std: as `mean`; both or neither are given.
        layer: index of a block of a ViT or of a stage of a timm trunk (negative: from the end), or
            "layer1" to "layer4" of a ModifiedResNet (-1 is "layer4"). Several of one grid: their features are
            concatenated, in the order in which they are named.
        trainable: whether gradients flow into the tower.
        norm: "batch" keeps BatchNorm where the model has it, with the statistics that it stores: right for pretrained
            weights. "group" puts GroupNorm in its place and standardizes the filters before it, so that a tower is
            learnt from nothing as fast as with BatchNorm, without one packed document's pictures changing another's.
        transformers: in the place of `open_clip`, the config of a vision model of transformers: CLIP, SigLIP or
            SigLIP2, whose keys are there as in its config.json. `mmllm import --vision` gives it, with its weights.
        whitened: in the place of `open_clip`, a small tower of convolutions behind filters that are computed from the
            training pictures when a training starts: it is learnt from nothing in minutes, and has no other weights.
        post_layernorm: whether the last block's features pass the norm that a ViT has behind it. Of other blocks, and
            of encoders that aren't a ViT of open_clip or transformers, none do.
    """

    open_clip: str | dict[str, Any] | None = None
    pretrained: str | None = None
    checkpoint: str | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    layer: int | str | tuple[int | str, ...] = -1
    trainable: bool = True
    norm: Literal["batch", "group"] = "batch"
    transformers: dict[str, Any] | None = None
    post_layernorm: bool = True
    whitened: WhitenedConfig | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("open_clip", "transformers", "whitened") if getattr(self, name) is not None]
        if len(given) != 1:
            said = " and ".join(f"vision.{name}" for name in given) + " are" if given else "none is"
            raise ValueError(f"of vision.open_clip, vision.transformers and vision.whitened {said} given; give one")
        if self.transformers is not None:
            check_config(self.transformers)
            _check_alone(self)
        if self.whitened is not None:
            _check_has_no_layers(self)
        if self.pretrained and self.checkpoint:
            raise ValueError(
                f"vision.pretrained is {self.pretrained!r} and vision.checkpoint {self.checkpoint!r}; give one of them"
            )
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"vision.mean is {self.mean} and vision.std {self.std}; give both or neither")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"vision.std is {self.std}; each must be positive")
        if isinstance(self.layer, list):  # as YAML gives it
            object.__setattr__(self, "layer", tuple(self.layer))
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise ValueError(f"vision.layer is {list(self.layers)}; name one layer, or several different ones")
        if isinstance(self.open_clip, dict):
            missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in self.open_clip]
            if missing:
                raise ValueError(f"vision.open_clip lacks {missing[0]!r}; it needs embed_dim, vision_cfg, text_cfg")

    @property
    def layers(self) -> tuple[int | str, ...]:
        """The layers whose features are given: `layer`, or all that it names."""
        return self.layer if isinstance(self.layer, tuple) else (self.layer,)


def _check_alone(config: VisionConfig) -> None:
    """Refuses what belongs to open_clip beside `transformers`, and pixels that nothing is said of.

    Raises:
        ValueError: something like that.
    """
    if config.mean is None:
        raise ValueError("vision.transformers is given without vision.mean and vision.std; give those of its weights")
    for key in ("pretrained", "checkpoint"):
        if getattr(config, key) is not None:
            raise ValueError(
                f"vision.{key} is {getattr(config, key)!r} beside vision.transformers, but is of open_clip; bring its "
                f"weights into a model folder with `mmllm import --vision`, and start from that"
            )


def _check_has_no_layers(config: VisionConfig) -> None:
    """Refuses beside `whitened` what has a meaning for other encoders alone.

    Raises:
        ValueError: something like that.
    """
    plain = VisionConfig(open_clip="")
    for key in ("pretrained", "checkpoint", "layer", "norm", "post_layernorm"):
        if getattr(config, key) != getattr(plain, key):
            raise ValueError(
                f"vision.{key} is {getattr(config, key)!r} beside vision.whitened, which has one norm, one layer of "
                f"features and no weights but those that it learns here; leave {key} out"
            )


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


def pixel_statistics(config: VisionConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of red, green and blue by which the tower's pixels are normalized."""
    if config.mean is not None and config.std is not None:
        return config.mean, config.std
    tag = get_pretrained_cfg(str(config.open_clip), config.pretrained) if config.pretrained else {}
    return tuple(tag.get("mean") or OPENAI_DATASET_MEAN), tuple(tag.get("std") or OPENAI_DATASET_STD)


def _check_statistics(config: VisionConfig) -> None:
    """A local file says nothing of its pixels: they must be told where the model's known weights don't share OpenAI's.

    Raises:
        ValueError: they are not told.
    """
    name = config.open_clip
    if config.mean is not None or not isinstance(name, str):
        return
    tags = {tag: pixel_statistics(VisionConfig(name, tag)) for tag in open_clip.list_pretrained_tags_by_model(name)}
    others = [tag for tag, known in tags.items() if known != (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)]
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


class VisionTower(nn.Module):
    """An image encoder up to the chosen layer; what lies behind it is cut off.

    Weights are random until `load_pretrained`, `from_clip` or `load_state_dict`. BatchNorm always uses
    its stored statistics: a decoder's batches of a few images would ruin them, and would mix documents.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.mean, self.std = pixel_statistics(config)
        if config.transformers is not None:
            self._build_encoder(config.transformers)
            return
        if config.whitened is not None:
            self._build_whitened(config.whitened)
            return
        clip = build_clip(config, load=False)
        visual: Any = clip.visual
        size: Any = visual.image_size
        self.image_size = int(size if isinstance(size, int) else size[0])
        self.visual, self._depths = _cut(visual, config)
        if isinstance(self.visual, ModifiedResNet):  # about a fifth faster on CPUs, weights and gradients laid alike
            self.visual.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.requires_grad_(config.trainable)
        self.train()
        with torch.no_grad():
            device = next(self.visual.parameters()).device
            probes = self._spatial(torch.zeros(1, 3, self.image_size, self.image_size, device=device))
        self.width = sum(probe.shape[1] for probe in probes)
        self.grid: tuple[int, int] = (probes[0].shape[2], probes[0].shape[3])
        grids = [f"{probe.shape[2]} x {probe.shape[3]}" for probe in probes]
        if len(set(grids)) > 1:
            raise ValueError(
                f"vision.layer is {list(config.layers)}, whose grids are {', '.join(grids)}; name layers of one grid"
            )

    def _build_encoder(self, values: dict[str, Any]) -> None:
        """The encoder of transformers, whose config tells its sizes."""
        encoder: Any = build_encoder(values)
        self._depths = _depths(self.config.layers, values["num_hidden_layers"])
        cut_encoder(encoder, max(self._depths), keeps_norm=self._normed_depth is not None)
        self.visual = encoder
        self.image_size, side = image_side(values), num_sides(values)
        self.width = values["hidden_size"] * len(self._depths)
        self.grid = (side, side)
        self.requires_grad_(self.config.trainable)
        self.train()

    def _build_whitened(self, config: WhitenedConfig) -> None:
        """The tower that is learnt here, whose config tells its sizes."""
        self.visual, self._depths = WhitenedTower(config), (0,)
        self.visual.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.image_size, self.width, side = config.image_size, config.feature_width, config.num_sides
        self.grid = (side, side)
        self.requires_grad_(self.config.trainable)
        self.train()

    @property
    def needs_pictures(self) -> bool:
        """Whether `whiten` is to be called before training; asks the device."""
        return self.config.whitened is not None and not int(self._whitened().num_pictures)

    def whiten(self, images_N3HW: Iterable[Tensor]) -> int:
        """Computes the filters of a whitened tower from uint8 images, in parts; gives how many there were."""
        return self._whitened().whiten(map(self._pixels, images_N3HW))

    def _whitened(self) -> WhitenedTower:
        assert self.config.whitened is not None, "only such a tower is computed from pictures"
        return self.visual  # pyright: ignore[reportReturnType]

    @property
    def _normed_depth(self) -> int | None:
        """Of the layer of transformers' encoder whose features pass the last norm."""
        assert self.config.transformers is not None
        last = self.config.transformers["num_hidden_layers"] - 1
        return last if self.config.post_layernorm and last in self._depths else None

    def load_pretrained(self) -> None:
        """Reads the weights that the config names, if any; see `build_clip` for what it raises."""
        if self.config.checkpoint or self.config.pretrained:
            self.from_clip(build_clip(self.config))

    def from_clip(self, clip: nn.Module) -> VisionTower:
        """Copies the image encoder's weights from an open_clip model of the same config; gives self."""
        visual: Any = clip.visual
        source, _ = _cut(copy.deepcopy(visual), self.config)
        self.visual.load_state_dict(source.state_dict())  # pyright: ignore[reportAttributeAccessIssue]
        return self

    @property
    def blocks(self) -> list[nn.Module]:
        """Its repeated blocks, in the order in which they run; each is called as a module."""
        visual: Any = self.visual
        if self.config.transformers is not None:
            return encoder_layers(visual)
        if self.config.whitened is not None:
            return self._whitened().blocks
        if isinstance(visual, ModifiedResNet):
            return [
                block for name in ("layer1", "layer2", "layer3", "layer4") for block in getattr(visual, name).children()
            ]
        if isinstance(visual, TimmModel):
            trunk: Any = visual.trunk
            return list(getattr(trunk, "blocks", None) or getattr(trunk, "stages", None) or [])
        return list(visual.transformer.resblocks)

    @property
    def hash(self) -> str:
        """SHA-256 of all that decides the features; where weights are sharded, a collective call."""
        shape: list[Any] = [self.config.transformers]
        if self.config.whitened is not None:
            shape = [dataclasses.asdict(self.config.whitened)]
        elif self.config.transformers is None:
            model_config = open_clip_config(self.config)
            shape = [model_config["vision_cfg"], model_config.get("quick_gelu", False), self.config.norm]
        if len(self._depths) > 1:
            shape.append(list(self._depths))
        digest = hashlib.sha256(json.dumps([*shape, self.mean, self.std], sort_keys=True).encode())
        for name, value in sorted(self.visual.state_dict().items()):  # only up to the chosen layer: the names tell it
            value = value.full_tensor() if isinstance(value, DTensor) else value
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def train(self, mode: bool = True) -> VisionTower:
        """As `nn.Module.train`, but BatchNorm, and a frozen tower, stay in evaluation mode."""
        super().train(mode and self.config.trainable)
        for module in self.modules():
            if isinstance(module, _BATCH_NORMS):
                module.eval()
        return self

    def forward(self, images_N3HW: Tensor) -> Tensor:
        """Features [N, S, C] of uint8 images of the tower's own size.

        Raises:
            ValueError: for images of another size or type.
        """
        size = self.image_size
        if images_N3HW.dtype != torch.uint8 or images_N3HW.shape[1:] != (3, size, size):
            raise ValueError(
                f"images are {images_N3HW.dtype} {list(images_N3HW.shape)}; "
                f"this tower takes uint8 [N, 3, {size}, {size}]"
            )
        pixels = self._pixels(images_N3HW).to(next(self.visual.parameters()).dtype)
        if self.config.whitened is not None or isinstance(self.visual, ModifiedResNet):
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(self.config.trainable and torch.is_grad_enabled()):
            layers = self._spatial(pixels)
            return (layers[0] if len(layers) == 1 else torch.cat(layers, dim=1)).flatten(2).transpose(1, 2)

    def _pixels(self, images_N3HW: Tensor) -> Tensor:
        """Normalized, float32."""
        mean_311, std_311 = (_of_levels(values, images_N3HW.device) for values in (self.mean, self.std))
        return (images_N3HW - mean_311) / std_311

    def _spatial(self, pixels_N3HW: Tensor) -> list[Tensor]:
        """[N, C, h, w] of each of the layers."""
        visual: Any = self.visual
        if self.config.whitened is not None:
            return [visual(pixels_N3HW)]
        if self.config.transformers is not None:
            return encoder_features(visual, self.config.transformers, pixels_N3HW, self._depths, self._normed_depth)
        if isinstance(visual, ModifiedResNet):
            x: Any = visual.stem(pixels_N3HW)
            stages = []
            for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
                x = stage(x)
                stages.append(x)
            return [stages[depth] for depth in self._depths]
        depths = sorted(self._depths)
        if isinstance(visual, TimmModel):
            trunk: Any = visual.trunk
            found = trunk.forward_intermediates(
                pixels_N3HW, indices=depths, intermediates_only=True, norm=False, output_fmt="NCHW"
            )
        else:
            is_one, is_normed = len(depths) == 1, self.config.post_layernorm
            output = visual.forward_intermediates(
                pixels_N3HW, indices=depths, normalize_intermediates=is_one and is_normed, intermediates_only=True
            )
            found = output["image_intermediates"]
            if (
                not is_one and is_normed
            ):  # the last block's features alone are normalized, as where they are the only ones
                found[-1] = visual.ln_post(found[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return [found[depths.index(depth)] for depth in self._depths]


def _of_levels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[3, 1, 1] in levels of 8 bits, made on the device: a copy from ordinary memory would wait for it."""
    return torch.cat([torch.full((1,), value, device=device) for value in values]).view(3, 1, 1) * 255


def _cut(visual: Any, config: VisionConfig) -> tuple[nn.Module, tuple[int, ...]]:
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
        depths = _depths(layers, len(trunk.feature_info))
        trunk.prune_intermediate_layers([max(depths)], prune_norm=True, prune_head=True)
        visual.head = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
        return visual, depths
    if not isinstance(visual, VisionTransformer):
        raise ValueError(
            f"vision.open_clip gives a {type(visual).__name__}; ViT, ModifiedResNet and timm are supported"
        )
    num_blocks = len(visual.transformer.resblocks)
    depths = _depths(layers, num_blocks)
    keeps_norm = config.post_layernorm and max(depths) == num_blocks - 1
    visual.prune_intermediate_layers([max(depths)], prune_norm=not keeps_norm, prune_head=True)
    visual.attn_pool = None
    return visual, depths


def _depths(layers: tuple[int | str, ...], num_layers: int) -> tuple[int, ...]:
    """Layers counted from the first one."""
    for layer in layers:
        if not isinstance(layer, int) or not -num_layers <= layer < num_layers:
            raise ValueError(f"vision.layer is {layer!r}; this tower has layers 0 to {num_layers - 1} (or -1, -2, …)")
    depths = tuple(int(layer) % num_layers for layer in layers)
    if len(set(depths)) < len(depths):
        raise ValueError(f"vision.layer is {list(layers)}, which names a layer twice; name different ones")
    return depths
