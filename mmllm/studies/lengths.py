"""How long a training is under a budget, from its plan: documents, tokens and operations, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mmllm.data.loading.datamodules import PackedDataModule
from mmllm.data.plan.plan import Plan
from mmllm.data.plan.recipe import recipe_from_dict
from mmllm.model.flops import ModelFlops
from mmllm.quickstart.plan import write_yaml
from mmllm.studies.settings import Settings, put
from mmllm.studies.study import Study
from mmllm.training.decoder_module import DecoderModule
from mmllm.training.estimate import model_config, planned_work
from mmllm.training.lightning_cli import unbuilt
from mmllm.training.parts import flops_of
from mmllm.training.planned_prompts import PlannedPrompts

GUESSED_STEPS = 100
"""A horizon to begin with, where schedules depend on the number of steps that is sought."""
MOST_STEPS = 1_000_000
_MISSED = 0.1
"""Trainings that miss their share of the budget by more of it, because a step is large, are refused."""


@dataclass(frozen=True)
class Length:
    """How long a training is.

    Attributes:
        steps: of the optimizer.
        samples: documents, repeated ones each time.
        tokens: of the decoder, without padding.
        flops: forward and backward, of what a token passes; every token of a document counts as a target.
    """

    steps: int = 0
    samples: int = 0
    tokens: int = 0
    flops: float = 0.0

    def __add__(self, other: Length) -> Length:
        return Length(*(mine + its for mine, its in zip(asdict(self).values(), asdict(other).values(), strict=True)))


@dataclass(frozen=True)
class Training:
    """One training, with its files written."""

    config: Path
    length: Length
    documents: int
    """Rows that its plan may draw from, each once; of the curve's sources where the study names some."""
    seconds: float | None = None
    """That bound it; None: its steps do."""


def write_training(study: Study, settings: Settings, share: float, run: Path, name: str) -> Training:
    """Writes a training's config and recipe, with a horizon that uses its share of the budget.

    Args:
        study: whose; its budget is that of a whole run.
        settings: without a horizon.
        share: of the budget.
        run: the run's folder.
        name: of the training in it.

    Raises:
        ValueError: a key of config or recipe is unknown or has a wrong value, the recipe's documents end before, or a
            step is so large that the budget is missed.
    """
    budget = study.budget
    amount = budget.amount * share
    if budget.kind == "seconds":
        config = write_files(settings.with_seconds(amount), run, name)
        return Training(config, Length(), _num_documents(opened(config)[1], study), amount)
    sized = settings.with_steps(GUESSED_STEPS)
    plan, length = _counted_until(sized, run, name, budget.kind, amount)
    if _read(settings.with_steps(length.steps)) != _read(sized):  # the plan depends on the horizon: it is nearly right
        plan, length = _counted_until(settings.with_steps(length.steps), run, name, budget.kind, amount)
    used = getattr(length, budget.kind)
    if abs(used - amount) > _MISSED * amount:
        raise ValueError(
            f"a whole number of steps comes no nearer to {amount:,.6g} {budget.kind} than {used:,.6g} "
            f"({length.steps} steps); lower data.init_args.batch_size or trainer.accumulate_grad_batches, or raise the "
            f"budget"
        )
    config = write_files(settings.with_steps(length.steps), run, name)
    return Training(config, length, _num_documents(plan, study))


def _counted_until(settings: Settings, run: Path, name: str, kind: str, amount: float) -> tuple[Plan, Length]:
    counter, plan, accumulated = opened(write_files(settings, run, name))
    return plan, until(counter, plan, accumulated, kind, amount)


def _read(settings: Settings) -> Any:
    """What a plan is made of."""
    keys = settings.config.get("data", {}).get("init_args", {})
    return settings.recipe, {key: value for key, value in keys.items() if key != "recipe"}


def _num_documents(plan: Plan, study: Study) -> int:
    names = study.curve_sources or [source.config.name for source in plan.sources]
    return sum(source.num_documents for source in plan.sources if source.config.name in names)


def length_of(config: Path, num_steps: int) -> Length:
    """How long so many steps of a training are."""
    counter, plan, accumulated = opened(config)
    return _counted(counter, plan, num_steps * accumulated, accumulated)


