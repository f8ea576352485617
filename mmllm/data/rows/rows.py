"""Rows: a text, a picture or a sound with its text, or a document of segments.

In a manifest, one JSON object a line, a row has `id`, and `text` with `image` or `audio` (paths relative to the
manifest, or what `media.py` says of embedded ones), or `segments`: a list of `{"text": …}`, `{"image": path}`,
`{"audio": path}`, with `question` and `answer` if there is one. Segments with a `role` (`system`, `user`, `assistant`,
`tool`) are a conversation, of which answers with `"loss": false` aren't trained on; `"new_turn": true` begins a turn
though the one before it is of the same role. Any other key is metadata.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mmllm.data.rows.bad_rows import ManifestError, is_of_machine
from mmllm.data.rows.media import Embedded, Media, is_encoded, media_file
from mmllm.data.rows.media_files import IMAGES, SOUNDS
from mmllm.data.samples.conversations import ROLES

Kind = Literal["caption", "interleaved", "text", "audio"]
KINDS: tuple[Kind, ...] = ("caption", "interleaved", "text", "audio")

OWN_KEYS = ("id", "text", "image", "audio", "segments")
_MEDIA_KEYS = ("image", "audio")


@dataclass(frozen=True)
class Row:
    """One line of a manifest, checked; its files exist but haven't been read."""

    id: str
    kind: Kind
    where: str
    """`file:line`, for messages."""
    text: str = ""
    image: Media | None = None
    audio: Media | None = None
    segments: tuple[dict[str, Any], ...] = ()
    """Each with one key: `text` (str), `image` or `audio` (Media); in a conversation also `role`, `loss` (False)
    where an answer isn't trained on, and `new_turn` (True) where a turn follows one of its role."""
    metadata: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON, for tasks of other processes and machines; `from_json` gives the same row again."""
        segments = [
            {key: _media_to_json(value) if key in _MEDIA_KEYS else value for key, value in segment.items()}
            for segment in self.segments
        ]
        image, audio = _media_to_json(self.image), _media_to_json(self.audio)
        return {**vars(self), "image": image, "audio": audio, "segments": segments}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Row:
        """The row of which `to_json` made this."""
        segments = tuple(
            {key: _media_from_json(item) if key in _MEDIA_KEYS else item for key, item in segment.items()}
            for segment in value["segments"]
        )
        image, audio = _media_from_json(value["image"]), _media_from_json(value["audio"])
        return cls(**{**value, "image": image, "audio": audio, "segments": segments})


def _media_to_json(media: Media | None) -> Any:
    return {"embedded": str(media)} if isinstance(media, Embedded) else None if media is None else str(media)


def _media_from_json(value: Any) -> Media | None:
    return Embedded.parse(value["embedded"]) if isinstance(value, dict) else None if value is None else Path(value)


def row_from_dict(value: Any, folder: Path, where: str) -> Row:
    """A checked row from what its line holds.

    Args:
        value: The row.
        folder: What its paths are relative to.
        where: `file:line`.

    Raises:
        ManifestError: A key or file is missing, empty or of the wrong type.
    """
    if not isinstance(value, dict):
        raise ManifestError(f"a row must be a JSON object, got {type(value).__name__}")
    _check_json(value)
    metadata = {key: item for key, item in value.items() if key not in OWN_KEYS}
    name = _id(value.get("id"), where)
    if "segments" in value:
        beside = [key for key in ("text", "image", "audio") if key in value]
        if beside:
            raise ManifestError(f"a row has {beside[0]!r} beside 'segments'; put it into a segment, where it belongs")
        row = Row(name, "interleaved", where, segments=_segments(value, folder), metadata=metadata)
        if not row_media(row):
            _check_keys(metadata, folder, "a segment")
        return row
    if "image" in value and "audio" in value:
        raise ManifestError("a row has both 'image' and 'audio'; give one, or 'segments'")
    if value.get("text") is None:
        if "image" not in value and "audio" not in value:
            _check_keys(metadata, folder, "image' or 'audio")
        names = ", ".join(key for key in value if key != "text")
        raise ManifestError(f"'text' is missing; the row has {names or 'nothing'}: name its text, --columns text=NAME")
    text = _text(value["text"], "text")
    if "image" in value:
        return Row(name, "caption", where, text, image=_file(value["image"], folder, "image"), metadata=metadata)
    if "audio" in value:
        return Row(name, "audio", where, text, audio=_file(value["audio"], folder, "audio"), metadata=metadata)
    _check_keys(metadata, folder, "image' or 'audio")
    return Row(name, "text", where, text, metadata=metadata)


def _check_keys(metadata: dict[str, Any], folder: Path, wanted: str) -> None:
    """Refuses a row of texts of which another key names a picture or a sound: `image` or `audio` was misspelt."""
    for key, item in metadata.items():
        if isinstance(item, str) and item.lower().endswith(IMAGES + SOUNDS) and (folder / item).is_file():
            kind = "image" if item.lower().endswith(IMAGES) else "audio"
            raise ManifestError(
                f"{key!r} names the file {item}, which '{wanted}' should; rename the key, or say so: "
                f"--columns {kind}={key}"
            )


def _id(value: Any, where: str) -> str:
    if value is None or value == "":
        return f"row{where.rpartition(':')[2]}"
    if isinstance(value, (list, dict)):
        raise ManifestError(f"'id' is {_shown(value)}; give a string or a number, or leave it out")
    return str(value)


def _text(value: Any, key: str) -> str:
    if value is None:
        raise ManifestError(f"{key!r} is missing")
    if not isinstance(value, str):
        raise ManifestError(f"{key!r} must be a string, got {type(value).__name__}")
    if not value.strip():
        raise ManifestError(f"{key!r} is empty")
    return value


def _check_json(value: dict[str, Any]) -> None:
    """Refuses what shards' JSON can't hold, wherever it stands: half surrogate pairs, NaN and Infinity."""
    try:
        _JSON.encode(value).encode()
        return
    except (UnicodeEncodeError, TypeError, ValueError, RecursionError):
        pass  # which key it is, is told below
    for key, item in value.items():
        try:
            _JSON.encode([key, item]).encode()
        except UnicodeEncodeError as error:
            raise ManifestError(f"{key!a} holds half a surrogate pair, which is no Unicode text") from error
        except (TypeError, ValueError, RecursionError) as error:
            if "float values" in str(error):
                raise ManifestError(f"{key!r} holds NaN or Infinity, which JSON can't; give null instead") from error
            raise ManifestError(f"{key!r} holds what JSON can't: {error}") from error


def _reference(value: Any) -> str:
    if isinstance(value, Embedded | bytes):
        return str(value)
    raise TypeError(f"{type(value).__name__} {str(value)[:40]!r}")


_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=_reference)


def _file(value: Any, folder: Path, key: str) -> Media:
    """The file or what is embedded: a path, a reference, or `bytes`, `path`, `array` as datasets has them."""
    match value:
        case Embedded():
            return value
        case {"bytes": Embedded() as embedded} | {"array": Embedded() as embedded}:
            return embedded
        case {"path": str() as path, **others} if not others.get("bytes"):
            value = path
        case {"bytes": _} | {"array": _}:
            raise ManifestError(f"{key!r} has neither bytes nor the path of a file: {_shown(value)}")
    if not isinstance(value, str) or not value:
        raise ManifestError(f"{key!r} must be a path, got {_shown(value)}; leave it out where there is none")
    if value.startswith("data:") or is_encoded(value):
        raise ManifestError(f"{key!r} is {_shown(value)}, which isn't the base64 of a picture or a sound")
    path = folder / value.removeprefix("file://")
    try:
        found, is_empty = path.is_file(), path.is_file() and not path.stat().st_size
        other = "" if found else "is a folder" if path.is_dir() else "is no file" if path.exists() else "doesn't exist"
    except (OSError, ValueError) as error:
        if is_of_machine(error):
            raise
        raise ManifestError(f"{key} {_shown(value)} can't be looked up: {_shown(str(error))}") from error
    if not found:
        if (embedded := Embedded.parse(str(path))) is not None:
            return embedded
        if "://" in value:
            raise ManifestError(f"{key} {_shown(value)} is an address; save the file, and name its path")
        if other != "doesn't exist":
            raise ManifestError(f"{key} {path} {other}; name the file of a picture or a sound")
        raise ManifestError(f"{key} file {path} {other}")
    if is_empty:
        raise ManifestError(f"{key} file {path} is empty (0 bytes)")
    return path


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _segments(value: dict[str, Any], folder: Path) -> tuple[dict[str, Any], ...]:
    items = value["segments"]
    if not isinstance(items, list) or not items:
        raise ManifestError("'segments' must be a list with at least one segment")
    segments = tuple(_segment(item, folder, number) for number, item in enumerate(items))
    if ("question" in value) != ("answer" in value):
        raise ManifestError("'question' and 'answer' go together; one is missing")
    if "question" in value:
        _text(value["question"], "question")
        _text(value["answer"], "answer")
    return segments


def _segment(item: Any, folder: Path, number: int) -> dict[str, Any]:
    kinds = [key for key in ("text", "image", "audio") if isinstance(item, dict) and key in item]
    if len(kinds) > 1:
        raise ManifestError(f"segment {number} has the keys {', '.join(kinds)}; give each a segment of its own")
    match item:
        case {"text": str() as text} if text.strip():
            segment: dict[str, Any] = {"text": text}
        case {"image": path}:
            segment = {"image": _file(path, folder, f"segment {number} image")}
        case {"audio": path}:
            segment = {"audio": _file(path, folder, f"segment {number} audio")}
        case _:
            raise ManifestError(f"segment {number} is {_shown(item)}; give a 'text', 'image' or 'audio', not empty")
    others = [key for key in item if key not in (*kinds, "role", "loss", "new_turn") and item[key] is not None]
    if others:
        raise ManifestError(f"segment {number} has the key {others[0]!r}, which has no place; put it beside 'segments'")
    if (role := item.get("role")) is not None:
        if role not in ROLES:
            raise ManifestError(f"segment {number} has the role {role!r}; it must be one of {', '.join(ROLES)}")
        segment["role"] = role
    if (loss := item.get("loss")) is not None:
        if loss not in (True, False) or role != "assistant":
            raise ManifestError(f"segment {number} has the loss {loss!r}; answers (role assistant) have true or false")
        if not loss:
            segment["loss"] = False
    if (new_turn := item.get("new_turn")) is not None:
        if new_turn not in (True, False) or role is None:
            raise ManifestError(
                f"segment {number} has the new_turn {new_turn!r}; segments with a role have true or false"
            )
        if new_turn:
            segment["new_turn"] = True
    return segment


def answered(row: Row) -> tuple[Row, int]:
    """A conversation without what stands behind its last answer, and how many segments that was.

    Raises:
        ManifestError: Nobody answers in it, or no answer is trained on.
    """
    if not any("role" in segment for segment in row.segments):
        return row, 0
    answers = [number for number, segment in enumerate(row.segments) if segment.get("role") == "assistant"]
    if not answers:
        raise ManifestError("nobody answers in this conversation")
    if not any(row.segments[number].get("loss", True) for number in answers):
        raise ManifestError("no answer of this conversation is trained on (loss: false or weight: 0 throughout)")
    kept = answers[-1] + 1
    return replace(row, segments=row.segments[:kept]), len(row.segments) - kept


def row_text(row: Row) -> str:
    """All that a row says: its text, or its segments' texts, and its question and answer."""
    parts = [row.text] if row.text else [segment["text"] for segment in row.segments if "text" in segment]
    asked = [row.metadata[key] for key in ("question", "answer") if row.metadata.get(key) is not None]
    return "\n".join(map(str, [*parts, *asked]))


def row_media(row: Row) -> list[tuple[str, Media]]:
    """The pictures and sounds of a row, in order, each with "image" or "audio"."""
    own = [(kind, media) for kind, media in (("image", row.image), ("audio", row.audio)) if media is not None]
    return own + [(kind, segment[kind]) for segment in row.segments for kind in ("image", "audio") if kind in segment]


def row_files(row: Row) -> list[Path]:
    """The files in which they lie."""
    return [media_file(media) for _, media in row_media(row)]


def with_absolute_paths(row: Row) -> Row:
    """The row, to be read from whatever working directory."""
    image, audio = (media.absolute() if media is not None else None for media in (row.image, row.audio))
    segments = tuple(
        {key: value.absolute() if key in ("image", "audio") else value for key, value in segment.items()}
        for segment in row.segments
    )
    return replace(row, image=image, audio=audio, segments=segments)
