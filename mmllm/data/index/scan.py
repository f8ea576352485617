"""What a shard holds, read in bulk: first from its headers and small files, then its token counts.

The two are apart because tokenising takes most of the time. Shapes: N documents, K codebooks.
"""

from __future__ import annotations

import gc
import io
import json
import mmap
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from mmllm.data.samples.documents import KIND_TASKS, document_length
from mmllm.data.samples.schema import (
    AUDIO_ENDINGS,
    IMAGE_ENDINGS,
    Names,
    check_endings,
    check_segment_files,
    jsonl_lines,
)
from mmllm.data.samples.stored import unpack_codes
from mmllm.data.shards.headers import TarTable, read_headers
from mmllm_tokenizers.audio import sound_length
from mmllm_tokenizers.folder import TokenizerFolder

_SHAPE = re.compile(rb"'shape': \((\d+), (\d+)\)")
_FLAC = b"fLaC"


@dataclass
class Facts:
    """The documents of one shard; a `jsonl` file's lines are documents of their own."""

    name: str
    kind: str = ""
    keys: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    spans: list[int] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    """Line of its `jsonl`, or -1."""
    texts: list[str | None] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    segments: list[list[str | int | None]] = field(default_factory=list)
    """As `document_length` wants them."""
    roles: list[list[str | None]] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class _Layout:
    """What the files of a sample are, by their place in it; -1: it has none."""

    kind: str
    text: int
    metadata: int
    lines: int
    image: int
    audio: int
    codes: int
    names: Names

    @property
    def is_bare(self) -> bool:
        """Whether there is only a json, which must then name the segments."""
        return max(self.image, self.audio, self.text, self.lines, self.codes) < 0


def _layout(endings: tuple[str, ...], name: str) -> _Layout:
    def find(*wanted: str) -> int:
        return next((place for place, ending in enumerate(endings) if ending in wanted), -1)

    image, audio, text = find(*IMAGE_ENDINGS), find(*AUDIO_ENDINGS), find("txt")
    lines, codes, metadata = find("jsonl"), find("codec.npz"), find("json")
    kind = "text" if lines >= 0 else "audio" if audio >= 0 or codes >= 0 else "caption" if image >= 0 else "text"
    layout = _Layout(kind, text, metadata, lines, image, audio, codes, check_endings(endings, name))
    if layout.is_bare and metadata < 0:
        raise ValueError(f"{name}: has only {sorted(endings)}; a sample needs a picture, a sound or a txt")
    return layout


def read_facts(data: bytes | mmap.mmap, name: str, folder: TokenizerFolder) -> Facts:
    """All but the token counts.

    Args:
        data: All bytes of the shard.
        name: What errors call it.
        folder: Of its audio tokenizer, hash and frame rate are needed.

    Raises:
        ValueError: The shard is truncated, damaged, empty, or mixes kinds; the message names shard and sample.
    """
    with _without_collection():
        table = read_headers(data, name)
        reader = _Reader(data, name, table, folder)
        facts = Facts(name, reader.kind)
        counts = reader.read_into(facts)
        facts.keys = _repeated(table.keys, counts)
        facts.offsets = _repeated(table.offsets_S.tolist(), counts)
        facts.spans = _repeated(table.spans_S.tolist(), counts)
    if not facts.keys:
        raise ValueError(f"{name}: has no samples; build it again")
    return facts


