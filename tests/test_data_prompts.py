"""Prompts: their order is that of seed and step, ranks share them, a resumed training goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmllm.data.loading.prompts import PromptDataModule, PromptLoader
from mmllm.data.rows.rows import Row

ROWS = [Row(f"row {number}", "text", f"rows.jsonl:{number}", "text") for number in range(7)]


def loader(**settings: int) -> PromptLoader:
    return PromptLoader(**{"rows": ROWS, "task": "chat", "batch_size": 4, "num_steps": 5, "seed": 3, **settings})


def ids(batches: object) -> list[list[str]]:
    return [[row.id for row in batch.rows] for batch in batches]  # pyright: ignore


def test_all_rows_come_in_an_order_of_the_seed_before_any_comes_again() -> None:
    first = ids(loader())
    assert first == ids(loader())
    assert first != ids(loader(seed=4))
    flat = [name for names in first for name in names]
    assert sorted(flat[:7]) == sorted(flat[7:14]) == sorted(row.id for row in ROWS)
    assert flat[:7] != flat[7:14]


def test_ranks_share_each_step() -> None:
    whole, parts = list(loader()), [list(loader(rank=rank, world_size=2)) for rank in range(2)]
    for step, batch in enumerate(whole):
        numbers = sorted(number for part in parts for number in part[step].numbers)
        assert numbers == batch.numbers == list(range(4 * step, 4 * step + 4))
        own = dict(zip(batch.numbers, ids([batch])[0], strict=True))
        for part in parts:
            assert ids([part[step]])[0] == [own[number] for number in part[step].numbers]
    with pytest.raises(ValueError, match="batch_size is 4 prompts, which 3 ranks can't share"):
        loader(world_size=3)


def test_a_batch_comes_as_often_as_it_is_learnt_from() -> None:
    batches = list(loader(iterations=2, num_steps=6))
    assert [(batch.step, batch.iteration) for batch in batches] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert ids(batches[0::2]) == ids(batches[1::2])


def test_a_resumed_loader_goes_on() -> None:
    whole = list(loader())
    begun = loader()
    stream = iter(begun)
    for _ in range(2):
        batch = next(stream)
    state = json.loads(json.dumps(begun.state_dict()))
    resumed = loader()
    resumed.load_state_dict(state)
    assert ids(resumed) == ids(whole[2:])
    assert begun.documents_of(2, batch.state)[0]["key"] == whole[2].rows[0].id
    with pytest.raises(ValueError, match="the checkpoint's prompts had seed 3, these have 5"):
        loader(seed=5).load_state_dict(state)


def test_rows_of_other_kinds_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "one"}, {"segments": [{"text": "how many?"}], "question": "how many?", "answer": "two"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row.text for row in PromptDataModule(path, "speak").rows] == ["one"]
    assert [row.metadata["answer"] for row in PromptDataModule(path, "question").rows] == ["two"]
    with pytest.raises(ValueError, match=r"rows\.jsonl has no rows of which 'caption' can be asked"):
        _ = PromptDataModule(path, "caption").rows
    with pytest.raises(ValueError, match="task is 'sing'"):
        PromptDataModule(path, "sing")  # pyright: ignore
    with pytest.raises(ValueError, match="batch_size is 0"):
        PromptDataModule(path, "speak", batch_size=0)
