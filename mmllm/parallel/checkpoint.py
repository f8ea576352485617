"""Checkpoints of sharded models: a folder to which each rank writes its shards, or one file as a single process writes.

A folder holds the shards as safetensors (torch's distributed checkpoint with its Hugging Face storage, whose metadata
is JSON: `.metadata` of the default storage is a pickle), and `meta.pt`, everything else, read without unpickling. It is
read by any number of ranks in any layout, and by one process without any.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, distribute_tensor

META = "meta.pt"
_PLACE = "sharded tensor"
"""Key of the dict that stands in `meta.pt` where a sharded tensor was."""


def is_folder(path: Path) -> bool:
    """Whether a path is a checkpoint that `save_folder` wrote."""
    return path.is_dir() and (path / META).is_file()


def save_folder(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Writes a checkpoint with DTensors in it; a collective call. What was at the path is replaced at the end.

    Args:
        checkpoint: dicts and lists of what `torch.load(weights_only=True)` reads, and DTensors.
        path: the folder, on a file system that all ranks see.
    """
    tensors: dict[str, Tensor] = {}
    rest = _map(checkpoint, "", lambda name, leaf: _taken_out(tensors, name, leaf))
    new = path.with_name(f".{path.name}.new")
    is_first = dist.get_rank() == 0
    if is_first:
        _remove(new)
        new.mkdir(parents=True)
    dist.barrier()
    dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(new), save_distributed=True))
    dist.barrier()
    if is_first:
        torch.save(rest, new / META)
        _remove(path)
        new.rename(path)
    dist.barrier()


def _taken_out(tensors: dict[str, Tensor], name: str, leaf: Any) -> Any:
    if not isinstance(leaf, DTensor):
        return leaf
    if leaf.ndim == 0:
        return leaf.full_tensor().cpu()
    tensors[name] = leaf.detach()
    return {_PLACE: name, "shape": list(leaf.shape), "dtype": str(leaf.dtype).removeprefix("torch.")}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


Like = Callable[[str], Tensor | None]
"""Gives for a tensor's name in a checkpoint (keys and indices, with slashes between) one that is sharded as it should
be; None: it is to be whole."""


def load_folder(path: Path, like_of: Callable[[Mapping[str, Any]], Like] | None = None) -> dict[str, Any]:
    """Reads a folder; a collective call where processes are connected, and one process's own otherwise.

    Args:
        path: the folder.
        like_of: gives a `Like` for what lies in `meta.pt`; of a tensor that is sharded only this rank's shard is read.
            None: all are read whole, to the CPU.

    Raises:
        ValueError: the folder is damaged.
    """
    try:
        rest = torch.load(path / META, map_location="cpu", weights_only=True)
        like: Like = like_of(rest) if like_of is not None else lambda name: None
        wanted: dict[str, Tensor] = {}
        whole = _map(rest, "", lambda name, leaf: _put_back(wanted, like, leaf), is_leaf=_is_place)
        if wanted:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
                dcp.load(wanted, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=not dist.is_initialized())
    except (OSError, RuntimeError, KeyError, SafetensorError, dcp.CheckpointException) as error:
        raise ValueError(f"{path} can't be read as a checkpoint: {error}; go on from another one") from error
    return whole


def _is_place(value: Any) -> bool:
    return isinstance(value, dict) and _PLACE in value


def _put_back(wanted: dict[str, Tensor], like: Like, leaf: Any) -> Any:
    if not _is_place(leaf):
        return leaf
    name, shape, dtype = leaf[_PLACE], torch.Size(leaf["shape"]), getattr(torch, leaf["dtype"])
    other = like(name)
    if isinstance(other, DTensor) and other.shape == shape:
        wanted[name] = torch.empty_like(other, dtype=dtype)
    else:
        wanted[name] = torch.empty(shape, dtype=dtype)
    return wanted[name]


def gathered(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint with whole CPU tensors in place of DTensors; a collective call, whose result rank 0 keeps.

    Other ranks get None in their place.
    """
    is_first = dist.get_rank() == 0

    def whole(_: str, leaf: Any) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        tensor = leaf.full_tensor().detach()
        return tensor.cpu() if is_first else None

    return _map(checkpoint, "", whole)


def sharded(checkpoint: Mapping[str, Any], like: Like) -> dict[str, Any]:
    """The checkpoint with this rank's shards in place of whole tensors, as `like` says."""

    def part(name: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or isinstance(leaf, DTensor):
            return leaf
        other = like(name)
        if not isinstance(other, DTensor) or other.shape != leaf.shape:
            return leaf
        part = distribute_tensor(leaf.to(other.device), other.device_mesh, other.placements, src_data_rank=None)
        return part.clone()  # of its own memory, not a view of the file's

    return _map(checkpoint, "", part)


def _map(
    value: Any, name: str, function: Callable[[str, Any], Any], is_leaf: Callable[[Any], bool] | None = None
) -> Any:
    """The same dicts, lists and tuples with `function(name, leaf)` in place of each leaf."""
    if is_leaf is not None and is_leaf(value):
        return function(name, value)
    prefix = f"{name}/" if name else ""
    if isinstance(value, Mapping):
        return {key: _map(each, f"{prefix}{key}", function, is_leaf) for key, each in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_map(each, f"{prefix}{index}", function, is_leaf) for index, each in enumerate(value))
    return function(name, value)
