"""Texts to sound, while their units are being spoken. Whole answers are the same stream, put together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from mmllm.inference.engine.requests import Cost, SpeechRequest, SpokenUnits, UnitsUpdate
from mmllm.inference.pacing import Pace
from mmllm.inference.speaking import speech_options
from mmllm.inference.streaming_sound import SoundStream
from mmllm.serving.config import ServeConfig
from mmllm.serving.drawing import seed_of
from mmllm.serving.errors import bad_request
from mmllm.serving.limits import ListeningClock
from mmllm.serving.rows import Rows
from mmllm.serving.served import ServedModel
from mmllm.serving.state import ServerState

_SHARE, _MOST_FRAMES = 6, 8
"""Of the frames that are there, a piece has one part of so many, up to so many frames."""
_SURE_SPEED, _KEPT_SECONDS = 2.0, 0.4
"""See `may_begin`."""


@dataclass(frozen=True)
class Utterance:
    """A text that is to be spoken.

    Attributes:
        text: what to say.
        request: of the engine.
        pace: how fast the sound is.
    """

    text: str
    request: SpeechRequest
    pace: Pace


def utterance(
    served: ServedModel,
    config: ServeConfig,
    text: str,
    voice: str | None,
    rate: float = 1.0,
    temperature: float | None = None,
    seed: int | None = None,
) -> Utterance:
    """A text as it is to be spoken.

    Raises:
        ApiError: the model doesn't speak, or not so; or the text is too long.
        ValueError: the library refuses a value.
    """
    model = served.model
    served.prompter.need_speech()
    if not text.strip():
        raise bad_request("the text to be spoken is empty; give words", "input")
    if len(text) > config.max_speech_characters:
        raise bad_request(
            f"the text has {len(text)} characters; this server speaks {config.max_speech_characters} at once: cut it "
            f"at the ends of sentences",
            "input",
            "text_too_long",
        )
    has_pointer = model.model.pointer is not None
    if rate != 1.0 and not has_pointer:
        raise bad_request(f"{served.name} can't be made faster or slower; leave speed out", "speed")
    settings: dict[str, Any] = {"seed": seed_of(seed)}
    if has_pointer:
        settings["rate"] = rate
    if temperature is not None:
        settings["temperature"] = temperature
    options = speech_options(settings, model.generation, has_pointer)
    (request,) = model.speaker.requests(text, voice, options)
    if request.prompt.num_tokens > config.max_context:
        raise bad_request(
            f"the text has {request.prompt.num_tokens} tokens; this server allows {config.max_context}",
            "input",
            "context_length_exceeded",
        )
    return Utterance(text, request, options.pace or Pace())


class SpokenSound:
    """The sound of a row that speaks.

    Args:
        state: of the server, whose thread for sound makes it.
        served: the model.
        said: what it speaks.
        clock: where the sound is streamed, of its listener.
    """

    def __init__(
        self, state: ServerState, served: ServedModel, said: Utterance, clock: ListeningClock | None = None
    ) -> None:
        self._clock = clock
        self._state = state
        self._served = served
        self._said = said
        self._num_frames = 0
        self._first_time: float | None = None
        self.cost = Cost()
        self.is_whole = True
        self.sample_rate = served.model.tokenizer.require_audio().sample_rate

    async def pieces(self, rows: Rows) -> AsyncIterator[np.ndarray]:
        """Samples float32 [T], as they become final; the first are kept until what follows will come in time.

        Args:
            rows: the row that speaks, alone.
        """
        kept: list[np.ndarray] = []
        has_begun = self._clock is None
        async for samples_T in self._made(rows):
            kept.append(samples_T)
            seconds = sum(map(len, kept)) / self.sample_rate
            has_begun = has_begun or may_begin(self._speed, seconds)
            if has_begun:
                yield self._noted(kept)
                self._wait()
                kept = []
        if kept:
            yield self._noted(kept)

    async def _made(self, rows: Rows) -> AsyncIterator[np.ndarray]:
        loop, pool = asyncio.get_running_loop(), self._state.sound
        stream = await loop.run_in_executor(pool, self._stream)
        waiting: list[UnitsUpdate] = []
        num_waiting = 0
        async for _, update in rows.updates():
            if update is not None:
                waiting.append(cast(UnitsUpdate, update))
                num_waiting += waiting[-1].codes_KF.shape[1]
                self._first_time = self._first_time or time.monotonic()
            # Each piece goes through a thread: few frames at first, then more, which changes nothing in the sound.
            if waiting and (update is None or num_waiting >= min(1 + self._num_frames // _SHARE, _MOST_FRAMES)):
                self._num_frames += num_waiting
                samples_T = await loop.run_in_executor(pool, _pushed, stream, waiting)
                num_waiting, waiting = 0, []
                if len(samples_T):
                    yield samples_T
        spoken = cast(SpokenUnits, rows.result(0))
        self.cost, self.is_whole = spoken.cost, spoken.is_whole
        samples_T = await loop.run_in_executor(pool, stream.finish, spoken.is_whole)
        if len(samples_T):
            yield samples_T

    @property
    def _speed(self) -> float:
        """Seconds of speech that are made in a second, from the first frame on."""
        if self._first_time is None:
            return 0.0
        seconds = (self._num_frames - 1) / self._served.model.tokenizer.frame_rate
        return seconds / max(time.monotonic() - self._first_time, 1e-6)

    def _stream(self) -> SoundStream:
        return SoundStream(self._served.model.tokenizer, self._said.text, self._said.pace)

    def _noted(self, pieces: list[np.ndarray]) -> np.ndarray:
        samples_T = np.concatenate(pieces)
        seconds = len(samples_T) / self.sample_rate
        self._state.metrics.note_sound(self._served.name, seconds)
        if self._clock is not None:
            self._clock.add(seconds)
        return samples_T

    def _wait(self) -> None:
        if self._clock is not None:
            self._clock.wait()


def may_begin(speed: float, kept_seconds: float) -> bool:
    """Whether a stream of sound may begin.

    Pieces of sound grow, each by half (`mmllm.inference.streaming_sound`): where frames are made much faster than they
    are heard, the next piece is always there in time. Where they are made hardly faster, with many streams at once, the
    first listener's seconds must cover what the pieces' growth takes.

    Args:
        speed: seconds of speech that are made in a second.
        kept_seconds: that are there.
    """
    return speed >= _SURE_SPEED or kept_seconds >= _KEPT_SECONDS


def _pushed(stream: SoundStream, updates: Sequence[UnitsUpdate]) -> np.ndarray:
    return np.concatenate([stream.push(each.codes_KF, each.pointer_F) for each in updates])
