"""What is in a shard, without opening it again: where each document is, how long, and its metadata.

Beside its shard lies `<shard>.index`, a file of arrays (`arrays.py`). Opening it reads its header; a document is then
one read of 24 bytes. Token counts depend on the tokenizer, whose hash is stored; another tokenizer or another shard is
refused.

Shapes: N documents, P pictures, Q sounds, L pieces of long texts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmllm.data.executors.parallel import in_chunks
from mmllm.data.index.arrays import ArraysFile, open_arrays, opened, write_arrays
from mmllm.data.index.columns import Column, Texts
from mmllm.data.index.count import TokenCounts, count_tokens
from mmllm.data.index.scan import Scan, scan_shard
from mmllm.data.samples.documents import KIND_TASKS
from mmllm.data.shards.files import Version, read_range
from mmllm.data.shards.find import SUMMARY
from mmllm.data.shards.reader import ShardReader
from mmllm.data.shards.remote import RemoteShard, Shard, fetch_side_file, local_copy, side_file, stat_shard
from mmllm_tokenizers.folder import TokenizerFolder

FORMAT_VERSION = 3
ENDING = ".index"
RECORD = np.dtype(
    [
        ("start", "<u8"),  # first byte of what is read: the sample's first header, or a line of its jsonl
        ("bytes", "<u4"),  # from there
        ("line", "<i4"),  # of its jsonl, or -1
        ("frames", "<u4"),  # of its sounds, together
        ("images", "<u2"),
        ("chats", "<u2"),  # whether `second` counts the task `chat`
    ]
)
_PROBES, _PROBE_BYTES = 8, 1024
_DIGESTS = "text.digests"
_NAMED = 20
"""Rows without a document that an index names; all are counted."""
_FETCHES = 32
"""Indices that are looked up at a time, where shards are remote."""
_SCALARS = {str, int, float, bool, type(None)}
_OLD_MAGIC = b"mmllmidx"

_logger = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where a document is in its shard."""

    start: int
    """First byte of its sample's first header, or of its line."""
    num_bytes: int
    line: int
    """Of its sample's `jsonl`, or -1."""
    num_frames: int
    num_images: int


