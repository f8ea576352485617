"""Plain PyTorch: the definition of correct. Every other backend is tested against this file.

Shapes: T tokens, D model width, E experts, K experts a token, N expert inner width, V codes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class MoEOutput(NamedTuple):
    """What a mixture of experts gives back."""

    out_TD: Tensor
    counts_E: Tensor
    """int64: how many (token, choice) pairs each expert took; sums to T·K."""
    experts_TK: Tensor
    """int64: each token's experts, the best first."""


def route(router_logits_TE: Tensor, top_k: int, renormalise: bool = True) -> tuple[Tensor, Tensor]:
    """Softmax over the experts in at least float32, then the best K of each token.

    Returns:
        gates_TK (their sum is 1 if `renormalise`) and experts_TK (int64).
    """
    if not 1 <= top_k <= router_logits_TE.shape[-1]:
        raise ValueError(f"top_k is {top_k}; it must be between 1 and the {router_logits_TE.shape[-1]} experts")
    dtype = torch.promote_types(router_logits_TE.dtype, torch.float32)
    gates_TK, experts_TK = router_logits_TE.softmax(dim=-1, dtype=dtype).topk(top_k, dim=-1)
    if renormalise:
        gates_TK = gates_TK / gates_TK.sum(dim=-1, keepdim=True)
    return gates_TK, experts_TK


def moe(
    x_TD: Tensor,
    router_logits_TE: Tensor,
    w_gate_up_E2ND: Tensor,
    w_down_EDN: Tensor,
    top_k: int,
    renormalise: bool = True,
) -> MoEOutput:
    """Dropless mixture of SwiGLU experts: every expert sees every token, weighted by its gate.

    Args:
        x_TD: tokens.
        router_logits_TE: unnormalised routing scores.
        w_gate_up_E2ND: rows [0, N) are the gate's, rows [N, 2N) the up projection's.
        w_down_EDN: the down projections.
        top_k: experts a token.
        renormalise: divide the chosen gates by their sum (Mixtral's way, arXiv 2401.04088).
    """
    gates_TK, experts_TK = route(router_logits_TE, top_k, renormalise)
    num_experts = router_logits_TE.shape[-1]
    gates_TE = torch.zeros_like(router_logits_TE, dtype=gates_TK.dtype).scatter(1, experts_TK, gates_TK)
    out_TD = torch.zeros_like(x_TD)
    for e in range(num_experts):
        gate_TN, up_TN = (x_TD @ w_gate_up_E2ND[e].T).chunk(2, dim=-1)
        out_TD = out_TD + (F.silu(gate_TN) * up_TN) @ w_down_EDN[e].T * gates_TE[:, e, None].to(x_TD.dtype)
    return MoEOutput(out_TD, torch.bincount(experts_TK.flatten(), minlength=num_experts), experts_TK)


def nearest_code(x_TD: Tensor, codebook_VD: Tensor) -> Tensor:
    """Index of the nearest row of the codebook (Euclidean; the lowest index wins a tie), int64 [T]."""
    return ((x_TD[:, None] - codebook_VD[None]) ** 2).sum(dim=-1).argmin(dim=-1)
