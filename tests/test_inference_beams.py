"""Beam search, against transformers' on the exported model, and in the engine beside other requests."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from mmllm.checkpoints.folder import save_model
from mmllm.checkpoints.settings import Sampling
from mmllm.cli.main import main
from mmllm.inference.api import Model
from mmllm.inference.constraints import choices
from mmllm.inference.engine.beams import Beam, BeamRow, _Finished
from mmllm.inference.engine.engine import Engine
from mmllm.inference.engine.requests import EngineConfig, TextRequest, TextResult
from mmllm.inference.engine.sampling import TextRules
from mmllm.model.multimodal import MultimodalModel
from tests.inference_fixtures import make
from tests.test_inference_engine import LONG_TEXT, prompt_of, requests_of
from tests.test_inference_engine import check_equal as check_all

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model() -> Model:
    """With experts in every layer, which transformers has too, and ends that are not too rare."""
    base = make("delay")
    config = base.model.config
    torch.manual_seed(2)
    made = MultimodalModel(
        dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, moe_layers="all"))
    ).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() > 1 and not name.startswith("vision"):
                parameter.normal_(std=0.25)
        for end in base.tokenizer.text.end_ids:
            made.decoder.embed_tokens.weight[end] *= 1.6
    return Model(made, base.tokenizer)


@pytest.fixture(scope="module")
def peer(model, tmp_path_factory) -> Any:
    """The model as transformers runs it; it draws what our texts may have."""
    folder = tmp_path_factory.mktemp("beams")
    save_model(folder / "model", model.model, model.tokenizer)
    assert main(["export", "--model", str(folder / "model"), "--out", str(folder / "out")]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "out", local_files_only=True)
    mask_V = TextRules.of(model.tokenizer).mask_V
    theirs.lm_head.register_forward_hook(lambda module, args, logits: logits + mask_V)
    return theirs.eval()


def text_prompt(model: Model, length: int):
    return model.prompter.continuation([LONG_TEXT[:length]])


def engine_of(model: Model, **config: Any) -> Engine:
    return Engine(model.model, model.tokenizer, EngineConfig(**config))


CASES = [
    {},
    {"num_beams": 2},
    {"num_beams": 5, "length_penalty": 0.0},
    {"length_penalty": 0.8},
    {"length_penalty": -1.0},
    {"early_stopping": True},
    {"early_stopping": "never"},
    {"early_stopping": "never", "num_beams": 2, "max_new_tokens": 40, "stop_ids": (70, 290, 300, 20, 120, 200)},
    {"num_beams": 2, "max_new_tokens": 40, "stop_ids": (70, 290, 300, 20, 120, 200)},
    {"early_stopping": "never", "length_penalty": 0.3, "num_beams": 3},
    {"early_stopping": True, "length_penalty": -0.5, "num_beams": 7},
    {"min_new_tokens": 4, "length_penalty": 0.5},
    {"stop_ids": (70, 290, 300)},
    {"stop_ids": (70, 300), "early_stopping": True, "length_penalty": 0.6},
    {"max_new_tokens": 1},
    {"repetition_penalty": 1.7},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_transformers_beam_search(model, peer, case):
    settings = {"num_beams": 4, "max_new_tokens": 14, **case}
    penalty = settings.pop("repetition_penalty", 1.0)
    prompts = [text_prompt(model, length) for length in (3, 8, 15, 22, 40)]
    requests = [TextRequest(p, Sampling(repetition_penalty=penalty), num_logprobs=0, **settings) for p in prompts]
    results = engine_of(model).run(requests)
    ends = sorted({*model.tokenizer.text.end_ids, *settings.pop("stop_ids", ())})
    finished = 0
    for request, result in zip(requests, results, strict=True):
        assert isinstance(result, TextResult)
        ids = torch.from_numpy(request.prompt.token_ids_T)[None]
        with torch.no_grad():
            theirs = peer.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=ends, pad_token_id=ends[0],
                repetition_penalty=penalty, return_dict_in_generate=True, output_scores=True, **settings,
            )  # fmt: skip
        wanted = theirs.sequences[0, ids.shape[1] :].tolist()
        has_ended = result.finish_reason == "stop"
        finished += has_ended
        assert list(result.ids) == (wanted[:-1] if has_ended else wanted)
        assert not has_ended or wanted[-1] in ends
        assert result.beam_score == pytest.approx(float(theirs.sequences_scores[0]), abs=1e-4, rel=2e-6)
        length = len(result.ids) + has_ended
        assert len(result.logprobs) == length
        if penalty == 1.0:
            total = sum(result.logprobs) / length ** settings.get("length_penalty", 1.0)
            assert total == pytest.approx(result.beam_score, abs=1e-4)
    assert case == {"max_new_tokens": 1} or finished, "no text has ended: the case tests little"


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"max_rows": 3},
        {"prefill_tokens": 7},
        {"block_size": 3},
        {"deterministic": True},
        {"speculation": "lookup"},
        {"max_cached_tokens": 1100},
        {"max_cached_tokens": 2400},
    ],
    ids=str,
)
def test_searches_run_beside_other_requests(model, config):
    """Of mixed lengths and widths; what each gets is what it gets alone, and nothing stays in the cache."""
    searches = [
        TextRequest(prompt_of(model, number), max_new_tokens=5 + 4 * number, num_beams=2 + number % 3, num_logprobs=1)
        for number in range(6)
    ]
    others = requests_of(model, 8)
    requests = [each for pair in zip(searches, others, strict=False) for each in pair]
    alone = [engine_of(model, prefix_cache_bytes=0).run([request])[0] for request in requests]
    engine = engine_of(model, **config)
    got = engine.run(requests)
    check_all(got, alone)
    for own, want in zip(got, alone, strict=True):
        if isinstance(want, TextResult) and want.beam_score is not None:
            assert own.beam_score == pytest.approx(want.beam_score, abs=1e-4)
    assert engine.num_running == engine.num_waiting == engine.num_positions == 0


def test_rows_that_were_taken_out_and_rows_that_grow(model):
    """Beams leave slabs that they grow out of together; a search that has to make room begins anew."""
    requests = [
        TextRequest(text_prompt(model, 30 + number), max_new_tokens=300, min_new_tokens=290, num_beams=3)
        for number in range(2)
    ]
    wanted = [engine_of(model).run([request])[0] for request in requests]
    engine = engine_of(model, max_cached_tokens=3 * 1024 + 3 * 256)
    got = engine.run(requests)
    assert engine.counts.preemptions > 0
    assert [each.ids for each in got] == [each.ids for each in wanted]
    assert all(len(each.ids) >= 290 for each in got)
    (cut,) = engine_of(model, max_cached_tokens=3 * 256).run(requests[:1])
    assert cut.finish_reason == "length" and 200 < len(cut.ids) < 256


def test_one_beam_is_what_is_most_probable(model):
    prompt = prompt_of(model, 2)
    plain, one = engine_of(model).run([TextRequest(prompt), TextRequest(prompt, num_beams=1, length_penalty=2.0)])
    assert plain.ids == one.ids and one.beam_score is None


@pytest.mark.parametrize("num_beams", [2, 4, 16])
def test_a_constraint_holds_in_every_beam(model, num_beams):
    """Of many beams the best is no worse than what each text alone is given, greedily: it may be cut into other ids."""
    texts = ["a red circle", "a blue square", "two squares"]
    maker = choices(model.tokenizer, texts)
    for number in range(4):
        request = TextRequest(
            prompt_of(model, number), num_beams=num_beams, length_penalty=0.0, constraint=maker, num_logprobs=0
        )
        (result,) = engine_of(model).run([request])
        assert result.text in texts and result.finish_reason == "stop"
        assert result.beam_score == pytest.approx(sum(result.logprobs), abs=1e-4)
        totals = []
        for text in texts:
            only = dataclasses.replace(request, constraint=choices(model.tokenizer, [text]), num_beams=1)
            totals.append(sum(engine_of(model).run([only])[0].logprobs))
        assert num_beams < 16 or result.beam_score > max(totals) - 1e-4


def test_it_can_be_ended_at_any_time(model):
    request = TextRequest(prompt_of(model, 0), max_new_tokens=9, min_new_tokens=9, num_beams=3)
    for num_steps in range(6):
        engine = engine_of(model)
        told: list = []
        ticket = engine.submit(request, told.append)
        for _ in range(num_steps):
            engine.step()
        engine.cancel(ticket)
        result = ticket.result()
        assert result.finish_reason == "cancelled" and len(result.ids) == max(0, num_steps) and not told
        assert engine.num_positions == 0


def test_its_text_is_told_when_it_has_ended(model):
    told: list = []
    engine = engine_of(model)
    request = TextRequest(prompt_of(model, 0), max_new_tokens=9, num_beams=3, num_logprobs=2)
    ticket = engine.submit(request, told.append)
    engine.finish([ticket])
    (update,) = told
    result = ticket.result()
    assert (update.text, update.ids) == (result.text, result.ids)
    assert update.logprobs == result.logprobs[: len(result.ids)]
    assert all(len(each) == 2 for each in result.top_logprobs)


def test_a_listener_that_fails_ends_its_own_request_alone(model):
    engine = engine_of(model)

    def fail(update: Any) -> None:
        raise RuntimeError("no")

    ticket = engine.submit(TextRequest(prompt_of(model, 0), max_new_tokens=4, num_beams=3), fail)
    other = engine.submit(TextRequest(prompt_of(model, 1), max_new_tokens=9, num_beams=2))
    engine.finish([ticket, other])
    assert isinstance(ticket.error, RuntimeError) and other.result().beam_score is not None
    assert engine.num_positions == 0


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"sampling": Sampling(temperature=0.5)}, "num_beams is 2 and temperature 0.5"),
        ({"stop": ("x",)}, "num_beams is 2 beside stop strings"),
        ({"num_beams": 0}, "num_beams is 0; it must be from 1"),
        ({"num_beams": 65}, "num_beams is 65"),
        ({"length_penalty": float("nan")}, "length_penalty is nan"),
        ({"early_stopping": "soon"}, "early_stopping is 'soon'"),
    ],
)
def test_what_a_search_cannot_do_is_refused(model, settings, match):
    with pytest.raises(ValueError, match=match):
        TextRequest(prompt_of(model, 2), **{"num_beams": 2, **settings})


def test_a_search_that_the_cache_cannot_hold_is_refused(model):
    with pytest.raises(ValueError, match="of 5 beams take 1280 of the cache's 1100"):
        engine_of(model, max_cached_tokens=1100).submit(TextRequest(prompt_of(model, 2), num_beams=5))


def test_the_prompts_own_log_probabilities(model):
    request = TextRequest(prompt_of(model, 2), max_new_tokens=4, prompt_logprobs=True)
    plain, searched = engine_of(model).run([request, dataclasses.replace(request, num_beams=2)])
    assert searched.prompt_logprobs[0] is None
    assert searched.prompt_logprobs[1:] == pytest.approx(plain.prompt_logprobs[1:], abs=1e-4)


def test_it_ends_when_transformers_does(model):
    """By the rule alone, on random scores: the searches above rarely hang on it."""
    rule = transformers.GenerationMixin._check_early_stop_heuristic
    rng, rules, answers = random.Random(0), TextRules.of(model.tokenizer), []
    for _ in range(400):
        stopping = rng.choice([False, "never"])
        penalty, num_new = rng.choice([-1.0, 0.0, 0.5, 1.0, 2.0]), rng.randint(1, 20)
        request = TextRequest(
            prompt_of(model, 2), max_new_tokens=20, num_beams=2, length_penalty=penalty, early_stopping=stopping
        )
        row = BeamRow(request, rules, model.tokenizer)
        scores = sorted((-rng.uniform(0, 10) for _ in range(2)), reverse=True)
        best = -rng.uniform(0, 40)
        row._finished = [_Finished(Beam(), score) for score in scores]
        goes_on = rule(
            torch.ones(1, 1, dtype=torch.bool), torch.tensor([[best, best - 1]]), torch.tensor([scores]),
            torch.ones(1, 2, dtype=torch.bool), num_new, 20, 0, stopping, penalty,
        )  # fmt: skip
        assert row._has_ended(best, num_new) is not bool(goes_on)
        answers.append(bool(goes_on))
        row._finished.pop()
        assert not row._has_ended(best, num_new)
    assert 0.2 < sum(answers) / len(answers) < 0.8


def test_a_search_needs_its_own_logits(model):
    rules = TextRules.of(model.tokenizer)
    row = BeamRow(TextRequest(prompt_of(model, 2), num_beams=2), rules, model.tokenizer)
    assert row.take(torch.randn(1, rules.num_text)) == [0, 0]


def test_it_is_a_setting(model, tmp_path, capsys):
    """Of the Python API and of the shell; what goes with it, and what doesn't, is named."""
    asked = model.generate(["one two"], num_beams=3, length_penalty=0.5, early_stopping="never", max_new_tokens=9)
    prompt = model.prompter.continuation(["one two"])
    request = TextRequest(prompt, max_new_tokens=9, num_beams=3, length_penalty=0.5, early_stopping="never")
    (wanted,) = engine_of(model).run([request])
    assert asked.ids == wanted.ids and 0 < asked.confidence <= 1
    for settings, match in (
        ({"num_beams": 0}, "num_beams is 0"),
        ({"length_penalty": 0.5}, "length_penalty is of a beam search"),
        ({"num_beams": 2, "best_of": 3, "temperature": 1.0}, "num_beams is 2 and 3 answers are drawn"),
        ({"num_beams": 2, "stop": "x"}, "num_beams is 2 beside stop strings"),
    ):
        with pytest.raises(ValueError, match=match):
            model.generate(["one two"], **settings)
    save_model(tmp_path / "model", model.model, model.tokenizer)
    options = ["--num_beams", "3", "--length_penalty", "0.5", "--max_new_tokens", "9"]
    assert main(["generate", "one two", "--model", str(tmp_path / "model"), *options]) == 0
    again = model.generate(["one two"], num_beams=3, length_penalty=0.5, max_new_tokens=9)
    assert capsys.readouterr().out.strip() == again.text.strip()
