"""The forward's kernels: gather-GEMM with SwiGLU, GEMM, weighted sum.

A program takes one tile of BLOCK_M rows of one expert (`routing.tiles_kernel`) and BLOCK_N columns; a tile
number beyond the last one ends at once. Rows are gathered through pointers, which Hopper copies
asynchronously. Offsets are int64. Widths are compile-time constants: they are few, and masks that are never
needed fold away. What varies with the number of tokens is not specialised on (Triton would make a constant of 1
and know multiples of 16): one compilation serves all batches.

Sources: SonicMoE (arXiv 2512.14080) for the formulation; the Triton tutorial "Matrix Multiplication" for
the order of programs. No float atomics anywhere.

Shapes: T tokens, D model width, E experts, S shared experts (their weights lie in a tensor of their own),
N expert inner width, J slots a token, P pairs in expert order. DOT is the products' dtype (the dtype of the
inputs; float32 under the interpreter, which multiplies no bfloat16).
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# (Triton's language is typed as if it were Python.)
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def swizzle(pid, num_m, NUM_N: tl.constexpr, GROUP: tl.constexpr):
    """The tile and the column block of a program: GROUP tiles share their columns' weights in the cache."""
    first = pid // (GROUP * NUM_N) * GROUP
    size = tl.minimum(num_m - first, GROUP)
    within = pid % (GROUP * NUM_N)
    return first + within % size, within // size


@triton.jit
def expert_weights(w_ptr, shared_ptr, expert, E: tl.constexpr, S: tl.constexpr, SIZE: tl.constexpr):
    """Where the weights of an expert or of a shared one begin."""
    offset = expert.to(tl.int64) * SIZE
    if S == 0:
        return w_ptr + offset
    else:
        return tl.where(expert < E, w_ptr + offset, shared_ptr + (offset - E * SIZE))


