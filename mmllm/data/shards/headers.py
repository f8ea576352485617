"""All headers of a shard at once: what `tar.headers_of` finds one by one, some ten times sooner.

The chain of headers is followed with two reads a file; names, kinds and checksums are then taken from all headers
together. Where anything but plain files with short names is met, and where anything is wrong, `headers_of` reads the
shard instead.

Shapes: M files, S samples.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field

import numpy as np

from mmllm.data.shards.tar import (
    BLOCK,
    COMPRESSED_ENDINGS,
    Walked,
    apart_error,
    check_end,
    headers_of,
    parse_number,
    refuse_compressed,
)

_CHUNK = 8192
_REGULAR = (ord("0"), 0)
_AFTER_SIZE = (ord(" "), 0)
_POWERS = 8 ** np.arange(5, -1, -1)
_EVEN_BYTES = np.uint64(0x00FF00FF00FF00FF)
_ZEROS = bytes(BLOCK)


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
    num_skipped: dict[str, int] = field(default_factory=dict)
    """What was passed over, by what it is: "folders", "._* files of macOS", …"""

    def files(self, sample: int) -> range:
        """The files of a sample."""
        return range(int(self.firsts_S[sample]), int(self.firsts_S[sample + 1]))


def read_headers(data: bytes | mmap.mmap, name: str) -> TarTable:
    """The files and samples of a whole tar.

    Args:
        data: All its bytes.
        name: What errors call it.

    Raises:
        ValueError: It is empty, truncated, damaged or no tar; it holds what can't be read; a sample's files lie apart;
            or a file's name leads out of its folder.
    """
    refuse_compressed(data, name)
    if len(data) < 2 * BLOCK:
        raise ValueError(f"{name}: {len(data)} bytes are no tar; build or copy the shard again")
    num_skipped: dict[str, int] = {}
    chain = _chain(data)
    split = _split_plain(data, chain.positions, name) if chain is not None else None
    if chain is not None and split is not None:
        keys, endings = split
        end, positions, sizes = chain.end, chain.positions, chain.sizes
        starts = positions + BLOCK
    else:
        walked = Walked()
        found = list(headers_of(data, name, walked))
        members = [member for _, member in found]
        keys, endings = [member.key for member in members], [member.ending for member in members]
        _refuse_traversal(keys, name)
        end, num_skipped = walked.end, dict(walked.num_skipped)
        positions = np.array([position for position, _ in found], dtype=np.int64)
        starts = np.array([member.offset for member in members], dtype=np.int64)
        sizes = np.array([member.size for member in members], dtype=np.int64)
    check_end(data, end, name)
    return _grouped(positions, starts, sizes, keys, endings, num_skipped, name)


@dataclass(frozen=True)
class _Chain:
    """Where each header is and the size of its file, and where the last file's last block ends."""

    positions: np.ndarray
    sizes: np.ndarray
    end: int


def _chain(data: bytes | mmap.mmap) -> _Chain | None:
    """The headers as they follow from one another's sizes; None where that leads to what is none."""
    positions: list[int] = []
    sizes: list[int] = []
    position, total = 0, len(data)
    while position + BLOCK <= total:  # a few operations a file: most of the time of reading headers goes here
        try:
            size = int(data[position + 124 : position + 135], 8)
        except ValueError:
            size = -1
        if size < 0:
            if data[position : position + BLOCK] != _ZEROS:
                return None
            break
        positions.append(position)
        sizes.append(size)
        position += (size + 2 * BLOCK - 1) // BLOCK * BLOCK
    if positions and positions[-1] + BLOCK + sizes[-1] > total:
        return None
    return _Chain(np.array(positions, dtype=np.int64), np.array(sizes, dtype=np.int64), position)


