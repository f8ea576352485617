"""Dates for rows that have none, by which texts drift: some words are rare in early texts and common in late ones.

So it is known what a chronological order (a curriculum with `metric: date`, or sources that filter by `date`) follows.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmllm.data.expressions import compile_filter
from mmllm.data.rows.filtered import kept_rows
from mmllm.data.rows.rows import Row
from mmllm.data.rows.split import write_manifest

COLUMN = "date"
FIRST, NUM_DAYS = datetime.date(2001, 1, 1), 1461
"""The four years from 2001 to 2004, with as many rows each."""


@dataclass(frozen=True)
class Drift:
    """How texts change over time.

    Attributes:
        words: in the order in which they come into use. The later the latest of them that a text has, the later the
            text is on average: of K words, one with the k-th (from 0) draws from the last 1 - k/K of a scale that
            orders it among texts with as many words; dates are spread evenly by that order.
        filter: which rows are read; the others are left out.
        seed: of the draws.
    """

    words: tuple[str, ...]
    filter: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        words = [word.lower() for word in self.words]
        if len(words) < 2 or len(set(words)) < len(words):
            raise ValueError(f"words is {', '.join(self.words) or 'empty'}; give two or more, each once")
        wrong = next((word for word in words if re.fullmatch(r"\w+", word) is None), None)
        if wrong is not None:
            raise ValueError(f"words has {wrong!r}, which is no single word, so that no text would have it")
        if self.filter is not None:
            compile_filter(self.filter)


def date_rows(rows: Sequence[Row], drift: Drift) -> list[Row]:
    """Rows in their order, each with a `date` (ISO 8601).

    Texts with equally many of the words have the same dates in all, spread evenly: else early texts would be those
    with few of them, and a chronological order one from easy to hard. Rows without any are dated without order.

    Raises:
        ValueError: a row has no text of its own, or has a date already.
    """
    places = {word.lower(): place for place, word in enumerate(drift.words)}
    generator = np.random.default_rng(drift.seed)
    counts_N, times_N = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows))
    for number, row in enumerate(rows):
        if not row.text:
            raise ValueError(f"{row.where} has no text of its own; date captions, transcripts or texts")
        if COLUMN in row.metadata:
            raise ValueError(f"{row.where} has a {COLUMN} already ({row.metadata[COLUMN]!r}); order by that")
        found = [places[word] for word in re.findall(r"\w+", row.text.lower()) if word in places]
        counts_N[number] = len(found)
        times_N[number] = generator.uniform(max(found, default=0) / len(places), 1)
    days_N = np.zeros(len(rows), dtype=np.int64)
    for count in np.unique(counts_N):
        alike = np.flatnonzero(counts_N == count)
        days_N[alike[np.argsort(times_N[alike])]] = np.arange(len(alike)) * NUM_DAYS // len(alike)
    dates = [str(FIRST + datetime.timedelta(days=days)) for days in days_N.tolist()]
    return [
        dataclasses.replace(row, metadata={**row.metadata, COLUMN: date}) for row, date in zip(rows, dates, strict=True)
    ]


def date(manifest: str | Path, out: Path, drift: Drift) -> list[str]:
    """Writes a manifest whose rows have a `date`; gives lines to print.

    Raises:
        FileNotFoundError, ValueError: there is no such manifest, no row of it passes the filter, no text has one of
            the words, or a row can't be dated.
    """
    rows = kept_rows(manifest, drift.filter)
    dated = date_rows(rows, drift)
    pattern = re.compile(rf"\b({'|'.join(drift.words)})\b", re.IGNORECASE)
    num_without = sum(pattern.search(row.text) is None for row in rows)
    if num_without == len(rows):
        raise ValueError(f"{manifest}: no text has any of the words {', '.join(drift.words)}; give words of its texts")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_manifest(dated, out)
    last = FIRST + datetime.timedelta(days=NUM_DAYS - 1)
    lines = [f"{out}: {len(dated)} rows, dated {FIRST} to {last}; {num_without} have none of the words, in no order"]
    first, later = (
        [row.text for row in dated if (row.metadata[COLUMN] < "2003") is is_early] for is_early in (True, False)
    )
    for word in drift.words:
        shares = [
            sum(re.search(rf"\b{word}\b", text, re.IGNORECASE) is not None for text in texts) / max(1, len(texts))
            for texts in (first, later)
        ]
        lines.append(f"  {word}: in {shares[0]:.1%} of the texts until 2002, {shares[1]:.1%} from 2003 on")
    return lines
