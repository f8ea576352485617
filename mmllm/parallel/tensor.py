"""Tensor parallelism: heads, inner widths, experts and the vocabulary split over ranks with the same sequences.

Column-wise then row-wise, as in Megatron-LM (arXiv 1909.08053), by torch's own DTensor styles; whole experts by rank.
Norms, routers, projectors and the image tower are computed alike on all ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from mmllm.model.multimodal import MultimodalModel
from mmllm.parallel.collectives import summed
from mmllm.parallel.experts import TensorDispatcher, spread_experts
from mmllm.parallel.mesh import ParallelMesh


def split(model: MultimodalModel, mesh: ParallelMesh) -> None:
    """Splits a model over the mesh's tensor axis, in place; before it is sharded."""
    tensor, decoder = mesh.dense["tensor"], model.decoder
    # The head has the same rows, or its own split alike; its losses add up over ranks (`mmllm.losses.vocabulary`).
    parallelize_module(decoder.embed_tokens, tensor, RowwiseParallel(input_layouts=Replicate()))
    if not model.config.decoder.tie_word_embeddings:
        spread_experts(decoder.lm_head, tensor)
    block: Any
    for layer, block in enumerate(decoder.layers):
        plan: dict[str, ParallelStyle] = {
            "self_attn.q_proj": ColwiseParallel(),
            "self_attn.k_proj": ColwiseParallel(),
            "self_attn.v_proj": ColwiseParallel(),
            "self_attn.o_proj": RowwiseParallel(),
        }
        if model.config.decoder.has_experts(layer):
            spread_experts(block.mlp.experts, tensor)
            block.mlp.dispatcher = TensorDispatcher(tensor.get_group(), block.mlp.config.num_experts)
        else:
            _sum_gradient_once(block.mlp, tensor)
            plan |= {
                "mlp.gate_proj": ColwiseParallel(),
                "mlp.up_proj": ColwiseParallel(),
                "mlp.down_proj": RowwiseParallel(),
            }
        _sum_gradient_once(block.self_attn, tensor)
        parallelize_module(block, tensor, plan)


def _sum_gradient_once(module: nn.Module, mesh: DeviceMesh) -> None:
    """Makes a module's input one DTensor for its column-wise layers: its gradient is then summed over ranks once."""

    def to_dtensor(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return DTensor.from_local(args[0], mesh, [Replicate()], run_check=False), *args[1:]

    module.register_forward_pre_hook(to_dtensor)


def partial_parameters(model: MultimodalModel) -> list[nn.Parameter]:
    """Weights that every rank has whole but applies to its own heads: of their gradients each rank has a part."""
    layers: Any = model.decoder.layers
    norms = [norm for block in layers for norm in (block.self_attn.q_norm, block.self_attn.k_norm)]
    return [parameter for norm in norms if norm is not None for parameter in norm.parameters()]


@torch.no_grad()
def sum_partial_gradients(model: MultimodalModel, mesh: ParallelMesh) -> None:
    """Adds them up over the tensor axis: one all-reduce, after the last backward pass of a step."""
    if mesh.config.tensor == 1:
        return
    gradients = [_local(p.grad) for p in partial_parameters(model) if p.grad is not None]
    if gradients:
        total = summed(torch.cat([gradient.flatten() for gradient in gradients]), mesh.dense.get_group("tensor"))
        for gradient, part in zip(gradients, total.split([each.numel() for each in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
