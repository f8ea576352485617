"""What is known of rows' pictures and sounds before training: whether they can be read."""

from __future__ import annotations

from collections.abc import Sequence

from mmllm.data.rows.bad_rows import BadRows, is_of_machine
from mmllm.data.rows.media import media_source
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
            for kind, media in row_media(row):
                source = media_source(media)
                decode_image(source, str(media)) if kind == "image" else load_audio(source, name=str(media))
            good.append(row)
        except (OSError, ValueError, RuntimeError) as error:
            if is_of_machine(error):
                raise
            bad.add(row.where, error)
    bad.check(len(rows), name, since)
    return good
