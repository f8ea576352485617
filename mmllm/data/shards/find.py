"""The shards that a recipe or a command names: paths, globs, brace ranges, folders' contents, addresses."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from braceexpand import braceexpand

from mmllm.data.shards.remote import RemoteShard, Shard, expand_remote, is_remote

SUMMARY = "shards.json"
"""What a build wrote, and what became of its rows."""
JOURNAL = "shards.partial"
"""Names of the shards that a build is giving their names; it is there until the summary is."""


def shard_paths(spec: str | Sequence[str], folder: Path | None = None) -> list[Path]:
    """The local shards that a path, a glob, or brace ranges such as `{00000..00999}` name, in order.

    Args:
        spec: One or several.
        folder: Relative specs that match nothing from the working directory are tried from here.

    Raises:
        FileNotFoundError: Nothing matches one of them.
        ValueError: One is an address, not a path, or a build into their folder never ended.
    """
    found: list[Path] = []
    for shard in find_shards(spec, folder):
        if isinstance(shard, RemoteShard):
            raise ValueError(f"{shard}: only recipes' sources may be remote; copy the shard to a local folder")
        found.append(shard)
    return found


def find_shards(spec: str | Sequence[str], folder: Path | None = None) -> list[Shard]:
    """As `shard_paths`, and addresses that fsspec opens: `s3://bucket/{000..099}.tar`.

    Raises:
        FileNotFoundError: Nothing matches one of them.
        ValueError: A build into their folder never ended.
    """
    found: list[Shard] = []
    for item in [spec] if isinstance(spec, str) else spec:
        if is_remote(item):
            found.extend(expand_remote(item))
            continue
        matches = _expand(item)
        if not any(match.is_file() for match in matches) and folder is not None and not Path(item).is_absolute():
            matches = _expand(f"{folder}{os.sep}{item}") or matches
        missing = [str(match) for match in matches if not match.is_file()]
        if missing or not matches:
            if not missing and Path(item).is_dir():
                raise FileNotFoundError(f"{item}: a folder without .tar files; build shards with 'mmllm data build'")
            which = f" ({len(missing)} of {len(matches)} that {item!r} names are missing)" if missing else ""
            raise FileNotFoundError(
                f"{missing[0] if missing else item}: no such shard{which}; build them with 'mmllm data build'"
            )
        found.extend(matches)
    for folder in dict.fromkeys(shard.parent for shard in found if isinstance(shard, Path)):
        if (folder / JOURNAL).is_file():
            raise ValueError(f"{folder}: a build was killed while it moved its shards here; run it again")
    return list(dict.fromkeys(found))


def _expand(pattern: str) -> list[Path]:
    """What a name names: itself, if it is there, whatever signs it has; a folder's shards; what a pattern matches."""
    found: list[Path] = []
    for name in [pattern] if os.path.exists(pattern) else braceexpand(pattern):
        if os.path.isdir(name):
            found.extend(sorted(Path(name).glob("*.tar")))
        elif os.path.exists(name) or not glob.has_magic(name):
            found.append(Path(name))
        else:
            folder, last = os.path.split(name)
            literal = os.path.join(glob.escape(folder), last) if os.path.isdir(folder) else name
            found.extend(Path(match) for match in sorted(glob.glob(literal)))
    return found
