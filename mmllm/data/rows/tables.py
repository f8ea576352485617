"""CSV and TSV: how a table is written, told from its header; and its rows, each of which can be read again alone."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from mmllm.data.rows.bad_rows import ManifestError

DELIMITERS = (",", "\t", ";", "|")
_MAX_FIELD = 1 << 24
"""Characters of a CSV field; longer ones come of a quote that nothing closes."""
_BOM = b"\xef\xbb\xbf"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_TOLD_DELIMITER = re.compile(r'"?sep=(.)"?')
"""What Excel writes above a header, and reads."""


@dataclass(frozen=True)
class Table:
    """How a table is written."""

    path: Path
    names: tuple[str, ...]
    """Of its columns, without the spaces around them; `column3` where the third has none."""
    delimiter: str
    skips_spaces: bool
    """Whether a space behind a delimiter belongs to it, as in the header."""
    has_quotes: bool
    start: int
    """Byte at which the rows begin."""
    num_lines: int
    """Lines above them."""

    def fields(self, lines: Iterator[str]) -> Iterator[list[str]]:
        """A reader of the rows' fields; its `line_num` counts lines."""
        quoting = csv.QUOTE_MINIMAL if self.has_quotes else csv.QUOTE_NONE
        return csv.reader(
            lines, delimiter=self.delimiter, skipinitialspace=self.skips_spaces, quoting=quoting,
            strict=self.has_quotes,
        )  # fmt: skip


class _Lines:
    """The lines of a file, and at which byte the next one begins."""

    def __init__(self, stream: BinaryIO, offset: int) -> None:
        stream.seek(offset)
        self.offset = offset
        self._lines = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.offset += len(line) if line.isascii() else len(line.encode("utf-8", "surrogateescape"))
        return line


def open_table(path: Path, has_quotes: bool = True) -> Table:
    """How a table is written, told from its header.

    Args:
        path: The file.
        has_quotes: Whether quotes hold fields together; else they are letters like others.

    Raises:
        ManifestError: It has no header, isn't UTF-8, or two columns have one name.
    """
    with path.open("rb") as stream:
        head = stream.read(3)
        if head[:2] in _UTF_16:
            raise ManifestError(f"{path}: is UTF-16; save it as UTF-8")
        lines = _Lines(stream, len(_BOM) if head == _BOM else 0)
        num_lines, told = 0, None
        for line in lines:
            num_lines += 1
            if match := _TOLD_DELIMITER.fullmatch(line.strip()):
                told = match[1]
            elif line.strip():
                break
        else:
            raise ManifestError(f"{path}: has no header; its first line must name the columns")
    delimiter = told or _told_delimiter(line, "\t" if path.suffix.lower() == ".tsv" else ",")
    names = _fields(line, delimiter)
    named = [name.strip() or f"column{number}" for number, name in enumerate(names, start=1)]
    table = Table(
        path, tuple(named), delimiter, any(name[:1] == " " for name in names[1:]), has_quotes,
        lines.offset, num_lines,
    )  # fmt: skip
    twice = [name for name, count in Counter(table.names).items() if count > 1]
    if twice:
        raise ManifestError(f"{path}: two of its columns are called {twice[0]!r}; give each a name of its own")
    if not _is_unicode(list(table.names)):
        raise ManifestError(f"{path}: its header holds bytes that are no UTF-8; save the file as UTF-8")
    return table


def _told_delimiter(header: str, usual: str) -> str:
    """The delimiter that cuts a header into most names."""
    return max((usual, *DELIMITERS), key=lambda delimiter: len(_fields(header, delimiter)))


def _fields(header: str, delimiter: str) -> list[str]:
    return next(csv.reader([header], delimiter=delimiter, skipinitialspace=False), [])


def read_table(table: Table) -> Iterator[tuple[str, dict[str, str] | ManifestError, tuple[int, int]]]:
    """The rows: where each is for messages, its fields by column, and where its bytes begin and how many they are.

    Raises:
        ManifestError: A quote holds several lines together and closes within a text, or never, or a field is longer
            than any text: which rows are in it can't be told.
    """
    with table.path.open("rb") as stream:
        lines = _Lines(stream, table.start)
        reader = table.fields(lines)
        first = number = table.num_lines
        while True:
            start, first = lines.offset, number + 1
            try:
                fields = _next(reader)
            except csv.Error as error:
                number = table.num_lines + reader.line_num  # pyright: ignore[reportAttributeAccessIssue]
                fields = _misquoted(table, error, first, number)
            if fields is None:
                return
            number = table.num_lines + reader.line_num  # pyright: ignore[reportAttributeAccessIssue]
            if fields:
                row = fields if isinstance(fields, ManifestError) else _row(table, fields)
                yield f"{table.path}:{number}", row, (start, lines.offset - start)


def _misquoted(table: Table, error: csv.Error, first: int, last: int) -> ManifestError:
    """Why a row that goes from one line to another isn't CSV.

    Raises:
        ManifestError: It has several lines, or goes on to the end of the file: rows may have vanished in it.
    """
    if "end of data" in str(error):
        raise ManifestError(
            f"{table.path}: a quote in its last row is never closed; the row begins in line {first}"
        ) from error
    if "expected after" not in str(error):
        raise ManifestError(f"{table.path}:{last}: not CSV from there on: {error}; is a quote missing?") from error
    if first != last:
        raise ManifestError(
            f"{table.path}:{first}: a quote that this line opens closes within a text of line {last}, so that the rows "
            f'between can\'t be told; close it, or write a quote within a quoted text twice ("")'
        ) from error
    return ManifestError('has text behind a closing quote; write a quote within a quoted text twice ("")')


def _next(reader: Iterator[list[str]]) -> list[str] | None:
    before = csv.field_size_limit(_MAX_FIELD)  # python's own limit is shorter than a book's chapter
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(before)


def _row(table: Table, fields: list[str]) -> dict[str, str] | ManifestError:
    if len(fields) != len(table.names):
        return ManifestError(
            f"has another number of fields ({len(fields)}) than the header's {len(table.names)} "
            f"({', '.join(table.names)}); put texts that hold {table.delimiter!r} into quotes"
        )
    if not _is_unicode(fields):
        return ManifestError("holds bytes that are no UTF-8; save the file as UTF-8")
    return dict(zip(table.names, fields, strict=True))


def table_row(path: Path, start: int, num_bytes: int) -> dict[str, str] | ManifestError:
    """The one row whose bytes lie there, as `read_table` gave it."""
    table = _known_table(path, path.stat().st_mtime_ns)
    with path.open("rb") as stream:
        stream.seek(start)
        text = stream.read(num_bytes).decode("utf-8", "surrogateescape")
    try:
        fields = _next(table.fields(iter(io.StringIO(text, newline=""))))
    except csv.Error as error:
        return ManifestError(f"isn't CSV: {error}")
    return _row(table, fields or [])


@lru_cache(maxsize=16)
def _known_table(path: Path, changed: int) -> Table:
    return open_table(path)


def _is_unicode(texts: list[str]) -> bool:
    """Whether no text holds the stand-ins for bytes that couldn't be decoded."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True
