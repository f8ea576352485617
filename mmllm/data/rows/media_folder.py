"""Folders: pictures and sounds with texts beside them, or texts alone; a text file."""

from __future__ import annotations

from pathlib import Path

from mmllm.data.rows.bad_rows import ManifestError
from mmllm.data.rows.media_files import IMAGES, SOUNDS
from mmllm.data.rows.records import Found

_UNREAD = (".heic", ".heif", ".avif", ".jp2", ".svg", ".psd", ".m4a", ".aac", ".wma", ".mp4", ".mov", ".mkv", ".webm")
"""Pictures, sounds and films that aren't read: the text beside one is a caption, and no text of its own."""


def folder_rows(path: Path, folder: Path) -> Found:
    """Each picture or sound with a text of the same name beside it; or plain texts, where there is nothing else."""
    files = sorted(item for item in path.rglob("*") if item.is_file() and not item.name.startswith("."))
    media = [item for item in files if item.suffix.lower() in IMAGES + SOUNDS]
    told = {item.with_suffix("") for item in media}
    for item in files:
        if item.suffix.lower() in _UNREAD and item.with_suffix(".txt").is_file() and item.with_suffix("") not in told:
            told.add(item.with_suffix(""))
            kinds = ", ".join(suffix[1:] for suffix in IMAGES + SOUNDS)
            yield (
                str(item),
                ManifestError(f"{item.relative_to(path)} isn't of a kind that is read ({kinds}); convert it"),
            )
    texts = [item for item in files if item.suffix.lower() == ".txt" and item.with_suffix("") not in told]
    for item in media or texts:
        name = item.relative_to(path)
        text = item.with_suffix(".txt")
        if not text.is_file():
            yield str(item), ManifestError(f"{name} has no {text.name} beside it")
            continue
        row = {"id": name.with_suffix("").as_posix(), "text": _read_text(text)}
        if item in media:
            row["image" if item.suffix.lower() in IMAGES else "audio"] = str(item.absolute())
        yield str(item), row


def text_rows(path: Path, folder: Path) -> Found:
    """A file is a document."""
    yield str(path), {"id": path.stem, "text": _read_text(path)}


def _read_text(path: Path) -> str:
    return path.read_bytes().decode("utf-8-sig", "replace").strip()
