"""Columns of an index: texts, and the rows' metadata, read from its file when they are asked for.

Shapes: N rows, W different words.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

_NONE, _BOOL, _INT, _FLOAT, _TEXT = range(5)
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_EXACT = 2**53
"""Integers up to here are floats as well."""
_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1

Read = Callable[..., np.ndarray]
"""Reads rows `[start, stop)` of an array by its name: `ArraysFile.read`."""


class Texts(Sequence[str]):
    """Strings that lie in one run of bytes; only those that are asked for are read and decoded."""

    def __init__(self, read: Read, name: str, count: int) -> None:
        self._read, self._name, self._count = read, name, count

    @staticmethod
    def arrays(texts: Sequence[str], name: str) -> dict[str, np.ndarray]:
        """What `Texts` is read from, as named arrays: where each ends, with a 0 before the first, and their bytes."""
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        small = ends.astype(np.uint32) if ends[-1] < 2**32 else ends.astype(np.uint64)
        return {f"{name}.bytes": np.frombuffer(b"".join(encoded), dtype=np.uint8), f"{name}.ends": small}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        if not -self._count <= row < self._count:
            raise IndexError(row)
        row %= self._count
        start, stop = self._read(f"{self._name}.ends", row, row + 2).tolist()
        return self._read(f"{self._name}.bytes", start, stop).tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        ends = self._read(f"{self._name}.ends").tolist()
        whole = self._read(f"{self._name}.bytes").tobytes()
        for start, stop in pairwise(ends):
            yield whole[start:stop].decode("utf-8", "surrogateescape")


class Column(Sequence[Any]):
    """One key of the rows' metadata: a bool, a number, a text, or `None` where a row has none.

    Integers are exact within 64 bits, beside floats within 53; larger ones become floats.

    Args:
        read: Reads its arrays: `NAME.values` [N] (a text's is its place among the words), uint8 `NAME.types` [N] where
            they differ, and the words.
        name: Of its arrays.
        count: N.
        only_type: The type of all values, where they are of one.
        num_words: W.
    """

    def __init__(self, read: Read, name: str, count: int, only_type: int | None, num_words: int) -> None:
        self._read, self._name, self._count, self._only_type = read, name, count, only_type
        self._words = Texts(read, f"{name}.words", num_words)

    @staticmethod
    def arrays(values: Sequence[Any], name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """What `Column` is made from: named arrays, and its other arguments by name."""
        types_N = _types(values)
        if (types_N == _FLOAT).any():
            inexact = [row for row in np.flatnonzero(types_N == _INT).tolist() if not -_EXACT < values[row] < _EXACT]
            types_N[inexact] = _FLOAT
        found = np.unique(types_N).tolist()
        words: dict[str, int] = {}
        numbers: Sequence[Any] = values
        if _TEXT in found:
            words = {word: place for place, word in enumerate(dict.fromkeys(v for v in values if isinstance(v, str)))}
            numbers = [words[value] if isinstance(value, str) else value for value in values]
        values_N = _packed(numbers, found)
        arrays = {f"{name}.values": values_N}
        if len(found) > 1:
            arrays[f"{name}.types"] = types_N
        if words:
            arrays |= Texts.arrays(list(words), f"{name}.words")
        return arrays, {"only_type": found[0] if len(found) == 1 else None, "num_words": len(words)}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        if not -self._count <= row < self._count:
            raise IndexError(row)
        row %= self._count
        (value,) = self._read(f"{self._name}.values", row, row + 1).tolist()
        kind = self._only_type
        if kind is None:
            (kind,) = self._read(f"{self._name}.types", row, row + 1).tolist()
        return self._words[int(value)] if kind == _TEXT else _restored(value, kind)

    def __iter__(self) -> Iterator[Any]:
        words = self.words
        for value, kind in zip(self.values_N.tolist(), self.types_N.tolist(), strict=True):
            yield words[int(value)] if kind == _TEXT else _restored(value, kind)

    @property
    def words(self) -> list[str]:
        """Its different texts."""
        return list(self._words) if len(self._words) else []

    @property
    def values_N(self) -> np.ndarray:
        """[N] numbers; of a text its place among the words; of what is missing nothing that means anything."""
        return self._read(f"{self._name}.values")

    @property
    def types_N(self) -> np.ndarray:
        """uint8 [N]."""
        if self._only_type is not None:
            return np.full(self._count, self._only_type, dtype=np.uint8)
        return self._read(f"{self._name}.types")

    @property
    def is_all_numbers(self) -> bool:
        """Whether each row has one."""
        return self._only_type in (_INT, _FLOAT, _BOOL)

    @property
    def is_whole(self) -> bool | None:
        """Whether its numbers are integers or bools; `None`: some are."""
        found = np.unique(self.types_N).tolist()
        return None if _FLOAT in found and (_INT in found or _BOOL in found) else _FLOAT not in found

    @property
    def is_text_N(self) -> np.ndarray:
        """Bools [N]."""
        return self.types_N == _TEXT

    @property
    def is_number_N(self) -> np.ndarray:
        """Bools [N]; a bool is one too."""
        return np.isin(self.types_N, (_INT, _FLOAT, _BOOL))

    def numbers(self) -> np.ndarray:
        """float64 [N]; infinite where a row has no number (so that it is the hardest).

        Dates and times as ISO 8601 writes them (2001-12-31, 2001-12-31T23:59:00Z) count as days since 1970, in UTC.
        """
        values_N, is_text_N = self.values_N, self.is_text_N
        numbers_N = np.where(self.is_number_N, values_N.astype(np.float64), np.inf)
        if is_text_N.any():
            numbers_N[is_text_N] = np.array([_days(word) for word in self.words])[values_N[is_text_N].astype(np.int64)]
        return numbers_N


def _days(text: str) -> float:
    """Days since 1970 of a date or a time; infinite where a text is neither."""
    if _DATE.match(text) is None:  # else 19991231 would be one
        return np.inf
    try:
        time = datetime.datetime.fromisoformat(text)
    except ValueError:
        return np.inf
    return (time if time.tzinfo else time.replace(tzinfo=datetime.UTC)).timestamp() / 86400


def _packed(numbers: Sequence[Any], types: list[int]) -> np.ndarray:
    """[N] in the narrowest dtype that keeps every value."""
    if _FLOAT in types:
        return np.array(numbers, dtype=np.float64)  # None becomes not a number
    whole = np.array([number or 0 for number in numbers] if _NONE in types else numbers, dtype=np.int64)
    for dtype in (np.uint8, np.uint16, np.int32):
        limits = np.iinfo(dtype)
        if limits.min <= whole.min() and whole.max() <= limits.max:
            return whole.astype(dtype)
    return whole


def _restored(value: Any, kind: int) -> Any:
    match kind:
        case 0:
            return None
        case 1:
            return bool(value)
        case 2:
            return int(value)
    return value


def _types(values: Sequence[Any]) -> np.ndarray:
    """uint8 [N]; most columns are of one type, which is seen at once."""
    kinds = set(map(type, values))
    if len(kinds) == 1 and (kinds != {int} or (min(values) >= _INT64_MIN and max(values) <= _INT64_MAX)):
        return np.full(len(values), _type(values[0]), dtype=np.uint8)
    return np.fromiter(map(_type, values), dtype=np.uint8, count=len(values))


def _type(value: Any) -> int:
    match value:
        case bool():
            return _BOOL
        case int():
            return _INT if _INT64_MIN <= value <= _INT64_MAX else _FLOAT
        case float():
            return _FLOAT
        case str():
            return _TEXT
    return _NONE
