"""Answers piece by piece, from several threads, and beside an event loop: the same answers."""

from __future__ import annotations

import asyncio
import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from mmllm.inference.completion import TextPiece
from tests.inference_fixtures import images, make, sounds

MESSAGES = [{"role": "user", "content": ["see ", images(1)[0]]}]
CALLS = {
    "caption": (images(1)[0],),
    "transcribe": (sounds(1)[0],),
    "answer": (["see ", images(1)[0]], "how many?"),
    "generate": (["a ", images(1)[0], " is"],),
    "chat": (MESSAGES,),
}
DRAWN = {"temperature": 1.0, "seed": 4, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.mark.parametrize("task", CALLS)
def test_pieces_together_are_the_whole(model, task):
    whole = getattr(model, task)(*CALLS[task], **DRAWN)
    stream = model.stream(task, *CALLS[task], **DRAWN)
    with pytest.raises(ValueError, match="still being written"):
        _ = stream.result
    pieces = list(stream)
    assert len(pieces) > 2 and all(isinstance(piece, TextPiece) and isinstance(piece, str) for piece in pieces)
    assert "".join(pieces) == whole == stream.result
    ids = [token for piece in pieces for token in piece.ids]
    assert tuple(ids[: len(whole.ids)]) == whole.ids == stream.result.ids
    logprobs = [number for piece in pieces for number in piece.logprobs or ()]
    np.testing.assert_allclose(logprobs[: len(whole.ids)], whole.logprobs[: len(whole.ids)], atol=1e-4)
    assert stream.result.finish_reason == whole.finish_reason
    assert list(stream) == [], "it is at its end"


def test_a_stop_string_is_never_streamed(model):
    whole = model.generate("a red", **DRAWN)
    stop = whole[6:9]
    pieces = list(model.stream("generate", "a red", stop=stop, **DRAWN))
    assert "".join(pieces) == whole[: whole.index(stop)]


def test_sound_is_streamed_as_it_is_spoken(model):
    for settings in ({"seed": 1}, {"temperature": 0, "max_seconds": 0.1}):
        whole = model.speak("a red circle", **settings)
        stream = model.stream("speak", "a red circle", **settings)
        with pytest.raises(ValueError, match="still being spoken"):
            _ = stream.result
        pieces = list(stream)
        assert all(len(piece.samples) and piece.sample_rate == whole.sample_rate for piece in pieces)
        np.testing.assert_array_equal(np.concatenate([piece.samples for piece in pieces]), whole.samples)
        np.testing.assert_array_equal(stream.result.samples, whole.samples)
        np.testing.assert_array_equal(stream.result.codes_KF, whole.codes_KF)
        assert stream.result.is_whole == whole.is_whole


def test_a_stream_that_is_closed_leaves_nothing_behind(model):
    with model.stream("generate", "a red", max_new_tokens=200, logit_bias={}) as stream:
        next(stream)
        assert model.engine.num_running + model.engine.num_waiting == 1
    assert model.engine.num_running + model.engine.num_waiting == 0
    assert "".join(stream) == stream.result[1:] or stream.result.finish_reason == "cancelled"
    with model.stream("speak", "one") as spoken:
        pass
    list(spoken)
    assert not spoken.result.is_whole and model.engine.num_waiting == 0


def test_streams_side_by_side_do_not_disturb_each_other(model):
    streams = [model.stream("caption", image, **DRAWN) for image in images(4)]
    texts = [""] * 4
    for _ in range(30):
        for number, stream in enumerate(streams):
            texts[number] += next(stream, "")
    assert texts == model.caption(images(4), **DRAWN)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("sing", "a"), "task is 'sing'; give 'caption' or"),
        (("captoin", "a"), r"did you mean caption\?"),
        (("answer", "a"), "question is None and task 'answer'"),
        (("generate", "a", "why?"), "question is 'why[?]' and task 'generate'"),
        (("caption", images(2)), "caption is streamed of one item"),
        (("generate", [["a"], ["b"]]), "generate is streamed of one prompt"),
        (("speak", ""), "text is empty"),
    ],
)
def test_a_wrong_stream_is_explained(model, call, message):
    with pytest.raises(ValueError, match=message):
        model.stream(*call)


