"""Captions against what the pictures hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np

from mmllm.data.rows.media import Media, media_source
from mmllm.data.rows.rows import Row
from mmllm.evaluation.asking import AskedModel
from mmllm.evaluation.captions import (
    caption_matches,
    caption_meaning,
    count_attributes,
    names_heldout_pairs,
    order_is_right,
    reference_scene,
)
from mmllm.evaluation.metrics import bootstrap_interval, cider_d
from mmllm.evaluation.results import Prediction, TaskResult
from mmllm.evaluation.scenes import ParsedScene
from mmllm.evaluation.scoring import causes, derangement, greedy_settings, mean_scores, scored_set, vote_scores
from mmllm.inference.voting import Vote, VotingConfig, vote


def evaluate_captions(
    model: AskedModel, rows: Sequence[Row], batch_size: int, seed: int, voting: VotingConfig | None = None
) -> TaskResult:
    """Exact match, attributes, order and CIDEr-D; rows with `heldout_pairs` are a set of their own.

    A row with `objects` is matched when the caption says the same scene; another row when the normalized texts are
    equal. `attribute_accuracy` is all right attributes over all attributes of the rows that have `objects` (see
    `mmllm.evaluation.captions.count_attributes`), `heldout_pairs_accuracy` the share of the held-out rows that
    name the held-out object's shape and colour both right. `order_accuracy_2` and `order_accuracy_3` are, of the
    scenes with two and three objects that are all named right (`order_n_2`, `order_n_3`), the share whose relations
    are right too: by chance 1 in 2 and 1 in 6. `shuffled_` scores are other pictures' captions. With `voting`, `voted_`
    scores are of what most of several sampled captions say, beside those of the greedy ones, which they don't change.
    """
    images = cast("list[Any]", [media_source(cast("Media", row.image)) for row in rows])
    settings = greedy_settings(model, [row.text for row in rows], batch_size)
    said = model.caption(images, **settings, rows=rows)
    blind = model.caption(images, blind=True, **settings, rows=rows)
    predictions = [_caption_prediction(row, *texts) for row, *texts in zip(rows, said, blind, strict=True)]
    test = [place for place, row in enumerate(rows) if scored_set(row) != "heldout_pairs"]
    scores: dict[str, Any] = {}
    if test:
        scores |= _caption_scores([rows[i] for i in test], [said[i] for i in test], seed, "")
        scores["n"] = len(test)
        scores |= _order_scores([rows[i] for i in test], [said[i] for i in test], seed)
        scores |= _caption_scores([rows[i] for i in test], [blind[i] for i in test], seed, "blind_")
        if len(test) > 1:
            others = [said[test[i]] for i in derangement(len(test), seed)]
            scores |= _caption_scores([rows[i] for i in test], others, seed, "shuffled_")
    heldout = [place for place in range(len(rows)) if place not in set(test)]
    if heldout:
        pairs = causes([rows[i] for i in heldout])
        for prefix, texts in (("", said), ("blind_", blind)):
            right = [names_heldout_pairs(texts[i], rows[i].metadata["heldout_pairs"]) for i in heldout]
            scores |= mean_scores(f"{prefix}heldout_pairs_accuracy", right, seed, pairs)
        scores["heldout_pairs_n"] = len(heldout)
        scores["num_heldout_pairs"] = len(set(pairs))
        matched = [predictions[i].correct for i in heldout]
        scores |= mean_scores("heldout_pairs_exact_match", matched, seed, pairs)
    if voting is not None:
        prompts = model.caption_prompts(images, settings["max_new_tokens"], rows)
        votes = vote(
            model.served, prompts, voting, caption_meaning, settings["max_new_tokens"], batch_size, model.progress
        )
        scores |= _voted_scores(rows, votes, seed) | vote_scores(votes, voting, seed, causes(rows))
        predictions = [
            replace(prediction, voted=one.text, agreement=one.agreement)
            for prediction, one in zip(predictions, votes, strict=True)
        ]
    return TaskResult("caption", scores, predictions)


def _caption_scores(rows: Sequence[Row], texts: Sequence[str], seed: int, prefix: str) -> dict[str, Any]:
    scenes = [reference_scene(row.metadata) for row in rows]
    matched = [caption_matches(text, row.text, scene) for text, row, scene in zip(texts, rows, scenes, strict=True)]
    pictures = causes(rows)
    scores = mean_scores(f"{prefix}exact_match", matched, seed, pictures)
    of_scenes = [place for place, scene in enumerate(scenes) if scene is not None]
    if of_scenes:
        counts = [count_attributes(texts[i], cast("ParsedScene", scenes[i])) for i in of_scenes]
        right, total = (np.array(column, dtype=float) for column in zip(*counts, strict=True))
        clusters = [pictures[i] for i in of_scenes]
        scores[f"{prefix}attribute_accuracy"] = float(right.sum() / total.sum())
        scores[f"{prefix}attribute_accuracy_ci"] = bootstrap_interval(
            right, total, seed=seed, clusters_N=clusters, is_share=True
        )
    cider = cider_d(texts, [[row.text] for row in rows])
    scores |= mean_scores(f"{prefix}cider", cider, seed, pictures, is_share=False)
    return scores


def _voted_scores(rows: Sequence[Row], votes: Sequence[Vote], seed: int) -> dict[str, Any]:
    """Exact match, and of rows with held-out pairs theirs, as of greedy captions."""
    right = [
        caption_matches(one.text, row.text, reference_scene(row.metadata))
        for row, one in zip(rows, votes, strict=True)
    ]  # fmt: skip
    heldout = [place for place, row in enumerate(rows) if scored_set(row) == "heldout_pairs"]
    test = sorted(set(range(len(rows))) - set(heldout))
    scores: dict[str, Any] = {}
    if test:
        scores |= mean_scores("voted_exact_match", [right[i] for i in test], seed, causes([rows[i] for i in test]))
    if heldout:
        pairs = causes([rows[i] for i in heldout])
        named = [names_heldout_pairs(votes[i].text, rows[i].metadata["heldout_pairs"]) for i in heldout]
        scores |= mean_scores("voted_heldout_pairs_accuracy", named, seed, pairs)
        scores |= mean_scores("voted_heldout_pairs_exact_match", [right[i] for i in heldout], seed, pairs)
    return scores


def _order_scores(rows: Sequence[Row], texts: Sequence[str], seed: int) -> dict[str, Any]:
    """Order right, given all objects right, of two and of three; an accuracy of no rows is left out, its number not."""
    scenes = [reference_scene(row.metadata) for row in rows]
    scores: dict[str, Any] = {}
    for num_objects in (2, 3):
        places = [i for i, scene in enumerate(scenes) if scene is not None and len(scene.objects) == num_objects]
        if not places:
            continue
        order = {i: order_is_right(texts[i], cast("ParsedScene", scenes[i])) for i in places}
        named = [i for i in places if order[i] is not None]
        if named:
            right = [bool(order[i]) for i in named]
            scores |= mean_scores(f"order_accuracy_{num_objects}", right, seed, causes([rows[i] for i in named]))
        scores[f"order_n_{num_objects}"] = len(named)
    return scores


def _caption_prediction(row: Row, said: str, blind: str) -> Prediction:
    scene = reference_scene(row.metadata)
    correct = caption_matches(said, row.text, scene)
    if scene is None:
        score = float(correct)
    else:
        right, total = count_attributes(said, scene)
        score = right / max(total, 1)
    return Prediction(row.id, row.text, said, score, correct, scored_set(row), blind, image=str(row.image))
