"""What all reasoning helpers share: questions with shots as prompts, prompts as texts, answers within texts, the cost.

A model with a chat template is asked in turns, others by the task `question`, as training wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

from mmllm.checkpoints.settings import Sampling
from mmllm.data.samples.document import Document, DocumentWriter
from mmllm.data.samples.documents import build_answer
from mmllm.data.samples.sample import Segment
from mmllm.inference import arguments
from mmllm.inference.api import Model
from mmllm.inference.engine.requests import ConstraintMaker, TextRequest, TextResult
from mmllm.inference.prompts import behind_shots, join
from mmllm.inference.text_settings import TextOptions, text_options
from mmllm_tokenizers.folder import TokenizerFolder

Shot = tuple[Any, str, str]
"""A question that is answered: its parts, as `Model.answer` takes them, the question, and the answer."""
Extract = str | Callable[[str], str | None]
"""Where in a text the answer is: a regular expression, or a function that gives it, or None where there is none."""


@dataclass(frozen=True, kw_only=True)
class Reasoned:
    """An answer, with what it took. It prints as its text.

    Attributes:
        text: the answer.
        num_tokens: that were drawn for it, ends included.
        num_prompt_tokens: positions of all prompts that were asked for it.
        num_cached_tokens: of these, those that the engine found in its cache.
    """

    text: str
    num_tokens: int
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0

    def __str__(self) -> str:
        """The text."""
        return self.text


@dataclass(frozen=True)
class Spent:
    """What several requests cost together."""

    num_tokens: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0

    @staticmethod
    def of(results: Sequence[TextResult]) -> Spent:
        """The sum over results."""
        costs = [result.cost for result in results]
        return Spent(
            sum(cost.num_new_tokens for cost in costs),
            sum(cost.num_prompt_tokens for cost in costs),
            sum(cost.num_cached_tokens for cost in costs),
        )


@dataclass(frozen=True)
class Shots:
    """The shots of a prompt.

    Attributes:
        given: all.
        kept: numbers of those that are in it.
        dropped: of those that it had no room for.
    """

    given: Sequence[Shot] = ()
    kept: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()


@dataclass(frozen=True)
class Asker:
    """Asks a model.

    Attributes:
        model: any.
        options: how its texts are drawn.
        maker: what they may be.
    """

    model: Model
    options: TextOptions
    maker: ConstraintMaker | None = field(default=None, repr=False)

    @staticmethod
    def of(model: Model, settings: Mapping[str, Any], sampling: Sampling | None = None) -> Asker:
        """With `TextSettings`; what is left out comes from `sampling` and the model.

        Raises:
            ValueError: a setting is wrong, or chooses among several texts, which these helpers do themselves.
        """
        defaults = model.generation if sampling is None else replace(model.generation, text=sampling)
        options = text_options(settings, defaults, model.tokenizer)
        if options.num_tries > 1 or options.num_beams > 1:
            name = "best_of" if options.num_tries > 1 else "num_beams"
            raise ValueError(f"{name} chooses among several texts, as these helpers do themselves; leave it out")
        return Asker(model, options, options.compiled(model.tokenizer))

    @property
    def tokenizer(self) -> TokenizerFolder:
        """Of the model."""
        return self.model.tokenizer

    @property
    def max_length(self) -> int | None:
        """Positions of a prompt and its text; None: any number."""
        return self.model.engine.config.max_length

    def greedy(self) -> Asker:
        """The same, with nothing left to chance."""
        return replace(self, options=replace(self.options, sampling=replace(self.options.sampling, temperature=0.0)))

    def free(self, max_new_tokens: int) -> Asker:
        """The same for a text before the answer: whatever it says, of this length at most."""
        options = replace(self.options, max_new_tokens=max_new_tokens, min_new_tokens=0, stop=(), stop_ids=())
        return replace(self, options=options, maker=None)

    def longer(self, num_more: int) -> Asker:
        """The same, with so many more tokens at most."""
        return replace(self, options=replace(self.options, max_new_tokens=self.options.max_new_tokens + num_more))

    def write_alike(self, prompts: Sequence[Document]) -> list[TextResult]:
        """A text behind each of prompts that begin alike: what the first one began with, the others have cached."""
        return [*self.write(prompts[:1]), *self.write(prompts[1:])]

    def write(self, prompts: Sequence[Document], numbers: Sequence[int] | None = None) -> list[TextResult]:
        """A text behind each prompt; equal prompts draw apart by their `numbers`."""
        requests = [self.options.requests(prompt, self.maker)[0] for prompt in prompts]
        if numbers is not None:
            requests = [replace(one, number=number) for one, number in zip(requests, numbers, strict=True)]
        return self.run(requests)

    def run(self, requests: Sequence[TextRequest]) -> list[TextResult]:
        """What the engine gives."""
        return cast("list[TextResult]", self.model.engine.run(requests))

    def written(self, text: str) -> Document:
        """Text as the model might have written it, to be put behind a prompt."""
        return self.of_ids(self.tokenizer.text.encode(text))

    def of_ids(self, ids: Sequence[int]) -> Document:
        """Likewise, of ids."""
        writer = DocumentWriter(self.tokenizer)
        writer.ids(ids, is_target=True)
        return writer.finish()

    def prompts(
        self, parts: Any, questions: Any, shots: Sequence[Shot] = (), room: int | None = None,
        max_length: int | None = None,
    ) -> list[tuple[Document, Shots]]:  # fmt: skip
        """A prompt of each question behind the shots; the longest shots are left out until there is room.

        Args:
            parts: what a question is about; with a list of questions, a list of these.
            questions: one, or a list.
            shots: questions that are answered.
            room: tokens that come behind a prompt; None: the most new tokens.
            max_length: positions of a prompt and what comes behind it; None: as the engine is bound.

        Raises:
            ValueError: parts and questions differ in number, a shot is none, or something can't be read.
        """
        many, asked = paired(parts, questions)
        check_shots(shots)
        most = self.max_length if max_length is None else arguments.whole("max_length", max_length, 2)
        room = self.options.max_new_tokens if room is None else room
        said = self._shot_documents(shots)
        lengths = [document.num_tokens for document in said]
        made = []
        for about, question in zip(many, asked, strict=True):
            joined = partial(self._joined, shots, said, about, question)
            prompt, kept = behind_shots(lengths, joined, room, most)
            dropped = tuple(shot for shot in range(len(shots)) if shot not in kept)
            made.append((prompt, Shots(shots, kept, dropped)))
        return made

    @property
    def _takes_turns(self) -> bool:
        return self.tokenizer.chat_template is not None

    def _shot_documents(self, shots: Sequence[Shot]) -> list[Document]:
        """Each shot by itself: what is put together, or, of turns, what tells how long they are."""
        if self._takes_turns:
            return [self.model.chat_prompt([_user(about, question)]) for about, question, _ in shots]
        return [
            join([self.model.question_prompt(about, question), build_answer("question", self.tokenizer, answer)])
            for about, question, answer in shots
        ]

    def _joined(
        self, shots: Sequence[Shot], said: Sequence[Document], about: Any, question: str, kept: Sequence[int]
    ) -> Document:
        if not self._takes_turns:
            return join([*(said[shot] for shot in kept), self.model.question_prompt(about, question)])
        messages: list[Mapping[str, Any]] = []
        for shot in kept:
            messages += [_user(*shots[shot][:2]), {"role": "assistant", "content": shots[shot][2]}]
        return self.model.chat_prompt([*messages, _user(about, question)])


def paired(parts: Any, questions: Any) -> tuple[list[Any], list[str]]:
    """What each question is about, and the questions.

    Raises:
        ValueError: they differ in number, or a question is no text.
    """
    many, asked = (parts, questions) if isinstance(questions, list) else ([parts], [questions])
    if not isinstance(many, list) or len(many) != len(asked):
        num_parts = len(many) if isinstance(many, list) else 1
        raise ValueError(f"there are {len(asked)} questions but parts for {num_parts}; give parts for each")
    return many, [arguments.text(f"questions[{place}]", one) for place, one in enumerate(asked)]


def check_shots(shots: Any) -> None:
    """Refuses what is no list of shots.

    Raises:
        ValueError: it is.
    """
    wanted = "(parts, question, answer)"
    if not isinstance(shots, Sequence) or isinstance(shots, (str, bytes)):
        raise arguments.wrong("shots", shots, f"a list of {wanted}")
    for place, shot in enumerate(shots):
        if not isinstance(shot, tuple) or len(shot) != 3:
            raise arguments.wrong(f"shots[{place}]", shot, wanted)
        arguments.text(f"shots[{place}]'s question", shot[1])
        arguments.text(f"shots[{place}]'s answer", shot[2])


def check_extract(extract: Any) -> None:
    """Refuses what can't find an answer in a text.

    Raises:
        ValueError: it is neither a function nor a regular expression.
    """
    if isinstance(extract, str):
        try:
            re.compile(extract)
        except re.error as error:
            raise ValueError(f"extract is {extract!r}, no regular expression ({error}); mend it") from None
    elif extract is not None and not callable(extract):
        raise arguments.wrong("extract", extract, "a regular expression or a function")


def extracted(text: str, extract: Extract | None) -> str | None:
    """The answer in a text: an expression's last match (its first group, if it has one); None: there is none.

    (The last: who thinks aloud may take an answer back.) Without `extract` it is the text, without space around it.
    """
    if extract is None:
        return text.strip()
    if not isinstance(extract, str):
        return extract(text)
    found = None
    for match in re.finditer(extract, text):
        found = match.group(1) if match.re.groups else match.group()
    return None if found is None else found.strip()


def _user(about: Any, question: str) -> dict[str, Any]:
    parts = about if isinstance(about, list) else [about]
    return {"role": "user", "content": [*parts, Segment(text=question)]}
