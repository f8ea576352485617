"""A source's documents by the values of a column: shares as the formula says, the same after a resume."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from mmllm.cli.main import main
from mmllm.data import commands
from mmllm.data.loading.datamodules import _once, default_steps
from mmllm.data.plan.plan import Plan, open_plan
from mmllm.data.plan.recipe import recipe_from_dict
from tests.data_fixtures import make_folder, recipe_dict, words, write_manifest

COUNTS = {"0": 64, "1": 16, "2": 4, "": 12}
"""Documents by topic; the last have none."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("balance"), np.random.default_rng(0)
    make_folder(root / "tok")
    topics = rng.permutation([topic for topic, count in COUNTS.items() for _ in range(count)]).tolist()
    rows = [
        {"id": f"{n}", "text": words(rng), **({"topic": int(topic)} if topic else {})} for n, topic in enumerate(topics)
    ]
    commands.build(write_manifest(root, rows), root / "s", samples_per_shard=40)
    commands.index(root / "s", root / "tok")
    return root


def recipe_of(root: Path, **changes: object) -> dict:
    source = {"name": "text", "kind": "text", "shards": str(root / "s" / "text-*.tar"), **changes}
    return recipe_dict(root / "s", root / "tok", sources=[source])


def plan_of(root: Path, **changes: object) -> Plan:
    return open_plan(recipe_from_dict(recipe_of(root, **changes)), 4)


def drawn(plan: Plan, count: int) -> np.ndarray:
    """The first items, by number."""
    return plan.sources[0].upcoming(0, count, None, None).items[:count]


def values(plan: Plan, numbers: np.ndarray) -> Counter[str]:
    source = plan.sources[0]
    return Counter(source.balance_value(item.shard, item.row) for item in source.items(numbers))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_shares_are_those_of_the_formula(made: Path, alpha: float):
    plan = plan_of(made, balance="topic", balance_alpha=alpha)
    balance = plan.sources[0].balance
    assert balance is not None and balance.names == ("", "0", "1", "2")
    wanted = {topic: count**alpha for topic, count in COUNTS.items()}
    wanted = {topic: power / sum(wanted.values()) for topic, power in wanted.items()}
    assert dict(zip(balance.names, balance.shares_V.tolist(), strict=True)) == pytest.approx(wanted)
    count = 6000
    found = values(plan, drawn(plan, count))
    for topic, share in wanted.items():
        assert found[topic] / count == pytest.approx(share, abs=4 * (share * (1 - share) / count) ** 0.5)


def test_an_epoch_draws_each_document_once_at_most_and_the_rarest_always(made: Path):
    plan = plan_of(made, balance="topic", max_epochs=3)
    source = plan.sources[0]
    epochs = [source.upcoming(n * source.num_items, 10**6, None, (n + 1) * source.num_items).items for n in range(3)]
    for items in epochs:
        assert len(set(items.tolist())) == len(items) < source.num_items and values(plan, items)["2"] == COUNTS["2"]
    assert len({tuple(sorted(items.tolist())) for items in epochs}) == 3  # each draws anew
    steps = list(plan.steps())
    assert sum(len(sequence) for step in steps for sequence in step.sequences) == sum(map(len, epochs))


def test_a_balance_of_alpha_one_changes_nothing_and_without_it_recipes_keep_their_hash(made: Path):
    plain, even = plan_of(made), plan_of(made, balance="topic", balance_alpha=1)
    assert np.array_equal(drawn(plain, 500), drawn(even, 500)) and plain.hash != even.hash
    assert plan_of(made, balance="topic").hash == plan_of(made, balance="topic", balance_alpha=0.5).hash
    assert plain.sources[0].balance is None
    once = _once(recipe_from_dict(recipe_of(made, balance="topic", balance_alpha=0.2)))
    assert once.sources[0].balance is None and once.sources[0].balance_alpha is None


def test_documents_that_may_have_masked_spans_are_counted_once(made: Path):
    plan = plan_of(made, balance="topic", balance_alpha=0, masked_spans={"sentinels": ["<|pad|>"], "share": 0.5})
    source = plan.sources[0]
    assert source.balance is not None and source.num_items > sum(COUNTS.values())
    assert dict(zip(source.balance.names, source.balance.counts_V.tolist(), strict=True)) == COUNTS
    found = values(plan, drawn(plan, 2000))
    assert all(0.21 < found[topic] / 2000 < 0.29 for topic in COUNTS)


