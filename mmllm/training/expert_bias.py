"""Balances experts by a bias of their own instead of a loss (arXiv 2408.15664, as in DeepSeek-V3).

Shapes: L layers with experts, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmllm.model.decoder import Decoder
from mmllm.model.router import Router


class ExpertBias:
    """The routers' biases, and the load since the last step that tells how to move them.

    Args:
        routers: of each layer with experts, in order; all have a bias.
        pools: sets of experts that share no expert; an expert's load is compared with the mean of its own set.
        speed: γ.
    """

    def __init__(self, routers: list[Router], pools: list[tuple[int, ...]], speed: float) -> None:
        self._routers, self._speed = routers, speed
        num_experts = len(routers[0].weight)
        pool_of = {expert: pool for pool in pools for expert in pool}
        is_rival_EE = [
            [float(other in pool_of[expert]) for other in range(num_experts)] for expert in range(num_experts)
        ]
        self._is_rival_EE = torch.tensor(is_rival_EE, dtype=torch.float64, device=routers[0].weight.device)
        self._counts_LE: Tensor | None = None

    @staticmethod
    def of(decoder: Decoder) -> ExpertBias | None:
        """For a decoder; None where its experts have no bias."""
        moe = decoder.config.moe
        if moe is None or not moe.use_expert_bias:
            return None
        routers = [layer.gate for layer in decoder.expert_layers().values()]
        return ExpertBias(routers, moe.expert_pools(), moe.bias_update_speed) if routers else None

    def add(self, counts_LE: Tensor) -> None:
        """Counts a batch's choices, of all ranks."""
        self._counts_LE = counts_LE.double() if self._counts_LE is None else self._counts_LE + counts_LE

    @torch.no_grad()
    def step(self) -> None:
        """After an optimizer step: b += γ · sign(mean load - load), and counts anew. Asks the host nothing."""
        if self._counts_LE is None:
            return
        counts_LE, self._counts_LE = self._counts_LE, None
        # Whole numbers, so that a load that is exactly the mean moves nothing.
        above_LE = counts_LE @ self._is_rival_EE - counts_LE * self._is_rival_EE.sum(dim=0)
        for router, sign_E in zip(self._routers, above_LE.sign().unbind(), strict=True):
            bias_E = router.e_score_correction_bias
            assert bias_E is not None
            bias_E.add_(sign_E.to(bias_E.dtype), alpha=self._speed)
