"""The public functions: arguments are checked, casts made, and a backend asked.

Shapes: T tokens, D model width, E experts, K experts a token, N expert inner width, S shared experts, V codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmllm_kernels import backends, matvec, ops, reference
from mmllm_kernels.backends import Backend
from mmllm_kernels.reference import ExpertsOutput, MoEOutput
from mmllm_kernels.sorted_tokens import Weights, check_indices

_MAX_PAIRS = 2**31 - 2**12
"""A block that starts below it also ends where int32 can count."""
_Shared = tuple[Tensor, Tensor] | tuple[()]


def experts(
    x_TD: Tensor,
    gates_TK: Tensor,
    experts_TK: Tensor,
    w_gate_up_E2ND: Tensor,
    w_down_EDN: Tensor,
    backend: Backend = "auto",
    *,
    shared_gate_up_S2ND: Tensor | None = None,
    shared_down_SDN: Tensor | None = None,
    recompute: bool = False,
) -> ExpertsOutput:
    """SwiGLU experts of tokens whose gates and experts are given, differentiable in the tokens, gates and weights.

    Each token's output is the sum over its K experts, weighted by its gates and taken in at least float32. Saved
    for backward are the tokens and the pre-activations: 2TD + 4TKN bytes in bfloat16 and 12 bytes a pair, besides
    the gates. Gradients are the same in every run, bit for bit. There is no second derivative.

    The computation is in the weights' dtype, or in autocast's; x is cast to it, and the output has x's dtype
    (under autocast, autocast's). The Triton kernels take bfloat16, float16 and float32 (gates in float32) and know
    neither a host sync nor atomics; the path of plain PyTorch takes every floating dtype.

    Sources: SonicMoE (arXiv 2512.14080) for what is saved; ScatterMoE (arXiv 2403.08245) for sorting indices
    in place of tokens; DeepSeekMoE (arXiv 2401.06066) for shared experts. `mmllm_kernels.reference.experts` is the
    definition.

    Args:
        x_TD: tokens; T may be 0.
        gates_TK: weights of each token's experts, float32 or wider; any K from 1 up.
        experts_TK: which experts these are, int64 or int32. The index −1 leaves a pair out: nobody computes it, no
            count has it, and its gate has the gradient 0; its memory is reserved all the same, since its absence is
            not known to the host. An expert that a token names twice counts twice. An index beyond the last expert
            is an error, but on a GPU, which is not waited for, it leaves the pair out.
        w_gate_up_E2ND: rows [0, N) are the gate's, rows [N, 2N) the up projection's.
        w_down_EDN: the down projections.
        backend: `reference` (plain and slow), `cpu` (plain PyTorch on sorted tokens, on any device),
            `triton`, or `auto`: triton on a GPU, otherwise cpu. What the Triton kernels cannot take goes to
            `cpu`, with one RuntimeWarning that says why.
        shared_gate_up_S2ND: experts that every token takes with the gate 1, laid out as the others'. A wide
            shared expert is exactly several of width N: split its rows.
        shared_down_SDN: their down projections.
        recompute: save the tokens alone and compute the pre-activations again in backward.

    Returns:
        The outputs, and how many (token, choice) pairs each expert took.

    Raises:
        ValueError: for shapes that do not fit one another, tensors of different devices, gates in half precision,
            indices that are no integers or beyond the last expert, an unknown backend, or about 2³¹ pairs and more.
    """
    backends.check(backend)
    _check_shapes(x_TD, "gates", gates_TK, "K", w_gate_up_E2ND, w_down_EDN)
    _check_choice(gates_TK, experts_TK)
    weights = (w_gate_up_E2ND, w_down_EDN)
    shared = _check_shared(shared_gate_up_S2ND, shared_down_SDN, *weights)
    if experts_TK.dtype != torch.int64:
        experts_TK = experts_TK.to(torch.int64)
    return _experts(x_TD, gates_TK, experts_TK, weights, shared, backend, recompute)


def route(
    router_logits_TE: Tensor, top_k: int, norm_topk_prob: bool = True, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """The K experts of the largest logits (of equal ones the lowest index first) and their softmax gates.

    Differentiable in the logits; there is no second derivative. Saved for backward are the gates and indices, and
    the logits if not `norm_topk_prob`. `mmllm_kernels.reference.route` is the definition.

    Args:
        router_logits_TE: unnormalized scores, floating; −inf shuts an expert out. T may be 0.
        top_k: K, from 1 to E.
        norm_topk_prob: gates are the softmax over the K chosen logits (Mixtral's, arXiv 2401.04088), so that they
            sum to 1; otherwise over all E.
        backend: as of `experts`. Triton's is one kernel, without a host sync.

    Returns:
        Gates [T, K] in at least float32, and experts [T, K] (int64), the best first.

    Raises:
        ValueError: for logits that are no matrix, a top_k out of range, or an unknown backend.
    """
    backends.check(backend)
    if router_logits_TE.ndim != 2:
        raise ValueError(f"router_logits has {router_logits_TE.ndim} dimensions; it must be [T, E]")
    _check_top_k(top_k, router_logits_TE.shape[1])
    return _route(router_logits_TE, top_k, norm_topk_prob, backend)


def moe(
    x_TD: Tensor,
    router_logits_TE: Tensor,
    w_gate_up_E2ND: Tensor,
    w_down_EDN: Tensor,
    top_k: int,
    norm_topk_prob: bool = True,
    backend: Backend = "auto",
    *,
    shared_gate_up_S2ND: Tensor | None = None,
    shared_down_SDN: Tensor | None = None,
    recompute: bool = False,
) -> MoEOutput:
    """Dropless mixture of SwiGLU experts, differentiable in all its tensors: `experts` of what `route` chooses.

    Saved for backward are 2TD + 4TKN bytes in bfloat16 and at most 32 bytes a pair (and the logits, if not
    `norm_topk_prob`). `mmllm_kernels.reference.moe` is the definition.

    Args:
        x_TD: tokens; T may be 0.
        router_logits_TE: as of `route`.
        w_gate_up_E2ND: as of `experts`.
        w_down_EDN: as of `experts`.
        top_k: as of `route`.
        norm_topk_prob: as of `route`.
        backend: as of `experts`.
        shared_gate_up_S2ND: as of `experts`.
        shared_down_SDN: as of `experts`.
        recompute: as of `experts`.

    Returns:
        The outputs, how many (token, choice) pairs each expert took, and each token's experts.

    Raises:
        ValueError: as `route` and `experts` do.
    """
    backends.check(backend)
    _check_shapes(x_TD, "router_logits", router_logits_TE, "E", w_gate_up_E2ND, w_down_EDN)
    _check_top_k(top_k, router_logits_TE.shape[1])
    weights = (w_gate_up_E2ND, w_down_EDN)
    shared = _check_shared(shared_gate_up_S2ND, shared_down_SDN, *weights)
    gates_TK, experts_TK = _route(router_logits_TE, top_k, norm_topk_prob, backend)
    out_TD, counts_E = _experts(x_TD, gates_TK, experts_TK, weights, shared, backend, recompute)
    return MoEOutput(out_TD, counts_E, experts_TK)


def nearest_code(x_TD: Tensor, codebook_VD: Tensor, backend: Backend = "auto") -> Tensor:
    """Index of the nearest row of the codebook for each row of x: Euclidean, of equal ones the lowest.

    Found as argmin(|c|² − 2 x·c), so that codes whose distances differ by less than that product's rounding
    may be taken for one another. No T×V matrix is made. Under autocast nothing is cast.
    `mmllm_kernels.reference.nearest_code` is the definition.

    Args:
        x_TD: vectors, of any floating dtype; T may be 0.
        codebook_VD: codes, V >= 1, of the same dtype.
        backend: as of `moe`.

    Returns:
        int64 [T].

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or an unknown backend.
    """
    backends.check(backend)
    if x_TD.ndim != 2 or codebook_VD.ndim != 2 or x_TD.shape[1] != codebook_VD.shape[1] or not len(codebook_VD):
        raise ValueError(
            f"x is {list(x_TD.shape)} and the codebook {list(codebook_VD.shape)}; "
            f"they must be [T, D] and [V, D], V >= 1"
        )
    if x_TD.dtype != codebook_VD.dtype or x_TD.device != codebook_VD.device:
        raise ValueError(
            f"x is {x_TD.dtype} on {x_TD.device}, the codebook {codebook_VD.dtype} on {codebook_VD.device}; "
            f"cast or move one of them"
        )
    x_TD, codebook_VD = x_TD.detach(), codebook_VD.detach()
    if backend == "reference":
        return reference.nearest_code(x_TD, codebook_VD)
    return ops.nearest_code(x_TD, codebook_VD, backend)


def _route(router_logits_TE: Tensor, top_k: int, norm_topk_prob: bool, backend: Backend) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return reference.route(router_logits_TE, top_k, norm_topk_prob)
    if torch.compiler.is_compiling() or (router_logits_TE.requires_grad and torch.is_grad_enabled()):
        return ops.route(router_logits_TE, top_k, norm_topk_prob, backend)
    return ops.infer_route(router_logits_TE, top_k, norm_topk_prob, backend)


def _experts(
    x_TD: Tensor,
    gates_TK: Tensor,
    experts_TK: Tensor,
    weights: tuple[Tensor, Tensor],
    shared: _Shared,
    backend: Backend,
    recompute: bool,
) -> ExpertsOutput:
    (num_tokens, top_k), num_experts = gates_TK.shape, weights[0].shape[0]
    num_shared = shared[0].shape[0] if shared else 0
    is_compiling = torch.compiler.is_compiling()
    device_type = "cpu" if x_TD.is_cpu else x_TD.device.type  # the first is much faster
    if not is_compiling and num_tokens * (top_k + num_shared) >= _MAX_PAIRS:
        raise ValueError(
            f"{num_tokens} tokens of {top_k + num_shared} experts are {_MAX_PAIRS} pairs or more; split the batch"
        )
    out_dtype, dtype = x_TD.dtype, weights[0].dtype
    autocasts = torch.is_autocast_enabled(device_type)
    if autocasts:
        out_dtype = dtype = torch.get_autocast_dtype(device_type)
    if x_TD.dtype != dtype:
        x_TD = x_TD.to(dtype)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x_TD, gates_TK, *weights, *shared))
    is_inference = not needs_grad and not is_compiling and backend != "reference"
    num_groups = num_experts + num_shared
    if is_inference and num_tokens == 1 and not backends.use_triton(backend, x_TD, (gates_TK,), num_groups):
        chosen = experts_TK.tolist()[0]
        check_indices(max(chosen), num_experts)
        decode = matvec.experts
        if autocasts:
            decode = torch.autocast(device_type, enabled=False)(decode)  # it casts itself, and less
        out_TD, counts = decode(x_TD, gates_TK, chosen, weights, shared, out_dtype)
        return ExpertsOutput(out_TD, experts_TK.new_tensor(counts))
    if not shared:
        shared = weights[0].new_empty(0, *weights[0].shape[1:]), weights[1].new_empty(0, *weights[1].shape[1:])
    all_weights = Weights(*(weight.to(dtype) for weight in (*weights, *shared)))
    if backend == "reference":
        result = reference.experts(x_TD, gates_TK, experts_TK, *all_weights)
        return result._replace(out_TD=result.out_TD.to(out_dtype))
    if is_inference:
        out_TD, counts_G = ops.infer_experts(x_TD, gates_TK, experts_TK, all_weights, backend)
    else:
        save_h = needs_grad and not recompute
        out_TD, counts_G, *_ = ops.experts(x_TD, gates_TK, experts_TK, *all_weights, save_h, backend)
    return ExpertsOutput(out_TD.to(out_dtype), counts_G[:num_experts])


def _check_shapes(x: Tensor, name: str, given: Tensor, columns: str, w_gate_up: Tensor, w_down: Tensor) -> None:
    """`given` has a row a token: router logits, of E columns, or gates, of K."""
    if x.ndim != 2 or given.ndim != 2 or w_gate_up.ndim != 3 or w_down.ndim != 3:
        raise ValueError(
            f"x, {name}, w_gate_up and w_down have {x.ndim}, {given.ndim}, {w_gate_up.ndim} and "
            f"{w_down.ndim} dimensions; they must be [T, D], [T, {columns}], [E, 2N, D] and [E, D, N]"
        )
    num_experts, inner2, width = w_gate_up.shape
    num_columns = num_experts if columns == "E" else given.shape[1]
    if x.shape[1] != width or given.shape != (x.shape[0], num_columns):
        raise ValueError(
            f"x is {list(x.shape)} and {name} {list(given.shape)}, but w_gate_up "
            f"{list(w_gate_up.shape)}; they must be [T, D], [T, {columns}] and [E, 2N, D]"
        )
    if inner2 % 2 or w_down.shape != (num_experts, width, inner2 // 2):
        raise ValueError(
            f"w_gate_up is {list(w_gate_up.shape)} and w_down {list(w_down.shape)}; "
            f"they must be [E, 2N, D] and [E, D, N]"
        )
    for each, tensor in ((name, given), ("w_gate_up", w_gate_up), ("w_down", w_down)):
        if tensor.device != x.device:
            raise ValueError(f"{each} is on {tensor.device} but x on {x.device}; move one of them")


def _check_top_k(top_k: int, num_experts: int) -> None:
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}; it must be between 1 and the {num_experts} experts")


def _check_choice(gates: Tensor, experts: Tensor) -> None:
    if experts.shape != gates.shape or not gates.shape[1]:
        raise ValueError(f"gates is {list(gates.shape)} and experts {list(experts.shape)}; both must be [T, K], K >= 1")
    if experts.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"experts is {experts.dtype}; it must be indices, int64 or int32")
    if not gates.is_floating_point() or gates.dtype.itemsize < 4:
        raise ValueError(f"gates is {gates.dtype}; the weighted sum needs float32 or wider: keep gates uncast")
    if experts.device != gates.device:
        raise ValueError(f"experts is on {experts.device} but gates on {gates.device}; move one of them")


def _check_shared(
    shared_gate_up: Tensor | None, shared_down: Tensor | None, w_gate_up: Tensor, w_down: Tensor
) -> _Shared:
    """The shared experts' weights, if there are any."""
    if shared_gate_up is None and shared_down is None:
        return ()
    if shared_gate_up is None or shared_down is None:
        raise ValueError("one of shared_gate_up and shared_down was given; give both or neither")
    if (
        shared_gate_up.shape[1:] != w_gate_up.shape[1:]
        or shared_down.shape[1:] != w_down.shape[1:]
        or shared_gate_up.shape[0] != shared_down.shape[0]
    ):
        raise ValueError(
            f"shared_gate_up is {list(shared_gate_up.shape)} and shared_down {list(shared_down.shape)}; they must be "
            f"[S, {w_gate_up.shape[1]}, {w_gate_up.shape[2]}] and [S, {w_down.shape[1]}, {w_down.shape[2]}]: "
            f"split a wider shared expert into several of the routed experts' width"
        )
    return shared_gate_up, shared_down
