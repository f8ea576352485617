"""Plain rows: records of our own form that any importer would take as they are.

Most rows of large manifests are: a text, alone or with one picture or one sound by its path, and metadata. Of these,
kind and id are told without making the row; what is not surely plain is left to the importer (`manifests.py`), so this
knows only what the importer surely accepts.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from mmllm.data.rows.column_names import OWN
from mmllm.data.rows.conversations import SIGNS
from mmllm.data.rows.inputs import MAY_BE_JSON, MAY_BE_LISTS
from mmllm.data.rows.manifests import FILES
from mmllm.data.rows.marks import has_marks
from mmllm.data.rows.media import is_encoded
from mmllm.data.rows.media_files import IMAGES, SOUNDS
from mmllm.data.rows.records import may_embed
from mmllm.data.rows.rows import OWN_KEYS, Kind, Row

_EMBEDDED = ("bytes", "data", "array")
_MEANT = frozenset({*SIGNS, *MAY_BE_JSON, *MAY_BE_LISTS, *FILES, *_EMBEDDED, *OWN_KEYS}) - set(OWN)
"""Keys that mean something to an importer. A record that has one isn't plain."""
_LONGEST_SUFFIX = max(map(len, IMAGES + SOUNDS))
_MAX_SHAPES = 10_000
_MAX_BRACKETS = 100


class _Shape(NamedTuple):
    """What the keys of a record say of it."""

    kind: Kind
    file_key: str
    """`image` or `audio`; "" for a text."""
    others: tuple[str, ...]
    """Keys of metadata."""


class PlainRows:
    """Tells plain rows.

    Args:
        folder: What their paths are relative to.
    """

    def __init__(self, folder: Path) -> None:
        self._prefix = os.path.join(folder, "")
        self._decode = json.JSONDecoder().raw_decode
        self._shapes: dict[tuple[str, ...], _Shape | None] = {}
        self._last_file = ""

    def told(self, line: bytes, number: int) -> tuple[Kind, str] | None:
        """Kind and id of the plain row in a line; None where it may not be one.

        Its file is there and isn't empty.

        Args:
            line: The line.
            number: Of the line, from 1.
        """
        try:
            text = line.decode()
            record, end = self._decode(text)
        except (ValueError, RecursionError):
            return None
        if type(record) is not dict or text[end:] not in ("\n", "\r\n", ""):
            return None
        keys = tuple(record)
        try:
            shape = self._shapes[keys]
        except KeyError:
            shape = self._new_shape(keys)
        if shape is None or not self._is_plain(record, text, shape):
            return None
        name = row_id(record, number)
        return None if name is None else (shape.kind, name)

    def _new_shape(self, keys: tuple[str, ...]) -> _Shape | None:
        if len(self._shapes) >= _MAX_SHAPES:
            self._shapes.clear()  # keys of metadata that are data themselves
        self._shapes[keys] = shape = _shape(keys)
        return shape

    def _is_plain(self, record: dict[str, Any], text: str, shape: _Shape) -> bool:
        words = record["text"]
        if type(words) is not str or not words or words.isspace():
            return False
        has_nested = False
        for key in shape.others:
            value = record[key]
            if type(value) is str:
                if is_encoded(value) or (not shape.file_key and _ends_as_file(value)):
                    return False
            elif type(value) is list or type(value) is dict:
                has_nested = True
            elif type(value) is float and not math.isfinite(value):
                return False
        if has_nested and may_embed(text):
            return False
        has_escapes = "\\" in text and ("\\ud" in text or "\\uD" in text)
        if (has_nested or has_escapes) and not _can_be_written(record, text):
            return False
        if not shape.file_key:
            return True
        return not ("<" in words and has_marks(words)) and self._is_file(record[shape.file_key])

    def _is_file(self, value: Any) -> bool:
        """Whether it is the path of a file that isn't empty, and can be nothing else."""
        if value and value == self._last_file:  # captions of one picture mostly follow each other
            return True
        if type(value) is not str or not value or ":" in value or value[0] in "[{" or value[0].isspace():
            return False
        if len(value) > 64 and is_encoded(value):
            return False
        try:
            found = os.stat(value if value[0] == "/" else self._prefix + value)
        except (OSError, ValueError):  # the importer says what it is
            return False
        if not stat.S_ISREG(found.st_mode) or not found.st_size:
            return False
        self._last_file = value
        return True


def plain_row(line: bytes, number: int, kind: Kind, folder: Path, where: str) -> Row:
    """The row of a line of which `PlainRows` told the kind.

    Args:
        line: The line.
        number: Of the line, from 1.
        kind: The kind.
        folder: What its paths are relative to; absolute.
        where: `file:line`.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: There is another line by now.
    """
    record = json.loads(line.decode())
    name = row_id(record, number)
    if name is None:
        raise TypeError("the row has another id")
    metadata = {key: value for key, value in record.items() if key not in OWN_KEYS}
    image = folder / record["image"] if kind == "caption" else None
    audio = folder / record["audio"] if kind == "audio" else None
    return Row(name, kind, where, record["text"], image, audio, metadata=metadata)


def row_id(record: dict[str, Any], number: int) -> str | None:
    """The id of a plain record in the line of this number; None where it is odd."""
    name = record.get("id")
    if name is None or name == "":
        return f"row{number}"
    if type(name) is str:
        return name
    return str(name) if type(name) is int else None


def _shape(keys: tuple[str, ...]) -> _Shape | None:
    found = set(keys)
    others = tuple(key for key in keys if key not in OWN)
    if "text" not in found or {"image", "audio"} <= found or not _MEANT.isdisjoint(_lowered(found)):
        return None
    if any(key.strip().lower() in OWN for key in others):
        return None
    if "image" in found:
        return _Shape("caption", "image", others)
    return _Shape("audio", "audio", others) if "audio" in found else _Shape("text", "", others)


def _lowered(keys: Iterable[str]) -> list[str]:
    return [key.strip().lower() for key in keys]


def _ends_as_file(value: str) -> bool:
    return value[-_LONGEST_SUFFIX:].lower().endswith(IMAGES + SOUNDS)


def _can_be_written(record: dict[str, Any], text: str) -> bool:
    """Whether it is shallow, and Unicode throughout: no half surrogate pairs; and all numbers are finite."""
    if text.count("[") + text.count("{") > _MAX_BRACKETS:
        return False
    try:
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        return False
    return True
