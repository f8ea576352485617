"""A sample and a task to the tokens of one document: the templates, the slots, the targets.

Training and inference both come through here, so a prompt is written the same way in both.

Shapes: K codebooks, F frames, L letters, S features a picture, C channels, M tiles, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from os import PathLike
from typing import Any

import numpy as np
import torch

from mmllm.batch import IGNORE
from mmllm.data.samples.conversations import Said, joined_texts, template_pieces
from mmllm.data.samples.decode import ImageInput, ImageTransform, picture_size
from mmllm.data.samples.document import NO_PIXELS, Document, DocumentWriter
from mmllm.data.samples.pointers import Pointer, spoken_pointer
from mmllm.data.samples.sample import WORDS, AudioInput, Sample, Segment, as_segment
from mmllm.data.samples.templates import (
    chat_pieces,
    interleaved_question,
    literal_ids,
    parse_template,
    spoken_voice,
    template_of,
)
from mmllm_tokenizers.alignment import read_words
from mmllm_tokenizers.audio import load_audio
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.pointer import Spelling, follow, letter_starts

Transform = Callable[..., np.ndarray]
"""A picture, what errors call it, and its tiles if it is cut, to pixels uint8 `[3, H, W]` or `[M, 3, H, W]`, as an
`ImageTransform` does."""

KIND_TASKS = {
    "caption": ("caption",),
    "interleaved": ("interleaved", "question", "chat"),
    "text": ("text",),
    "audio": ("transcribe", "speak"),
}
"""The tasks that each kind of source can be written as."""


def default_transform(folder: TokenizerFolder) -> ImageTransform:
    """The image transform that a tokenizer folder implies."""
    return ImageTransform(folder.image_size)


def build_document(
    sample: Sample,
    task: str,
    folder: TokenizerFolder,
    transform: Transform | None = None,
    template: Mapping[str, str] | None = None,
    anchor: str | None = None,
) -> Document:
    """The training document of one sample: the task's template, prompt and target.

    Only the target's tokens are to be predicted: of `interleaved`, all text; of `speak`, the units and their end; of
    `chat`, what the assistant says. Conversations are written by the folder's own chat template, where it has one.

    Args:
        sample: The row; its pictures and sounds may be paths, bytes or arrays.
        task: A key of the folder's templates.
        folder: Tokenizers and templates.
        transform: Pictures to pixels; by default what the folder implies.
        template: `prompt` and `target` instead of the folder's.
        anchor: A text in front of all, which is not to be predicted; of a conversation, the system's first turn.

    Raises:
        ValueError: The task is unknown, or the sample lacks what its template asks for, or can't be read.
    """
    writer = DocumentWriter(folder)
    is_conversation = task == "chat" and any(segment.role for segment in sample.segments)
    if anchor is not None and is_conversation:
        sample = replace(sample, segments=(Segment(anchor, role="system"), *_after_anchor(sample.segments)))
    elif anchor is not None:
        writer.ids(folder.text.encode(anchor), False)
    fields = _Fields(sample, task, folder, transform or default_transform(folder))
    if task == "interleaved" and "question" in sample.metadata:
        fields.render(writer, interleaved_question(folder), True)
        return writer.finish()
    if is_conversation:
        if template is None and folder.chat_template is not None:
            fields.templated(writer)
        else:
            fields.conversation(writer, template)
        return writer.finish()
    template = template or template_of(task, folder)
    fields.render(writer, template["prompt"], False)
    fields.render(writer, template["target"], True)
    return writer.finish()


def with_anchor(said: Sequence[Said], anchor: str) -> list[Said]:
    """A conversation behind an anchor, as `build_document` writes it."""
    first, *others = said
    if first.role == "system" and first.kind == "text":
        first = replace(first, text=f"\n{first.text}")
    return [Said("system", "text", anchor), first, *others]


def _after_anchor(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Segments behind an anchor, which is of the system: what the system says itself becomes a line of that turn."""
    first, *others = segments
    if first.role == "system" and first.text is not None:
        first = replace(first, text=f"\n{first.text}")
    return first, *others


def media_slots(segment: Segment, folder: TokenizerFolder, transform: Transform | None = None) -> Document:
    """The slots of a picture or a sound alone.

    Raises:
        ValueError: It can't be read.
    """
    writer = DocumentWriter(folder)
    sample = Sample("prompt", segments=(segment,))
    _Fields(sample, "interleaved", folder, transform or default_transform(folder)).render(writer, "{segments}", False)
    return writer.finish()


