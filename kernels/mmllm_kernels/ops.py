"""The backends as PyTorch operators, so that `torch.compile` and `torch.export` trace through them.

Each operator has a fake kernel (shapes alone) and picks its backend when it runs: what a trace records
does not depend on it. The forward operator gives back what its backward reads, since an operator may save
only its inputs and outputs.

Shapes: T tokens, D model width, E experts, S shared experts, G = E + S, K experts a token, J = K + S,
P = T·J pairs, N expert inner width, V codes.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from mmllm_kernels import backends, sorted_tokens
from mmllm_kernels.sorted_tokens import Routing, Weights


def _module(backend: str, x: Tensor, others: tuple[Tensor, ...], num_groups: int = 1) -> ModuleType:
    """Where this backend's functions are; both modules have the same ones."""
    if backends.use_triton(backend, x, others, num_groups):
        from mmllm_kernels.gpu import launch

        return launch
    return sorted_tokens


def _num_groups(w_gate_up: Tensor, shared_gate_up: Tensor) -> int:
    return w_gate_up.shape[0] + shared_gate_up.shape[0]


@torch.library.custom_op("mmllm_kernels::moe", mutates_args=())
def moe(
    x: Tensor,
    router_logits: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    shared_gate_up: Tensor,
    shared_down: Tensor,
    top_k: int,
    renormalise: bool,
    save_h: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs [T, D], the fields of `Routing`, and the pre-activations [P, 2N] (or [0, 2N])."""
    weights = Weights(*(w.contiguous() for w in (w_gate_up, w_down, shared_gate_up, shared_down)))
    module = _module(backend, x, (router_logits, *weights), _num_groups(w_gate_up, shared_gate_up))
    routing = module.route(router_logits, top_k, renormalise, len(shared_gate_up))
    out, h = module.forward(x.contiguous(), weights, routing, save_h)
    return (out, *routing, h)


@moe.register_fake
def _(x, router_logits, w_gate_up, w_down, shared_gate_up, shared_down, top_k, renormalise, save_h, backend):
    num_tokens, num_slots = x.shape[0], top_k + shared_gate_up.shape[0]
    gates = x.new_empty(num_tokens, num_slots, dtype=torch.promote_types(router_logits.dtype, torch.float32))
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        gates,
        torch.empty_like(gates, dtype=torch.int64),
        x.new_empty(_num_groups(w_gate_up, shared_gate_up), dtype=torch.int64),
        x.new_empty(num_tokens * num_slots, dtype=torch.int32),
        torch.empty_like(gates, dtype=torch.int32),
        x.new_empty(num_tokens * num_slots if save_h else 0, w_gate_up.shape[1]),
    )


@torch.library.custom_op("mmllm_kernels::moe_backward", mutates_args=())
def moe_backward(
    grad_out: Tensor,
    x: Tensor,
    router_logits: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    shared_gate_up: Tensor,
    shared_down: Tensor,
    gates: Tensor,
    experts: Tensor,
    counts: Tensor,
    order: Tensor,
    inverse: Tensor,
    h: Tensor,
    renormalise: bool,
    weight_grads: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first six inputs of `moe`; the weights' are empty without `weight_grads`."""
    weights = Weights(*(w.contiguous() for w in (w_gate_up, w_down, shared_gate_up, shared_down)))
    module = _module(backend, x, (router_logits, *weights), _num_groups(w_gate_up, shared_gate_up))
    routing = Routing(gates, experts, counts, order, inverse)
    grad_x, grad_logits, grads = module.backward(
        grad_out.contiguous(), x.contiguous(), h, router_logits, weights, routing, renormalise, weight_grads
    )
    return (grad_x, grad_logits, *grads)


@moe_backward.register_fake
def _(
    grad_out, x, router_logits, w_gate_up, w_down, shared_gate_up, shared_down,
    gates, experts, counts, order, inverse, h, renormalise, weight_grads, backend,
):  # fmt: skip
    weights = (w_gate_up, w_down, shared_gate_up, shared_down)
    if weight_grads:
        grads = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights]
    else:
        grads = [w.new_empty(0) for w in weights]
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(x, memory_format=contiguous),
        torch.empty_like(router_logits, memory_format=contiguous),
        *grads,
    )


def _save(ctx, inputs, output) -> None:
    x, router_logits, *weights, _, ctx.renormalise, _, ctx.backend = inputs
    _, *routing_and_h = output
    _, experts, counts, order, inverse, _ = routing_and_h
    ctx.mark_non_differentiable(experts, counts, order, inverse)
    ctx.set_materialize_grads(False)
    # Renormalised gates have a gradient in terms of themselves; only the shape of the logits is read then.
    ctx.logits_like = None
    if ctx.renormalise:
        ctx.logits_like = (router_logits.shape, router_logits.dtype)
        ctx.save_for_backward(x, *weights, *routing_and_h)
    else:
        ctx.save_for_backward(x, *weights, *routing_and_h, router_logits)


def _differentiate(ctx, grad_out, *_):
    nones = (None,) * 4
    if grad_out is None:
        return (None,) * 6 + nones
    x, *saved = ctx.saved_tensors
    if ctx.logits_like is not None:
        shape, dtype = ctx.logits_like
        router_logits = torch.empty(1, dtype=dtype, device=x.device).expand(shape)
    else:
        router_logits = saved.pop()
    weight_grads = any(ctx.needs_input_grad[2:6])
    grads = moe_backward(grad_out, x, router_logits, *saved, ctx.renormalise, weight_grads, ctx.backend)
    return (*grads[:2], *(grads[2:] if weight_grads else nones), *nones)


moe.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("mmllm_kernels::nearest_code", mutates_args=())
def nearest_code(x: Tensor, codebook: Tensor, backend: str) -> Tensor:
    """Index [T] of the nearest row of the codebook."""
    return _module(backend, x, (codebook,)).nearest_code(x.contiguous(), codebook.contiguous())


@nearest_code.register_fake
def _(x, codebook, backend):
    return x.new_empty(x.shape[0], dtype=torch.int64)


def infer(
    x: Tensor, router_logits: Tensor, weights: Weights, top_k: int, renormalise: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, counts [G] and experts [T, J] without what backward needs."""
    weights = Weights(*(w.contiguous() for w in weights))
    module = _module(backend, x, (router_logits, *weights), _num_groups(weights[0], weights[2]))
    routing = module.route(router_logits, top_k, renormalise, len(weights.shared_gate_up_S2ND))
    out, _ = module.forward(x.contiguous(), weights, routing, False)
    return out, routing.counts_G, routing.experts_TJ
