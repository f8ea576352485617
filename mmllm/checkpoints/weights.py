"""Weights on disk, a tensor at a time: safetensors of a folder, in one file or in shards with their index.

Reading never unpickles. Writing holds no more than the tensor that is being written: a checkpoint passes from one
form to another in the memory of its largest tensor.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
"""A larger checkpoint is cut into shards, as Hugging Face's are."""
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HEADER_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""As safetensors itself limits it."""
_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's type and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Of all dimensions."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """On disk."""
        return self.num_elements * self.dtype.itemsize


@dataclass(frozen=True)
class _Place:
    path: Path
    start: int
    spec: TensorSpec


class Tensors(Protocol):
    """Named tensors that are read when asked for: a `Checkpoint`, or what stands for one."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Type and shape of each, by name."""
        ...

    def read(self, name: str) -> Tensor:
        """One of them."""
        ...


class Checkpoint:
    """The tensors of a folder, read when asked for.

    Args:
        folder: where they lie.
        places: of each tensor its file and first byte.
        index: the index file of shards.
    """

    def __init__(self, folder: Path, places: Mapping[str, _Place], index: Path | None = None) -> None:
        self.folder = folder
        self.index = index
        self._places = dict(places)

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Reads the headers of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

        Where both are there, the one file counts, as in transformers.

        Raises:
            FileNotFoundError: there is no such folder, no weights in it, or a shard that the index names is missing.
            ValueError: only pickled weights are there, a file is damaged, or the index doesn't fit its shards.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder; give the folder of a checkpoint")
        if (folder / WEIGHTS).is_file():
            return cls(folder, _read_header(folder / WEIGHTS))
        if (folder / INDEX).is_file():
            return cls._open_shards(folder, folder / INDEX)
        pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
        if pickled:
            raise ValueError(
                f"{folder} has its weights in {pickled[0]} alone, a pickle, which can execute code and is never read; "
                f"wanted {WEIGHTS}: load it where you trust it and save it with safetensors"
            )
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        raise FileNotFoundError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}{f' (but {others[0]})' if others else ''}; give the folder of "
            f"a whole checkpoint"
        )

    @classmethod
    def open_file(cls, path: str | Path) -> Checkpoint:
        """Reads the header of one safetensors file, whatever it is called.

        Raises:
            FileNotFoundError, ValueError: as `open`.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is no file; give safetensors")
        return cls(path.parent, _read_header(path))

    @classmethod
    def _open_shards(cls, folder: Path, index: Path) -> Checkpoint:
        try:
            where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = sorted(set(where.values()))
            if not all(isinstance(shard, str) for shard in shards):
                raise ValueError(f"weight_map has the shard {shards[0]!r}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index} is no index of shards: {error}; copy the checkpoint again") from error
        places: dict[str, _Place] = {}
        unlisted: list[str] = []
        for shard in shards:
            if Path(shard).name != shard:
                raise ValueError(f"{index} names the shard {shard!r}; wanted a file beside it: copy it again")
            if not (folder / shard).is_file():
                raise FileNotFoundError(
                    f"{folder / shard} doesn't exist, but {index.name} names it ({list(where.values()).count(shard)} "
                    f"tensors); copy the whole checkpoint"
                )
            held = _read_header(folder / shard)
            places |= {name: place for name, place in held.items() if where.get(name) == shard}
            unlisted += [name for name in held if name not in where]
        missing = [name for name in where if name not in places]
        if missing:
            raise ValueError(
                f"{folder / where[missing[0]]} lacks {missing[0]}, which {index.name} says is in it ({len(missing)} "
                f"such tensors); copy the whole checkpoint"
            )
        if unlisted:
            raise ValueError(f"{index} doesn't name {unlisted[0]}, which its shards hold; copy the whole checkpoint")
        return cls(folder, places, index)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Type and shape of each tensor, by name."""
        return {name: place.spec for name, place in self._places.items()}

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._places[name].path

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(place.spec.num_bytes for place in self._places.values())

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own.

        Raises:
            KeyError: there is none of that name.
            ValueError: the file ends before it.
        """
        place = self._places[name]
        spec = place.spec
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        if not spec.num_bytes:
            return tensor
        with place.path.open("rb", buffering=0) as file:
            file.seek(place.start)
            into = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
            done = 0
            while done < len(into):
                count = file.readinto(into[done:])
                if not count:
                    raise ValueError(f"{place.path} ends inside of {name}; copy the checkpoint again")
                done += count
        return tensor

    def read_start(self, name: str, num_bytes: int) -> bytes:
        """The first bytes of a tensor, or all that it has."""
        place = self._places[name]
        with place.path.open("rb") as file:
            file.seek(place.start)
            return file.read(min(num_bytes, place.spec.num_bytes))


def _read_header(path: Path) -> dict[str, _Place]:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            prefix = file.read(_HEADER_BYTES)
            if len(prefix) < _HEADER_BYTES:
                raise SafetensorError("it is shorter than a header")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(size - _HEADER_BYTES, _MAX_HEADER_BYTES):
                raise SafetensorError(f"its header would be {length} bytes long, the file has {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        places = {name: _place(path, _HEADER_BYTES + length, name, entry) for name, entry in header.items()}
        _check_disjoint(places)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} can't be read as safetensors: {error}; copy the checkpoint again") from error
    end = max((place.start + place.spec.num_bytes for place in places.values()), default=0)
    if end > size:
        raise ValueError(f"{path} has {size} bytes, its header speaks of {end}; copy the checkpoint again")
    return places


def _check_disjoint(places: Mapping[str, _Place]) -> None:
    """Makes sure that no byte belongs to two tensors."""
    ordered = sorted((place.start, place.spec.num_bytes, name) for name, place in places.items())
    for (start, num_bytes, name), (after, _, other) in itertools.pairwise(ordered):
        if after < start + num_bytes:
            raise SafetensorError(f"{name} and {other} have the same bytes")


def _place(path: Path, base: int, name: str, entry: Mapping) -> _Place:
    if entry["dtype"] not in _DTYPES:
        raise SafetensorError(f"{name} has dtype {entry['dtype']}; known are {', '.join(_DTYPES)}")
    shape = entry["shape"]
    if not all(type(size) is int and size >= 0 for size in shape):
        raise SafetensorError(f"{name} has shape {shape}")
    spec = TensorSpec(_DTYPES[entry["dtype"]], tuple(shape))
    start, end = entry["data_offsets"]
    if not (type(start) is int and type(end) is int):
        raise SafetensorError(f"{name} has data_offsets {entry['data_offsets']}")
    if start < 0 or end - start != spec.num_bytes:
        raise SafetensorError(f"{name} has {end - start} bytes, its shape and dtype make {spec.num_bytes}")
    return _Place(path, base + start, spec)


def write_weights(
    folder: str | Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Writes `model.safetensors`, or shards and their index, one tensor after another, in whatever order they come.

    Args:
        folder: where to; it exists.
        specs: of all tensors.
        tensors: each once. Only the one that is given last is held.
        max_shard_bytes: a checkpoint that is larger becomes shards of about this size.

    Returns:
        The files.

    Raises:
        AssertionError: the tensors are not those of `specs`.
    """
    folder = Path(folder)
    shards = _shards(specs, max_shard_bytes)
    if len(shards) == 1:
        paths = [folder / WEIGHTS]
    else:
        paths = [
            folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
        ]
    with ExitStack() as stack:
        places: dict[str, tuple[BinaryIO, int]] = {}
        for path, names in zip(paths, shards, strict=True):
            file = stack.enter_context(path.open("wb"))
            header, base = _header({name: specs[name] for name in names})
            file.write(header)
            for name, start in base.items():
                places[name] = file, start
        waiting = set(specs)
        for name, tensor in tensors:
            assert name in waiting, f"{name} is written twice, or not at all expected"
            spec = specs[name]
            assert tensor.dtype == spec.dtype and tuple(tensor.shape) == spec.shape, (name, spec, tensor.shape)
            waiting.discard(name)
            file, start = places[name]
            file.seek(start)
            if spec.num_bytes:
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                file.write(memoryview(flat.view(torch.uint8).numpy()))  # pyright: ignore[reportArgumentType]
            del tensor
        assert not waiting, f"{sorted(waiting)[:3]} never came"
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(spec.num_bytes for spec in specs.values())},
            "weight_map": {name: path.name for path, names in zip(paths, shards, strict=True) for name in names},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        paths.append(folder / INDEX)
    return paths


def _shards(specs: Mapping[str, TensorSpec], max_bytes: int) -> list[list[str]]:
    """Names of each shard, in order; a tensor that is larger than a shard has one of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.num_bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.num_bytes
    return shards


def _header(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """A safetensors file up to its first tensor, and where each begins: wider types first, so that all are aligned."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset, offsets = 0, {}
    for name, spec in sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize):
        entries[name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.num_bytes],
        }
        offsets[name] = offset
        offset += spec.num_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = _HEADER_BYTES + len(text)
    return struct.pack("<Q", len(text)) + text, {name: base + start for name, start in offsets.items()}
