"""Ranges of bytes of local files, of which a bounded number stays open.

A process may open some thousand files, and a recipe may name a hundred thousand shards.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path

MAX_OPEN = 128
"""Files that each thread keeps open: the least recently used is closed first."""

Version = tuple[int, int, int]
"""A file's inode, size and time of change: another version of it is another file."""
Stamp = tuple[int, str]
"""A file's size, and what changes when it does: its time of change, or what a server says."""


def version_of(found: os.stat_result) -> Version:
    """What tells a file from one that replaced it."""
    return found.st_ino, found.st_size, found.st_mtime_ns


def stamp_of(found: os.stat_result) -> Stamp:
    """A local file's stamp."""
    return found.st_size, str(found.st_mtime_ns)


class OpenFiles:
    """Files that are read by range. One thread's: nothing is locked, so that a fork can leave no lock behind."""

    def __init__(self, max_open: int = MAX_OPEN) -> None:
        self._max_open = max_open
        self._files: OrderedDict[tuple[str, Version | Stamp | None], int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._files)

    def read(self, path: Path | str, offset: int, size: int, version: Version | Stamp | None = None) -> bytes:
        """At most `size` bytes from `offset`; fewer where the file ends.

        Args:
            path: The file.
            offset: First byte.
            size: Bytes.
            version: What the file must be when it is opened, if that matters.

        Raises:
            OSError: It can't be read.
            ValueError: It is another version.
        """
        file = self._open(str(path), version)
        data = os.pread(file, size, offset)
        while data and len(data) < size:  # a read gives 2 GiB at most, and less from some network file systems
            more = os.pread(file, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def _open(self, path: str, version: Version | Stamp | None) -> int:
        key = path, version
        file = self._files.get(key)
        if file is not None:
            self._files.move_to_end(key)
            return file
        while len(self._files) >= self._max_open:
            os.close(self._files.popitem(last=False)[1])
        file = os.open(path, os.O_RDONLY)
        found = os.fstat(file)
        if version is not None and version not in (version_of(found), stamp_of(found)):
            os.close(file)
            raise ValueError(f"{path}: was replaced while it was in use; start again")
        self._files[key] = file
        return file

    def forget(self, path: Path | str) -> None:
        """Close a file, where it may have been replaced."""
        file = self._files.pop((str(path), None), None)
        if file is not None:
            os.close(file)

    def close(self) -> None:
        """Close all."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        """A thread that ends leaves nothing open."""
        self.close()


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.files = OpenFiles()


_of_thread = _OfThread()


def read_range(path: Path | str, offset: int, size: int, version: Version | None = None) -> bytes:
    """As `OpenFiles.read`, with the files that this thread keeps open."""
    return _of_thread.files.read(path, offset, size, version)
