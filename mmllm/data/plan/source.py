"""A recipe's source: its documents as items, their order of difficulty, and what is drawn next.

Of each item its number of tokens is kept, two bytes; which row it is where rows are left out or split, and what a
budget or a curriculum asks for. All else stays in the files of the indices.

Positions count the items of all epochs on end: `position // num_items` is the epoch. Each epoch is shuffled in blocks
of whole shards, so that a large source is never permuted at once.

Shapes: M items (a document as one task, or one part of a long text), G groups of items (one shard as one task).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, repeat
from typing import Any

import numpy as np

from mmllm.data.expressions import filter_names
from mmllm.data.index.columns import Column
from mmllm.data.index.index import ShardIndex
from mmllm.data.plan.balance import NO_VALUE, Balance, balance_of
from mmllm.data.plan.filter import kept_documents
from mmllm.data.plan.items import Item, Items
from mmllm.data.plan.readings import measured, shares_of, sounds_of, values_of
from mmllm.data.plan.recipe import DEFAULT_ALPHA, CurriculumConfig, Recipe, SourceConfig
from mmllm.data.samples.stored import COLUMN
from mmllm.data.samples.text_parts import num_parts

BLOCK_ITEMS = 1 << 20
"""Items that are shuffled together, at least; fewer where the source has no more."""

_CHUNK = 4096
_COUNTED = ("num_tokens", "num_images", "num_frames")
_LENGTHS = ("num_tokens", "length")
TASK_COLUMN = "task"
"""The rows' key that says a document's task type, where a source names no other."""
_COPIED = "perturbed"
"""What `build --perturb` writes in altered copies; without it no row has the key, and a filter may still name it."""
_ORDER, _RANKS, _CAP, _FORM = 6, 7, 10, 13
"""What random numbers are for; others of the recipe's seed are 1 (`Plan`), 4 and 14 (`StepDataset`), and 8 and 9
(`single.py`)."""
_NAMED = 5
"""Documents that are named in one message."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawn:
    """The next items of a source."""

    items: np.ndarray
    """Their numbers."""
    after: np.ndarray
    """The position after each."""
    is_all: bool
    """Nothing may be drawn after them: the source is at its limit."""


@dataclass(frozen=True)
class _Rows:
    """Documents of a shard as one task, before long ones are split."""

    index: ShardIndex
    rows: np.ndarray
    tokens: np.ndarray
    is_masked: bool = False
    """The documents have masked spans."""


