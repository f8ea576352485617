"""Which rank takes which sequences of a step: equal numbers of them, and about equal work.

Best-fit packing puts documents of like lengths together, so that one sequence holds pictures alone and its neighbour
none. Ranks wait for each other at every step: an uneven share costs all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heapreplace

IMAGE_COST, FRAME_COST = 17.0, 0.3
"""What a picture's tower and a heard frame's projector cost beside one token of the decoder: measured for the demo's
model (docs/RESULTS.md). Rough for others; a wrong guess costs time, never correctness."""


def shares(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """The sequences of each rank, ascending; the same wherever it is called.

    The dearest come first, each to the rank with the least work that has room (longest processing time first:
    Graham 1969, https://doi.org/10.1137/0117039; here with equal numbers).

    Args:
        costs: of a step's sequences.
        num_ranks: a divisor of their number.
    """
    room = len(costs) // num_ranks
    taken: list[list[int]] = [[] for _ in range(num_ranks)]
    idlest = [(0.0, rank) for rank in range(num_ranks)]  # those with room; of equal work the lowest rank first
    heapify(idlest)
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        work, rank = idlest[0]
        taken[rank].append(number)
        if len(taken[rank]) < room:
            heapreplace(idlest, (work + costs[number], rank))
        else:
            heappop(idlest)
    return [sorted(numbers) for numbers in taken]
