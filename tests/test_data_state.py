"""What a saved data state may be continued with: all that makes no other plan, and nothing else."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmllm.data import commands
from mmllm.data.loading.loader import PackedLoader, StepDataset
from mmllm.data.plan.plan import Plan, open_plan
from mmllm.data.plan.recipe import recipe_from_dict
from mmllm.data.samples.decode import ImageTransform
from mmllm_tokenizers.folder import TokenizerFolder
from tests.data_fixtures import make_folder, mixed_manifest, recipe_dict

NUM_STEPS = 24


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("state")
    make_folder(root / "tok")
    commands.build(mixed_manifest(root / "m"), root / "s", root / "tok")
    commands.index(root / "s", root / "tok")
    return root


def plan_of(made: Path, batch_size: int = 2, **changes: Any) -> Plan:
    return open_plan(recipe_from_dict(recipe_dict(made / "s", made / "tok", **changes)), batch_size)


def sources_of(made: Path, *changes: dict[str, Any]) -> list[dict[str, Any]]:
    """The recipe's sources, the first of them changed."""
    whole = recipe_dict(made / "s", made / "tok")["sources"]
    return [{**source, **change} for source, change in zip(whole, [*changes, {}, {}, {}, {}], strict=False)]


def steps_of(plan: Plan, state: dict[str, Any] | None = None) -> list[Any]:
    return [step.sequences for step in islice(plan.steps(state), NUM_STEPS)]


@pytest.mark.parametrize(
    ("changes", "of_source"),
    [
        ({"on_error": {"action": "raise", "max_fraction": 0.5}}, {}),
        ({}, {"name": "photos"}),
        ({}, {"weight_schedule": [[0, 0.3], [5, 0.3]], "weight": 0.7}),
        ({}, {"tasks": ["caption"]}),
    ],
)
def test_what_changes_no_plan_may_change(made: Path, changes: dict[str, Any], of_source: dict[str, Any]) -> None:
    """Names, what becomes of broken samples, defaults that are written out."""
    schedule = {"weight_schedule": [[0, 0.3], [5, 0.3]]} if "weight_schedule" in of_source else {}
    plan = plan_of(made, sources=sources_of(made, schedule))
    other = plan_of(made, sources=sources_of(made, of_source), **changes)
    assert other.hash == plan.hash
    assert steps_of(other) == steps_of(plan)
    names = [plan.sequence_hash(sequence) for sequence in plan.at(3).sequences]
    assert [other.sequence_hash(sequence) for sequence in other.at(3).sequences] == names
    state = plan.at(5).state
    assert steps_of(other, state) == steps_of(plan, state)


@pytest.mark.parametrize(
    ("changes", "of_source"),
    [
        ({"seed": 8}, {}),
        ({"sequence_length": 127}, {}),
        ({"packing": {"window": 33}}, {}),
        ({"packing": {"window": 32, "max_images": 3}}, {}),
        ({"mixture": {"unit": "samples"}}, {}),
        ({"curriculum": {"start": 0.5}}, {}),
        ({}, {"weight": 0.4}),
        ({}, {"max_epochs": 2}),
        ({}, {"filter": "num_tokens < 40"}),
        ({}, {"kind": "audio", "name": "other", "shards": "{s}/audio-*.tar"}),
    ],
)
def test_what_changes_the_plan_changes_the_hash(made: Path, changes: dict[str, Any], of_source: dict[str, Any]) -> None:
    of_source = {key: str(value).format(s=made / "s") if key == "shards" else value for key, value in of_source.items()}
    plan, other = plan_of(made), plan_of(made, sources=sources_of(made, of_source), **changes)
    assert other.hash != plan.hash
    with pytest.raises(ValueError, match="the saved data state has recipe"):
        other.check_state(plan.at(5).state)


def test_two_sources_of_the_same_shards_are_drawn_in_different_orders(made: Path) -> None:
    twice = [{"name": name, "kind": "text", "shards": str(made / "s" / "text-*.tar")} for name in ("one", "two")]
    plan = plan_of(made, sources=twice, mixture={"unit": "samples"})
    drawn = [item for step in steps_of(plan) for sequence in step for item in sequence]
    first, second = ([item.row for item in drawn if item.source == source] for source in (0, 1))
    assert len(first) > 24 and first[:24] != second[:24]


def test_states_of_earlier_versions_are_refused_by_name(made: Path) -> None:
    plan = plan_of(made)
    state = {**plan.at(5).state, "version": 2}
    for key in ("next", "numpy"):
        del state[key]
    for refuse in (plan.check_state, lambda state: next(plan.steps(state))):
        with pytest.raises(ValueError, match=r"has version 2, this mmllm writes 3.*sources' names.*begin a new one"):
            refuse(state)


def test_a_state_names_what_comes_next(made: Path) -> None:
    """At every step, windows' ends included, and also where a stream ends."""
    plan = plan_of(made, sources=sources_of(made, {"max_epochs": 1}))
    steps = list(plan.steps())
    assert {step.state["offset"] == 0 for step in steps} == {True, False}
    names = [step.state["next"] for step in steps]
    assert len(set(names)) == len(names) and None not in names[:-1] and names[-1] is None
    for step in steps:
        state = json.loads(json.dumps(step.state))
        plan.check_state(state)
        assert [following.state for following in plan.steps(state)] == [later.state for later in steps[step.step + 1 :]]


@pytest.mark.parametrize("number", [0, 3, 11])
def test_another_random_stream_is_noticed(made: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """As another NumPy may have one; the recipe's hash is the same."""
    folder = TokenizerFolder.load(made / "tok")
    state = {**plan_of(made).at(number).state, "numpy": "1.26.0"}
    monkeypatch.setattr(np.random, "default_rng", lambda seed: np.random.Generator(np.random.PCG64DXSM(seed)))
    plan = plan_of(made)
    loader = PackedLoader(plan, StepDataset(plan, folder, ImageTransform(folder.image_size)), 10)
    message = rf"NumPy 1\.26\.0 then, {np.__version__} now.*resume with the NumPy"
    for refuse in (loader.load_state_dict, plan.check_state, lambda state: next(plan.steps(state))):
        with pytest.raises(ValueError, match=message):
            refuse(state)


def test_another_sequence_is_noticed(made: Path) -> None:
    """As of an index that was made anew by code that counts otherwise: recipe, shards and tokenizer are the same."""
    plan = plan_of(made)
    with pytest.raises(ValueError, match=r"goes on with sequence 0000.*the shards' indices changed"):
        plan.check_state({**plan.at(4).state, "next": "0" * 16})
