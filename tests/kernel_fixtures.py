"""Inputs that a mixture of experts finds hard, and the comparison with the reference, for all backends' tests.

T tokens, D width, E experts, K experts a token, N inner width, S shared experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import mmllm_kernels
from mmllm_kernels import reference

TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Largest difference from the reference in float64 of the same inputs, over the reference's largest value."""
NAMES = ("x", "router_logits", "w_gate_up", "w_down", "shared_gate_up", "shared_down")


@dataclass(frozen=True)
class Case:
    """A shape, and what is odd about its inputs."""

    T: int
    D: int = 13
    E: int = 5
    K: int = 2
    N: int = 7
    S: int = 0
    twist: str = ""
    """`one expert`, `duplicates`, `minus infinity` or `strided`."""
    renormalise: bool = True
    recompute: bool = False

    def __str__(self) -> str:
        flags = [self.twist] * bool(self.twist) + ["raw gates"] * (not self.renormalise)
        return "-".join([f"T{self.T}E{self.E}K{self.K}S{self.S}", *flags, *["recompute"] * self.recompute])


CASES = [
    Case(T=0),
    Case(T=1),
    Case(T=1, E=1, K=1),
    Case(T=37),
    Case(T=37, renormalise=False),
    Case(T=37, E=4, K=4),
    Case(T=37, E=4, K=4, renormalise=False, S=1),
    Case(T=37, S=2),
    Case(T=37, S=1, recompute=True),
    Case(T=0, S=1, recompute=True),
    Case(T=37, twist="one expert", K=1),
    Case(T=37, twist="duplicates", K=3),
    Case(T=37, twist="minus infinity", K=3),
    Case(T=37, twist="minus infinity", K=3, renormalise=False),
    Case(T=37, twist="strided", S=1),
    Case(T=1000, D=24, E=8, K=2, N=20),
]


def make(case: Case, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """The six tensors of `NAMES`, all with gradients; about unit variance everywhere."""
    generator = torch.Generator().manual_seed(case.T + case.E)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        tensor = (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)
        if case.twist == "strided":
            tensor = tensor.mT.contiguous().mT
        return tensor.requires_grad_()

    c = case
    inputs = [
        draw(c.T, c.D),
        draw(c.T, c.E),
        draw(c.E, 2 * c.N, c.D, scale=c.D**-0.5),
        draw(c.E, c.D, c.N, scale=c.N**-0.5),
        draw(c.S, 2 * c.N, c.D, scale=c.D**-0.5),
        draw(c.S, c.D, c.N, scale=c.N**-0.5),
    ]
    with torch.no_grad():
        match case.twist:
            case "one expert":
                inputs[1][:, 3] += 100
            case "duplicates":
                inputs[1].round_().clamp_(-1, 1)
            case "minus infinity":
                inputs[1][:, :2] = -torch.inf
                inputs[1][::3, 2] = -torch.inf  # fewer than K experts are left
    return inputs


def run(inputs: list[Tensor], case: Case, backend: Any) -> dict[str, Tensor]:
    """Outputs and the gradients of a weighted sum of them, by name."""
    x, logits, w_gate_up, w_down, *shared = inputs
    keywords = dict(zip(("shared_gate_up_S2ND", "shared_down_SDN"), shared, strict=True)) if case.S else {}
    result = mmllm_kernels.moe(
        x, logits, w_gate_up, w_down, case.K, case.renormalise, backend, recompute=case.recompute, **keywords
    )
    out = result.out_TD
    # Made where it is used: a copy from pageable memory is a host sync, which one test forbids.
    grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view_as(out).cos().to(out.dtype)
    inputs = inputs if case.S else inputs[:4]
    grads = torch.autograd.grad(out, inputs, grad)
    named = {f"gradient of {name}": tensor for name, tensor in zip(NAMES, grads, strict=False)}
    return {"out": out.detach(), "counts": result.counts_E, "experts": result.experts_TK, **named}


def assert_like_reference(
    case: Case, dtype: torch.dtype, backend: str, device: str = "cpu", least: float = 1e-3
) -> None:
    """Outputs and every gradient of `backend` are the reference's, computed in float64 from the same inputs."""
    inputs = make(case, dtype, device)
    got = run(inputs, case, backend)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    wanted = run(exact, case, "reference")
    assert_close(got, wanted, TOLERANCE[dtype], least)


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float, least: float = 1e-3) -> None:
    """Integers are equal; floats differ by at most `tolerance` of the largest wanted one, or of `least`."""
    assert got.keys() == wanted.keys()
    for name, expected in wanted.items():
        value = got[name]
        assert value.shape == expected.shape, name
        if not expected.is_floating_point():
            assert torch.equal(value, expected), name
        elif expected.numel():
            error = (value.double() - expected).abs().max() / expected.abs().max().clamp(min=least)
            assert error <= tolerance, f"{name}: off by {error:.2g} of its largest value"


def nearest_case(num_tokens: int, width: int, num_codes: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Vectors and codes on a coarse grid, so that every product is exact and ties are real."""
    generator = torch.Generator().manual_seed(num_tokens + num_codes)
    shapes = ((num_tokens, width), (num_codes, width))
    return [torch.randint(-3, 4, shape, generator=generator).to(device, dtype) for shape in shapes]


def assert_nearest_like_reference(
    num_tokens: int, width: int, num_codes: int, dtype: torch.dtype, backend: Any, device: str = "cpu"
) -> None:
    """The reference's codes, ties included."""
    x, codebook = nearest_case(num_tokens, width, num_codes, dtype, device)
    expected = reference.nearest_code(x.double(), codebook.double())
    assert torch.equal(mmllm_kernels.nearest_code(x, codebook, backend), expected)


def any_case(data: st.DataObject, max_tokens: int, max_width: int) -> Case:
    """A case of small sizes, drawn by hypothesis."""
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    num_experts = draw(1, 9)
    return Case(
        T=draw(0, max_tokens), D=draw(1, max_width), E=num_experts, K=draw(1, num_experts), N=draw(1, 40), S=draw(0, 2),
        renormalise=data.draw(st.booleans()), recompute=data.draw(st.booleans()),
    )  # fmt: skip
