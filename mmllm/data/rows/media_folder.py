"""Folders: pictures and sounds with texts beside them or in a `metadata` file, or texts alone; a text file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmllm.data.rows.bad_rows import ManifestError
from mmllm.data.rows.inputs import Found, Input, each_record, tried
from mmllm.data.rows.manifests import named_files, record_row
from mmllm.data.rows.media_files import IMAGES, SOUNDS, visible_files

_UNREAD = (".heic", ".heif", ".avif", ".jp2", ".svg", ".psd", ".m4a", ".aac", ".wma", ".mp4", ".mov", ".mkv", ".webm")
"""Pictures, sounds and videos that aren't read: the text beside one is a caption, and no text of its own."""
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""What imagefolder and audiofolder of `datasets` call the file of captions."""


def folder_rows(given: Input) -> Found:
    """Each picture or sound with its line in a `metadata` file, or with a text of its name beside it.

    Where there is neither picture nor sound, each text is a row.
    """
    files = visible_files(given.path, given.bad)
    listed: set[Path] = set()
    for item in files:
        if item.name in METADATA:
            yield from _metadata_rows(given.of(item), listed)
    yield from _files_with_texts(given, files, listed)


def _metadata_rows(given: Input, listed: set[Path]) -> Found:
    """Imagefolder's and audiofolder's captions: `file_name`, relative to the file that names it, and other columns."""

    def row(record: dict[str, Any], number: int) -> dict[str, Any]:
        record = {key: value for key, value in record.items() if value is not None and value != ""}
        media = named_files(record)
        names = [name for files in media.values() for name in files]
        if not names:
            raise ManifestError(f"has no 'file_name'; its columns are {', '.join(record)}")
        listed.update(Path(os.path.normpath(given.folder / name)) for name in names)
        files = {f"{kind}s": [str((given.folder / name).absolute()) for name in found] for kind, found in media.items()}
        return record_row({"id": names[0].rpartition(".")[0], **record, **files}, number, given)

    yield from each_record(given, "line of metadata", row)


def _files_with_texts(given: Input, files: Sequence[Path], listed: set[Path]) -> Found:
    """Of files that no metadata lists."""
    media = [item for item in files if item.suffix.lower() in IMAGES + SOUNDS]
    texts = {item.with_suffix(""): item for item in files if item.suffix.lower() == ".txt"}
    told = {item.with_suffix("") for item in media}
    for item in files:
        if item.suffix.lower() in _UNREAD and item.with_suffix("") not in told:
            told.add(item.with_suffix(""))
            kinds = ", ".join(suffix[1:] for suffix in IMAGES + SOUNDS)
            name = item.relative_to(given.path)
            yield str(item), ManifestError(f"{name} isn't of a kind that is read ({kinds}); convert it")
        elif item.suffix.lower() not in (*IMAGES, *SOUNDS, *_UNREAD, ".txt") and item.name not in METADATA:
            given.bad.left_out["other files"] += 1
    for item in media:
        if item not in listed:
            text = texts.get(item.with_suffix(""))
            yield str(item), tried("text", partial(_with_text, given, item, text, bool(listed)))
    for stem, item in texts.items():
        if stem in told:
            continue
        if media:
            yield (
                str(item),
                ManifestError(f"{item.relative_to(given.path)} has no picture or sound beside it"),
            )
        else:
            yield str(item), tried("text", partial(_text_row, item, stem.relative_to(given.path).as_posix()))


def _with_text(given: Input, item: Path, text: Path | None, has_metadata: bool) -> dict[str, Any]:
    name = item.relative_to(given.path)
    if text is None:
        more = " and no line of metadata" if has_metadata else ""
        raise ManifestError(f"{name} has no {name.with_suffix('.txt').name} beside it{more}; give it a text")
    kind = "image" if item.suffix.lower() in IMAGES else "audio"
    return {"id": name.with_suffix("").as_posix(), "text": _read_text(text), kind: str(item.absolute())}


def _text_row(path: Path, name: str) -> dict[str, Any]:
    return {"id": name, "text": _read_text(path)}


def _read_text(path: Path) -> str:
    """What a file says.

    Raises:
        ManifestError: It isn't UTF-8, or holds NUL bytes, as UTF-16 does where it happens to be UTF-8 too.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path.name} isn't UTF-8 ({error.reason}, byte {error.start}); save it as UTF-8") from None
    if "\0" in text:
        raise ManifestError(f"{path.name} holds NUL bytes (the first is byte {data.index(0)}); save it as UTF-8")
    return text.strip()


def text_rows(given: Input) -> Found:
    """A file is a document."""
    yield str(given.path), tried("text", partial(_text_row, given.path, given.path.stem))
