"""Reads tar headers one by one, and the files of one sample from its span of bytes.

A sample is the run of files that share a key, the part of the name before its base name's first dot; what follows it
is the file's ending, in lower case. USTAR, GNU and PAX tars are read: long names and PAX records belong to the file
that they precede, and so to its sample's span. What holds no sample's file (folders, `._*` of macOS, …) is passed over
and counted; what can't be read as the file that it stands for (links, sparse and compressed files) is refused, and so
are samples whose files lie apart.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

BLOCK = 512
"""Bytes; headers and files begin at multiples of it."""
_ZEROS = bytes(BLOCK)
_PLAIN = (b"0", b"\0", b"7")
_FOLDERS = (b"5", b"D")
_EXTENDED = (b"L", b"K", b"x", b"X", b"g")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Whatever their size says, as `tarfile` has it."""
_REFUSED = {
    b"1": "is a hard link to {target}; make the shard again with copies (tar --hard-dereference)",
    b"2": "is a symbolic link to {target}; make the shard again with the files themselves (tar --dereference)",
    b"S": "is stored sparse; make the shard again without tar's --sparse",
}
_SPARSE = ("GNU.sparse.", "SCHILY.realsize")
COMPRESSED_ENDINGS = ("gz", "bz2", "xz", "zst", "lz4")
_COMPRESSED = (
    (0, b"\x1f\x8b", "gzip -d"), (4, b"1AY&SY", "bzip2 -d"), (0, b"\xfd7zXZ", "xz -d"),
    (0, b"\x28\xb5\x2f\xfd", "zstd -d"), (0, b"\x04\x22\x4d\x18", "lz4 -d"), (0, b"PK\x03\x04", "unzip, then tar"),
)  # fmt: skip
_CHUNK = 1 << 20


class Member(NamedTuple):
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


@dataclass
class Walked:
    """What `headers_of` tells besides the files, once it has gone through all headers."""

    end: int = 0
    """Where the end mark is, or would be."""
    num_skipped: Counter[str] = field(default_factory=Counter)
    """What was passed over, by what it is."""


def parse_number(field: bytes) -> int:
    """A number of a header: octal text, or GNU's base 256; raises ValueError for what is none, or negative."""
    if field[0] == 0x80:  # GNU base-256; 0xff begins a negative number
        return int.from_bytes(field[1:], "big")
    text = field.partition(b"\0")[0].strip(b" ")
    number = int(text, 8) if text else 0
    if number < 0:
        raise ValueError(f"{number} is no size")
    return number


def headers_of(data: bytes | mmap.mmap, name: str, walked: Walked | None = None) -> Iterator[tuple[int, Member]]:
    """(offset of its first header, member) for each file of a sample.

    Args:
        data: A whole tar, or a sample's span.
        name: What errors call it.
        walked: Takes what else there is to say.

    Raises:
        ValueError: The tar is broken, or holds what is no plain file; the message names it.
    """
    position, total = 0, len(data)
    first = -1  # the first header of the next file, where it has more than one
    told: dict[str, bytes] = {}  # and what those before its own say of it
    while position + BLOCK <= total:
        header = data[position : position + BLOCK]
        if not header[0] and header == _ZEROS:
            break
        size = _checked_size(header, position, name)
        start, kind = position + BLOCK, header[156:157]
        if kind in _EXTENDED:
            if start + size > total:
                raise _cut(start, size, total, name, "an extended header")
            if first < 0 and kind != b"g":
                first = position
            _extend(told, kind, bytes(data[start : start + size]), f"{name}: the extended header at byte {position}")
        else:
            path = _text(told.get("GNU.sparse.name") or told.get("path") or _own_path(header))
            if kind == b"\0" and path.endswith("/"):  # how folders were written before they had a kind of their own
                kind = b"5"
            if kind in _WITHOUT_DATA:
                size = 0
            elif "size" in told:
                size = int(told["size"])
            if start + size > total:
                raise _cut(start, size, total, name, path)
            member = member_of(path, start, size)
            reason = _passed_over(path, member, kind)
            if reason is None:
                if kind not in _PLAIN or told or member.ending.endswith(COMPRESSED_ENDINGS):
                    _refuse_unreadable(member, kind, header, told, f"{name}: {path!r} at byte {position}")
                yield first if first >= 0 else position, member
            elif walked is not None:
                walked.num_skipped[reason] += 1
            if first >= 0:
                first, told = -1, {}
        position = start + (size + BLOCK - 1) // BLOCK * BLOCK
    if first >= 0:
        raise ValueError(f"{name}: truncated: ends after the extended header at byte {first}; copy the shard again")
    if walked is not None:
        walked.end = position


