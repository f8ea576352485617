"""How many bits a model needs for texts, each token predicted from those before it.

Shapes: B windows, T positions, V vocabulary, N documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mmllm.data.samples.document import Document
from mmllm.data.samples.documents import build_document
from mmllm.data.samples.sample import Sample
from mmllm.inference.api import Model
from mmllm.inference.prompts import pad_left
from mmllm.losses.cross_entropy import log_probabilities


@dataclass(frozen=True)
class Window:
    """Tokens `[start, stop)` of a document, of which those from `first_scored` on are scored."""

    start: int
    stop: int
    first_scored: int


def plan_windows(num_tokens: int, window: int) -> Iterator[Window]:
    """Windows that overlap by half, in which each token but the document's first is scored exactly once.

    A scored token has at least half a window of context before it (all there is, in the first window).

    Raises:
        ValueError: `window` is less than 2.
    """
    if window < 2:
        raise ValueError(f"window is {window} tokens; predicting a token needs at least 2")
    stride = max(window // 2, 1)
    first_scored = 1
    start = 0
    while first_scored < num_tokens:
        stop = min(start + window, num_tokens)
        yield Window(start, stop, first_scored)
        first_scored = stop
        start = max(min(start + stride, num_tokens - window), start + 1)


def bits_of_documents(
    model: Model,
    texts: Sequence[str],
    window: int = 512,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Bits of each text under the model's full softmax, teacher-forced.

    A document is written by the `text` template, as in training; its text and its end are scored, the prompt isn't.
    Documents longer than `window` are cut into windows that overlap by half (training cuts them without overlap).

    Args:
        model: with any senses.
        texts: N documents.
        window: positions at once; the length of training's sequences, beyond which positions were never seen.
        batch_size: windows of like length at once.
        progress: called with the number of texts that have become done.

    Returns:
        float64 [N].
    """
    documents = [build_document(Sample(str(i), text), "text", model.tokenizer) for i, text in enumerate(texts)]
    pieces = [(i, w) for i, document in enumerate(documents) for w in plan_windows(document.num_tokens, window)]
    pieces.sort(key=lambda piece: piece[1].stop - piece[1].start)
    bits_N = np.zeros(len(texts))
    was_training = model.model.training
    model.model.eval()
    try:
        for first in range(0, len(pieces), batch_size):
            batch = pieces[first : first + batch_size]
            nats_B = _nats_of_windows(model, [documents[i] for i, _ in batch], [w for _, w in batch])
            np.add.at(bits_N, [i for i, _ in batch], nats_B / math.log(2))
            if progress is not None:
                progress(sum(w.stop == documents[i].num_tokens for i, w in batch))
    finally:
        model.model.train(was_training)
    return bits_N


@torch.no_grad()
def _nats_of_windows(model: Model, documents: Sequence[Document], windows: Sequence[Window]) -> np.ndarray:
    """Negative log likelihood of each window's scored targets, float64 [B]."""
    device = model.model.decoder.head_weight_VD.device
    batch = pad_left([d.part(w.start, w.stop) for d, w in zip(documents, windows, strict=True)]).to(device)
    num_positions = batch.token_ids_BT.shape[1]
    is_scored_BT = torch.zeros(batch.token_ids_BT.shape, dtype=torch.bool)
    for row, (document, w) in enumerate(zip(documents, windows, strict=True)):
        scored = torch.from_numpy(document.targets_T[w.first_scored : w.stop].copy())
        is_scored_BT[row, num_positions - len(scored) :] = scored
    rows, places = is_scored_BT.nonzero(as_tuple=True)
    hidden_MD = model.model.hidden(batch)[rows.to(device), places.to(device) - 1]
    ids_M = batch.token_ids_BT[rows.to(device), places.to(device)]
    nats_M = -log_probabilities(hidden_MD, model.model.decoder.head_weight_VD, ids_M)
    return torch.zeros(len(windows), dtype=torch.float64).index_add(0, rows, nats_M.double().cpu()).numpy()
