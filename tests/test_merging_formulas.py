"""Each merging method against a loop over single numbers, and against mergekit where it is installed."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmllm.interop.merging.formulas import METHODS, Numbers, merged

torch.set_num_threads(1)
SHAPES = [(7, 12), (3, 4, 6), (9,), (1, 1)]
WEIGHTS, DENSITIES, EPSILONS = (0.7, 0.4, -0.3), (0.5, 0.8, 0.3), (0.1, 0.15, 0.2)


def tensors(shape: tuple[int, ...], count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    noise = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count - 1)]
    return [base, *(base + 0.3 * each for each in noise)]


def generator_of(place: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 + place)


def numbers_of(method: str, **changes: Any) -> Numbers:
    rule = METHODS[method]
    shared = {{"lambda": "scale"}.get(key, key): value for key, value in rule.shared.items() if value is not None}
    return Numbers(**{"weights": WEIGHTS, "densities": DENSITIES, "epsilons": EPSILONS, **shared, **changes})


# --- the loops: no vectors, one number after another ------------------------------------------------------------------


def slow_kept(method: str, change: list[float], numbers: Numbers, place: int, shape: tuple[int, ...]) -> list[float]:
    """A change, trimmed as the method says."""
    density, size = numbers.densities[place], len(change)
    if method in ("task_arithmetic",):
        return change
    if method == "ties":
        count = max(1, int(density * size))
        kept = set(sorted(range(size), key=lambda i: (-abs(change[i]), i))[:count])
        return [value if i in kept else 0.0 for i, value in enumerate(change)]
    draws = torch.rand(shape, generator=generator_of(place)).flatten().tolist()
    if method.startswith("dare"):
        return [value / density if draw < density else 0.0 for value, draw in zip(change, draws, strict=True)]
    epsilon, width = numbers.epsilons[place], shape[-1]
    made = []
    for start in range(0, size, width):
        row = change[start : start + width]
        order = sorted(range(width), key=lambda i: (abs(row[i]), i))
        for i, value in enumerate(row):
            chance = density - epsilon + 2 * epsilon * order.index(i) / max(width - 1, 1)
            made.append(value / chance if draws[start + i] < chance else 0.0)
    return made


def slow(method: str, given: list[Tensor], numbers: Numbers) -> Tensor:
    shape = tuple(given[0].shape)
    flat = [tensor.flatten().tolist() for tensor in given]
    base, others = flat[0], flat[1:]
    size = len(base)
    if method == "linear":
        total = sum(numbers.weights) if numbers.normalize else 1.0
        made = [sum(w * x[i] for w, x in zip(numbers.weights, others, strict=True)) / total for i in range(size)]
    elif method == "slerp":
        other = others[0]
        norms = [math.sqrt(sum(x * x for x in each)) for each in (base, other)]
        cosine = sum(a * b for a, b in zip(base, other, strict=True)) / (norms[0] * norms[1])
        shares = (1 - numbers.t, numbers.t)
        if abs(cosine) <= 0.9995:
            angle = math.acos(cosine)
            shares = tuple(math.sin(share * angle) / math.sin(angle) for share in shares)
        made = [shares[0] * a + shares[1] * b for a, b in zip(base, other, strict=True)]
    elif method == "model_stock":
        changes = [[x - b for x, b in zip(other, base, strict=True)] for other in others]
        cosines = []
        for a, b in itertools.combinations(changes, 2):
            norms = [math.sqrt(sum(x * x for x in each)) for each in (a, b)]
            cosines.append(sum(x * y for x, y in zip(a, b, strict=True)) / (norms[0] * norms[1]))
        cosine, count = sum(cosines) / len(cosines), len(others)
        share = count * cosine / (1 + (count - 1) * cosine)
        means = [sum(other[i] for other in others) / count for i in range(size)]
        made = [share * mean + (1 - share) * b for mean, b in zip(means, base, strict=True)]
    else:
        changes = [[x - b for x, b in zip(other, base, strict=True)] for other in others]
        changes = [slow_kept(method, change, numbers, place, shape) for place, change in enumerate(changes)]
        made = []
        for i, b in enumerate(base):
            parts = [(w * change[i], w) for w, change in zip(numbers.weights, changes, strict=True)]
            if method in ("ties", "dare_ties", "della"):
                sign = 1.0 if sum(part for part, _ in parts) >= 0 else -1.0
                parts = [(part, w) for part, w in parts if part * sign > 0]
            divisor = sum(w for _, w in parts) if numbers.normalize else 1.0
            made.append(b + numbers.scale * sum(part for part, _ in parts) / (divisor or 1.0))
    return torch.tensor(made, dtype=given[0].dtype).reshape(shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_its_loop(method: str, shape: tuple[int, ...]) -> None:
    given = tensors(shape, 2 if method == "slerp" else 4)
    for changes in ({"t": 0.3}, {"t": 1.0, "scale": 0.6}, {"normalize": True}):
        numbers = numbers_of(method, **changes)
        base = None if method == "linear" else given[0]
        made = merged(method, base, given[1:], numbers, generator_of)
        torch.testing.assert_close(made, slow(method, given, numbers), rtol=1e-9, atol=1e-12)


def test_slerp_of_nearly_parallel_tensors_is_a_line() -> None:
    base = torch.randn(5, 5, dtype=torch.float64)
    made = merged("slerp", base, [base * 3], Numbers(t=0.25), generator_of)
    torch.testing.assert_close(made, base * 1.5)
    assert torch.isfinite(merged("slerp", torch.zeros(4), [torch.ones(4)], Numbers(t=0.5), generator_of)).all()


def test_model_stock_by_rows_and_of_changes_that_cancel() -> None:
    base, *others = tensors((5, 8), 3)
    made = merged("model_stock", base, others, Numbers(filter_wise=True), generator_of)
    for row in range(5):
        own = merged("model_stock", base[row], [other[row] for other in others], Numbers(), generator_of)
        torch.testing.assert_close(made[row], own)
    away = [base + others[0], base - others[0]]
    torch.testing.assert_close(merged("model_stock", base, away, Numbers(), generator_of), base)


def test_what_is_drawn_keeps_its_mean() -> None:
    """DARE and DELLA are right on average: what stays is divided by its chance."""
    base, change = torch.zeros(4, 50), torch.randn(4, 50)
    for method in ("dare_linear", "della_linear"):
        numbers = Numbers(weights=(1.0,), densities=(0.5,), epsilons=(0.2,), rescale=True)
        total = torch.zeros_like(change)
        for seed in range(4000):
            total += merged(method, base, [change], numbers, lambda _, seed=seed: torch.Generator().manual_seed(seed))
        assert ((total / 4000 - change).abs() < 0.15 * change.abs() + 1e-3).all(), method


# --- mergekit ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_mergekits(method: str) -> None:
    """All of them where nothing is drawn: DARE and DELLA with all numbers kept."""
    pytest.importorskip("mergekit")
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import PerInputValues, TensorGroup

    has_draws = method.startswith(("dare", "della"))
    for shape in SHAPES:
        given = tensors(shape, 2 if method == "slerp" else 4)
        numbers = numbers_of(method, t=0.4, densities=(1.0, 1.0, 1.0) if has_draws else DENSITIES, scale=0.8)
        start = 1 if method == "linear" else 0
        group = TensorGroup.from_tensors(given[start:], base_index=None if start else 0)
        places = [place for place in range(len(given) - start) if start or place]
        parameters: dict[str, Any] = {}
        kinds = {"weight": numbers.weights, "density": numbers.densities, "epsilon": numbers.epsilons}
        for key in METHODS[method].of_models:
            parameters[key] = PerInputValues(list(zip(places, kinds[key], strict=True)))
        for key in METHODS[method].shared:
            parameters[key] = getattr(numbers, {"lambda": "scale"}.get(key, key))
        [theirs] = registry.get(method)([group], parameters=parameters)
        made = merged(method, None if start else given[0], given[1:], numbers, generator_of)
        torch.testing.assert_close(made, theirs, rtol=1e-6, atol=1e-7)
