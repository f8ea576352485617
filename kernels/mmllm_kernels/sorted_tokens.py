"""The fast path for CPUs (and GPUs without a kernel of ours): tokens sorted by expert, one GEMM an expert.

The formulation is SonicMoE's (arXiv 2512.14080): backward saves only the tokens and the
pre-activations, and the router's gradient comes from the activations, without the expert outputs.

Shapes: T tokens, D model width, E experts, K experts a token, N expert inner width, V codes,
P = T·K (token, choice) pairs in expert order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm_kernels.reference import MoEOutput, route


def moe(
    x_TD: Tensor,
    router_logits_TE: Tensor,
    w_gate_up_E2ND: Tensor,
    w_down_EDN: Tensor,
    top_k: int,
    renormalise: bool = True,
) -> MoEOutput:
    """The same function as `mmllm_kernels.reference.moe`, at the speed of its matrix products."""
    gates_TK, experts_TK = route(router_logits_TE, top_k, renormalise)
    counts_E = torch.bincount(experts_TK.flatten(), minlength=router_logits_TE.shape[-1])
    order_P = experts_TK.flatten().argsort(stable=True)
    out_TD = _SortedExperts.apply(x_TD, gates_TK.to(x_TD.dtype), order_P, counts_E, w_gate_up_E2ND, w_down_EDN)
    return MoEOutput(out_TD, counts_E, experts_TK)  # pyright: ignore[reportArgumentType]


def nearest_code(x_TD: Tensor, codebook_VD: Tensor, chunk_size: int = 4096) -> Tensor:
    """The same as `mmllm_kernels.reference.nearest_code` by one matrix product a chunk of tokens."""
    squares_V = (codebook_VD**2).sum(dim=-1)
    chunks = [torch.addmm(squares_V, x, codebook_VD.T, alpha=-2).argmin(dim=-1) for x in x_TD.split(chunk_size)]
    return torch.cat(chunks) if chunks else torch.zeros(0, dtype=torch.int64, device=x_TD.device)


class _SortedExperts(torch.autograd.Function):
    """One expert at a time, so that what lies between its matrix products stays in the cache."""

    @staticmethod
    def forward(ctx, x_TD, gates_TK, order_P, counts_E, w_gate_up_E2ND, w_down_EDN):
        (T, K), D = gates_TK.shape, x_TD.shape[1]
        counts = counts_E.tolist()
        tokens_P = order_P // K
        inverse_P = torch.empty_like(order_P)
        inverse_P[order_P] = torch.arange(T * K, device=order_P.device)
        h_P2N = x_TD.new_empty(T * K, w_gate_up_E2ND.shape[1])
        y_PD = x_TD.new_empty(T * K, D)
        runs = zip(*(t.split(counts) for t in (tokens_P, h_P2N, y_PD)), w_gate_up_E2ND, w_down_EDN, strict=True)
        for tokens, h, y, w_gate_up, w_down in runs:
            torch.mm(x_TD.index_select(0, tokens), w_gate_up.T, out=h)
            gate, up = h.chunk(2, dim=-1)
            torch.mm(F.silu(gate).mul_(up), w_down.T, out=y)
        ctx.save_for_backward(x_TD, gates_TK, order_P, inverse_P, h_P2N, w_gate_up_E2ND, w_down_EDN)
        ctx.counts = counts
        return torch.bmm(gates_TK[:, None], y_PD.index_select(0, inverse_P).view(T, K, D)).squeeze(1)

    @staticmethod
    def backward(ctx, grad_out_TD):
        x_TD, gates_TK, order_P, inverse_P, h_P2N, w_gate_up_E2ND, w_down_EDN = ctx.saved_tensors
        (T, K), D = gates_TK.shape, x_TD.shape[1]
        gates_P = gates_TK.flatten().index_select(0, order_P)
        grad_x_PD, grad_gates_P = x_TD.new_empty(T * K, D), torch.empty_like(gates_P)
        grad_w_gate_up_E2ND, grad_w_down_EDN = torch.empty_like(w_gate_up_E2ND), torch.empty_like(w_down_EDN)
        runs = zip(
            *(t.split(ctx.counts) for t in (order_P // K, gates_P, h_P2N, grad_x_PD, grad_gates_P)),
            *(w_gate_up_E2ND, w_down_EDN, grad_w_gate_up_E2ND, grad_w_down_EDN),
            strict=True,
        )
        for tokens, gates, h, grad_x, grad_gates, w_gate_up, w_down, grad_w_gate_up, grad_w_down in runs:
            grad_y = grad_out_TD.index_select(0, tokens)
            grad_a = grad_y @ w_down  # before the token's gate
            gate, up = h.chunk(2, dim=-1)
            sigmoid = gate.sigmoid()
            silu = gate * sigmoid
            a = silu * up
            torch.sum(a * grad_a, dim=-1, out=grad_gates)
            grad_a.mul_(gates[:, None])
            torch.mm(grad_y.T, a.mul_(gates[:, None]), out=grad_w_down)
            grad_h = torch.empty_like(h)
            grad_gate, grad_up = grad_h.chunk(2, dim=-1)
            torch.mul(grad_a, silu, out=grad_up)
            # silu'(g) = sigmoid(g) + silu(g) (1 - sigmoid(g))
            slope = torch.addcmul(silu, silu, sigmoid, value=-1).add_(sigmoid)
            torch.mul(grad_a.mul_(up), slope, out=grad_gate)
            torch.mm(grad_h.T, x_TD.index_select(0, tokens), out=grad_w_gate_up)
            torch.mm(grad_h, w_gate_up, out=grad_x)
        grad_x_TD = grad_x_PD.index_select(0, inverse_P).view(T, K, D).sum(dim=1)
        grad_gates_TK = grad_gates_P.index_select(0, inverse_P).view(T, K)
        return grad_x_TD, grad_gates_TK, None, None, grad_w_gate_up_E2ND, grad_w_down_EDN
