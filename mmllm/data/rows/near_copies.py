"""Near copies: rows whose texts share most of their shingles, and whose pictures and sounds are the same.

Texts are told by MinHash (Broder 1997, https://doi.org/10.1109/SEQUEN.1997.666900), whose candidates are rows that
agree in a whole band of their signatures; pictures by small thumbnails, so that a copy that was encoded anew, scaled or
made slightly noisy is still the same picture, and one that was cropped or mirrored isn't; sounds by their files. Rows
that are near, and what is near those, are one cluster.

Shapes: N rows, P hash functions, B bands of R of them, I pictures of a row, F levels of their thumbnails, E pairs.
"""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from mmllm.data.rows.media import Media, media_source
from mmllm.data.samples.decode import decode_image

NUM_HASHES, MAX_BAND_ROWS = 128, 8
MIN_RECALL = 0.9
"""Of pairs that are as alike as the threshold says, so many become candidates, or more."""
MIN_SHINGLES = 8
"""Shorter texts are told by exact comparison alone: too many of so few shingles agree by chance."""
THUMBNAIL_SIDE = 8
THUMBNAIL_RMS = 4.0
"""Two pictures are the same up to this root mean square between their thumbnails, in levels of 255."""
_FEW = 32
"""So many rows are all compared with each other, without candidates."""
_CELL_AXES, _AXES = 3, 32
_FITTED = 2048
"""Pictures by which the axes are chosen along which all are sorted."""

Unit = Literal["words", "chars"]


@dataclass(frozen=True)
class Shingles:
    """What texts are compared by: their runs of `size` words, or of `size` characters.

    Both see texts in lower case and without punctuation. Runs of words suit documents; of a caption's ten words, one
    that was swapped is in half of the runs of five, and characters tell more.
    """

    unit: Unit = "words"
    size: int = 5

    @classmethod
    def parse(cls, text: str) -> Shingles:
        """From `words:5` or `chars:5`.

        Raises:
            ValueError: It is another text.
        """
        unit, _, size = text.partition(":")
        if unit not in get_args(Unit) or not size.isdecimal() or not int(size):
            raise ValueError(f"shingles is {text!r}; give words:N or chars:N, such as words:5, or chars:5 of captions")
        return cls(unit, int(size))  # pyright: ignore[reportArgumentType]

    def of(self, text: str) -> set[int]:
        """The CRC-32 of each shingle of a text; of a shorter one, that of all of it."""
        units = re.findall(r"\w+", text.lower())
        between = " " if self.unit == "words" else ""
        if self.unit == "chars":
            units = list(" ".join(units))
        starts = range(max(1, len(units) - self.size + 1))
        return {zlib.crc32(between.join(units[start : start + self.size]).encode()) for start in starts}


def minhash(text: str, shingles: Shingles | None = None) -> np.ndarray | None:
    """uint32 [P] signature of a text's shingles, by default of runs of five words.

    The share of places in which two signatures agree estimates the Jaccard similarity of their shingles. `None` for a
    text with fewer than `MIN_SHINGLES`.
    """
    found = np.array(sorted((shingles or Shingles()).of(text)), dtype=np.uint64)
    if len(found) < MIN_SHINGLES:
        return None
    rng = np.random.default_rng(0)
    factors_P, offsets_P = (rng.integers(1, 2**63, NUM_HASHES, dtype=np.uint64) for _ in range(2))
    with np.errstate(over="ignore"):  # multiply-shift hashing (Dietzfelbinger et al. 1997): the overflow is meant
        hashed = (found[:, None] * (factors_P | np.uint64(1)) + offsets_P) >> np.uint64(32)
    return hashed.min(axis=0).astype(np.uint32)


def banding(threshold: float) -> tuple[int, int]:
    """(B, R): as few candidates as the recall at the threshold allows.

    Two texts of similarity s become candidates with the probability 1 - (1 - s^R)^B.
    """
    for size in range(MAX_BAND_ROWS, 1, -1):
        if 1 - (1 - threshold**size) ** (NUM_HASHES // size) >= MIN_RECALL:
            return NUM_HASHES // size, size
    return NUM_HASHES, 1


def described_media(media: Sequence[tuple[str, Media]], digests: Sequence[str]) -> list[str]:
    """What comparing needs of a row's pictures and sounds, in order, as JSON.

    Args:
        media: Of the row, each with "image" or "audio".
        digests: Of their files.

    Raises:
        OSError, ValueError: A picture can't be read.
    """
    return [
        f"image {thumbnail(item).tobytes().hex()}" if kind == "image" else f"audio {digest}"
        for (kind, item), digest in zip(media, digests, strict=True)
    ]


def thumbnail(media: Media) -> np.ndarray:
    """uint8 [F], a picture scaled to `THUMBNAIL_SIDE` squared, by the mean over each of its parts."""
    picture = decode_image(media_source(media), str(media))
    small = picture.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.uint8).reshape(-1)


