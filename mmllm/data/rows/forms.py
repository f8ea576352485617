"""Inputs of any form as rows: our manifests, and other people's data, each form by its own importer.

Each importer yields (where, row) pairs in the manifest's form (`rows.py`), which are then checked like a manifest's.
A row that can't be told is an exception in place of the row: it is counted and named.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from mmllm.data.rows.bad_rows import BadRows, ManifestError
from mmllm.data.rows.coco import coco_rows, is_coco
from mmllm.data.rows.common_voice import common_voice_rows
from mmllm.data.rows.conversations import conversation_rows
from mmllm.data.rows.csv_table import csv_rows
from mmllm.data.rows.librispeech import librispeech_rows
from mmllm.data.rows.media_folder import folder_rows, text_rows
from mmllm.data.rows.records import Found, read_records
from mmllm.data.rows.rows import Row, read_manifest, row_from_dict
from mmllm.data.rows.web_documents import mmc4_rows, obelics_rows

_LOOKED_AT = 20
"""Records from which the form is told: the first may be an odd one."""


def read_rows(
    path: str | Path, bad: BadRows | None = None, form: str = "auto", media: str | Path | None = None
) -> list[Row]:
    """The good rows of an input of any form.

    Args:
        path: A file or folder.
        bad: Takes the rows that are skipped; without it, any bad row is an error.
        form: A key of `FORMS`, or `auto`: told from the file.
        media: What its paths are relative to; by default the folder in which it lies.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ManifestError: Its form isn't known, it is empty, or has more bad rows than `bad` allows.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such manifest")
    if form == "auto":
        path = path / "manifest.jsonl" if (path / "manifest.jsonl").is_file() else path
        form = told_form(path)
    if form not in FORMS:
        raise ManifestError(f"format is {form!r}; it must be one of auto, {', '.join(FORMS)}")
    if form == "manifest" and media is None and path.suffix.lower() not in (".json", ".parquet"):
        return read_manifest(path, bad)
    folder = Path(media) if media is not None else path if path.is_dir() else path.parent
    own = bad if bad is not None else BadRows(0.0)
    since, count = len(own.reasons), 0
    rows: list[Row] = []
    for where, value in FORMS[form](path, folder):
        count += 1
        try:
            if isinstance(value, ManifestError):
                raise value
            rows.append(row_from_dict(value, folder, where))
        except ManifestError as error:
            own.add(where, error)
    if not count:
        raise ManifestError(f"{path}: holds no rows of the form {form}; see --format for others")
    own.check(count, str(path), since)
    return rows


def told_form(path: Path) -> str:
    """The form of an input, told from its name and its first record.

    Raises:
        ManifestError: It can't be told.
    """
    if path.is_dir():
        return "librispeech" if next(path.rglob("*.trans.txt"), None) is not None else "folder"
    match path.suffix.lower():
        case ".txt":
            return "text"
        case ".csv":
            return "csv"
        case ".tsv":
            with path.open(encoding="utf-8-sig", errors="replace") as stream:
                header = set(next(csv.reader([stream.readline()], delimiter="\t"), []))
            return "commonvoice" if {"client_id", "path", "sentence"} <= header else "csv"
        case ".json" | ".jsonl" | ".parquet":
            return _told_records(path)
    raise ManifestError(f"{path}: can't tell its form; name it with --format ({', '.join(FORMS)})")


def _told_records(path: Path) -> str:
    if path.suffix.lower() == ".json" and is_coco(path):
        return "coco"
    try:
        records = [value for _, value in islice(read_records(path), _LOOKED_AT)]
    except ManifestError:
        records = []  # the form's reader says what is wrong
    for record in records:
        match record:
            case {"conversations": _} | {"messages": _}:
                return "llava"
            case {"text_list": _}:
                return "mmc4"
            case {"texts": list(), "images": list()}:
                return "obelics"
    return "manifest"


def _manifest_rows(path: Path, folder: Path) -> Found:
    yield from read_records(path)


FORMS: dict[str, Callable[[Path, Path], Found]] = {
    "manifest": _manifest_rows,
    "csv": csv_rows,
    "folder": folder_rows,
    "llava": conversation_rows,
    "coco": coco_rows,
    "librispeech": librispeech_rows,
    "commonvoice": common_voice_rows,
    "obelics": obelics_rows,
    "mmc4": mmc4_rows,
    "text": text_rows,
}