@dataclass(frozen=True)
class LongText:
    """A text whose pieces can each be tokenised alone."""

    bounds_L2: np.ndarray
    """int64, first token and first byte of each piece, and behind the last one the numbers of both."""
    start: int
    """First byte of its `txt` in the shard, or 0: it is in a line of a `jsonl`."""

    @property
    def num_tokens(self) -> int:
        """Of the whole text."""
        return int(self.bounds_L2[-1, 0])

    def holding(self, first: int, stop: int) -> np.ndarray:
        """The bounds of the pieces that hold the tokens `[first, stop)`."""
        firsts = self.bounds_L2[:-1, 0]
        low = max(0, int(np.searchsorted(firsts, first, side="right")) - 1)
        high = max(low + 1, int(np.searchsorted(firsts, stop, side="left")))
        return self.bounds_L2[low : high + 1]


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """The documents of one shard. A `jsonl` file's lines are documents of their own.

    It holds some 1 KB, whatever the number of documents; all else is read from its file when it is asked for.
    """

    path: Shard
    file: Path
    version: Version
    records_start: int
    """First byte of the records in the file."""
    sha256: str
    kind: str
    num_documents: int
    """N."""
    text_key: str | None
    """The key of a sample's `json` that holds its text, where it has no `txt`."""
    has_pieces: bool

    @property
    def arrays(self) -> ArraysFile:
        """The file with its whole header."""
        return opened(self.file, self.version)

    @property
    def lengths(self) -> dict[str, np.ndarray]:
        """int64 [N] token counts by task; 0 where the document can't be written as that task. Read each time."""
        first, *others = KIND_TASKS[self.kind]
        lengths = {first: self.tokens_N}
        if others:
            second_N = self.arrays.read("second").astype(np.int64)
            chats_N = self.records_N["chats"] > 0 if len(others) > 1 else np.zeros(len(second_N), dtype=bool)
            lengths[others[0]] = np.where(chats_N, 0, second_N)
            if len(others) > 1:
                lengths[others[1]] = np.where(chats_N, second_N, 0)
        return lengths

    def tokens_of(self, task: str) -> np.ndarray:
        """As `lengths` has it for one task; no more is read."""
        return self.tokens_N if task == KIND_TASKS[self.kind][0] else self.lengths[task]

    @property
    def tokens_N(self) -> np.ndarray:
        """int64 [N] as the kind's first task."""
        return self.arrays.read("tokens").astype(np.int64)

    @property
    def records_N(self) -> np.ndarray:
        """`RECORD`s."""
        return self.arrays.read("records").reshape(-1).view(RECORD)

    @property
    def num_images_N(self) -> np.ndarray:
        """Pictures of each document."""
        return self.records_N["images"]

    @property
    def num_frames_N(self) -> np.ndarray:
        """Frames of its sounds, together."""
        return self.records_N["frames"]

    @property
    def picture_sizes_P2(self) -> np.ndarray:
        """uint32 width and height of all documents' pictures, in order, as they are stored; 0 where unreadable."""
        return self.arrays.read("picture.sizes")

    @property
    def sounds_Q3(self) -> np.ndarray:
        """uint32 samples, samples a second and frames of all documents' sounds, in order; 0 what isn't known."""
        return self.arrays.read("sound.lengths")

    @property
    def keys(self) -> Texts:
        """Of the samples; documents of one `jsonl` share a key."""
        return Texts(self._read, "keys", self.num_documents)

    @property
    def column_names(self) -> list[str]:
        """Of `columns`."""
        return list(self.arrays.info["columns"])

    @property
    def columns(self) -> Mapping[str, Column]:
        """The rows' scalar metadata, and what was measured: `width`, `height`, `duration`, `rarity`."""
        told = self.arrays.info["columns"]
        return {
            name: Column(self._read, f"column{number}", self.num_documents, **more)
            for number, (name, more) in enumerate(told.items())
        }

    @property
    def bad(self) -> tuple[int, list[tuple[str, str]]]:
        """How many rows of the shard no document is made of, and the first of them: name and reason."""
        told = self.arrays.info["bad"]
        return told["count"], [(name, reason) for name, reason in told["named"]]

    @property
    def caption_digests_N(self) -> np.ndarray | None:
        """uint64, equal for equal texts of captions; `None` of another kind, and of an index that lacks them."""
        return self.arrays.read(_DIGESTS) if _DIGESTS in self.arrays.places else None

    @property
    def num_skipped(self) -> dict[str, int]:
        """Members of the tar that are no sample's file, by what they are."""
        return self.arrays.info["skipped"]

    @property
    def num_unread(self) -> int:
        """Of the bad rows, those that are no documents: the others are, without tokens."""
        return self.arrays.info["bad"]["unread"]

    def _read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.arrays.read(name, start, stop)

    def place(self, row: int) -> Place:
        """Where a document is: one read of its record."""
        size = RECORD.itemsize
        data = read_range(self.file, self.records_start + row * size, size, self.version)
        start, num_bytes, line, frames, images, _ = np.frombuffer(data, dtype=RECORD)[0].item()
        return Place(start, num_bytes, line, frames, images)

    def key(self, row: int) -> str:
        """A document's key."""
        return self.keys[row]

    def long_text(self, row: int) -> LongText | None:
        """Where the pieces of a long text are; `None` of another."""
        if not self.has_pieces:
            return None
        begin, end = self._read("piece.firsts", row, row + 2).tolist()
        if end - begin < 2:
            return None
        starts_L2 = self._read("piece.starts", begin, end).astype(np.int64)
        ((num_tokens, num_bytes, start),) = self._read("piece.texts", row, row + 1).tolist()
        return LongText(np.concatenate([starts_L2, [[num_tokens, num_bytes]]]), start)


def index_path(shard: Shard) -> Path:
    """Where a shard's index lies, or a remote shard's copy of it."""
    return side_file(shard, ENDING)


def index_shard(shard: Shard, folder: TokenizerFolder, text_key: str | None = None) -> ShardIndex:
    """Scans one shard, counts its tokens, and writes its index, all or nothing.

    Raises:
        FileNotFoundError: There is no such shard.
        ValueError: It is truncated, damaged, empty, or mixes kinds; the message names shard and sample.
    """
    with local_copy(shard) as path:
        if not path.stat().st_size:
            raise ValueError(f"{shard}: 0 bytes are no tar; build or copy the shard again")
        with path.open("rb") as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        found = scan_shard(data, str(shard), folder, text_key)
        digest = _built_digest(shard) or _digest(path)
        probes = _probes(data, found)
    counts = count_tokens(found, folder)
    save_index(shard, digest, found, counts, folder, text_key, probes)
    return load_index(shard, folder.hash)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _built_digest(shard: Shard) -> str | None:
    """The digest that the build wrote down, where the shard hasn't changed since."""
    if isinstance(shard, RemoteShard):
        return None
    with suppress(OSError, ValueError, KeyError, TypeError):
        summary = shard.with_name(SUMMARY)
        built = json.loads(summary.read_text(encoding="utf-8"))["shards"][shard.name]
        found = shard.stat()
        if built["bytes"] == found.st_size and found.st_mtime_ns <= summary.stat().st_mtime_ns:
            return str(built["sha256"])
    return None