def test_a_text_of_several_parts_is_one_document(made: Path):
    plan = open_plan(
        recipe_from_dict({**recipe_of(made, balance="topic", balance_alpha=0.5), "sequence_length": 12}), 4
    )
    source = plan.sources[0]
    assert source.num_items > sum(COUNTS.values()) and source.balance is not None
    assert dict(zip(source.balance.names, source.balance.counts_V.tolist(), strict=True)) == COUNTS
    items = source.upcoming(0, 10**6, None, 300 * source.num_items).items
    firsts = items[[item.part <= 0 for item in source.items(items)]]
    found, wanted = values(plan, firsts), {topic: count**0.5 for topic, count in COUNTS.items()}
    for topic, share in wanted.items():
        assert found[topic] / len(firsts) == pytest.approx(share / sum(wanted.values()), rel=0.05)


@pytest.mark.parametrize("masked", [None, {"sentinels": ["<|pad|>"], "share": 0.5}])
def test_one_pass_is_as_many_tokens_as_an_epoch_draws(made: Path, masked: dict | None):
    more = {} if masked is None else {"masked_spans": masked}
    plan = plan_of(made, balance="topic", balance_alpha=0, **more)
    source = plan.sources[0]
    tokens = source.tokens_M[source.upcoming(0, 10**6, None, 400 * source.num_items).items].sum() / 400
    assert source.num_epoch_tokens == pytest.approx(tokens, rel=0.03)
    assert tokens < 0.5 * plan_of(made).sources[0].num_epoch_tokens
    assert default_steps(plan) == max(1, math.ceil(source.num_epoch_tokens / (4 * plan.recipe.sequence_length)))


def test_a_resumed_plan_goes_on_in_the_same_order(made: Path):
    def plan() -> Plan:
        return plan_of(made, balance="topic", balance_alpha=0.2)

    steps = list(islice(plan().steps(), 25))
    for stop in (3, 11, 20):
        again = list(islice(plan().steps(json.loads(json.dumps(steps[stop - 1].state))), 5))
        assert [step.sequences for step in again] == [step.sequences for step in steps[stop : stop + 5]]
        assert plan().at(stop).sequences == steps[stop].sequences


def test_stats_say_what_was_wanted_and_drawn(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "r.yaml").write_text(json.dumps(recipe_of(made, balance="topic", balance_alpha=0)))
    told = commands.stats(tmp_path / "r.yaml", 60, 4)["balance"]["text"]
    assert told["column"] == "topic" and told["alpha"] == 0
    assert {name: each["documents"] for name, each in told["values"].items()} == COUNTS
    assert all(each["wanted_share"] == 0.25 for each in told["values"].values())
    assert sum(each["share"] for each in told["values"].values()) == pytest.approx(1)
    assert all(0.18 < each["share"] < 0.32 for each in told["values"].values())
    assert main(["data", "stats", "--recipe", str(tmp_path / "r.yaml"), "--steps", "60", "--batch_size", "4"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["value", "documents", "wanted", "realized"] in lines
    assert [line[:3] for line in lines if line and line[0] in ("none", "0", "1", "2")] == [
        [topic or "none", str(count), "25.00%"] for topic, count in sorted(COUNTS.items())
    ]


def test_what_cannot_be_balanced_is_named(made: Path):
    for changes, said in (
        ({"balance": "topics"}, "balance is 'topics', which no document has; known are .*topic"),
        ({"balance": "topic", "balance_alpha": 1.5}, "balance_alpha is 1.5"),
        ({"balance_alpha": 0.5}, "balance_alpha is 0.5 and balance None"),
    ):
        with pytest.raises(ValueError, match=said):
            plan_of(made, **changes)
    recipe = {**recipe_of(made, balance="topic"), "curriculum": {"metric": "num_tokens"}}
    with pytest.raises(ValueError, match=r"'text' has balance and the recipe a curriculum"):
        recipe_from_dict(recipe)
