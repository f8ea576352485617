"""A model that was built without memory becomes this rank's part of it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmllm.model.multimodal import MultimodalModel
from mmllm.parallel.deferred import DeferredInit, materialize
from mmllm.parallel.experts import spread
from mmllm.parallel.mesh import ParallelMesh
from mmllm.parallel.shard import ShardConfig, shard
from mmllm.parallel.tensor import split


def distribute(
    model: MultimodalModel, deferred: DeferredInit, mesh: ParallelMesh, config: ShardConfig, device: torch.device
) -> None:
    """Shards a model over a mesh, in place, and gives its decoder the weights that one process would have.

    Args:
        model: its decoder was built under `deferred`, the rest has its weights.
        deferred: what the decoder was built under.
        mesh: of all processes.
        config: precision, and when weights are freed.
        device: this rank's.
    """
    initializers = deferred.initializers(model.decoder)
    if mesh.config.tensor > 1:
        split(model, mesh)
    if mesh.config.expert > 1:
        spread(model, mesh)
    shard(model, mesh, config)
    materialize(model.decoder, initializers, device)


def whole_state(model: MultimodalModel) -> dict[str, Tensor] | None:
    """A sharded model's state dict as whole CPU tensors, on rank 0; None elsewhere. A collective call."""
    is_first = dist.get_rank() == 0
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if is_first:
            state[name] = whole.cpu()
    return state if is_first else None
