"""Columns of an index, memory-mapped: texts, and the rows' metadata.

Shapes: N rows.
"""

from __future__ import annotations

import json
import mmap
import struct
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_NONE, _BOOL, _INT, _FLOAT, _TEXT = range(5)


class Texts(Sequence[str]):
    """Strings that lie in one run of bytes; only those that are asked for are decoded."""

    def __init__(self, blob: np.ndarray, ends_N: np.ndarray) -> None:
        self._blob, self._ends_N = blob, ends_N

    @staticmethod
    def arrays(texts: Sequence[str], name: str) -> dict[str, np.ndarray]:
        """What `Texts` is made from, as named arrays of a sidecar."""
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        ends_N = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        return {f"{name}.bytes": np.frombuffer(b"".join(encoded), dtype=np.uint8), f"{name}.ends": ends_N}

    def __len__(self) -> int:
        return len(self._ends_N)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        if row < 0:
            row += len(self)
        start = int(self._ends_N[row - 1]) if row else 0
        return self._blob[start : int(self._ends_N[row])].tobytes().decode("utf-8", "surrogateescape")


class Column(Sequence[Any]):
    """One key of the rows' metadata: a bool, a number, a text, or `None` where a row has none.

    Args:
        values_N: float64 numbers, or for a text its place among the words.
        types_N: uint8, what each value is.
        words: The texts, each once.
    """

    def __init__(self, values_N: np.ndarray, types_N: np.ndarray, words: Sequence[str]) -> None:
        self._values_N, self._types_N, self._words = values_N, types_N, words

    @staticmethod
    def arrays(values: Sequence[Any], name: str) -> dict[str, np.ndarray]:
        """What `Column` is made from, as named arrays of a sidecar."""
        words: dict[str, int] = {}
        numbers = values
        types = set(map(type, values))
        if len(types) == 1 and (types != {int} or max(max(values), -min(values)) < 2**53):
            types_N = np.full(len(values), _type(values[0]), dtype=np.uint8)
        else:
            types_N = np.array([_type(value) for value in values], dtype=np.uint8)
        if str in types:
            words = {word: place for place, word in enumerate(dict.fromkeys(v for v in values if isinstance(v, str)))}
            numbers = [words[value] if isinstance(value, str) else value for value in values]
        values_N = np.array(numbers, dtype=np.float64)  # None becomes not a number
        return {f"{name}.values": values_N, f"{name}.types": types_N, **Texts.arrays(list(words), f"{name}.words")}

    def __len__(self) -> int:
        return len(self._types_N)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        value = float(self._values_N[row])
        match int(self._types_N[row]):
            case 0:
                return None
            case 1:
                return bool(value)
            case 2:
                return int(value)
            case 3:
                return value
        return self._words[int(value)]

    def __iter__(self) -> Iterator[Any]:
        words = list(self._words)
        for value, kind in zip(self._values_N.tolist(), self._types_N.tolist(), strict=True):
            match kind:
                case 0:
                    yield None
                case 1:
                    yield bool(value)
                case 2:
                    yield int(value)
                case 3:
                    yield value
                case _:
                    yield words[int(value)]

    def numbers(self) -> np.ndarray:
        """float64 [N]; infinite where a row has no number (so that it is the hardest)."""
        return np.where(np.isin(self._types_N, (_INT, _FLOAT, _BOOL)), self._values_N, np.inf)


def _type(value: Any) -> int:
    match value:
        case bool():
            return _BOOL
        case int():
            return _INT if abs(value) < 2**53 else _FLOAT
        case float():
            return _FLOAT
        case str():
            return _TEXT
    return _NONE


def save_npz(path: Path, arrays: dict[str, np.ndarray], info: dict[str, Any]) -> None:
    """Writes arrays and a JSON object, uncompressed, so that they can be mapped."""
    packed = np.frombuffer(json.dumps(info).encode(), dtype=np.uint8)
    with path.open("wb") as stream:
        np.savez(stream, info=packed, **arrays)  # pyright: ignore[reportArgumentType]


def map_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an uncompressed `.npz`, read-only, as parts of one memory map: nothing is read until it is used.

    Raises:
        OSError, ValueError, KeyError, zipfile.BadZipFile: It is none, or is broken.
    """
    arrays: dict[str, np.ndarray] = {}
    with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        for item in archive.infolist():
            if item.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{item.filename} is compressed")
            names, extra = struct.unpack_from("<HH", mapped, item.header_offset + 26)
            stream.seek(item.header_offset + 30 + names + extra)
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(stream)
            count = int(np.prod(shape))
            start = stream.tell()
            if dtype.hasobject or start + count * dtype.itemsize > len(mapped):
                raise ValueError(f"{item.filename} doesn't fit in the file")
            array = np.frombuffer(mapped, dtype=dtype, count=count, offset=start) if count else np.zeros(0, dtype)
            arrays[item.filename.removesuffix(".npy")] = array.reshape(shape)
    return arrays
