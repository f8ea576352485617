"""Rows measured, filtered by quality, and rid of exact and near duplicates, before they are split and built.

Measuring reads every file, row by row, and knows of no other row: it may run in many processes and elsewhere.
Choosing looks at the measures alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmllm.data.executors.parallel import in_order
from mmllm.data.executors.stages import Executor, Progress, Stage
from mmllm.data.executors.task import Work
from mmllm.data.expressions import compile_filter, filter_names
from mmllm.data.rows.bad_rows import ManifestError, is_of_machine
from mmllm.data.rows.media import Digests, Media
from mmllm.data.rows.near_copies import Shingles, described_media, minhash, near_rows
from mmllm.data.rows.rows import Row, row_files, row_media, row_text

Dedup = Literal["none", "exact", "minhash"]
DEDUPS: tuple[Dedup, ...] = ("none", "exact", "minhash")
SHINGLES = "words:5"
_CHUNK, _MAX_CHUNKS = 256, 4096
_FACTS = ("words", "characters", "mean_word", "letters", "symbols", "repeated_lines")


@dataclass(frozen=True)
class CleaningConfig:
    """What is left out."""

    dedup: Dedup = "none"
    """`exact`: rows of equal files and text. `minhash`: also those whose text is nearly another's and whose pictures
    and sounds, if they have any, are the same (`near_copies.py`); of a cluster of them the first is kept."""
    threshold: float = 0.8
    """Jaccard similarity of two texts' shingles from which one is left out, as estimated by their signatures."""
    quality: str | None = None
    """Which rows are kept, e.g. `"words >= 5 and repeated_lines < 0.3"`: a filter over the row's metadata and `words`,
    `characters`, `mean_word` (letters a word), `letters`, `symbols` and `repeated_lines` (shares). The measures are
    those of Rae et al. 2021 (https://arxiv.org/abs/2112.11446, A1.1)."""
    shingles: str = SHINGLES
    """What `minhash` compares texts by: `words:N` or `chars:N`. A text of fewer than eight (by default: than twelve
    words) is near no other; captions need `chars:5` or the like."""

    def __post_init__(self) -> None:
        if self.dedup not in DEDUPS:
            raise ValueError(f"dedup is {self.dedup!r}; it must be one of {', '.join(DEDUPS)}")
        Shingles.parse(self.shingles)
        if self.shingles != SHINGLES and self.dedup != "minhash":
            raise ValueError(f"shingles is {self.shingles!r}, but dedup is {self.dedup!r}; only minhash compares them")
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
    measured = _Measured(config.quality is not None, config.dedup == "minhash", config.shingles)
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
    shingles: str = SHINGLES

    def __call__(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        return [self._measure(row) for row in rows]

    def _measure(self, row: Row) -> dict[str, Any]:
        try:
            return measure(row, self.facts, self.signature, self.shingles)
        except (OSError, ValueError) as error:
            if is_of_machine(error):
                raise
            return {"error": str(error)}


def row_measurer(settings: dict[str, Any]) -> Callable[[Sequence[Any], str], list[dict[str, Any]]]:
    """What a task elsewhere does with a chunk of rows, given as JSON."""
    measured = _Measured(**settings)
    return lambda rows, key: measured([Row.from_json(row) for row in rows])


def measure(row: Row, facts: bool = False, signature: bool = False, shingles: str = SHINGLES) -> dict[str, Any]:
    """What choosing needs of a row, as JSON.

    Returns:
        `digest` of what it holds; `files`, the digests of its files; `facts` of its text; `signature` of its text with
        its question and answer, uint32 `[P]` in hexadecimal digits, or `None` where that is too short; beside a
        signature, `kind` and `media`, as `near_copies.described_media` gives it.
    """
    digests, text = Digests(), _text(row)
    found: dict[str, Any] = {"digest": _digest(row, digests), "files": [digests(media) for _, media in row_media(row)]}
    if facts:
        found["facts"] = text_facts(text)
    if signature:
        signature_P = minhash(row_text(row), Shingles.parse(shingles))
        found["signature"] = None if signature_P is None else signature_P.astype("<u4").tobytes().hex()
        if signature_P is not None:
            found |= {"kind": row.kind, "media": described_media(row_media(row), found["files"])}
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
        for number in near_rows(measures, keep, config.threshold):
            keep[number] = False
            counts["near"] += 1
    kept = [row for row, is_kept in zip(rows, keep, strict=True) if is_kept]
    if not kept:
        told = ", ".join(f"{count} by {stage}" for stage, count in counts.items() if count)
        raise ManifestError(f"cleaning leaves none of {len(rows)} rows ({told}); loosen the quality filter")
    return kept, counts
