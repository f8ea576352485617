"""Shards wherever they lie: local files, and anything that fsspec opens (`s3://`, `gs://`, `http://`, `hf://`, …).

Remote bytes are read by range, tried again when a server fails, and kept in blocks in a bounded folder. That folder is
`MMLLM_CACHE` (by default `~/.cache/mmllm`), at most `MMLLM_CACHE_GB` large (by default 8); remote shards' indices lie
there too.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from braceexpand import braceexpand
from fsspec.config import conf as settings

BLOCK_BYTES = 1 << 20
TRIES = 5
SILENT_SECONDS = 60.0
"""A server that sends nothing for so long is asked again."""
_WAIT_SECONDS = 0.1
_STALE_SECONDS = 24 * 3600.0
_GONE = (404, 410)
_IDENTITY = (
    "ETag", "etag", "md5", "sha256", "mtime", "LastModified", "updated", "last_modified", "created",
    "Last-Modified", "Content-MD5", "Digest",  # http
    "blob_id", "lfs", "xet_hash",  # hf
)  # fmt: skip
"""What file systems say of a file that changes when it does."""

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class RemoteShard:
    """A shard that fsspec opens."""

    url: str

    @property
    def name(self) -> str:
        """The last part of its address."""
        return self.url.partition("?")[0].rstrip("/").rpartition("/")[2]

    @property
    def cache_name(self) -> str:
        """Names its folder in the cache."""
        return hashlib.sha256(self.url.encode()).hexdigest()[:24]

    def __str__(self) -> str:
        return self.url.partition("?")[0]  # what follows may be a signature


Shard = Path | RemoteShard


def is_remote(spec: str) -> bool:
    """Whether a spec names something that fsspec opens, rather than a local path."""
    return "://" in spec


def cache_folder() -> Path:
    """Where remote bytes and indices are kept."""
    return Path(os.environ.get("MMLLM_CACHE") or Path.home() / ".cache" / "mmllm")


def cache_bytes() -> int:
    """How large the folder of remote blocks may grow."""
    given = os.environ.get("MMLLM_CACHE_GB") or "8"
    try:
        return int(float(given) * 2**30)
    except ValueError as error:
        raise ValueError(f"MMLLM_CACHE_GB is {given!r}; it must be a number of gigabytes") from error


def side_file(shard: Shard, ending: str) -> Path:
    """Where a file that belongs to a shard lies: beside it, or for a remote shard in the cache."""
    if isinstance(shard, RemoteShard):
        return cache_folder() / "indices" / shard.cache_name / (shard.name + ending)
    return shard.with_name(shard.name + ending)


def expand_remote(spec: str) -> list[RemoteShard]:
    """The shards that an address with globs or brace ranges names, in order.

    Raises:
        FileNotFoundError: A glob matches nothing.
    """
    found: list[RemoteShard] = []
    for url in braceexpand(spec):
        if not _is_glob(url):
            found.append(RemoteShard(url))
            continue
        system, path = _open_system(url)
        matches = retried(lambda: sorted(str(item) for item in system.glob(path)), str(RemoteShard(url)))  # noqa: B023
        if not matches:
            raise FileNotFoundError(f"{url}: no such shard; nothing matches")
        found += [RemoteShard(str(system.unstrip_protocol(match))) for match in matches]
    return found


def _is_glob(url: str) -> bool:
    """Whether an address is a pattern. What follows `?` is a query on the web, and elsewhere where it has a `=`."""
    if url.startswith(("http://", "https://")):
        return any(mark in url.partition("?")[0] for mark in "*[")
    return any(mark in url for mark in "*[") or re.search(r"\?(?![\w.-]+=)", url) is not None


def _open_system(url: str) -> tuple[Any, str]:
    try:
        system, path = fsspec.core.url_to_fs(url, **_options(url.partition("://")[0]))
    except ImportError as error:
        raise ModuleNotFoundError(f"{url.partition('://')[0]}:// needs a package of its own: {error}") from error
    return system, str(path)


def _options(protocol: str) -> dict[str, Any]:
    """How a file system is opened: fsspec would wait minutes for a web server that says nothing."""
    if protocol not in ("http", "https"):
        return {}
    from aiohttp import ClientTimeout  # fsspec reads the web with it

    given: dict[str, Any] = {
        "timeout": ClientTimeout(total=None, sock_connect=SILENT_SECONDS, sock_read=SILENT_SECONDS)
    }
    for name in ("http", "https"):  # what is given here would replace what the user's own settings of fsspec say
        given |= settings.get(name, {}).get("client_kwargs", {})
    return {"client_kwargs": given}


def retried(function: Callable[[], _T], name: str) -> _T:
    """A remote request, tried `TRIES` times with growing pauses.

    Raises:
        FileNotFoundError, PermissionError: At once; but fsspec also calls missing what a failing server didn't tell.
        OSError: It failed each time; the message has the last reason.
    """
    last: Exception | None = None
    for attempt in range(TRIES):
        if attempt:
            time.sleep(_WAIT_SECONDS * 2 ** (attempt - 1))
        try:
            return function()
        except (PermissionError, ModuleNotFoundError):
            raise
        except FileNotFoundError as error:
            last = _failure(error)
            if last is None:
                raise
        except Exception as error:  # each backend has errors of its own
            last = error
        _logger.info("%s: attempt %d of %d failed: %s", name, attempt + 1, TRIES, _told(last))
    raise OSError(f"{name}: failed {TRIES} times: {_told(last)}") from last


def _failure(error: FileNotFoundError) -> Exception | None:
    """What kept fsspec from looking a file up, where that was not its absence."""
    cause = error.__cause__
    status = getattr(cause, "status", None)
    if isinstance(cause, Exception) and isinstance(status, int):
        return None if status in _GONE else cause
    is_transport = isinstance(cause, (ConnectionError, TimeoutError)) or type(cause).__module__.startswith("aiohttp")
    return cause if isinstance(cause, Exception) and is_transport else None


def _told(error: Exception | None) -> str:
    """An error's message; an answer's status alone, for the rest of its message has the address with its signature."""
    status = getattr(error, "status", None)
    return f"{type(error).__name__}: {f'status {status}' if isinstance(status, int) else error}"


def stat_shard(shard: Shard) -> tuple[int, str] | None:
    """(bytes, what changes when it changes) of a shard; `None` where there is none."""
    if isinstance(shard, Path):
        if not shard.is_file():
            return None
        found = shard.stat()
        return found.st_size, str(found.st_mtime_ns)
    system, path = _open_system(shard.url)

    def look() -> dict[str, Any]:
        system.invalidate_cache()
        return system.info(path)

    try:
        info = retried(look, str(shard))
    except FileNotFoundError:
        return None
    if not info.get("size"):
        raise OSError(f"{shard}: the server doesn't say how large it is; copy it to a local folder")
    identity = " ".join(str(info[key]) for key in _IDENTITY if info.get(key))
    if not identity:
        _warn_nameless(str(shard).rpartition("/")[0])
    return int(info["size"]), identity


@cache
def _warn_nameless(folder: str) -> None:
    """Says it once for each folder."""
    _logger.warning(
        "%s: the server gives neither an ETag nor a date, so a shard that is replaced by one of the same size goes "
        "unseen; give changed shards other names",
        folder,
    )


@contextmanager
def local_copy(shard: Shard) -> Iterator[Path]:
    """A shard as a local file; a remote one's copy is removed afterwards.

    Raises:
        FileNotFoundError: There is no such shard.
    """
    if isinstance(shard, Path):
        if not shard.is_file():
            raise FileNotFoundError(f"{shard}: no such shard")
        yield shard
        return
    cache_folder().mkdir(parents=True, exist_ok=True)
    _sweep()
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix="whole-") as folder:
        target = Path(folder) / shard.name
        found = stat_shard(shard)
        if found is None:
            raise FileNotFoundError(f"{shard}: no such shard")
        size = found[0]
        if size > shutil.disk_usage(folder).free:
            raise OSError(f"{shard}: has {size} bytes, more than is free in {cache_folder()}; set MMLLM_CACHE")
        with target.open("wb") as stream:
            for start in range(0, size, 32 * BLOCK_BYTES):
                stream.write(_fetch(shard, start, min(start + 32 * BLOCK_BYTES, size)))
        yield target


def _sweep() -> None:
    """Removes the copies that killed processes left: those to which nothing was written for a day."""
    for folder in cache_folder().glob("whole-*"):
        with suppress(OSError):  # its own process removed it
            latest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - latest > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _fetch(shard: RemoteShard, start: int, stop: int) -> bytes:
    """Bytes `[start, stop)` from the server.

    Raises:
        OSError: They can't be had.
    """
    system, path = _open_system(shard.url)

    def read() -> bytes:
        data = system.cat_file(path, start=start, end=stop)
        if len(data) > stop - start:
            raise PermissionError(f"{shard}: the server gives no ranges of bytes; copy the shard to a local folder")
        if len(data) < stop - start:
            raise OSError(f"{len(data)} bytes came, {stop - start} were asked for")
        return data

    return retried(read, f"{shard} bytes {start}-{stop}")


class ShardReader:
    """Reads ranges of bytes of shards; keeps local files open, and remote blocks in the cache folder."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._folders: dict[RemoteShard, tuple[Path, int]] = {}
        self._num_stored = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"_files": {}, "_folders": {}, "_num_stored": 0}

    def read(self, shard: Shard, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset`; fewer where the shard ends.

        Raises:
            OSError: It can't be read.
        """
        if isinstance(shard, RemoteShard):
            return self._read_remote(shard, offset, size)
        if shard not in self._files:
            self._files[shard] = os.open(shard, os.O_RDONLY)
        return os.pread(self._files[shard], size, offset)

    def _read_remote(self, shard: RemoteShard, offset: int, size: int) -> bytes:
        folder, total = self._folder(shard)
        stop = min(offset + size, total)
        numbers = range(offset // BLOCK_BYTES, -(-stop // BLOCK_BYTES))
        blocks = {number: block for number in numbers if (block := self._stored(folder, number)) is not None}
        missing = [number for number in numbers if number not in blocks]
        if missing:  # one request, from the first block that lacks to the last
            start, end = missing[0] * BLOCK_BYTES, min((missing[-1] + 1) * BLOCK_BYTES, total)
            data = _fetch(shard, start, end)
            for number in range(missing[0], missing[-1] + 1):
                block = data[number * BLOCK_BYTES - start :][:BLOCK_BYTES]
                if number not in blocks:
                    blocks[number] = block
                    self._store(folder, number, block)
        return b"".join(blocks[number] for number in numbers)[offset - numbers.start * BLOCK_BYTES :][: stop - offset]

    def _folder(self, shard: RemoteShard) -> tuple[Path, int]:
        """Where a shard's blocks are kept (another version of it has another folder), and its size."""
        if shard not in self._folders:
            found = stat_shard(shard)
            if found is None:
                raise FileNotFoundError(f"{shard}: no such shard")
            version = hashlib.sha256(repr(found).encode()).hexdigest()[:8]
            self._folders[shard] = cache_folder() / "blocks" / f"{shard.cache_name}-{version}", found[0]
        return self._folders[shard]

    def _stored(self, folder: Path, number: int) -> bytes | None:
        path = folder / str(number)
        try:
            block = path.read_bytes()
            os.utime(path)  # the least recently used go first
        except OSError:
            return None
        return block

    def _store(self, folder: Path, number: int, block: bytes) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / f"{number}.{os.getpid()}.partial"
            partial.write_bytes(block)
            partial.replace(folder / str(number))
        except OSError as error:  # a full disk: what was read is used all the same
            _logger.warning("%s: a block couldn't be kept: %s", folder, error)
        self._num_stored += 1
        if self._num_stored % 16 == 1:
            shrink_cache(cache_bytes() - 16 * BLOCK_BYTES)

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()


def shrink_cache(limit_bytes: int) -> int:
    """Removes the least recently used blocks until the rest take at most `limit_bytes`; returns what they take."""
    blocks = []
    for path in (cache_folder() / "blocks").glob("*/*"):
        with suppress(OSError):  # another process removed it
            found = path.stat()
            blocks.append((found.st_mtime_ns, found.st_size, path))
    total = sum(size for _, size, _ in blocks)
    for _, size, path in sorted(blocks):
        if total <= max(0, limit_bytes):
            break
        path.unlink(missing_ok=True)
        total -= size
    return total
