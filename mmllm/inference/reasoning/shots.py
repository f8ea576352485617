"""Few-shot prompts: questions that are answered, with their pictures and sounds, before the one that is asked.

Brown et al. 2020 (arXiv:2005.14165); with pictures between the text, Alayrac et al. 2022 (arXiv:2204.14198).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack, overload

from mmllm.inference.answering import as_given
from mmllm.inference.api import Model
from mmllm.inference.inputs import Part
from mmllm.inference.reasoning.asking import Asker, Reasoned, Shot
from mmllm.inference.text_settings import TextSettings


@dataclass(frozen=True, kw_only=True)
class Shown(Reasoned):
    """An answer behind shots.

    Attributes:
        shots: numbers of the shots that were shown.
        dropped: of those that there was no room for.
    """

    shots: tuple[int, ...]
    dropped: tuple[int, ...] = ()


@overload
def few_shot(
    model: Model, shots: Sequence[Shot], parts: list[Any], questions: list[str], *, max_length: int | None = None,
    **settings: Unpack[TextSettings],
) -> list[Shown]: ...  # fmt: skip
@overload
def few_shot(
    model: Model, shots: Sequence[Shot], parts: Part | list[Any], questions: str, *, max_length: int | None = None,
    **settings: Unpack[TextSettings],
) -> Shown: ...  # fmt: skip
def few_shot(
    model: Model, shots: Sequence[Shot], parts: Any, questions: Any, *, max_length: int | None = None,
    **settings: Unpack[TextSettings],
) -> Any:  # fmt: skip
    """Answers a question, or each of a list, as `Model.answer` does, behind questions that are answered.

    Shots are written as the model's own documents with their answers, or, where it has a chat template, as turns. The
    engine computes what prompts begin with alike once.

    Args:
        model: that answers.
        shots: (parts, question, answer) each.
        parts: as of `Model.answer`.
        questions: likewise.
        max_length: positions of a prompt and its answer together; the longest shots are left out until they have room,
            which the result tells. None: as the engine is bound (`GenerationConfig.max_length`).
        **settings: see `TextSettings`.

    Raises:
        ValueError: a shot is none, parts and questions differ in number, or a part can't be read.
    """
    asker = Asker.of(model, settings)
    prompts = asker.prompts(parts, questions, shots, max_length=max_length)
    documents = [prompt for prompt, _ in prompts]
    results = asker.write_alike(documents) if shots else asker.write(documents)
    answers = [
        Shown(
            text=result.text,
            num_tokens=result.cost.num_new_tokens,
            num_prompt_tokens=result.cost.num_prompt_tokens,
            num_cached_tokens=result.cost.num_cached_tokens,
            shots=shown.kept,
            dropped=shown.dropped,
        )
        for result, (_, shown) in zip(results, prompts, strict=True)
    ]
    return as_given(questions, answers)
