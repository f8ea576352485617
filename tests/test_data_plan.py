from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import yaml

from mmllm.data import commands
from mmllm.data.expressions import compile_filter
from mmllm.data.index.index import index_path, load_index
from mmllm.data.plan.plan import Plan, open_plan, open_sources
from mmllm.data.plan.recipe import (
    CurriculumConfig,
    load_recipe,
    recipe_from_dict,
    recipe_hash,
    recipe_to_dict,
)
from mmllm.data.shards.tar import scan_tar
from tests.data_fixtures import make_folder, mixed_manifest, recipe_dict, words, write_manifest
from tests.real_data import needs_real_data, real_set


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a tokenizer, and indexed shards of all kinds, the sounds with altered copies."""
    root = tmp_path_factory.mktemp("plan")
    make_folder(root / "tok")
    commands.build(mixed_manifest(root / "m"), root / "s", root / "tok", perturb=1)
    commands.index(root / "s", root / "tok")
    return root


def plan_of(root, batch_size: int = 4, **changes) -> Plan:
    return open_plan(recipe_from_dict(recipe_dict(root / "s", root / "tok", **changes)), batch_size)


def source(root, kind: str, **changes) -> dict:
    return {"name": kind, "kind": kind, "shards": str(root / "s" / f"{kind}-*.tar"), **changes}


def hashes(plan: Plan, steps, state=None) -> list[list[str]]:
    return [[plan.sequence_hash(sequence) for sequence in step.sequences] for step in islice(plan.steps(state), steps)]


def test_the_plan_is_a_function_of_recipe_and_seed(made):
    first, second = hashes(plan_of(made), 30), hashes(plan_of(made), 30)
    assert first == second
    assert hashes(plan_of(made, seed=8), 30) != first
    assert [plan_of(made).sequence_hash(sequence) for sequence in plan_of(made).at(17).sequences] == first[17]


def test_every_state_continues_the_stream_exactly(made):
    curriculum = {"start": 0.3, "steps": 20}
    plan = plan_of(made, curriculum=curriculum)
    steps = list(islice(plan.steps(), 40))
    wanted = hashes(plan, 40)
    for number in (0, 1, 2, 7, 16, 25):
        state = json.loads(json.dumps(steps[number].state))
        assert len(json.dumps(state)) < 1024
        assert hashes(plan_of(made, curriculum=curriculum), 40 - number - 1, state) == wanted[number + 1 :]


def test_a_foreign_state_is_refused(made):
    state = next(plan_of(made).steps()).state
    with pytest.raises(ValueError, match="recipe"):
        next(plan_of(made, seed=8).steps(state))
    with pytest.raises(ValueError, match="batch_size"):
        next(plan_of(made, batch_size=2).steps(state))


def test_sequences_are_full_and_shares_are_kept(made):
    told = commands.stats(write_recipe(made), steps=200, batch_size=4)
    for name, share in told["wanted_share"].items():
        assert abs(told["share"][name] - share) < 0.01, name
    assert told["padding"] < 0.1
    plan = plan_of(made)
    for step in islice(plan.steps(), 50):
        for sequence in step.sequences:
            assert 0 < sum(item.num_tokens for item in sequence) <= 128


def test_shares_by_samples_and_temperature(made):
    recipe = recipe_from_dict(recipe_dict(made / "s", made / "tok", mixture={"unit": "samples", "temperature": 2.0}))
    root = np.sqrt([0.3, 0.3, 0.1, 0.3])
    assert recipe.shares() == pytest.approx((root / root.sum()).tolist())
    told = commands.stats(write_recipe(made, mixture={"unit": "samples"}), steps=100, batch_size=4)
    total = sum(told["documents"].values())
    assert told["documents"]["caption"] / total == pytest.approx(0.3, abs=0.03)


def write_recipe(made, **changes):
    path = made / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_dict(made / "s", made / "tok", **changes)))
    return path


def test_an_epoch_holds_each_document_once(made):
    sources = [source(made, "caption", max_epochs=1), source(made, "audio", max_epochs=2)]
    plan = plan_of(made, sources=sources, mixture={"on_exhausted": "renormalize"})
    drawn = [item for step in plan.steps() for sequence in step.sequences for item in sequence]
    counts: dict = {}
    for item in drawn:
        key = (item.source, item.row, item.task)
        counts[key] = counts.get(key, 0) + 1
    assert {count for key, count in counts.items() if key[0] == 0} == {1}
    assert {count for key, count in counts.items() if key[0] == 1} == {2}
    assert len(counts) == 24 + 48 * 2  # each sound as two tasks
    last = list(plan.steps())[-1]
    assert len(last.sequences) == 4  # filled up with empty sequences


def test_what_happens_when_a_source_runs_out(made):
    sources = [source(made, "caption", max_epochs=1), source(made, "text")]
    stopped = list(plan_of(made, sources=sources).steps())
    assert len(stopped) < 20
    for action in ("renormalize", "repeat"):
        plan = plan_of(made, sources=sources, mixture={"on_exhausted": action})
        late = list(islice(plan.steps(), 60))[-1]
        kinds = {item.source for sequence in late.sequences for item in sequence}
        assert kinds == ({1} if action == "renormalize" else {0, 1})


def test_filters_tasks_and_image_caps(made):
    clean = plan_of(made, sources=[source(made, "audio", filter="not perturbed", tasks=["speak"])])
    assert clean.sources[0].num_items == 24 and clean.sources[0].num_filtered == 24
    one = plan_of(made, sources=[source(made, "audio", filter="speaker == 'bob' and duration < 9")])
    assert one.sources[0].num_items == 48
    weighted = plan_of(made, sources=[source(made, "audio", task_weights=[1.0, 0.25])])
    tasks = [item.task for step in islice(weighted.steps(), 60) for sequence in step.sequences for item in sequence]
    assert 0.15 < tasks.count("speak") / tasks.count("transcribe") < 0.4
    with pytest.raises(ValueError, match="no documents are left"):
        plan_of(made, sources=[source(made, "interleaved", max_images=0)])
    asked = plan_of(made, sources=[source(made, "interleaved", tasks=["question"])])
    assert asked.sources[0].num_items == 8


def test_shares_of_the_data_lie_in_each_other(made):
    def rows(share: float, seed: int = 0) -> set[tuple[str, int, int]]:
        plan = plan_of(made, seed=seed, sources=[source(made, "audio", share=share)])
        (drawn,) = plan.sources
        items = drawn.items(np.arange(drawn.num_items))
        assert drawn.num_documents == len({(item.shard, item.row) for item in items})
        assert len(items) == 2 * drawn.num_documents  # each sound as two tasks
        return {(item.task, item.shard, item.row) for item in items}

    half, whole = rows(0.5), rows(1.0)
    assert rows(0.25) < half < whole and len(whole) == 48 * 2
    assert half == rows(0.5) != rows(0.5, seed=1)
    assert (
        plan_of(made, sources=[source(made, "audio")]).hash
        != plan_of(made, sources=[source(made, "audio", share=0.5)]).hash
    )
    with pytest.raises(ValueError, match="share is 0"):
        plan_of(made, sources=[source(made, "audio", share=0)])
    with pytest.raises(ValueError, match="filtered out by its filter and its share of 1e-09"):
        plan_of(made, sources=[source(made, "audio", share=1e-9)])


def test_long_texts_are_split_and_others_left_out(made):
    plan = plan_of(made, sequence_length=32, sources=[source(made, "text")])
    parts = [item for step in islice(plan.steps(), 40) for sequence in step.sequences for item in sequence]
    assert any(item.part > 0 for item in parts) and all(item.num_tokens <= 32 for item in parts)
    dropped = plan_of(made, sequence_length=32, sources=[source(made, "text")], packing={"long_documents": "drop"})
    (kept,) = dropped.sources
    assert kept.num_too_long and all(item.part == -1 for item in kept.items(np.arange(kept.num_items)))
    with pytest.raises(ValueError, match="longer than sequence_length"):
        plan_of(made, sequence_length=4, sources=[source(made, "caption")])


def test_the_curriculum_begins_with_the_easiest(made):
    plan = plan_of(made, sources=[source(made, "text")], curriculum={"start": 0.2, "steps": 50, "pacing": "step"})
    lengths = [
        max(item.num_tokens for sequence in step.sequences for item in sequence) for step in islice(plan.steps(), 120)
    ]
    tokens = np.sort(plan.sources[0].tokens_M)
    assert max(lengths[:40]) <= tokens[int(np.ceil(0.2 * len(tokens))) - 1]
    assert max(lengths[80:]) == tokens[-1]
    column = plan_of(made, sources=[source(made, "audio")], curriculum={"metric": "duration", "start": 0.5})
    assert column.sources[0].rank_M is not None


def test_curriculum_shares():
    linear = CurriculumConfig(pacing="linear", start=0.2, steps=100)
    root = CurriculumConfig(pacing="root", start=0.2, steps=100)
    assert [linear.share(step) for step in (0, 50, 100, 500)] == pytest.approx([0.2, 0.6, 1.0, 1.0])
    assert root.share(0) == pytest.approx(0.2) and root.share(50) == pytest.approx(np.sqrt(0.52))


def test_packing_is_best_fit_decreasing(made):
    plan = plan_of(made, packing={"window": 400})
    windows: dict[int, list[int]] = {}
    for step in islice(plan.steps(), 12):
        for sequence in step.sequences:
            windows.setdefault(step.state["window"], []).append(sum(item.num_tokens for item in sequence))
    assert np.mean(windows[0]) > 0.97 * 128


def test_the_recipe_hash_knows_no_path(made, tmp_path):
    recipe = recipe_from_dict(recipe_dict(made / "s", made / "tok"))
    digests = [[index.sha256 for index in item.indices] for item in open_sources(recipe, plan_tokenizer(made))]
    moved = recipe_from_dict(recipe_dict(tmp_path, tmp_path))
    assert recipe_hash(recipe, digests, "t") == recipe_hash(moved, digests, "t")
    assert recipe_hash(recipe, digests, "t") != recipe_hash(recipe, digests, "u")
    assert recipe_from_dict(recipe_to_dict(recipe)) == recipe


def plan_tokenizer(made) -> str:
    from mmllm_tokenizers.folder import TokenizerFolder

    return TokenizerFolder.load(made / "tok").hash


def text_source(**changes) -> dict:
    return {"name": "a", "kind": "text", "shards": "x", **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sed": 3}, "unknown key 'sed'"),
        ({"sequence_length": "long"}, "sequence_length is 'long'"),
        ({"sequence_length": 1}, "at least 2"),
        ({"sources": []}, "at least one"),
        ({"packing": {"windows": 3}}, "packing has the unknown key 'windows'"),
        ({"mixture": {"unit": "words"}}, "mixture.unit is 'words'"),
        ({"curriculum": {"start": 0}}, "curriculum"),
        ({"curriculum": {"sources": ["words"]}}, "curriculum.sources names 'words', which is no source of the recipe"),
        ({"curriculum": {"sources": []}}, "curriculum.sources is empty; name a source"),
        ({"on_error": {"max_fraction": 2}}, "max_fraction"),
        ({"seed": True}, "seed is True"),
        ({"sources": [{"name": "a", "kind": "video", "shards": "x"}]}, r"sources\[0\].kind is 'video'"),
        ({"sources": [{"name": "a", "kind": "text"}]}, "lacks the key 'shards'"),
        ({"sources": [{"name": "a", "kind": "text", "shards": "x", "tasks": ["speak"]}]}, "task 'speak'"),
        ({"sources": [{"name": "a", "kind": "text", "shards": "x", "filter": "import os"}]}, "filter"),
        ({"sources": [{"name": "a", "kind": "text", "shards": "x", "weight": 0}]}, "weight"),
        ({"sources": [{"name": "a", "kind": "text", "shards": "x"}] * 2}, "names"),
        ({"sources": [text_source(weight=float("inf"))]}, r"sources\[0\]\.weight is inf; it must be a finite number"),
        ({"sources": [text_source(weight=10**400)]}, r"sources\[0\]\.weight is 1000.*finite"),
        ({"sources": [text_source(max_epochs=float("nan"))]}, r"sources\[0\]\.max_epochs is nan"),
        ({"sources": [text_source(weight_schedule=[[0, float("nan")], [3, 1]])]}, r"weight_schedule\[0\]\[1\] is nan"),
        ({"on_error": {"max_fraction": float("nan")}}, r"on_error\.max_fraction is nan"),
        ({"mixture": {"temperature": 1e-4}}, r"mixture\.temperature is 0\.0001.*raise the temperature"),
        ({"sources": [text_source(weight=1e300)], "mixture": {"temperature": 0.1}}, r"mixture\.temperature is 0\.1"),
        ({"sources": [text_source(weight_schedule=[[0, 1], [50, 0]])]}, "weight 0 at step 50; mend their weight_sched"),
        ({"sources": [text_source(weight_schedule=[[0, 1], [5, 1], [5, 0], [9, 0], [9, 1]])]}, "weight 0 at step 5;"),
    ],
)
def test_wrong_recipes_are_named(tmp_path, changes, message):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe_dict(tmp_path, tmp_path, **changes)))
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)


def test_recipes_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "r.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="not YAML"):
        load_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("- a")
    with pytest.raises(ValueError, match="mapping"):
        load_recipe(tmp_path / "r.yaml")


def test_filters():
    row = {"width": 64, "speaker": "bob", "perturbed": True, "score": 0.5}
    for text, wanted in {
        "width >= 64": True, "not perturbed": False, "not missing": True, "speaker == 'bob' or width > 100": True,
        "speaker in ['ann', 'bob']": True, "missing > 3": False, "missing > 3 or width": True, "-score < 0": True,
        "32 < width * 2 <= 128": True, "speaker != 'bob'": False, "width % 7 == 1": True, "missing is None": None,
    }.items():  # fmt: skip
        if wanted is None:
            with pytest.raises(ValueError, match="isn't allowed"):
                compile_filter(text)
        else:
            assert compile_filter(text)(row) is wanted, text
    for text in ("__import__('os')", "speaker.upper()", "[x for x in y]", "lambda: 0", "width =", "", "row['a']"):
        with pytest.raises(ValueError, match="filter"):
            compile_filter(text)


def test_an_index_of_another_tokenizer_or_shard_is_refused(made, tmp_path):
    manifest = write_manifest(tmp_path, [{"id": str(n), "text": words(np.random.default_rng(n))} for n in range(5)])
    commands.build(manifest, tmp_path / "s")
    shard = tmp_path / "s" / "text-000000.tar"
    with pytest.raises(FileNotFoundError, match="no index"):
        load_index(shard, "x")
    commands.index(tmp_path / "s", made / "tok")
    with pytest.raises(ValueError, match="tokenizer"):
        load_index(shard, "x")
    whole = shard.read_bytes()
    shard.write_bytes(whole + b"\0" * 512)
    with pytest.raises(ValueError, match="when it was indexed"):
        load_index(shard, plan_tokenizer(made))
    commands.index(tmp_path / "s", made / "tok")  # made anew
    assert load_index(shard, plan_tokenizer(made)).num_documents == 5
    index_path(shard).write_bytes(b"PK nonsense")
    with pytest.raises(ValueError, match="broken"):
        load_index(shard, plan_tokenizer(made))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="only its index is left"):
        load_index(shard, plan_tokenizer(made))


@pytest.mark.parametrize("cut", [100, 700, 5000, -600])
def test_a_truncated_tar_is_named(made, tmp_path, cut):
    shard = tmp_path / "cut.tar"
    whole = (made / "s" / "caption-000000.tar").read_bytes()
    ended = max(span.offset + span.size for span in scan_tar(made / "s" / "caption-000000.tar"))
    shard.write_bytes(whole[: cut if cut > 0 else ended + cut])
    with pytest.raises(ValueError, match=r"cut\.tar"):
        commands.index(shard, made / "tok")
    told = commands.verify(shard, made / "tok")
    assert told["broken"] and "cut.tar" in told["errors"][0]


def test_a_damaged_or_foreign_tar_is_named(made, tmp_path):
    shard = tmp_path / "bad.tar"
    shard.write_bytes(b"this is no tar at all, " * 100)
    with pytest.raises(ValueError, match=r"bad\.tar"):
        commands.index(shard, made / "tok")
    whole = bytearray((made / "s" / "text-000000.tar").read_bytes())
    whole[1024 + 3] ^= 1
    shard.write_bytes(bytes(whole))
    with pytest.raises(ValueError, match="checksum"):
        commands.index(shard, made / "tok")


def test_jsonl_in_shards_is_one_document_a_line(made, tmp_path):
    import io
    import tarfile

    data = b"".join(json.dumps({"text": f"line {n}", "n": n}).encode() + b"\n" for n in range(4))
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        member = tarfile.TarInfo("many.jsonl")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    told = commands.index(tmp_path / "t.tar", made / "tok")
    assert told["documents"] == 4 and commands.verify(tmp_path / "t.tar", made / "tok")["broken"] == 0
    plan = plan_of(made, sources=[{"name": "t", "kind": "text", "shards": str(tmp_path / "t.tar"), "filter": "n != 2"}])
    assert [plan.describe(plan.sources[0].item(n))["key"] for n in range(3)] == ["many-0", "many-1", "many-3"]


def test_scanning_agrees_with_tarfile(made):
    import tarfile

    for shard in sorted((made / "s").glob("*.tar")):
        ours = [
            (member.key + "." + member.ending, member.offset, member.size)
            for s in scan_tar(shard)
            for member in s.members
        ]
        with tarfile.open(shard) as tar:
            assert ours == [(member.name, member.offset_data, member.size) for member in tar]


def test_shipped_recipes_can_be_read():
    paths = sorted((Path(__file__).parent.parent / "data_recipes").rglob("*.yaml"))
    assert paths
    for path in paths:
        assert load_recipe(path).sources


@needs_real_data
def test_real_data_goes_the_whole_way(made, tmp_path):
    sources = []
    for name, kind in (("fsdd", "audio"), ("cifar10", "caption"), ("emoji", "caption"), ("shakespeare", "text")):
        whole = real_set(name)
        rows = [json.loads(line) for line in whole.read_text().splitlines()[::100]]
        for row in rows:
            row |= {key: str(whole.parent / row[key]) for key in ("image", "audio") if key in row}
        manifest = write_manifest(tmp_path, rows, f"{name}.jsonl")
        told = commands.build(manifest, tmp_path / name, made / "tok", perturb=1)
        assert told["num_bad"] == 0 and told["num_samples"] == len(rows) * (2 if kind == "audio" else 1)
        assert commands.verify(tmp_path / name, made / "tok")["broken"] == 0
        sources.append({"name": name, "kind": kind, "shards": str(tmp_path / name / "*.tar")})
    plan = plan_of(made, sources=sources, sequence_length=512)
    assert all(len(step.sequences) == 4 for step in islice(plan.steps(), 20))
