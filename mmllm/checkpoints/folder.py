"""A model on disk: a folder of JSON, safetensors and a model card. Loading it never unpickles.

```
config.json             format_version, the model's config (CLIP tower included), image transform, tokenizer hash
model.safetensors       every weight, image tower included; above 5 GB in shards, with model.safetensors.index.json
generation_config.json  how text and speech are sampled unless the caller says otherwise
tokenizer.json  templates.json  tokenizer_config.json  codec/      the tokenizer folder, flat
chat_template.jinja     how an imported checkpoint writes conversations
source/                 what an imported checkpoint had beside its weights, to the letter
adapters/NAME/          adapters, as PEFT lays them out
README.md               model card: recipe hash, data, scores, commit
```
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmllm.checkpoints.adapters import adapter_folder, base_facts, base_state, load_adapter, set_adapter
from mmllm.checkpoints.card import ModelInfo, model_card
from mmllm.checkpoints.files import (
    CARD,
    CONFIG,
    GENERATION,
    SOURCE,
    check_files,
    listed,
    parsed,
    read_json,
    replaced_folder,
    write_json,
)  # fmt: skip
from mmllm.checkpoints.settings import GenerationConfig
from mmllm.checkpoints.weights import WEIGHTS, Checkpoint, Tensors, TensorSpec, write_weights
from mmllm.data.samples.decode import ImageTransform
from mmllm.model.earlier_names import current_keys, current_weights, is_earlier
from mmllm.model.embedding import joined_rows
from mmllm.model.multimodal import ModelConfig, MultimodalModel
from mmllm.model.vision import pixel_statistics
from mmllm_tokenizers.folder import TokenizerFolder

FORMAT_VERSION = 2
"""1 has the names that `mmllm.model.earlier_names` lists; it is still read."""


@dataclass(frozen=True)
class LoadedModel:
    """What a model folder holds."""

    model: MultimodalModel
    tokenizer: TokenizerFolder
    image_transform: ImageTransform | None
    generation: GenerationConfig


@dataclass(frozen=True)
class FolderParts:
    """What a model folder holds, its weights not yet read."""

    config: ModelConfig
    tokenizer: TokenizerFolder
    image_transform: ImageTransform | None
    checkpoint: Tensors


class _Held:
    """Tensors that are in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def open_weights(directory: Path, config: ModelConfig) -> Tensors:
    """A model folder's weights, by today's names; those of earlier folders are all read at once.

    Raises:
        FileNotFoundError, ValueError: as `Checkpoint.open`.
    """
    checkpoint = Checkpoint.open(directory)
    if not any(is_earlier(name) for name in checkpoint.specs):
        return checkpoint
    tensors = {name: checkpoint.read(name) for name in checkpoint.specs}
    return _Held(current_weights(tensors, config.decoder.num_attention_heads, config.decoder.kv_heads))


def read_folder(directory: str | os.PathLike[str]) -> FolderParts:
    """Reads a model folder but for its weights.

    Raises:
        FileNotFoundError, ValueError: as `load_model`.
    """
    directory = Path(directory)
    check_files(directory)
    config = read_config(directory)
    tokenizer = read_tokenizer(directory, config["tokenizer_hash"])
    model_config = parsed(directory / CONFIG, ModelConfig.from_dict, config["model"])
    transform = config["image_transform"]
    if transform is not None:
        transform = parsed(directory / CONFIG, ImageTransform.from_dict, transform)
    _check_vocabulary(model_config, tokenizer)
    _check_tiling(model_config, tokenizer)
    return FolderParts(model_config, tokenizer, transform, open_weights(directory, model_config))


