"""Items of a source: a document as one task, or one part of a long text, in as few bytes as may be.

Shapes: M items.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np


class Item(NamedTuple):
    """One document of a sequence: where it is and what it becomes."""

    source: int
    shard: int
    row: int
    """Row of the shard's index."""
    task: str
    part: int
    """Piece of a split text, or -1 for a whole document."""
    num_tokens: int


class Items:
    """Items as they are gathered: room for as many as there are documents is set aside, and none touched before."""

    def __init__(self, room: int, max_tokens: int) -> None:
        self.sizes: list[int] = []
        """Items of each group."""
        self._room, self._count = room, 0
        self._tokens = np.empty(room, dtype=np.uint16 if max_tokens < 2**16 else np.int32)
        self._rows: np.ndarray | None = None
        self._parts: np.ndarray | None = None

    def add(self, tokens: np.ndarray, rows: np.ndarray | None, parts: np.ndarray | None) -> None:
        """A group; `rows` is `None` where they are 0, 1, 2, …, and `parts` where all are whole."""
        start, stop = self._count, self._count + len(tokens)
        if stop > self._room:
            self._grow(max(stop, self._room + self._room // 2))
        self._tokens[start:stop] = tokens
        if rows is not None and self._rows is None:
            self._rows = np.empty(self._room, dtype=np.int32)
            bounds = np.cumsum([0, *self.sizes]).tolist()
            for begin, end in pairwise(bounds):
                self._rows[begin:end] = np.arange(end - begin)
        if parts is not None and self._parts is None:
            self._parts = np.empty(self._room, dtype=np.int32)
            self._parts[:start] = -1
        if self._rows is not None:
            self._rows[start:stop] = np.arange(len(tokens)) if rows is None else rows
        if self._parts is not None:
            self._parts[start:stop] = -1 if parts is None else parts
        self.sizes.append(len(tokens))
        self._count = stop

    def _grow(self, room: int) -> None:
        def grown(column: np.ndarray) -> np.ndarray:
            larger = np.empty(room, dtype=column.dtype)
            larger[: self._count] = column[: self._count]
            return larger

        self._room, self._tokens = room, grown(self._tokens)
        self._rows = grown(self._rows) if self._rows is not None else None
        self._parts = grown(self._parts) if self._parts is not None else None

    def whole(self) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """[M] tokens, rows and parts."""
        columns = self._rows, self._parts
        rows, parts = (column[: self._count] if column is not None else None for column in columns)
        return self._tokens[: self._count], rows, parts
