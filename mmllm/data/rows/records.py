"""The records of files of others: JSONL, JSON lists, parquet, CSV and TSV.

Each reader yields (where, record) pairs. A record that can't be read is an exception in its place.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from mmllm.data.rows.bad_rows import ManifestError

_MAX_FIELD = 1 << 24
"""Characters of a CSV field; longer ones come of a quote that nothing closes."""

Found = Iterator[tuple[str, dict[str, Any] | ManifestError]]


def read_json(path: Path) -> Any:
    """A JSON file; raises ManifestError where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: not JSON: {error}") from error


def read_records(path: Path) -> Found:
    """The records of a JSONL file, a JSON list, or a parquet file."""
    match path.suffix.lower():
        case ".json" if not _is_lines(path):
            whole = read_json(path)
            for number, value in enumerate(whole if isinstance(whole, list) else [whole]):
                yield f"{path}:{number}", value
        case ".parquet":
            yield from _parquet(path)
        case _:
            with path.open("rb") as stream:
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        try:
                            yield f"{path}:{number}", json.loads(line.decode("utf-8-sig"))
                        except (ValueError, RecursionError) as error:
                            yield f"{path}:{number}", ManifestError(f"not JSON: {error}")


def _is_lines(path: Path) -> bool:
    """Whether a `.json` holds an object a line, as JSONL does."""
    with path.open("rb") as stream:
        lines = list(islice((line for line in stream if line.strip()), 2))
    try:
        return len(lines) == 2 and isinstance(json.loads(lines[0].decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def _parquet(path: Path) -> Found:
    try:
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path}: reading parquet needs pyarrow; pip install pyarrow") from error
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(256):
            for value in batch.to_pylist():
                yield f"{path}:{number}", {key: item for key, item in value.items() if item is not None}
                number += 1
    except (ValueError, OSError) as error:
        raise ManifestError(f"{path}:{number}: not to be read as parquet: {error}") from error


def read_table(path: Path, **options: Any) -> Iterator[tuple[str, dict[str, str] | ManifestError]]:
    """The rows of CSV or TSV.

    Raises:
        ManifestError: A field is longer than any text, so that the rows after it can't be told.
    """
    with path.open(encoding="utf-8-sig", newline="", errors="surrogateescape") as stream:
        reader = csv.DictReader(stream, **options)
        while True:
            before = csv.field_size_limit(_MAX_FIELD)  # python's own limit is shorter than a book's chapter
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise ManifestError(
                    f"{path}:{reader.line_num}: not CSV from there on: {error}; is a quote missing?"
                ) from error
            finally:
                csv.field_size_limit(before)
            if row is None:
                return
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                yield where, ManifestError(f"has another number of fields than the header's {reader.fieldnames}")
            elif not _is_unicode([*row, *row.values()]):
                yield where, ManifestError("holds bytes that are no UTF-8; save the file as UTF-8")
            else:
                yield where, row


def _is_unicode(texts: list[str]) -> bool:
    """Whether no text holds the stand-ins for bytes that couldn't be decoded."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def each_record(path: Path, what: str, read: Callable[[dict[str, Any], int], dict[str, Any]]) -> Found:
    """What `read` makes of each record and its number; a record that it can't read is a bad row, not the end."""
    for number, (where, record) in enumerate(read_records(path)):
        if isinstance(record, dict):
            yield where, tried(what, partial(read, record, number))
        elif isinstance(record, ManifestError):
            yield where, record
        else:
            yield where, ManifestError(f"no {what}: a JSON object is wanted, got {type(record).__name__}")


def tried(what: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any] | ManifestError:
    """What `make` makes of a record, or why it can't."""
    try:
        return make()
    except ManifestError as error:
        return error
    except (LookupError, TypeError, AttributeError, ValueError, OSError, RuntimeError) as error:
        return ManifestError(f"no {what}: {error!r}")


def record_id(record: dict[str, Any], default: str) -> str:
    """The record's `id`, if it has one."""
    return default if record.get("id") is None else str(record["id"])
