"""Samples by their place in the plan's shards, those of a step together.

Of a text that is longer than a sequence, the pieces that an item needs are read and tokenized, and not the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from mmllm.data.index.index import LongText, Place, ShardIndex
from mmllm.data.plan.plan import Item, Plan
from mmllm.data.rows.bad_rows import is_exhausted
from mmllm.data.samples.document import Document
from mmllm.data.samples.sample import Sample
from mmllm.data.samples.schema import parse_line, read_sample
from mmllm.data.samples.text_parts import TextFrame, text_frame, text_part
from mmllm.data.shards.reader import Range, ShardReader
from mmllm.data.shards.tar import read_members
from mmllm_tokenizers.folder import TokenizerFolder


@dataclass(frozen=True)
class TextPiece:
    """The tokens that an item's part of a long text needs."""

    text_ids: list[int]
    first: int
    """Which of the text's tokens the first of them is."""
    total: int
    """Tokens of the whole text."""


def named_failure(plan: Plan, item: Item, error: Exception) -> str:
    """What went wrong with an item, and which it is. Raises the error where it is no fault of the item's."""
    if is_exhausted(error):
        raise error
    named = plan.describe(item)
    return f"{named['source']}: {named['shard']}:{named['key']} as {item.task}: {error}"


@dataclass(frozen=True)
class _Wanted:
    """What is read for an item."""

    index: ShardIndex
    place: Place
    span: Range
    long: LongText | None = None
    first: int = 0
    stop: int = 0


class SampleReader:
    """Reads samples; keeps some files open.

    Args:
        plan: Where the shards are.
        codec: The audio tokenizer's hash, which stored codes must have; `None` ignores them.
        folder: With it, parts of long texts are read alone.
    """

    def __init__(self, plan: Plan, codec: str | None, folder: TokenizerFolder | None = None) -> None:
        self._plan, self._codec, self._folder = plan, codec, folder
        self._reader = ShardReader()
        self._frames: dict[tuple[int, str], TextFrame | None] = {}

    def __call__(self, item: Item, features: str | None = None) -> Sample:
        """The sample of a plan item, whole.

        Args:
            item: Which.
            features: The hash that the image features stored with it must have; `None` ignores them.

        Raises:
            ValueError, OSError: It can't be read, or isn't what was indexed.
        """
        wanted = self._whole(item)
        return self._sample(wanted, self._reader.read(*wanted.span), features, item)

    def read_many(self, items: Sequence[Item], features: str | None = None) -> list[Sample | TextPiece | Exception]:
        """Of each item its sample, the tokens of its part of a long text, or what went wrong."""
        found: list[Sample | TextPiece | Exception] = []
        wanted: list[_Wanted | Exception] = []
        for item in items:
            try:
                wanted.append(self._part(item) or self._whole(item))
            except (ValueError, OSError) as error:
                wanted.append(error)
        read = iter(self._reader.read_many([each.span for each in wanted if isinstance(each, _Wanted)]))
        for item, each in zip(items, wanted, strict=True):
            try:
                if isinstance(each, Exception):
                    raise each
                data = next(read)
                if isinstance(data, Exception):
                    raise data
                is_piece = each.long is not None
                found.append(self._piece(each, data) if is_piece else self._sample(each, data, features, item))
            except Exception as error:  # whatever a broken sample makes a library say: it is named by the caller
                found.append(error)
        return found

    def _index(self, item: Item) -> ShardIndex:
        index = self._plan.sources[item.source].indices[item.shard]
        self._reader.know(index.path, index.stamp)
        return index

    def _whole(self, item: Item) -> _Wanted:
        index = self._index(item)
        place = index.place(item.row)
        return _Wanted(index, place, (index.path, place.start, place.num_bytes))

    def _part(self, item: Item) -> _Wanted | None:
        """What an item's part needs of its text; `None` where it takes the whole sample."""
        frame, index = self.frame(item), self._index(item)
        long = index.long_text(item.row) if frame is not None else None
        if frame is None or long is None:
            return None
        place = index.place(item.row)
        start = item.part * (self._plan.recipe.sequence_length - 1) - len(frame.before)
        first, stop = (min(max(token, 0), long.num_tokens) for token in (start, start + item.num_tokens))
        span = place.start, place.num_bytes
        if long.start:
            bounds = long.holding(first, stop)
            span = long.start + int(bounds[0, 1]), int(bounds[-1, 1] - bounds[0, 1])
        return _Wanted(index, place, (index.path, *span), long, first, stop)

    def reads_part(self, item: Item) -> bool:
        """Whether `read_many` reads no more than an item's part of its text."""
        return self.frame(item) is not None and self._index(item).long_text(item.row) is not None

    def frame(self, item: Item) -> TextFrame | None:
        """What surrounds the text, where an item is a part of a text that may be read alone."""
        if item.part < 0 or self._folder is None:
            return None
        key = item.source, item.task
        if key not in self._frames:
            config = self._plan.sources[item.source].config
            template = (config.templates or {}).get(item.task)
            self._frames[key] = text_frame(item.task, self._folder, template, config.anchor_prompt)
        return self._frames[key]

    def _piece(self, wanted: _Wanted, data: bytes) -> TextPiece:
        assert wanted.long is not None and self._folder is not None
        if len(data) < wanted.span[2]:
            raise ValueError(f"{wanted.index.path}: ends early; it changed since it was indexed")
        bounds = wanted.long.holding(wanted.first, wanted.stop).tolist()
        if not wanted.long.start:
            text, _ = parse_line(data, wanted.index.text_key)
            data = text.encode()[bounds[0][1] : bounds[-1][1]]
        ids: list[int] = []
        for (token, begin), (next_token, end) in pairwise(bounds):
            found = self._folder.text.encode(data[begin - bounds[0][1] : end - bounds[0][1]].decode())
            if len(found) != next_token - token:
                raise ValueError(
                    f"has {len(found)} tokens, {next_token - token} when it was indexed, from byte {begin} of its "
                    f"text on; index it again"
                )
            ids += found
        return TextPiece(ids, bounds[0][0], wanted.long.num_tokens)

    def _sample(self, wanted: _Wanted, data: bytes, features: str | None, item: Item) -> Sample:
        index, place = wanted.index, wanted.place
        key = index.key(item.row)
        name = f"{index.path}:{key}"
        if len(data) < place.num_bytes:
            raise ValueError(
                f"{name}: the shard ends {place.num_bytes - len(data)} bytes early; it changed since it was indexed"
            )
        if place.line >= 0:
            try:
                text, metadata = parse_line(data, index.text_key)
            except ValueError as error:
                raise ValueError(f"{name} line {place.line + 1}: {error}; index it again") from error
            return Sample(f"{key}-{place.line}", text, metadata=metadata)
        found, files = read_members(data, name)
        if found != key:
            raise ValueError(f"{name}: {found!r} is there instead; the shard changed: index it again")
        return read_sample(files, key, name, self._codec, features, index.text_key)

    def part_document(self, piece: TextPiece, item: Item) -> Document:
        """The document of an item's part."""
        frame = self.frame(item)
        assert frame is not None and self._folder is not None
        start = item.part * (self._plan.recipe.sequence_length - 1)
        return text_part(frame, piece.text_ids, piece.first, piece.total, start, start + item.num_tokens, self._folder)

    def close(self) -> None:
        """Close the files."""
        self._reader.close()
