"""The public functions: arguments are checked, casts made, and a backend asked.

Shapes: T tokens, D model width, E experts, K experts a token, N expert inner width, S shared experts, V codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmllm_kernels import backends, ops, reference, sorted_tokens
from mmllm_kernels.backends import Backend
from mmllm_kernels.reference import MoEOutput
from mmllm_kernels.sorted_tokens import Weights

_MAX_PAIRS = 2**31 - 2**12
"""A block that starts below it also ends where int32 can count."""


def moe(
    x_TD: Tensor,
    router_logits_TE: Tensor,
    w_gate_up_E2ND: Tensor,
    w_down_EDN: Tensor,
    top_k: int,
    renormalise: bool = True,
    backend: Backend = "auto",
    *,
    shared_gate_up_S2ND: Tensor | None = None,
    shared_down_SDN: Tensor | None = None,
    recompute: bool = False,
) -> MoEOutput:
    """Dropless mixture of SwiGLU experts, differentiable in all its tensors.

    Each token goes to the K experts of its largest router logits (of equal ones the lowest index first);
    their outputs are summed in at least float32, weighted by the softmax of the logits. Saved for backward
    are the tokens and the pre-activations: 2TD + 4TKN bytes in bfloat16 and at most 32 bytes a pair (and
    the logits, if not `renormalise`). Gradients are the same in every run, bit for bit. There is no second
    derivative.

    The computation is in the weights' dtype, or in autocast's; x is cast to it, and the output has x's dtype
    (under autocast, autocast's). The Triton kernels take bfloat16, float16 and float32 and know neither
    a host sync nor atomics; the path of plain PyTorch takes every floating dtype.

    Sources: SonicMoE (arXiv 2512.14080) for what is saved; ScatterMoE (arXiv 2403.08245) for sorting indices
    in place of tokens; Mixtral (arXiv 2401.04088) for `renormalise`; DeepSeekMoE (arXiv 2401.06066) for
    shared experts. `mmllm_kernels.reference.moe` is the definition.

    Args:
        x_TD: tokens; T may be 0.
        router_logits_TE: unnormalised routing scores, floating; −inf shuts an expert out.
        w_gate_up_E2ND: rows [0, N) are the gate's, rows [N, 2N) the up projection's.
        w_down_EDN: the down projections.
        top_k: K, from 1 to E.
        renormalise: gates are the softmax over the K chosen logits, so that they sum to 1; otherwise over all E.
        backend: `reference` (plain and slow), `cpu` (plain PyTorch on sorted tokens, on any device),
            `triton`, or `auto`: triton on a GPU, otherwise cpu. What the Triton kernels cannot take goes to
            `cpu`, with one RuntimeWarning that says why.
        shared_gate_up_S2ND: experts that every token takes with the gate 1, laid out as the others'. A wide
            shared expert is exactly several of width N: split its rows.
        shared_down_SDN: their down projections.
        recompute: save the tokens alone and compute the pre-activations again in backward.

    Returns:
        The outputs, how many (token, choice) pairs each expert took, and each token's experts.

    Raises:
        ValueError: for shapes that do not fit one another, tensors of different devices, a top_k out of
            range, an unknown backend, or about 2³¹ pairs and more.
    """
    backends.check(backend)
    _check_shapes(x_TD, router_logits_TE, w_gate_up_E2ND, w_down_EDN, top_k)
    if (shared_gate_up_S2ND is None) != (shared_down_SDN is None):
        raise ValueError("one of shared_gate_up and shared_down was given; give both or neither")
    weights, shared, num_shared = (w_gate_up_E2ND, w_down_EDN), (), 0
    if shared_gate_up_S2ND is not None and shared_down_SDN is not None:
        _check_shared(shared_gate_up_S2ND, shared_down_SDN, w_gate_up_E2ND, w_down_EDN)
        shared, num_shared = (shared_gate_up_S2ND, shared_down_SDN), shared_gate_up_S2ND.shape[0]
    (num_tokens, num_experts), num_slots = router_logits_TE.shape, top_k + num_shared
    is_compiling = torch.compiler.is_compiling()
    device_type = "cpu" if x_TD.is_cpu else x_TD.device.type  # the first is much faster
    if not is_compiling and num_tokens * num_slots >= _MAX_PAIRS:
        raise ValueError(f"{num_tokens} tokens of {num_slots} experts are {_MAX_PAIRS} pairs or more; split the batch")
    out_dtype, dtype = x_TD.dtype, w_gate_up_E2ND.dtype
    autocasts = torch.is_autocast_enabled(device_type)
    if autocasts:
        out_dtype = dtype = torch.get_autocast_dtype(device_type)
    if x_TD.dtype != dtype:
        x_TD = x_TD.to(dtype)
    needs_grad = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (x_TD, router_logits_TE, *weights, *shared)
    )
    is_inference = not needs_grad and not is_compiling and backend != "reference"
    num_groups = num_experts + num_shared
    if is_inference and num_tokens == 1 and not backends.use_triton(backend, x_TD, (router_logits_TE,), num_groups):
        decode = sorted_tokens.decode
        if autocasts:
            decode = torch.autocast(device_type, enabled=False)(decode)  # it casts itself, and less
        return MoEOutput(*decode(x_TD, router_logits_TE, weights, shared, top_k, renormalise, out_dtype))
    if not shared:
        shared = tuple(weight.new_empty(0, *weight.shape[1:]) for weight in weights)
    weights = Weights(*(weight.to(dtype) for weight in (*weights, *shared)))
    if backend == "reference":
        result = reference.moe(x_TD, router_logits_TE, *weights[:2], top_k, renormalise, *weights[2:])
        return result._replace(out_TD=result.out_TD.to(out_dtype))
    if is_inference:
        out_TD, counts_G, experts_TJ = ops.infer(x_TD, router_logits_TE, weights, top_k, renormalise, backend)
    else:
        save_h = needs_grad and not recompute
        out_TD, _, experts_TJ, counts_G, *_ = ops.moe(
            x_TD, router_logits_TE, *weights, top_k, renormalise, save_h, backend
        )
    return MoEOutput(out_TD.to(out_dtype), counts_G[:num_experts], experts_TJ[:, :top_k])


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


def _check_shapes(x: Tensor, router_logits: Tensor, w_gate_up: Tensor, w_down: Tensor, top_k: int) -> None:
    if x.ndim != 2 or router_logits.ndim != 2 or w_gate_up.ndim != 3 or w_down.ndim != 3:
        raise ValueError(
            f"x, router_logits, w_gate_up and w_down have {x.ndim}, {router_logits.ndim}, {w_gate_up.ndim} and "
            f"{w_down.ndim} dimensions; they must be [T, D], [T, E], [E, 2N, D] and [E, D, N]"
        )
    num_experts, inner2, width = w_gate_up.shape
    if x.shape[1] != width or router_logits.shape[0] != x.shape[0] or router_logits.shape[1] != num_experts:
        raise ValueError(
            f"x is {list(x.shape)} and router_logits {list(router_logits.shape)}, but w_gate_up "
            f"{list(w_gate_up.shape)}; they must be [T, D], [T, E] and [E, 2N, D]"
        )
    if inner2 % 2 or w_down.shape != (num_experts, width, inner2 // 2):
        raise ValueError(
            f"w_gate_up is {list(w_gate_up.shape)} and w_down {list(w_down.shape)}; "
            f"they must be [E, 2N, D] and [E, D, N]"
        )
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}; it must be between 1 and the {num_experts} experts")
    for name, tensor in (("router_logits", router_logits), ("w_gate_up", w_gate_up), ("w_down", w_down)):
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x on {x.device}; move one of them")


def _check_shared(shared_gate_up: Tensor, shared_down: Tensor, w_gate_up: Tensor, w_down: Tensor) -> None:
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
