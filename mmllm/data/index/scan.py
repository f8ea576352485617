"""What a shard holds, read in bulk from its headers and small files; tokens are counted in `count.py`.

Shapes: N documents.
"""

from __future__ import annotations

import gc
import io
import json
import mmap
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from mmllm.data.samples.conversations import Said
from mmllm.data.samples.decode import picture_size
from mmllm.data.samples.lengths import PieceSize
from mmllm.data.samples.schema import (
    AUDIO_ENDINGS,
    IMAGE_ENDINGS,
    Names,
    as_said,
    check_endings,
    check_segment_files,
    jsonl_rows,
    parse_line,
)
from mmllm.data.samples.stored import unpack_codes
from mmllm.data.shards.headers import TarTable, read_headers
from mmllm_tokenizers.audio import sound_length
from mmllm_tokenizers.folder import TokenizerFolder

_SHAPE = re.compile(rb"'shape': \((\d+), (\d+)\)")
_FLAC = b"fLaC"
_OWN_ENDINGS = frozenset({*IMAGE_ENDINGS, *AUDIO_ENDINGS, "txt", "json", "jsonl"})


@dataclass(frozen=True)
class BadRow:
    """A row of a shard of which no document is made: its name and what is wrong with it."""

    name: str
    reason: str


@dataclass
class Scan:
    """The documents of one shard; a `jsonl` file's lines are documents of their own."""

    name: str
    kind: str = ""
    keys: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    """First byte of what is read of a document: its sample's first header, or its line."""
    spans: list[int] = field(default_factory=list)
    """Bytes from there."""
    lines: list[int] = field(default_factory=list)
    """Line of its `jsonl`, or -1."""
    texts: list[str | None] = field(default_factory=list)
    text_starts: list[int] = field(default_factory=list)
    """First byte of its `txt`, or 0."""
    pictures: list[list[tuple[int, int]]] = field(default_factory=list)
    """Width and height of each of its pictures as they are stored (upright, where pictures are cut into tiles), (0, 0)
    where that can't be read."""
    sounds: list[list[tuple[int, int, int]]] = field(default_factory=list)
    """Samples, samples a second and frames of each of its sounds, 0 where they aren't known."""
    segments: list[list[PieceSize]] = field(default_factory=list)
    """As `document_length` wants them."""
    said: list[list[Said]] = field(default_factory=list)
    """Of conversations, who says each segment; of all else nothing."""
    metadata: list[dict[str, Any]] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    num_skipped: dict[str, int] = field(default_factory=dict)
    """Members of the tar that are no sample's file, by what they are."""

    def __len__(self) -> int:
        return len(self.keys)

    def num_frames(self, row: int) -> int:
        """Frames of a document's sounds, together."""
        return sum(frames for _, _, frames in self.sounds[row])


_COLUMNS = (
    "keys", "starts", "spans", "lines", "texts", "text_starts", "pictures", "sounds", "segments", "said", "metadata",
)  # fmt: skip
_NO_PICTURE = "its picture can't be read"


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
    passed_over: tuple[str, ...]
    """Endings of files that are nothing of a sample's."""

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
    over = tuple(ending for ending in endings if "." not in ending and ending not in _OWN_ENDINGS)
    layout = _Layout(kind, text, metadata, lines, image, audio, codes, check_endings(endings, name), over)
    if layout.is_bare and metadata < 0:
        raise ValueError(f"{name}: has only {sorted(endings)}; a sample needs a picture, a sound or a txt")
    return layout


def scan_shard(data: bytes | mmap.mmap, name: str, folder: TokenizerFolder, text_key: str | None = None) -> Scan:
    """All that an index holds but the token counts.

    Args:
        data: All bytes of the shard.
        name: What errors call it.
        folder: Of its audio tokenizer, hash and frame rate are needed.
        text_key: Where a sample has no `txt`, the key of its `json` that holds its text.

    Raises:
        ValueError: The shard is truncated, damaged, empty, or mixes kinds; the message names shard and sample.
    """
    with _without_collection():
        table = read_headers(data, name)
        reader = _Reader(data, name, table, folder, text_key)
        found = Scan(name, reader.kind, num_skipped=table.num_skipped | reader.num_passed_over)
        reader.read_into(found)
    if not found.keys and not found.bad:
        raise ValueError(f"{name}: has no samples; build it again")
    return found


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


