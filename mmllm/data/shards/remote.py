"""Shards wherever they lie: local files, and anything that fsspec opens (`s3://`, `gs://`, `http://`, `hf://`, …).

Remote bytes are fetched by range, tried again when a server fails, and kept in a bounded folder (`cache.py`). That
folder is `MMLLM_CACHE` (by default `~/.cache/mmllm`), at most `MMLLM_CACHE_GB` large (by default 8); remote shards'
indices lie there too.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from braceexpand import braceexpand
from fsspec.config import conf as settings

from mmllm.data.shards.files import Stamp, stamp_of

FETCH_BYTES = 1 << 25
"""Of a whole shard, at a time."""
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
    whole: bool = False
    """Fetch all of it once any of it is read, rather than the ranges that are."""

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
        return int(float(given) * 1e9)
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


def stat_shard(shard: Shard) -> Stamp | None:
    """(bytes, what changes when it changes) of a shard; `None` where there is none."""
    if isinstance(shard, Path):
        if not shard.is_file():
            return None
        return stamp_of(shard.stat())
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
            for start in range(0, size, FETCH_BYTES):
                stream.write(fetch(shard, start, min(start + FETCH_BYTES, size)))
        if stat_shard(shard) != found:
            raise OSError(f"{shard}: was replaced while it was copied; try again")
        yield target


def _sweep() -> None:
    """Removes the copies that killed processes left: those to which nothing was written for a day."""
    for folder in cache_folder().glob("whole-*"):
        with suppress(OSError):  # its own process removed it
            latest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - latest > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def fetch_side_file(shard: RemoteShard, ending: str, unlike: bytes | None = None) -> bool:
    """Brings a file that lies beside a remote shard to where `side_file` says, once for all processes.

    Args:
        shard: The shard.
        ending: What the file's name has behind the shard's.
        unlike: What is here already and of no use: another file replaces it. Without it, what is here stays.

    Returns:
        Whether the file is here now, and is another one.

    Raises:
        OSError: The server can't be asked.
    """
    if "?" in shard.url:  # a signature, which is the shard's alone
        return False
    target = side_file(shard, ending)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        here = target.read_bytes() if target.is_file() else None
        if here != unlike:  # another process brought it
            return True
        beside = RemoteShard(shard.url + ending)
        system, path = _open_system(beside.url)
        try:
            data = retried(lambda: system.cat_file(path), str(beside))
        except (FileNotFoundError, PermissionError):  # where listing is forbidden, what is missing is forbidden too
            return False
        if data == unlike:
            return False
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        partial.write_bytes(data)
        partial.replace(target)
    return True


def fetch(shard: RemoteShard, start: int, stop: int) -> bytes:
    """Bytes `[start, stop)` from the server.

    Raises:
        OSError: They can't be had.
    """
    system, path = _open_system(shard.url)

    def read() -> bytes:
        return _checked(shard, system.cat_file(path, start=start, end=stop), start, stop)

    return retried(read, f"{shard} bytes {start}-{stop}")


def _checked(shard: RemoteShard, data: bytes, start: int, stop: int) -> bytes:
    if len(data) > stop - start:
        raise PermissionError(f"{shard}: the server gives no ranges of bytes; copy the shard to a local folder")
    if len(data) < stop - start:
        raise OSError(f"{len(data)} bytes came, {stop - start} were asked for")
    return data


def fetch_many(spans: Sequence[tuple[RemoteShard, int, int]]) -> list[bytes | Exception]:
    """As `fetch`, several requests under way at a time; for each span its bytes or what went wrong."""
    found: list[bytes | Exception] = [OSError("not fetched")] * len(spans)
    by_system: dict[int, tuple[Any, list[tuple[int, str]]]] = {}
    for number, (shard, _, _) in enumerate(spans):
        try:
            system, path = _open_system(shard.url)
        except (OSError, ModuleNotFoundError, ValueError) as error:
            found[number] = error
        else:
            by_system.setdefault(id(system), (system, []))[1].append((number, path))
    for system, items in by_system.values():
        starts, stops = ([spans[number][place] for number, _ in items] for place in (1, 2))
        got: list[Any]
        try:
            got = system.cat_ranges([path for _, path in items], starts, stops, on_error="return")
        except Exception:  # each is asked for alone, which tells what is wrong
            got = [OSError("not fetched")] * len(items)
        for (number, _), data in zip(items, got, strict=True):
            try:
                found[number] = _checked(spans[number][0], data, *spans[number][1:])
            except (TypeError, OSError):  # an error, or not those bytes: now with patience
                try:
                    found[number] = fetch(*spans[number])
                except (OSError, ModuleNotFoundError) as error:
                    found[number] = error
    return found
