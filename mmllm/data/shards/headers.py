"""All headers of a shard at once: what `tars.scan_tar` finds one by one, some ten times sooner.

The chain of headers is followed with two reads a file; names, kinds and checksums are then taken from all headers
together. Long names (GNU) and prefixes (USTAR) go the slow way.

Shapes: M files, S samples.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np

from mmllm.data.shards.tar import BLOCK, headers_of, member_of, parse_number

_CHUNK = 8192
_REGULAR = (ord("0"), 0)
_POWERS = 8 ** np.arange(5, -1, -1)
_EVEN_BYTES = np.uint64(0x00FF00FF00FF00FF)


@dataclass(frozen=True)
class TarTable:
    """The files of a shard, and which of them make a sample: `[firsts_S[s], firsts_S[s + 1])`."""

    starts_M: np.ndarray
    """int64, where each file's bytes begin."""
    sizes_M: np.ndarray
    """int64."""
    endings: list[str]
    firsts_S: np.ndarray
    """int64 [S + 1], ends with M."""
    keys: list[str]
    """[S]"""
    offsets_S: np.ndarray
    """int64, first header of each sample."""
    spans_S: np.ndarray
    """int64, bytes from there to its last file's end."""

    def files(self, sample: int) -> range:
        """The files of a sample."""
        return range(int(self.firsts_S[sample]), int(self.firsts_S[sample + 1]))


def read_headers(data: bytes | mmap.mmap, name: str) -> TarTable:
    """The files and samples of a whole tar.

    Args:
        data: All its bytes.
        name: What errors call it.

    Raises:
        ValueError: It is empty, truncated, damaged or no tar, or a file's name leads out of its folder.
    """
    if len(data) < 2 * BLOCK:
        raise ValueError(f"{name}: {len(data)} bytes are no tar; build or copy the shard again")
    positions, sizes, ended = _chain(data, name)
    if len(data) < ended + 2 * BLOCK:
        raise ValueError(f"{name}: truncated: no end mark after byte {ended}; build or copy the shard again")
    is_plain, names = _check(data, name, np.array(positions, dtype=np.int64))
    if is_plain:
        starts = np.array(positions, dtype=np.int64) + BLOCK
        keys, endings = _split(names, name)
    else:
        found = list(headers_of(data, name))
        members, positions = [member for _, member in found], [position for position, _ in found]
        starts = np.array([member.offset for member in members], dtype=np.int64)
        sizes = [member.size for member in members]
        keys, endings = [member.key for member in members], [member.ending for member in members]
        _refuse_traversal(keys, name)
    return _grouped(np.array(positions, dtype=np.int64), starts, np.array(sizes, dtype=np.int64), keys, endings)


def _chain(data: bytes | mmap.mmap, name: str) -> tuple[list[int], list[int], int]:
    """Where each header is, the size of its file, and where the last one ends."""
    positions: list[int] = []
    sizes: list[int] = []
    position, total = 0, len(data)
    while position + BLOCK <= total:  # a few operations a file: most of the time of reading headers goes here
        try:
            size = int(data[position + 124 : position + 135], 8)
        except ValueError:
            size = -1
        if size < 0:
            if not data[position]:
                break
            size = _odd_size(data, position, name)
        positions.append(position)
        sizes.append(size)
        position += (size + 2 * BLOCK - 1) // BLOCK * BLOCK
    if positions and positions[-1] + BLOCK + sizes[-1] > total:
        _check(data, name, np.array(positions, dtype=np.int64))  # rather a wrong checksum than a wrong size
        raise ValueError(
            f"{name}: truncated: a file at byte {positions[-1]} needs {sizes[-1]} bytes, "
            f"{total - positions[-1] - BLOCK} are left; build or copy the shard again"
        )
    return positions, sizes, position


def _odd_size(data: bytes | mmap.mmap, position: int, name: str) -> int:
    try:
        return parse_number(data[position + 124 : position + 136])
    except ValueError as error:
        raise ValueError(f"{name}: no tar header at byte {position}; the shard is damaged") from error


