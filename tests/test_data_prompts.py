"""Prompts: their order is that of seed and step, ranks share them, a resumed training goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmllm.data.loading.prompts import PromptDataModule, PromptLoader
from mmllm.data.rows.bad_rows import ManifestError
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.rows import Row
from mmllm.evaluation.preferences.prompts import _turns

ROWS = [Row(f"row {number}", "text", f"rows.jsonl:{number}", "text") for number in range(7)]


def loader(**settings: Any) -> PromptLoader:
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


class _Replay:
    """Some steps of replayed documents, of which `failed` can't be read."""

    def __init__(self, num_steps: int, failed: tuple[str, ...] = ()) -> None:
        self.num_steps, self.failed, self.checked = num_steps, failed, []
        self.plan = SimpleNamespace(check_state=self.checked.append)
        self.recipe = SimpleNamespace(on_error=SimpleNamespace(max_fraction=0.001))

    def steps(self, state: Mapping[str, Any] | None, rank: int, world_size: int) -> Iterator[Any]:
        for step in range(0 if state is None else state["step"], self.num_steps):
            yield SimpleNamespace(state={"step": step + 1})

    def batch(self, step: Any) -> Any:
        return SimpleNamespace(step=step.state["step"], state={"errors": list(self.failed)}, num_documents=3)


def test_a_replay_goes_along_and_is_resumed_or_refused() -> None:
    whole: Any = list(loader(replay=_Replay(9)))
    begun = loader(replay=_Replay(9))
    stream = iter(begun)
    for _ in range(2):
        next(stream)
    state = json.loads(json.dumps(begun.state_dict()))
    replay = _Replay(9)
    resumed: Any = loader(replay=replay)
    resumed.load_state_dict(state)
    assert [batch.replay.step for batch in resumed] == [batch.replay.step for batch in whole[2:]] == [3, 4, 5]
    assert replay.checked == [{"step": 2}], "the recipe must be the same"
    for other, saved in ((loader(), state), (loader(replay=replay), loader().state_dict())):
        with pytest.raises(ValueError, match="differ in whether there is a replay_recipe"):
            other.load_state_dict(saved)
    with pytest.raises(ValueError, match="the replay recipe's documents are used up"):
        list(loader(replay=_Replay(3)))


def test_what_fails_of_a_replay_is_named_and_bounded(caplog: pytest.LogCaptureFixture) -> None:
    list(loader(replay=_Replay(9, ("a.tar:1: broken",)), num_steps=9))
    assert "masked a.tar:1: broken" in caplog.text
    with pytest.raises(ValueError, match=r"12 of 18 documents of replay_recipe failed.*a\.tar:1: broken"):
        list(loader(replay=_Replay(9, ("a.tar:1: broken",) * 6), num_steps=9))


def test_a_replay_has_a_recipe_and_a_size() -> None:
    wrong: tuple[dict[str, Any], ...] = (
        {"replay_recipe": "r.yaml"}, {"replay_sequences": 2}, {"replay_recipe": "r", "replay_sequences": -1},
    )  # fmt: skip
    for given in wrong:
        with pytest.raises(ValueError, match="give both, or neither"):
            PromptDataModule("rows.jsonl", "chat", **given)


def test_a_conversation_is_asked_up_to_its_last_answer_and_needs_none(tmp_path: Path) -> None:
    """Training leaves a question at the end out, which is what is asked here."""
    ask, answer = {"role": "user", "content": "which?"}, {"role": "assistant", "content": "red"}
    path = tmp_path / "rows.jsonl"
    talks = ([ask], [ask, answer, {**ask, "content": "why?"}], [ask, answer])
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    turns = [[content[0]["text"] for _, content in _turns(row)] for row in PromptDataModule(path, "chat").rows]
    assert turns == [["which?"], ["which?", "red", "why?"], ["which?"]]
    with pytest.raises(ManifestError, match="nobody answers in this conversation"):
        read_rows(path)


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
