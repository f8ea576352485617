"""Common Voice: a table of clips."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from mmllm.data.rows.bad_rows import ManifestError
from mmllm.data.rows.inputs import Found, Input, tried
from mmllm.data.rows.tables import open_table, read_table

COLUMNS = frozenset({"client_id", "path", "sentence"})


def common_voice_rows(given: Input) -> Found:
    """One of Common Voice's `.tsv` files, beside the folder `clips`."""
    clips = given.folder / "clips" if (given.folder / "clips").is_dir() else given.folder
    for where, row, _ in read_table(open_table(given.path, has_quotes=False)):
        yield where, row if isinstance(row, ManifestError) else tried("clip", partial(_clip, row, clips))


def _clip(row: dict[str, str], clips: Path) -> dict[str, Any]:
    values = {"id": Path(row["path"]).stem, "text": row["sentence"], "speaker": row["client_id"]}
    values["audio"] = str((clips / row["path"]).absolute())
    known = {"locale": "language"}
    others = {key: value for key, value in row.items() if value and key not in COLUMNS}
    return {**{known.get(key, key): value for key, value in others.items()}, **values}
