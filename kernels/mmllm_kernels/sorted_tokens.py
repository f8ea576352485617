"""The path for CPUs (and for what the Triton path cannot take): tokens sorted by expert, one GEMM an expert.

The formulation is SonicMoE's (arXiv 2512.14080): backward needs only the tokens and the pre-activations,
because dO · Y = ⟨dA', A⟩ gives the router's gradient without the experts' outputs Y. Written anew for
the CPU: one expert at a time, so that what lies between its products stays in the cache; its elementwise
passes are counted; a gather and a weighted sum are one `embedding_bag`.

Shapes: T tokens, D model width, E experts, S shared experts, G = E + S groups, K experts a token,
J = K + S slots a token (a shared expert is one that every token takes with the gate 1), N expert inner
width, V codes, P = T·J pairs (token, slot) in expert order, R those
that are not left out, B the rows of a block or of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm_kernels.matvec import matvec

_BLOCK_ELEMENTS = 1 << 19
"""Pre-activations that are worked on at once: two MiB in float32."""
_CHUNK_ELEMENTS = 1 << 17
"""Distances that `nearest_code` holds at once: half a MiB in float32 stays in the second cache."""


class Sorting(NamedTuple):
    """The pairs (token, slot) in expert order. A token's slots are its K experts, then the shared ones."""

    counts_G: Tensor
    """int64: rows an expert; the shared experts' follow the others'."""
    order_P: Tensor
    """int32: in expert order, t·J + j of each pair; pairs that are left out come last."""
    inverse_TJ: Tensor
    """int32: the row of each pair, −1 if it is left out."""


class Weights(NamedTuple):
    """The routed experts' weights and the shared experts' (S may be 0)."""

    gate_up_E2ND: Tensor
    down_EDN: Tensor
    shared_gate_up_S2ND: Tensor
    shared_down_SDN: Tensor

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(gate and up, down) of each group."""
        gate_ups = [*self.gate_up_E2ND.unbind(), *self.shared_gate_up_S2ND.unbind()]
        return list(zip(gate_ups, [*self.down_EDN.unbind(), *self.shared_down_SDN.unbind()], strict=True))


def route(router_logits_TE: Tensor, top_k: int, norm_topk_prob: bool) -> tuple[Tensor, Tensor]:
    """Gates and experts [T, K] as in `mmllm_kernels.reference.route`; ties are rare, so sorting is the exception."""
    num_tokens, num_experts = router_logits_TE.shape
    logits_TE = router_logits_TE if router_logits_TE.dtype.itemsize >= 4 else router_logits_TE.float()
    # topk leaves the order of equal values open.
    if num_tokens == 1:
        best_TK, experts_TK = logits_TE.topk(top_k, dim=-1)
        tied = len(set(logits_TE.tolist()[0])) < num_experts
    else:
        best, experts = logits_TE.topk(min(top_k + 1, num_experts), dim=-1)
        best_TK, experts_TK = best[:, :top_k], experts[:, :top_k].contiguous()
        tied = bool((best[:, 1:] == best[:, :-1]).any())
    if tied:
        best, experts = torch.sort(logits_TE, dim=-1, descending=True, stable=True)
        best_TK, experts_TK = best[:, :top_k], experts[:, :top_k].contiguous()
    return best_TK.softmax(dim=-1) if norm_topk_prob else logits_TE.softmax(dim=-1).gather(1, experts_TK), experts_TK


def route_backward(
    grad_gates_TK: Tensor, gates_TK: Tensor, experts_TK: Tensor, router_logits_TE: Tensor, norm_topk_prob: bool
) -> Tensor:
    """Gradient of the router's logits. Under `norm_topk_prob` their values are not read, only their shape.

    With g a softmax, ∂L/∂lₖ = gₖ·(∂L/∂gₖ − Σⱼ gⱼ·∂L/∂gⱼ).
    """
    dots_TK = gates_TK * grad_gates_TK
    sums_T1 = dots_TK.sum(dim=1, keepdim=True)
    if norm_topk_prob:
        grad_TE = torch.zeros(router_logits_TE.shape, dtype=gates_TK.dtype, device=gates_TK.device)
        return grad_TE.scatter_(1, experts_TK, dots_TK - gates_TK * sums_T1).to(router_logits_TE.dtype)
    grad_TE = router_logits_TE.to(gates_TK.dtype).softmax(dim=-1).mul_(-sums_T1)
    return grad_TE.scatter_add_(1, experts_TK, dots_TK).to(router_logits_TE.dtype)


def sort(experts_TK: Tensor, num_experts: int, num_shared: int) -> Sorting:
    """The counting sort of the pairs by expert, the shared experts' pairs and those left out behind the others'."""
    num_tokens, num_groups = len(experts_TK), num_experts + num_shared
    check_indices(int(experts_TK.max()) if experts_TK.numel() else 0, num_experts)
    groups_TJ = experts_TK.masked_fill(experts_TK < 0, num_groups)
    if num_shared:
        shared_S = torch.arange(num_experts, num_groups, device=experts_TK.device)
        groups_TJ = torch.cat([groups_TJ, shared_S.expand(num_tokens, -1)], dim=1)
    groups_P = groups_TJ.flatten()
    counts_G = torch.bincount(groups_P, minlength=num_groups + 1)[:num_groups]
    order_P = groups_P.argsort(stable=True).to(torch.int32)
    inverse_P = torch.empty_like(order_P)
    inverse_P[order_P] = torch.arange(len(order_P), dtype=torch.int32, device=order_P.device)
    return Sorting(counts_G, order_P, inverse_P.masked_fill_(groups_P == num_groups, -1).view_as(groups_TJ))


def check_indices(largest: int, num_experts: int) -> None:
    """Raises ValueError where an expert's index is beyond the last expert."""
    if largest >= num_experts:
        raise ValueError(
            f"experts has the index {largest}, but there are {num_experts} experts; "
            f"indices go to {num_experts - 1}, and -1 leaves a pair out"
        )


