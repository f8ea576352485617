"""Inputs of any form as rows: our manifests, and other people's data, each form by its own importer.

Each importer yields (where, row) pairs in the manifest's form (`rows.py`), which are then checked like a manifest's.
A row that can't be told is an exception in place of the row: it is counted and named.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from mmllm.data.rows.bad_rows import BadRows, ManifestError
from mmllm.data.rows.coco import coco_rows, is_coco
from mmllm.data.rows.column_names import ColumnNames
from mmllm.data.rows.common_voice import COLUMNS, common_voice_rows
from mmllm.data.rows.conversations import conversation_rows, is_conversation
from mmllm.data.rows.inputs import Found, Input, opened
from mmllm.data.rows.librispeech import TRANSCRIPT, librispeech_rows
from mmllm.data.rows.manifests import manifest_rows, table_rows
from mmllm.data.rows.media_files import visible_files
from mmllm.data.rows.media_folder import METADATA, folder_rows, text_rows
from mmllm.data.rows.records import read_records
from mmllm.data.rows.rows import Row, answered, row_from_dict
from mmllm.data.rows.tables import open_table
from mmllm.data.rows.web_documents import mmc4_rows, obelics_rows
from mmllm.data.rows.wordings import table_path, wording_rows

_logger = logging.getLogger(__name__)

FORMS: dict[str, Callable[[Input], Found]] = {
    "manifest": manifest_rows,
    "csv": table_rows,
    "folder": folder_rows,
    "llava": conversation_rows,
    "coco": coco_rows,
    "librispeech": librispeech_rows,
    "commonvoice": common_voice_rows,
    "obelics": obelics_rows,
    "mmc4": mmc4_rows,
    "text": text_rows,
    "flan": wording_rows,
}
_WITHOUT_COLUMNS = ("coco", "librispeech", "commonvoice", "text")
OF_FOLDERS = ("folder", "librispeech")
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
"""Of files whose form can be told."""
_LOOKED_AT = 20
"""Records from which the form is told: the first may be an odd one."""


def read_rows(
    path: str | Path,
    bad: BadRows | None = None,
    form: str = "auto",
    media: str | Path | None = None,
    columns: ColumnNames | None = None,
    is_asked: bool = False,
) -> list[Row]:
    """The good rows of an input of any form.

    Args:
        path: A file or folder.
        bad: Takes the rows that are skipped; without it, any bad row is an error.
        form: A key of `FORMS`, or `auto`: told from the file.
        media: What its paths are relative to; by default the folder in which it lies.
        columns: What its columns are called here, and their types.
        is_asked: Whether conversations are prompts: a question at the end stays, and none needs an answer.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ManifestError: Its form isn't known, it is empty, or has more bad rows than `bad` allows.
    """
    own = bad if bad is not None else BadRows(0.0)
    form, given = told_input(path, own, form, media, columns)
    given = replace(given, is_asked=is_asked)
    since, count = len(own.reasons), 0
    rows: list[Row] = []
    for where, value in FORMS[form](given):
        count += 1
        if (row := checked_row(where, value, given)) is not None:
            rows.append(row)
    check_read(count, given, since, form)
    return rows


def told_input(
    path: str | Path, bad: BadRows, form: str, media: str | Path | None, columns: ColumnNames | None
) -> tuple[str, Input]:
    """The form of an input, a key of `FORMS`, and what its reader takes.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ManifestError: Its form isn't known.
    """
    path, columns = Path(path), columns or ColumnNames()
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such manifest")
    if form == "auto":
        path = path / "manifest.jsonl" if (path / "manifest.jsonl").is_file() else path
        form = told_form(path, columns)
    if form not in FORMS:
        raise ManifestError(f"format is {form!r}; it must be one of auto, {', '.join(FORMS)}")
    if path.is_dir() != (form in OF_FOLDERS):
        what = "a folder; name the file in it" if path.is_dir() else "a file; name its folder"
        raise ManifestError(f"{path}: is {what}, which the form {form} reads")
    folder = Path(media) if media is not None else path if path.is_dir() else path.parent
    if columns.ours and form in _WITHOUT_COLUMNS:
        _logger.warning("--columns isn't used for %s: the form %s has no columns to name", path, form)
    return form, Input(path, folder, columns, bad)


def checked_row(where: str, value: dict[str, Any] | ManifestError, given: Input) -> Row | None:
    """The row of what a reader found; None of a bad one, which is counted."""
    try:
        if isinstance(value, ManifestError):
            raise value
        row = row_from_dict(value, given.folder, where)
        if given.is_asked:
            return row
        row, num_unanswered = answered(row)
        if num_unanswered:
            _logger.warning("%s: ends without an answer; what stands behind the last one is left out", where)
            given.bad.left_out["questions at the end of a conversation, which nobody answers"] += 1
        return row
    except ManifestError as error:
        given.bad.add(where, error)
        return None


def check_read(count: int, given: Input, since: int, form: str) -> None:
    """Refuses an input of which nothing, or too little, could be read.

    Args:
        count: Of its rows, bad ones included.
        given: The input.
        since: Bad rows from this one on are its.
        form: As which it was read.

    Raises:
        ManifestError: It is empty, or has more bad rows than are allowed.
    """
    if not count:
        raise ManifestError(f"{given.path}: is empty, or holds no rows of the form {form}; --format names others")
    given.bad.check(count, str(given.path), since)


def is_input(path: Path) -> bool:
    """Whether `read_rows` may read it: a file whose form can be told, or a folder that holds no shards."""
    if path.is_dir():
        return next(path.glob("*.tar"), None) is None
    return path.suffix.lower() in SUFFIXES


def told_form(path: Path, columns: ColumnNames | None = None) -> str:
    """The form of an input, told from its name and its first records.

    Raises:
        ManifestError: It can't be told.
    """
    if path.is_dir():
        names = {item.name for item in visible_files(path, BadRows(0.0))}
        is_librispeech = names.isdisjoint(METADATA) and any(name.endswith(TRANSCRIPT) for name in names)
        return "librispeech" if is_librispeech else "folder"
    match path.suffix.lower():
        case ".json" | ".jsonl" | ".parquet" | ".csv" if table_path(path).is_file():
            return "flan"
        case ".txt":
            return "text"
        case ".csv":
            return "csv"
        case ".tsv":
            return "commonvoice" if set(open_table(path, has_quotes=False).names) >= COLUMNS else "csv"
        case ".json" | ".jsonl" | ".parquet":
            return _told_records(path, columns or ColumnNames())
    raise ManifestError(f"{path}: can't tell its form; name it with --format ({', '.join(FORMS)})")


def _told_records(path: Path, columns: ColumnNames) -> str:
    if path.suffix.lower() == ".json" and is_coco(path):
        return "coco"
    records = []
    try:
        for record in islice(read_records(path), _LOOKED_AT):
            if isinstance(record.value, dict):
                named = {columns.ours.get(key) or key: value for key, value in record.value.items()}
                records.append({key: opened(key, value) for key, value in named.items()})
    except ManifestError:
        pass  # the form's reader says what is wrong
    for record in records:
        if is_conversation(record):
            return "llava"
        match record:
            case {"text_list": _}:
                return "mmc4"
            case {"texts": list(), "images": list()}:
                return "obelics"
    return "manifest"
