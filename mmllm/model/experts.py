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

    def __init__(self, width: int, intermediate_size: int, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(width, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(width, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, width, bias=bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Same shape as the input."""
        return self.down_proj(F.silu(self.gate_proj(x_ND)) * self.up_proj(x_ND))


class Experts(nn.Module):
    """Weights stacked over experts: gate and up in one matrix [E, 2I, D], and down [E, D, I]."""

    def __init__(self, width: int, num_experts: int, intermediate_size: int, backend: Backend):
        super().__init__()
        self.backend: Backend = backend
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, width))
        self.down_proj = nn.Parameter(torch.empty(num_experts, width, intermediate_size))
        mark(self, gate_up_proj="hidden", down_proj="hidden")

    def forward(self, x_TD: Tensor, gates_TK: Tensor, experts_TK: Tensor, shared: Experts | None = None) -> Tensor:
        """Weighted sums of the chosen experts' outputs, and of the shared experts' where they are given, [T, D]."""
        return mmllm_kernels.experts(
            x_TD,
            gates_TK,
            experts_TK,
            _here(self.gate_up_proj),
            _here(self.down_proj),
            self.backend,
            shared_gate_up_S2ND=None if shared is None else shared.gate_up_proj,
            shared_down_SDN=None if shared is None else shared.down_proj,
        ).out_TD

    def of_every_token(self, x_TD: Tensor) -> Tensor:
        """The sum of all experts' outputs, each with gate 1."""
        num_tokens, num_experts = len(x_TD), len(self.gate_up_proj)
        gates_TE = torch.ones(num_tokens, num_experts, device=x_TD.device)
        return self(x_TD, gates_TE, torch.arange(num_experts, device=x_TD.device).expand(num_tokens, num_experts))


def _here(weight: Tensor) -> Tensor:
    """This rank's experts, where they are spread over ranks."""
    if type(weight) in (Tensor, nn.Parameter):
        return weight
    from torch.distributed.tensor import DTensor  # half a second that nobody else needs

    return weight.to_local() if isinstance(weight, DTensor) else weight


class MoE(nn.Module):
    """Router and experts, with what brings tokens to their experts between them.

    Attributes:
        dispatcher: of tokens to experts on other ranks; None: all experts are here.
    """

    def __init__(self, width: int, config: MoEConfig):
        super().__init__()
        self.config = config
        self.gate = Router(width, config)
        inner, backend = config.moe_intermediate_size, config.backend
        self.experts = Experts(width, config.num_experts, inner, backend)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = Experts(width, config.n_shared_experts, inner, backend)
        self.dispatcher: Dispatcher | None = None

    def forward(self, x_ND: Tensor, tokens: TokenInfo) -> tuple[Tensor, LayerSums | None]:
        """Outputs [N, D], and the sums of the routing if they are wanted."""
        routing = self.gate(x_ND, tokens.modality_N)
        if self.dispatcher is None:
            out_ND = self.experts(x_ND, routing.gates_NK, routing.experts_NK, self.shared_experts)
        else:
            out_ND = self.dispatcher(x_ND, routing.gates_NK, routing.experts_NK, self.experts)
            if self.shared_experts is not None:
                out_ND = out_ND + self.shared_experts.of_every_token(x_ND)
        return out_ND, layer_sums(routing, tokens, self.config) if tokens.is_counted else None
