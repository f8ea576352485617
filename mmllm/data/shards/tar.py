"""Reads tar headers fast, and the files of one sample from its span of bytes.

A sample is the run of files that share a key, the part of the name before its first dot; what follows it is the file's
ending, in lower case. `tarfile` reads some
ten times slower; shards are plain USTAR, as webdataset's writer makes them (GNU long names are read too).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK = 512
"""Bytes; headers and files begin at multiples of it."""
_REGULAR = (b"0", b"\0")


@dataclass(frozen=True)
class Member:
    """A file in a tar: its key and ending, and where its bytes are."""

    key: str
    ending: str
    offset: int
    size: int


@dataclass(frozen=True)
class Span:
    """The bytes of one sample, from its first header to its last file's end."""

    key: str
    offset: int
    size: int
    members: tuple[Member, ...]


def parse_number(field: bytes) -> int:
    """A number of a header: octal text, or GNU's base 256; raises ValueError for what is none, or negative."""
    if field[0] & 0x80:  # GNU base-256
        return int.from_bytes(field[1:], "big")
    text = field.rstrip(b"\0 ").lstrip(b" ")
    number = int(text, 8) if text else 0
    if number < 0:
        raise ValueError(f"{number} is no size")
    return number


def headers_of(data: bytes | mmap.mmap, name: str) -> Iterator[tuple[int, Member]]:
    """(offset of the header, member) for each regular file; raises ValueError where the tar is broken."""
    position, long_name, total = 0, b"", len(data)
    while position + BLOCK <= total:
        header = data[position : position + BLOCK]
        if header[0] == 0:
            return
        try:
            size = parse_number(header[124:136])
            stored = parse_number(header[148:156])
        except ValueError as error:
            raise ValueError(f"{name}: no tar header at byte {position}; the shard is damaged") from error
        summed = sum(header.translate(None, b"\0")) - sum(header[148:156]) + 8 * ord(" ")  # headers are mostly zeros
        if stored != summed:
            raise ValueError(f"{name}: wrong header checksum at byte {position}; the shard is damaged")
        start = position + BLOCK
        if start + size > total:
            raise ValueError(
                f"{name}: truncated: a file at byte {position} needs {size} bytes, {total - start} are left; "
                f"build or copy the shard again"
            )
        kind = header[156:157]
        if kind == b"L":
            long_name = data[start : start + size].rstrip(b"\0")
        elif kind in _REGULAR:
            prefix = header[345:500].rstrip(b"\0") if header[257:262] == b"ustar" else b""
            path = long_name or b"/".join(part for part in (prefix, header[:100].rstrip(b"\0")) if part)
            long_name = b""
            yield position, member_of(path.decode("utf-8", "replace"), start, size)
        position = start + (size + BLOCK - 1) // BLOCK * BLOCK


def member_of(path: str, offset: int, size: int) -> Member:
    """A file by its name in the tar."""
    folder, slash, base = path.rpartition("/")
    stem, _, ending = base.partition(".")
    return Member(folder + slash + stem, ending.lower(), offset, size)


def scan_tar(path: str | Path) -> Iterator[Span]:
    """The samples of a shard, in order, from its headers alone.

    Raises:
        FileNotFoundError: There is no such shard.
        ValueError: It is empty, truncated, damaged, or no tar at all; the samples before that are given first.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such shard")
    if path.stat().st_size < 2 * BLOCK:
        raise ValueError(f"{path}: {path.stat().st_size} bytes are no tar; build or copy the shard again")
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start, members = 0, []
        ended = 0
        for position, member in headers_of(data, str(path)):
            if members and member.key != members[0].key:
                yield _span(start, members)
                members = []
            if not members:
                start = position
            members.append(member)
            ended = member.offset + (member.size + BLOCK - 1) // BLOCK * BLOCK
        if members:
            yield _span(start, members)
        if len(data) < ended + 2 * BLOCK:
            raise ValueError(f"{path}: truncated: no end mark after byte {ended}; build or copy the shard again")


def _span(start: int, members: list[Member]) -> Span:
    return Span(members[0].key, start, members[-1].offset + members[-1].size - start, tuple(members))


def read_members(span_bytes: bytes, name: str) -> tuple[str, dict[str, bytes]]:
    """The key and the files (by ending) of one sample from its span of bytes.

    Raises:
        ValueError: The bytes aren't whole tar members of one key: the shard changed since it was indexed.
    """
    files: dict[str, bytes] = {}
    key = None
    for _, member in headers_of(span_bytes, name):
        if key is not None and member.key != key:
            raise ValueError(f"{name}: holds {member.key!r} after {key!r}; the shard changed: index it again")
        key = member.key
        files[member.ending] = bytes(span_bytes[member.offset : member.offset + member.size])
    if key is None:
        raise ValueError(f"{name}: no tar header there; the shard changed since it was indexed: index it again")
    return key, files