class _Reader:
    """Reads the small files of samples, a column at a time."""

    def __init__(
        self,
        data: bytes | mmap.mmap,
        name: str,
        table: TarTable,
        folder: TokenizerFolder,
        text_key: str | None,
    ) -> None:
        self._data, self._name, self._table, self._folder = data, name, table, folder
        self._text_key = text_key
        self._starts, self._ends = table.starts_M.tolist(), (table.starts_M + table.sizes_M).tolist()
        self._firsts = table.firsts_S.tolist()
        self._is_tiled = folder.config.tiling is not None
        self._codec = folder.audio.hash if folder.audio is not None else None
        self._codec_bytes = self._codec.encode("utf-32-le") if self._codec else b""
        self._distinct: dict[tuple[str, ...], _Layout] = {}
        self._bad: dict[int, str] = {}  # samples of which nothing is made, and why
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
            if isinstance(value, dict):
                values[sample] = value
            else:
                self._bad.setdefault(sample, f"its json is {type(value).__name__}; it must be an object")
        return values

    def _check_dots(self) -> None:
        """Refuses what a key with dots makes of two samples: one, of which the second's files are never read."""
        if all(layout.names == "plain" for layout in self._distinct.values()):
            return
        for sample, (layout, metadata) in enumerate(zip(self._layouts, self._metadata, strict=True)):
            segments = metadata.get("segments") if layout.lines < 0 else None
            if sample in self._bad:
                continue
            if layout.names == "named" or (layout.names == "numbered" and segments is None):
                endings = [self._table.endings[number] for number in self._table.files(sample)]
                check_segment_files(endings, segments, self._named(sample))

    def _only_kind(self) -> str:
        """The kind that all samples are of."""
        kinds = {
            sample: "interleaved" if "segments" in values and layout.lines < 0 else layout.kind
            for sample, (layout, values) in enumerate(zip(self._layouts, self._metadata, strict=True))
            if sample not in self._bad
        }
        if not kinds:
            return ""
        first = next(iter(kinds.values()))
        other = next((sample for sample, kind in kinds.items() if kind != first), None)
        if other is not None:
            raise ValueError(
                f"{self._name}: {self._table.keys[other]} is a sample of kind {kinds[other]}, others are {first}; "
                f"split them"
            )
        bare = [sample for sample in kinds if self._layouts[sample].is_bare] if first == "text" else []
        if bare:
            raise ValueError(f"{self._named(bare[0])}: has only a json; a sample needs a picture, a sound or a txt")
        return first

    @property
    def num_passed_over(self) -> dict[str, int]:
        """Files of samples that are nothing of theirs, by ending."""
        if not any(layout.passed_over for layout in self._distinct.values()):
            return {}
        return dict(Counter(f".{ending} files" for layout in self._layouts for ending in layout.passed_over))

    def _file(self, number: int) -> bytes:
        return self._data[self._starts[number] : self._ends[number]]

    def _one_json(self, sample: int, number: int) -> Any:
        try:
            return json.loads(self._file(number))
        except (ValueError, RecursionError) as error:
            self._bad[sample] = f"its json can't be read: {error}"
            return None

    def _named(self, sample: int) -> str:
        return f"{self._name}:{self._table.keys[sample]}"

    def read_into(self, found: Scan) -> None:
        """Fills all columns."""
        found.keys, found.starts = self._table.keys, self._table.offsets_S.tolist()
        found.spans, found.metadata = self._table.spans_S.tolist(), self._metadata
        if any(layout.lines >= 0 for layout in self._layouts):
            self._read_lines(found)
        else:
            found.lines = [-1] * len(self._layouts)
            found.texts = [self._text(sample) for sample in range(len(self._layouts))]
            found.text_starts = [
                self._starts[first + layout.text] if layout.text >= 0 else 0
                for first, layout in zip(self._firsts, self._layouts, strict=False)
            ]
        count = len(found.keys)
        found.pictures, found.sounds = [[] for _ in range(count)], [[] for _ in range(count)]
        found.segments, found.said = [[] for _ in range(count)], [[] for _ in range(count)]
        if self.kind == "interleaved":
            self._read_segments(found)
        elif self.kind == "audio":
            self._read_sounds(found)
        elif self.kind == "caption":
            self._read_pictures(found)
        if self._bad:
            found.bad += [BadRow(self._named(sample), reason) for sample, reason in sorted(self._bad.items())]
            if not any(layout.lines >= 0 for layout in self._layouts):  # else they were never added
                self._leave_out(found)

    def _leave_out(self, found: Scan) -> None:
        """Removes the bad samples from all columns."""
        kept = [sample for sample in range(len(self._layouts)) if sample not in self._bad]
        for name in _COLUMNS:
            column = getattr(found, name)
            setattr(found, name, [column[sample] for sample in kept])

    def _text(self, sample: int) -> str | None:
        place = self._layouts[sample].text
        if place < 0:
            told = self._metadata[sample].get(self._text_key) if self._text_key is not None else None
            return told if isinstance(told, str) else None
        try:
            return self._file(self._firsts[sample] + place).decode()
        except UnicodeDecodeError as error:
            self._bad[sample] = f"its txt isn't UTF-8 ({error.reason} at byte {error.start}); save it so"
            return None

    def _read_lines(self, found: Scan) -> None:
        """Samples of text of which some are `jsonl`: each line that is a row becomes a document."""
        keys, starts, spans, metadata = found.keys, found.starts, found.spans, found.metadata
        found.keys, found.starts, found.spans, found.metadata = [], [], [], []
        for sample, layout in enumerate(self._layouts):
            first = self._firsts[sample]
            if layout.lines < 0:
                row = -1, self._text(sample), metadata[sample], starts[sample], spans[sample]
                if sample in self._bad:
                    continue
                self._add(found, keys[sample], row, self._starts[first + layout.text])
                continue
            start = self._starts[first + layout.lines]
            for number, data in enumerate(jsonl_rows(self._file(first + layout.lines))):
                try:
                    text, others = parse_line(data, self._text_key)
                except ValueError as error:
                    found.bad.append(BadRow(f"{self._named(sample)} line {number + 1}", str(error)))
                else:
                    self._add(found, keys[sample], (number, text, others, start, len(data)), 0)
                start += len(data) + 1

    @staticmethod
    def _add(found: Scan, key: str, row: tuple[int, str | None, dict[str, Any], int, int], text_start: int) -> None:
        columns = found.lines, found.texts, found.metadata, found.starts, found.spans
        for column, value in zip(columns, row, strict=True):
            column.append(value)  # pyright: ignore[reportArgumentType]
        found.keys.append(key)
        found.text_starts.append(text_start)

    def _read_segments(self, found: Scan) -> None:
        found.texts, found.text_starts = [None] * len(self._metadata), [0] * len(self._metadata)
        for sample, metadata in enumerate(self._metadata):
            items = metadata.pop("segments", [])
            try:
                found.segments[sample] = self._segments(sample, items, found.pictures[sample], found.sounds[sample])
            except ValueError as error:
                self._bad[sample] = self._reason(error, sample)
                continue
            if (0, 0) in found.pictures[sample]:
                self._bad[sample] = _NO_PICTURE
            said = [as_said(item) for item in items] if isinstance(items, list) else []
            found.said[sample] = said if any(segment.role for segment in said) else []

    def _reason(self, error: ValueError, sample: int) -> str:
        """An error without the sample's name, which stands before it."""
        return str(error).removeprefix(f"{self._named(sample)}: ")

    def _read_sounds(self, found: Scan) -> None:
        for sample, (first, layout) in enumerate(zip(self._firsts, self._layouts, strict=False)):
            name, metadata = self._named(sample), self._metadata[sample]
            codes = self._file(first + layout.codes) if layout.codes >= 0 else None
            try:
                sound = self._sound(first + layout.audio if layout.audio >= 0 else -1, codes, name)
            except ValueError as error:
                self._bad[sample] = self._reason(error, sample)
                continue
            found.sounds[sample].append(sound)
            if "duration" not in metadata and sound[1]:
                metadata["duration"] = sound[0] / sound[1]

    def _read_pictures(self, found: Scan) -> None:
        """Sizes as rows tell them; where slots depend on them, as the pictures do."""
        columns = zip(self._firsts, self._layouts, self._metadata, found.pictures, strict=False)
        for sample, (first, layout, metadata, pictures) in enumerate(columns):
            width, height = metadata.get("width"), metadata.get("height")
            if not self._is_tiled and type(width) is int and type(height) is int and width >= 0 and height >= 0:
                pictures.append((width, height))
                continue
            size = self._size(first + layout.image)
            pictures.append(size)
            if size == (0, 0):
                self._bad.setdefault(sample, _NO_PICTURE)
            if size[0] and "width" not in metadata and "height" not in metadata:
                metadata["width"], metadata["height"] = size

    def _segments(
        self, sample: int, items: Any, pictures: list[tuple[int, int]], sounds: list[tuple[int, int, int]]
    ) -> list[PieceSize]:
        """Each segment as `document_length` wants it; pictures and sounds are appended."""
        numbers = {self._table.endings[number]: number for number in self._table.files(sample)}
        sizes: list[PieceSize] = []
        for item in items if isinstance(items, list) else [items]:
            match item:
                case {"text": str() as text}:
                    sizes.append(text)
                case {"image": str() as named} if (ending := named.lower()) in numbers:
                    pictures.append(self._size(numbers[ending]))
                    sizes.append(pictures[-1] if self._is_tiled else None)
                case {"audio": str() as named} if (ending := named.lower()) in numbers:
                    stored = numbers.get(f"{ending.partition('.')[0]}.codec.npz")
                    codes = self._file(stored) if stored is not None else None
                    sounds.append(self._sound(numbers[ending], codes, self._named(sample)))
                    sizes.append(sounds[-1][2])
                case _:
                    raise ValueError(
                        f"{self._named(sample)}: segment {item!r} names no file of the sample "
                        f"({', '.join(sorted(numbers))})"
                    )
        return sizes

    def _sound(self, number: int, codes: bytes | None, name: str) -> tuple[int, int, int]:
        """(samples, samples a second, frames) of a sound from its header and its codes' header; 0 what isn't known."""
        samples, rate = self._sound_header(number, name) if number >= 0 else (0, 0)
        if self._codec is None:
            return samples, rate, 0
        if codes is not None:
            shape = _SHAPE.search(codes)
            if shape and codes[30:39] == b"codes.npy" and self._codec_bytes in codes:
                return samples, rate, int(shape[2])
            return samples, rate, unpack_codes(codes, self._codec, name).shape[1]
        audio = self._folder.require_audio()
        if not audio.keeps_durations:
            raise ValueError(
                f"{name}: no codes are stored with its sound, and how many de-duplicated units it has isn't known from "
                f"its length; build the shards with `mmllm data build --tokenizer`"
            )
        return samples, rate, audio.num_frames_of(samples, rate) if rate else 0

    def _sound_header(self, number: int, name: str) -> tuple[int, int]:
        """(samples, samples a second)."""
        start = self._starts[number]
        head = self._data[start : min(start + 42, self._ends[number])]
        if head[:4] == _FLAC and len(head) == 42 and head[4] & 0x7F == 0:
            packed = int.from_bytes(head[18:26], "big")  # rate 20 bits, channels 3, depth 5, samples 36
            rate, samples = packed >> 44, packed & (1 << 36) - 1
            if rate and samples:
                return samples, rate
        return sound_length(self._file(number), f"{name}: the sound")

    def _size(self, number: int) -> tuple[int, int]:
        """Width and height from a picture's header."""
        try:
            if self._is_tiled:
                return picture_size(self._file(number))
            with Image.open(io.BytesIO(self._file(number))) as picture:
                return picture.size
        except Exception:  # whatever is wrong with it is said, counted and masked when it is decoded
            return 0, 0
