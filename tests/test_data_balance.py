from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given

from mmllm.data.loading.balance import shares


def test_the_dearest_are_shared_out() -> None:
    assert shares([9.0, 8.0, 1.0, 2.0], 2) == [[0, 2], [1, 3]]
    assert shares([9.0, 1.0, 1.0, 1.0], 2) == [[0, 3], [1, 2]]  # equal numbers, however dear the first
    assert shares([5.0, 4.0], 1) == [[0, 1]]
    assert shares([], 2) == [[], []]


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
