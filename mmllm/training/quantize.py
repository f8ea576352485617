"""A frozen base in four bits while an adapter is trained on it (QLoRA, arXiv 2305.14314), by bitsandbytes.

Linear layers of the decoder's blocks are quantized in memory alone: checkpoints leave them to the base folder, and the
export takes them from there. Stacks of experts, embeddings and the head stay as they are.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import nn

from mmllm.checkpoints.peft_library import bitsandbytes_library
from mmllm.model.decoder import Decoder
from mmllm.model.embedding import joined_rows
from mmllm.model.multimodal import MultimodalModel

log = logging.getLogger(__name__)

Quantization = Literal["nf4", "fp4"]
BLOCK = 64
"""Weights of a row that share a scale."""


def check_quantization(is_sharded: bool, is_compiled: bool, rates: dict[str, float]) -> None:
    """Refuses what quantized layers can't do.

    Args:
        is_sharded: by a `MeshStrategy`.
        is_compiled: the decoder's layers.
        rates: of the parts that have such layers.

    Raises:
        ValueError: one of these; the message says what to do instead.
    """
    if is_sharded:
        raise ValueError(
            "adapter.quantization is given under a MeshStrategy, which can't shard bitsandbytes' packed weights; train "
            "on one device or with ddp, or leave quantization out"
        )
    if is_compiled:
        raise ValueError(
            "adapter.quantization and compile are given, and bitsandbytes' layers break compiled blocks; set compile "
            "to false"
        )
    trained = [part for part, rate in rates.items() if rate > 0]
    if trained:
        raise ValueError(
            f"optimizer.parts.{trained[0]} is {rates[trained[0]]:g}, but adapter.quantization keeps its weights in "
            f"four bits, which can't be trained; set it to 0, or leave quantization out"
        )


def quantize_base(decoder: Decoder, kind: Quantization) -> set[str]:
    """Quantizes the linear layers of a decoder's blocks, in place; before it gets its adapter.

    Args:
        decoder: with the base's weights.
        kind: of the four bits.

    Returns:
        Names of the quantized weights.

    Raises:
        ModuleNotFoundError: without bitsandbytes.
    """
    bnb = bitsandbytes_library()
    names = {name for path, layer in decoder.layers.named_modules() for name in _weights(path, layer)}
    for name in names:
        path, _, leaf = name.removesuffix(".weight").rpartition(".")
        owner = decoder.layers.get_submodule(path)
        setattr(owner, leaf, _quantized(bnb, getattr(owner, leaf), kind))
    decoder.is_loaded_in_4bit = True  # pyright: ignore[reportArgumentType]  # PEFT asks for it
    return {f"decoder.layers.{name}" for name in names}


def _weights(path: str, layer: nn.Module) -> list[str]:
    if type(layer) is not nn.Linear:
        return []
    if layer.in_features % BLOCK:
        log.warning("%s stays whole: its width, %d, is no multiple of %d", path, layer.in_features, BLOCK)
        return []
    return [f"{path}.weight"]


def _quantized(bnb: Any, layer: nn.Linear, kind: Quantization) -> nn.Module:
    has_bias, device = layer.bias is not None, layer.weight.device
    made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, has_bias, quant_type=kind, device="meta")
    made.weight = bnb.nn.Params4bit(layer.weight.detach(), requires_grad=False, quant_type=kind, module=made)
    if has_bias:
        made.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return made.to(device)


@torch.no_grad()
def put_trained(full: MultimodalModel, trained: dict[str, torch.Tensor], quantized: set[str]) -> None:
    """Copies all but the quantized weights of a state dict into a model that has the base's.

    Args:
        full: with the weights of the base folder.
        trained: state dict of the model that was trained, without its adapter.
        quantized: of `quantize_base`.
    """
    own = full.state_dict()
    for name, tensor in joined_rows(trained).items():
        if name in own and name not in quantized:
            own[name].copy_(tensor)
