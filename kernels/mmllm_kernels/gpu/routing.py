"""Routing on the device: top-k, gates, and a stable counting sort without atomics or a host sync.

Each program takes BLOCK_T tokens. `choose_kernel` counts its tokens' choices, `prefix_kernel` scans the
counts over programs, `place_kernel` scatters: a pair's row is what comes before its expert, plus what
earlier programs gave it, plus what earlier tokens of this program gave it (a token takes an expert once).
Few tokens need one program, which does all three.

Sources: ScatterMoE (arXiv 2403.08245) for sorting indices in place of tokens.

Shapes: T tokens, E experts, S shared experts, G = E + S, K experts a token, J = K + S slots a token,
P = T·J pairs (token, slot).
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# (Triton's language is typed as if it were Python.)
from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**31))
"""Below the key of every logit."""


@triton.jit
def _descending_keys(logits_TE, e, E: tl.constexpr):
    """Integers in the order of the floats; equal for −0 and 0; LOWEST where there is no expert."""
    bits = tl.where(logits_TE == 0.0, 0.0, logits_TE).to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where((e < E)[None, :], tl.maximum(keys, LOWEST + 1), LOWEST)


@triton.jit
def _scatter(
    order_ptr, inverse_ptr, expert_TJ, first_row_E, taken_TE, t, e, j, T,
    K: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Writes both permutations for the tokens t, whose expert e begins at first_row_E."""
    J: tl.constexpr = K + S
    ok = t < T
    row_TE = first_row_E[None, :] + tl.cumsum(taken_TE, axis=0) - taken_TE
    for k in tl.static_range(K):
        pair = t.to(tl.int64) * J + k
        chosen = tl.sum(tl.where(j[None, :] == k, expert_TJ, 0), axis=1)
        row = tl.sum(tl.where(e[None, :] == chosen[:, None], row_TE, 0), axis=1)
        tl.store(order_ptr + row.to(tl.int64), pair.to(tl.int32), mask=ok)
        tl.store(inverse_ptr + pair, row, mask=ok)
    for s in tl.static_range(S):
        pair = t.to(tl.int64) * J + K + s
        row = T * (K + s) + t
        tl.store(order_ptr + row.to(tl.int64), pair.to(tl.int32), mask=ok)
        tl.store(inverse_ptr + pair, row, mask=ok)


@triton.jit(do_not_specialize=["T", "num_blocks"])
def choose_kernel(
    logits_ptr, gates_ptr, experts_ptr, counts_ptr, block_counts_ptr, order_ptr, inverse_ptr, T, num_blocks,
    E: tl.constexpr, K: tl.constexpr, S: tl.constexpr, RENORMALISE: tl.constexpr, ONE_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Gates [T, J] float32, experts [T, J] int64, and the histogram of each program's tokens [E, programs]."""
    J: tl.constexpr = K + S
    block = tl.program_id(0)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    j = tl.arange(0, BLOCK_J)
    ok = t < T
    logits_TE = tl.load(
        logits_ptr + (t.to(tl.int64)[:, None] * E + e[None, :]), mask=ok[:, None] & (e < E)[None, :], other=0.0
    ).to(tl.float32)
    keys_TE = _descending_keys(logits_TE, e, E)
    taken_TE = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.int32)
    value_TJ = tl.zeros((BLOCK_T, BLOCK_J), dtype=tl.float32)
    expert_TJ = tl.zeros((BLOCK_T, BLOCK_J), dtype=tl.int32) + E - K + j[None, :]  # shared ones count on from E
    for k in tl.static_range(K):
        best = tl.max(keys_TE, axis=1)
        chosen = tl.min(tl.where(keys_TE == best[:, None], e[None, :], BLOCK_E), axis=1)
        here_TE = e[None, :] == chosen[:, None]
        taken_TE += here_TE.to(tl.int32)
        keys_TE = tl.where(here_TE, LOWEST, keys_TE)
        value = tl.sum(tl.where(here_TE, logits_TE, 0.0), axis=1)
        value_TJ = tl.where(j[None, :] == k, value[:, None], value_TJ)
        expert_TJ = tl.where(j[None, :] == k, chosen[:, None], expert_TJ)
    largest = tl.sum(tl.where(j[None, :] == 0, value_TJ, 0.0), axis=1)
    share_TJ = tl.where(j[None, :] < K, tl.exp(value_TJ - largest[:, None]), 0.0)
    if RENORMALISE:
        total = tl.sum(share_TJ, axis=1)
    else:
        total = tl.sum(tl.where((e < E)[None, :], tl.exp(logits_TE - largest[:, None]), 0.0), axis=1)
    gate_TJ = tl.where(j[None, :] < K, share_TJ / total[:, None], 1.0)
    pair_TJ = t.to(tl.int64)[:, None] * J + j[None, :]
    ok_TJ = ok[:, None] & (j < J)[None, :]
    tl.store(gates_ptr + pair_TJ, gate_TJ, mask=ok_TJ)
    tl.store(experts_ptr + pair_TJ, expert_TJ.to(tl.int64), mask=ok_TJ)
    taken_TE = tl.where(ok[:, None], taken_TE, 0)
    counts_E = tl.sum(taken_TE, axis=0)
    if ONE_BLOCK:
        tl.store(counts_ptr + e.to(tl.int64), tl.where(e < E, counts_E, T).to(tl.int64), mask=e < E + S)
        first_row_E = tl.cumsum(counts_E, axis=0) - counts_E
        _scatter(order_ptr, inverse_ptr, expert_TJ, first_row_E, taken_TE, t, e, j, T, K, S)
    else:
        tl.store(block_counts_ptr + (e.to(tl.int64) * num_blocks + block), counts_E, mask=e < E)


