"""Packing: best-fit-decreasing, and for documents of like lengths, pairing.

Best-fit-decreasing: the longest first, each into the fullest sequence that still takes it. It puts like beside like, so
that documents of much the same length (a picture's slots and a caption) leave gaps that nothing fills; where it leaves
more than `GAPS`, `pairing.paired` is tried, and the packing with fewer sequences is taken.

Shapes: M documents, G groups of documents alike, D budgets (tokens are the first).
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

Budgets = Sequence[tuple[np.ndarray, int]]

_Open = tuple[int, int, list[int]]
"""A sequence that takes more: tokens left, its number, what is left of each further budget."""


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
        budgets: For each further budget, what each document takes of it, none more than what a sequence may take,
            and that.

    Returns:
        For each sequence, its documents, in the order in which they were placed.
    """
    assert all((values_M <= limit).all() for values_M, limit in budgets)
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
        needs_GD = np.stack([needs_M[bounds[:-1]] for needs_M in (sizes_M, *costs)], axis=1)
        return _pack_within(order, needs_GD, bounds, [length, *(limit for _, limit in budgets)])
    return _pack(order, sizes, bounds, length)


def _may_keep(tokens_M: np.ndarray, length: int, budgets: Budgets) -> bool:
    """Whether sequences full of tokens would have some of every budget left, on average."""
    num_full = max(1.0, float(tokens_M.sum()) / length)
    return all(float(values_M.sum()) <= limit * num_full for values_M, limit in budgets)


def _pack(order: list[int], sizes: list[int], bounds: list[int], length: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # tokens left of an open sequence, and its number; ascending
    for size, (start, stop) in zip(sizes, pairwise(bounds), strict=True):
        while start < stop:
            place = bisect_left(room, (size,))
            if place < len(room):
                left, number = room.pop(place)
            else:
                left, number = length, len(bins)
                bins.append([])
            count = min(left // size, stop - start)
            bins[number] += order[start : start + count]
            start += count
            left -= count * size
            if left:
                insort(room, (left, number))
    return bins


def _pack_within(order: list[int], needs_GD: np.ndarray, bounds: list[int], limits: list[int]) -> list[list[int]]:
    """As `_pack`; a sequence takes a document only if it keeps all budgets.

    Open sequences are kept in pools, by how much is left of each further budget, in powers of two (`_about`); within a
    pool they are sorted by the tokens left. A document looks through the pools that may have enough for it, from the
    first sequence with enough tokens on, and takes the fullest found. One list of all open sequences would do as well,
    but a document with a picture would step over hundreds of sequences that have no pictures left.
    """
    bins: list[list[int]] = []
    pools: dict[tuple[int, ...], list[_Open]] = {}
    pools_for: dict[tuple[int, ...], list[list[_Open]]] = {}  # what a document costs, about: those that may take it
    length, *budgets = limits
    least_GD = np.minimum.accumulate(needs_GD[::-1])[::-1]  # of a group and all later ones
    groups = zip(needs_GD.tolist(), least_GD.tolist(), pairwise(bounds), strict=True)
    for (size, *costs), (least_size, *least_costs), (start, stop) in groups:
        wanted, has_tokens = _about(costs), (size,)
        while start < stop:
            if wanted not in pools_for:
                pools_for[wanted] = [pool for about, pool in pools.items() if all(map(ge, about, wanted))]
            best, found, place = (length, len(bins), budgets), None, 0  # a new sequence, unless another takes it
            for pool in pools_for[wanted]:
                at = bisect_left(pool, has_tokens)
                while at < len(pool) and pool[at] < best:
                    if all(map(ge, pool[at][2], costs)):
                        best, found, place = pool[at], pool, at
                        break
                    at += 1
            room, number, left = best
            if found is None:
                bins.append([])
            else:
                del found[place]
            count = stop - start
            if count > 1:
                count = min(count, room // size, *(has // cost for has, cost in zip(left, costs) if cost))  # noqa: B905
            bins[number] += order[start : start + count]
            start += count
            room -= count * size
            left = [has - count * cost for has, cost in zip(left, costs)]  # noqa: B905 (a tenth of all the time)
            if room >= least_size and all(map(ge, left, least_costs)):  # else nothing that comes fits
                about = _about(left)
                if about not in pools:
                    pools[about] = []
                    pools_for.clear()
                insort(pools[about], (room, number, left))
    return bins


def _about(values: list[int]) -> tuple[int, ...]:
    """Ascending with each value, which is one of few: 0, 1, 2 to 3, 4 to 7, 8 to 15 and so on."""
    return tuple([value.bit_length() for value in values])
