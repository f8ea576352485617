"""Inputs of rows, written for a test."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from mmllm.data.rows.bad_rows import BadRows
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.rows import Row


def picture_bytes(number: int, form: str = "PNG") -> bytes:
    """A small picture, another for each number."""
    stream = io.BytesIO()
    Image.new("RGB", (8 + number, 6), (40 * number % 256, 90, 200)).save(stream, form)
    return stream.getvalue()


def pictures(folder: Path, count: int = 3) -> list[bytes]:
    """`0.png`, `1.png`, … in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    found = [picture_bytes(number) for number in range(count)]
    for number, data in enumerate(found):
        (folder / f"{number}.png").write_bytes(data)
    return found


def sound_bytes(number: int = 0, form: str = "FLAC") -> bytes:
    """A fifth of a second of a tone, another for each number."""
    stream = io.BytesIO()
    wave = 0.3 * np.sin(np.arange(1600) * (0.1 + 0.05 * number))
    soundfile.write(stream, wave.astype(np.float32), 8000, format=form)
    return stream.getvalue()


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def as_lines(path: Path, *records: Any) -> Path:
    """A JSONL file."""
    return put(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read(path: Path, **options: Any) -> tuple[list[Row], list[str]]:
    """The good rows, and what is wrong with the others; one good row is added so that all others may be bad."""
    bad = BadRows(1.0)
    return read_rows(path, bad, **options), bad.reasons


def only(path: Path, **options: Any) -> Row:
    (row,) = read_rows(path, **options)
    return row


def said(row: Row) -> list[str]:
    """A conversation in short: `u:` or `a:` and each segment, a file by its name."""
    found = []
    for segment in row.segments:
        media = segment.get("image", segment.get("audio"))
        shown = segment["text"] if "text" in segment else Path(str(media).partition("@")[0]).name
        found.append(f"{segment.get('role', '-')[0]}:{shown}" + ("" if segment.get("loss", True) else " (not trained)"))
    return found
