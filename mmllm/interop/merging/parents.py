"""The parents of a merged model: opened, compared, and read a tensor at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm.checkpoints.adapters import WEIGHTS as ADAPTER_WEIGHTS
from mmllm.checkpoints.adapters import base_facts
from mmllm.checkpoints.files import CODEC, CONFIG, read_json
from mmllm.checkpoints.folder import FolderParts, read_folder
from mmllm.checkpoints.weights import Checkpoint, TensorSpec
from mmllm.interop.merging.lora import Lora
from mmllm_tokenizers.folder import TokenizerFolder

_FREE = {
    "decoder": ("dropout", "gradient_checkpointing", "attention_backend", "mod_capacity", "mod_predictor_coef"),
    "decoder.moe": (
        "backend", "router_aux_loss_coef", "router_z_loss_coef", "aux_loss_scope", "bias_update_speed",
        "router_jitter_noise", "expert_dropout", "local_entropy_loss_coef", "local_entropy_modalities",
        "global_entropy_loss_coef", "global_entropy_min_experts",
    ),
    "vision": ("trainable", "pretrained", "checkpoint"),
    "image_projector": ("dropout", "position_std"),
    "audio.projector": ("dropout", "code_dropout", "frame_mask", "mask_span", "warp", "band_mask"),
    "": ("loss",),
}  # fmt: skip
"""Keys of the config that only training reads: parents may differ in them."""
_CHUNK = 1 << 24


class Parent:
    """A model folder, with one of its adapters in its weights where the path is `DIR+NAME`.

    Args:
        path: as the YAML has it.

    Raises:
        FileNotFoundError: no such folder, or no such adapter.
        ValueError: it isn't a model folder, or the adapter isn't one of its decoder; the message says what is wrong.
    """

    def __init__(self, path: str) -> None:
        folder, plus, adapter = path.rpartition("+")
        if not plus or Path(path).is_dir():
            folder, adapter = path, ""
        self.path = path
        self.folder = Path(folder)
        with torch.random.fork_rng(devices=[]):  # building the codec draws weights that are overwritten
            self.parts: FolderParts = read_folder(self.folder)
            self.parts.tokenizer.hash  # noqa: B018  # reads the codec
        self.order: dict[int, list[int]] = {}
        """Of layers whose experts are read in another order: the place of each in the file."""
        self.lora: Lora | None = None
        if adapter:
            self.lora = Lora(self.folder, adapter, self.parts.config.decoder, self.specs)
            facts = base_facts(Checkpoint.open(self.folder), self.parts.config.decoder)
            if self.lora.base is not None and self.lora.base != facts:
                raise ValueError(
                    f"{self.lora.folder} is an adapter of another base than the weights of {folder}; merge it with the "
                    f"model that it was trained on"
                )

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Type and shape of each weight."""
        return self.parts.checkpoint.specs

    def read(self, name: str) -> Tensor:
        """A weight, with the adapter, its experts in `order`."""
        tensor = self.parts.checkpoint.read(name)
        if self.lora is not None:
            tensor = self.lora.added_to(name, tensor)
        layer = layer_of_experts(name)
        if layer is not None and layer in self.order:
            tensor = tensor[torch.tensor(self.order[layer])]
        return tensor

    @property
    def digest(self) -> str:
        """SHA-256 of the files of weights."""
        digest = hashlib.sha256()
        files = sorted(self.folder.glob("model*.safetensors"))
        if self.lora is not None:
            files.append(self.lora.folder / ADAPTER_WEIGHTS)
        for file in files:
            with file.open("rb") as opened:
                while chunk := opened.read(_CHUNK):
                    digest.update(chunk)
        return digest.hexdigest()

    def line(self) -> str:
        """For the card: folder, adapter and digest."""
        name = self.folder.resolve().name if self.lora is None else f"{self.folder.resolve().name}+{self.lora.name}"
        return f"{name}: weights `{self.digest[:16]}`"


