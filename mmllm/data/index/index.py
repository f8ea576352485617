"""What is in a shard, without opening it again: where each document is, how long, and its metadata.

Beside its shard lie `<shard>.index`, a fixed record of 24 bytes a document behind a header of 32, and the sidecar
`<shard>.index.npz` with keys and columns. Both are memory-mapped: opening them reads next to nothing. Token counts
depend on the tokenizer, whose hash is stored; another tokenizer or another shard is refused.

Shapes: N documents.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.data.executors.parallel import in_chunks
from mmllm.data.index.columns import Column, Texts, map_npz, save_npz
from mmllm.data.index.scan import Facts, TokenCounts, count_tokens, read_facts
from mmllm.data.samples.documents import KIND_TASKS
from mmllm.data.shards.find import SUMMARY
from mmllm.data.shards.remote import RemoteShard, Shard, ShardReader, local_copy, side_file, stat_shard
from mmllm.data.shards.tar import BLOCK, read_members
from mmllm_tokenizers.folder import TokenizerFolder

FORMAT_VERSION = 2
RECORD = np.dtype(
    [
        ("block", "<u4"),  # first header of the sample, in blocks of 512 bytes
        ("bytes", "<u4"),  # its headers and files
        ("tokens", "<u4"),  # as the kind's first task
        ("second", "<u4"),  # as another task; of a text: line of its jsonl + 1, or 0
        ("frames", "<u4"),  # of its sounds, together
        ("images", "<u2"),
        ("chats", "<u2"),  # whether `second` counts the task `chat`
    ]
)
_HEADER = struct.Struct("<8sIIQ8s")
_MAGIC = b"mmllmidx"
_PROBES = 10
_SCALARS = {str, int, float, bool, type(None)}

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardIndex:
    """The documents of one shard. A `jsonl` file's lines are documents of their own."""

    path: Shard
    sha256: str
    kind: str
    records_N: np.ndarray
    """`RECORD`s."""
    keys: Sequence[str]
    columns: Mapping[str, Column]
    """The rows' scalar metadata, and what was measured: `width`, `height`, `duration`, `rarity`."""

    @property
    def num_documents(self) -> int:
        """N."""
        return len(self.records_N)

    @cached_property
    def lengths(self) -> dict[str, np.ndarray]:
        """int64 [N] token counts by task; 0 where the document can't be written as that task."""
        tokens_N = self.records_N["tokens"].astype(np.int64)
        second_N = self.records_N["second"].astype(np.int64)
        chats_N = self.records_N["chats"] > 0
        first, *others = KIND_TASKS[self.kind]
        match others:
            case []:
                return {first: tokens_N}
            case [only]:
                return {first: tokens_N, only: second_N}
        return {first: tokens_N, others[0]: np.where(chats_N, 0, second_N), others[1]: np.where(chats_N, second_N, 0)}

    @property
    def num_images_N(self) -> np.ndarray:
        """Pictures of each document."""
        return self.records_N["images"]

    @property
    def num_frames_N(self) -> np.ndarray:
        """Frames of its sounds, together."""
        return self.records_N["frames"]

    def place(self, row: int) -> tuple[int, int, int]:
        """(offset of the sample's first header, bytes of its headers and files, line of its jsonl or -1)."""
        record = self.records_N[row]
        line = int(record["second"]) - 1 if self.kind == "text" else -1
        return int(record["block"]) * BLOCK, int(record["bytes"]), line


def index_path(shard: Shard) -> Path:
    """Where a shard's records lie; keys and columns are in `sidecar_path`."""
    return side_file(shard, ".index")


def sidecar_path(shard: Shard) -> Path:
    """Where the keys and columns of a shard's index lie."""
    return side_file(shard, ".index.npz")


def index_shard(shard: Shard, folder: TokenizerFolder) -> ShardIndex:
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
        facts = read_facts(data, str(shard), folder)
        digest = _built_digest(shard) or _digest(path)
    save_index(shard, digest, facts, count_tokens(facts, folder), folder.hash)
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


