"""The records of files of others: JSONL, JSON lists, parquet, CSV and TSV.

A record that can't be read is an exception in its place. Each can be read again alone, by its place.
"""

from __future__ import annotations

import datetime
import decimal
import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

from mmllm.data.rows.bad_rows import ManifestError, is_of_machine
from mmllm.data.rows.tables import open_table, read_table, table_row

Place = int | tuple[int, int]
"""Of a record in its file: its row, or where its bytes begin and how many they are."""

TABLES = (".csv", ".tsv")
_BOM = "\ufeff"
_EMBEDDING = (
    "base64,", '"bytes"', '"data"', '"array"', "/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "ZkxhQ", "T2dnUw", "SUQz",
)  # fmt: skip
"""One of these is in every JSON text that embeds a picture or a sound."""
_SPACE = re.compile(r"[ \t\n\r]*")
_MANY, _FEW = 256, 16
"""Rows of a parquet file that are read together; few where they may hold pictures or sounds."""


class Record(NamedTuple):
    """A record of a file."""

    where: str
    """`file:line`, for messages."""
    value: Any
    """What it holds, mostly a dict; a `ManifestError` where it can't be read."""
    place: Place
    may_embed: bool = True
    """Whether pictures or sounds may be embedded in it."""


def is_null(value: Any) -> bool:
    """Whether it is nothing, or a place for a picture without one: a struct of nulls, as parquet has them."""
    return value is None or (isinstance(value, dict) and all(map(is_null, value.values())))


def read_json(path: Path) -> Any:
    """A JSON file; raises ManifestError where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: not JSON: {error}") from error


def read_records(path: Path) -> Iterator[Record]:
    """The records of a JSONL file, a JSON list, a parquet file or a table.

    Raises:
        ManifestError: The file is broken, so that its records can't be told.
    """
    match path.suffix.lower():
        case ".json" if not _is_lines(path):
            yield from _json_records(path)
        case ".parquet":
            yield from _parquet_records(path)
        case suffix if suffix in TABLES:
            yield from (Record(*found) for found in read_table(open_table(path)))
        case _:
            yield from _lines(path)


def record_at(path: Path, place: Place, key: str) -> Any:
    """A record's value of one key, read again. A value that is JSON in a text comes as that text.

    Raises:
        OSError, ValueError, LookupError, TypeError: There is no such record any more.
    """
    if isinstance(place, int):
        return _reader(path, path.stat().st_mtime_ns, os.getpid()).value(place, key)
    if path.suffix.lower() in TABLES:
        row = table_row(path, *place)
        if isinstance(row, ManifestError):
            raise row
        return row[key]
    with path.open("rb") as stream:
        stream.seek(place[0])
        return json.loads(stream.read(place[1]).decode("utf-8").removeprefix(_BOM))[key]


def _lines(path: Path) -> Iterator[Record]:
    offset = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            record = line_record(path, number, offset, line)
            offset += len(line)
            if record is not None:
                yield record


def line_record(path: Path, number: int, offset: int, line: bytes) -> Record | None:
    """The record of a line of JSONL, None of a blank one.

    Args:
        path: The file.
        number: Of the line, from 1.
        offset: Of its first byte.
        line: The line.
    """
    if not line.strip():
        return None
    text = ""
    try:
        text = line.decode("utf-8")
        value = json.loads(text[1:] if text[0] == _BOM else text)
    except UnicodeDecodeError as error:
        value = ManifestError(f"not JSON: not UTF-8 ({error.reason}, byte {error.start} of the line); save it so")
    except (ValueError, RecursionError) as error:
        value = ManifestError(f"not JSON: {error}")
    return Record(f"{path}:{number}", value, (offset, len(line)), may_embed(text))


def may_embed(text: str) -> bool:
    """Whether pictures or sounds may be embedded in this JSON."""
    return any(map(text.__contains__, _EMBEDDING))


def holds_lines(path: Path) -> bool:
    """Whether its records are lines of JSON."""
    match path.suffix.lower():
        case ".json":
            return _is_lines(path)
        case suffix:
            return suffix not in (*TABLES, ".parquet")


def _is_lines(path: Path) -> bool:
    """Whether a `.json` holds an object a line, as JSONL does."""
    with path.open("rb") as stream:
        lines = list(islice((line for line in stream if line.strip()), 2))
    try:
        return len(lines) == 2 and isinstance(json.loads(lines[0].decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def _json_records(path: Path) -> Iterator[Record]:
    """The items of a JSON list, one by one, or all of another JSON file as one record."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    start, done = len(data) - _num_bytes(text), 0
    del data
    try:
        for number, (value, first, after) in enumerate(_items(text)):
            start, done = start + _num_bytes(text[done:first]), first
            record = text[first:after]
            yield Record(f"{path}:{number}", value, (start, _num_bytes(record)), may_embed(record))
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: not JSON: {error}") from error


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _items(text: str) -> Iterator[tuple[Any, int, int]]:
    """(value, place of its first letter, place behind its last) of each item of a list; else of the whole."""
    decode = json.JSONDecoder().raw_decode
    place = _behind_space(text, 0)
    if text[place : place + 1] != "[":
        value, after = decode(text, place)
        yield value, place, after
    else:
        place, mark = _behind_space(text, place + 1), ","
        if text[place : place + 1] == "]":
            mark, after = "]", place + 1
        while mark == ",":
            value, after = decode(text, place)
            yield value, place, after
            after = _behind_space(text, after)
            mark = text[after : after + 1]
            if mark not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, after)
            after += 1
            place = _behind_space(text, after)
    if _behind_space(text, after) < len(text):
        raise json.JSONDecodeError("Extra data", text, after)


