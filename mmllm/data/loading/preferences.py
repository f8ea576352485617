"""Preference data as batches of packed answers: which rows each step has, reading them, a loader that resumes.

What a step holds follows from the files, the seed, the batch size and its number; ranks and workers change nothing.

Shapes: N items, A answers.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import numpy as np
from torch.utils.data import DataLoader, Dataset

from mmllm.batch import AnswerBatch
from mmllm.data.loading.ahead import Ahead
from mmllm.data.loading.answers import AnswerDocument, pack_answers
from mmllm.data.loading.datamodules import on_gpu, rank_of
from mmllm.data.loading.loader import has_next_window
from mmllm.data.loading.pictures import PictureTransform
from mmllm.data.loading.preference_rows import AnswerWriter, Form, PreferenceRow, read_row
from mmllm.data.loading.replay import Replay
from mmllm.data.plan.plan import StepPlan
from mmllm.data.plan.recipe import Recipe, load_recipe
from mmllm.data.rows.bad_rows import BadRows, is_of_machine
from mmllm.data.samples.decode import ImageTransform
from mmllm.data.samples.document import Document
from mmllm_tokenizers.folder import TokenizerFolder

_logger = logging.getLogger(__name__)
_ORDER = 11
"""What random numbers are for; those of plans have others."""
_VERSION = 1
_NAMED = 5
_LEAST_FAILED = 10
"""Failures while training that are always allowed, if any are: of a few rows, two that are bad by chance are many."""


class PreferenceFiles:
    """Where the rows of JSONL files are; the rows themselves are read when they are needed.

    Args:
        files: paths.
        form: what an item is.
        max_bad_fraction: of the rows of a file that can't be used; each is named.

    Raises:
        FileNotFoundError: a file isn't there.
        ValueError: too many rows can't be used, or none can.
    """

    def __init__(self, files: Sequence[str | Path], form: Form, max_bad_fraction: float) -> None:
        self.files = [Path(file) for file in files]
        items: list[tuple[int, int, int, int]] = []
        digest, bad = hashlib.sha256(form.encode()), BadRows(max_bad_fraction)
        for number, file in enumerate(self.files):
            offset, num_rows, before = 0, 0, len(bad.reasons)
            with file.open("rb") as stream:
                for line_number, line in enumerate(stream, start=1):
                    digest.update(line)
                    if line.strip():
                        num_rows += 1
                        try:
                            row = read_row(line, f"{file.name}:{line_number}", file.parent)
                            items += [(number, offset, line_number, side) for side in _items(row, form)]
                        except ValueError as error:
                            bad.add(f"{file}:{line_number}", error)
                    offset += len(line)
            bad.check(num_rows, str(file), before)
        if not items:
            raise ValueError(f"{', '.join(map(str, self.files))}: there are no rows to train on")
        self.items_N4 = np.array(items, dtype=np.int64)
        """Each its file, where its row begins, its line, and which side it is: -1 both."""
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        """N."""
        return len(self.items_N4)

    def row(self, item: int) -> tuple[PreferenceRow, int]:
        """An item's row, and its side: -1 both."""
        number, offset, line_number, side = self.items_N4[item].tolist()
        file = self.files[number]
        with file.open("rb") as stream:
            stream.seek(offset)
            return read_row(stream.readline(), f"{file.name}:{line_number}", file.parent), side

    def name(self, item: int) -> str:
        """Its `file:line`."""
        number, _, line_number, _ = self.items_N4[item].tolist()
        return f"{self.files[number]}:{line_number}"


def _items(row: PreferenceRow, form: Form) -> list[int]:
    if form == "answers":
        return list(range(len(row.answers)))
    if len(row.answers) != 2:
        raise ValueError('is an answer by itself, and form is "pairs"; give pairs, or set form to "answers"')
    return [-1]


def _are_equal(first: Document, second: Document) -> bool:
    return np.array_equal(first.token_ids_T, second.token_ids_T) and np.array_equal(first.codes_TK, second.codes_TK)