def _checked_size(header: bytes, position: int, name: str) -> int:
    try:
        size = parse_number(header[124:136])
        stored = parse_number(header[148:156])
    except ValueError as error:
        raise ValueError(f"{name}: no tar header at byte {position}; the shard is damaged") from error
    summed = sum(header.translate(None, b"\0")) - sum(header[148:156]) + 8 * ord(" ")  # headers are mostly zeros
    if stored != summed:
        num_high = sum(byte > 127 for byte in header[:148] + header[156:])
        if stored != summed - 256 * num_high:  # some old programs added signed bytes
            raise ValueError(f"{name}: wrong header checksum at byte {position}; the shard is damaged")
    return size


def _cut(start: int, size: int, total: int, name: str, what: str) -> ValueError:
    return ValueError(
        f"{name}: truncated: {what} at byte {start - BLOCK} needs {size} bytes, {total - start} are left; "
        f"build or copy the shard again"
    )


def _own_path(header: bytes) -> bytes:
    path = header[:100].partition(b"\0")[0]
    if header[345] and header[257:262] == b"ustar" and header[262:263] != b" ":  # GNU has other things there
        return header[345:500].partition(b"\0")[0] + b"/" + path
    return path


def _text(path: bytes) -> str:
    """A path as text; of bytes that aren't UTF-8 their numbers, so that names that differ stay apart."""
    return path.decode("utf-8", "backslashreplace")


def _extend(told: dict[str, bytes], kind: bytes, content: bytes, where: str) -> None:
    """Adds what an extended header says of the file after it."""
    match kind:
        case b"L":
            found = {"path": content.partition(b"\0")[0]}
        case b"K":
            found = {"linkpath": content.partition(b"\0")[0]}
        case _:
            found = _records(content, where)
    if kind == b"g":
        odd = next((key for key in found if key in ("path", "size") or key.startswith(_SPARSE)), None)
        if odd is not None:
            raise ValueError(f"{where} gives all files after it one {odd}; make the shard again")
        return
    twice = next((key for key in found if key in told and told[key] != found[key]), None)
    if twice is not None:
        raise ValueError(f"{where} gives the file after it a second {twice}; the shard is damaged")
    told.update(found)


def _records(content: bytes, where: str) -> dict[str, bytes]:
    """The records of a PAX header: `LENGTH KEY=VALUE` and a line break each, the length that of the whole record."""
    found: dict[str, bytes] = {}
    place = 0
    while place < len(content) and content[place]:
        digits = content[place : place + 20].partition(b" ")[0]
        record = content[place : place + int(digits)] if digits.isdigit() else b""
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if not equals or record[-1:] != b"\n" or len(record) != int(digits):
            raise ValueError(f"{where} is broken: no record at its byte {place}; the shard is damaged")
        if value:  # an empty one stands for the header's own
            found[key.decode("utf-8", "backslashreplace")] = value
        place += len(record)
    if not found.get("size", b"0").isdigit():
        raise ValueError(f"{where} is broken: it gives a size of {found['size']!r}; the shard is damaged")
    return found


def member_of(path: str, offset: int, size: int) -> Member:
    """A file by its name in the tar."""
    folder, slash, base = path.rpartition("/")
    stem, _, ending = base.partition(".")
    return Member(folder + slash + stem, ending.lower(), offset, size)


def _passed_over(path: str, member: Member, kind: bytes) -> str | None:
    """What it is, if it is no sample's file."""
    if kind in _FOLDERS:
        return "folders"
    if kind == b"V":
        return "volume labels"
    if kind == b"S":  # has more headers: nothing after it would be found
        return None
    if "__MACOSX/" in path and "__MACOSX" in path.split("/"):
        return "files in __MACOSX"
    if member.ending and member.key and member.key[-1] != "/":
        return None
    base = path.rpartition("/")[2]
    if base.startswith("._"):
        return "._* files of macOS"
    return "hidden files" if base.startswith(".") else "files without an ending"


