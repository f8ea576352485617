"""Masked spans: drawn as a slow version would, the document can be put together again, and plans know their lengths."""

from __future__ import annotations

import json
import pickle
import re
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mmllm.batch import IGNORE, PackedBatch
from mmllm.data import commands
from mmllm.data.loading.loader import StepDataset
from mmllm.data.looking.tables import stats_lines
from mmllm.data.plan.plan import Plan, StepPlan, open_plan, span_masking
from mmllm.data.plan.recipe import SourceConfig, recipe_from_dict, recipe_to_dict
from mmllm.data.samples.decode import ImageTransform
from mmllm.data.samples.documents import build_document
from mmllm.data.samples.masked_spans import (
    MASKED,
    MaskedSpansConfig,
    SpanMasking,
    drawn_spans,
    num_masked,
    sentinel_ids,
)
from mmllm.data.samples.schema import Sample
from mmllm.training.planned_prompts import PlannedPrompts
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.vocab import END, SPECIAL_TOKENS
from tests.data_fixtures import make_folder, mixed_manifest, recipe_dict

PAD = ["<|pad|>"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("masked")
    make_folder(root / "tok")
    commands.build(mixed_manifest(root / "m", num=40), root / "s", root / "tok", samples_per_shard=9)
    commands.index(root / "s", root / "tok")
    return root


@pytest.fixture(scope="module")
def folder(made) -> TokenizerFolder:
    return TokenizerFolder.load(made / "tok")


def plan_of(root, kind: str = "text", sequence_length: int = 512, **masked) -> Plan:
    shards, spans = str(root / "s" / f"{kind}-*.tar"), {"sentinels": PAD, **masked}
    source = {"name": kind, "kind": kind, "shards": shards, "masked_spans": spans}
    changes = {"sources": [source], "sequence_length": sequence_length}
    return open_plan(recipe_from_dict(recipe_dict(root / "s", root / "tok", **changes)), 2)


def filled(prompt_ids: Sequence[int], answer_ids: Sequence[int], sentinels: Sequence[int]) -> list[int]:
    """A prompt with the spans of an answer, each behind its sentinel, in their places: the inverse of masking."""
    spans: list[list[int]] = []
    for token in answer_ids:
        if token in sentinels:
            spans.append([])
        elif spans:
            spans[-1].append(token)
    rest = iter(spans)
    return [each for token in prompt_ids for each in (next(rest, []) if token in sentinels else [token])]


def all_spans(num_tokens: int, masked: int, spans: int, first: int = 0) -> list[list[tuple[int, int]]]:
    """Every choice of spans with a token between two of them."""
    if not spans:
        return [[]] if not masked else []
    return [
        [(start, start + length), *rest]
        for start in range(first, num_tokens)
        for length in range(1, min(masked, num_tokens - start) + 1)
        for rest in all_spans(num_tokens, masked - length, spans - 1, start + length + 1)
    ]


@pytest.mark.parametrize(("num_tokens", "masked", "spans"), [(6, 3, 2), (5, 2, 1), (3, 2, 2), (2, 1, 1), (7, 4, 3)])
def test_every_choice_of_spans_is_as_likely(num_tokens: int, masked: int, spans: int):
    possible = all_spans(num_tokens, masked, spans)
    rng = np.random.default_rng(0)
    count = 300 * len(possible)
    drawn = Counter(tuple(drawn_spans(num_tokens, masked, spans, rng)) for _ in range(count))
    assert set(drawn) == {tuple(each) for each in possible}
    assert max(abs(number - 300) for number in drawn.values()) < 5 * 300**0.5


def test_as_many_tokens_are_masked_as_the_rate_says():
    lengths = np.arange(200)
    for rate, mean in ((0.15, 3.0), (0.5, 1.0), (0.9, 8.0), (0.01, 3.0)):
        masked, spans = num_masked(lengths, rate, mean)
        assert (masked[:2] == 0).all() and (spans[:2] == 0).all()
        for length in range(2, 200):
            wanted = min(max(round(length * rate), 1), length - 1)
            assert masked[length] == wanted
            assert spans[length] == min(max(round(wanted / mean), 1), wanted, length - wanted + 1)
        assert (np.diff(lengths + 2 * spans) > 0).all()  # `num_prompt` finds a text by its length


def masked_document(folder: TokenizerFolder, kind: str, seed: int, **changes):
    masking = SpanMasking(MaskedSpansConfig(sentinels=PAD, **changes), kind, folder)
    picture = np.zeros((16, 16, 3), dtype=np.uint8) if kind == "caption" else None
    sample = Sample("a", "a red circle stands above two blue squares, and both are small", picture)
    document = build_document(sample, kind, folder)
    return masking, document, masking.masked(document, np.random.default_rng(seed))


@pytest.mark.parametrize("kind", ["text", "caption"])
@pytest.mark.parametrize(("rate", "mean_length"), [(0.15, 3.0), (0.5, 1.0), (0.6, 2.0)])
def test_spans_and_what_is_left_are_the_document(folder, kind: str, rate: float, mean_length: float):
    for seed in range(5):
        masking, document, got = masked_document(folder, kind, seed, rate=rate, mean_length=mean_length)
        start = int(got.targets_T.argmax())
        assert got.targets_T[start:].all() and not got.targets_T[:start].any()
        answer = got.token_ids_T[start:].tolist()
        assert answer[-1] == folder.id(END) and answer[0] == folder.id(PAD[0])
        whole = filled(got.token_ids_T[:start].tolist(), answer[:-1], [folder.id(PAD[0])])
        assert whole == document.token_ids_T.tolist()
        text = int(document.targets_T.sum()) - 1
        masked, spans = (int(each[0]) for each in num_masked(np.array([text]), rate, mean_length))
        assert len(answer) == masked + spans + 1
        tiles = np.array([len(document.images)])
        assert masking.num_tokens(np.array([document.num_tokens]), tiles).tolist() == [got.num_tokens]
        assert masking.num_prompt(got.num_tokens, len(document.images)) == start
        assert got.images == document.images and (got.codes_TK == -1).all()
        assert len(got.modality_T) == len(got.codes_TK) == got.num_tokens
        assert (got.modality_T[: document.num_tokens // 2] == document.modality_T[: document.num_tokens // 2]).all()


def folder_with(*names: str) -> Any:
    """A folder whose tokenizer is a checkpoint's, with tokens of these names, numbered from 50."""
    tokens = [*SPECIAL_TOKENS, *names]
    ids = {name: number + (36 if number >= 14 else 0) for number, name in enumerate(tokens)}
    foreign = SimpleNamespace(named={"bos_token": "<s>", "pad_token": "<pad>", "mask_token": "<mask>"})
    ends = tuple(ids[name] for name in (END, "</s>") if name in ids)
    text = SimpleNamespace(control_tokens=set(tokens), end_ids=ends, foreign=foreign, id=ids.__getitem__)
    templates = {"text": {"prompt": "<turn>", "target": "{text}"}}
    return SimpleNamespace(text=text, templates=templates, chat_template="{{ '<|user_turn|>' }}", id=text.id)


def test_sentinels_are_found_by_name(folder):
    assert sentinel_ids(folder_with("<extra_id_10>", "<extra_id_9>", "<mask>"), None) == [51, 50]
    assert sentinel_ids(folder_with("<mask>"), None) == [50]
    with pytest.raises(ValueError, match=r"no token that could stand for a masked span; .*masked_spans\.sentinels"):
        sentinel_ids(folder, None)
    for name in ("hello", *(name for name in SPECIAL_TOKENS if name not in PAD)):
        with pytest.raises(ValueError, match=rf"masked_spans\.sentinels names '{re.escape(name)}'.* free are <.pad.>$"):
            sentinel_ids(folder, [name])
    assert sentinel_ids(folder, PAD) == [folder.id(PAD[0])]


def test_tokens_of_a_checkpoint_that_mean_something_are_no_sentinels():
    meant = ("<s>", "</s>", "<turn>", "<|user_turn|>")
    theirs = folder_with(*meant, "<pad>", "<mask>", "<tool>")
    assert sentinel_ids(theirs, ["<tool>", "<pad>", "<mask>", *PAD]) == [56, 54, 55, 0]
    for name in meant:
        with pytest.raises(ValueError, match=rf"names '{re.escape(name)}', .*; free are <mask> <pad> <tool> <.pad.>$"):
            sentinel_ids(theirs, [name])


def batches_of(plan: Plan, folder: TokenizerFolder, steps: list[StepPlan]) -> list[PackedBatch]:
    dataset = pickle.loads(pickle.dumps(StepDataset(plan, folder, ImageTransform(16), cache_bytes=1 << 20)))
    return [dataset[step] for step in steps]


@pytest.mark.parametrize("kind", ["text", "caption"])
def test_each_epoch_draws_each_document_in_one_form(made, folder, kind: str):
    plan = plan_of(made, kind, share=0.5)
    (source,) = plan.sources
    drawn = source.upcoming(0, 10**6, None, 3 * source.num_items)
    epochs = (drawn.after - 1) // source.num_items
    forms = []
    for epoch in range(3):
        items = source.items(drawn.items[epochs == epoch])
        assert len({(item.shard, item.row) for item in items}) == len(items) == source.num_documents
        forms.append({(item.shard, item.row): item.task for item in items})
        share = np.mean([task.startswith(MASKED) for task in forms[-1].values()])
        assert 0.2 < share < 0.8
    assert forms[0] != forms[1] != forms[2]
    again = plan_of(made, kind, share=0.5).sources[0].upcoming(0, 10**6, None, 3 * source.num_items)
    assert np.array_equal(again.items, drawn.items)
    every = plan_of(made, kind, share=1.0).sources[0]
    tasks = Counter(item.task for item in every.items(every.upcoming(0, 10**6, None, every.num_items).items))
    assert tasks[MASKED + kind] == source.num_documents - source.num_never_masked
    assert tasks[kind] == source.num_never_masked


@pytest.mark.parametrize("kind", ["text", "caption"])
def test_batches_hold_what_was_planned_and_other_spans_at_other_steps(made, folder, kind: str):
    plan = plan_of(made, kind, share=1.0, rate=0.4)
    steps = list(islice(plan.steps(), 6))
    assert any(item.task.startswith(MASKED) for step in steps for sequence in step.sequences for item in sequence)
    first, again = batches_of(plan, folder, steps), batches_of(plan, folder, steps[3:])
    pad, prompts = folder.id(PAD[0]), PlannedPrompts(plan)
    for step, batch in zip(steps, first, strict=True):
        assert not batch.state.get("errors"), batch.state
        metadata = batch.with_metadata().metadata
        assert metadata is not None
        items = [item for sequence in step.sequences for item in sequence]
        assert list(metadata.sequences.lengths) == [item.num_tokens for item in items]
        places = [plan.sources[0].indices[item.shard].place(item.row) for item in items]
        wanted = [prompts.num_tokens(item, place) for item, place in zip(items, places, strict=True)]
        assert list(metadata.sequences.num_prompt or ()) == wanted
        is_sentinel = (batch.labels_BT == pad) & (batch.labels_BT != IGNORE)
        assert is_sentinel.any()
    for one, other in zip(first[3:], again, strict=True):  # resumed
        assert (one.token_ids_BT == other.token_ids_BT).all()
    masked = next(item for step in steps for s in step.sequences for item in s if item.task.startswith(MASKED))
    moved = [StepPlan(number, ((masked,),), {}, 1, (0,)) for number in range(8)]
    texts = {tuple(batch.token_ids_BT.flatten().tolist()) for batch in batches_of(plan, folder, moved)}
    assert len(texts) > 1


def test_what_has_no_place_for_them_is_named(made, folder):
    for changes, message in (
        ({"kind": "audio"}, r"masked_spans is of kinds text and caption"),
        ({"max_documents": 3}, r"max_documents 3"),
    ):
        values = {"name": "x", "kind": "text", "shards": "s", "masked_spans": MaskedSpansConfig(), **changes}
        with pytest.raises(ValueError, match=message):
            SourceConfig(**values)
    for key, value in (("share", 0), ("rate", 1.0), ("mean_length", 0.5), ("sentinels", [])):
        with pytest.raises(ValueError, match=rf"masked_spans\.{key} is"):
            MaskedSpansConfig(**{key: value})  # pyright: ignore[reportArgumentType]
    template = {"caption": {"prompt": "{text}", "target": "{image}<|end|>"}}
    config = SourceConfig("x", "caption", "s", masked_spans=MaskedSpansConfig(sentinels=PAD), templates=template)
    with pytest.raises(ValueError, match=r"source 'x': masked_spans are of documents whose prompt"):
        span_masking(config, folder)
    with pytest.raises(ValueError, match=r"source 'text': the tokenizer has no token"):
        plan_of(made, sentinels=None)


def test_a_recipe_without_them_has_the_hash_that_it_had(made):
    recipe = recipe_from_dict(recipe_dict(made / "s", made / "tok"))
    assert "masked_spans" not in recipe_to_dict(recipe)["sources"][0]


def test_a_text_that_is_too_long_stays_as_it_is_and_is_counted(made):
    plan = plan_of(made, share=1.0, sequence_length=48)
    (source,) = plan.sources
    items = source.items(source.upcoming(0, 10**6, None, source.num_items).items)
    plain = [item for item in items if not item.task.startswith(MASKED)]
    assert any(item.part > 0 for item in plain) and all(item.part < 0 for item in items if item not in plain)
    assert source.num_never_masked == len({(item.shard, item.row) for item in plain}) > 0
    assert len({(item.shard, item.row) for item in items}) == source.num_documents


def test_an_epochs_tokens_are_counted_once(made):
    plain = plan_of(made, share=1.0).sources[0]
    half = plan_of(made, share=0.5).sources[0]
    drawn = half.upcoming(0, 10**6, None, 400 * half.num_items)
    mean = half.tokens_M[drawn.items].sum() / 400
    assert half.num_epoch_tokens == pytest.approx(mean, rel=0.01)
    assert plain.num_epoch_tokens > half.num_epoch_tokens


def test_stats_count_a_document_once_whatever_its_form_and_tell_those_never_masked(made, tmp_path):
    source = {
        "name": "text", "kind": "text", "shards": str(made / "s" / "text-*.tar"),
        "masked_spans": {"sentinels": PAD, "share": 0.5},
    }  # fmt: skip
    recipe = recipe_dict(made / "s", made / "tok", sources=[source], sequence_length=48)
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    told = commands.stats(tmp_path / "r.yaml", 200, 4)
    seen = Counter()
    for step in islice(open_plan(recipe_from_dict(recipe), 4).steps(), 200):
        seen.update((item.shard, item.row, item.part) for sequence in step.sequences for item in sequence)
    assert told["repeated_documents"] == sum(count > 1 for count in seen.values()) == len(seen)
    count = told["never_masked"]["text"]
    lines = list(stats_lines(told))
    assert count and any(line.startswith(f"never masked, of text: {count:,} documents") for line in lines)
