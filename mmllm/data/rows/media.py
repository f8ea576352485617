"""Pictures and sounds of rows: files, or embedded in a file of rows, of which a row holds only where they lie.

`train.parquet#12/image/bytes@0a1b2c3d` is what row 12 of `train.parquet` has at `image`, `bytes`;
`chat.jsonl#1052+88221/images/0@…` lies in the record of 88221 bytes that begins at byte 1052. Behind the `@` stands a
checksum, so that a file that was written anew is never misread. Manifests hold these texts where they hold paths.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import re
import struct
import zlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import soundfile

from mmllm.data.rows.bad_rows import ManifestError, is_of_machine
from mmllm.data.rows.records import Place, record_at

TEXT_KEYS = frozenset({
    "text", "value", "content", "caption", "title", "user", "assistant", "query", "response", "instruction", "input",
    "output", "prompt", "completion", "question", "answer", "system", "id",
})  # fmt: skip
"""Keys of texts, in which nothing is taken for a picture or a sound, whatever it looks like."""
_DATA_URL = re.compile(r"data:[\w.+/-]*(?:;[\w.+=\"-]*)*;base64,", re.ASCII)
_BASE64 = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|ZkxhQ|T2dnUw|SUQz)[A-Za-z0-9+/\s]{48,}={0,2}\s*", re.ASCII)
"""JPEG, PNG, GIF, WebP and WAV, FLAC, Ogg, MP3 in base64: no path looks like it."""
_REFERENCE = re.compile(r"(?P<file>.+)#(?P<place>\d+)(?:\+(?P<size>\d+))?/(?P<keys>[^@#]+)@(?P<check>[0-9a-f]{8})")


@dataclass(frozen=True)
class Embedded:
    """A picture or a sound inside a file of rows: where it lies."""

    file: Path
    place: Place
    keys: tuple[str, ...]
    """What leads from the record to it: keys, and numbers of list items."""
    check: int
    """CRC-32 of what lies there."""

    def __str__(self) -> str:
        place = str(self.place) if isinstance(self.place, int) else f"{self.place[0]}+{self.place[1]}"
        keys = "/".join(quote(key, safe="") for key in self.keys)
        return f"{self.file}#{place}/{keys}@{self.check:08x}"

    @classmethod
    def parse(cls, text: str) -> Embedded | None:
        """From what `str` gives; None where it is another text."""
        match = _REFERENCE.fullmatch(text)
        if match is None:
            return None
        place = int(match["place"]) if match["size"] is None else (int(match["place"]), int(match["size"]))
        keys = tuple(unquote(key) for key in match["keys"].split("/"))
        return cls(Path(match["file"]), place, keys, int(match["check"], 16))

    def absolute(self) -> Embedded:
        """The same, to be read from whatever working directory."""
        return replace(self, file=self.file.absolute())

    def read_bytes(self) -> bytes:
        """What a file of it would hold.

        Raises:
            ValueError: The file of rows was changed, or what lies there is neither bytes nor base64.
            OSError: It can't be read.
        """
        try:
            value = record_at(self.file, self.place, self.keys[0])
            for key in self.keys[1:]:
                value = json.loads(value) if isinstance(value, str) else value
                value = value[int(key)] if isinstance(value, list) else value[key]
            raw = _raw(value)
        except (ValueError, LookupError, TypeError, OSError) as error:
            if isinstance(error, OSError) and is_of_machine(error):
                raise
            raise ValueError(f"{self}: isn't there any more ({error}); has {self.file.name} been changed?") from error
        if zlib.crc32(raw) != self.check:
            raise ValueError(f"{self}: {self.file.name} holds something else there by now; read its rows again")
        match value:
            case dict():
                return _float_wav(raw, value["sampling_rate"])
            case bytes():
                return raw
        return _decoded(raw, str(self))


Media = Path | Embedded
"""A picture or a sound of a row. Both have `read_bytes()` and `absolute()`; manifests hold `str` of either."""


def named_media(text: str) -> Media:
    """What `str` of a picture or a sound named."""
    path = Path(text)
    return path if path.is_file() else Embedded.parse(text) or path


def media_source(media: Media) -> Path | bytes:
    """A file as its path, an embedded one as its bytes: what decoders take."""
    return media if isinstance(media, Path) else media.read_bytes()


def media_file(media: Media) -> Path:
    """The file in which it lies."""
    return media if isinstance(media, Path) else media.file


def sound_seconds(media: Media) -> float:
    """A sound's length by its header; 0 where that can't be read."""
    try:
        source = str(media) if isinstance(media, Path) else io.BytesIO(media.read_bytes())
        return float(soundfile.info(source).duration)
    except (OSError, RuntimeError, ValueError) as error:
        if is_of_machine(error):
            raise
        return 0.0


class Digests:
    """What is in pictures and sounds, told by a hash: each is read once."""

    def __init__(self) -> None:
        self._known: dict[Media, str] = {}

    def know(self, media: Media, digest: str) -> None:
        """Take a picture's or a sound's SHA-1 as read."""
        self._known[media] = digest

    def __call__(self, media: Media) -> str:
        """The SHA-1 of a picture or a sound."""
        if media not in self._known:
            if isinstance(media, Path):
                with media.open("rb") as stream:
                    self._known[media] = hashlib.file_digest(stream, "sha1").hexdigest()
            else:
                self._known[media] = hashlib.sha1(media.read_bytes()).hexdigest()
        return self._known[media]


def with_references(value: Any, file: Path, place: Place, texts: Collection[str] = TEXT_KEYS) -> Any:
    """A record with an `Embedded` in place of each picture and sound that it holds as bytes, base64 or data URL.

    Args:
        value: The record.
        file: The file that holds it.
        place: Where.
        texts: Keys whose texts are texts, whatever they look like.
    """
    return _referred(value, file, place, (), texts)


def _referred(value: Any, file: Path, place: Place, keys: tuple[str, ...], texts: Collection[str]) -> Any:
    match value:
        case bytes():
            return Embedded(file, place, keys, zlib.crc32(value)) if value else value
        case str():
            is_text = not keys or keys[-1] in texts
            return value if is_text or not is_encoded(value) else Embedded(file, place, keys, zlib.crc32(_raw(value)))
        case {"array": list(array), "sampling_rate": int(), **others} if array and not others.get("bytes"):
            return Embedded(file, place, keys, zlib.crc32(_raw(value)))
        case dict():
            found = {key: _referred(item, file, place, (*keys, str(key)), texts) for key, item in value.items()}
            return _with_base64(found, file, place, keys)
        case list():
            return [_referred(item, file, place, (*keys, str(n)), texts) for n, item in enumerate(value)]
    return value


def _with_base64(value: dict[str, Any], file: Path, place: Place, keys: tuple[str, ...]) -> dict[str, Any]:
    """Base64 where its key says so: `bytes` beside `path`, `data` beside `format` or `media_type`."""
    match value:
        case {"bytes": str(text)} if text and value.keys() <= {"bytes", "path", "array", "sampling_rate"}:
            key = "bytes"
        case {"data": str(text), "format": str()} | {"data": str(text), "media_type": str()} if text:
            key = "data"
        case _:
            return value
    return {**value, key: Embedded(file, place, (*keys, key), zlib.crc32(_raw(text)))}


def is_encoded(text: str) -> bool:
    """Whether a text is a data URL, or a picture or a sound in base64."""
    if text.startswith("data:"):
        match = _DATA_URL.match(text)
        return match is not None and match.end() < len(text)
    return len(text) > 64 and _BASE64.fullmatch(text) is not None


def _raw(value: Any) -> bytes:
    """What lies there as bytes, not decoded."""
    match value:
        case bytes():
            return value
        case str():
            return value.encode("utf-8", "surrogatepass")
        case {"array": list(array), "sampling_rate": int()}:
            return np.asarray(array, dtype="<f4").reshape(-1).tobytes()
    raise ManifestError(f"{str(value)[:80]} is neither bytes nor base64")


def _float_wav(samples: bytes, rate: int) -> bytes:
    """Mono samples as a WAV file. `soundfile` would write the time into it."""
    head = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", 36 + len(samples), b"WAVE", b"fmt ", 16, 3, 1, rate, 4 * rate, 4, 32)
    return head + struct.pack("<4sI", b"data", len(samples)) + samples


def _decoded(raw: bytes, name: str) -> bytes:
    text = raw.partition(b";base64,")[2] if raw.startswith(b"data:") else raw
    try:
        compact = b"".join(text.split())
        return base64.b64decode(compact + b"=" * (-len(compact) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(f"{name}: isn't base64: {error}") from error
