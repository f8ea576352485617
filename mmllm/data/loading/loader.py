"""Plan items to batches: reading, decoding, packing; a loader whose state is what was consumed.

Workers hold no state: they are handed a step's plan and give back its batch, so their number changes nothing.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
from torch.utils.data import DataLoader, Dataset

from mmllm.batch import CaptionBatch, PackedBatch, SoundBatch
from mmllm.data.loading.ahead import Ahead
from mmllm.data.loading.augment import NUM_DRAWS, AugmentConfig, augment
from mmllm.data.loading.balance import FRAME_COST, IMAGE_COST, shares
from mmllm.data.loading.collate import Gap, pack_documents
from mmllm.data.loading.reader import SampleReader, TextPiece, named_failure
from mmllm.data.plan.plan import Item, Plan, StepPlan, span_masking
from mmllm.data.samples.decode import ImageInput, ImageTransform
from mmllm.data.samples.document import NO_PIXELS, Document
from mmllm.data.samples.documents import build_document
from mmllm.data.samples.masked_spans import MASKED, base_task
from mmllm.data.samples.sample import Sample
from mmllm.data.samples.text_parts import part_bounds
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.tiling import TileGrid

AnyBatch = TypeVar("AnyBatch", PackedBatch, CaptionBatch, SoundBatch)

_logger = logging.getLogger(__name__)
_NAMED = 5
_NOT_STATE = ("errors", "hashes", "row_errors")
LEAST_SEEN, LEAST_FAILED = 1000, 10
"""Until a stream ends, `on_error.max_fraction` allows what it would of so many documents, and at least so many
failures: of a few documents, two that are bad by chance are a large share."""


class StepDataset(Dataset[PackedBatch]):
    """Steps of a plan as batches: `dataset[step_plan]`.

    Args:
        plan: Where the sources and the recipe are.
        folder: Tokenizers.
        transform: Pictures to pixels.
        cache_bytes: Documents kept once they are built, at most this much memory a process.
        augment: How pictures are altered; the same step always sees the same pictures.
        hashes: Also give each sequence's hash and errors, in `state["hashes"]` and `state["row_errors"]`.
        raises: Whether a broken document may be an error, where the recipe says so; else it is always masked.
        features: Instead of decoding pictures, take the features of this hash that are stored with them.
        token_multiple: The tokens of a batch are rounded up to it by padding that is computed.
    """

    def __init__(
        self,
        plan: Plan,
        folder: TokenizerFolder,
        transform: ImageTransform,
        cache_bytes: int = 0,
        augment: AugmentConfig | None = None,
        hashes: bool = False,
        features: str | None = None,
        raises: bool = True,
        token_multiple: int = 1,
    ) -> None:
        self._token_multiple = token_multiple
        self._raises = raises and plan.recipe.on_error.action == "raise"
        self._augment, self._hashes, self._features = augment or AugmentConfig(), hashes, features
        self._plan, self._folder, self._transform = plan, folder, transform
        codec = folder.audio.hash if folder.audio is not None else None
        self._read = SampleReader(plan, codec, folder)
        self._cache_bytes, self._cached = cache_bytes, 0
        self._cache: OrderedDict[_Place, Document] = OrderedDict()
        self._masking = {
            source.number: span_masking(source.config, folder)
            for source in plan.sources
            if source.config.masked_spans is not None
        }

    def __getitem__(self, step: StepPlan) -> PackedBatch:
        """The batch of a step. `state["errors"]` names its documents that failed, if any."""
        row_errors: list[list[str]] = [[] for _ in step.sequences]
        items = [item for sequence in step.sequences for item in sequence]
        rows = [row for row, sequence in enumerate(step.sequences) for _ in sequence]
        documents = iter(self._documents(items, [row_errors[row] for row in rows], step.step))
        sequences = [list(islice(documents, len(sequence))) for sequence in step.sequences]
        errors = [message for messages in row_errors for message in messages]
        sources = [[item.source for item in sequence] for sequence in step.sequences]
        state = {**step.state, "errors": errors} if errors else step.state
        if self._hashes:
            told = [self._plan.sequence_hash(sequence) for sequence in step.sequences]
            state = {**state, "hashes": told, "row_errors": row_errors}
        batch = pack_documents(sequences, self._plan.recipe.sequence_length, sources, state, self._token_multiple)
        if self._augment.is_on and len(batch.images_NCHW):
            draws = [
                self._draws(step.step, item, len(document.images))
                for items, documents in zip(step.sequences, sequences, strict=True)
                for item, document in zip(items, documents, strict=True)
                if isinstance(document, Document) and document.images
            ]
            batch.images_NCHW = augment(batch.images_NCHW, np.concatenate(draws), self._augment)
        return batch

    def _draws(self, step: int, item: Item, num_images: int) -> np.ndarray:
        """Random numbers of a document's pictures: they depend on step and document, not on rank or worker."""
        seed = [self._plan.recipe.seed, 4, step, item.source, item.shard, item.row]
        return np.random.default_rng(seed).random((num_images, NUM_DRAWS), dtype=np.float32)

    def document(self, item: Item, errors: list[str]) -> Document | Gap:
        """The document of an item, or where it fails a gap of its length, with the reason added to `errors`.

        Masked spans are those that it has at step 0.
        """
        return self._documents([item], [errors], 0)[0]

    def _documents(self, items: Sequence[Item], errors: Sequence[list[str]], step: int) -> list[Document | Gap]:
        """The documents of items, each with the list that takes its error.

        All are read, then all written, then all pictures decoded: a picture empties the processor's caches, and after
        each one the code for everything else would have to come back.
        """
        places = [self._place(item) for item in items]
        drafts = {place: _Draft(item, place) for place, item in zip(places, items, strict=True)}
        self._read_drafts(drafts)
        for work in (self._write_draft, self._decode_draft):
            for draft in drafts.values():
                if draft.error is None:
                    try:
                        work(draft)
                    except Exception as error:  # a broken sample must never stop a run: it is named, counted, bounded
                        draft.error = error
        return [
            self._own_part(drafts[self._place(item)], item, told, step)
            for item, told in zip(items, errors, strict=True)
        ]

    def _place(self, item: Item) -> _Place:
        """What tells documents apart. Parts of a text are documents of their own where they can be read alone."""
        part = item.part if self._read.reads_part(item) else -1
        return item.source, item.shard, item.row, base_task(item.task), part

    def _own_part(self, draft: _Draft, item: Item, errors: list[str], step: int) -> Document | Gap:
        """An item's part of its document, or a gap."""
        try:
            if draft.error is not None:
                raise draft.error
            return self._checked_part(draft, item, step)
        except Exception as error:
            message = named_failure(self._plan, item, error)
            if self._raises:
                raise ValueError(message) from error
            errors.append(message)
            return Gap(item.num_tokens)

    def _checked_part(self, draft: _Draft, item: Item, step: int) -> Document:
        document = draft.document
        assert document is not None
        if item.part >= 0 and draft.place[-1] < 0:
            document = document.part(*part_bounds(document.num_tokens, self._plan.recipe.sequence_length, item.part))
        if item.task.startswith(MASKED):
            seed = [self._plan.recipe.seed, 14, step, item.source, item.shard, item.row]
            document = self._masking[item.source].masked(document, np.random.default_rng(seed))
        if document.num_tokens != item.num_tokens:
            raise ValueError(f"has {document.num_tokens} tokens, {item.num_tokens} when it was indexed; index it again")
        return document

    def _read_drafts(self, drafts: Mapping[_Place, _Draft]) -> None:
        unread = []
        for place, draft in drafts.items():
            draft.document = self._cache.get(place)
            if draft.document is None:
                unread.append(draft)
        found = self._read.read_many([draft.item for draft in unread], self._features)
        for draft, read in zip(unread, found, strict=True):
            if isinstance(read, Exception):
                draft.error = read
            else:
                draft.read = read

    def _write_draft(self, draft: _Draft) -> None:
        item, read = draft.item, draft.read
        if read is None:
            return
        if isinstance(read, TextPiece):
            draft.document = self._read.part_document(read, item)
        else:
            config = self._plan.sources[item.source].config
            task = base_task(item.task)
            template = (config.templates or {}).get(task)
            draft.document = build_document(read, task, self._folder, draft.later, template, config.anchor_prompt)
        draft.read, draft.is_new = None, True

    def _decode_draft(self, draft: _Draft) -> None:
        if draft.is_new:
            assert draft.document is not None
            if draft.pictures:
                pixels: list[np.ndarray] = []
                for source, name, tiles in draft.pictures:
                    found = self._transform(source, name, tiles)
                    pixels += [found] if tiles is None else list(found)
                draft.document = draft.document.with_pixels(pixels)
                draft.pictures.clear()
            self._keep(draft.place, draft.document)

    def _keep(self, place: _Place, document: Document) -> None:
        self._cached += document.num_bytes
        if self._cached <= self._cache_bytes:
            self._cache[place] = document
        else:  # full: what is in stays, since every document comes round equally often
            self._cached -= document.num_bytes


