"""Samples of a plan's items, read together and decoded one by one; those that fail are named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from mmllm.data.loading.reader import SampleReader, TextPiece, named_failure
from mmllm.data.plan.plan import Item, Plan
from mmllm.data.samples.sample import Sample


class Sized(Protocol):
    """What can be kept in memory."""

    @property
    def num_bytes(self) -> int:
        """Of its arrays."""
        ...


Value = TypeVar("Value", bound=Sized)


class DecodedSamples(Generic[Value]):
    """Reads and decodes; keeps what fits into memory.

    Args:
        plan: Where the shards are, and whether a failure is an error.
        decode: What a sample becomes.
        cache_bytes: Values kept once they are made, at most this much memory a process.
    """

    def __init__(self, plan: Plan, decode: Callable[[Sample], Value], cache_bytes: int = 0) -> None:
        self._plan, self._decode, self._read = plan, decode, SampleReader(plan, None)
        self._cache_bytes, self._cached = cache_bytes, 0
        self._cache: dict[tuple[int, int], Value] = {}

    def get(self, items: Sequence[Item]) -> tuple[list[Value | None], list[str]]:
        """Of each item its value, or `None` where it failed; and what went wrong, by name.

        Raises:
            ValueError: One failed, and the recipe's `on_error` is `raise`.
        """
        values: dict[tuple[int, int], Value | Exception] = {}
        unread: dict[tuple[int, int], Item] = {}
        for item in items:
            place = item.shard, item.row
            if place in self._cache:
                values[place] = self._cache[place]
            else:
                unread[place] = item
        for (place, _), read in zip(unread.items(), self._read.read_many(list(unread.values())), strict=True):
            values[place] = self._value(place, read)
        found: list[Value | None] = []
        errors: list[str] = []
        for item in items:
            value = values[item.shard, item.row]
            if isinstance(value, Exception):
                message = named_failure(self._plan, item, value)
                if self._plan.recipe.on_error.action == "raise":
                    raise ValueError(message) from value
                errors.append(message)
            found.append(None if isinstance(value, Exception) else value)
        return found, errors

    def _value(self, place: tuple[int, int], read: Sample | TextPiece | Exception) -> Value | Exception:
        if isinstance(read, Exception):
            return read
        assert isinstance(read, Sample), "documents are whole"
        try:
            value = self._decode(read)
        except Exception as error:  # whatever a broken sample makes a library say
            return error
        if self._cached + value.num_bytes <= self._cache_bytes:  # full: what is in stays, all come equally often
            self._cache[place] = value
            self._cached += value.num_bytes
        return value
