"""What a shard's index says of its documents.

Shapes: N documents of the shard, Q sounds.
"""

from __future__ import annotations

import numpy as np

from mmllm.data.index.index import ShardIndex
from mmllm.data.plan.balance import NO_VALUE


def sounds_of(index: ShardIndex) -> tuple[np.ndarray, np.ndarray]:
    """int64 [Q, 3] samples, samples a second and frames of each sound that has any, and which document's it is.

    Which sounds are a document's isn't stored, but sounds lie in the order of documents, and so many frames are its.
    """
    sounds_Q3 = index.sounds_Q3.astype(np.int64)
    sounds_Q3 = sounds_Q3[sounds_Q3[:, 2] > 0]
    frames_Q, ends_N = sounds_Q3[:, 2], index.num_frames_N.astype(np.int64).cumsum()
    return sounds_Q3, np.searchsorted(ends_N, frames_Q.cumsum() - frames_Q, side="right")


def values_of(index: ShardIndex, name: str) -> list[str]:
    """What a column says of a shard's documents, as texts; `NO_VALUE` of those that it says nothing of."""
    column = index.columns.get(name)
    if column is None:
        return [NO_VALUE] * index.num_documents
    return [NO_VALUE if value is None else str(value) for value in column]


def measured(index: ShardIndex, metric: str) -> np.ndarray:
    """[N] of one of the curriculum's metrics; infinite where a document has none."""

    def column(name: str) -> np.ndarray:
        return index.columns[name].numbers() if name in index.columns else np.full(index.num_documents, np.inf)

    match metric:
        case "num_images":
            return index.num_images_N
        case "num_tiles":
            return index.num_tiles_N
        case "num_frames":
            return index.num_frames_N
        case "seconds":
            return column("duration")
        case "image_area":
            return column("width") * column("height")
    return column(metric)


def shares_of(index: ShardIndex, seed: int) -> np.ndarray:
    """[N] a number in [0, 1) for each document of a shard, by the shard's contents and a seed alone."""
    digest = int(index.sha256[:16], 16)
    return np.random.default_rng([seed, digest]).random(index.num_documents)
