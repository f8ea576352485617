"""What a completion is, and what the settings of text make of it."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle

import numpy as np
import pytest
import torch

import mmllm
from mmllm.checkpoints.folder import save_model
from mmllm.checkpoints.settings import Sampling
from mmllm.inference.completion import Completion, TextPiece, best_first
from mmllm.inference.engine.sampling import TextRules
from mmllm.inference.generate import generate_text
from mmllm.inference.text_settings import try_number
from mmllm_tokenizers.vocab import END
from tests.inference_fixtures import images, make, sounds


@pytest.fixture(scope="module")
def model():
    made = make()
    with torch.no_grad():
        made.model.decoder.head_weight_VD[made.tokenizer.id(END)] *= 4  # else hardly an answer ends by itself
    return made


def slow_logprobs(model: mmllm.Model, prompt, ids: list[int]) -> list[float]:
    """Of each id behind the prompt, by one forward pass without a cache."""
    from mmllm.data.samples.document import DocumentWriter
    from mmllm.inference.prompts import join, pad_left

    writer = DocumentWriter(model.tokenizer)
    writer.ids(ids, is_target=True)
    with torch.no_grad():
        hidden_TD = model.model.hidden(pad_left([join([prompt, writer.finish()])]))[0]
    rules = TextRules.of(model.tokenizer)
    logits_TV = hidden_TD.double() @ model.model.decoder.head_weight_VD[: rules.num_text].double().T + rules.mask_V
    log_probs_TV = logits_TV.log_softmax(dim=-1)
    start = prompt.num_tokens - 1
    return [log_probs_TV[start + place, token].item() for place, token in enumerate(ids)]


def test_a_completion_is_its_text_and_more():
    said = Completion("a red circle", (1, 2, 3), "length", (math.log(0.5), math.log(0.25)), seconds=2.0)
    assert said == "a red circle" == said.text and type(said.text) is str
    assert f"{said}|{said:>14}|" == "a red circle|  a red circle|" and str(said) == said.text
    assert repr([said]) == "['a red circle']"
    assert {said: 1}["a red circle"] == 1 and said in {"a red circle"} and said != "a"
    assert len(said) == 12 and "red" in said and said[2:5] == "red" and said.split() == ["a", "red", "circle"]
    assert json.dumps({"text": said}) == '{"text": "a red circle"}' and " ".join([said, said]).count("red") == 2
    assert said.confidence == pytest.approx(0.375) and said.mean_logprob == pytest.approx(math.log(0.125) / 2)
    assert Completion("").confidence is None
    for again in (pickle.loads(pickle.dumps(said)), copy.copy(said), copy.deepcopy(said), dataclasses.replace(said)):
        assert again == said and again.ids == (1, 2, 3) and again.finish_reason == "length" and again.seconds == 2.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        said.text = "b"  # pyright: ignore[reportAttributeAccessIssue]
    piece = TextPiece("re", (7,), (-0.5,))
    assert piece + "d" == "red" and piece.ids == (7,)


def test_the_best_is_the_one_of_the_highest_mean():
    given = [
        Completion("a", logprobs=(-1.0,)),
        Completion("b", logprobs=(-0.4, -0.4)),
        Completion("c", logprobs=(-0.4,)),
    ]
    assert best_first([*given, Completion("d")]) == ["b", "c", "a", "d"], "among equals the first; unknown last"


def test_a_completion_tells_what_was_drawn(model):
    prompts = [model.caption_prompt(image) for image in images(6)]
    expected = generate_text(model.model, model.tokenizer, prompts, Sampling(), 12)
    reasons = set()
    for prompt, ids, said in zip(prompts, expected, model.caption(images(6)), strict=True):
        assert said.ids == tuple(ids) and said == model.tokenizer.text.decode(ids)
        ended = said.finish_reason == "stop"
        drawn = [*ids, *([model.tokenizer.id(END)] if ended else [])]
        np.testing.assert_allclose(said.logprobs, slow_logprobs(model, prompt, drawn), atol=1e-5)
        assert said.confidence == pytest.approx(np.exp(said.logprobs).mean())
        assert said.num_prompt_tokens == prompt.num_tokens and said.seconds > 0
        assert ended == (len(ids) < 12)
        reasons.add(said.finish_reason)
    assert reasons == {"stop", "length"}


def test_logprobs_are_told_as_far_as_they_are_asked_for(model):
    three = model.generate("a red", logprobs=3)
    assert three.top_logprobs is not None and three.logprobs is not None
    for token, top, own in zip(three.ids, three.top_logprobs, three.logprobs, strict=False):
        assert len(top) >= 3 and max(top, key=lambda each: top[each]) == token, "greedy"
        assert top[token] == pytest.approx(own)
    none = model.generate("a red", logprobs=None)
    assert none == three and none.logprobs is None and none.confidence is None
    told = model.generate("a red", prompt_logprobs=True)
    assert told == three and len(told.prompt_logprobs) == told.num_prompt_tokens and told.prompt_logprobs[0] is None


def test_n_completions_are_those_of_their_numbers(model):
    warm, prompt = Sampling(temperature=1.0, seed=3), model.continuation_prompt(["a red"])
    expected = [
        generate_text(model.model, model.tokenizer, [prompt], warm, 8, numbers=[try_number(place)])[0]
        for place in range(5)
    ]
    settings = {"temperature": 1.0, "seed": 3, "max_new_tokens": 8}
    said = model.generate("a red", n=5, **settings)
    assert [list(each.ids) for each in said] == expected and len(set(said)) > 1
    assert model.generate("a red", **settings) == said[0]
    assert model.generate("a red", n=1, **settings) == said[:1], "a list, as n is given"
    best = model.generate("a red", best_of=5, **settings)
    assert best == max(said, key=lambda each: each.mean_logprob) and best != said[0]
    ranked = sorted(said, key=lambda each: -each.mean_logprob)
    assert model.generate("a red", n=2, best_of=5, **settings) == ranked[:2]
    assert model.generate([["a red"], ["two"]], n=5, **settings)[0] == said
    assert model.caption(images(2), n=2, temperature=1.0)[1] == model.caption(images(2)[1], n=2, temperature=1.0)


def test_what_is_drawn_of_one_does_not_depend_on_the_others(model):
    settings = {"temperature": 1.0, "seed": 5}
    assert model.caption(images(6), **settings) == [model.caption(image, **settings) for image in images(6)]
    assert model.transcribe(sounds(5), **settings) == [model.transcribe(sound, **settings) for sound in sounds(5)]
    together = model.speak(["one", "two blue", "red"], **settings)
    for text, speech in zip(["one", "two blue", "red"], together, strict=True):
        np.testing.assert_array_equal(speech.codes_KF, model.speak(text, **settings).codes_KF)
    assert model.caption(images(1)[0], temperature=1.0, seed=6) != model.caption(images(1)[0], **settings)


def test_a_stop_string_ends_a_text_before_it(model):
    whole = model.generate("a red", max_new_tokens=12)
    stop = whole[3:5]
    said = model.generate("a red", stop=stop)
    assert said == whole[: whole.index(stop)] and (said.stop, said.finish_reason) == (stop, "stop")
    assert model.generate("a red", stop=["", stop][1:]) == said
    ends = model.generate("a red", stop_ids=[whole.ids[2]])
    assert ends.ids == whole.ids[:2] and ends.finish_reason == "stop"
    banned = model.generate("a red", logit_bias={whole.ids[0]: -100.0})
    assert banned.ids[0] != whole.ids[0]
    assert len(model.generate("a red", min_new_tokens=12).ids) == 12


def test_choices_are_the_only_answers(model):
    said = model.answer([["see ", image] for image in images(3)], ["how many?"] * 3, choices=["one", "two", "three"])
    assert set(said) <= {"one", "two", "three"}
    assert model.generate("a ", regex="(red|blue) [0-9]").split()[0] in ("red", "blue")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": None}, "temperature is None; give a number"),
        ({"temperature": "1"}, "temperature is '1'; give a number"),
        ({"temperature": float("nan")}, "temperature is nan; give a number"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": True}, "temperature is True; give a number"),
        ({"max_new_tokens": "5"}, "max_new_tokens is '5'; give a whole number of at least 1"),
        ({"max_new_tokens": None}, "max_new_tokens is None; give a whole number"),
        ({"max_new_tokens": 5.0}, "max_new_tokens is 5.0; give a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"min_new_tokens": 99}, "min_new_tokens is 99; give a whole number from 0 to 12"),
        ({"top_k": "3"}, "top_k is '3'"),
        ({"top_p": [0.5]}, r"top_p is \[0.5\] of type list"),
        ({"top_p": 2.0}, "top_p is 2.0"),
        ({"min_p": -1.0}, "min_p is -1.0"),
        ({"seed": -1}, "seed is -1; give a whole number from 0 to 4294967295"),
        ({"seed": None}, "seed is None"),
        ({"stop": 3}, "stop is 3; give text, or a list of texts"),
        ({"stop": ["a", None]}, r"stop\[1\] is None; give text"),
        ({"stop": [""]}, "stop holds an empty text"),
        ({"stop": ["x"] * 257}, "stop has 257 texts; give at most 256"),
        ({"stop_ids": "a"}, "stop_ids is 'a'; give a list of token ids"),
        ({"stop_ids": [10**6]}, r"stop_ids\[0\] is 1000000"),
        ({"logit_bias": {3: "x"}}, r"logit_bias\[3\] is 'x'; give a number"),
        ({"logit_bias": [3]}, r"logit_bias is \[3\] of type list; give a dict"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"prompt_logprobs": 1}, "prompt_logprobs is 1; give True or False"),
        ({"n": 0}, "n is 0"),
        ({"n": 2}, "n is 2, but nothing is left to chance"),
        ({"best_of": 2}, "best_of is 2, but nothing is left to chance"),
        ({"n": 3, "best_of": 2, "temperature": 1.0}, "best_of is 2; give a whole number from 3"),
        ({"best_of": 2, "temperature": 1.0, "logprobs": None}, "best_of is 2, which is told by logprobs"),
        ({"choices": ["a"], "regex": "a"}, "choices and regex are given; a text can follow one of them"),
        ({"regex": 3}, "regex is 3; give text"),
        ({"json_schema": "{}"}, "json_schema is '{}'; give a JSON schema as a dict"),
        ({"on_error": "ignore"}, "on_error is 'ignore'; give 'raise' or 'return'"),
        ({"max_tokens": 3}, r"unknown setting 'max_tokens' \(did you mean max_new_tokens\?\)"),
    ],
)
def test_a_wrong_setting_is_named(model, settings, message):
    with pytest.raises(ValueError, match=message):
        model.generate("a red", **settings)


def test_numbers_of_numpy_are_numbers(model):
    numpy = {"temperature": np.float32(0.5), "top_k": np.int64(3), "seed": np.int32(2), "max_new_tokens": np.int64(4)}
    plain = {"temperature": 0.5, "top_k": 3, "seed": 2, "max_new_tokens": 4}
    assert model.generate("a red", **numpy) == model.generate("a red", **plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": None}, "temperature is None"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"max_seconds": "3"}, "max_seconds is '3'; give a number"),
        ({"rate": None}, "rate is None; give a number"),
        ({"pauses": [1.0]}, "pauses is .* give a dict"),
        ({"pauses": {"1": 1.0}}, "a word's number in pauses is '1'"),
        ({"best_of": "2"}, "best_of is '2'"),
        ({"stop": "."}, "stop is '.'; give a function"),
        ({"max_new_tokens": 3}, "unknown setting 'max_new_tokens'"),
        ({"voice": 3}, "voice is 3; give text"),
    ],
)
def test_a_wrong_setting_of_speech_is_named(model, settings, message):
    with pytest.raises(ValueError, match=message):
        model.speak("one", **settings)


def test_a_model_is_loaded_with_fewer_bits_or_with_a_draft(model, tmp_path):
    folder = save_model(tmp_path / "m", model.model, model.tokenizer, generation=model.generation)
    expected = model.caption(images(3))
    drafted = mmllm.load(folder, draft=folder)
    assert drafted.engine.config.speculation == "draft" and drafted.caption(images(3)) == expected
    small = mmllm.load(folder, quantize="int8")
    assert len(small.caption(images(3))) == 3
    assert abs(small.caption(images(1)[0]).logprobs[0] - expected[0].logprobs[0]) < 0.3
    with pytest.raises(ValueError, match="quantize is 'int3'"):
        mmllm.load(folder, quantize="int3")
    with pytest.raises(FileNotFoundError):
        mmllm.load(folder, draft=tmp_path / "nowhere")
    bounded = mmllm.load(folder, engine=mmllm.EngineConfig(max_rows=2))
    assert bounded.engine.config.max_rows == 2 and bounded.caption(images(3)) == expected
