"""A recipe: which sources, in what shares, how long, in what order of difficulty.

Paths in a recipe are relative to the working directory, or else to the recipe's own folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmllm.data.expressions import compile_filter
from mmllm.data.samples.documents import KIND_TASKS
from mmllm.data.samples.masked_spans import KINDS, MASKED, MaskedSpansConfig
from mmllm.data.samples.templates import check_template
from mmllm.parsing import parse, read_yaml

METRICS = ("num_tokens", "length", "rarity", "mean_rarity", "image_area", "seconds", "num_frames", "num_images")
"""Of a curriculum; besides, any numeric metadata column."""
DEFAULT_ALPHA = 0.5
"""Of a source's `balance`."""


@dataclass(frozen=True)
class SourceConfig:
    """One source of documents."""

    name: str
    kind: Literal["caption", "interleaved", "text", "audio"]
    shards: str | list[str]
    """A path, a glob or brace ranges, or several."""
    weight: float = 1.0
    weight_schedule: list[list[float]] | None = None
    """`[[step, weight], …]` instead of `weight`: linear between the points, constant outside; two points at one step
    make a jump."""
    max_epochs: float | None = None
    """How often its documents may be drawn; `None`: without end. Not together with a curriculum."""
    filter: str | None = None
    """Which rows, e.g. `"not perturbed and width >= 64"`."""
    share: float | None = None
    """Of its rows only so many, 0 to 1, drawn by the recipe's seed: those of a smaller share are among those of a
    larger one. For learning curves."""
    max_documents: int | None = None
    """At most this many documents of each task type, drawn by the recipe's seed: an instruction mixture's cap."""
    heldout_tasks: list[str] | None = None
    """Task types whose documents are never drawn, so that they can be tested."""
    task_column: str | None = None
    """The rows' key that says a document's task type; by default `task`."""
    balance: str | None = None
    """A key of the rows, such as the `topic` that `mmllm data topics` writes, by whose values documents are drawn in
    other shares than there are: a value of n documents gets n^balance_alpha, counted in documents. An epoch then
    draws only some of the more frequent ones. Not together with a curriculum of the source."""
    balance_alpha: float | None = None
    """0: as many documents of each value; 1: as many as there are. By default 0.5."""
    anchor_prompt: str | None = None
    """One fixed text in front of each of its documents, which is not to be predicted (TELL,
    https://arxiv.org/abs/2404.00914); of a conversation, the system's. Opening the recipe then reads every conversation
    once, to count."""
    tasks: list[str] | None = None
    """Each sample is one document per task. By default: audio as transcribe and speak, others as their kind."""
    task_weights: list[float] | None = None
    """Share of the documents drawn as each task, relative to the largest."""
    masked_spans: MaskedSpansConfig | None = None
    """A share of its texts or captions is learned by filling in: the prompt has spans left out, and the answer is those
    spans (T5, https://arxiv.org/abs/1910.10683). Which documents and which spans is drawn anew in every epoch."""
    max_images: int | None = None
    """Documents with more pictures are left out."""
    text_key: str | None = None
    """The key of a sample's json that holds its text where it has no txt, e.g. `caption`; `mmllm data index --text_key`
    must have been told the same."""
    remote: Literal["spans", "shards"] = "spans"
    """How remote shards are fetched: the documents that are needed, or once any of them is, the whole shard into the
    cache (fewer requests; the cache must hold what is shuffled together). The documents are the same."""
    templates: dict[str, dict[str, str]] | None = None
    """How this source's tasks are written instead of the tokenizer's way: `{caption: {prompt: …, target: …}}`, with the
    same fields. For `chat`, opening the recipe reads every conversation once, to count its turns."""

    def __post_init__(self) -> None:
        if self.kind not in KIND_TASKS:
            raise ValueError(f"source {self.name!r}: kind is {self.kind!r}; it must be one of {', '.join(KIND_TASKS)}")
        if not self.weight > 0:
            raise ValueError(f"source {self.name!r}: weight is {self.weight}; it must be above 0 (or leave it out)")
        if self.weight_schedule is not None:
            _check_schedule(self.weight_schedule, f"source {self.name!r}: weight_schedule")
        if self.max_epochs is not None and not self.max_epochs > 0:
            raise ValueError(f"source {self.name!r}: max_epochs is {self.max_epochs}; it must be above 0")
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"source {self.name!r}: share is {self.share}; it must be above 0 and at most 1")
        known = KIND_TASKS[self.kind]
        for task in self.tasks or ():
            if task not in known:
                raise ValueError(f"source {self.name!r}: task {task!r}; kind {self.kind} has {', '.join(known)}")
        if self.tasks is not None and (not self.tasks or len(set(self.tasks)) != len(self.tasks)):
            raise ValueError(f"source {self.name!r}: tasks is {self.tasks}; name each task once, and at least one")
        if self.task_weights is not None and (
            len(self.task_weights) != len(self.task_names) or not all(weight > 0 for weight in self.task_weights)
        ):
            raise ValueError(
                f"source {self.name!r}: task_weights is {self.task_weights}; give a weight above 0 for each of "
                f"{', '.join(self.task_names)}"
            )
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"source {self.name!r}: max_documents is {self.max_documents}; it must be at least 1")
        if self.heldout_tasks is not None and not self.heldout_tasks:
            raise ValueError(f"source {self.name!r}: heldout_tasks is empty; name a task type, or leave it out")
        if self.task_column is not None and self.max_documents is None and self.heldout_tasks is None:
            raise ValueError(
                f"source {self.name!r}: task_column is {self.task_column!r}, which max_documents and heldout_tasks "
                f"read; give one of them, or leave it out"
            )
        if self.balance_alpha is not None and (self.balance is None or not 0 <= self.balance_alpha <= 1):
            raise ValueError(
                f"source {self.name!r}: balance_alpha is {self.balance_alpha} and balance {self.balance!r}; give "
                f"balance the key whose values are balanced, and balance_alpha from 0 to 1"
            )
        if self.masked_spans is not None and (self.kind not in KINDS or self.max_documents is not None):
            raise ValueError(
                f"source {self.name!r}: masked_spans is of kinds {' and '.join(KINDS)} without max_documents, and this "
                f"is {self.kind} with max_documents {self.max_documents}; leave it out here"
            )
        if self.anchor_prompt is not None and not self.anchor_prompt.strip():
            raise ValueError(f"source {self.name!r}: anchor_prompt is empty; give a text, or leave it out")
        if self.filter is not None:
            try:
                compile_filter(self.filter)
            except ValueError as error:
                raise ValueError(f"source {self.name!r}: {error}") from error

        for task, template in (self.templates or {}).items():
            if task not in self.task_names or task == "interleaved" or set(template) != {"prompt", "target"}:
                raise ValueError(
                    f"source {self.name!r}: templates.{task} is {template}; give prompt and target, for one of "
                    f"{', '.join(name for name in self.task_names if name != 'interleaved') or 'no task'}"
                )
            for part, text in template.items():
                try:
                    check_template(text)
                except ValueError as error:
                    raise ValueError(
                        f"source {self.name!r}: templates.{task}.{part} is {text!r}: {error}; write {{{{ and }}}} for "
                        f"braces that are text"
                    ) from error
            if task == "chat" and ("{segments}" not in template["prompt"] or "{text}" not in template["target"]):
                raise ValueError(
                    f"source {self.name!r}: templates.chat is {template}; its prompt must have {{segments}}, what is "
                    f"asked, and its target {{text}}, what is answered"
                )

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks its samples are written as."""
        if self.tasks is not None:
            return tuple(self.tasks)
        match self.kind:
            case "audio":
                return KIND_TASKS["audio"]
            case "interleaved":  # conversations are chats, everything else is not
                return ("interleaved", "chat")
        return KIND_TASKS[self.kind][:1]

    @property
    def item_tasks(self) -> tuple[str, ...]:
        """The tasks, and likewise with masked spans where some documents have them."""
        if self.masked_spans is None:
            return self.task_names
        return tuple(form for task in self.task_names for form in (task, MASKED + task))

    def weight_at(self, step: int) -> float:
        """The weight at a step; may be 0 for a while."""
        if self.weight_schedule is None:
            return self.weight
        before = [point for point in self.weight_schedule if point[0] <= step]
        after = [point for point in self.weight_schedule if point[0] > step]
        if not before or not after:
            return (before[-1] if before else after[0])[1]
        (start, first), (stop, last) = before[-1], after[0]
        return first + (last - first) * (step - start) / (stop - start)

    @property
    def largest_weight(self) -> float:
        """The largest weight that it has at any step; above 0."""
        return self.weight if self.weight_schedule is None else max(point[1] for point in self.weight_schedule)


def _check_schedule(points: list[list[float]], where: str) -> None:
    steps = [point[0] for point in points]
    if (
        not points
        or any(len(point) != 2 or min(point) < 0 for point in points)
        or steps != sorted(steps)
        or not any(weight > 0 for _, weight in points)
    ):
        raise ValueError(f"{where} is {points}; give [step, weight] points by ascending step, some weight above 0")


@dataclass(frozen=True)
class TellConfig:
    """Few documents of one task, mixed at random into many general ones (TELL, https://arxiv.org/abs/2404.00914).

    Each document of the task comes with `ratio` general ones: at a random place among them, drawn anew each time, so
    that no stretch of training holds the task alone.
    """

    task: str
    """The source of the task."""
    ratio: float
    """General documents for each of the task's."""
    general: list[str] | None = None
    """The other sources, which share the general part by their weights; by default all."""

    def __post_init__(self) -> None:
        if not self.ratio > 0:
            raise ValueError(f"tell.ratio is {self.ratio}; it must be above 0 (0 is plain fine-tuning: leave tell out)")


@dataclass(frozen=True)
class MixtureConfig:
    """What the weights mean, and what happens when a source that is capped runs out."""

    unit: Literal["tokens", "samples"] = "tokens"
    temperature: float = 1.0
    """Shares are weight^(1/temperature)."""
    on_exhausted: Literal["stop", "renormalize", "repeat"] = "stop"
    """End there; go on with the other sources, to the last row of each, also of those whose weight is 0 then; or draw
    it again all the same."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"mixture.temperature is {self.temperature}; it must be above 0")


@dataclass(frozen=True)
class PackingConfig:
    """How documents share a sequence."""

    algorithm: Literal["best_fit"] = "best_fit"
    window: int = 4096
    """Documents that are packed together."""
    long_documents: Literal["split", "drop"] = "split"
    """Texts longer than a sequence are split into sequences, or left out. Others are always left out."""
    max_images: int | None = None
    """Pictures a sequence may hold, or tiles of pictures that are cut; documents with more are left out."""
    max_frames: int | None = None
    """Frames of sound a sequence may hold (seconds times the tokenizer's frame rate); likewise."""

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"packing.window is {self.window}; it must be at least 1 document")
        for name, limit in (("max_images", self.max_images), ("max_frames", self.max_frames)):
            if limit is not None and limit < 0:
                raise ValueError(f"packing.{name} is {limit}; it must not be negative")


@dataclass(frozen=True)
class CurriculumConfig:
    """Easy first: at step t only the easiest share c(t) of each source is drawn.

    c(t) = min(1, (t·(1 − c₀ᵖ)/T + c₀ᵖ)^(1/p)), p = 1 linear, 2 root (Platanios et al. 2019,
    https://arxiv.org/abs/1903.09848); `exponential` is c₀^(1 − t/T); `step` keeps c₀ until T.
    """

    metric: str = "num_tokens"
    """`num_tokens` (or `length`), `rarity`, `mean_rarity`, `image_area`, `seconds`, `num_frames`, `num_images`, or a
    numeric metadata column. Rarity is the sum of -log p of a text's tokens, p their share in its shard (Platanios et
    al., arXiv 1903.09848), so that long texts are rare, too; `mean_rarity` is the mean, whatever their lengths."""
    order: Literal["easy_first", "hard_first", "random"] = "easy_first"
    """The others are controls: the same pacing over the opposite order, or over one that means nothing."""
    pacing: Literal["linear", "root", "step", "exponential"] = "root"
    start: float = 0.3
    """c₀."""
    steps: int = 1000
    """T."""
    sources: list[str] | None = None
    """Names of those that it orders; the others are drawn from whole from the start. `None`: all are ordered."""

    def __post_init__(self) -> None:
        if not 0 < self.start <= 1 or self.steps < 1:
            raise ValueError(f"curriculum: start is {self.start}, steps {self.steps}; they must be in (0, 1] and >= 1")

    def orders(self, source: str) -> bool:
        """Whether it holds for the source of that name."""
        return self.sources is None or source in self.sources

    def share(self, step: int) -> float:
        """c(step), in (0, 1]."""
        if step >= self.steps:
            return 1.0
        if self.pacing == "step":
            return self.start
        if self.pacing == "exponential":
            return self.start ** (1 - step / self.steps)
        power = 1 if self.pacing == "linear" else 2
        floor = self.start**power
        return min(1.0, (step * (1 - floor) / self.steps + floor) ** (1 / power))


@dataclass(frozen=True)
class OnErrorConfig:
    """What a sample that fails at run time becomes: masked padding of its length, or an error."""

    action: Literal["mask", "raise"] = "mask"
    max_fraction: float = 0.001
    """Of the documents seen (rounded up); more is an error, early in a run only from the eleventh failure on."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_fraction <= 1:
            raise ValueError(f"on_error.max_fraction is {self.max_fraction}; it must be within 0–1")


@dataclass(frozen=True)
class Recipe:
    """The whole recipe."""

    tokenizer: str
    """The tokenizer folder; it alone fixes token counts, the codec and the image slots."""
    sequence_length: int
    sources: list[SourceConfig]
    seed: int = 0
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    packing: PackingConfig = field(default_factory=PackingConfig)
    curriculum: CurriculumConfig | None = None
    tell: TellConfig | None = None
    on_error: OnErrorConfig = field(default_factory=OnErrorConfig)
    folder: str | None = None
    """Where the recipe lies; set by `load_recipe`, never written."""

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length is {self.sequence_length}; it must be at least 2 tokens")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")
        if not self.sources:
            raise ValueError("sources is empty; a recipe needs at least one")
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"sources have the names {names}; give each its own")
        if self.tell is not None:
            self._check_tell(self.tell, names)
        ordered = self._ordered(names)
        balanced = [source.name for source in self.sources if source.balance is not None and source.name in ordered]
        if balanced:
            raise ValueError(
                f"source {balanced[0]!r} has balance and the recipe a curriculum that orders it: the easiest documents "
                f"have other values than all have; leave out one of the two, or name others in curriculum.sources"
            )
        capped = [source.name for source in self.sources if source.max_epochs is not None and source.name in ordered]
        if (
            capped
            and self.curriculum is not None
            and self.curriculum.start < 1
            and self.mixture.on_exhausted != "repeat"
        ):
            # An epoch passes over what is still too hard, and a state of a few numbers can't say what that was.
            raise ValueError(
                f"source {capped[0]!r} has max_epochs and the recipe a curriculum: what the curriculum holds back "
                f"would be counted as drawn; leave out one of the two, or set mixture.on_exhausted to repeat"
            )
        for step in sorted(self._turns()):
            self.shares(step)

    def _check_tell(self, tell: TellConfig, names: list[str]) -> None:
        general = tell.general if tell.general is not None else [name for name in names if name != tell.task]
        wrong = next((name for name in (tell.task, *general) if name not in names), None)
        if wrong is not None:
            raise ValueError(f"tell names {wrong!r}, which is no source of the recipe; it has {', '.join(names)}")
        if tell.task in general or sorted([tell.task, *general]) != sorted(names) or not general:
            raise ValueError(
                f"tell has the task {tell.task!r} and general {general}; together they must be all sources of the "
                f"recipe, each once: {', '.join(names)}"
            )
        if self.mixture.unit != "samples":
            raise ValueError(
                f"tell counts documents, but mixture.unit is {self.mixture.unit!r}; set mixture.unit to samples"
            )
        if self.mixture.on_exhausted == "renormalize":
            raise ValueError(
                "mixture.on_exhausted is 'renormalize', by which the task would go on alone where the general sources "
                "are used up; with tell, set it to stop or repeat"
            )
        task = next(source for source in self.sources if source.name == tell.task)
        if task.weight_schedule is not None or task.weight != 1.0:
            raise ValueError(
                f"source {tell.task!r} has a weight or a weight_schedule, but tell.ratio says its share; leave it out"
            )

    def _ordered(self, names: list[str]) -> list[str]:
        """Sources that a curriculum orders."""
        if self.curriculum is None:
            return []
        unknown = set(self.curriculum.sources or ()) - set(names)
        if unknown:
            raise ValueError(
                f"curriculum.sources names {min(unknown)!r}, which is no source of the recipe; it has "
                f"{', '.join(names)}"
            )
        if self.curriculum.sources == []:
            raise ValueError("curriculum.sources is empty; name a source, or leave the curriculum out")
        return [name for name in names if self.curriculum.orders(name)]

    def shares(self, step: int = 0) -> list[float]:
        """Each source's share at a step, summing to one.

        Raises:
            ValueError: The schedules leave no source a weight at this step, or the temperature leaves one no share.
        """
        tell = self.tell
        weights = [
            0.0 if tell is not None and source.name == tell.task else source.weight_at(step) for source in self.sources
        ]
        if not any(weights):
            raise ValueError(f"all sources have weight 0 at step {step}; mend their weight_schedule")
        shares = self._shares(weights)
        if tell is None:
            return shares
        of_task = 1 / (1 + tell.ratio)
        return [
            of_task if source.name == tell.task else share * (1 - of_task)
            for source, share in zip(self.sources, shares, strict=True)
        ]

    def shares_at_rest(self, step: int) -> list[float] | None:
        """The shares of the sources that have no weight at a step, by their largest weights, if all others ran out.

        None: there is no such source.
        """
        weights = [0.0 if source.weight_at(step) else source.largest_weight for source in self.sources]
        return self._shares(weights) if any(weights) else None

    def _shares(self, weights: list[float]) -> list[float]:
        try:
            powers = [weight ** (1 / self.mixture.temperature) if weight else 0.0 for weight in weights]
        except OverflowError:
            powers = [math.inf]
        if math.isinf(sum(powers)) or any(weight and not power for weight, power in zip(weights, powers, strict=True)):
            raise ValueError(
                f"mixture.temperature is {self.mixture.temperature}: the weights {weights} to the power of "
                f"1/temperature are beyond all numbers; raise the temperature, or choose weights nearer to 1"
            )
        return [power / sum(powers) for power in powers]

    def _turns(self) -> set[int]:
        """Steps that tell whether some weight is above 0 at every step: between points, weights are lines."""
        points = [point[0] for source in self.sources for point in source.weight_schedule or ()]
        return {0, *(math.ceil(point) + more for point in points for more in (0, 1))}

    def tokenizer_folder(self) -> Path:
        """The tokenizer folder's path.

        Raises:
            FileNotFoundError: There is none.
        """
        candidates = [Path(self.tokenizer)]
        if self.folder is not None and not candidates[0].is_absolute():
            candidates.append(Path(self.folder) / self.tokenizer)
        for candidate in candidates:
            if candidate.is_dir():
                return candidate
        raise FileNotFoundError(f"{self.tokenizer}: no such tokenizer folder; the recipe's 'tokenizer' must name one")


def load_recipe(path: str | Path) -> Recipe:
    """A recipe from its YAML.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It isn't YAML, or a key is unknown, missing, or has a wrong value; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe")
    value = read_yaml(path)
    try:
        return recipe_from_dict(value, folder=str(path.parent))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def recipe_from_dict(value: Any, folder: str | None = None) -> Recipe:
    """A recipe from plain dicts and lists, checked.

    Raises:
        ValueError: As `load_recipe`.
    """
    recipe = parse(Recipe, value, hidden=("folder",), what="the recipe")
    return dataclasses.replace(recipe, folder=folder)


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """What `recipe_from_dict` reads; defaults that are `None` are left out."""
    value = dataclasses.asdict(recipe)
    value.pop("folder")
    value["sources"] = [{k: v for k, v in source.items() if v is not None} for source in value["sources"]]
    value["packing"] = {key: item for key, item in value["packing"].items() if item is not None}
    if value["curriculum"] is not None:  # recipes older than these keys keep their hash
        for key, default in (("order", "easy_first"), ("sources", None)):
            if value["curriculum"][key] == default:
                del value["curriculum"][key]
    return {key: item for key, item in value.items() if item is not None}


def recipe_hash(recipe: Recipe, shard_digests: list[list[str]], tokenizer_hash: str) -> str:
    """SHA-256 of all that the plan is a function of, and of nothing else.

    Sources go in by their place, their shards and the tokenizer by their contents: no name, no path. What becomes of
    broken samples doesn't go in, nor a weight where a schedule stands instead.

    Args:
        recipe: The recipe.
        shard_digests: For each source, its shards' SHA-256 in order.
        tokenizer_hash: The tokenizer folder's.
    """
    value = recipe_to_dict(recipe)
    del value["on_error"]
    value["tokenizer"] = tokenizer_hash
    if recipe.curriculum is not None and recipe.curriculum.sources is not None:
        value["curriculum"]["sources"] = [recipe.curriculum.orders(source.name) for source in recipe.sources]
    if recipe.tell is not None:
        value["tell"] = {"ratio": recipe.tell.ratio, "task": [s.name == recipe.tell.task for s in recipe.sources]}
    for source, config, digests in zip(value["sources"], recipe.sources, shard_digests, strict=True):
        del source["name"], source["remote"]
        if config.weight_schedule is not None:
            del source["weight"]
        if config.balance is not None and config.balance_alpha is None:
            source["balance_alpha"] = DEFAULT_ALPHA
        source |= {"shards": digests, "tasks": list(config.task_names)}
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
