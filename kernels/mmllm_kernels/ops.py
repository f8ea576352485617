"""The backends as PyTorch operators, so that `torch.compile` and `torch.export` trace through them.

Each operator has a fake kernel (shapes alone) and picks its backend when it runs: what a trace records
does not depend on it. A forward operator gives back what its backward reads, since an operator may save
only its inputs and outputs.

Shapes: T tokens, D model width, E experts, S shared experts, G = E + S, K experts a token, J = K + S,
P = T·J pairs, N expert inner width, V codes.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from mmllm_kernels import backends, sorted_tokens
from mmllm_kernels.sorted_tokens import Sorting, Weights


def _module(backend: str, x: Tensor, others: tuple[Tensor, ...] = (), num_groups: int = 1) -> ModuleType:
    """Where this backend's functions are; both modules have the same ones."""
    if backends.use_triton(backend, x, others, num_groups):
        from mmllm_kernels.gpu import launch

        return launch
    return sorted_tokens


def _num_groups(w_gate_up: Tensor, shared_gate_up: Tensor) -> int:
    return w_gate_up.shape[0] + shared_gate_up.shape[0]


@torch.library.custom_op("mmllm_kernels::route", mutates_args=())
def route(router_logits: Tensor, top_k: int, norm_topk_prob: bool, backend: str) -> tuple[Tensor, Tensor]:
    """Gates and experts [T, K]."""
    module = _module(backend, router_logits, num_groups=router_logits.shape[1])
    return module.route(router_logits, top_k, norm_topk_prob)


@route.register_fake
def _(router_logits, top_k, norm_topk_prob, backend):
    dtype = torch.promote_types(router_logits.dtype, torch.float32)
    gates = router_logits.new_empty(router_logits.shape[0], top_k, dtype=dtype)
    return gates, torch.empty_like(gates, dtype=torch.int64)


@torch.library.custom_op("mmllm_kernels::route_backward", mutates_args=())
def route_backward(
    grad_gates: Tensor, gates: Tensor, experts: Tensor, router_logits: Tensor, norm_topk_prob: bool, backend: str
) -> Tensor:
    """Gradient of the logits [T, E]."""
    module = _module(backend, router_logits, (grad_gates,), router_logits.shape[1])
    return module.route_backward(grad_gates, gates, experts, router_logits, norm_topk_prob)


@route_backward.register_fake
def _(grad_gates, gates, experts, router_logits, norm_topk_prob, backend):
    return torch.empty_like(router_logits, memory_format=torch.contiguous_format)


def _save_route(ctx, inputs, output) -> None:
    router_logits, _, ctx.norm_topk_prob, ctx.backend = inputs
    gates, experts = output
    ctx.mark_non_differentiable(experts)
    ctx.set_materialize_grads(False)
    # Normalized gates have a gradient in terms of themselves; only the shape of the logits is read then.
    ctx.logits_like = (router_logits.shape, router_logits.dtype) if ctx.norm_topk_prob else None
    ctx.save_for_backward(gates, experts, *(() if ctx.norm_topk_prob else (router_logits,)))


def _differentiate_route(ctx, grad_gates, _):
    if grad_gates is None:
        return (None,) * 4
    gates, experts, *logits = ctx.saved_tensors
    if ctx.logits_like is not None:
        shape, dtype = ctx.logits_like
        logits = [torch.empty(1, dtype=dtype, device=gates.device).expand(shape)]
    grad = route_backward(grad_gates, gates, experts, *logits, ctx.norm_topk_prob, ctx.backend)
    return grad, None, None, None


route.register_autograd(_differentiate_route, setup_context=_save_route)