def _behind_space(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    return match.end() if match else place


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path}: reading parquet needs pyarrow; pip install 'mmllm[parquet]'") from error
    with path.open("rb"):  # says what keeps it from being opened, with a number that tells whose fault it is
        return parquet.ParquetFile(path)


def _parquet_records(path: Path) -> Iterator[Record]:
    number = 0
    try:
        file = _parquet(path)
        size = _FEW if _has_bytes(file) else _MANY
        for batch in file.iter_batches(size):
            for value in batch.to_pylist():
                found = {key: None if is_null(item) else _plain(item) for key, item in value.items()}
                yield Record(f"{path}:{number}", found, number)
                number += 1
    except (ValueError, OSError) as error:
        if is_of_machine(error):
            raise
        raise ManifestError(f"{path}:{number}: not to be read as parquet: {error}") from error


def _has_bytes(file: Any) -> bool:
    schema = file.schema
    return any(
        schema.column(number).physical_type == "BYTE_ARRAY" and schema.column(number).logical_type.type == "NONE"
        for number in range(len(schema))
    )


def _plain(value: Any) -> Any:
    """A value of Arrow's as JSON has them, but for bytes."""
    match value:
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case datetime.date() | datetime.time():
            return value.isoformat()
        case datetime.timedelta():
            return value.total_seconds()
        case decimal.Decimal():
            return str(value)
    return value


@lru_cache(maxsize=4)
def _reader(path: Path, changed: int, process: int) -> _ParquetReader:
    """Of this process: a file that was opened before a fork would share its place with the other's."""
    return _ParquetReader(path)


class _ParquetReader:
    """Rows of a parquet file in any order: quick where it is nearly the file's, and never more than a few in memory."""

    def __init__(self, path: Path) -> None:
        self._file = _parquet(path)
        sizes = [self._file.metadata.row_group(number).num_rows for number in range(self._file.num_row_groups)]
        self._starts = [0, *accumulate(sizes)]
        self._open: dict[str, tuple[int, Iterator[Any], int, list[Any]]] = {}
        """By column: its row group, the batches that follow, the first row of the last one, and its values."""

    def value(self, row: int, column: str) -> Any:
        """What a column has in a row; LookupError where there is none."""
        if not 0 <= row < self._starts[-1]:
            raise IndexError(f"it has {self._starts[-1]} rows")
        group = bisect_right(self._starts, row) - 1
        opened, batches, start, values = self._open.get(column, (-1, iter(()), 0, []))
        if opened != group or row < start:
            batches = self._file.iter_batches(_FEW, row_groups=[group], columns=[column], use_threads=False)
            start, values = self._starts[group], []
        while row >= start + len(values):
            start += len(values)
            values = next(batches).column(column).to_pylist()
        self._open[column] = group, batches, start, values
        return values[row - start]
