"""LLaVA of transformers (`LlavaForConditionalGeneration`) out: a model's image tower and projector as it has them.

The text decoder goes by `mmllm.interop.decoders.DecoderWriter`, under the names of `decoder_names.LLAVA`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm.checkpoints.weights import TensorSpec
from mmllm.data.samples.decode import ImageTransform
from mmllm.interop.clip_names import ClipTower
from mmllm.interop.image_processors import image_processor_of
from mmllm.interop.llava import IMAGE_TOKEN, TOWER, projector_names
from mmllm.interop.towers import CONFIG, PREFIX, vision_values
from mmllm.model.multimodal import ModelConfig
from mmllm.model.transformers_vision import FAMILIES, num_sides
from mmllm.model.vision import VisionConfig


class LlavaWriter:
    """The tower and the projector of a model as a published LLaVA has them.

    Args:
        config: the model's.
        specs: of our tensors; more than the tower's and the projector's are not minded.
        transform: how pictures reach the tower.
        text_config: of the decoder, as its family's config.json.
        image_token_id: of the token that stands for a picture's features.
        rest: tensors of the tower behind the chosen layer, as `ImportedLlava.rest` had them. Without them the tower
            ends at that layer, and its last norm does nothing.
        base: config.json of the LLaVA that the model was imported from; what is still so stays as it is written there.

    Attributes:
        config: config.json.
        processor: processor_config.json, the image processor's config in it.
        specs: of their tensors, by published names.
        notes: what isn't quite as here.

    Raises:
        ValueError: LLaVA can't compute what the model does with pictures; the message names the switch.
    """

    def __init__(
        self,
        config: ModelConfig,
        specs: Mapping[str, TensorSpec],
        transform: ImageTransform,
        text_config: Mapping[str, Any],
        image_token_id: int,
        rest: Mapping[str, TensorSpec] | None = None,
        base: Mapping[str, Any] | None = None,
    ):
        vision = check_llava(config)
        self._tower = ClipTower(vision)
        values = self._tower.values
        ours = {name.removeprefix(PREFIX): spec for name, spec in specs.items() if name.startswith(PREFIX)}
        self._depths = [int(layer) % values["num_hidden_layers"] for layer in vision.layers]  # pyright: ignore
        pieces = {TOWER + name: piece for name, piece in self._tower.pieces(ours).items()}
        self._rest = self._whole_rest(rest or {}, max(self._depths))
        self._ends: dict[str, Tensor] = {}
        depth = values["num_hidden_layers"]
        if not self._rest:
            depth = max(self._depths) + 1
            self._ends = self._norm_without_effect(ours)
        self._pieces = pieces
        self._projector = {theirs: name for name, theirs in projector_names(config.image_projector).items()}
        self.specs: dict[str, TensorSpec] = {name: piece.spec for name, piece in pieces.items()}
        self.specs |= {name: TensorSpec(end.dtype, tuple(end.shape)) for name, end in self._ends.items()}
        self.specs |= self._rest
        self.specs |= {theirs: specs[name] for theirs, name in self._projector.items()}
        family = FAMILIES[values["model_type"]]
        strategy = "default" if family.has_class_token else "full"
        self.config = self._config(config, values | {"num_hidden_layers": depth}, text_config, image_token_id, base)
        self.config["vision_feature_select_strategy"] = strategy
        image_processor, notes = image_processor_of(transform, values["model_type"])
        self.notes = tuple(notes)
        self.processor = {
            "image_processor": image_processor,
            "image_token": IMAGE_TOKEN,
            "num_additional_image_tokens": int(family.has_class_token),
            "patch_size": values["patch_size"],
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": strategy,
        }

    def _whole_rest(self, rest: Mapping[str, TensorSpec], depth: int) -> dict[str, TensorSpec]:
        """`rest`, where it has all that is missing behind `depth`."""
        wanted = {TOWER + name for name in self._tower.names_behind(depth)}
        return dict(rest) if wanted <= set(rest) else {}

    def _norm_without_effect(self, ours: Mapping[str, TensorSpec]) -> dict[str, Tensor]:
        """The norm behind the last layer, which LLaVA has and doesn't use."""
        width, dtype = self._tower.values["hidden_size"], next(iter(ours.values())).dtype
        name = f"{TOWER}post_layernorm."
        return {f"{name}weight": torch.ones(width, dtype=dtype), f"{name}bias": torch.zeros(width, dtype=dtype)}

    def _config(
        self,
        config: ModelConfig,
        values: dict[str, Any],
        text_config: Mapping[str, Any],
        image_token_id: int,
        base: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        vision = dict(values)
        if not FAMILIES[values["model_type"]].has_class_token:
            vision["vision_use_head"] = any(name.startswith(f"{TOWER}head.") for name in self._rest)
        if base is not None and vision_values(Path(CONFIG), base["vision_config"], values["model_type"]) == values:
            vision = base["vision_config"]
        layers = self._feature_layers(config.vision, values["num_hidden_layers"])  # pyright: ignore[reportArgumentType]
        text = {key: value for key, value in text_config.items() if key != "transformers_version"}
        return {
            "architectures": ["LlavaForConditionalGeneration"],
            **(base or self._dtype(text_config)),
            "model_type": "llava",
            "image_seq_length": (base or {}).get("image_seq_length", num_sides(values) ** 2),
            "image_token_index": image_token_id,
            "multimodal_projector_bias": config.image_projector.bias,
            "projector_hidden_act": "gelu",
            "text_config": text,
            "tie_word_embeddings": config.decoder.tie_word_embeddings,
            "vision_config": vision,
            "vision_feature_layer": layers,
        }

    def _dtype(self, text_config: Mapping[str, Any]) -> dict[str, str]:
        """What all of it is loaded in: the decoder's, which is most of it; of the tower's where nothing is said."""
        told = text_config.get("dtype", text_config.get("torch_dtype"))
        return {"dtype": told or str(next(iter(self.specs.values())).dtype).removeprefix("torch.")}

    def _feature_layers(self, vision: VisionConfig, num_layers: int) -> int | list[int]:
        """`vision_feature_layer`: from the end where it was told so or the tower ends earlier, else from the front."""
        told = [
            int(layer) if int(layer) < 0 and self._rest else depth - num_layers if not self._rest else depth + 1
            for layer, depth in zip(vision.layers, self._depths, strict=True)
        ]
        return told if len(told) > 1 else told[0]

    def tensors(
        self, read: Callable[[str], Tensor], read_rest: Callable[[str], Tensor] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """All of `specs`, one after another.

        Args:
            read: gives one of our tensors by its name.
            read_rest: gives one of `rest`.
        """
        for name in self.specs:
            if name in self._pieces:
                yield name, self._pieces[name].of(lambda ours: read(PREFIX + ours))
            elif name in self._ends:
                yield name, self._ends[name]
            elif name in self._projector:
                yield name, read(self._projector[name])
            else:
                assert read_rest is not None, "what gave rest gives its tensors too"
                yield name, read_rest(name)


def check_llava(config: ModelConfig) -> VisionConfig:
    """The tower's config, of a model whose pictures LLaVA can compute.

    Raises:
        ValueError: it can't; the message names the switch.
    """
    vision, projector = config.vision, config.image_projector
    if vision is None:
        raise ValueError("the model has no image tower; export it as decoder")
    if projector.kind != "llava":
        raise ValueError(
            f"image_projector.kind is {projector.kind!r}, which LLaVA doesn't compute; train with kind: llava to "
            f"export pictures, or export as decoder"
        )
    if projector.max_tiles > 1:
        raise ValueError(
            f"image_projector.max_tiles is {projector.max_tiles}; LLaVA doesn't cut pictures into tiles: train with a "
            f"tokenizer folder without tiling to export pictures, or export as decoder"
        )
    if projector.max_number:
        raise ValueError(
            f"image_projector.max_number is {projector.max_number}; LLaVA doesn't number pictures: train with 0 to "
            f"export pictures, or export as decoder"
        )
    if projector.hidden_size not in (None, config.decoder.hidden_size):
        raise ValueError(
            f"image_projector.hidden_size is {projector.hidden_size}; LLaVA's is the decoder's, "
            f"{config.decoder.hidden_size}: leave it out to export pictures"
        )
    tower = ClipTower(vision)  # refuses encoders that LLaVA's towers can't compute
    last = tower.values["num_hidden_layers"] - 1
    if vision.post_layernorm and any(int(layer) in (-1, last) for layer in vision.layers):
        raise ValueError(
            f"vision.post_layernorm is true and vision.layer {list(vision.layers)} has the last; LLaVA takes its "
            f"features before that norm: train with post_layernorm: false, or an earlier layer, to export pictures"
        )
    return dataclasses.replace(vision, post_layernorm=False)
