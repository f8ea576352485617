"""Pictures and sounds as files: which kinds are read, and which of them the media folder holds."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mmllm.data.rows.bad_rows import ManifestError

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
SOUNDS = (".flac", ".wav", ".ogg", ".mp3", ".opus")


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
        except OSError:  # longer than a file's name may be
            continue
    return None