class Source:
    """A recipe's source with its shards' indices: its items, in the order of the shards.

    Args:
        config: The source.
        number: Its place in the recipe.
        indices: Its shards' indices.
        recipe: The recipe.
        more_tokens: Of a shard, by task, tokens that the source's own templates add, to all documents or to each.
        masked_tokens: Of documents with so many tokens and tiles, how many they have with masked spans; 0: they can't
            have any. Needed where `masked_spans` is set.

    Raises:
        ValueError: The shards hold another kind, or nothing is left after the filter.
    """

    def __init__(
        self,
        config: SourceConfig,
        number: int,
        indices: Sequence[ShardIndex],
        recipe: Recipe,
        more_tokens: Callable[[ShardIndex], Mapping[str, int | np.ndarray]] | None = None,
        masked_tokens: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self.config, self.number, self.indices = config, number, list(indices)
        self.num_filtered = self.num_too_long = self.num_over_budget = self.num_over_cap = self.num_never_masked = 0
        self.num_by_type: Counter[str] = Counter()
        """Documents by task type, where the source caps types or holds some out."""
        self.num_held_out: Counter[str] = Counter()
        """Documents that are held out, by task type."""
        self._named_too_long: list[str] = []
        self._seed = (recipe.seed, number)
        if config.masked_spans is not None and masked_tokens is None:
            raise ValueError(f"source {config.name!r}: masked_spans is for training a decoder; leave it out here")
        self._check_filter()
        items = Items(
            len(config.item_tasks) * sum(index.num_documents for index in self.indices), recipe.sequence_length
        )
        groups = self._groups_of_rows(recipe, more_tokens, masked_tokens)
        for group in groups if config.max_documents is None else self._capped(list(groups), config.max_documents):
            if (config.max_documents is not None or config.heldout_tasks is not None) and not group.is_masked:
                self.num_by_type.update(self._types(group.index)[group.rows].tolist())
            items.add(*self._parted(group, recipe))
        self._check_held_out()
        self.tokens_M, self._row_M, self._part_M = items.whole()
        self._starts_G = np.cumsum([0, *items.sizes])
        if not len(self.tokens_M):
            raise ValueError(f"source {config.name!r}: no documents are left {self._why_none_is_left(recipe)}")
        too_long = f"longer than a sequence: {', '.join(self._named_too_long)}"
        too_long += ", …" if self.num_too_long > len(self._named_too_long) else ""
        for count, why in ((self.num_too_long, too_long), (self.num_over_budget, "over a budget")):
            if count:
                _logger.warning("source %s: left out %d documents %s", config.name, count, why)
        if self.num_never_masked:
            _logger.info(
                "source %s: %d documents are too long or too short for masked spans, and stay as they are",
                config.name, self.num_never_masked,
            )  # fmt: skip
        for task_type, count in self.num_held_out.items():
            _logger.info("source %s: held out %d documents of the task type %s", config.name, count, task_type)
        self.rank_M = self._ranks(recipe.curriculum)
        self.balance, self._chance_M = self._balanced()
        self._may_mask = self._maskable()
        self._blocks: dict[tuple[int, int], tuple[np.ndarray, np.ndarray | None]] = {}
        self._cuts: tuple[int, np.ndarray, np.ndarray] | None = None

    def _why_none_is_left(self, recipe: Recipe) -> str:
        shared = "" if self.config.share is None else f" by its filter and its share of {self.config.share:g}"
        return (
            f"({self.num_filtered} filtered out{shared}, {self.num_held_out.total()} held out, "
            f"{self.num_too_long} longer than sequence_length {recipe.sequence_length}, {self.num_over_budget} over "
            f"the packing's budgets); check its filter, tasks and the sequence length"
        )

    def _lengths(self, index: ShardIndex, task: str) -> np.ndarray:
        """int64 [N] of a shard's documents as a task; those of 0 are left out."""
        return index.tokens_of(task)

    def values(self, name: str) -> set[str]:
        """What a column says of the documents that are drawn, as strings; what is empty left out."""
        found: set[str] = set()
        for index in self.indices:
            column = index.columns.get(name)
            if column is None:
                continue
            for task in self.config.task_names:
                tokens_N = self._lengths(index, task)
                is_drawn_N = self._keep(index, task, tokens_N) & (tokens_N > 0)
                if (is_held_N := self._is_held_out(index)) is not None:
                    is_drawn_N &= ~is_held_N
                found.update(str(column[row]) for row in is_drawn_N.nonzero()[0] if column[row] not in (None, ""))
        return found

    def __getstate__(self) -> dict[str, Any]:
        """What a worker needs: it is told which items to read, and plans none."""
        nothing = np.zeros(0, dtype=np.int32)
        planned = {
            "tokens_M": nothing,
            "_row_M": None,
            "_part_M": None,
            "rank_M": None,
            "_chance_M": None,
            "_may_mask": None,
            "_blocks": {},
            "_cuts": None,
        }
        return {**self.__dict__, **planned}

    def _check_index(self, index: ShardIndex) -> None:
        if index.kind != self.config.kind:
            raise ValueError(
                f"source {self.config.name!r}: {index.path} holds {index.kind} samples, not {self.config.kind}"
            )
        if index.text_key != self.config.text_key:
            raise ValueError(
                f"source {self.config.name!r}: {index.path} was indexed with text_key {index.text_key!r}, the recipe "
                f"has {self.config.text_key!r}; run 'mmllm data index --text_key' again, or set the source's text_key"
            )

    def _groups_of_rows(
        self,
        recipe: Recipe,
        more_tokens: Callable[[ShardIndex], Mapping[str, int | np.ndarray]] | None,
        masked_tokens: Callable[[np.ndarray, np.ndarray], np.ndarray] | None,
    ) -> Iterator[_Rows]:
        """The rows of each shard as each task that may be drawn."""
        for index in self.indices:
            self._check_index(index)
            more = more_tokens(index) if more_tokens is not None else {}
            if (is_held_N := self._is_held_out(index)) is not None:
                written_N = np.logical_or.reduce([self._lengths(index, task) > 0 for task in self.config.task_names])
                self.num_held_out.update(self._types(index)[is_held_N & written_N].tolist())
            for task in self.config.task_names:
                rows = self._rows(index, task, recipe, more.get(task, 0), is_held_N)
                yield rows
                if masked_tokens is not None:
                    yield self._masked(rows, recipe, masked_tokens(rows.tokens, index.num_tiles_N[rows.rows]))

    def _masked(self, whole: _Rows, recipe: Recipe, tokens: np.ndarray) -> _Rows:
        """The rows of a group that can be written with masked spans, in one sequence."""
        fits = (tokens > 0) & (tokens <= recipe.sequence_length)
        self.num_never_masked += int((~fits).sum())
        return _Rows(whole.index, whole.rows[fits], tokens[fits], is_masked=True)

    def _types(self, index: ShardIndex) -> np.ndarray:
        """[N] the task type of a shard's documents, "" of those that don't say it."""
        column = index.columns.get(self.config.task_column or TASK_COLUMN)
        if column is None:
            return np.full(index.num_documents, "")
        return np.array(["" if value is None else str(value) for value in column])

    def _is_held_out(self, index: ShardIndex) -> np.ndarray | None:
        """[N] bools; `None` where nothing is held out."""
        if self.config.heldout_tasks is None:
            return None
        return np.isin(self._types(index), self.config.heldout_tasks)

    def _check_held_out(self) -> None:
        """A misspelt task type would be trained on, and a misspelt column cap nothing."""
        config, name = self.config, self.config.task_column or TASK_COLUMN
        if (config.max_documents is not None or config.heldout_tasks is not None) and name not in self.column_names:
            raise ValueError(
                f"source {config.name!r}: no document says its task type in {name!r}, which max_documents and "
                f"heldout_tasks read; set task_column to one of {', '.join(sorted(self.column_names)) or 'no key'}"
            )
        unknown = [each for each in config.heldout_tasks or () if each not in self.num_held_out]
        if unknown:
            known = sorted({*self.num_by_type, *self.num_held_out} - {""})
            raise ValueError(
                f"source {config.name!r}: heldout_tasks names {unknown[0]!r}, which no document of it has in {name!r}; "
                f"there are {', '.join(known)}"
            )

    def _capped(self, groups: list[_Rows], cap: int) -> Iterator[_Rows]:
        """The groups with at most so many documents of each task type, as each task that they are written as."""
        num_tasks = len(self.config.task_names)
        kept = [np.zeros(0, dtype=bool)] * len(groups)
        for place in range(num_tasks):
            mine = range(place, len(groups), num_tasks)
            types_R = np.concatenate([self._types(groups[number].index)[groups[number].rows] for number in mine])
            order = self._random(_CAP, place).permutation(len(types_R))
            _, codes_R, counts = np.unique(types_R[order], return_inverse=True, return_counts=True)
            starts_R = np.repeat(np.cumsum(counts) - counts, counts)
            occurrence_R = np.empty(len(order), dtype=np.int64)
            occurrence_R[order[np.argsort(codes_R, kind="stable")]] = np.arange(len(order)) - starts_R
            is_kept_R = occurrence_R < cap
            self.num_over_cap += int((~is_kept_R).sum())
            ends = np.cumsum([len(groups[number].rows) for number in mine])[:-1]
            for number, is_kept in zip(mine, np.split(is_kept_R, ends), strict=True):
                kept[number] = is_kept
        for group, is_kept in zip(groups, kept, strict=True):
            yield replace(group, rows=group.rows[is_kept], tokens=group.tokens[is_kept])

    def _rows(
        self,
        index: ShardIndex,
        task: str,
        recipe: Recipe,
        more_tokens: int | np.ndarray,
        is_held_N: np.ndarray | None,
    ) -> _Rows:
        """A shard's rows as one task that may be drawn."""
        length, packing = recipe.sequence_length, recipe.packing
        tokens_N = self._lengths(index, task)
        keep_N = self._keep(index, task, tokens_N)
        is_chat_too = self.config.kind == "interleaved" and len(self.config.task_names) > 1
        self.num_filtered += int((~keep_N & (tokens_N > 0)).sum() if is_chat_too else (~keep_N | (tokens_N == 0)).sum())
        keep_N &= tokens_N > 0
        if is_held_N is not None:
            keep_N &= ~is_held_N
        within_N = np.ones(len(tokens_N), dtype=bool)
        for limit, name in ((packing.max_images, "num_tiles"), (packing.max_frames, "num_frames")):
            if limit is not None:
                within_N &= measured(index, name) <= limit
        self.num_over_budget += int((keep_N & ~within_N).sum())
        rows = np.flatnonzero(keep_N & within_N)
        tokens = tokens_N[rows] + (more_tokens if isinstance(more_tokens, int) else more_tokens[rows])
        is_long = tokens > length
        if index.kind != "text" or packing.long_documents == "drop":
            self.num_too_long += int(is_long.sum())
            for row, count in zip(rows[is_long].tolist(), tokens[is_long].tolist(), strict=True):
                if len(self._named_too_long) == _NAMED:
                    break
                self._named_too_long.append(f"{index.path.name}:{index.key(row)} ({count} tokens)")
            rows, tokens = rows[~is_long], tokens[~is_long]
        return _Rows(index, rows, tokens)

    def _parted(self, group: _Rows, recipe: Recipe) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """(tokens, row, part) of a group; rows are `None` where all are there, once each."""
        index, rows, tokens, length = group.index, group.rows, group.tokens, recipe.sequence_length
        is_long = tokens > length
        if not is_long.any():
            return tokens, rows if len(rows) < index.num_documents else None, None
        counts = np.ones(len(rows), dtype=np.int64)
        counts[is_long] = [num_parts(int(count), length) for count in tokens[is_long]]
        part = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        rows, tokens, is_long = (np.repeat(column, counts) for column in (rows, tokens, is_long))
        tokens = np.where(is_long, np.minimum(length, tokens - part * (length - 1)), tokens)
        return tokens, rows, np.where(is_long, part, -1)

    def _check_filter(self) -> None:
        """A misspelt key would be `None` in every row, and `not` of it keep them all."""
        if self.config.filter is None:
            return
        known = {*_COUNTED, _COPIED, *self.column_names}
        unknown = [name for name in filter_names(self.config.filter) if name not in known]
        if unknown:
            raise ValueError(
                f"source {self.config.name!r}: filter {self.config.filter!r} reads {unknown[0]!r}, which no document "
                f"has; known are {', '.join(sorted(known))}"
            )

    def _keep(self, index: ShardIndex, task: str, tokens_N: np.ndarray) -> np.ndarray:
        keep_N = np.ones(index.num_documents, dtype=bool)
        if self.config.max_images is not None:
            keep_N &= index.num_images_N <= self.config.max_images
        if self.config.share is not None:
            keep_N &= shares_of(index, self._seed[0]) < self.config.share
        if self.config.filter is not None:
            columns: dict[str, Column | np.ndarray] = dict(index.columns)
            for name in set(_COUNTED) & set(filter_names(self.config.filter)):
                columns[name] = tokens_N if name == "num_tokens" else measured(index, name)
            try:
                keep_N &= kept_documents(self.config.filter, columns, index.num_documents)
            except ValueError as error:
                raise ValueError(f"source {self.config.name!r}: {error}") from error
        return keep_N

    def _balanced(self) -> tuple[Balance | None, np.ndarray | None]:
        """The values of the column that the source balances, and each item's chance [M] to be drawn in an epoch."""
        name, alpha = self.config.balance, self.config.balance_alpha
        if name is None:
            return None, None
        if name not in self.column_names:
            raise ValueError(
                f"source {self.config.name!r}: balance is {name!r}, which no document has; known are "
                f"{', '.join(sorted(self.column_names)) or 'none'}"
            )
        codes: dict[str, int] = {}
        codes_D = np.concatenate([  # of all documents, as `_documents_of` numbers them
            np.array([codes.setdefault(value, len(codes)) for value in values_of(index, name)], dtype=np.int32)
            for index in self.indices
        ])  # fmt: skip
        documents_M = self._documents_of(np.arange(self.num_items))
        is_item_D = np.zeros(len(codes_D), dtype=bool)
        is_item_D[documents_M] = True  # one that is several parts, tasks or forms is counted once
        counts = np.bincount(codes_D[is_item_D], minlength=len(codes))
        balance, chance_M = balance_of(codes_D[documents_M], codes, DEFAULT_ALPHA if alpha is None else alpha, counts)
        return balance, chance_M.astype(np.float32)

    def balance_value(self, shard: int, row: int) -> str:
        """A document's value of the column that the source balances."""
        column = self.indices[shard].columns.get(self.config.balance or "")
        value = None if column is None else column[row]
        return NO_VALUE if value is None else str(value)

    def _ranks(self, curriculum: CurriculumConfig | None) -> np.ndarray | None:
        """Each item's place in the order in which the curriculum adds them, 0 the first."""
        if curriculum is None or not curriculum.orders(self.config.name):
            return None
        if curriculum.order == "random":
            rng = self._random(_RANKS)
            return rng.permutation(self.num_items).astype(np.int32)
        difficulty_M = self._difficulty(curriculum.metric).astype(np.float64)
        if curriculum.order == "hard_first":
            difficulty_M = np.where(np.isfinite(difficulty_M), -difficulty_M, np.inf)
        rank_M = np.empty(len(difficulty_M), dtype=np.int32)
        rank_M[np.argsort(difficulty_M, kind="stable")] = np.arange(len(difficulty_M))
        return rank_M

    def _difficulty(self, metric: str) -> np.ndarray:
        if metric in _LENGTHS:
            return self.tokens_M
        if not self.has(metric):
            _logger.warning("source %s: no document has %r; the curriculum keeps their order", self.config.name, metric)
        return self._gathered(lambda index: measured(index, metric), np.float64)

    def has(self, metric: str) -> bool:
        """Whether any document has a number for a curriculum's metric."""
        if metric in _LENGTHS:
            return True
        return any(np.isfinite(measured(index, metric)).any() for index in self.indices)

    def _gathered(self, read: Callable[[ShardIndex], np.ndarray], dtype: type) -> np.ndarray:
        """[M] from values of each shard's documents."""
        gathered_M, bounds = np.empty(self.num_items, dtype=dtype), self._starts_G.tolist()
        num_tasks = len(self.config.item_tasks)
        for shard, index in enumerate(self.indices):
            values_N = read(index)
            for group in range(shard * num_tasks, (shard + 1) * num_tasks):
                here = slice(bounds[group], bounds[group + 1])
                gathered_M[here] = values_N if self._row_M is None else values_N[self._row_M[here]]
        return gathered_M

    def costs(self, name: str) -> np.ndarray:
        """int32 [M] of `num_tiles` or `num_frames`."""
        return self._gathered(lambda index: measured(index, name), np.int32)

    def heard_sounds(self) -> np.ndarray:
        """int64 [Q, 3] of each sound that its items let a model hear, as `ShardIndex.sounds_Q3` has them."""
        bounds, tasks = self._starts_G.tolist(), self.config.item_tasks
        heard = [np.zeros((0, 3), dtype=np.int64)]
        for shard, index in enumerate(self.indices):
            sounds_Q3, documents_Q = sounds_of(index)
            for place, task in enumerate(tasks):
                group = shard * len(tasks) + place
                here = slice(bounds[group], bounds[group + 1])
                if task == "speak":
                    continue
                if self._row_M is not None:
                    is_item_N = np.zeros(index.num_documents, dtype=bool)
                    is_item_N[self._row_M[here]] = True
                    heard.append(sounds_Q3[is_item_N[documents_Q]])
                else:
                    heard.append(sounds_Q3)
        return np.concatenate(heard)

    def made_features(self) -> dict[str | None, Item]:
        """The hashes of what made the features stored with its pictures (`None`: none are), each with an item of it."""
        numbers: dict[str | None, int] = {}

        def makers(index: ShardIndex) -> np.ndarray:
            made_by: Iterable[Any] = index.columns.get(COLUMN, [None] * index.num_documents)
            numbers_N = np.array([numbers.setdefault(value, len(numbers)) for value in made_by])
            return np.where(index.num_images_N > 0, numbers_N, -1)

        found, firsts = np.unique(self._gathered(makers, np.int32), return_index=True)
        hashes = list(numbers)
        pairs = zip(found.tolist(), firsts.tolist(), strict=True)
        return {hashes[number]: self.item(first) for number, first in pairs if number >= 0}

    @property
    def has_media(self) -> bool:
        """Whether its documents have pictures or sounds."""
        return self.config.kind != "text"

    @property
    def column_names(self) -> set[str]:
        """Keys of its rows' metadata."""
        return {name for index in self.indices for name in index.column_names}

    @property
    def num_items(self) -> int:
        """M."""
        return len(self.tokens_M)

    @property
    def num_documents(self) -> int:
        """Rows that its items are made of, each once."""
        if self._row_M is None:
            return sum(index.num_documents for index in self.indices)
        bounds, num_tasks = self._starts_G.tolist(), len(self.config.item_tasks)
        firsts = bounds[::num_tasks]
        return sum(len(np.unique(self._row_M[start:stop])) for start, stop in pairwise(firsts))

    @property
    def num_epoch_tokens(self) -> int:
        """Tokens that an epoch may draw; where chance balances documents, or masks spans of them, on average."""
        if self._chance_M is None and self._may_mask is None:
            return int(self.tokens_M.sum())
        tokens_M = self.tokens_M.astype(np.float64)
        if self._chance_M is not None:
            tokens_M *= self._chance_M
        if self.config.masked_spans is not None and self._may_mask is not None:
            numbers, share = np.arange(self.num_items), self.config.masked_spans.share
            may_mask = self._may_mask[self._documents_of(numbers)]
            tokens_M *= np.where(self._groups(numbers)[2] == 1, share, np.where(may_mask, 1 - share, 1.0))
        return round(float(tokens_M.sum()))

    @property
    def limit(self) -> int | None:
        """The position at which `max_epochs` ends it."""
        return None if self.config.max_epochs is None else int(np.ceil(self.config.max_epochs * self.num_items))

    def upcoming(self, position: int, count: int, num_easiest: int | None, limit: int | None) -> Drawn:
        """More than `count` items from a position on, or all up to the limit.

        Args:
            position: Where to go on.
            count: How many are wanted.
            num_easiest: Only items of a lower rank, if any.
            limit: A position.
        """
        items: list[np.ndarray] = []
        after: list[np.ndarray] = []
        found, start = 0, position
        is_all = False
        while found <= count:
            if (limit is not None and position >= limit) or (not found and position - start > 2 * self.num_items):
                is_all = True
                break
            epoch, inside = divmod(position, self.num_items)
            block_start, order, is_kept = self._block(epoch, inside)
            chunk = slice(inside - block_start, inside - block_start + max(_CHUNK, 2 * count))
            numbers = order[chunk] if limit is None else order[chunk][: limit - position]
            keep = np.ones(len(numbers), dtype=bool) if is_kept is None else is_kept[chunk][: len(numbers)].copy()
            if num_easiest is not None and self.rank_M is not None:
                keep &= self.rank_M[numbers] < num_easiest
            places = np.flatnonzero(keep)
            items.append(numbers[places])
            after.append(position + places + 1)
            found += len(places)
            position += len(numbers)
        if not items:
            return Drawn(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), is_all)
        return Drawn(np.concatenate(items), np.concatenate(after), is_all)

    def _block(self, epoch: int, inside: int) -> tuple[int, np.ndarray, np.ndarray | None]:
        """(first position, items, which of them are kept for their task's weight) of the block at a position."""
        found, blocks = self._cuts, self._blocks  # other threads may plan too: what is kept is replaced, not changed
        if found is None or found[0] != epoch:
            found = self._cuts = (epoch, *self._block_groups(epoch))
        _, cuts, groups = found
        number = int(np.searchsorted(cuts, inside, side="right")) - 1
        if (epoch, number) not in blocks:
            block = self._shuffled(epoch, number, int(cuts[number]), int(cuts[number + 1]), groups)
            last = list(blocks.items())[-1:]  # the one before is still read when a window reaches over the border
            blocks = self._blocks = dict([*last, ((epoch, number), block)])
        return int(cuts[number]), *blocks[epoch, number]

    def _block_groups(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(first position of each block and the end, groups of items in this epoch's order)."""
        num_shards = len(self.indices)
        per_shard = len(self.config.item_tasks)
        if self.num_items <= BLOCK_ITEMS or num_shards == 1:
            return np.array([0, self.num_items]), np.arange(num_shards * per_shard)
        shards = self._random(_ORDER, epoch, 1).permutation(num_shards)
        groups = (shards[:, None] * per_shard + np.arange(per_shard)).reshape(-1)
        ends = np.cumsum((self._starts_G[1:] - self._starts_G[:-1])[groups])[per_shard - 1 :: per_shard]
        cuts = [0]
        for end in ends.tolist():
            if end - cuts[-1] >= BLOCK_ITEMS:
                cuts.append(end)
        if cuts[-1] != self.num_items:
            cuts.append(self.num_items)
        return np.array(cuts), groups

    def _shuffled(
        self, epoch: int, number: int, start: int, stop: int, groups: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        is_whole = stop - start == self.num_items
        rng = self._random(_ORDER, epoch, *([] if is_whole else [2 + number]))
        if is_whole:
            order = rng.permutation(self.num_items)
        else:
            sizes = (self._starts_G[1:] - self._starts_G[:-1])[groups]
            ends = np.cumsum(sizes)
            mine = groups[(ends > start) & (ends <= stop)]
            order = rng.permutation(np.concatenate([np.arange(*self._starts_G[g : g + 2]) for g in mine.tolist()]))
        if self.config.task_weights is None and self._chance_M is None:
            return order, self._in_one_form(epoch, order, None)
        chances = np.ones(len(order)) if self._chance_M is None else self._chance_M[order]
        if self.config.task_weights is not None:
            weights = np.array(self.config.task_weights) / max(self.config.task_weights)
            chances = chances * weights[self._groups(order)[2] // (len(self.config.item_tasks) // len(weights))]
        return order, self._in_one_form(epoch, order, rng.random(len(order)) < chances)

    def _maskable(self) -> np.ndarray | None:
        """Bools of all shards' documents, one after the other: whether they can have masked spans; None: none have."""
        if self.config.masked_spans is None:
            return None
        numbers = np.arange(self.num_items)
        may_mask = np.zeros(sum(index.num_documents for index in self.indices), dtype=bool)
        may_mask[self._documents_of(numbers[self._groups(numbers)[2] == 1])] = True
        return may_mask

    def _documents_of(self, numbers: np.ndarray) -> np.ndarray:
        """The numbers of items' documents among those of all shards, one after the other."""
        firsts = np.cumsum([0, *(index.num_documents for index in self.indices)])
        return firsts[self._groups(numbers)[1]] + self._rows_of(numbers)

    def _in_one_form(self, epoch: int, order: np.ndarray, kept: np.ndarray | None) -> np.ndarray | None:
        """Which items are kept: of each document that with masked spans or that without, by chance in every epoch."""
        if self.config.masked_spans is None or self._may_mask is None:
            return kept
        is_masked = self._random(_FORM, epoch).random(len(self._may_mask)) < self.config.masked_spans.share
        is_own = (is_masked & self._may_mask)[self._documents_of(order)] == (self._groups(order)[2] == 1)
        return is_own if kept is None else kept & is_own

    def _rows_of(self, numbers: np.ndarray) -> np.ndarray:
        """The rows of items in their shards."""
        groups = self._groups(numbers)[0]
        return numbers - self._starts_G[groups] if self._row_M is None else self._row_M[numbers]

    def _groups(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(group, shard, task) of items."""
        groups = np.searchsorted(self._starts_G, numbers, side="right") - 1
        return groups, *np.divmod(groups, len(self.config.item_tasks))

    def _random(self, purpose: int, *numbers: int) -> np.random.Generator:
        """Random numbers by the source's place in the recipe, so that its name may change."""
        seed, place = self._seed
        return np.random.default_rng([seed, purpose, place, *numbers])

    def items(self, numbers: np.ndarray) -> list[Item]:
        """Items in full."""
        groups, shards, tasks = self._groups(numbers)
        rows = numbers - self._starts_G[groups] if self._row_M is None else self._row_M[numbers]
        parts = repeat(-1) if self._part_M is None else self._part_M[numbers].tolist()
        names = self.config.item_tasks
        columns = (
            repeat(self.number), shards.tolist(), rows.tolist(), [names[task] for task in tasks.tolist()], parts,
            self.tokens_M[numbers].tolist(),
        )  # fmt: skip
        return list(map(Item._make, zip(*columns, strict=False)))

    def item(self, number: int) -> Item:
        """Item `number` in full."""
        return self.items(np.array([number]))[0]
