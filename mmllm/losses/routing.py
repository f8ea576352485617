"""The losses of a decoder's routers, as its config has them: each rank's part, so that the parts add up.

Shapes: L layers with experts, E experts, M modalities, B sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmllm.batch import Modality
from mmllm.losses.router import (
    balance_loss,
    global_entropy_losses,
    local_entropy_losses,
    sequence_balance_loss,
    z_loss,
)
from mmllm.model.router import MoEConfig
from mmllm.model.routing_stats import RoutingStats


@dataclass(frozen=True)
class RoutingTotals:
    """What the losses need of all ranks: detached, in float64, to be summed over ranks."""

    num_tokens: Tensor
    counts_LE: Tensor
    num_sequences: Tensor
    """Those that hold tokens; 0 where they are not counted."""
    tokens_M: Tensor
    """Zeros where they are not counted."""
    probability_sums_LME: Tensor
    """[0, M, E] where nothing needs them."""
    tokens_L: Tensor
    """[0] where all tokens pass all layers."""

    @classmethod
    def of(cls, routing: RoutingStats) -> RoutingTotals:
        """One rank's."""
        like = routing.counts_LE.double()
        tokens_M, sums_LME = routing.tokens_M, routing.probability_sums_LME
        tokens_B = routing.tokens_B
        return cls(
            num_tokens=like.new_full((), routing.num_tokens),
            counts_LE=like,
            num_sequences=like.new_zeros(()) if tokens_B is None else (tokens_B > 0).sum().double(),
            tokens_M=like.new_zeros(len(Modality)) if tokens_M is None else tokens_M.double(),
            probability_sums_LME=like.new_zeros(0) if sums_LME is None else sums_LME.detach().double(),
            tokens_L=like.new_zeros(0) if routing.tokens_L is None else routing.tokens_L.double(),
        )

    def flat(self) -> Tensor:
        """All of it, one after the other."""
        return torch.cat([tensor.flatten() for tensor in vars(self).values()])

    def with_flat(self, values: Tensor) -> RoutingTotals:
        """The same with other values, as `flat` gives them."""
        parts = values.split([tensor.numel() for tensor in vars(self).values()])
        pairs = zip(vars(self).items(), parts, strict=True)
        return replace(self, **{name: part.view(tensor.shape) for (name, tensor), part in pairs})


def router_losses(config: MoEConfig, routing: RoutingStats, totals: RoutingTotals) -> dict[str, Tensor]:
    """This rank's part of each loss that the config gives a weight; see `MoEConfig` for what they are.

    Args:
        config: of the experts.
        routing: of this rank's tokens.
        totals: of all ranks.

    Returns:
        "balance", "z", "local_entropy" and "global_entropy" to differentiable scalars.
    """
    losses: dict[str, Tensor] = {}
    if not routing.layers:
        return losses
    dtype = routing.probability_sums_LE.dtype
    num_tokens, tokens_M = totals.num_tokens.to(dtype), totals.tokens_M.to(dtype)
    num_tokens = totals.tokens_L.to(dtype) if len(totals.tokens_L) else num_tokens
    if config.counts_by_sequence:
        assert routing.counts_LBE is not None and routing.probability_sums_LBE is not None
        assert routing.tokens_B is not None
        sums = (routing.counts_LBE, routing.probability_sums_LBE, routing.tokens_B)
        losses["balance"] = sequence_balance_loss(*sums, routing.top_k)[0] / totals.num_sequences.to(dtype).clamp(min=1)
    elif config.router_aux_loss_coef:
        scope = "global" if config.aux_loss_scope == "global" else "layer"
        counts_LE = totals.counts_LE.to(dtype)
        losses["balance"] = balance_loss(counts_LE, routing.probability_sums_LE, num_tokens, routing.top_k, scope)
    if config.router_z_loss_coef:
        losses["z"] = z_loss(routing.z_sums_L, num_tokens)
    if config.local_entropy_loss_coef:
        assert routing.entropy_sums_LM is not None, "the batch's modalities are given in training"
        columns = [int(Modality[name.upper()]) for name in config.local_entropy_modalities]
        by_modality_LM = local_entropy_losses(routing.entropy_sums_LM, tokens_M)
        losses["local_entropy"] = by_modality_LM[:, columns].sum(dim=1).mean()
    if config.global_entropy_loss_coef:
        assert routing.probability_sums_LME is not None, "the batch's modalities are given in training"
        threshold = config.global_entropy_min_experts
        by_modality_LM = global_entropy_losses(
            routing.probability_sums_LME,
            tokens_M,
            totals.probability_sums_LME.to(dtype),
            math.log(threshold) if threshold else None,
        )
        losses["global_entropy"] = by_modality_LM.sum(dim=1).mean()
    return losses


def router_loss_weights(config: MoEConfig) -> dict[str, float]:
    """What each of `router_losses` weighs in training."""
    return {
        "balance": config.router_aux_loss_coef,
        "z": config.router_z_loss_coef,
        "local_entropy": config.local_entropy_loss_coef,
        "global_entropy": config.global_entropy_loss_coef,
    }
