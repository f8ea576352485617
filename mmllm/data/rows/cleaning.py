"""Rows measured, filtered by quality, and rid of exact and near duplicates, before they are split and built.

Measuring reads every file, row by row, and knows of no other row: it may run in many processes and elsewhere.
Choosing looks at the measures alone. Shapes: P hash functions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mmllm.data.executors.parallel import in_order
from mmllm.data.executors.stages import Executor, Progress, Stage
from mmllm.data.executors.task import Work
from mmllm.data.expressions import compile_filter, filter_names
from mmllm.data.rows.bad_rows import ManifestError, is_of_machine
from mmllm.data.rows.media import Digests, Media
from mmllm.data.rows.rows import Row, row_files, row_media

Dedup = Literal["none", "exact", "minhash"]
DEDUPS: tuple[Dedup, ...] = ("none", "exact", "minhash")
NUM_BANDS, BAND_ROWS = 16, 8
SHINGLE_WORDS = 5
MIN_SHINGLES = 8
"""Shorter texts are told by exact comparison alone: of a caption's few words, too many agree by chance."""
_CHUNK, _MAX_CHUNKS = 256, 4096
_FACTS = ("words", "characters", "mean_word", "letters", "symbols", "repeated_lines")


@dataclass(frozen=True)
class CleaningConfig:
    """What is left out."""

    dedup: Dedup = "none"
    """`exact`: rows of equal files and text. `minhash`: also texts and documents that are nearly another."""
    threshold: float = 0.8
    """Jaccard similarity of two texts' shingles from which one is left out, as estimated by their signatures."""
    quality: str | None = None
    """Which rows are kept, e.g. `"words >= 5 and repeated_lines < 0.3"`: a filter over the row's metadata and `words`,
    `characters`, `mean_word` (letters a word), `letters`, `symbols` and `repeated_lines` (shares). The measures are
    those of Rae et al. 2021 (https://arxiv.org/abs/2112.11446, A1.1)."""

    def __post_init__(self) -> None:
        if self.dedup not in DEDUPS:
            raise ValueError(f"dedup is {self.dedup!r}; it must be one of {', '.join(DEDUPS)}")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; it must be in (0, 1]")
        if self.quality is not None:
            compile_filter(self.quality)

    @property
    def is_on(self) -> bool:
        """Whether anything is left out."""
        return self.dedup != "none" or self.quality is not None


