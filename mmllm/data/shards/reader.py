"""Ranges of bytes of shards, here or remote, many at a time."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from mmllm.data.shards.cache import CacheBound, CachedShard
from mmllm.data.shards.files import OpenFiles, Stamp
from mmllm.data.shards.remote import FETCH_BYTES, RemoteShard, Shard, cache_bytes, fetch, fetch_many

Range = tuple[Shard, int, int]
"""A shard, the first byte, and how many."""
_logger = logging.getLogger(__name__)
WASTE = 8
"""Two ranges are fetched as one where what lies between is at most an eighth of them."""


class ShardReader:
    """Reads ranges of bytes of shards; keeps some local files open, and remote bytes in the cache folder."""

    def __init__(self) -> None:
        self._files = OpenFiles()
        self._cached: dict[RemoteShard, CachedShard] = {}
        self._stamps: dict[Shard, Stamp] = {}
        self._too_large: set[RemoteShard] = set()
        self._bound = CacheBound()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ShardReader.__init__(self)

    def know(self, shard: Shard, stamp: Stamp) -> None:
        """Take a shard as looked up already: no other version of it is read, and its server isn't asked again."""
        self._stamps[shard] = stamp

    def read(self, shard: Shard, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset`; fewer where the shard ends.

        Raises:
            OSError: It can't be read.
        """
        (data,) = self.read_many([(shard, offset, size)])
        if isinstance(data, Exception):
            raise data
        return data

    def read_many(self, ranges: Sequence[Range]) -> list[bytes | Exception]:
        """As `read`, for each range its bytes or what went wrong: in order of place, remote ones all together."""
        found: list[bytes | Exception | None] = [None] * len(ranges)
        missing: dict[RemoteShard, list[int]] = {}
        for number in sorted(range(len(ranges)), key=lambda number: (str(ranges[number][0]), ranges[number][1])):
            shard, offset, size = ranges[number]
            try:
                if isinstance(shard, RemoteShard):
                    found[number] = self._here(shard).read(offset, size)
                    if found[number] is None:
                        missing.setdefault(shard, []).append(number)
                else:
                    found[number] = self._files.read(shard, offset, size, self._stamps.get(shard))
            except (OSError, ValueError) as error:
                found[number] = error
        if missing:
            self._fetch(ranges, missing, found)
        return found  # pyright: ignore[reportReturnType]

    def _here(self, shard: RemoteShard) -> CachedShard:
        if shard not in self._cached:
            self._cached[shard] = CachedShard(shard, self._files, self._stamps.get(shard))
        return self._cached[shard]

    def _fetch(
        self,
        ranges: Sequence[Range],
        missing: dict[RemoteShard, list[int]],
        found: list[bytes | Exception | None],
    ) -> None:
        """Fills in what isn't here: whole shards where the recipe says so, else the ranges, near ones as one."""
        spans: list[tuple[RemoteShard, int, int, list[int]]] = []
        for shard, numbers in missing.items():
            here = self._here(shard)
            if shard.whole and self._may_hold(shard, here):
                try:
                    self._fetch_whole(shard, here)
                    for number in numbers:
                        found[number] = here.read(*ranges[number][1:])
                except OSError as error:
                    for number in numbers:
                        found[number] = error
                numbers = [number for number in numbers if found[number] is None]  # the cache can't hold it
            for number in numbers:
                start, stop = here.around(*ranges[number][1:])
                if spans and spans[-1][0] == shard and _are_near(spans[-1][1:3], start, stop):
                    _, first, last, together = spans.pop()
                    spans.append((shard, first, max(last, stop), [*together, number]))
                else:
                    spans.append((shard, start, stop, [number]))
        for (shard, start, _, numbers), data in zip(spans, fetch_many([span[:3] for span in spans]), strict=True):
            for number in numbers:
                _, offset, size = ranges[number]
                found[number] = data if isinstance(data, Exception) else data[offset - start :][:size]
            if not isinstance(data, Exception):
                self._cached[shard].add(start, data)
                self._bound.added(len(data))

    def _may_hold(self, shard: RemoteShard, here: CachedShard) -> bool:
        """Whether the cache has room for a whole shard; says so once where it hasn't."""
        if here.size <= cache_bytes():
            return True
        if shard not in self._too_large:
            self._too_large.add(shard)
            _logger.warning(
                "%s: has %d bytes, more than MMLLM_CACHE_GB allows: its documents are fetched one by one",
                shard,
                here.size,
            )
        return False

    def _fetch_whole(self, shard: RemoteShard, here: CachedShard) -> None:
        """Brings a whole shard; other processes that want it wait, and find it here."""
        with here.alone():
            for start in range(0, here.size, FETCH_BYTES):
                stop = min(start + FETCH_BYTES, here.size)
                if here.read(start, stop - start) is None:
                    here.add(start, fetch(shard, start, stop))
                    self._bound.added(stop - start)

    def close(self) -> None:
        """Close the files."""
        self._files.close()


def _are_near(span: tuple[int, int], start: int, stop: int) -> bool:
    first, last = span
    return (start - last) * WASTE <= max(last, stop) - first
