from __future__ import annotations

import random
import sys

import psutil
import pytest

from mmllm.heap import trim_heap
from mmllm.training import heap
from mmllm.training.heap import TrimHeap


def resident_bytes() -> int:
    return psutil.Process().memory_info().rss


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc_trim is glibc's")
def test_what_was_freed_between_kept_pieces_goes_back():
    """Every second of many pieces is freed: a heap that only shrinks at its end keeps all of it."""
    if not trim_heap():
        pytest.skip("this C library has no malloc_trim")
    pieces = [bytearray(random.randrange(50_000, 100_000)) for _ in range(4000)]
    kept = pieces[1::2]
    del pieces
    before = resident_bytes()
    assert trim_heap()
    freed = before - resident_bytes()
    assert freed > 0.7 * sum(len(piece) for piece in kept)


class _Calls:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> bool:
        self.count += 1
        return True


def test_it_trims_every_few_steps(monkeypatch):
    calls = _Calls()
    monkeypatch.setattr(heap, "trim_heap", calls)
    callback = TrimHeap(every_steps=3)
    counts = []
    for step in range(7):
        callback.on_train_batch_end(None, None, None, None, step)  # pyright: ignore[reportArgumentType]
        counts.append(calls.count)
    assert counts == [0, 0, 1, 1, 1, 2, 2]


def test_where_there_is_none_it_says_so(monkeypatch, caplog):
    monkeypatch.setattr("mmllm.heap._malloc_trim", lambda: None)
    assert not trim_heap()
    TrimHeap().on_fit_start(None, None)  # pyright: ignore[reportArgumentType]
    assert "TrimHeap does nothing: this system's C library has no malloc_trim" in caplog.text


def test_steps_are_positive():
    with pytest.raises(ValueError, match="every_steps is 0; give 1 or more"):
        TrimHeap(every_steps=0)
