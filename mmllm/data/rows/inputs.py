"""An input that is read: a file or folder, where its pictures and sounds lie, what its columns are called."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from mmllm.data.rows.bad_rows import BadRows, ManifestError, is_of_machine
from mmllm.data.rows.column_names import ColumnNames
from mmllm.data.rows.media import TEXT_KEYS, with_references
from mmllm.data.rows.records import Record, read_records

Found = Iterator[tuple[str, dict[str, Any] | ManifestError]]
"""Where each row is, and what it holds in the manifest's form (`rows.py`), or why that can't be told."""

TALKS = ("conversations", "messages")
MAY_BE_JSON = (*TALKS, "texts", "segments", "history", "chosen", "rejected")
MAY_BE_LISTS = ("image", "images", "audio", "audios", "video", "videos")
_MAY_BE = frozenset({*MAY_BE_JSON, *MAY_BE_LISTS})


@dataclass(frozen=True)
class Input:
    """A file or folder of rows."""

    path: Path
    folder: Path
    """What its paths are relative to, and where downloaded pictures lie."""
    columns: ColumnNames = field(default_factory=ColumnNames)
    bad: BadRows = field(default_factory=lambda: BadRows(0.0))
    """Takes count of what isn't a row and isn't used."""
    is_asked: bool = False
    """Whether its conversations are prompts, which need no answer, and keep a question at their end."""

    def of(self, path: Path) -> Input:
        """A file that belongs to this input; its paths are relative to its own folder."""
        return replace(self, path=path, folder=path.parent)

    def records(self) -> Iterator[Record]:
        """The records of its file, with our names; JSON in texts is read, pictures and sounds are references.

        Raises:
            ManifestError: The file is broken, or has none of the columns that were named.
        """
        names: set[str] = set()
        for record in read_records(self.path):
            if isinstance(record.value, dict):
                names.update(record.value if self.columns.ours else ())
            yield self.named(record)
        if names and (unknown := self.columns.unknown(names)):
            raise ManifestError(
                f"{self.path}: has no column {unknown[0]!r}, which --columns names; there are "
                f"{', '.join(sorted(names))}"
            )

    def named(self, record: Record) -> Record:
        """A record of the file as `records` gives it."""
        if isinstance(record.value, dict):
            return record._replace(value=tried("row", partial(self._value, record)))
        return record

    def _value(self, record: Record) -> dict[str, Any]:
        value = record.value
        if self.columns.ours or not _MAY_BE.isdisjoint(value):
            value = {key: opened(self.columns.ours.get(key) or key, item) for key, item in value.items()}
        if record.may_embed:
            named = {theirs for theirs, ours in self.columns.ours.items() if ours in MAY_BE_LISTS}
            value = with_references(value, self.path, record.place, TEXT_KEYS - named)
        return self.columns.applied(value)


def opened(key: str, value: Any) -> Any:
    """What JSON in a text holds, where a list is expected.

    Raises:
        ManifestError: It begins like JSON and isn't.
    """
    if not isinstance(value, str) or key not in _MAY_BE or value.lstrip()[:1] not in "[{":
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        if key in MAY_BE_LISTS:
            return value  # a file may be called so
        raise ManifestError(
            f"{key!r} is a text that begins like a list, and isn't JSON ({error}); write it with json.dumps"
        ) from error


def each_record(given: Input, what: str, read: Callable[[dict[str, Any], int], dict[str, Any]]) -> Found:
    """What `read` makes of each record and its number; a record that it can't read is a bad row, not the end."""
    for number, record in enumerate(given.records()):
        yield record.where, read_record(record, number, what, read)


def read_record(
    record: Record, number: int, what: str, read: Callable[[dict[str, Any], int], dict[str, Any]]
) -> dict[str, Any] | ManifestError:
    """What `read` makes of one record, or why it can't."""
    match record.value:
        case dict() as value:
            return tried(what, partial(read, value, number))
        case ManifestError() as error:
            return error
        case other:
            return ManifestError(f"no {what}: a JSON object is wanted, got {type(other).__name__}")


def tried(what: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any] | ManifestError:
    """What `make` makes of a record, or why it can't."""
    try:
        return make()
    except ManifestError as error:
        return error
    except (LookupError, TypeError, AttributeError, ValueError, OSError, RuntimeError) as error:
        if is_of_machine(error):
            raise
        return ManifestError(f"no {what}: {error!r}")


def record_id(record: dict[str, Any], default: str) -> str:
    """The record's `id`, if it has one."""
    return default if record.get("id") is None else str(record["id"])