@dataclass(frozen=True)
class PreferenceStep:
    """What one step of one rank holds."""

    step: int
    items: tuple[int, ...]
    """Of all ranks."""
    mine: tuple[int, ...]
    """Places among them."""
    replay: StepPlan | None
    state: dict[str, Any]


@dataclass(frozen=True)
class AnswerSettings:
    """How items become batches."""

    form: Form
    sequence_length: int
    token_multiple: int = 1
    mismatches: bool = False
    """Also answers behind prompts that aren't theirs, of which KTO estimates a divergence."""
    cache_bytes: int = 0


class AnswerDataset(Dataset[AnswerBatch]):
    """Batches of packed answers: `dataset[step]`. `state["errors"]` names the rows that failed, if any.

    Args:
        files: where rows are.
        writer: of documents.
        settings: of batches.
        references_NA: log-probabilities by the reference, of an item's one or two answers; None: not stored.
        replay: goes along.
    """

    def __init__(
        self,
        files: PreferenceFiles,
        writer: AnswerWriter,
        settings: AnswerSettings,
        references_NA: np.ndarray | None = None,
        replay: Replay | None = None,
    ) -> None:
        self.files, self._writer, self._settings = files, writer, settings
        self._references_NA, self._replay = references_NA, replay
        self._cached = 0
        self._cache: dict[int, tuple[Document, ...]] = {}

    def __getitem__(self, step: PreferenceStep) -> AnswerBatch:
        """The batch of a step."""
        errors: list[str] = []
        groups: list[list[AnswerDocument]] = []
        mismatched: list[list[AnswerDocument]] = []
        for place in step.mine:
            item = step.items[place]
            try:
                groups.append(self.answers(item, len(groups)))
            except Exception as error:  # a broken row must never stop a run: it is named, counted, bounded
                if is_of_machine(error):
                    raise
                errors.append(f"{self.files.name(item)}: {error}")
                continue
            if self._settings.mismatches and (other := self._other_row(step.items, place)) is not None:
                mismatched += self._mismatch(item, other, len(mismatched))
        state = dict(step.state)
        replay = None
        if step.replay is not None:
            assert self._replay is not None
            replay = self._replay.batch(step.replay)
            errors += replay.state.get("errors", [])
        if errors:
            state["errors"] = errors
        batch = self.packed(groups, state)
        if self._settings.mismatches:
            batch.mismatched = self.packed(mismatched, {})
        batch.replay = replay
        return batch

    def answers(self, item: int, group: int) -> list[AnswerDocument]:
        """An item's documents: both sides of a pair, the chosen one first, or an answer by itself.

        Raises:
            ValueError: they can't be written, or are equal.
        """
        row, side = self.files.row(item)
        documents = self._cache.get(item)
        if documents is None:
            chosen = row.answers if side < 0 else row.answers[side : side + 1]
            documents = tuple(self._writer.document(row, answer) for answer in chosen)
            if len(documents) == 2 and _are_equal(*documents):
                raise ValueError("chosen and rejected are the same tokens; a pair has two different sides")
            self._keep(item, documents)
        liked = row.is_liked if side < 0 else row.is_liked[side : side + 1]
        known: Sequence[float | None] = (None,) * len(documents)
        if self._references_NA is not None:
            known = self._references_NA[item].tolist()[: len(documents)]
            if any(value is not None and math.isnan(value) for value in known):
                raise ValueError("what the reference says isn't known: the row couldn't be read before training")
        return [
            AnswerDocument(document, group, is_liked, reference, row.margin)
            for document, is_liked, reference in zip(documents, liked, known, strict=True)
        ]

    def _keep(self, item: int, documents: tuple[Document, ...]) -> None:
        size = sum(document.num_bytes for document in documents)
        if self._cached + size <= self._settings.cache_bytes:  # full: what is in stays, all come equally often
            self._cache[item] = documents
            self._cached += size

    def _other_row(self, items: Sequence[int], place: int) -> int | None:
        """The item before it in the step whose row is another; None: there is none."""
        own = self.files.items_N4[items[place], :2].tolist()
        for distance in range(1, len(items)):
            other = items[place - distance]
            if self.files.items_N4[other, :2].tolist() != own:
                return other
        return None

    def _mismatch(self, item: int, other: int, group: int) -> list[list[AnswerDocument]]:
        """The other item's answer behind this one's prompt; none where that can't be written: it is of another task."""
        row, _ = self.files.row(item)
        given, side = self.files.row(other)
        if given.task != row.task and "speak" in (given.task, row.task):
            return []
        try:
            return [[AnswerDocument(self._writer.document(row, given.answers[side]), group)]]
        except ValueError:  # too long, or broken, which is told where it is the answer of its own prompt
            return []

    def packed(self, groups: Sequence[Sequence[AnswerDocument]], state: dict[str, Any]) -> AnswerBatch:
        """A batch of as few sequences as first-fit decreasing needs, at least one."""
        settings = self._settings
        answers = [answer for group in groups for answer in group]
        rows: list[list[AnswerDocument]] = []
        room: list[int] = []
        for number in sorted(range(len(answers)), key=lambda number: -answers[number].num_tokens):
            size = answers[number].num_tokens
            row = next((row for row, left in enumerate(room) if left >= size), len(rows))
            if row == len(rows):
                rows.append([])
                room.append(settings.sequence_length)
            rows[row].append(answers[number])
            room[row] -= size
        return pack_answers(rows or [[]], settings.sequence_length, state, settings.token_multiple)