@triton.jit(do_not_specialize=["T", "num_blocks"])
def prefix_kernel(block_counts_ptr, counts_ptr, T, num_blocks, E: tl.constexpr, BLOCK: tl.constexpr):
    """One program an expert: its counts become how many rows earlier programs give it; their sum is its count."""
    e = tl.program_id(0)
    total = tl.zeros((), dtype=tl.int32)
    if e >= E:
        total += T
    else:
        for start in range(0, num_blocks, BLOCK):
            block = start + tl.arange(0, BLOCK)
            at = e.to(tl.int64) * num_blocks + block
            counts = tl.load(block_counts_ptr + at, mask=block < num_blocks, other=0)
            tl.store(block_counts_ptr + at, total + tl.cumsum(counts, axis=0) - counts, mask=block < num_blocks)
            total += tl.sum(counts, axis=0)
    tl.store(counts_ptr + e.to(tl.int64), total.to(tl.int64))


@triton.jit(do_not_specialize=["T", "num_blocks"])
def place_kernel(
    experts_ptr, counts_ptr, block_counts_ptr, order_ptr, inverse_ptr, T, num_blocks,
    E: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Both permutations, from the scanned counts."""
    J: tl.constexpr = K + S
    block = tl.program_id(0)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    j = tl.arange(0, BLOCK_J)
    ok_TJ = (t < T)[:, None] & (j < K)[None, :]
    expert_TJ = tl.load(experts_ptr + (t.to(tl.int64)[:, None] * J + j[None, :]), mask=ok_TJ, other=-1).to(tl.int32)
    counts_E = tl.load(counts_ptr + e.to(tl.int64), mask=e < E, other=0).to(tl.int32)
    earlier_E = tl.load(block_counts_ptr + (e.to(tl.int64) * num_blocks + block), mask=e < E, other=0)
    taken_TE = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.int32)
    for k in tl.static_range(K):
        chosen = tl.sum(tl.where(j[None, :] == k, expert_TJ, 0), axis=1)
        taken_TE += (e[None, :] == chosen[:, None]).to(tl.int32)
    first_row_E = tl.cumsum(counts_E, axis=0) - counts_E + earlier_E
    _scatter(order_ptr, inverse_ptr, expert_TJ, first_row_E, taken_TE, t, e, j, T, K, S)


@triton.jit(do_not_specialize=["num_tiles"])
def tiles_kernel(
    counts_ptr, tiles_ptr, num_tiles, G: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Which rows the i-th tile of BLOCK_M rows of one expert is: tiles [3, num_tiles] int32.

    (expert, first row, one past the expert's last row); expert −1 where there are fewer tiles. The number of
    tiles is bounded without knowing the counts, so the host need not wait for them.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g = tl.arange(0, BLOCK_G)
    counts_G = tl.load(counts_ptr + g.to(tl.int64), mask=g < G, other=0).to(tl.int32)
    tiles_G = (counts_G + BLOCK_M - 1) // BLOCK_M
    last_tile_G, last_row_G = tl.cumsum(tiles_G, axis=0), tl.cumsum(counts_G, axis=0)
    expert = tl.sum(((last_tile_G[None, :] <= i[:, None]) & (g < G)[None, :]).to(tl.int32), axis=1)
    mine = g[None, :] == expert[:, None]
    tile = i - tl.sum(tl.where(mine, (last_tile_G - tiles_G)[None, :], 0), axis=1)
    end = tl.sum(tl.where(mine, last_row_G[None, :], 0), axis=1)
    start = end - tl.sum(tl.where(mine, counts_G[None, :], 0), axis=1) + tile * BLOCK_M
    ok = i < num_tiles
    at = i.to(tl.int64)
    tl.store(tiles_ptr + at, tl.where(expert < G, expert, -1), mask=ok)
    tl.store(tiles_ptr + (at + num_tiles), start, mask=ok)
    tl.store(tiles_ptr + (at + num_tiles + num_tiles), end, mask=ok)


@triton.jit(do_not_specialize=["T"])
def router_gradient_kernel(
    dots_ptr, gates_ptr, experts_ptr, inverse_ptr, logits_ptr, grad_ptr, T,
    E: tl.constexpr, K: tl.constexpr, S: tl.constexpr, NUM_PARTS: tl.constexpr, RENORMALISE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """∂L/∂logits [T, E] from gate·∂L/∂gate, which lies in NUM_PARTS float32 parts a row [P, NUM_PARTS].

    qₖ − gₖ Σⱼ qⱼ where qₖ = gₖ·∂L/∂gₖ: no division by a gate that may be 0.
    """
    J: tl.constexpr = K + S
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    part = tl.arange(0, BLOCK_PARTS)
    ok = t < T
    ok_TE = ok[:, None] & (e < E)[None, :]
    grad_TE = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float32)
    gate_TE = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float32)
    for k in tl.static_range(K):
        pair = t.to(tl.int64) * J + k
        row = tl.load(inverse_ptr + pair, mask=ok, other=0).to(tl.int64)
        ok_parts = ok[:, None] & (part < NUM_PARTS)[None, :]
        parts = tl.load(dots_ptr + (row[:, None] * NUM_PARTS + part[None, :]), mask=ok_parts, other=0.0)
        here_TE = e[None, :] == tl.load(experts_ptr + pair, mask=ok, other=-1).to(tl.int32)[:, None]
        grad_TE += tl.where(here_TE, tl.sum(parts, axis=1)[:, None], 0.0)
        gate_TE += tl.where(here_TE, tl.load(gates_ptr + pair, mask=ok, other=0.0)[:, None], 0.0)
    at_TE = t.to(tl.int64)[:, None] * E + e[None, :]
    if not RENORMALISE:
        logits_TE = tl.load(logits_ptr + at_TE, mask=ok_TE, other=0.0).to(tl.float32)
        top = tl.max(tl.where((e < E)[None, :], logits_TE, -float("inf")), axis=1)
        share_TE = tl.where((e < E)[None, :], tl.exp(logits_TE - top[:, None]), 0.0)
        gate_TE = share_TE / tl.sum(share_TE, axis=1)[:, None]
    grad_TE -= gate_TE * tl.sum(grad_TE, axis=1)[:, None]
    tl.store(grad_ptr + at_TE, grad_TE.to(grad_ptr.dtype.element_ty), mask=ok_TE)
