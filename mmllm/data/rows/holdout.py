"""Which rows are held out, and that nothing of what they show is trained on."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence

from mmllm.data.rows.bad_rows import ManifestError
from mmllm.data.rows.media import Digests
from mmllm.data.rows.rows import KINDS, Row, row_media

_logger = logging.getLogger(__name__)


def even_hash(text: str) -> float:
    """A number in [0, 1) from a text. CRC won't do: texts that differ in one letter get numbers that hardly differ."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def _shown(row: Row, digests: Digests) -> str:
    """What rows of one picture, one sound or one text have in common: never parted by a split.

    Files are told by what is in them, wherever they lie and whatever they are called; a document goes with its first.
    """
    media = row_media(row)
    if media:
        return digests(media[0][1])
    return row.id if row.segments else row.text


def shown_contents(row: Row, digests: Digests) -> set[str]:
    """All that a row shows: what is in its files, or where it has none, its text."""
    files = {digests(media) for _, media in row_media(row)}
    texts = [segment["text"] for segment in row.segments] if not files else []
    return files or {"\0".join(["text", row.text, *texts])}


def without_shown(rows: Sequence[Row], heldout: Sequence[Row], digests: Digests) -> list[Row]:
    """The rows that show nothing of what held-out rows show: scores of what was trained on are no results.

    Files are told by what is in them, wherever they lie: a row goes if any of its pictures or sounds is in a held-out
    row, be it a caption's or a document's. Rows without files are told by their text.

    Raises:
        ManifestError: None would be left.
    """
    kept = showing_nothing_of(rows, heldout, digests)
    if rows and not kept:
        raise ManifestError(
            f"each of the {len(rows)} training rows shows a picture, a sound or a text of the held-out rows; hold "
            f"other rows out (--test, --holdout KEY=VALUE; with --hold_tasks also --holdout 0.1)"
        )
    if len(kept) < len(rows):
        _logger.warning("%d rows are left out: what they show is held out as well", len(rows) - len(kept))
    return kept


def showing_nothing_of(rows: Sequence[Row], others: Sequence[Row], digests: Digests) -> list[Row]:
    """The rows that share no picture, no sound and no text with others."""
    shown = set[str]().union(*(shown_contents(row, digests) for row in others))
    return [row for row in rows if shown.isdisjoint(shown_contents(row, digests))]


def split_rows(
    rows: Sequence[Row], holdout: str | float, seed: int = 0, digests: Digests | None = None
) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out.

    Args:
        rows: The rows.
        holdout: `KEY=VALUE` holds out the rows whose metadata has that value; a number holds out that
            fraction of them, chosen by the hash of what they show (so that adding rows moves none, and rows of one
            picture, one sound or one text stay together), of each kind one at least.
        seed: Changes the choice by fraction.
        digests: Of files that were read before.

    Returns:
        `(train, heldout)`, each in the rows' order.

    Raises:
        ManifestError: `holdout` can't be read, or one of the two parts would be empty.
    """
    if isinstance(holdout, str) and "=" in holdout:
        key, _, wanted = holdout.partition("=")
        mask = [str(row.metadata.get(key)) == wanted for row in rows]
    else:
        try:
            fraction = float(holdout)
        except ValueError as error:
            raise ManifestError(f"holdout is {holdout!r}; give KEY=VALUE or a fraction") from error
        digests = digests or Digests()
        hashes = [even_hash(f"{seed}:{_shown(row, digests)}") for row in rows]
        least = _least_of_each_kind(rows, hashes) if fraction > 0 else set[float]()
        mask = [value < fraction or value in least for value in hashes]
    heldout = [row for row, out in zip(rows, mask, strict=True) if out]
    train = [row for row, out in zip(rows, mask, strict=True) if not out]
    if not heldout or not train:
        keys = sorted({key for row in rows for key in row.metadata})
        raise ManifestError(
            f"holdout {holdout!r} leaves {len(train)} rows to train and {len(heldout)} to test; both need some "
            f"(metadata keys: {', '.join(keys) or 'none'})"
        )
    return train, heldout


def split_tasks(
    rows: Sequence[Row], tasks: Sequence[str], column: str, is_known: bool = False
) -> tuple[list[Row], list[Row]]:
    """Rows of other task types, and those of these: whole kinds of questions that are never trained on.

    Args:
        rows: The rows.
        tasks: The types that are held out.
        column: The key of a row's metadata that says its type.
        is_known: Whether types that no row has are none of those that were misspelt.

    Raises:
        ManifestError: No row is of one of the types, or all are.
    """
    found = {str(row.metadata[column]) for row in rows if row.metadata.get(column) is not None}
    unknown = [task for task in tasks if task not in found and not is_known]
    if unknown:
        raise ManifestError(
            f"hold_tasks names {unknown[0]!r}, which no row has in {column!r}; there are "
            f"{', '.join(sorted(found)) or 'none'}"
        )
    train = [row for row in rows if str(row.metadata.get(column)) not in tasks]
    if not train:
        raise ManifestError(f"hold_tasks {', '.join(tasks)} leaves no row to train on")
    return train, [row for row in rows if str(row.metadata.get(column)) in tasks]


def _least_of_each_kind(rows: Sequence[Row], hashes: Sequence[float]) -> set[float]:
    """The least hash of each kind that would be left with another to train on; if none would, the least of all."""
    of_kinds = [{value for row, value in zip(rows, hashes, strict=True) if row.kind == kind} for kind in KINDS]
    return {min(values) for values in of_kinds if len(values) > 1} or set(sorted(hashes)[:1])
