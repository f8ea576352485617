"""Chain of thought: the model writes how it gets to an answer before it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack, overload

from mmllm.inference import arguments
from mmllm.inference.answering import as_given
from mmllm.inference.api import Model
from mmllm.inference.inputs import Part
from mmllm.inference.prompts import join
from mmllm.inference.reasoning.asking import Asker, Extract, Reasoned, Shot, Spent, check_extract, extracted
from mmllm.inference.text_settings import TextSettings

ANSWER = r"(?i)\banswer is:?\s+(.+?)\s*(?:[.\n]|$)"
"""Where an answer is told behind shots whose answers end so."""


@dataclass(frozen=True)
class ThinkConfig:
    """How a thought is begun and ended.

    Attributes:
        trigger: what the model's text begins with. (The best of those that Kojima et al. tried.)
        answer_trigger: what is put behind its thought, for the answer to follow.
        max_thought_tokens: of a thought at most.
    """

    trigger: str = "Let's think step by step."
    answer_trigger: str = "\nTherefore, the answer is"
    max_thought_tokens: int = 128

    def __post_init__(self) -> None:
        arguments.text("trigger", self.trigger)
        arguments.text("answer_trigger", self.answer_trigger)
        arguments.whole("max_thought_tokens", self.max_thought_tokens, 1)


@dataclass(frozen=True, kw_only=True)
class Thought(Reasoned):
    """An answer with the thought that led to it.

    Attributes:
        rationale: the thought, its trigger included; with shots, all that was written.
        is_found: False: no answer was found where it was looked for, and `text` is all that was written there.
        shots: numbers of the shots that were shown.
        dropped: of those that there was no room for.
    """

    rationale: str
    is_found: bool
    shots: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()


@overload
def think(
    model: Model, parts: list[Any], questions: list[str], *, shots: Sequence[Shot] = (),
    config: ThinkConfig | None = None, extract: Extract | None = None, max_length: int | None = None,
    **settings: Unpack[TextSettings],
) -> list[Thought]: ...  # fmt: skip
@overload
def think(
    model: Model, parts: Part | list[Any], questions: str, *, shots: Sequence[Shot] = (),
    config: ThinkConfig | None = None, extract: Extract | None = None, max_length: int | None = None,
    **settings: Unpack[TextSettings],
) -> Thought: ...  # fmt: skip
def think(
    model: Model, parts: Any, questions: Any, *, shots: Sequence[Shot] = (), config: ThinkConfig | None = None,
    extract: Extract | None = None, max_length: int | None = None, **settings: Unpack[TextSettings],
) -> Any:  # fmt: skip
    """Answers a question, or each of a list, after a thought.

    Without shots the model is asked twice (Kojima et al. 2022, arXiv:2205.11916): its text begins with
    `config.trigger`, and to what it thinks then `config.answer_trigger` is added, behind which it answers. The second
    prompt begins with the first one, which the engine has in its cache.

    With shots, whose answers tell a thought and end in "The answer is …." (Wei et al. 2022, arXiv:2201.11903), it is
    asked once, and the answer is found in what it writes.

    Args:
        model: that answers.
        parts: as of `Model.answer`.
        questions: likewise.
        shots: (parts, question, thought and answer) each.
        config: how a thought is begun and ended; None: as the papers do.
        extract: where the answer is in what is written for it: a regular expression, whose last match counts (its
            first group, if it has one), or a function that gives it or None. None: without shots all of it; with
            shots, what follows "answer is".
        max_length: see `few_shot`.
        **settings: see `TextSettings`; what bounds or constrains a text is of the answer alone, without shots.

    Raises:
        ValueError: as of `few_shot`; or there is no room for a thought.
    """
    check_extract(extract)
    asker, config = Asker.of(model, settings), config or ThinkConfig()
    if shots:
        return as_given(questions, _shown(asker, parts, questions, shots, config, extract, max_length))
    return as_given(questions, _asked_twice(asker, parts, questions, config, extract, max_length))


def _shown(
    asker: Asker, parts: Any, questions: Any, shots: Sequence[Shot], config: ThinkConfig, extract: Extract | None,
    max_length: int | None,
) -> list[Thought]:  # fmt: skip
    room = config.max_thought_tokens + asker.options.max_new_tokens
    prompts = asker.prompts(parts, questions, shots, room, max_length)
    results = asker.longer(config.max_thought_tokens).write_alike([prompt for prompt, _ in prompts])
    thoughts = []
    for result, (_, shown) in zip(results, prompts, strict=True):
        found = extracted(result.text, ANSWER if extract is None else extract)
        thoughts.append(
            Thought(
                text=result.text.strip() if found is None else found,
                num_tokens=result.cost.num_new_tokens,
                num_prompt_tokens=result.cost.num_prompt_tokens,
                num_cached_tokens=result.cost.num_cached_tokens,
                rationale=result.text,
                is_found=found is not None,
                shots=shown.kept,
                dropped=shown.dropped,
            )
        )
    return thoughts


def _asked_twice(
    asker: Asker, parts: Any, questions: Any, config: ThinkConfig, extract: Extract | None, max_length: int | None
) -> list[Thought]:
    trigger, cue = asker.written(config.trigger), asker.written(config.answer_trigger)
    begun = [join([prompt, trigger]) for prompt, _ in asker.prompts(parts, questions)]
    most = config.max_thought_tokens
    bound = asker.max_length if max_length is None else arguments.whole("max_length", max_length, 2)
    if bound is not None and begun:
        longest = max(prompt.num_tokens for prompt in begun)
        most = min(most, bound - longest - cue.num_tokens - asker.options.max_new_tokens)
        if most < 1:
            raise ValueError(
                f"a prompt of {longest} tokens and an answer of {asker.options.max_new_tokens} leave no room for a "
                f"thought: max_length is {bound}; lower max_new_tokens, or shorten the prompt"
            )
    thoughts = asker.free(most).write(begun)
    prompts = [join([prompt, asker.of_ids(thought.ids), cue]) for prompt, thought in zip(begun, thoughts, strict=True)]
    answers = []
    for thought, result in zip(thoughts, asker.write(prompts), strict=True):
        spent, found = Spent.of([thought, result]), extracted(result.text, extract)
        answers.append(
            Thought(
                text=result.text.strip() if found is None else found,
                **vars(spent),
                rationale=config.trigger + thought.text,
                is_found=found is not None,
            )
        )
    return answers
