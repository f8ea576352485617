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
from mmllm.model.roles import mark
from mmllm_kernels import Backend, MoEOutput


@dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts, dropless.

    Attributes:
        num_experts: experts a layer.
        num_experts_per_tok: experts a token.
        moe_intermediate_size: inner width of each expert.
        router_aux_loss_coef: weight of the balance loss (1 at perfect balance) in the training loss.
        router_z_loss_coef: weight of the router's z-loss (ST-MoE, arXiv 2202.08906).
        norm_topk_prob: divide a token's chosen gates by their sum.
        backend: of `mmllm_kernels.moe`.
    """

    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 256
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001
    norm_topk_prob: bool = True
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"moe.num_experts_per_tok is {self.num_experts_per_tok}; it must be between 1 and num_experts, "
                f"{self.num_experts}"
            )
        if self.moe_intermediate_size < 1:
            raise ValueError(f"moe.moe_intermediate_size is {self.moe_intermediate_size}; it must be positive")


class Router(nn.Module):
    """A score of each expert for each token."""

    def __init__(self, width: int, num_experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        mark(self, weight="head")

    def forward(self, x_ND: Tensor) -> Tensor:
        """Logits [N, E], float32 or wider, also under autocast."""
        dtype = torch.promote_types(torch.promote_types(x_ND.dtype, self.weight.dtype), torch.float32)
        with torch.autocast(x_ND.device.type, enabled=False):
            return F.linear(x_ND.to(dtype), self.weight.to(dtype))


class Experts(nn.Module):
    """Weights stacked over experts: gate and up in one matrix [E, 2I, D], and down [E, D, I]."""

    def __init__(self, width: int, config: MoEConfig):
        super().__init__()
        num_experts, inner = config.num_experts, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(num_experts, width, inner))
        mark(self, gate_up_proj="hidden", down_proj="hidden")


class MoE(nn.Module):
    """Router and experts."""

    def __init__(self, width: int, config: MoEConfig):
        super().__init__()
        self.config = config
        self.gate = Router(width, config.num_experts)
        self.experts = Experts(width, config)

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor, MoEOutput]:
        """Outputs [N, D], router logits [N, E] (float32 or wider, also under autocast) and how the kernel routed."""
        logits_NE = self.gate(x_ND)
        result = mmllm_kernels.moe(
            x_ND,
            logits_NE,
            self.experts.gate_up_proj,
            self.experts.down_proj,
            self.config.num_experts_per_tok,
            self.config.norm_topk_prob,
            self.config.backend,
        )
        return result.out_TD, logits_NE, result


class MLP(nn.Module):
    """Dense SwiGLU (arXiv 2002.05202)."""

    def __init__(self, width: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, intermediate_size, bias=False)
        self.up_proj = nn.Linear(width, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, width, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Same shape as the input."""
        return self.down_proj(F.silu(self.gate_proj(x_ND)) * self.up_proj(x_ND))


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
