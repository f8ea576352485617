"""A sweep for a scaling law: sizes, lengths and variants of one base, each training with a horizon of its own.

Learning rates follow a rule that the plan tells, since the best one falls as models grow; so does every schedule that
is a share of a run's steps.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmllm import paths
from mmllm.parsing import parse, read_yaml
from mmllm.studies.measures import Measure
from mmllm.studies.study import Data, check_keys

_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
"""Numbers that YAML 1.1 takes for text: 1e6, which it wants to be 1.0e+6."""


@dataclass(frozen=True)
class RateRule:
    """Learning rates by size: the config's, times (parameters / at) ** exponent.

    Attributes:
        at: parameters, those a token passes, at which the config's own rates hold.
        exponent: below 0, larger models learn at lower rates; 0: all at the same.
        keys: of the config, that are rates.
    """

    at: float = 1.0
    exponent: float = 0.0
    keys: tuple[str, ...] = ("model.init_args.optimizer.lr",)

    def __post_init__(self) -> None:
        if not self.at > 0:
            raise ValueError(f"rate.at is {self.at}; it must be a positive number of parameters")

    def factor(self, parameters: float) -> float:
        """Of a size."""
        return (parameters / self.at) ** self.exponent


@dataclass(frozen=True)
class Variant:
    """Changes of the base: dense or experts, one modality or all, an optimizer.

    Attributes:
        config: dotted keys of the config and their values; null takes a key out.
        recipe: likewise of the recipe.
    """

    config: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """Trainings beyond the sweep, on which a law is checked: they are left out of its fit.

    Attributes:
        sizes: as of the sweep.
        tokens: that they are trained on.
    """

    sizes: dict[str, dict[str, Any]]
    tokens: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """One training of a sweep.

    Attributes:
        variant: name of.
        size: name of.
        amount: tokens, or flops where the sweep is of flops.
        is_flops: which.
        share: of the documents; below 1 they come again sooner.
        rate: multiple of the rule's learning rate.
        batch_size: None: the config's.
        seed: of weights and order.
        is_check: it is no part of a fit.
    """

    variant: str
    size: str
    amount: float
    is_flops: bool = False
    share: float = 1.0
    rate: float = 1.0
    batch_size: int | None = None
    seed: int = 0
    is_check: bool = False

    @property
    def name(self) -> str:
        """Of its folder."""
        parts = [self.variant, self.size, f"{'c' if self.is_flops else 't'}{self.amount:.4g}"]
        parts += [f"share{self.share:g}"] if self.share != 1 else []
        parts += [f"rate{self.rate:g}"] if self.rate != 1 else []
        parts += [f"batch{self.batch_size}"] if self.batch_size is not None else []
        return "-".join([*parts, f"seed{self.seed}"]).replace("/", "_").replace(" ", "_").replace("+", "")


@dataclass(frozen=True)
class Sweep:
    """What is swept.

    Attributes:
        title: of reports.
        data: what all runs read; see `mmllm.studies.study.Data`.
        config: of the base: a config of `mmllm fit`; `{data}` in its values is replaced.
        recipe: of the base.
        heldout: recipe of held-out documents, whose loss is measured, by source and modality: a file, or the recipe
            itself. `{data}` in it is replaced, and `{prepared}` by the folder that `prepare` makes.
        sizes: by name, dotted keys of the config.
        tokens: lengths; or
        flops: budgets of 6·N·D, N the parameters that a token passes, of which each size has as many tokens as it
            pays for.
        variants: by name; each is a law of its own.
        shares: of the documents: smaller ones are repeated more often.
        rates: multiples of the rule's learning rate, to find the best.
        batch_sizes: none: the config's.
        seeds: of weights and order.
        rate: rule of learning rates.
        check: larger trainings, on which the law is checked; None: none.
        set: dotted keys of the config, for all runs.
        set_recipe: dotted keys of the recipe, for all runs.
        prepare: commands of `mmllm` that make what is held out, into `{prepared}`, once a sweep.
        measures: scores of `mmllm eval`, beside the loss.
        num_heldout_sequences: at most.
        is_law: whether a law is to be fitted: then grids that can't tell one are refused.
    """

    title: str
    data: Data
    config: str
    recipe: str
    heldout: str | dict[str, Any]
    sizes: dict[str, dict[str, Any]]
    tokens: tuple[float, ...] = ()
    flops: tuple[float, ...] = ()
    variants: dict[str, Variant] = field(default_factory=lambda: {"base": Variant()})
    shares: tuple[float, ...] = (1.0,)
    rates: tuple[float, ...] = (1.0,)
    batch_sizes: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (0,)
    rate: RateRule = field(default_factory=RateRule)
    check: Check | None = None
    set: dict[str, Any] = field(default_factory=dict)
    set_recipe: dict[str, Any] = field(default_factory=dict)
    prepare: tuple[str, ...] = ()
    measures: tuple[Measure, ...] = ()
    num_heldout_sequences: int = 256
    is_law: bool = True

    def __post_init__(self) -> None:
        if bool(self.tokens) == bool(self.flops):
            raise ValueError("the sweep has tokens and flops, or neither; give one of them, a list of numbers")
        if self.num_heldout_sequences < 1:
            raise ValueError(f"num_heldout_sequences is {self.num_heldout_sequences}; it must be at least 1")
        for name in ("sizes", "variants", "shares", "rates", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give one at least")
        for name in ("tokens", "flops", "shares", "rates", "batch_sizes", "seeds"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} is {list(values)}; give each value once")
            if name != "seeds" and any(not value > 0 for value in values):
                raise ValueError(f"{name} is {list(values)}; all must be positive")
        if any(share > 1 for share in self.shares):
            raise ValueError(f"shares is {list(self.shares)}; they are of the documents, 1 at most")
        given = {"set": self.set, "set_recipe": self.set_recipe}
        for name, variant in self.variants.items():
            given |= {f"variants.{name}.config": variant.config, f"variants.{name}.recipe": variant.recipe}
        given |= {f"sizes.{name}": keys for name, keys in self.sizes.items()}
        given |= {f"check.sizes.{name}": keys for name, keys in (self.check.sizes if self.check else {}).items()}
        check_keys(given, "the grid")
        names = [run.name for run in self.runs()]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two runs would have the folder {twice}; their names, tokens or flops are too near")

    def runs(self) -> list[Run]:
        """All trainings, the smallest first; those of the check last."""
        batches: tuple[int | None, ...] = self.batch_sizes or (None,)
        amounts, is_flops = (self.flops, True) if self.flops else (self.tokens, False)
        rest = list(itertools.product(self.variants, self.sizes, self.shares, self.rates, batches, self.seeds))
        runs = [
            Run(variant, size, amount, is_flops, share, rate, batch, seed)
            for amount in sorted(amounts)
            for variant, size, share, rate, batch, seed in rest
        ]
        if self.check is not None:
            runs += [
                Run(variant, size, amount, seed=seed, is_check=True)
                for amount, variant, size, seed in itertools.product(
                    self.check.tokens, self.variants, self.check.sizes, self.seeds
                )
            ]
        return runs

    def size(self, run: Run) -> dict[str, Any]:
        """The keys that make a run's size."""
        if run.is_check:
            assert self.check is not None
            return self.check.sizes[run.size]
        return self.sizes[run.size]


def load_sweep(path: str | Path, data: str | None = None) -> tuple[Sweep, dict[str, Any]]:
    """A sweep from its YAML, and the YAML's values.

    Args:
        path: the YAML, or the name of a shipped one.
        data: a folder that is there, in the place of the sweep's own.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it isn't YAML, or a key is unknown, missing, or has a wrong value.
    """
    path = paths.find_config(str(path))
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such plan of a sweep; give its YAML")
    values = read_yaml(path)
    if data is not None and isinstance(values, dict):
        values["data"] = {"folder": data}
    try:
        return sweep_of(values), values
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def sweep_of(values: Any) -> Sweep:
    """A sweep from plain dicts and lists, checked.

    Raises:
        ValueError: a key is unknown, missing, or has a wrong value; the message names it.
    """
    return parse(Sweep, _with_numbers(values), what="the sweep")


def _with_numbers(value: Any) -> Any:
    """`1e6` is a number to whoever writes it."""
    if isinstance(value, dict):
        return {key: _with_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value
