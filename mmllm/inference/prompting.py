"""What a model is asked, as prompts: pictures, sounds, text and conversations to documents.

Shapes: K codebooks, F frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

from torch import Tensor

from mmllm.checkpoints.settings import GenerationConfig
from mmllm.data.samples.decode import ImageTransform
from mmllm.data.samples.document import Document, DocumentWriter
from mmllm.data.samples.documents import build_prompt, media_slots
from mmllm.data.samples.sample import Segment
from mmllm.inference import arguments
from mmllm.inference.inputs import AudioPart, ImagePart, Part, PictureInput, as_image, parse_parts
from mmllm.inference.messages import ROLES, as_content, check_messages, message_parts
from mmllm.inference.prompts import join
from mmllm.model.multimodal import ModelConfig
from mmllm_tokenizers.chat import chat_pieces
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.vocab import END

Parts = Sequence[str | ImagePart | AudioPart]
_Task = Literal["caption", "transcribe", "speak", "text", "interleaved", "question", "chat"]


@dataclass(frozen=True)
class Prompter:
    """Writes a model's prompts, as training wrote them.

    Attributes:
        config: what the model can: see, hear, speak.
        tokenizer: of the model.
        image_transform: how images reach the tower.
        generation: how long the sounds are that the model hears.
        anchor: a text in front of every prompt but those of `plain`, as a recipe's `anchor_prompt` is in front of a
            source's documents; of a conversation, the system's first turn.
    """

    config: ModelConfig
    tokenizer: TokenizerFolder
    image_transform: ImageTransform
    generation: GenerationConfig
    anchor: str | None = None

    def anchored(self, anchor: str | None) -> Prompter:
        """The same with another anchor; None: with the one that it has.

        Raises:
            ValueError: it is no text, or empty.
        """
        return self if anchor is None else replace(self, anchor=check_anchor(anchor))

    def caption(self, image: PictureInput, name: str = "image") -> Document:
        """An image, for its caption."""
        self.need_sight()
        return self._prompt("caption", image=as_image(image, name))

    def transcript(self, codes_KF: Tensor) -> Document:
        """A sound's codes, for its transcript."""
        self.need_hearing()
        return self._prompt("transcribe", audio=codes_KF)

    def question(self, parts: Part | Sequence[Part], question: str) -> Document:
        """Text, images and sounds with a question about them, for the answer."""
        return self._prompt("question", segments=self._segments(parse_parts(parts)), question=question)

    def continuation(self, parts: Parts) -> Document:
        """What is to be continued: of the `text` task if it is text alone, else `interleaved`."""
        if all(isinstance(part, str) for part in parts):
            return self._prompt("text", text="".join(parts))  # type: ignore[arg-type]
        return self._prompt("interleaved", segments=self._segments(parts))

    def plain(self, parts: Parts) -> Document:
        """Text, images and sounds with nothing added to them, neither special nor task tokens."""
        documents = []
        segments = iter(self._segments([part for part in parts if not isinstance(part, str)]))
        for part in parts:
            if isinstance(part, str):
                documents.append(self._text(part, is_target=False))
            else:
                documents.append(media_slots(next(segments), self.tokenizer, self.image_transform))
        return join(documents) if documents else self._text("", is_target=False)

    def chat(self, messages: Sequence[Mapping[str, Any]], reads_files: bool = True) -> Document:
        """A conversation, for the assistant's next message.

        Args:
            messages: see `Model.chat`.
            reads_files: as of `mmllm.inference.messages.message_parts`.

        Raises:
            ValueError: it is no conversation, a part can't be read, or the chat template refuses it.
        """
        template = self.tokenizer.chat_template
        roles, last = (ROLES, ("user",)) if template is None else (None, ("user", "tool"))
        checked = check_messages(messages, roles, last)
        if self.anchor is not None:
            checked = _after_anchor(self.anchor, checked, reads_files)
        if template is not None:
            return self._templated(template, checked, reads_files)
        documents: list[Document] = []
        numbered = enumerate(checked)
        for answers, turn in groupby(numbered, key=lambda pair: pair[1]["role"] == "assistant"):
            said = _as_one_turn([_parts_of(message, number, reads_files) for number, message in turn])
            if answers and not documents:
                documents.append(self._turn(()))  # training writes an empty question
            documents.append(self._said(said) if answers else self._turn(said))
        return join(documents)

    def codes(self, sounds: Sequence[AudioPart]) -> list[Tensor]:
        """Codes [K, F] of each sound, encoded in batches.

        Raises:
            ValueError: the model doesn't hear.
        """
        if not sounds:
            return []
        self.need_hearing()
        audio = self.tokenizer.require_audio()
        return audio.encode_batch([audio.prepare(sound.wave_CT, sound.sample_rate) for sound in sounds])

    def is_long(self, sound: AudioPart) -> bool:
        """Whether a sound is longer than any that training heard."""
        longest = self.generation.max_heard_seconds
        return longest is not None and sound.seconds > longest + 1 / self.tokenizer.frame_rate

    def check_length(self, sound: AudioPart, name: str) -> None:
        """Refuses a sound that is longer than the model hears at once.

        Raises:
            ValueError: it is.
        """
        if self.is_long(sound):
            raise ValueError(
                f"{name} lasts {sound.seconds:.1f} s; this model hears {self.generation.max_heard_seconds:g} s at "
                f"once, the longest that training heard; cut it into pieces, or transcribe it"
            )

    def need_sight(self) -> None:
        """Raises a ValueError where the model doesn't see."""
        self._need(self.config.vision, "see", "images")

    def need_hearing(self) -> None:
        """Raises a ValueError where the model doesn't hear."""
        self._need(self.config.audio, "hear", "sounds")

    def need_speech(self) -> None:
        """Raises a ValueError where the model doesn't speak."""
        self._need(self.config.audio, "speak", "texts to be spoken")
        self.tokenizer.check_speech()

    def _templated(self, template: str, messages: Sequence[Mapping[str, Any]], reads_files: bool) -> Document:
        """A conversation as the model's own chat template writes it."""
        media: list[ImagePart | AudioPart] = []
        written = []
        for number, message in enumerate(messages):
            if message.get("content") is None:
                written.append(dict(message))
                continue
            parts = _parts_of(message, number, reads_files)
            media += [part for part in parts if not isinstance(part, str)]
            written.append({**message, "content": as_content(parts)})
        segments = iter(self._segments(media))
        documents = []
        for piece in chat_pieces(self.tokenizer.text, template, written):
            if piece.kind == "text":
                writer = DocumentWriter(self.tokenizer)
                writer.ids(piece.ids, is_target=False)
                documents.append(writer.finish())
            else:
                documents.append(media_slots(next(segments), self.tokenizer, self.image_transform))
        return join(documents)

    def _turn(self, parts: Parts) -> Document:
        """What is asked in a conversation, whose anchor is a message of its own."""
        return replace(self, anchor=None)._prompt("chat", segments=self._segments(parts))

    def _said(self, parts: Parts) -> Document:
        if not all(isinstance(part, str) for part in parts):
            raise ValueError("an assistant's message holds an image or a sound; it can hold text alone")
        end = DocumentWriter(self.tokenizer)
        end.ids([self.tokenizer.id(END)], is_target=True)
        return join([self._text("".join(parts), is_target=True), end.finish()])  # type: ignore[arg-type]

    def _text(self, text: str, is_target: bool) -> Document:
        writer = DocumentWriter(self.tokenizer)
        writer.ids(self.tokenizer.text.encode(text), is_target=is_target)
        return writer.finish()

    def _prompt(
        self,
        task: _Task,
        text: str | None = None,
        image: Any = None,
        audio: Tensor | None = None,
        segments: Sequence[Segment] = (),
        question: str | None = None,
    ) -> Document:
        return build_prompt(
            task,
            self.tokenizer,
            text=text,
            image=image,
            audio=audio,
            segments=segments,
            question=question,
            transform=self.image_transform,
            anchor=self.anchor,
        )

    def _segments(self, parts: Parts) -> list[Segment]:
        if any(isinstance(part, ImagePart) for part in parts):
            self.need_sight()
        sounds = [part for part in parts if isinstance(part, AudioPart)]
        if sounds:
            self.need_hearing()
        for number, sound in enumerate(sounds, start=1):
            self.check_length(sound, f"sound {number} of {len(sounds)}")
        codes = iter(self.codes(sounds))
        segments = []
        for part in parts:
            match part:
                case str():
                    segments.append(Segment(text=part))
                case ImagePart():
                    segments.append(Segment(image=part.image))
                case AudioPart():
                    segments.append(Segment(audio=next(codes)))
        return segments

    def _need(self, part: object | None, verb: str, noun: str) -> None:
        if part is None:
            raise ValueError(f"this model does not {verb}, but {noun} were given; use a model that was trained to")


