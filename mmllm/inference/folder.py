"""A model on disk: a folder of JSON, safetensors and a model card. Loading it never unpickles.

```
config.json             format_version, the model's config (CLIP tower included), image transform, tokenizer hash
model.safetensors       every weight, image tower included
generation_config.json  how text and speech are sampled unless the caller says otherwise
tokenizer.json  templates.json  tokenizer_config.json  codec/      the tokenizer folder, flat
README.md               model card: recipe hash, data, scores, commit
```
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmllm.data.samples.decode import ImageTransform
from mmllm.inference.card import ModelInfo, model_card
from mmllm.inference.settings import GenerationConfig
from mmllm.model.earlier_names import current_keys, current_weights, is_earlier
from mmllm.model.multimodal import ModelConfig, MultimodalModel
from mmllm.model.vision import open_clip_config, pixel_statistics
from mmllm_tokenizers.folder import TokenizerFolder

FORMAT_VERSION = 2
"""1 has the names that `mmllm.model.earlier_names` lists; it is still read."""
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
GENERATION = "generation_config.json"
CARD = "README.md"
TOKENIZER_FILES = ("tokenizer.json", "templates.json", "tokenizer_config.json")
CODEC = "codec"

_REQUIRED = (CONFIG, WEIGHTS, GENERATION, *TOKENIZER_FILES)
_WELCOME_SUFFIXES = (".md", ".txt")
_NUM_SHOWN = 5

_Given = TypeVar("_Given")
_Parsed = TypeVar("_Parsed")


@dataclass(frozen=True)
class LoadedModel:
    """What a model folder holds."""

    model: MultimodalModel
    tokenizer: TokenizerFolder
    image_transform: ImageTransform | None
    generation: GenerationConfig


def save_model(
    directory: str | os.PathLike[str],
    model: MultimodalModel,
    tokenizer: TokenizerFolder,
    info: ModelInfo | None = None,
    image_transform: ImageTransform | None = None,
    generation: GenerationConfig | None = None,
) -> Path:
    """Writes a model folder, whole or not at all; an older model at `directory` is replaced.

    Args:
        directory: where to; its parents are made.
        model: the weights, saved in the dtype that they have.
        tokenizer: what it was trained with.
        info: facts for the model card.
        image_transform: how images reach the tower; by default a squash to the tower's size.
        generation: default sampling.

    Returns:
        The folder.

    Raises:
        ValueError: `directory` holds something that is not a model, the model has other ids or tiles than the
            tokenizer, or it sees images in another size than the transform gives.
    """
    directory = Path(directory)
    _check_vocabulary(model.config, tokenizer)
    _check_tiling(model.config, tokenizer)
    check_replaceable(directory)
    image_transform = _checked_transform(model, image_transform)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        tokenizer.save(partial)
        _write_json(partial / CONFIG, _config_dict(model, tokenizer, image_transform))
        _write_json(partial / GENERATION, (generation or GenerationConfig()).to_dict())
        state = model.state_dict()
        tensors = {name: state[name].detach().cpu().contiguous().clone() for name in _unique_names(state)}
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / CARD).write_text(model_card(model, tokenizer, info or ModelInfo()), encoding="utf-8")
        partial.chmod(0o755)
        replaced = partial.with_name(partial.name + ".old")
        if directory.exists():
            directory.rename(replaced)
        partial.rename(directory)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def write_card(directory: str | os.PathLike[str], info: ModelInfo) -> None:
    """Writes a model folder's card anew, once more is known than when it was saved.

    Args:
        directory: the model folder.
        info: facts for the card.

    Raises:
        FileNotFoundError, ValueError: as `load_model`.
    """
    loaded = load_model(directory)
    (Path(directory) / CARD).write_text(model_card(loaded.model, loaded.tokenizer, info), encoding="utf-8")


def load_model(
    directory: str | os.PathLike[str], device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> LoadedModel:
    """Reads a model folder; the weights are exactly those that were saved.

    Args:
        directory: the folder that `save_model` wrote.
        device: where the model goes.
        dtype: another floating-point type for the weights; None keeps the saved one.

    Raises:
        FileNotFoundError: `directory` does not exist.
        ValueError: it lacks a file, has a foreign or damaged one, is of another format version, has a
            missing, unexpected or misshapen tensor, or another tokenizer than the model was trained with.
    """
    directory = Path(directory)
    _check_files(directory)
    config = _read_config(directory)
    with torch.random.fork_rng(devices=[]):  # building draws weights that are overwritten: leave the user's seed alone
        tokenizer = _read_tokenizer(directory, config["tokenizer_hash"])
        model = _build(directory, config["model"])
    _load_weights(directory / WEIGHTS, model)
    _check_vocabulary(model.config, tokenizer)
    _check_tiling(model.config, tokenizer)
    generation = _parse(directory / GENERATION, GenerationConfig.from_dict, _read_json(directory / GENERATION))
    transform = config["image_transform"]
    if transform is not None:
        transform = _parse(directory / CONFIG, _transform_from_dict, transform)
        if model.vision is not None and model.vision.config.mean is None:
            model.vision.mean, model.vision.std = transform.mean, transform.std
    model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, transform, generation)


def check_replaceable(directory: Path) -> None:
    """Makes sure that `save_model` would replace no more than an older model.

    Raises:
        ValueError: `directory` is a file, or a folder with something else in it.
    """
    if directory.is_file():
        raise ValueError(f"cannot save a model to {directory}: it is a file; give a folder")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / CONFIG).is_file():
        raise ValueError(
            f"cannot save a model to {directory}: it holds other files and no {CONFIG}; "
            f"give a new or empty folder, or one with an older model"
        )


def _check_vocabulary(config: ModelConfig, tokenizer: TokenizerFolder) -> None:
    size = tokenizer.vocabulary.size
    if config.decoder.vocab_size != size:
        raise ValueError(
            f"decoder.vocab_size is {config.decoder.vocab_size} but the tokenizer has {size} ids; "
            f"use the tokenizer that the model was trained with"
        )


def _check_tiling(config: ModelConfig, tokenizer: TokenizerFolder) -> None:
    tiling = tokenizer.config.tiling
    got, wanted = config.image_projector.max_tiles, 1 if tiling is None else tiling.max_tiles
    if config.vision is not None and got != wanted:
        raise ValueError(
            f"image_projector.max_tiles is {got} but the tokenizer's tiling makes it {wanted}; use the tokenizer that "
            f"the model was trained with"
        )


def _checked_transform(model: MultimodalModel, transform: ImageTransform | None) -> ImageTransform | None:
    if model.vision is None:
        return None
    size = model.vision.image_size
    if transform is None:
        return ImageTransform(size, _three(model.vision.mean), _three(model.vision.std))
    if transform.size != size:
        raise ValueError(
            f"image_transform gives images of {transform.size} pixels but the image tower sees {size}; "
            f"use ImageTransform(size={size})"
        )
    return transform


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue


def _config_dict(
    model: MultimodalModel, tokenizer: TokenizerFolder, transform: ImageTransform | None
) -> dict[str, Any]:
    return {
        "format": "mmllm",
        "format_version": FORMAT_VERSION,
        "tokenizer_hash": tokenizer.hash,
        "image_transform": None if transform is None else dataclasses.asdict(transform),
        "model": _self_contained(model.config).to_dict(),
    }


def _self_contained(config: ModelConfig) -> ModelConfig:
    """The config without weights from elsewhere: the folder's own weights are all that loading reads."""
    if config.vision is None:
        return config
    vision = config.vision
    if vision.pretrained is not None:  # what the tag said of pixels and activation stays with the weights
        mean, std = pixel_statistics(vision)
        vision = dataclasses.replace(vision, open_clip=open_clip_config(vision), mean=_three(mean), std=_three(std))
    return dataclasses.replace(config, vision=dataclasses.replace(vision, pretrained=None, checkpoint=None))


