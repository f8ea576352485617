"""What is drawn when: shares, schedules, curricula, blocks, templates, conversations."""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest

from mmllm.batch import IGNORE
from mmllm.data import commands
from mmllm.data.loading.loader import StepDataset
from mmllm.data.plan import source
from mmllm.data.plan.plan import Plan, open_plan
from mmllm.data.plan.recipe import CurriculumConfig, SourceConfig, recipe_from_dict
from mmllm.data.samples.decode import ImageTransform
from mmllm.data.samples.document import Document
from mmllm.data.samples.documents import build_document
from mmllm.data.samples.templates import template_tokens
from mmllm_tokenizers.folder import TokenizerFolder
from tests.data_fixtures import make_folder, mixed_manifest, recipe_dict, words, write_manifest, write_picture


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tokenizer, and indexed shards of all kinds, several of each."""
    root = tmp_path_factory.mktemp("mixture")
    make_folder(root / "tok")
    commands.build(mixed_manifest(root / "m", num=40), root / "s", root / "tok", samples_per_shard=9)
    commands.index(root / "s", root / "tok")
    return root


def one(root, kind: str, **changes) -> dict:
    return {"name": kind, "kind": kind, "shards": str(root / "s" / f"{kind}-*.tar"), **changes}


def plan_of(root, batch_size: int = 4, **changes) -> Plan:
    return open_plan(recipe_from_dict(recipe_dict(root / "s", root / "tok", **changes)), batch_size)


def slow_draw(plan: Plan, cursors: list, step: int) -> tuple[list[tuple[int, int]], bool]:
    """One document after the other, always from the source whose clock is lowest; at rest, where none else has any."""
    drawn = slowly_drawn(plan, cursors, step, plan.recipe.shares(step))
    if not drawn[0] and plan.recipe.mixture.on_exhausted == "renormalize":
        sources = plan.recipe.sources
        largest = [max(point[1] for point in s.weight_schedule) if s.weight_schedule else s.weight for s in sources]
        shares = [
            weight if not source.weight_at(step) else 0.0 for source, weight in zip(sources, largest, strict=True)
        ]
        return slowly_drawn(plan, cursors, step, [share / (sum(shares) or 1) for share in shares])
    return drawn


def slowly_drawn(plan: Plan, cursors: list, step: int, shares: list[float]) -> tuple[list[tuple[int, int]], bool]:
    mixture, curriculum = plan.recipe.mixture, plan.recipe.curriculum
    all_names = [source.name for source in plan.recipe.sources]
    clocks = [clock for _, clock in cursors]
    costs = [0] * len(cursors)
    left: list[list[int]] = []
    for number, item in enumerate(plan.sources):
        is_ordered = curriculum is not None and plan.recipe.sources[number].name in (curriculum.sources or all_names)
        share = curriculum.share(step) if curriculum and is_ordered else 1.0
        most = int(np.ceil(share * item.num_items)) if share < 1 else None
        limit = None if mixture.on_exhausted == "repeat" else item.limit
        if not shares[number]:
            left.append([])
            continue
        left.append(item.upcoming(int(cursors[number][0]), 5000, most, limit).items.tolist())
    ends = [mixture.on_exhausted != "repeat" and item.limit is not None for item in plan.sources]
    drawn: list[tuple[int, int]] = []
    while len(drawn) < plan.recipe.packing.window:
        stopped = [n for n in range(len(left)) if ends[n] and not left[n] and shares[n]]
        if mixture.on_exhausted == "stop" and stopped:
            return drawn, True
        open_ = [n for n in range(len(left)) if left[n]]
        if not open_:
            return drawn, True
        number = min(open_, key=lambda n: clocks[n] + costs[n] / shares[n])
        item = left[number].pop(0)
        drawn.append((number, item))
        tokens = int(plan.sources[number].tokens_M[item])
        costs[number] += tokens if mixture.unit == "tokens" else 1
    return drawn, False


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixture": {"unit": "samples", "temperature": 3.0}},
        {"mixture": {"on_exhausted": "renormalize"}, "caps": [1, 2, None, 0.5]},
        {"mixture": {"on_exhausted": "stop"}, "caps": [2, None, None, None]},
        {"mixture": {"on_exhausted": "repeat"}, "caps": [1, 1, 1, 1]},
        {"curriculum": {"start": 0.2, "steps": 30}},
        {"curriculum": {"start": 0.1, "steps": 300, "sources": ["text", "audio"]}},
        {"weights": [[[0, 1.0], [10, 0.0]], [[0, 0.0], [5, 0.0], [6, 2.0]], None, None]},
        {
            "mixture": {"on_exhausted": "renormalize"},
            "caps": [2, 2, 0.5, 0.5],
            "weights": [[[0, 1.0], [4, 0.0]], [[0, 0.0], [500, 0.0], [501, 2.0]], None, None],
        },
    ],
)
def test_drawing_is_the_slow_one(made, changes):
    recipe = recipe_dict(made / "s", made / "tok", packing={"window": 50})
    recipe |= {key: value for key, value in changes.items() if key not in ("caps", "weights")}
    for number, cap in enumerate(changes.get("caps", [])):
        recipe["sources"][number]["max_epochs"] = cap
    for number, points in enumerate(changes.get("weights", [])):
        recipe["sources"][number]["weight_schedule"] = points
    plan = open_plan(recipe_from_dict(recipe), 2)
    cursors, first = plan.initial_state()["cursors"], 0
    num_windows = 0
    for window in range(25):
        step = first // 2
        wanted, _ = slow_draw(plan, cursors, step)
        found = plan._draw(cursors, step)
        assert list(zip(found.sources.tolist(), found.items.tolist(), strict=True)) == wanted
        packed = plan._window(cursors, step, window)
        if packed is None:
            assert not wanted
            break
        cursors, first, num_windows = packed.after, first + len(packed.bins), num_windows + 1
    assert num_windows >= 2


def shares_of(plan: Plan, start: int, stop: int) -> dict[str, float]:
    tokens = dict.fromkeys((item.config.name for item in plan.sources), 0)
    for step in islice(plan.steps(), start, stop):
        for sequence in step.sequences:
            for item in sequence:
                tokens[plan.sources[item.source].config.name] += item.num_tokens
    return {name: count / sum(tokens.values()) for name, count in tokens.items()}


def test_shares_after_a_thousand_sequences(made):
    plan = plan_of(made)
    found = shares_of(plan, 0, 250)
    for item, share in zip(plan.sources, plan.recipe.shares(), strict=True):
        assert abs(found[item.config.name] - share) < 0.003


def test_weights_follow_their_schedule(made):
    schedule = [[0, 0.0], [40, 0.0], [40, 0.5], [80, 1.0]]
    sources = [one(made, "caption", weight=0.5), one(made, "text", weight_schedule=schedule)]
    plan = plan_of(made, sources=sources, packing={"window": 16})
    assert [plan.recipe.sources[1].weight_at(step) for step in (0, 39, 40, 60, 80, 500)] == [0, 0, 0.5, 0.75, 1, 1]
    assert shares_of(plan, 0, 38)["text"] == 0
    assert shares_of(plan, 50, 70)["text"] == pytest.approx(0.6, abs=0.03)  # what it missed is not made up for
    assert shares_of(plan, 100, 200)["text"] == pytest.approx(2 / 3, abs=0.02)
    for wrong in ([], [[0, -1]], [[5, 1], [0, 1]], [[0, 0]], [[0, 1, 2]]):
        with pytest.raises(ValueError, match="weight_schedule"):
            SourceConfig("a", "text", "x", weight_schedule=wrong)


@pytest.mark.parametrize(
    "schedule",
    [[[0, 0.0], [1000, 0.0], [1001, 1.0]], [[0, 1.0], [3, 0.0]], [[0, 0.0], [2, 0.0], [3, 1.0], [4, 0.0]]],
)
def test_sources_at_rest_are_drawn_to_their_end_when_no_other_has_rows(made, schedule):
    """They rest for long, for ever from some step on, or but for a few steps."""
    sources = [one(made, "caption", max_epochs=1), one(made, "text", max_epochs=2, weight_schedule=schedule)]
    plan = plan_of(made, sources=sources, mixture={"on_exhausted": "renormalize"}, packing={"window": 16})
    steps = list(plan.steps())
    drawn = [item for step in steps for sequence in step.sequences for item in sequence]
    counts = [np.bincount([item.shard * 100 + item.row for item in drawn if item.source == n]) for n in (0, 1)]
    assert [set(count[count > 0].tolist()) for count in counts] == [{1}, {2}]
    assert [(count > 0).sum() for count in counts] == [source.num_items for source in plan.sources]
    if schedule[1][0] == 1000:
        assert {item.source for sequence in steps[0].sequences for item in sequence} == {0}
    for step in steps[:: max(1, len(steps) // 7)]:
        assert list(plan.steps(step.state)) == steps[step.step + 1 :]
    stopped = list(plan_of(made, sources=sources, packing={"window": 16}).steps())
    assert len(stopped) < len(steps)


@pytest.mark.parametrize("order", ["easy_first", "hard_first", "random"])
def test_curriculum_orders(made, order):
    config = {"start": 0.25, "steps": 1000, "pacing": "step", "order": order}
    plan = plan_of(made, sources=[one(made, "text")], curriculum=config)
    tokens = np.sort(plan.sources[0].tokens_M)
    drawn = {
        item.row + 100 * item.shard: item.num_tokens
        for step in islice(plan.steps(), 20)
        for sequence in step.sequences
        for item in sequence
    }
    assert len(drawn) == 10
    wanted = {"easy_first": tokens[:10], "hard_first": tokens[-10:]}.get(order)
    assert wanted is None or sorted(drawn.values()) == wanted.tolist()
    assert order != "random" or tokens[:10].sum() < sum(drawn.values()) < tokens[-10:].sum()


@pytest.mark.parametrize(
    "metric", ["length", "rarity", "mean_rarity", "image_area", "seconds", "num_frames", "missing"]
)
def test_curriculum_metrics(made, metric, caplog):
    kind = {"image_area": "caption", "rarity": "text", "mean_rarity": "text", "length": "text"}.get(metric, "audio")
    if metric == "missing":  # one source has it, the other is named
        sources = [one(made, "text"), one(made, "audio")]
        item = plan_of(made, sources=sources, curriculum={"metric": "duration"}).sources[0]
        assert "source text: no document has 'duration'" in caplog.text
    else:
        item = plan_of(made, sources=[one(made, kind)], curriculum={"metric": metric}).sources[0]
        assert "no document has" not in caplog.text
    assert item.rank_M is not None and sorted(item.rank_M) == list(range(item.num_items))
    index = item.indices[0]
    rows = [(item.rank_M[number], item.item(number).row) for number in range(item.num_items)]
    by_rank = [row for _, row in sorted(rows) if item.item(0).shard == 0]
    assert by_rank
    if metric == "seconds":
        mine = [n for n in range(item.num_items) if item.item(n).shard == 0]
        ordered = sorted(mine, key=lambda n: item.rank_M[n])
        seconds = [index.columns["duration"][item.item(n).row] for n in ordered]
        assert seconds == sorted(seconds)


def test_keys_and_metrics_that_no_document_has_are_refused(made):
    for text in ("not pertrubed", "num_frames >= 1 and lengh > 3"):
        with pytest.raises(
            ValueError, match=r"source 'audio': filter .* reads '(pertrubed|lengh)'.*known are.*speaker"
        ):
            plan_of(made, sources=[one(made, "audio", filter=text)])
    assert plan_of(made, sources=[one(made, "audio", filter="not perturbed")]).sources[0].num_filtered == 0
    for metric in ("lenght", "speaker"):  # a speaker is no number
        with pytest.raises(ValueError, match=f"curriculum.metric is '{metric}'.*known are.*duration.*rarity"):
            plan_of(made, sources=[one(made, "audio")], curriculum={"metric": metric})


def test_a_curriculum_of_some_sources_leaves_the_others_whole(made):
    sources = [one(made, "text"), one(made, "audio")]
    config = {"start": 0.1, "steps": 1000, "pacing": "step", "sources": ["audio"]}
    plan = plan_of(made, sources=sources, curriculum=config)
    text, audio = plan.sources
    assert text.rank_M is None and audio.rank_M is not None
    seen: dict[int, set[int]] = {0: set(), 1: set()}
    for step in islice(plan.steps(), 100):
        for sequence in step.sequences:
            for item in sequence:
                seen[item.source].add(item.num_tokens)
    assert max(seen[0]) == text.tokens_M.max()
    assert max(seen[1]) == np.sort(audio.tokens_M)[int(np.ceil(0.1 * len(audio.tokens_M))) - 1] < audio.tokens_M.max()


def test_a_cap_on_a_source_that_the_curriculum_leaves_alone(made):
    sources = [one(made, "caption", max_epochs=1), one(made, "text")]
    plan_of(made, sources=sources, curriculum={"start": 0.3, "sources": ["text"]})
    with pytest.raises(ValueError, match="source 'caption' has max_epochs and the recipe a curriculum"):
        plan_of(made, sources=sources, curriculum={"start": 0.3, "sources": ["caption"]})


def test_the_hash_knows_which_sources_a_curriculum_orders_by_their_places(made):
    def hashed(names: list[str], ordered: list[str] | None) -> str:
        sources = [one(made, kind, name=name) for kind, name in zip(("text", "audio"), names, strict=True)]
        curriculum = {"start": 0.3} if ordered is None else {"start": 0.3, "sources": ordered}
        return plan_of(made, sources=sources, curriculum=curriculum).hash

    assert hashed(["a", "b"], ["a"]) == hashed(["c", "d"], ["c"]) != hashed(["a", "b"], ["b"])
    assert len({hashed(["a", "b"], None), hashed(["a", "b"], ["a"]), hashed(["a", "b"], ["b"])}) == 3


def test_a_curriculum_and_a_cap_are_refused_together(made):
    """What is held back would count as drawn: a cap of one epoch would end before all documents were seen."""
    sources, curriculum = [one(made, "caption", max_epochs=1)], {"start": 0.3}
    with pytest.raises(ValueError, match=r"source 'caption' has max_epochs and the recipe a curriculum.*leave out one"):
        plan_of(made, sources=sources, curriculum=curriculum)
    plan_of(made, sources=sources, curriculum=curriculum, mixture={"on_exhausted": "repeat"})
    plan_of(made, sources=sources, curriculum={"start": 1.0})


def test_exponential_pacing():
    config = CurriculumConfig(pacing="exponential", start=0.1, steps=100)
    assert [config.share(step) for step in (0, 50, 100)] == pytest.approx([0.1, np.sqrt(0.1), 1.0])


def test_large_sources_are_shuffled_by_blocks_of_shards(made, monkeypatch):
    monkeypatch.setattr(source, "BLOCK_ITEMS", 20)
    plan = plan_of(made, sources=[one(made, "audio", max_epochs=2), one(made, "text", task_weights=[2.0])])
    item = plan.sources[0]
    assert item.num_items == 80 and len(item._block_groups(0)[0]) == 4  # 18 items a shard
    whole = item.upcoming(0, 1000, None, item.limit)
    assert whole.is_all and sorted(whole.items) == sorted([*range(80), *range(80)])
    assert sorted(whole.items[:80]) == list(range(80)) and whole.after.tolist() == list(range(1, 161))
    first = {item.item(int(number)).shard for number in whole.items[: item._block_groups(0)[0][1]]}
    assert len(first) == 2  # two shards at a time
    assert whole.items[:80].tolist() != whole.items[80:].tolist()
    for position in (0, 1, 17, 36, 79, 80, 110, 159, 160):
        part = item.upcoming(position, 5, None, item.limit)
        assert part.items.tolist() == whole.items[position : position + len(part.items)].tolist()
        assert len(part.items) > 5 or part.is_all
    other = open_plan(plan.recipe, 4)
    again = other.sources[0].upcoming(90, 3, None, None)
    assert again.items[:3].tolist() == whole.items[90:93].tolist()


def test_every_state_is_found_without_naming_documents(made):
    plan = plan_of(made, curriculum={"start": 0.3, "steps": 20})
    steps = list(islice(plan.steps(), 40))
    for number in (0, 1, 5, 17, 39):
        state = plan.state_before(number)
        assert next(plan.steps(state)) == steps[number] == plan.at(number)
    capped = plan_of(made, sources=[one(made, "text", max_epochs=1)])
    last = list(capped.steps())[-1]
    assert capped.at(last.step) == last
    for step in (last.step + 1, last.step + 50):
        with pytest.raises(ValueError, match=f"last for {last.step + 1} steps"):
            capped.at(step)


def test_a_state_of_thirty_sources_is_small(made):
    sources = [one(made, "text", weight=0.1 * n + 0.1) | {"name": f"t{n}"} for n in range(30)]
    plan = plan_of(made, sources=sources)
    states = [step.state for step in islice(plan.steps(), 60)]
    assert max(len(json.dumps(state)) for state in states) <= 1024


def test_budgets_of_a_sequence(made):
    whole = plan_of(made)
    assert max(_images(whole, sequence) for step in islice(whole.steps(), 40) for sequence in step.sequences) > 3
    plan = plan_of(made, packing={"window": 32, "max_images": 3, "max_frames": 60})
    for step in islice(plan.steps(), 40):
        for sequence in step.sequences:
            assert _images(plan, sequence) <= 3
            indices = [plan.sources[item.source].indices[item.shard] for item in sequence]
            assert sum(i.num_frames_N[item.row] for i, item in zip(indices, sequence, strict=True)) <= 60
    with pytest.raises(ValueError, match="over the packing's budgets"):
        plan_of(made, sources=[one(made, "caption")], packing={"max_images": 0})


def _images(plan: Plan, sequence) -> int:
    return sum(int(plan.sources[item.source].indices[item.shard].num_images_N[item.row]) for item in sequence)


def test_filters_read_what_was_measured(made):
    plan = plan_of(made, sources=[one(made, "text", filter="num_tokens < 40")])
    assert plan.sources[0].tokens_M.max() < 40 and plan.sources[0].num_filtered > 0
    plan = plan_of(made, sources=[one(made, "audio", filter="num_frames >= 20 and speaker == 'bob'")])
    assert 0 < plan.sources[0].num_items < 80


def test_templates_of_a_source(made):
    folder = TokenizerFolder.load(made / "tok")
    own = {"prompt": "{image}<|caption|>red and green: ", "target": "{text} too<|end|>"}
    sources = [one(made, "caption", templates={"caption": own}), one(made, "text")]
    plan, plain = plan_of(made, sources=sources), plan_of(made, sources=[one(made, "caption"), one(made, "text")])
    more = template_tokens("caption", own, folder)
    assert more > 4 and (plan.sources[0].tokens_M == plain.sources[0].tokens_M + more).all()
    assert plan.hash != plain.hash
    dataset = StepDataset(plan, folder, ImageTransform(folder.image_size))
    texts = []
    for step in islice(plan.steps(), 4):
        batch = dataset[step]
        assert "errors" not in batch.state
        texts.append(folder.text.decode(batch.token_ids_BT.reshape(-1).tolist()))
    assert "red and green: " in texts[0] and " too" in texts[0]
    for wrong, message in (
        ({"caption": {"prompt": "{image}", "target": "<|end|>"}}, "must have"),
        ({"caption": {"prompt": "{image}"}}, "prompt and target"),
        ({"speak": own}, "templates.speak"),
        (
            {"caption": {**own, "prompt": "{image}{"}},
            r"source 'caption': templates\.caption\.prompt is '\{image\}\{': ",
        ),
        ({"caption": {**own, "target": "{}"}}, r"templates\.caption\.target is '\{\}': a field is without a name"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_of(made, sources=[one(made, "caption", templates=wrong)])


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    root = tmp_path_factory.mktemp("chats")
    make_folder(root / "tok")
    rng = np.random.default_rng(0)
    (root / "m").mkdir()
    write_picture(root / "m" / "a.png", rng)
    rows = []
    for number in range(12):
        segments: list[dict] = []
        for turn in range(number % 3 + 1):
            if turn == 0:
                segments.append({"image": "a.png", "role": "user"})
            segments += [{"text": words(rng), "role": "user"}, {"text": words(rng), "role": "assistant"}]
        rows.append({"id": f"chat{number}", "segments": segments})
    rows.append({"id": "plain", "segments": [{"text": "red"}, {"image": "a.png"}]})
    commands.build(write_manifest(root / "m", rows), root / "s", root / "tok")
    commands.index(root / "s", root / "tok")
    return root


def test_conversations_are_learnt_by_their_answers(chats):
    folder = TokenizerFolder.load(chats / "tok")
    plan = plan_of(chats, sources=[one(chats, "interleaved")], mixture={"on_exhausted": "renormalize"})
    tasks = [plan.sources[0].item(number).task for number in range(plan.sources[0].num_items)]
    assert tasks.count("chat") == 12 and tasks.count("interleaved") == 1
    dataset = StepDataset(plan, folder, ImageTransform(folder.image_size))
    reader = dataset._read
    for number in range(plan.sources[0].num_items):
        item = plan.sources[0].item(number)
        if item.task != "chat":
            continue
        sample = reader(item)
        document = build_document(sample, "chat", folder)
        assert document.num_tokens == item.num_tokens
        said = [segment.text for segment in sample.segments if segment.role == "assistant"]
        target = folder.text.decode(
            [t for t, is_target in zip(document.token_ids_T, document.targets_T, strict=True) if is_target]
        )
        assert target == "".join(text for text in said if text)
        ends = document.token_ids_T == folder.id("<|end|>")
        assert ends.sum() == len(said) and document.targets_T[ends].all()
        asked = [folder.id("<|user|>"), folder.id("<|assistant|>")]
        assert not document.targets_T[np.isin(document.token_ids_T, asked)].any()
    batch = dataset[plan.at(0)]
    assert (batch.labels_BT != IGNORE).any() and "errors" not in batch.state
    assert commands.verify(chats / "s", chats / "tok")["broken"] == 0


def test_conversations_in_a_template_of_their_source(chats):
    """Each turn has more tokens than in the tokenizer's template, so that the index alone doesn't tell how many."""
    folder = TokenizerFolder.load(chats / "tok")
    own = {"prompt": "red one: {segments}<|assistant|>", "target": "two {text}<|end|> blue"}
    sources = [one(chats, "interleaved", templates={"chat": own})]
    plan = plan_of(chats, sources=sources, mixture={"on_exhausted": "renormalize"}, on_error={"action": "raise"})
    plain = plan_of(chats, sources=[one(chats, "interleaved")])
    more = {int(tokens) for tokens in plan.sources[0].tokens_M - plain.sources[0].tokens_M}
    assert len(more) == 4 and min(more) == 0  # one, two or three turns; what is no conversation is as it was
    dataset = StepDataset(plan, folder, ImageTransform(folder.image_size))
    turns = set()
    for number in range(plan.sources[0].num_items):
        document = dataset.document(plan.sources[0].item(number), [])
        assert isinstance(document, Document)
        if plan.sources[0].item(number).task == "chat":
            text = folder.text.decode(document.token_ids_T.tolist())
            turns.add(text.count("red one: "))
            assert text.startswith("red one: ") and text.count("two ") >= text.count("red one: ")
            assert document.targets_T[document.token_ids_T == folder.id("<|end|>")].all()
    assert turns == {1, 2, 3}
    with pytest.raises(ValueError, match=r"templates\.chat is .*its prompt must have \{segments\}"):
        plan_of(chats, sources=[one(chats, "interleaved", templates={"chat": {**own, "prompt": "red"}})])
