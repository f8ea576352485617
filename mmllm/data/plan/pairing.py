"""Packing documents of like lengths: any few, ended by the two that fill what is left.

In the manner of the minimum bin slack heuristic (Gupta and Ho 1999, https://doi.org/10.1080/095372899233244), but the
search is over the last two documents alone, in one table look-up for all lengths together. Sequences of k documents
use up the longer ones, sequences of k + 1 the shorter: which of the two is made next keeps the mean of the rest.

Shapes: M documents, U different lengths.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterator

import numpy as np

TRIES = 1
"""Other documents that are tried before the pair is taken as it is; more fill sequences little better."""


def paired(tokens_M: np.ndarray, length: int, seed: int = 0) -> list[list[int]]:
    """Which documents share a sequence; a pure function of its arguments.

    Args:
        tokens_M: int64 lengths, none above `length`.
        length: Tokens of a sequence.
        seed: Of the order in which documents are tried.
    """
    return list(each_paired(tokens_M, length, seed))


def each_paired(tokens_M: np.ndarray, length: int, seed: int = 0) -> Iterator[list[int]]:
    """As `paired`, one sequence after the other, so that one may stop early."""
    pool = _Pool(tokens_M, length, seed)
    mean = max(1.0, float(tokens_M.mean())) if len(tokens_M) else 1.0
    while pool.num_left:
        sizes: list[int] = []
        room = length
        is_short = pool.tokens_left < mean * pool.num_left
        num_free = int(length / mean) - 2 + is_short
        while len(sizes) < num_free and pool.num_left:
            size = pool.draw()
            if is_short and pool.num_left:
                other = pool.draw()
                pool.put_back(max(size, other))
                size = min(size, other)
            if size > room:
                pool.put_back(size)
                break
            sizes.append(size)
            room -= size
        sizes, room = _last_swapped(pool, sizes, room)
        pair = pool.best_pair(room)
        for size in pair:
            pool.take(size)
        room -= sum(pair)
        sizes += pair
        while (size := pool.largest(room)) > 0:
            pool.take(size)
            sizes.append(size)
            room -= size
        yield [pool.document(size) for size in sizes]


def _last_swapped(pool: _Pool, sizes: list[int], room: int) -> tuple[list[int], int]:
    """The documents so far, the last one exchanged where that lets a pair fit better."""
    if not sizes:
        return sizes, room
    best, best_slack = sizes[-1], room - sum(pool.best_pair(room))
    whole = room + sizes[-1]
    for _ in range(TRIES):
        if best_slack == 0 or not pool.num_left:
            break
        size = pool.draw()
        if size <= whole:
            slack = whole - size - sum(pool.best_pair(whole - size))
            if slack < best_slack:
                pool.put_back(best)
                best, best_slack = size, slack
                continue
        pool.put_back(size)
    return [*sizes[:-1], best], whole - best


class _Pool:
    """The documents that are left, by length."""

    def __init__(self, tokens_M: np.ndarray, length: int, seed: int) -> None:
        counts = np.bincount(tokens_M, minlength=length + 1)
        self._counts: list[int] = counts.tolist()
        self._sizes: list[int] = np.flatnonzero(counts).tolist()  # those that are left, ascending
        self._order = np.argsort(tokens_M, kind="stable").tolist()
        self._next: list[int] = (np.cumsum(counts) - counts).tolist()
        self._queue = deque(np.random.default_rng(seed).permutation(tokens_M).tolist())
        self._spent = [0] * (length + 1)  # of each length, how many in the queue are gone already
        self.num_left, self.tokens_left = len(tokens_M), int(tokens_M.sum())

    def draw(self) -> int:
        """The next document's length, at random; it is taken."""
        while True:
            size = self._queue.pop()
            if self._spent[size]:
                self._spent[size] -= 1
                continue
            self._remove(size)
            return size

    def put_back(self, size: int) -> None:
        """A drawn document goes behind all others."""
        self._queue.appendleft(size)
        if not self._counts[size]:
            insort(self._sizes, size)
        self._counts[size] += 1
        self.num_left += 1
        self.tokens_left += size

    def take(self, size: int) -> None:
        """One of a length, wherever it is in the queue."""
        self._spent[size] += 1
        self._remove(size)

    def _remove(self, size: int) -> None:
        self._counts[size] -= 1
        self.num_left -= 1
        self.tokens_left -= size
        if not self._counts[size]:
            del self._sizes[bisect_left(self._sizes, size)]

    def largest(self, room: int) -> int:
        """The largest length left that fits, or 0."""
        place = bisect_right(self._sizes, room)
        return self._sizes[place - 1] if place else 0

    def best_pair(self, room: int) -> list[int]:
        """Two lengths that are left and fill the room best (or one, or none); of equal sums, the least first."""
        sizes, counts = self._sizes, self._counts
        high = bisect_right(sizes, room) - 1
        if high < 0:
            return []
        best, most = [sizes[high]], sizes[high] - 1
        low = bisect_left(sizes, room - sizes[high])  # what is less fills less than the one before this, with any
        low = max(0, min(low, high) - 1)
        while low <= high:  # two pointers: for each `low`, the largest that fits beside it
            first, second = sizes[low], sizes[high]
            if first + second > room:
                high -= 1
                continue
            if first + second > most and (low < high or counts[first] > 1):
                best, most = [first, second], first + second
                if most == room:
                    break
            low += 1
        return best

    def document(self, size: int) -> int:
        """A document of a length that was taken; each is given once."""
        number = self._order[self._next[size]]
        self._next[size] += 1
        return number
