"""The formulas by which tensors are merged, each as its paper has it.

They compute on one tensor of each parent, in float32 or wider, and know neither files nor names. What is drawn (DARE,
DELLA) comes from generators that the caller gives, one a parent.

Shapes: M parents beside the base; a tensor's own are free.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NEARLY_PARALLEL = 0.9995
"""|cos| of two tensors above which SLERP is a straight line: sin of their angle is too small to divide by."""
_SMALLEST = 1e-8


@dataclass(frozen=True)
class Numbers:
    """The numbers that a method takes for one tensor; lists have one for each parent beside the base."""

    weights: tuple[float, ...] = ()
    densities: tuple[float, ...] = ()
    epsilons: tuple[float, ...] = ()
    t: float = 0.5
    scale: float = 1.0
    """`lambda` of the YAML."""
    normalize: bool = False
    rescale: bool = True
    filter_wise: bool = False


# --- of the tensors themselves ----------------------------------------------------------------------------------------


def linear(tensors: Sequence[Tensor], weights: Sequence[float], normalize: bool = True) -> Tensor:
    """The weighted mean (model soups, arXiv 2203.05482); without `normalize` the weighted sum."""
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total += weight * tensor
    return total / sum(weights) if normalize else total


def slerp(start: Tensor, end: Tensor, t: float) -> Tensor:
    """On the arc from one tensor to another, each taken as one vector; a straight line where they are nearly parallel.

    (Shoemake 1985, https://doi.org/10.1145/325334.325242.)
    """
    norms = [torch.linalg.vector_norm(each).clamp(min=_SMALLEST) for each in (start, end)]
    cosine = ((start / norms[0]) * (end / norms[1])).sum().clamp(-1, 1)
    if cosine.abs() > NEARLY_PARALLEL:
        return (1 - t) * start + t * end
    angle = torch.acos(cosine)
    return (torch.sin((1 - t) * angle) * start + torch.sin(t * angle) * end) / torch.sin(angle)


def model_stock(base: Tensor, tensors: Sequence[Tensor], filter_wise: bool = False) -> Tensor:
    """Between the base and the parents' mean, as near to the mean as their changes agree (arXiv 2403.19522).

    With M parents whose changes have the mean pairwise cosine c, the share of the mean is M·c / (1 + (M - 1)·c). Where
    there is none (changes that cancel), the base stays.

    Args:
        base: that they were trained from.
        tensors: of two parents or more.
        filter_wise: a share for each row of the last dimension, instead of one for the tensor.
    """
    shape = base.shape
    rows = (lambda x: x.reshape(-1, x.shape[-1]) if x.dim() > 1 else x[None]) if filter_wise else (
        lambda x: x.reshape(1, -1))  # fmt: skip
    start, ends = rows(base), [rows(tensor) for tensor in tensors]
    cosines = [
        torch.nn.functional.cosine_similarity(a - start, b - start, dim=-1, eps=1e-12)
        for a, b in itertools.combinations(ends, 2)
    ]
    cosine, count = torch.stack(cosines).mean(dim=0)[:, None], len(ends)
    below = 1 + (count - 1) * cosine
    share = torch.where(below.abs() < 1e-6, 0.0, count * cosine / torch.where(below.abs() < 1e-6, 1.0, below))
    return (share * (sum(ends) / count) + (1 - share) * start).reshape(shape)


# --- of what changed since the base -----------------------------------------------------------------------------------


def largest(change: Tensor, density: float) -> Tensor:
    """A change with its smallest numbers set to 0: a share `density` stays, at least one (TIES' trimming)."""
    if density >= 1:
        return change
    count = max(1, int(density * change.numel())) if density > 0 else 0
    kept = torch.zeros(change.numel(), dtype=torch.bool)
    kept[torch.argsort(change.abs().reshape(-1), descending=True, stable=True)[:count]] = True
    return change * kept.reshape(change.shape)


def random(change: Tensor, density: float, rescale: bool, generator: torch.Generator) -> Tensor:
    """A change with numbers set to 0 at random; those that stay are divided by `density` (DARE, arXiv 2311.03099)."""
    if density >= 1:
        return change
    kept = torch.rand(change.shape, generator=generator) < density
    return change * kept / (density if rescale and density > 0 else 1.0)


def keep_chances(change: Tensor, density: float, epsilon: float) -> Tensor:
    """DELLA's chance of each number to stay: by its rank in its row, from `density` - ε to `density` + ε."""
    ranks = change.abs().argsort(dim=-1, stable=True).argsort(dim=-1, stable=True).to(change.dtype)
    return density - epsilon + 2 * epsilon * ranks / max(change.shape[-1] - 1, 1)


def by_magnitude(change: Tensor, density: float, epsilon: float, rescale: bool, generator: torch.Generator) -> Tensor:
    """As `random`, but larger numbers stay more often: each is divided by its own chance (DELLA, arXiv 2406.11617)."""
    if density >= 1 or not change.dim():
        return change
    chances = keep_chances(change, density, epsilon)
    kept = torch.rand(change.shape, generator=generator) < chances
    return change * kept / (chances if rescale else 1.0)


def added(base: Tensor, changes: Sequence[Tensor], numbers: Numbers) -> Tensor:
    """Task arithmetic (arXiv 2212.04089): the base and `scale` times the weighted sum of the changes."""
    total = linear(changes, numbers.weights, normalize=False)
    divisor = sum(numbers.weights)
    if numbers.normalize and abs(divisor) >= _SMALLEST:
        total = total / divisor
    return base + numbers.scale * total


def elected(base: Tensor, changes: Sequence[Tensor], numbers: Numbers) -> Tensor:
    """TIES (arXiv 2306.01708): of the weighted changes those whose sign is that of their sum, number by number.

    With `normalize` their mean by weight, as in the paper; else their sum.
    """
    weighted = [change * weight for change, weight in zip(changes, numbers.weights, strict=True)]
    sign = torch.where(torch.stack(weighted).sum(dim=0) >= 0, 1.0, -1.0).to(base.dtype)
    total, divisor = torch.zeros_like(base), torch.zeros_like(base)
    for change, weight in zip(weighted, numbers.weights, strict=True):
        agrees = (change.sign() == sign).to(base.dtype)
        total += change * agrees
        divisor += weight * agrees
    if numbers.normalize:
        total = total / torch.where(divisor == 0, 1.0, divisor)
    return base + numbers.scale * total


# --- by name ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """What a method of the YAML takes.

    Attributes:
        of_models: parameters that each parent has, and their defaults; None: it must be given.
        shared: parameters that all have in common, likewise.
        needs_base: whether it is about what changed since `base_model`.
        min_parents: beside the base.
        max_parents: likewise; None: any number.
        paper: where it is told.
    """

    of_models: dict[str, float | None]
    shared: dict[str, float | bool | None]
    needs_base: bool = True
    min_parents: int = 1
    max_parents: int | None = None
    paper: str = ""


_DENSITY = {"weight": None, "density": 1.0}
_DELLA = {**_DENSITY, "epsilon": 0.15}
METHODS: dict[str, Method] = {
    "linear": Method({"weight": None}, {"normalize": True}, False, 2, paper="https://arxiv.org/abs/2203.05482"),
    "slerp": Method({}, {"t": None}, True, 1, 1, "https://doi.org/10.1145/325334.325242"),
    "task_arithmetic": Method(
        {"weight": None}, {"lambda": 1.0, "normalize": False}, paper="https://arxiv.org/abs/2212.04089"
    ),
    "ties": Method(_DENSITY, {"lambda": 1.0, "normalize": True}, paper="https://arxiv.org/abs/2306.01708"),
    "dare_linear": Method(
        _DENSITY, {"lambda": 1.0, "normalize": False, "rescale": True}, paper="https://arxiv.org/abs/2311.03099"
    ),
    "dare_ties": Method(
        _DENSITY, {"lambda": 1.0, "normalize": False, "rescale": True}, paper="https://arxiv.org/abs/2311.03099"
    ),
    "della": Method(
        _DELLA, {"lambda": 1.0, "normalize": True, "rescale": True}, paper="https://arxiv.org/abs/2406.11617"
    ),
    "della_linear": Method(
        _DELLA, {"lambda": 1.0, "normalize": False, "rescale": True}, paper="https://arxiv.org/abs/2406.11617"
    ),
    "model_stock": Method({}, {"filter_wise": False}, True, 2, paper="https://arxiv.org/abs/2403.19522"),
}
"""Names, parameters and defaults are mergekit's."""


def merged(
    method: str,
    base: Tensor | None,
    tensors: Sequence[Tensor],
    numbers: Numbers,
    generator_of: Callable[[int], torch.Generator],
) -> Tensor:
    """One tensor of a merged model.

    Args:
        method: of `METHODS`.
        base: of the base; None for a method without one.
        tensors: of the other parents.
        numbers: for this tensor.
        generator_of: gives the generator of a parent, by its place; asked by methods that draw.

    Returns:
        In the dtype of the inputs.
    """
    if method == "linear":
        return linear(tensors, numbers.weights, numbers.normalize)
    assert base is not None, method
    if method == "slerp":
        return slerp(base, tensors[0], numbers.t)
    if method == "model_stock":
        return model_stock(base, tensors, numbers.filter_wise)
    changes = [tensor - base for tensor in tensors]
    for place, change in enumerate(changes):
        match method:
            case "ties":
                changes[place] = largest(change, numbers.densities[place])
            case "dare_linear" | "dare_ties":
                changes[place] = random(change, numbers.densities[place], numbers.rescale, generator_of(place))
            case "della" | "della_linear":
                changes[place] = by_magnitude(
                    change, numbers.densities[place], numbers.epsilons[place], numbers.rescale, generator_of(place)
                )
    return (elected if method in ("ties", "dare_ties", "della") else added)(base, changes, numbers)
