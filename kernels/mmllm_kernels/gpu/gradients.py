"""The backward's own kernels; the rest are the forward's, used again.

dA' = gathered dO · W_down; since dO · Y = ⟨dA', A⟩, the gates' gradient needs no expert output Y, and
X and dO are gathered inside the products: neither is saved or copied (SonicMoE, arXiv 2512.14080). Every
sum has a fixed order, so gradients repeat bit for bit.

Shapes: as in `products`.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# (Triton's language is typed as if it were Python.)
from __future__ import annotations

import triton
import triton.language as tl

from mmllm_kernels.gpu.products import expert_weights, load_block, swizzle, tile_rows


@triton.jit
def _finish_columns(acc, gates, rows, ok_rows, columns, h_ptr, grad_h_ptr, a_ptr, N: tl.constexpr):
    """Stores what follows from acc = gathered dO · W_down at these columns; returns a row's part of ∂L/∂gate."""
    ok = ok_rows[:, None] & (columns < N)[None, :]
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    h_at = rows[:, None] * (2 * N) + columns[None, :]
    gate = tl.load(h_ptr + h_at, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + (h_at + N), mask=ok, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    a = silu * up
    dots = tl.sum(acc * a, axis=1)
    acc *= gates[:, None]
    tl.store(a_ptr + (rows[:, None] * N + columns[None, :]), (a * gates[:, None]).to(dtype), mask=ok)
    # silu'(g) = sigmoid(g) + silu(g) (1 − sigmoid(g))
    grad_gate = acc * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(grad_h_ptr + h_at, grad_gate.to(dtype), mask=ok)
    tl.store(grad_h_ptr + (h_at + N), (acc * silu).to(dtype), mask=ok)
    return dots


@triton.jit(do_not_specialize=["num_tiles"])
def activation_gradient_kernel(
    grad_out_ptr, w_ptr, shared_ptr, order_ptr, tiles_ptr, gates_ptr, h_ptr, grad_h_ptr, a_ptr, dots_ptr, num_tiles,
    D: tl.constexpr, N: tl.constexpr, E: tl.constexpr, S: tl.constexpr, J: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The gradient of h [P, 2N]; a [P, N], gate times activation; dots [P, blocks], parts of ∂L/∂gate."""
    num_blocks: tl.constexpr = tl.cdiv(N, BLOCK_N)
    tile, block = swizzle(tl.program_id(0), num_tiles, num_blocks, GROUP)
    expert = tl.load(tiles_ptr + tile.to(tl.int64))
    if expert < 0:
        return
    rows, ok_rows = tile_rows(tiles_ptr, num_tiles, tile, BLOCK_M)
    pairs = tl.load(order_ptr + rows)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    ok_columns = columns < N
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    w = expert_weights(w_ptr, shared_ptr, expert, E, S, D * N)
    grad_ptrs = grad_out_ptr + ((pairs // J).to(tl.int64)[:, None] * D + k[None, :])
    w_ptrs = w + (columns.to(tl.int64)[None, :] + k[:, None] * N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    MASK_K: tl.constexpr = D % BLOCK_K != 0
    MASK_N: tl.constexpr = N % BLOCK_N != 0
    zero = tl.zeros((), dtype=tl.int64)
    for start in range(0, D, BLOCK_K):
        ok_k = k < D - start
        at = zero + start
        grad = load_block(grad_ptrs + at, ok_rows, ok_k, False, MASK_K)
        w_block = load_block(w_ptrs + at * N, ok_k, ok_columns, MASK_K, MASK_N)
        acc = tl.dot(grad.to(DOT), w_block.to(DOT), acc, input_precision=PRECISION)
    if S == 0:
        gates = tl.load(gates_ptr + pairs.to(tl.int64))
    else:
        K: tl.constexpr = J - S
        slot = pairs % J
        gates = tl.load(gates_ptr + ((pairs // J).to(tl.int64) * K + slot), mask=slot < K, other=1.0)
    # In halves: a whole tile of `_finish_columns`' values needs more registers than a thread has.
    HALF: tl.constexpr = BLOCK_N // 2
    left, right = acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
    columns = block * BLOCK_N + tl.arange(0, HALF)
    dots = _finish_columns(left, gates, rows, ok_rows, columns, h_ptr, grad_h_ptr, a_ptr, N)
    dots += _finish_columns(right, gates, rows, ok_rows, columns + HALF, h_ptr, grad_h_ptr, a_ptr, N)
    tl.store(dots_ptr + (rows * num_blocks + block), dots, mask=ok_rows)


@triton.jit
def weight_gradient_kernel(
    left_ptr, right_ptr, order_ptr, counts_ptr, grad_ptr, shared_grad_ptr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr, S: tl.constexpr, J: tl.constexpr,
    GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Writes grad [expert, HEIGHT, WIDTH] = leftᵀ · right over the expert's rows; zeros where it has none.

    A gathered operand has one row a token [T, ·], the other one a pair [P, ·] in expert order.
    """
    num_m: tl.constexpr = tl.cdiv(HEIGHT, BLOCK_M)
    num_n: tl.constexpr = tl.cdiv(WIDTH, BLOCK_N)
    expert = tl.program_id(0) // (num_m * num_n)
    block_m, block_n = swizzle(tl.program_id(0) % (num_m * num_n), num_m, num_n, GROUP)
    g = tl.arange(0, BLOCK_G)
    counts = tl.load(counts_ptr + g.to(tl.int64), mask=g <= expert, other=0).to(tl.int32)
    end = tl.sum(counts, axis=0)
    begin = end - tl.sum(tl.where(g == expert, counts, 0), axis=0)
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(begin, end, BLOCK_K):
        rows = start + k
        ok_rows = rows < end
        rows = rows.to(tl.int64)
        tokens = (tl.load(order_ptr + rows, mask=ok_rows, other=0) // J).to(tl.int64)
        left_rows = tokens if GATHER_LEFT else rows
        right_rows = tokens if GATHER_RIGHT else rows
        left_ptrs = left_ptr + (left_rows[None, :] * HEIGHT + m[:, None])
        right_ptrs = right_ptr + (right_rows[:, None] * WIDTH + n[None, :])
        left = load_block(left_ptrs, m < HEIGHT, ok_rows, HEIGHT % BLOCK_M != 0, True)
        right = load_block(right_ptrs, ok_rows, n < WIDTH, True, WIDTH % BLOCK_N != 0)
        acc = tl.dot(left.to(DOT), right.to(DOT), acc, input_precision=PRECISION)
    grad = expert_weights(grad_ptr, shared_grad_ptr, expert, E, S, HEIGHT * WIDTH)
    ok = (m < HEIGHT)[:, None] & (n < WIDTH)[None, :]
    tl.store(grad + (m.to(tl.int64)[:, None] * WIDTH + n[None, :]), acc.to(grad_ptr.dtype.element_ty), mask=ok)