def make_records(facts: Facts, counts: TokenCounts) -> np.ndarray:
    """The records of documents.

    Raises:
        ValueError: A document has more bytes, tokens, frames or pictures than a record can say.
    """
    tasks = KIND_TASKS[facts.kind]
    chat_N = counts.by_task.get("chat", np.zeros(len(facts), dtype=np.int64))
    second_N = counts.by_task[tasks[1]] + chat_N if len(tasks) > 1 else np.array(facts.lines, dtype=np.int64) + 1
    columns = {
        "block": np.array(facts.offsets, dtype=np.int64) // BLOCK, "bytes": facts.spans,
        "tokens": counts.by_task[tasks[0]], "second": second_N, "frames": facts.frames, "images": facts.images,
        "chats": chat_N > 0,
    }  # fmt: skip
    records_N = np.zeros(len(facts), dtype=RECORD)
    for name, values in columns.items():
        values_N = np.asarray(values, dtype=np.int64)
        limit = np.iinfo(RECORD[name]).max
        if (values_N > limit).any():
            row = int(np.argmax(values_N))
            raise ValueError(
                f"{facts.name}:{facts.keys[row]} has {values_N[row]} {name}, more than an index can hold ({limit})"
            )
        records_N[name] = values_N
    return records_N


def save_index(shard: Shard, sha256: str, facts: Facts, counts: TokenCounts, tokenizer_hash: str) -> None:
    """Writes a shard's index: first the sidecar, then the records that belong to it."""
    records_N = make_records(facts, counts)
    tag = hashlib.blake2b(records_N.tobytes() + sha256.encode() + tokenizer_hash.encode(), digest_size=8).digest()
    arrays = Texts.arrays(facts.keys, "keys")
    columns = _columns(facts.metadata)
    if not np.isnan(counts.rarity_N).all() and "rarity" not in columns:
        columns["rarity"] = [None if np.isnan(value) else float(value) for value in counts.rarity_N]
    names = list(columns)
    for number, name in enumerate(names):
        arrays |= Column.arrays(columns[name], f"column{number}")
    info = {
        "format_version": FORMAT_VERSION, "tokenizer": tokenizer_hash, "sha256": sha256, "kind": facts.kind,
        "shard": stat_shard(shard), "columns": names, "tag": tag.hex(),
    }  # fmt: skip
    _put(sidecar_path(shard), lambda path: save_npz(path, arrays, info))
    header = _HEADER.pack(_MAGIC, FORMAT_VERSION, RECORD.itemsize, len(records_N), tag)
    _put(index_path(shard), lambda path: path.write_bytes(header + records_N.tobytes()))


