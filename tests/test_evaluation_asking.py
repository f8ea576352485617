"""How evaluation asks: the model's own answers, and blind ones that nothing seen or heard changes."""

from __future__ import annotations

import numpy as np
import pytest

from mmllm.checkpoints.settings import Sampling
from mmllm.data.samples.sample import Segment
from mmllm.evaluation.asking import AskedModel
from tests.inference_fixtures import images, make, sounds


@pytest.fixture(scope="module")
def model():
    return make()


def test_answers_are_the_models_own(model):
    asked = AskedModel(model)
    parts, questions = [["see ", image] for image in images(2)], ["how many?", "red?"]
    assert asked.caption(images(3), 12, 2) == model.caption(images(3))
    assert asked.transcribe(sounds(3), 12, 2) == model.transcribe(sounds(3))
    assert asked.answer(parts, questions, 12, 2) == model.answer(parts, questions)
    texts = [Segment(text="a red"), Segment(text="two")]
    greedy = asked.continue_texts(texts, 8, Sampling())
    assert greedy == model.generate([["a red"], ["two"]], max_new_tokens=8)


def test_the_blind_see_and_hear_nothing(model):
    counts: list[int] = []
    asked = AskedModel(model, counts.append)
    alike = asked.caption(images(3), 12, 8, blind=True)
    assert len(set(alike)) == 1 and counts == [1], "prompts that are alike are asked once"
    assert len(set(asked.caption(images(3), 12, 8))) > 1
    same_length = [(sound[0][:700], sound[1]) for sound in sounds(3)]
    assert len(set(asked.transcribe(same_length, 12, 8, blind=True))) == 1
    assert len(set(asked.transcribe(same_length, 12, 8))) > 1
    parts = [["see ", image] for image in images(2)]
    assert len(set(asked.answer(parts, ["how many?"] * 2, 12, 8, blind=True))) == 1


def test_what_rows_draw_differs_by_their_places(model):
    counts: list[int] = []
    asked = AskedModel(model, counts.append)
    first, second = asked.speak(["one", "one"], [None, None], 3, max_seconds=0.2)
    np.testing.assert_array_equal(first.codes_KF, model.speak("one", seed=3, max_seconds=0.2).codes_KF)
    assert first.codes_KF.shape != second.codes_KF.shape or (first.codes_KF != second.codes_KF).any()
    assert sum(counts) == 2
    drawn = asked.continue_texts([Segment(text="a red")] * 3, 8, Sampling(temperature=1.0, seed=1))
    assert len(set(drawn)) > 1
