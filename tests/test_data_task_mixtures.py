"""Instruction mixtures: caps and held-out task types, anchors, and few documents of a task among many general ones."""

import json
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest

from mmllm.data import commands
from mmllm.data.loading.loader import StepDataset
from mmllm.data.plan.plan import Plan, open_plan
from mmllm.data.plan.recipe import recipe_from_dict, recipe_hash, recipe_to_dict
from mmllm.data.plan.tasks import TaskConfig, open_task_plan, split_sources
from mmllm.data.rows.bad_rows import ManifestError
from mmllm.data.rows.split import split
from mmllm.data.samples.decode import ImageTransform
from mmllm.data.samples.document import Document
from mmllm.data.samples.documents import build_document
from mmllm.data.samples.lengths import document_length
from mmllm_tokenizers.folder import TokenizerConfig, TokenizerFolder
from tests.data_fixtures import make_folder, mixed_manifest, words
from tests.pretrained_fixtures import CHATML
from tests.rows_fixtures import as_lines, pictures, put

COUNTS = {"count": 40, "compare": 25, "yesno": 6, "several": 3}
ANCHOR = "red is what we talk of"


def talks(counts=COUNTS, seed=0, column="task"):
    rng = np.random.default_rng(seed)
    rows = []
    for task, count in counts.items():
        for number in range(count):
            messages = [{"role": "user", "content": words(rng)}, {"role": "assistant", "content": words(rng)}]
            system = [{"role": "system", "content": "be brief"}] * (number % 3 == 0)
            rows.append({"id": f"{task}{number}", "messages": [*system, *messages], column: task})
    rng.shuffle(rows)
    return rows


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("tasks")
    make_folder(root / "tok")
    commands.build(as_lines(root / "talks.jsonl", *talks()), root / "talks", samples_per_shard=20)
    commands.build(mixed_manifest(root / "m", num=24), root / "s", root / "tok", samples_per_shard=10)
    commands.index([root / "talks", root / "s"], root / "tok")
    return root


def talk(root, **changes):
    return {
        "name": "talk",
        "kind": "interleaved",
        "shards": str(root / "talks" / "*.tar"),
        "tasks": ["chat"],
        **changes,
    }


def kind(root, name, **changes):
    return {"name": name, "kind": name, "shards": str(root / "s" / f"{name}-*.tar"), **changes}


def plan_of(root, *sources, batch_size=2, **changes) -> Plan:
    told = {"tokenizer": str(root / "tok"), "sequence_length": 128, "seed": 7, "packing": {"window": 64}}
    return open_plan(recipe_from_dict({**told, "sources": list(sources), **changes}), batch_size)


def types_of(plan, number=0):
    """The task type of each item of a source, by its key."""
    source = plan.sources[number]
    found = {}
    for item in map(source.item, range(source.num_items)):
        index = source.indices[item.shard]
        found[index.key(item.row)] = index.columns["task"][item.row]
    return found


# ------------------------------------------------------------------------------------------------- caps, held out
def test_no_task_type_has_more_documents_than_its_cap(made):
    whole = types_of(plan_of(made, talk(made)))
    assert Counter(whole.values()) == COUNTS
    plan = plan_of(made, talk(made, max_documents=8))
    capped = types_of(plan)
    assert Counter(capped.values()) == {"count": 8, "compare": 8, "yesno": 6, "several": 3}
    assert plan.sources[0].num_over_cap == 40 + 25 - 16 and plan.sources[0].num_by_type == Counter(capped.values())
    assert types_of(plan_of(made, talk(made, max_documents=8))) == capped, "the same each time"
    other = types_of(plan_of(made, talk(made, max_documents=8), seed=8))
    assert other != capped and Counter(other.values()) == Counter(capped.values()), "another seed draws others"
    assert {key for key in capped if capped[key] in ("yesno", "several")} == {
        key for key in whole if whole[key] in ("yesno", "several")
    }
    drawn = {plan.describe(item)["key"] for step in islice(plan.steps(), 30) for s in step.sequences for item in s}
    assert drawn == set(capped), "no other document is ever drawn"


