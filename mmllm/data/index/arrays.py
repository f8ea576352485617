"""An index file: named arrays behind a JSON header, in safetensors' format, of which parts are read by range.

Any program that knows safetensors reads it whole; here nothing but the header is read until it is asked for, and no
file stays mapped, so that neither the number of shards nor that of their documents costs memory.
(https://huggingface.co/docs/safetensors/index#format: eight bytes with the header's length, the header, the arrays.)
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from mmllm.data.shards.files import Version, read_range, version_of

_MAX_HEADER = 1 << 26
_DTYPES = {
    "U8": np.dtype("u1"), "BOOL": np.dtype("?"), "U16": np.dtype("<u2"), "U32": np.dtype("<u4"),
    "U64": np.dtype("<u8"), "I32": np.dtype("<i4"), "I64": np.dtype("<i8"), "F64": np.dtype("<f8"),
}  # fmt: skip
_INFO, _CHECKSUMS = "info", "crc32"
_KEPT = 64
"""Headers that each thread keeps."""


@dataclass(frozen=True)
class ArraysFile:
    """An open index file's header."""

    path: Path
    version: Version
    info: dict[str, Any]
    places: dict[str, tuple[np.dtype[Any], tuple[int, ...], int]]
    """Of each array: dtype, shape, first byte in the file."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `[start, stop)` of an array, read-only.

        Raises:
            OSError, ValueError: They can't be read, or the file was replaced.
        """
        dtype, shape, begin = self.places[name]
        stop = shape[0] if stop is None else min(stop, shape[0])
        row_bytes = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        size = max(0, stop - start) * row_bytes
        data = read_range(self.path, begin + start * row_bytes, size, self.version) if size else b""
        if len(data) < size:
            raise ValueError(f"{self.path}: ends {size - len(data)} bytes early")
        if start == 0 and stop == shape[0] and zlib.crc32(data) != self.info[_CHECKSUMS][name]:
            raise ValueError(f"{self.path}: {name} is damaged; run 'mmllm data index' again")
        return np.frombuffer(data, dtype=dtype).reshape(-1, *shape[1:])


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], info: Mapping[str, Any]) -> None:
    """Writes arrays, their checksums and a JSON object, all or nothing."""
    whole = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    checksums = {name: zlib.crc32(values.tobytes()) for name, values in whole.items()}
    data = save(whole, {_INFO: json.dumps({**info, _CHECKSUMS: checksums})})
    put_file(path, lambda target: target.write_bytes(data))


def put_file(target: Path, write: Callable[[Path], object]) -> None:
    """Lets a file be written aside and gives it its name when it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.kept: OrderedDict[tuple[Path, Version], ArraysFile] = OrderedDict()


_of_thread = _OfThread()


def open_arrays(path: Path) -> ArraysFile:
    """Reads a file's header.

    Raises:
        OSError: It can't be read.
        ValueError, KeyError, TypeError: It is none, or isn't whole.
    """
    with path.open("rb", buffering=0) as stream:
        version = version_of(os.fstat(stream.fileno()))
        head = stream.read(1 << 13)
        length = int.from_bytes(head[:8], "little")
        if len(head) < 8 or not 2 <= length <= min(_MAX_HEADER, version[1] - 8):
            raise ValueError("has no header")
        while len(head) < 8 + length:
            more = stream.read(8 + length - len(head))
            if not more:
                raise ValueError("its header is cut short")
            head += more
    header = json.loads(head[8 : 8 + length])
    info = json.loads(header.pop("__metadata__")[_INFO])
    places = {
        name: (_DTYPES[item["dtype"]], tuple(item["shape"]), 8 + length + item["data_offsets"][0])
        for name, item in header.items()
    }
    end = max((8 + length + item["data_offsets"][1] for item in header.values()), default=8 + length)
    if version[1] != end:
        raise ValueError(f"has {version[1]} bytes, its arrays need {end}")
    found = ArraysFile(path, version, info, places)
    kept = _of_thread.kept
    kept[path, version] = found
    if len(kept) > _KEPT:
        kept.popitem(last=False)
    return found


def opened(path: Path, version: Version) -> ArraysFile:
    """A file's header as `open_arrays` read it, read again where that is long ago.

    Raises:
        ValueError: It was replaced since.
    """
    kept = _of_thread.kept
    found = kept.get((path, version))
    if found is None:
        found = open_arrays(path)
        if found.version != version:
            raise ValueError(f"{path}: was replaced while it was in use; start again")
    else:
        kept.move_to_end((path, version))
    return found
