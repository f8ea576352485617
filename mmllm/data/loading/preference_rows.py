"""Rows of preference data, in TRL's conversational form, as documents.

A pair is `{"prompt": [messages], "chosen": [messages], "rejected": [messages]}`, an answer by itself `{"prompt",
"completion", "label"}` (https://huggingface.co/docs/trl/dataset_formats). A message's content is a string, or parts
`{"type": "text"|"image"|"audio", "text"|"image"|"audio": …}` with paths relative to the file; an image without a path
is the next one of the row's `images`. A pair's `margin`, as reward models know it, is a number. One key more is ours:
`task`, which says as what the model is asked.

Shapes: K codebooks, F frames.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from mmllm.data.samples.document import Document, DocumentWriter
from mmllm.data.samples.documents import build_document, encode_audio
from mmllm.data.samples.pointers import Pointer, spoken_pointer
from mmllm.data.samples.sample import Sample, Segment
from mmllm.data.samples.stored import unpack_codes
from mmllm.data.samples.templates import literal_ids, parse_template, template_of
from mmllm_tokenizers.alignment import read_words
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.pointer import Spelling, follow, letter_starts

AnswerTask = Literal["chat", "caption", "transcribe", "question", "speak", "text"]
Form = Literal["pairs", "answers"]
"""pairs: both sides of each pair together. answers: each by itself, with whether it is liked; pairs are taken apart."""
_ROLES = ("system", "user", "assistant")
_MOST_MARGIN = 1e30
"""Larger ones are no numbers in float32, or their loss isn't."""
_ASKED = {
    "caption": "one picture",
    "transcribe": "one sound",
    "question": "pictures, sounds and texts, the last of which is the question",
    "speak": "the text to say",
    "text": "the text to go on with",
}


@dataclass(frozen=True)
class Part:
    """A piece of a message."""

    kind: Literal["text", "image", "audio"]
    value: str
    """The text, or the file's path."""
    words: Any = None
    """Of a sound that is an answer: when each word is said."""


@dataclass(frozen=True)
class Message:
    """Who says what."""

    role: str
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """Its text, without its pictures and sounds."""
        return "".join(part.value for part in self.parts if part.kind == "text")


@dataclass(frozen=True)
class PreferenceRow:
    """A prompt with answers: two of a pair, the chosen one first, or one by itself."""

    where: str
    """`file:line`."""
    task: AnswerTask
    prompt: tuple[Message, ...]
    answers: tuple[Message, ...]
    is_liked: tuple[bool, ...]
    voice: str | None = None
    margin: float = 0.0
    """By how much the chosen side is better."""