def build_prompt(
    task: str,
    folder: TokenizerFolder,
    *,
    text: str | None = None,
    image: ImageInput | None = None,
    audio: AudioInput = None,
    segments: Sequence[Any] | None = None,
    question: str | None = None,
    voice: str | None = None,
    transform: ImageTransform | None = None,
    anchor: str | None = None,
) -> Document:
    """The prompt of a task, ready to be continued: no end.

    What is asked has no targets; a text that is continued has those of training, since what attends in both directions
    (`decoder.prefix`, `decoder.encoder_layers`) ends where targets begin.

    Args:
        task: `caption`, `transcribe`, `speak`, `text`, `interleaved`, `question` or `chat`. `text` and
            `interleaved` continue what is given (`text` starts at `<|text|>`).
        folder: Tokenizers and templates.
        text: The words to speak, or the text to continue.
        image: The picture to caption.
        audio: The sound to transcribe: a path, bytes, a waveform, `(waveform, rate)`, or codes `[K, F]`.
        segments: `Segment`s, or dicts with one of the keys `text`, `image`, `audio`, or plain strings and
            PIL pictures, in order.
        question: For `question`, what is asked about the segments.
        voice: For `speak`, the speaker.
        transform: Pictures to pixels; by default what the folder implies.
        anchor: A text in front of all, as of `build_document`.

    Raises:
        ValueError: Something the task needs is missing or cannot be read.
    """
    if task == "speak":
        folder.check_speech()
    metadata = {key: value for key, value in (("speaker", voice), ("question", question)) if value is not None}
    parts = tuple(as_segment(segment) for segment in segments or ())
    sample = Sample("prompt", text, image, audio, None, parts, metadata)
    fields = _Fields(sample, task, folder, transform or default_transform(folder), drops_voice=False)
    writer = DocumentWriter(folder)
    if anchor is not None:
        writer.ids(folder.text.encode(anchor), False)
    fields.render(writer, template_of(task, folder)["prompt"], False)
    if task == "speak" and folder.config.pointer is not None:
        letters_L = Spelling.of(fields._need(text, "text")).letters_L
        first = np.zeros(1, dtype=np.int64)
        writer.point(Pointer(letters_L, first, first, np.full_like(first, IGNORE)))
    if task == "interleaved":
        fields.render(writer, "{segments}", True)
    elif task == "text" and text:
        fields.render(writer, "{text}", True)
    return writer.finish()


def build_answer(task: str, folder: TokenizerFolder, text: str) -> Document:
    """What training has behind a prompt of `build_prompt`: the answer and its end, to be predicted.

    Args:
        task: `caption`, `transcribe` or `question`.
        folder: Tokenizers and templates.
        text: The answer.
    """
    fields = _Fields(Sample("answer", text, metadata={"answer": text}), task, folder, default_transform(folder))
    writer = DocumentWriter(folder)
    fields.render(writer, template_of(task, folder)["target"], True)
    return writer.finish()


def encode_audio(audio: AudioInput, folder: TokenizerFolder, name: str = "audio") -> np.ndarray:
    """Codes int64 `[K, F]` of a sound, with the K codebooks that the folder hears; codes pass through.

    Raises:
        ValueError: The sound can't be read, or the folder has no audio tokenizer.
    """
    if isinstance(audio, torch.Tensor | np.ndarray) and not _is_float(audio):
        codes_KF = np.asarray(audio)
    else:
        tokenizer = folder.require_audio()
        source: Any = str(audio) if isinstance(audio, PathLike) else audio
        wave_CT, rate = load_audio(source, tokenizer.sample_rate, name=None if isinstance(source, str) else name)
        codes_KF = tokenizer.encode(wave_CT, rate).numpy()
    if codes_KF.ndim != 2 or codes_KF.shape[0] < folder.heard_codebooks:
        raise ValueError(
            f"{name}: codes have shape {codes_KF.shape}; the tokenizer needs {folder.heard_codebooks} codebooks x "
            f"frames; stored codes of fewer are made anew by building the shards with it"
        )
    return codes_KF[: folder.heard_codebooks].astype(np.int64)


def _is_float(array: torch.Tensor | np.ndarray) -> bool:
    return array.dtype.kind == "f" if isinstance(array, np.ndarray) else array.is_floating_point()


