"""What the tasks share: which set a row is scored in, how the model is asked, how a score and its interval are kept."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from mmllm.data.rows.rows import Row, row_media
from mmllm.evaluation.asking import AskedModel
from mmllm.evaluation.metrics import Edits, bootstrap_interval, error_rate, word_edits
from mmllm.inference.voting import Vote, VotingConfig


def scored_set(row: Row) -> str:
    """The set in which a row is scored."""
    if row.metadata.get("heldout_pairs"):
        return "heldout_pairs"
    return "heldout_voices" if row.metadata.get("heldout_voice") else "test"


def causes(rows: Sequence[Row]) -> list[Hashable]:
    """What each row's score shares with others', so that intervals don't take them for independent.

    Of rows with held-out pairs the pairs, of voices never heard the voice, else the row's pictures and sounds: five
    captions of one picture are one picture. A row without any of these stands for itself.
    """
    return [_cause(row) or place for place, row in enumerate(rows)]


def _cause(row: Row) -> tuple[str, ...]:
    match scored_set(row):
        case "heldout_pairs":
            return tuple(sorted(str(pair) for pair in row.metadata["heldout_pairs"]))
        case "heldout_voices" if row.metadata.get("speaker") is not None:
            return (str(row.metadata["speaker"]),)
        case _:
            return tuple(str(media) for _, media in row_media(row))


def greedy_settings(model: AskedModel, references: Sequence[str], batch_size: int) -> dict[str, Any]:
    """Of `AskedModel`: with room for twice the longest reference, so that a model that rambles is stopped."""
    longest = max(len(model.tokenizer.text.encode(reference)) for reference in references)
    return {"max_new_tokens": max(16, 2 * longest + 2), "batch_size": batch_size}


def mean_scores(
    key: str,
    values: Sequence[float] | np.ndarray,
    seed: int,
    clusters: Sequence[Hashable] | None = None,
    is_share: bool = True,
) -> dict[str, Any]:
    """A mean over rows under `key`, by default of shares, and its interval; see `bootstrap_interval`."""
    interval = bootstrap_interval(values, seed=seed, clusters_N=clusters, is_share=is_share)
    return {key: float(np.mean(values)), f"{key}_ci": interval}


def vote_scores(votes: Sequence[Vote], voting: VotingConfig, seed: int, clusters: Sequence[Hashable]) -> dict[str, Any]:
    """What every voted score is to be read beside: how votes were drawn, how far they agree and what they cost."""
    return {
        "num_votes": voting.num_votes,
        "vote_temperature": voting.sampling.temperature,
        **mean_scores("mean_agreement", [one.agreement for one in votes], seed, clusters),
        "tokens_per_answer": float(np.mean([one.num_tokens for one in votes])),
    }


def rate_scores(
    key: str, edits: Sequence[Edits], seed: int, clusters: Sequence[Hashable] | None = None
) -> dict[str, Any]:
    """A word or character error rate under `key`, and its interval; see `bootstrap_interval`.

    A rate may be above 1, and is no share; without a single error its interval is that of the share of rows with one.
    """
    errors, lengths = [e.errors for e in edits], [e.length for e in edits]
    is_share = not any(errors)
    interval = bootstrap_interval(errors, lengths, seed=seed, clusters_N=clusters, is_share=is_share)
    return {key: error_rate(edits), f"{key}_ci": interval}


def edits_of_words(texts: Sequence[str], references: Sequence[str]) -> list[Edits]:
    """Word edits, row by row."""
    return [word_edits(text, reference) for text, reference in zip(texts, references, strict=True)]


def derangement(num_rows: int, seed: int) -> list[int]:
    """A random permutation without fixed points: each row gets another's place in a random cycle.

    Raises:
        ValueError: there are fewer than two rows.
    """
    if num_rows < 2:
        raise ValueError(f"got {num_rows} rows; shuffling them needs at least two")
    order = list(range(num_rows))
    random.Random(f"derangement {seed}").shuffle(order)
    given = [0] * num_rows
    for place, row in enumerate(order):
        given[row] = order[(place + 1) % num_rows]
    return given