# ------------------------------------------------------------------------------------------------------------- reading
def read_row(line: str | bytes, where: str, folder: Path) -> PreferenceRow:
    """A line of a file of preference data.

    Args:
        line: JSON.
        where: its `file:line`.
        folder: to which paths are relative.

    Raises:
        ValueError: it is no such row; the message says why, without `where`.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"is {_shown(value)}; a JSON object is wanted")
    task = value.get("task", "chat")
    if task not in get_args(AnswerTask):
        raise ValueError(f"has the unknown task {task!r}; known are {', '.join(get_args(AnswerTask))}")
    if value.get("tools") not in (None, "", [], "[]"):
        raise ValueError("has 'tools', which have no place here; write them into the system prompt, as text")
    images = value.get("images") or []
    if not isinstance(images, list):
        raise ValueError(f"'images' is {_shown(images)}; a list of paths is wanted")
    sides, is_liked = _sides(value)
    prompt = value["prompt"] if "prompt" in value else _common(list(sides.values()))
    if "prompt" not in value:
        sides = {name: side[len(prompt) :] for name, side in sides.items()}
    reader = _Reader(folder, [str(path) for path in images], task)
    asked = reader.messages(prompt, "prompt")
    _check_prompt(asked, task)
    answers = tuple(reader.answer(side, name) for name, side in sides.items())
    reader.check_images()
    if len(answers) == 2 and answers[0].parts == answers[1].parts:
        raise ValueError("chosen and rejected are equal; a pair has two different sides")
    voice = value.get("voice")
    voice = None if voice is None else str(voice)
    return PreferenceRow(where, task, asked, answers, is_liked, voice, _margin(value))


def _margin(value: Mapping[str, Any]) -> float:
    margin = value.get("margin")
    if margin is None:
        return 0.0
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not abs(margin) <= _MOST_MARGIN:
        raise ValueError(f"'margin' is {_shown(margin)}; a number is wanted: by how much the chosen side is better")
    return float(margin)


def _sides(value: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[bool, ...]]:
    """The answers by the names of their keys, and whether each is liked."""
    if "chosen" in value or "rejected" in value:
        missing = [key for key in ("chosen", "rejected") if key not in value]
        if missing:
            raise ValueError(f"has no {missing[0]!r}; a pair has chosen and rejected")
        return {"chosen": value["chosen"], "rejected": value["rejected"]}, (True, False)
    if "completion" not in value or "label" not in value:
        raise ValueError(
            f"has the keys {', '.join(map(str, value)) or 'none'}; a pair has prompt, chosen and rejected, an answer "
            f"by itself prompt, completion and label"
        )
    if not isinstance(value["label"], bool):
        raise ValueError(f"'label' is {_shown(value['label'])}; true (liked) or false is wanted")
    return {"completion": value["completion"]}, (value["label"],)


def _common(sides: Sequence[Any]) -> list[Any]:
    """The messages with which both sides of a pair without a prompt begin."""
    if len(sides) < 2 or not all(isinstance(side, list) for side in sides):
        raise ValueError("has no 'prompt'")
    same = 0
    for first, second in zip(*sides, strict=False):
        if first != second:
            break
        same += 1
    return list(sides[0][:same])


class _Reader:
    """Messages of one row; images without a path are taken from its `images`, in order."""

    def __init__(self, folder: Path, images: list[str], task: str) -> None:
        self._folder, self._images, self._task, self._num_taken = folder, images, task, 0

    def messages(self, value: Any, name: str) -> tuple[Message, ...]:
        if isinstance(value, str) and self._task == "text":
            value = [{"role": "user" if name == "prompt" else "assistant", "content": value}]
        if not isinstance(value, list):
            raise ValueError(
                f"{name!r} is {_shown(value)}; a list of messages is wanted, such as "
                f'[{{"role": "user", "content": "…"}}] (plain text has its place in the task "text")'
            )
        return tuple(self._message(message, f"{name}[{place}]") for place, message in enumerate(value))

    def answer(self, value: Any, name: str) -> Message:
        """One message of the assistant's."""
        messages = self.messages(value, name)
        if len(messages) != 1 or messages[0].role != "assistant":
            roles = ", ".join(message.role for message in messages) or "no message"
            raise ValueError(f"{name!r} is of {roles}; it must be one message of the assistant")
        (answer,) = messages
        wanted = "audio" if self._task == "speak" else "text"
        if len(answer.parts) != 1 or answer.parts[0].kind != wanted:
            kinds = ", ".join(part.kind for part in answer.parts) or "nothing"
            raise ValueError(f"{name!r} has {kinds}; an answer of the task {self._task} is {wanted} alone")
        if not answer.parts[0].value:
            raise ValueError(f"{name!r} is empty; an answer says something")
        return answer

    def check_images(self) -> None:
        if self._num_taken < len(self._images):
            raise ValueError(f"has {len(self._images)} images, but {self._num_taken} places for them in its messages")

    def _message(self, value: Any, where: str) -> Message:
        if not isinstance(value, dict) or value.get("role") not in _ROLES or value.get("content") is None:
            raise ValueError(f"{where} is {_shown(value)}; it must have content and a role: {', '.join(_ROLES)}")
        if value.get("tool_calls"):
            raise ValueError(f"{where} calls tools, which has no place here; write the call as text")
        content = value["content"]
        parts = content if isinstance(content, list) else [content]
        return Message(value["role"], tuple(self._part(part, f"{where}[{n}]") for n, part in enumerate(parts)))

    def _part(self, part: Any, where: str) -> Part:
        match part:
            case str():
                return Part("text", part)
            case {"type": "text", "text": str() as text}:
                return Part("text", text)
            case {"type": "image", "image": str() as path}:
                return Part("image", str(self._folder / path))
            case {"type": "image"} if part.get("image") is None:
                if self._num_taken >= len(self._images):
                    raise ValueError(f"{where} is an image without a path, and 'images' has {len(self._images)}")
                self._num_taken += 1
                return Part("image", str(self._folder / self._images[self._num_taken - 1]))
            case {"type": "audio", "audio": str() as path}:
                return Part("audio", str(self._folder / path), part.get("words"))
        raise ValueError(f"{where} is {_shown(part)}; a text is wanted, or a part of type text, image or audio")


