"""The CPU path and the public face of the kernels. Triton's tests are in test_kernels_triton.py."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import mmllm_kernels
from mmllm_kernels import backends, matvec, ops, reference, sorted_tokens
from tests.kernel_fixtures import (
    CASES,
    TOLERANCE,
    Case,
    any_case,
    assert_like_reference,
    assert_nearest_like_reference,
    make,
    nearest_case,
    run,
    saved_bytes,
)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_equal_the_reference(case, dtype):
    assert_like_reference(case, dtype, "cpu")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_equals_the_reference(data):
    assert_like_reference(any_case(data, 70, 33), torch.float64, "cpu")


def test_reference_by_hand():
    # One feature, experts that multiply silu(x)·x by 1, 10 and 100.
    x_TD, logits_TE = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0, 1.0, 1.0], [3.0, -torch.inf, 2.0]])
    w_gate_up_E2ND, w_down_EDN = torch.ones(3, 2, 1), torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1)
    out_TD, counts_E, experts_TK = reference.moe(x_TD, logits_TE, w_gate_up_E2ND, w_down_EDN, 2)
    first, second = 1 / (1 + torch.tensor(-1.0).exp()), 4 / (1 + torch.tensor(-2.0).exp())
    gate = 1 / (1 + torch.tensor(-1.0).exp())
    assert experts_TK.tolist() == [[1, 2], [0, 2]]
    assert counts_E.tolist() == [1, 1, 2]
    torch.testing.assert_close(out_TD[:, 0], torch.stack([first * 55, second * (gate + 100 * (1 - gate))]))
    shared = {"shared_gate_up_S2ND": w_gate_up_E2ND[:1], "shared_down_SDN": w_down_EDN[:1]}
    with_shared_TD = reference.moe(x_TD, logits_TE, w_gate_up_E2ND, w_down_EDN, 2, **shared).out_TD
    torch.testing.assert_close((with_shared_TD - out_TD)[:, 0], torch.stack([first, second]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [Case(9, 4, 3, 2, 5), Case(6, 3, 3, 3, 2, S=1, norm_topk_prob=False)], ids=str)
def test_gradients_are_those_of_the_function(case):
    inputs = make(case, torch.float64)
    inputs = inputs if case.S else inputs[:4]

    def function(*tensors):
        shared = dict(zip(("shared_gate_up_S2ND", "shared_down_SDN"), tensors[4:], strict=False))
        return mmllm_kernels.moe(*tensors[:4], case.K, case.norm_topk_prob, **shared).out_TD

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "case", [Case(256, 64, 8, 2, 96), Case(256, 64, 32, 4, 32), Case(256, 32, 128, 8, 16)], ids=str
)
def test_backward_keeps_tokens_and_pre_activations_alone(case, recompute):
    inputs = make(case, torch.bfloat16)[:4]
    saved = saved_bytes(lambda: mmllm_kernels.moe(*inputs, case.K, recompute=recompute), inputs[2:])
    h_bytes = 0 if recompute else 4 * case.T * case.K * case.N
    assert 2 * case.T * case.D + h_bytes <= saved <= 2 * case.T * case.D + h_bytes + 32 * case.T * case.K


def test_two_runs_give_equal_bits():
    case = Case(300, 32, 6, 2, 24, S=1)
    first, second = (run(make(case, torch.float32), case, "cpu") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck looks at copies of its own
@pytest.mark.parametrize("case", [Case(20), Case(20, S=1, norm_topk_prob=False, recompute=True)], ids=str)
def test_operators_pass_opcheck(case):
    x, logits, *weights = make(case, torch.float64)
    torch.library.opcheck(ops.route, (logits, case.K, case.norm_topk_prob, "cpu"))
    gates, experts = (tensor.detach() for tensor in ops.route(logits, case.K, case.norm_topk_prob, "cpu"))
    arguments = (torch.ones_like(gates), gates, experts, logits.detach(), case.norm_topk_prob, "cpu")
    torch.library.opcheck(ops.route_backward, arguments)
    if case.recompute:  # or the pre-activations of what is left out, which nobody writes, would be compared
        experts[::3, 1] = -1
    arguments = (x, gates.requires_grad_(), experts, *weights, not case.recompute, "cpu")
    torch.library.opcheck(ops.experts, arguments)
    with torch.no_grad():
        out, *sorting_and_h = ops.experts(*arguments)
        detached = [tensor.detach() for tensor in (x, gates, *weights)]
        for weight_grads in (True, False):
            arguments = (torch.ones_like(out), *detached, *sorting_and_h, weight_grads, "cpu")
            torch.library.opcheck(ops.experts_backward, arguments)
        torch.library.opcheck(ops.nearest_code, (*nearest_case(20, 4, 7, torch.float32), "cpu"))


def test_compile_traces_through():
    def step(x, logits, w_gate_up, w_down):
        out, counts, _ = mmllm_kernels.moe(x * 2, logits, w_gate_up, w_down, top_k=2)
        return out.sin(), counts, mmllm_kernels.nearest_code(x, x)

    case = Case(33)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_tokens in (33, 12):
        case = Case(num_tokens)
        results = []
        for function in (step, compiled):
            inputs = make(case, torch.float64)[:4]
            out, counts, codes = function(*inputs)
            results.append([out, counts, codes, *torch.autograd.grad(out.sum(), inputs)])
        torch.testing.assert_close(results[1], results[0])
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs)[0], results[0][0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    case = Case(30)
    wanted = run(make(case, torch.float64), case, "cpu")
    inputs = make(case, torch.float64)[:4]
    out = checkpoint(lambda *x: mmllm_kernels.moe(*x, case.K).out_TD, *inputs, use_reentrant=reentrant)
    assert torch.is_tensor(out)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).cos())
    for name, tensor in zip(("x", "router_logits", "w_gate_up", "w_down"), inputs, strict=True):
        torch.testing.assert_close(tensor.grad, wanted[f"gradient of {name}"])


def test_frozen_weights_and_frozen_tokens():
    case = Case(30)
    wanted = run(make(case, torch.float64), case, "cpu")
    for trained in ([0], [1], [2], [0, 3]):
        inputs = [tensor.requires_grad_(i in trained) for i, tensor in enumerate(make(case, torch.float64)[:4])]
        out = mmllm_kernels.moe(*inputs, case.K).out_TD
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).cos())
        names = ("x", "router_logits", "w_gate_up", "w_down")
        for i, (name, tensor) in enumerate(zip(names, inputs, strict=True)):
            assert (tensor.grad is not None) == (i in trained)
            if i in trained:
                torch.testing.assert_close(tensor.grad, wanted[f"gradient of {name}"])


def test_autocast_casts_tokens_and_weights():
    inputs = make(Case(20, 8, 4, 2, 6), torch.float32)[:4]
    with torch.autocast("cpu", torch.bfloat16):
        out = mmllm_kernels.moe(*inputs, top_k=2).out_TD
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), mmllm_kernels.moe(*inputs, top_k=2).out_TD, rtol=0.05, atol=0.05)
    out.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.dtype == torch.float32 for tensor in inputs)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "top_k", "num_shared"), [(1, 2, 0), (1, 3, 1), (1, 4, 2), (3, 2, 1)])
@pytest.mark.parametrize("twist", ["", "strided"])
def test_large_experts_decode_like_the_reference(threads, num_threads, dtype, num_tokens, top_k, num_shared, twist):
    """Weights of so many elements that their rows are shared out, or two experts."""
    case = Case(num_tokens, 512, 4, top_k, 576, S=num_shared, twist=twist)
    assert matvec._SHARED_ELEMENTS <= 512 * 576
    inputs = [tensor.detach() for tensor in make(case, dtype)]
    shared = dict(zip(("shared_gate_up_S2ND", "shared_down_SDN"), inputs[4:], strict=True)) if num_shared else {}
    threads(num_threads)
    got = mmllm_kernels.moe(*inputs[:4], top_k, **shared)
    wanted = reference.moe(
        *(tensor.double() for tensor in inputs[:4]), top_k, True, *(w.double() for w in shared.values())
    )
    assert torch.equal(got.counts_E, wanted.counts_E) and torch.equal(got.experts_TK, wanted.experts_TK)
    assert (got.out_TD - wanted.out_TD).abs().max() <= TOLERANCE[dtype] * wanted.out_TD.abs().max()


@pytest.mark.parametrize("logits", [[2.0, 1.0, 3.0], [1.0, 2.0, 2.0], [2.0, 2.0, 2.0], [-torch.inf, 1.0, -torch.inf]])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("width", [16, 512])
def test_decoding_chooses_experts_like_the_reference(threads, logits, norm_topk_prob, top_k, width):
    threads(2)
    x, _, *weights = (tensor.detach() for tensor in make(Case(1, width, 3, top_k, width), torch.float32)[:4])
    got = mmllm_kernels.moe(x, torch.tensor([logits]), *weights, top_k, norm_topk_prob)
    wanted = reference.moe(x, torch.tensor([logits]), *weights, top_k, norm_topk_prob)
    assert torch.equal(got.counts_E, wanted.counts_E) and torch.equal(got.experts_TK, wanted.experts_TK)
    torch.testing.assert_close(got.out_TD, wanted.out_TD, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "experts", [[1, 3], [3, 1], [2, 2], [-1, 2], [-1, -1], [0, -1, 2, 3], [1, 1, 2, 0], [-1, 0, 1]], ids=str
)
@pytest.mark.parametrize("num_shared", [0, 1])
def test_decoding_of_given_experts(threads, dtype, experts, num_shared):
    case = Case(1, 512, 4, len(experts), 576, S=num_shared)
    assert matvec._SHARED_ELEMENTS <= 512 * 576
    x, _, *weights = (tensor.detach() for tensor in make(case, dtype))
    gates = torch.tensor([[0.7, -0.3, 0.0, 2.0][: case.K]])
    gates = gates.masked_fill(torch.tensor([experts]) < 0, torch.nan)
    shared = dict(zip(("shared_gate_up_S2ND", "shared_down_SDN"), weights[2:], strict=True)) if num_shared else {}
    threads(2)
    got = mmllm_kernels.experts(x, gates, torch.tensor([experts]), *weights[:2], **shared)
    exact = [w.double() for w in weights[: 4 if num_shared else 2]]
    wanted = reference.experts(x.double(), gates.double(), torch.tensor([experts]), *exact)
    assert got.out_TD.dtype == dtype and torch.equal(got.counts_E, wanted.counts_E)
    assert (got.out_TD - wanted.out_TD).abs().max() <= TOLERANCE[dtype] * wanted.out_TD.abs().max()


@pytest.mark.parametrize("top_k", [2, 7])
def test_decoding_takes_the_lowest_of_equal_experts(top_k):
    x, _, *weights = (tensor.detach() for tensor in make(Case(1, E=40, K=top_k), torch.float32)[:4])
    for seed in range(20):
        logits = torch.randint(4, (1, 40), generator=torch.Generator().manual_seed(seed)).float()
        experts = mmllm_kernels.moe(x, logits, *weights, top_k).experts_TK
        assert torch.equal(experts, reference.route(logits, top_k)[1])


def test_decoding_takes_weights_of_several_dtypes_and_no_shared_experts():
    x, logits, w_gate_up, w_down, *none = (tensor.detach() for tensor in make(Case(1, 512, 4, 2, 512), torch.float32))
    shared = dict(zip(("shared_gate_up_S2ND", "shared_down_SDN"), none, strict=True))
    wanted = reference.moe(x, logits, w_gate_up, w_down, 2).out_TD
    assert not len(none[0])
    for each in (w_down, w_down.bfloat16()):
        out = mmllm_kernels.moe(x, logits, w_gate_up, each, 2, **shared).out_TD
        assert out.dtype == torch.float32
        assert (out - wanted).abs().max() <= TOLERANCE[torch.bfloat16] * wanted.abs().max()


def test_decoding_under_autocast_casts_the_tokens_experts_alone():
    x, *others = (tensor.detach() for tensor in make(Case(1, 64, 8, 2, 32), torch.float32)[:4])
    cast = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "_to_copy" in str(func):
                cast.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16), Casts():
        out = mmllm_kernels.moe(x, *others, top_k=2).out_TD
    assert out.dtype == torch.bfloat16 and max(cast) == 2 * 32 * 64, "one expert's weights at most"
    assert 2 not in cast, "the gates stay in float32"
    wanted = mmllm_kernels.moe(x, *others, top_k=2).out_TD
    assert (out - wanted).abs().max() <= TOLERANCE[torch.bfloat16] * wanted.abs().max()


@pytest.mark.parametrize("num_shared", [0, 1])
@pytest.mark.parametrize("num_tokens", [1, 2, 5])
def test_decoding_with_bfloat16_weights(num_tokens, num_shared):
    case = Case(num_tokens, 32, 8, 2, 48, S=num_shared)
    x, logits, *weights = (tensor.detach() for tensor in make(case, torch.float32))
    weights = [w.bfloat16() for w in weights]
    shared = {"shared_gate_up_S2ND": weights[2], "shared_down_SDN": weights[3]} if num_shared else {}
    out = mmllm_kernels.moe(x, logits, *weights[:2], 2, **shared).out_TD
    wanted = reference.moe(x, logits, *(w.float() for w in weights[:2]), 2, True, *(w.float() for w in weights[2:]))
    assert out.dtype == torch.float32
    assert (out - wanted.out_TD).abs().max() <= TOLERANCE[torch.bfloat16] * wanted.out_TD.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("num_tokens", "width", "num_codes"), [(0, 6, 17), (1, 6, 17), (300, 5, 17), (1000, 3, 2000), (5, 4, 1)]
)
def test_nearest_code(num_tokens, width, num_codes, dtype):
    assert_nearest_like_reference(num_tokens, width, num_codes, dtype, "cpu")


def test_nearest_code_of_strided_vectors_that_require_gradients():
    x = torch.randn(6, 40, requires_grad=True).T
    codebook = torch.randn(12, 6)[::2]
    assert torch.equal(mmllm_kernels.nearest_code(x, codebook), reference.nearest_code(x, codebook))


class _LargestOutput(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, result.numel() if torch.is_tensor(result) else 0)
        return result


def test_nearest_code_makes_no_matrix_of_all_distances():
    x, codebook = torch.randn(5000, 4), torch.randn(512, 4)
    with _LargestOutput() as largest:
        sorted_tokens.nearest_code(x, codebook)
    assert 5000 * 4 <= largest.numel < 5000 * 512 / 10


def test_what_triton_cannot_take_falls_back_with_one_warning():
    backends._warn_once.cache_clear()
    inputs = make(Case(5), torch.float64)[:4]
    with pytest.warns(RuntimeWarning, match="need a GPU .*but the tensors are on cpu; the sorted-token path") as caught:
        out = mmllm_kernels.moe(*inputs, top_k=2, backend="triton").out_TD
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out.sum().backward()
        mmllm_kernels.moe(*inputs, top_k=2, backend="triton")
        mmllm_kernels.moe(*inputs, top_k=2)
    torch.testing.assert_close(out, mmllm_kernels.moe(*inputs, top_k=2).out_TD)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 6}, "top_k is 6"),
        ({"backend": "gpu"}, "'gpu'; choose auto, reference, cpu, triton"),
        ({"w_gate_up_E2ND": torch.zeros(5, 14, 12)}, "x is .4, 13."),
        ({"w_gate_up_E2ND": torch.zeros(5, 13, 13)}, "w_gate_up is"),
        ({"w_down_EDN": torch.zeros(5, 13, 8)}, "w_down .5, 13, 8."),
        ({"x_TD": torch.zeros(4, 1, 13)}, "3, 2, 3 and 3 dimensions"),
        ({"router_logits_TE": torch.zeros(3, 5)}, "router_logits .3, 5."),
        ({"x_TD": torch.zeros(4, 13, device="meta")}, "on cpu but x on meta"),
        ({"shared_down_SDN": torch.zeros(1, 13, 7)}, "give both or neither"),
        ({"shared_gate_up_S2ND": torch.zeros(1, 28, 13), "shared_down_SDN": torch.zeros(1, 13, 14)}, "split a wider"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    names = ("x_TD", "router_logits_TE", "w_gate_up_E2ND", "w_down_EDN")
    arguments = {**dict(zip(names, make(Case(4), torch.float32), strict=False)), "top_k": 2, **change}
    with pytest.raises(ValueError, match=message):
        mmllm_kernels.moe(**arguments)


def test_wrong_arguments_of_nearest_code_are_named():
    with pytest.raises(ValueError, match=r"must be \[T, D\] and \[V, D\]"):
        mmllm_kernels.nearest_code(torch.zeros(3, 4), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="cast or move"):
        mmllm_kernels.nearest_code(torch.zeros(3, 4), torch.zeros(5, 4, dtype=torch.float64))


def test_importing_needs_neither_triton_nor_mmllm():
    program = (
        "import sys; import mmllm_kernels; "
        "sys.exit(' '.join({'triton', 'mmllm', 'mmllm_tokenizers'} & {*sys.modules}) or 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
