"""Conversations as a checkpoint's own chat template writes them, with special tokens that no message can forge.

Templates are Jinja in the form of transformers' `apply_chat_template`. They run in `mmllm_tokenizers.chat_sandbox`.

How special tokens of the template are told from those that words spell: the words get a character of no text, the
guard, wherever a special token could begin in them, or go on into them. What the template makes of them, by cutting,
joining, deleting or changing case, has guards inside; what is whole is the template's own. Guards are taken out again
before anything is encoded, and words in which the template looks for something stay whole, so that it finds it.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import Template, TemplateError

from mmllm_tokenizers.chat_sandbox import GENERATION, MAX_CHARACTERS, Sandbox, too_long
from mmllm_tokenizers.text import GUARD as PRIVATE
from mmllm_tokenizers.text import TextTokenizer
from mmllm_tokenizers.vocab import IMAGE

ROLES = ("system", "user", "assistant", "tool")
_GUARD = "\ufdd1"
_MEDIUM = "\ufdd2"
"""Noncharacters of Unicode, which no message has: one breaks special tokens, the other stands for media."""
_GENERATES = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_PROBE = "probe of content"
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which an assistant's thoughts are given; templates read the first, some the second."""
_Mark = Callable[[str], str]


@dataclass(frozen=True)
class ChatPiece:
    """A piece of a rendered conversation: ids of text, or the place of a message's image or sound."""

    kind: Literal["text", "image", "audio"]
    ids: tuple[int, ...] = ()
    targets: tuple[bool, ...] = ()
    """Of each id whether it stands in one of the template's `{% generation %}` blocks; of `marked_pieces` alone."""


class _Renderer:
    """A template, compiled once and rendered several times, always at the same time of day.

    Args:
        template: Jinja.
        now: the time of day; by default that of making it.
        marks: whether `GENERATION` stands around what is in a `{% generation %}` block.

    Attributes:
        constants: strings and names of attributes that the template looks for or compares with.
    """

    def __init__(self, template: str, now: datetime.datetime | None = None, marks: bool = False) -> None:
        self._sandbox = Sandbox(now or datetime.datetime.now(), marks)
        self._template: Template = _said(lambda: self._sandbox.from_string(template))
        self.constants = self._sandbox.constants

    def render(self, given: Mapping[str, Any]) -> str:
        """The text; ValueError as `render_chat`."""
        self._sandbox.begin()
        return _said(lambda: self._written(given))

    def _written(self, given: Mapping[str, Any]) -> str:
        parts: list[str] = []
        num_characters = 0
        for part in self._template.generate(given):
            num_characters += len(part)
            if num_characters > MAX_CHARACTERS:
                raise too_long()
            parts.append(part)
        return "".join(parts)


_renderer = functools.lru_cache(maxsize=4)(_Renderer)
"""Of conversations that are written as of a fixed time, one after the other: compiling takes longer than rendering."""


def _said(work: Callable[[], Any]) -> Any:
    """What a template gives; whatever it raises becomes a ValueError."""
    try:
        return work()
    except RecursionError as error:
        raise ValueError("the chat template nests or calls itself without end; the checkpoint's is broken") from error
    except MemoryError as error:
        raise ValueError("the chat template can't write these messages: it wants more memory than there is") from error
    except (
        TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, SyntaxError, RuntimeError,
    ) as error:  # fmt: skip
        raise ValueError(f"the chat template can't write these messages: {error}") from error


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    named: Mapping[str, str] | None = None,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """A conversation as text, as transformers' `apply_chat_template(tokenize=False)` writes it.

    Args:
        template: Jinja.
        messages: with `role` and `content`, and whatever else the template reads.
        named: what it calls special tokens: `bos_token`, …
        add_generation_prompt: whether the assistant's turn is opened behind the last message.
        tools: JSON schemas of functions.
        **variables: more that it reads, such as `enable_thinking` or `documents`.

    Raises:
        ValueError: the template is no Jinja, refuses the messages, does what the sandbox forbids, or makes more than
            `MAX_CHARACTERS`.
    """
    _check_some(messages)
    given = [_completed(_marked(message, str)) for message in messages]
    return _Renderer(template).render(_given(given, named, add_generation_prompt, _marked(tools, str), variables))


