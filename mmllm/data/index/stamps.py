"""Copies of a shard that an index was found to be of: they have other times than the shard that it was made from.

An index is never written again for that, since other processes read it. What was found lies in a small file beside it,
or in the cache folder where that can't be written.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from mmllm.data.index.arrays import put_file
from mmllm.data.shards.files import Stamp
from mmllm.data.shards.remote import Shard, cache_folder, side_file

ENDING = ".index.copies"
_KEPT = 16

_logger = logging.getLogger(__name__)


def is_known(shard: Shard, sha256: str, stamp: Stamp) -> bool:
    """Whether the shard of this stamp was found to be the one of this digest."""
    return any([sha256, *stamp] in _read(path) for path in _places(shard))


def note(shard: Shard, sha256: str, stamp: Stamp) -> None:
    """Notes that it is."""
    for path in _places(shard):
        text = json.dumps([*_read(path), [sha256, *stamp]][-_KEPT:])
        with suppress(OSError):  # another's folder, which we may read
            put_file(path, partial(Path.write_text, data=text))
            return
    _logger.warning("%s: that it is a copy can't be noted: each time it is opened it is read whole", shard)


def _places(shard: Shard) -> Iterator[Path]:
    yield side_file(shard, ENDING)
    name = hashlib.sha256(str(shard.absolute() if isinstance(shard, Path) else shard.url).encode()).hexdigest()[:24]
    yield cache_folder() / "copies" / name


def _read(path: Path) -> list[list[object]]:
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        if isinstance(found, list):
            return found
    return []
