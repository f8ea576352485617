"""Tree search: texts that grow step by step, the best ones first, within a budget of tokens.

Yao et al. 2023, "Tree of Thoughts" (arXiv:2305.10601): steps are sampled ("i.i.d." in their section 3) and searched
best first or breadth first with a beam. A node's value is the mean log-probability of its text, or what a function
says of it, where they ask the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack, overload

from mmllm.checkpoints.settings import Sampling
from mmllm.data.samples.document import Document
from mmllm.inference import arguments
from mmllm.inference.answering import as_given
from mmllm.inference.api import Model
from mmllm.inference.engine.requests import TextResult
from mmllm.inference.inputs import Part
from mmllm.inference.prompts import join
from mmllm.inference.reasoning.asking import Asker, Reasoned, Shot, Spent
from mmllm.inference.text_settings import TextSettings, try_number

Value = Callable[[str], float]
"""How good a text is so far; more is better."""
_SAMPLING = Sampling(temperature=0.7)


@dataclass(frozen=True)
class TreeConfig:
    """How a tree grows.

    Attributes:
        budget: tokens that are drawn for a question at most, all of the tree together.
        branches: continuations that are drawn of a text.
        step_tokens: of a continuation at most.
        separator: text behind which a continuation ends; "": only at `step_tokens`.
        beam: how many texts of equal depth are kept; None: none is left out, and the best one grows first.
    """

    budget: int = 128
    branches: int = 4
    step_tokens: int = 16
    separator: str = "\n"
    beam: int | None = None

    def __post_init__(self) -> None:
        for name in ("budget", "branches", "step_tokens"):
            arguments.whole(name, getattr(self, name), 1)
        arguments.text("separator", self.separator)
        if self.beam is not None:
            arguments.whole("beam", self.beam, 1)


@dataclass(frozen=True, kw_only=True)
class TreeAnswer(Reasoned):
    """The best text of a tree.

    Attributes:
        path: its steps.
        value: its own.
        num_nodes: of the tree, its root apart.
        is_finished: False: the budget was spent before any text had ended.
    """

    path: tuple[str, ...]
    value: float
    num_nodes: int
    is_finished: bool


@overload
def tree_search(
    model: Model, parts: list[Any], questions: list[str], config: TreeConfig | None = None, *,
    value: Value | None = None, shots: Sequence[Shot] = (), **settings: Unpack[TextSettings],
) -> list[TreeAnswer]: ...  # fmt: skip
@overload
def tree_search(
    model: Model, parts: Part | list[Any], questions: str, config: TreeConfig | None = None, *,
    value: Value | None = None, shots: Sequence[Shot] = (), **settings: Unpack[TextSettings],
) -> TreeAnswer: ...  # fmt: skip
def tree_search(
    model: Model, parts: Any, questions: Any, config: TreeConfig | None = None, *, value: Value | None = None,
    shots: Sequence[Shot] = (), **settings: Unpack[TextSettings],
) -> Any:  # fmt: skip
    """Answers a question, or each of a list, by the best text that is found within a budget of tokens.

    It ends when the best text has ended, or the budget is spent: never is a token more drawn.

    Args:
        model: that answers.
        parts: as of `Model.answer`.
        questions: likewise.
        config: how the tree grows; None: as `TreeConfig` is.
        value: how good a text is, whole or begun; None: the mean log-probability of its tokens.
        shots: see `few_shot`.
        **settings: see `TextSettings`; the temperature is 0.7 unless told, and no text is longer than
            `max_new_tokens`.

    Raises:
        ValueError: as of `few_shot`; a setting constrains the text, which a step can't go on with; or nothing is left
            to chance.
    """
    config, asker = config or TreeConfig(), Asker.of(model, settings, _SAMPLING)
    sampling = asker.options.sampling
    if asker.options.constraint is not None:
        raise ValueError(f"{asker.options.constraint[0]} constrains a text from its beginning, and a tree's texts are "
                         f"written step by step; leave it out, or give a value of texts")  # fmt: skip
    if sampling.has_penalties:
        raise ValueError("penalties count a text's tokens, and a tree's texts are written step by step; leave them out")
    if config.branches > 1 and (sampling.temperature == 0 or sampling.top_k == 1):
        raise ValueError(
            f"branches is {config.branches}, but nothing is left to chance, so that all are the same; give a "
            f"temperature above 0"
        )
    asker = replace(asker, options=replace(asker.options, num_logprobs=asker.options.num_logprobs or 0))
    trees = [_Tree(asker, prompt, config, value) for prompt, _ in asker.prompts(parts, questions, shots)]
    while True:
        wanted = [(tree, tree.wanted()) for tree in trees]
        asked = [step for _, steps in wanted for step in steps]
        if not asked:
            break
        results = iter(_written(asker, asked, config.separator))
        for tree, steps in wanted:
            tree.grow([(step, next(results)) for step in steps])
    return as_given(questions, [tree.answer() for tree in trees])


@dataclass(frozen=True, eq=False)
class _Node:
    """A text of the tree, whole or begun."""

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    path: tuple[str, ...]
    value: float
    is_finished: bool


@dataclass(frozen=True)
class _Step:
    """A continuation that is to be drawn."""

    node: _Node
    prompt: Document
    max_new_tokens: int
    number: int


class _Tree:
    """One question's."""

    def __init__(self, asker: Asker, prompt: Document, config: TreeConfig, value: Value | None) -> None:
        self._asker, self._prompt, self._config, self._value = asker, prompt, config, value
        self._leaves = [_Node("", (), (), (), -math.inf, False)]
        self._num_nodes = self._num_drawn = 0
        self._spent = Spent()

    def wanted(self) -> list[_Step]:
        """What is to be drawn next; nothing: the search has ended."""
        config, left = self._config, self._config.budget - self._spent.num_tokens
        self._leaves.sort(key=lambda node: -node.value)  # among equals the one that was drawn first
        best = self._leaves[: config.beam or 1]
        if config.beam is not None:
            self._leaves = best
        steps: list[_Step] = []
        for node in best:
            most = 0 if node.is_finished else min(config.step_tokens, self._room(node), left)
            num_branches = min(config.branches, left // most) if most else 0
            if not num_branches:
                continue
            left -= num_branches * most
            prompt = self._asker.of_ids(node.ids)
            prompt = join([self._prompt, prompt]) if node.ids else self._prompt
            for _ in range(num_branches):
                steps.append(_Step(node, prompt, most, try_number(self._num_drawn)))
                self._num_drawn += 1
        return steps

    def _room(self, node: _Node) -> int:
        """Tokens that a text may still have."""
        options, most = self._asker.options, self._asker.max_length
        room = options.max_new_tokens - len(node.ids)
        return room if most is None else min(room, most - self._prompt.num_tokens - len(node.ids))

    def grow(self, drawn: Sequence[tuple[_Step, TextResult]]) -> None:
        """Takes continuations in; those of a text that are the same are one."""
        if not drawn:
            return
        spent = Spent.of([result for _, result in drawn])
        self._spent = Spent(*(a + b for a, b in zip(vars(self._spent).values(), vars(spent).values(), strict=True)))
        assert self._spent.num_tokens <= self._config.budget, "a continuation was longer than it may be"
        grown = {id(step.node) for step, _ in drawn}
        self._leaves = [node for node in self._leaves if id(node) not in grown]
        seen: set[tuple[int, ...]] = set()
        for step, result in drawn:
            child = self._child(step, result)
            key = (*child.ids, -1 if child.is_finished else -2)
            if key not in seen:
                seen.add(key)
                self._leaves.append(child)
                self._num_nodes += 1

    def _child(self, step: _Step, result: TextResult) -> _Node:
        assert result.logprobs is not None
        ids, logprobs = step.node.ids + result.ids, step.node.logprobs + result.logprobs
        is_step = result.stop is not None and result.stop == self._config.separator
        is_finished = result.finish_reason == "stop" and not is_step
        if result.stop is None or is_step:
            text = self._asker.tokenizer.text.decode(list(ids))  # a character may have begun in the step before
        else:
            text = step.node.text + result.text  # without the stop string
        value = math.fsum(logprobs) / len(logprobs) if self._value is None else float(self._value(text))
        if math.isnan(value):
            raise ValueError(f"the value of {text!r} is not a number; give one that can be compared")
        node = _Node(text, ids, logprobs, (*step.node.path, result.text), value, is_finished)
        return replace(node, is_finished=True) if not is_finished and self._room(node) < 1 else node

    def answer(self) -> TreeAnswer:
        """The best text that has ended; where none has, the best one."""
        ended = [node for node in self._leaves if node.is_finished]
        best = max(ended or self._leaves, key=lambda node: node.value)
        return TreeAnswer(
            text=best.text.strip(), **vars(self._spent), path=best.path, value=best.value, num_nodes=self._num_nodes,
            is_finished=best.is_finished,
        )  # fmt: skip


def _written(asker: Asker, steps: Sequence[_Step], separator: str) -> list[TextResult]:
    """All trees' continuations, together."""
    requests = []
    for step in steps:
        (request,) = asker.options.requests(step.prompt, None)
        most = step.max_new_tokens
        least = min(most, max(0, request.min_new_tokens - len(step.node.ids)))
        stop = (separator, *request.stop) if separator else request.stop
        requests.append(replace(request, max_new_tokens=most, min_new_tokens=least, stop=stop, number=step.number))
    return asker.run(requests)