@torch.library.custom_op("mmllm_kernels::experts", mutates_args=())
def experts(
    x: Tensor,
    gates: Tensor,
    experts: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    shared_gate_up: Tensor,
    shared_down: Tensor,
    save_h: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs [T, D], the fields of `Sorting`, and the pre-activations [P, 2N] (or [0, 2N])."""
    weights = Weights(*(w.contiguous() for w in (w_gate_up, w_down, shared_gate_up, shared_down)))
    module = _module(backend, x, (gates, *weights), _num_groups(w_gate_up, shared_gate_up))
    sorting = module.sort(experts, len(w_gate_up), len(shared_gate_up))
    out, h = module.forward(x.contiguous(), gates.contiguous(), weights, sorting, save_h)
    return (out, *sorting, h)


@experts.register_fake
def _(x, gates, experts, w_gate_up, w_down, shared_gate_up, shared_down, save_h, backend):
    num_tokens, num_slots = x.shape[0], gates.shape[1] + shared_gate_up.shape[0]
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(_num_groups(w_gate_up, shared_gate_up), dtype=torch.int64),
        x.new_empty(num_tokens * num_slots, dtype=torch.int32),
        x.new_empty(num_tokens, num_slots, dtype=torch.int32),
        x.new_empty(num_tokens * num_slots if save_h else 0, w_gate_up.shape[1]),
    )


@torch.library.custom_op("mmllm_kernels::experts_backward", mutates_args=())
def experts_backward(
    grad_out: Tensor,
    x: Tensor,
    gates: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    shared_gate_up: Tensor,
    shared_down: Tensor,
    counts: Tensor,
    order: Tensor,
    inverse: Tensor,
    h: Tensor,
    weight_grads: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the tokens, the gates and the weights; the weights' are empty without `weight_grads`."""
    weights = Weights(*(w.contiguous() for w in (w_gate_up, w_down, shared_gate_up, shared_down)))
    module = _module(backend, x, (gates, *weights), _num_groups(w_gate_up, shared_gate_up))
    sorting = Sorting(counts, order, inverse)
    grad_x, grad_gates, grads = module.backward(
        grad_out.contiguous(), x.contiguous(), gates.contiguous(), h, weights, sorting, weight_grads
    )
    return (grad_x, grad_gates, *grads)


@experts_backward.register_fake
def _(
    grad_out, x, gates, w_gate_up, w_down, shared_gate_up, shared_down,
    counts, order, inverse, h, weight_grads, backend,
):  # fmt: skip
    weights = (w_gate_up, w_down, shared_gate_up, shared_down)
    contiguous = torch.contiguous_format
    if weight_grads:
        grads = [torch.empty_like(w, memory_format=contiguous) for w in weights]
    else:
        grads = [w.new_empty(0) for w in weights]
    return torch.empty_like(x, memory_format=contiguous), torch.empty_like(gates, memory_format=contiguous), *grads


def _save_experts(ctx, inputs, output) -> None:
    x, gates, _, *weights, _, ctx.backend = inputs
    _, *sorting, h = output
    ctx.mark_non_differentiable(*sorting)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, gates, *weights, *sorting, h)


def _differentiate_experts(ctx, grad_out, *_):
    if grad_out is None:
        return (None,) * 9
    weight_grads = any(ctx.needs_input_grad[3:7])
    grad_x, grad_gates, *grads = experts_backward(grad_out, *ctx.saved_tensors, weight_grads, ctx.backend)
    return grad_x, grad_gates, None, *(grads if weight_grads else (None,) * 4), None, None


experts.register_autograd(_differentiate_experts, setup_context=_save_experts)


@torch.library.custom_op("mmllm_kernels::nearest_code", mutates_args=())
def nearest_code(x: Tensor, codebook: Tensor, backend: str) -> Tensor:
    """Index [T] of the nearest row of the codebook."""
    return _module(backend, x, (codebook,)).nearest_code(x.contiguous(), codebook.contiguous())


@nearest_code.register_fake
def _(x, codebook, backend):
    return x.new_empty(x.shape[0], dtype=torch.int64)


def infer_route(router_logits: Tensor, top_k: int, norm_topk_prob: bool, backend: str) -> tuple[Tensor, Tensor]:
    """`route` without what backward needs."""
    module = _module(backend, router_logits, num_groups=router_logits.shape[1])
    return module.route(router_logits, top_k, norm_topk_prob)


def infer_experts(x: Tensor, gates: Tensor, experts: Tensor, weights: Weights, backend: str) -> tuple[Tensor, Tensor]:
    """Outputs and counts [G] without what backward needs."""
    weights = Weights(*(w.contiguous() for w in weights))
    module = _module(backend, x, (gates, *weights), _num_groups(weights[0], weights[2]))
    sorting = module.sort(experts, len(weights.gate_up_E2ND), len(weights.shared_gate_up_S2ND))
    out, _ = module.forward(x.contiguous(), gates.contiguous(), weights, sorting, False)
    return out, sorting.counts_G
