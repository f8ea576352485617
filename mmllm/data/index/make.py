"""Makes the indices of shards: of those that have none, or one that is out of date."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import numpy as np

from mmllm.data.executors.parallel import in_chunks
from mmllm.data.index import stamps
from mmllm.data.index.arrays import open_arrays
from mmllm.data.index.count import count_tokens
from mmllm.data.index.index import (
    PROBE_BYTES,
    ShardIndex,
    file_digest,
    index_path,
    load_index,
    load_indices,
    short_digest,
)
from mmllm.data.index.scan import Scan, scan_shard
from mmllm.data.index.write import save_index
from mmllm.data.shards.find import SUMMARY
from mmllm.data.shards.remote import RemoteShard, Shard, local_copy, stat_shard
from mmllm_tokenizers.folder import TokenizerFolder

_PROBES = 8
"""Places of a shard that are compared with its index."""


def index_shard(shard: Shard, folder: TokenizerFolder, text_key: str | None = None) -> ShardIndex:
    """Scans one shard, counts its tokens, and writes its index, all or nothing.

    Raises:
        FileNotFoundError: There is no such shard.
        ValueError: It is truncated, damaged, empty, or mixes kinds; the message names shard and sample.
    """
    before = stat_shard(shard)
    with local_copy(shard) as path:
        if not path.stat().st_size:
            raise ValueError(f"{shard}: 0 bytes are no tar; build or copy the shard again")
        with path.open("rb") as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        found = scan_shard(data, str(shard), folder, text_key)
        digest = _built_digest(shard) or hashlib.sha256(data).hexdigest()
        probes = _probes(data, found)
    counts = count_tokens(found, folder)
    if before is None or stat_shard(shard) != before:
        raise ValueError(f"{shard}: was replaced while it was indexed; run 'mmllm data index' again")
    save_index(shard, before, digest, found, counts, folder, text_key, probes)
    return load_index(shard, folder.hash)


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
        start = max(found.starts[row], stop - PROBE_BYTES)
        places.append((start, stop - start, short_digest(data[start:stop])))
    return places


def is_current(shard: Shard, tokenizer_hash: str, text_key: str | None = None, has_template: bool = False) -> bool:
    """Whether a shard's index can be kept: right tokenizer, and a shard of the same size and time, or else digest.

    Of a remote shard the index beside it is taken without reading the whole shard; one that is here already is not,
    once the shard has changed.

    Args:
        shard: The tar.
        tokenizer_hash: Of the tokenizer folder.
        text_key: The key of a sample's json that holds its text.
        has_template: Whether the tokenizer folder has a chat template of its own.
    """
    found, is_known = stat_shard(shard), True
    with suppress(OSError, ValueError, KeyError, TypeError):
        info = open_arrays(index_path(shard)).info
        is_known = found is None or info["shard"] == list(found) or stamps.is_known(shard, info["sha256"], found)
    try:
        index = load_index(shard, tokenizer_hash)
        index.check_chat(has_template)
    except (FileNotFoundError, ValueError):
        return False
    if index.text_key != text_key or (index.kind == "caption" and index.caption_digests_N is None):
        return False
    if is_known or not isinstance(shard, RemoteShard):
        return True
    with local_copy(shard) as path:
        return file_digest(path) == index.sha256


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
            if not is_current(shard, folder.hash, text_key, folder.chat_template is not None):
                index_shard(shard, folder, text_key)
    except (FileNotFoundError, ValueError) as error:
        return error
    return None
