"""Plain PyTorch: the definition of correct. Every other backend is tested against this file.

Written to be read, not to be fast: every expert sees every token, and its gate, mostly zero, weighs
what it says.

Shapes: T tokens, D model width, E experts, K experts a token, N expert inner width, S shared experts, V codes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ExpertsOutput(NamedTuple):
    """What experts give back whose gates and indices were given."""

    out_TD: Tensor
    counts_E: Tensor
    """int64: how many (token, choice) pairs each expert took; sums to T·K less the pairs left out."""


class MoEOutput(NamedTuple):
    """What a mixture of experts gives back."""

    out_TD: Tensor
    counts_E: Tensor
    """int64: how many (token, choice) pairs each expert took; sums to T·K."""
    experts_TK: Tensor
    """int64: each token's experts, the best first."""


def route(router_logits_TE: Tensor, top_k: int, norm_topk_prob: bool = True) -> tuple[Tensor, Tensor]:
    """The K experts of the largest logits (of equal ones the lowest index) and their softmax gates.

    Args:
        router_logits_TE: unnormalized scores; an expert at −inf gets the gate 0, and is taken only if fewer
            than K others are left. A token needs at least one finite logit.
        top_k: K.
        norm_topk_prob: gates are the softmax over the K chosen logits (their sum is 1); otherwise over all E.

    Returns:
        gates_TK, in at least float32, and experts_TK (int64).
    """
    if not 1 <= top_k <= router_logits_TE.shape[-1]:
        raise ValueError(f"top_k is {top_k}; it must be between 1 and the {router_logits_TE.shape[-1]} experts")
    logits_TE = router_logits_TE.to(torch.promote_types(router_logits_TE.dtype, torch.float32))
    experts_TK = torch.sort(logits_TE.detach(), dim=-1, descending=True, stable=True).indices[:, :top_k]
    if norm_topk_prob:
        return logits_TE.gather(1, experts_TK).softmax(dim=-1), experts_TK
    return logits_TE.softmax(dim=-1).gather(1, experts_TK), experts_TK


def swiglu_expert(x_TD: Tensor, w_gate_up_2ND: Tensor, w_down_DN: Tensor) -> Tensor:
    """One expert (arXiv 2002.05202): down · (silu(gate · x) ⊙ (up · x)), for each token."""
    gate_TN, up_TN = (x_TD @ w_gate_up_2ND.T).chunk(2, dim=-1)
    return (F.silu(gate_TN) * up_TN) @ w_down_DN.T


def experts(
    x_TD: Tensor,
    gates_TK: Tensor,
    experts_TK: Tensor,
    w_gate_up_E2ND: Tensor,
    w_down_EDN: Tensor,
    shared_gate_up_S2ND: Tensor | None = None,
    shared_down_SDN: Tensor | None = None,
) -> ExpertsOutput:
    """SwiGLU experts: each token's output is the sum over its K experts, weighted by its gates.

    Args:
        x_TD: tokens.
        gates_TK: weights of a token's experts, in at least float32.
        experts_TK: which experts these are. A negative index leaves the pair out: nobody computes it, and its
            gate has the gradient 0. An expert that a token names twice counts twice.
        w_gate_up_E2ND: rows [0, N) are the gate's, rows [N, 2N) the up projection's.
        w_down_EDN: the down projections.
        shared_gate_up_S2ND: experts that every token takes with the gate 1 (DeepSeekMoE, arXiv 2401.06066).
        shared_down_SDN: their down projections.
    """
    # The weighted sum is taken in at least float32, whatever the experts compute in.
    out_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, gates_TK.dtype))
    counts = []
    for e in range(len(w_gate_up_E2ND)):
        here_TK = experts_TK == e
        gate_T1 = torch.where(here_TK, gates_TK, 0.0).sum(dim=1, keepdim=True)
        out_TD = out_TD + gate_T1 * swiglu_expert(x_TD, w_gate_up_E2ND[e], w_down_EDN[e])
        counts.append(here_TK.sum())
    if shared_gate_up_S2ND is not None and shared_down_SDN is not None:
        for w_gate_up_2ND, w_down_DN in zip(shared_gate_up_S2ND, shared_down_SDN, strict=True):
            out_TD = out_TD + swiglu_expert(x_TD, w_gate_up_2ND, w_down_DN)
    return ExpertsOutput(out_TD.to(x_TD.dtype), torch.stack(counts))


def moe(
    x_TD: Tensor,
    router_logits_TE: Tensor,
    w_gate_up_E2ND: Tensor,
    w_down_EDN: Tensor,
    top_k: int,
    norm_topk_prob: bool = True,
    shared_gate_up_S2ND: Tensor | None = None,
    shared_down_SDN: Tensor | None = None,
) -> MoEOutput:
    """Dropless mixture of SwiGLU experts: `experts` with the gates and indices of `route`.

    Args:
        x_TD: tokens.
        router_logits_TE: unnormalized routing scores; see `route`.
        w_gate_up_E2ND: as of `experts`.
        w_down_EDN: as of `experts`.
        top_k: experts a token.
        norm_topk_prob: divide the chosen gates by their sum (Mixtral's way, arXiv 2401.04088).
        shared_gate_up_S2ND: as of `experts`.
        shared_down_SDN: as of `experts`.
    """
    gates_TK, experts_TK = route(router_logits_TE, top_k, norm_topk_prob)
    weights = (w_gate_up_E2ND, w_down_EDN, shared_gate_up_S2ND, shared_down_SDN)
    return MoEOutput(*experts(x_TD, gates_TK, experts_TK, *weights), experts_TK)


def nearest_code(x_TD: Tensor, codebook_VD: Tensor) -> Tensor:
    """Index of the nearest row of the codebook (Euclidean; the lowest index wins a tie), int64 [T]."""
    return ((x_TD[:, None] - codebook_VD[None]) ** 2).sum(dim=-1).argmin(dim=-1)
