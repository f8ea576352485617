"""The Triton path's cases. Not collected by name: test_kernels_triton.py runs this file in a process of its own.

Without a GPU the kernels run under Triton's interpreter (TRITON_INTERPRET=1 must be set before the import).
"""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mmllm_kernels
from mmllm_kernels import backends, ops, sorted_tokens
from mmllm_kernels.gpu import launch
from mmllm_kernels.sorted_tokens import Weights
from tests.kernel_fixtures import (
    CASES,
    GIVEN_CASES,
    Case,
    any_case,
    assert_given_like_reference,
    assert_like_reference,
    assert_nearest_like_reference,
    make,
    nearest_case,
    run,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MANY_BLOCKS = Case(T=150, D=40, E=3, K=2, N=36, S=1, norm_topk_prob=False)
"""Uneven blocks in every dimension, more than one program in routing, more than one part of a gate's gradient."""


@pytest.fixture(autouse=True)
def no_fallback():
    """What a test here computes, the Triton kernels compute."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


BOTH = [torch.float32, torch.bfloat16]
LARGE = [pytest.param(CASES[-1], torch.bfloat16, marks=pytest.mark.proof), (CASES[-1], torch.float32)]


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, dtype) for case in [*CASES[:-1], MANY_BLOCKS] for dtype in BOTH), *LARGE], ids=str
)
def test_outputs_and_gradients_equal_the_reference(case, dtype):
    assert_like_reference(case, dtype, "triton", DEVICE)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("case", GIVEN_CASES, ids=str)
def test_given_gates_and_indices_equal_the_reference(case, dtype):
    assert_given_like_reference(case, dtype, "triton", DEVICE)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_equals_the_reference(data):
    assert_like_reference(any_case(data, 90, 40), torch.float32, "triton", DEVICE)


@pytest.mark.proof
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("dtype", BOTH)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_many_more_shapes_equal_the_reference(dtype, data):
    # Of one token and few channels, the largest output may be small because large terms cancel, or have the rounding
    # of a single large pre-activation.
    assert_like_reference(any_case(data, 90, 40), dtype, "triton", DEVICE, least=0.1, slack=2.0)


@pytest.mark.parametrize("num_experts", [5, 300])
@pytest.mark.parametrize("num_tokens", [1, 8, 9, 131])
def test_routing_is_that_of_sorting(num_tokens, num_experts):
    logits = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    logits[::2].round_()  # ties
    logits[0, :3] = torch.tensor([0.0, -0.0, -torch.inf])
    (gates, experts), (wanted_gates, wanted) = (module.route(logits, 3, True) for module in (launch, sorted_tokens))
    torch.testing.assert_close(gates, wanted_gates)
    assert torch.equal(experts, wanted)
    experts[0, :2] = -1
    experts[1::3, 2] = -1
    experts[::4] = experts[::4, :1]  # one expert in every slot, or none
    got, wanted = (module.sort(experts, num_experts, 2) for module in (launch, sorted_tokens))
    for name in ("counts_G", "order_P", "inverse_TJ"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name


def test_undefined_logits_stay_in_bounds():
    logits = torch.full((20, 6), torch.nan, device=DEVICE)
    logits[::2] = torch.tensor(-1).to(torch.int32).view(torch.float32)  # a NaN whose bits are all ones
    _, experts = launch.route(logits, 3, True)
    assert experts.min() >= 0 and experts.max() < 6
    sorting = launch.sort(experts, 6, 0)
    assert torch.equal(sorting.order_P.sort().values, torch.arange(60, dtype=torch.int32, device=DEVICE))


def test_indices_beyond_the_experts_are_left_out():
    experts = torch.tensor([[0, 5], [7, 1], [-1, -9]], device=DEVICE)
    got, wanted = launch.sort(experts, 5, 1), sorted_tokens.sort(experts.where(experts < 5, -1), 5, 1)
    assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.proof)])
def test_two_runs_give_equal_bits(dtype):
    first, second = (run(make(MANY_BLOCKS, dtype, DEVICE), MANY_BLOCKS, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck looks at copies of its own
def test_operators_pass_opcheck():
    case = Case(20, S=1)
    x, logits, *weights = make(case, torch.float32, DEVICE)
    torch.library.opcheck(ops.route, (logits, case.K, True, "triton"))
    gates, experts = (tensor.detach() for tensor in ops.route(logits, case.K, True, "triton"))
    torch.library.opcheck(ops.experts, (x, gates.requires_grad_(), experts, *weights, True, "triton"))
    experts[::3, 1] = -1  # the pre-activations of what is left out are not written: they are not asked for
    torch.library.opcheck(ops.experts, (x, gates, experts, *weights, False, "triton"))
    torch.library.opcheck(ops.nearest_code, (*nearest_case(20, 4, 7, torch.float32, DEVICE), "triton"))


def test_without_weight_gradients_none_is_computed():
    inputs = [tensor.detach() for tensor in make(Case(20), torch.float32, DEVICE)]
    weights = Weights(*inputs[2:])
    gates, experts = launch.route(inputs[1], 2, True)
    sorting = launch.sort(experts, 5, 0)
    out, h = launch.forward(inputs[0], gates, weights, sorting, True)
    grads = [launch.backward(out, inputs[0], gates, h, weights, sorting, wanted) for wanted in (True, False)]
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])
    assert all(tensor.numel() == 0 for tensor in grads[1][2])


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize(
    ("num_tokens", "width", "num_codes"), [(0, 6, 17), (1, 6, 17), (70, 40, 17), (130, 3, 150), (5, 4, 1)]
)
def test_nearest_code(num_tokens, width, num_codes, dtype):
    assert_nearest_like_reference(num_tokens, width, num_codes, dtype, "triton", DEVICE)


def test_float64_falls_back_with_one_warning():
    backends._warn_once.cache_clear()
    inputs = make(Case(5), torch.float64, DEVICE)[:4]
    with pytest.warns(RuntimeWarning, match="not float64; the sorted-token path") as caught:
        mmllm_kernels.moe(*inputs, top_k=2, backend="triton")
    assert len(caught) == 1


gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@gpu
def test_a_cuda_graph_captures_forward_and_backward():
    case = Case(T=64, D=64, E=8, K=2, N=32)
    inputs = make(case, torch.bfloat16, DEVICE)[:4]
    grad = torch.ones(64, 64, dtype=torch.bfloat16, device=DEVICE)

    def step():
        return torch.autograd.grad(mmllm_kernels.moe(*inputs, case.K).out_TD, inputs, grad)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        wanted = [tensor.clone() for tensor in step()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@gpu
def test_no_host_sync():
    case = Case(T=300, D=64, E=8, K=2, N=32, S=1)
    inputs = make(case, torch.bfloat16, DEVICE)
    run(inputs, case, "triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs, case, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.proof
def test_operands_of_more_than_two_to_the_31_elements():
    # x and h have 2³¹ elements and more. Wanted is plain PyTorch on chunks; weights' gradients are sums over them.
    T, D, E, N = 2**20 + 64, 2048, 2, 1024
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.bfloat16, device=DEVICE)

    x, w_gate_up, w_down, logits = draw(T, D), draw(E, 2 * N, D) / 45, draw(E, D, N) / 32, draw(T, E)
    inputs = [tensor.requires_grad_() for tensor in (x, w_gate_up, w_down)]
    out = mmllm_kernels.moe(x, logits, w_gate_up, w_down, 1).out_TD
    grad_x, *grads = torch.autograd.grad(out, inputs, out.detach())
    sums = [torch.zeros_like(grad, dtype=torch.float32) for grad in grads]
    for chunk in torch.arange(T, device=DEVICE).split(2**16):
        here = slice(int(chunk[0]), int(chunk[-1]) + 1)
        small = x.detach()[here].requires_grad_()
        wanted = mmllm_kernels.moe(small, logits[here], w_gate_up, w_down, 1, backend="cpu").out_TD
        wanted_x, *parts = torch.autograd.grad(wanted, [small, w_gate_up, w_down], out.detach()[here])
        torch.testing.assert_close(out[here], wanted, rtol=0.05, atol=0.05)
        torch.testing.assert_close(grad_x[here], wanted_x, rtol=0.05, atol=0.05)
        for total, part in zip(sums, parts, strict=True):
            total += part
    for grad, total in zip(grads, sums, strict=True):
        assert (grad.float() - total).norm() <= 1e-2 * total.norm()
