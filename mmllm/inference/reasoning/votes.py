"""Self-consistency: the answer on which most of several sampled ones agree, with no more of them than it takes."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any, Unpack, overload

from mmllm.data.samples.document import Document
from mmllm.inference import arguments
from mmllm.inference.answering import as_given
from mmllm.inference.api import Model
from mmllm.inference.engine.requests import TextResult
from mmllm.inference.inputs import Part
from mmllm.inference.reasoning.asking import Asker, Extract, Shot, Spent, check_extract, extracted
from mmllm.inference.text_settings import TextSettings, try_number
from mmllm.inference.voting import Meaning, Vote, VotingConfig, majority


@overload
def self_consistency(
    model: Model, parts: list[Any], questions: list[str], voting: VotingConfig | None = None, *,
    shots: Sequence[Shot] = (), meaning: Meaning = str.strip, extract: Extract | None = None,
    confidence: float | None = 1.0, **settings: Unpack[TextSettings],
) -> list[Vote]: ...  # fmt: skip
@overload
def self_consistency(
    model: Model, parts: Part | list[Any], questions: str, voting: VotingConfig | None = None, *,
    shots: Sequence[Shot] = (), meaning: Meaning = str.strip, extract: Extract | None = None,
    confidence: float | None = 1.0, **settings: Unpack[TextSettings],
) -> Vote: ...  # fmt: skip
def self_consistency(
    model: Model, parts: Any, questions: Any, voting: VotingConfig | None = None, *, shots: Sequence[Shot] = (),
    meaning: Meaning = str.strip, extract: Extract | None = None, confidence: float | None = 1.0,
    **settings: Unpack[TextSettings],
) -> Any:  # fmt: skip
    """Answers a question, or each of a list, several times, and gives what most answers agree on.

    Wang et al. 2022 (arXiv:2203.11171). The votes are those of `Model.answer` with this sampling and `n`; they are
    drawn in rounds of as few as might decide, so that no more are drawn than one by one.

    Args:
        model: that answers.
        parts: as of `Model.answer`.
        questions: likewise.
        voting: how many answers at most, and how they are drawn; None: 8, at temperature 0.5.
        shots: see `few_shot`; with thoughts in their answers and `extract`, it is a vote of chains of thought.
        meaning: what is compared; by default the answer without space around it.
        extract: where in a text its answer is; see `think`. Texts without one agree with one another.
        confidence: 1 stops when the majority can't be overtaken any more: it means what that of all votes would. Less
            stops sooner, when the majority is one of all answers so probably (Aggarwal et al. 2023, arXiv:2305.11860,
            whose value is 0.95). None draws all.
        **settings: see `TextSettings`; those of sampling stand in the place of `voting`'s.

    Returns:
        A vote for each question; `Vote.num_votes` tells how many were drawn.

    Raises:
        ValueError: as of `few_shot`; or nothing is left to chance.
    """
    asker, voting = voter(model, voting, settings)
    check_extract(extract)
    check_confidence(confidence)
    prompts = [prompt for prompt, _ in asker.prompts(parts, questions, shots)]
    return as_given(questions, draw_votes(asker, prompts, voting.num_votes, meaning, extract, confidence))


def voter(model: Model, voting: VotingConfig | None, settings: TextSettings) -> tuple[Asker, VotingConfig]:
    """Who draws votes, and how.

    Raises:
        ValueError: nothing is left to chance.
    """
    voting = voting or VotingConfig()
    asker = Asker.of(model, settings, voting.sampling)
    return asker, replace(voting, sampling=asker.options.sampling)


def draw_votes(
    asker: Asker, prompts: Sequence[Document], num_votes: int, meaning: Meaning, extract: Extract | None,
    confidence: float | None,
) -> list[Vote]:  # fmt: skip
    """A vote for each prompt, all prompts' rounds together; see `self_consistency`."""
    drawn: list[list[TextResult]] = [[] for _ in prompts]
    texts: list[list[str]] = [[] for _ in prompts]
    meanings: list[list[Hashable]] = [[] for _ in prompts]
    while True:
        places = [
            place for place in range(len(prompts)) for _ in range(num_needed(meanings[place], num_votes, confidence))
        ]
        if not places:
            break
        number_of = [len(one) for one in drawn]
        numbers = []
        for place in places:
            numbers.append(try_number(number_of[place]))
            number_of[place] += 1
        for place, result in zip(places, asker.write([prompts[place] for place in places], numbers), strict=True):
            found = extracted(result.text, extract) if extract is not None else result.text
            drawn[place].append(result)
            texts[place].append("" if found is None else found)
            meanings[place].append(meaning(texts[place][-1]))
    return [replace(majority(said, meaning), **vars(Spent.of(of))) for said, of in zip(texts, drawn, strict=True)]


def num_needed(meanings: Sequence[Hashable], num_votes: int, confidence: float | None) -> int:
    """The fewest further votes after which a majority might be decided; 0: it is.

    Args:
        meanings: of the votes so far, in order.
        num_votes: at most.
        confidence: see `self_consistency`.
    """
    left = num_votes - len(meanings)
    if confidence is None:
        return left
    counts: dict[Hashable, int] = {}
    for meaning in meanings:
        counts[meaning] = counts.get(meaning, 0) + 1
    ranked = list(counts.values())  # in the order in which they were first drawn: the first wins a tie
    leader = max(range(len(ranked)), key=ranked.__getitem__) if ranked else 0
    lead = ranked[leader] if ranked else 0
    before, behind = max(ranked[:leader], default=-num_votes - 1), max(ranked[leader + 1 :], default=0)
    for more in range(left):
        could_get = left - more
        is_decided = lead + more > before + could_get and lead + more >= behind + could_get
        is_probable = confidence < 1 and lead + more and _surely(lead + more, max(before, behind, 0)) >= confidence
        if is_decided or is_probable:
            return more
    return left


def _surely(first: int, second: int) -> float:
    """How probably an answer that was drawn `first` times is the more probable one beside one drawn `second` times.

    That is P(p > 1/2) for p of the distribution Beta(first + 1, second + 1), in closed form: it is that of at most
    `first` heads among first + second + 1 tosses.
    """
    num_tosses = first + second + 1
    return sum(math.comb(num_tosses, heads) for heads in range(first + 1)) / 2**num_tosses


def check_confidence(confidence: Any) -> None:
    """Refuses what is no confidence.

    Raises:
        ValueError: it isn't between 1/2 and 1, nor None.
    """
    if confidence is not None:
        arguments.real("confidence", confidence, 0.5, 1.0)