def test_a_cap_counts_what_can_be_drawn(made):
    """Documents that a filter, a sequence's length or a holdout leaves out take no place of others."""
    plan = plan_of(made, talk(made, max_documents=8, filter='task != "yesno"', heldout_tasks=["several"]))
    assert Counter(types_of(plan).values()) == {"count": 8, "compare": 8}
    answer = {"role": "assistant", "content": "b"}
    rows = [
        {"id": f"l{n}", "task": "a", "messages": [{"role": "user", "content": "red " * (200 if n % 2 else 1)}, answer]}
        for n in range(20)
    ]
    commands.build(as_lines(made / "long.jsonl", *rows), made / "long")
    commands.index(made / "long", made / "tok")
    source = plan_of(made, {**talk(made, max_documents=9), "shards": str(made / "long" / "*.tar")}).sources[0]
    assert source.num_items == 9 and source.num_over_cap == 1 and source.num_too_long == 10


def test_a_capped_document_is_kept_as_each_task_it_is_written_as(made):
    source = plan_of(made, kind(made, "audio", max_documents=5, task_column="speaker")).sources[0]
    kept = Counter((source.item(n).task, source.indices[source.item(n).shard].columns["speaker"][source.item(n).row])
                   for n in range(source.num_items))  # fmt: skip
    assert kept == {(task, who): 5 for task in ("transcribe", "speak") for who in ("ann", "bob")}


