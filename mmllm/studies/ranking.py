"""How hard each row of a manifest is for a model: its loss, which a curriculum can then order by (`metric: loss`).

Ranked between two trainings, that is self-paced learning (Kumar et al. 2010) in rounds: what is easy, the model says
that is being trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mmllm.data.rows.filtered import kept_rows
from mmllm.data.rows.media import Media, media_source
from mmllm.data.rows.rows import Row
from mmllm.data.rows.split import write_manifest

if TYPE_CHECKING:
    from mmllm.data.samples.document import Document
    from mmllm.inference.api import Model

COLUMN = "loss"
BATCH_SIZE = 64


def rank(model_dir: str | Path, manifest: str | Path, out: Path, keep: str | None = None) -> list[str]:
    """Writes a manifest whose rows have `loss`; gives lines to print.

    Args:
        model_dir: of the model that ranks.
        manifest: of captions and recordings.
        out: the new manifest.
        keep: which rows are read, as a recipe's `filter`; the others are left out.

    Raises:
        FileNotFoundError: there is no such model or manifest.
        ValueError: no row passes the filter, or one is neither a caption nor a recording.
    """
    from mmllm.inference.api import load

    rows = kept_rows(manifest, keep)
    wrong = next((row for row in rows if row.kind not in ("caption", "audio")), None)
    if wrong is not None:
        raise ValueError(f"{wrong.where} is of the kind {wrong.kind}; captions and recordings are ranked")
    losses = list(row_losses(load(model_dir), rows))
    ranked = [
        dataclasses.replace(row, metadata={**row.metadata, COLUMN: round(loss, 4)})
        for row, loss in zip(rows, losses, strict=True)
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_manifest(ranked, out)
    ordered = sorted(losses)
    low, middle, high = (ordered[int(share * (len(ordered) - 1))] for share in (0.1, 0.5, 0.9))
    return [
        f"{out}: {len(rows)} rows; nats a token {low:.3f} (easiest tenth), {middle:.3f}, {high:.3f} (hardest tenth)"
    ]


def row_losses(model: Model, rows: Sequence[Row]) -> Iterator[float]:
    """Of each row, minus the log-probability of its text behind its picture or sound, in nats a token.

    Args:
        model: that is asked.
        rows: captions and recordings.
    """
    for start in range(0, len(rows), BATCH_SIZE):
        some = rows[start : start + BATCH_SIZE]
        prompts = [_prompt(model, row) for row in some]
        scores = model.score(prompts, [row.text for row in some])
        for row, score in zip(some, scores, strict=True):
            yield -score / max(1, len(model.tokenizer.text.encode(row.text)))


def _prompt(model: Model, row: Row) -> Document:
    write: Callable[..., Document] = model.caption_prompt if row.kind == "caption" else model.transcript_prompt
    return write(media_source(cast("Media", row.image if row.kind == "caption" else row.audio)))
