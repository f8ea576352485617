"""`mmllm draft`: a smaller model that learns what a large one would write, and what it is worth."""

from __future__ import annotations

import dataclasses
import itertools
import json
import types
from itertools import islice

import numpy as np
import pytest
import torch

import mmllm
from mmllm.batch import IGNORE, Modality
from mmllm.checkpoints.folder import LoadedModel, load_model, save_model
from mmllm.checkpoints.settings import Sampling
from mmllm.cli.main import main
from mmllm.inference.drafts import load_draft
from mmllm.inference.engine.drafting import _EACH_GUESS, _LONGER_STEP, StepTimes, best_length, have_equal_inputs
from mmllm.inference.engine.engine import Engine
from mmllm.inference.engine.ngrams import ORDERS, NGramCounts, NGrams
from mmllm.inference.engine.requests import EngineConfig, TextRequest
from mmllm.training import draft_speed, drafting
from mmllm.training.draft_speed import Speed, held_back_prompts
from mmllm.training.draft_texts import written_batches
from mmllm.training.drafting import DraftConfig, begin_draft, distil, divergence
from tests.inference_fixtures import images, make
from tests.test_inference_engine import check_equal, prompt_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of two layers, the second of experts."""
    made = make()
    return save_model(
        tmp_path_factory.mktemp("draft") / "large", made.model, made.tokenizer, generation=made.generation
    )


@pytest.fixture(scope="module")
def loaded(folder) -> LoadedModel:
    return load_model(folder)


def lesson_of(loaded: LoadedModel, seed: int = 0):
    return drafting._lesson(loaded.model, next(written_batches(loaded, seed)))


def test_a_draft_begins_as_some_of_the_models_layers(loaded):
    config = loaded.model.config
    deep = dataclasses.replace(
        config, decoder=dataclasses.replace(config.decoder, num_hidden_layers=5, moe_layers=(0, 3, 4))
    )
    large = mmllm.model.multimodal.MultimodalModel(deep).eval()
    draft = begin_draft(large, 3)  # layers 0, 2 and 4
    assert draft.config.decoder.num_hidden_layers == 3 and draft.config.decoder.moe_layers == (0, 2)
    theirs, own = large.state_dict(), draft.state_dict()
    for name, weight in own.items():
        for place, layer in ((0, 0), (1, 2), (2, 4)):
            name = name.replace(f"decoder.layers.{place}.", f"decoder.layers.kept{layer}.")
        assert torch.equal(weight, theirs[name.replace("kept", "")]), name
    trained = {name for name, each in draft.named_parameters() if each.requires_grad}
    assert trained and all(name.startswith(("decoder.layers.", "decoder.norm.")) for name in trained)
    with pytest.raises(ValueError, match="layers is 5 and the model has 5"):
        begin_draft(large, 5)


def test_the_divergence_is_that_of_the_next_ids(loaded):
    lesson = lesson_of(loaded)
    draft = begin_draft(loaded.model, 1)
    with torch.no_grad():
        draft.decoder.norm.weight.mul_(4.0)  # far, so that the other way round is another number
    num_text = loaded.model.config.num_text
    with torch.no_grad():
        labels_BT = lesson.batch.labels_BT
        chosen_BT = (labels_BT != IGNORE) & (lesson.batch.modality_BT != Modality.UNITS)
        own, other = (
            model.logits(lesson.batch)[chosen_BT][:, :num_text].double().softmax(-1) for model in (loaded.model, draft)
        )
        wanted = (own * (own / other).log()).sum(-1).mean()
        assert abs((other * (other / own).log()).sum(-1).mean() / wanted - 1) > 0.1
        assert divergence(draft, lesson).item() == pytest.approx(wanted.item(), rel=0.02)  # kept in bfloat16
        assert divergence(loaded.model, lesson).item() == pytest.approx(0, abs=1e-3)


def test_texts_that_the_model_writes_itself_are_of_all_its_tasks(loaded):
    first, again, other = (next(written_batches(loaded, seed)) for seed in (0, 0, 1))
    assert torch.equal(first.token_ids_BT, again.token_ids_BT) and torch.equal(first.images_NCHW, again.images_NCHW)
    assert not torch.equal(first.token_ids_BT[:1, :40], other.token_ids_BT[:1, :40])
    assert first.num_documents == 64 and len(first.images_NCHW) == 32 and len(first.clip_codes_CFK) == 16
    is_target_BT = first.labels_BT != IGNORE
    assert is_target_BT.any() and (first.labels_BT[is_target_BT] < loaded.model.config.num_text).all()
    batches = list(islice(written_batches(loaded, 0), 2))
    assert not torch.equal(batches[0].token_ids_BT[0, :60], batches[1].token_ids_BT[0, :60])


def test_a_draft_comes_nearer_to_the_model(loaded, monkeypatch):
    """By a clock that goes on when it is looked at: the same steps on any machine."""
    clock = itertools.count(0, 0.05)
    monkeypatch.setattr(drafting, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    before = begin_draft(loaded.model, 1)
    frozen = {name: each.clone() for name, each in before.state_dict().items()}
    held_back = lesson_of(loaded, 7)
    distilled = distil(loaded, DraftConfig(minutes=0.15, learning_rate=1e-2), 0.0)
    with torch.no_grad():
        assert divergence(distilled.draft, held_back) < 0.8 * divergence(before, held_back)
    assert 20 < distilled.num_steps < 100 and distilled.num_ids > 1000
    for name, weight in distilled.draft.state_dict().items():
        is_trained = name.startswith(("decoder.layers.", "decoder.norm."))
        assert is_trained or torch.equal(weight, frozen[name]), name
    assert have_equal_inputs(loaded.model, distilled.draft)


def test_prompts_are_what_documents_begin_with(loaded):
    batch = next(written_batches(loaded, 3))
    found = held_back_prompts([batch], loaded.tokenizer)
    assert set(found) <= {"text", "pictures"} and len(found["pictures"]) == 8
    pictures = {image.numpy().tobytes() for image in batch.images_NCHW}
    template = make().tokenizer
    caption = prompt_of(make(), 0)
    assert any(len(each.token_ids_T) == caption.num_tokens for each in found["pictures"])
    for prompt in found["pictures"]:
        (picture,) = prompt.images
        assert picture.pixels_3HW.tobytes() in pictures
        is_slot_T = prompt.modality_T == Modality.IMAGE
        assert is_slot_T.nonzero()[0].tolist() == list(range(picture.start, picture.start + picture.num_slots))
        assert not prompt.targets_T.any() and prompt.token_ids_T[-1] in (
            caption.token_ids_T[-1], template.id("<|answer|>"),
        )  # fmt: skip


def test_what_a_large_model_has_of_a_prompt_is_not_computed_again(loaded, monkeypatch):
    """Pictures go through the tower once; the ids are the same."""
    draft = begin_draft(loaded.model, 1)
    model = make()
    requests = [TextRequest(prompt_of(model, number), max_new_tokens=9, num_logprobs=0) for number in range(6)]
    plain = Engine(loaded.model, loaded.tokenizer).run(requests)
    for changes in (False, True):
        looked: list[int] = []
        if changes:
            with torch.no_grad():
                next(draft.image_projector.parameters()).add_(0.1)
        assert have_equal_inputs(loaded.model, draft) is not changes
        with monkeypatch.context() as patch:
            patch.setattr(draft, "image_embedding", _noting(draft.image_embedding, looked))
            engine = Engine(loaded.model, loaded.tokenizer, EngineConfig(max_rows=2, speculation="draft"), draft)
            got = engine.run(requests)
        assert [each.ids for each in got] == [each.ids for each in plain]
        assert bool(looked) is changes
        assert engine.counts.drafted >= engine.counts.accepted and engine.counts.drafted > 0


def _noting(function, calls):
    def noted(*args):
        calls.append(1)
        return function(*args)

    return noted


def test_from_the_shell_to_answers(folder, tmp_path, capsys):
    out = tmp_path / "small"
    assert main(["draft", "--model", str(folder), "--out", str(out), "--minutes", "0.1"]) == 0
    said = capsys.readouterr().out
    assert "steps on" in said and "guesses accepted; tokens/s" in said and "pictures: " in said
    card = (out / "README.md").read_text()
    assert "# draft of large" in card and "A draft model of `large` for speculative decoding" in card
    assert "pictures acceptance" in card
    plain, quick = mmllm.load(folder), mmllm.load(folder, draft=out)
    assert quick.engine.config.speculation == "draft"
    assert quick.caption(images(3), max_new_tokens=9) == plain.caption(images(3), max_new_tokens=9)
    config = EngineConfig(max_rows=2)
    assert mmllm.load(folder, draft=out, engine=config).engine.config.speculation == "draft"
    from PIL import Image

    Image.fromarray(images(1)[0]).save(tmp_path / "one.png")
    lines = []
    for more in ([], ["--draft", str(out)], ["--speculation", "lookup"]):
        assert main(["caption", str(tmp_path / "one.png"), "--model", str(folder), "--json", *more]) == 0
        lines.append(json.loads(capsys.readouterr().out)["text"])
    assert lines == lines[:1] * 3
    both = ["--draft", str(out), "--speculation", "lookup"]
    assert main(["caption", str(tmp_path / "one.png"), "--model", str(folder), *both]) == 2
    assert "--draft and --speculation lookup are given" in capsys.readouterr().err
    assert main(["draft", "--model", str(folder), "--out", str(out), "--layers", "2"]) == 2
    assert "layers is 2 and the model has 2" in capsys.readouterr().err


def test_a_table_has_what_mostly_follows():
    """Counted by hand, of each few ids; the longest few that are known say what follows."""
    counts = NGramCounts(50, "hash")
    texts = [([9], [1, 2, 3]), ([9, 8, 7, 6, 5], [1, 2, 4, 1, 2, 4]), ([], [-1, 2, 3])]
    for before, ids in texts:
        counts.add(before, ids)
    table = counts.table()
    for order in ORDERS:
        wanted: dict = {}
        for before, ids in texts:
            whole = before + ids
            for place in range(len(before), len(whole)):
                # of a longer beginning its last four ids are seen
                if place - order >= max(0, len(before) - 4):
                    wanted.setdefault(tuple(whole[place - order : place]), []).append(whole[place])
        assert {key for key in table.following if len(key) == order} == set(wanted)
        for key, found in wanted.items():
            token_id, count, total = table.following[key]
            assert count == found.count(token_id) == max(map(found.count, found)) and total == len(found)
    assert table.guess([9, 1, 2]) == (3, 1 / 1.5) and table.guess([7, 7, 2]) == (3, 2 / 4.5)
    assert table.guess([7, 7]) is None and table.guess([]) is None


@pytest.mark.parametrize("max_rows", [1, 3])
def test_a_table_changes_nothing_but_the_speed(loaded, max_rows):
    """Greedy rows and drawn ones; learned on the very texts it is right, on others it is wrong."""
    model = make()
    sampling = [Sampling(), Sampling(temperature=0.7, seed=3)]
    requests = [
        TextRequest(prompt_of(model, number), sampling[number % 2], 24, 9, number, num_logprobs=1)
        for number in range(6)
    ]
    wanted = [Engine(loaded.model, loaded.tokenizer, EngineConfig(max_rows=1)).run([each])[0] for each in requests]
    plain = Engine(loaded.model, loaded.tokenizer, EngineConfig(max_rows=max_rows))
    plain.run(requests)
    for shift in (0, 1):
        counts = NGramCounts(loaded.model.config.num_text, loaded.tokenizer.hash)
        for request, result in zip(requests, wanted, strict=True):
            counts.add(request.prompt.token_ids_T[-1:].tolist(), [each + shift for each in result.ids])
        config = EngineConfig(max_rows=max_rows, speculation="ngram")
        engine = Engine(loaded.model, loaded.tokenizer, config, counts.table())
        check_equal(engine.run(requests), wanted)
        assert engine.counts.steps <= plain.counts.steps
        if not shift:
            assert engine.counts.steps < 0.7 * plain.counts.steps
            assert engine.counts.accepted > 0.7 * engine.counts.drafted > 0


def test_a_table_is_a_folder(folder, loaded, tmp_path, capsys):
    out = tmp_path / "table"
    for seed in ("0", "1"):  # an earlier one is replaced
        arguments = ["draft", "--model", str(folder), "--out", str(out), "--kind", "ngram", "--minutes", "0.05"]
        assert main([*arguments, "--seed", seed]) == 0
    assert "texts with" in capsys.readouterr().out
    assert "A table of n-grams" in (out / "README.md").read_text()
    table = load_draft(out, loaded.tokenizer)
    assert isinstance(table, NGrams) and len(table.following) > 20
    table.save(tmp_path / "again.safetensors")
    assert NGrams.load(tmp_path / "again.safetensors") == table
    plain, quick = mmllm.load(folder), mmllm.load(folder, draft=out)
    assert quick.engine.config.speculation == "ngram"
    assert quick.caption(images(3), max_new_tokens=9) == plain.caption(images(3), max_new_tokens=9)
    assert quick.engine.counts.drafted > 0
    dataclasses.replace(table, tokenizer_hash="f" * 64).save(out / "ngrams.safetensors")
    with pytest.raises(ValueError, match="is of tokenizer ffffffffffff, the model of"):
        mmllm.load(folder, draft=out)
    with pytest.raises(ValueError, match="lacks"):
        mmllm.load(out)
    (out / "ngrams.safetensors").write_bytes(b"no table")
    with pytest.raises(ValueError, match="no table of `mmllm draft --kind ngram`"):
        mmllm.load(folder, draft=out)


@pytest.mark.parametrize(("speculation", "draft"), [("ngram", None), ("draft", "ngram"), ("none", "ngram")])
def test_a_draft_of_another_kind_is_refused(loaded, speculation, draft):
    table = NGrams(loaded.model.config.num_text, loaded.tokenizer.hash, {}) if draft else None
    with pytest.raises(ValueError, match=f"speculation is '{speculation}' and there is"):
        Engine(loaded.model, loaded.tokenizer, EngineConfig(speculation=speculation), table)
    other = NGrams(7, "", {})
    with pytest.raises(ValueError, match="the draft model has 7 ids of text"):
        Engine(loaded.model, loaded.tokenizer, EngineConfig(speculation="ngram"), other)


def test_as_many_guesses_are_verified_as_give_the_most_by_time():
    rng, times = np.random.default_rng(0), StepTimes()
    for _ in range(200):  # verifying eight takes twice as long as was thought
        times.note_plain(1, 0.01)
        times.note_verified(1, 8, 0.02 * (1 + _LONGER_STEP + 8 * _EACH_GUESS))
    assert times.cost(8) == pytest.approx(2 * StepTimes().cost(8), rel=1e-3)
    times.note_verified(1, 8, 5.0)  # held up
    assert times.cost(8) < 2.5 * StepTimes().cost(8)
    check_lengths(rng, StepTimes())
    check_lengths(rng, times)


def check_lengths(rng: np.random.Generator, times: StepTimes) -> None:
    for _ in range(200):
        chances = np.cumprod(rng.uniform(0.3, 1, 8)).tolist()
        rates = [(1 + sum(chances[:count])) / (times.cost(count) if count else 1) for count in range(9)]
        assert rates[best_length(chances, times)] == pytest.approx(max(rates))
    assert best_length([], times) == best_length([0.1], times) == 0


def test_a_draft_that_does_not_pay_is_said_plainly():
    speed = Speed("text", 4, 100, 40, 100.0, 90.0, 130.0)
    assert speed.ratio == pytest.approx(0.9) and speed.acceptance == pytest.approx(0.4)
    assert str(speed).startswith("text: 40% of 100 guesses accepted; tokens/s 90 against 100 without, 0.90 times")
    assert "It doesn't pay: --speculation lookup is faster here" in str(speed)
    assert "another --kind of draft" in str(dataclasses.replace(speed, looked_up=99.0))
    assert "doesn't pay" not in str(dataclasses.replace(speed, drafted=100 * draft_speed.PAYS))
    with pytest.raises(ValueError, match="minutes is 0"):
        DraftConfig(minutes=0)


def test_pictures_without_sense_are_blocks():
    from mmllm.training.draft_texts import _blocks

    sizes = set()
    for seed in range(20):
        picture_HWC = _blocks(np.random.default_rng(seed), 16)
        assert picture_HWC.shape == (16, 16, 3) and picture_HWC.dtype == np.uint8
        sizes.add(len(np.unique(picture_HWC.reshape(-1, 3), axis=0)))
    assert len(sizes) > 3