def _probes(data: bytes | mmap.mmap, found: Scan) -> list[tuple[int, int, str]]:
    """A few places of a shard, and what lies there: another shard of the same size would have something else.

    They are the ends of samples, where contents are, and small samples whole, with their names.
    """
    rows = np.unique(np.linspace(0, max(0, len(found) - 1), _PROBES).astype(np.int64)).tolist() if len(found) else []
    places = []
    for row in rows:
        stop = found.starts[row] + found.spans[row]
        start = max(found.starts[row], stop - _PROBE_BYTES)
        places.append((start, stop - start, _short_digest(data[start:stop])))
    return places


def _short_digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def make_records(found: Scan, counts: TokenCounts) -> dict[str, np.ndarray]:
    """The arrays of documents: `records`, `tokens`, and `second` where the kind has more than one task.

    Raises:
        ValueError: A document has more bytes, tokens, frames or pictures than a record can say.
    """
    tasks, count = KIND_TASKS[found.kind] if found.kind else ("text",), len(found)
    chat_N = counts.by_task.get("chat", np.zeros(count, dtype=np.int64))
    records = {
        "start": found.starts, "bytes": found.spans, "line": found.lines,
        "frames": [found.num_frames(row) for row in range(count)],
        "images": [len(pictures) for pictures in found.pictures], "chats": chat_N > 0,
    }  # fmt: skip
    records_N = np.zeros(count, dtype=RECORD)
    for name, values in records.items():
        records_N[name] = _fitting(found, name, values, RECORD[name])
    arrays = {
        "records": records_N.view(np.uint8).reshape(count, RECORD.itemsize),
        "tokens": _fitting(found, "tokens", counts.by_task[tasks[0]], np.dtype("<u4")),
    }
    if len(tasks) > 1:
        arrays["second"] = _fitting(found, "tokens", counts.by_task[tasks[1]] + chat_N, np.dtype("<u4"))
    return arrays


def _fitting(found: Scan, name: str, values: Any, dtype: np.dtype[Any]) -> np.ndarray:
    values_N = np.asarray(values, dtype=np.int64)
    limit = np.iinfo(dtype).max
    if limit < np.iinfo(np.int64).max and (values_N > limit).any():
        row = int(np.argmax(values_N))
        raise ValueError(
            f"{found.name}:{found.keys[row]} has {values_N[row]} {name}, more than an index can hold ({limit})"
        )
    return values_N.astype(dtype)


def save_index(
    shard: Shard,
    sha256: str,
    found: Scan,
    counts: TokenCounts,
    folder: TokenizerFolder,
    text_key: str | None = None,
    probes: Sequence[tuple[int, int, str]] = (),
) -> None:
    """Writes a shard's index."""
    arrays = make_records(found, counts) | Texts.arrays(found.keys, "keys")
    pictures = [size for sizes in found.pictures for size in sizes]
    sounds = [sound for each in found.sounds for sound in each]
    arrays["picture.sizes"] = np.array(pictures, dtype=np.int64).reshape(-1, 2).clip(0, 2**32 - 1).astype(np.uint32)
    arrays["sound.lengths"] = np.array(sounds, dtype=np.int64).reshape(-1, 3).clip(0, 2**32 - 1).astype(np.uint32)
    arrays |= _piece_arrays(found, counts)
    if found.kind == "caption":
        digests = b"".join(hashlib.blake2b((text or "").encode(), digest_size=8).digest() for text in found.texts)
        arrays[_DIGESTS] = np.frombuffer(digests, dtype="<u8")
    columns = _columns(found.metadata)
    if not np.isnan(counts.rarity_N).all() and "rarity" not in columns:
        columns["rarity"] = [None if np.isnan(value) else float(value) for value in counts.rarity_N]
    told: dict[str, Any] = {}
    for number, (name, values) in enumerate(columns.items()):
        more, told[name] = Column.arrays(values, f"column{number}")
        arrays |= more
    bad = [(row.name, row.reason) for row in found.bad] + _unwritable(found, counts, folder)
    info = {
        "format_version": FORMAT_VERSION, "tokenizer": folder.hash, "sha256": sha256, "kind": found.kind,
        "shard": stat_shard(shard), "columns": told, "text_key": text_key, "probes": list(probes),
        "bad": {"count": len(bad), "unread": len(found.bad), "named": bad[:_NAMED]}, "skipped": found.num_skipped,
    }  # fmt: skip
    write_arrays(index_path(shard), arrays, info)
    if not isinstance(shard, RemoteShard):
        side_file(shard, ".index.npz").unlink(missing_ok=True)  # of an earlier format


