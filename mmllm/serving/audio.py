"""`POST /v1/audio/speech` and `/v1/audio/transcriptions`."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import cast

from fastapi import Request
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.responses import Response

from mmllm.inference.engine.engine import Ticket
from mmllm.inference.engine.requests import Request as EngineRequest
from mmllm.inference.engine.requests import Result
from mmllm.inference.engine.thread import EngineThread
from mmllm.inference.inputs import AudioPart
from mmllm.inference.long_sound import SpeechModel, transcribe_long
from mmllm.inference.subtitles import to_srt, to_verbose_json, to_vtt
from mmllm.inference.text_settings import TextOptions, text_options
from mmllm.inference.transcripts import Transcript
from mmllm.serving import schemas
from mmllm.serving.errors import as_api_error, bad_request
from mmllm.serving.replies import Stream, event, while_wanted
from mmllm.serving.rows import Rows, running
from mmllm.serving.served import ServedModel
from mmllm.serving.sounds import MEDIA_TYPES, SoundWriter, check_format
from mmllm.serving.speech import SpokenSound, Utterance, utterance
from mmllm.serving.state import ServerState

_GRANULARITIES = {"words": "word", "segments": "segment"}
"""Keys of `verbose_json` and what asks for them."""


async def answer_speech(state: ServerState, body: schemas.SpeechRequest, request: Request) -> Response:
    """Speaks a text: the sound is sent as it is made.

    Raises:
        ApiError: it can't.
    """
    served = state.find(body.model)
    stack = AsyncExitStack()
    try:
        async with stack:
            served.prompter.need_speech()
            rate = served.model.tokenizer.require_audio().sample_rate
            check_format(body.response_format, rate, "response_format")
            given = body.voice.id if isinstance(body.voice, schemas.VoiceId) else body.voice
            voice = served.voice(given, "voice")
            stack.enter_context(served.admission.enter())
            clock = stack.enter_context(served.streaming())

            def said() -> Utterance:
                return utterance(served, state.config, body.input, voice, body.speed, body.temperature, body.seed)

            async def begin() -> tuple[Utterance, Rows]:
                spoken = await state.decode(said)
                return spoken, await stack.enter_async_context(running(served.thread, state.waiting, [spoken.request]))

            spoken, rows = await while_wanted(begin(), request, state.lifecycle)
            pieces = _spoken_pieces(SpokenSound(state, served, spoken, clock), rows, state, body)
            if body.stream_format == "sse":
                return Stream(_sound_events(pieces, served, body), stack.pop_all(), state.lifecycle, state.metrics)
            headers = {"X-Sample-Rate": str(rate)}
            media_type = MEDIA_TYPES[body.response_format]
            if body.response_format == "pcm":
                media_type = f"audio/pcm;rate={rate};channels=1"
            return Stream(pieces, stack.pop_all(), state.lifecycle, state.metrics, media_type, headers, is_events=False)
    except ValueError as error:
        raise as_api_error(error) from error
    raise AssertionError("the stack swallows nothing")


async def _spoken_pieces(
    sound: SpokenSound, rows: Rows, state: ServerState, body: schemas.SpeechRequest
) -> AsyncIterator[bytes]:
    started, is_first = time.monotonic(), True
    writer = SoundWriter(body.response_format, sound.sample_rate)
    async for samples_T in sound.pieces(rows):
        if is_first:
            state.metrics.note_first(body.model, time.monotonic() - started)
            is_first = False
        if piece := writer.write(samples_T):
            yield piece
    if piece := writer.finish():
        yield piece


async def _sound_events(
    pieces: AsyncIterator[bytes], served: ServedModel, body: schemas.SpeechRequest
) -> AsyncIterator[bytes]:
    """OpenAI's events of a spoken text."""
    async for piece in pieces:
        yield event({"type": "speech.audio.delta", "audio": base64.b64encode(piece).decode()})
    num_tokens = len(served.model.tokenizer.text.encode(body.input))
    usage = {"input_tokens": num_tokens, "output_tokens": 0, "total_tokens": num_tokens}
    yield event({"type": "speech.audio.done", "usage": usage})


