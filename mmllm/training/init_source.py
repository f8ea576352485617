"""The folder that a training starts from (`init_from`): what it holds, and the config that is filled in from it.

A model folder, whoever wrote it; or what `mmllm import` wrote before it wrote model folders: a decoder alone, in
`decoder.safetensors` and `decoder.json`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from mmllm.checkpoints.files import CONFIG, GENERATION, SOURCE, check_files, parsed, read_json
from mmllm.checkpoints.folder import read_config, read_tokenizer
from mmllm.checkpoints.settings import GenerationConfig
from mmllm.checkpoints.weights import Checkpoint
from mmllm.data.samples.decode import ImageTransform
from mmllm.model.config import config_from_dict
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.earlier_names import current_keys, current_weights, is_earlier
from mmllm.model.multimodal import ModelConfig
from mmllm_tokenizers.folder import TokenizerFolder

OLD_WEIGHTS, OLD_CONFIG = "decoder.safetensors", "decoder.json"
_HASH_KEY = "tokenizer"
SECTIONS = ("decoder", "vision", "image_projector", "audio", "loss")
"""Keys of a model's config that a training's config has too."""


@dataclass(frozen=True)
class InitSource:
    """A folder to start from. Weights are read one at a time, when they are asked for."""

    path: Path
    model: ModelConfig
    is_model_folder: bool
    """False: what `mmllm import` once wrote, a decoder alone."""
    tokenizer_hash: str | None
    """Of the folder that its ids belong to; None: not known."""
    image_transform: ImageTransform | None = None

    @staticmethod
    def open(directory: str | Path) -> InitSource:
        """Looks at a folder's files and reads its config.

        Raises:
            FileNotFoundError: there is no such folder, or it lacks a file.
            ValueError: it is neither of the two, or damaged.
        """
        directory = Path(directory)
        old = directory / OLD_WEIGHTS, directory / OLD_CONFIG
        if any(path.is_file() for path in old) and not (directory / CONFIG).is_file():
            return _open_old(directory)
        check_files(directory)
        config = read_config(directory)
        model = parsed(directory / CONFIG, ModelConfig.from_dict, config["model"])
        transform = config["image_transform"]
        if transform is not None:
            transform = parsed(directory / CONFIG, ImageTransform.from_dict, transform)
        return InitSource(directory, model, True, str(config["tokenizer_hash"]), transform)

    @property
    def weights_path(self) -> Path:
        """Where its weights are, for messages."""
        return self.checkpoint.index or self.checkpoint.file_of(next(iter(self.checkpoint.specs)))

    @property
    def said(self) -> str:
        """What messages call it."""
        return f"the model in {self.path}" if self.is_model_folder else "the imported decoder"

    @property
    def config_path(self) -> Path:
        """Where its config is."""
        return self.path / (CONFIG if self.is_model_folder else OLD_CONFIG)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Its weights, unread."""
        if self.is_model_folder:
            return Checkpoint.open(self.path)
        try:
            return Checkpoint.open_file(self.path / OLD_WEIGHTS)
        except ValueError as error:
            raise ValueError(f"{self.path / OLD_WEIGHTS} can't be read: {error}; import it again") from error

    @cached_property
    def tokenizer(self) -> TokenizerFolder | None:
        """Its tokenizer; None where it holds none."""
        if not self.is_model_folder or self.tokenizer_hash is None:
            return None
        return read_tokenizer(self.path, self.tokenizer_hash)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of its config and of all its weights."""
        digest = hashlib.sha256(self.config_path.read_bytes())
        for name, spec in sorted(self.checkpoint.specs.items()):
            digest.update(f"{name} {spec.dtype} {list(spec.shape)}".encode())
            digest.update(self.checkpoint.read(name).reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @property
    def generation(self) -> GenerationConfig:
        """Its sampling."""
        if not self.is_model_folder:
            return GenerationConfig()
        return parsed(self.path / GENERATION, GenerationConfig.from_dict, read_json(self.path / GENERATION))

    @property
    def foreign_files(self) -> Path | None:
        """What an imported checkpoint had beside its weights; None: nothing."""
        path = self.path / SOURCE
        return path if self.is_model_folder and path.is_dir() else None

    @cached_property
    def readers(self) -> dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]]:
        """Of each weight, by the name that `MultimodalModel` has for it, the shape and how it is read."""
        checkpoint, prefix = self.checkpoint, "" if self.is_model_folder else "decoder."
        if any(is_earlier(name) for name in checkpoint.specs):  # stacks of theirs are several of ours
            decoder = self.model.decoder
            read = {name: checkpoint.read(name) for name in checkpoint.specs}
            named = current_weights(read, decoder.num_attention_heads, decoder.kv_heads)
            return {prefix + name: (tuple(tensor.shape), lambda t=tensor: t) for name, tensor in named.items()}
        return {
            prefix + name: (spec.shape, lambda name=name: checkpoint.read(name))
            for name, spec in checkpoint.specs.items()
        }


def _open_old(directory: Path) -> InitSource:
    weights, config_path = directory / OLD_WEIGHTS, directory / OLD_CONFIG
    for wanted in (weights, config_path):
        if not wanted.is_file():
            raise FileNotFoundError(f"{wanted} doesn't exist; `mmllm import` writes it")
    try:
        values = current_keys(json.loads(config_path.read_text(encoding="utf-8")), "decoder")
        decoder = config_from_dict(DecoderConfig, values)
    except ValueError as error:
        raise ValueError(f"{config_path} is no imported decoder's config: {error}; import it again") from error
    return InitSource(directory, ModelConfig(decoder), False, _old_hash(weights))


def _old_hash(path: Path) -> str | None:
    """The hash of the tokenizer folder that an imported decoder was exported with, if that is known."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get(_HASH_KEY)
    except SafetensorError as error:
        raise ValueError(f"{path} can't be read: {error}; import it again") from error


