"""What `mmllm merge` is asked for: mergekit's YAML (https://github.com/arcee-ai/mergekit), and keys of our own.

A parameter is a number; a list of numbers, interpolated over the layers; or a list of `{filter, value}`, of which the
first counts whose `filter` is part of the tensor's name ("*" or none: always). A model's own parameters come before
those of its slice, and these before those of the whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mmllm.interop.merging.formulas import METHODS, Method, Numbers

BRANCHES = "branch_train_mix"
"""The method that makes experts of dense models."""
ADAPTER_METHODS = (
    "svd", "linear", "cat", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
"""PEFT's `combination_type`."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
Setting = Any
"""A number, a list, or filters: as the YAML has it, checked."""


@dataclass(frozen=True)
class Alignment:
    """How experts are brought into one order before they are merged.

    Attributes:
        by: "weight": experts of like weights; "activation": experts that answer alike; "none".
        manifest: of "activation", rows that are shown.
        limit: at most so many of each kind.
    """

    by: str = "none"
    manifest: str | None = None
    limit: int = 64

    def __post_init__(self) -> None:
        if self.by not in ("weight", "activation", "none"):
            raise ValueError(f"align_experts is {self.by!r}; choose weight, activation or none")
        if (self.by == "activation") != (self.manifest is not None):
            raise ValueError(
                f"align_experts is by {self.by} and its manifest {self.manifest!r}; activations need rows, and nothing "
                f"else does: write align_experts: {{by: activation, manifest: FILE}}"
            )
        if not isinstance(self.limit, int) or self.limit < 1:
            raise ValueError(f"align_experts.limit is {self.limit!r}; give a number of rows")


@dataclass(frozen=True)
class Part:
    """Some layers, or all that there is, with what the parents' parameters are there.

    Attributes:
        layers: first and behind the last; None: everything.
        models: parameters of each parent, by its path.
        parameters: that they have in common.
    """

    layers: tuple[int, int] | None
    models: Mapping[str, Mapping[str, Setting]]
    parameters: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class MergeConfig:
    """A parsed `CONFIG.yaml`. Paths are the user's own; `DIR+NAME` is a folder's model with its adapter in it."""

    method: str
    parents: tuple[str, ...]
    """Beside the base, in the order of the file."""
    base: str | None
    parts: tuple[Part, ...]
    parameters: Mapping[str, Setting]
    dtype: torch.dtype | None = None
    seed: int = 0
    engine: str = "mmllm"
    align: Alignment = field(default_factory=Alignment)
    evolve: Mapping[str, Any] | None = None
    adapter: str | None = None
    experts_per_token: int = 2
    text: str = ""
    """The YAML, for the card."""

    @property
    def rule(self) -> Method:
        """What the method takes."""
        return METHODS[self.method]

    @property
    def first(self) -> str:
        """The parent that others are compared with, and whose settings the merged model has."""
        return self.base or self.parents[0]

    @property
    def every_parent(self) -> tuple[str, ...]:
        """With the base, which comes first."""
        return self.parents if self.base is None else (self.base, *self.parents)

    def numbers(self, name: str, num_layers: int) -> Numbers:
        """What the method takes for a tensor.

        Args:
            name: of the tensor.
            num_layers: of the decoder, over which gradients run.

        Raises:
            ValueError: a parameter is missing, or weights don't sum to what they must.
        """
        part, place = self.part_of(name, num_layers)

        def of_model(key: str) -> tuple[float, ...]:
            levels = [(part.models[model], part.parameters, self.parameters) for model in self.parents]
            default = self.rule.of_models[key]
            return tuple(
                float(_found(key, name, place, each, default, model))
                for model, each in zip(self.parents, levels, strict=True)
            )

        def shared(key: str) -> Any:
            return _found(key, name, place, (part.parameters, self.parameters), self.rule.shared[key], None)

        kinds = {"weight": "weights", "density": "densities", "epsilon": "epsilons"}
        values: dict[str, Any] = {kinds[key]: of_model(key) for key in self.rule.of_models}
        values |= {{"lambda": "scale"}.get(key, key): shared(key) for key in self.rule.shared}
        numbers = Numbers(**values)
        self._check(name, numbers)
        return numbers

    def part_of(self, name: str, num_layers: int) -> tuple[Part, float]:
        """The part that a tensor belongs to, and how deep in it the tensor lies, from 0 to 1."""
        found = _LAYER.match(name)
        if found is None:  # mergekit gives what isn't in a layer the gradient's beginning
            last = self.parts[-1] if name.startswith(("decoder.norm.", "decoder.lm_head.")) else self.parts[0]
            return last, 0.0
        layer = int(found[1])
        for part in self.parts:
            first, end = part.layers or (0, num_layers)
            if first <= layer < end:
                return part, (layer - first) / (end - first - 1) if end - first > 1 else 1.0
        raise AssertionError(name)

    def _check(self, name: str, numbers: Numbers) -> None:
        total = sum(numbers.weights)
        if self.method == "linear":
            if numbers.normalize and abs(total) < 1e-6:
                raise ValueError(f"the weights of {name} sum to {total:g}, by which they would be divided; change them")
            if not numbers.normalize and abs(total - 1) > 1e-4:
                raise ValueError(
                    f"the weights of {name} sum to {total:g} and normalize is false; whole weights that are added must "
                    f"sum to 1: change them, or leave normalize out"
                )
        for density, epsilon in zip(numbers.densities, numbers.epsilons, strict=False):
            if density < 1 and not epsilon < density < 1 - epsilon:
                raise ValueError(
                    f"density is {density:g} and epsilon {epsilon:g} for {name}; density - epsilon and density + "
                    f"epsilon must lie between 0 and 1: lower epsilon"
                )

    def check_layers(self, num_layers: int) -> None:
        """Raises ValueError where slices don't cover the decoder's layers, each once and in order."""
        if self.parts[0].layers is None:
            return
        ranges = [part.layers for part in self.parts if part.layers is not None]
        ends = [0, *(end for _, end in ranges)]
        if [first for first, _ in ranges] != ends[:-1] or ends[-1] != num_layers:
            raise ValueError(
                f"slices have the layers {', '.join(f'{first} to {end}' for first, end in ranges)}, the decoder 0 to "
                f"{num_layers}; cover each once and in order: layers aren't left out, doubled or moved here"
            )

    def check_filters(self, names: Iterable[str]) -> None:
        """Raises ValueError where a filter is part of no tensor's name."""
        names = list(names)
        groups = [self.parameters, *(part.parameters for part in self.parts)]
        groups += [own for part in self.parts for own in part.models.values()]
        for key, pattern in ((key, p) for group in groups for key, setting in group.items() for p in _filters(setting)):
            if not any(pattern in name for name in names):
                raise ValueError(f"{key} has the filter {pattern!r}, which is part of no tensor's name; see --check")