def _given(
    messages: Any,
    named: Mapping[str, str] | None,
    add_generation_prompt: bool,
    tools: Any,
    variables: Mapping[str, Any],
) -> dict[str, Any]:
    """All that a template sees."""
    given = {"documents": None, **(named or {}), **variables, "messages": messages, "tools": tools}
    return given | {"add_generation_prompt": add_generation_prompt}


def chat_pieces(
    text: TextTokenizer,
    template: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    now: datetime.datetime | None = None,
    **variables: Any,
) -> list[ChatPiece]:
    """A conversation as ids, with the places of its images and sounds.

    The ids are those of `apply_chat_template`, but that special tokens in the messages' own words are words.

    Args:
        text: the checkpoint's tokenizer.
        template: its template.
        messages: `{"role": …, "content": …}`; content is text, or a list of parts `{"type": "text", "text": …}`,
            `{"type": "image"}` and `{"type": "audio"}`. Roles are `ROLES`, and others that the template names.
        add_generation_prompt: as in `render_chat`.
        tools: likewise.
        now: what a template that asks is told for the time; by default the time it is.
        **variables: as in `render_chat`.

    Raises:
        ValueError: as `render_chat`; a role or part is unknown, the template drops an image or sound, or makes special
            tokens of words.
    """
    renderer = _Renderer(template) if now is None else _renderer(template, now)
    return _pieces(text, renderer, template, messages, add_generation_prompt, tools, variables)


def marked_pieces(
    text: TextTokenizer, template: str, messages: Sequence[Mapping[str, Any]], now: datetime.datetime
) -> list[ChatPiece] | None:
    """As `chat_pieces` of a whole conversation, with `targets`: what stands in `{% generation %}` blocks.

    None: the template has none, or changes with the marks. A token that reaches over a block's border is in it, as in
    transformers.

    Raises:
        ValueError: as `chat_pieces`.
    """
    if not _GENERATES.search(template):
        return None
    plain = chat_pieces(text, template, messages, False, now=now)
    try:
        marked = _pieces(text, _renderer(template, now, True), template, messages, False, None, {})
    except ValueError:
        return None
    is_same = [(piece.kind, piece.ids) for piece in plain] == [(piece.kind, piece.ids) for piece in marked]
    return marked if is_same and any(any(piece.targets) for piece in marked) else None


def _pieces(
    text: TextTokenizer,
    renderer: _Renderer,
    template: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
) -> list[ChatPiece]:
    _check_some(messages)
    takes_parts = _takes_parts(template)
    has_own_image = text.special_ids[IMAGE] < text.num_tokens
    own_image = text.token(text.special_ids[IMAGE]) if has_own_image and takes_parts else None
    named = {} if text.foreign is None else text.foreign.named
    media: list[Literal["image", "audio"]] = []

    def render(mark: _Mark) -> str:
        media.clear()
        marked = [
            _message(each, mark, media, renderer.constants, takes_parts, own_image is not None) for each in messages
        ]
        more = {key: _marked(value, mark) for key, value in variables.items()}
        return renderer.render(_given(marked, named, add_generation_prompt, _marked(tools, mark), more))

    rendered = _guarded(render, _control(frozenset(text.control_tokens), renderer.constants))
    marks = re.escape(_MEDIUM) + (f"|{re.escape(own_image)}" if own_image else "")
    parts = re.split(marks, rendered)
    if len(parts) - 1 != len(media):
        raise ValueError(
            f"the chat template wrote {len(parts) - 1} images and sounds of the messages' {len(media)}; give those "
            f"roles text alone"
        )
    pieces = []
    is_inside = False
    for number, part in enumerate(parts):
        if number:
            pieces.append(ChatPiece(media[number - 1]))
        written, borders = _without_marks(part)
        if written:
            ids, spans = text.encode_marked_spans(written, _GUARD)
            pieces.append(ChatPiece("text", tuple(ids), _inside(spans, borders, is_inside)))
        is_inside ^= len(borders) % 2 == 1
    return pieces


