"""The engine: whatever else it answers, in whatever pieces, each request gets what it would get alone."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Sequence

import pytest
import torch

from mmllm.checkpoints.settings import Sampling
from mmllm.data.samples.document import Document
from mmllm.data.samples.documents import build_prompt
from mmllm.inference.api import Model
from mmllm.inference.engine.engine import Engine
from mmllm.inference.engine.requests import (
    EngineConfig,
    Request,
    Result,
    SpeechRequest,
    SpokenUnits,
    TextRequest,
    TextResult,
    TextUpdate,
    UnitsUpdate,
)
from mmllm.inference.engine.thread import EngineThread
from mmllm.inference.pacing import Pace
from mmllm.inference.prompts import join, pad_left
from mmllm_tokenizers.pointer import PointerRule
from tests.inference_fixtures import images, make, sounds

DRAWN = Sampling(temperature=1.0, seed=4)
SHORT = Pace(max_letter_seconds=0.05, variation=1.0)
LONG_TEXT = "one two three, he said: a red circle above two blue squares " * 3


@pytest.fixture(scope="module", params=["pointer", "no pointer"])
def model(request) -> Model:
    return make("delay", pointer=PointerRule() if request.param == "pointer" else None)


def prompt_of(model: Model, number: int) -> Document:
    """Captions, transcripts, text of several lengths."""
    kind = number % 3
    if kind == 0:
        return build_prompt("caption", model.tokenizer, image=images(8)[number % 8])
    if kind == 1:
        return build_prompt("transcribe", model.tokenizer, audio=sounds(8)[number % 8])
    return build_prompt("text", model.tokenizer, text=LONG_TEXT[: 5 + 7 * number])


def requests_of(model: Model, count: int = 12) -> list[Request]:
    """Rows that write and rows that speak, greedy and drawn, short and long."""
    made: list[Request] = []
    for number in range(count):
        sampling = DRAWN if number % 2 else Sampling()
        if number % 4 == 3:
            prompt = build_prompt("speak", model.tokenizer, text=LONG_TEXT[: 3 + number], voice="he")
            made.append(SpeechRequest(prompt, (sampling,), 3 + number, SHORT, number))
        else:
            made.append(TextRequest(prompt_of(model, number), sampling, 3 + number, number=number, num_logprobs=2))
    return made


def alone(model: Model, requests: Sequence[Request]) -> list[Result]:
    config = EngineConfig(max_rows=1, prefix_cache_bytes=0)
    return [Engine(model.model, model.tokenizer, config).run([request])[0] for request in requests]


def check_equal(got: Sequence[Result], wanted: Sequence[Result], atol: float = 1e-4) -> None:
    for own, want in zip(got, wanted, strict=True):
        if isinstance(want, SpokenUnits):
            assert isinstance(own, SpokenUnits)
            assert torch.equal(own.codes_KF, want.codes_KF) and own.is_whole == want.is_whole
            assert (own.pointer_F is None) == (want.pointer_F is None)
            assert own.pointer_F is None or torch.equal(own.pointer_F, want.pointer_F)
            assert own.num_bounded == want.num_bounded
        else:
            assert isinstance(own, TextResult)
            assert (own.ids, own.text, own.finish_reason) == (want.ids, want.text, want.finish_reason)
            assert own.logprobs == pytest.approx(want.logprobs, abs=atol)


def uncached_ids(model: Model, prompt: Document, count: int) -> list[int]:
    """Greedy, by whole passes over the text so far: slow and obvious."""
    text, ids = model.tokenizer.text, []
    for _ in range(count):
        said = build_prompt("text", model.tokenizer, text="x")
        said = dataclasses.replace(
            said, token_ids_T=said.token_ids_T[:0], targets_T=said.targets_T[:0], modality_T=said.modality_T[:0],
            codes_TK=said.codes_TK[:0], pointer=None,
        )  # fmt: skip
        if ids:
            import numpy as np

            said = dataclasses.replace(
                said, token_ids_T=np.array(ids), targets_T=np.ones(len(ids), dtype=bool),
                modality_T=np.zeros(len(ids), dtype=np.int64),
                codes_TK=np.full((len(ids), prompt.codes_TK.shape[1]), -1),
            )  # fmt: skip
        document = join([prompt, said]) if ids else prompt
        with torch.no_grad():
            logits_V = model.model.logits(pad_left([document]))[0, -1, : model.tokenizer.vocabulary.num_text]
        allowed_V = torch.zeros(len(logits_V), dtype=torch.bool)
        allowed_V[: text.num_tokens] = True
        allowed_V[list(text.hidden_ids)] = False
        allowed_V[list(text.end_ids)] = True
        token_id = int(logits_V.masked_fill(~allowed_V, -torch.inf).argmax())
        if token_id in text.end_ids:
            break
        ids.append(token_id)
    return ids


def test_what_is_written_is_what_whole_passes_find(model):
    requests = [TextRequest(prompt_of(model, number), max_new_tokens=8) for number in range(6)]
    for request, result in zip(requests, Engine(model.model, model.tokenizer).run(requests), strict=True):
        assert list(result.ids) == uncached_ids(model, request.prompt, 8)


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(),
        EngineConfig(max_rows=3),
        EngineConfig(prefill_tokens=7),
        EngineConfig(prefix_cache_bytes=0),
        EngineConfig(block_size=4),
        EngineConfig(max_rows=5, prefill_tokens=11, block_size=3),
        EngineConfig(deterministic=True),
        EngineConfig(speculation="lookup"),
        EngineConfig(speculation="lookup", max_rows=2, block_size=3, most_drafts=3),
    ],
)
def test_a_row_gets_what_it_gets_alone(model, config):
    requests = requests_of(model)
    check_equal(Engine(model.model, model.tokenizer, config).run(requests), alone(model, requests))


def test_rows_may_come_at_any_step(model):
    requests = requests_of(model)
    engine = Engine(model.model, model.tokenizer, EngineConfig(max_rows=4))
    tickets = []
    for request in requests:
        tickets.append(engine.submit(request))
        engine.step()
    engine.finish(tickets)
    check_equal([ticket.result() for ticket in tickets], alone(model, requests))
    assert engine.num_running == engine.num_waiting == engine.num_positions == 0


def test_deterministic_rows_are_the_same_bit_for_bit(model):
    requests = [request for request in requests_of(model) if isinstance(request, TextRequest)]
    engine = Engine(model.model, model.tokenizer, EngineConfig(deterministic=True))
    together = engine.run(requests)
    for own, want in zip(together, [engine.run([request])[0] for request in reversed(requests)][::-1], strict=True):
        assert own.logprobs == want.logprobs


def test_the_same_beginning_is_computed_once(model):
    engine = Engine(model.model, model.tokenizer, EngineConfig(block_size=4))
    picture, others = prompt_of(model, 0), requests_of(model)
    first = TextRequest(picture, max_new_tokens=4, num_logprobs=0)
    engine.run(others)
    wanted = engine.run([first])[0]
    again = engine.run([first, dataclasses.replace(first, prompt=copy.deepcopy(picture), number=3)])
    check_equal(again, [wanted, wanted])
    assert [result.cost.num_cached_tokens for result in again] == [picture.num_tokens] * 2
    base = build_prompt("text", model.tokenizer, text=LONG_TEXT)
    longer = build_prompt("text", model.tokenizer, text=LONG_TEXT + "he said")
    engine.run([TextRequest(base, max_new_tokens=1)])
    (result,) = engine.run([TextRequest(longer, max_new_tokens=6, num_logprobs=0)])
    num_common = (
        next(n for n in range(base.num_tokens) if base.token_ids_T[n] != longer.token_ids_T[n])
        if (base.token_ids_T != longer.token_ids_T[: base.num_tokens]).any()
        else base.num_tokens
    )
    assert result.cost.num_cached_tokens == num_common // 4 * 4 > 8
    check_equal([result], alone(model, [TextRequest(longer, max_new_tokens=6, num_logprobs=0)]))


def test_other_pictures_in_the_same_words_are_not_confused(model):
    engine = Engine(model.model, model.tokenizer, EngineConfig(block_size=2))
    requests = [TextRequest(prompt_of(model, 3 * number), max_new_tokens=6, num_logprobs=0) for number in range(8)]
    check_equal([engine.run([request])[0] for request in requests], alone(model, requests))


def test_other_weights_are_noticed(model):
    model = Model(copy.deepcopy(model.model), model.tokenizer)
    request = TextRequest(prompt_of(model, 0), max_new_tokens=6, num_logprobs=0)
    engine = Engine(model.model, model.tokenizer)
    (before,) = engine.run([request])
    with torch.no_grad():
        for parameter in model.model.decoder.parameters():
            parameter.mul_(1.1)
    (after,) = engine.run([request])
    assert after.logprobs != before.logprobs
    check_equal([after], alone(model, [request]))


def test_rows_that_were_taken_out_go_on_where_they_were(model):
    """In a cache with room for two large rows, six that grow large."""
    make_room = EngineConfig(max_cached_tokens=256 * 8, max_rows=6, prefix_cache_bytes=0)
    requests: list[Request] = []
    for number in range(6):
        text = build_prompt("text", model.tokenizer, text=LONG_TEXT[: 20 + number])
        requests.append(
            TextRequest(text, DRAWN, 330, min_new_tokens=330, number=number, num_logprobs=0)
            if number % 3
            else SpeechRequest(
                build_prompt("speak", model.tokenizer, text=LONG_TEXT[:60] * 2), (DRAWN,), 300,
                Pace(max_letter_seconds=0.1), number,
            )
        )  # fmt: skip
    engine = Engine(model.model, model.tokenizer, make_room)
    results = engine.run(requests)
    assert engine.counts.preemptions > 0
    check_equal(results, alone(model, requests), atol=1e-3)


def test_a_row_that_no_cache_can_hold_ends_at_its_length(model):
    config = EngineConfig(max_cached_tokens=256)
    prompt = build_prompt("text", model.tokenizer, text="he said")
    (result,) = Engine(model.model, model.tokenizer, config).run([TextRequest(prompt, DRAWN, 2000, 2000)])
    assert result.finish_reason == "length" and 256 - prompt.num_tokens <= len(result.ids) <= 256
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens"):
        Engine(model.model, model.tokenizer, config).run(
            [TextRequest(build_prompt("text", model.tokenizer, text=LONG_TEXT * 20))]
        )


def test_updates_together_are_the_result(model):
    requests = requests_of(model)
    engine = Engine(model.model, model.tokenizer)
    told: list[list] = [[] for _ in requests]
    tickets = [engine.submit(request, own.append) for request, own in zip(requests, told, strict=True)]
    engine.finish(tickets)
    for ticket, updates in zip(tickets, told, strict=True):
        result = ticket.result()
        if isinstance(result, TextResult):
            assert all(isinstance(update, TextUpdate) for update in updates)
            assert "".join(update.text for update in updates) == result.text
            assert tuple(token_id for update in updates for token_id in update.ids) == result.ids
        else:
            assert all(isinstance(update, UnitsUpdate) for update in updates)
            assert torch.equal(torch.cat([update.codes_KF for update in updates], dim=1), result.codes_KF)
            if result.pointer_F is not None:
                assert torch.equal(torch.cat([update.pointer_F for update in updates]), result.pointer_F)
    check_equal([ticket.result() for ticket in tickets], alone(model, requests))


def test_a_request_can_be_ended_at_any_time(model):
    requests = requests_of(model)
    wanted = alone(model, requests)
    for num_steps in range(5):
        engine = Engine(model.model, model.tokenizer, EngineConfig(max_rows=9))
        tickets = [engine.submit(request) for request in requests]
        for _ in range(num_steps):
            engine.step()
        for ticket in tickets[::3]:
            engine.cancel(ticket)
            assert ticket.is_done
        engine.finish(tickets)
        for number, (ticket, want) in enumerate(zip(tickets, wanted, strict=True)):
            result = ticket.result()
            if number % 3:
                check_equal([result], [want])
            elif isinstance(result, TextResult) and isinstance(want, TextResult):
                assert result.ids == want.ids[: len(result.ids)]
                assert len(result.ids) <= num_steps
        assert engine.num_positions == 0


def test_a_listener_that_fails_ends_its_own_request_alone(model):
    requests = requests_of(model)
    engine = Engine(model.model, model.tokenizer)

    def fail(update: object) -> None:
        raise KeyError("the listener's")

    def leave(update: object) -> None:
        engine.cancel(tickets[1])

    listeners = [fail, leave, *[None] * 10]
    tickets = [engine.submit(request, listener) for request, listener in zip(requests, listeners, strict=True)]
    engine.finish(tickets)
    with pytest.raises(KeyError, match="the listener's"):
        tickets[0].result()
    assert tickets[1].result().finish_reason == "cancelled"
    check_equal([ticket.result() for ticket in tickets[2:]], alone(model, requests)[2:])


def test_a_prompt_that_cannot_be_computed_ends_alone(model):
    requests = requests_of(model)
    broken = prompt_of(model, 0)
    picture = dataclasses.replace(broken.images[0], num_slots=broken.images[0].num_slots - 1)
    requests[0] = TextRequest(dataclasses.replace(broken, images=(picture,)))
    engine = Engine(model.model, model.tokenizer)
    tickets = engine.submit_all(requests)
    engine.finish(tickets)
    with pytest.raises(ValueError, match="image slots"):
        tickets[0].result()
    check_equal([ticket.result() for ticket in tickets[1:]], alone(model, requests[1:]))


def test_a_step_that_fails_leaves_an_engine_that_goes_on(model, monkeypatch):
    requests = requests_of(model)
    engine = Engine(model.model, model.tokenizer, EngineConfig(max_rows=4))
    tickets = engine.submit_all(requests)
    engine.step()
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine._running, "_forward", lambda *_: 1 / 0)
        engine.step()
    failed = [ticket.is_done and ticket.error is not None for ticket in tickets]
    assert 0 < sum(failed) <= 4
    engine.finish(tickets)
    for ticket, has_failed, want in zip(tickets, failed, alone(model, requests), strict=True):
        if has_failed:
            with pytest.raises(ZeroDivisionError):
                ticket.result()
        else:
            check_equal([ticket.result()], [want])


def test_many_threads_share_steps(model):
    requests = requests_of(model)
    wanted = alone(model, requests)
    engine = Engine(model.model, model.tokenizer)
    got: dict[int, Result] = {}

    def ask(number: int) -> None:
        (got[number],) = engine.run([requests[number]])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check_equal([got[number] for number in range(len(requests))], wanted)


def test_a_listener_may_not_step(model):
    requests = requests_of(model)
    engine = Engine(model.model, model.tokenizer)
    tickets = [engine.submit(requests[0], lambda _: engine.step()), *map(engine.submit, requests[1:])]
    engine.finish(tickets)
    with pytest.raises(RuntimeError, match="a listener steps the engine"):
        tickets[0].result()
    check_equal([ticket.result() for ticket in tickets[1:]], alone(model, requests)[1:])


def test_an_interrupt_leaves_an_engine_that_goes_on(model, monkeypatch):
    requests = requests_of(model)
    engine = Engine(model.model, model.tokenizer)

    def interrupt(ready: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        engine.run(requests[:1])
        patch.setattr(engine._running, "advance", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.run(requests)
    assert engine.num_running == engine.num_waiting == 0
    check_equal(engine.run(requests), alone(model, requests))


def test_training_mode_of_parts_is_left_as_it_was(model):
    parts = Model(copy.deepcopy(model.model), model.tokenizer)
    parts.model.train()
    parts.model.decoder.layers[0].eval()
    before = [module.training for module in parts.model.modules()]
    Engine(parts.model, parts.tokenizer).run(requests_of(model))
    assert [module.training for module in parts.model.modules()] == before


def test_speech_of_any_bound(model):
    """Also where the last letter is passed so late that the other codebooks' codes lie beyond the bound."""
    prompt = build_prompt("speak", model.tokenizer, text="one two")
    for bound in range(1, 30):
        text = TextRequest(prompt_of(model, 2), DRAWN, 30, 30)
        speech, other = Engine(model.model, model.tokenizer).run(
            [SpeechRequest(prompt, (DRAWN,), bound, SHORT, bound), text]
        )
        assert isinstance(speech, SpokenUnits)
        assert speech.codes_KF.shape[1] <= bound and (speech.is_whole or speech.codes_KF.shape[1] > 0)
        assert len(other.ids) == 30