def _refuse_unreadable(member: Member, kind: bytes, header: bytes, told: dict[str, bytes], where: str) -> None:
    if any(key.startswith(_SPARSE) for key in told):
        kind = b"S"
    if kind not in _PLAIN:
        target = _text(told.get("linkpath") or header[157:257].partition(b"\0")[0])
        why = _REFUSED.get(kind, "is no plain file (its type is {kind!r}); make the shard again without it")
        raise ValueError(f"{where} {why.format(target=repr(target), kind=kind.decode('latin-1'))}")
    if member.ending.rpartition(".")[2] in COMPRESSED_ENDINGS:
        raise ValueError(f"{where} is compressed, and shards hold files as they are; unpack it before")


def refuse_compressed(data: bytes | mmap.mmap, name: str) -> None:
    """Raises ValueError where a shard is compressed as a whole: no sample of it could be read alone."""
    for place, magic, command in _COMPRESSED:
        if data[place : place + len(magic)] == magic:
            raise ValueError(
                f"{name}: is compressed, so no sample of it can be read alone; unpack it first ({command})"
            )


def check_end(data: bytes | mmap.mmap, end: int, name: str) -> None:
    """Raises ValueError where a tar has no end mark, or goes on after it.

    Args:
        data: The whole tar.
        end: Where its last file's last block ends.
        name: What errors call it.
    """
    if len(data) < end + 2 * BLOCK:
        raise ValueError(f"{name}: truncated: no end mark after byte {end}; build or copy the shard again")
    for start in range(end, len(data), _CHUNK):
        left = data[start : start + _CHUNK].lstrip(b"\0")
        if left:
            raise ValueError(
                f"{name}: goes on after its end mark at byte {end}, where nobody looks; if two tars were put together, "
                f"keep them apart, or use tar --concatenate"
            )


def apart_error(key: str, position: int, name: str) -> ValueError:
    """The error for a sample that comes a second time."""
    return ValueError(
        f"{name}: files of {key!r} lie apart: others come between them, and more are at byte {position}; the files of "
        f"a sample must follow one another, and keys be unlike: make the shard again (tar --sort=name)"
    )


def scan_tar(path: str | Path) -> Iterator[Span]:
    """The samples of a shard, in order, from its headers alone.

    Raises:
        FileNotFoundError: There is no such shard.
        ValueError: It is empty, truncated, damaged, no tar at all, or holds what can't be read; the samples before that
            are given first.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such shard")
    if path.stat().st_size < 2 * BLOCK:
        raise ValueError(f"{path}: {path.stat().st_size} bytes are no tar; build or copy the shard again")
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        refuse_compressed(data, str(path))
        walked, seen = Walked(), set()
        start, members = 0, []
        for position, member in headers_of(data, str(path), walked):
            if members and member.key != members[0].key:
                yield _span(start, members, str(path))
                members = []
            if not members:
                if member.key in seen:
                    raise apart_error(member.key, position, str(path))
                seen.add(member.key)
                start = position
            members.append(member)
        if members:
            yield _span(start, members, str(path))
        check_end(data, walked.end, str(path))


def _span(start: int, members: list[Member], name: str) -> Span:
    key, endings = members[0].key, [member.ending for member in members]
    if len(set(endings)) < len(endings):
        twice = next(ending for ending in endings if endings.count(ending) > 1)
        raise ValueError(f"{name}:{key}: has two files that end in .{twice}; give each sample a key of its own")
    return Span(key, start, members[-1].offset + members[-1].size - start, tuple(members))


def read_members(span_bytes: bytes, name: str) -> tuple[str, dict[str, bytes]]:
    """The key and the files (by ending) of one sample from its span of bytes.

    Raises:
        ValueError: The bytes aren't whole tar members of one key, each with an ending of its own: the shard changed
            since it was indexed.
    """
    files: dict[str, bytes] = {}
    key = None
    for _, member in headers_of(span_bytes, name):
        if key is not None and member.key != key:
            raise ValueError(f"{name}: holds {member.key!r} after {key!r}; the shard changed: index it again")
        if member.ending in files:
            raise ValueError(f"{name}: holds two files that end in .{member.ending}; the shard changed: index it again")
        key = member.key
        files[member.ending] = bytes(span_bytes[member.offset : member.offset + member.size])
    if key is None:
        raise ValueError(f"{name}: no tar header there; the shard changed since it was indexed: index it again")
    return key, files
