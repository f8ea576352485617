"""Experts whose gates and indices are given, and the router apart, on the CPU path. Triton's are in triton_cases.py."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mmllm_kernels
from mmllm_kernels import reference
from tests.kernel_fixtures import (
    CASES,
    GIVEN_CASES,
    TOLERANCE,
    Case,
    assert_close,
    assert_given_like_reference,
    make,
    make_choice,
    run,
    run_given,
    saved_bytes,
)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", GIVEN_CASES, ids=str)
def test_outputs_and_gradients_equal_the_reference(case, dtype):
    assert_given_like_reference(case, dtype, "cpu")


def test_reference_by_hand():
    # One feature, experts that multiply silu(x)·x by 1, 10 and 100.
    x_TD = torch.tensor([[1.0], [2.0], [3.0]])
    w_gate_up_E2ND, w_down_EDN = torch.ones(3, 2, 1), torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1)
    gates_TK = torch.tensor([[0.5, 2.0], [-1.0, torch.nan], [1.0, 1.0]])
    experts_TK = torch.tensor([[2, 0], [1, -1], [1, 1]])
    out_TD, counts_E = reference.experts(x_TD, gates_TK, experts_TK, w_gate_up_E2ND, w_down_EDN)
    assert counts_E.tolist() == [1, 3, 1]
    torch.testing.assert_close(out_TD, x_TD**2 * x_TD.sigmoid() * torch.tensor([[52.0], [-10.0], [20.0]]))


@pytest.mark.parametrize("case", [Case(9, 4, 3, 2, 5), Case(6, 3, 2, 3, 2, S=1, recompute=True)], ids=str)
def test_gradients_are_those_of_the_function(case):
    x, _, *weights = make(case, torch.float64)
    gates, experts = make_choice(case, torch.float64)
    gates = gates.detach().nan_to_num(0.3).requires_grad_()

    def function(x, gates, *weights):
        shared = dict(zip(("shared_gate_up_S2ND", "shared_down_SDN"), weights[2:], strict=True)) if case.S else {}
        return mmllm_kernels.experts(x, gates, experts, *weights[:2], recompute=case.recompute, **shared).out_TD

    assert torch.autograd.gradcheck(function, (x, gates, *weights[: 4 if case.S else 2]))


@pytest.mark.parametrize("case", [case for case in CASES if case.T < 100], ids=str)
def test_moe_is_route_then_experts(case):
    composed = make(case, torch.float32)
    x, logits, w_gate_up, w_down, *shared = composed
    gates, experts = mmllm_kernels.route(logits, case.K, case.norm_topk_prob)
    keywords = dict(zip(("shared_gate_up_S2ND", "shared_down_SDN"), shared, strict=True)) if case.S else {}
    out, counts = mmllm_kernels.experts(x, gates, experts, w_gate_up, w_down, recompute=case.recompute, **keywords)
    wanted = run(make(case, torch.float32), case, "cpu")
    assert torch.equal(out, wanted["out"])
    assert torch.equal(counts, wanted["counts"]) and torch.equal(experts, wanted["experts"])
    grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).cos().to(out.dtype)
    (grad_logits,) = torch.autograd.grad(out, logits, grad)
    assert torch.equal(grad_logits, wanted["gradient of router_logits"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", [case for case in CASES if case.T < 100], ids=str)
def test_route_equals_the_reference(case, dtype):
    logits = make(case, dtype)[1]
    exact = logits.detach().double().requires_grad_()
    results = []
    for each, backend in ((logits, "cpu"), (exact, "reference")):
        gates, experts = mmllm_kernels.route(each, case.K, case.norm_topk_prob, backend)
        weight = torch.linspace(0, 99, gates.numel(), dtype=torch.float64).sin().view_as(gates).to(gates.dtype)
        (grad,) = torch.autograd.grad(gates, each, weight)
        results.append({"gates": gates.detach(), "experts": experts, "gradient of router_logits": grad})
    assert_close(*results, TOLERANCE[dtype])


def test_gates_of_half_precision_logits_are_float32():
    logits = torch.randn(5, 4).bfloat16()
    gates, experts = mmllm_kernels.route(logits, 2)
    assert gates.dtype == torch.float32 and torch.equal(experts, reference.route(logits, 2)[1])


def test_two_runs_give_equal_bits():
    case = GIVEN_CASES[-1]
    first, second = (
        run_given(make(case, torch.float32), *make_choice(case, torch.float32), case, "cpu") for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_is_left_out_changes_nothing_else():
    case = Case(37, K=3)
    x, _, w_gate_up, w_down, *_ = (tensor.detach() for tensor in make(case, torch.float32))
    gates, experts = (tensor.detach() for tensor in make_choice(case, torch.float32))
    left_out = experts < 0
    out, counts = mmllm_kernels.experts(x, gates, experts, w_gate_up, w_down)
    gates, experts = gates.masked_fill(left_out, 0.0), experts.masked_fill(left_out, 0)
    wanted, more = mmllm_kernels.experts(x, gates, experts, w_gate_up, w_down)
    torch.testing.assert_close(out, wanted)
    assert torch.equal(more - counts, torch.tensor([int(left_out.sum()), 0, 0, 0, 0]))


@pytest.mark.parametrize("recompute", [False, True])
def test_backward_keeps_tokens_and_pre_activations_alone(recompute):
    case = Case(256, 64, 8, 2, 96)
    x, _, *weights = make(case, torch.bfloat16)[:4]
    gates, experts = make_choice(case, torch.bfloat16)
    saved = saved_bytes(lambda: mmllm_kernels.experts(x, gates, experts, *weights, recompute=recompute), weights)
    h_bytes = 0 if recompute else 4 * case.T * case.K * case.N
    assert 2 * case.T * case.D + h_bytes <= saved <= 2 * case.T * case.D + h_bytes + 13 * case.T * case.K


def test_compile_traces_through_both():
    def step(x, logits, w_gate_up, w_down):
        gates, experts = mmllm_kernels.route(logits * 2, 2)
        experts = experts.where(gates > 0.4, -1)
        out, counts = mmllm_kernels.experts(x * 2, gates * 3, experts, w_gate_up, w_down)
        return out.sin(), counts

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_tokens in (33, 12):
        results = []
        for function in (step, compiled):
            inputs = make(Case(num_tokens), torch.float64)[:4]
            out, counts = function(*inputs)
            results.append([out, counts, *torch.autograd.grad(out.sum(), inputs)])
        torch.testing.assert_close(results[1], results[0])


def test_compile_traces_the_reference():
    def step(x, logits, w_gate_up, w_down):
        return mmllm_kernels.moe(x, logits, w_gate_up, w_down, 2, backend="reference").out_TD

    inputs = make(Case(9), torch.float64)[:4]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), step(*inputs))


@pytest.mark.parametrize("trained", [[0], [1], [2], [0, 3]])
def test_frozen_inputs(trained):
    case = Case(30)
    names = ("x", "gates", "w_gate_up", "w_down")
    x, _, *weights = make(case, torch.float64)[:4]
    gates, experts = make_choice(case, torch.float64)
    wanted = run_given(make(case, torch.float64), gates, experts, case, "cpu")
    inputs = [tensor.detach().requires_grad_(i in trained) for i, tensor in enumerate((x, gates, *weights))]
    out = mmllm_kernels.experts(*inputs[:2], experts, *inputs[2:]).out_TD
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).cos())
    for i, (name, tensor) in enumerate(zip(names, inputs, strict=True)):
        assert (tensor.grad is not None) == (i in trained)
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, wanted[f"gradient of {name}"])


def test_activation_checkpointing():
    case = Case(30)
    x, _, *weights = make(case, torch.float64)[:4]
    gates, experts = make_choice(case, torch.float64)
    wanted = run_given(make(case, torch.float64), gates, experts, case, "cpu")
    out = checkpoint(
        lambda *t: mmllm_kernels.experts(*t[:2], experts, *t[2:]).out_TD, x, gates, *weights, use_reentrant=False
    )
    assert torch.is_tensor(out)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).cos())
    for name, tensor in zip(("x", "gates", "w_gate_up", "w_down"), (x, gates, *weights), strict=True):
        torch.testing.assert_close(tensor.grad, wanted[f"gradient of {name}"])


def test_autocast_leaves_the_gates_alone():
    x, _, *weights = make(Case(20, 8, 4, 2, 6), torch.float32)[:4]
    gates, experts = make_choice(Case(20, E=4), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = mmllm_kernels.experts(x, gates, experts, *weights).out_TD
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(
        out.float(), mmllm_kernels.experts(x, gates, experts, *weights).out_TD, rtol=0.05, atol=0.05
    )
    out.sum().backward()
    assert gates.grad is not None and gates.grad.dtype == torch.float32


def test_indices_may_be_int32():
    case = Case(9)
    x, _, *weights = make(case, torch.float32)[:4]
    gates, experts = make_choice(case, torch.float32)
    results = [mmllm_kernels.experts(x, gates, each, *weights) for each in (experts, experts.int())]
    assert torch.equal(results[0].out_TD, results[1].out_TD)


@pytest.mark.parametrize("num_tokens", [1, 4])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gates_TK": torch.zeros(3, 2)}, "gates .3, 2."),
        ({"gates_TK": torch.zeros(0)}, r"must be \[T, D\], \[T, K\]"),
        ({"experts_TK": torch.zeros(2, 2, dtype=torch.int64)}, "experts .2, 2.; both"),
        ({"experts_TK": lambda gates, experts: experts.float()}, "experts is torch.float32; it must be indices"),
        ({"gates_TK": lambda gates, experts: gates.bfloat16()}, "gates is torch.bfloat16; .* keep gates uncast"),
        ({"experts_TK": lambda gates, experts: experts + 5}, "the index 5, but there are 5 experts; indices go to 4"),
        ({"backend": "gpu"}, "'gpu'; choose auto, reference, cpu, triton"),
        ({"shared_down_SDN": torch.zeros(1, 13, 7)}, "give both or neither"),
    ],
)
def test_wrong_arguments_are_named(change, message, num_tokens):
    x, _, w_gate_up, w_down, *_ = (tensor.detach() for tensor in make(Case(num_tokens), torch.float32))
    gates, experts = torch.ones(num_tokens, 2), torch.zeros(num_tokens, 2, dtype=torch.int64)
    arguments = {
        "x_TD": x, "gates_TK": gates, "experts_TK": experts, "w_gate_up_E2ND": w_gate_up, "w_down_EDN": w_down,
    }  # fmt: skip
    arguments.update({name: each(gates, experts) if callable(each) else each for name, each in change.items()})
    with pytest.raises(ValueError, match=message):
        mmllm_kernels.experts(**arguments)


def test_wrong_arguments_of_route_are_named():
    with pytest.raises(ValueError, match=r"router_logits has 3 dimensions; it must be \[T, E\]"):
        mmllm_kernels.route(torch.zeros(2, 3, 4), 1)
    with pytest.raises(ValueError, match="top_k is 5; it must be between 1 and the 4 experts"):
        mmllm_kernels.route(torch.zeros(2, 4), 5)