def save_model(
    directory: str | os.PathLike[str],
    model: MultimodalModel,
    tokenizer: TokenizerFolder,
    info: ModelInfo | None = None,
    image_transform: ImageTransform | None = None,
    generation: GenerationConfig | None = None,
    source: Path | None = None,
    more: Callable[[Path], None] | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> Path:
    """Writes a model folder, whole or not at all; an older model at `directory` is replaced.

    Args:
        directory: where to; its parents are made.
        model: the weights.
        tokenizer: what it was trained with.
        info: facts for the model card.
        image_transform: how images reach the tower; by default a squash to the tower's size.
        generation: default sampling.
        source: folder of what an imported checkpoint had beside its weights, which is copied.
        more: writes what else belongs into the folder, before it takes its place.
        dtypes: of weights, by name; others are saved in the dtype that they have.

    Returns:
        The folder.

    Raises:
        ValueError: `directory` holds something that is not a model, the model has other ids or tiles than the
            tokenizer, or it sees images in another size than the transform gives.
    """
    directory = Path(directory)
    _check_vocabulary(model.config, tokenizer)
    _check_tiling(model.config, tokenizer)
    image_transform = _checked_transform(model, image_transform)
    state = base_state(joined_rows(model.state_dict()))
    names = _unique_names(state)
    dtypes = {name: state[name].dtype for name in names} | {**(dtypes or {})}
    specs = {name: TensorSpec(dtypes[name], tuple(state[name].shape)) for name in names}
    with replaced_folder(directory) as partial:
        tokenizer.save(partial)
        write_json(partial / CONFIG, folder_config(model.config, tokenizer, image_transform))
        write_json(partial / GENERATION, (generation or GenerationConfig()).to_dict())
        write_weights(partial, specs, ((name, state[name].to(dtypes[name])) for name in names))
        (partial / CARD).write_text(model_card(model, tokenizer, info or ModelInfo()), encoding="utf-8")
        if source is not None and source.is_dir():
            shutil.copytree(source, partial / SOURCE)
        if more is not None:
            more(partial)
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
    directory: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    adapter: str | Sequence[str] | None = None,
) -> LoadedModel:
    """Reads a model folder; the weights are exactly those that were saved.

    Args:
        directory: the folder that `save_model` wrote.
        device: where the model goes.
        dtype: another floating-point type for the weights; None keeps the saved one.
        adapter: of `adapters/NAME`; of several, the model runs with the first until another is chosen
            (`mmllm.checkpoints.adapters.set_adapter`). None: with none.

    Raises:
        FileNotFoundError: `directory` does not exist.
        ValueError: it lacks a file, has a foreign or damaged one, is of another format version, has a
            missing, unexpected or misshapen tensor, or another tokenizer than the model was trained with.
    """
    directory = Path(directory)
    check_files(directory)
    config = read_config(directory)
    with torch.random.fork_rng(devices=[]):  # building draws weights that are overwritten: leave the user's seed alone
        tokenizer = read_tokenizer(directory, config["tokenizer_hash"])
        model = _build(directory, config["model"])
    load_weights(directory, model, dtype)
    _check_vocabulary(model.config, tokenizer)
    _check_tiling(model.config, tokenizer)
    generation = parsed(directory / GENERATION, GenerationConfig.from_dict, read_json(directory / GENERATION))
    transform = config["image_transform"]
    if transform is not None:
        transform = parsed(directory / CONFIG, ImageTransform.from_dict, transform)
        if model.vision is not None and model.vision.config.mean is None:
            model.vision.mean, model.vision.std = transform.mean, transform.std
    names = [adapter] if isinstance(adapter, str) else list(adapter or ())
    load_adapters(directory, model, names)
    model = model.to(device=device).eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, transform, generation)


def load_adapters(directory: Path, model: MultimodalModel, names: Sequence[str]) -> None:
    """Puts a folder's adapters into its model, which then runs with the first.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: as `mmllm.checkpoints.adapters.load_adapter`.
    """
    if not names:
        return
    base = base_facts(Checkpoint.open(directory), model.config.decoder)
    for name in names:
        load_adapter(model.decoder, adapter_folder(directory, name), name, base)
    set_adapter(model.decoder, names[0])


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


def folder_config(config: ModelConfig, tokenizer: TokenizerFolder, transform: ImageTransform | None) -> dict[str, Any]:
    """What `config.json` holds."""
    return {
        "format": "mmllm",
        "format_version": FORMAT_VERSION,
        "tokenizer_hash": tokenizer.hash,
        "image_transform": None if transform is None else transform.to_dict(),
        "model": _self_contained(config).to_dict(),
    }


def _self_contained(config: ModelConfig) -> ModelConfig:
    """The config without weights from elsewhere: the folder's own weights are all that loading reads."""
    if config.vision is None:
        return config
    vision = config.vision
    if vision.pretrained is not None:  # what the tag said of pixels and activation stays with the weights
        from mmllm.model.open_clip_vision import open_clip_config

        mean, std = pixel_statistics(vision)
        vision = dataclasses.replace(vision, open_clip=open_clip_config(vision), mean=_three(mean), std=_three(std))
    return dataclasses.replace(config, vision=dataclasses.replace(vision, pretrained=None, checkpoint=None))


