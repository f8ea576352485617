"""Nearest code as one product whose epilogue keeps the best: no [T, V] matrix.

Shapes: T vectors, D width, V codes.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# (Triton's language is typed as if it were Python.)
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T"])
def nearest_kernel(
    x_ptr, codebook_ptr, squares_ptr, codes_ptr, T,
    D: tl.constexpr, V: tl.constexpr, DOT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Writes codes [T] int64 = argmin over v of |cᵥ|² − 2 x·cᵥ; the lowest index of equal ones."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    ok_t = t < T
    t = t.to(tl.int64)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    best = tl.full((BLOCK_T,), float("inf"), dtype=tl.float32)
    code = tl.zeros((BLOCK_T,), dtype=tl.int32)
    for first in range(0, V, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        dots = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
        for start in range(0, D, BLOCK_K):
            at = k + start
            x = tl.load(x_ptr + (t[:, None] * D + at[None, :]), mask=ok_t[:, None] & (at < D)[None, :], other=0.0)
            codes = tl.load(
                codebook_ptr + (v.to(tl.int64)[None, :] * D + at[:, None]),
                mask=(at < D)[:, None] & (v < V)[None, :], other=0.0,
            )  # fmt: skip
            dots = tl.dot(x.to(DOT), codes.to(DOT), dots, input_precision="ieee")
        squares = tl.load(squares_ptr + v.to(tl.int64), mask=v < V, other=float("inf"))
        distances = squares[None, :] - 2.0 * dots
        nearest = tl.min(distances, axis=1)
        index = tl.min(tl.where(distances == nearest[:, None], v[None, :], V), axis=1)
        code = tl.where(nearest < best, index, code)
        best = tl.minimum(nearest, best)
    tl.store(codes_ptr + t, code.to(tl.int64), mask=ok_t)
