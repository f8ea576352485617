"""Bytes of remote shards that are here already: a sparse file a shard, and in it a map of what it holds.

The folder is bounded; the shards that were read least recently go first.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from mmllm.data.shards.files import OpenFiles, Stamp
from mmllm.data.shards.remote import RemoteShard, cache_bytes, cache_folder, stat_shard

GRAIN = 64
"""Bytes that are there together or not at all; a bit each in the map."""
_CHECKED_EVERY = 1 << 26
"""Bytes that a process adds before it looks whether the folder has grown too large."""

_LOCK = ".lock"

_logger = logging.getLogger(__name__)


class CachedShard:
    """The part of one version of a remote shard that is here. Several processes may read and add to it.

    A mark is set after its bytes are written. Where the machine stops in between, the disk may have one without the
    other, so what an earlier start of the machine left isn't read.

    Args:
        shard: The shard.
        files: What reads it.
        found: As `stat_shard` gives it, where that is known.

    Raises:
        FileNotFoundError: There is no such shard.
        OSError: The server can't be asked.
    """

    def __init__(self, shard: RemoteShard, files: OpenFiles, found: Stamp | None = None) -> None:
        found = found or stat_shard(shard)
        if found is None:
            raise FileNotFoundError(f"{shard}: no such shard")
        self.size = found[0]
        version = hashlib.sha256(repr((*found, _boot())).encode()).hexdigest()[:8]
        self.path = cache_folder() / "spans" / f"{shard.cache_name}-{version}"
        self._files = files
        self._grains = -(-self.size // GRAIN)
        self._whole = self.size + -(-self._grains // 8)
        with suppress(OSError):  # the least recently used go first
            os.utime(self.path)

    def around(self, offset: int, size: int) -> tuple[int, int]:
        """First byte, and the one after the last, of the grains that hold a range: whole ones can be kept."""
        return offset // GRAIN * GRAIN, min(-(-(offset + size) // GRAIN) * GRAIN, self.size)

    def read(self, offset: int, size: int) -> bytes | None:
        """Bytes `[offset, offset + size)`, or `None` where some of them aren't here."""
        stop = min(offset + size, self.size)
        first, last = offset // GRAIN, -(-stop // GRAIN)
        try:
            bits = self._files.read(self.path, self.size + first // 8, (last + 7) // 8 - first // 8)
            have = int.from_bytes(bits, "little") >> first % 8
            wanted = (1 << last - first) - 1
            if have & wanted != wanted:
                return None
            data = self._files.read(self.path, offset, stop - offset)
        except OSError:
            return None
        return data if len(data) == stop - offset else None

    def add(self, offset: int, data: bytes) -> None:
        """Keep bytes; those of a grain that isn't whole are left out. What can't be kept is named, and no error."""
        stop = offset + len(data)
        first = -(-offset // GRAIN)
        last = self._grains if stop >= self.size else stop // GRAIN
        if last <= first:
            return
        begin, end = first * GRAIN, min(last * GRAIN, self.size)
        try:
            file = self._opened()
            try:
                _write(file, data[begin - offset : end - offset], begin)
                self._mark(file, first, last)
            finally:
                os.close(file)
                self._files.forget(self.path)  # it may be another file now: the one before was removed
        except OSError as error:  # a full disk: what was read is used all the same
            _logger.warning("%s: bytes couldn't be kept: %s", self.path, error)

    def _opened(self) -> int:
        """The file, which gets its name when it has its size: no process sees it smaller."""
        while True:
            with suppress(FileNotFoundError):
                file = os.open(self.path, os.O_RDWR)
                if os.fstat(file).st_size == self._whole:
                    return file
                os.close(file)
                self.path.unlink(missing_ok=True)  # cut short by whatever it was
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, made = tempfile.mkstemp(dir=self.path.parent, prefix=f"{self.path.name}.")
            try:
                os.ftruncate(handle, self._whole)
                os.link(made, self.path)
            except FileExistsError:  # another process was sooner
                pass
            except OSError:  # no links there: what another process has written meanwhile is lost, and is fetched again
                os.replace(made, self.path)
            finally:
                os.close(handle)
                with suppress(FileNotFoundError):
                    os.unlink(made)

    def _mark(self, file: int, first: int, last: int) -> None:
        """Sets the bits `[first, last)`. Of two processes that set bits of one byte, one may be lost: a miss."""
        start, stop = first // 8, -(-last // 8)
        have = int.from_bytes(os.pread(file, stop - start, self.size + start), "little")
        have |= ((1 << last - first) - 1) << first % 8
        _write(file, have.to_bytes(stop - start, "little"), self.size + start)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One process at a time, so that two don't fetch the same."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with (self.path.parent / f"{self.path.name}{_LOCK}").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


@cache
def _boot() -> str:
    """Names this start of the machine; "" where it has no name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _write(file: int, data: bytes, offset: int) -> None:
    """All of it: a disk that is nearly full takes a part, and says nothing."""
    while data:
        count = os.pwrite(file, data, offset)
        data, offset = data[count:], offset + count


class CacheBound:
    """Keeps the folder within its bound as a process adds to it."""

    def __init__(self) -> None:
        self._added = _CHECKED_EVERY

    def added(self, num_bytes: int) -> None:
        """Note that bytes were added."""
        self._added += num_bytes
        if self._added >= min(_CHECKED_EVERY, max(1, cache_bytes() // 4)):
            self._added = 0
            shrink_cache(cache_bytes())


def shrink_cache(limit_bytes: int) -> int:
    """Removes what was least recently used until the rest takes at most `limit_bytes`; returns what it takes."""
    found = []
    for path in (cache_folder() / "spans").glob("*"):
        if path.name.endswith(_LOCK):  # without it, two processes would fetch the same
            continue
        with suppress(OSError):  # another process removed it
            told = path.stat()
            found.append((told.st_mtime_ns, told.st_blocks * 512, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= max(0, limit_bytes):
            break
        path.unlink(missing_ok=True)
        total -= size
    return total
