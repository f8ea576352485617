"""What a written text may be: one of some choices, a text that a pattern matches, or JSON that follows a schema.

Each function makes a `ConstraintMaker` for `TextRequest.constraint`. Any tokens that spell the text are allowed.
Patterns and schemas need xgrammar (`pip install 'mmllm[constraints]'`), choices nothing more.

Shapes: V ids of text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmllm.inference.engine.token_texts import token_texts
from mmllm.inference.grammars import Grammar, compiler_of
from mmllm.inference.json_schemas import schema_text
from mmllm_tokenizers.folder import TokenizerFolder

COMPILE_SECONDS = 10.0
MAX_CHOICES = 10_000
MAX_CHOICE_BYTES = 1_000_000
MAX_PATTERN_CHARACTERS = 8192


def choices(tokenizer: TokenizerFolder, texts: Sequence[str]) -> Choices:
    """The text is one of these.

    Raises:
        ValueError: there is none, one isn't text, they are too many or too long, or the tokenizer can't write one.
    """
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise ValueError(f"choices are {type(texts).__name__}; wanted a list of texts")
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong or not texts:
        raise ValueError(f"choices are {f'{wrong[0]!r} among others' if wrong else 'none'}; wanted one text or more")
    if len(texts) > MAX_CHOICES:
        raise ValueError(f"there are {len(texts)} choices; give at most {MAX_CHOICES}")
    return _choices(tokenizer, tuple(texts))


def regex(tokenizer: TokenizerFolder, pattern: str, seconds: float = COMPILE_SECONDS) -> Grammar:
    r"""The pattern matches the whole text.

    It is read as JavaScript does: `\d`, `\w` and `\s` are of ASCII. Look-arounds, back references, word boundaries and
    flags are refused.

    Args:
        tokenizer: of the model.
        pattern: a regular expression.
        seconds: how long compiling it may take.

    Raises:
        ValueError: it is no such pattern, or compiling it takes too long or too much memory.
        TimeoutError: other grammars are being compiled.
        ModuleNotFoundError: without xgrammar.
    """
    if not isinstance(pattern, str):
        raise ValueError(f"the regular expression is {type(pattern).__name__}; wanted text")
    _check_unicode("the regular expression", pattern)
    if len(pattern) > MAX_PATTERN_CHARACTERS:
        raise ValueError(
            f"the regular expression has {len(pattern)} characters; at most {MAX_PATTERN_CHARACTERS} are compiled"
        )
    return compiler_of(tokenizer).compile("regex", _without_line_ends(pattern), seconds)


def json_schema(tokenizer: TokenizerFolder, schema: Mapping[str, Any], seconds: float = COMPILE_SECONDS) -> Grammar:
    """The text is JSON that follows the schema; its objects have no other properties, in the schema's order.

    Args:
        tokenizer: of the model.
        schema: a JSON schema. What of it can't be followed is refused, by name.
        seconds: how long compiling it may take.

    Raises:
        ValueError: it is no such schema, is too large or too deep, or compiling it takes too long or too much memory.
        TimeoutError: other grammars are being compiled.
        ModuleNotFoundError: without xgrammar.
    """
    return compiler_of(tokenizer).compile("json_schema", schema_text(schema), seconds)


def json_object(tokenizer: TokenizerFolder, seconds: float = COMPILE_SECONDS) -> Grammar:
    """The text is a JSON object, of any properties; the rest as of `json_schema`."""
    return json_schema(tokenizer, {"type": "object", "additionalProperties": True}, seconds)


class Choices:
    """Some texts, of which one is written; `begin` makes the state of one row. Use `choices`.

    Nodes of a tree of their bytes stand for what is written so far: `start` for nothing at all, 0 for a text that has
    begun with an id which adds nothing.
    """

    def __init__(self, tokenizer: TokenizerFolder, texts: Sequence[str]) -> None:
        self._pieces = token_texts(tokenizer.text)
        self._num_text = tokenizer.vocabulary.num_text
        self._end_ids = list(tokenizer.text.end_ids)
        self._first, self._middle = _spellings(tokenizer)
        self._children: list[dict[int, int]] = [{}]
        self._is_end = [False]
        self._following: dict[int, Tensor] = {}
        for text in texts:
            self._add(text)
        self._children.append(self._children[0])
        self._is_end.append(self._is_end[0])
        self.start = len(self._children) - 1
        self._writable = self._writable_nodes()
        self._check(texts)

    def begin(self) -> ChoiceState:
        """At the text's beginning."""
        return ChoiceState(self)

    def allowed(self, node: int) -> Tensor:
        """Bools [V]: what may follow a node."""
        ids_N = self._following.get(node)
        if ids_N is None:
            ids = list(self._end_ids) if self._is_end[node] else []
            ids += [i for spelt, end in self._ways(node) if self._can_go_on(end) for i in spelt]
            if node == self.start and any(self._can_go_on(end) for _, end in self._ways(0)):
                ids += self._pieces.silent_first_ids
            self._following[node] = ids_N = torch.tensor(ids)
        return torch.zeros(self._num_text, dtype=torch.bool).index_fill_(0, ids_N, True)

    def after(self, node: int, token_id: int) -> int:
        """The node behind an id that was allowed."""
        is_first = node == self.start
        node = 0 if is_first else node
        for byte in self._pieces.first(token_id) if is_first else self._pieces.middle(token_id):
            node = self._children[node][byte]
        return node

    def _add(self, text: str) -> None:
        _check_unicode("a choice", text)
        node = 0
        for byte in text.encode():
            following = self._children[node].get(byte)
            if following is None:
                following = self._children[node][byte] = len(self._children)
                self._children.append({})
                self._is_end.append(False)
            node = following
        if len(self._children) > MAX_CHOICE_BYTES:
            raise ValueError(f"the choices have more than {MAX_CHOICE_BYTES} bytes; give fewer or shorter ones")
        self._is_end[node] = True

    def _ways(self, node: int) -> Iterator[tuple[list[int], int]]:
        """Ids of equal bytes that may be written next, with the node behind them."""
        spelling = self._first if node == self.start else self._middle
        stack = [(b"", node)]
        while stack:
            written, here = stack.pop()
            if written in spelling.ids:
                yield spelling.ids[written], here
            if written in spelling.prefixes:
                stack += [(written + bytes([byte]), child) for byte, child in self._children[here].items()]

    def _can_go_on(self, node: int) -> bool:
        return self._writable is None or node in self._writable

    def _writable_nodes(self) -> set[int] | None:
        """Nodes from which tokens lead to the end of a text; None: all of them, there is a token for each byte."""
        if all(bytes([byte]) in self._middle.ids for children in self._children for byte in children):
            return None
        writable: set[int] = set()
        for node in reversed(range(1, self.start)):  # children come behind their parents
            if self._is_end[node] or any(end in writable for _, end in self._ways(node)):
                writable.add(node)
        return writable

    def _check(self, texts: Sequence[str]) -> None:
        """Refuses texts that no tokens spell."""
        for text in texts:
            spelt = text.encode()
            reached = {0} if not spelt or self._pieces.silent_first_ids else set()
            reached.update(self._first.ends(spelt, 0))
            if self._writable is None:  # each byte leads on
                reached |= {len(spelt)} if reached else set()
            for place in range(len(spelt)):
                if len(spelt) in reached:
                    break
                if place in reached:
                    reached.update(self._middle.ends(spelt, place))
            if len(spelt) not in reached:
                raise ValueError(
                    f"this tokenizer has no tokens that spell the choice {text!r}; write it in another way"
                )