def _without_marks(part: str) -> tuple[str, list[int]]:
    """A rendered text without the borders of generation blocks, and where they are, counted without guards."""
    pieces = part.split(GENERATION)
    sizes = [len(piece.replace(_GUARD, "")) for piece in pieces[:-1]]
    return "".join(pieces), list(itertools.accumulate(sizes))


def _inside(spans: Sequence[tuple[int, int]], borders: Sequence[int], is_inside: bool) -> tuple[bool, ...]:
    """Of each token whether a character of it is in a block.

    Args:
        spans: characters of the tokens.
        borders: characters at which blocks begin and end in turn.
        is_inside: whether the text begins inside of one.
    """
    if not borders and not is_inside:
        return (False,) * len(spans)
    ends = [*([0] if is_inside else []), *borders]
    ends += [max((stop for _, stop in spans), default=0)] * (len(ends) % 2)
    blocks = list(zip(ends[::2], ends[1::2], strict=True))
    return tuple(any(start < last and first < stop for first, last in blocks) for start, stop in spans)


def _check_some(messages: Sequence[Mapping[str, Any]]) -> None:
    if not messages:
        raise ValueError("there is no message; a conversation has one at least")


@functools.lru_cache(maxsize=8)
def _takes_parts(template: str) -> bool:
    """Whether a template reads lists of parts; others paste what content is."""
    parts = [{"type": "text", "text": _PROBE}]
    for before in ([], [{"role": "system", "content": parts}]):
        try:
            rendered = render_chat(template, [*before, {"role": "user", "content": parts}], {})
        except ValueError:
            continue
        if _PROBE in rendered:
            return "'type'" not in rendered and '"type"' not in rendered
    return False


# --- what messages hold ---------------------------------------------------------------------------------------


def _message(
    message: Mapping[str, Any],
    mark: _Mark,
    media: list[Literal["image", "audio"]],
    constants: frozenset[str],
    takes_parts: bool,
    has_own_image: bool,
) -> dict[str, Any]:
    """A message as the template sees it, its words marked, its media where they stand."""
    role = message.get("role")
    if not (role in ROLES or (isinstance(role, str) and role.isidentifier() and role in constants)):
        raise ValueError(f"a message has role {role!r}; wanted one of {', '.join(ROLES)}")
    marked = {
        key: role if key == "role" else _content(value, mark, media, takes_parts, has_own_image)
        if key == "content" else _marked(value, mark)
        for key, value in message.items()
    }  # fmt: skip
    return _completed(marked)


def _content(
    content: Any, mark: _Mark, media: list[Literal["image", "audio"]], takes_parts: bool, has_own_image: bool
) -> Any:
    if content is None or isinstance(content, str):
        return content if content is None else _marked(content, mark)
    if not isinstance(content, Sequence):
        raise ValueError(f"a message's content is {type(content).__name__}; wanted text, or a list of parts")
    parts: list[dict[str, Any]] = []
    for part in content:
        match part:
            case str() | {"type": "text", "text": str()}:
                words = _checked(part if isinstance(part, str) else part["text"])
                parts.append({"type": "text", "text": words})
            case {"type": "image" | "audio" as kind}:
                media.append(kind)
                is_own = kind == "image" and has_own_image and takes_parts
                parts.append({"type": "image"} if is_own else {"type": "text", "text": _MEDIUM})
            case _:
                raise ValueError(f"a part of a message is {part!r}; wanted a part of type text, image or audio")
    if not takes_parts:  # joined before they are marked: two parts may spell a token together
        return mark("".join(part["text"] for part in parts))
    return [{**part, "text": mark(part["text"])} if "text" in part else part for part in parts]


def _completed(message: dict[str, Any]) -> dict[str, Any]:
    """A message without keys that say nothing, whose thoughts have each of the names that templates read.

    So it is in transformers 5: many templates write `None` where a key is null, but look whether it is there.
    """
    message = {key: value for key, value in message.items() if value is not None}
    given = [message[key] for key in _REASONING if message.get(key) is not None]
    return {"thinking": given[0], **message, "reasoning_content": given[0]} if given else message


