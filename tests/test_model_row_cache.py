"""Rows that enter, grow and leave: each finds what it has cached, wherever it is moved to."""

from __future__ import annotations

import random

import pytest
import torch

from mmllm.model.decoder import Decoder
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.row_cache import (
    CAPACITY_STEP,
    SMALLEST_CAPACITY,
    CachedRow,
    Chunk,
    PromptStep,
    RowCache,
    RunningStep,
    capacity_of,
)

SIZES = {
    "vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 8,
}  # fmt: skip
CONVOLUTIONS = DecoderConfig(**SIZES, conv_size=3)
DEPTHS = DecoderConfig(**SIZES, mod_layers=(1,), mod_capacity=0.5)


def write(row: CachedRow, values_T: torch.Tensor) -> None:
    """Stands for a step: positions whose keys and values are all one number, as are the convolutions' states."""
    slab = row.slab
    start = row.start + row.length
    slab.kv_LSF[:, start : start + len(values_T)] = values_T[:, None]
    if slab.conv_state_MSJD is not None:
        slab.conv_state_MSJD[:, row.slot] = values_T[-1]
    for keys_S in slab.keys_by_layer.values():
        keys_S[start : start + len(values_T)] = values_T.long() % 2 == 0
    row.length += len(values_T)


def check(row: CachedRow, values: list[float]) -> None:
    slab, here = row.slab, slice(row.start, row.start + row.length)
    assert slab.slots[row.slot] is row and row.length == len(values) <= slab.capacity
    wanted_T = torch.tensor(values)
    assert (slab.kv_LSF[:, here] == wanted_T[:, None]).all()
    if slab.conv_state_MSJD is not None:
        assert (slab.conv_state_MSJD[:, row.slot] == wanted_T[-1]).all()
    for keys_S in slab.keys_by_layer.values():
        assert torch.equal(keys_S[here], wanted_T.long() % 2 == 0)


@pytest.mark.parametrize("config", [CONVOLUTIONS, DEPTHS], ids=["convolutions", "depths"])
@pytest.mark.parametrize("seed", range(3))
def test_rows_keep_what_they_cached_whatever_others_do(seed: int, config: DecoderConfig) -> None:
    chance = random.Random(seed)
    cache = RowCache(config)
    rows: dict[CachedRow, list[float]] = {}
    clock = 0.0
    for _ in range(300):
        action = chance.choice(["enter", "enter", "start", "leave", "append", "append", "append"])
        waiting = [row for row in rows if not row.is_running]
        if action == "enter" and len(rows) < 12:
            row = cache.allocate(chance.choice([3, SMALLEST_CAPACITY, SMALLEST_CAPACITY + 1]))
            rows[row] = [clock := clock + 1]
            write(row, torch.tensor(rows[row]))
        elif action == "start" and waiting:
            cache.start(chance.choice(waiting))
        elif action == "leave" and rows:
            row = chance.choice(list(rows))
            del rows[row]
            cache.free(row)
        elif action == "append" and rows:
            row = chance.choice(list(rows))
            new = [clock := clock + 1 for _ in range(chance.choice([1, 1, 1, SMALLEST_CAPACITY // 2]))]
            if row.length + len(new) <= SMALLEST_CAPACITY * CAPACITY_STEP:
                cache.make_room(row, len(new))
                rows[row] += new
                write(row, torch.tensor(new))
        for row, values in rows.items():
            check(row, values)
        running = [row for slab in cache.slabs for row in slab.rows]
        assert set(running) == {row for row in rows if row.is_running}
        assert cache.num_positions == sum(row.slab.capacity for row in rows)


def test_a_row_has_room_in_a_slab_of_its_capacity() -> None:
    assert [capacity_of(count) for count in (1, 256, 257, 1024, 1025)] == [256, 256, 1024, 1024, 4096]


def test_what_a_large_request_needed_is_given_back() -> None:
    cache = RowCache(DecoderConfig(vocab_size=9, hidden_size=8, num_hidden_layers=40, num_attention_heads=2))
    large, small = cache.allocate(1 << 14), cache.allocate(5)
    assert len(cache._slabs) == 2
    cache.free(large)
    cache.free(small)
    assert list(cache._slabs) == [SMALLEST_CAPACITY]


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 5])
def test_prompts_in_pieces_beside_others_compute_what_whole_ones_do(window: int | None) -> None:
    """Pieces of prompts, running rows, rows of several slabs: all as one packed pass over each document."""
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, conv_size=4, qk_norm="head", sliding_window=window,
    )  # fmt: skip
    decoder = Decoder(config).double().eval()
    for parameter in decoder.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    lengths = [9, 4, 300, 17]
    documents = [torch.randint(0, 50, (length,)) for length in lengths]
    wanted = [decoder(decoder.embed(ids[None]), torch.arange(len(ids))[None], ids[None] * 0)[0][0] for ids in documents]
    cache = decoder.make_row_cache()
    rows = [cache.allocate(length) for length in lengths]
    got = [torch.zeros(0, 16, dtype=torch.float64) for _ in rows]
    chance = random.Random(1)
    while any(len(own) < length for own, length in zip(got, lengths, strict=True)):
        pieces, running = [], []
        for number, row in enumerate(rows):
            left = lengths[number] - row.length
            if row.is_running or not left:
                running += [number] if left else []
            elif chance.random() < 0.7:
                pieces.append((number, min(left, chance.randint(1, max(2, lengths[number] // 3)))))
        pieces.sort(key=lambda piece: rows[piece[0]].length != 0)
        if pieces:
            boundaries = [(1,) if count > 1 else () for _, count in pieces]
            chunks = [Chunk(rows[n], count, cut) for (n, count), cut in zip(pieces, boundaries, strict=True)]
            places = [torch.arange(rows[n].length, rows[n].length + count) for n, count in pieces]
            ids = torch.cat([documents[n][place] for (n, _), place in zip(pieces, places, strict=True)])
            step = PromptStep(chunks)
            hidden = decoder.continue_rows(decoder.embed(ids), torch.cat(places), ids * 0, step)
            for (number, _), own in zip(pieces, hidden.split([count for _, count in pieces]), strict=True):
                got[number] = torch.cat([got[number], own])
            num_states = 0 if step.boundary_states_MBJD is None else step.boundary_states_MBJD.shape[1]
            assert num_states == sum(map(len, boundaries))
        for number, row in enumerate(rows):  # the last quarter of each is computed as running rows are
            if not row.is_running and row.length >= lengths[number] * 3 // 4 and row.length < lengths[number]:
                cache.start(row)
        for slab in cache.slabs:
            numbers = [rows.index(row) for row in slab.rows if row.length < lengths[rows.index(row)]]
            if len(numbers) < slab.num_rows:
                for row in [row for row in slab.rows if row.length == lengths[rows.index(row)]]:
                    cache.free(row)
            if not slab.num_rows:
                continue
            numbers = [rows.index(row) for row in slab.rows]
            ids = torch.stack([documents[n][rows[n].length] for n in numbers])
            step = RunningStep(slab)
            hidden = decoder.continue_rows(decoder.embed(ids), step.lengths_N, ids * 0, step)
            for number, own in zip(numbers, hidden, strict=True):
                got[number] = torch.cat([got[number], own[None]])
    for own, want in zip(got, wanted, strict=True):
        torch.testing.assert_close(own, want, rtol=1e-9, atol=1e-9)
