"""A model that is served, under its name, with the thread that answers for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmllm.inference.api import Model
from mmllm.inference.engine.engine import Engine
from mmllm.inference.engine.thread import EngineThread
from mmllm.serving.config import ServeConfig
from mmllm.serving.errors import bad_request
from mmllm.serving.limits import Admission, ListeningClock

DEFAULT_VOICE = "default"
"""Leaves the voice to the model, as none does."""


class ServedModel:
    """A model with its engine's thread and its bounds.

    Args:
        name: by which clients ask for it.
        model: as `mmllm.load` gives it.
        config: bounds.
    """

    def __init__(self, name: str, model: Model, config: ServeConfig) -> None:
        self.name = name
        self.model = model
        self.prompter = model.prompter
        self.thread = EngineThread(model.engine)
        self.admission = Admission(self.engine.config.max_rows, config.max_queue)
        self.config = config
        self._clocks: set[ListeningClock] = set()
        num_streams = config.max_speaking or self.engine.config.max_rows
        self.speaking = Admission(num_streams, 0, "streams of sound")
        self.created = int(time.time())
        has_template = model.tokenizer.chat_template is not None
        self.takes_conversations = has_template if config.conversations is None else config.conversations

    @contextmanager
    def streaming(self) -> Iterator[ListeningClock]:
        """A place for a stream of sound, and its clock.

        Where no bound is given, there are fewer places behind a stream that came too late than there were streams
        beside it, and one more behind a stream that came in time while somebody was refused.

        Raises:
            ApiError: 429, there is none, or those that stream come too late already.
        """
        places = self.speaking
        if any(clock.is_late for clock in self._clocks):
            raise places.full("sounds are being streamed slower than they are listened to")
        with places.enter():
            clock, num_refused = ListeningClock(), places.num_refused
            self._clocks.add(clock)
            for each in self._clocks:
                each.most_streams = max(each.most_streams, len(self._clocks))
            try:
                yield clock
            finally:
                self._clocks.discard(clock)
                if self.config.max_speaking is None and clock.was_late:
                    places.max_running = max(1, min(places.max_running, clock.most_streams - 1))
                elif self.config.max_speaking is None and places.num_refused > num_refused:
                    places.max_running = min(places.max_running + 1, self.engine.config.max_rows)

    @property
    def engine(self) -> Engine:
        """What answers."""
        return self.thread.engine

    @property
    def sees(self) -> bool:
        """Whether it takes pictures."""
        return self.model.model.config.vision is not None

    @property
    def hears(self) -> bool:
        """Whether it takes sounds."""
        return self.model.model.config.audio is not None

    @property
    def speaks(self) -> bool:
        """Whether it says texts."""
        return self.hears and self.model.tokenizer.keeps_durations

    @property
    def voices(self) -> tuple[str, ...]:
        """That can be asked for by name."""
        return self.model.generation.voices if self.hears else ()

    def voice(self, given: str | None, param: str) -> str | None:
        """A voice that a client asked for; None: the model's own choice.

        Raises:
            ApiError: there is none of this name.
        """
        if given is None or given == DEFAULT_VOICE or given in self.voices:
            return None if given == DEFAULT_VOICE else given
        known = ", ".join(self.voices[:8]) + (", …" if len(self.voices) > 8 else "")
        hint = f"{self.name} speaks as {known} (GET /v1/models lists all)" if known else f"{self.name} knows no names"
        raise bad_request(
            f"there is no voice {given[:80]!r}; {hint}; or give {DEFAULT_VOICE!r}", param, "unknown_voice"
        )

    def to_dict(self) -> dict[str, Any]:
        """As `/v1/models` lists it."""
        audio = self.model.tokenizer.audio
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "mmllm",
            "voices": list(self.voices),
            "input_modalities": ["text", *(["image"] if self.sees else []), *(["audio"] if self.hears else [])],
            "output_modalities": ["text", *(["audio"] if self.speaks else [])],
            "conversations": self.takes_conversations,
            "sample_rate": None if audio is None else audio.sample_rate,
            "max_heard_seconds": self.model.generation.max_heard_seconds,
        }
