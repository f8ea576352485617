"""What is known of rows' pictures and sounds before training: whether they can be read."""

from __future__ import annotations

from collections.abc import Sequence

from mmllm.data.rows.bad_rows import BadRows
from mmllm.data.rows.rows import Row, row_media
from mmllm.data.samples.decode import decode_image
from mmllm_tokenizers.audio import load_audio


def readable_rows(rows: Sequence[Row], bad: BadRows, name: str) -> list[Row]:
    """The rows whose pictures and sounds can be read; the others are named in `bad`.

    Args:
        rows: Checked rows.
        bad: Takes the others.
        name: What they are called where there are too many.

    Raises:
        ManifestError: More than `bad` allows can't be read.
    """
    good, since = [], len(bad.reasons)
    for row in rows:
        try:
            for kind, path in row_media(row):
                decode_image(path) if kind == "image" else load_audio(path)
            good.append(row)
        except (OSError, ValueError, RuntimeError) as error:
            bad.add(row.where, error)
    bad.check(len(rows), name, since)
    return good
