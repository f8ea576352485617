"""Answers to questions about interleaved pictures and sounds."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mmllm.data.rows.rows import Row
from mmllm.data.samples.sample import Segment
from mmllm.evaluation.asking import AskedModel
from mmllm.evaluation.metrics import exact_match, text_meaning
from mmllm.evaluation.results import Prediction, TaskResult
from mmllm.evaluation.scoring import causes, greedy_settings, mean_scores, vote_scores
from mmllm.evaluation.shots import prompt_segments
from mmllm.inference.voting import VotingConfig, vote

_ORDINAL = re.compile(r"\b(?:first|second|third|fourth|fifth)\b", re.IGNORECASE)


def evaluate_answers(
    model: AskedModel,
    rows: Sequence[Row],
    batch_size: int,
    seed: int,
    voting: VotingConfig | None = None,
    controls: bool = True,
) -> TaskResult:
    """Answers right, beside those given when pictures and sounds change places between rows, and blind.

    `ordinal_accuracy` is that of the `ordinal_n` questions that ask for one of several by its place ("the first
    picture", "which word is said second?"): they need what was seen or heard, and which came when. With `voting`,
    `voted_` scores are of what most of several sampled answers say, beside the greedy ones, which they don't change.
    """
    questions = [str(row.metadata["question"]) for row in rows]
    references = [str(row.metadata["answer"]) for row in rows]
    settings = greedy_settings(model, references, batch_size)
    parts = [prompt_segments(row) for row in rows]
    answers = model.answer(parts, questions, **settings, rows=rows)
    given = [("", answers)]
    blind: Sequence[str | None] = [None] * len(rows)
    if controls:
        blind = model.answer(parts, questions, blind=True, **settings, rows=rows)
        shuffled = model.answer(shuffled_segments(rows, seed), questions, **settings, rows=rows)
        given += [("shuffled_", shuffled), ("blind_", blind)]
    right = _matches(answers, references)
    media = causes(rows)
    ordinal = [place for place, question in enumerate(questions) if _ORDINAL.search(question)]
    scores: dict[str, Any] = {}
    for prefix, texts in given:
        matched = _matches(texts, references)
        scores |= mean_scores(f"{prefix}accuracy" if prefix else "answer_accuracy", matched, seed, media)
        if ordinal:
            clusters = [media[i] for i in ordinal]
            scores |= mean_scores(f"{prefix}ordinal_accuracy", [matched[i] for i in ordinal], seed, clusters)
    scores["n"] = len(rows)
    if ordinal:
        scores["ordinal_n"] = len(ordinal)
    predictions = [
        Prediction(
            row.id, reference, answer, float(correct), correct, "test", without, question=question,
            segments=[
                {kind: str(segment[kind]) for kind in ("text", "image", "audio") if kind in segment}
                for segment in row.segments
            ],
        )
        for row, reference, answer, correct, without, question in zip(
            rows, references, answers, right, blind, questions, strict=True
        )
    ]  # fmt: skip
    if voting is not None:
        prompts = model.answer_prompts(parts, questions, settings["max_new_tokens"], rows)
        votes = vote(
            model.served, prompts, voting, text_meaning, settings["max_new_tokens"], batch_size, model.progress
        )
        matched = _matches([one.text for one in votes], references)
        scores |= mean_scores("voted_answer_accuracy", matched, seed, media)
        if ordinal:
            clusters = [media[i] for i in ordinal]
            scores |= mean_scores("voted_ordinal_accuracy", [matched[i] for i in ordinal], seed, clusters)
        scores |= vote_scores(votes, voting, seed, media)
        predictions = [
            replace(prediction, voted=one.text, agreement=one.agreement)
            for prediction, one in zip(predictions, votes, strict=True)
        ]
    return TaskResult("interleaved", scores, predictions)


def _matches(texts: Sequence[str], references: Sequence[str]) -> list[bool]:
    return [exact_match(text, reference) for text, reference in zip(texts, references, strict=True)]


def shuffled_segments(rows: Sequence[Row], seed: int) -> list[list[Segment]]:
    """Each row's prompt with pictures and sounds of other rows in the places of its own, kind for kind.

    A picture comes back to its own row only where one row holds more than half of all pictures.
    """
    shuffled = [prompt_segments(row) for row in rows]
    order = list(range(len(rows)))
    random.Random(f"shuffle {seed}").shuffle(order)
    for kind in ("image", "audio"):
        places = [
            (row, number) for row in order for number, segment in enumerate(rows[row].segments) if kind in segment
        ]
        if not places:
            continue
        most_of_one_row = max(np.bincount([row for row, _ in places]))
        given = [shuffled[row][number] for row, number in places]
        for place, (row, number) in enumerate(places):
            shuffled[row][number] = given[(place + int(most_of_one_row)) % len(places)]
    return shuffled
