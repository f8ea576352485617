"""The feed-forward layers: a dense SwiGLU, and a dropless mixture of SwiGLU experts.

Shapes: N tokens of the whole batch (padding removed), D width, E experts, K experts a token, I inner width,
S shared experts, T tokens that arrived here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmllm_kernels
from mmllm.model.roles import mark
from mmllm.model.router import MoEConfig, Router, TokenInfo
from mmllm.model.routing_stats import LayerSums, layer_sums
from mmllm_kernels import Backend

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Tokens [T, D], gates [T, K] and indices [T, K] among the experts that are here (-1: none) to weighted sums [T, D]."""

Dispatcher = Callable[[Tensor, Tensor, Tensor, Compute], Tensor]
"""Tokens [N, D], gates [N, K], experts [N, K], and what computes the experts that are here, to weighted sums [N, D].
Differentiable in tokens and gates. It may call `Compute` with the tokens of other ranks."""


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


class Experts(nn.Module):
    """Weights stacked over experts: gate and up in one matrix [E, 2I, D], and down [E, D, I]."""

    def __init__(self, width: int, config: MoEConfig):
        super().__init__()
        num_experts, inner = config.num_experts, config.moe_intermediate_size
        self.backend: Backend = config.backend
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(num_experts, width, inner))
        mark(self, gate_up_proj="hidden", down_proj="hidden")

    def forward(
        self, x_TD: Tensor, gates_TK: Tensor, experts_TK: Tensor, shared: SharedExperts | None = None
    ) -> Tensor:
        """Weighted sums of the chosen experts' outputs, and of the shared experts' where they are given, [T, D]."""
        return mmllm_kernels.experts(
            x_TD,
            gates_TK,
            experts_TK,
            self.gate_up_proj,
            self.down_proj,
            self.backend,
            shared_gate_up_S2ND=None if shared is None else shared.gate_up_proj,
            shared_down_SDN=None if shared is None else shared.down_proj,
        ).out_TD


class SharedExperts(nn.Module):
    """Experts that every token passes, stacked as the others: [S, 2I, D] and [S, D, I]."""

    def __init__(self, width: int, config: MoEConfig):
        super().__init__()
        num_shared, inner = config.n_shared_experts, config.moe_intermediate_size
        self.backend: Backend = config.backend
        self.gate_up_proj = nn.Parameter(torch.empty(num_shared, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(num_shared, width, inner))
        mark(self, gate_up_proj="hidden", down_proj="hidden")

    def forward(self, x_ND: Tensor) -> Tensor:
        """The sum of their outputs; `Experts` computes it in one go with its own where all experts are here."""
        num_tokens, num_shared = len(x_ND), len(self.gate_up_proj)
        gates_NS = torch.ones(num_tokens, num_shared, device=x_ND.device)
        experts_NS = torch.arange(num_shared, device=x_ND.device).expand(num_tokens, num_shared)
        weights = (self.gate_up_proj, self.down_proj)
        return mmllm_kernels.experts(x_ND, gates_NS, experts_NS, *weights, self.backend).out_TD


class MoE(nn.Module):
    """Router and experts, with what brings tokens to their experts between them.

    Attributes:
        dispatcher: of tokens to experts on other ranks; None: all experts are here.
    """

    def __init__(self, width: int, config: MoEConfig):
        super().__init__()
        self.config = config
        self.gate = Router(width, config)
        self.experts = Experts(width, config)
        self.shared_experts = SharedExperts(width, config) if config.n_shared_experts else None
        self.dispatcher: Dispatcher | None = None

    def forward(self, x_ND: Tensor, tokens: TokenInfo) -> tuple[Tensor, LayerSums | None]:
        """Outputs [N, D], and the sums of the routing if they are wanted."""
        routing = self.gate(x_ND, tokens.modality_N)
        if self.dispatcher is None:
            out_ND = self.experts(x_ND, routing.gates_NK, routing.experts_NK, self.shared_experts)
        else:
            out_ND = self.dispatcher(x_ND, routing.gates_NK, routing.experts_NK, self.experts)
            if self.shared_experts is not None:
                out_ND = out_ND + self.shared_experts(x_ND)
        return out_ND, layer_sums(routing, tokens, self.config) if tokens.is_counted else None
