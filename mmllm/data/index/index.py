"""What is in a shard, without opening it again: where each document is, how long, and its metadata.

Beside its shard lies `<shard>.index`, a file of arrays (`arrays.py`). Opening it reads its header; a document is then
one read of 24 bytes. Token counts depend on the tokenizer, whose hash is stored; another tokenizer or another shard is
refused.

Shapes: N documents, P pictures, Q sounds, L pieces of long texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmllm.data.index import stamps
from mmllm.data.index.arrays import ArraysFile, open_arrays, opened
from mmllm.data.index.columns import Column, Texts
from mmllm.data.samples.documents import KIND_TASKS
from mmllm.data.shards.files import Stamp, Version, read_range
from mmllm.data.shards.reader import ShardReader
from mmllm.data.shards.remote import RemoteShard, Shard, fetch_side_file, side_file, stat_shard

FORMAT_VERSION = 4
ENDING = ".index"
CHAT_RULE = 1
"""How conversations are counted of a tokenizer folder with a chat template of its own: as that writes them. Indices
without it counted them as the task `chat` of templates.json."""
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
PROBE_BYTES = 1024
"""Of each place of a shard that is compared with its index."""
DIGESTS = "text.digests"
"""Name of the array of what tells captions' texts apart."""
TILES = "image.tiles"
"""Name of the array of tiles, there where the tokenizer folder cuts pictures."""
_FETCHES = 32
"""Indices that are looked up at a time, where shards are remote."""
_OLD_MAGIC = b"mmllmidx"


class Place(NamedTuple):
    """Where a document is in its shard."""

    start: int
    """First byte of its sample's first header, or of its line."""
    num_bytes: int
    line: int
    """Of its sample's `jsonl`, or -1."""
    num_frames: int
    num_images: int
    num_tiles: int
    """Of its pictures together; one each where pictures aren't cut."""


@dataclass(frozen=True)
class LongText:
    """A text whose pieces can each be tokenized alone."""

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
    stamp: Stamp
    """Of the shard, when the index was opened."""
    key_ends_start: int
    """First byte of where keys end, and the bytes of each such number."""
    key_end_bytes: int
    keys_start: int
    """First byte of the keys."""
    has_tiles: bool = False
    """Whether pictures are cut into tiles."""

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
    def num_tiles_N(self) -> np.ndarray:
        """What the image tower sees of each document: tiles, or pictures where they aren't cut."""
        return self.arrays.read(TILES) if self.has_tiles else self.num_images_N

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
        """The rows' scalar metadata, and what was measured: `width`, `height`, `duration`, `rarity`, `mean_rarity`."""
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
        return self.arrays.read(DIGESTS) if DIGESTS in self.arrays.places else None

    @property
    def num_skipped(self) -> dict[str, int]:
        """Members of the tar that are no sample's file, by what they are."""
        return self.arrays.info["skipped"]

    def check_chat(self, has_template: bool) -> None:
        """Refuses an index whose conversations were counted in another form than they are written in.

        Args:
            has_template: Whether the tokenizer folder has a chat template of its own.

        Raises:
            ValueError: They were.
        """
        if has_template and self.kind == "interleaved" and self.arrays.info.get("chat") != CHAT_RULE:
            raise ValueError(
                f"{self.file}: counted conversations as the task chat of templates.json writes them, but they are "
                f"written by the tokenizer folder's chat_template.jinja; run 'mmllm data index' again"
            )

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
        num_tiles = int(self._read(TILES, row, row + 1)[0]) if self.has_tiles else images
        return Place(start, num_bytes, line, frames, images, num_tiles)

    def key(self, row: int) -> str:
        """A document's key."""
        size = self.key_end_bytes
        ends = read_range(self.file, self.key_ends_start + row * size, 2 * size, self.version)
        start, stop = (int.from_bytes(end, "little") for end in (ends[:size], ends[size:]))
        key = read_range(self.file, self.keys_start + start, stop - start, self.version) if stop > start else b""
        return key.decode("utf-8", "surrogateescape")

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


