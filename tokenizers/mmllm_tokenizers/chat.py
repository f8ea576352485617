"""Conversations as a checkpoint's own chat template writes them, with special tokens that no message can forge.

Templates are Jinja in the form of transformers' `apply_chat_template`. They come with checkpoints from anywhere, so
they run in jinja2's immutable sandbox, and what they make is bounded.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from mmllm_tokenizers.text import TextTokenizer
from mmllm_tokenizers.vocab import IMAGE

MAX_CHARACTERS = 4_000_000
"""Of a rendered conversation, and of any string on the way to it."""
MAX_LOOP_STEPS = 1_000_000
"""Of all loops of a template."""
ROLES = ("system", "user", "assistant", "tool")
_GUARD = "\ufdd1"
_MEDIUM = "\ufdd2"
"""Noncharacters of Unicode, which no message has: one breaks special tokens, the other stands for media."""
_PROBE = "probe of content"


@dataclass(frozen=True)
class ChatPiece:
    """A piece of a rendered conversation: ids of text, or the place of a message's image or sound."""

    kind: Literal["text", "image", "audio"]
    ids: tuple[int, ...] = ()


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
        **variables: more that it reads, such as `enable_thinking`.

    Raises:
        ValueError: the template is no Jinja, refuses the messages, does what the sandbox forbids, or makes more than
            `MAX_CHARACTERS`.
    """
    given = {**(named or {}), **variables, "messages": [dict(message) for message in messages]}
    given |= {"tools": None if tools is None else [dict(tool) for tool in tools], "documents": None}
    given["add_generation_prompt"] = add_generation_prompt
    parts: list[str] = []
    num_characters = 0
    try:
        environment = _Sandbox()
        for part in environment.from_string(template).generate(given):
            num_characters += len(part)
            if num_characters > MAX_CHARACTERS:
                raise _too_long()
            parts.append(part)
    except RecursionError as error:
        raise ValueError("the chat template calls itself without end; the checkpoint's is broken") from error
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, MemoryError) as error:
        raise ValueError(f"the chat template can't write these messages: {error}") from error
    return "".join(parts)


def chat_pieces(
    text: TextTokenizer,
    template: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> list[ChatPiece]:
    """A conversation as ids, with the places of its images and sounds.

    The ids are those of `apply_chat_template`, but that special tokens in the messages' own words are words.

    Args:
        text: the checkpoint's tokenizer.
        template: its template.
        messages: `{"role": …, "content": …}`; content is text, or a list of parts `{"type": "text", "text": …}`,
            `{"type": "image"}` and `{"type": "audio"}`.
        add_generation_prompt: as in `render_chat`.
        tools: likewise.
        **variables: likewise.

    Raises:
        ValueError: as `render_chat`; a role or part is unknown, or the template drops an image or sound.
    """
    takes_parts = _takes_parts(template)
    has_own_image = text.special_ids[IMAGE] < text.num_tokens
    own_image = text.token(text.special_ids[IMAGE]) if has_own_image and takes_parts else None
    control = _control_pattern(text)
    media: list[Literal["image", "audio"]] = []
    guarded = [_guarded_message(message, control, media, takes_parts, own_image is not None) for message in messages]
    named = {} if text.foreign is None else text.foreign.named
    tools = None if tools is None else [_guarded(dict(tool), control) for tool in tools]
    rendered = render_chat(template, guarded, named, add_generation_prompt, tools, **variables)
    marks = re.escape(_MEDIUM) + (f"|{re.escape(own_image)}" if own_image else "")
    parts = re.split(marks, rendered)
    if len(parts) - 1 != len(media):
        raise ValueError(
            f"the chat template wrote {len(parts) - 1} images and sounds of the messages' {len(media)}; give those "
            f"roles text alone"
        )
    pieces = []
    for number, part in enumerate(parts):
        if number:
            pieces.append(ChatPiece(media[number - 1]))
        if part:
            pieces.append(ChatPiece("text", tuple(text.encode_marked(part, _GUARD))))
    return pieces


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


def _guarded_message(
    message: Mapping[str, Any],
    control: re.Pattern[str],
    media: list[Literal["image", "audio"]],
    takes_parts: bool,
    has_own_image: bool,
) -> dict[str, Any]:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"a message has role {role!r}; wanted one of {', '.join(ROLES)}")
    guarded = {key: _guarded(value, control) for key, value in message.items() if key != "content"}
    if content is None or isinstance(content, str):
        return {**guarded, "content": content if content is None else _guarded(content, control)}
    if not isinstance(content, Sequence):
        raise ValueError(f"a message's content is {type(content).__name__}; wanted text, or a list of parts")
    parts: list[dict[str, Any]] = []
    for part in content:
        match part:
            case str():
                parts.append({"type": "text", "text": _guarded(part, control)})
            case {"type": "text", "text": str() as words}:
                parts.append({"type": "text", "text": _guarded(words, control)})
            case {"type": "image" | "audio" as kind}:
                media.append(kind)
                own = kind == "image" and has_own_image
                parts.append({"type": "image"} if own else {"type": "text", "text": _MEDIUM})
            case _:
                raise ValueError(f"a part of a message is {part!r}; wanted a part of type text, image or audio")
    if has_own_image and takes_parts:
        return {**guarded, "content": parts}
    merged = "".join(part["text"] for part in parts)
    return {**guarded, "content": [{"type": "text", "text": merged}] if takes_parts else merged}


def _control_pattern(text: TextTokenizer) -> re.Pattern[str]:
    names = sorted(text.control_tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)))


def _guarded(value: Any, control: re.Pattern[str]) -> Any:
    """The value with a guard inside of each special token that its strings spell."""
    match value:
        case str():
            if _GUARD in value or _MEDIUM in value:
                raise ValueError(f"a message holds a noncharacter of Unicode ({_GUARD!r} or {_MEDIUM!r}); leave it out")
            return control.sub(lambda found: found[0][0] + _GUARD + found[0][1:], value)
        case Mapping():
            return {_guarded(key, control): _guarded(item, control) for key, item in value.items()}
        case list() | tuple():
            return [_guarded(item, control) for item in value]
    return value


def _too_long() -> SecurityError:
    return SecurityError(f"it makes more than {MAX_CHARACTERS} characters")


def _bounded(value: Any) -> Any:
    if isinstance(value, (str, bytes, list, tuple)) and len(value) > MAX_CHARACTERS:
        raise _too_long()
    return value


class _Watched(NodeTransformer):
    """`a ~ b` and `for a in b`, which the sandbox can't watch, through filters that it can."""

    def visit_For(self, node: nodes.For, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "stepped", [], [], None, None).set_lineno(node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), "concatenated", [], [], None, None).set_lineno(node.lineno)


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}`, which marks the assistant's words, as what is in it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """What stands between, as a scope of its own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Namespace(Namespace):
    """A namespace without access to what Python keeps behind underscores."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"it stores {name!r} in a namespace; names may not begin with an underscore")
        super().__setitem__(name, value)


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox, in which neither strings nor loops grow without bound."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self._num_steps = 0
        self.filters["tojson"] = _to_json
        self.filters["stepped"] = self._stepped
        self.filters["concatenated"] = lambda parts: _bounded("".join(map(str, parts)))
        self.filters = {name: _watched(function) for name, function in self.filters.items()}
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": lambda form: datetime.datetime.now().strftime(form),
            "namespace": _Namespace,
        }
        for name in ("lipsum", "cycler", "joiner"):
            self.globals.pop(name)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Watched().visit(super()._parse(source, name, filename))

    def _stepped(self, values: Any) -> Any:
        """What a loop goes through, if all loops together have not too many steps."""
        if not hasattr(values, "__len__"):
            values = list(itertools.islice(values, MAX_LOOP_STEPS + 1))
        self._num_steps += len(values)
        if self._num_steps > MAX_LOOP_STEPS:
            raise SecurityError(f"its loops have more than {MAX_LOOP_STEPS} steps")
        return values

    def call_binop(self, context: Any, operator_: str, left: Any, right: Any) -> Any:
        """`left operator right`, if its result is not too long."""
        sizes = [len(side) if hasattr(side, "__len__") else side for side in (left, right)]
        numbers = [size for size in sizes if isinstance(size, (int, float))]
        match operator_:
            case "*" if any(hasattr(side, "__len__") for side in (left, right)) and len(numbers) == 2:
                if numbers[0] * numbers[1] > MAX_CHARACTERS:
                    raise _too_long()
            case "**" if any(abs(number) > 1000 for number in numbers):
                raise SecurityError("it takes powers of large numbers")
            case "%" if isinstance(left, (str, bytes)):
                _check_widths(str(left), "%")
        functions: dict[str, Callable[[Any, Any], Any]] = {
            "+": operator.add, "*": operator.mul, "**": operator.pow, "%": operator.mod,
        }  # fmt: skip
        return _bounded(functions[operator_](left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call, if neither its numbers nor its result are too large."""
        numbers = [value for value in (*args, *kwargs.values()) if isinstance(value, int)]
        if any(abs(number) > MAX_CHARACTERS for number in numbers):
            raise _too_long()
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str) and function.__name__ in ("format", "format_map"):
            _check_widths(owner, "{")
        if isinstance(owner, str) and function.__name__ == "replace" and len(args) >= 2:
            _check_replaced(owner, *args[:2])
        return _bounded(super().call(context, function, *args, **kwargs))


def _watched(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter, if its numbers are not too large, nor what it makes."""

    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        numbers = [value for value in (*args, *kwargs.values()) if isinstance(value, int)]
        strings = [value for value in args if isinstance(value, str)]
        if any(abs(number) > MAX_CHARACTERS for number in numbers):
            raise _too_long()
        if function.__name__ == "do_format" and strings:
            _check_widths(strings[0], "%")
        if function.__name__ == "do_replace" and len(strings) >= 3:
            _check_replaced(*strings[:3])
        return _bounded(function(*args, **kwargs))

    return watched


def _check_widths(form: str, _kind: str) -> None:
    if re.search(r"\d{7}|\*", form):
        raise SecurityError(f"its format {form[:40]!r} pads without bound")


def _check_replaced(whole: Any, old: Any, new: Any) -> None:
    num_found = whole.count(old) if isinstance(old, str) else 0
    if len(whole) + num_found * len(str(new)) > MAX_CHARACTERS:
        raise _too_long()


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
