"""LLaVA of transformers (`LlavaForConditionalGeneration`) in: its image tower and its projector.

The text decoder inside is `mmllm.interop.decoders`', the tokenizer `mmllm.interop.tokenizers`'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mmllm.checkpoints.weights import Checkpoint, TensorSpec
from mmllm.data.samples.decode import ImageTransform
from mmllm.interop.foreign_config import read_json, refuse_custom_code
from mmllm.interop.image_processors import PROCESSOR, transform_of_folder
from mmllm.interop.towers import (
    CONFIG,
    TowerReport,
    TowerTensors,
    encoder_prefix,
    told_features,
    vision_config,
    vision_values,
)
from mmllm.model.image_projectors import ImageProjectorConfig
from mmllm.model.transformers_vision import FAMILIES, image_side, num_sides
from mmllm.model.vision import VisionConfig

IMAGE_TOKEN = "<image>"
TOWER, PROJECTOR = "vision_tower.", "multi_modal_projector."
"""What names begin with in a published checkpoint."""
_PROJECTOR_LAYERS = {"project.0": "linear_1", "project.2": "linear_2"}
_OURS = "image_projector."
_TOWERS = ("clip_vision_model", "siglip_vision_model")
_POSITION_IDS = "embeddings.position_ids"


@dataclass(frozen=True)
class LlavaParts:
    """What a LLaVA's config.json says.

    Attributes:
        text_config: of its decoder.
        vision_values: of its tower, as `VisionConfig.transformers`.
        layer: as `VisionConfig.layer`.
        projector: the image projector's.
        image_token_id: of the token that stands for a picture's features, once for each.
        num_image_tokens: of a picture.
    """

    text_config: dict[str, Any]
    vision_values: dict[str, Any]
    layer: int | tuple[int, ...]
    projector: ImageProjectorConfig
    image_token_id: int
    num_image_tokens: int


def llava_parts(path: Path, config: Mapping[str, Any]) -> LlavaParts:
    """The parts of a LLaVA, by its config.json.

    Args:
        path: of the file, for messages.
        config: what is in it.

    Raises:
        ValueError: it isn't a LLaVA's, or describes what isn't computed here; the message names the field.
        ModuleNotFoundError: without transformers.
    """
    refuse_custom_code(path, config)
    if config.get("model_type") != "llava":
        raise ValueError(f"{path}: model_type is {config.get('model_type')!r}; wanted 'llava'")
    for key in ("text_config", "vision_config"):
        if not isinstance(config.get(key), dict):
            raise ValueError(f"{path}: {key} is {config.get(key)!r}; wanted an object; copy the checkpoint again")
    text = {"model_type": "llama", **config["text_config"]}
    if config.get("tie_word_embeddings"):
        text["tie_word_embeddings"] = True
    kind = config["vision_config"].get("model_type", "clip_vision_model")
    if kind not in _TOWERS:
        raise ValueError(f"{path}: vision_config.model_type is {kind!r}; LLaVA is imported with {' or '.join(_TOWERS)}")
    values = vision_values(path, config["vision_config"], kind)
    _check_features(path, config, kind)
    act = config.get("projector_hidden_act", "gelu")
    if act != "gelu":
        raise ValueError(f"{path}: projector_hidden_act is {act!r}; only 'gelu' can be imported")
    bias = config.get("multimodal_projector_bias", True)
    token = config.get("image_token_index", config.get("image_token_id", 32000))
    if not isinstance(token, int) or token < 0:
        raise ValueError(f"{path}: image_token_index is {token!r}; wanted a token's id")
    projector = ImageProjectorConfig("llava", bias=bool(bias))
    layer = _layers(path, config.get("vision_feature_layer", -2), values["num_hidden_layers"])
    return LlavaParts(text, values, layer, projector, token, num_sides(values) ** 2)


def _check_features(path: Path, config: Mapping[str, Any], kind: str) -> None:
    """Makes sure that the features are those of all patches, and of nothing else."""
    key, has_class_token = "vision_feature_select_strategy", FAMILIES[kind].has_class_token
    strategy, wanted = config.get(key, "default"), "default" if has_class_token else "full"
    if strategy == wanted:
        return
    why = f"of a {kind} only {wanted!r} can be imported"
    if strategy == "full":
        why += ": 'full' keeps the class token's features beside those of the patches"
    if strategy == "default":
        why += ": 'default' leaves out the first patch, since there is no class token"
    raise ValueError(f"{path}: {key} is {strategy!r}; {why}")


def _layers(path: Path, given: Any, num_layers: int) -> int | tuple[int, ...]:
    """`VisionConfig.layer` of `vision_feature_layer`, which counts the embeddings as the first."""
    several = given if isinstance(given, list) else [given]
    if not several or not all(
        isinstance(each, int) and not isinstance(each, bool) and each and -num_layers <= each <= num_layers
        for each in several
    ):
        raise ValueError(
            f"{path}: vision_feature_layer is {given!r}; wanted layers from 1 to {num_layers}, or from -{num_layers} "
            f"to -1: features of the embeddings, before all layers, can't be imported"
        )
    layers = [each - 1 if each > 0 else each for each in several]
    return tuple(layers) if len(layers) > 1 else layers[0]


@dataclass(frozen=True)
class ImportedLlava:
    """A LLaVA's tower and projector, and what is to be known for the rest.

    Attributes:
        parts: what its config.json says; `parts.text_config` is for `DecoderReader`.
        vision: the tower's config.
        transform: how pictures reach it.
        image_token: the token that stands for a picture's features.
        elsewhere: what the names of the tensors begin with that aren't the decoder's.
        specs: of the tower's and the projector's tensors, by their names in the model's state dict.
        rest: tensors of the tower behind the chosen layer, by their published names: without them a checkpoint can't
            go out again as it came.
        report: what came, and what stayed behind.
        read: gives a tensor of `specs`.
        read_rest: gives a tensor of `rest`.
    """

    parts: LlavaParts
    vision: VisionConfig
    transform: ImageTransform
    image_token: str
    elsewhere: tuple[str, ...]
    specs: dict[str, TensorSpec]
    rest: dict[str, TensorSpec]
    report: TowerReport
    read: Callable[[str], Tensor]
    read_rest: Callable[[str], Tensor]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All of `specs`, one after another."""
        for name in self.specs:
            yield name, self.read(name)


