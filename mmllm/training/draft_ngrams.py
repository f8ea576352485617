"""A draft without a model: a table of what a large model writes behind each few ids, counted on what it writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np

from mmllm.batch import Modality, PackedBatch
from mmllm.checkpoints.folder import LoadedModel
from mmllm.inference.engine.engine import Engine
from mmllm.inference.engine.ngrams import ORDERS, NGramCounts, NGrams
from mmllm.inference.engine.requests import EngineConfig, TextRequest, TextResult
from mmllm.training.draft_speed import prompts_of

_NEW_TOKENS = 96
_TOLD_SECONDS = 10
_CUTS = 6
"""Places at which each text is cut, to be gone on with."""
_MOST_TOKENS = 1_000_000
"""More fill the memory: some 500 bytes each."""


def count_ngrams(
    loaded: LoadedModel, batches: Iterator[PackedBatch], seed: int, end: float, tell: Callable[[str], None]
) -> tuple[NGrams, int, int]:
    """Lets a model go on with the beginnings of documents, greedily, and counts what it writes.

    Args:
        loaded: the model.
        batches: documents.
        seed: of where texts are cut.
        end: by `time.monotonic`; one batch is answered in any case.
        tell: is given a line now and then.

    Returns:
        (the table, requests that were answered, ids that were counted).
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    counts = NGramCounts(model.config.num_text, tokenizer.hash)
    engine = Engine(model, tokenizer, EngineConfig(prefix_cache_bytes=0))
    ends = sorted(tokenizer.text.end_ids)[:1]
    rng, told = np.random.default_rng(seed), time.monotonic()
    num_texts = num_ids = 0
    while num_ids < _MOST_TOKENS and (not num_texts or time.monotonic() < end):
        batch = next(batches)
        found = [*prompts_of(batch, tokenizer, rng)]
        for _ in range(_CUTS - 1):  # pictures begin alike wherever they are cut
            found += [(what, prompt) for what, prompt in prompts_of(batch, tokenizer, rng) if what == "text"]
        prompts = [prompt for _, prompt in found]
        requests = [TextRequest(prompt, max_new_tokens=_NEW_TOKENS) for prompt in prompts]
        for prompt, result in zip(prompts, engine.run(requests), strict=True):
            assert isinstance(result, TextResult)
            is_text_T = prompt.modality_T[-max(ORDERS) :] == Modality.TEXT
            before = np.where(is_text_T, prompt.token_ids_T[-max(ORDERS) :], -1).tolist()
            ids = [*result.ids, *(ends if result.finish_reason == "stop" else [])]
            counts.add(before, ids)
            num_ids += len(ids)
        num_texts += len(prompts)
        if time.monotonic() - told > _TOLD_SECONDS:
            told = time.monotonic()
            tell(f"{num_texts:,} texts of {num_ids:,} ids counted")
    return counts.table(), num_texts, num_ids
