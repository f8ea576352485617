"""Routing on the device: top-k and gates in one kernel; a stable counting sort without atomics or a host sync.

Each program of the sort takes BLOCK_T tokens. `count_kernel` counts its tokens' choices, `prefix_kernel` scans
the counts over programs, `place_kernel` scatters: a pair's row is what comes before its expert, plus what
earlier programs gave it, plus what earlier tokens of this program and earlier slots of this token gave it.
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


@triton.jit(do_not_specialize=["T"])
def choose_kernel(
    logits_ptr, gates_ptr, experts_ptr, T,
    E: tl.constexpr, K: tl.constexpr, NORM_TOPK_PROB: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gates [T, K] float32 and experts [T, K] int64."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    k_K = tl.arange(0, BLOCK_K)
    ok = t < T
    logits_TE = tl.load(
        logits_ptr + (t.to(tl.int64)[:, None] * E + e[None, :]), mask=ok[:, None] & (e < E)[None, :], other=0.0
    ).to(tl.float32)
    keys_TE = _descending_keys(logits_TE, e, E)
    value_TK = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
    expert_TK = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.int32)
    for k in tl.static_range(K):
        best = tl.max(keys_TE, axis=1)
        chosen = tl.min(tl.where(keys_TE == best[:, None], e[None, :], BLOCK_E), axis=1)
        here_TE = e[None, :] == chosen[:, None]
        keys_TE = tl.where(here_TE, LOWEST, keys_TE)
        value = tl.sum(tl.where(here_TE, logits_TE, 0.0), axis=1)
        value_TK = tl.where(k_K[None, :] == k, value[:, None], value_TK)
        expert_TK = tl.where(k_K[None, :] == k, chosen[:, None], expert_TK)
    largest = tl.sum(tl.where(k_K[None, :] == 0, value_TK, 0.0), axis=1)
    share_TK = tl.where(k_K[None, :] < K, tl.exp(value_TK - largest[:, None]), 0.0)
    if NORM_TOPK_PROB:
        total = tl.sum(share_TK, axis=1)
    else:
        total = tl.sum(tl.where((e < E)[None, :], tl.exp(logits_TE - largest[:, None]), 0.0), axis=1)
    pair_TK = t.to(tl.int64)[:, None] * K + k_K[None, :]
    ok_TK = ok[:, None] & (k_K < K)[None, :]
    tl.store(gates_ptr + pair_TK, share_TK / total[:, None], mask=ok_TK)
    tl.store(experts_ptr + pair_TK, expert_TK.to(tl.int64), mask=ok_TK)


@triton.jit
def _load_experts(experts_ptr, t, k_K, T, E: tl.constexpr, K: tl.constexpr):
    """Experts [BLOCK_T, BLOCK_K] of these tokens; −1 for what is no expert's index."""
    ok_TK = (t < T)[:, None] & (k_K < K)[None, :]
    expert_TK = tl.load(experts_ptr + (t.to(tl.int64)[:, None] * K + k_K[None, :]), mask=ok_TK, other=-1)
    return tl.where((expert_TK >= 0) & (expert_TK < E), expert_TK, -1).to(tl.int32)


@triton.jit
def _count(expert_TK, e, k_K, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    """How often each token takes each expert [BLOCK_T, BLOCK_E]."""
    taken_TE = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.int32)
    for k in tl.static_range(K):
        chosen = tl.sum(tl.where(k_K[None, :] == k, expert_TK, 0), axis=1)
        taken_TE += (e[None, :] == chosen[:, None]).to(tl.int32)
    return taken_TE


