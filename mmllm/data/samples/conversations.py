"""Conversations: whose turn each segment is, and the document as the model's own chat template writes it.

What is trained on is what the assistant says, turn by turn. Where a template marks it by `{% generation %}` blocks, as
for transformers' `return_assistant_tokens_mask`, these are the targets. Else an answer is what the whole conversation
has behind the prompt that a model would be given for it; that prompt must be how the conversation begins, token by
token, since a model is asked with it.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mmllm_tokenizers.chat import ChatPiece, chat_pieces, marked_pieces
from mmllm_tokenizers.text import TextTokenizer

if TYPE_CHECKING:  # it imports torch, which reading rows does without
    from mmllm_tokenizers.folder import TokenizerFolder

ROLES = ("system", "user", "assistant", "tool")

CLOCK = datetime.datetime(2024, 7, 26)
"""What templates that write the date are told in training: a document must be the same each time that it is written."""

Flat = list[int | str]
"""A rendered conversation: ids, and "image" and "audio" where these stand."""


@dataclass(frozen=True)
class Said:
    """A segment of a conversation, without the picture or the sound."""

    role: str | None
    kind: Literal["text", "image", "audio"]
    text: str = ""
    new_turn: bool = False
    """Whether it begins a turn though the one before it is of the same role."""
    is_trained: bool = True
    """Of an answer."""

    @property
    def is_answer(self) -> bool:
        """Whether the assistant says it."""
        return self.role == "assistant"


def joined_texts(said: Sequence[Said]) -> list[str]:
    """Each segment's text as the task `chat` of templates.json writes it, "" of a picture or a sound.

    There the assistant speaks in turn with all others together: a line break parts the texts of turns that become one.
    """
    texts = []
    for number, segment in enumerate(said):
        before = said[number - 1] if number else None
        is_joined = (
            before is not None
            and before.kind == segment.kind == "text"
            and before.is_answer == segment.is_answer
            and (segment.new_turn or before.role != segment.role)
        )
        texts.append("\n" + segment.text if is_joined else segment.text)
    return texts


def template_pieces(said: Sequence[Said], folder: TokenizerFolder) -> list[ChatPiece]:
    """A conversation as the folder's own chat template writes it; `targets` are what is to be predicted.

    Raises:
        ValueError: the template refuses it, no answer is trained on, or an answer can't be told from the rest.
    """
    assert folder.chat_template is not None, "only folders with a chat template write conversations so"
    messages, trained = _messages(said)
    if not any(trained):
        raise ValueError("no answer of this conversation is trained on")
    pieces = marked_pieces(folder.text, folder.chat_template, messages, CLOCK)
    if pieces is not None:
        return _by_blocks(pieces, messages, trained, folder.text, folder.chat_template)
    return _by_prompts(messages, trained, folder.text, folder.chat_template)


def _messages(said: Sequence[Said]) -> tuple[list[dict[str, Any]], list[bool]]:
    """The turns as messages, and of each whether it is an answer that is trained on."""
    messages: list[dict[str, Any]] = []
    trained: list[bool] = []
    for number, segment in enumerate(said):
        role = segment.role or "user"
        if not number or segment.new_turn or messages[-1]["role"] != role:
            messages.append({"role": role, "content": []})
            trained.append(segment.is_answer and segment.is_trained)
        part = {"type": "text", "text": segment.text} if segment.kind == "text" else {"type": segment.kind}
        messages[-1]["content"].append(part)
    for message in messages:
        if all(part["type"] == "text" for part in message["content"]):
            message["content"] = "".join(part["text"] for part in message["content"])
    return messages, trained


# ------------------------------------------------------------------------------------------------- generation blocks
def _by_blocks(
    pieces: list[ChatPiece],
    messages: Sequence[dict[str, Any]],
    trained: Sequence[bool],
    text: TextTokenizer,
    template: str,
) -> list[ChatPiece]:
    """The pieces with the blocks of those answers alone that are trained on."""
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    flat, targets = _flat(pieces)
    runs = _runs(targets)
    if len(runs) == len(answers):
        ends = list(range(1, len(runs) + 1))
    else:  # a block of several pieces, or answers without one: counted in each beginning of the conversation
        ends = [_num_runs(messages[: number + 1], text, template) for number in answers]
    start = 0
    for answer, end in zip(answers, ends, strict=True):
        if trained[answer] and end <= start:
            raise ValueError(
                f"message {answer} (assistant) isn't within the generation block of the chat template; mend "
                f"chat_template.jinja, or set the turn's loss to false"
            )
        if not trained[answer]:
            for first, stop in runs[start:end]:
                targets[first:stop] = [False] * (stop - first)
        start = max(start, end)
    return _pieces(flat, targets)


def _num_runs(messages: Sequence[dict[str, Any]], text: TextTokenizer, template: str) -> int:
    pieces = marked_pieces(text, template, messages, CLOCK)
    return len(_runs(_flat(pieces)[1])) if pieces is not None else 0


def _runs(targets: Sequence[bool]) -> list[tuple[int, int]]:
    """(first, the one behind the last) of each run of targets."""
    runs: list[tuple[int, int]] = []
    for number, is_target in enumerate(targets):
        if is_target and number and targets[number - 1]:
            runs[-1] = (runs[-1][0], number + 1)
        elif is_target:
            runs.append((number, number + 1))
    return runs


# ----------------------------------------------------------------------------------------------------------- prompts
def _by_prompts(
    messages: Sequence[dict[str, Any]], trained: Sequence[bool], text: TextTokenizer, template: str
) -> list[ChatPiece]:
    """The whole conversation; of each answer that is trained on, what stands behind its prompt is to be predicted."""

    def written(count: int, is_prompt: bool) -> Flat:
        return _flat(chat_pieces(text, template, messages[:count], is_prompt, now=CLOCK))[0]

    whole = written(len(messages), False)
    targets = [False] * len(whole)
    for number, is_trained in enumerate(trained):
        if not is_trained:
            continue
        if not number:
            raise ValueError(
                "the conversation begins with the assistant, for which the chat template writes no prompt; leave that "
                "turn out, or set its loss to false"
            )
        prompt = written(number, True)
        if whole[: len(prompt)] != prompt:
            place = next((i for i, pair in enumerate(zip(prompt, whole, strict=False)) if pair[0] != pair[1]), 0)
            raise ValueError(
                f"the chat template writes what comes before message {number} (assistant) otherwise when it asks for "
                f"it than in the whole conversation, from token {place} on; mark what is to be learnt in "
                f"chat_template.jinja by {{% generation %}}"
            )
        stop = _answer_end(whole, len(prompt), written(number + 1, False), text)
        following = next((n for n in range(number + 1, len(messages)) if messages[n]["role"] == "assistant"), None)
        if stop is None or (following is not None and stop > len(written(following, True))):
            raise ValueError(
                f"where message {number} (assistant) ends can't be told in what the chat template writes; mark what is "
                f"to be learnt in chat_template.jinja by {{% generation %}}"
            )
        targets[len(prompt) : stop] = [isinstance(token, int) for token in whole[len(prompt) : stop]]
    return _pieces(whole, targets)


def _answer_end(whole: Flat, start: int, until: Flat, text: TextTokenizer) -> int | None:
    """Behind which token of the conversation an answer ends; None: that can't be told.

    Args:
        whole: the conversation.
        start: the answer's first token.
        until: the conversation as it is written to the end of the answer.
        text: whose end tokens no words can give.
    """
    if whole[: len(until)] != until:  # templates that write an answer otherwise where another follows
        return next((place + 1 for place in range(start, len(whole)) if whole[place] in text.end_ids), None)
    last = next((place for place in reversed(range(start, len(until))) if whole[place] in text.end_ids), None)
    if last is None or last + 1 == len(until):
        return len(until)
    behind = [token for token in until[last + 1 :] if isinstance(token, int)]
    return last + 1 if not text.decode(behind).strip() else len(until)


# ------------------------------------------------------------------------------------------------------------ pieces
def _flat(pieces: Sequence[ChatPiece]) -> tuple[Flat, list[bool]]:
    tokens: Flat = []
    targets: list[bool] = []
    for piece in pieces:
        tokens += piece.ids if piece.kind == "text" else (piece.kind,)
        targets += piece.targets if piece.kind == "text" else (False,)
    return tokens, targets


def _pieces(tokens: Flat, targets: Sequence[bool]) -> list[ChatPiece]:
    pieces: list[ChatPiece] = []
    ids: list[int] = []
    flags: list[bool] = []
    for token, is_target in [*zip(tokens, targets, strict=True), (None, False)]:
        if isinstance(token, int):
            ids.append(token)
            flags.append(is_target)
            continue
        if ids:
            pieces.append(ChatPiece("text", tuple(ids), tuple(flags)))
            ids, flags = [], []
        if token is not None:
            pieces.append(ChatPiece(token))  # pyright: ignore[reportArgumentType]
    return pieces
