"""The plan: which documents make sequence n. A pure function of (recipe, shards, batch size).

A window of documents is drawn, always from the source that is furthest below its share; the window is packed
best-fit-decreasing; its sequences are shuffled and numbered on. Every rank plans the same global stream and
takes its own rows of it, so neither ranks nor workers change what a step holds.

Shapes: M items (a document as one task, or one part of a long text).
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.data.documents import num_parts
from mmllm.data.filters import compile_filter
from mmllm.data.index import ShardIndex, load_index
from mmllm.data.recipe import CurriculumConfig, Recipe, SourceConfig, recipe_hash
from mmllm.data.shards import find_shards
from mmllm_tokenizers.folder import TokenizerFolder

STATE_VERSION = 1

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """One document of a sequence: where it is and what it becomes."""

    source: int
    shard: int
    row: int
    """Row of the shard's index."""
    task: str
    part: int
    """Piece of a split text, or -1 for a whole document."""
    num_tokens: int


@dataclass(frozen=True)
class StepPlan:
    """What one step holds: the sequences of one rank (or of all), and the state after it."""

    step: int
    sequences: tuple[tuple[Item, ...], ...]
    state: dict[str, Any]
    num_global_sequences: int
    """Of all ranks."""


class Source:
    """A recipe's source with its shards' indices: its items, in the order of the shards.

    Raises:
        ValueError: The shards hold another kind, or nothing is left after the filter.
    """

    def __init__(self, config: SourceConfig, number: int, indices: list[ShardIndex], recipe: Recipe) -> None:
        self.config, self.number, self.indices = config, number, indices
        self.num_filtered = self.num_too_long = 0
        self._seed = recipe.seed
        columns: list[list[np.ndarray]] = [[], [], [], [], []]
        for shard, index in enumerate(indices):
            if index.kind != config.kind:
                raise ValueError(f"source {config.name!r}: {index.path} holds {index.kind} samples, not {config.kind}")
            for task_number, task in enumerate(config.task_names):
                for column, values in zip(columns, self._items(shard, index, task_number, task, recipe), strict=True):
                    column.append(values)
        self.shard_M, self.row_M, self.task_M, self.part_M, self.tokens_M = (np.concatenate(c) for c in columns)
        self.name_seed = zlib.crc32(config.name.encode())
        if not len(self.tokens_M):
            raise ValueError(
                f"source {config.name!r}: no documents are left ({self.num_filtered} filtered out, "
                f"{self.num_too_long} longer than sequence_length {recipe.sequence_length}); "
                f"check its filter, tasks and the sequence length"
            )
        if self.num_too_long:
            _logger.warning("source %s: left out %d documents longer than a sequence", config.name, self.num_too_long)
        self.rank_M = self._ranks(recipe.curriculum)

    def _items(self, shard: int, index: ShardIndex, task_number: int, task: str, recipe: Recipe) -> list[np.ndarray]:
        length = recipe.sequence_length
        tokens_N = index.lengths[task]
        keep_N = (tokens_N > 0) & self._keep(index)
        self.num_filtered += int((~keep_N).sum())
        rows = np.flatnonzero(keep_N)
        tokens = tokens_N[rows]
        is_long = tokens > length
        if index.kind != "text" or recipe.packing.long_documents == "drop":
            self.num_too_long += int(is_long.sum())
            rows, tokens = rows[~is_long], tokens[~is_long]
            is_long = is_long[~is_long]
        counts = np.ones(len(rows), dtype=np.int64)
        counts[is_long] = [num_parts(int(count), length) for count in tokens[is_long]]
        part = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        rows, tokens, is_long = (np.repeat(column, counts) for column in (rows, tokens, is_long))
        tokens = np.where(is_long, np.minimum(length, tokens - part * (length - 1)), tokens)
        part = np.where(is_long, part, -1)
        return [np.full(len(rows), shard), rows, np.full(len(rows), task_number), part, tokens]

    def _keep(self, index: ShardIndex) -> np.ndarray:
        keep_N = np.ones(index.num_documents, dtype=bool)
        if self.config.max_images is not None:
            keep_N &= index.num_images_N <= self.config.max_images
        if self.config.filter is not None:
            function = compile_filter(self.config.filter)
            names = list(index.columns)
            rows = zip(*index.columns.values(), strict=True) if names else ((),) * index.num_documents
            keep_N &= np.array([function(dict(zip(names, row, strict=True))) for row in rows], dtype=bool)
        return keep_N

    def _ranks(self, curriculum: CurriculumConfig | None) -> np.ndarray | None:
        """Each item's place in the order of difficulty, 0 the easiest."""
        if curriculum is None:
            return None
        difficulty_M = self._difficulty(curriculum.metric)
        rank_M = np.empty(len(difficulty_M), dtype=np.int64)
        rank_M[np.argsort(difficulty_M, kind="stable")] = np.arange(len(difficulty_M))
        return rank_M

    def _difficulty(self, metric: str) -> np.ndarray:
        if metric == "num_tokens":
            return self.tokens_M
        per_shard = []
        for index in self.indices:
            match metric:
                case "num_images":
                    values_N = index.num_images_N
                case "num_frames":
                    values_N = index.num_frames_N
                case _:
                    column = index.columns.get(metric)
                    values_N = np.full(index.num_documents, np.inf) if column is None else column.numbers()
            per_shard.append(values_N)
        starts = np.cumsum([0, *(len(values) for values in per_shard)])[:-1]
        return np.concatenate(per_shard)[starts[self.shard_M] + self.row_M]

    @property
    def num_items(self) -> int:
        """M."""
        return len(self.tokens_M)

    def order(self, epoch: int) -> list[int]:
        """The items of an epoch, shuffled; tasks of less weight keep a share of theirs."""
        rng = np.random.default_rng([self._seed, self.name_seed, epoch])
        order = rng.permutation(self.num_items)
        if self.config.task_weights is not None:
            weights = np.array(self.config.task_weights) / max(self.config.task_weights)
            kept = order[rng.random(self.num_items) < weights[self.task_M[order]]]
            order = kept if len(kept) else order
        return order.tolist()

    def item(self, number: int) -> Item:
        """Item `number` in full."""
        task = self.config.task_names[self.task_M[number]]
        shard, row, part, tokens = (int(c[number]) for c in (self.shard_M, self.row_M, self.part_M, self.tokens_M))
        return Item(self.number, shard, row, task, part, tokens)

    @cached_property
    def token_list(self) -> list[int]:
        """`tokens_M` as plain integers, which Python's loops read faster."""
        return self.tokens_M.tolist()

    @cached_property
    def rank_list(self) -> list[int] | None:
        """`rank_M` likewise."""
        return None if self.rank_M is None else self.rank_M.tolist()