async def answer_transcription(
    state: ServerState, form: schemas.TranscriptionForm, data: bytes, request: Request
) -> Response:
    """Writes down a sound of any length.

    Args:
        state: of the server.
        form: the fields of the request.
        data: its file's content.
        request: of the client.

    Raises:
        ApiError: it can't.
    """
    served = state.find(form.model)
    stack = AsyncExitStack()
    try:
        async with stack:
            served.prompter.need_hearing()
            stack.enter_context(served.admission.enter())
            options = _options(form, served)

            def sound() -> AudioPart:
                return state.reader().sound(data, "file")

            heard = await while_wanted(state.decode(sound, "file"), request, state.lifecycle)
            if form.stream:
                pieces = _transcript_events(state, served, heard, options)
                return Stream(pieces, stack.pop_all(), state.lifecycle, state.metrics)
            if "word" in form.timestamp_granularities and served.model.model.ctc_head is None:
                raise bad_request(
                    f"{served.name} can't tell when words are said (it has no CTC head); leave word out",
                    "timestamp_granularities",
                )
            transcript = await while_wanted(_transcribed(state, served, heard, options), request, state.lifecycle)
            return transcript_response(transcript, form)
    except ValueError as error:
        raise as_api_error(error) from error
    raise AssertionError("the stack swallows nothing")


def _options(form: schemas.TranscriptionForm, served: ServedModel) -> TextOptions:
    settings = {} if form.temperature is None else {"temperature": form.temperature}
    return text_options(settings, served.model.generation, served.model.tokenizer)


async def _transcribed(state: ServerState, served: ServedModel, sound: AudioPart, options: TextOptions) -> Transcript:
    """The transcript of a sound; its rows are ended when this is cancelled."""
    hearer = _Hearer(served)

    def work() -> list[Transcript]:
        return transcribe_long(cast(SpeechModel, hearer), [sound], options)

    try:
        (transcript,) = await state.decode(work, "file", state.hearing)
    finally:
        hearer.engine.is_cancelled.set()
    return transcript


def transcript_response(transcript: Transcript, form: schemas.TranscriptionForm) -> Response:
    """A transcript in the format that a form asks for.

    Words whose times aren't known, since the text doesn't fit the sound, are left out of `words`.
    """
    seconds = {"type": "duration", "seconds": round(transcript.seconds, 3)}
    match form.response_format:
        case "text":
            return PlainTextResponse(f"{transcript.text}\n")
        case "srt":
            return PlainTextResponse(to_srt(transcript))
        case "vtt":
            return PlainTextResponse(to_vtt(transcript), media_type="text/vtt")
        case "json":
            return JSONResponse({"text": transcript.text, "usage": seconds})
    timed = tuple(segment for segment in transcript.segments if segment.words is not None)
    words = to_verbose_json(replace(transcript, segments=timed))["words"]
    value = {**to_verbose_json(transcript), "words": words, "usage": seconds}
    value["language"] = form.language or value["language"]
    wanted = form.timestamp_granularities or ["segment"]
    left_out = [key for key, name in _GRANULARITIES.items() if name not in wanted]
    return JSONResponse({key: each for key, each in value.items() if key not in left_out})


async def _transcript_events(
    state: ServerState, served: ServedModel, sound: AudioPart, options: TextOptions
) -> AsyncIterator[bytes]:
    """OpenAI's events of a transcript, segment by segment: all windows are written at once, and then joined."""
    transcript = await _transcribed(state, served, sound, options)
    for number, segment in enumerate(transcript.segments):
        yield event({"type": "transcript.text.delta", "delta": f"{' ' if number else ''}{segment.text}"})
    yield event({"type": "transcript.text.done", "text": transcript.text})


class _Hearer:
    """A served model as `transcribe_long` asks for it."""

    def __init__(self, served: ServedModel) -> None:
        self.model = served.model.model
        self.tokenizer = served.model.tokenizer
        self.generation = served.model.generation
        self.engine = _WaitingEngine(served.thread)


class _WaitingEngine:
    """Runs rows in an engine's thread and waits for them, until they are no longer wanted."""

    def __init__(self, thread: EngineThread) -> None:
        self._thread = thread
        self.is_cancelled = threading.Event()

    def run(self, requests: Sequence[EngineRequest]) -> list[Result]:
        """As `Engine.run`."""
        tickets: list[Ticket] = []
        try:
            for request in requests:
                tickets.append(self._thread.submit(request))
            for ticket in tickets:
                while not ticket.wait(0.1):
                    if self.is_cancelled.is_set():
                        raise bad_request("the request was given up")
            return [ticket.result() for ticket in tickets]
        finally:
            for ticket in tickets:
                if not ticket.is_done:
                    self._thread.cancel(ticket)