def read_llava(folder: str | Path, checkpoint: Checkpoint | None = None) -> ImportedLlava:
    """A LLaVA's tower and projector; no tensor is read before it is asked for.

    Args:
        folder: of the checkpoint, with its processor's files.
        checkpoint: its weights, where they are open already.

    Raises:
        FileNotFoundError: a file isn't there.
        ValueError: as `llava_parts`; or a tensor is missing, unknown or of another shape, or pictures can't be made to
            the pixel.
        ModuleNotFoundError: without transformers.
    """
    folder = Path(folder)
    parts = llava_parts(folder / CONFIG, read_json(folder / CONFIG))
    values = parts.vision_values
    transform = transform_of_folder(folder, values["model_type"], image_side(values))
    vision = vision_config(values, transform, parts.layer, post_layernorm=False)
    checkpoint = checkpoint or Checkpoint.open(folder)
    prefix = encoder_prefix(checkpoint, folder)
    root = prefix[: prefix.index(TOWER) + len(TOWER)] if TOWER in prefix else prefix
    tower = TowerTensors(vision, checkpoint, lambda name: prefix + name, str(folder))
    before = _projector_prefix(checkpoint, folder)
    theirs = {name: before + published for name, published in projector_names(parts.projector).items()}
    specs = tower.specs | {name: _projector_spec(checkpoint, folder, theirs, name, tower, parts) for name in theirs}
    used = {*tower.theirs.values(), *theirs.values()}
    published = {TOWER + name.removeprefix(prefix): name for name in checkpoint.specs if name.startswith(root)}
    rest = {ours: name for ours, name in published.items() if name not in used and not name.endswith(_POSITION_IDS)}
    beginning = before + PROJECTOR
    unknown = [name for name in checkpoint.specs if name.startswith(beginning) and name not in used]
    if unknown:
        raise ValueError(
            f"{folder} has the tensor {unknown[0]}, but its config says nothing of it; the two are of different "
            f"models: copy both again"
        )
    names = tower.theirs | theirs
    processor = read_json(folder / PROCESSOR) if (folder / PROCESSOR).is_file() else {}
    return ImportedLlava(
        parts=parts,
        vision=vision,
        transform=transform,
        image_token=str(processor.get("image_token") or IMAGE_TOKEN),
        elsewhere=(root, beginning),
        specs=specs,
        rest={ours: checkpoint.specs[name] for ours, name in rest.items()},
        report=TowerReport(str(folder), told_features(tower.tower), _behind(rest.values())),
        read=lambda name: checkpoint.read(names[name]),
        read_rest=lambda name: checkpoint.read(rest[name]),
    )


def _behind(names: Any) -> dict[str, int]:
    """Numbers of a tower's tensors, by layer."""
    counts: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        numbers = [index + 1 for index, part in enumerate(parts) if part.isdigit()]
        group = ".".join(parts[: numbers[0]] if numbers else parts[:-1])
        counts[group] = counts.get(group, 0) + 1
    return counts


def projector_names(config: ImageProjectorConfig) -> dict[str, str]:
    """Our names of the projector's tensors, to those published."""
    kinds = ("weight", "bias") if config.bias else ("weight",)
    return {
        f"{_OURS}{ours}.{kind}": f"{PROJECTOR}{theirs}.{kind}"
        for ours, theirs in _PROJECTOR_LAYERS.items()
        for kind in kinds
    }


def _projector_prefix(checkpoint: Checkpoint, folder: Path) -> str:
    """What comes before the published names of the projector's tensors."""
    end = f"{PROJECTOR}linear_1.weight"
    found = [name.removesuffix(end) for name in checkpoint.specs if name.endswith(end)]
    if len(found) != 1:
        raise ValueError(f"{folder} has {len(found)} tensors {end}; wanted one; copy the whole checkpoint")
    return found[0]


def _projector_spec(
    checkpoint: Checkpoint, folder: Path, theirs: Mapping[str, str], name: str, tower: TowerTensors, parts: LlavaParts
) -> TensorSpec:
    spec = checkpoint.specs.get(theirs[name])
    if spec is None:
        raise ValueError(f"{folder} lacks the tensor {theirs[name]}; copy the whole checkpoint")
    if not spec.dtype.is_floating_point or spec.dtype.itemsize < 2:
        raise ValueError(
            f"{folder}: the tensor {theirs[name]} is {spec.dtype}; wanted float32, bfloat16 or float16: take weights "
            f"that aren't quantized"
        )
    width = parts.text_config.get("hidden_size", spec.shape[0])
    shape = (width,) if name.endswith("bias") else (width, tower.tower.width if ".0." in name else width)
    if spec.shape != shape:
        raise ValueError(
            f"{folder}: the tensor {theirs[name]} has shape {list(spec.shape)}, its config says {list(shape)}; the two "
            f"are of different models: copy both again"
        )
    return spec