def test_a_row_grows_beside_one_that_enters(model):
    """In the step in which another's prompt is computed, which must make room, or wait."""
    config = EngineConfig(max_cached_tokens=1024, prefix_cache_bytes=0)
    long = TextRequest(build_prompt("text", model.tokenizer, text="he said"), DRAWN, 400, 400, num_logprobs=0)
    other = TextRequest(prompt_of(model, 2), DRAWN, 20, 20, num_logprobs=0)
    wanted = alone(model, [long, other])
    for num_steps in range(240, 262):
        engine = Engine(model.model, model.tokenizer, config)
        tickets = [engine.submit(long)]
        for _ in range(num_steps):
            engine.step()
        tickets.append(engine.submit(other))
        engine.finish(tickets)
        check_equal([ticket.result() for ticket in tickets], wanted, atol=1e-3)


@pytest.mark.parametrize("speculation", ["lookup", "draft"])
def test_a_row_that_is_cancelled_while_it_was_taken_out_leaves_nothing(model, speculation):
    draft = copy.deepcopy(model.model) if speculation == "draft" else None
    config = EngineConfig(max_cached_tokens=256 * 5, max_rows=3, prefix_cache_bytes=0, speculation=speculation)
    engine = Engine(model.model, model.tokenizer, config, draft)
    prompt = build_prompt("text", model.tokenizer, text="he said one two")
    tickets = [engine.submit(TextRequest(prompt, DRAWN, 330, 330, number=number)) for number in range(3)]
    while not engine.counts.preemptions:
        engine.step()
    for ticket in tickets:
        engine.cancel(ticket)
    drafter = engine._running._drafter
    assert engine.num_positions == 0
    assert not (drafter._texts if speculation == "lookup" else drafter._cached)


