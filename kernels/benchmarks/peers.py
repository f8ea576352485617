"""Other mixtures of experts over the same weights and the same router logits; each is optional.

T tokens, D width, E experts, K experts a token, N inner width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[Tensor, Tensor], Tensor]
"""Tokens [T, D] and router logits [T, E] to outputs [T, D]."""


def find(
    w_gate_up: Tensor, w_down: Tensor, top_k: int, names: tuple[str, ...]
) -> tuple[dict[str, tuple[Forward, list[Tensor]]], dict[str, str]]:
    """What can run here, as name -> (forward, parameters), and name -> why not."""
    makers = {
        "transformers eager": lambda: _transformers(w_gate_up, w_down, top_k, "eager"),
        "transformers grouped_mm": lambda: _transformers(w_gate_up, w_down, top_k, "grouped_mm"),
        "liger": lambda: _liger(w_gate_up, w_down, top_k),
        "scattermoe": lambda: _scattermoe(w_gate_up, w_down, top_k),
        "sonicmoe": lambda: _sonicmoe(w_gate_up, top_k),
    }
    found, missing = {}, {}
    for name in names:
        if not w_gate_up.is_cuda and not name.startswith("transformers"):
            missing[name] = "needs a GPU"
            continue
        try:
            found[name] = makers[name]()
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}"
    return found, missing


def _route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """As transformers' MixtralTopKRouter: softmax, top-k, gates divided by their sum."""
    gates, experts = logits.float().softmax(dim=-1).topk(top_k, dim=-1)
    return gates / gates.sum(dim=-1, keepdim=True), experts


def _transformers(w_gate_up: Tensor, w_down: Tensor, top_k: int, implementation: str) -> tuple[Forward, list[Tensor]]:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    num_experts, inner2, width = w_gate_up.shape
    config = MixtralConfig(
        hidden_size=width, intermediate_size=inner2 // 2, num_local_experts=num_experts, num_experts_per_tok=top_k
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = MixtralExperts(config)
    experts.gate_up_proj, experts.down_proj = nn.Parameter(w_gate_up.detach()), nn.Parameter(w_down.detach())

    def forward(x: Tensor, logits: Tensor) -> Tensor:
        gates, chosen = _route(logits, top_k)
        return experts(x, chosen, gates.to(x.dtype))

    return forward, [experts.gate_up_proj, experts.down_proj]


def _liger(w_gate_up: Tensor, w_down: Tensor, top_k: int) -> tuple[Forward, list[Tensor]]:
    from liger_kernel.ops import LigerFusedMoEFunction  # pyright: ignore[reportMissingImports]

    parameters = [w_gate_up.detach().requires_grad_(), w_down.detach().requires_grad_()]

    def forward(x: Tensor, logits: Tensor) -> Tensor:
        gates, chosen = _route(logits, top_k)
        return LigerFusedMoEFunction.apply(x, *parameters, chosen.int(), gates.to(x.dtype))

    return forward, parameters


def _scattermoe(w_gate_up: Tensor, w_down: Tensor, top_k: int) -> tuple[Forward, list[Tensor]]:
    from scattermoe.mlp import GLUMLP  # pyright: ignore[reportMissingImports]

    num_experts, inner2, width = w_gate_up.shape
    with torch.device("meta"):
        mlp: Any = GLUMLP(width, inner2 // 2, num_experts, top_k)
    gate, up = w_gate_up.detach().chunk(2, dim=1)
    mlp.experts.weight = nn.Parameter(torch.cat([up, gate], dim=1))  # it has the gate second
    mlp.output_experts.weight = nn.Parameter(w_down.detach())

    def forward(x: Tensor, logits: Tensor) -> Tensor:
        gates, chosen = _route(logits, top_k)
        return mlp(x, gates.to(x.dtype), chosen)

    return forward, [mlp.experts.weight, mlp.output_experts.weight]


def _sonicmoe(w_gate_up: Tensor, top_k: int) -> tuple[Forward, list[Tensor]]:
    """With weights and a router of its own: it takes no logits. Its router's product and auxiliary loss are extras."""
    from sonicmoe import KernelBackendMoE, MoE  # pyright: ignore[reportMissingImports]
    from sonicmoe.enums import ActivationType  # pyright: ignore[reportMissingImports]

    num_experts, inner2, width = w_gate_up.shape
    layer: Any = MoE(
        num_experts=num_experts, num_experts_per_tok=top_k, hidden_size=width, intermediate_size=inner2 // 2,
        activation_function=ActivationType.SWIGLU, add_bias=False, std=0.02,
    ).to(w_gate_up.device, w_gate_up.dtype)  # fmt: skip

    def forward(x: Tensor, logits: Tensor) -> Tensor:
        return layer(x, kernel_backend_moe=KernelBackendMoE.sonicmoe)[0] + 0.0 * logits.sum()

    return forward, list(layer.parameters())
