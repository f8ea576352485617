"""A sample and a task to the tokens of one document: the templates, the slots, the targets.

Training and inference both come through here, so a prompt is written the same way in both.

Shapes: T tokens, K codebooks, F frames, P frames after the codebook pattern, L letters, S features a picture, C
channels, H and W pixels.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from os import PathLike
from typing import Any

import numpy as np
import torch

from mmllm.batch import IGNORE, Modality
from mmllm.data.samples.conversations import Said, joined_texts, template_pieces
from mmllm.data.samples.decode import ImageInput, ImageTransform, picture_size
from mmllm.data.samples.pointers import Pointer, spoken_pointer
from mmllm.data.samples.templates import chat_pieces, literal_ids, parse_template, template_of
from mmllm_tokenizers.alignment import read_words
from mmllm_tokenizers.audio import load_audio
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.pointer import Spelling, follow, letter_starts
from mmllm_tokenizers.vocab import AUDIO, IMAGE

AudioInput = Any
"""A path, bytes, a waveform at the codec's rate, `(waveform, sample_rate)`, or int64 codes `[K, F]`."""

Transform = Callable[..., np.ndarray]
"""A picture, what errors call it, and its tiles if it is cut, to pixels uint8 `[3, H, W]` or `[M, 3, H, W]`, as an
`ImageTransform` does."""

PieceSize = str | int | tuple[int, int] | None
"""What of an interleaved document's segment counts: the text, a sound's frames, a picture's width and height. `None`: a
picture, where pictures aren't cut into tiles."""

NO_PIXELS = np.zeros((3, 0, 0), dtype=np.uint8)
"""Of a picture that has features, or isn't decoded yet."""

VOICE_DROP = 5
"""The voice is left out of one `speak` document in this many, so that speaking works without one."""

WORDS = "words"
"""Key of a row's metadata: when each of its words is said."""
ALIGNED = "aligned"
"""Of a stored row that has `WORDS`: True, for filters."""

KIND_TASKS = {
    "caption": ("caption",),
    "interleaved": ("interleaved", "question", "chat"),
    "text": ("text",),
    "audio": ("transcribe", "speak"),
}
"""The tasks that each kind of source can be written as."""


@dataclass(frozen=True)
class Segment:
    """A piece of an interleaved document: one of text, a picture, or a sound."""

    text: str | None = None
    image: ImageInput | None = None
    audio: AudioInput = None
    role: str | None = None
    """Of a conversation: `system`, `user`, `assistant` or `tool`."""
    features_SC: np.ndarray | None = None
    """As `Sample.features_SC`."""
    is_trained: bool = True
    """Whether an answer of a conversation is to be predicted."""
    new_turn: bool = False
    """Whether it begins a turn though the one before it is of the same role."""

    @property
    def said(self) -> Said:
        """Whose turn it is, and its text."""
        kind = "image" if self.image is not None else "audio" if self.audio is not None else "text"
        return Said(self.role, kind, self.text or "", self.new_turn, self.is_trained)


