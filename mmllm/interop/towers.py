"""Pretrained image encoders in: of open_clip by name, tag, file or folder; CLIP, SigLIP and SigLIP2 of transformers.

What comes is a `VisionConfig`, how pictures reach it, and its tensors by our names, one after another. Text towers,
heads and layers behind the chosen one stay behind, by name. Only safetensors are read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.pretrained import get_pretrained_cfg
from open_clip.transform import PreprocessCfg
from torch import Tensor

from mmllm.checkpoints.weights import Checkpoint, TensorSpec
from mmllm.data.samples.decode import ImageTransform
from mmllm.interop.foreign_config import read_json, refuse_custom_code
from mmllm.interop.image_processors import transform_of_folder, transform_of_open_clip
from mmllm.interop.library import transformers_library
from mmllm.model.config import config_from_dict
from mmllm.model.open_clip_vision import open_clip_config
from mmllm.model.transformers_vision import FAMILIES, check_config, image_side
from mmllm.model.vision import VisionConfig, VisionTower, pixel_statistics

CONFIG = "config.json"
OPEN_CLIP_CONFIG = "open_clip_config.json"
PREFIX = "vision."
"""Of the tower in the model."""
VISION_MODELS = {
    "clip": "clip_vision_model",
    "clip_vision_model": "clip_vision_model",
    "siglip": "siglip_vision_model",
    "siglip_vision_model": "siglip_vision_model",
    "siglip2": "siglip2_vision_model",
    "siglip2_vision_model": "siglip2_vision_model",
}
"""By `model_type` of a checkpoint of transformers, that of its vision model."""
_PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".jit", ".th")
_ENCODER = "vision_model."
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Layers = int | str | tuple[int | str, ...]


@dataclass(frozen=True)
class TowerReport:
    """What came of a checkpoint, and what didn't.

    Attributes:
        source: what was asked for.
        features: which are given, in words.
        left_out: numbers of tensors, by what their names begin with.
        notes: what else is to be known.
    """

    source: str
    features: str
    left_out: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImportedTower:
    """An image encoder from elsewhere.

    Attributes:
        vision: its config.
        transform: how pictures reach it.
        specs: of its tensors, by their names in the model's state dict.
        report: what came, and what stayed behind.
        read: gives a tensor by such a name.
    """

    vision: VisionConfig
    transform: ImageTransform
    specs: dict[str, TensorSpec]
    report: TowerReport
    read: Callable[[str], Tensor]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All of `specs`, one after another."""
        for name in self.specs:
            yield name, self.read(name)


def read_tower(source: str | Path, layer: Layers = -1, post_layernorm: bool | None = None) -> ImportedTower:
    """An image encoder from elsewhere; no tensor is read before it is asked for.

    Args:
        source: folder of a checkpoint of transformers (`config.json`) or of open_clip (`open_clip_config.json`), or
            what training CLIP here wrote (`ClipModule`'s `out`); or `NAME` (random weights), `NAME:TAG` (weights that
            lie in Hugging Face's cache) or `NAME:FILE` of open_clip.
        layer: as `VisionConfig.layer`.
        post_layernorm: as there; None: as the library gives its last layer's features: open_clip and SigLIP through
            the norm, transformers' CLIP without it.

    Raises:
        FileNotFoundError: a file or folder isn't there. Nothing is downloaded.
        ValueError: the weights are pickled or TorchScript, quantized, or not those of the config; the config is of
            another model or custom code; or its pictures can't be made to the pixel.
        ModuleNotFoundError: it is of transformers, which isn't installed.
    """
    text = str(source)
    if Path(text).is_dir():
        folder = Path(text)
        if (folder / CONFIG).is_file():
            return _of_transformers(folder, layer, post_layernorm)
        if (folder / OPEN_CLIP_CONFIG).is_file():
            return _of_open_clip_folder(folder, layer, post_layernorm)
        raise FileNotFoundError(
            f"{folder} has neither {CONFIG} nor {OPEN_CLIP_CONFIG}; give the folder of a vision model of transformers "
            f"or open_clip"
        )
    name, _, weights = text.partition(":")
    if Path(text).is_file() or open_clip.get_model_config(name) is None:
        what = (
            "a file, which doesn't say of what model" if Path(text).is_file() else "no folder, nor a name of open_clip"
        )
        raise ValueError(
            f"the tower {text!r} is {what}; give a folder, or NAME, NAME:TAG or NAME:FILE with a name of "
            f"open_clip.list_models()"
        )
    return _of_open_clip_name(name, weights, layer, post_layernorm)