def test_prompts_in_fewer_bits_are_the_same_in_pieces(model):
    for kv_dtype in ("int8", "bfloat16"):
        requests = [request for request in requests_of(model) if isinstance(request, TextRequest)]
        results = [
            Engine(model.model, model.tokenizer, EngineConfig(kv_dtype=kv_dtype, **more)).run(requests)
            for more in ({"prefix_cache_bytes": 0, "max_rows": 1}, {"prefill_tokens": 5, "block_size": 4})
        ]
        check_equal(*results)


def test_a_cancelled_texts_updates_are_its_text(model):
    request = TextRequest(prompt_of(model, 2), DRAWN, 40, 40, stop=("never seen", "\n\n\n"))
    for num_steps in range(2, 30, 3):
        engine, told = Engine(model.model, model.tokenizer), []
        ticket = engine.submit(request, told.append)
        for _ in range(num_steps):
            engine.step()
        engine.cancel(ticket)
        assert "".join(update.text for update in told) == ticket.result().text


def test_a_thread_loses_no_request(model):
    """Whether or not somebody is told, and stopped at any moment."""
    for _ in range(3):
        engine = Engine(model.model, model.tokenizer)
        thread, tickets = EngineThread(engine), []
        thread.start()

        def ask(thread: EngineThread = thread, tickets: list = tickets) -> None:
            for _ in range(40):
                try:
                    tickets.append(thread.submit(TextRequest(prompt_of(model, 2), DRAWN, 60, 60)))
                except RuntimeError:
                    return

        askers = [threading.Thread(target=ask) for _ in range(3)]
        for asker in askers:
            asker.start()
        threading.Event().wait(0.05)
        thread.stop()
        for asker in askers:
            asker.join()
        assert tickets and all(ticket.is_done for ticket in tickets)