def _check(data: bytes | mmap.mmap, name: str, positions_M: np.ndarray) -> tuple[bool, list[bytes]]:
    """Whether all headers are of plain files with short names, and the names. Raises where a checksum is wrong."""
    names: list[bytes] = []
    is_plain = True
    blocks = np.frombuffer(data, dtype=np.uint8, count=len(data) // BLOCK * BLOCK).reshape(-1, BLOCK)
    for start in range(0, len(positions_M), _CHUNK):
        here = positions_M[start : start + _CHUNK]
        headers = blocks[here // BLOCK]
        field = headers[:, 148:156]
        digits = field[:, :6].astype(np.int64) - ord("0")
        stored = digits @ _POWERS
        odd = ((digits < 0) | (digits > 7)).any(axis=1) | (field[:, 6] != 0)
        for row in np.flatnonzero(odd):
            try:
                stored[row] = parse_number(field[row].tobytes())
            except ValueError as error:
                raise ValueError(f"{name}: no tar header at byte {here[row]}; the shard is damaged") from error
        found = _byte_sums(headers) - field.sum(axis=1, dtype=np.int64) + 8 * 32
        if (found != stored).any():
            position = here[np.flatnonzero(found != stored)[0]]
            raise ValueError(f"{name}: wrong header checksum at byte {position}; the shard is damaged")
        has_prefix = (headers[:, 345] != 0) & (headers[:, 257] == ord("u"))
        is_plain = is_plain and bool(np.isin(headers[:, 156], _REGULAR).all()) and not has_prefix.any()
        names += np.ascontiguousarray(headers[:, :100]).view("S100")[:, 0].tolist()
    return is_plain, names


def _byte_sums(blocks: np.ndarray) -> np.ndarray:
    """The sum of each block's bytes: four at a time, in the 16-bit quarters of 64-bit words (at most 64 · 2 · 255)."""
    words = blocks.view(np.uint64)
    quarters = (words & _EVEN_BYTES) + (words >> np.uint64(8) & _EVEN_BYTES)
    return quarters.sum(axis=1).view(np.uint16).reshape(-1, 4).sum(axis=1, dtype=np.int64)


def _split(names: list[bytes], name: str) -> tuple[list[str], list[str]]:
    keys: list[str] = []
    endings: list[str] = []
    text = b"\n".join(names).decode("utf-8", "replace")
    decoded = text.split("\n")
    if len(decoded) != len(names):  # somebody's names hold line breaks
        decoded = [item.decode("utf-8", "replace") for item in names]
    if "/" in text:
        for item in decoded:
            member = member_of(item, 0, 0)
            keys.append(member.key)
            endings.append(member.ending)
        _refuse_traversal(keys, name)
    else:
        parts = [item.partition(".") for item in decoded]
        keys, endings = [key for key, _, _ in parts], [ending for _, _, ending in parts]
        lowered = {ending: ending.lower() for ending in set(endings)}  # few are distinct
        if any(ending != low for ending, low in lowered.items()):
            endings = [lowered[ending] for ending in endings]
    return keys, endings


def _refuse_traversal(keys: list[str], name: str) -> None:
    for key in keys:
        if key.startswith("/") or ".." in key.split("/"):
            raise ValueError(
                f"{name}: a file of key {key!r} leads out of its folder; nothing of this shard is used: build it again"
            )


def _grouped(
    positions_M: np.ndarray, starts_M: np.ndarray, sizes_M: np.ndarray, keys: list[str], endings: list[str]
) -> TarTable:
    firsts = [row for row, (key, last) in enumerate(zip(keys, [None, *keys], strict=False)) if key != last]
    firsts_S = np.array([*firsts, len(keys)], dtype=np.int64)
    offsets_S = positions_M[firsts_S[:-1]]
    ends_M = starts_M + sizes_M
    spans_S = ends_M[firsts_S[1:] - 1] - offsets_S
    return TarTable(starts_M, sizes_M, endings, firsts_S, [keys[row] for row in firsts], offsets_S, spans_S)