def _piece_arrays(found: Scan, counts: TokenCounts) -> dict[str, np.ndarray]:
    if not counts.pieces:
        return {}
    sizes_N, texts_N3 = np.zeros(len(found), dtype=np.int64), np.zeros((len(found), 3), dtype=np.uint64)
    for row, pieces in counts.pieces.items():
        sizes_N[row] = len(pieces)
        num_bytes = len((found.texts[row] or "").encode())
        texts_N3[row] = counts.num_text_tokens[row], num_bytes, found.text_starts[row]
    starts = np.concatenate([np.array(counts.pieces[row], dtype=np.int64) for row in sorted(counts.pieces)])
    return {
        "piece.firsts": np.concatenate([[0], np.cumsum(sizes_N)]).astype(np.uint32),
        "piece.starts": starts.astype(np.uint32),
        "piece.texts": texts_N3,
    }


def _unwritable(found: Scan, counts: TokenCounts, folder: TokenizerFolder) -> list[tuple[str, str]]:
    """The documents that no task can be written of, and why."""
    if not len(found):
        return []
    is_empty_N = np.logical_and.reduce([tokens_N == 0 for tokens_N in counts.by_task.values()])
    why = "its text is missing or empty" if found.kind != "interleaved" else "nothing is in its segments"
    if found.kind in ("audio", "interleaved") and folder.audio is None:
        why += ", or it has a sound and the tokenizer has no audio tokenizer"
    return [
        (f"{found.name}:{found.keys[row]}", f"can't be written as {' or '.join(counts.by_task)}: {why}")
        for row in np.flatnonzero(is_empty_N).tolist()
    ]


