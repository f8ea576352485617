"""Bits a byte of held-out text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmllm.checkpoints.settings import Sampling
from mmllm.data.rows.rows import Row
from mmllm.data.samples.sample import Segment
from mmllm.evaluation.asking import AskedModel
from mmllm.evaluation.metrics import bootstrap_interval
from mmllm.evaluation.perplexity import bits_of_documents
from mmllm.evaluation.results import Prediction, TaskResult

NUM_CONTINUATIONS = 6
CONTINUATION_TOKENS = 80


def evaluate_text(
    model: AskedModel, rows: Sequence[Row], batch_size: int, seed: int, sequence_length: int
) -> TaskResult:
    """Bits a byte: the tokens' negative log2 likelihood, the document's end included, over the text's UTF-8 bytes.

    There is no blind baseline: nothing but text is given.
    """
    texts = [row.text for row in rows]
    bits_N = bits_of_documents(model.served, texts, sequence_length, batch_size, model.progress)
    bytes_N = np.array([len(text.encode("utf-8")) for text in texts], dtype=float)
    scores: dict[str, Any] = {
        "bits_per_byte": float(bits_N.sum() / bytes_N.sum()),
        "bits_per_byte_ci": bootstrap_interval(bits_N, bytes_N, seed=seed),
        "n": len(rows),
        "num_bytes": int(bytes_N.sum()),
    }
    samples = dict(_continuations(model, texts, seed))
    predictions = [
        Prediction(
            row.id, *samples.get(i, ("", ""))[1:], score=-bits / size, correct=False,
            question=samples[i][0] if i in samples else None,
        )
        if i in samples
        else Prediction(row.id, "", "", -bits / size, False)
        for i, (row, bits, size) in enumerate(zip(rows, bits_N.tolist(), bytes_N.tolist(), strict=True))
    ]  # fmt: skip
    return TaskResult("text", scores, predictions)


def _continuations(model: AskedModel, texts: Sequence[str], seed: int) -> list[tuple[int, tuple[str, str, str]]]:
    """(row, (beginning, how it goes on, how the model goes on)) of a few rows, drawn at random."""
    chosen = random.Random(f"text {seed}").sample(range(len(texts)), min(NUM_CONTINUATIONS, len(texts)))
    cut = [_cut(texts[i]) for i in chosen]
    prompts = [Segment(text=start) for start, _ in cut]
    said = model.continue_texts(prompts, CONTINUATION_TOKENS, Sampling(temperature=0.8, top_p=0.95, seed=seed))
    return [(i, (start, end, text)) for i, (start, end), text in zip(chosen, cut, said, strict=True)]


def _cut(text: str, num_given: int = 160, num_shown: int = 320) -> tuple[str, str]:
    """The beginning of a text, up to a space near its first third or `num_given` letters, and what follows."""
    place = min(num_given, max(len(text) // 3, 1))
    place = text.find(" ", place) if " " in text[place:] else place
    return text[:place], text[place : place + num_shown]