def test_a_thread_that_fails_ends_its_requests(model, monkeypatch, caplog):
    thread = EngineThread(Engine(model.model, model.tokenizer))
    done = []
    with thread, monkeypatch.context() as patch:
        patch.setattr(thread.engine, "step", lambda: 1 / 0)
        ticket = thread.submit(requests_of(model)[0], on_done=done.append)
        assert ticket.wait(30)
        while thread.is_alive:
            threading.Event().wait(0.01)
        with pytest.raises(RuntimeError, match="isn't running"):
            thread.submit(requests_of(model)[0])
    assert done == [ticket] and "has failed" in caplog.text


def test_a_thread_answers_in_the_background(model):
    requests = requests_of(model)
    done = []
    with EngineThread(Engine(model.model, model.tokenizer)) as thread:
        tickets = [thread.submit(request, on_done=done.append) for request in requests]
        assert all(ticket.wait(30) for ticket in tickets)
        late = thread.submit(TextRequest(prompt_of(model, 2), DRAWN, 4000, 4000), on_done=done.append)
    assert late.result().finish_reason == "cancelled"
    assert set(done) == {*tickets, late}
    check_equal([ticket.result() for ticket in tickets], alone(model, requests))
    with pytest.raises(RuntimeError, match="isn't running"):
        thread.submit(requests[0])


