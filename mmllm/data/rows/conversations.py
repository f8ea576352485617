"""LLaVA's, ShareGPT's and OpenAI's conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmllm.data.rows.bad_rows import ManifestError
from mmllm.data.rows.media_files import local_image
from mmllm.data.rows.records import Found, each_record, record_id

_ROLES = {"human": "user", "user": "user", "system": "user", "gpt": "assistant", "assistant": "assistant"}
_SLOTS = {"<image>": "image", "<audio>": "audio"}


def conversation_rows(path: Path, folder: Path) -> Found:
    """LLaVA's `conversations` (`from`, `value`) and ShareGPT's or OpenAI's `messages` (`role`, `content`).

    `<image>` in a text stands for the next picture of `image` or `images`; pictures without a mark come first. A
    content may be a list of parts: `text`, `image_url` (of a picture in the media folder), and `image` or `audio`,
    which stand for the next one.
    """
    return each_record(
        path, "conversation", lambda record, number: _conversation(record, record_id(record, f"chat{number}"), folder)
    )


def _conversation(record: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
    turns = record.get("conversations") or record.get("messages") or []
    left = {kind: list(_listed(record, kind)) for kind in _SLOTS.values()}
    contents = [_content(turn.get("value", turn.get("content")), folder) for turn in turns]
    texts = [item for content in contents for item in content if isinstance(item, str)]
    marked = {kind: sum(text.count(mark) for text in texts) for mark, kind in _SLOTS.items()}
    segments: list[dict[str, Any]] = []
    for kind, files in left.items():
        unmarked = len(files) - marked[kind]
        if unmarked < 0:
            raise ManifestError(f"{marked[kind]} marks for {kind} but {len(files)} files; give one for each")
        segments += [{kind: files.pop(0), "role": "user"} for _ in range(unmarked)]
    for turn, content in zip(turns, contents, strict=True):
        role = _ROLES.get(str(turn.get("from", turn.get("role"))))
        if role is None:
            raise ManifestError(f"unknown role {turn.get('from', turn.get('role'))!r}; known are {', '.join(_ROLES)}")
        for item in content:
            pieces = _pieces(item, left) if isinstance(item, str) else [item]
            segments += [{**piece, "role": role} for piece in pieces]
    if not any(segment["role"] == "assistant" for segment in segments):
        raise ManifestError("nobody answers in this conversation")
    return {"id": name, "segments": segments}


def _content(value: Any, folder: Path) -> list[str | dict[str, Any]]:
    """What is said in a turn: texts, marks for the next picture or sound among them, and pictures with their paths.

    Raises:
        ManifestError: It says nothing, or has a part that isn't read.
    """
    if isinstance(value, (str, int, float)):
        return [str(value)]
    if not isinstance(value, list) or not value:
        raise ManifestError(f"a turn's content is {value!r}; give a text or a list of parts")
    found: list[str | dict[str, Any]] = []
    for part in value:
        match part:
            case str() | {"type": "text", "text": str()}:
                found.append(part if isinstance(part, str) else part["text"])
            case {"type": "image_url", "image_url": {"url": str() as url}} | {
                "type": "image_url",
                "image_url": str() as url,
            }:
                found.append({"image": _named_image(url, folder)})
            case {"type": "image", "image": str() as url} | {"type": "image", "url": str() as url}:
                found.append({"image": _named_image(url, folder)})
            case {"type": "image" | "audio" as kind, **others} if not any(others.values()):
                found.append(f"<{kind}>")
            case _:
                shown = repr(part)
                raise ManifestError(
                    f"a turn has the part {shown[:80]}{'…' if len(shown) > 80 else ''}; those of type text and "
                    f"image_url are read"
                )
    return found


def _named_image(url: str, folder: Path) -> str:
    found = None if url.startswith("data:") else local_image(url.removeprefix("file://"), folder)
    if found is None:
        raise ManifestError(f"image_url {url[:80]!r} names no picture in {folder}; save it there, and name its path")
    return str(found.absolute())


def _listed(record: dict[str, Any], kind: str) -> list[str]:
    value = record.get(f"{kind}s", record.get(kind))
    return [] if value is None else value if isinstance(value, list) else [value]


def _pieces(text: str, left: dict[str, list[str]]) -> list[dict[str, Any]]:
    """A text cut at its marks, each replaced by the next file."""
    pieces: list[dict[str, Any]] = []
    while text:
        place, mark = min(((text.find(mark), mark) for mark in _SLOTS if mark in text), default=(len(text), ""))
        before = text[:place].strip("\n")
        if before.strip():
            pieces.append({"text": before})
        if mark:
            kind = _SLOTS[mark]
            pieces.append({kind: left[kind].pop(0)})
        text = text[place + len(mark) :]
    return pieces