def _columns(metadata: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Scalars by name, `None` where a row has none."""
    columns = {}
    for name in sorted(set().union(*metadata)):
        values = [row.get(name) for row in metadata]
        if not set(map(type, values)) <= _SCALARS:
            values = [value if isinstance(value, str | int | float) else None for value in values]
        if values.count(None) < len(values):
            columns[name] = values
    return columns


def load_index(shard: Shard, tokenizer_hash: str | None) -> ShardIndex:
    """The index of a shard, checked. A remote shard's is taken from beside it where none is here yet.

    Where the shard's time has changed but not its size, it may be a copy: some of its bytes are compared, and for a
    local shard all of them, once: the index then notes the new time.

    Args:
        shard: The tar.
        tokenizer_hash: Of the tokenizer that it must have been made with; `None`: any, no token count will matter.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is broken, or was made with another tokenizer or for another version of the shard.
    """
    path, advice = index_path(shard), "run 'mmllm data index' again"
    found = stat_shard(shard)
    if found is None:
        raise FileNotFoundError(f"{shard}: no such shard{', only its index is left' if path.is_file() else ''}")
    if isinstance(shard, RemoteShard) and not path.is_file():
        fetch_side_file(shard, ENDING)
    try:
        arrays = open_arrays(path)
        info = arrays.info
        index = ShardIndex(
            shard, path, arrays.version, arrays.places["records"][2], info["sha256"], info["kind"],
            arrays.places["records"][1][0], info["text_key"], "piece.firsts" in arrays.places,
        )  # fmt: skip
        (size, changed), made_with = info["shard"], info["tokenizer"]
    except FileNotFoundError:
        raise FileNotFoundError(f"{shard}: has no index; run 'mmllm data index'") from None
    except (ValueError, KeyError, TypeError) as error:
        if _is_old(path):
            raise ValueError(f"{path}: is of an earlier format than {FORMAT_VERSION}; {advice}") from error
        raise ValueError(f"{path}: the index is broken ({type(error).__name__}: {error}); {advice}") from error
    if info["format_version"] != FORMAT_VERSION:
        raise ValueError(f"{path}: is of format {info['format_version']}, not {FORMAT_VERSION}; {advice}")
    if tokenizer_hash is not None and made_with != tokenizer_hash:
        raise ValueError(
            f"{path}: was made with tokenizer {made_with[:12]}, the recipe's is {tokenizer_hash[:12]}; {advice}"
        )
    if size != found[0]:
        raise ValueError(f"{shard}: has {found[0]} bytes, {size} when it was indexed; {advice}")
    if changed == found[1]:
        return index
    _probe(shard, info["probes"], advice)
    if not isinstance(shard, RemoteShard) and _digest(shard) != index.sha256:
        raise ValueError(f"{shard}: its bytes changed since it was indexed, though not how many; {advice}")
    return load_index(shard, tokenizer_hash) if _note_time(shard, arrays, found) else index


def _is_old(path: Path) -> bool:
    with suppress(OSError), path.open("rb") as stream:
        return stream.read(len(_OLD_MAGIC)) == _OLD_MAGIC
    return False


def _note_time(shard: Shard, arrays: ArraysFile, found: tuple[int, str]) -> bool:
    """The index is of this copy of the shard as well; whether that could be noted."""
    values = {name: arrays.read(name) for name in arrays.places}
    try:
        write_arrays(arrays.path, values, {**arrays.info, "shard": found})
    except OSError as error:  # another's folder, which we may read
        _logger.warning("%s: its new time can't be noted (%s): each time it is opened it is read whole", shard, error)
        return False
    return True


def _probe(shard: Shard, probes: Sequence[tuple[int, int, str]], advice: str) -> None:
    """Compares a few places of a shard with the index: a shard of the same size may be another one."""
    reader = ShardReader()
    asked = replace(shard, whole=False) if isinstance(shard, RemoteShard) else shard
    spans = [(asked, start, size) for start, size, _ in probes]
    for (start, _, wanted), data in zip(probes, reader.read_many(spans), strict=True):
        if isinstance(data, Exception):
            raise data
        if _short_digest(data) != wanted:
            raise ValueError(f"{shard}: changed since it was indexed: other bytes lie at {start}; {advice}")
    reader.close()


def is_current(shard: Shard, tokenizer_hash: str, text_key: str | None = None) -> bool:
    """Whether a shard's index can be kept: right tokenizer, and a shard of the same size and time, or else digest.

    Of a remote shard the index beside it is taken without reading the whole shard; one that is here already is not,
    once the shard has changed.
    """
    before = None
    with suppress(OSError, ValueError, KeyError, TypeError):
        before = open_arrays(index_path(shard)).info["shard"]
    try:
        index = load_index(shard, tokenizer_hash)
    except (FileNotFoundError, ValueError):
        return False
    if index.text_key != text_key or (index.kind == "caption" and index.caption_digests_N is None):
        return False
    found = stat_shard(shard)
    if before is None or not isinstance(shard, RemoteShard) or (found is not None and before == list(found)):
        return True
    with local_copy(shard) as path:
        return _digest(path) == index.sha256


def load_indices(shards: Sequence[Shard], tokenizer_hash: str | None) -> Iterator[ShardIndex]:
    """The indices of shards, in order; remote ones are looked up several at a time. As `load_index`.

    Raises:
        FileNotFoundError, ValueError: As `load_index`.
    """
    if not any(isinstance(shard, RemoteShard) for shard in shards):
        yield from (load_index(shard, tokenizer_hash) for shard in shards)
        return
    with ThreadPoolExecutor(_FETCHES) as threads:
        yield from threads.map(partial(load_index, tokenizer_hash=tokenizer_hash), shards)


def write_indices(
    shards: Sequence[Shard],
    folder: TokenizerFolder,
    progress: Callable[[int, int], None] | None = None,
    workers: int = 0,
    text_key: str | None = None,
) -> list[ShardIndex]:
    """Indexes shards whose index is missing or out of date; the others' are read.

    Args:
        shards: The tars.
        folder: The tokenizer.
        progress: Called with the numbers of shards done and in all.
        workers: Processes that share the shards; 0: this one alone.
        text_key: Where a sample has no `txt`, the key of its `json` that holds its text.

    Raises:
        FileNotFoundError, ValueError: As `index_shard`.
    """
    results = in_chunks(partial(_make_current, folder=folder, text_key=text_key), shards, 1, workers)
    for number, (_, error) in enumerate(results, start=1):
        if error is not None:
            raise error
        if progress:
            progress(number, len(shards))
    return list(load_indices(shards, folder.hash))


def _make_current(shards: Sequence[Shard], folder: TokenizerFolder, text_key: str | None) -> Exception | None:
    """An error is handed over, not raised: a worker's would come with its own trace in place of the message."""
    try:
        for shard in shards:
            if not is_current(shard, folder.hash, text_key):
                index_shard(shard, folder, text_key)
    except (FileNotFoundError, ValueError) as error:
        return error
    return None
