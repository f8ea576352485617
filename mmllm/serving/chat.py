"""`POST /v1/chat/completions`: answers in text and in speech, whole and as they come."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, cast

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from mmllm.inference.engine.requests import Cost, TextRequest, TextResult, TextUpdate
from mmllm.inference.text_settings import TextOptions
from mmllm.serving import schemas
from mmllm.serving.drawing import chat_logprobs, drawing_options, text_requests, usage
from mmllm.serving.errors import as_api_error, bad_request
from mmllm.serving.limits import ListeningClock
from mmllm.serving.replies import Stream, event, while_wanted
from mmllm.serving.rows import Rows, running
from mmllm.serving.served import ServedModel
from mmllm.serving.sounds import SoundWriter, check_format
from mmllm.serving.speech import SpokenSound, utterance
from mmllm.serving.state import ServerState
from mmllm.serving.tasks import plan_chat

SOUND_SECONDS = 3600
"""Of `expires_at`: clients want one, though nothing is kept here that could expire."""


@dataclass(frozen=True)
class _Asked:
    """A request, decoded.

    Attributes:
        requests: texts to be written; none: `spoken` is spoken as it is.
        spoken: a text that was given to be spoken.
        options: how text is drawn.
    """

    requests: Sequence[TextRequest]
    spoken: str | None
    options: TextOptions


class ChatAnswer:
    """An answer on its way.

    Args:
        state: of the server.
        served: the model.
        body: of the request.
    """

    def __init__(self, state: ServerState, served: ServedModel, body: schemas.ChatRequest) -> None:
        self._state = state
        self._served = served
        self._body = body
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._started = time.monotonic()
        self._is_first = True
        self._costs: list[Cost] = []
        self._spoken_cost = Cost()
        self._voice: str | None = None
        self._clock: ListeningClock | None = None
        self._sound_id = f"audio_{uuid.uuid4().hex}"

    async def answer(self, request: Request) -> Response:
        """Answers: whole, or as a stream that has begun once nothing in the request can be wrong."""
        state, body = self._state, self._body
        self._check_sound()
        stack = AsyncExitStack()
        async with stack:
            stack.enter_context(self._served.admission.enter(body.n or 1))
            if body.is_spoken and body.stream:
                self._clock = stack.enter_context(self._served.streaming())
            asked, rows = await while_wanted(self._begin(stack), request, state.lifecycle)
            if not body.stream:
                return JSONResponse(await while_wanted(self._whole(asked, rows), request, state.lifecycle))
            pieces = self._spoken_events(asked, rows) if body.is_spoken else self._written_events(asked, rows)
            return Stream(pieces, stack.pop_all(), state.lifecycle, state.metrics)
        raise AssertionError("the stack swallows nothing")

    def _check_sound(self) -> None:
        body = self._body
        if not body.is_spoken:
            return
        self._served.prompter.need_speech()
        audio = body.audio or schemas.AudioOutput()
        given = audio.voice.id if isinstance(audio.voice, schemas.VoiceId) else audio.voice
        self._voice = self._served.voice(given, "audio.voice")
        check_format(audio.format, self._served.model.tokenizer.require_audio().sample_rate, "audio.format")
        if "text" not in (body.modalities or ()):
            raise bad_request(
                'modalities is ["audio"]; give ["text", "audio"]: a transcript comes with it', "modalities"
            )

    async def _begin(self, stack: AsyncExitStack) -> tuple[_Asked, Rows | None]:
        asked = await self._state.decode(self._decoded)
        if not asked.requests:
            return asked, None
        return asked, await stack.enter_async_context(running(self._served.thread, self._state.waiting, asked.requests))

    def _decoded(self) -> _Asked:
        body, served, config = self._body, self._served, self._state.config
        options = drawing_options(body, served, config)
        plan = plan_chat(body, served, self._state.reader())
        if plan.prompt is None:
            assert plan.spoken is not None
            utterance(served, config, plan.spoken, self._voice)  # what is wrong with it is said before a stream begins
            return _Asked((), plan.spoken, options)
        return _Asked(text_requests(plan.prompt, options, body.n or 1, served, config), None, options)

    # ---- whole

    async def _whole(self, asked: _Asked, rows: Rows | None) -> dict[str, Any]:
        results = [cast(TextResult, each) for each in await rows.results()] if rows is not None else []
        self._costs = [result.cost for result in results]
        if results:
            self._note_first(results[0].cost.first_seconds)
        choices = [self._choice(number, result, asked.options) for number, result in enumerate(results)]
        if self._body.is_spoken:
            text = results[0].text if results else asked.spoken or ""
            data, is_whole = await self._spoken(text)
            finish = (results[0].finish_reason if results else "stop") if is_whole else "length"
            sound = {"id": self._sound_id, "data": data, "expires_at": self._expiry, "transcript": text}
            message = {"role": "assistant", "content": None, "refusal": None, "audio": sound}
            choices = [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None}]
        return {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._served.name,
            "choices": choices,
            "usage": self._usage(),
        }

    def _choice(self, number: int, result: TextResult, options: TextOptions) -> dict[str, Any]:
        told = self._logprobs(options, result)
        return {
            "index": number,
            "message": {"role": "assistant", "content": result.text, "refusal": None},
            "finish_reason": result.finish_reason,
            "logprobs": None if told is None else {"content": told, "refusal": None},
        }

    async def _spoken(self, text: str) -> tuple[str, bool]:
        """Sound in base64, and whether all of the text is said."""
        pieces = [piece async for piece in self._sound(text)]
        return base64.b64encode(b"".join(pieces)).decode(), self._is_whole

    # ---- streams

    async def _written_events(self, asked: _Asked, rows: Rows | None) -> AsyncIterator[bytes]:
        assert rows is not None
        for number in range(len(asked.requests)):
            yield self._chunk(number, {"role": "assistant", "content": ""})
        self._costs = [Cost()] * len(asked.requests)
        async for number, update in rows.updates():
            if update is None:
                result = cast(TextResult, rows.result(number))
                self._costs[number] = result.cost
                yield self._chunk(number, {}, result.finish_reason)
                continue
            news = cast(TextUpdate, update)
            self._note_first()
            told = self._logprobs(asked.options, news)
            if news.text or told:
                yield self._chunk(number, {"content": news.text}, told=told)
        for last in self._usage_chunk():
            yield last

    async def _spoken_events(self, asked: _Asked, rows: Rows | None) -> AsyncIterator[bytes]:
        """The transcript as it is written, then the sound as it is made."""
        yield self._chunk(0, {"role": "assistant", "content": None, "audio": {"id": self._sound_id, "transcript": ""}})
        text, finish = asked.spoken or "", "stop"
        if rows is None:
            yield self._chunk(0, {"audio": {"transcript": text}})
        else:
            async for _, update in rows.updates():
                if update is not None and (piece := cast(TextUpdate, update).text):
                    self._note_first()
                    yield self._chunk(0, {"audio": {"transcript": piece}})
            result = cast(TextResult, rows.result(0))
            self._costs, text, finish = [result.cost], result.text, result.finish_reason
        async for piece in self._sound(text):
            yield self._chunk(0, {"audio": {"data": base64.b64encode(piece).decode()}})
        yield self._chunk(0, {"audio": {"expires_at": self._expiry}})
        yield self._chunk(0, {}, finish if self._is_whole else "length")
        for last in self._usage_chunk():
            yield last

    async def _sound(self, text: str) -> AsyncIterator[bytes]:
        """The answer's sound, in the format that was asked for."""
        state, served, audio = self._state, self._served, self._body.audio or schemas.AudioOutput()
        writer = SoundWriter(audio.format, served.model.tokenizer.require_audio().sample_rate)
        self._is_whole = True
        if text.strip():

            def said() -> Any:
                return utterance(served, state.config, text, self._voice, seed=self._body.seed)

            spoken_text = await state.decode(said)
            sound = SpokenSound(state, served, spoken_text, self._clock)
            async with running(served.thread, state.waiting, [spoken_text.request]) as rows:
                async for samples_T in sound.pieces(rows):
                    self._note_first()
                    if piece := writer.write(samples_T):
                        yield piece
            self._spoken_cost, self._is_whole = sound.cost, sound.is_whole
        if piece := writer.finish():
            yield piece

    # ---- parts of answers

    @property
    def _expiry(self) -> int:
        return self._created + SOUND_SECONDS

    def _chunk(
        self, number: int, delta: dict[str, Any], finish: str | None = None, told: list[Any] | None = None
    ) -> bytes:
        logprobs = None if told is None else {"content": told, "refusal": None}
        choice = {"index": number, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        return event(self._frame([choice]))

    def _frame(self, choices: list[Any]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._served.name,
            "choices": choices,
        }

    def _usage_chunk(self) -> Sequence[bytes]:
        options = self._body.stream_options
        if options is None or not options.include_usage:
            return ()
        return (event({**self._frame([]), "usage": self._usage()}),)

    def _usage(self) -> dict[str, Any]:
        return usage(self._costs, spoken=self._spoken_cost)

    def _logprobs(self, options: TextOptions, told: TextResult | TextUpdate) -> list[dict[str, Any]] | None:
        if options.num_logprobs is None or told.logprobs is None:
            return None
        tokenizer = self._served.model.tokenizer.text
        return chat_logprobs(tokenizer, told.ids, told.logprobs, told.top_logprobs, self._body.top_logprobs or 0)

    def _note_first(self, seconds: float | None = None) -> None:
        if self._is_first:
            self._is_first = False
            self._state.metrics.note_first(self._served.name, seconds or time.monotonic() - self._started)


async def answer_chat(state: ServerState, body: schemas.ChatRequest, request: Request) -> Response:
    """Answers a conversation.

    Raises:
        ApiError: it can't be answered.
    """
    try:
        return await ChatAnswer(state, state.find(body.model), body).answer(request)
    except ValueError as error:
        raise as_api_error(error) from error
