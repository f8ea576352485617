from __future__ import annotations

import time

import numpy as np
import pytest

from mmllm.data.plan.best_fit import best_fit_decreasing, pack, pack_window
from mmllm.data.plan.pairing import paired


def slow_best_fit(tokens: list[int], length: int, budgets: list[tuple[list[int], int]]) -> list[list[int]]:
    """One by one, looking at every sequence."""
    bins: list[list[int]] = []
    for document in sorted(range(len(tokens)), key=lambda number: (tokens[number], number), reverse=True):
        best, best_room = None, length + 1
        for number, documents in enumerate(bins):
            room = length - sum(tokens[other] for other in documents)
            within = all(
                sum(costs[other] for other in documents) + costs[document] <= limit for costs, limit in budgets
            )
            if tokens[document] <= room < best_room and within:
                best, best_room = number, room
        if best is None:
            bins.append([document])
        else:
            bins[best].append(document)
    return bins


def draws(seed: int) -> tuple[np.ndarray, int]:
    rng = np.random.default_rng(seed)
    length = int(rng.integers(8, 300))
    match seed % 4:
        case 0:
            tokens = rng.integers(1, length + 1, rng.integers(0, 200))
        case 1:
            tokens = np.minimum(length, 1 + np.exp(rng.normal(2, 1, 150)).astype(np.int64))
        case 2:
            tokens = np.full(100, max(1, length // int(rng.integers(1, 9))))
        case _:
            tokens = np.minimum(length, length // 7 + rng.integers(0, 4, 200) + 1)
    return tokens.astype(np.int64), length


@pytest.mark.parametrize("seed", range(24))
def test_best_fit_decreasing_is_the_slow_one(seed):
    tokens, length = draws(seed)
    assert best_fit_decreasing(tokens, length) == slow_best_fit(tokens.tolist(), length, [])
    rng = np.random.default_rng(seed)
    images, frames = rng.integers(0, 4, len(tokens)), rng.integers(0, 50, len(tokens))
    ours = best_fit_decreasing(tokens, length, [(images, 5), (frames, 60)])
    assert ours == slow_best_fit(tokens.tolist(), length, [(images.tolist(), 5), (frames.tolist(), 60)])


@pytest.mark.parametrize("seed", range(8))
def test_many_sequences_that_have_spent_a_budget(seed):
    """Wide costs, so that what is left of a budget has many levels, some of whose sequences fit and some don't."""
    rng = np.random.default_rng(seed)
    tokens = np.minimum(500, 1 + np.exp(rng.normal(4, 1, 400)).astype(np.int64))
    images, frames = rng.integers(0, 9, len(tokens)), rng.integers(0, 300, len(tokens))
    ours = best_fit_decreasing(tokens, 500, [(frames, 400)])
    assert ours == slow_best_fit(tokens.tolist(), 500, [(frames.tolist(), 400)])
    ours = best_fit_decreasing(tokens, 500, [(images, 12), (frames, 1000)])
    assert ours == slow_best_fit(tokens.tolist(), 500, [(images.tolist(), 12), (frames.tolist(), 1000)])
    loose = [(images, 10_000), (frames, 1_000_000)]
    assert best_fit_decreasing(tokens, 500, loose) == best_fit_decreasing(tokens, 500)


@pytest.mark.parametrize("limits", [(4, None), (None, 450), (6, 900)])
def test_a_budget_that_binds_costs_little_time(limits):
    rng = np.random.default_rng(0)
    tokens = np.minimum(2048, np.exp(rng.normal(np.log(400), 0.9, 4096)).astype(np.int64) + 1)
    costs = rng.integers(0, 4, len(tokens)), rng.integers(0, 400, len(tokens))
    budgets = [(values, limit) for values, limit in zip(costs, limits, strict=True) if limit is not None]
    started = time.process_time()
    bins, _ = pack_window(tokens, 2048, budgets)
    assert time.process_time() - started < 1.5  # about 0.05; where every open sequence is looked at, above 2
    assert all(values[documents].sum() <= limit for values, limit in budgets for documents in bins)


@pytest.mark.parametrize("seed", range(24))
def test_every_packing_holds_each_document_once_and_keeps_the_bounds(seed):
    tokens, length = draws(seed)
    images = np.random.default_rng(seed).integers(0, 3, len(tokens))
    for bins, budgets in (
        (paired(tokens, length), []),
        (pack(tokens, length), []),
        (pack(tokens, length, [(images, 4)]), [(images, 4)]),
    ):
        assert sorted(document for documents in bins for document in documents) == list(range(len(tokens)))
        for documents in bins:
            assert documents and tokens[documents].sum() <= length
            assert all(values[documents].sum() <= limit for values, limit in budgets)
    assert paired(tokens, length, 3) == paired(tokens, length, 3)


@pytest.mark.parametrize("seed", range(24))
def test_a_window_is_cut_only_where_that_saves_a_sequence(seed):
    tokens, length = draws(seed)
    whole, (bins, count) = pack(tokens, length), pack_window(tokens, length)
    assert sorted(document for documents in bins for document in documents) == list(range(count))
    assert count == len(tokens) or len(bins) < len(whole)
    assert count >= 0.75 * len(tokens)


def fill(tokens: np.ndarray, length: int) -> float:
    bins, count = pack_window(tokens, length)
    return tokens[:count].sum() / (len(bins) * length)


def test_how_full_sequences_are():
    rng = np.random.default_rng(0)
    captions = 144 + np.exp(rng.normal(np.log(30), 0.7, 4096)).astype(np.int64)
    texts = np.minimum(2048, np.exp(rng.normal(np.log(600), 1.0, 4096)).astype(np.int64) + 1)
    mixed = np.where(rng.random(4096) < 0.5, captions, texts)
    assert fill(captions, 2048) >= 0.985
    assert fill(mixed, 2048) >= 0.996
    assert fill(mixed, 8192) >= 0.998
    bins = best_fit_decreasing(captions, 2048)
    assert captions.sum() / (len(bins) * 2048) < 0.98  # what pairing is for