def check_anchor(anchor: Any) -> str:
    """A text that can be in front of prompts.

    Raises:
        ValueError: it is no text, or empty.
    """
    if not arguments.text("anchor", anchor).strip():
        raise ValueError("anchor is empty; give the text of the recipe's anchor_prompt, or leave it out")
    return anchor


def _after_anchor(anchor: str, messages: Sequence[Mapping[str, Any]], reads_files: bool) -> list[Mapping[str, Any]]:
    """A conversation behind an anchor, as `build_document` has it: what the system says is a line of that turn."""
    first, *others = messages
    said: list[Any] = [{"type": "text", "text": anchor}]  # no file's name, whatever it says
    if first["role"] != "system" or first.get("content") is None:
        return [{"role": "system", "content": said}, *messages]
    for number, part in enumerate(_parts_of(first, 0, reads_files)):
        is_text = isinstance(part, str)
        said.append({"type": "text", "text": part if number else f"\n{part}"} if is_text else part)
    return [{**first, "content": said}, *others]


def _parts_of(message: Mapping[str, Any], number: int, reads_files: bool) -> list[str | ImagePart | AudioPart]:
    """A message's parts; what a system or an assistant says in one string is text, whatever it says."""
    content, name = message["content"], f"messages[{number}].content"
    if isinstance(content, str) and message["role"] != "user":
        return [content]
    return message_parts(content, name, reads_files)


def _as_one_turn(messages: Sequence[Parts]) -> list[str | ImagePart | AudioPart]:
    """Parts of messages that become one turn; a line break parts their texts, as in training (`joined_texts`)."""
    turn: list[str | ImagePart | AudioPart] = []
    for parts in messages:
        is_joined = bool(turn) and isinstance(turn[-1], str) and isinstance(parts[0], str)
        turn += [f"\n{parts[0]}", *parts[1:]] if is_joined else parts
    return turn