class _Cursor:
    """How far a source has been drawn."""

    def __init__(self, source: Source, epoch: int, position: int, drawn: int) -> None:
        self.source, self.epoch, self.position = source, epoch, position
        self.drawn = drawn
        """Tokens, or samples, drawn so far: what shares are kept by."""
        self._order = source.order(epoch)

    def exhausted(self, repeat: bool) -> bool:
        limit = self.source.config.max_epochs
        if limit is None or repeat:
            return False
        return self.epoch + self.position / len(self._order) >= limit

    def draw(self, num_easiest: int | None) -> int | None:
        """The next item's number; `None` where the epoch had no more that is easy enough."""
        ranks = self.source.rank_list
        while self.position < len(self._order):
            number = self._order[self.position]
            self.position += 1
            if num_easiest is None or ranks is None or ranks[number] < num_easiest:
                return number
        return None

    def turn(self) -> None:
        """Begin the next epoch if this one is over."""
        if self.position >= len(self._order):
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self.source.order(self.epoch)


class Plan:
    """The stream of steps of a recipe.

    Args:
        recipe: The recipe.
        sources: Its sources, opened (`open_sources`).
        batch_size: Sequences a step, of all ranks together.
        tokenizer_hash: The tokenizer folder's.
    """

    def __init__(self, recipe: Recipe, sources: list[Source], batch_size: int, tokenizer_hash: str) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1 sequence")
        self.recipe, self.sources, self.batch_size = recipe, sources, batch_size
        digests = [[index.sha256 for index in source.indices] for source in sources]
        self.hash = recipe_hash(recipe, digests, tokenizer_hash)
        self._shares = recipe.shares()

    def initial_state(self) -> dict[str, Any]:
        """The state before step 0."""
        return {
            "version": STATE_VERSION,
            "recipe": self.hash[:16],
            "batch_size": self.batch_size,
            "step": 0,
            "window": 0,
            "offset": 0,
            "cursors": [[0, 0, 0] for _ in self.sources],
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse a state that belongs to another recipe, other shards, or another batch size.

        Raises:
            ValueError: It does.
        """
        wanted = self.initial_state()
        for key in ("version", "recipe", "batch_size"):
            if state.get(key) != wanted[key]:
                raise ValueError(
                    f"the saved data state has {key} {state.get(key)!r}, this run has {wanted[key]!r}; "
                    f"resume with the same recipe, shards, tokenizer and global batch size"
                )

    def steps(self, state: Mapping[str, Any] | None = None) -> Iterator[StepPlan]:
        """Steps from a state on; ends only when a capped source runs out (see `mixture.on_exhausted`).

        The last step of a stream that ends is filled up with empty sequences.
        """
        state = dict(state) if state is not None else self.initial_state()
        self.check_state(state)
        step, pending = state["step"], []
        here: dict[str, Any] = {}
        for here, sequence in self._sequences(state):
            pending.append(sequence)
            if len(pending) == self.batch_size:
                step += 1
                yield StepPlan(step - 1, tuple(pending), {**here, "step": step}, self.batch_size)
                pending = []
        if pending:
            pending += [()] * (self.batch_size - len(pending))
            yield StepPlan(step, tuple(pending), {**here, "step": step + 1}, self.batch_size)

    def at(self, step: int) -> StepPlan:
        """Step number `step`, planned from the start.

        Raises:
            ValueError: The stream ends before it.
        """
        last = -1
        for plan in self.steps():
            if plan.step == step:
                return plan
            last = plan.step
        raise ValueError(f"step is {step}; the recipe's documents last for {last + 1} steps")

    def _sequences(self, state: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], tuple[Item, ...]]]:
        """(state after it, sequence), on and on."""
        window, offset = state["window"], state["offset"]
        cursors = [_Cursor(source, *values) for source, values in zip(self.sources, state["cursors"], strict=True)]
        base = {key: state[key] for key in ("version", "recipe", "batch_size")}
        # The curriculum reads the step at which a window began; a resumed window must read the same one.
        first = state["step"] * self.batch_size - offset
        while True:
            before = [[cursor.epoch, cursor.position, cursor.drawn] for cursor in cursors]
            items, is_last = self._draw(cursors, max(0, first) // self.batch_size)
            if not items:
                return
            packed = self._pack(items, window)
            for number in range(offset, len(packed)):
                done = number + 1 == len(packed)
                after = [[cursor.epoch, cursor.position, cursor.drawn] for cursor in cursors] if done else before
                yield (
                    {**base, "window": window + done, "offset": 0 if done else number + 1, "cursors": after},
                    packed[number],
                )
            if is_last:
                return
            first, offset, window = first + len(packed), 0, window + 1

    def _draw(self, cursors: list[_Cursor], step: int) -> tuple[list[tuple[int, int, int]], bool]:
        """A window of (tokens, source, item), and whether the stream ends with it."""
        mixture, curriculum = self.recipe.mixture, self.recipe.curriculum
        repeat = mixture.on_exhausted == "repeat"
        by_tokens = mixture.unit == "tokens"
        easiest: list[int | None] = [None] * len(cursors)
        if curriculum is not None and curriculum.share(step) < 1:
            share = curriculum.share(step)
            easiest = [max(1, int(np.ceil(share * cursor.source.num_items))) for cursor in cursors]
        open_ = [number for number, cursor in enumerate(cursors) if not cursor.exhausted(repeat)]
        if mixture.on_exhausted == "stop" and len(open_) < len(cursors):
            return [], True
        drawn: list[tuple[int, int, int]] = []
        while open_ and len(drawn) < self.recipe.packing.window:
            number = min(open_, key=lambda source: cursors[source].drawn / self._shares[source])
            cursor = cursors[number]
            cursor.turn()
            item = cursor.draw(easiest[number])
            if item is not None:
                tokens = cursor.source.token_list[item]
                cursor.drawn += tokens if by_tokens else 1
                drawn.append((tokens, number, item))
            if cursor.exhausted(repeat):
                open_.remove(number)
                if mixture.on_exhausted == "stop":
                    return drawn, True
        return drawn, not open_

    def _pack(self, items: list[tuple[int, int, int]], window: int) -> list[tuple[Item, ...]]:
        """Best-fit-decreasing: the longest first, each into the fullest sequence that still takes it."""
        length = self.recipe.sequence_length
        bins: list[list[tuple[int, int, int]]] = []
        room: list[tuple[int, int]] = []  # (tokens left, bin), ascending
        for item in sorted(items, reverse=True):
            place = bisect_left(room, (item[0], -1))
            if place < len(room):
                left, number = room.pop(place)
                bins[number].append(item)
            else:
                left, number = length, len(bins)
                bins.append([item])
            if left > item[0]:
                insort(room, (left - item[0], number))
        order = np.random.default_rng([self.recipe.seed, 1, window]).permutation(len(bins))
        return [tuple(self.sources[source].item(item) for _, source, item in bins[number]) for number in order]

    def describe(self, item: Item) -> dict[str, Any]:
        """An item by name: source, shard, key, task, part, tokens."""
        index = self.sources[item.source].indices[item.shard]
        _, _, line = index.place(item.row)
        return {
            "source": self.sources[item.source].config.name,
            "shard": index.path.name,
            "key": index.keys[item.row] + (f"-{line}" if line >= 0 else ""),
            "task": item.task,
            "part": item.part,
            "tokens": item.num_tokens,
        }

    def sequence_hash(self, sequence: tuple[Item, ...]) -> str:
        """Names a sequence by what it holds: equal for equal documents in equal order, wherever they lie."""
        text = "\n".join("\t".join(str(value) for value in self.describe(item).values()) for item in sequence)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def open_sources(recipe: Recipe, tokenizer_hash: str) -> list[Source]:
    """A recipe's sources with their indices.

    Raises:
        FileNotFoundError: Shards or their indices are missing.
        ValueError: An index belongs to another tokenizer, or a source is left without documents.
    """
    sources = []
    base = Path(recipe.folder) if recipe.folder is not None else None
    for number, config in enumerate(recipe.sources):
        try:
            indices = [load_index(path, tokenizer_hash) for path in find_shards(config.shards, base)]
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"source {config.name!r}: {error}") from error
        sources.append(Source(config, number, indices, recipe))
    return sources


def open_plan(recipe: Recipe, batch_size: int, folder: TokenizerFolder | None = None) -> Plan:
    """The plan of a recipe, its tokenizer and shards looked up.

    Args:
        recipe: The recipe.
        batch_size: Sequences a step, of all ranks together.
        folder: The recipe's tokenizer folder, if it is loaded already.

    Raises:
        FileNotFoundError, ValueError: As `open_sources`.
    """
    folder = folder or TokenizerFolder.load(recipe.tokenizer_folder())
    return Plan(recipe, open_sources(recipe, folder.hash), batch_size, folder.hash)
