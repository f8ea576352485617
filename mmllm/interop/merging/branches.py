"""`merge_method: branch_train_mix`: dense specialists become the experts of one model (arXiv 2403.07816).

Each parent's MLP is an expert of its layer; all else is averaged; the routers are new and random. Specialists that are
one and the same give their own outputs, whatever the routers say, since the gates of the chosen sum to 1. Others are
trained on for a while ("MiX" is that training), as `init_from` of a `mmllm fit`.

Shapes: E experts, one a parent; I inner width, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mmllm.checkpoints.card import ModelInfo
from mmllm.checkpoints.files import replaced_folder
from mmllm.checkpoints.weights import TensorSpec, write_weights
from mmllm.interop.merging.folder import MergeReport, card_notes, check_new, count, generator_for, write_files
from mmllm.interop.merging.formulas import linear
from mmllm.interop.merging.parents import Parent, open_parents
from mmllm.interop.merging.settings import MergeConfig, weights_of
from mmllm.model.decoder import INIT_STD
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.multimodal import MultimodalModel
from mmllm.model.router import MoEConfig

_DENSE = ("gate_proj", "up_proj", "down_proj")


def mix_branches(config: MergeConfig, out: str | Path, is_check: bool = False) -> MergeReport:
    """Writes a model folder whose experts are dense models' MLPs.

    Args:
        config: whose `models` are the specialists.
        out: model folder to write; it is new or empty.
        is_check: write nothing, say what would be done.

    Raises:
        FileNotFoundError: no such model.
        ValueError: the parents have experts already, differ in more than weights, or `out` isn't empty.
    """
    out = check_new(out)
    parents = open_parents(config.every_parent)
    first = parents[0]
    config.check_layers(first.parts.config.decoder.num_hidden_layers)
    config.check_filters(first.specs)
    decoder = mixed_config(first.parts.config.decoder, len(parents), config.experts_per_token)
    whole = dataclasses.replace(first.parts.config, decoder=decoder)
    with torch.device("meta"):
        shapes = MultimodalModel(whole).state_dict()
    specs = _specs(first, {name: tuple(tensor.shape) for name, tensor in shapes.items()}, config)
    report = MergeReport(str(out), config.method, [parent.path for parent in parents])
    report.num_parameters = sum(spec.num_elements for spec in specs.values() if spec.dtype.is_floating_point)
    made = ((name, tensor.to(specs[name].dtype)) for name, tensor in _tensors(config, parents, decoder, report))
    if is_check:
        for _ in made:
            pass
        return report
    with replaced_folder(out, sources=[parent.folder for parent in parents]) as folder:
        write_weights(folder, specs, made)
        info = ModelInfo(
            name=f"{len(parents)} specialists as experts",
            data=tuple(parent.line() for parent in parents),
            notes=card_notes(config.text) + "\n\nThe routers are new: train it on before it is used.",
        )
        write_files(folder, first, whole, info)
    return report


def mixed_config(dense: DecoderConfig, num_experts: int, per_token: int) -> DecoderConfig:
    """The decoder of the mixture.

    Raises:
        ValueError: the parents have experts or biases.
    """
    if dense.moe is not None and any(map(dense.has_experts, range(dense.num_hidden_layers))):
        raise ValueError("the models have experts already (decoder.moe); branch_train_mix wants dense ones")
    if dense.mlp_bias:
        raise ValueError("decoder.mlp_bias is true, and experts have no biases; take models without")
    layers = tuple(layer for layer in range(dense.num_hidden_layers) if not dense.skips_tokens(layer))
    moe = MoEConfig(
        num_experts=num_experts, num_experts_per_tok=per_token, moe_intermediate_size=dense.intermediate_size
    )
    is_all = len(layers) == dense.num_hidden_layers
    return dataclasses.replace(dense, moe=moe, moe_layers="all" if is_all else layers)


def _specs(first: Parent, shapes: dict[str, tuple[int, ...]], config: MergeConfig) -> dict[str, TensorSpec]:
    """Of the new tensors, each in the type that the layer's MLP, or the tensor itself, has."""
    specs = {}
    for name, shape in shapes.items():
        if name == "decoder.lm_head.weight" and name not in first.specs:  # tied
            continue
        like = first.specs.get(name) or first.specs[f"{name.rpartition('.mlp.')[0]}.mlp.up_proj.weight"]
        is_cast = config.dtype is not None and like.dtype.is_floating_point
        specs[name] = TensorSpec(config.dtype if is_cast and config.dtype is not None else like.dtype, shape)
    return specs


def _tensors(
    config: MergeConfig, parents: list[Parent], decoder: DecoderConfig, report: MergeReport
) -> Iterator[tuple[str, Tensor]]:
    replaced = set()
    for layer in filter(decoder.has_experts, range(decoder.num_hidden_layers)):
        path = f"decoder.layers.{layer}.mlp"
        replaced.update(f"{path}.{projection}.weight" for projection in _DENSE)
        generator = generator_for(config.seed, f"{path}.gate.weight", 0)
        yield f"{path}.gate.weight", torch.randn(len(parents), decoder.hidden_size, generator=generator) * INIT_STD
        gates, ups, downs = ([p.read(f"{path}.{projection}.weight") for p in parents] for projection in _DENSE)
        both = [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
        yield f"{path}.experts.gate_up_proj", torch.stack(both)
        yield f"{path}.experts.down_proj", torch.stack(downs)
    for name in parents[0].specs:
        if name in replaced:
            continue
        tensors = [parent.read(name) for parent in parents]
        if count(report, name, tensors):
            wide = [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
            yield name, linear(wide, weights_of(config, name, decoder.num_hidden_layers))
        else:
            yield name, tensors[0]
