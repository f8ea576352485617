"""Manifests in our own form, tables and parquet files: a record is a row, or a conversation."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from mmllm.data.rows.bad_rows import ManifestError
from mmllm.data.rows.conversations import SIGNS, conversation, empty_talk, is_conversation
from mmllm.data.rows.inputs import Found, Input, each_record, read_record
from mmllm.data.rows.marks import KINDS, Marked, has_marks
from mmllm.data.rows.media_files import IMAGES, SOUNDS, drop_embedded, gathered, listed, local_image, refuse_videos
from mmllm.data.rows.records import Record, is_null

_TEXTS = ("caption", "title", "transcription", "transcript", "sentence")
"""What others call the text of a picture or a sound, where there is no `text`."""
FILES = ("filepath", "file_name", "image_file_name", "audio_file_name")
"""What others call a picture's or a sound's file, where there is neither `image` nor `audio`."""

_OF_FILES = frozenset({*KINDS, *FILES})
_SIGNS = frozenset({*SIGNS, *FILES, "segments", *(f"{kind}{s}" for kind in (*KINDS, "video") for s in ("", "s"))})
"""Keys that ask for more than to be taken as they are."""


@lru_cache(maxsize=4096)
def _is_sign(key: str) -> bool:
    return key.strip().lower() in _SIGNS


def manifest_rows(given: Input) -> Found:
    """JSONL, JSON lists and parquet: a record is a row. Parquet's nulls are no values."""
    if given.path.suffix.lower() == ".parquet":
        return each_record(given, "row", lambda record, number: record_row(_filled(record, ()), number, given))
    return each_record(given, "row", lambda record, number: record_row(record, number, given))


def manifest_row(record: Record, number: int, given: Input) -> dict[str, Any] | ManifestError:
    """One record of the file as `manifest_rows` gives it."""
    return read_record(given.named(record), number, "row", lambda value, number: record_row(value, number, given))


def table_rows(given: Input) -> Found:
    """CSV and TSV: `text` with `image` or `audio`; other columns are metadata. Values are texts, empty ones none."""
    return each_record(given, "row", lambda record, number: record_row(_filled(record, ("",)), number, given))


def _filled(record: dict[str, Any], nothing: tuple[str, ...]) -> dict[str, Any]:
    """A table's record without what is nothing, but for pictures and sounds, which a row must not lack unnoticed."""
    found: dict[str, Any] = {}
    for key, value in record.items():
        is_nothing = value is None or (isinstance(value, str) and value in nothing)
        if not is_nothing:
            found[key] = value
        elif key.strip().lower() in _OF_FILES:
            found[key] = None
    return found


def record_row(record: dict[str, Any], number: int, given: Input) -> dict[str, Any]:
    """A record in the manifest's form, whatever its columns are called.

    Raises:
        ManifestError: It holds what has no place in a row.
    """
    if not any(map(_is_sign, record)):  # most rows of texts
        return drop_embedded(record, False, given.bad)
    if is_conversation(record):
        return conversation(record, number, given)
    row = dict(record)
    refuse_videos(row)
    lacking = [key for key in row if key.strip().lower() in _OF_FILES and row[key] != [] and not listed(row[key])]
    media = {kind: gathered(row, kind) for kind in KINDS}
    if not any(media.values()) and "segments" not in row:
        media = named_files(row)
    has_media = any(media.values())
    if has_media and row.get("text") is None and "segments" not in row:
        _name_text(row)
    if isinstance(row.get("segments"), list):
        row["segments"] = [_without_nulls(item) for item in row["segments"]]
    row = drop_embedded(row, has_media or "segments" in row, given.bad)
    if not has_media:
        if "segments" not in row:
            _note_lacking(lacking, given)
            if row.get("text") is None and (empty := empty_talk(record)):
                raise ManifestError(empty)
        return row
    row = {key: value for key, value in row.items() if key not in lacking}
    text = row.get("text")
    if isinstance(text, str) and has_marks(text) and "segments" not in row:
        return _document(row, text, media, given)
    for kind, files in media.items():
        if len(files) > 1:
            raise ManifestError(f"has {len(files)} files in '{kind}s' and one text; mark their places in it: <{kind}>")
        if files:
            row[kind] = files[0]
    return row


def _note_lacking(keys: list[str], given: Input) -> None:
    """Counts a row of texts whose `image` and `audio` are both empty: tables of several kinds have such rows.

    Raises:
        ManifestError: It has one such key, so that its picture or its sound is missing.
    """
    if len(keys) == 1:
        raise ManifestError(
            f"{keys[0]!r} must be a path, got None; leave it out where there is none, or the row out of a table whose "
            f"rows have one"
        )
    if keys:
        given.bad.left_out["rows with neither picture nor sound, kept as texts"] += 1


def _without_nulls(segment: Any) -> Any:
    """A segment without the keys that parquet gives it because others have them."""
    return (
        {key: value for key, value in segment.items() if not is_null(value)} if isinstance(segment, dict) else segment
    )


def named_files(row: dict[str, Any]) -> dict[str, list[Any]]:
    """Pictures and sounds in columns that others' forms call so; these leave the row."""
    media: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    for key in FILES:
        theirs = next((name for name in row if name.strip().lower() == key), key)
        value = row.get(theirs)
        if not isinstance(value, str):
            continue
        kinds = [kind for kind, endings in zip(KINDS, (IMAGES, SOUNDS), strict=True) if value.lower().endswith(endings)]
        kind = key.partition("_file_name")[0] if key.endswith("_file_name") else next(iter(kinds), None)
        if kind is None:
            known = ", ".join(ending[1:] for ending in IMAGES + SOUNDS)
            raise ManifestError(f"{theirs!r} is {value!r}, which ends as no picture or sound does ({known})")
        media[kind].append(row.pop(theirs))
    return media


def _name_text(row: dict[str, Any]) -> None:
    """Calls a caption or a transcript `text`, whatever its column was called, if there is one such column."""
    found = [key for key in row if key.strip().lower() in _TEXTS and isinstance(row[key], str)]
    if len(found) > 1:
        raise ManifestError(
            f"has no 'text', and {found[0]!r} as well as {found[1]!r}; say which it is: --columns text={found[0]}"
        )
    row.pop("text", None)
    if found:
        row["text"] = row.pop(found[0])


def _document(row: dict[str, Any], text: str, media: dict[str, list[Any]], given: Input) -> dict[str, Any]:
    """A text with marks as a document of segments."""

    def find(kind: str, path: str) -> str:
        found = local_image(path, given.folder)
        if found is None:
            raise ManifestError(f"{kind} {path!r} isn't in {given.folder}; save it there, and name its path")
        return str(found.absolute())

    marked = Marked([text], media, find)
    segments = [{kind: file} for kind in KINDS for file in marked.unmarked[kind]] + marked.pieces(text)
    others = {key: value for key, value in row.items() if key != "text"}
    return {**others, "segments": segments}
