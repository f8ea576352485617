"""Pictures and sounds as files: which kinds are read, which a folder holds, and what a record says of its own."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from mmllm.data.rows.bad_rows import BadRows, ManifestError, is_of_machine
from mmllm.data.rows.media import Embedded
from mmllm.data.rows.records import is_null

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
SOUNDS = (".flac", ".wav", ".ogg", ".mp3", ".opus")
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
_OF_ROWS = ("image", "images", "audio", "audios", "segments")
_SIMPLE = (str, int, float, type(None))
_OF_MACOS = ("__MACOSX", ".DS_Store")


def visible_files(folder: Path, bad: BadRows) -> list[Path]:
    """All files below a folder, in order; what macOS puts beside files, and hidden ones, are counted in `bad`.

    Links to folders elsewhere are followed, each folder once; those that lead to one a second time are counted.
    """
    found: list[Path] = []
    root, seen = folder.resolve(), set[str]()
    for name, folders, files in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(name))
        folders.sort()
        for each in list(folders):
            path = Path(name, each)
            if hidden := _hidden_as(each):
                folders.remove(each)
                bad.left_out[hidden] += sum(len(names) for _, _, names in os.walk(path))
            elif os.path.realpath(path) in seen or (path.is_symlink() and _is_read_anyway(path.resolve(), root)):
                folders.remove(each)
                bad.left_out["folders that links lead to a second time"] += 1
        for each in files:
            if hidden := _hidden_as(each):
                bad.left_out[hidden] += 1
            else:
                found.append(Path(name, each))
    return sorted(found)


def _is_read_anyway(target: Path, root: Path) -> bool:
    """Whether a folder is below the one that is read, and not in a hidden one; or above it, so that it has no end."""
    if target.is_relative_to(root):
        return not any(map(_hidden_as, target.relative_to(root).parts))
    return root.is_relative_to(target)


def _hidden_as(name: str) -> str:
    """What the summary calls a file or folder that is no one's data; "" where it may be."""
    if name.startswith("._") or name in _OF_MACOS:
        return "files of macOS"
    return "hidden files" if name.startswith(".") else ""


def gathered(record: dict[str, Any], kind: str) -> list[Any]:
    """A record's pictures or sounds, as `image` or `images` names them; these keys leave it.

    Raises:
        ManifestError: Both name some, and not the same.
    """
    found = [value for value in (listed(record.pop(key, None)) for key in (kind, f"{kind}s")) if value]
    if len(found) > 1 and found[0] != found[1]:
        raise ManifestError(
            f"both {kind!r} ({len(found[0])}) and '{kind}s' ({len(found[1])}) name files; put all into '{kind}s'"
        )
    return found[0] if found else []


def listed(value: Any) -> list[Any]:
    """The pictures or sounds of a column: those of its list, or the one that it is, or none."""
    if value is None or value == "" or is_null(value):
        return []
    found = value if isinstance(value, list) else [value]
    return [] if all(map(is_null, found)) else found


def refuse_videos(record: dict[str, Any]) -> None:
    """Raises ManifestError where a record names videos; a `video` that names no file stays as metadata."""
    for key in ("video", "videos"):
        values = listed(record.get(key))
        is_name = key == "video" and all(isinstance(item, str) and not item.lower().endswith(VIDEOS) for item in values)
        if values and not is_name:
            raise ManifestError(f"{key!r} names videos, which aren't read; give pictures of them in 'images'")


def drop_embedded(record: dict[str, Any], has_media: bool, bad: BadRows) -> dict[str, Any]:
    """The record without columns of bytes, which are no metadata; they are counted.

    Raises:
        ManifestError: It has no picture or sound of its own, so that one of these is likely to be it.
    """
    columns = [key for key, value in record.items() if not isinstance(value, _SIMPLE) and _holds_embedded(value)]
    columns = [key for key in columns if key not in _OF_ROWS]
    if columns and not has_media:
        raise ManifestError(
            f"the column {columns[0]!r} holds a picture or a sound, and no column is called image or audio; name it: "
            f"--columns image={columns[0]}"
        )
    if not columns:
        return record
    bad.left_out.update(f"bytes of the column {key!r}" for key in columns)
    return {key: value for key, value in record.items() if key not in columns}


def _holds_embedded(value: Any) -> bool:
    match value:
        case Embedded() | bytes():
            return True
        case dict():
            return any(map(_holds_embedded, value.values()))
        case list():
            return any(map(_holds_embedded, value))
    return False


def local_image(value: str, folder: Path) -> Path | None:
    """The picture in the media folder that a path or an address names.

    Raises:
        ManifestError: The path leads out of the folder. Web documents come from strangers: one of them would put any
            file of this machine into the shards.
    """
    names = [value]
    if "://" in value:
        ending = value.partition("?")[0].rpartition("/")[2]
        digest = hashlib.sha256(value.encode()).hexdigest()
        names = [name for name in (ending, digest, *(digest + suffix for suffix in IMAGES)) if name not in ("", "..")]
    for name in names:
        try:
            path = folder / name
            if not path.resolve().is_relative_to(folder.resolve()):
                raise ManifestError(f"image {value!r} leads out of {folder}; put it there, or name it with --media")
            if path.is_file() and path.stat().st_size:
                return path
        except OSError as error:  # longer than a file's name may be
            if is_of_machine(error):
                raise
    return None
