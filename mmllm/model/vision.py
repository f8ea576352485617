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
from typing import Any, Literal

import torch
from torch import Tensor, nn

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

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of red, green and blue, by which CLIP's pixels are normalized where nothing else is said."""
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


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


def pixel_statistics(config: VisionConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of red, green and blue by which the tower's pixels are normalized."""
    if config.mean is not None and config.std is not None:
        return config.mean, config.std
    mean, std = None, None
    if config.pretrained:
        from mmllm.model.open_clip_vision import tag_statistics

        mean, std = tag_statistics(config)
    return tuple(mean or OPENAI_MEAN), tuple(std or OPENAI_STD)


def chosen_depths(layers: tuple[int | str, ...], num_layers: int) -> tuple[int, ...]:
    """Layers counted from the first one."""
    for layer in layers:
        if not isinstance(layer, int) or not -num_layers <= layer < num_layers:
            raise ValueError(f"vision.layer is {layer!r}; this tower has layers 0 to {num_layers - 1} (or -1, -2, …)")
    depths = tuple(int(layer) % num_layers for layer in layers)
    if len(set(depths)) < len(depths):
        raise ValueError(f"vision.layer is {list(layers)}, which names a layer twice; name different ones")
    return depths


class VisionTower(nn.Module):
    """An image encoder up to the chosen layer; what lies behind it is cut off.

    Weights are random until `load_pretrained`, `from_clip` or `load_state_dict`. BatchNorm always uses
    its stored statistics: a decoder's batches of a few images would ruin them, and would mix documents.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self._is_channels_last = config.whitened is not None
        self.mean, self.std = pixel_statistics(config)
        if config.transformers is not None:
            self._build_encoder(config.transformers)
            return
        if config.whitened is not None:
            self._build_whitened(config.whitened)
            return
        from mmllm.model.open_clip_vision import build_clip, cut_visual, is_resnet

        clip = build_clip(config, load=False)
        visual: Any = clip.visual
        size: Any = visual.image_size
        self.image_size = int(size if isinstance(size, int) else size[0])
        self.visual, self._depths = cut_visual(visual, config)
        self._is_channels_last = is_resnet(self.visual)
        if self._is_channels_last:  # about a fifth faster on CPUs, weights and gradients laid alike
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
        self._depths = chosen_depths(self.config.layers, values["num_hidden_layers"])
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
            from mmllm.model.open_clip_vision import build_clip

            self.from_clip(build_clip(self.config))

    def from_clip(self, clip: nn.Module) -> VisionTower:
        """Copies the image encoder's weights from an open_clip model of the same config; gives self."""
        from mmllm.model.open_clip_vision import cut_visual

        visual: Any = clip.visual
        source, _ = cut_visual(copy.deepcopy(visual), self.config)
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
        from mmllm.model.open_clip_vision import encoder_blocks

        return encoder_blocks(visual)

    @property
    def hash(self) -> str:
        """SHA-256 of all that decides the features; where weights are sharded, a collective call."""
        shape: list[Any] = [self.config.transformers]
        if self.config.whitened is not None:
            shape = [dataclasses.asdict(self.config.whitened)]
        elif self.config.transformers is None:
            from mmllm.model.open_clip_vision import open_clip_config

            model_config = open_clip_config(self.config)
            shape = [model_config["vision_cfg"], model_config.get("quick_gelu", False), self.config.norm]
        if len(self._depths) > 1:
            shape.append(list(self._depths))
        digest = hashlib.sha256(json.dumps([*shape, self.mean, self.std], sort_keys=True).encode())
        for name, value in sorted(self.visual.state_dict().items()):  # only up to the chosen layer: the names tell it
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
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
        if self._is_channels_last:
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
        from mmllm.model.open_clip_vision import spatial_features

        return spatial_features(visual, pixels_N3HW, self._depths, self.config.post_layernorm)


def _of_levels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[3, 1, 1] in levels of 8 bits, made on the device: a copy from ordinary memory would wait for it."""
    return torch.cat([torch.full((1,), value, device=device) for value in values]).view(3, 1, 1) * 255
