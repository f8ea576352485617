"""The path for CPUs (and for what the Triton path cannot take): tokens sorted by expert, one GEMM an expert.

The formulation is SonicMoE's (arXiv 2512.14080): backward needs only the tokens and the pre-activations,
because dO · Y = ⟨dA', A⟩ gives the router's gradient without the experts' outputs Y. Written anew for
the CPU: one expert at a time, so that what lies between its products stays in the cache; its elementwise
passes are counted; a gather and a weighted sum are one `embedding_bag`.

Shapes: T tokens, D model width, E experts, S shared experts, G = E + S groups, K experts a token,
J = K + S slots a token (a shared expert is one that every token takes with the gate 1), N expert inner
width, V codes, P = T·J pairs (token, slot) in expert order, R the rows of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 19
"""Pre-activations that are worked on at once: two MiB in float32."""
_CHUNK_ELEMENTS = 1 << 17
"""Distances that `nearest_code` holds at once: half a MiB in float32 stays in the second cache."""
_SHARED_ELEMENTS = 1 << 18
"""Weights from which a matrix-vector product is worth more than one thread."""


class Routing(NamedTuple):
    """Who goes where. `inverse` is the permutation that undoes `order`."""

    gates_TJ: Tensor
    """At least float32."""
    experts_TJ: Tensor
    """int64; the shared experts' indices begin at E."""
    counts_G: Tensor
    """int64: rows an expert."""
    order_P: Tensor
    """int32: in expert order, t·J + j of each pair."""
    inverse_TJ: Tensor
    """int32: the row of each pair."""


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


