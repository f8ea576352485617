"""The Triton path's functions, the same as `mmllm_kernels.sorted_tokens` has: buffers, grids, launches.

No host sync on any way through (lazy tuning apart, see `tuning`): grids are bounded by shapes alone, so
that a CUDA graph can capture every call.

Shapes: T tokens, D model width, E experts, S shared experts, G = E + S, K experts a token, J = K + S slots
a token, N expert inner width, P = T·J pairs in expert order, V codes.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (Launching a kernel is typed as calling it.)
from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmllm_kernels.backends import interpreted
from mmllm_kernels.gpu import gradients, nearest, products, routing, tuning
from mmllm_kernels.gpu.tuning import Blocks, Key
from mmllm_kernels.sorted_tokens import Sorting, Weights

_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def route(router_logits_TE: Tensor, top_k: int, norm_topk_prob: bool) -> tuple[Tensor, Tensor]:
    """Gates and experts [T, K], in one launch."""
    (T, E), device = router_logits_TE.shape, router_logits_TE.device
    router_logits_TE = router_logits_TE.contiguous()
    gates_TK = torch.empty(T, top_k, dtype=torch.float32, device=device)
    experts_TK = torch.empty(T, top_k, dtype=torch.int64, device=device)
    if T:
        shape = _routing_blocks(T, E, top_k)
        with _on(router_logits_TE):
            routing.choose_kernel[(triton.cdiv(T, shape["BLOCK_T"]),)](
                router_logits_TE, gates_TK, experts_TK, T, E=E, K=top_k, NORM_TOPK_PROB=norm_topk_prob, **shape
            )  # fmt: skip
    return gates_TK, experts_TK


def route_backward(
    grad_gates_TK: Tensor, gates_TK: Tensor, experts_TK: Tensor, router_logits_TE: Tensor, norm_topk_prob: bool
) -> Tensor:
    """Gradient of the router's logits. Under `norm_topk_prob` their values are not read, only their shape."""
    (T, K), E = gates_TK.shape, router_logits_TE.shape[1]
    grad_TE = torch.empty_like(router_logits_TE, memory_format=torch.contiguous_format)
    logits = grad_TE if norm_topk_prob else router_logits_TE.contiguous()
    BLOCK_E = triton.next_power_of_2(E)
    BLOCK_T = max(min(4096 // BLOCK_E, 32), 4)
    if T:
        with _on(grad_TE):
            routing.router_gradient_kernel[(triton.cdiv(T, BLOCK_T),)](
                grad_gates_TK.contiguous(), gates_TK, experts_TK, logits, grad_TE, T,
                E=E, K=K, NORM_TOPK_PROB=norm_topk_prob, BLOCK_T=BLOCK_T, BLOCK_E=BLOCK_E,
            )  # fmt: skip
    return grad_TE


def sort(experts_TK: Tensor, num_experts: int, num_shared: int) -> Sorting:
    """The counting sort of the pairs by expert: one launch for few tokens, three otherwise."""
    (T, K), E = experts_TK.shape, num_experts
    experts_TK, J = experts_TK.contiguous(), K + num_shared
    integers = {"dtype": torch.int32, "device": experts_TK.device}
    result = Sorting(
        counts_G=torch.empty(E + num_shared, dtype=torch.int64, device=experts_TK.device),
        order_P=torch.empty(T * J, **integers),
        inverse_TJ=torch.empty(T, J, **integers),
    )
    if not T:
        result.counts_G.zero_()
        return result
    counts, order, inverse = result
    shape = _routing_blocks(T, E + num_shared, K)
    num_blocks = triton.cdiv(T, shape["BLOCK_T"])
    block_counts = torch.empty(E if num_blocks > 1 else 0, num_blocks, **integers)
    shape.update(E=E, K=K, S=num_shared)
    with _on(experts_TK):
        routing.count_kernel[(num_blocks,)](
            experts_TK, counts, block_counts, order, inverse, T, num_blocks, ONE_BLOCK=num_blocks == 1, **shape
        )  # fmt: skip
        if num_blocks > 1:
            routing.prefix_kernel[(E + num_shared,)](block_counts, counts, T, num_blocks, E=E, BLOCK=1024)
            routing.place_kernel[(num_blocks,)](
                experts_TK, counts, block_counts, order, inverse, T, num_blocks, **shape
            )  # fmt: skip
    return result


def forward(x_TD: Tensor, gates_TK: Tensor, weights: Weights, sorting: Sorting, save_h: bool) -> tuple[Tensor, Tensor]:
    """Outputs [T, D] and, if `save_h`, the pre-activations [P, 2N] in expert order (otherwise [0, 2N])."""
    call = _Call(x_TD, gates_TK, weights, sorting)
    h_P2N = x_TD.new_empty(call.P if save_h else 0, 2 * call.N)
    if not call.P:
        return torch.zeros_like(x_TD), h_P2N
    a_PN, y_PD = x_TD.new_empty(call.P, call.N), x_TD.new_empty(call.P, call.D)
    with _on(x_TD):
        call.gate_up(h_P2N, a_PN, store_h=save_h, store_a=True)
        call.project("down", a_PN, weights.down_EDN, weights.shared_down_SDN, y_PD, transposed=True)
        return call.weighted_sum(y_PD, weighted=True), h_P2N


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
    call = _Call(x_TD, gates_TK, weights, sorting)
    grads = Weights(*(torch.empty_like(w) if weight_grads else w.new_empty(0) for w in weights))
    if not call.P:
        return torch.zeros_like(x_TD), torch.zeros_like(gates_TK), Weights(*(g.zero_() for g in grads))
    a_PN, grad_h_P2N = x_TD.new_empty(call.P, call.N), x_TD.new_empty(call.P, 2 * call.N)
    with _on(x_TD):
        if not len(h_P2N):
            h_P2N = torch.empty_like(grad_h_P2N)
            call.gate_up(h_P2N, a_PN, store_h=True, store_a=False)
        dots = call.activation_gradient(grad_out_TD, h_P2N, grad_h_P2N, a_PN)
        grad_gates_TK = call.gate_gradient(dots)
        if weight_grads:
            call.weight_gradient(grad_out_TD, a_PN, grads.down_EDN, grads.shared_down_SDN, gather_left=True)
            call.weight_gradient(grad_h_P2N, x_TD, grads.gate_up_E2ND, grads.shared_gate_up_S2ND, gather_left=False)
        grad_x_PD = x_TD.new_empty(call.P, call.D)
        call.project(
            "token_gradient", grad_h_P2N, weights.gate_up_E2ND, weights.shared_gate_up_S2ND, grad_x_PD, transposed=False
        )
        return call.weighted_sum(grad_x_PD, weighted=False), grad_gates_TK, grads


def nearest_code(x_TD: Tensor, codebook_VD: Tensor) -> Tensor:
    """The same as `mmllm_kernels.reference.nearest_code`, at full precision also where TF32 is allowed."""
    (T, D), V = x_TD.shape, len(codebook_VD)
    codes_T = torch.empty(T, dtype=torch.int64, device=x_TD.device)
    if not T:
        return codes_T
    squares_V = codebook_VD.float().square().sum(dim=1)

    def launch(b: Blocks) -> None:
        nearest.nearest_kernel[(triton.cdiv(T, b.m),)](
            x_TD, codebook_VD, squares_V, codes_T, T, D=D, V=V, DOT=_dot_dtype(x_TD),
            BLOCK_T=b.m, BLOCK_V=b.n, BLOCK_K=b.k, num_warps=b.warps, num_stages=b.stages,
        )  # fmt: skip

    with _on(x_TD):
        _tuned(Key("nearest", _name(x_TD), D, V, tuning.bucket(T, 1)), launch, x_TD)
    return codes_T


class _Call:
    """What the kernels of one forward or backward share: sizes and the map of tiles."""

    def __init__(self, x_TD: Tensor, gates_TK: Tensor, weights: Weights, sorting: Sorting):
        self.x, self.gates, self.weights, self.sorting = x_TD, gates_TK, weights, sorting
        (self.T, self.J), self.D = sorting.inverse_TJ.shape, x_TD.shape[1]
        self.E, self.S, self.N = len(weights.gate_up_E2ND), len(weights.shared_gate_up_S2ND), weights.down_EDN.shape[2]
        self.P, self.G = self.T * self.J, self.E + self.S
        self.bucket = tuning.bucket(self.P, self.G)
        self.block_m = tuning.tile_rows(self.bucket)
        if x_TD.dtype == torch.float32:
            self.block_m = min(self.block_m, 64)
        self.groups = {"E": self.E, "S": self.S}
        self.numbers = {"DOT": _dot_dtype(x_TD), "PRECISION": _precision(x_TD)}
        # A tile holds at least one row, and all but the last one of an expert are full.
        self.num_tiles = min(triton.cdiv(self.P, self.block_m) + self.G, self.P)
        self.tiles = torch.empty(3, self.num_tiles, dtype=torch.int32, device=x_TD.device)
        if self.P:
            with _on(x_TD):
                routing.tiles_kernel[(triton.cdiv(self.num_tiles, 64),)](
                    sorting.counts_G, self.tiles, self.num_tiles, G=self.G,
                    BLOCK_M=self.block_m, BLOCK_G=triton.next_power_of_2(self.G), BLOCK=64,
                )  # fmt: skip

    def _key(self, kernel: str, depth: int, width: int) -> Key:
        return Key(kernel, _name(self.x), depth, width, self.bucket)

    def _shape(self, b: Blocks) -> dict[str, Any]:
        sizes = {"BLOCK_M": self.block_m, "BLOCK_N": b.n, "BLOCK_K": b.k, "GROUP": b.group}
        return {**sizes, **self.groups, **self.numbers, "num_warps": b.warps, "num_stages": b.stages}

    def gate_up(self, h_P2N: Tensor, a_PN: Tensor, store_h: bool, store_a: bool) -> None:
        w, shared = self.weights.gate_up_E2ND, self.weights.shared_gate_up_S2ND

        def launch(b: Blocks) -> None:
            products.gate_up_kernel[(self.num_tiles * triton.cdiv(self.N, b.n),)](
                self.x, w, shared, self.sorting.order_P, self.tiles, h_P2N, a_PN, self.num_tiles,
                D=self.D, N=self.N, J=self.J, STORE_H=store_h, STORE_A=store_a, **self._shape(b),
            )  # fmt: skip

        _tuned(self._key("gate_up", self.D, self.N), launch, self.x)

    def project(self, kernel: str, lhs: Tensor, w: Tensor, shared: Tensor, out: Tensor, transposed: bool) -> None:
        depth, width = lhs.shape[1], out.shape[1]

        def launch(b: Blocks) -> None:
            products.project_kernel[(self.num_tiles * triton.cdiv(width, b.n),)](
                lhs, w, shared, self.tiles, out, self.num_tiles,
                DEPTH=depth, WIDTH=width, TRANSPOSED=transposed, **self._shape(b),
            )  # fmt: skip

        _tuned(self._key(kernel, depth, width), launch, self.x)

    def weighted_sum(self, y_PD: Tensor, weighted: bool) -> Tensor:
        out_TD = torch.empty_like(self.x)
        BLOCK_D = min(triton.next_power_of_2(self.D), 512)
        BLOCK_T = max(2048 // BLOCK_D, 1) if self.T > 512 or interpreted() else 1
        products.weighted_sum_kernel[(triton.cdiv(self.T, BLOCK_T), triton.cdiv(self.D, BLOCK_D))](
            y_PD, self.sorting.inverse_TJ, self.gates, out_TD, self.T,
            D=self.D, J=self.J, S=self.S, WEIGHTED=weighted, BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D,
        )  # fmt: skip
        return out_TD

    def activation_gradient(self, grad_out_TD: Tensor, h_P2N: Tensor, grad_h_P2N: Tensor, a_PN: Tensor) -> Tensor:
        """Writes the gradient of h and the weighted activations; returns the parts of ∂L/∂gate [P, parts]."""
        dots: dict[int, Tensor] = {}

        def launch(b: Blocks) -> None:
            parts = triton.cdiv(self.N, b.n)
            if b.n not in dots:
                dots[b.n] = torch.empty(self.P, parts, dtype=torch.float32, device=self.x.device)
            gradients.activation_gradient_kernel[(self.num_tiles * parts,)](
                grad_out_TD, self.weights.down_EDN, self.weights.shared_down_SDN, self.sorting.order_P, self.tiles,
                self.gates, h_P2N, grad_h_P2N, a_PN, dots[b.n], self.num_tiles,
                D=self.D, N=self.N, J=self.J, **self._shape(b),
            )  # fmt: skip

        blocks = _tuned(self._key("activation_gradient", self.D, self.N), launch, self.x)
        return dots[blocks.n]

    def gate_gradient(self, dots: Tensor) -> Tensor:
        grad_TK = torch.empty_like(self.gates)
        BLOCK_PARTS = triton.next_power_of_2(dots.shape[1])
        BLOCK = max(2048 // BLOCK_PARTS, 1)
        routing.gate_gradient_kernel[(triton.cdiv(grad_TK.numel(), BLOCK),)](
            dots, self.sorting.inverse_TJ, grad_TK, self.T,
            K=self.J - self.S, S=self.S, NUM_PARTS=dots.shape[1], BLOCK=BLOCK, BLOCK_PARTS=BLOCK_PARTS,
        )  # fmt: skip
        return grad_TK

    def weight_gradient(
        self, left: Tensor, right: Tensor, grad: Tensor, shared_grad: Tensor, gather_left: bool
    ) -> None:
        height, width = left.shape[1], right.shape[1]

        def launch(b: Blocks) -> None:
            grid = (self.G * triton.cdiv(height, b.m) * triton.cdiv(width, b.n),)
            shape = {**self._shape(b), "BLOCK_M": b.m, "BLOCK_G": triton.next_power_of_2(self.G)}
            gradients.weight_gradient_kernel[grid](
                left, right, self.sorting.order_P, self.sorting.counts_G, grad, shared_grad,
                HEIGHT=height, WIDTH=width, J=self.J, GATHER_LEFT=gather_left, GATHER_RIGHT=not gather_left, **shape,
            )  # fmt: skip

        _tuned(self._key("weight_gradient", height, width), launch, self.x)


def _tuned(key: Key, launch: Callable[[Blocks], None], x: Tensor) -> Blocks:
    blocks = tuning.blocks(key, launch, x.device)
    launch(blocks)
    return blocks


def _routing_blocks(num_tokens: int, num_groups: int, top_k: int) -> dict[str, int]:
    """A program's logits, keys, and rows of each expert stay in registers; a few tokens take no larger block."""
    BLOCK_E = triton.next_power_of_2(num_groups)
    BLOCK_T = min(max(min(2048 // BLOCK_E, 64), 8), triton.next_power_of_2(num_tokens))
    num_warps = 1 if BLOCK_T * BLOCK_E <= 128 else 4
    return {"BLOCK_T": BLOCK_T, "BLOCK_E": BLOCK_E, "BLOCK_K": triton.next_power_of_2(top_k), "num_warps": num_warps}


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _dot_dtype(x: Tensor) -> tl.dtype:
    """The interpreter multiplies bfloat16's bits as if they were integers: give it float32, which is exact."""
    return tl.float32 if interpreted() else _DTYPES[x.dtype]


def _precision(x: Tensor) -> str:
    return "tf32" if x.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _on(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
