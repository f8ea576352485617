"""A manifest's row as what a model is asked: messages in TRL's form, and the prompt by the model's own template."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmllm.data.rows.media import Embedded, Media, media_source
from mmllm.data.rows.rows import Row
from mmllm.data.samples.document import Document
from mmllm.data.samples.sample import Segment
from mmllm.evaluation.answer_task import prompt_segments
from mmllm.inference.api import Model
from mmllm.inference.inputs import as_audio, as_image

KINDS_OF_TASK = {
    "caption": ("caption",),
    "transcribe": ("audio",),
    "speak": ("audio", "text"),
    "question": ("interleaved",),
    "chat": ("interleaved", "text"),
}
_WANTED = {
    "caption": "rows with a picture",
    "transcribe": "rows with a sound",
    "speak": "rows with a text to say, or a sound with its text",
    "question": "rows with segments, a question and an answer",
    "chat": "conversations, or rows with text alone",
}


def rows_of_task(rows: Sequence[Row], task: str, name: str) -> list[Row]:
    """The rows that a task can be asked about: those of the first of its kinds of which there are any.

    Raises:
        ValueError: there are none.
    """
    for kind in KINDS_OF_TASK[task]:
        if fitting := [row for row in rows if row.kind == kind and _has_what(row, task)]:
            return fitting
    raise ValueError(f"{name} has no {_WANTED[task]}, which the task {task!r} needs; give another manifest or task")


def _has_what(row: Row, task: str) -> bool:
    match task:
        case "question":
            return "question" in row.metadata
        case "chat" if row.kind == "interleaved":
            return any(segment.get("role") == "user" for segment in row.segments)
    return True


def document_of(row: Row, task: str, model: Model) -> Document:
    """The prompt, as the model's own template writes it; of speech `mmllm.inference.speaking` writes it.

    Raises:
        ValueError: the model lacks the sense, or a picture or sound can't be read or is too long.
    """
    match task:
        case "caption":
            return model.caption_prompt(_source(row.image))
        case "transcribe":
            return model.transcript_prompt(_source(row.audio))
        case "question":
            return model.question_prompt(prompt_segments(row), str(row.metadata["question"]))
    assert task == "chat", task
    return model.chat_prompt([
        {"role": role, "content": _asked_content(pieces)} for role, pieces in _turns(row)
    ])  # fmt: skip


def _source(media: Media | None) -> Any:
    assert media is not None, "a row of its kind has one"
    return media_source(media)


def _asked_content(pieces: Sequence[dict[str, Any]]) -> Any:
    """As `Model.chat` takes it; text is text, whatever it says."""
    if all("text" in piece for piece in pieces):
        return [{"type": "text", "text": "".join(piece["text"] for piece in pieces)}]
    parts: list[Any] = []
    for piece in pieces:
        match piece:
            case {"text": text}:
                parts.append({"type": "text", "text": text})
            case {"image": media}:
                parts.append(Segment(image=as_image(media_source(media))))
            case {"audio": media}:
                sound = as_audio(media_source(media))
                parts.append((sound.wave_CT, sound.sample_rate))
    return parts


def _turns(row: Row) -> list[tuple[str, list[dict[str, Any]]]]:
    """A conversation up to the answer that is asked for: the last one of the row, where it ends with one."""
    if row.kind == "text":
        return [("user", [{"text": row.text}])]
    turns: list[tuple[str, list[dict[str, Any]]]] = []
    for segment in row.segments:
        role = segment.get("role", "user")
        if not turns or turns[-1][0] != role:
            turns.append((role, []))
        said = {key: segment[key] for key in ("text", "image", "audio") if key in segment}
        if segment.get("new_turn") and "text" in said and turns[-1][1] and "text" in turns[-1][1][-1]:
            said["text"] = f"\n{said['text']}"  # two turns of one role become one, as in training
        turns[-1][1].append(said)
    return turns[:-1] if turns[-1][0] == "assistant" else turns


def messages_of(row: Row, task: str, folder: Path, media: MediaFiles) -> list[dict[str, Any]]:
    """The prompt in TRL's conversational form.

    Args:
        row: of the manifest.
        task: that it is asked for.
        folder: to which paths are relative.
        media: where pictures and sounds go that lie inside a file of rows.
    """
    match task:
        case "caption":
            pieces: list[dict[str, Any]] = [{"image": row.image}]
        case "transcribe":
            pieces = [{"audio": row.audio}]
        case "speak":
            pieces = [{"text": row.text}]
        case "question":
            pieces = [{key: value for key, value in segment.items() if key != "role"} for segment in row.segments]
            pieces.append({"text": str(row.metadata["question"])})
        case _:
            return [{"role": role, "content": _content(said, folder, media)} for role, said in _turns(row)]
    return [{"role": "user", "content": _content(pieces, folder, media)}]


def _content(pieces: Sequence[dict[str, Any]], folder: Path, media: MediaFiles) -> Any:
    if len(pieces) == 1 and "text" in pieces[0]:
        return pieces[0]["text"]
    content = []
    for piece in pieces:
        ((kind, value),) = [(key, piece[key]) for key in ("text", "image", "audio") if key in piece]
        content.append({"type": kind, kind: value if kind == "text" else media.path(value, kind, folder)})
    return content


class MediaFiles:
    """Pictures and sounds as files, those too that lie inside a file of rows.

    Args:
        folder: where the latter are written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, media: Media, kind: str, start: Path) -> str:
        """A file's path, relative to `start`."""
        if isinstance(media, Embedded):
            data = media.read_bytes()
            file = self._folder / f"{media.check:08x}{_suffix(data, kind)}"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
            media = file
        return os.path.relpath(media.absolute(), start.absolute())


_SUFFIXES = {
    b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"fLaC": ".flac", b"OggS": ".ogg", b"ID3": ".mp3",
}  # fmt: skip
"""By how a file begins."""


def _suffix(data: bytes, kind: str) -> str:
    """What a file is called by, which tells a judge and a browser its type."""
    if data[:4] == b"RIFF":
        return ".webp" if data[8:12] == b"WEBP" else ".wav"
    found = (suffix for begin, suffix in _SUFFIXES.items() if data.startswith(begin))
    return next(found, {"image": ".img", "audio": ".wav"}[kind])


def reference_of(row: Row, task: str, folder: Path, media: MediaFiles) -> dict[str, Any]:
    """The manifest's own keys, which rewards look at; of a conversation the reply that it has stands at `answer`."""
    value: dict[str, Any] = {"id": row.id, **row.metadata}
    if row.text:
        value["text"] = row.text
    for kind, one in (("image", row.image), ("audio", row.audio)):
        if one is not None:
            value[kind] = media.path(one, kind, folder)
    reply = reply_of(row) if task == "chat" else None
    if reply is not None:
        value.setdefault("answer", reply)
    return value


def reply_of(row: Row) -> str | None:
    """What a conversation has as the answer that is asked for; None: it doesn't end with one."""
    replies: list[str] = []
    for segment in reversed(row.segments):
        if segment.get("role") != "assistant":
            break
        replies.insert(0, segment.get("text", ""))
    return "".join(replies) if replies else None
