from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
from hypothesis import given

from mmllm.data.loading.balance import shares


def test_the_dearest_are_shared_out() -> None:
    assert shares([9.0, 8.0, 1.0, 2.0], 2) == [[0, 2], [1, 3]]
    assert shares([9.0, 1.0, 1.0, 1.0], 2) == [[0, 3], [1, 2]]  # equal numbers, however dear the first
    assert shares([5.0, 4.0], 1) == [[0, 1]]
    assert shares([], 2) == [[], []]


def slow_shares(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Looks at every rank for each sequence."""
    room = len(costs) // num_ranks
    taken: list[list[int]] = [[] for _ in range(num_ranks)]
    work = [0.0] * num_ranks
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        rank = min((rank for rank in range(num_ranks) if len(taken[rank]) < room), key=lambda rank: work[rank])
        taken[rank].append(number)
        work[rank] += costs[number]
    return [sorted(numbers) for numbers in taken]


@pytest.mark.parametrize("seed", range(24))
def test_shares_are_the_slow_ones(seed: int) -> None:
    draw = random.Random(seed)
    num_ranks, room = draw.randint(1, 40), draw.randint(0, 9)
    kinds = [
        lambda: draw.uniform(0, 1e4),
        lambda: float(draw.randint(0, 3)),
        lambda: 0.0,
        lambda: 2048 + 17.0 * draw.randint(0, 9),
    ]
    costs = [kinds[seed % 4]() for _ in range(num_ranks * room)]  # with ties, most of them
    assert shares(costs, num_ranks) == slow_shares(costs, num_ranks)


def test_a_step_of_many_ranks_is_shared_at_once() -> None:
    draw = random.Random(0)
    costs = [draw.uniform(1000, 9000) for _ in range(4096)]
    began = time.process_time()
    found = shares(costs, 512)
    assert time.process_time() - began < 0.1  # about 0.003; 0.5 where each sequence looks at every rank
    assert {len(numbers) for numbers in found} == {8}


@given(st.lists(st.floats(0, 1e4), min_size=2, max_size=6).filter(lambda costs: len(costs) % 2 == 0))
def test_two_shares_are_nearly_the_best_there_are(costs: list[float]) -> None:
    found = shares(costs, 2)
    assert sorted(found[0] + found[1]) == list(range(len(costs))) and len(found[0]) == len(found[1])
    half = len(costs) // 2
    best = min(
        max(sum(costs[i] for i in chosen), sum(costs) - sum(costs[i] for i in chosen))
        for chosen in itertools.combinations(range(len(costs)), half)
    )
    dearest = max(sum(costs[i] for i in numbers) for numbers in found)
    assert dearest <= best * 4 / 3 + 1e-6


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_sequence_has_one_rank(num_ranks: int) -> None:
    found = shares([float(i % 3) for i in range(8)], num_ranks)
    assert sorted(itertools.chain(*found)) == list(range(8))
    assert {len(numbers) for numbers in found} == {8 // num_ranks}
