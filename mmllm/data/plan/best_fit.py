"""Packing: best-fit-decreasing, and for documents of like lengths, pairing.

Best-fit-decreasing: the longest first, each into the fullest sequence that still takes it. It puts like beside like, so
that documents of much the same length (a picture's slots and a caption) leave gaps that nothing fills; where it leaves
more than `GAPS`, `pairing.paired` is tried, and the packing with fewer sequences is taken.

Shapes: M documents.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import pairwise
from operator import ge

import numpy as np

from mmllm.data.plan.pairing import each_paired

GAPS = 0.02
"""Share of all positions, the last sequence's apart."""
FULL = 0.9
LEAST_OF_WINDOW = 0.75
_SHIFT = 32
_MASK = (1 << _SHIFT) - 1
_NOWHERE = 1 << 62


Budgets = Sequence[tuple[np.ndarray, int]]


def pack(tokens_M: np.ndarray, length: int, budgets: Budgets = (), seed: int = 0) -> list[list[int]]:
    """Which documents share a sequence: the better of best-fit-decreasing and pairing.

    Args:
        tokens_M: int64 lengths, none above `length`.
        length: Tokens of a sequence.
        budgets: For each further budget, what each document takes of it, and what a sequence may take.
        seed: Of the order in which pairing tries documents.

    Returns:
        For each sequence, its documents, in the order in which they were placed.
    """
    return _packed(tokens_M, length, budgets, seed)[0]


def _packed(tokens_M: np.ndarray, length: int, budgets: Budgets, seed: int) -> tuple[list[list[int]], bool]:
    """(sequences, whether they were paired)."""
    fitted = best_fit_decreasing(tokens_M, length, budgets)
    most = (1 - GAPS) * (len(fitted) - 1)  # where a budget fills more than so many, pairing has nothing to win
    if tokens_M.sum() < (1 - GAPS) * length * (len(fitted) - 1) and all(
        values_M.sum() <= limit * most for values_M, limit in budgets
    ):
        other = _paired_within(tokens_M, length, budgets, seed, len(fitted) - 1)
        if other is not None:
            return other, True
    return fitted, False


def _paired_within(tokens_M: np.ndarray, length: int, budgets: Budgets, seed: int, most: int) -> list[list[int]] | None:
    """At most so many sequences by pairing; none as soon as it needs more, or one of them goes over a budget."""
    bins: list[list[int]] = []
    for documents in each_paired(tokens_M, length, seed):
        bins.append(documents)
        if len(bins) > most or not _keeps([documents], budgets):
            return None
    return bins


def pack_window(tokens_M: np.ndarray, length: int, budgets: Budgets = (), seed: int = 0) -> tuple[list[list[int]], int]:
    """Packs a window, and where its last sequence would stay far from full, only as many documents as fill the others.

    Args:
        tokens_M: Lengths in the order in which the documents were drawn.
        length: Tokens of a sequence.
        budgets: As `pack`.
        seed: As `pack`.

    Returns:
        (for each sequence, its documents; how many documents of the window are in them: the others are drawn again).
    """
    whole, is_paired = _packed(tokens_M, length, budgets, seed)
    firsts = np.cumsum([0, *map(len, whole[:-1])])
    emptiest = int(np.add.reduceat(tokens_M[np.concatenate(whole)], firsts).min()) if whole else length
    count = int(np.searchsorted(np.cumsum(tokens_M), int(tokens_M.sum()) - emptiest, side="right"))
    if is_paired or emptiest > FULL * length or count < LEAST_OF_WINDOW * len(tokens_M):
        return whole, len(tokens_M)
    cut = [(values_M[:count], limit) for values_M, limit in budgets]
    if any(int(values_M.sum()) > limit * (len(whole) - 1) for values_M, limit in cut):  # that saves no sequence
        return whole, len(tokens_M)
    less = pack(tokens_M[:count], length, cut, seed)
    return (less, count) if len(less) < len(whole) else (whole, len(tokens_M))


def _keeps(bins: list[list[int]], budgets: Budgets) -> bool:
    return all(int(values_M[documents].sum()) <= limit for values_M, limit in budgets for documents in bins)


def best_fit_decreasing(tokens_M: np.ndarray, length: int, budgets: Budgets = ()) -> list[list[int]]:
    """Which documents share a sequence.

    Args:
        tokens_M: int64 lengths, none above `length`. Among equal ones, the later comes first.
        length: Tokens of a sequence.
        budgets: For each further budget, what each document takes of it, and what a sequence may take.

    Returns:
        For each sequence, its documents, in the order in which they were placed.
    """
    order_M = np.lexsort((np.arange(len(tokens_M)), tokens_M))[::-1]
    sizes_M = tokens_M[order_M]
    changes_M = np.flatnonzero(np.diff(sizes_M)) + 1
    costs = [values_M[order_M] for values_M, _ in budgets]
    for cost_M in costs:
        changes_M = np.union1d(changes_M, np.flatnonzero(np.diff(cost_M)) + 1)
    bounds = [0, *changes_M.tolist(), len(order_M)] if len(order_M) else [0]
    order, sizes = order_M.tolist(), sizes_M[bounds[:-1]].tolist()
    if budgets and _may_keep(tokens_M, length, budgets):
        bins = _pack(order, sizes, bounds, length)
        if _keeps(bins, budgets):  # then each document went where it would have gone under the budgets
            return bins
    if budgets:
        costs_GL = np.stack([cost_M[bounds[:-1]] for cost_M in costs], axis=1)
        return _pack_within(order, sizes, costs_GL, bounds, length, [limit for _, limit in budgets])
    return _pack(order, sizes, bounds, length)