def _marked(value: Any, mark: _Mark) -> Any:
    """The value with all strings in it marked, made of plain types alone: a template sees no methods of others."""
    match value:
        case None | bool():
            return value
        case str():
            return mark(_checked(value))
        case int() | float():
            return int(value) if isinstance(value, int) else float(value)
        case Mapping():
            return {_marked(key, mark): _marked(item, mark) for key, item in value.items()}
        case list():
            return [_marked(item, mark) for item in value]
        case tuple():
            return tuple(_marked(item, mark) for item in value)
    return f"<{type(value).__name__}>"


def _checked(words: str) -> str:
    found = next((each for each in (PRIVATE, _GUARD, _MEDIUM, GENERATION) if each in words), None)
    if found is not None:
        raise ValueError(f"a message holds the noncharacter of Unicode {found!r}; leave it out")
    return str(words)


# --- guards ---------------------------------------------------------------------------------------------------


class _Control:
    """Special tokens, and where guards against them stand in words.

    Args:
        names: how the special tokens are written.
        constants: what the template looks for. Where words hold it, they stay whole, unless it is itself a part of a
            special token, or holds one.
    """

    def __init__(self, names: frozenset[str], constants: frozenset[str]) -> None:
        self.pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
        lower = [name.lower() for name in names]
        self._longest = max(map(len, lower))
        self._whole = "\0".join(lower)
        self._behind = "\0".join(name[1:] for name in lower)
        self._begins = {name[:size] for name in lower for size in range(1, len(name) + 1)}
        self._ends = {name[start:] for name in lower for start in range(1, len(name))}
        self._constants = constants
        firsts = {each for name in names for each in (name[0].lower(), name[0].upper())}
        self._firsts = re.compile("[" + "".join(map(re.escape, sorted(firsts))) + "]")
        kept = [each for each in constants if self._firsts.search(each) and not self._touches(each.lower())]
        kept.sort(key=len, reverse=True)
        self._kept = re.compile("(" + "|".join(map(re.escape, kept)) + ")") if kept else None

    def _touches(self, constant: str) -> bool:
        """Whether a constant holds a special token, is a part of one, or ends as one begins."""
        ends = (constant[start:] for start in range(max(0, len(constant) - self._longest), len(constant)))
        holds_one = re.search(self.pattern.pattern, constant, re.IGNORECASE) is not None
        return holds_one or constant in self._whole or any(end in self._begins for end in ends)

    def spelt(self, words: str) -> str:
        """Words with a guard in each special token that they spell."""
        return self.pattern.sub(lambda found: found[0][0] + _GUARD + found[0][1:], words)

    def anywhere(self, words: str) -> str:
        """Words with a guard wherever a special token could begin in them, or go on into them."""
        parts = self._kept.split(words) if self._kept else [words]
        for number in range(0, len(parts), 2):
            parts[number] = self._firsts.sub(lambda found: found[0] + _GUARD, parts[number])
        return (_GUARD if self._goes_on(words) else "") + "".join(parts)

    def _goes_on(self, words: str) -> bool:
        """Whether words may be the end of a special token, or its middle."""
        if not words or words in self._constants:
            return False
        start = words[: self._longest].lower()
        if any(start[:size] in self._ends for size in range(1, len(start) + 1)):
            return True
        return len(words) < self._longest and start in self._behind


_control = functools.lru_cache(maxsize=8)(_Control)


def _guarded(render: Callable[[_Mark], str], control: _Control) -> str:
    """A conversation whose special tokens are the template's own, with guards in the words.

    Raises:
        ValueError: guards change what the template writes, so that its own special tokens can't be told from words.
    """
    plain = render(str)
    guarded = _attempt(render, control.anywhere)
    if guarded is not None and guarded.replace(_GUARD, "") == plain:
        return guarded
    spelt = _attempt(render, control.spelt)  # of a template that looks at single characters, or at lengths
    if guarded is not None and spelt is not None and spelt.replace(_GUARD, "") == plain:
        own = [control.pattern.findall(each) for each in (spelt, guarded)]
        if own[0] == own[1]:
            return spelt
    found = control.pattern.search(plain)
    raise ValueError(
        f"the chat template changes the messages' words such that they can't be told from its special tokens "
        f"({'' if found is None else found[0]}); leave out what looks like parts of these"
    )


def _attempt(render: Callable[[_Mark], str], mark: _Mark) -> str | None:
    try:
        return render(mark)
    except ValueError:
        return None