def _unique_names(state: Mapping[str, Tensor]) -> list[str]:
    """Names of a state dict, each storage once: of tensors that share one (tied embeddings) the first."""
    names: list[str] = []
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    for name, tensor in state.items():
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if not (tensor.numel() and identity in seen):
            names.append(name)
        seen.add(identity)
    return names


def _check_files(directory: Path) -> None:
    if not directory.exists():
        raise FileNotFoundError(f"no model folder at {directory}; give the folder that training or `save_model` wrote")
    if not directory.is_dir():
        raise ValueError(f"{directory} is a file; a model is a folder with {CONFIG} and {WEIGHTS}")
    present = {entry.name for entry in directory.iterdir()}
    missing = [name for name in _REQUIRED if name not in present]
    if missing:
        raise ValueError(
            f"model folder {directory} lacks {_listed(missing)}; wanted {_listed(list(_REQUIRED), len(_REQUIRED))}; "
            f"copy the whole folder or export the model again"
        )
    foreign = sorted(
        name
        for name in present - {*_REQUIRED, CARD, CODEC}
        if not name.startswith((".", "LICENSE")) and not name.endswith(_WELCOME_SUFFIXES)
    )
    if foreign:
        raise ValueError(
            f"model folder {directory} holds {_listed(foreign)}, which is no part of a model; "
            f"wanted {_listed([*_REQUIRED, CODEC + '/', CARD], 9)} alone; move it elsewhere"
        )


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    config = _read_json(path)
    if config.get("format") != "mmllm":
        what = "a transformers model" if {"architectures", "model_type"} & set(config) else "something else"
        raise ValueError(
            f'{path} describes {what}: its "format" is {config.get("format")!r}, wanted "mmllm"; '
            f"give a folder that mmllm wrote, or convert it with `mmllm import`"
        )
    version = config.get("format_version")
    if version not in (1, FORMAT_VERSION):
        raise ValueError(
            f"{path} has format_version {version!r}; this mmllm reads 1 to {FORMAT_VERSION}; "
            f"load it with the mmllm that wrote it, or export the model again"
        )
    wanted = {"format", "format_version", "tokenizer_hash", "image_transform", "model"}
    if set(config) != wanted:
        raise ValueError(
            f"{path} has keys {sorted(config)}; wanted {sorted(wanted)}; restore the file or export the model again"
        )
    if version == 1:
        config["model"] = _parse(path, current_keys, config["model"])
    return config