def _may_keep(tokens_M: np.ndarray, length: int, budgets: Budgets) -> bool:
    """Whether sequences full of tokens would have some of every budget left, on average."""
    num_full = max(1.0, float(tokens_M.sum()) / length)
    return all(float(values_M.sum()) <= limit * num_full for values_M, limit in budgets)


def _pack(order: list[int], sizes: list[int], bounds: list[int], length: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[int] = []  # tokens left in the high bits, the sequence's number in the low ones; ascending
    for size, (start, stop) in zip(sizes, pairwise(bounds), strict=True):
        wanted = size << _SHIFT
        while start < stop:
            place = bisect_left(room, wanted)
            if place < len(room):
                packed = room.pop(place)
                left, number = packed >> _SHIFT, packed & _MASK
            else:
                left, number = length, len(bins)
                bins.append([])
            count = min(left // size, stop - start)
            bins[number] += order[start : start + count]
            start += count
            left -= count * size
            if left:
                insort(room, left << _SHIFT | number)
    return bins


def _pack_within(
    order: list[int],
    sizes: list[int],
    costs_GL: np.ndarray,
    bounds: list[int],
    length: int,
    limits: list[int],
) -> list[list[int]]:
    """As `_pack`; a sequence takes a document only if it keeps all budgets.

    What is left of a sequence's budgets is one integer, a field for each, with a bit above each field that a cost which
    is too high borrows. The open sequences lie in one ascending list of room for each level of what is left, so that
    those which have spent a budget are not in the way of those which haven't.
    """
    bins: list[list[int]] = []
    budgets: list[int] = []
    levels = _Levels(limits)
    guards, lists_for, place_of = levels.guards, levels.lists_for, levels.place_of
    whole = levels.joined(np.array([limits]))[0] | guards
    least_GL = np.minimum.accumulate(costs_GL[::-1])[::-1]  # of a group and all later ones
    groups = zip(sizes, levels.joined(costs_GL), levels.joined(least_GL), pairwise(bounds), strict=True)
    for size, cost, least, (start, stop) in groups:
        wanted = size << _SHIFT
        while start < stop:
            best, room, place = _NOWHERE, None, 0
            sure, others = lists_for.get(cost) or levels.find(cost)
            for here in sure:
                at = bisect_left(here, wanted)
                if at < len(here) and here[at] < best:
                    best, room, place = here[at], here, at
            for here in others:
                at = bisect_left(here, wanted)
                while at < len(here) and here[at] < best:
                    if (budgets[here[at] & _MASK] - cost) & guards == guards:
                        best, room, place = here[at], here, at
                        break
                    at += 1
            if room is not None:
                del room[place]
                left, number = best >> _SHIFT, best & _MASK
            else:
                left, number = length, len(bins)
                bins.append([])
                budgets.append(whole)
            count = min(left // size, stop - start)
            if count > 1:
                count = min(count, levels.times(budgets[number], cost))
            bins[number] += order[start : start + count]
            start += count
            left -= count * size
            budget = budgets[number] = budgets[number] - count * cost
            if left >= sizes[-1] and (budget - least) & guards == guards:  # else nothing that comes fits
                insort(place_of[budget] if budget in place_of else levels.open(budget), left << _SHIFT | number)
    return bins


class _Levels:
    """The lists of room of `_pack_within`."""

    def __init__(self, limits: list[int]) -> None:
        self._shifts: list[int] = []
        self.guards = at = 0
        for limit in limits:
            self._shifts.append(at)
            at += limit.bit_length() + 1
            self.guards |= 1 << at - 1
        self._masks = [(1 << limit.bit_length()) - 1 for limit in limits]
        self._rooms: dict[tuple[int, ...], list[int]] = {}
        self.place_of: dict[int, list[int]] = {}
        """The list of what is left."""
        self.lists_for: dict[int, tuple[list[list[int]], list[list[int]]]] = {}
        """For a cost, the lists whose sequences all can pay it, and those of which some can."""

    def joined(self, values_GL: np.ndarray) -> list[int]:
        """Each row as one integer, without guards."""
        columns = [column.astype(object) << shift for column, shift in zip(values_GL.T, self._shifts, strict=True)]
        return np.sum(columns, axis=0).tolist()

    def _split(self, value: int) -> list[int]:
        return [(value >> shift) & mask for shift, mask in zip(self._shifts, self._masks, strict=True)]

    def times(self, budget: int, cost: int) -> int:
        """How often a budget pays a cost."""
        pairs = zip(self._split(budget), self._split(cost), strict=True)
        return min((here // more for here, more in pairs if more), default=_NOWHERE)

    def open(self, budget: int) -> list[int]:
        """The list of what is left, made where there is none."""
        level = self._level(budget)
        if level not in self._rooms:
            self._rooms[level] = []
            self.lists_for.clear()
        self.place_of[budget] = self._rooms[level]
        return self._rooms[level]

    def find(self, cost: int) -> tuple[list[list[int]], list[list[int]]]:
        """As `lists_for`, which keeps it."""
        wanted, sure, others = self._level(cost), [], []
        for level, room in self._rooms.items():
            if all(map(ge, level, wanted)):
                is_sure = all(here > more or here < 4 for here, more in zip(level, wanted, strict=True))
                (sure if is_sure else others).append(room)
        self.lists_for[cost] = sure, others
        return sure, others

    def _level(self, value: int) -> tuple[int, ...]:
        return tuple(map(_level, self._split(value)))


def _level(value: int) -> int:
    """Ascending with the value, which is one of few: exact below 4, then one for each power of four."""
    return value if value < 4 else (value.bit_length() + 5) // 2
