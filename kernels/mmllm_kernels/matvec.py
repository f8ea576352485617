"""Matrix-vector products, and the experts of a single token by them: decoding on a CPU.

Shapes: D model width, E experts, S shared experts, K experts of the token, N expert inner width; T is 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_SHARED_ELEMENTS = 1 << 18
"""Weights from which a matrix-vector product is worth more than one thread."""


def experts(
    x_TD: Tensor,
    gates_TK: Tensor,
    experts: list[int],
    weights: tuple[Tensor, Tensor],
    shared: tuple[Tensor, Tensor] | tuple[()],
    out_dtype: torch.dtype,
) -> tuple[Tensor, list[int]]:
    """The output of one token and the counts [E]: matrix-vector products with its experts' weights alone.

    Weights of another dtype than the token's are cast, its experts' alone. Each call of PyTorch counts, also one that
    changes nothing: the products drive all else from the caches, and then it takes 5 to 30 µs (`to(dtype=…)` two thirds
    of `to(…)`).
    """
    if min(experts) < 0:
        taken = [k for k, e in enumerate(experts) if e >= 0]
        gates_TK, experts = gates_TK[:, taken], [experts[k] for k in taken]
    if x_TD.dtype == torch.float64 != gates_TK.dtype:
        gates_TK = gates_TK.to(torch.float64)
    counts = [0] * len(weights[0])
    for e in experts:
        counts[e] += 1
    if experts:
        y_KD = _swiglu_experts(x_TD, *weights, experts)
        out_TD = torch.mm(gates_TK, y_KD if y_KD.dtype == gates_TK.dtype else y_KD.to(dtype=gates_TK.dtype))
    else:
        out_TD = torch.zeros_like(x_TD, dtype=gates_TK.dtype)
    if shared and len(shared[0]):
        out_TD += _swiglu_experts(x_TD, *shared, range(len(shared[0]))).sum(dim=0, dtype=out_TD.dtype)
    if out_TD.dtype != out_dtype:
        out_TD = out_TD.to(dtype=out_dtype)
    return out_TD, counts


def _swiglu_experts(x_TD: Tensor, w_gate_up_E2ND: Tensor, w_down_EDN: Tensor, experts: Sequence[int]) -> Tensor:
    """What each of K experts makes of one token, [K, D]."""
    same_dtype = x_TD.dtype == w_gate_up_E2ND.dtype == w_down_EDN.dtype
    # A matrix for each of two threads; more threads are busier with the rows of each matrix shared out.
    pairable = len(experts) % 2 == 0 and len(set(experts)) == len(experts)
    if pairable and same_dtype and _needs_threads(w_gate_up_E2ND) and torch.get_num_threads() == 2:
        pairs = zip(experts[::2], experts[1::2], strict=True)
        ys_2D = [_swiglu_pair(x_TD, w_gate_up_E2ND, w_down_EDN, *pair) for pair in pairs]
        return ys_2D[0] if len(ys_2D) == 1 else torch.cat(ys_2D)
    gate_ups, downs = [w_gate_up_E2ND[e] for e in experts], [w_down_EDN[e] for e in experts]
    if not same_dtype:
        gate_ups, downs = ([w.to(x_TD.dtype) for w in each] for each in (gate_ups, downs))
    x_D = x_TD[0]
    gate_KN, up_KN = torch.stack([matvec(w, x_D) for w in gate_ups]).chunk(2, dim=-1)
    a_KN = F.silu(gate_KN).mul_(up_KN)
    return torch.stack([matvec(w, a_N) for w, a_N in zip(downs, a_KN.unbind(), strict=True)])


def _swiglu_pair(x_TD: Tensor, w_gate_up_E2ND: Tensor, w_down_EDN: Tensor, first: int, second: int) -> Tensor:
    """What two experts make of one token, [2, D]: the weights of any two are a strided view."""
    low, high = min(first, second), max(first, second)
    both = slice(low, high + 1, high - low)
    h_212N = torch.bmm(x_TD.expand(2, 1, -1), w_gate_up_E2ND[both].transpose(1, 2))
    gate_21N, up_21N = h_212N.chunk(2, dim=-1)
    y_21D = torch.bmm(F.silu(gate_21N).mul_(up_21N), w_down_EDN[both].transpose(1, 2))
    return (y_21D if first == low else y_21D.flip(0)).squeeze(1)


def matvec(w_ND: Tensor, x_D: Tensor) -> Tensor:
    """The product w · x by the call of PyTorch that is fastest for the dtype, the same on every processor.

    bfloat16 is a product of matrices: oneDNN, which takes bfloat16 on processors with AVX512, needs about the time of
    float32 for `mv` where there is AVX512-BF16, and half of that for `mm`; without oneDNN both are PyTorch's own and
    alike. float32 shares its rows out where that is worth it.
    """
    if w_ND.dtype == torch.bfloat16:
        return torch.mm(x_D[None], w_ND.T)[0]
    if not _needs_threads(w_ND):
        return torch.mv(w_ND, x_D)
    num_rows, width = w_ND.shape
    parts = next(parts for parts in range(torch.get_num_threads(), 0, -1) if num_rows % parts == 0)
    w_PDN = w_ND.reshape(parts, -1, width).transpose(1, 2)
    return torch.bmm(x_D.expand(parts, 1, -1), w_PDN).view(-1)


def _needs_threads(w: Tensor) -> bool:
    """Whether products with a matrix [..., N, D] want several threads and get them not from PyTorch itself.

    One thread cannot read float32 weights as fast as the memory gives them; in half precision `mm` and `mv` use all.
    """
    return w.dtype == torch.float32 and w.shape[-2] * w.shape[-1] >= _SHARED_ELEMENTS and w.is_cpu