class ChoiceState:
    """How much of a choice a row has written; a `Constraint`."""

    def __init__(self, made: Choices) -> None:
        self._choices = made
        self._node = made.start

    def allowed(self) -> Tensor:
        """Bools [V]."""
        return self._choices.allowed(self._node)

    def accept(self, token_id: int) -> None:
        """Moves on by an id that was allowed."""
        self._node = self._choices.after(self._node, token_id)


class _Spelling:
    """Which ids add which bytes to a text."""

    def __init__(self, added: Callable[[int], bytes], num_text: int) -> None:
        self.ids: dict[bytes, list[int]] = {}
        for token_id in range(num_text):
            self.ids.setdefault(added(token_id), []).append(token_id)
        self.ids.pop(b"", None)
        self.prefixes = {spelt[:length] for spelt in self.ids for length in range(len(spelt))}
        """Beginnings of what longer tokens add."""

    def ends(self, spelt: bytes, place: int) -> Iterator[int]:
        """Where a token that begins at a place of a text may end."""
        for end in range(place + 1, len(spelt) + 1):
            if spelt[place:end] in self.ids:
                yield end
            if spelt[place:end] not in self.prefixes:
                return


@functools.lru_cache(maxsize=4)
def _spellings(tokenizer: TokenizerFolder) -> tuple[_Spelling, _Spelling]:
    """Of a text's first id, and of the others."""
    pieces, num_text = token_texts(tokenizer.text), tokenizer.vocabulary.num_text
    return _Spelling(pieces.first, num_text), _Spelling(pieces.middle, num_text)


@functools.lru_cache(maxsize=32)
def _choices(tokenizer: TokenizerFolder, texts: tuple[str, ...]) -> Choices:
    return Choices(tokenizer, texts)


def _check_unicode(what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is not valid Unicode at character {error.start}: half of a surrogate pair") from error


def _without_line_ends(pattern: str) -> str:
    """The pattern with each `.` as what it means, any character but a line's end: xgrammar takes it for any."""
    parts, place, is_class = [], 0, False
    while place < len(pattern):
        character = pattern[place]
        if character == "\\":
            parts.append(pattern[place : place + 2])
            place += 2
            continue
        is_class = (is_class or character == "[") and character != "]"
        parts.append(r"[^\n\r\u2028\u2029]" if character == "." and not is_class else character)
        place += 1
    return "".join(parts)
