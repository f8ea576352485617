"""A shard's index from what was found in it.

Shapes: N documents, L pieces of long texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmllm.data.index.arrays import write_arrays
from mmllm.data.index.columns import Column, Texts
from mmllm.data.index.count import TokenCounts
from mmllm.data.index.index import CHAT_RULE, DIGESTS, FORMAT_VERSION, RECORD, TILES, index_path
from mmllm.data.index.scan import Scan
from mmllm.data.samples.documents import KIND_TASKS
from mmllm.data.shards.files import Stamp
from mmllm.data.shards.remote import RemoteShard, Shard, side_file
from mmllm_tokenizers.folder import TokenizerFolder

_NAMED = 20
"""Rows without a document that an index names; all are counted."""
_SCALARS = {str, int, float, bool, type(None)}
_LARGE = 10**300
"""Integers beyond all floats are kept as texts."""


def make_records(found: Scan, counts: TokenCounts) -> dict[str, np.ndarray]:
    """The arrays of documents: `records`, `tokens`, and `second` where the kind has more than one task.

    Raises:
        ValueError: A document has more bytes, tokens, frames or pictures than a record can say.
    """
    tasks, count = KIND_TASKS[found.kind] if found.kind else ("text",), len(found)
    chat_N = counts.by_task.get("chat", np.zeros(count, dtype=np.int64))
    records = {
        "start": found.starts, "bytes": found.spans, "line": found.lines,
        "frames": [found.num_frames(row) if found.sounds[row] else 0 for row in range(count)],
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
    stamp: Stamp,
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
    if folder.config.tiling is not None:
        tiles = [sum(folder.tile_grid(*size).num_tiles for size in sizes) for sizes in found.pictures]
        arrays[TILES] = _fitting(found, "tiles", tiles, np.dtype("<u4"))
    arrays["picture.sizes"] = np.array(pictures, dtype=np.int64).reshape(-1, 2).clip(0, 2**32 - 1).astype(np.uint32)
    arrays["sound.lengths"] = np.array(sounds, dtype=np.int64).reshape(-1, 3).clip(0, 2**32 - 1).astype(np.uint32)
    arrays |= _piece_arrays(found, counts)
    if found.kind == "caption":
        digests = b"".join(hashlib.blake2b((text or "").encode(), digest_size=8).digest() for text in found.texts)
        arrays[DIGESTS] = np.frombuffer(digests, dtype="<u8")
    columns = _columns(found.metadata)
    for name, values_N in (("rarity", counts.rarity_N), ("mean_rarity", counts.mean_rarity_N)):
        if not np.isnan(values_N).all() and name not in columns:
            columns[name] = [None if np.isnan(value) else float(value) for value in values_N]
    told: dict[str, Any] = {}
    for number, (name, values) in enumerate(columns.items()):
        more, told[name] = Column.arrays(values, f"column{number}")
        arrays |= more
    bad = [(row.name, row.reason) for row in found.bad] + _unwritable(found, counts, folder)
    info = {
        "format_version": FORMAT_VERSION, "tokenizer": folder.hash, "sha256": sha256, "kind": found.kind,
        "shard": stamp, "columns": told, "text_key": text_key, "probes": list(probes),
        "bad": {"count": len(bad), "unread": len(found.bad), "named": bad[:_NAMED]}, "skipped": found.num_skipped,
        "chat": CHAT_RULE,
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
        (
            f"{found.name}:{found.keys[row]}",
            counts.refused.get(row, f"can't be written as {' or '.join(counts.by_task)}: {why}"),
        )
        for row in np.flatnonzero(is_empty_N).tolist()
    ]


def _columns(metadata: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Scalars by name, `None` where a row has none."""
    columns = {}
    for name in sorted(set().union(*metadata)):
        values = [row.get(name) for row in metadata]
        if not set(map(type, values)) <= _SCALARS:
            values = [value if isinstance(value, str | int | float) else None for value in values]
        if any(isinstance(value, int) and not -_LARGE < value < _LARGE for value in values):
            values = [str(value) if isinstance(value, int) and abs(value) >= _LARGE else value for value in values]
        if values.count(None) < len(values):
            columns[name] = values
    return columns