def weights_of(config: MergeConfig, name: str, num_layers: int) -> tuple[float, ...]:
    """The share of each parent in a tensor's mean, where `weight` may be left out: then all are equal.

    Raises:
        ValueError: they sum to 0.
    """
    part, place = config.part_of(name, num_layers)
    found = [
        float(_found("weight", name, place, (part.models[model], part.parameters, config.parameters), 1.0, model))
        for model in config.parents
    ]
    if abs(sum(found)) < 1e-6:
        raise ValueError(f"the weights of {name} sum to {sum(found):g}, by which they would be divided; change them")
    return tuple(found)


def _found(
    key: str, name: str, place: float, levels: Sequence[Mapping[str, Setting]], default: Any, model: str | None
) -> Any:
    for settings in levels:
        value = _value(settings[key], name, place) if key in settings else None
        if value is not None:
            return value
    if default is None:
        raise ValueError(
            f"{key} is missing for {name}{f' of {model}' if model else ''}; give it, or end its filters with one "
            f"{{value: …}} for all others"
        )
    return default


def _value(setting: Setting, name: str, place: float) -> Any:
    """A parameter's value for a tensor; None where no filter fits."""
    if not isinstance(setting, list):
        return setting
    if isinstance(setting[0], Mapping):
        for each in setting:
            if each["filter"] in (None, "*") or each["filter"] in name:
                return _value(each["value"], name, place)
        return None
    if isinstance(setting[0], bool):
        return setting[int(place * (len(setting) - 1))]
    before = min(int(place * (len(setting) - 1)), len(setting) - 1)
    after, between = min(before + 1, len(setting) - 1), place * (len(setting) - 1) - before
    return (1 - between) * setting[before] + between * setting[after]


def _filters(setting: Setting) -> Iterator[str]:
    if isinstance(setting, list) and isinstance(setting[0], Mapping):
        yield from (each["filter"] for each in setting if each["filter"] not in (None, "*"))