def with_folder_keys(init_args: Mapping[str, Any], directory: str | Path) -> dict[str, Any]:
    """The settings of a `DecoderModule` in which what isn't given is the folder's.

    Sizes that the tokenizer decides are left to it where another than the folder's is named. A section that is null
    stays so. Settings with a `decoder.vocab_size` have all sizes, so that they can be estimated without the folder:
    where that isn't there yet they stay as they are.

    Args:
        init_args: as YAML has them, all or some.
        directory: `init_from`.

    Raises:
        FileNotFoundError, ValueError: as `InitSource.open`.
    """
    given = dict(init_args)
    decoder = given.get("decoder")
    if isinstance(decoder, dict) and decoder.get("vocab_size") and not Path(directory).exists():
        return given
    source = InitSource.open(directory)
    if source.is_model_folder:
        given.setdefault("tokenizer", str(directory))
    is_own = source.is_model_folder and _is_same(given.get("tokenizer"), directory)
    values = source.model.to_dict()
    if not is_own:
        values = _without_sizes(values)
    hints = get_type_hints(ModelConfig)
    sections = SECTIONS if source.is_model_folder else ("decoder",)
    for name in sections:
        own = values[name]
        if name == "vision" and own is not None and given.get("clip"):
            own = None  # the tower is that of `clip`
        given[name] = _overlaid(hints[name], own, given[name]) if name in given else own
    return given


def _is_same(first: Any, second: Any) -> bool:
    return first is not None and Path(str(first)).resolve() == Path(str(second)).resolve()


def _without_sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `mmllm.training.vocabulary.with_vocabulary` fills in is left to it."""
    values = {name: dict(section) if isinstance(section, dict) else section for name, section in values.items()}
    values["decoder"]["vocab_size"] = 0
    if values["audio"] is not None:
        values["audio"] |= dict.fromkeys(("num_codebooks", "codebook_size", "codebook_dim"), 0)
        values["audio"]["heard_codebooks"] = None
    values["image_projector"]["max_tiles"] = 1
    return values


def _overlaid(hint: Any, base: Any, given: Any) -> Any:
    """`given` over `base`, key by key where the config has keys of ours."""
    config = next((each for each in (hint, *get_args(hint)) if dataclasses.is_dataclass(each)), None)
    if config is None or not isinstance(base, dict) or not isinstance(given, dict):
        return given
    hints = get_type_hints(config)
    return {**base, **{key: _overlaid(hints.get(key), base.get(key), value) for key, value in given.items()}}
