"""Self-consistency: of several sampled answers to one prompt, the one that most of them agree on.

Wang et al. 2022, "Self-Consistency Improves Chain of Thought Reasoning in Language Models" (arXiv:2203.11171): the
unweighted majority of section 2, over any answer whose meaning a function tells, not only over final numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

from mmllm.checkpoints.settings import Sampling
from mmllm.data.samples.document import Document
from mmllm.inference.api import Model
from mmllm.inference.generate import generate_text
from mmllm.inference.text_settings import try_number

Meaning = Callable[[str], Hashable]
"""What is compared: texts of equal meaning vote together."""
_SAMPLING = Sampling(temperature=0.5)


@dataclass(frozen=True)
class VotingConfig:
    """How votes are drawn."""

    num_votes: int = 8
    """Answers drawn to each prompt."""
    sampling: Sampling = _SAMPLING

    def __post_init__(self) -> None:
        if self.num_votes < 1:
            raise ValueError(f"num_votes is {self.num_votes}; it must be at least 1")
        if self.sampling.temperature == 0:
            raise ValueError("temperature is 0, at which all votes are the same; give one above 0, such as 0.5")


@dataclass(frozen=True)
class Vote:
    """What most of the answers to a prompt agree on."""

    text: str
    """The commonest wording of it."""
    votes: int
    """Answers that mean the same."""
    agreement: float
    """Their share of all."""
    num_tokens: int
    """Tokens that were drawn for all answers together, their ends included, the prompt not."""
    num_prompt_tokens: int = 0
    """Positions of the answers' prompts; 0: not told."""
    num_cached_tokens: int = 0
    """Of these, those that the engine found in its cache."""

    def __str__(self) -> str:
        """The text."""
        return self.text

    @property
    def num_votes(self) -> int:
        """Answers that were drawn."""
        return round(self.votes / self.agreement)


def vote(
    model: Model,
    prompts: Sequence[Document],
    voting: VotingConfig,
    meaning: Meaning = str.strip,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Vote]:
    """Answers each prompt several times and gives what most answers agree on.

    An answer depends on the prompt's place, its own number and the seed alone: neither `batch_size` nor how many
    votes there are changes it, and those of the first prompt are what `Model` itself draws with this sampling and `n`.

    Args:
        model: that answers.
        prompts: as `Model.caption_prompt`, `question_prompt`, `continuation_prompt` and `chat_prompt` give them.
        voting: how many answers, and how they are drawn.
        meaning: what is compared; by default the text without space around it.
        max_new_tokens: of one answer; None: the model's default.
        batch_size: answers drawn at once; None: the model's default.
        progress: called with the number of answers that have become done.
    """
    if max_new_tokens is None:
        max_new_tokens = model.generation.max_new_tokens
    places = [place for place in range(len(prompts)) for _ in range(voting.num_votes)]
    numbers = [draw_number(place, draw) for place in range(len(prompts)) for draw in range(voting.num_votes)]
    answers = generate_text(
        model.model,
        model.tokenizer,
        [prompts[place] for place in places],
        voting.sampling,
        max_new_tokens,
        model.generation.batch_size if batch_size is None else batch_size,
        progress=progress,
        numbers=numbers,
    )
    texts = [model.tokenizer.text.decode(ids) for ids in answers]
    votes = []
    for start in range(0, len(texts), voting.num_votes):
        stop = start + voting.num_votes
        # an answer shorter than it may be has drawn its end, which is no part of its ids
        num_tokens = sum(min(len(ids) + 1, max_new_tokens) for ids in answers[start:stop])
        votes.append(replace(majority(texts[start:stop], meaning), num_tokens=num_tokens))
    return votes


def draw_number(place: int, draw: int) -> int:
    """The number by which a prompt's answers draw: that of the first is the prompt's place.

    Below 2**32, since of a seed PyTorch's generator keeps no more: numbers that differ above would draw the same.
    """
    return (place + try_number(draw)) % 2**32


def majority(texts: Sequence[str], meaning: Meaning = str.strip) -> Vote:
    """The meaning that most texts have, in its commonest wording; among equals the one that was drawn first.

    Returns:
        A vote whose `num_tokens` is 0: texts alone don't tell.

    Raises:
        ValueError: there are no texts.
    """
    if not texts:
        raise ValueError("there are no texts; a vote needs at least one")
    wordings: dict[Hashable, list[str]] = {}
    for text in texts:
        wordings.setdefault(meaning(text), []).append(text)
    agreed = max(wordings.values(), key=len)  # the first of the longest: dicts keep the order of drawing
    ((text, _),) = Counter(agreed).most_common(1)  # likewise
    return Vote(text, len(agreed), len(agreed) / len(texts), 0)