def test_the_prompts_own_log_probabilities(model):
    prompt = join([prompt_of(model, 0), build_prompt("text", model.tokenizer, text=LONG_TEXT[:30])])
    request = TextRequest(prompt, max_new_tokens=2, prompt_logprobs=True)
    with torch.no_grad():
        logits_TV = model.model.logits(pad_left([prompt]))[0, :, : model.tokenizer.vocabulary.num_text]
    wanted = logits_TV.log_softmax(dim=-1)
    for config in (EngineConfig(), EngineConfig(prefill_tokens=5)):
        engine = Engine(model.model, model.tokenizer, config)
        engine.run([TextRequest(prompt, max_new_tokens=2)])
        (result,) = engine.run([request])
        assert result.prompt_logprobs is not None
        for place, value in enumerate(result.prompt_logprobs):
            is_text = prompt.modality_T[place] == 0
            assert (value is None) == (place == 0 or not is_text)
            if value is not None:
                assert value == pytest.approx(float(wanted[place - 1, prompt.token_ids_T[place]]), abs=1e-4)


def test_a_text_ends_at_a_stop_string_and_not_too_soon(model):
    request = TextRequest(prompt_of(model, 2), DRAWN, 30, min_new_tokens=30)
    (whole,) = Engine(model.model, model.tokenizer).run([request])
    stop = whole.text[len(whole.text) // 2 :][:2]
    (cut,) = Engine(model.model, model.tokenizer).run([dataclasses.replace(request, stop=("never", stop))])
    assert cut.finish_reason == "stop" and cut.stop == stop
    assert cut.text == whole.text[: whole.text.index(stop)]


@pytest.mark.parametrize("kind", ["lookup", "itself", "another"])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_what_was_guessed_changes_nothing_but_the_speed(model, kind, num_rows):
    """Greedy rows and drawn ones."""
    text = "one two three, one two three, one two three, he said: one two"
    requests = []
    for number in range(6):
        sampling = Sampling(temperature=0.7, seed=2) if number % 2 and kind != "itself" else Sampling()
        prompt = build_prompt("text", model.tokenizer, text=text[: 30 + 5 * number])
        if number == 2:
            prompt = prompt_of(model, 0)
        requests.append(TextRequest(prompt, sampling, 25 + number, number=number, num_logprobs=1, min_new_tokens=9))
    draft = None
    if kind != "lookup":
        torch.manual_seed(8)
        draft = copy.deepcopy(model.model)
        if kind == "another":
            with torch.no_grad():
                for parameter in draft.decoder.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
    config = EngineConfig(speculation="lookup" if draft is None else "draft", max_rows=num_rows, most_drafts=6)
    engine = Engine(model.model, model.tokenizer, config, draft)
    told: list[list] = [[] for _ in requests]
    tickets = [engine.submit(request, own.append) for request, own in zip(requests, told, strict=True)]
    engine.finish(tickets)
    wanted = alone(model, requests)
    check_equal([ticket.result() for ticket in tickets], wanted)
    for ticket, updates in zip(tickets, told, strict=True):
        assert "".join(update.text for update in updates) == ticket.result().text
    plain = Engine(model.model, model.tokenizer, EngineConfig(max_rows=num_rows))
    plain.run(requests)
    if kind == "itself":
        assert engine.counts.steps < plain.counts.steps / 2
    assert engine.counts.steps <= plain.counts.steps


@pytest.mark.parametrize(("kv_dtype", "share", "nats"), [("bfloat16", 0.5, 0.05), ("int8", 0.25, 0.1)])
def test_keys_and_values_in_fewer_bits(model, kv_dtype, share, nats):
    """Less memory, and nearly the same: log-probabilities of a given text, alone, beside others, and from the cache."""
    text = build_prompt("text", model.tokenizer, text=LONG_TEXT)
    request = TextRequest(text, max_new_tokens=9, min_new_tokens=9, num_logprobs=0, logit_bias={40: 100.0})
    (plain,) = alone(model, [request])
    engine = Engine(model.model, model.tokenizer, EngineConfig(kv_dtype=kv_dtype, block_size=8))
    for others in ([], requests_of(model), requests_of(model)):
        (*_, got) = engine.run([*others, request])
        assert got.ids == plain.ids == (40,) * 9
        assert got.logprobs == pytest.approx(plain.logprobs, abs=nats) and got.logprobs != plain.logprobs
    assert got.cost.num_cached_tokens == text.num_tokens
    sizes = []
    for config in (EngineConfig(kv_dtype=kv_dtype), EngineConfig()):
        engine = Engine(model.model, model.tokenizer, config)
        engine.run([request])
        sizes.append(sum(block.kv_LPF.nbytes for block in engine._prefixes._blocks.values()))
    assert sizes[0] == share * sizes[1]


def test_a_prompt_and_its_text_stay_within_what_the_model_takes(model):
    prompt = prompt_of(model, 2)
    engine = Engine(model.model, model.tokenizer, EngineConfig(max_length=prompt.num_tokens + 4))
    (result,) = engine.run([TextRequest(prompt, DRAWN, 50, 50)])
    assert len(result.ids) == 4 and result.finish_reason == "length"
    with pytest.raises(ValueError, match=rf"the prompt has {prompt.num_tokens} tokens; this model takes 5 at most"):
        Engine(model.model, model.tokenizer, EngineConfig(max_length=5)).submit(TextRequest(prompt))