def layer_of_experts(name: str) -> int | None:
    """The layer, where a weight has its routed experts as its first dimension."""
    parts = name.split(".")
    if parts[:2] != ["decoder", "layers"] or parts[3] != "mlp":
        return None
    leaf = ".".join(parts[4:])
    is_stack = leaf in ("experts.gate_up_proj", "experts.down_proj", "gate.weight", "gate.e_score_correction_bias")
    return int(parts[2]) if is_stack else None


def open_parents(paths: Sequence[str]) -> list[Parent]:
    """Parents that can be merged, the first being what the others are compared with.

    Raises:
        FileNotFoundError, ValueError: as `Parent`; or tokenizers, tensors or configs differ: the message names what,
            and the parents.
    """
    parents = [Parent(path) for path in paths]
    for other in parents[1:]:
        check_tokenizers(parents[0], other)
        _check_tensors(parents[0], other)
        _check_configs(parents[0], other)
    return parents


def check_tokenizers(one: Parent, other: Parent) -> None:
    """Raises ValueError where two parents have other ids, units or templates, and says which."""
    a, b = one.parts.tokenizer, other.parts.tokenizer
    if a.hash == b.hash:
        return
    what = next(_tokenizer_differences(a, b), "tokenizer folder")
    raise ValueError(
        f"{one.path} and {other.path} differ in their {what}; ids and units must mean the same: merge models that were "
        f"trained with one tokenizer folder"
    )


def _tokenizer_differences(a: TokenizerFolder, b: TokenizerFolder) -> Iterator[str]:
    if a.text.hash != b.text.hash:
        yield f"text tokenizer ({a.text.vocab_size} and {b.text.vocab_size} ids)"
    hashes = [None if each.audio is None else each.audio.hash for each in (a, b)]
    if hashes[0] != hashes[1]:
        yield f"units ({CODEC}/)" if None not in hashes else f"units: only one has a {CODEC}/"
    before, after = a.config.to_dict(), b.config.to_dict()
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            yield f"tokenizer_config.json: {key} is {before.get(key)!r} and {after.get(key)!r}"
    if a.templates != b.templates:
        yield "templates.json"
    if a.chat_template != b.chat_template:
        yield "chat_template.jinja"


def _check_tensors(one: Parent, other: Parent) -> None:
    for name in sorted(one.specs.keys() | other.specs.keys()):
        a, b = one.specs.get(name), other.specs.get(name)
        if a is None or b is None:
            lacks, has = (one, other) if a is None else (other, one)
            raise ValueError(
                f"{lacks.path} has no tensor {name}, which {has.path} has; merge models of one architecture"
            )
        if a.shape != b.shape:
            raise ValueError(
                f"tensor {name} is {list(a.shape)} in {one.path} and {list(b.shape)} in {other.path}; merge models of "
                f"one architecture"
            )
        if a.dtype.is_floating_point != b.dtype.is_floating_point:
            raise ValueError(
                f"tensor {name} is {a.dtype} in {one.path} and {b.dtype} in {other.path}; cast one of them"
            )


def _check_configs(one: Parent, other: Parent) -> None:
    a, b = (plain_config(parent.parts.config.to_dict()) for parent in (one, other))
    for key in sorted(a.keys() | b.keys()):
        if a.get(key) != b.get(key):
            raise ValueError(
                f"model.{key} is {a.get(key)!r} in {one.path} and {b.get(key)!r} in {other.path} ({CONFIG}); their "
                f"weights compute other things: merge models of one architecture"
            )
    transforms = [read_json(parent.folder / CONFIG)["image_transform"] for parent in (one, other)]
    if transforms[0] != transforms[1]:
        raise ValueError(
            f"image_transform is {transforms[0]} in {one.path} and {transforms[1]} in {other.path}; their towers see "
            f"other pixels: merge models of one architecture"
        )


def plain_config(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """A config as dotted keys, without those that only training reads."""
    plain: dict[str, Any] = {}
    for key, value in values.items():
        if key in _FREE.get(path, ()):
            continue
        dotted = f"{path}.{key}" if path else key
        if isinstance(value, Mapping) and value:
            plain |= plain_config(value, dotted)
        else:
            plain[dotted] = list(value) if isinstance(value, tuple) else value
    return plain
