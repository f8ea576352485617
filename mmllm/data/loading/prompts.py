"""Prompts to answer, for training from rewards: rows of a manifest, some at each step, in an order of seed and step.

Shapes: nothing here is a tensor.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import lightning as L

from mmllm.batch import Batch, PackedBatch
from mmllm.data.loading.datamodules import rank_of
from mmllm.data.loading.loader import LEAST_FAILED, LEAST_SEEN
from mmllm.data.loading.replay import Replay
from mmllm.data.plan.plan import StepPlan
from mmllm.data.plan.recipe import Recipe, load_recipe
from mmllm.data.rows.bad_rows import BadRows, ManifestError
from mmllm.data.rows.column_names import ColumnNames
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.readable import readable_rows
from mmllm.data.rows.rows import Row
from mmllm.data.samples.decode import ImageTransform
from mmllm.data.samples.documents import default_transform
from mmllm_tokenizers.folder import TokenizerFolder

PromptTask = Literal["caption", "transcribe", "question", "chat", "speak"]
KINDS_OF_PROMPT: dict[str, tuple[str, ...]] = {
    "caption": ("caption",),
    "transcribe": ("audio",),
    "question": ("interleaved",),
    "chat": ("interleaved", "text"),
    "speak": ("audio", "text"),
}
"""The kinds of rows of which each task can be asked."""
_logger = logging.getLogger(__name__)
_NAMED = 5
_CACHE_BYTES = 512 * 2**20
"""Of documents of the replay that are built."""


@dataclass
class PromptBatch(Batch):
    """What this rank is asked at a step."""

    rows: list[Row]
    """Not read yet."""
    numbers: list[int]
    """Of each how many prompts were asked before it, by all ranks: with a seed it decides what is drawn."""
    task: str
    step: int
    """How many times prompts were drawn before; the same batch comes `iterations` times."""
    iteration: int = 0
    """Which of these times this is."""
    replay: PackedBatch | None = None
    """Documents of the usual data, whose usual loss is added."""
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def num_documents(self) -> int:
        """Prompts, and documents of the replay."""
        return len(self.rows) + (0 if self.replay is None else self.replay.num_documents)


class PromptLoader:
    """The prompts of one rank, with a length, and a state that Lightning saves and restores.

    Rows are shuffled anew each time that all were asked; what is asked at a step depends on seed and step alone.

    Args:
        rows: at least one.
        task: that they are asked for.
        batch_size: prompts a step, of all ranks together.
        num_steps: of an epoch, at each of which a batch is taken.
        seed: of the order.
        rank: takes each `world_size`-th prompt from this one on.
        world_size: ranks with prompts of their own.
        iterations: how many times in a row a batch is given.
        replay: the usual data, of which a batch goes along with each of prompts.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        task: str,
        batch_size: int,
        num_steps: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        iterations: int = 1,
        replay: Replay | None = None,
    ) -> None:
        if batch_size % world_size:
            raise ValueError(
                f"batch_size is {batch_size} prompts, which {world_size} ranks can't share equally; choose a multiple "
                f"of {world_size}"
            )
        self._rows, self._task, self._batch_size, self._num_steps = rows, task, batch_size, num_steps
        self._seed, self._rank, self._world_size, self._iterations = seed, rank, world_size, iterations
        self._replay = replay
        self._replay_state: Mapping[str, Any] | None = None
        self._taken = self._position = self._num_seen = self._num_failed = 0

    def __len__(self) -> int:
        """Batches an epoch."""
        return self._num_steps

    def __iter__(self) -> Iterator[PromptBatch]:
        """The rest of the epoch."""
        if self._position >= self._num_steps:
            self._position = 0
        steps: Iterator[StepPlan] = iter(())
        if self._replay is not None:
            steps = self._replay.steps(self._replay_state, self._rank, self._world_size)
        while self._position < self._num_steps:
            batch = self.batch(*divmod(self._taken, self._iterations))
            if self._replay is not None:
                step = next(steps, None)
                if step is None:
                    raise ValueError(
                        "the replay recipe's documents are used up; set its mixture.on_exhausted to repeat"
                    )
                batch.replay, self._replay_state = self._replay.batch(step), step.state
                self._count(batch.replay, self._replay.recipe.on_error.max_fraction)
            self._taken += 1
            self._position += 1
            batch.state = {"taken": self._taken, "position": self._position}
            yield batch

    def batch(self, step: int, iteration: int = 0) -> PromptBatch:
        """This rank's prompts of a step, without a replay."""
        first = step * self._batch_size
        numbers = list(range(first + self._rank, first + self._batch_size, self._world_size))
        rows = [self._rows[self._place(number)] for number in numbers]
        return PromptBatch(rows, numbers, self._task, step, iteration)

    def _count(self, batch: PackedBatch, limit: float) -> None:
        """Names the replay's documents that failed; more than its recipe allows are an error."""
        errors = batch.state.get("errors", ())
        self._num_seen += batch.num_documents + len(errors)
        self._num_failed += len(errors)
        for message in errors[:_NAMED]:
            _logger.warning("masked %s", message)
        allowed = max(math.ceil(limit * max(LEAST_SEEN, self._num_seen)), LEAST_FAILED if limit else 0)
        if errors and self._num_failed > allowed:
            raise ValueError(
                f"{self._num_failed} of {self._num_seen} documents of replay_recipe failed, more than its "
                f"on_error.max_fraction {limit}; the last: {'; '.join(errors[:_NAMED])}"
            )

    def _place(self, number: int) -> int:
        epoch, place = divmod(number, len(self._rows))
        return _order(self._seed, epoch, len(self._rows))[place]

    def documents_of(self, step: int, before: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """The rows of this rank's batch of a step, by name."""
        taken = step if before is None else int(before.get("taken", step))
        rows = self.batch(taken // self._iterations).rows
        return [{"source": self._task, "shard": row.where, "key": row.id, "row": 0, "number": place}
                for place, row in enumerate(rows)]  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs."""
        state = {"taken": self._taken, "position": self._position, "seed": self._seed, "rows": len(self._rows),
                 "batch_size": self._batch_size, "iterations": self._iterations}  # fmt: skip
        if self._replay is None:
            return state
        return {**state, "replay": self._replay_state, "replay_seen": self._num_seen,
                "replay_failed": self._num_failed}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, also with another number of ranks.

        Raises:
            ValueError: It belongs to other prompts, or another replay.
        """
        own = self.state_dict()
        for key in ("seed", "rows", "batch_size", "iterations"):
            if state[key] != own[key]:
                raise ValueError(
                    f"the checkpoint's prompts had {key} {state[key]}, these have {own[key]}; resume with the same "
                    f"manifest and settings, or begin anew without --ckpt_path"
                )
        if ("replay" in state) != (self._replay is not None):
            raise ValueError("the checkpoint's prompts and these differ in whether there is a replay_recipe")
        if self._replay is not None:
            if state["replay"] is not None:
                self._replay.plan.check_state(state["replay"])
            self._replay_state = state["replay"]
            self._num_seen, self._num_failed = int(state.get("replay_seen", 0)), int(state.get("replay_failed", 0))
        self._taken, self._position = int(state["taken"]), int(state["position"])


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_rows: int) -> list[int]:
    order = list(range(num_rows))
    random.Random(f"prompts {seed} {epoch}").shuffle(order)
    return order


class PromptDataModule(L.LightningDataModule):
    """Rows of a manifest as prompts, some at each step.

    Args:
        manifest: Rows, or the input to read them from, of any form; those of other kinds than the task's are left out.
        task: What is asked of them: caption, transcribe, question, chat (up to the last answer) or speak.
        batch_size: Prompts a step, of all ranks together.
        seed: Of their order.
        limit: The first so many rows; None: all.
        form: Of the input; "auto": told from it.
        columns: What its columns are called here, and their types: items `[ours=]theirs[:type]`.
        max_bad_fraction: More unusable rows than this are an error; fewer are named and left out.
        steps_per_epoch: How many steps Lightning calls an epoch; by default one pass over the rows.
        replay_recipe: A recipe of the usual data, of which some sequences go along with each step's prompts: their
            usual loss, times `replay_weight` of the module, is added; None: none.
        replay_sequences: So many a step, of all ranks together; given with `replay_recipe`.
    """

    def __init__(
        self,
        manifest: str | Path,
        task: PromptTask,
        batch_size: int = 16,
        seed: int = 0,
        limit: int | None = None,
        form: str = "auto",
        columns: list[str] | None = None,
        max_bad_fraction: float = 0.05,
        steps_per_epoch: int | None = None,
        replay_recipe: str | Path | None = None,
        replay_sequences: int = 0,
    ) -> None:
        super().__init__()
        if task not in KINDS_OF_PROMPT:
            raise ValueError(f"task is {task!r}; choose one of {', '.join(KINDS_OF_PROMPT)}")
        for name, value in (("batch_size", batch_size), ("limit", limit), ("steps_per_epoch", steps_per_epoch)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if replay_sequences < 0 or (replay_recipe is None) != (replay_sequences == 0):
            raise ValueError(
                f"replay_recipe is {replay_recipe} and replay_sequences {replay_sequences}; give both, or neither"
            )
        self._manifest, self._task, self._batch_size, self._seed = manifest, task, batch_size, seed
        self._limit, self._form, self._max_bad_fraction = limit, form, max_bad_fraction
        self._columns = None if columns is None else ColumnNames.parse(columns)
        self._steps_per_epoch = steps_per_epoch
        self._replay_recipe = None if replay_recipe is None else Path(replay_recipe)
        self._replay_sequences = replay_sequences
        self._iterations = 1
        self._transform: ImageTransform | None = None
        self._rows: list[Row] | None = None
        self._loader: PromptLoader | None = None
        self._folder: TokenizerFolder | None = None

    @property
    def task(self) -> str:
        """What is asked."""
        return self._task

    @property
    def batch_size(self) -> int:
        """Prompts a step, of all ranks together."""
        return self._batch_size

    @property
    def replayed(self) -> tuple[Path | None, int]:
        """The recipe of what goes along with them, and how many sequences of it a step."""
        return self._replay_recipe, self._replay_sequences

    @property
    def rows(self) -> list[Row]:
        """What is asked about.

        Raises:
            FileNotFoundError: there is no such input.
            ManifestError: it has no row of the task, or too many that can't be used.
        """
        if self._rows is None:
            name = str(self._manifest)
            bad = BadRows(self._max_bad_fraction)
            rows = read_rows(self._manifest, bad, self._form, columns=self._columns, is_asked=True)
            rows = [row for row in rows if row.kind in KINDS_OF_PROMPT[self._task] and _can_be_asked(row, self._task)]
            if not rows:
                raise ManifestError(
                    f"{name} has no rows of which {self._task!r} can be asked; it takes rows of the kinds "
                    f"{' and '.join(KINDS_OF_PROMPT[self._task])}"
                )
            rows = rows[: self._limit]
            looks = self._task != "speak"  # which says a row's text, whatever its sound is
            self._rows = readable_rows(rows, BadRows(self._max_bad_fraction), name) if looks else rows
        return self._rows

    @property
    def replay(self) -> Recipe | None:
        """The recipe of the usual data that goes along."""
        return None if self._replay_recipe is None else load_recipe(self._replay_recipe)

    @property
    def folder(self) -> TokenizerFolder | None:
        """The replay's tokenizer folder; None: prompts alone are written by the model's."""
        recipe = self.replay
        if self._folder is None and recipe is not None:
            self._folder = TokenizerFolder.load(recipe.tokenizer_folder())
        return self._folder

    @property
    def source_names(self) -> list[str]:
        """Of the replay's sources."""
        recipe = self.replay
        return [] if recipe is None else [source.name for source in recipe.sources]

    def take_transform(self, transform: ImageTransform) -> None:
        """The replay's pictures are to be made as the model saw them."""
        self._transform = transform

    @property
    def image_transform(self) -> ImageTransform | None:
        """How pictures become the tower's squares; None: as the model's folder says."""
        return self._transform

    def take_iterations(self, iterations: int) -> None:
        """How many times in a row each batch is given; called before any loader is made."""
        self._iterations = iterations

    def setup(self, stage: str | None = None) -> None:
        """Reads the rows."""
        _ = self.rows

    def train_dataloader(self) -> PromptLoader:
        """This rank's prompts; the same loader whenever it is asked for, since it keeps its place."""
        if self._loader is None:
            rank, world_size = rank_of(self)
            steps = self._steps_per_epoch or self._iterations * -(-len(self.rows) // self._batch_size)
            self._loader = PromptLoader(
                self.rows, self._task, self._batch_size, steps, self._seed, rank, world_size, self._iterations,
                self._replay(),
            )  # fmt: skip
        return self._loader

    def val_dataloader(self) -> list[PromptLoader]:
        """Nothing: what a model can do is asked by `TaskScores` or `mmllm eval`."""
        return []

    def _replay(self) -> Replay | None:
        recipe, folder = self.replay, self.folder
        if recipe is None or folder is None:
            return None
        transform = self._transform or default_transform(folder)
        return Replay(recipe, self._replay_sequences, folder, transform, _CACHE_BYTES)


def _can_be_asked(row: Row, task: str) -> bool:
    match task:
        case "question":
            return "question" in row.metadata
        case "chat" if row.kind == "interleaved":
            return any(segment.get("role") == "user" for segment in row.segments)
    return True