def forward(x_TD: Tensor, gates_TK: Tensor, weights: Weights, sorting: Sorting, save_h: bool) -> tuple[Tensor, Tensor]:
    """Outputs [T, D] and, if `save_h`, the pre-activations [P, 2N] in expert order (otherwise [0, 2N])."""
    num_pairs, J = sorting.inverse_TJ.numel(), sorting.inverse_TJ.shape[1]
    N2 = weights.gate_up_E2ND.shape[1]
    counts = sorting.counts_G.tolist()
    num_rows = sum(counts)
    y_RD = _rows(x_TD, num_rows, num_pairs)
    h_P2N = x_TD.new_empty(num_pairs if save_h else 0, N2)
    pairs, tokens_P = weights.pairs(), sorting.order_P // J
    for block in _blocks(counts, N2):
        x_BD = x_TD.index_select(0, tokens_P[block.rows])
        h_B2N = h_P2N[block.rows] if save_h else x_TD.new_empty(len(x_BD), N2)
        for e, x, h in block.by_expert(x_BD, h_B2N):
            _product(x, pairs[e][0], h)
        gate_BN, up_BN = h_B2N.chunk(2, dim=-1)
        a_BN = F.silu(gate_BN).mul_(up_BN)
        for e, a, y in block.by_expert(a_BN, y_RD[block.rows]):
            _product(a, pairs[e][1], y)
    gates_TJ = _with_shared(gates_TK, weights)
    return _weighted_sum(y_RD, num_rows, sorting.inverse_TJ, gates_TJ, x_TD.dtype), h_P2N


