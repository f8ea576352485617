"""Copies, near copies, wrong and garbled texts and rows of another topic planted in a manifest.

So it is known what cleaning should find. What was done to a row stands in its `planted`: "copy", "near_copy", "wrong",
"garbled" or "off_topic".
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
from mmllm.data.rows.filtered import drawn_rows, kept_rows
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.media import media_source
from mmllm.data.rows.rows import Row
from mmllm.data.rows.split import write_manifest
from mmllm.data.samples.decode import decode_image, picture_size
from mmllm.studies.planting_edits import edited_picture, edited_text, noise_picture, other_text

COPIED_SHARE = 0.01
"""Of the rows, those that copies are of: a few that are repeated often, as in text from the web (2107.06499)."""
SYMBOLS = "#$%&*+-/<=>@^_|~"
_PICTURES = 1
"""What random numbers are for."""


@dataclass(frozen=True)
class Planting:
    """What is planted.

    Attributes:
        copies: rows that are added, as a share of those there are; each repeats one of `COPIED_SHARE` of them.
        wrong: share of the rows whose text becomes another row's.
        garbled: share of the rows whose text becomes symbols of its length.
        near_copies: as copies, of the same rows, but each with a light edit of its text and, of a caption, of its
            picture (`planting_edits.py`).
        off_topic: rows that are added, as a share of those there are: texts of another manifest, cut to the lengths
            of the rows', under pictures of noise where the rows have pictures.
        limit: at most so many rows are read, drawn by the seed; None: all.
        filter: which rows are read; the others are left out.
        seed: of the draws.
    """

    copies: float = 0.0
    wrong: float = 0.0
    garbled: float = 0.0
    near_copies: float = 0.0
    off_topic: float = 0.0
    limit: int | None = None
    filter: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("wrong", "garbled"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share of the rows, from 0 to 1")
        if self.wrong + self.garbled > 1:
            raise ValueError(f"wrong is {self.wrong} and garbled {self.garbled}; together they are at most all rows")
        for name in ("copies", "near_copies", "off_topic"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give how many for each row there is, 0 or more")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; give at least 1, or leave it out")
        if self.filter is not None:
            compile_filter(self.filter)


def plant(manifest: str | Path, out: Path, planting: Planting, noise: str | Path | None = None) -> list[str]:
    """Writes a manifest with what is planted; gives lines to print.

    Pictures of near copies and of noise are written to the folder `NAME_pictures` beside it.

    Args:
        manifest: of the rows.
        out: the new manifest, `NAME.jsonl`.
        planting: what is planted.
        noise: a manifest of another topic, whose texts `off_topic` takes.

    Raises:
        FileNotFoundError, ValueError: there is no such manifest, no row of it passes the filter, a row has no text, a
            picture can't be read, or one of `off_topic` and `noise` is given without the other.
    """
    if (noise is None) != (planting.off_topic == 0):
        raise ValueError(
            f"off_topic is {planting.off_topic} and noise {noise}; off_topic is how many rows are added, and noise the "
            f"manifest that their texts are from: give both, or neither"
        )
    rows = drawn_rows(kept_rows(manifest, planting.filter), planting.limit, planting.seed)
    texts = [row.text for row in read_rows(noise) if (row.text or "").strip()] if noise is not None else []
    if noise is not None and not texts:
        raise ValueError(f"{noise}: no row has a text of its own; give a manifest of texts, captions or transcripts")
    planted = plant_rows(rows, planting, texts)
    out.parent.mkdir(parents=True, exist_ok=True)
    planted = _with_pictures(planted, out.parent / f"{out.stem}_pictures", planting.seed)
    write_manifest(planted, out)
    counts = Counter(row.metadata["planted"] for row in planted if "planted" in row.metadata)
    told = ", ".join(f"{count} {what}" for what, count in sorted(counts.items())) or "nothing"
    return [f"{out}: {len(planted)} rows; planted: {told}"]


def _with_pictures(rows: Sequence[Row], folder: Path, seed: int) -> list[Row]:
    """The rows; near copies get pictures that were changed lightly, rows of another topic such of noise."""
    generator, found = np.random.default_rng([seed, _PICTURES]), list(rows)
    for number, row in enumerate(rows):
        if row.image is None or row.metadata.get("planted") not in ("near_copy", "off_topic"):
            continue
        source, name = media_source(row.image), str(row.image)
        if row.metadata["planted"] == "near_copy":
            path = folder / f"near_{number:06d}.jpg"
            data = edited_picture(decode_image(source, name), generator)
        else:
            path, data = folder / f"noise_{number:06d}.png", noise_picture(picture_size(source, name), generator)
        folder.mkdir(exist_ok=True)
        path.write_bytes(data)
        found[number] = dataclasses.replace(row, image=path)
    return found


def plant_rows(rows: Sequence[Row], planting: Planting, noise: Sequence[str] = ()) -> list[Row]:
    """Rows with what is planted; their order is kept, and rows that are added lie anywhere among them.

    Pictures stay as they are; `plant` changes those of near copies and of rows of another topic.

    Args:
        rows: one or more.
        planting: what is planted.
        noise: texts of another topic.

    Raises:
        ValueError: a row whose text is to change has none, or one of another topic would be a recording.
    """
    generator = np.random.default_rng(planting.seed)
    order = generator.permutation(len(rows))
    num_wrong, num_garbled = round(planting.wrong * len(rows)), round(planting.garbled * len(rows))
    wrong, garbled = order[:num_wrong], order[num_wrong : num_wrong + num_garbled]
    found = list(rows)
    for place in (*wrong, *garbled):
        _with_text(rows[place])
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
    places = [*range(len(rows)), *generator.uniform(0, len(rows), num_copies)]
    for number, original in enumerate(generator.choice(originals, size=round(planting.near_copies * len(rows)))):
        row = _with_text(found[original])
        text = edited_text(row.text, generator)
        found.append(_changed(row, id=f"{row.id}_near{number}", text=text, planted="near_copy"))
    for number, place in enumerate(generator.integers(len(rows), size=round(planting.off_topic * len(rows)))):
        row = _with_text(rows[place])
        if row.kind == "audio":
            raise ValueError(f"{row.where} is a recording; rows of another topic are planted among captions and texts")
        text = other_text(len(row.text.split()), noise, generator)
        found.append(_changed(row, id=f"{row.id}_off_topic{number}", text=text, planted="off_topic"))
    places += generator.uniform(0, len(rows), len(found) - len(places)).tolist()
    return [found[place] for place in np.argsort(places)]


def _with_text(row: Row) -> Row:
    if not (row.text or "").strip():
        raise ValueError(f"{row.where} has no text of its own; plant in captions, transcripts or texts")
    return row


def _changed(row: Row, planted: str, **fields: Any) -> Row:
    return dataclasses.replace(row, metadata={**row.metadata, "planted": planted}, **fields)
