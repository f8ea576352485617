"""Pieces of a long text's document, from the tokens of the piece alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from mmllm.data.samples.document import Document, DocumentWriter
from mmllm.data.samples.templates import literal_ids, parse_template, template_of
from mmllm_tokenizers.folder import TokenizerFolder


@dataclass(frozen=True)
class TextFrame:
    """What a template writes around a text, as tokens and whether they are to be predicted."""

    before: tuple[tuple[int, bool], ...]
    after: tuple[tuple[int, bool], ...]
    is_target: bool
    """Whether the text is."""


def text_frame(
    task: str, folder: TokenizerFolder, template: Mapping[str, str] | None = None, anchor: str | None = None
) -> TextFrame | None:
    """The frame of a task whose only field is the text, behind an anchor if any; `None` where it has other fields."""
    template = template or template_of(task, folder)
    sides: tuple[list[tuple[int, bool]], list[tuple[int, bool]]] = [], []
    sides[0].extend((token, False) for token in folder.text.encode(anchor or ""))
    found: list[bool] = []
    for part, is_target in (("prompt", False), ("target", True)):
        for literal, name in parse_template(template[part]):
            sides[bool(found)].extend((token, is_target) for token in literal_ids(folder.text, literal) if literal)
            if name is not None:
                if name != "text":
                    return None
                found.append(is_target)
    return TextFrame(tuple(sides[0]), tuple(sides[1]), found[0]) if len(found) == 1 else None


def text_part(
    frame: TextFrame, text_ids: Sequence[int], first: int, total: int, start: int, stop: int, folder: TokenizerFolder
) -> Document:
    """Tokens `[start, stop)` of a text's document, as `Document.part` gives them, from those of the text alone.

    Args:
        frame: Of its task.
        text_ids: Tokens of the text from `first` on, as many as are needed.
        first: Which the first of them is.
        total: Tokens of the whole text.
        start: Of the document.
        stop: Of the document.
        folder: Tokenizers.
    """
    writer = DocumentWriter(folder)
    begin = len(frame.before)
    low, high = (min(max(place - begin, 0), total) for place in (start, stop))
    pieces = [
        frame.before[start:stop],
        [(token, frame.is_target) for token in text_ids[low - first : high - first]],
        frame.after[max(0, start - begin - total) : max(0, stop - begin - total)],
    ]
    for piece in pieces:
        for is_target, tokens in groupby(piece, key=itemgetter(1)):
            writer.ids([token for token, _ in tokens], is_target)
    return writer.finish()


def num_parts(num_tokens: int, sequence_length: int) -> int:
    """Pieces into which a long text is split: each begins with the last token of the one before it."""
    return max(1, math.ceil((num_tokens - 1) / (sequence_length - 1)))


def part_bounds(num_tokens: int, sequence_length: int, part: int) -> tuple[int, int]:
    """Tokens `[start, stop)` of a piece; every token but a document's first is a target in exactly one piece."""
    start = part * (sequence_length - 1)
    return start, min(start + sequence_length, num_tokens)