def _put(target: Path, write: Callable[[Path], object]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


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


def load_index(shard: Shard, tokenizer_hash: str) -> ShardIndex:
    """The index of a shard, mapped and checked.

    Where the shard's time has changed but not its size, it may be a copy: some of its headers are compared, and for a
    local shard all its bytes, once: the index then notes the new time.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is broken, or was made with another tokenizer or for another version of the shard.
    """
    path, sidecar = index_path(shard), sidecar_path(shard)
    advice = "run 'mmllm data index' again"
    found = stat_shard(shard)
    if found is None:
        raise FileNotFoundError(f"{shard}: no such shard{', only its index is left' if path.is_file() else ''}")
    if not path.is_file() or not sidecar.is_file():
        raise FileNotFoundError(f"{shard}: has no index; run 'mmllm data index'")
    try:
        records_N, tag = _map_records(path)
        arrays = map_npz(sidecar)
        info = json.loads(arrays["info"].tobytes())
        if info["format_version"] == FORMAT_VERSION and info["tag"] != tag.hex():
            raise ValueError("records and sidecar are of two indices")
        names = info["columns"]
        index = ShardIndex(
            shard, info["sha256"], info["kind"], records_N, _texts(arrays, "keys"),
            {name: _column(arrays, f"column{number}") for number, name in enumerate(names)},
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, EOFError, struct.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: the index is broken ({type(error).__name__}: {error}); {advice}") from error
    if info["tokenizer"] != tokenizer_hash:
        raise ValueError(
            f"{path}: was made with tokenizer {info['tokenizer'][:12]}, the recipe's is {tokenizer_hash[:12]}; {advice}"
        )
    size, changed = info["shard"]
    if size != found[0]:
        raise ValueError(f"{shard}: has {found[0]} bytes, {size} when it was indexed; {advice}")
    if changed != found[1]:
        _probe(index, advice)
        if not isinstance(shard, RemoteShard):
            if _digest(shard) != index.sha256:
                raise ValueError(f"{shard}: its bytes changed since it was indexed, though not how many; {advice}")
            _note_time(shard, arrays, info, found)
    return index


def _note_time(shard: Shard, arrays: dict[str, np.ndarray], info: dict[str, Any], found: tuple[int, str]) -> None:
    """The index is of this copy of the shard as well."""
    others = {name: values for name, values in arrays.items() if name != "info"}
    try:
        _put(sidecar_path(shard), lambda target: save_npz(target, others, {**info, "shard": found}))
    except OSError as error:  # another's folder, which we may read
        _logger.warning("%s: its new time can't be noted (%s): each time it is opened it is read whole", shard, error)


def _map_records(path: Path) -> tuple[np.ndarray, bytes]:
    with path.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    magic, version, record_bytes, count, tag = _HEADER.unpack_from(mapped)
    if magic != _MAGIC or version != FORMAT_VERSION or record_bytes != RECORD.itemsize:
        raise ValueError(f"is no index of format {FORMAT_VERSION}")
    if len(mapped) != _HEADER.size + count * record_bytes:
        raise ValueError(f"has {len(mapped)} bytes, {count} records need {_HEADER.size + count * record_bytes}")
    return np.frombuffer(mapped, dtype=RECORD, count=count, offset=_HEADER.size), tag


def _texts(arrays: Mapping[str, np.ndarray], name: str) -> Texts:
    return Texts(arrays[f"{name}.bytes"], arrays[f"{name}.ends"])


def _column(arrays: Mapping[str, np.ndarray], name: str) -> Column:
    return Column(arrays[f"{name}.values"], arrays[f"{name}.types"], list(_texts(arrays, f"{name}.words")))


def _probe(index: ShardIndex, advice: str) -> None:
    """Compares a few samples' names with the index: a shard of the same size may be another one."""
    rows = np.unique(np.linspace(0, index.num_documents - 1, _PROBES).astype(np.int64)).tolist()
    reader = ShardReader()
    for row in rows:
        offset, size, _ = index.place(row)
        try:
            found, _ = read_members(reader.read(index.path, offset, size), str(index.path))
        except ValueError:
            found = ""
        if found != index.keys[row]:
            raise ValueError(
                f"{index.path}: changed since it was indexed: {found!r} lies where {index.keys[row]!r} was; {advice}"
            )
    reader.close()


def is_current(shard: Shard, tokenizer_hash: str) -> bool:
    """Whether a shard's index can be kept: right tokenizer, and a shard of the same size and time, or else digest."""
    try:
        index = load_index(shard, tokenizer_hash)
        arrays = map_npz(sidecar_path(shard))
    except (FileNotFoundError, ValueError):
        return False
    info, found = json.loads(arrays["info"].tobytes()), stat_shard(shard)
    if found is not None and info["shard"] == list(found):
        return True
    with local_copy(shard) as path:
        if _digest(path) != index.sha256:
            return False
    if found is not None:
        _note_time(shard, arrays, info, found)
    return True


def write_indices(
    shards: Sequence[Shard],
    folder: TokenizerFolder,
    progress: Callable[[int, int], None] | None = None,
    workers: int = 0,
) -> list[ShardIndex]:
    """Indexes shards whose index is missing or out of date; the others' are read.

    Args:
        shards: The tars.
        folder: The tokenizer.
        progress: Called with the numbers of shards done and in all.
        workers: Processes that share the shards; 0: this one alone.

    Raises:
        FileNotFoundError, ValueError: As `index_shard`.
    """
    results = in_chunks(partial(_make_current, folder=folder), shards, 1, workers)
    for number, (_, error) in enumerate(results, start=1):
        if error is not None:
            raise error
        if progress:
            progress(number, len(shards))
    return [load_index(shard, folder.hash) for shard in shards]


def _make_current(shards: Sequence[Shard], folder: TokenizerFolder) -> Exception | None:
    """An error is handed over, not raised: a worker's would come with its own trace in place of the message."""
    try:
        for shard in shards:
            if not is_current(shard, folder.hash):
                index_shard(shard, folder)
    except (FileNotFoundError, ValueError) as error:
        return error
    return None
