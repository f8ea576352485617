"""Rows on disk: a build of a billion rows holds some 40 bytes of each, where it lies and what kind it is.

A plain row of a manifest (`plain.py`) stays where it is. Any other is made at once, as `read_rows` does, and kept as a
line of JSON in a file of the build's own. Rows are made, or made again, when they are worked on.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mmllm.data.rows.bad_rows import BadRows, ManifestError
from mmllm.data.rows.column_names import ColumnNames
from mmllm.data.rows.forms import FORMS, check_read, checked_row, told_input
from mmllm.data.rows.inputs import Input
from mmllm.data.rows.keys import copy_name, id_hash, key_numbers, numbered_key, safe_key
from mmllm.data.rows.manifests import manifest_row
from mmllm.data.rows.plain import PlainRows, plain_row
from mmllm.data.rows.records import holds_lines, line_record
from mmllm.data.rows.rows import KINDS, Kind, Row, with_absolute_paths

_BLOCK_BYTES = 1 << 20
_KEPT = 0
"""The source of rows that the table keeps itself."""
_NUMBER_OF_KIND = {kind: number for number, kind in enumerate(KINDS)}


def _stay_there(given: Input) -> bool:
    """Whether rows of a manifest can stay where they are: in lines of a file that can be read twice, named as ours."""
    return given.columns == ColumnNames() and given.path.is_file() and holds_lines(given.path)


class ChangedError(ManifestError):
    """A manifest has been changed since it was read."""


@dataclass(frozen=True)
class _Source:
    """A manifest whose rows stay in it."""

    path: Path
    name: str
    """As it was given, for messages."""
    folder: Path
    """What its paths are relative to."""
    size: int
    changed: int
    """Nanoseconds."""

    def check(self, stream: BinaryIO) -> None:
        """Raises ChangedError where it is no longer what was read."""
        found = os.fstat(stream.fileno())
        if (found.st_size, found.st_mtime_ns) != (self.size, self.changed):
            raise self.error()

    def error(self) -> ChangedError:
        """What is raised then."""
        return ChangedError(
            f"{self.name}: was changed while its rows were built; leave it as it is until the build has ended, and "
            f"run the build again"
        )


class RowTable:
    """Rows in the order in which they were read.

    Args:
        kept: A file for rows that don't stay where they are; written where there are such.
        num_copies: Keys of a sound: one for each of its copies.
    """

    def __init__(self, kept: Path, num_copies: int = 1) -> None:
        self._kept, self._num_copies = kept, num_copies
        self._kept_bytes = 0
        self._stream: BinaryIO | None = None
        self._sources: list[_Source | None] = [None]
        self._source, self._start, self._line = array("I"), array("Q"), array("Q")
        self._kind = array("B")
        self._hashes = array("Q")
        self._first_keys: np.ndarray | None = None
        self._numbers: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._kind)

    def read(
        self,
        path: str | Path,
        bad: BadRows,
        form: str = "auto",
        media: str | Path | None = None,
        columns: ColumnNames | None = None,
    ) -> None:
        """Takes the good rows of an input, those that `read_rows` gives, with absolute paths.

        Raises:
            FileNotFoundError, ManifestError: As `read_rows`.
            OSError: Rows can't be kept.
        """
        form, given = told_input(path, bad, form, media, columns)
        since, count = len(bad.reasons), 0
        try:
            if form == "manifest" and _stay_there(given):
                count = self._read_lines(given)
            else:
                for where, value in FORMS[form](given):
                    count += 1
                    if (row := checked_row(where, value, given)) is not None:
                        self._keep(row)
        finally:
            self._close()
        check_read(count, given, since, form)

    def extend(self, rows: Iterable[Row]) -> None:
        """Takes checked rows."""
        try:
            for row in rows:
                self._keep(row)
        finally:
            self._close()

    def _close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def _read_lines(self, given: Input) -> int:
        """Takes the rows of a manifest in our own form; returns how many there are, bad ones included."""
        plain, count, number, start = PlainRows(given.folder), 0, 0, 0
        with given.path.open("rb") as stream:
            found = os.fstat(stream.fileno())
            path, folder = given.path.absolute(), given.folder.absolute()
            source = _Source(path, str(given.path), folder, found.st_size, found.st_mtime_ns)
            self._sources.append(source)
            place, told_of, append = len(self._sources) - 1, plain.told, self._append
            while lines := stream.readlines(_BLOCK_BYTES):
                for line in lines:
                    number += 1
                    if (told := told_of(line, number)) is not None:
                        append(place, start, number, *told)
                        count += 1
                    elif (record := line_record(given.path, number, start, line)) is not None:
                        row = checked_row(record.where, manifest_row(record, count, given), given)
                        count += 1
                        if row is not None:
                            self._keep(row)
                    start += len(line)
            source.check(stream)
        return count

    def _keep(self, row: Row) -> None:
        data = f"{json.dumps(with_absolute_paths(row).to_json())}\n".encode()
        if self._stream is None:
            self._kept.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self._kept.open("ab")
        self._stream.write(data)
        self._append(_KEPT, self._kept_bytes, 0, row.kind, row.id)
        self._kept_bytes += len(data)

    def _append(self, source: int, start: int, line: int, kind: Kind, name: str) -> None:
        self._source.append(source)
        self._start.append(start)
        self._line.append(line)
        self._kind.append(_NUMBER_OF_KIND[kind])
        self._hashes.append(id_hash(name))
        if kind == "audio":
            for copy in range(1, self._num_copies):
                self._hashes.append(id_hash(copy_name(name, copy)))

    def number_keys(self) -> None:
        """Makes keys unlike. What that needs of each row's key is forgotten: no more rows can be taken."""
        self._numbers = key_numbers(self._hashes)
        self._hashes = array("Q")
        if self._numbers is not None and self._num_copies > 1:
            counts_R = np.where(np.frombuffer(self._kind, np.uint8) == _NUMBER_OF_KIND["audio"], self._num_copies, 1)
            self._first_keys = np.cumsum(counts_R) - counts_R

    def of_kind(self, kind: Kind) -> np.ndarray:
        """int64 `[R]`: the numbers of the rows of a kind."""
        return np.flatnonzero(np.frombuffer(self._kind, np.uint8) == _NUMBER_OF_KIND[kind])

    def rows(self, numbers: Sequence[int] | np.ndarray) -> Iterator[tuple[Row, tuple[str, ...]]]:
        """Rows, made anew, and their keys: one, or of a sound one for each of its copies.

        Args:
            numbers: Which, from 0; best in order.

        Raises:
            ChangedError: A manifest has been changed.
        """
        streams: dict[int, BinaryIO] = {}
        with ExitStack() as stack:
            for number in map(int, numbers):
                place = self._source[number]
                if place not in streams:
                    streams[place] = stack.enter_context(self._opened(self._sources[place]))
                row = self._row(number, streams[place])
                yield row, self._keys(number, row)
            for place, stream in streams.items():
                if (source := self._sources[place]) is not None:
                    source.check(stream)

    def _opened(self, source: _Source | None) -> BinaryIO:
        if source is None:
            return self._kept.open("rb")
        try:
            stream = source.path.open("rb")
        except FileNotFoundError as error:
            raise source.error() from error
        try:
            source.check(stream)
        except ChangedError:
            stream.close()
            raise
        return stream

    def _row(self, number: int, stream: BinaryIO) -> Row:
        stream.seek(self._start[number])
        line, source = stream.readline(), self._sources[self._source[number]]
        if source is None:
            return Row.from_json(json.loads(line))
        place = self._line[number]
        try:
            return plain_row(line, place, KINDS[self._kind[number]], source.folder, f"{source.name}:{place}")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise source.error() from error

    def _keys(self, number: int, row: Row) -> tuple[str, ...]:
        num_keys = self._num_copies if row.kind == "audio" else 1
        keys = [safe_key(copy_name(row.id, copy)) for copy in range(num_keys)]
        if self._numbers is None:
            return tuple(keys)
        first = number if self._first_keys is None else int(self._first_keys[number])
        numbers = self._numbers[first : first + num_keys].tolist()
        return tuple(numbered_key(key, count) for key, count in zip(keys, numbers, strict=True))
