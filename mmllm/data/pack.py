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

import numpy as np

from mmllm.data.pairing import paired

GAPS = 0.02
"""Share of all positions, the last sequence's apart."""
FULL = 0.9
LEAST_OF_WINDOW = 0.75
_SHIFT = 32
_MASK = (1 << _SHIFT) - 1


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
    if tokens_M.sum() < (1 - GAPS) * length * (len(fitted) - 1):
        other = paired(tokens_M, length, seed)
        if len(other) < len(fitted) and _keeps(other, budgets):
            return other, True
    return fitted, False


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
    emptiest = min((int(tokens_M[documents].sum()) for documents in whole), default=length)
    count = int(np.searchsorted(np.cumsum(tokens_M), int(tokens_M.sum()) - emptiest, side="right"))
    if is_paired or emptiest > FULL * length or count < LEAST_OF_WINDOW * len(tokens_M):
        return whole, len(tokens_M)
    less = pack(tokens_M[:count], length, [(values_M[:count], limit) for values_M, limit in budgets], seed)
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
    if budgets:
        taken = list(zip(*(cost_M[bounds[:-1]].tolist() for cost_M in costs), strict=True))
        return _pack_within(order, sizes, taken, bounds, length, [limit for _, limit in budgets])
    return _pack(order, sizes, bounds, length)


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
    taken: list[tuple[int, ...]],
    bounds: list[int],
    length: int,
    limits: list[int],
) -> list[list[int]]:
    """As `_pack`; a sequence takes a document only if it keeps all budgets."""
    bins: list[list[int]] = []
    room: list[int] = []
    budgets: list[list[int]] = []
    for size, cost, (start, stop) in zip(sizes, taken, pairwise(bounds), strict=True):
        wanted = size << _SHIFT
        while start < stop:
            place = bisect_left(room, wanted)
            while place < len(room) and any(
                here < more for here, more in zip(budgets[room[place] & _MASK], cost, strict=True)
            ):
                place += 1
            if place < len(room):
                packed = room.pop(place)
                left, number = packed >> _SHIFT, packed & _MASK
            else:
                left, number = length, len(bins)
                bins.append([])
                budgets.append(list(limits))
            count = min(left // size, stop - start)
            count = min([count, *(here // more for here, more in zip(budgets[number], cost, strict=True) if more)])
            bins[number] += order[start : start + count]
            start += count
            left -= count * size
            budgets[number] = [here - count * more for here, more in zip(budgets[number], cost, strict=True)]
            if left:
                insort(room, left << _SHIFT | number)
    return bins
