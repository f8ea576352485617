"""Copies, wrong texts and garbled ones planted in a manifest, so that it is known what cleaning should find.

What was done to a row stands in its `planted`: "copy", "wrong" or "garbled".
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.data.expressions import compile_filter
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.rows import Row
from mmllm.data.rows.split import write_manifest

COPIED_SHARE = 0.01
"""Of the rows, those that copies are of: a few that are repeated often, as in text from the web (2107.06499)."""
SYMBOLS = "#$%&*+-/<=>@^_|~"


@dataclass(frozen=True)
class Planting:
    """What is planted.

    Attributes:
        copies: rows that are added, as a share of those there are; each repeats one of `COPIED_SHARE` of them.
        wrong: share of the rows whose text becomes another row's.
        garbled: share of the rows whose text becomes symbols of its length.
        filter: which rows are read; the others are left out.
        seed: of the draws.
    """

    copies: float = 0.0
    wrong: float = 0.0
    garbled: float = 0.0
    filter: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("wrong", "garbled"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share of the rows, from 0 to 1")
        if self.wrong + self.garbled > 1:
            raise ValueError(f"wrong is {self.wrong} and garbled {self.garbled}; together they are at most all rows")
        if not self.copies >= 0:
            raise ValueError(f"copies is {self.copies}; give how many for each row there is, 0 or more")
        if self.filter is not None:
            compile_filter(self.filter)


def plant(manifest: str | Path, out: Path, planting: Planting) -> list[str]:
    """Writes a manifest with what is planted; gives lines to print.

    Raises:
        FileNotFoundError, ValueError: there is no such manifest, no row of it passes the filter, or a row has no text.
    """
    keeps = (lambda metadata: True) if planting.filter is None else compile_filter(planting.filter)
    rows = [row for row in read_rows(manifest) if keeps(row.metadata)]
    if not rows:
        raise ValueError(f"{manifest}: no row passes the filter {planting.filter!r}; mend it")
    planted = plant_rows(rows, planting)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_manifest(planted, out)
    counts = Counter(row.metadata["planted"] for row in planted if "planted" in row.metadata)
    told = ", ".join(f"{count} {what}" for what, count in sorted(counts.items())) or "nothing"
    return [f"{out}: {len(planted)} rows; planted: {told}"]


def plant_rows(rows: Sequence[Row], planting: Planting) -> list[Row]:
    """Rows with what is planted; their order is kept, and copies lie anywhere among them.

    Raises:
        ValueError: a row whose text is to change has none.
    """
    generator = np.random.default_rng(planting.seed)
    order = generator.permutation(len(rows))
    num_wrong, num_garbled = round(planting.wrong * len(rows)), round(planting.garbled * len(rows))
    wrong, garbled = order[:num_wrong], order[num_wrong : num_wrong + num_garbled]
    found = list(rows)
    for place in (*wrong, *garbled):
        if not rows[place].text:
            raise ValueError(f"{rows[place].where} has no text of its own; plant in captions, transcripts or texts")
    for place in wrong:
        others = [row.text for row in (rows[each] for each in generator.integers(len(rows), size=64))]
        other = next((text for text in others if text != rows[place].text), None)
        if other is None:
            raise ValueError(f"{rows[place].where}: no other row with another text was found to take its text from")
        found[place] = _changed(rows[place], text=other, planted="wrong")
    for place in garbled:
        drawn = generator.choice(list(SYMBOLS), size=len(rows[place].text))
        found[place] = _changed(rows[place], text="".join(drawn), planted="garbled")
    num_copies = round(planting.copies * len(rows))
    originals = order[::-1][: max(1, round(COPIED_SHARE * len(rows)))]
    for number, original in enumerate(generator.choice(originals, size=num_copies)):
        row = found[original]
        found.append(_changed(row, id=f"{row.id}_copy{number}", planted="copy"))
    places = np.r_[np.arange(len(rows)), generator.uniform(0, len(rows), num_copies)]
    return [found[place] for place in np.argsort(places)]


def _changed(row: Row, planted: str, **fields: Any) -> Row:
    return dataclasses.replace(row, metadata={**row.metadata, "planted": planted}, **fields)
