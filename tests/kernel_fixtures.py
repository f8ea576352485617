"""Inputs that a mixture of experts finds hard, and the comparison with the reference, for all backends' tests.

T tokens, D width, E experts, K experts a token, N inner width, S shared experts.
"""

from __future__ import annotations

from collections.abc import Callable
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
    """`one expert`, `duplicates`, `minus infinity` or `strided`; of a given choice also `all left out`."""
    norm_topk_prob: bool = True
    recompute: bool = False

    def __str__(self) -> str:
        flags = [self.twist] * bool(self.twist) + ["raw gates"] * (not self.norm_topk_prob)
        return "-".join([f"T{self.T}E{self.E}K{self.K}S{self.S}", *flags, *["recompute"] * self.recompute])


CASES = [
    Case(T=0),
    Case(T=1),
    Case(T=1, E=1, K=1),
    Case(T=37),
    Case(T=37, norm_topk_prob=False),
    Case(T=37, E=4, K=4),
    Case(T=37, E=4, K=4, norm_topk_prob=False, S=1),
    Case(T=37, S=2),
    Case(T=37, S=1, recompute=True),
    Case(T=0, S=1, recompute=True),
    Case(T=37, twist="one expert", K=1),
    Case(T=37, twist="duplicates", K=3),
    Case(T=37, twist="minus infinity", K=3),
    Case(T=37, twist="minus infinity", K=3, norm_topk_prob=False),
    Case(T=37, twist="strided", S=1),
    Case(T=1000, D=24, E=8, K=2, N=20),
]


GIVEN_CASES = [
    Case(T=0, S=1),
    Case(T=1),
    Case(T=1, S=2, twist="all left out"),
    Case(T=37),
    Case(T=37, E=2, K=5, S=1),
    Case(T=37, E=40, K=3, recompute=True),
    Case(T=37, twist="strided", S=1, recompute=True),
    Case(T=37, twist="all left out"),
    Case(T=300, D=24, E=8, K=2, N=40, S=1),
]
"""Where gates and indices are given: see `make_choice`."""


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
        x, logits, w_gate_up, w_down, case.K, case.norm_topk_prob, backend, recompute=case.recompute, **keywords
    )
    out = result.out_TD
    # Made where it is used: a copy from pageable memory is a host sync, which one test forbids.
    grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view_as(out).cos().to(out.dtype)
    inputs = inputs if case.S else inputs[:4]
    grads = torch.autograd.grad(out, inputs, grad)
    named = {f"gradient of {name}": tensor for name, tensor in zip(NAMES, grads, strict=False)}
    return {"out": out.detach(), "counts": result.counts_E, "experts": result.experts_TK, **named}


def make_choice(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Gates [T, K] of any sign, some 0, and experts [T, K]: some twice a token, some pairs left out, with a NaN."""
    generator = torch.Generator().manual_seed(case.T)
    gates_TK = torch.randn(case.T, case.K, generator=generator, dtype=torch.float64)
    gates_TK = gates_TK.masked_fill(torch.rand(case.T, case.K, generator=generator) < 0.2, 0.0)
    experts_TK = torch.randint(-1, case.E, (case.T, case.K), generator=generator)
    if case.twist == "all left out":
        experts_TK.fill_(-1)
    gates_TK = gates_TK.masked_fill(experts_TK < 0, torch.nan).to(device, torch.promote_types(dtype, torch.float32))
    experts_TK = experts_TK.to(device)
    if case.twist == "strided":
        gates_TK, experts_TK = gates_TK.mT.contiguous().mT, experts_TK.mT.contiguous().mT
    return gates_TK.requires_grad_(), experts_TK


def run_given(
    inputs: list[Tensor], gates_TK: Tensor, experts_TK: Tensor, case: Case, backend: Any
) -> dict[str, Tensor]:
    """As `run`, of `experts`."""
    x, _, w_gate_up, w_down, *shared = inputs
    keywords = dict(zip(("shared_gate_up_S2ND", "shared_down_SDN"), shared, strict=True)) if case.S else {}
    result = mmllm_kernels.experts(
        x, gates_TK, experts_TK, w_gate_up, w_down, backend, recompute=case.recompute, **keywords
    )
    out = result.out_TD
    grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view_as(out).cos().to(out.dtype)
    named = {"x": x, "gates": gates_TK, "w_gate_up": w_gate_up, "w_down": w_down}
    named.update(zip(NAMES[4:], shared if case.S else (), strict=False))
    grads = torch.autograd.grad(out, list(named.values()), grad)
    grads = {f"gradient of {name}": grad for name, grad in zip(named, grads, strict=True)}
    return {"out": out.detach(), "counts": result.counts_E, **grads}


def assert_given_like_reference(case: Case, dtype: torch.dtype, backend: Any, device: str = "cpu") -> None:
    """Outputs and every gradient of `experts` are the reference's, computed in float64 from the same inputs."""
    inputs, (gates, experts) = make(case, dtype, device), make_choice(case, dtype, device)
    got = run_given(inputs, gates, experts, case, backend)
    exact = [tensor.detach().double().requires_grad_() for tensor in (*inputs, gates)]
    wanted = run_given(exact[:-1], exact[-1], experts, case, "reference")
    assert not wanted["gradient of gates"][experts < 0].any()
    assert not got["gradient of gates"][experts < 0].any()
    assert_close(got, wanted, 2 * TOLERANCE[dtype])  # gates of both signs cancel


def assert_like_reference(
    case: Case, dtype: torch.dtype, backend: str, device: str = "cpu", least: float = 1e-3, slack: float = 1.0
) -> None:
    """Outputs and every gradient of `backend` are the reference's, computed in float64 from the same inputs."""
    inputs = make(case, dtype, device)
    got = run(inputs, case, backend)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    wanted = run(exact, case, "reference")
    assert_close(got, wanted, slack * TOLERANCE[dtype], least)


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


def saved_bytes(function: Callable[[], Any], parameters: list[Tensor]) -> int:
    """Bytes that backward keeps, each storage once; weights are there anyway."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    assert result is not None
    for parameter in parameters:
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storages.values())


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
        norm_topk_prob=data.draw(st.booleans()), recompute=data.draw(st.booleans()),
    )  # fmt: skip