class PreferenceLoader:
    """The batches of one rank, with a length, and a state that Lightning saves and restores.

    Args:
        files: where rows are.
        dataset: steps to batches.
        batch_size: items a step, of all ranks together.
        seed: of the order; None: the files' order, once.
        num_steps: an epoch; None: one pass over the rows.
        ranks: this rank, and how many there are.
        num_workers: processes that read and decode; 0: this one.
        pin_memory: for GPUs.
        max_failed: share of the rows seen that may fail while training.
        replay: goes along.
    """

    def __init__(
        self,
        files: PreferenceFiles,
        dataset: AnswerDataset,
        batch_size: int,
        seed: int | None,
        num_steps: int | None = None,
        ranks: tuple[int, int] = (0, 1),
        num_workers: int = 0,
        pin_memory: bool = False,
        max_failed: float = 0.01,
        replay: Replay | None = None,
    ) -> None:
        self._rank, self._world_size = ranks
        if seed is not None and batch_size % self._world_size:
            raise ValueError(
                f"batch_size is {batch_size}, which {self._world_size} ranks can't share equally; choose a multiple of "
                f"{self._world_size}"
            )
        self._files, self._dataset, self._batch_size, self._seed = files, dataset, batch_size, seed
        self._num_steps = num_steps or math.ceil(len(files) / batch_size)
        self._num_workers, self._pin_memory, self._max_failed = num_workers, pin_memory, max_failed
        self._replay = replay
        self._state = self._initial_state()
        self._position = self._num_seen = self._num_failed = 0
        self._orders: dict[int, np.ndarray] = {}

    def _initial_state(self) -> dict[str, Any]:
        replay = None if self._replay is None else self._replay.plan.initial_state()
        digest = self._files.digest[:16]
        keys = {"version": _VERSION, "data": digest, "seed": self._seed, "batch_size": self._batch_size}
        return {**keys, "step": 0, "replay": replay}

    def __len__(self) -> int:
        """Steps an epoch."""
        return self._num_steps

    def __iter__(self) -> Iterator[AnswerBatch]:
        """The rest of the epoch; the stream goes on from one to the next."""
        if self._seed is None:
            self._state, self._position = self._initial_state(), 0
        elif self._position >= self._num_steps:
            self._position = 0
        with Ahead(self._steps(self._num_steps - self._position), _is_enough) as steps:
            loader = DataLoader(
                self._dataset,
                batch_size=None,
                sampler=steps,  # pyright: ignore[reportArgumentType]
                num_workers=self._num_workers,
                pin_memory=self._pin_memory,
                prefetch_factor=2 if self._num_workers else None,
                collate_fn=_as_it_is,  # pyright: ignore[reportArgumentType]
            )
            for batch in loader:
                self._count(batch)
                self._state = {key: value for key, value in batch.state.items() if key != "errors"}
                self._position += 1
                batch.state = {**batch.state, "position": self._position}
                yield batch

    def _steps(self, count: int) -> Iterator[PreferenceStep]:
        first, replays = self._state["step"], None
        if self._replay is not None:
            replays = self._replay.steps(self._state["replay"], self._rank, self._world_size)
        for step in range(first, first + count):
            items = tuple(self._items(step))
            mine = tuple(range(self._rank, len(items), self._world_size))
            replay = None if replays is None else next(replays, None)
            if replays is not None and replay is None:
                raise ValueError("the replay recipe's documents are used up; set its mixture.on_exhausted to repeat")
            state = {**self._state, "step": step + 1, "replay": None if replay is None else replay.state}
            yield PreferenceStep(step, items, mine, replay, state)

    def _items(self, step: int) -> Iterator[int]:
        """The items of a step of all ranks; a step may reach over an epoch's end."""
        for place in range(step * self._batch_size, (step + 1) * self._batch_size):
            if self._seed is None:
                if place < len(self._files):
                    yield place
                continue
            epoch, offset = divmod(place, len(self._files))
            if epoch not in self._orders:
                rng = np.random.default_rng([self._seed, _ORDER, epoch])
                self._orders = {epoch: rng.permutation(len(self._files))}
            yield int(self._orders[epoch][offset])

    def _count(self, batch: AnswerBatch) -> None:
        errors = batch.state.get("errors", ())
        self._num_seen += len(batch.group_A.unique()) + len(errors)
        if not errors:
            return
        self._num_failed += len(errors)
        for message in errors[:_NAMED]:
            _logger.warning("left out %s", message)
        allowed = max(_LEAST_FAILED if self._max_failed else 0, math.ceil(self._max_failed * self._num_seen))
        is_all = self._num_failed == self._num_seen >= min(len(self._files), 100)
        if self._num_failed > allowed or is_all:
            raise ValueError(
                f"{self._num_failed} of {self._num_seen} rows failed, more than max_bad_fraction {self._max_failed}; "
                f"the last: {'; '.join(errors[-_NAMED:])}"
            )

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs: the state after the last batch that was taken."""
        return {**self._state, "position": self._position, "seen": self._num_seen, "failed": self._num_failed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state, also with other numbers of ranks and workers.

        Raises:
            ValueError: it belongs to other data, or another seed or batch size.
        """
        for key, wanted in self._initial_state().items():
            if key not in ("step", "replay") and state.get(key) != wanted:
                raise ValueError(
                    f"the saved data state has {key} {state.get(key)!r}, this run has {wanted!r}; resume with the same "
                    f"pairs, seed and batch_size"
                )
        if (state.get("replay") is None) != (self._replay is None):
            raise ValueError("the saved data state and this run differ in whether there is a replay_recipe")
        if self._replay is not None:
            self._replay.plan.check_state(state["replay"])
        self._state = {key: state[key] for key in self._initial_state()}
        self._position = int(state.get("position", 0))
        self._num_seen, self._num_failed = int(state.get("seen", 0)), int(state.get("failed", 0))


