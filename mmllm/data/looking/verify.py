"""Every sample of every task read, decoded and tokenized; the broken ones are named. Processes share the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mmllm.data.executors.parallel import in_chunks
from mmllm.data.index.index import ShardIndex
from mmllm.data.index.make import write_indices
from mmllm.data.loading.reader import SampleReader
from mmllm.data.plan.plan import Item, Plan, Source
from mmllm.data.plan.recipe import Recipe, SourceConfig
from mmllm.data.rows.bad_rows import is_exhausted
from mmllm.data.samples.decode import ImageTransform
from mmllm.data.samples.documents import build_document
from mmllm.data.samples.stored import COLUMN
from mmllm.data.shards.remote import Shard
from mmllm_tokenizers.folder import TokenizerFolder

_CHUNK = 64


def verify_shards(
    shards: Sequence[Shard],
    folder: TokenizerFolder,
    max_named: int = 20,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Reads every sample of every task.

    Args:
        shards: The tars; where an index is missing it is made.
        folder: The tokenizer folder.
        max_named: How many broken samples are named.
        workers: Processes that read; 0: this one does. They find the same.
        progress: Called with the numbers of documents done and in all.

    Returns:
        `documents`, `broken` (a count) and `errors` (messages naming shard and key). A document that no task can be
        written of, such as a caption without text, is broken.
    """
    num_documents, num_broken = 0, 0
    errors: list[str] = []
    indices: list[ShardIndex] = []
    for shard in shards:
        try:
            (index,) = write_indices([shard], folder)
        except (ValueError, OSError) as error:
            if is_exhausted(error):
                raise
            num_broken += 1
            errors.append(str(error))
            continue
        empty = _empty_rows(index)
        num_documents += len(empty)
        num_broken += len(empty)
        errors += [_empty(index, row, folder) for row in empty[: max(0, max_named - len(errors))]]
        if len(empty) < index.num_documents:
            indices.append(index)
    check = _Check(indices, folder)
    num_all = num_documents + check.num_documents
    for _, messages in in_chunks(check, check.places(), 1, workers):
        num_documents += len(messages)
        broken = [message for message in messages if message]
        num_broken += len(broken)
        errors += broken[: max(0, max_named - len(errors))]
        if progress:
            progress(num_documents, num_all)
    return {"documents": num_documents, "broken": num_broken, "errors": errors[: max(0, max_named)]}


def _empty_rows(index: ShardIndex) -> list[int]:
    """The rows that no task can be written of."""
    return np.flatnonzero(~np.logical_or.reduce([tokens_N > 0 for tokens_N in index.lengths.values()])).tolist()


def _empty(index: ShardIndex, row: int, folder: TokenizerFolder) -> str:
    """What is wrong with such a row."""
    why = "its text is missing or empty" if index.kind != "interleaved" else "nothing is in its segments"
    if index.kind in ("audio", "interleaved") and folder.audio is None:
        why = "it has sounds, and the tokenizer folder has no audio tokenizer"
    return f"{index.path}:{index.key(row)}: can't be written as {' or '.join(index.lengths)}: {why}"


class _Check:
    """What is wrong with each document of some place, or "" for those that are whole."""

    def __init__(self, indices: Sequence[ShardIndex], folder: TokenizerFolder) -> None:
        self._folder, self._transform = folder, ImageTransform(folder.image_size)
        self._plans = [_plan(index, folder) for index in indices]
        self._counts = [plan.sources[0].num_items for plan in self._plans]
        self._codec = folder.audio.hash if folder.audio is not None else None

    def places(self) -> list[tuple[int, int]]:
        """(plan, first of its items) of each place: a place never lies in two shards."""
        return [(plan, start) for plan, count in enumerate(self._counts) for start in range(0, count, _CHUNK)]

    @property
    def num_documents(self) -> int:
        """In all places."""
        return sum(self._counts)

    def __call__(self, places: Sequence[tuple[int, int]]) -> list[str]:
        messages = []
        for number, start in places:
            plan = self._plans[number]
            read = SampleReader(plan, self._codec)
            stop = min(start + _CHUNK, plan.sources[0].num_items)
            messages += [self._wrong(plan, read, plan.sources[0].item(item)) for item in range(start, stop)]
            read.close()
        return messages

    def _wrong(self, plan: Plan, read: SampleReader, item: Item) -> str:
        indexed = plan.sources[0].indices[0]
        try:
            found = build_document(read(item), item.task, self._folder, self._transform).num_tokens
            wrong = f"{found} tokens, indexed as {item.num_tokens}" if found != item.num_tokens else ""
            if COLUMN in indexed.columns:
                read(item, indexed.columns[COLUMN][item.row])
        except Exception as error:  # whatever a broken file makes a library say, the others are checked all the same
            if is_exhausted(error):
                raise
            wrong = str(error) or type(error).__name__
        return f"{indexed.path}:{indexed.key(item.row)} as {item.task}: {wrong}" if wrong else ""


def _plan(indexed: ShardIndex, folder: TokenizerFolder) -> Plan:
    tasks = [task for task, lengths in indexed.lengths.items() if lengths.any()] or list(indexed.lengths)[:1]
    config = SourceConfig("verify", indexed.kind, str(indexed.path), tasks=tasks)  # pyright: ignore[reportArgumentType]
    recipe = Recipe("", 2**31 - 1, [config])
    return Plan(recipe, [Source(config, 0, [indexed], recipe)], 1, folder.hash)
