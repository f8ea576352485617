"""Safetensors files that others may read: safetensors writes them for their owner alone, whatever the umask is."""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file with the permissions that any new file there gets.

    Args:
        tensors: by name; contiguous, and none sharing memory with another.
        path: of the file; an older one is replaced.
        metadata: of its header.
    """
    path = Path(path)
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    path.chmod(_mode_of_new_files(path.parent))


def _mode_of_new_files(folder: Path) -> int:
    """Asked of the file system: the umask can't be read without setting it, for all threads."""
    probe = folder / f".{uuid.uuid4().hex}"
    os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()