@contextmanager
def _without_collection() -> Iterator[None]:
    """Python's collector of cycles goes through all rows again and again while they are made, and finds nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _repeated(values: list[Any], counts: list[int] | None) -> list[Any]:
    if counts is None:
        return values
    return [value for value, count in zip(values, counts, strict=True) for _ in range(count)]


class _Reader:
    """Reads the small files of samples, a column at a time."""

    def __init__(self, data: bytes | mmap.mmap, name: str, table: TarTable, folder: TokenizerFolder) -> None:
        self._data, self._name, self._table, self._folder = data, name, table, folder
        self._starts, self._ends = table.starts_M.tolist(), (table.starts_M + table.sizes_M).tolist()
        self._firsts = table.firsts_S.tolist()
        self._codec = folder.audio.hash if folder.audio is not None else None
        self._codec_bytes = self._codec.encode("utf-32-le") if self._codec else b""
        self._distinct: dict[tuple[str, ...], _Layout] = {}
        self._layouts = self._find_layouts()
        self._metadata = self._read_metadata()
        self._check_dots()
        self.kind = self._only_kind()

    def _find_layouts(self) -> list[_Layout]:
        """What each sample's files are."""
        endings, layouts = self._table.endings, self._distinct
        found: list[_Layout] = []
        for sample, (first, after) in enumerate(zip(self._firsts, self._firsts[1:], strict=False)):
            key = tuple(endings[first:after])
            if key not in layouts:
                layouts[key] = _layout(key, self._named(sample))
            found.append(layouts[key])
        return found

    def _read_metadata(self) -> list[dict[str, Any]]:
        """Each sample's `json`, all parsed at once."""
        places = [
            (sample, first + layout.metadata)
            for sample, (first, layout) in enumerate(zip(self._firsts, self._layouts, strict=False))
            if layout.metadata >= 0
        ]
        found: list[Any] = []
        try:
            found = json.loads(b"[" + b",".join([self._file(number) for _, number in places]) + b"]")
        except (ValueError, RecursionError):
            found = []
        if len(found) != len(places):
            found = [self._one_json(sample, number) for sample, number in places]
        values: list[dict[str, Any]] = [{} for _ in self._layouts]
        for (sample, _), value in zip(places, found, strict=True):
            if not isinstance(value, dict):
                raise ValueError(f"{self._named(sample)}: its json is {type(value).__name__}; it must be an object")
            values[sample] = value
        return values

    def _check_dots(self) -> None:
        """Refuses what a key with dots makes of two samples: one, of which the second's files are never read."""
        if all(layout.names == "plain" for layout in self._distinct.values()):
            return
        for sample, (layout, metadata) in enumerate(zip(self._layouts, self._metadata, strict=True)):
            segments = metadata.get("segments") if layout.lines < 0 else None
            if layout.names == "named" or (layout.names == "numbered" and segments is None):
                endings = [self._table.endings[number] for number in self._table.files(sample)]
                check_segment_files(endings, segments, self._named(sample))

    def _only_kind(self) -> str:
        """The kind that all samples are of."""
        kinds = [
            "interleaved" if "segments" in values and layout.lines < 0 else layout.kind
            for layout, values in zip(self._layouts, self._metadata, strict=True)
        ]
        if not kinds:
            return ""
        other = next((sample for sample, kind in enumerate(kinds) if kind != kinds[0]), None)
        if other is not None:
            raise ValueError(
                f"{self._name}: {self._table.keys[other]} is a sample of kind {kinds[other]}, others are {kinds[0]}; "
                f"split them"
            )
        bare = [sample for sample, layout in enumerate(self._layouts) if layout.is_bare] if kinds[0] == "text" else []
        if bare:
            raise ValueError(f"{self._named(bare[0])}: has only a json; a sample needs a picture, a sound or a txt")
        return kinds[0]

    def _file(self, number: int) -> bytes:
        return self._data[self._starts[number] : self._ends[number]]

    def _one_json(self, sample: int, number: int) -> Any:
        try:
            return json.loads(self._file(number))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self._named(sample)}: broken text or json: {error!r}") from error

    def _named(self, sample: int) -> str:
        return f"{self._name}:{self._table.keys[sample]}"

    def read_into(self, facts: Facts) -> list[int] | None:
        """Fills the columns but keys and places; gives how many documents each sample has, or None: one each."""
        counts = None
        if any(layout.lines >= 0 for layout in self._layouts):
            documents = [self._documents(sample) for sample in range(len(self._layouts))]
            counts = [len(each) for each in documents]
            rows = [row for each in documents for row in each]
            facts.lines, facts.texts = [line for line, _, _ in rows], [text for _, text, _ in rows]
            facts.metadata = [metadata for _, _, metadata in rows]
        else:
            facts.lines = [-1] * len(self._layouts)
            facts.texts = [self._text(sample) for sample in range(len(self._layouts))]
            facts.metadata = self._metadata
        num_documents = len(facts.texts)
        facts.frames = [0] * num_documents
        facts.images = [int(self.kind == "caption")] * num_documents
        facts.segments, facts.roles = [[] for _ in range(num_documents)], [[] for _ in range(num_documents)]
        if self.kind == "interleaved":
            self._read_segments(facts)
        elif self.kind == "audio":
            self._read_sounds(facts)
        elif self.kind == "caption":
            for first, layout, metadata in zip(self._firsts, self._layouts, self._metadata, strict=False):
                if "width" not in metadata or "height" not in metadata:
                    self._add_size(metadata, first + layout.image)
        return counts

    def _text(self, sample: int) -> str | None:
        place = self._layouts[sample].text
        if place < 0:
            return None
        try:
            return self._file(self._firsts[sample] + place).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._named(sample)}: broken text or json: {error!r}") from error

    def _documents(self, sample: int) -> list[tuple[int, str | None, dict[str, Any]]]:
        """(line or -1, text, metadata) of each document of a text sample."""
        place = self._layouts[sample].lines
        if place < 0:
            return [(-1, self._text(sample), self._metadata[sample])]
        try:
            rows = [json.loads(line) for line in jsonl_lines(self._file(self._firsts[sample] + place).decode())]
            texts = [row["text"] for row in rows]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{self._named(sample)}: broken text or json: {error!r}") from error
        others = [{key: value for key, value in row.items() if key != "text"} for row in rows]
        return list(zip(range(len(rows)), texts, others, strict=True))

    def _read_segments(self, facts: Facts) -> None:
        for sample, metadata in enumerate(self._metadata):
            segments, facts.roles[sample] = self._segments(sample, metadata.pop("segments"))
            facts.segments[sample], facts.images[sample] = segments, segments.count(None)
            facts.frames[sample] = sum(item for item in segments if isinstance(item, int))

    def _read_sounds(self, facts: Facts) -> None:
        for sample, (first, layout) in enumerate(zip(self._firsts, self._layouts, strict=False)):
            name, metadata = self._named(sample), self._metadata[sample]
            if self._codec is not None:
                codes = self._file(first + layout.codes) if layout.codes >= 0 else None
                facts.frames[sample] = self._frames(first + layout.audio if layout.audio >= 0 else -1, codes, name)
            if "duration" not in metadata and layout.audio >= 0:
                samples, rate = self._sound(first + layout.audio, name)
                metadata["duration"] = samples / rate

    def _segments(self, sample: int, items: Any) -> tuple[list[str | int | None], list[str | None]]:
        """Each segment as `document_length` wants it, and who says it (for a conversation alone)."""
        numbers = {self._table.endings[number]: number for number in self._table.files(sample)}
        sizes: list[str | int | None] = []
        for item in items if isinstance(items, list) else [items]:
            match item:
                case {"text": str() as text}:
                    sizes.append(text)
                case {"image": str() as named} if named.lower() in numbers:
                    sizes.append(None)
                case {"audio": str() as named} if (ending := named.lower()) in numbers:
                    stored = numbers.get(f"{ending.partition('.')[0]}.codec.npz")
                    codes = self._file(stored) if stored is not None else None
                    name = self._named(sample)
                    sizes.append(self._frames(numbers[ending], codes, name) if self._codec is not None else 0)
                case _:
                    raise ValueError(
                        f"{self._named(sample)}: segment {item!r} names no file of the sample "
                        f"({', '.join(sorted(numbers))})"
                    )
        roles = [item.get("role") for item in items]
        return sizes, roles if any(roles) else []

    def _frames(self, number: int, codes: bytes | None, name: str) -> int:
        """Frames of a sound, from its codes' header or from its own."""
        assert self._codec is not None
        if codes is not None:
            found = _SHAPE.search(codes)
            if found and codes[30:39] == b"codes.npy" and self._codec_bytes in codes:
                return int(found[2])
            return unpack_codes(codes, self._codec, name).shape[1]
        samples, rate = self._sound(number, name)
        return self._folder.require_audio().num_frames_of(samples, rate)

    def _sound(self, number: int, name: str) -> tuple[int, int]:
        """(samples, samples a second) from a sound's header."""
        start = self._starts[number]
        head = self._data[start : min(start + 42, self._ends[number])]
        if head[:4] == _FLAC and len(head) == 42 and head[4] & 0x7F == 0:
            packed = int.from_bytes(head[18:26], "big")  # rate 20 bits, channels 3, depth 5, samples 36
            rate, samples = packed >> 44, packed & (1 << 36) - 1
            if rate and samples:
                return samples, rate
        return sound_length(self._file(number), f"{name}: the sound")

    def _add_size(self, metadata: dict[str, Any], number: int) -> None:
        """Width and height from the picture's header, where the row doesn't say them."""
        if "width" in metadata and "height" in metadata:
            return
        try:
            with Image.open(io.BytesIO(self._file(number))) as picture:
                metadata["width"], metadata["height"] = picture.size
        except Exception:  # whatever is wrong with it is said, counted and masked when it is decoded
            return


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of each document by task, 0 where it can't be written so; and how rare its tokens are."""

    by_task: dict[str, np.ndarray]
    rarity_N: np.ndarray
    """float64, mean of -log p of a text's tokens, p their share in this shard; not a number without a text."""