def near_rows(measures: Sequence[dict[str, Any]], keep: Sequence[bool], threshold: float) -> list[int]:
    """Rows that are in a cluster of near copies and not the first of it, ascending.

    Args:
        measures: Each row's `kind`; `signature`, uint32 [P] in hexadecimal digits or None; and `media`, as
            `described_media` gives it. Rows of different kinds are never near.
        keep: Which rows are looked at.
        threshold: Similarity of two texts from which they are near, as estimated by their signatures.
    """
    numbers = [number for number, found in enumerate(measures) if keep[number] and found.get("signature") is not None]
    if not numbers:
        return []
    signatures_NP = np.frombuffer(
        bytes.fromhex("".join(measures[number]["signature"] for number in numbers)), dtype="<u4"
    ).reshape(len(numbers), NUM_HASHES)
    clusters = _Clusters(len(numbers))
    described = [(found.get("kind", ""), *found.get("media", ())) for found in (measures[each] for each in numbers)]
    for rows, levels_NF in _by_media(described):
        is_near = _Near(signatures_NP, threshold, rows, levels_NF)
        firsts = _firsts(signatures_NP[rows], levels_NF)
        clusters.put(rows, rows[firsts])  # equal ones need no comparison, and one of them is enough for the others
        for bucket in candidates(signatures_NP, np.unique(rows[firsts]), threshold):
            clusters.link(bucket, len(bucket), is_near)
    first_N = clusters.roots(np.arange(len(numbers)))
    return [number for place, number in enumerate(numbers) if first_N[place] != place]


def candidates(signatures_NP: np.ndarray, rows: np.ndarray, threshold: float) -> Iterator[np.ndarray]:
    """Rows that agree in a band, two or more at a time; where there are few, all of them.

    Args:
        signatures_NP: Of all rows.
        rows: Which are looked at, ascending.
        threshold: By which bands are chosen.
    """
    if len(rows) <= _FEW:
        yield rows
        return
    num_bands, size = banding(threshold)
    for band in range(num_bands):
        part = np.ascontiguousarray(signatures_NP[rows, band * size : (band + 1) * size])
        _, codes, counts = np.unique(part, axis=0, return_inverse=True, return_counts=True)
        order = np.argsort(codes.reshape(-1), kind="stable")
        for bucket in np.split(order, np.cumsum(counts)[:-1]):
            if len(bucket) > 1:
                yield rows[bucket]


def _firsts(signatures_NP: np.ndarray, levels_NF: np.ndarray | None) -> np.ndarray:
    """[N] the first row that has the same signature, and the same levels if there are any."""
    equal_N = np.ascontiguousarray(signatures_NP).view(np.uint8)
    if levels_NF is not None:
        equal_N = np.concatenate([equal_N, levels_NF], axis=1)
    _, firsts, codes_N = np.unique(equal_N, axis=0, return_index=True, return_inverse=True)
    return firsts[codes_N.reshape(-1)]


@dataclass(frozen=True)
class _Near:
    """Which of other rows are near one: their texts, and their pictures, if they have any."""

    signatures_NP: np.ndarray
    threshold: float
    rows: np.ndarray
    """Ascending."""
    levels_NF: np.ndarray | None
    """Of these rows."""

    def __call__(self, row: int, others: np.ndarray) -> np.ndarray:
        near = (self.signatures_NP[others] == self.signatures_NP[row]).mean(axis=1) >= self.threshold
        if self.levels_NF is not None and near.any():
            here, there = np.searchsorted(self.rows, row), np.searchsorted(self.rows, others[near])
            near[near] = _same_pictures(self.levels_NF[here], self.levels_NF[there])
        return near