def _unique_names(state: Mapping[str, Tensor]) -> list[str]:
    """Names of a state dict, each storage once: of tensors that share one (tied embeddings) the first."""
    names: list[str] = []
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    for name, tensor in state.items():
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.is_meta or not (tensor.numel() and identity in seen):
            names.append(name)
        seen.add(identity)
    return names


def read_config(directory: Path) -> dict[str, Any]:
    """A model folder's `config.json`, with today's names of keys; ValueError if it isn't one."""
    path = directory / CONFIG
    config = read_json(path)
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
        config["model"] = parsed(path, current_keys, config["model"])
    return config


def read_tokenizer(directory: Path, wanted_hash: str) -> TokenizerFolder:
    """A model folder's tokenizer; ValueError if it is another than the model was trained with."""
    tokenizer = parsed(directory, TokenizerFolder.load, directory)
    got_hash = parsed(directory, lambda folder: folder.hash, tokenizer)
    if got_hash != wanted_hash:
        raise ValueError(
            f"the tokenizer in {directory} has hash {got_hash[:16]}… but the model was trained with "
            f"{str(wanted_hash)[:16]}…; put back the tokenizer files that were saved with the model"
        )
    return tokenizer


def _build(directory: Path, config: dict[str, Any]) -> MultimodalModel:
    """The model, its decoder without memory: the weights that are read are all that it ever has."""
    return parsed(
        directory / CONFIG,
        lambda values: MultimodalModel(ModelConfig.from_dict(values), _without_weights()),
        config,
    )


@contextmanager
def _without_weights() -> Iterator[None]:
    """What is built has no memory, and nothing is drawn into it: on the meta device that imports PyTorch's compiler."""
    with torch.device("meta"), _Undrawn():
        yield


class _Undrawn(TorchFunctionMode):
    """Functions of `torch.nn.init` leave their tensors as they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def load_weights(directory: Path, model: MultimodalModel, dtype: torch.dtype | None = None) -> None:
    """Gives a model the weights of a folder, one tensor after another; what lies on the meta device gets memory.

    Args:
        directory: the model folder.
        model: of the folder's config.
        dtype: of floating-point weights; None: as saved.

    Raises:
        ValueError: the weights are damaged, or not those of the config.
    """
    path = directory / WEIGHTS
    checkpoint = open_weights(directory, model.config)
    shapes = {name: spec.shape for name, spec in checkpoint.specs.items()}
    own = model.state_dict()
    _check_names(path, set(shapes), set(_unique_names(own)))
    for name, shape in shapes.items():
        if shape != own[name].shape:
            raise ValueError(
                f"tensor {name} in {path} has shape {shape}; {CONFIG} wants "
                f"{tuple(own[name].shape)}; the two files are of different models: copy the folder again"
            )
    for module in model.decoder.modules():
        _fill_buffers(module)
    for name in shapes:
        _put(model, name, checkpoint.read(name), dtype)


def _fill_buffers(module: Any) -> None:
    """Memory for a module's buffers, of which not all are saved."""
    if any(buffer is not None for buffer in module._buffers.values()):
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
        module.reset_buffers()


def _put(model: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype | None) -> None:
    """Makes a tensor a parameter, in `dtype`, or a buffer, whose dtype is the module's: biases of routers need it."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf in owner._parameters:
        tensor = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
    else:
        buffer = owner._buffers[leaf]
        assert buffer is not None
        owner._buffers[leaf] = tensor.to(buffer.dtype)


def _check_names(path: Path, names: set[str], wanted: set[str]) -> None:
    missing, unexpected = sorted(wanted - names), sorted(names - wanted)
    if missing or unexpected:
        found = [f"lacks {listed(missing)}"] if missing else []
        found += [f"has unexpected {listed(unexpected)}"] if unexpected else []
        raise ValueError(
            f"{path} {' and '.join(found)}; got {len(names)} tensors, {CONFIG} wants {len(wanted)}; "
            f"the two files are of different models: copy the folder again"
        )