# --- transformers ---------------------------------------------------------------------------------------------


def _of_transformers(folder: Path, layer: Layers, post_layernorm: bool | None) -> ImportedTower:
    path = folder / CONFIG
    config = read_json(path)
    if config.get("format") == "mmllm":
        raise ValueError(f"{path} is of a model of mmllm, not of a vision model; start from it with init_from")
    refuse_custom_code(path, config)
    kind = config.get("model_type")
    if kind is None and "open_clip" in config:
        return _of_clip_run(folder, config, layer, post_layernorm)
    if kind not in VISION_MODELS:
        raise ValueError(f"{path}: model_type is {kind!r}; vision models of {', '.join(VISION_MODELS)} can be imported")
    values = vision_values(path, config if kind in FAMILIES else _nested(path, config), VISION_MODELS[kind])
    transform = transform_of_folder(folder, values["model_type"], image_side(values), values.get("num_patches"))
    vision = vision_config(values, transform, layer, post_layernorm)
    checkpoint = Checkpoint.open(folder)
    prefix = encoder_prefix(checkpoint, folder)
    notes = []
    if (folder / OPEN_CLIP_CONFIG).is_file():
        notes.append(f"{OPEN_CLIP_CONFIG} is there too, and not used")
    if "num_patches" in values:
        notes.append(
            f"pictures are squares of {image_side(values)} pixels ({values['num_patches']} patches); grids of other "
            f"proportions, which this model knows too, are not used"
        )
    return _imported(str(folder), vision, transform, checkpoint, lambda name: prefix + name, notes)


