"""Compute by difficulty: an answer at once where the model is sure of it, a vote where it isn't.

As System 1 and System 2 (Kahneman 2011, "Thinking, Fast and Slow"): whether the first tokens of the greedy answer are
probable tells which question is hard. The threshold is chosen on questions whose answers are known, and on which
nothing is measured afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Unpack, overload

from mmllm.data.samples.document import Document
from mmllm.inference import arguments
from mmllm.inference.answering import as_given
from mmllm.inference.api import Model
from mmllm.inference.engine.requests import TextResult
from mmllm.inference.inputs import Part
from mmllm.inference.reasoning.asking import Asker, Reasoned, Shot, Spent
from mmllm.inference.reasoning.votes import check_confidence, draw_votes, voter
from mmllm.inference.text_settings import TextSettings
from mmllm.inference.voting import Meaning, Vote, VotingConfig

Certainty = Literal["least", "mean"]
ALWAYS_VOTE = 2.0
"""A threshold that no probability reaches."""


@dataclass(frozen=True)
class SureConfig:
    """When a greedy answer is sure.

    Attributes:
        threshold: from this certainty on it is given at once.
        certainty: the least probability among its first tokens, or their mean.
        first_tokens: how many are looked at, the end among them.
    """

    threshold: float = 0.9
    certainty: Certainty = "least"
    first_tokens: int = 4

    def __post_init__(self) -> None:
        arguments.real("threshold", self.threshold, 0.0)
        arguments.choice("certainty", self.certainty, ("least", "mean"))
        arguments.whole("first_tokens", self.first_tokens, 1)

    def of(self, logprobs: Sequence[float]) -> float:
        """The certainty of a text with these log-probabilities."""
        probs = [math.exp(logprob) for logprob in logprobs[: self.first_tokens]]
        return min(probs) if self.certainty == "least" else math.fsum(probs) / len(probs)


@dataclass(frozen=True, kw_only=True)
class Effort(Reasoned):
    """An answer, given at once or voted for.

    Attributes:
        is_sure: whether it was given at once.
        certainty: of the greedy answer.
        vote: None where it was given at once.
    """

    is_sure: bool
    certainty: float
    vote: Vote | None = None


@overload
def by_difficulty(
    model: Model, parts: list[Any], questions: list[str], sure: SureConfig | None = None,
    voting: VotingConfig | None = None, *, shots: Sequence[Shot] = (), meaning: Meaning = str.strip,
    confidence: float | None = 1.0, **settings: Unpack[TextSettings],
) -> list[Effort]: ...  # fmt: skip
@overload
def by_difficulty(
    model: Model, parts: Part | list[Any], questions: str, sure: SureConfig | None = None,
    voting: VotingConfig | None = None, *, shots: Sequence[Shot] = (), meaning: Meaning = str.strip,
    confidence: float | None = 1.0, **settings: Unpack[TextSettings],
) -> Effort: ...  # fmt: skip
def by_difficulty(
    model: Model, parts: Any, questions: Any, sure: SureConfig | None = None, voting: VotingConfig | None = None, *,
    shots: Sequence[Shot] = (), meaning: Meaning = str.strip, confidence: float | None = 1.0,
    **settings: Unpack[TextSettings],
) -> Any:  # fmt: skip
    """Answers a question, or each of a list, at once where the greedy answer is sure, else by a vote.

    Args:
        model: that answers.
        parts: as of `Model.answer`.
        questions: likewise.
        sure: when an answer is sure; None: as `SureConfig` is. `choose_threshold` finds what suits a model.
        voting: of the others; see `self_consistency`, as for what follows.
        shots: see `few_shot`.
        meaning: what votes are compared by.
        confidence: when a vote ends.
        **settings: see `TextSettings`; those of sampling are the votes'.

    Raises:
        ValueError: as of `self_consistency`.
    """
    sure = sure or SureConfig()
    check_confidence(confidence)
    asker, voting = voter(model, voting, settings)
    prompts = [prompt for prompt, _ in asker.prompts(parts, questions, shots)]
    greedy = _greedy(asker, prompts)
    certainties = [sure.of(result.logprobs or ()) for result in greedy]
    unsure = [place for place, certainty in enumerate(certainties) if certainty < sure.threshold]
    drawn = draw_votes(asker, [prompts[place] for place in unsure], voting.num_votes, meaning, None, confidence)
    votes = dict(zip(unsure, drawn, strict=True))
    return as_given(questions, [
        _effort(result, certainty, votes.get(place))
        for place, (result, certainty) in enumerate(zip(greedy, certainties, strict=True))
    ])  # fmt: skip


def _greedy(asker: Asker, prompts: Sequence[Document]) -> list[TextResult]:
    greedy = asker.greedy()
    return replace(greedy, options=replace(greedy.options, num_logprobs=greedy.options.num_logprobs or 0)).write(
        prompts
    )


def _effort(result: TextResult, certainty: float, vote: Vote | None) -> Effort:
    spent = Spent.of([result])
    if vote is None:
        return Effort(text=result.text, **vars(spent), is_sure=True, certainty=certainty)
    return Effort(
        text=vote.text,
        num_tokens=spent.num_tokens + vote.num_tokens,
        num_prompt_tokens=spent.num_prompt_tokens + vote.num_prompt_tokens,
        num_cached_tokens=spent.num_cached_tokens + vote.num_cached_tokens,
        is_sure=False,
        certainty=certainty,
        vote=vote,
    )


# ---- the threshold


@dataclass(frozen=True)
class Trial:
    """A question whose answer is known, answered at once and by a vote.

    Attributes:
        certainty: of the greedy answer.
        is_right_at_once: whether that is right.
        num_tokens_at_once: that it took.
        is_right_voted: whether the vote is right.
        num_tokens_voted: that the vote took, the greedy answer included.
    """

    certainty: float
    is_right_at_once: bool
    num_tokens_at_once: int
    is_right_voted: bool
    num_tokens_voted: int


@dataclass(frozen=True)
class ThresholdPoint:
    """What a threshold gives.

    Attributes:
        threshold: of `SureConfig`.
        share_sure: share of questions that are answered at once.
        accuracy: share of right answers.
        num_tokens: a question, on average.
    """

    threshold: float
    share_sure: float
    accuracy: float
    num_tokens: float


def effort_trials(
    model: Model, parts: list[Any], questions: list[str], is_right: Callable[[int, str], bool],
    sure: SureConfig | None = None, voting: VotingConfig | None = None, *, shots: Sequence[Shot] = (),
    meaning: Meaning = str.strip, confidence: float | None = 1.0, **settings: Unpack[TextSettings],
) -> list[Trial]:  # fmt: skip
    """Answers validation questions both ways, for `threshold_curve`. Take none on which the model is then measured.

    Args:
        model: that answers.
        parts: of each question.
        questions: as many.
        is_right: says of a question's number and a text whether it is right.
        sure: what certainty is; its threshold doesn't count.
        voting: as of `by_difficulty`, as for what follows.
        shots: likewise.
        meaning: likewise.
        confidence: likewise.
        **settings: likewise.
    """
    sure = replace(sure or SureConfig(), threshold=ALWAYS_VOTE)
    check_confidence(confidence)
    asker, voting = voter(model, voting, settings)
    prompts = [prompt for prompt, _ in asker.prompts(parts, questions, shots)]
    greedy = _greedy(asker, prompts)
    votes = draw_votes(asker, prompts, voting.num_votes, meaning, None, confidence)
    trials = []
    for place, (result, vote) in enumerate(zip(greedy, votes, strict=True)):
        num_tokens = result.cost.num_new_tokens
        trials.append(
            Trial(
                sure.of(result.logprobs or ()),
                is_right(place, result.text),
                num_tokens,
                is_right(place, vote.text),
                num_tokens + vote.num_tokens,
            )
        )
    return trials


def threshold_curve(trials: Sequence[Trial]) -> list[ThresholdPoint]:
    """What each threshold that matters gives, from 0 (nothing is voted for) to `ALWAYS_VOTE`.

    Those between lie half-way from one question's certainty to the next one's.

    Raises:
        ValueError: there are no trials.
    """
    if not trials:
        raise ValueError("there are no trials; a threshold needs questions whose answers are known")
    ranked = sorted(trials, key=lambda trial: trial.certainty)
    num_right = sum(trial.is_right_at_once for trial in ranked)
    num_tokens = sum(trial.num_tokens_at_once for trial in ranked)
    points = [ThresholdPoint(0.0, 1.0, num_right / len(ranked), num_tokens / len(ranked))]
    for place, trial in enumerate(ranked):  # it and those before it are voted for
        num_right += trial.is_right_voted - trial.is_right_at_once
        num_tokens += trial.num_tokens_voted - trial.num_tokens_at_once
        is_last = place + 1 == len(ranked)
        if not is_last and ranked[place + 1].certainty == trial.certainty:
            continue
        threshold = ALWAYS_VOTE if is_last else _between(trial.certainty, ranked[place + 1].certainty)
        share_sure = 1 - (place + 1) / len(ranked)
        points.append(ThresholdPoint(threshold, share_sure, num_right / len(ranked), num_tokens / len(ranked)))
    return points


def _between(lower: float, upper: float) -> float:
    """A number above `lower` that isn't above `upper`, half-way where there is one."""
    half = (lower + upper) / 2
    return half if half > lower else upper


def choose_threshold(curve: Sequence[ThresholdPoint], tolerance: float = 0.0) -> ThresholdPoint:
    """The cheapest point whose accuracy is within `tolerance` of the best."""
    arguments.real("tolerance", tolerance, 0.0, 1.0)
    best = max(point.accuracy for point in curve)
    return min((point for point in curve if point.accuracy >= best - tolerance), key=lambda point: point.num_tokens)