_Place = tuple[int, int, int, str, int]
"""Source, shard, row, task, and the part, or -1: whole."""


@dataclass
class _Draft:
    """A document on its way."""

    item: Item
    """It, or one of its parts."""
    place: _Place
    read: Sample | TextPiece | None = None
    document: Document | None = None
    is_new: bool = False
    pictures: list[tuple[ImageInput, str, TileGrid | None]] = field(default_factory=list)
    error: Exception | None = None

    def later(self, source: ImageInput, name: str = "image", tiles: TileGrid | None = None) -> np.ndarray:
        """In a transform's stead: notes a picture that is to be decoded."""
        self.pictures.append((source, name, tiles))
        return NO_PIXELS if tiles is None else np.stack([NO_PIXELS] * tiles.num_tiles)


class PackedLoader(Generic[AnyBatch]):
    """The batches of one rank, with a length, and a state that Lightning saves and restores.

    An epoch is `num_steps` steps; the stream goes on from one to the next. Steps are planned in a thread, a window
    ahead of the one that is taken, so that no step waits for packing.

    Args:
        plan: The plan.
        dataset: Steps to batches.
        num_steps: Length of an epoch.
        rank: This rank; it takes its share of each step's sequences (see `mmllm.data.loading.balance`).
        world_size: Number of ranks; it must divide the batch size.
        num_workers: Processes that read and decode; 0: this one.
        pin_memory: For GPUs.
        restarts: Begin anew each epoch (for validation).
        is_bounded: Too many documents that fail are an error.
    """

    def __init__(
        self,
        plan: Plan,
        dataset: Dataset[AnyBatch],
        num_steps: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        restarts: bool = False,
        is_bounded: bool = True,
    ) -> None:
        if plan.batch_size % world_size:
            raise ValueError(
                f"batch_size is {plan.batch_size} sequences, which {world_size} ranks can't share equally; "
                f"choose a multiple of {world_size}"
            )
        self._plan, self._dataset, self._num_steps = plan, dataset, num_steps
        self._rank, self._world_size = rank, world_size
        self._num_workers, self._pin_memory, self._restarts = num_workers, pin_memory, restarts
        self._is_bounded = is_bounded
        self._state = plan.initial_state()
        self._position = 0
        self._num_seen = self._num_failed = 0
        self._last_errors: list[str] = []

    def __len__(self) -> int:
        """Steps an epoch."""
        return self._num_steps

    def __iter__(self) -> Iterator[AnyBatch]:
        """The rest of the epoch."""
        if self._restarts:
            self._state, self._position = self._plan.initial_state(), 0
        elif self._position >= self._num_steps:
            self._position = 0
        is_empty = True
        # Planning begins with the first step that is asked for, which is when the workers have been started.
        with Ahead(self._rank_steps(self._num_steps - self._position), has_next_window) as plans:
            loader = DataLoader(
                self._dataset,
                batch_size=None,
                sampler=plans,  # pyright: ignore[reportArgumentType]
                num_workers=self._num_workers,
                pin_memory=self._pin_memory,
                prefetch_factor=4 if self._num_workers else None,
                collate_fn=_as_it_is,  # pyright: ignore[reportArgumentType]
            )
            for batch in self._living(iter(loader)):
                is_empty = False
                self._count(batch)
                self._state = {key: value for key, value in batch.state.items() if key not in _NOT_STATE}
                self._position += 1
                batch.state = {**batch.state, "position": self._position}
                yield batch
        if is_empty:  # silence would let a trainer count empty epochs for ever
            raise ValueError(
                f"the recipe's documents are used up after step {self._state['step']}; train for fewer steps, raise "
                f"max_epochs, or set mixture.on_exhausted to repeat"
            )
        if self._position < self._num_steps:  # all documents were seen: there is nothing more to wait for
            self._check_bound()

    def _living(self, batches: Iterator[AnyBatch]) -> Iterator[AnyBatch]:
        """The batches; where a worker is gone, an error that says so, in whatever way its pipe broke."""
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (EOFError, ConnectionError) as error:
                raise RuntimeError(
                    f"a DataLoader worker was killed or exited after step {self._state['step']} (out of memory?); "
                    f"resume from the last checkpoint, with a smaller cache_mb or fewer num_workers"
                ) from error
            yield batch

    def _rank_steps(self, count: int) -> Iterator[StepPlan]:
        for step in islice(self._plan.steps(self._state), count):
            numbers = tuple(self.share(step))
            mine = tuple(step.sequences[number] for number in numbers)
            yield StepPlan(step.step, mine, step.state, step.num_global_sequences, numbers)

    def share(self, step: StepPlan) -> list[int]:
        """Which of a whole step's sequences are this rank's, in the order of its batch."""
        if self._world_size == 1:
            return list(range(len(step.sequences)))
        costs = [sum(map(self._cost, sequence)) for sequence in step.sequences]
        return shares(costs, self._world_size)[self._rank]

    def documents_of(self, step: int, before: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """The documents of this rank's batch of a step, by name.

        Args:
            step: Of the plan, from 0.
            before: The state before that step, from which it is found at once; without it, or if it is another's, all
                windows up to the step are planned again.

        Returns:
            What `Plan.describe` says of each, with the `row` of the batch and the `number` in it, as in
            `document_ids_BT`.
        """
        planned = None
        if before is not None and before.get("step") == step:
            state = {key: before[key] for key in self._plan.initial_state()}
            planned = next(self._plan.steps(state), None)
        if planned is None:
            planned = self._plan.at(step)
        return [
            {**self._plan.describe(item), "row": row, "number": number}
            for row, place in enumerate(self.share(planned))
            for number, item in enumerate(planned.sequences[place])
        ]

    def _cost(self, item: Item) -> float:
        """About how much work a document is, in tokens."""
        if not self._plan.sources[item.source].has_media:
            return item.num_tokens
        place = self._plan.sources[item.source].indices[item.shard].place(item.row)
        num_frames = 0 if item.task == "speak" else place.num_frames
        return item.num_tokens + IMAGE_COST * place.num_tiles + FRAME_COST * num_frames

    def _count(self, batch: AnyBatch) -> None:
        errors = batch.state.get("errors", ())
        self._num_seen += batch.num_documents + len(errors)
        if not errors:
            return
        self._num_failed += len(errors)
        for message in errors[:_NAMED]:
            _logger.warning("masked %s", message)
        self._last_errors = errors[:_NAMED]
        limit = self._plan.recipe.on_error.max_fraction
        self._check_bound(max(math.ceil(limit * LEAST_SEEN), LEAST_FAILED if limit else 0))

    def _check_bound(self, allowed: int = 0) -> None:
        """Refuses more failures than the recipe allows of the documents seen, and more than `allowed`."""
        limit = self._plan.recipe.on_error.max_fraction
        if self._is_bounded and self._num_failed > max(allowed, math.ceil(limit * self._num_seen)):
            raise ValueError(
                f"{self._num_failed} of {self._num_seen} documents failed, more than on_error.max_fraction {limit}; "
                f"the last: {'; '.join(self._last_errors)}"
            )

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs: the plan's state after the last batch that was taken."""
        return {**self._state, "position": self._position, "seen": self._num_seen, "failed": self._num_failed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, also with other numbers of ranks and workers.

        Raises:
            ValueError: It belongs to another recipe or batch size.
        """
        self._plan.check_state(state)
        self._state = {key: state[key] for key in self._plan.initial_state()}
        self._position = int(state.get("position", 0))
        self._num_seen, self._num_failed = int(state.get("seen", 0)), int(state.get("failed", 0))


def has_next_window(steps: Sequence[StepPlan]) -> bool:
    """Whether the window after that of the coming step is planned; of a plan without windows, the step after it."""
    first, last = (step.state.get("window", step.step) for step in (steps[0], steps[-1]))
    return last > first


def _as_it_is(batch: AnyBatch) -> AnyBatch:
    return batch
