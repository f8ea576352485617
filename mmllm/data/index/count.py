"""How many tokens documents have as each task, and where long texts can be cut so that a part is tokenized alone.

Shapes: N documents, P pieces of long texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mmllm.data.index.scan import Scan
from mmllm.data.samples.documents import KIND_TASKS
from mmllm.data.samples.lengths import document_length
from mmllm_tokenizers.folder import TokenizerFolder

LONG_BYTES = 8192
"""Of a text, from which it is cut into pieces."""


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of each document by task, 0 where it can't be written so; how rare its tokens are; long texts' pieces."""

    by_task: dict[str, np.ndarray]
    rarity_N: np.ndarray
    """float64, sum of -log p of a text's tokens, p their share in this shard; not a number without a text."""
    mean_rarity_N: np.ndarray
    """float64, likewise their mean."""
    pieces: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """By a long text's row: first token and first byte of each piece."""
    num_text_tokens: dict[int, int] = field(default_factory=dict)
    """By a long text's row: its tokens, without a template's."""
    refused: dict[int, str] = field(default_factory=dict)
    """By the row of a conversation why no document is made of it."""


def count_tokens(found: Scan, folder: TokenizerFolder, progress: Callable[[int], None] | None = None) -> TokenCounts:
    """Tokenizes all texts, and counts each document's tokens by task.

    Args:
        found: The documents.
        folder: Tokenizers and templates.
        progress: Called with the number of documents done.
    """
    kind, hears = found.kind, folder.audio is not None
    speaks = hears and folder.keeps_durations
    ids: list[np.ndarray] = []
    pieces: dict[int, list[tuple[int, int]]] = {}
    for row, text in enumerate(found.texts):
        if text and kind == "text" and len(text) >= LONG_BYTES // 4 and len(text.encode()) >= LONG_BYTES:
            values, pieces[row] = folder.text.encode_pieces(text)
        else:
            values = folder.text.encode(text) if text else []
        ids.append(np.array(values, dtype=np.int32))
    counts: dict[str, list[int]] = {task: [] for task in KIND_TASKS[kind]}
    refused: dict[int, str] = {}
    for row, key in enumerate(found.keys):
        line, segments, said = found.lines[row], found.segments[row], found.said[row]
        metadata = found.metadata[row]
        for task, column in counts.items():
            needs_text = task not in ("interleaved", "question", "chat")
            is_deaf = not hears and (kind == "audio" or any(isinstance(segment, int) for segment in segments))
            impossible = (
                is_deaf
                or (task == "speak" and not speaks)
                or (needs_text and not found.texts[row])
                or (task == "question" and "question" not in metadata)
                or (kind == "interleaved" and bool(said) != (task == "chat"))
            )
            try:
                tokens = 0 if impossible else document_length(
                    task, folder, key=f"{key}-{line}" if line >= 0 else key, text=len(ids[row]),
                    num_frames=found.num_frames(row), segments=segments, metadata=metadata, said=said,
                    image_size=found.pictures[row][0] if found.pictures[row] else (1, 1),
                )  # fmt: skip
            except ValueError as error:  # a chat template refuses what has roles out of turn
                if not said:
                    raise
                tokens, refused[row] = 0, str(error)
            column.append(tokens)
        if progress and row % 1000 == 999:
            progress(row + 1)
    by_task = {task: np.array(column, dtype=np.int64) for task, column in counts.items()}
    return TokenCounts(by_task, *_rarities(ids), pieces, {row: len(ids[row]) for row in pieces}, refused)


def _rarities(ids: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and mean of -log p."""
    lengths = np.array([len(item) for item in ids], dtype=np.int64)
    if not lengths.sum():
        return np.full(len(ids), np.nan), np.full(len(ids), np.nan)
    together = np.concatenate(ids)
    counts = np.bincount(together)
    surprise = -np.log(np.maximum(counts, 1) / len(together))[together]
    sums = np.diff(np.concatenate([[0.0], np.cumsum(surprise)])[np.concatenate([[0], np.cumsum(lengths)])])
    sums = np.where(lengths > 0, sums, np.nan)
    return sums, sums / np.maximum(lengths, 1)
