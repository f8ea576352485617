"""Templates of tasks: what they hold, and how many tokens they add; a conversation's turns."""

from __future__ import annotations

import string
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.text import TextTokenizer

VOICE_DROP = 5
"""The voice is left out of one `speak` document in this many, so that speaking works without one."""


def template_of(task: str, folder: TokenizerFolder) -> dict[str, str]:
    """The folder's `prompt` and `target` of a task.

    Raises:
        ValueError: It has none.
    """
    if task not in folder.templates:
        raise ValueError(f"task is {task!r}; the tokenizer has templates for {', '.join(sorted(folder.templates))}")
    return folder.templates[task]


@lru_cache(maxsize=256)
def literal_ids(text: TextTokenizer, literal: str) -> tuple[int, ...]:
    """Ids of a template's own text."""
    return tuple(text.encode_template(literal))


@lru_cache(maxsize=256)
def parse_template(template: str) -> tuple[tuple[str, str | None], ...]:
    """Its pieces: text, and the field that follows it, if any."""
    return tuple((literal, name) for literal, name, _, _ in string.Formatter().parse(template))


def check_template(template: str) -> None:
    """Refuse what isn't written as Python's format strings are.

    Raises:
        ValueError: A brace is without the other, or nothing is between them.
    """
    if any(name == "" for _, name in parse_template(template)):
        raise ValueError("a field is without a name")


def template_tokens(task: str, template: Mapping[str, str], folder: TokenizerFolder) -> int:
    """How many tokens more than by the folder's template a document has.

    Raises:
        ValueError: The template has other fields, so that token counts don't tell.
    """
    counts, fields = [], []
    for parts in (template_of(task, folder), template):
        pieces = parse_template(parts["prompt"] + parts["target"])
        fields.append(sorted(name for _, name in pieces if name is not None))
        literals = [text for part in parts.values() for text, _ in parse_template(part) if text]
        counts.append(sum(len(literal_ids(folder.text, text)) for text in literals))
    if fields[0] != fields[1]:
        raise ValueError(f"its template for {task} has the fields {fields[1]}; it must have {fields[0]}, each once")
    return counts[1] - counts[0]


def chat_pieces(
    roles: Sequence[str | None], folder: TokenizerFolder, template: Mapping[str, str] | None = None
) -> list[tuple[str, int]]:
    """A conversation as the chat template writes it: template text, or "" and the number of a segment.

    The assistant's segments stand where the template has `{text}`, everybody else's where it has `{segments}`.
    Each run of one role is a turn; a conversation that begins with the assistant begins with an empty question.
    """
    template = template or template_of("chat", folder)
    asked, before = _around(template["prompt"], "segments")
    opened, ended = _around(template["target"], "text")
    before += opened
    pieces: list[tuple[str, int]] = []
    is_open, last = False, None
    for number, role in enumerate(roles):
        answers = role == "assistant"
        if answers != last:
            if not answers:
                pieces += [(ended, -1)] * (last is True) + [(asked, -1)]
                is_open = True
            else:
                pieces += [] if is_open else [(asked, -1)]
                pieces.append((before, -1))
                is_open = False
            last = answers
        pieces.append(("", number))
    return [*pieces, (ended if last else before, -1)]


def _around(template: str, field: str) -> tuple[str, str]:
    """The text of a template before and behind a field."""
    parts = {False: "", True: ""}
    is_behind = False
    for literal, name in parse_template(template):
        parts[is_behind] += literal
        is_behind = is_behind or name == field
    return parts[False], parts[True]


def interleaved_question(folder: TokenizerFolder) -> str:
    """How an interleaved row with a question is written, all of whose text is to be predicted."""
    return template_of("interleaved", folder)["prompt"] + "{segments}<|question|>{question}<|answer|>{answer}<|end|>"


def spoken_voice(key: str | None, metadata: dict[str, Any]) -> str:
    """The voice as the `speak` template renders it: "" for one document in `VOICE_DROP`, by its key if it has one."""
    if key is not None and zlib.crc32(key.encode()) % VOICE_DROP == 0:
        return ""
    speaker = metadata.get("speaker")
    return "" if speaker is None else str(speaker)