def _check_prompt(prompt: Sequence[Message], task: str) -> None:
    """Refuses a prompt without an end that can be answered, and what the task has no place for."""
    if not any(part.value for message in prompt for part in message.parts):
        raise ValueError("its prompt is empty; an answer needs something to answer")
    roles = [message.role for message in prompt]
    if roles[-1] != "user":
        raise ValueError(f"its prompt ends with the {roles[-1]}; the last message of a prompt is the user's")
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != ["user" if place % 2 == 0 else "assistant" for place in range(len(turns))]:
        raise ValueError(f"has its prompt's roles out of turn: {', '.join(roles)}; user and assistant take turns")
    if task == "chat":
        return
    kinds = [part.kind for part in prompt[-1].parts]
    fits = {
        "caption": kinds == ["image"],
        "transcribe": kinds == ["audio"],
        "question": len(kinds) > 1 and kinds[-1] == "text",
        "speak": kinds == ["text"],
        "text": kinds == ["text"],
    }
    if len(prompt) > 1 or not fits[task]:
        raise ValueError(
            f"has a prompt of {len(prompt)} messages with {', '.join(kinds)}; the task {task} has one of the user's "
            f"with {_ASKED[task]}"
        )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:79] + "…"


# ------------------------------------------------------------------------------------------------------------- writing
@dataclass(frozen=True)
class AnswerWriter:
    """Writes prompts and answers as the model's templates have them; the answer alone is to be predicted.

    Attributes:
        folder: tokenizers and templates.
        transform: pictures to pixels.
        sequence_length: a document's tokens, at most.
    """

    folder: TokenizerFolder
    transform: Any
    sequence_length: int

    def document(self, row: PreferenceRow, answer: Message) -> Document:
        """An answer behind a row's prompt.

        Raises:
            ValueError: a picture or sound can't be read, or it is longer than a sequence.
        """
        document = self._written(row, answer)
        if document.num_tokens > self.sequence_length:
            raise ValueError(
                f"prompt and answer have {document.num_tokens} tokens, and sequence_length is {self.sequence_length}; "
                f"raise it, or leave the row out"
            )
        return document

    def _written(self, row: PreferenceRow, answer: Message) -> Document:
        key, last = row.where, row.prompt[-1]
        match row.task:
            case "caption":
                sample = Sample(key, answer.text, image=last.parts[0].value)
            case "transcribe":
                sample = Sample(key, answer.text, audio=last.parts[0].value)
            case "question":
                asked = {"question": last.parts[-1].value, "answer": answer.text}
                sample = Sample(key, segments=tuple(map(_segment, last.parts[:-1])), metadata=asked)
            case "speak":
                return self._speech(row, answer.parts[0])
            case "text":
                return self._rendered("text", {"text": last.text}, answer.text)
            case "chat":
                asked = [
                    _segment(part, message.role, is_trained=False) for message in row.prompt for part in message.parts
                ]
                said = [_segment(part, "assistant") for part in answer.parts]
                sample = Sample(key, segments=(*asked, *said))
        return build_document(sample, row.task, self.folder, self.transform)

    def _rendered(self, task: str, fields: Mapping[str, str], answer: str) -> Document:
        """A text that is gone on with: behind the template's prompt stands its beginning, which is no target."""
        writer, template = DocumentWriter(self.folder), template_of(task, self.folder)
        self._render(writer, template["prompt"], {}, False)
        writer.ids(self.folder.text.encode(fields["text"]), False)
        self._render(writer, template["target"], {"text": answer}, True)
        return writer.finish()

    def _render(self, writer: DocumentWriter, template: str, fields: Mapping[str, str], is_target: bool) -> None:
        for literal, name in parse_template(template):
            if literal:
                writer.ids(literal_ids(self.folder.text, literal), is_target)
            if name is not None:
                writer.ids(self.folder.text.encode(fields[name]), is_target)

    def _speech(self, row: PreferenceRow, sound: Part) -> Document:
        """What is said, and the sound that says it. Unlike in training on speech, no voice is left out at random."""
        text, folder = row.prompt[-1].text, self.folder
        codes_KF, pointer_F = self._codes(sound)
        pointer = self._pointer(text, sound, codes_KF.shape[1], pointer_F)
        writer, template = DocumentWriter(folder), template_of("speak", folder)
        self._render(writer, template["prompt"], {"text": text, "voice": row.voice or ""}, False)
        for literal, name in parse_template(template["target"]):
            if literal:
                writer.ids(literal_ids(folder.text, literal), True)
            if name is not None:
                writer.units(codes_KF, True, pointer)
        return writer.finish()

    def _codes(self, sound: Part) -> tuple[np.ndarray, np.ndarray | None]:
        """A sound's codes, and where they were stored with it the letter that each frame says."""
        path = Path(sound.value)
        if path.suffix != ".npz":
            return encode_audio(str(path), self.folder, path.name), None
        data = path.read_bytes()
        codes_KF = encode_audio(unpack_codes(data, self.folder.require_audio().hash, path.name), self.folder, path.name)
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                pointer_F = arrays["pointer"].astype(np.int64) if "pointer" in arrays else None
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path.name}: is broken ({type(error).__name__})") from error
        return codes_KF, pointer_F

    def _pointer(self, text: str, sound: Part, num_frames: int, pointer_F: np.ndarray | None) -> Pointer | None:
        """Where the frames are in the text; None where the folder has no pointer."""
        folder, rule, name = self.folder, self.folder.config.pointer, Path(sound.value).name
        if rule is None:
            return None
        spelling = Spelling.of(text)
        if pointer_F is None:
            if sound.words is None:
                raise ValueError(
                    f"{name}: the model says which letter each frame says, but the sound doesn't: give its `.npz` a "
                    f"'pointer' (`mmllm prefer sample` does), or the part of the message its 'words' with their times"
                )
            starts_L = letter_starts(text, read_words(sound.words, text, name), num_frames / folder.frame_rate)
            pointer_F = follow(starts_L, num_frames, folder.frame_rate, rule)
        least, most = int(pointer_F.min(initial=0)), int(pointer_F.max(initial=0))
        if len(pointer_F) != num_frames or least < 0 or most >= len(spelling.letters_L):
            raise ValueError(
                f"{name}: its pointer has {len(pointer_F)} places up to {most}, but there are "
                f"{num_frames} frames and {len(spelling.letters_L)} letters; it is of another sound or text"
            )
        return spoken_pointer(spelling.letters_L, pointer_F, folder.num_unit_positions(num_frames))


def without_answer(document: Document) -> Document:
    """Its prompt: all before its first target, which is text."""
    stop = int(document.targets_T.argmax())
    here = slice(0, stop)
    return replace(
        document,
        token_ids_T=document.token_ids_T[here],
        targets_T=document.targets_T[here],
        modality_T=document.modality_T[here],
        codes_TK=document.codes_TK[here],
    )


def _segment(part: Part, role: str | None = None, is_trained: bool = True) -> Segment:
    match part.kind:
        case "text":
            return Segment(text=part.value, role=role, is_trained=is_trained)
        case "image":
            return Segment(image=part.value, role=role, is_trained=is_trained)
        case "audio":
            return Segment(audio=part.value, role=role, is_trained=is_trained)