@triton.jit
def load_block(ptrs, ok_rows, ok_columns, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """A block, 0 outside; what divides evenly is not masked."""
    if MASK_ROWS and MASK_COLUMNS:
        return tl.load(ptrs, mask=ok_rows[:, None] & ok_columns[None, :], other=0.0)
    elif MASK_ROWS:
        return tl.load(ptrs, mask=ok_rows[:, None], other=0.0)
    elif MASK_COLUMNS:
        return tl.load(ptrs, mask=ok_columns[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def tile_rows(tiles_ptr, num_tiles, tile, BLOCK_M: tl.constexpr):
    """A tile's rows, int64, and which of them are its expert's; the others repeat its last one."""
    at = tile.to(tl.int64) + num_tiles
    rows = tl.load(tiles_ptr + at) + tl.arange(0, BLOCK_M)
    end = tl.load(tiles_ptr + (at + num_tiles))
    return tl.minimum(rows, end - 1).to(tl.int64), rows < end


@triton.jit(do_not_specialize=["num_tiles"])
def gate_up_kernel(
    x_ptr, w_ptr, shared_ptr, order_ptr, tiles_ptr, h_ptr, a_ptr, num_tiles,
    D: tl.constexpr, N: tl.constexpr, E: tl.constexpr, S: tl.constexpr, J: tl.constexpr,
    STORE_H: tl.constexpr, STORE_A: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Writes h [P, 2N] = gathered x · wᵀ, gate and up side by side, and a [P, N] = silu(gate) ⊙ up."""
    tile, block = swizzle(tl.program_id(0), num_tiles, tl.cdiv(N, BLOCK_N), GROUP)
    expert = tl.load(tiles_ptr + tile.to(tl.int64))
    if expert < 0:
        return
    rows, ok_rows = tile_rows(tiles_ptr, num_tiles, tile, BLOCK_M)
    tokens = tl.load(order_ptr + rows) // J
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    ok_columns = columns < N
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    w = expert_weights(w_ptr, shared_ptr, expert, E, S, 2 * N * D)
    x_ptrs = x_ptr + (tokens.to(tl.int64)[:, None] * D + k[None, :])
    gate_ptrs = w + (columns.to(tl.int64)[None, :] * D + k[:, None])
    up_ptrs = w + (columns.to(tl.int64)[None, :] * D + k[:, None] + N * D)
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    MASK_K: tl.constexpr = D % BLOCK_K != 0
    MASK_N: tl.constexpr = N % BLOCK_N != 0
    zero = tl.zeros((), dtype=tl.int64)
    for start in range(0, D, BLOCK_K):
        ok_k = k < D - start
        at = zero + start
        x = load_block(x_ptrs + at, ok_rows, ok_k, False, MASK_K)
        w_gate = load_block(gate_ptrs + at, ok_k, ok_columns, MASK_K, MASK_N)
        w_up = load_block(up_ptrs + at, ok_k, ok_columns, MASK_K, MASK_N)
        gate = tl.dot(x.to(DOT), w_gate.to(DOT), gate, input_precision=PRECISION)
        up = tl.dot(x.to(DOT), w_up.to(DOT), up, input_precision=PRECISION)
    ok = ok_rows[:, None] & ok_columns[None, :]
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    gate_rounded, up_rounded = gate.to(dtype), up.to(dtype)  # what backward will see
    if STORE_H:
        h_ptrs = h_ptr + (rows[:, None] * (2 * N) + columns[None, :])
        tl.store(h_ptrs, gate_rounded, mask=ok)
        tl.store(h_ptrs + tl.full((), N, tl.int64), up_rounded, mask=ok)
    if STORE_A:
        gate, up = gate_rounded.to(tl.float32), up_rounded.to(tl.float32)
        a = gate * tl.sigmoid(gate) * up
        tl.store(a_ptr + (rows[:, None] * N + columns[None, :]), a.to(dtype), mask=ok)


@triton.jit(do_not_specialize=["num_tiles"])
def project_kernel(
    lhs_ptr, w_ptr, shared_ptr, tiles_ptr, out_ptr, num_tiles,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr, S: tl.constexpr,
    TRANSPOSED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Writes out [P, WIDTH] = lhs [P, DEPTH] · w; an expert's w is [DEPTH, WIDTH], or its transpose if TRANSPOSED."""
    tile, block = swizzle(tl.program_id(0), num_tiles, tl.cdiv(WIDTH, BLOCK_N), GROUP)
    expert = tl.load(tiles_ptr + tile.to(tl.int64))
    if expert < 0:
        return
    rows, ok_rows = tile_rows(tiles_ptr, num_tiles, tile, BLOCK_M)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    ok_columns = columns < WIDTH
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    w = expert_weights(w_ptr, shared_ptr, expert, E, S, DEPTH * WIDTH)
    lhs_ptrs = lhs_ptr + (rows[:, None] * DEPTH + k[None, :])
    if TRANSPOSED:
        w_ptrs = w + (columns.to(tl.int64)[None, :] * DEPTH + k[:, None])
    else:
        w_ptrs = w + (columns.to(tl.int64)[None, :] + k[:, None] * WIDTH)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    MASK_K: tl.constexpr = DEPTH % BLOCK_K != 0
    MASK_N: tl.constexpr = WIDTH % BLOCK_N != 0
    zero = tl.zeros((), dtype=tl.int64)
    for start in range(0, DEPTH, BLOCK_K):
        ok_k = k < DEPTH - start
        at = zero + start
        w_at = at if TRANSPOSED else at * WIDTH
        lhs = load_block(lhs_ptrs + at, ok_rows, ok_k, False, MASK_K)
        w_block = load_block(w_ptrs + w_at, ok_k, ok_columns, MASK_K, MASK_N)
        acc = tl.dot(lhs.to(DOT), w_block.to(DOT), acc, input_precision=PRECISION)
    out_ptrs = out_ptr + (rows[:, None] * WIDTH + columns[None, :])
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=ok_rows[:, None] & ok_columns[None, :])


@triton.jit(do_not_specialize=["T"])
def weighted_sum_kernel(
    y_ptr, inverse_ptr, gates_ptr, out_ptr, T,
    D: tl.constexpr, J: tl.constexpr, S: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes out [T, D]: a token's J rows of y [P, D], weighted by its gates, summed in float32 in slot order.

    A slot whose row is −1 is left out; a shared expert's weight is 1.
    """
    K: tl.constexpr = J - S
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    ok = (t < T)[:, None] & (d < D)[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for j in range(J):
        pair = t.to(tl.int64) * J + j
        row = tl.load(inverse_ptr + pair, mask=t < T, other=-1).to(tl.int64)
        y = tl.load(y_ptr + (row[:, None] * D + d[None, :]), mask=ok & (row >= 0)[:, None], other=0.0).to(tl.float32)
        if WEIGHTED:
            y *= tl.load(gates_ptr + (t.to(tl.int64) * K + j), mask=(row >= 0) & (j < K), other=1.0)[:, None]
        acc += y
    tl.store(out_ptr + (t.to(tl.int64)[:, None] * D + d[None, :]), acc.to(out_ptr.dtype.element_ty), mask=ok)
