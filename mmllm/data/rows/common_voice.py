"""Common Voice: a table of clips."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any

from mmllm.data.rows.bad_rows import ManifestError
from mmllm.data.rows.records import Found, read_table, tried


def common_voice_rows(path: Path, folder: Path) -> Found:
    """One of Common Voice's `.tsv` files, beside the folder `clips`."""
    clips = folder / "clips" if (folder / "clips").is_dir() else folder
    for where, row in read_table(path, delimiter="\t", quoting=csv.QUOTE_NONE):
        yield where, row if isinstance(row, ManifestError) else tried("clip", partial(_clip, row, clips))


def _clip(row: dict[str, str], clips: Path) -> dict[str, Any]:
    values = {"id": Path(row["path"]).stem, "text": row["sentence"], "speaker": row["client_id"]}
    values["audio"] = str((clips / row["path"]).absolute())
    for theirs, ours in (("locale", "language"), ("age", "age"), ("gender", "gender"), ("accents", "accents")):
        if row.get(theirs):
            values[ours] = row[theirs]
    return values