def measure_rows(
    rows: Sequence[Row], config: CleaningConfig, executor: Executor, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Each row's measures; of one whose files can't be read, `error`.

    Args:
        rows: The rows.
        config: What is measured.
        executor: Where.
        progress: Called with the numbers of rows done and in all.

    Raises:
        UnfinishedError: Tasks elsewhere aren't done yet.
    """
    size = max(_CHUNK, -(-len(rows) // _MAX_CHUNKS))
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    measured = _Measured(config.quality is not None, config.dedup == "minhash")
    if executor.is_here:
        found = []
        for _, measures in in_order(measured, chunks, executor.workers):
            found += measures
            if progress:
                progress(len(found), len(rows))
        return found
    work = Work("mmllm.data.rows.cleaning:row_measurer", dataclasses.asdict(measured))
    stage = Stage("measure", executor, work.settings)
    keys = [stage.key(chunk, [path for row in chunk for path in row_files(row)]) for chunk in chunks]
    done = stage.run(work, chunks, keys, [len(chunk) for chunk in chunks], progress)
    return [found for measures in done for found in measures]


@dataclass(frozen=True)
class _Measured:
    facts: bool
    signature: bool

    def __call__(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        return [self._measure(row) for row in rows]

    def _measure(self, row: Row) -> dict[str, Any]:
        try:
            return measure(row, self.facts, self.signature)
        except (OSError, ValueError) as error:
            if is_of_machine(error):
                raise
            return {"error": str(error)}


def row_measurer(settings: dict[str, Any]) -> Callable[[Sequence[Any], str], list[dict[str, Any]]]:
    """What a task elsewhere does with a chunk of rows, given as JSON."""
    measured = _Measured(**settings)
    return lambda rows, key: measured([Row.from_json(row) for row in rows])


def measure(row: Row, facts: bool = False, signature: bool = False) -> dict[str, Any]:
    """What choosing needs of a row, as JSON.

    Returns:
        `digest` of what it holds; `files`, the digests of its files; `facts` of its text; `signature`, uint32 `[P]` in
        hexadecimal digits, or `None` where its text is too short or its kind has none.
    """
    digests, text = Digests(), _text(row)
    found: dict[str, Any] = {"digest": _digest(row, digests), "files": [digests(media) for _, media in row_media(row)]}
    if facts:
        found["facts"] = text_facts(text)
    if signature and row.kind in ("text", "interleaved"):
        signature_P = minhash(text)
        found["signature"] = None if signature_P is None else signature_P.astype("<u4").tobytes().hex()
    return found


def _text(row: Row) -> str:
    return row.text or "\n".join(str(segment["text"]) for segment in row.segments if "text" in segment)


def _digest(row: Row, digests: Digests) -> str:
    digest = hashlib.sha256()
    parts: list[Any] = [row.text, row.image, row.audio]
    parts += [value for segment in row.segments for value in segment.values()]
    parts += [row.metadata.get("question"), row.metadata.get("answer")]
    for part in parts:
        data = (digests(part) if isinstance(part, Media) else str(part)).encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def text_facts(text: str) -> dict[str, float]:
    """Measures of a text; shares are 0 where there is nothing to count."""
    words = text.split()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    letters = sum(character.isalpha() for character in text)
    symbols = sum(not character.isalnum() and not character.isspace() for character in text)
    solid = max(1, sum(not character.isspace() for character in text))
    values = (
        len(words), len(text), sum(map(len, words)) / max(1, len(words)), letters / solid, symbols / solid,
        1 - len(set(lines)) / max(1, len(lines)) if lines else 0.0,
    )  # fmt: skip
    return dict(zip(_FACTS, values, strict=True))


def _shingles(text: str) -> set[int]:
    words = re.findall(r"\w+", text.lower())
    starts = range(max(1, len(words) - SHINGLE_WORDS + 1))
    return {zlib.crc32(" ".join(words[start : start + SHINGLE_WORDS]).encode()) for start in starts}


def minhash(text: str) -> np.ndarray | None:
    """uint32 [P] signature of a text's shingles of five words (Broder 1997, https://doi.org/10.1109/SEQUEN.1997.666900).

    The share of places in which two signatures agree estimates the Jaccard similarity of their shingles. `None` for a
    text with fewer than `MIN_SHINGLES`.
    """
    shingles = np.array(sorted(_shingles(text)), dtype=np.uint64)
    if len(shingles) < MIN_SHINGLES:
        return None
    rng = np.random.default_rng(0)
    factors_P, offsets_P = (rng.integers(1, 2**63, NUM_BANDS * BAND_ROWS, dtype=np.uint64) for _ in range(2))
    with np.errstate(over="ignore"):  # multiply-shift hashing (Dietzfelbinger et al. 1997): the overflow is meant
        hashed = (shingles[:, None] * (factors_P | np.uint64(1)) + offsets_P) >> np.uint64(32)
    return hashed.min(axis=0).astype(np.uint32)


def choose(
    rows: Sequence[Row], measures: Sequence[dict[str, Any]], config: CleaningConfig
) -> tuple[list[Row], dict[str, int]]:
    """The rows that are kept, in order, and how many each stage left out.

    Raises:
        ManifestError: None is kept.
    """
    keep = [True] * len(rows)
    counts = {"quality": 0, "exact": 0, "near": 0}
    if config.quality is not None:
        known = {*_FACTS, *(key for row in rows for key in row.metadata)}
        unknown = [name for name in filter_names(config.quality) if name not in known]
        if unknown:
            raise ManifestError(
                f"the quality filter {config.quality!r} reads {unknown[0]!r}, which no row has; there are "
                f"{', '.join(sorted(known))}"
            )
        keeps = compile_filter(config.quality)
        for number, (row, found) in enumerate(zip(rows, measures, strict=True)):
            keep[number] = keeps({**row.metadata, **found["facts"]})
        counts["quality"] = keep.count(False)
    if config.dedup != "none":
        seen: set[str] = set()
        for number, found in enumerate(measures):
            if keep[number] and found["digest"] in seen:
                keep[number] = False
                counts["exact"] += 1
            elif keep[number]:
                seen.add(found["digest"])
    if config.dedup == "minhash":
        for number in _near(measures, keep, config.threshold):
            keep[number] = False
            counts["near"] += 1
    kept = [row for row, is_kept in zip(rows, keep, strict=True) if is_kept]
    if not kept:
        told = ", ".join(f"{count} by {stage}" for stage, count in counts.items() if count)
        raise ManifestError(f"cleaning leaves none of {len(rows)} rows ({told}); loosen the quality filter")
    return kept, counts


def _near(measures: Sequence[dict[str, Any]], keep: Sequence[bool], threshold: float) -> list[int]:
    """Rows that are nearly one that is kept before them.

    Signatures that agree in a whole band are candidates; they are compared in full.
    """
    bands: dict[bytes, list[int]] = {}
    kept: dict[int, np.ndarray] = {}
    near = []
    for number, found in enumerate(measures):
        if not keep[number] or found.get("signature") is None:
            continue
        signature_P = np.frombuffer(bytes.fromhex(found["signature"]), dtype="<u4")
        names = [bytes([band]) + part.tobytes() for band, part in enumerate(signature_P.reshape(NUM_BANDS, BAND_ROWS))]
        candidates = {other for name in names for other in bands.get(name, ())}
        if any((kept[other] == signature_P).mean() >= threshold for other in candidates):
            near.append(number)
            continue
        kept[number] = signature_P
        for name in names:
            bands.setdefault(name, []).append(number)
    return near