def _nested(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """`vision_config` of a model with two towers, with what early checkpoints say in `vision_config_dict`."""
    nested = config.get("vision_config") or {}
    if not isinstance(nested, dict):
        raise ValueError(f"{path}: vision_config is {nested!r}; wanted an object")
    earlier = config.get("vision_config_dict")
    if earlier:  # wins with its defaults, as in transformers
        name = FAMILIES[VISION_MODELS[config["model_type"]]].config
        nested = nested | getattr(transformers_library(), name)(**earlier).to_dict()
    return nested


def vision_values(path: Path, config: Mapping[str, Any], model_type: str | None = None) -> dict[str, Any]:
    """`VisionConfig.transformers` of a vision model's config: all that decides the features, defaults included.

    Args:
        path: of the config.json, for messages.
        config: the vision model's.
        model_type: its type; None: what `config` says.

    Raises:
        ValueError: it isn't a config of such a model, or a size isn't a square's.
        ModuleNotFoundError: without transformers, whose defaults these are.
    """
    kind = model_type or config.get("model_type")
    kind = VISION_MODELS.get(str(kind))
    if kind is None:
        raise ValueError(
            f"{path}: vision_config.model_type is {config.get('model_type')!r}; {', '.join(FAMILIES)} can be imported"
        )
    family, transformers = FAMILIES[kind], transformers_library()
    from huggingface_hub.errors import StrictDataclassError
    from transformers.activations import ACT2FN

    given = {key: _side(path, key, value) for key, value in config.items() if key in family.keys}
    try:
        filled = getattr(transformers, family.config)(**given)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ValueError(f"{path}: no config of a {kind}: {error}") from error
    values = {key: getattr(filled, key) for key in family.keys}
    if values["hidden_act"] not in ACT2FN:
        raise ValueError(f"{path}: hidden_act is {values['hidden_act']!r}, which transformers doesn't know")
    values = {"model_type": kind, **values}
    check_config(values, f"{path}: ")
    return values


def _side(path: Path, key: str, value: Any) -> Any:
    """A size that may be told twice, as rows and columns."""
    if not isinstance(value, (list, tuple)):
        return value
    if len(set(value)) != 1:
        raise ValueError(f"{path}: {key} is {list(value)}; only squares can be imported")
    return value[0]


def vision_config(
    values: Mapping[str, Any], transform: ImageTransform, layer: Layers, post_layernorm: bool | None
) -> VisionConfig:
    """Of a vision model of transformers."""
    if post_layernorm is None:
        post_layernorm = not FAMILIES[values["model_type"]].has_class_token
    return VisionConfig(
        transformers=dict(values),
        mean=transform.mean,
        std=transform.std,
        layer=layer,
        post_layernorm=post_layernorm,
    )


def encoder_prefix(checkpoint: Checkpoint, folder: Path) -> str:
    """What the names of the image encoder's tensors begin with, which differs by version and by what is around it.

    Raises:
        ValueError: there is no such encoder.
    """
    ends = ("embeddings.patch_embedding.weight",)
    found = [name.removesuffix(end) for name in checkpoint.specs for end in ends if name.endswith(end)]
    if len(found) != 1:
        raise ValueError(
            f"{folder} has {len(found)} tensors that end with {ends[0]}; wanted one, of the image encoder; copy the "
            f"checkpoint again"
        )
    return found[0]


# --- open_clip ------------------------------------------------------------------------------------------------


def _of_open_clip_name(name: str, weights: str, layer: Layers, post_layernorm: bool | None) -> ImportedTower:
    """`NAME`, `NAME:TAG` or `NAME:FILE`."""
    source = f"{name}:{weights}" if weights else name
    tag = get_pretrained_cfg(name, weights) if weights else {}
    checkpoint, notes = None, []
    if Path(weights).suffix in _PICKLED:
        raise _pickled(name, weights)
    if tag:
        checkpoint = Checkpoint.open_file(_cached(name, weights, tag))
    elif weights:
        if not Path(weights).is_file():
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
            raise FileNotFoundError(f"{weights!r} of {source} is neither a file nor a tag; open_clip knows {tags}")
        _check_unambiguous(name, weights)
        checkpoint = Checkpoint.open_file(weights)
    else:
        notes.append("no weights were named: they are random")
    values = open_clip_config(VisionConfig(name, weights if tag else None))
    return _of_open_clip(source, values, tag, checkpoint, layer, post_layernorm, notes)


def _pickled(name: str, weights: str) -> ValueError:
    return ValueError(
        f"{weights} is a pickle or TorchScript, which can execute code and is never read; where you trust it, make "
        f"safetensors of it: `import open_clip, safetensors.torch as s; m = open_clip.create_model({name!r}, "
        f"pretrained={weights!r}); s.save_file({{k: v.contiguous() for k, v in m.state_dict().items()}}, "
        f"'{name}.safetensors')`, and give {name}:{name}.safetensors"
    )


def _cached(name: str, tag: str, known: Mapping[str, Any]) -> str:
    """A tag's safetensors in Hugging Face's cache."""
    from huggingface_hub import try_to_load_from_cache

    repository, filename = (known.get("hf_hub") or "/").rsplit("/", 1)
    candidates = [*([filename] if filename.endswith(".safetensors") else []), HF_SAFE_WEIGHTS_NAME]
    for candidate in candidates if repository else []:
        found = try_to_load_from_cache(repository, candidate)
        if isinstance(found, str):
            return found
    pickled = [try_to_load_from_cache(repository, filename or HF_WEIGHTS_NAME)] if repository else []
    url = Path(str(known.get("url", ""))).name
    pickled += [str(Path("~/.cache/clip").expanduser() / url)] if url else []
    for path in pickled:
        if isinstance(path, str) and Path(path).is_file():
            raise _pickled(name, path)
    raise FileNotFoundError(
        f"the weights of {name} {tag} are not in Hugging Face's cache as safetensors; download "
        f"{repository or 'them'} there, or give {name}:FILE"
    )


def _check_unambiguous(name: str, weights: str) -> None:
    """A file says nothing of its pixels: the model's known weights must all want them as open_clip does by default.

    Raises:
        ValueError: some want them otherwise.
    """
    usual = dataclasses.asdict(PreprocessCfg())
    for tag in open_clip.list_pretrained_tags_by_model(name):
        known = get_pretrained_cfg(name, tag)
        other = next((key for key in ("mean", "std", "interpolation", "resize_mode") if known[key] != usual[key]), None)
        if other is not None:
            raise ValueError(
                f"{weights} doesn't say how its pictures are made, and of {name} {tag} wants {other} {known[other]} in "
                f"the place of {usual[other]}; put it as {HF_SAFE_WEIGHTS_NAME} beside an {OPEN_CLIP_CONFIG} with "
                f"model_cfg and preprocess_cfg, and give that folder"
            )


def _of_open_clip_folder(folder: Path, layer: Layers, post_layernorm: bool | None) -> ImportedTower:
    path = folder / OPEN_CLIP_CONFIG
    config = read_json(path)
    model, preprocess = (config.get(key) for key in ("model_cfg", "preprocess_cfg"))
    if not isinstance(model, dict) or not isinstance(preprocess, dict):
        missing = "preprocess_cfg" if isinstance(model, dict) else "model_cfg"
        raise ValueError(f"{path}: {missing} is {config.get(missing)!r}; wanted an object, as open_clip writes it")
    weights = folder / HF_SAFE_WEIGHTS_NAME
    if not weights.is_file():
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)
        if pickled:
            raise _pickled("NAME", str(folder / pickled[0]))
        raise FileNotFoundError(f"{weights} doesn't exist; copy the whole folder of the model")
    return _of_open_clip(str(folder), model, preprocess, Checkpoint.open_file(weights), layer, post_layernorm, [])