@triton.jit
def _scatter(
    order_ptr, inverse_ptr, expert_TK, counts_E, earlier_E, taken_TE, t, e, k_K, T,
    K: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Writes both permutations for the tokens t, of which earlier_E rows an expert are earlier programs'."""
    J: tl.constexpr = K + S
    ok = t < T
    row_TE = (tl.cumsum(counts_E, axis=0) - counts_E + earlier_E)[None, :] + tl.cumsum(taken_TE, axis=0) - taken_TE
    num_routed = tl.sum(counts_E, axis=0)
    # The pairs left out come last: as many as precede this token's, of its t·K earlier ones.
    taken_T = tl.sum(taken_TE, axis=1)
    left_out_row = num_routed + T * S + t * K - (tl.sum(earlier_E, axis=0) + tl.cumsum(taken_T, axis=0) - taken_T)
    for k in tl.static_range(K):
        pair = t.to(tl.int64) * J + k
        chosen = tl.sum(tl.where(k_K[None, :] == k, expert_TK, 0), axis=1)
        here_TE = e[None, :] == chosen[:, None]
        row = tl.sum(tl.where(here_TE, row_TE, 0), axis=1)
        tl.store(order_ptr + tl.where(chosen >= 0, row, left_out_row).to(tl.int64), pair.to(tl.int32), mask=ok)
        tl.store(inverse_ptr + pair, tl.where(chosen >= 0, row, -1), mask=ok)
        row_TE += here_TE.to(tl.int32)
        left_out_row += (chosen < 0).to(tl.int32)
    for s in tl.static_range(S):
        pair = t.to(tl.int64) * J + K + s
        row = num_routed + T * s + t
        tl.store(order_ptr + row.to(tl.int64), pair.to(tl.int32), mask=ok)
        tl.store(inverse_ptr + pair, row, mask=ok)


@triton.jit(do_not_specialize=["T", "num_blocks"])
def count_kernel(
    experts_ptr, counts_ptr, block_counts_ptr, order_ptr, inverse_ptr, T, num_blocks,
    E: tl.constexpr, K: tl.constexpr, S: tl.constexpr, ONE_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The histogram of each program's tokens [E, programs]; of a single program all that is asked for."""
    block = tl.program_id(0)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    k_K = tl.arange(0, BLOCK_K)
    expert_TK = _load_experts(experts_ptr, t, k_K, T, E, K)
    taken_TE = _count(expert_TK, e, k_K, K, BLOCK_T, BLOCK_E)
    counts_E = tl.sum(taken_TE, axis=0)
    if ONE_BLOCK:
        tl.store(counts_ptr + e.to(tl.int64), tl.where(e < E, counts_E, T).to(tl.int64), mask=e < E + S)
        _scatter(
            order_ptr, inverse_ptr, expert_TK, counts_E, tl.zeros_like(counts_E), taken_TE, t, e, k_K, T, K, S
        )  # fmt: skip
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
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Both permutations, from the scanned counts."""
    block = tl.program_id(0)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    k_K = tl.arange(0, BLOCK_K)
    expert_TK = _load_experts(experts_ptr, t, k_K, T, E, K)
    taken_TE = _count(expert_TK, e, k_K, K, BLOCK_T, BLOCK_E)
    counts_E = tl.load(counts_ptr + e.to(tl.int64), mask=e < E, other=0).to(tl.int32)
    earlier_E = tl.load(block_counts_ptr + (e.to(tl.int64) * num_blocks + block), mask=e < E, other=0)
    _scatter(order_ptr, inverse_ptr, expert_TK, counts_E, earlier_E, taken_TE, t, e, k_K, T, K, S)


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
def gate_gradient_kernel(
    dots_ptr, inverse_ptr, grad_ptr, T,
    K: tl.constexpr, S: tl.constexpr, NUM_PARTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """∂L/∂gates [T, K] from its NUM_PARTS float32 parts a row [P, NUM_PARTS]; 0 where a pair is left out."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, BLOCK_PARTS)
    ok = pair < T.to(tl.int64) * K
    row = tl.load(inverse_ptr + (pair // K * (K + S) + pair % K), mask=ok, other=-1).to(tl.int64)
    ok_parts = (row >= 0)[:, None] & (part < NUM_PARTS)[None, :]
    parts = tl.load(dots_ptr + (row[:, None] * NUM_PARTS + part[None, :]), mask=ok_parts, other=0.0)
    tl.store(grad_ptr + pair, tl.sum(parts, axis=1), mask=ok)


@triton.jit(do_not_specialize=["T"])
def router_gradient_kernel(
    grad_gates_ptr, gates_ptr, experts_ptr, logits_ptr, grad_ptr, T,
    E: tl.constexpr, K: tl.constexpr, NORM_TOPK_PROB: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """∂L/∂logits [T, E] = qₑ − gₑ Σⱼ qⱼ, where q is gate·∂L/∂gate, 0 of experts that were not chosen."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    ok = t < T
    ok_TE = ok[:, None] & (e < E)[None, :]
    grad_TE = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float32)
    gate_TE = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float32)
    for k in tl.static_range(K):
        pair = t.to(tl.int64) * K + k
        gate = tl.load(gates_ptr + pair, mask=ok, other=0.0)
        grad = tl.load(grad_gates_ptr + pair, mask=ok, other=0.0)
        here_TE = e[None, :] == tl.load(experts_ptr + pair, mask=ok, other=-1).to(tl.int32)[:, None]
        grad_TE += tl.where(here_TE, (gate * grad)[:, None], 0.0)
        gate_TE += tl.where(here_TE, gate[:, None], 0.0)
    at_TE = t.to(tl.int64)[:, None] * E + e[None, :]
    if not NORM_TOPK_PROB:
        logits_TE = tl.load(logits_ptr + at_TE, mask=ok_TE, other=0.0).to(tl.float32)
        top = tl.max(tl.where((e < E)[None, :], logits_TE, -float("inf")), axis=1)
        share_TE = tl.where((e < E)[None, :], tl.exp(logits_TE - top[:, None]), 0.0)
        gate_TE = share_TE / tl.sum(share_TE, axis=1)[:, None]
    grad_TE -= gate_TE * tl.sum(grad_TE, axis=1)[:, None]
    tl.store(grad_ptr + at_TE, grad_TE.to(grad_ptr.dtype.element_ty), mask=ok_TE)