def choose(router_logits_TE: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
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
    return best_TK.softmax(dim=-1) if renormalise else logits_TE.softmax(dim=-1).gather(1, experts_TK), experts_TK


def route(router_logits_TE: Tensor, top_k: int, renormalise: bool, num_shared: int) -> Routing:
    """The choice of experts and its counting sort."""
    gates_TJ, experts_TJ = choose(router_logits_TE, top_k, renormalise)
    num_tokens, num_experts = router_logits_TE.shape
    if num_shared:
        gates_TJ = F.pad(gates_TJ, (0, num_shared), value=1.0)
        shared_S = torch.arange(num_experts, num_experts + num_shared, device=experts_TJ.device)
        experts_TJ = torch.cat([experts_TJ, shared_S.expand(num_tokens, -1)], dim=1)
    counts_G = torch.bincount(experts_TJ.flatten(), minlength=num_experts + num_shared)
    order_P = experts_TJ.flatten().argsort(stable=True).to(torch.int32)
    inverse_P = torch.empty_like(order_P)
    inverse_P[order_P] = torch.arange(len(order_P), dtype=torch.int32, device=order_P.device)
    return Routing(gates_TJ, experts_TJ, counts_G, order_P, inverse_P.view_as(experts_TJ))


def forward(x_TD: Tensor, weights: Weights, routing: Routing, save_h: bool) -> tuple[Tensor, Tensor]:
    """Outputs [T, D] and, if `save_h`, the pre-activations [P, 2N] in expert order (otherwise [0, 2N])."""
    (T, J), D = routing.gates_TJ.shape, x_TD.shape[1]
    N2 = weights.gate_up_E2ND.shape[1]
    y_PD = x_TD.new_empty(T * J, D)
    h_P2N = x_TD.new_empty(T * J if save_h else 0, N2)
    pairs, tokens_P = weights.pairs(), routing.order_P // J
    for block in _blocks(routing, N2):
        x_RD = x_TD.index_select(0, tokens_P[block.rows])
        h_R2N = h_P2N[block.rows] if save_h else x_TD.new_empty(len(x_RD), N2)
        for e, x, h in block.by_expert(x_RD, h_R2N):
            _product(x, pairs[e][0], h)
        gate_RN, up_RN = h_R2N.chunk(2, dim=-1)
        a_RN = F.silu(gate_RN).mul_(up_RN)
        for e, a, y in block.by_expert(a_RN, y_PD[block.rows]):
            _product(a, pairs[e][1], y)
    return _weighted_sum(y_PD, routing.inverse_TJ, routing.gates_TJ, x_TD.dtype), h_P2N


def backward(
    grad_out_TD: Tensor,
    x_TD: Tensor,
    h_P2N: Tensor,
    router_logits_TE: Tensor,
    weights: Weights,
    routing: Routing,
    renormalise: bool,
    weight_grads: bool,
) -> tuple[Tensor, Tensor, Weights]:
    """Gradients of the tokens, of the router's logits, and of the weights (empty without `weight_grads`).

    Where h_P2N is empty it is computed again.
    """
    (T, J), D = routing.gates_TJ.shape, x_TD.shape[1]
    gates_P = routing.gates_TJ.flatten().index_select(0, routing.order_P).to(x_TD.dtype)
    grad_x_PD = x_TD.new_empty(T * J, D)
    gate_dots_P = gates_P.new_empty(T * J, dtype=routing.gates_TJ.dtype)
    grads = Weights(*(torch.empty_like(w) if weight_grads else w.new_empty(0) for w in weights))
    pairs, grad_pairs = weights.pairs(), grads.pairs() if weight_grads else []
    for e, count in enumerate(routing.counts_G.tolist() if weight_grads else []):
        if not count:
            grad_pairs[e][0].zero_()
            grad_pairs[e][1].zero_()
    tokens_P = routing.order_P // J
    for block in _blocks(routing, weights.gate_up_E2ND.shape[1]):
        tokens_R = tokens_P[block.rows]
        x_RD, grad_y_RD = x_TD.index_select(0, tokens_R), grad_out_TD.index_select(0, tokens_R)
        grad_y_RD.mul_(gates_P[block.rows, None])
        h_R2N = h_P2N[block.rows] if len(h_P2N) else x_TD.new_empty(len(x_RD), h_P2N.shape[1])
        grad_a_RN = x_TD.new_empty(len(x_RD), h_P2N.shape[1] // 2)
        for e, x, h, grad_y, grad_a in block.by_expert(x_RD, h_R2N, grad_y_RD, grad_a_RN):
            if not len(h_P2N):
                _product(x, pairs[e][0], h)
            torch.mm(grad_y, pairs[e][1], out=grad_a)
        a_RN, grad_h_R2N = _swiglu_backward(h_R2N, grad_a_RN, gate_dots_P[block.rows])
        for e, x, grad_x, grad_h in block.by_expert(x_RD, grad_x_PD[block.rows], grad_h_R2N):
            torch.mm(grad_h, pairs[e][0], out=grad_x)
            if weight_grads:
                torch.mm(grad_h.T, x, out=grad_pairs[e][0])
        if weight_grads:
            for e, grad_y, a in block.by_expert(grad_y_RD, a_RN):
                torch.mm(grad_y.T, a, out=grad_pairs[e][1])
    gate_dots_TJ = gate_dots_P.index_select(0, routing.inverse_TJ.flatten()).view(T, J)
    top_k = J - len(weights.shared_gate_up_S2ND)
    dots_TK, gates_TK, experts_TK = (t[:, :top_k] for t in (gate_dots_TJ, routing.gates_TJ, routing.experts_TJ))
    grad_logits_TE = _router_gradient(dots_TK, gates_TK, experts_TK, router_logits_TE, renormalise)
    return _weighted_sum(grad_x_PD, routing.inverse_TJ, None, x_TD.dtype), grad_logits_TE, grads


def _router_gradient(
    gate_dots_TK: Tensor, gates_TK: Tensor, experts_TK: Tensor, router_logits_TE: Tensor, renormalise: bool
) -> Tensor:
    """Gradient of the router's logits from gₖ·∂L/∂gₖ, which is what the experts' backward gives.

    With g a softmax, ∂L/∂lₖ = gₖ·∂L/∂gₖ − gₖ·Σⱼ gⱼ·∂L/∂gⱼ: no division by a gate that may be 0. Under
    `renormalise` the logits' values are not read, only their shape.
    """
    sums_T1 = gate_dots_TK.sum(dim=1, keepdim=True)
    if renormalise:
        grad_TE = torch.zeros(router_logits_TE.shape, dtype=gates_TK.dtype, device=gates_TK.device)
        return grad_TE.scatter_(1, experts_TK, gate_dots_TK - gates_TK * sums_T1).to(router_logits_TE.dtype)
    grad_TE = router_logits_TE.to(gates_TK.dtype).softmax(dim=-1).mul_(-sums_T1)
    return grad_TE.scatter_add_(1, experts_TK, gate_dots_TK).to(router_logits_TE.dtype)


def decode(
    x_TD: Tensor,
    router_logits_TE: Tensor,
    weights: tuple[Tensor, Tensor],
    shared: tuple[Tensor, Tensor] | tuple[()],
    top_k: int,
    renormalise: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, counts [E] and experts [T, K] of one token: matrix-vector products with its experts' weights alone.

    Weights of another dtype than the token's are cast, its experts' alone. Each call of PyTorch counts, also one that
    changes nothing: the products drive all else from the caches, and then it takes 5 to 30 µs (`to(dtype=…)` two thirds
    of `to(…)`).
    """
    gates_TK, experts_TK = choose(router_logits_TE, top_k, renormalise)
    experts, counts = experts_TK.tolist()[0], [0] * router_logits_TE.shape[1]
    for e in experts:
        counts[e] = 1
    y_KD = _swiglu_experts(x_TD, *weights, experts)
    out_TD = torch.mm(gates_TK, y_KD if y_KD.dtype == gates_TK.dtype else y_KD.to(dtype=gates_TK.dtype))
    if shared and len(shared[0]):
        out_TD += _swiglu_experts(x_TD, *shared, range(len(shared[0]))).sum(dim=0, dtype=out_TD.dtype)
    if out_TD.dtype != out_dtype:
        out_TD = out_TD.to(dtype=out_dtype)
    return out_TD, experts_TK.new_tensor(counts), experts_TK


def _swiglu_experts(x_TD: Tensor, w_gate_up_E2ND: Tensor, w_down_EDN: Tensor, experts: Sequence[int]) -> Tensor:
    """What each of K experts makes of one token, [K, D]."""
    same_dtype = x_TD.dtype == w_gate_up_E2ND.dtype == w_down_EDN.dtype
    # A matrix for each of two threads; more threads are busier with the rows of each matrix shared out.
    if len(experts) % 2 == 0 and same_dtype and _needs_threads(w_gate_up_E2ND) and torch.get_num_threads() == 2:
        pairs = zip(experts[::2], experts[1::2], strict=True)
        ys_2D = [_swiglu_pair(x_TD, w_gate_up_E2ND, w_down_EDN, *pair) for pair in pairs]
        return ys_2D[0] if len(ys_2D) == 1 else torch.cat(ys_2D)
    gate_ups, downs = [w_gate_up_E2ND[e] for e in experts], [w_down_EDN[e] for e in experts]
    if not same_dtype:
        gate_ups, downs = ([w.to(x_TD.dtype) for w in each] for each in (gate_ups, downs))
    x_D = x_TD[0]
    gate_KN, up_KN = torch.stack([_matvec(w, x_D) for w in gate_ups]).chunk(2, dim=-1)
    a_KN = F.silu(gate_KN).mul_(up_KN)
    return torch.stack([_matvec(w, a_N) for w, a_N in zip(downs, a_KN.unbind(), strict=True)])


def _swiglu_pair(x_TD: Tensor, w_gate_up_E2ND: Tensor, w_down_EDN: Tensor, first: int, second: int) -> Tensor:
    """What two experts make of one token, [2, D]: the weights of any two are a strided view."""
    low, high = min(first, second), max(first, second)
    both = slice(low, high + 1, high - low)
    h_212N = torch.bmm(x_TD.expand(2, 1, -1), w_gate_up_E2ND[both].transpose(1, 2))
    gate_21N, up_21N = h_212N.chunk(2, dim=-1)
    y_21D = torch.bmm(F.silu(gate_21N).mul_(up_21N), w_down_EDN[both].transpose(1, 2))
    return (y_21D if first == low else y_21D.flip(0)).squeeze(1)


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
        """Each expert with its rows of the tensors [R, ·]: views, made in one call a tensor."""
        return zip(self.experts, *(tensor.split(self.counts) for tensor in tensors), strict=True)


def _blocks(routing: Routing, width: int) -> Iterator[_Block]:
    """Every expert with rows, in order: small ones share a block, so that few calls serve them all."""
    start = stop = 0
    experts, counts = [], []
    for e, count in enumerate(routing.counts_G.tolist()):
        if counts and (stop - start + count) * width > _BLOCK_ELEMENTS:
            yield _Block(slice(start, stop), experts, counts)
            start, experts, counts = stop, [], []
        if count:
            experts.append(e)
            counts.append(count)
            stop += count
    if counts:
        yield _Block(slice(start, stop), experts, counts)


def _product(x_RD: Tensor, w_ND: Tensor, out_RN: Tensor) -> None:
    """Writes x · wᵀ; of a single row as a matrix-vector product, which reads w at the memory's speed."""
    if len(x_RD) == 1:
        out_RN[0] = _matvec(w_ND, x_RD[0])
    else:
        torch.mm(x_RD, w_ND.T, out=out_RN)


def _matvec(w_ND: Tensor, x_D: Tensor) -> Tensor:
    """The product w · x, its rows shared out if that is worth it."""
    if not _needs_threads(w_ND):
        return torch.mv(w_ND, x_D)
    num_rows, width = w_ND.shape
    parts = next(parts for parts in range(torch.get_num_threads(), 0, -1) if num_rows % parts == 0)
    w_PDN = w_ND.reshape(parts, -1, width).transpose(1, 2)
    return torch.bmm(x_D.expand(parts, 1, -1), w_PDN).view(-1)


def _needs_threads(w: Tensor) -> bool:
    """Whether products with a matrix [..., N, D] want several threads and get them not from PyTorch itself.

    One thread cannot read float32 weights as fast as the memory gives them; of half precision `mv` uses them all.
    """
    return w.dtype == torch.float32 and w.shape[-2] * w.shape[-1] >= _SHARED_ELEMENTS and w.is_cpu


def _swiglu_backward(h_R2N: Tensor, grad_a_RN: Tensor, gate_dots_R: Tensor) -> tuple[Tensor, Tensor]:
    """The activations and the gradient of h; writes ⟨a, grad_a⟩ and uses grad_a up."""
    gate_RN, up_RN = h_R2N.chunk(2, dim=-1)
    silu_RN = F.silu(gate_RN)
    a_RN = silu_RN * up_RN
    torch.sum(a_RN * grad_a_RN, dim=-1, dtype=gate_dots_R.dtype, out=gate_dots_R)
    grad_h_R2N = torch.empty_like(h_R2N)
    grad_gate_RN, grad_up_RN = grad_h_R2N.chunk(2, dim=-1)
    torch.mul(grad_a_RN, silu_RN, out=grad_up_RN)
    torch.ops.aten.silu_backward.grad_input(grad_a_RN.mul_(up_RN), gate_RN, grad_input=grad_gate_RN)
    return a_RN, grad_h_R2N


def _weighted_sum(y_PD: Tensor, inverse_TJ: Tensor, gates_TJ: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Each token's J rows of y, weighted, summed in at least float32."""
    if not inverse_TJ.numel() or not y_PD.shape[1]:
        return y_PD.new_zeros(len(inverse_TJ), y_PD.shape[1], dtype=dtype)
    y_PD = y_PD.to(torch.promote_types(y_PD.dtype, torch.float32))
    gates_TJ = None if gates_TJ is None else gates_TJ.to(y_PD.dtype)
    return F.embedding_bag(inverse_TJ, y_PD, mode="sum", per_sample_weights=gates_TJ).to(dtype)