def _of_clip_run(folder: Path, config: Mapping[str, Any], layer: Layers, post_layernorm: bool | None) -> ImportedTower:
    """What training CLIP here wrote: an open_clip model by name or as its config, and how pixels are normalized."""
    checkpoint = Checkpoint.open(folder)
    vision = config_from_dict(
        VisionConfig,
        {**config, "layer": layer, "post_layernorm": post_layernorm is not False},
        str(folder / CONFIG),
    )
    mean, std = pixel_statistics(vision)
    vision = dataclasses.replace(vision, mean=mean, std=std)
    with torch.device("meta"):
        transform = ImageTransform(VisionTower(vision).image_size, mean, std)  # pyright: ignore[reportArgumentType]
    notes = ["pictures are squashed to squares, which is what training CLIP does by default; its folder doesn't say"]
    return _imported(str(folder), vision, transform, checkpoint, lambda name: f"visual.{name}", notes)


def _of_open_clip(
    source: str,
    values: dict[str, Any],
    preprocess: Mapping[str, Any],
    checkpoint: Checkpoint | None,
    layer: Layers,
    post_layernorm: bool | None,
    notes: list[str],
) -> ImportedTower:
    """A tower of open_clip, by its model's config and what is done with pictures."""
    if "hf_model_name" in values.get("text_cfg", {}):
        raise ValueError(
            f"{source}: text_cfg.hf_model_name is {values['text_cfg']['hf_model_name']!r}, a text tower that needs the "
            f"network to be built; take a model with open_clip's own text tower"
        )
    vision = VisionConfig(values, layer=layer, post_layernorm=post_layernorm is not False)
    with torch.device("meta"):
        size = VisionTower(vision).image_size
    transform = transform_of_open_clip(source, preprocess, size)
    vision = dataclasses.replace(vision, mean=transform.mean, std=transform.std)
    if checkpoint is not None:
        return _imported(source, vision, transform, checkpoint, lambda name: f"visual.{name}", notes)
    tower = VisionTower(vision)
    state = {PREFIX + name: tensor.detach() for name, tensor in tower.state_dict().items()}
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    report = TowerReport(source, told_features(tower), notes=tuple(notes))
    return ImportedTower(vision, transform, specs, report, state.__getitem__)


# --- both -----------------------------------------------------------------------------------------------------


def _imported(
    source: str,
    vision: VisionConfig,
    transform: ImageTransform,
    checkpoint: Checkpoint,
    their_name: Callable[[str], str],
    notes: list[str],
) -> ImportedTower:
    tensors = TowerTensors(vision, checkpoint, their_name, source)
    report = TowerReport(source, told_features(tensors.tower), tensors.left_out(), tuple(notes))
    return ImportedTower(vision, transform, tensors.specs, report, tensors.read)