def test_what_a_stream_cannot_choose_is_refused(model):
    with pytest.raises(ValueError, match="best_of is 2; the best of several can't be streamed"):
        model.stream("generate", "a", best_of=2, temperature=1.0)
    with pytest.raises(ValueError, match="voice and recording are of 'speak'"):
        model.stream("generate", "a", voice="ann")
    with pytest.raises(ValueError, match="unknown setting 'n'"):
        model.stream("generate", "a", n=2)


def test_async_twins_give_the_same_and_leave_the_loop_free(model):
    async def all_at_once():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                await asyncio.sleep(0.001)
                ticks += 1

        clock = asyncio.create_task(tick())
        answers = await asyncio.gather(
            model.acaption(images(3)), model.atranscribe(sounds(1)[0]), model.agenerate("a red", n=2, **DRAWN),
            model.aanswer("a", "why?"), model.achat(MESSAGES), model.aembed("a red"), model.ascore("a ", "red"),
            model.aspeak("one", seed=2),
        )  # fmt: skip
        pieces = [piece async for piece in model.astream("generate", "a red", **DRAWN)]
        chunks = [piece async for piece in model.astream("speak", "one", seed=2)]
        clock.cancel()
        return answers, pieces, chunks, ticks

    answers, pieces, chunks, ticks = asyncio.run(all_at_once())
    captions, said, two, answered, reply, vector, score, speech = answers
    assert captions == model.caption(images(3)) and said == model.transcribe(sounds(1)[0])
    assert two == model.generate("a red", n=2, **DRAWN) and "".join(pieces) == two[0]
    assert answered == model.answer("a", "why?") and reply == model.chat(MESSAGES)
    assert torch.equal(vector, model.embed("a red")) and score == pytest.approx(model.score("a ", "red"))
    np.testing.assert_array_equal(np.concatenate([chunk.samples for chunk in chunks]), speech.samples)
    assert ticks > 3


def test_an_async_stream_that_is_left_is_ended(model):
    async def first():
        stream = model.astream("generate", "a red", max_new_tokens=200)
        async for piece in stream:
            await stream.aclose()  # pyright: ignore[reportAttributeAccessIssue]
            return piece

    assert asyncio.run(first()) is not None
    assert model.engine.num_running + model.engine.num_waiting == 0
    with pytest.raises(ValueError, match="temperature is None"):
        asyncio.run(model.acaption(images(1)[0], temperature=None))


def test_many_threads_get_the_answers_of_one(model):
    expected = model.caption(images(12), **DRAWN)
    with ThreadPoolExecutor(12) as pool:
        alone = list(pool.map(lambda image: model.caption(image, **DRAWN), images(12)))
        streamed = list(pool.map(lambda image: "".join(model.stream("caption", image, **DRAWN)), images(12)))
    assert alone == streamed == expected


def test_a_stream_can_be_closed_by_another_thread(model):
    stream = model.stream("generate", "a red", max_new_tokens=2000, logit_bias={})
    done = threading.Event()

    def take():
        for _ in stream:
            pass
        done.set()

    thread = threading.Thread(target=take)
    thread.start()
    stream.close()
    thread.join(30)
    assert done.is_set() and model.engine.num_running == 0


def test_a_copy_has_an_engine_of_its_own(model):
    twin = copy.deepcopy(model)
    assert twin.engine is not model.engine and twin.engine.model is twin.model is not model.model
    assert twin.generate("a red") == model.generate("a red")


def test_an_adapter_is_not_changed_under_way(model, monkeypatch):
    changed = []
    monkeypatch.setattr("mmllm.inference.api.set_adapter", lambda _, name: changed.append(name))
    stream = model.stream("generate", "a red")
    with pytest.raises(ValueError, match="1 requests are being answered; wait for them"):
        model.set_adapter("x")
    stream.close()
    model.set_adapter("x")
    assert changed == ["x"]
