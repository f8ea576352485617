"""Plans without packing: each row of a step is one document, a pair for CLIP, or fills up with sounds for the codec.

Source, index, filter, state and loader are those of packed plans. What a step holds follows from its number, so a state
names no more than the next step.

Shapes: M documents.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, islice
from typing import Any, Literal

import numpy as np

from mmllm.data.expressions import filter_names
from mmllm.data.index.index import ShardIndex, load_index, load_indices
from mmllm.data.index.make import index_shard
from mmllm.data.plan.items import Item
from mmllm.data.plan.plan import Plan, StepPlan, sequence_digest
from mmllm.data.plan.recipe import OnErrorConfig, Recipe, SourceConfig
from mmllm.data.plan.source import Source
from mmllm.data.shards.find import find_shards
from mmllm.data.shards.remote import Shard
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.text import MIN_VOCAB_SIZE, TextTokenizer

_ANY_LENGTH = 2**31 - 1
_TOKENS = ("num_tokens", "num_frames")
_NAMED = 5
_FILLERS, _SPREAD = 8, 9
"""What random numbers are for; `source.py` has the others."""

_logger = logging.getLogger(__name__)


class CaptionSource(Source):
    """Captions with a text, whatever the index's tokenizer. Equal ones lie as far apart as their number allows."""

    def __init__(self, config: SourceConfig, indices: Sequence[ShardIndex], recipe: Recipe) -> None:
        super().__init__(config, 0, indices, recipe)
        digests_M = self._gathered(_caption_digests, np.uint64)
        self._caption_M = np.unique(digests_M, return_inverse=True)[1].astype(np.int32)

    def __getstate__(self) -> dict[str, Any]:
        """As the other sources': a worker plans nothing."""
        return {**super().__getstate__(), "_caption_M": None}

    def _lengths(self, index: ShardIndex, task: str) -> np.ndarray:
        return np.minimum(index.tokens_of(task), 1)

    def _why_none_is_left(self, recipe: Recipe) -> str:
        return _why_none_is_left(self)

    def _shuffled(
        self, epoch: int, number: int, start: int, stop: int, groups: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        order, kept = super()._shuffled(epoch, number, start, stop, groups)
        return self._spread(order, self._random(_SPREAD, epoch, number)), kept

    def _spread(self, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The n rows of a caption are put at (0, 1, …, n - 1) / n of the way, all a little later."""
        _, captions, counts = np.unique(self._caption_M[order], return_inverse=True, return_counts=True)
        starts = np.repeat(np.cumsum(counts) - counts, counts)
        occurrence = np.empty(len(order))
        occurrence[np.argsort(captions, kind="stable")] = np.arange(len(order)) - starts
        place = (occurrence + rng.random(len(counts))[captions]) / counts[captions]
        return order[np.argsort(place, kind="stable")]


class SoundSource(Source):
    """Sounds, whatever the index's tokenizer. Their length is counted in samples.

    Args:
        config: The source.
        indices: Its shards' indices.
        recipe: The recipe.
        sample_rate: Of the samples that are counted.
        unknown: The length of a sound whose own isn't known.
    """

    def __init__(
        self, config: SourceConfig, indices: Sequence[ShardIndex], recipe: Recipe, sample_rate: int, unknown: int
    ) -> None:
        self._rate, self._unknown = sample_rate, unknown
        super().__init__(config, 0, indices, recipe)

    def _lengths(self, index: ShardIndex, task: str) -> np.ndarray:
        samples_N, rates_N, _ = index.sounds_Q3.astype(np.float64).T  # each document is one sound
        lengths_N = np.ceil(samples_N * self._rate / np.maximum(rates_N, 1)).clip(max=_ANY_LENGTH).astype(np.int64)
        return np.where(lengths_N > 0, lengths_N, self._unknown)

    def _why_none_is_left(self, recipe: Recipe) -> str:
        return _why_none_is_left(self)


def _caption_digests(index: ShardIndex) -> np.ndarray:
    digests_N = index.caption_digests_N
    if digests_N is None:
        raise ValueError(f"{index.file}: doesn't say which captions are equal; run 'mmllm data index' again")
    return digests_N


def _why_none_is_left(source: Source) -> str:
    return (
        f"({source.num_filtered} without a text or filtered out by {source.config.filter!r}); check the shards and the "
        f"filter"
    )


class SinglePlan(Plan):
    """The stream of steps of one source without packing.

    Args:
        recipe: The recipe; it has one source.
        source: It, opened.
        batch_size: Rows a step, of all ranks together.
        order: `epochs`: each epoch shuffled anew, in steps of `batch_size` rows (of M, if there are no more); what is
            left over is shuffled into the next. `stream`: likewise, but a step may reach over an epoch's end. `once`:
            in the order of the shards, to the end.
        num_ranks: Steps get empty rows until ranks can share them equally. What `once` leaves over that is less than a
            row for each joins the last step. Nothing else depends on it.
        fill: A row is filled up with other documents, drawn at random, until it is so long; 0: each is one document.
        tokenizer_hash: Of the tokenizer that reads the rows, if one does.

    Raises:
        ValueError: There are fewer documents than ranks, or no row for a step.
    """

    def __init__(
        self,
        recipe: Recipe,
        source: Source,
        batch_size: int,
        order: Literal["epochs", "stream", "once"],
        num_ranks: int = 1,
        fill: int = 0,
        tokenizer_hash: str = "",
    ) -> None:
        super().__init__(recipe, [source], batch_size, tokenizer_hash)
        self._source, self._order_of, self._num_ranks, self._fill = source, order, num_ranks, fill
        self._num_rows = batch_size if order == "stream" else min(batch_size, source.num_items)
        if source.num_items < num_ranks:
            raise ValueError(
                f"source {source.config.name!r} has {source.num_items} documents, too few for {num_ranks} ranks"
            )

    @property
    def num_steps(self) -> int:
        """Steps an epoch, the last one of `stream` to its end; with `fill`, about as many as the source fills."""
        num_whole, num_left = divmod(self._source.num_items, self._num_rows)
        match self._order_of:
            case "epochs":
                return num_whole
            case "once":
                return num_whole + (num_left >= self._num_ranks)
        if self._fill:
            length = int(self._source.tokens_M.sum(dtype=np.int64))
            return max(1, length // (self._fill * self._num_rows))
        return num_whole + (num_left > 0)

    def initial_state(self) -> dict[str, Any]:
        """The state before step 0; `next` names the row that comes next, `None` at the end."""
        state = super().initial_state()
        return {key: value for key, value in state.items() if key not in ("window", "offset", "cursors")}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """As of packed plans."""
        self._check_keys(state)
        self._check_next(state, self._first(self._rows(state["step"])))

    def steps(self, state: Mapping[str, Any] | None = None) -> Iterator[StepPlan]:
        """Steps from a state on; they end only where the order is `once`."""
        state = dict(state) if state is not None else self.initial_state()
        self._check_keys(state)
        rows = self._rows(state["step"])
        self._check_next(state, self._first(rows))
        for step in count(state["step"]):
            following = self._rows(step + 1)
            if rows is None:
                return
            after = {**self.initial_state(), "step": step + 1, "next": sequence_digest(self._first(following))}
            rows += [()] * (-len(rows) % self._num_ranks)
            yield StepPlan(step, tuple(rows), after, len(rows))
            rows = following

    def state_before(self, step: int) -> dict[str, Any]:
        """The state before a step."""
        return {**self.initial_state(), "step": step}

    @staticmethod
    def _first(rows: list[tuple[Item, ...]] | None) -> tuple[Item, ...] | None:
        return None if rows is None else rows[0]

    def _rows(self, step: int) -> list[tuple[Item, ...]] | None:
        """The documents of each row of a step; `None` where there is no such step."""
        size, num_items = self._num_rows, self._source.num_items
        match self._order_of:
            case "once":
                if step >= self.num_steps:
                    return None
                numbers = np.arange(step * size, num_items if step + 1 == self.num_steps else (step + 1) * size)
            case "epochs":
                epoch, place = divmod(step, self.num_steps)
                numbers = self._source.upcoming(epoch * num_items + place * size, size, None, None).items[:size]
            case "stream":
                numbers = self._source.upcoming(step * size, size, None, None).items[:size]
        rows = [self._filled(number, step, place) for place, number in enumerate(numbers.tolist())]
        items = iter(self._source.items(np.array([number for row in rows for number in row])))
        return [tuple(islice(items, len(row))) for row in rows]

    def _filled(self, number: int, step: int, place: int) -> list[int]:
        """A row of a step: a document, and those that follow it."""
        row, lengths_M = [number], self._source.tokens_M
        length = int(lengths_M[number])
        if length < self._fill:
            rng = np.random.default_rng([self.recipe.seed, _FILLERS, step, place])
            while length < self._fill:
                row.append(int(rng.integers(len(lengths_M))))
                length += int(lengths_M[row[-1]])
        return row


def open_captions(
    shards: str | list[str], filter_: str | None, seed: int, on_error: OnErrorConfig, folder: TokenizerFolder
) -> tuple[Recipe, CaptionSource]:
    """A source of captions, and a recipe of it alone.

    Args:
        shards: Paths, globs, brace ranges or addresses.
        filter_: Which rows.
        seed: Of the order.
        on_error: What becomes of samples that fail.
        folder: Shards without an index get one by this tokenizer.

    Raises:
        FileNotFoundError: There are no such shards.
        ValueError: As `open_sources`.
    """
    config = _config("caption", shards, "caption", filter_)
    indices = open_indices(shards, folder)
    config, recipe = _recipe(config, indices, seed, on_error)
    return recipe, CaptionSource(config, indices, recipe)


def open_sounds(
    shards: str | list[str], filter_: str | None, seed: int, on_error: OnErrorConfig, sample_rate: int, unknown: int
) -> tuple[Recipe, SoundSource]:
    """A source of sounds, and a recipe of it alone; as `open_captions`.

    There need be no tokenizer yet: shards without an index get one that counts texts in bytes, and its hash says so.
    `mmllm data index` makes it anew for a tokenizer.

    Args:
        shards: Paths, globs, brace ranges or addresses.
        filter_: Which rows.
        seed: Of the order.
        on_error: What becomes of samples that fail.
        sample_rate: In which lengths are counted.
        unknown: The length of sounds whose own isn't known.
    """
    config = _config("audio", shards, "transcribe", filter_)
    indices = open_indices(shards, None)
    config, recipe = _recipe(config, indices, seed, on_error)
    return recipe, SoundSource(config, indices, recipe, sample_rate, unknown)


def _config(kind: Literal["caption", "audio"], shards: str | list[str], task: str, filter_: str | None) -> SourceConfig:
    config = SourceConfig(kind, kind, shards, filter=filter_, tasks=[task])
    for name in filter_names(filter_) if filter_ is not None else ():
        if name in _TOKENS:
            raise ValueError(
                f"filter {filter_!r} reads {name!r}, which depends on the tokenizer, but here any tokenizer's index "
                f"serves; filter by another key, such as duration or width"
            )
    return config


def _recipe(
    config: SourceConfig, indices: Sequence[ShardIndex], seed: int, on_error: OnErrorConfig
) -> tuple[SourceConfig, Recipe]:
    """The source, with its texts where the indices found them, and its recipe."""
    config = replace(config, text_key=indices[0].text_key)
    return config, Recipe("", _ANY_LENGTH, [config], seed=seed, on_error=on_error)


def open_indices(shards: str | list[str], folder: TokenizerFolder | None) -> list[ShardIndex]:
    """The shards' indices, made by whichever tokenizer; those that are missing or out of date are made.

    Args:
        shards: Paths, globs, brace ranges or addresses.
        folder: The tokenizer of those that are made; `None`: one that counts texts in bytes.

    Raises:
        FileNotFoundError: There are no such shards.
        ValueError: A shard can't be indexed.
        PermissionError: An index is missing and can't be written.
    """
    found = find_shards(shards)
    try:
        return list(load_indices(found, None))
    except (FileNotFoundError, ValueError):
        # Whoever has no tokenizer takes no documents: sound to learn a codec from is none as long as there is no codec.
        level = logging.INFO if folder is None else logging.WARNING
        folder = folder or TokenizerFolder(TextTokenizer.train((), MIN_VOCAB_SIZE))
        return [_index(shard, folder, level) for shard in found]


def _index(shard: Shard, folder: TokenizerFolder, level: int) -> ShardIndex:
    try:
        return load_index(shard, None)
    except (FileNotFoundError, ValueError) as reason:
        _logger.info("%s: its index is made (%s)", shard, reason)
    try:
        index = index_shard(shard, folder)
        num_bad, named = index.bad
        if num_bad:
            first = "; ".join(f"{name}: {why}" for name, why in named[:_NAMED])
            _logger.log(level, "%s: %d of its rows become no document: %s", shard, num_bad, first)
        return index
    except PermissionError as error:
        raise PermissionError(
            f"{shard}: has no index that can be used, and none can be written beside it ({error}); run 'mmllm data "
            f"index' as a user who may write there"
        ) from error