class TowerTensors:
    """A tower's tensors in a checkpoint.

    Args:
        vision: the tower's config.
        checkpoint: where they lie.
        their_name: by which, from the name in the encoder.
        source: what errors call the checkpoint.

    Attributes:
        tower: on the meta device.
        specs: of the tensors that are used, by our names.
        theirs: their names there, by ours.

    Raises:
        ValueError: one is missing, has another shape, or is of no type that products take.
    """

    def __init__(self, vision: VisionConfig, checkpoint: Checkpoint, their_name: Callable[[str], str], source: str):
        depth = (vision.transformers or {}).get("num_hidden_layers", 0)
        if depth > len(checkpoint.specs):  # before so many are made
            raise ValueError(
                f"{source}: num_hidden_layers is {depth}, but there are {len(checkpoint.specs)} tensors; the two are "
                f"of different models: copy both again"
            )
        with torch.device("meta"):
            self.tower = VisionTower(vision)
        self._checkpoint, self._source = checkpoint, source
        state = self.tower.state_dict()
        self.theirs = {PREFIX + name: their_name(name.removeprefix("visual.")) for name in state}
        self.specs = {PREFIX + name: self._spec(PREFIX + name, tensor) for name, tensor in state.items()}

    def _spec(self, name: str, tensor: Tensor) -> TensorSpec:
        theirs = self.theirs[name]
        spec = self._checkpoint.specs.get(theirs)
        if spec is None:
            raise ValueError(
                f"{self._source} lacks the tensor {theirs}; it isn't the model that its config says, or not the whole "
                f"of it; copy it again"
            )
        if spec.shape != tuple(tensor.shape):
            raise ValueError(
                f"{self._source}: the tensor {theirs} has shape {list(spec.shape)}, its config says "
                f"{list(tensor.shape)}; the two are of different models: copy both again"
            )
        if tensor.is_floating_point() and spec.dtype not in _FLOATS:
            raise ValueError(
                f"{self._source}: the tensor {theirs} is {spec.dtype}; wanted float32, bfloat16 or float16: take "
                f"weights that aren't quantized"
            )
        return spec

    def read(self, name: str) -> Tensor:
        """A tensor, by our name."""
        return self._checkpoint.read(self.theirs[name])

    def left_out(self, also_used: tuple[str, ...] = ()) -> dict[str, int]:
        """Numbers of the checkpoint's other tensors, by what their names begin with.

        Args:
            also_used: beginnings of names that others read.
        """
        used = set(self.theirs.values())
        counts: dict[str, int] = {}
        for name in self._checkpoint.specs:
            if name not in used and not name.startswith(also_used or ("\0",)):
                counts[_group(name)] = counts.get(_group(name), 0) + 1
        return counts


def _group(name: str) -> str:
    """By what a tensor is told: a layer of the image encoder by its number, other things by their first name."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    is_of_pictures = parts[0] in ("visual", "vision_model", "vision_tower", "encoder") or "vision_tower" in parts[:2]
    if is_of_pictures and numbers:
        return ".".join(parts[: numbers[0] + 1])
    return ".".join(parts[:-1] if is_of_pictures and len(parts) > 2 else parts[:1])


def told_features(tower: VisionTower) -> str:
    """Which features a tower gives, in words."""
    vision, (rows, columns) = tower.config, tower.grid
    layers = ", ".join(str(layer) for layer in vision.layers)
    words = f"layer {layers}: {rows} x {columns} features of {tower.width} channels"
    last = num_layers(vision)
    if last is not None and any(isinstance(layer, int) and layer in (-1, last - 1) for layer in vision.layers):
        words += ", the last layer's " + ("through" if vision.post_layernorm else "without") + " the norm behind it"
    return words


def num_layers(vision: VisionConfig) -> int | None:
    """Of a ViT with a norm behind its last; None: it has no such norm."""
    if vision.transformers is not None:
        return vision.transformers["num_hidden_layers"]
    values = open_clip_config(vision)["vision_cfg"]
    is_vit = "timm_model_name" not in values and isinstance(values.get("layers", 12), int)
    return values.get("layers", 12) if is_vit else None