@dataclass(frozen=True)
class Sample:
    """A row with its files in memory; what `build_document` reads."""

    key: str
    text: str | None = None
    image: ImageInput | None = None
    audio: AudioInput = None
    codes_KF: np.ndarray | None = None
    """Codes of `audio` stored with it; they stand in for encoding it."""
    segments: tuple[Segment, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    """The row's other keys; `speaker` is the voice, `question` and `answer` end an interleaved row."""
    features_SC: np.ndarray | None = None
    """Features of `image` stored with it; they stand in for decoding it and for the image tower."""


@dataclass(frozen=True)
class Clip:
    """A sound that is heard: codes, unpatterned, and where its slots start."""

    start: int
    codes_FK: np.ndarray
    num_slots: int
    target_ids: tuple[int, ...] = ()
    """Token ids of what is said, where known (for the CTC loss)."""


@dataclass(frozen=True)
class Picture:
    """A picture that is seen, or a tile of one, and where its slots start."""

    start: int
    pixels_3HW: np.ndarray
    """uint8; without height and width where there are features."""
    num_slots: int
    features_SC: np.ndarray | None = None
    """float16, what the image tower gives for it."""
    tile: tuple[int, int] = (0, 0)
    """Row and column in the picture that it is a tile of, from 1; (0, 0): the whole."""
    is_first: bool = True
    """Whether it isn't another tile of the picture before it."""


def tile_places(pictures: Iterable[Picture]) -> np.ndarray:
    """int64 [N, 3]: of each tile the number of its picture, its row and its column; [0, 3] where none is cut."""
    numbers, rows = -1, []
    for picture in pictures:
        numbers += picture.is_first
        rows.append((numbers, *picture.tile))
    is_cut = any(row or column for _, row, column in rows)
    return np.array(rows if is_cut else [], dtype=np.int64).reshape(-1, 3)


@dataclass(frozen=True)
class Document:
    """One document or prompt: T tokens and what hangs on them. Labels are shifted when packed."""

    token_ids_T: np.ndarray
    """int64. At a frame of units, codebook 0's id (its filler's id at the delay's tail)."""
    targets_T: np.ndarray
    """bool: this token is to be predicted (from the position before it)."""
    modality_T: np.ndarray
    """int64, a `Modality`."""
    codes_TK: np.ndarray
    """int64: the frame's patterned codes (filler = codebook size), -1 where there are no units."""
    images: tuple[Picture, ...] = ()
    clips: tuple[Clip, ...] = ()
    filler: int = 0
    """The filler's code, which is never an audio label."""
    has_units: bool = False
    pointer: Pointer | None = None
    """None: nothing in it says where in its text it is."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids_T)

    @property
    def num_bytes(self) -> int:
        """About how much memory it takes."""
        arrays = [self.token_ids_T, self.targets_T, self.modality_T, self.codes_TK]
        arrays += [picture.pixels_3HW for picture in self.images] + [clip.codes_FK for clip in self.clips]
        arrays += [picture.features_SC for picture in self.images if picture.features_SC is not None]
        if self.pointer is not None:
            arrays += vars(self.pointer).values()
        return 500 + sum(array.nbytes for array in arrays)

    def with_pixels(self, pixels: Iterable[np.ndarray]) -> Document:
        """Its pictures, those that have features apart, with pixels `[3, H, W]` of their own."""
        rest = iter(pixels)
        images = tuple(
            replace(picture, pixels_3HW=next(rest)) if picture.features_SC is None else picture
            for picture in self.images
        )
        return replace(self, images=images)

    def part(self, start: int, stop: int) -> Document:
        """Tokens `[start, stop)` of a document that has neither pictures nor clips."""
        assert not self.images and not self.clips, "only documents without slots are split"
        here = slice(start, stop)
        columns = self.token_ids_T[here], self.targets_T[here], self.modality_T[here], self.codes_TK[here]
        return Document(*columns, filler=self.filler)


class DocumentWriter:
    """Appends text, slots and units, and gives the `Document`."""

    def __init__(self, folder: TokenizerFolder) -> None:
        self._folder = folder
        self._ids: list[int] = []
        self._runs: list[tuple[int, bool, int]] = []  # tokens, whether they are targets, their modality
        self._units: list[tuple[int, np.ndarray]] = []
        self._pointers: list[tuple[int, Pointer]] = []
        self._images: list[Picture] = []
        self._clips: list[Clip] = []

    def ids(self, token_ids: Iterable[int], is_target: bool, modality: Modality = Modality.TEXT) -> None:
        """Append tokens as they are."""
        before = len(self._ids)
        self._ids.extend(token_ids)
        count = len(self._ids) - before
        self._runs.append((count, is_target, int(modality)))

    def image(self, pixels_3HW: np.ndarray, features_SC: np.ndarray | None = None) -> None:
        """Append the slots of a picture that isn't cut."""
        self._picture(pixels_3HW, features_SC=features_SC)

    def tiles(self, pixels_M3HW: np.ndarray, places: Sequence[tuple[int, int]]) -> None:
        """Append a picture's slots, tile by tile."""
        for number, (pixels_3HW, place) in enumerate(zip(pixels_M3HW, places, strict=True)):
            self._picture(pixels_3HW, tile=place, is_first=number == 0)

    def _picture(self, pixels_3HW: np.ndarray, **more: Any) -> None:
        count = self._folder.num_image_tokens
        self._images.append(Picture(len(self._ids), pixels_3HW, count, **more))
        self.ids([self._folder.id(IMAGE)] * count, False, Modality.IMAGE)

    def clip(self, codes_KF: np.ndarray, target_ids: Iterable[int] = ()) -> None:
        """Append the slots of a sound that is heard."""
        num_slots = self._folder.num_audio_slots(codes_KF.shape[1])
        self._clips.append(Clip(len(self._ids), codes_KF.T.astype(np.int64), num_slots, tuple(target_ids)))
        self.ids([self._folder.id(AUDIO)] * num_slots, False, Modality.AUDIO)

    def units(self, codes_KF: np.ndarray, is_target: bool, pointer: Pointer | None = None) -> None:
        """Append frames of units under the folder's pattern.

        Args:
            codes_KF: of a sound.
            is_target: whether they are to be predicted.
            pointer: of the positions that predict them, from the one before them on.

        Raises:
            ValueError: the folder's codes can't be spoken.
        """
        self._folder.check_speech()
        vocabulary = self._folder.vocabulary
        codes_KP = pattern_codes(codes_KF, self._folder)
        if pointer is not None:
            self.point(pointer)
        self._units.append((len(self._ids), codes_KP.T))
        self.ids((codes_KP[0] + vocabulary.codebook_start(0)).tolist(), is_target, Modality.UNITS)

    def point(self, pointer: Pointer) -> None:
        """Give a pointer to the last position so far and those that will follow it."""
        assert self._ids, "speech follows a token, where its first frame is predicted"
        self._pointers.append((len(self._ids) - 1, pointer))

    def _pointer(self, num_tokens: int) -> Pointer | None:
        if not self._pointers:
            return None
        pieces, used = [], 0
        for start, pointer in self._pointers:
            pieces += [Pointer.none(start - used), pointer]
            used = start + len(pointer.places_T)
        return Pointer.join([*pieces, Pointer.none(num_tokens - used)])

    def finish(self) -> Document:
        """The document so far."""
        num_tokens = len(self._ids)
        counts, targets, modality = zip(*self._runs, strict=True) if self._runs else ((), (), ())
        codes_TK = np.full((num_tokens, self._folder.vocabulary.num_codebooks), -1, dtype=np.int64)
        for start, codes_PK in self._units:
            codes_TK[start : start + len(codes_PK)] = codes_PK
        return Document(
            np.array(self._ids, dtype=np.int64),
            np.repeat(np.array(targets, dtype=bool), counts),
            np.repeat(np.array(modality, dtype=np.int64), counts),
            codes_TK,
            tuple(self._images),
            tuple(self._clips),
            self._folder.vocabulary.filler,
            bool(self._units),
            self._pointer(num_tokens),
        )


def pattern_codes(codes_KF: np.ndarray, folder: TokenizerFolder) -> np.ndarray:
    """Codes `[K, F]` as the frames `[K, P]` that are predicted, under the folder's pattern: those spoken."""
    codes = torch.as_tensor(np.ascontiguousarray(codes_KF[: folder.num_codebooks]), dtype=torch.int64)
    return folder.apply_pattern(codes).numpy()


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
        fields.render(writer, _interleaved_question(folder), True)
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


def _interleaved_question(folder: TokenizerFolder) -> str:
    """How an interleaved row with a question is written, all of whose text is to be predicted."""
    return template_of("interleaved", folder)["prompt"] + "{segments}<|question|>{question}<|answer|>{answer}<|end|>"


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


def as_segment(value: Any) -> Segment:
    """A `Segment` from a dict with one key, a string (text), or a picture.

    Raises:
        ValueError: It is none of these.
    """
    match value:
        case Segment():
            return value
        case str():
            return Segment(text=value)
        case {"text": text}:
            return Segment(text=text)
        case {"image": image}:
            return Segment(image=image)
        case {"audio": audio}:
            return Segment(audio=audio)
        case dict():
            raise ValueError(f"a segment has the keys {sorted(value)}; give one of 'text', 'image' or 'audio'")
    return Segment(image=value)


def document_length(
    task: str,
    folder: TokenizerFolder,
    *,
    key: str = "",
    text: str | int | None = None,
    num_frames: int = 0,
    segments: Sequence[PieceSize] = (),
    metadata: dict[str, Any] | None = None,
    said: Sequence[Said] = (),
    image_size: tuple[int, int] = (1, 1),
) -> int:
    """Tokens that `build_document` will give, without a picture or a sound at hand.

    Args:
        task: A key of the folder's templates.
        folder: Tokenizers and templates.
        key: The sample's key (it decides whether the voice is dropped).
        text: The sample's text, or how many tokens it has.
        num_frames: Frames of its sound.
        segments: Of an interleaved sample, in order.
        metadata: The row's other keys.
        said: Of a conversation, who says each segment.
        image_size: Width and height of its picture, where pictures are cut into tiles.

    Raises:
        ValueError: No answer of the conversation is trained on, or the folder's chat template refuses it.
    """
    metadata = metadata or {}
    if task == "chat" and said:
        if not any(segment.is_answer and segment.is_trained for segment in said):
            raise ValueError("no answer of this conversation is trained on")
        sizes = sum(_segment_length(segment, folder) for segment in segments if not isinstance(segment, str))
        return sizes + conversation_tokens(said, folder)
    if task == "interleaved" and "question" in metadata:
        rendered = _interleaved_question(folder)
    else:
        template = template_of(task, folder)
        rendered = template["prompt"] + template["target"]
    total = 0
    for literal, name in parse_template(rendered):
        total += len(literal_ids(folder.text, literal)) if literal else 0
        match name:
            case None:
                pass
            case "text":
                total += text if isinstance(text, int) else len(folder.text.encode(text or ""))
            case "image":
                total += folder.num_image_slots(*image_size)
            case "audio":
                total += folder.num_audio_slots(num_frames)
            case "units":
                total += folder.num_unit_positions(num_frames)
            case "voice":
                total += len(folder.text.encode(spoken_voice(key, metadata)))
            case "segments":
                total += sum(_segment_length(segment, folder) for segment in segments)
            case _:
                total += len(folder.text.encode(str(metadata.get(name, ""))))
    return total


def conversation_tokens(
    said: Sequence[Said], folder: TokenizerFolder, template: Mapping[str, str] | None = None
) -> int:
    """Tokens of a conversation's texts, and of what its template writes around them: all but pictures and sounds.

    Args:
        said: Who says each segment.
        folder: Tokenizers and templates.
        template: `prompt` and `target` instead of the folder's.

    Raises:
        ValueError: The folder's chat template refuses the conversation.
    """
    if template is None and folder.chat_template is not None:
        return sum(len(piece.ids) for piece in template_pieces(said, folder))
    literals = chat_pieces([segment.role for segment in said], folder, template)
    total = sum(len(literal_ids(folder.text, piece)) for piece, _ in literals)
    return total + sum(len(folder.text.encode(text)) for text in joined_texts(said) if text)


def _segment_length(segment: PieceSize, folder: TokenizerFolder) -> int:
    match segment:
        case None:
            return folder.num_image_tokens
        case (width, height):
            return folder.num_image_slots(width, height)
        case int():
            return folder.num_audio_slots(segment)
    return len(folder.text.encode(segment))


def spoken_voice(key: str | None, metadata: dict[str, Any]) -> str:
    """The voice as the `speak` template renders it: "" for one document in `VOICE_DROP`, by its key if it has one."""
    if key is not None and zlib.crc32(key.encode()) % VOICE_DROP == 0:
        return ""
    speaker = metadata.get("speaker")
    return "" if speaker is None else str(speaker)


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


@dataclass(frozen=True)
class TextFrame:
    """What a template writes around a text, as tokens and whether they are to be predicted."""

    before: tuple[tuple[int, bool], ...]
    after: tuple[tuple[int, bool], ...]
    is_target: bool
    """Whether the text is."""


def text_frame(
    task: str, folder: TokenizerFolder, template: Mapping[str, str] | None = None, anchor: str | None = None
) -> TextFrame | None:
    """The frame of a task whose only field is the text, behind an anchor if any; `None` where it has other fields."""
    template = template or template_of(task, folder)
    sides: tuple[list[tuple[int, bool]], list[tuple[int, bool]]] = [], []
    sides[0].extend((token, False) for token in folder.text.encode(anchor or ""))
    found: list[bool] = []
    for part, is_target in (("prompt", False), ("target", True)):
        for literal, name in parse_template(template[part]):
            sides[bool(found)].extend((token, is_target) for token in literal_ids(folder.text, literal) if literal)
            if name is not None:
                if name != "text":
                    return None
                found.append(is_target)
    return TextFrame(tuple(sides[0]), tuple(sides[1]), found[0]) if len(found) == 1 else None


def text_part(
    frame: TextFrame, text_ids: Sequence[int], first: int, total: int, start: int, stop: int, folder: TokenizerFolder
) -> Document:
    """Tokens `[start, stop)` of a text's document, as `Document.part` gives them, from those of the text alone.

    Args:
        frame: Of its task.
        text_ids: Tokens of the text from `first` on, as many as are needed.
        first: Which the first of them is.
        total: Tokens of the whole text.
        start: Of the document.
        stop: Of the document.
        folder: Tokenizers.
    """
    writer = DocumentWriter(folder)
    begin = len(frame.before)
    low, high = (min(max(place - begin, 0), total) for place in (start, stop))
    pieces = [
        frame.before[start:stop],
        [(token, frame.is_target) for token in text_ids[low - first : high - first]],
        frame.after[max(0, start - begin - total) : max(0, stop - begin - total)],
    ]
    for piece in pieces:
        for is_target, tokens in groupby(piece, key=itemgetter(1)):
            writer.ids([token for token, _ in tokens], is_target)
    return writer.finish()


def num_parts(num_tokens: int, sequence_length: int) -> int:
    """Pieces into which a long text is split: each begins with the last token of the one before it."""
    return max(1, math.ceil((num_tokens - 1) / (sequence_length - 1)))


def part_bounds(num_tokens: int, sequence_length: int, part: int) -> tuple[int, int]:
    """Tokens `[start, stop)` of a piece; every token but a document's first is a target in exactly one piece."""
    start = part * (sequence_length - 1)
    return start, min(start + sequence_length, num_tokens)