def _split_plain(data: bytes | mmap.mmap, positions_M: np.ndarray, name: str) -> tuple[list[str], list[str]] | None:
    """Keys and endings; None unless all headers are right, of plain files, and their names those of samples' files."""
    names: list[bytes] = []
    blocks = np.frombuffer(data, dtype=np.uint8, count=len(data) // BLOCK * BLOCK).reshape(-1, BLOCK)
    for start in range(0, len(positions_M), _CHUNK):
        headers = blocks[positions_M[start : start + _CHUNK] // BLOCK]
        field = headers[:, 148:156]
        digits = field[:, :6].astype(np.int64) - ord("0")
        stored = digits @ _POWERS
        odd = ((digits < 0) | (digits > 7)).any(axis=1) | (field[:, 6] != 0)
        for row in np.flatnonzero(odd):
            try:
                stored[row] = parse_number(field[row].tobytes())
            except ValueError:
                return None
        is_right = (_byte_sums(headers) - field.sum(axis=1, dtype=np.int64) + 8 * 32 == stored).all()
        is_plain = np.isin(headers[:, 156], _REGULAR).all() and np.isin(headers[:, 135], _AFTER_SIZE).all()
        has_prefix = ((headers[:, 345] != 0) & (headers[:, 257] == ord("u"))).any()
        if not is_right or not is_plain or has_prefix:
            return None
        names += np.ascontiguousarray(headers[:, :100]).view("S100")[:, 0].tolist()
    return _split(names, name)


def _byte_sums(blocks: np.ndarray) -> np.ndarray:
    """The sum of each block's bytes: four at a time, in the 16-bit quarters of 64-bit words (at most 64 · 2 · 255)."""
    words = blocks.view(np.uint64)
    quarters = (words & _EVEN_BYTES) + (words >> np.uint64(8) & _EVEN_BYTES)
    return quarters.sum(axis=1).view(np.uint16).reshape(-1, 4).sum(axis=1, dtype=np.int64)


def _split(names: list[bytes], name: str) -> tuple[list[str], list[str]] | None:
    """Keys and endings of plain names; None where one asks for a closer look."""
    try:
        text = b"\n".join(names).decode()
    except UnicodeDecodeError:
        return None
    decoded = text.split("\n") if names else []
    if len(decoded) != len(names) or "\0" in text or "__MACOSX" in text:
        return None
    if "/" in text:
        keys, endings = [], []
        for item in decoded:  # as `member_of`
            folder, slash, base = item.rpartition("/")
            stem, _, ending = base.partition(".")
            keys.append(f"{folder}{slash}{stem}")
            endings.append(ending)
        if ".." in text or text.startswith("/") or "\n/" in text:
            _refuse_traversal(keys, name)
        has_key = "/." not in text and not text.startswith(".") and "\n." not in text
    else:
        parts = [item.partition(".") for item in decoded]
        keys, endings = [key for key, _, _ in parts], [ending for _, _, ending in parts]
        has_key = all(keys)
    distinct = set(endings)  # few
    lowered = {ending: ending.lower() for ending in distinct}
    if not has_key or "" in distinct or any(low.endswith(COMPRESSED_ENDINGS) for low in lowered.values()):
        return None
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
    positions_M: np.ndarray,
    starts_M: np.ndarray,
    sizes_M: np.ndarray,
    keys: list[str],
    endings: list[str],
    num_skipped: dict[str, int],
    name: str,
) -> TarTable:
    firsts = [row for row, (key, last) in enumerate(zip(keys, [None, *keys], strict=False)) if key != last]
    firsts_S = np.array([*firsts, len(keys)], dtype=np.int64)
    keys_S = [keys[row] for row in firsts]
    if len(set(keys_S)) < len(keys_S):
        seen: set[str] = set()
        again = next(sample for sample, key in enumerate(keys_S) if key in seen or seen.add(key))
        raise apart_error(keys_S[again], int(positions_M[firsts[again]]), name)
    offsets_S = positions_M[firsts_S[:-1]]
    ends_M = starts_M + sizes_M
    spans_S = ends_M[firsts_S[1:] - 1] - offsets_S
    return TarTable(starts_M, sizes_M, endings, firsts_S, keys_S, offsets_S, spans_S, num_skipped)
