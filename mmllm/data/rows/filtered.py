"""The rows of a manifest that a filter keeps, or so many of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmllm.data.expressions import compile_filter, filter_names
from mmllm.data.rows.bad_rows import ManifestError
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.rows import Row


def filtered(rows: Sequence[Row], expression: str, manifest: str | Path) -> list[Row]:
    """The rows that a filter keeps; a misspelt key would be `None` in every row, and `not` of it keep them all.

    Raises:
        ManifestError: the filter reads a key that no row has, or can't be asked of one.
    """
    known = {name for row in rows for name in row.metadata}
    unknown = [name for name in filter_names(expression) if name not in known]
    if rows and unknown:
        raise ManifestError(
            f"{manifest}: filter {expression!r} reads {unknown[0]!r}, which none of the rows has; known are "
            f"{', '.join(sorted(known)) or 'none'}"
        )
    keeps, kept = compile_filter(expression), []
    for row in rows:
        try:
            if keeps(row.metadata):
                kept.append(row)
        except ValueError as error:
            raise ManifestError(f"{manifest}: {row.where} ({row.id}): {error}") from error
    return kept


def kept_rows(manifest: str | Path, expression: str | None) -> list[Row]:
    """A manifest's rows that pass a filter; None: all.

    Raises:
        FileNotFoundError, ValueError: there is no such manifest, no row passes, or as of `filtered`.
    """
    rows = read_rows(manifest)
    kept = rows if expression is None else filtered(rows, expression, manifest)
    if not kept:
        why = "it has no rows" if expression is None else f"no row passes the filter {expression!r}"
        raise ManifestError(f"{manifest}: {why}; mend it")
    return kept


def drawn_rows(rows: Sequence[Row], limit: int | None, seed: int) -> Sequence[Row]:
    """So many rows, drawn by a seed, in their order; None, or as many as there are: all."""
    if limit is None or limit >= len(rows):
        return rows
    places = np.random.default_rng(seed).permutation(len(rows))[:limit]
    return [rows[place] for place in np.sort(places)]