def file_digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def short_digest(data: bytes) -> str:
    """Eight bytes that tell some bytes from others."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def load_index(shard: Shard, tokenizer_hash: str | None) -> ShardIndex:
    """The index of a shard, checked. A remote shard's is taken from beside it where none is here yet.

    Where the shard's time has changed but not its size, it may be a copy: some of its bytes are compared, and for a
    local shard all of them, once: then it is noted (`stamps.py`).

    Args:
        shard: The tar.
        tokenizer_hash: Of the tokenizer that it must have been made with; `None`: any, no token count will matter.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is broken, or was made with another tokenizer or for another version of the shard.
    """
    path, found = index_path(shard), stat_shard(shard)
    if found is None:
        raise FileNotFoundError(f"{shard}: no such shard{', only its index is left' if path.is_file() else ''}")
    if isinstance(shard, RemoteShard) and not path.is_file():
        fetch_side_file(shard, ENDING)
    try:
        return _checked(shard, tokenizer_hash, found)
    except ValueError:  # what is here may be older than what lies beside the shard
        if isinstance(shard, RemoteShard) and fetch_side_file(shard, ENDING, path.read_bytes()):
            return _checked(shard, tokenizer_hash, found)
        raise


def _checked(shard: Shard, tokenizer_hash: str | None, found: Stamp) -> ShardIndex:
    """The index that is here, for the shard that was found."""
    path, advice = index_path(shard), "run 'mmllm data index' again"
    try:
        arrays = open_arrays(path)
        info, places = arrays.info, arrays.places
        if info["format_version"] != FORMAT_VERSION:
            raise ValueError(f"{path}: is of format {info['format_version']}, not {FORMAT_VERSION}; {advice}")
        index = ShardIndex(
            shard, path, arrays.version, places["records"][2], info["sha256"], info["kind"], places["records"][1][0],
            info["text_key"], "piece.firsts" in places, found, places["keys.ends"][2],
            places["keys.ends"][0].itemsize, places["keys.bytes"][2], TILES in places,
        )  # fmt: skip
        (size, changed), made_with = info["shard"], info["tokenizer"]
    except FileNotFoundError:
        raise FileNotFoundError(f"{shard}: has no index; run 'mmllm data index'") from None
    except (ValueError, KeyError, TypeError) as error:
        if "is of format" in str(error):
            raise
        if _is_old(path):
            raise ValueError(f"{path}: is of an earlier format than {FORMAT_VERSION}; {advice}") from error
        raise ValueError(f"{path}: the index is broken ({type(error).__name__}: {error}); {advice}") from error
    if tokenizer_hash is not None and made_with != tokenizer_hash:
        raise ValueError(
            f"{path}: was made with tokenizer {made_with[:12]}, the recipe's is {tokenizer_hash[:12]}; {advice}"
        )
    if size != found[0]:
        raise ValueError(f"{shard}: has {found[0]} bytes, {size} when it was indexed; {advice}")
    if changed == found[1] or stamps.is_known(shard, index.sha256, found):
        return index
    _probe(shard, info["probes"], advice)
    if not isinstance(shard, RemoteShard) and file_digest(shard) != index.sha256:
        raise ValueError(f"{shard}: its bytes changed since it was indexed, though not how many; {advice}")
    stamps.note(shard, index.sha256, found)
    return index


def _is_old(path: Path) -> bool:
    with suppress(OSError), path.open("rb") as stream:
        return stream.read(len(_OLD_MAGIC)) == _OLD_MAGIC
    return False


def _probe(shard: Shard, probes: Sequence[tuple[int, int, str]], advice: str) -> None:
    """Compares a few places of a shard with the index: a shard of the same size may be another one."""
    reader = ShardReader()
    asked = replace(shard, whole=False) if isinstance(shard, RemoteShard) else shard
    spans = [(asked, start, size) for start, size, _ in probes]
    found = reader.read_many(spans)
    reader.close()
    for (start, _, wanted), data in zip(probes, found, strict=True):
        if isinstance(data, Exception):
            raise data
        if short_digest(data) != wanted:
            raise ValueError(f"{shard}: changed since it was indexed: other bytes lie at {start}; {advice}")


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
