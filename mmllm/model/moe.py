"""The feed-forward layers: a dense SwiGLU, and a dropless mixture of SwiGLU experts.

Shapes: N tokens of the whole batch (padding removed), D width, E experts, I inner width,
L layers with experts, M modalities.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmllm_kernels
from mmllm_kernels import Backend, MoEOutput


@dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts, dropless.

    Attributes:
        num_experts: experts a layer.
        top_k: experts a token.
        expert_width: inner width of each expert.
        balance_weight: weight of the balance loss (1 at perfect balance) in the training loss.
        z_weight: weight of the router's z-loss (ST-MoE, arXiv 2202.08906).
        renormalise: divide a token's chosen gates by their sum.
        backend: of `mmllm_kernels.moe`.
    """

    num_experts: int = 8
    top_k: int = 2
    expert_width: int = 256
    balance_weight: float = 0.01
    z_weight: float = 0.001
    renormalise: bool = True
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"moe.top_k is {self.top_k}; it must be between 1 and num_experts, {self.num_experts}")
        if self.expert_width < 1:
            raise ValueError(f"moe.expert_width is {self.expert_width}; it must be positive")


class MoE(nn.Module):
    """Router and experts. Weights are stacked over experts, gate and up in one matrix."""

    def __init__(self, width: int, config: MoEConfig):
        super().__init__()
        self.config = config
        self.router_ED = nn.Parameter(torch.empty(config.num_experts, width))
        self.gate_up_E2ID = nn.Parameter(torch.empty(config.num_experts, 2 * config.expert_width, width))
        self.down_EDI = nn.Parameter(torch.empty(config.num_experts, width, config.expert_width))

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor, MoEOutput]:
        """Outputs [N, D], router logits [N, E] (float32 or wider, also under autocast) and how the kernel routed."""
        dtype = torch.promote_types(torch.promote_types(x_ND.dtype, self.router_ED.dtype), torch.float32)
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = F.linear(x_ND.to(dtype), self.router_ED.to(dtype))
        result = mmllm_kernels.moe(
            x_ND,
            logits_NE,
            self.gate_up_E2ID,
            self.down_EDI,
            self.config.top_k,
            self.config.renormalise,
            self.config.backend,
        )
        return result.out_TD, logits_NE, result


class MLP(nn.Module):
    """Dense SwiGLU (arXiv 2002.05202), gate and up in one matrix."""

    def __init__(self, width: int, mlp_width: int):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * mlp_width, bias=False)
        self.down = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Same shape as the input."""
        gate_NI, up_NI = self.gate_up(x_ND).chunk(2, dim=-1)
        return self.down(F.silu(gate_NI) * up_NI)


@dataclass
class RoutingStats:
    """Routing of one forward pass, padding left out, for the auxiliary losses and for reports.

    Sums, not means, so that ranks can be added: see `balance_loss`.
    """

    layers: tuple[int, ...]
    """Which decoder layers the L rows are."""
    top_k: int
    num_tokens: int
    counts_LE: Tensor
    """int64: (token, choice) pairs."""
    probability_sums_LE: Tensor
    """Differentiable: the router's probabilities summed over tokens."""
    z_sums_L: Tensor
    """Differentiable: logsumexp(router logits)² summed over tokens."""
    counts_LME: Tensor | None = None
    """int64, by modality; None unless `modality_BT` was given."""

    def balance_loss(self, counts_LE: Tensor | None = None, num_tokens: int | Tensor | None = None) -> Tensor:
        """E · Σᵢ fᵢ Pᵢ (Switch, arXiv 2101.03961), mean over layers: 1 at perfect balance.

        fᵢ is expert i's share of (token, choice) pairs, Pᵢ its mean probability. With the counts and
        number of tokens summed over all ranks the ranks' losses add up to the loss of one process.
        """
        counts_LE = self.counts_LE if counts_LE is None else counts_LE
        num_tokens = self.num_tokens if num_tokens is None else num_tokens
        if not self.layers or (not isinstance(num_tokens, Tensor) and num_tokens == 0):
            return self.probability_sums_LE.sum() * 0.0
        shares_LE = counts_LE.to(self.probability_sums_LE.dtype) / (num_tokens * self.top_k)
        num_experts = shares_LE.shape[1]
        return num_experts * (shares_LE * self.probability_sums_LE).sum(dim=1).mean() / num_tokens

    def z_loss(self, num_tokens: int | Tensor | None = None) -> Tensor:
        """Mean over tokens and layers of logsumexp(router logits)²."""
        num_tokens = max(self.num_tokens, 1) if num_tokens is None else num_tokens
        return self.z_sums_L.sum() / max(len(self.layers), 1) / num_tokens