def test_held_out_task_types_are_never_drawn(made, caplog):
    caplog.set_level("INFO")
    plan = plan_of(made, talk(made, heldout_tasks=["count", "several"]))
    assert set(types_of(plan).values()) == {"compare", "yesno"}
    assert plan.sources[0].num_held_out == {"count": 40, "several": 3}
    assert "held out 40 documents of the task type count" in caplog.text
    for wrong, message in (
        ({"heldout_tasks": ["cuont"]}, r"names 'cuont', which no document .* has in 'task'; there are compare, count"),
        ({"heldout_tasks": ["a"], "task_column": "kind"}, "no document says its task type in 'kind'"),
        ({"max_documents": 3, "task_column": "kind"}, "set task_column to one of"),
        ({"max_documents": 0}, "max_documents is 0"),
        ({"heldout_tasks": []}, "heldout_tasks is empty"),
        ({"task_column": "task"}, "give one of them"),
        ({"heldout_tasks": list(COUNTS)}, "no documents are left .*74 held out"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_of(made, talk(made, **wrong))


def test_stats_tell_of_task_types(made, tmp_path):
    source = talk(made, heldout_tasks=["several"], max_documents=8)
    recipe = recipe_to_dict(plan_of(made, source).recipe)
    told = commands.stats(put(tmp_path / "r.yaml", json.dumps(recipe)), 3, 2)
    assert told["task_types"]["talk"] == {
        "drawn_from": {"count": 8, "compare": 8, "yesno": 6}, "held_out": {"several": 3},
    }  # fmt: skip
    from mmllm.data.looking.tables import stats_lines

    lines = list(stats_lines(told))
    assert "task types drawn from, talk: compare 8, count 8, yesno 6" in lines
    assert any("49 over max documents, 3 held out" in line for line in lines)


def test_task_types_are_split_off_whole(tmp_path):
    path = as_lines(tmp_path / "t.jsonl", *talks())
    told = split([path], tmp_path / "out", num_val=0, hold_tasks=["yesno", "several"])
    assert told["held_tasks"] == {"yesno": 6, "several": 3}
    read = {name: [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
            for name in ("train-interleaved", "test")}  # fmt: skip
    assert {row["task"] for row in read["test"]} == {"yesno", "several"} and len(read["test"]) == 9
    assert Counter(row["task"] for row in read["train-interleaved"]) == {"count": 40, "compare": 25}
    both = split([path], tmp_path / "both", num_val=0, holdout="0.2", hold_tasks=["yesno"])
    assert both["test"]["interleaved"] > 6 and both["held_tasks"] == {"yesno": 6}
    pictures(tmp_path, 20)
    shown = [{**row, "images": [f"{number % 20}.png"]} for number, row in enumerate(talks())]
    path = as_lines(tmp_path / "shown.jsonl", *shown)
    few = as_lines(tmp_path / "few.jsonl", *({**row, "images": [f"{n % 2}.png"]} for n, row in enumerate(talks())))
    with pytest.raises(ManifestError, match=r"with --hold_tasks also --holdout 0\.1"):
        split([few], tmp_path / "no", num_val=0, hold_tasks=["compare", "yesno"])
    told = split([path], tmp_path / "some", num_val=0, holdout="0.3", hold_tasks=["compare", "yesno"])
    train, test = (
        [json.loads(line) for line in (tmp_path / "some" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train-interleaved", "test")
    )
    assert {row["task"] for row in train} == {"count", "several"} and {"compare", "count"} <= {r["task"] for r in test}
    seen = [{segment["image"] for row in rows for segment in row["segments"] if "image" in segment}
            for rows in (train, test)]  # fmt: skip
    assert seen[0].isdisjoint(seen[1])
    lost = told["left_out"]["rows of held task types that show what is trained on"]
    assert len(train) + len(test) + lost == len(shown) and lost > 0 == told["repeated"]
    with pytest.raises(ManifestError, match=r"hold_tasks names 'yes', which no row has in 'task'; there are compare"):
        split([path], tmp_path / "no", hold_tasks=["yes"])
    with pytest.raises(ManifestError, match="leaves no row to train on"):
        split([path], tmp_path / "no", hold_tasks=list(COUNTS))


# --------------------------------------------------------------------------------------------------------- anchors
def test_an_anchor_stands_before_every_document_and_is_not_trained_on(made):
    folder = TokenizerFolder.load(made / "tok")
    names = ("caption", "interleaved", "text", "audio")
    anchored = [kind(made, name, anchor_prompt=ANCHOR) for name in names] + [talk(made, anchor_prompt=ANCHOR)]
    plan = plan_of(made, *anchored, on_error={"action": "raise"})
    plain = plan_of(made, *(kind(made, name) for name in names), talk(made), sequence_length=4096)
    dataset = StepDataset(plan, folder, ImageTransform(folder.image_size))
    wanted, tasks = folder.text.encode(ANCHOR), set()
    for source, other in zip(plan.sources, plain.sources, strict=True):
        lengths = {}
        for item in map(other.item, range(other.num_items)):
            lengths[item.shard, item.row, item.task] = item.num_tokens
        for item in map(source.item, range(source.num_items)):
            document = dataset.document(item, [])
            assert isinstance(document, Document) and document.num_tokens == item.num_tokens
            if item.part > 0:
                continue
            tasks.add(item.task)
            first = document.token_ids_T[: len(wanted)]
            assert first.tolist() == wanted or folder.text.decode(document.token_ids_T.tolist()).startswith(ANCHOR)
            assert not document.targets_T[: len(wanted)].any()
            if item.task != "chat" and item.part < 0:
                assert item.num_tokens == lengths[item.shard, item.row, item.task] + len(wanted)
    assert tasks == {"caption", "interleaved", "text", "transcribe", "speak", "chat"}
    assert plan.hash != plan_of(made, *({**each, "anchor_prompt": "red"} for each in anchored)).hash


def test_an_anchor_of_conversations_is_the_systems_turn(made):
    folder = TokenizerFolder.load(made / "tok")
    plan = plan_of(made, talk(made, anchor_prompt=ANCHOR))
    dataset = StepDataset(plan, folder, ImageTransform(folder.image_size))
    for item in map(plan.sources[0].item, range(plan.sources[0].num_items)):
        document, sample = dataset.document(item, []), dataset._read(item)
        assert isinstance(document, Document)
        said = [segment.text for segment in sample.segments if segment.text]
        text = folder.text.decode(document.token_ids_T.tolist())
        assert text == "\n".join([ANCHOR, *said[:-1]]) + said[-1]
    ours = TokenizerFolder(folder.text, None, TokenizerConfig(), folder.templates, CHATML)
    sample = next(sample for sample in map(dataset._read, map(plan.sources[0].item, range(9)))
                  if sample.segments[0].role == "system")  # fmt: skip
    document = build_document(sample, "chat", ours, anchor=ANCHOR)
    # of a folder with a chat template: the same message, as the template writes it (a folder without its tokens)
    text = folder.text.decode(document.token_ids_T.tolist())
    assert text.startswith(f"<|im_start|>system\n{ANCHOR}\nbe brief<|im_end|>")
    assert document.num_tokens != document_length("chat", ours, said=[s.said for s in sample.segments])


def test_an_empty_anchor_is_refused(made):
    with pytest.raises(ValueError, match="anchor_prompt is empty"):
        plan_of(made, talk(made, anchor_prompt=" "))


# ------------------------------------------------------------------------------------------------------------ TELL
def tell_plan(root, ratio=3.0, task=None, batch_size=2, **changes):
    sources = [talk(root, **(task or {})), kind(root, "text"), kind(root, "caption", weight=2.0)]
    told = {"tell": {"task": "talk", "ratio": ratio}, "mixture": {"unit": "samples"}}
    return plan_of(root, *sources, batch_size=batch_size, **{**told, **changes})


def drawn_order(plan, count):
    """Sources in the order in which documents are drawn, window after window."""
    cursors, window, order = plan.initial_state()["cursors"], 0, []
    while len(order) < count:
        found = plan._window(cursors, 0, window)
        order += found.sources.tolist()
        cursors, window = found.after, window + 1
    return order[:count]


@pytest.mark.parametrize("ratio", [0.5, 1.0, 4.0, 16.0])
def test_each_document_of_the_task_comes_with_so_many_general_ones(made, ratio):
    order = drawn_order(tell_plan(made, ratio), 1600)
    share = order.count(0) / len(order)
    assert share == pytest.approx(1 / (1 + ratio), rel=0.03)
    assert order.count(2) / order.count(1) == pytest.approx(2.0, rel=0.05), "the general ones by their weights"
    places = [place for place, source in enumerate(order) if source == 0]
    for number, place in enumerate(places):  # its turn is one stretch of 1 + ratio documents, its place in that random
        assert abs(place - (number + 0.5) * (1 + ratio)) < 1 + ratio + 2
    if ratio >= 4:
        gaps = Counter(after - before for before, after in pairwise(places))
        assert len(gaps) > ratio, "not at every so manieth place"
        assert max(gaps.values()) < 0.5 * gaps.total()


def test_no_stretch_of_training_holds_the_task_alone(made):
    plan = tell_plan(made, 4.0, batch_size=4)
    runs, run = [], 0
    for step in islice(plan.steps(), 80):
        sources = [item.source for sequence in step.sequences for item in sequence]
        assert 0 < sources.count(0) < len(sources) and sources.count(0) / len(sources) < 0.5
        for source in sources:
            run = run + 1 if source == 0 else 0
            runs.append(run)
    assert max(runs) <= 6  # at random, 1 in 5: some 1,600 documents hold a run of 4 or 5


def test_the_shuffle_is_a_function_of_recipe_seed_and_step(made):
    first = [step.sequences for step in islice(tell_plan(made).steps(), 12)]
    assert first == [step.sequences for step in islice(tell_plan(made).steps(), 12)]
    plan = tell_plan(made)
    states = [plan.initial_state(), *(step.state for step in islice(plan.steps(), 11))]
    for number, state in enumerate(states):
        again = json.loads(json.dumps(state))
        plan.check_state(again)
        assert next(iter(plan.steps(again))).sequences == first[number]
        assert plan.at(number).sequences == first[number]
    assert first != [step.sequences for step in islice(tell_plan(made, seed=8).steps(), 12)]


def test_a_run_ends_where_the_task_is_used_up(made):
    plan = tell_plan(made, 2.0, {"max_epochs": 2})
    sources = Counter(item.source for step in plan.steps() for sequence in step.sequences for item in sequence)
    assert sources[0] == 2 * 74 and (sources[1] + sources[2]) / sources[0] == pytest.approx(2.0, abs=0.1)


def test_stats_tell_the_ratio(made, tmp_path):
    path = put(tmp_path / "r.yaml", json.dumps(recipe_to_dict(tell_plan(made, 4.0).recipe)))
    told = commands.stats(path, 60, 4)
    assert told["tell"]["ratio"] == pytest.approx(4.0, rel=0.1) and told["tell"]["wanted_ratio"] == 4.0
    assert sum(told["wanted_share"].values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tell": {"task": "tlak", "ratio": 1.0}}, "tell names 'tlak', which is no source"),
        ({"tell": {"task": "talk", "ratio": 1.0, "general": ["text"]}}, "must be all sources of the recipe"),
        ({"tell": {"task": "talk", "ratio": 1.0, "general": ["talk", "text"]}}, "must be all sources of the recipe"),
        ({"tell": {"task": "talk", "ratio": 0.0}}, "tell.ratio is 0.0"),
        ({"mixture": {"unit": "tokens"}}, "set mixture.unit to samples"),
        ({"mixture": {"unit": "samples", "on_exhausted": "renormalize"}}, "set it to stop or repeat"),
    ],
)
def test_a_mixture_that_cannot_be_kept_is_refused(made, changes, message):
    with pytest.raises(ValueError, match=message):
        tell_plan(made, **changes)
    with pytest.raises(ValueError, match="has a weight or a weight_schedule"):
        tell_plan(made, 1.0, {"weight": 2.0})


def test_steps_of_one_task_at_a_time_are_no_mixture(made):
    recipe, folder = tell_plan(made).recipe, TokenizerFolder.load(made / "tok")
    with pytest.raises(ValueError, match=r"tell, which mixes .* and data\.init_args\.tasks has steps of one task"):
        open_task_plan(recipe, 2, folder, TaskConfig(1))
    with pytest.raises(ValueError, match=r"tell, which mixes .* and data\.init_args\.tasks has steps of one task"):
        split_sources(recipe, folder, "task")


@pytest.mark.parametrize("values", [(1, 2), (True, False), ("it's", 'so "q"'), (0.5, 0.25)])
def test_a_column_of_any_type_tells_tasks(tmp_path, values):
    talk_of = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "a star"}]
    rows = [{"id": f"r{number}", "messages": talk_of, "level": values[number % 2]} for number in range(6)]
    folder = make_folder(tmp_path / "tok")
    commands.build(as_lines(tmp_path / "talks.jsonl", *rows), tmp_path / "talks")
    commands.index(tmp_path / "talks", tmp_path / "tok")
    told = {"tokenizer": str(tmp_path / "tok"), "sequence_length": 128, "sources": [talk(tmp_path)]}
    recipe = split_sources(recipe_from_dict(told), folder, "level")
    assert [source.name for source in recipe.sources] == [f"talk:{value}" for value in sorted(map(str, values))]
    plan = open_task_plan(recipe, 2, folder, TaskConfig(1))
    assert [source.num_items for source in plan.sources] == [3, 3]


def test_hashes_of_older_recipes_stay_and_the_new_keys_are_in_them(made):
    told = {
        "tokenizer": "tok", "sequence_length": 128, "seed": 7, "curriculum": {"steps": 10, "sources": ["b"]},
        "mixture": {"unit": "samples"},
        "sources": [
            {"name": "a", "kind": "interleaved", "shards": "x.tar", "max_images": 3},
            {"name": "b", "kind": "audio", "shards": ["y.tar"], "weight": 0.5,
             "templates": {"speak": {"prompt": "{text}", "target": "{units}"}}},
        ],
    }  # fmt: skip
    old = "98f03647a2b412d2b077b09f7b6a68310eeb393833fc328e8720e28a5b0b1c01"
    assert recipe_hash(recipe_from_dict(told), [["s1"], ["s2", "s3"]], "t") == old, "as before there was any of this"
    hashes = {tell_plan(made, ratio).hash for ratio in (1.0, 2.0)} | {plan_of(made, talk(made)).hash}
    more = ({"max_documents": 8}, {"max_documents": 9}, {"heldout_tasks": ["count"]}, {"anchor_prompt": ANCHOR})
    hashes |= {plan_of(made, talk(made, **each)).hash for each in more}
    assert len(hashes) == 7
    renamed = recipe_to_dict(tell_plan(made, 2.0).recipe)
    renamed["sources"][0]["name"], renamed["tell"]["task"] = "other", "other"
    assert open_plan(recipe_from_dict(renamed), 2).hash == tell_plan(made, 2.0).hash, "names are no part of it"