def backward(
    grad_out_TD: Tensor,
    x_TD: Tensor,
    gates_TK: Tensor,
    h_P2N: Tensor,
    weights: Weights,
    sorting: Sorting,
    weight_grads: bool,
) -> tuple[Tensor, Tensor, Weights]:
    """Gradients of the tokens, of the gates, and of the weights (empty without `weight_grads`).

    Where h_P2N is empty it is computed again.
    """
    (T, J), N2 = sorting.inverse_TJ.shape, weights.gate_up_E2ND.shape[1]
    counts = sorting.counts_G.tolist()
    num_rows = sum(counts)
    order_R = sorting.order_P[:num_rows]
    gates_R = _with_shared(gates_TK, weights).flatten().index_select(0, order_R).to(x_TD.dtype)
    grad_gates_R = gates_TK.new_empty(num_rows)
    grad_x_RD = _rows(x_TD, num_rows, T * J)
    grads = Weights(*(torch.empty_like(w) if weight_grads else w.new_empty(0) for w in weights))
    pairs, grad_pairs = weights.pairs(), grads.pairs() if weight_grads else []
    for e, count in enumerate(counts if weight_grads else []):
        if not count:
            grad_pairs[e][0].zero_()
            grad_pairs[e][1].zero_()
    tokens_R = order_R // J
    for block in _blocks(counts, N2):
        tokens_B, gates_B1 = tokens_R[block.rows], gates_R[block.rows, None]
        x_BD, grad_y_BD = x_TD.index_select(0, tokens_B), grad_out_TD.index_select(0, tokens_B)
        h_B2N = h_P2N[block.rows] if len(h_P2N) else x_TD.new_empty(len(x_BD), N2)
        grad_a_BN = x_TD.new_empty(len(x_BD), N2 // 2)
        for e, x, h, grad_y, grad_a in block.by_expert(x_BD, h_B2N, grad_y_BD, grad_a_BN):
            if not len(h_P2N):
                _product(x, pairs[e][0], h)
            torch.mm(grad_y, pairs[e][1], out=grad_a)
        a_BN, grad_h_B2N = _swiglu_backward(h_B2N, grad_a_BN, gates_B1, grad_gates_R[block.rows])
        for e, x, grad_x, grad_h in block.by_expert(x_BD, grad_x_RD[block.rows], grad_h_B2N):
            torch.mm(grad_h, pairs[e][0], out=grad_x)
            if weight_grads:
                torch.mm(grad_h.T, x, out=grad_pairs[e][0])
        if weight_grads:
            narrow = a_BN if a_BN.shape[1] < grad_y_BD.shape[1] else grad_y_BD
            narrow.mul_(gates_B1)
            for e, grad_y, a in block.by_expert(grad_y_BD, a_BN):
                torch.mm(grad_y.T, a, out=grad_pairs[e][1])
    grad_gates_TJ = gates_TK.new_zeros(T * J).index_put_((order_R,), grad_gates_R).view(T, J)
    grad_gates_TK = grad_gates_TJ[:, : gates_TK.shape[1]].contiguous()
    return _weighted_sum(grad_x_RD, num_rows, sorting.inverse_TJ, None, x_TD.dtype), grad_gates_TK, grads


def nearest_code(x_TD: Tensor, codebook_VD: Tensor) -> Tensor:
    """The same as `mmllm_kernels.reference.nearest_code` by matrix products of chunks that stay in the cache."""
    squares_V = (codebook_VD**2).sum(dim=-1)
    codes_T = torch.empty(len(x_TD), dtype=torch.int64, device=x_TD.device)
    chunk_size = max(_CHUNK_ELEMENTS // len(codebook_VD), 32)
    distances = x_TD.new_empty(min(chunk_size, len(x_TD)), len(codebook_VD))
    for x, codes in zip(x_TD.split(chunk_size), codes_T.split(chunk_size), strict=True):
        torch.addmm(squares_V, x, codebook_VD.T, alpha=-2, out=distances[: len(x)])
        torch.argmin(distances[: len(x)], dim=-1, out=codes)
    return codes_T


class _Block(NamedTuple):
    """Experts that follow one another, few enough that their activations stay in the cache together."""

    rows: slice
    experts: list[int]
    counts: list[int]
    """Rows of each."""

    def by_expert(self, *tensors: Tensor) -> Iterator[tuple]:
        """Each expert with its rows of the tensors [B, ·]: views, made in one call a tensor."""
        return zip(self.experts, *(tensor.split(self.counts) for tensor in tensors), strict=True)


def _blocks(all_counts: list[int], width: int) -> Iterator[_Block]:
    """Every expert with rows, in order: small ones share a block, so that few calls serve them all."""
    start = stop = 0
    experts, counts = [], []
    for e, count in enumerate(all_counts):
        if counts and (stop - start + count) * width > _BLOCK_ELEMENTS:
            yield _Block(slice(start, stop), experts, counts)
            start, experts, counts = stop, [], []
        if count:
            experts.append(e)
            counts.append(count)
            stop += count
    if counts:
        yield _Block(slice(start, stop), experts, counts)


def _product(x_BD: Tensor, w_ND: Tensor, out_BN: Tensor) -> None:
    """Writes x · wᵀ; of a single row as a matrix-vector product, which reads w at the memory's speed."""
    if len(x_BD) == 1:
        out_BN[0] = matvec(w_ND, x_BD[0])
    else:
        torch.mm(x_BD, w_ND.T, out=out_BN)


def _with_shared(gates_TK: Tensor, weights: Weights) -> Tensor:
    """The gates of all slots [T, J]: a shared expert's is 1."""
    num_shared = len(weights.shared_gate_up_S2ND)
    return F.pad(gates_TK, (0, num_shared), value=1.0) if num_shared else gates_TK


def _swiglu_backward(h_B2N: Tensor, grad_a_BN: Tensor, gates_B1: Tensor, grad_gates_B: Tensor) -> tuple[Tensor, Tensor]:
    """The activations and the gradient of h; writes the gates' and uses up grad_a, which knows of no gates yet."""
    gate_BN, up_BN = h_B2N.chunk(2, dim=-1)
    silu_BN = F.silu(gate_BN)
    a_BN = silu_BN * up_BN
    torch.sum(a_BN * grad_a_BN, dim=-1, dtype=grad_gates_B.dtype, out=grad_gates_B)
    grad_a_BN.mul_(gates_B1)
    grad_h_B2N = torch.empty_like(h_B2N)
    grad_gate_BN, grad_up_BN = grad_h_B2N.chunk(2, dim=-1)
    torch.mul(grad_a_BN, silu_BN, out=grad_up_BN)
    torch.ops.aten.silu_backward.grad_input(grad_a_BN.mul_(up_BN), gate_BN, grad_input=grad_gate_BN)
    return a_BN, grad_h_B2N


def _rows(x_TD: Tensor, num_rows: int, num_pairs: int) -> Tensor:
    """A row [D] of each pair; where pairs are left out, one more that stands for them and is not read."""
    return x_TD.new_empty(num_rows + (num_rows < num_pairs), x_TD.shape[1])


def _weighted_sum(
    y_RD: Tensor, num_rows: int, inverse_TJ: Tensor, gates_TJ: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Each token's rows of y (made by `_rows`), weighted, summed in at least float32."""
    if not num_rows or not y_RD.shape[1]:
        return y_RD.new_zeros(len(inverse_TJ), y_RD.shape[1], dtype=dtype)
    left_out = None
    if num_rows < inverse_TJ.numel():
        left_out = num_rows
        inverse_TJ = inverse_TJ.masked_fill(inverse_TJ < 0, left_out)
    y_RD = y_RD.to(torch.promote_types(y_RD.dtype, torch.float32))
    gates_TJ = None if gates_TJ is None else gates_TJ.to(y_RD.dtype)
    return F.embedding_bag(inverse_TJ, y_RD, mode="sum", per_sample_weights=gates_TJ, padding_idx=left_out).to(dtype)
