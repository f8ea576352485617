"""CSV and TSV: a row of a table is a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmllm.data.rows.bad_rows import ManifestError
from mmllm.data.rows.records import Found, read_table


def csv_rows(path: Path, folder: Path) -> Found:
    """A header with `text` and `image` or `audio`; other columns are metadata, numbers where they are such."""
    texts = ("id", "text", "image", "audio", "question", "answer")
    for where, row in read_table(path, delimiter="\t" if path.suffix.lower() == ".tsv" else ","):
        if isinstance(row, ManifestError):
            yield where, row
            continue
        yield where, {key: value if key in texts else _number(value) for key, value in row.items() if value != ""}


def _number(value: str) -> Any:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
