"""What the page asks its models, without anything of Gradio: pictures, sounds and texts in, answers out."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmllm.data.samples.document import Document
from mmllm.data.samples.sample import Segment
from mmllm.evaluation.answer_traces import AnswerTrace, trace_answer
from mmllm.evaluation.speech_traces import SpeechTrace, trace_speech
from mmllm.inference.api import Model
from mmllm.inference.engine.requests import SpokenUnits, TextRequest, TextResult
from mmllm.inference.inputs import Audio, AudioPart, ImagePart, TextPart, as_audio, as_image
from mmllm.inference.pacing import Pace
from mmllm.inference.speaking import Waveform, speech_options
from mmllm.inference.transcripts import Transcript

MAX_SENTENCES = 12
"""That are spoken one by one; what is more is said with the last."""
MAX_CHARACTERS = 1000
"""Of a text to be spoken."""
MAX_MESSAGES = 40
"""Of a conversation, that are remembered."""
_SENTENCE = re.compile(r"(?<=[.!?…])\s+|\n+")
_BY_TASK = (
    "this model was not trained on conversations; it answers one message by task: a picture alone or with 'caption', a "
    "sound alone or with 'transcribe', a picture or a sound with a question, or a text alone that it is to speak"
)

MessagePart = ImagePart | AudioPart | TextPart


@dataclass(frozen=True, eq=False)
class Spoken:
    """A sentence that was spoken."""

    text: str
    waveform: Waveform
    prompt: Document
    units: SpokenUnits


@dataclass(frozen=True, eq=False)
class Answer:
    """An answer, and what it takes to look into it."""

    text: str
    asker: Asker
    prompt: Document | None = None
    """None: it is speech, or was put together from parts of a long sound."""
    result: TextResult | None = None
    """None: the text was put together from what was written, and its tokens are taken anew to look into it."""
    seconds: float = 0.0
    spoken: tuple[Spoken, ...] = ()
    """Sentences, where it was spoken."""

    @property
    def has_trace(self) -> bool:
        """Whether it can be looked into."""
        return self.prompt is not None or bool(self.spoken)

    def speech_traces(self) -> list[SpeechTrace]:
        """How each sentence came about."""
        with self.asker.in_use() as model:
            return [
                trace_speech(model.model, model.tokenizer, each.prompt, each.text, each.units) for each in self.spoken
            ]

    def trace(self) -> AnswerTrace:
        """How it came about.

        Raises:
            ValueError: it can't be told.
        """
        if self.prompt is None:
            raise ValueError("this answer can't be looked into: it is of a sound that was heard in parts, or speech")
        with self.asker.in_use() as model:
            ids = model.tokenizer.text.encode(self.text) if self.result is None else self.result.ids
            has_ended = self.result is None or self.result.finish_reason == "stop"
            return trace_answer(model.model, model.tokenizer, self.prompt, ids, has_ended)


@dataclass(frozen=True, eq=False)
class Conversation:
    """What was said so far, as `Model.chat` takes it; the oldest messages are forgotten."""

    messages: tuple[dict[str, Any], ...] = ()

    def said(self, parts: Sequence[MessagePart], answer: str) -> Conversation:
        """With another message and its answer."""
        new = (
            {"role": "user", "content": [_as_given(part) for part in parts]},
            {"role": "assistant", "content": answer},
        )
        return Conversation((*self.messages, *new)[-MAX_MESSAGES:])


@dataclass(eq=False)
class SharedModel:
    """A model that answers one question at a time, with whichever adapter is asked for.

    Attributes:
        model: the model.
        adapter: that it runs with now; None: with none.
    """

    model: Model
    adapter: str | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @contextmanager
    def with_adapter(self, name: str | None) -> Iterator[Model]:
        """The model, for the caller alone."""
        with self._lock:
            if name != self.adapter:
                self.model.set_adapter(name)
                self.adapter = name
            yield self.model


@dataclass(frozen=True, eq=False)
class Asker:
    """A model that the page asks, with one of its adapters or none.

    Attributes:
        name: what it is called beside another.
        shared: the model, which may be another's too, with another adapter.
        adapter: None: the model alone.
        conversations: whether it is asked with all that was said before; None: if it has a chat template.
    """

    name: str
    shared: SharedModel
    adapter: str | None = None
    conversations: bool | None = None

    @property
    def model(self) -> Model:
        """To be looked at; who asks it takes turns by `in_use`."""
        return self.shared.model

    def in_use(self) -> AbstractContextManager[Model]:
        """The model with the adapter, for the caller alone."""
        return self.shared.with_adapter(self.adapter)

    @property
    def converses(self) -> bool:
        """Whether it answers conversations; else each message by its task."""
        return self.model.tokenizer.chat_template is not None if self.conversations is None else self.conversations

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
    def has_pace(self) -> bool:
        """Whether its speech can be made faster or slower."""
        return self.model.model.pointer is not None

    @property
    def voices(self) -> tuple[str, ...]:
        """It speaks as these."""
        return self.model.generation.voices

    def caption(self, path: str | Path) -> Answer:
        """What is in a picture."""
        with self.in_use() as model:
            return self._written(model, model.caption_prompt(Path(path)))

    def transcribe(self, path: str | Path) -> tuple[Transcript, Answer]:
        """What is said in a sound, and when."""
        started = time.monotonic()
        with self.in_use() as model:
            part = as_audio(Path(path))
            sound = Audio(part.wave_CT, part.sample_rate)
            transcript = model.transcribe(sound, timestamps=True)
            seconds = time.monotonic() - started
            is_whole = bool(transcript.text) and not model.prompter.is_long(part)
            prompt = model.transcript_prompt(sound) if is_whole else None
        return transcript, Answer(transcript.text, self, prompt, seconds=seconds)

    def speak(self, text: str, voice: str | None = None, rate: float = 1.0) -> Iterator[Spoken]:
        """A text, sentence by sentence.

        Raises:
            ValueError: it is empty or too long, or the voice is unknown.
        """
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"the text has {len(text)} characters; give at most {MAX_CHARACTERS}")
        if voice is not None and voice not in self.voices:
            raise ValueError(f"there is no voice {voice!r}; choose one of the menu")
        parts = sentences(text)
        if not parts:
            raise ValueError("there is nothing to say; write a text first")
        for sentence in parts:
            with self.in_use() as model:
                spoken = _spoken(model, sentence, voice, {"rate": rate} if self.has_pace and rate != 1.0 else {})
            yield spoken

    def answer(self, before: Conversation, parts: Sequence[MessagePart], aloud: bool = False) -> Answer:
        """The answer to a message.

        Args:
            before: what was said so far; a model without conversations doesn't see it.
            parts: of the message.
            aloud: its text is to be spoken.

        Raises:
            ValueError: the model can't answer it; the message says what it can.
        """
        if not parts:
            raise ValueError("the message is empty; write something, or add a picture or a sound")
        texts = [part.text for part in parts if isinstance(part, TextPart)]
        media = [part for part in parts if not isinstance(part, TextPart)]
        text = " ".join(texts).strip()
        if aloud or (not media and not self.converses):
            return self._aloud(text, media)
        with self.in_use() as model:
            if not self.converses:
                return self._written(model, _by_task(model, media, text))
            message = {"role": "user", "content": [_as_given(part) for part in parts]}
            return self._written(model, model.chat_prompt([*before.messages, message]))

    def _aloud(self, text: str, media: Sequence[ImagePart | AudioPart]) -> Answer:
        if media or not text or not self.speaks:
            raise ValueError(
                "only a text alone can be spoken; leave pictures and sounds out, or ask to be answered in writing"
                if self.speaks
                else "this model does not speak; ask to be answered in writing"
            )
        started = time.monotonic()
        spoken = tuple(self.speak(text))
        return Answer(text, self, seconds=time.monotonic() - started, spoken=spoken)

    def _written(self, model: Model, prompt: Document) -> Answer:
        result = _written(model, prompt)
        return Answer(result.text, self, prompt, result, result.cost.seconds)


def _written(model: Model, prompt: Document) -> TextResult:
    """What a model writes by its own settings."""
    request = TextRequest(prompt, model.generation.text, model.generation.max_new_tokens)
    (result,) = model.engine.run([request])
    assert isinstance(result, TextResult), "a text was asked for"
    return result


def _spoken(model: Model, text: str, voice: str | None, settings: dict[str, Any]) -> Spoken:
    """What a model says, as `Model.speak` does, with the units that it drew."""
    options = speech_options(settings, model.generation, model.model.pointer is not None)
    (request,) = model.speaker.requests(text, voice, options)
    (units,) = model.engine.run([request])
    assert isinstance(units, SpokenUnits), "speech was asked for"
    waveform = model.speaker.waveform(units, text, options.pace or Pace(), None)
    return Spoken(text, waveform, request.prompt, units)


def _by_task(model: Model, media: Sequence[ImagePart | AudioPart], text: str) -> Document:
    """What a message asks of a model that knows tasks alone; see `mmllm.serving.tasks`, which does so for programs."""
    match media, text.casefold().rstrip("."):
        case [ImagePart(image=image)], "" | "caption":
            return model.caption_prompt(image)
        case [AudioPart() as sound], "" | "transcribe":
            return model.transcript_prompt(Audio(sound.wave_CT, sound.sample_rate))
        case [_, *_], word if word not in ("", "caption", "transcribe"):
            return model.prompter.question([*media], text)  # pyright: ignore[reportArgumentType]
    raise ValueError(_BY_TASK)


def _as_given(part: MessagePart) -> Any:
    """As `Model.chat` takes it: text in which nothing is looked for, and media as they are."""
    return Segment(text=part.text) if isinstance(part, TextPart) else part


def sentences(text: str) -> list[str]:
    """A text's sentences; those beyond `MAX_SENTENCES` are one with the last of these."""
    parts = [part.strip() for part in _SENTENCE.split(text) if any(map(str.isalnum, part))]
    return [*parts[: MAX_SENTENCES - 1], " ".join(parts[MAX_SENTENCES - 1 :])] if len(parts) > MAX_SENTENCES else parts


def message_parts(text: str, files: Sequence[str | Path]) -> list[MessagePart]:
    """Files and text of a message; a file is what its content says, whatever its name ends in.

    Raises:
        ValueError: a file is neither picture nor sound.
    """
    parts: list[MessagePart] = [_media(Path(path)) for path in files]
    if text.strip():
        parts.append(TextPart(text.strip()))
    return parts


def _media(path: Path) -> ImagePart | AudioPart:
    try:
        return ImagePart(as_image(path))
    except ValueError:
        pass
    try:
        return as_audio(path)
    except ValueError as error:
        raise ValueError(f"{path.name} is neither a picture nor a sound that can be read") from error
