"""Answers in conversations: the last answer of each is written anew, from the turns before it as they are.

A row is right where the answer is the row's, or one of its `accept`, a list of texts, or matches the whole of its
`answer_pattern`, a regular expression.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mmllm.data.rows.bad_rows import BadRows, ManifestError
from mmllm.data.rows.rows import Row
from mmllm.data.samples.document import Document
from mmllm.data.samples.sample import Segment
from mmllm.evaluation.answer_task import shuffled_segments
from mmllm.evaluation.asking import AskedModel
from mmllm.evaluation.metrics import text_meaning
from mmllm.evaluation.results import Prediction, TaskResult
from mmllm.evaluation.scoring import causes, greedy_settings, mean_scores
from mmllm.evaluation.shots import prompt_segments


@dataclass(frozen=True)
class ChatRow:
    """A conversation as it is scored."""

    row: Row
    """Its segments are those before the answer."""
    answer: str
    is_right: Callable[[str], bool]

    @classmethod
    def of(cls, row: Row) -> ChatRow:
        """Cuts a row before its last answer.

        Raises:
            ManifestError: it does not end in an answer of text that somebody asked for, or doesn't say well what is
                right.
        """
        segments = list(row.segments)
        answer: list[str] = []
        while segments and segments[-1].get("role") == "assistant":
            segment = segments.pop()
            if "text" not in segment:
                raise ManifestError("its last answer holds a picture or a sound; answers of text are scored")
            answer.insert(0, f"\n{segment['text']}" if segment.get("new_turn") else segment["text"])
        if not answer:
            raise ManifestError("it does not end with the assistant, whose last answer is scored")
        if not segments:
            raise ManifestError("it has nothing before the assistant's answer")
        wanted = "".join(answer)
        metadata = row.metadata
        asked = Row(row.id, row.kind, row.where, segments=tuple(segments), metadata=metadata)
        return cls(asked, wanted, _judge(wanted, metadata.get("accept"), metadata.get("answer_pattern")))

    def messages(self, parts: Sequence[Segment]) -> list[dict[str, Any]]:
        """The turns before the answer, as training has them.

        Args:
            parts: in the place of the row's own segments.
        """
        messages: list[dict[str, Any]] = []
        for segment, part in zip(self.row.segments, parts, strict=True):
            role = segment.get("role") or "user"
            if not messages or segment.get("new_turn") or messages[-1]["role"] != role:
                messages.append({"role": role, "content": []})
            messages[-1]["content"].append(part)
        return messages


def _judge(answer: str, accept: Any, pattern: Any) -> Callable[[str], bool]:
    """What tells whether a text is right."""
    if accept is None:
        accept = []
    if not isinstance(accept, list) or not all(isinstance(text, str) for text in accept):
        raise ManifestError(f"'accept' is {accept!r}; give a list of texts that are right too")
    right = {text_meaning(text) for text in (answer, *accept)}
    if pattern is None:
        return lambda text: text_meaning(text) in right
    if not isinstance(pattern, str):
        raise ManifestError(f"'answer_pattern' is {pattern!r}; give a regular expression")
    try:
        matches = re.compile(pattern, re.IGNORECASE).fullmatch
    except re.error as error:
        raise ManifestError(f"'answer_pattern' is {pattern!r}, which is no regular expression: {error}") from None
    return lambda text: text_meaning(text) in right or matches(text.strip()) is not None


def is_conversation(row: Row) -> bool:
    """Whether somebody answers in a row."""
    return any(segment.get("role") == "assistant" for segment in row.segments)


def chat_rows(rows: Sequence[Row], bad: BadRows, name: str) -> list[ChatRow]:
    """The rows that can be scored; others are named in `bad`."""
    kept, since = [], len(bad.reasons)
    for row in rows:
        try:
            kept.append(ChatRow.of(row))
        except ManifestError as error:
            bad.add(row.where, str(error))
    bad.check(len(rows), name, since)
    return kept


def evaluate_chat(
    model: AskedModel, rows: Sequence[ChatRow], batch_size: int, seed: int, controls: bool = True
) -> TaskResult:
    """Answers right, beside those given when pictures and sounds change places between rows, and blind."""
    settings = greedy_settings(model, [one.answer for one in rows], batch_size)
    plain = [one.row for one in rows]
    shown = [prompt_segments(row) for row in plain]
    prompts = [_prompt(model, one.messages(parts)) for one, parts in zip(rows, shown, strict=True)]
    answers = model.write(prompts, **settings)
    given = [("answer_accuracy", answers)]
    blind: Sequence[str | None] = [None] * len(rows)
    if controls:
        blind = model.write(prompts, blind=True, **settings)
        shuffled = [
            _prompt(model, one.messages(parts)) for one, parts in zip(rows, shuffled_segments(plain, seed), strict=True)
        ]
        given += [("shuffled_accuracy", model.write(shuffled, **settings)), ("blind_accuracy", blind)]
    media = causes(plain)
    scores: dict[str, Any] = {}
    for key, texts in given:
        matched = [one.is_right(text) for one, text in zip(rows, texts, strict=True)]
        scores |= mean_scores(key, matched, seed, media)
    scores["n"] = len(rows)
    predictions = [
        Prediction(
            one.row.id, one.answer, answer, float(one.is_right(answer)), one.is_right(answer), "test", without,
            question=_last_question(one.row),
            segments=[
                {kind: str(segment[kind]) for kind in ("text", "image", "audio") if kind in segment}
                for segment in one.row.segments
            ],
        )
        for one, answer, without in zip(rows, answers, blind, strict=True)
    ]  # fmt: skip
    return TaskResult("chat", scores, predictions)


def _prompt(model: AskedModel, messages: list[dict[str, Any]]) -> Document:
    """The prompt of a conversation; in the form of templates.json what a tool says is written as the user's."""
    if model.tokenizer.chat_template is None:
        messages = [{**message, "role": "user"} if message["role"] == "tool" else message for message in messages]
    return model.prompter.chat(messages)


def _last_question(row: Row) -> str | None:
    """The last text before the answer."""
    return next((segment["text"] for segment in reversed(row.segments) if "text" in segment), None)