def write_files(settings: Settings, run: Path, name: str) -> Path:
    """Writes a training's config and recipe into a run's folder; gives the config's path."""
    path, recipe = run / f"{name}.yaml", run / f"{name}.recipe.yaml"
    write_yaml(recipe, settings.recipe, "Written by `mmllm study run`.")
    put(settings.config, "data.init_args.recipe", str(recipe))
    write_yaml(path, settings.config, f"Written by `mmllm study run`. Again: mmllm fit -c {path} --overwrite")
    return path


def opened(path: Path) -> tuple[ModelFlops, Plan, int]:
    """What counts, what is counted, and batches a step."""
    module, data, accumulated = read_training(path)
    return flops_of(model_config(module), module.optimizer, module.adapter), data.plan, accumulated


def read_training(path: Path) -> tuple[DecoderModule, PackedDataModule, int]:
    """A config's module and data, neither of them built, and batches a step.

    Raises:
        ValueError: a key is unknown or has a wrong value, or it trains something else.
    """
    module, data, trainer = unbuilt(["-c", str(path)])
    if not isinstance(module, DecoderModule) or not isinstance(data, PackedDataModule):
        raise ValueError(
            f"{path}: studies and sweeps train DecoderModule with PackedDataModule, or what is made of them, and the "
            f"config has {type(module).__name__} with {type(data).__name__}"
        )
    return module, data, int(trainer.get("accumulate_grad_batches") or 1)


def until(counter: ModelFlops, plan: Plan, accumulated: int, kind: str, amount: float) -> Length:
    """The steps of a plan until so many samples, tokens or flops are used up: the last one is that which comes nearest.

    Args:
        counter: of flops.
        plan: whose steps.
        accumulated: batches a step.
        kind: a field of `Length`.
        amount: how much of it.

    Raises:
        ValueError: the documents end before.
    """
    length, prompts = Length(), _prompts(counter, plan)
    steps = plan.steps()
    while length.steps < MOST_STEPS:
        more = _length(counter, plan, list(islice(steps, accumulated)), prompts)
        if not more.samples:
            raise ValueError(
                f"the recipe's documents end after {length.steps} steps with {getattr(length, kind):,} "
                f"{kind} of the budget's {amount:,.0f}; set mixture.on_exhausted to repeat, or lower the budget"
            )
        used, after = getattr(length, kind), getattr(length + more, kind)
        if length.steps and abs(used - amount) <= abs(after - amount):
            break
        length = length + more
    return length


def _counted(counter: ModelFlops, plan: Plan, num_batches: int, accumulated: int) -> Length:
    length, prompts = Length(), _prompts(counter, plan)
    steps = islice(plan.steps(), num_batches)
    while batch := list(islice(steps, accumulated)):
        length = length + _length(counter, plan, batch, prompts)
    return length


def _prompts(counter: ModelFlops, plan: Plan) -> PlannedPrompts | None:
    """What tells an encoder's tokens; None: the model has none."""
    return PlannedPrompts(plan) if counter.per_prompt_token else None


def _length(counter: ModelFlops, plan: Plan, batches: Sequence[Any], prompts: PlannedPrompts | None) -> Length:
    work = planned_work(plan, batches, prompts)
    return Length(1 if batches else 0, len(work.lengths), work.num_tokens, float(counter.training(work)))


def check_training(settings: Settings, kind: str, run: Path, name: str) -> None:
    """Checks the keys of a training that can't be counted yet, since the model that it starts from isn't there.

    Args:
        settings: without a horizon.
        kind: of the budget.
        run: folder for its files.
        name: of the training in it.

    Raises:
        ValueError: a key of config or recipe is unknown or has a wrong value.
    """
    ready = settings.with_seconds(1.0) if kind == "seconds" else settings.with_steps(GUESSED_STEPS)
    recipe_from_dict(ready.recipe)
    put(ready.config, "model.init_args.init_from", None)
    if "decoder" not in ready.config["model"]["init_args"]:  # it is that of the model to come
        put(ready.config, "model.init_args.decoder", {"vocab_size": 1})
    unbuilt(["-c", str(write_files(ready, run, name))])


def check_recipe(settings: Settings) -> None:
    """Raises ValueError where a recipe has an unknown key or a wrong value, before any of its files is there."""
    recipe_from_dict(settings.with_steps(GUESSED_STEPS).recipe)
