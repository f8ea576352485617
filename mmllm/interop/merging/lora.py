"""A saved LoRA as pairs of matrices, a weight at a time: what it adds to a decoder, without building one.

Of a stack of experts PEFT keeps one pair: A [E·R, I], an expert's rows together, and B [O, R·E], in whose columns the
expert is the faster index. Here each expert has a pair of its own, and a linear layer is a stack of one.

Shapes: E experts (1 of a linear layer), R rank, I inputs, O outputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm.checkpoints.adapters import BASE, CONFIG, PREFIX, WEIGHTS, adapter_folder
from mmllm.checkpoints.files import read_json
from mmllm.checkpoints.weights import Checkpoint, TensorSpec
from mmllm.model.decoder_config import DecoderConfig

_PAIR = re.compile(r"(?P<path>.+?)(?P<inner>\.base_layer)?\.lora_(?P<side>[AB])\.weight")
_EXPERTS = re.compile(r"layers\.\d+\.mlp\.experts")


@dataclass(frozen=True)
class Pair:
    """Two matrices of each expert, or of a linear layer."""

    a_ERI: Tensor
    b_EOR: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """R."""
        return self.a_ERI.shape[1]

    def change(self) -> Tensor:
        """What is added to the weight, [E, O, I]."""
        return torch.bmm(self.b_EOR.float(), self.a_ERI.float()) * self.scaling


class Lora:
    """An adapter of a model folder, read when asked for.

    Args:
        model_folder: with `adapters/NAME`.
        name: of the adapter.
        config: of the folder's decoder.
        specs: of the folder's weights.

    Raises:
        FileNotFoundError: there is none of this name.
        ValueError: it is of another kind, or changes more than weights; the message names file and key.
    """

    def __init__(self, model_folder: Path, name: str, config: DecoderConfig, specs: Mapping[str, TensorSpec]) -> None:
        self.folder = adapter_folder(model_folder, name)
        self.name = name
        self.values = read_json(self.folder / CONFIG)
        self.base: dict[str, Any] | None = read_json(self.folder / BASE) if (self.folder / BASE).is_file() else None
        _check_kind(self.folder / CONFIG, self.values)
        self.stored = Checkpoint.open_file(self.folder / WEIGHTS)
        rank, alpha = float(self.values["r"]), float(self.values["lora_alpha"])
        self.scaling = alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank)
        self._keys: dict[str, dict[str, str]] = {}
        self._num_experts = config.moe.num_experts if config.moe is not None else 1
        for key in self.stored.specs:
            found = _PAIR.fullmatch(key.removeprefix(PREFIX)) if key.startswith(PREFIX) else None
            if found is None:
                raise ValueError(f"{self.folder / WEIGHTS} has {key}, which is no part of a LoRA: save it again")
            self._keys.setdefault(self._weight_of(found, config), {})[found["side"]] = key
        for weight, keys in self._keys.items():
            if set(keys) != {"A", "B"} or f"decoder.{weight}" not in specs:
                raise ValueError(
                    f"{self.folder / WEIGHTS} adapts {weight} by {sorted(keys.values())}; wanted lora_A and lora_B of "
                    f"a weight that {model_folder} has: it is an adapter of another base"
                )

    def _weight_of(self, found: re.Match[str], config: DecoderConfig) -> str:
        """The decoder's weight that a matrix belongs to."""
        if not _EXPERTS.fullmatch(found["path"]):
            return f"{found['path']}.weight"
        targets = [str(target).rpartition(".")[2] for target in self.values.get("target_parameters") or ()]
        if len(targets) == 1:
            return f"{found['path']}.{targets[0]}"
        return f"{found['path']}.{'gate_up_proj' if found['inner'] else 'down_proj'}"  # PEFT wraps the first first

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the decoder's weights that it adapts, without "decoder."."""
        return tuple(self._keys)

    def keys(self, weight: str) -> dict[str, str]:
        """The names of a weight's two matrices in the file, by side: "A", "B"."""
        return self._keys[weight]

    def pair(self, weight: str) -> Pair:
        """A weight's matrices, in float32."""
        a, b = (self.stored.read(self._keys[weight][side]).float() for side in "AB")
        num_experts = self._num_experts if weight.rpartition(".")[0].endswith("experts") else 1
        return Pair(a.unflatten(0, (num_experts, -1)), b.unflatten(1, (-1, num_experts)).permute(2, 0, 1), self.scaling)

    def added_to(self, name: str, tensor: Tensor) -> Tensor:
        """A weight with what the adapter adds; others as they are."""
        weight = name.removeprefix("decoder.")
        if weight not in self._keys:
            return tensor
        change = self.pair(weight).change().reshape(tensor.shape)
        return (tensor.float() + change).to(tensor.dtype)


def joined(a_ERI: Tensor, b_EOR: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices as PEFT keeps them: A [E·R, I] and B [O, R·E]."""
    return a_ERI.flatten(0, 1).contiguous(), b_EOR.permute(1, 2, 0).flatten(1).contiguous()


def _check_kind(path: Path, values: Mapping[str, Any]) -> None:
    if values.get("peft_type") != "LORA":
        raise ValueError(f"{path} has peft_type {values.get('peft_type')!r}; only LORA can be merged")
    for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out"):
        if values.get(key):
            raise ValueError(f"{path} has {key} {values[key]!r}, which isn't merged; train the adapter without it")
    if values.get("bias", "none") != "none":
        raise ValueError(f"{path} has bias {values['bias']!r}; wanted none: it changes weights of the base")
    for key in ("r", "lora_alpha"):
        if not isinstance(values.get(key), (int, float)):
            raise ValueError(f"{path} has {key} {values.get(key)!r}; wanted a number: save the adapter again")