def count_tokens(facts: Facts, folder: TokenizerFolder, progress: Callable[[int], None] | None = None) -> TokenCounts:
    """Tokenises all texts, and counts each document's tokens by task.

    Args:
        facts: The documents.
        folder: Tokenizers and templates.
        progress: Called with the number of documents done.
    """
    kind, hears = facts.kind, folder.audio is not None
    ids = [np.array(folder.text.encode(text) if text else [], dtype=np.int32) for text in facts.texts]
    counts: dict[str, list[int]] = {task: [] for task in KIND_TASKS[kind]}
    for row, key in enumerate(facts.keys):
        line, segments, roles = facts.lines[row], facts.segments[row], facts.roles[row]
        metadata = facts.metadata[row]
        for task, column in counts.items():
            needs_text = task not in ("interleaved", "question", "chat")
            is_deaf = not hears and (kind == "audio" or any(isinstance(segment, int) for segment in segments))
            impossible = (
                is_deaf
                or (needs_text and not facts.texts[row])
                or (task == "question" and "question" not in metadata)
                or (kind == "interleaved" and bool(roles) != (task == "chat"))
            )
            tokens = 0 if impossible else document_length(
                task, folder, key=f"{key}-{line}" if line >= 0 else key, text=len(ids[row]),
                num_frames=facts.frames[row], segments=segments, metadata=metadata, roles=roles,
            )  # fmt: skip
            column.append(tokens)
        if progress and row % 1000 == 999:
            progress(row + 1)
    return TokenCounts({task: np.array(column, dtype=np.int64) for task, column in counts.items()}, _rarity(ids))


def _rarity(ids: Sequence[np.ndarray]) -> np.ndarray:
    lengths = np.array([len(item) for item in ids], dtype=np.int64)
    if not lengths.sum():
        return np.full(len(ids), np.nan)
    together = np.concatenate(ids)
    counts = np.bincount(together)
    surprise = -np.log(np.maximum(counts, 1) / len(together))[together]
    sums = np.diff(np.concatenate([[0.0], np.cumsum(surprise)])[np.concatenate([[0], np.cumsum(lengths)])])
    return np.where(lengths > 0, sums / np.maximum(lengths, 1), np.nan)
