"""FSDP2 for the multimodal model: what is gathered and reduced together, in what precision, and when.

Each decoder layer is a unit, and so is each block of a trained image tower, the embedding, and the head (one unit for
both where they are tied); the small rest is the root's. While a layer computes, the next one's weights are gathered.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from mmllm.model.multimodal import ModelConfig, MultimodalModel
from mmllm.model.recompute import recompute_mode
from mmllm.parallel.mesh import ParallelConfig, ParallelMesh


@dataclass(frozen=True)
class ShardConfig:
    """How weights are gathered.

    Attributes:
        compute_dtype: of gathered weights and of activations; None: the weights' own. Routers stay in theirs: in bf16,
            1.6% of tokens went to other experts. Norms take bf16 weights and keep their statistics in float32.
        reduce_dtype: of gradients while they are summed over ranks; None: the gradients' own.
        reshard_after_forward: free a layer's weights after its forward pass and gather them again for the backward
            pass; False: keep them, which saves a third of the traffic and costs the memory of a whole model.
    """

    compute_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    reshard_after_forward: bool = True


def shard(model: MultimodalModel, mesh: ParallelMesh, config: ShardConfig | None = None) -> None:
    """Shards a model over a mesh's fsdp axis, in place; its forward pass is then a collective call.

    A frozen image tower stays whole on every rank: it has neither gradients nor optimizer state, and so a rank without
    pictures need not run it.

    Args:
        model: on the meta device or not; what the tensor and expert axes split is split already.
        mesh: of all processes.
        config: precision, and when weights are freed.
    """
    config = config or ShardConfig()
    units = _Units(mesh, config)
    decoder, vision = model.decoder, model.vision
    layers: list[list[FSDPModule]] = []
    for layer, block in enumerate(decoder.layers):
        nested: list[nn.Module] = []
        if model.config.decoder.has_experts(layer):
            moe: Any = block.mlp
            if config.compute_dtype is not None:
                nested.append(units.make(moe.gate, keeps_dtype=True))
            if mesh.config.expert > 1:
                nested.append(units.make(moe.experts, mesh.expert_fsdp_mesh(), casts_inputs=False))
        layers.append([units.make(block), *nested])  # pyright: ignore[reportArgumentType]
    blocks: list[FSDPModule] = []
    frozen: set[nn.Parameter] = set()
    if vision is not None and vision.config.trainable:
        vision.to(memory_format=torch.contiguous_format)  # fully_shard takes no other  # pyright: ignore
        blocks = [units.make(block) for block in vision.blocks]
        units.make(vision)
        model.always_runs_tower = True
    elif vision is not None:
        frozen = set(vision.parameters())
    if model.config.decoder.tie_word_embeddings:
        units.make([decoder.embed_tokens, decoder.lm_head])
    else:
        units.make(decoder.embed_tokens)
        units.make(decoder.lm_head)
    # The root's stay gathered for the losses: the CTC head is called after the model's own forward pass, and only on
    # ranks that hear something, so that it can't be a unit of its own, which all would have to call.
    units.make(model, reshards=False, ignored=frozen)
    _prefetch(layers)
    _prefetch([[block] for block in blocks])


def compiles_in_one_graph(model: ModelConfig, mesh: ParallelConfig, config: ShardConfig) -> bool:
    """Whether a sharded layer can be compiled without a break; False: its router is a unit, whose hooks are breaks.

    Raises:
        ValueError: such a layer can't be compiled at all.
    """
    for axis in ("expert", "tensor"):
        if getattr(mesh, axis) > 1:
            raise ValueError(
                f"model.init_args.compile is true and strategy.{axis} is {getattr(mesh, axis)}, whose exchanges "
                f"between ranks lie inside of a layer; set compile to false, or {axis} to 1"
            )
    if model.decoder.moe is None or config.compute_dtype is None:
        return True
    if recompute_mode(model.decoder.gradient_checkpointing) == "selective":
        raise ValueError(
            "model.init_args.compile is true and decoder.gradient_checkpointing is 'selective', which takes the "
            "gathering of a sharded router's weight for an operator that wasn't there before; set "
            "gradient_checkpointing to full or none, or compile to false"
        )
    return False


def free_gathered(model: nn.Module) -> None:
    """Frees weights that a forward pass without a backward pass left gathered: else they would be used again, stale."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _prefetch(units: Sequence[list[FSDPModule]]) -> None:
    """Each unit asks for the next one's weights as soon as it has its own; backwards too."""
    for before, after in itertools.pairwise(units):
        before[0].set_modules_to_forward_prefetch(list(after))
        after[0].set_modules_to_backward_prefetch(list(before))


@dataclass(frozen=True)
class _Units:
    mesh: ParallelMesh
    config: ShardConfig

    def make(
        self,
        module: Any,
        mesh: DeviceMesh | None = None,
        keeps_dtype: bool = False,
        casts_inputs: bool = True,
        reshards: bool = True,
        ignored: set[nn.Parameter] | None = None,
    ) -> Any:
        """Makes a module, or several, one unit.

        Args:
            module: one, or a list.
            mesh: over which it is sharded; None: what is no expert.
            keeps_dtype: its weights are gathered in their own dtype.
            casts_inputs: float inputs become the compute dtype; not where gates are among them, which stay float32.
            reshards: after the forward pass, where that is configured.
            ignored: parameters that stay whole.
        """
        mesh = self.mesh.fsdp_mesh() if mesh is None else mesh
        policy = MixedPrecisionPolicy(
            None if keeps_dtype else self.config.compute_dtype,
            self.config.reduce_dtype,
            cast_forward_inputs=casts_inputs and not keeps_dtype,
        )
        num_shards = mesh.size(mesh.ndim - 1)
        return fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=self.config.reshard_after_forward and reshards,
            shard_placement_fn=lambda parameter: _placement(parameter, num_shards),
            mp_policy=policy,
            ignored_params=ignored,
        )


def _placement(parameter: Tensor, num_shards: int) -> Shard | None:
    """Over which dimension fsdp splits a weight that the tensor or expert axis has split; None: the first.

    Another one than they took, so that each rank's part is one block of the whole.
    """
    if not isinstance(parameter, DTensor):
        return None
    (taken,) = (place.dim for place in parameter.placements if isinstance(place, Shard))
    free = [d for d in range(parameter.ndim) if d != taken and parameter.shape[d] % num_shards == 0]
    if not free:
        raise ValueError(
            f"a weight of shape {list(parameter.shape)} is split over its dimension {taken} by strategy.tensor or "
            f"strategy.expert, and strategy.fsdp, {num_shards}, divides none of the others; choose a divisor"
        )
    return Shard(free[0])