@dataclass(frozen=True)
class _Fields:
    """The values of a template's fields."""

    sample: Sample
    task: str
    folder: TokenizerFolder
    transform: Transform
    drops_voice: bool = True

    def render(self, writer: DocumentWriter, template: str, is_target: bool) -> None:
        for literal, name in parse_template(template):
            if literal:
                writer.ids(literal_ids(self.folder.text, literal), is_target)
            if name is not None:
                self._field(writer, name, is_target)

    def _field(self, writer: DocumentWriter, name: str, is_target: bool) -> None:
        sample, folder = self.sample, self.folder
        match name:
            case "text":
                writer.ids(folder.text.encode(self._need(sample.text, "text")), is_target)
            case "image":
                self._image(writer, self._need(sample.image, "image"), sample.features_SC, sample.key)
            case "audio":
                spoken = folder.text.encode(sample.text) if sample.text else ()
                writer.clip(self._codes(), spoken)
            case "units":
                codes_KF = self._codes()
                writer.units(codes_KF, is_target, self._pointer(codes_KF.shape[1]))
            case "voice":
                metadata = sample.metadata
                key = sample.key if self.drops_voice else None
                writer.ids(folder.text.encode(spoken_voice(key, metadata)), is_target)
            case "segments":
                self._segments(writer, is_target)
            case _:
                value = self._need(sample.metadata.get(name), name)
                writer.ids(folder.text.encode(str(value)), is_target)

    def _segments(self, writer: DocumentWriter, is_target: bool) -> None:
        for number in range(len(self.sample.segments)):
            self._segment(writer, number, is_target)

    def _segment(self, writer: DocumentWriter, number: int, is_target: bool, text: str | None = None) -> None:
        segment = self.sample.segments[number]
        if segment.image is not None:
            self._image(writer, segment.image, segment.features_SC, f"{self.sample.key} segment {number}")
        elif segment.audio is not None:
            writer.clip(encode_audio(segment.audio, self.folder, f"{self.sample.key} segment {number}"))
        else:
            writer.ids(self.folder.text.encode((segment.text or "") if text is None else text), is_target)

    def _image(self, writer: DocumentWriter, image: ImageInput, features_SC: np.ndarray | None, name: str) -> None:
        if self.folder.config.tiling is None:
            pixels_3HW = self.transform(image, name) if features_SC is None else NO_PIXELS
            writer.image(pixels_3HW, features_SC)
            return
        if features_SC is not None:
            raise ValueError(
                f"{name}: stored image features are of whole pictures, but the tokenizer folder's tiling.max_tiles is "
                f"{self.folder.config.tiling.max_tiles}; set image_features to false, or take a folder without tiling"
            )
        tiles = self.folder.tile_grid(*picture_size(image, name))
        if tiles.is_cut:
            writer.tiles(self.transform(image, name, tiles), tiles.places)
        else:
            writer.image(self.transform(image, name))

    def conversation(self, writer: DocumentWriter, template: Mapping[str, str] | None = None) -> None:
        """All turns of a conversation; what the assistant says, and the end of it, is to be predicted.

        Answers that aren't trained on are written like others.
        """
        roles = [segment.role for segment in self.sample.segments]
        texts = joined_texts([segment.said for segment in self.sample.segments])
        answers = False
        for literal, number in chat_pieces(roles, self.folder, template):
            if number < 0:
                writer.ids(literal_ids(self.folder.text, literal), answers)
                answers = False  # of what follows an answer only its end is said by the assistant
                continue
            answers = roles[number] == "assistant" and self.sample.segments[number].is_trained
            self._segment(writer, number, answers, texts[number])

    def templated(self, writer: DocumentWriter) -> None:
        """A conversation as the folder's own chat template writes it."""
        segments = self.sample.segments
        media = iter(number for number, segment in enumerate(segments) if segment.said.kind != "text")
        for piece in template_pieces([segment.said for segment in segments], self.folder):
            if piece.kind != "text":
                self._segment(writer, next(media), False)
                continue
            for is_target, tokens in groupby(zip(piece.targets, piece.ids, strict=True), key=itemgetter(0)):
                writer.ids([token for _, token in tokens], is_target)

    def _codes(self) -> np.ndarray:
        source = self.sample.codes_KF if self.sample.codes_KF is not None else self.sample.audio
        return encode_audio(self._need(source, "audio"), self.folder, self.sample.key)

    def _pointer(self, num_frames: int) -> Pointer | None:
        """Where the frames of the sample's sound are in its text; None where the folder has no pointer."""
        rule, key, folder = self.folder.config.pointer, self.sample.key, self.folder
        if rule is None:
            return None
        text = self._need(self.sample.text, "text")
        if WORDS not in self.sample.metadata:
            raise ValueError(
                f"{key}: the tokenizer folder has a pointer, but the row doesn't say when its words are said; "
                f"`mmllm data align` adds `{WORDS}` to a manifest, from which its shards are built then"
            )
        times = read_words(self.sample.metadata[WORDS], text, key)
        try:
            starts_L = letter_starts(text, times, num_frames / folder.frame_rate)
            pointer_F = follow(starts_L, num_frames, folder.frame_rate, rule)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
        return spoken_pointer(Spelling.of(text).letters_L, pointer_F, folder.num_unit_positions(num_frames))

    def _need(self, value: Any, name: str) -> Any:
        if value is None:
            raise ValueError(f"{self.sample.key}: the task {self.task!r} needs {name!r}, which is missing")
        return value