def _is_enough(steps: Sequence[PreferenceStep]) -> bool:
    """Whether enough is planned: the next window of a replay, else two steps."""
    replays = [step.replay for step in steps if step.replay is not None]
    return has_next_window(replays) if replays else len(steps) >= 2


def _as_it_is(batch: AnswerBatch) -> AnswerBatch:
    return batch


class PreferenceDataModule(L.LightningDataModule):
    """Pairs, or answers with a label, from files of preference data (see `mmllm.data.loading.preference_rows`).

    Many answers are packed into a sequence, and none sees another; both sides of a pair are in one batch.

    Args:
        pairs: JSONL files.
        tokenizer: the tokenizer folder, or the model folder that has it.
        form: "pairs" for DPO and reward models; "answers" for KTO, each with whether it is liked.
        batch_size: pairs (or answers) a step, of all ranks together.
        sequence_length: positions of a sequence; an answer with its prompt must fit in.
        val_pairs: JSONL files of validation, which are held out; by default none.
        num_workers: processes that read and decode, a rank; 0: the training process itself.
        seed: of the order.
        steps_per_epoch: how many steps Lightning calls an epoch; by default one pass over the rows.
        max_bad_fraction: share of rows that may be unusable; each is named.
        image_mode: how pictures become square; by default as the model in `init_from` saw them, else squash.
        cache_mb: memory for built documents, a process.
        token_multiple: the tokens of a batch are rounded up to it by padding that is computed, for `compile`.
        replay_recipe: the recipe of data that the model was trained on, of which some goes along; None: none.
        replay_sequences: sequences of it a step, of all ranks together.
    """

    def __init__(
        self,
        pairs: str | list[str],
        tokenizer: str | Path,
        form: Form = "pairs",
        batch_size: int = 16,
        sequence_length: int = 512,
        val_pairs: str | list[str] | None = None,
        num_workers: int = 0,
        seed: int = 0,
        steps_per_epoch: int | None = None,
        max_bad_fraction: float = 0.01,
        image_mode: Literal["squash", "pad", "crop"] | None = None,
        cache_mb: int = 512,
        token_multiple: int = 1,
        replay_recipe: str | Path | Recipe | None = None,
        replay_sequences: int = 0,
    ) -> None:
        super().__init__()
        if form not in get_args(Form):
            raise ValueError(f"form is {form!r}; choose {', '.join(get_args(Form))}")
        least = {"batch_size": 1, "sequence_length": 2, "num_workers": 0, "token_multiple": 1, "replay_sequences": 0}
        for name, bound in least.items():
            if (value := locals()[name]) < bound:
                raise ValueError(f"{name} is {value}; it must be at least {bound}")
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction is {max_bad_fraction}; it must be within 0-1")
        if (replay_recipe is None) != (replay_sequences == 0):
            raise ValueError(
                f"replay_recipe is {replay_recipe} and replay_sequences {replay_sequences}; give both, or neither"
            )
        self.form: Form = form
        self.sequence_length = sequence_length
        self._pairs, self._val_pairs = _paths(pairs), _paths(val_pairs)
        self._tokenizer, self._batch_size, self._num_workers = tokenizer, batch_size, num_workers
        self._seed, self._steps_per_epoch, self._max_bad = seed, steps_per_epoch, max_bad_fraction
        self._pictures = PictureTransform(image_mode)
        self._cache_bytes, self._token_multiple = cache_mb * 2**20, token_multiple
        self._replay_recipe, self._replay_sequences = replay_recipe, replay_sequences
        self._folder: TokenizerFolder | None = None
        self._files: dict[str, PreferenceFiles] = {}
        self._references: dict[str, np.ndarray] = {}
        self._replay: Replay | None = None
        self._train_loader: PreferenceLoader | None = None

    @property
    def num_answers(self) -> int:
        """Answers a step, of all ranks together."""
        return self._batch_size * (2 if self.form == "pairs" else 1)

    @property
    def replayed(self) -> tuple[str | Path | Recipe | None, int]:
        """The recipe of what goes along, and how many sequences of it a step."""
        return self._replay_recipe, self._replay_sequences

    @property
    def folder(self) -> TokenizerFolder:
        """The tokenizer folder."""
        if self._folder is None:
            self._folder = TokenizerFolder.load(self._tokenizer)
        return self._folder

    @property
    def image_transform(self) -> ImageTransform:
        """How pictures become the tower's squares."""
        return self._pictures.of(self.folder)

    def take_transform(self, transform: ImageTransform) -> None:
        """Pictures are to be made as a pretrained tower saw them; called before any loader is made.

        Raises:
            ValueError: `image_mode` was set to something else, or the tokenizer folder has pictures of another size.
        """
        self._pictures.take(transform, self.folder)
        self._replay = None  # one that was made before makes them otherwise

    @property
    def source_names(self) -> list[str]:
        """Of the replay recipe."""
        if self._replay_recipe is None:
            return []
        given = self._replay_recipe
        recipe = given if isinstance(given, Recipe) else load_recipe(given)
        return [source.name for source in recipe.sources]

    @property
    def replay(self) -> Replay | None:
        """What goes along; None: nothing does."""
        if self._replay is None and self._replay_recipe is not None:
            settings = (self._replay_sequences, self.folder, self.image_transform, self._cache_bytes)
            self._replay = Replay(self._replay_recipe, *settings)
        return self._replay

    def files(self, split: Literal["train", "val"]) -> PreferenceFiles | None:
        """Where the rows of a split are; None: it has none."""
        paths = self._pairs if split == "train" else self._val_pairs
        if paths and split not in self._files:
            self._files[split] = PreferenceFiles(paths, self.form, self._max_bad)
        return self._files.get(split)

    def take_references(self, split: Literal["train", "val"], references_NA: np.ndarray) -> None:
        """Log-probabilities by the reference go along from now on; called before any loader is made."""
        assert self._train_loader is None, "workers have what they were made with"
        self._references[split] = references_NA

    def setup(self, stage: str | None = None) -> None:
        """Looks at all rows.

        Args:
            stage: Lightning's; a stage that doesn't train opens no training data.
        """
        for split in ("train", "val"):
            if split == "val" or stage in (None, "fit"):
                self.files(split)

    def train_dataloader(self) -> PreferenceLoader:
        """The training batches of this rank; the same loader whenever it is asked for, since it keeps its place."""
        if self._train_loader is None:
            self._train_loader = self.loader("train", seed=self._seed, replay=self.replay)
        return self._train_loader

    def val_dataloader(self) -> PreferenceLoader | list[PreferenceLoader]:
        """The validation batches of this rank: the same ones each time."""
        return [] if self.files("val") is None else self.loader("val", seed=None)

    def test_dataloader(self) -> PreferenceLoader | list[PreferenceLoader]:
        """As validation."""
        return self.val_dataloader()

    def answers_of(self, split: Literal["train", "val"]) -> Iterator[tuple[list[int], AnswerBatch]]:
        """This rank's share of a split's items, each once, in this process: their numbers by group, and the batch.

        Items that can't be written are left out: they are named when they are trained on.
        """
        dataset, (rank, world_size) = self._dataset(split, None), rank_of(self)
        mine = range(rank, len(dataset.files), world_size)
        for start in range(0, len(mine), self._batch_size):
            items: list[int] = []
            groups: list[list[AnswerDocument]] = []
            for item in mine[start : start + self._batch_size]:
                try:
                    groups.append(dataset.answers(item, len(groups)))
                    items.append(item)
                except Exception as error:
                    if is_of_machine(error):
                        raise
            if items:
                yield items, dataset.packed(groups, {})

    def loader(
        self, split: Literal["train", "val"], seed: int | None, replay: Replay | None = None
    ) -> PreferenceLoader:
        """The batches of this rank.

        Args:
            split: whose rows.
            seed: of their order; None: once, in the files' order.
            replay: goes along.
        """
        dataset = self._dataset(split, replay)
        num_steps = self._steps_per_epoch if seed is not None else None
        return PreferenceLoader(
            dataset.files, dataset, self._batch_size, seed, num_steps, rank_of(self), self._num_workers, on_gpu(self),
            self._max_bad, replay,
        )  # fmt: skip

    def _dataset(self, split: Literal["train", "val"], replay: Replay | None) -> AnswerDataset:
        files = self.files(split)
        assert files is not None, "the split has rows"
        settings = AnswerSettings(
            self.form, self.sequence_length, self._token_multiple, self.form == "answers", self._cache_bytes
        )
        writer = AnswerWriter(self.folder, self.image_transform, self.sequence_length)
        return AnswerDataset(files, writer, settings, self._references.get(split), replay)


def _paths(paths: str | list[str] | None) -> list[str]:
    return [] if paths is None else [paths] if isinstance(paths, str) else list(paths)
