from __future__ import annotations

import pytest
import torch

import mmllm_kernels
from mmllm_kernels import reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def _inputs(num_tokens: int, width: int, num_experts: int, inner: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    return [
        draw(num_tokens, width),
        draw(num_tokens, num_experts),
        draw(num_experts, 2 * inner, width),
        draw(num_experts, width, inner),
    ]


def _outputs_and_gradients(inputs: list[torch.Tensor], top_k: int, renormalise: bool, backend: str) -> list:
    result = mmllm_kernels.moe(*inputs, top_k=top_k, renormalise=renormalise, backend=backend)
    weights = torch.linspace(-1, 1, result.out_TD.numel(), dtype=result.out_TD.dtype).view_as(result.out_TD)
    return [result.out_TD, result.counts_E, *torch.autograd.grad((result.out_TD * weights).sum(), inputs)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"), [(0, 4, 2), (1, 4, 2), (37, 5, 1), (37, 3, 3), (1000, 8, 2), (64, 1, 1)]
)
def test_fast_moe_equals_reference(num_tokens, num_experts, top_k, renormalise, dtype):
    inputs = _inputs(num_tokens, 13, num_experts, 7, dtype)
    fast = _outputs_and_gradients(inputs, top_k, renormalise, "cpu")
    slow = _outputs_and_gradients(inputs, top_k, renormalise, "reference")
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 10)


def test_one_expert_may_take_all():
    inputs = _inputs(50, 8, 6, 5, torch.float64)
    with torch.no_grad():
        inputs[1][:, 3] += 100
    fast = _outputs_and_gradients(inputs, 1, True, "cpu")
    slow = _outputs_and_gradients(inputs, 1, True, "reference")
    assert fast[1].tolist() == [0, 0, 0, 50, 0, 0]
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_the_function():
    inputs = _inputs(9, 4, 3, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: mmllm_kernels.moe(*x, top_k=2).out_TD, inputs)


def test_autocast_casts_tokens_and_weights():
    inputs = _inputs(20, 8, 4, 6, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = mmllm_kernels.moe(*inputs, top_k=2).out_TD
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), mmllm_kernels.moe(*inputs, top_k=2).out_TD, rtol=0.1, atol=0.3)
    out.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.dtype == torch.float32 for tensor in inputs)


def test_top_k_out_of_range_and_unknown_backend_are_named():
    inputs = _inputs(4, 3, 2, 3, torch.float32)
    with pytest.raises(ValueError, match="top_k is 3"):
        mmllm_kernels.moe(*inputs, top_k=3)
    with pytest.raises(ValueError, match="'gpu'"):
        mmllm_kernels.moe(*inputs, top_k=1, backend="gpu")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("num_tokens", [0, 1, 300])
def test_nearest_code(num_tokens):
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(num_tokens, 6, generator=generator, dtype=torch.float64)
    codebook_VD = torch.randn(17, 6, generator=generator, dtype=torch.float64)
    expected = reference.nearest_code(x_TD, codebook_VD)
    assert torch.equal(mmllm_kernels.nearest_code(x_TD, codebook_VD), expected)
    assert torch.equal(mmllm_kernels.nearest_code(codebook_VD, codebook_VD), torch.arange(17))
