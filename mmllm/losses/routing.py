"""The losses of the experts' routers that a config asks for, from one forward pass's `RoutingStats`.

Shapes: L layers with experts, E experts, M modalities, B sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
from mmllm.model.routing_stats import RoutingStats

ROUTER_LOSSES = ("balance", "z", "local_entropy", "global_entropy")
"""Each has a weight of its own in `MoEConfig`; see there."""


@dataclass
class RoutingTotals:
    """What the losses need of all ranks, detached: with it the ranks' losses add up to those of one process."""

    num_tokens: Tensor
    num_sequences: Tensor
    """Those that hold tokens; 0 where nobody asks."""
    counts_LE: Tensor
    tokens_M: Tensor | None
    probability_sums_LME: Tensor | None

    @staticmethod
    def flat(stats: RoutingStats) -> Tensor:
        """This rank's part as one float64 vector, to be added over ranks."""
        return torch.cat([part.flatten() for part in _parts(stats)])

    @staticmethod
    def of(stats: RoutingStats, flat: Tensor | None = None) -> RoutingTotals:
        """The totals.

        Args:
            stats: of this rank; tells the shapes.
            flat: `RoutingTotals.flat` added over ranks; None: there is one rank.
        """
        parts = _parts(stats)
        if flat is not None:
            sizes = [part.numel() for part in parts]
            parts = [new.view(part.shape) for new, part in zip(flat.split(sizes), parts, strict=True)]
        numbers, counts_LE, *of_modalities = parts
        tokens_M = of_modalities.pop(0) if stats.tokens_M is not None else None
        probability_sums_LME = of_modalities.pop(0) if of_modalities else None
        return RoutingTotals(numbers[0], numbers[1], counts_LE, tokens_M, probability_sums_LME)


def _parts(stats: RoutingStats) -> list[Tensor]:
    counts_LE = stats.counts_LE.detach().double()
    num_sequences = 0.0 if stats.tokens_B is None else (stats.tokens_B > 0).sum()
    numbers = counts_LE.new_zeros(2)
    numbers[0] = stats.num_tokens
    numbers[1] = num_sequences
    optional = [x.detach().double() for x in (stats.tokens_M, stats.probability_sums_LME) if x is not None]
    return [numbers, counts_LE, *optional]


def router_losses(stats: RoutingStats, totals: RoutingTotals | None = None) -> dict[str, Tensor]:
    """Each of `ROUTER_LOSSES`, unweighted: this rank's part, differentiable. Those that have no use are left out.

    Args:
        stats: of this rank.
        totals: of all ranks; None: there is one.
    """
    config = stats.config
    if config is None or not stats.layers:
        return {}
    totals = RoutingTotals.of(stats) if totals is None else totals
    wide = stats.probability_sums_LE.dtype
    num_tokens = totals.num_tokens.to(wide)
    if config.aux_loss_scope != "sequence":
        scope = config.aux_loss_scope
        balance = balance_loss(totals.counts_LE, stats.probability_sums_LE, num_tokens, stats.top_k, scope)
        losses = {"balance": balance}
    elif stats.counts_LBE is None or stats.probability_sums_LBE is None or stats.tokens_B is None:
        losses = {}
    else:
        by_sequence = (stats.counts_LBE, stats.probability_sums_LBE, stats.tokens_B)
        total, _ = sequence_balance_loss(*by_sequence, stats.top_k)
        losses = {"balance": total / totals.num_sequences.clamp(min=1).to(wide)}
    losses["z"] = z_loss(stats.z_sums_L, num_tokens)
    if stats.entropy_sums_LM is not None and totals.tokens_M is not None and config.local_entropy_loss_coef:
        losses_LM = local_entropy_losses(stats.entropy_sums_LM, totals.tokens_M)
        chosen = [Modality[name.upper()] for name in config.local_entropy_modalities]
        losses["local_entropy"] = sum((losses_LM[:, m].mean() for m in chosen), start=losses_LM.sum() * 0.0)
    if stats.probability_sums_LME is not None and totals.tokens_M is not None and config.global_entropy_loss_coef:
        threshold = math.log(config.global_entropy_min_experts) if config.global_entropy_min_experts else None
        all_sums_LME = None if totals.probability_sums_LME is None else totals.probability_sums_LME.to(wide)
        losses_LM = global_entropy_losses(stats.probability_sums_LME, totals.tokens_M, all_sums_LME, threshold)
        losses["global_entropy"] = losses_LM.sum(dim=1).mean()
    return losses