class _Clusters:
    """Which of N rows belong together; the lowest of a cluster is its root."""

    def __init__(self, count: int) -> None:
        self._parents_N = np.arange(count)

    def roots(self, rows: np.ndarray) -> np.ndarray:
        """Of some rows."""
        found = self._parents_N[rows]
        while not np.array_equal(further := self._parents_N[found], found):
            found = further
        self._parents_N[rows] = found
        return found

    def put(self, rows: np.ndarray, roots: np.ndarray) -> None:
        """Puts rows, none of which is with others yet, under these roots, which are among them."""
        self._parents_N[rows] = roots

    def join(self, rows: np.ndarray) -> None:
        """Puts the rows' clusters together."""
        found = self.roots(rows)
        self._parents_N[found] = found.min()

    def link(self, rows: np.ndarray, count: int, is_near: Callable[[int, np.ndarray], np.ndarray]) -> None:
        """Joins what is near, comparing what isn't together yet, until all that is left is one cluster.

        Args:
            rows: Any number.
            count: So many of the first are each compared with all rows behind them.
            is_near: Tells of a row and others which of these are near it.
        """
        for place, row in enumerate(rows[:count].tolist()):
            left = rows[place:]
            roots = self.roots(left)
            others = left[roots != roots[0]]
            if not len(others):
                return
            if (near := is_near(row, others)).any():
                self.join(np.append(others[near], row))


def _by_media(described: Sequence[Sequence[str]]) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Rows that may show and sound the same, ascending, and the levels of their pictures [N, F], if they have any.

    Rows that are alone in that are left out.

    Args:
        described: Each row's kind, and its pictures and sounds.
    """
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for row, items in enumerate(described):
        groups[tuple("image" if item.startswith("image ") else item for item in items)].append(row)
    for key, members in groups.items():
        rows = np.array(members)
        if len(rows) < 2:
            continue
        if "image" not in key:
            yield rows, None
            continue
        shown = (
            "".join(item[len("image ") :] for item in described[row] if item.startswith("image ")) for row in members
        )
        levels_NF = np.frombuffer(bytes.fromhex("".join(shown)), dtype=np.uint8).reshape(len(rows), -1)
        unique_UF, codes_N = np.unique(levels_NF, axis=0, return_inverse=True)
        roots_N = _picture_clusters(unique_UF)[codes_N.reshape(-1)]
        order = np.argsort(roots_N, kind="stable")
        for some in np.split(order, np.flatnonzero(np.diff(roots_N[order])) + 1):
            if len(some) > 1:
                yield rows[some], levels_NF[some]


def _same_pictures(one_F: np.ndarray, others_NF: np.ndarray) -> np.ndarray:
    """Which rows have the same pictures as one: each of them within `THUMBNAIL_RMS`."""
    apart_NF = others_NF.astype(np.int32) - one_F.astype(np.int32)
    size = 3 * THUMBNAIL_SIDE**2
    squares_NI = (apart_NF**2).reshape(len(others_NF), one_F.size // size, size).mean(axis=2)
    return squares_NI.max(axis=1) <= THUMBNAIL_RMS**2


def _picture_clusters(levels_NF: np.ndarray) -> np.ndarray:
    """[N] the lowest row of each row's cluster of same pictures.

    Along any axis two such rows are no further apart than in all: rows are sorted into cells along the few axes by
    which their first pictures differ most, and compared with those of the neighbouring cells.
    """
    size, everyone = 3 * THUMBNAIL_SIDE**2, np.arange(len(levels_NF))
    bound = THUMBNAIL_RMS * size**0.5 * 1.001  # a little more, for rounding
    first_NF, clusters = levels_NF[:, :size].astype(np.float32), _Clusters(len(levels_NF))
    if len(levels_NF) > _FEW:
        fitted = first_NF[:: -(-len(first_NF) // _FITTED)]
        _, axes = np.linalg.eigh(np.cov(fitted, rowvar=False))
        along_NA = first_NF @ axes[:, : -_AXES - 1 : -1].astype(np.float32)
    else:
        along_NA = np.zeros((len(levels_NF), _CELL_AXES), dtype=np.float32)  # all in one cell

    def is_same(row: int, others: np.ndarray) -> np.ndarray:
        same = ((along_NA[others] - along_NA[row]) ** 2).sum(axis=1) <= bound**2
        same[same] = _same_pictures(levels_NF[row], levels_NF[others[same]])
        return same

    cells: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for row, place in enumerate(np.floor(along_NA[:, :_CELL_AXES] / bound).astype(np.int64).tolist()):
        cells[tuple(place)].append(row)
    half = [shift for shift in product((-1, 0, 1), repeat=_CELL_AXES) if shift > (0,) * _CELL_AXES]
    for place, members in cells.items():
        beside = [cells.get(tuple(a + b for a, b in zip(place, shift, strict=True)), []) for shift in half]
        around = np.array(members + [row for some in beside for row in some])
        clusters.link(around, len(members), is_same)
    return clusters.roots(everyone)