def _read_tokenizer(directory: Path, wanted_hash: str) -> TokenizerFolder:
    tokenizer = _parse(directory, TokenizerFolder.load, directory)
    got_hash = _parse(directory, lambda folder: folder.hash, tokenizer)
    if got_hash != wanted_hash:
        raise ValueError(
            f"the tokenizer in {directory} has hash {got_hash[:16]}… but the model was trained with "
            f"{str(wanted_hash)[:16]}…; put back the tokenizer files that were saved with the model"
        )
    return tokenizer


def _build(directory: Path, config: dict[str, Any]) -> MultimodalModel:
    return _parse(directory / CONFIG, lambda values: MultimodalModel(ModelConfig.from_dict(values)), config)


def _load_weights(path: Path, model: MultimodalModel) -> None:
    try:
        tensors = load_file(path, device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read: {error}; wanted a whole safetensors file; copy or export the model again"
        ) from error
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtype=dtypes.pop())
    if any(is_earlier(name) for name in tensors):
        decoder = model.config.decoder
        tensors = current_weights(tensors, decoder.num_attention_heads, decoder.kv_heads)
    own = model.state_dict()
    _check_names(path, set(tensors), set(_unique_names(own)))
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"tensor {name} in {path} has shape {tuple(tensor.shape)}; {CONFIG} wants "
                f"{tuple(own[name].shape)}; the two files are of different models: copy the folder again"
            )
        own[name].copy_(tensor)


def _check_names(path: Path, names: set[str], wanted: set[str]) -> None:
    missing, unexpected = sorted(wanted - names), sorted(names - wanted)
    if missing or unexpected:
        found = [f"lacks {_listed(missing)}"] if missing else []
        found += [f"has unexpected {_listed(unexpected)}"] if unexpected else []
        raise ValueError(
            f"{path} {' and '.join(found)}; got {len(names)} tensors, {CONFIG} wants {len(wanted)}; "
            f"the two files are of different models: copy the folder again"
        )


def _parse(path: Path, parse: Callable[[_Given], _Parsed], value: _Given) -> _Parsed:
    """`parse(value)`; whatever it dislikes becomes a ValueError that names the file."""
    try:
        return parse(value)
    except (ValueError, TypeError, KeyError, OSError, AttributeError) as error:
        said = f"{type(error).__name__} {error}" if isinstance(error, (KeyError, AttributeError)) else str(error)
        raise ValueError(f"{path} is not usable: {said}; restore it or export the model again") from error


def _transform_from_dict(values: Any) -> ImageTransform:
    known = [f.name for f in dataclasses.fields(ImageTransform)]
    if not isinstance(values, dict) or set(values) != set(known):
        raise ValueError(f"image_transform is {values!r}; wanted an object with the keys {known}")
    return ImageTransform(values["size"], _three(values["mean"]), _three(values["std"]), values["mode"])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not JSON: {error}; copy or export the model again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; wanted an object; copy or export the model again")
    return values


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _listed(names: list[str], num_shown: int = _NUM_SHOWN) -> str:
    shown = ", ".join(names[:num_shown])
    return shown if len(names) <= num_shown else f"{shown} and {len(names) - num_shown} more"
