"""A model with weights of 8 or 4 bits: less memory, and more tokens a second where reading weights is what takes time.

Weights alone, rounded to the nearest: no data is needed, and what is computed from them stays in floating point.
LLM.int8() (https://arxiv.org/abs/2208.07339) and GPTQ (https://arxiv.org/abs/2210.17323) do more for models in which
single features are large; these here have at most some hundreds of millions of weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from mmllm.inference.quantized_layers import (
    Int8Matrices,
    QuantizedExperts,
    QuantizedHead,
    QuantizedLinear,
    WeightKind,
    pack,
)
from mmllm.model.embedding import Head
from mmllm.model.experts import Experts
from mmllm.model.multimodal import MultimodalModel

GROUP_SIZES = (32, 64, 128)
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_BLOCK_PARTS = ("self_attn", "mlp")
_TOWERS = ("vision", "image_projector", "clip_projector", "unit_projector")


@dataclass(frozen=True)
class Quantized:
    """What was done to a model.

    Attributes:
        kind: of the weights.
        names: of the modules that are quantized.
        in_8_bits: those that are so although 4 bits were asked for: the head, and where groups don't divide the inputs.
        bytes_before: of all the model's parameters and buffers.
        bytes_after: of these.
    """

    kind: WeightKind
    names: tuple[str, ...]
    in_8_bits: tuple[str, ...]
    bytes_before: int
    bytes_after: int


@torch.no_grad()
def quantize(model: MultimodalModel, kind: WeightKind, *, group_size: int = 32, towers: bool = False) -> Quantized:
    """Quantizes a model's weights in place, for inference: it can't be trained or saved afterwards.

    Linear layers and experts of the decoder's blocks are quantized, and the head, which stays in 8 bits: in 4 it costs
    more than the layers together. Where the head is the embedding, this stays beside it. Norms, routers, convolutions,
    embeddings and adapters stay, and so does what an adapter of experts or with DoRA is around of, since it reads
    these weights. No adapter can be merged or added afterwards.

    Args:
        model: on the CPU, in float32 or bfloat16.
        kind: "int8", with a scale an output, or "int4", with a scale and a zero point a group of inputs.
        group_size: of "int4": 32, 64 or 128 inputs.
        towers: also of those that see, and of what joins them and sounds to the decoder.

    Raises:
        ValueError: another kind or size, a model that is on another device, in another dtype, sharded, compiled or
            quantized already.
    """
    if kind not in get_args(WeightKind):
        raise ValueError(f"quantize is {kind!r}; it must be one of {', '.join(get_args(WeightKind))}")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {group_size}; it must be one of {', '.join(map(str, GROUP_SIZES))}")
    _check(model)
    before, chosen = _num_bytes(model), _chosen(model, towers)
    names = tuple(chosen)
    for siblings in _joinable(chosen, kind):
        layers: list[Any] = [chosen.pop(name) for name in siblings]
        whole: QuantizedLinear = _quantized(_joined(layers), kind, group_size)
        for name, part in zip(siblings, whole.split([layer.out_features for layer in layers]), strict=True):
            model.set_submodule(name, part)
    for name in list(chosen):
        model.set_submodule(name, _quantized(chosen.pop(name), kind, group_size))
    in_8_bits = tuple(name for name in names if kind == "int4" and _is_in_8_bits(model.get_submodule(name)))
    return Quantized(kind, names, in_8_bits, before, _num_bytes(model))


def _check(model: MultimodalModel) -> None:
    quantized = (QuantizedLinear, QuantizedExperts, QuantizedHead)
    already = next((name for name, module in model.named_modules() if isinstance(module, quantized)), None)
    if already is not None:
        raise ValueError(f"{already} is quantized already; load the model again to quantize it otherwise")
    if any(block.compiled is not None for block in model.decoder.layers):  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError("the decoder's layers are compiled; quantize the model instead of compiling it")
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "placements"):
            raise ValueError(f"{name} is spread over ranks; quantized weights are whole: load the model on one device")
        if parameter.device.type != "cpu":
            raise ValueError(
                f"{name} is on {parameter.device}; weights of 8 and 4 bits are for the CPU: load the model there, or "
                f"leave quantize out and take dtype='bfloat16'"
            )
        if name.startswith("decoder.") and parameter.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"{name} is {parameter.dtype}; weights of torch.float32 or torch.bfloat16 are quantized: load the "
                f"model with dtype='float32'"
            )


def _chosen(model: MultimodalModel, towers: bool) -> dict[str, nn.Module]:
    """What is quantized, by name."""
    roots = [f"decoder.layers.{layer}.{part}" for layer in range(len(model.decoder.layers)) for part in _BLOCK_PARTS]
    if towers:
        roots += [tower for tower in _TOWERS if getattr(model, tower) is not None]
    chosen: dict[str, nn.Module] = {}
    for root in roots:
        for name, module in model.get_submodule(root).named_modules(prefix=root):
            if type(module) in (nn.Linear, Experts) and "lora_" not in name and not _is_read(model, name):
                chosen[name] = module
    return {**chosen, "decoder.lm_head": model.decoder.lm_head}


def _is_read(model: nn.Module, name: str) -> bool:
    """Whether an adapter around a module reads its weights: PEFT's of stacks of experts do, and DoRA."""
    owner: Any = model.get_submodule(name.rpartition(".")[0])
    return hasattr(owner, "parameter_name") or len(getattr(owner, "lora_magnitude_vector", ())) > 0


def _joinable(chosen: Mapping[str, nn.Module], kind: WeightKind) -> list[list[str]]:
    """Linear layers of one input: one product gives all their outputs."""
    groups = []
    for first in chosen:
        owner, _, leaf = first.rpartition(".")
        for siblings in _SIBLINGS:
            names = [f"{owner}.{each}" for each in siblings]
            if leaf != siblings[0] or not all(name in chosen for name in names):
                continue
            layers: list[Any] = [chosen[name] for name in names]
            is_packable = kind == "int8" or all(layer.out_features % 64 == 0 for layer in layers)
            if is_packable and len({layer.bias is None for layer in layers}) == 1:
                groups.append(names)
    return groups


def _joined(layers: Sequence[nn.Linear]) -> nn.Linear:
    joined = nn.Linear(1, 1, bias=False)
    joined.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
    if layers[0].bias is not None:
        joined.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
    return joined


def _quantized(module: nn.Module, kind: WeightKind, group_size: int) -> Any:
    match module:
        case Head():
            matrices = Int8Matrices.of(module.weight_VD[None])
            return QuantizedHead(matrices, module.rows if module.weight is None else None)
        case Experts():
            gate_up, down = (pack(weight, kind, group_size) for weight in (module.gate_up_proj, module.down_proj))
            return QuantizedExperts(gate_up, down, len(module.gate_up_proj))
        case nn.Linear():
            return QuantizedLinear(pack(module.weight[None], kind, group_size), module.bias)
    raise AssertionError(f"{type(module).__name__} is not quantized")


def _is_in_8_bits(module: nn.Module) -> bool:
    return any(isinstance(each, Int8Matrices) for each in module.modules())


def _num_bytes(model: nn.Module) -> int:
    tensors: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        tensors[id(tensor)] = tensor
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
