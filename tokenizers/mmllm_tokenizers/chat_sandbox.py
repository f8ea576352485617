"""Where chat templates run: jinja2's immutable sandbox, in which neither strings, lists, numbers nor time grow freely.

Templates come with checkpoints from anywhere. jinja2's sandbox keeps them from Python's insides; here every loop, call,
filter, operator and output is counted besides, and what would make something large is refused before it is made.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import operator
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_CHARACTERS = 4_000_000
"""Of a rendered conversation, and of any string or list on the way to it, whatever is in the list included."""
MAX_STEPS = 1_000_000
"""Turns of loops, calls, filters and operators of one rendering."""
MAX_SECONDS = 10.0
"""Of one rendering; one of many messages takes some hundredths."""
GENERATION = "\ufdd3"
"""A noncharacter that stands at both ends of what is in a `{% generation %}` block, where that is asked for."""
_MAX_MADE = 16 * MAX_CHARACTERS
"""Characters and items that all steps of one rendering make together."""
_MAX_PRINTED = 4 * MAX_CHARACTERS
"""Characters that are written into macros, blocks and the conversation together."""
_MAX_BITS = 4096
"""Of a whole number."""
_UNBOUNDED = (
    "urlize", "wordwrap", "xmlattr", "pprint", "filesizeformat", "groupby", "random", "striptags",
)  # fmt: skip
"""Filters that no chat template needs, whose work or size can't be told beforehand."""


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template; `begin` before each rendering.

    Args:
        now: the time that templates are told.
        marks: whether `GENERATION` stands around what is in a `{% generation %}` block.

    Attributes:
        constants: strings that stand in expressions of the template, and names of attributes.
    """

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

    def __init__(self, now: datetime.datetime, marks: bool = False) -> None:
        # Without the optimizer: what it computes beforehand would not be counted.
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], optimized=False)
        self.marks_generation = marks
        self.begin()
        self.constants: frozenset[str] = frozenset()
        for name in _UNBOUNDED:
            self.filters.pop(name)
        self.filters["tojson"] = _to_json
        self.filters = {name: self._watched(name, function) for name, function in self.filters.items()}
        self.filters |= {
            "join": self._join,
            "stepped": pass_context(lambda _, values: self._stepped(values)),
            "printed": pass_context(lambda _, value: self._printed(value)),
            "made": pass_context(lambda _, value: self._bounded(value)),
            "concatenated": pass_context(lambda _, parts: self._joined("", parts)),
        }
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": lambda form: now.strftime(form),
            "namespace": _Namespace,
            "dict": _Dict(),
        }
        for name in ("lipsum", "cycler", "joiner"):
            self.globals.pop(name)

    def begin(self) -> None:
        """Counts from nothing."""
        self._num_steps = self._num_made = self._num_printed = 0
        self._deadline = time.monotonic() + MAX_SECONDS

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        strings = {each.value for each in tree.find_all(nodes.Const) if isinstance(each.value, str)}
        self.constants = frozenset(strings | {each.attr for each in tree.find_all(nodes.Getattr)})
        return _Watched().visit(tree)

    def _step(self) -> None:
        self._num_steps += 1
        if self._num_steps > MAX_STEPS:
            raise SecurityError(f"its loops and calls have more than {MAX_STEPS} steps")
        if not self._num_steps % 16 and time.monotonic() > self._deadline:
            raise SecurityError(f"it runs for more than {MAX_SECONDS:g} seconds")

    def _bounded(self, value: Any) -> Any:
        """A value that was made, if it is not too large, nor all that were."""
        self._step()
        self._num_made += len(value) if isinstance(value, (str, bytes, list, tuple, Mapping)) else 1
        if _size(value) > MAX_CHARACTERS or self._num_made > _MAX_MADE:
            raise too_long()
        return value

    def _printed(self, value: Any) -> str:
        """What is written of a value."""
        self._step()
        written = str(value)
        self._num_printed += len(written)
        if self._num_printed > _MAX_PRINTED:
            raise too_long()
        return written

    def _stepped(self, values: Any) -> _Loop:
        """What a loop goes through, each turn of it counted."""
        if not hasattr(values, "__len__"):
            values = list(itertools.islice(values, MAX_STEPS + 1))
        return _Loop(values, self._step)

    def _joined(self, between: Any, parts: Any) -> str:
        """The parts as one string, if that is not too long."""
        written, size = [], 0
        for part in parts:
            written.append(str(part))
            size += len(written[-1]) + len(str(between))
            if size > MAX_CHARACTERS + len(str(between)):
                raise too_long()
        return self._bounded(str(between).join(written))

    def call_binop(self, context: Any, operator_: str, left: Any, right: Any) -> Any:
        """`left operator right`, if its result is not too large."""
        sides = (left, right)
        sized = [_size(side) for side in sides if hasattr(side, "__len__")]
        whole = [int(side) for side in sides if isinstance(side, int)]
        match operator_:
            case "*" if sized and whole and sized[0] * whole[0] > MAX_CHARACTERS:
                raise too_long()
            case "*" if len(whole) == 2 and sum(number.bit_length() for number in whole) > _MAX_BITS:
                raise SecurityError(f"it makes numbers of more than {_MAX_BITS} bits")
            case "**" if any(isinstance(side, (int, float)) and abs(side) > 1000 for side in sides):
                raise SecurityError("it takes powers of large numbers")
            case "%" if isinstance(left, (str, bytes)):
                _check_format(left, right if isinstance(right, tuple) else (right,))
        return self._bounded(_OPERATORS[operator_](left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call, if neither what it is given nor its result is too large."""
        inner = getattr(function, "__wrapped__", function)  # the sandbox wraps `format`
        owner = getattr(inner, "__self__", None)
        if _size((*args, *kwargs.values())) > MAX_CHARACTERS:
            raise too_long()
        _check_numbers((*args, *kwargs.values()))
        if isinstance(owner, (str, bytes)):
            if inner.__name__ == "join":
                return self._joined(owner, *args)
            _check_method(owner, inner.__name__, args, kwargs)
        return self._bounded(super().call(context, function, *args, **kwargs))

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter, if neither what it is given nor what it makes is too large."""

        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            given = args[1:] if hasattr(function, "jinja_pass_arg") else args
            _check_numbers((*given[1:], *kwargs.values()))
            match name, given:
                case "sum", _ if _started(given, kwargs) is not None:
                    raise SecurityError("it adds up what are no numbers")
                case "format", _:
                    _check_format(given[0], (*given[1:], *kwargs.values()))
                case "replace", [whole, old, new, *_]:
                    _check_replaced(str(whole), old, new)
                case "indent", _:
                    _check_indented(str(given[0]), (*given[1:], *kwargs.values()))
                case "tojson", _ if _indentation(given, kwargs) * _size(given[0]) > MAX_CHARACTERS:
                    raise too_long()
            return self._bounded(function(*args, **kwargs))

        return watched

    def _join(self, values: Any, d: Any = "", attribute: Any = None) -> str:
        """The filter `join`."""
        of = (lambda value: value) if attribute is None else make_attrgetter(self, attribute)
        return self._joined(d, map(of, values))


_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "//": operator.floordiv,
    "**": operator.pow, "%": operator.mod,
}  # fmt: skip


def too_long() -> SecurityError:
    """Of what a template makes."""
    return SecurityError(f"it makes more than {MAX_CHARACTERS} characters")


class _Loop:
    """What a loop goes through."""

    def __init__(self, values: Any, step: Callable[[], None]) -> None:
        self._values, self._step = values, step

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        for value in self._values:
            self._step()
            yield value


class _Watched(NodeTransformer):
    """What the sandbox can't watch, through filters that it can."""

    def visit_For(self, node: nodes.For, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "stepped")
        return node

    def visit_Call(self, node: nodes.Call, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.node, nodes.Name) and node.node.name == "loop":  # of `{% for … recursive %}`
            node.args = [_filtered(each, "stepped") for each in node.args]
        return node

    def visit_Concat(self, node: nodes.Concat, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes).set_lineno(node.lineno), "concatenated")

    def visit_Output(self, node: nodes.Output, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [
            _filtered(nodes.Const(each.data) if isinstance(each, nodes.TemplateData) else each, "printed")
            for each in node.nodes
        ]
        return node

    def _container(self, node: Any, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node)
        is_target = getattr(node, "ctx", "load") != "load"
        return node if is_target else _filtered(node, "made")

    visit_List = visit_Tuple = visit_Dict = _container


def _filtered(node: Any, name: str) -> Any:
    return nodes.Filter(node, name, [], [], None, None).set_lineno(node.lineno)


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}`, which marks the assistant's words, as what is in it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """What stands between, as a scope of its own."""
        line = next(parser.stream).lineno
        inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        if getattr(self.environment, "marks_generation", False):
            first, last = (nodes.Output([nodes.TemplateData(GENERATION)]).set_lineno(line) for _ in range(2))
            inside = [first, *inside, last]
        return nodes.Scope(inside).set_lineno(line)


class _Namespace(Namespace):
    """A namespace without access to what Python keeps behind underscores."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"it stores {name!r} in a namespace; names may not begin with an underscore")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # what is in it may be itself


class _Dict:
    """`dict`, as a function alone."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As of dicts."""
        return dict.fromkeys(*args)


def _size(value: Any) -> int:
    """Characters and items of a value, those of what is in it included, each time that it is in it."""
    known: dict[int, int] = {}

    def size(value: Any) -> int:
        if isinstance(value, (str, bytes, range)):
            return len(value)
        if isinstance(value, int):
            return 1 + value.bit_length() // 8
        if not isinstance(value, (list, tuple, Mapping)):
            return 1
        if id(value) not in known:
            parts = itertools.chain(value.keys(), value.values()) if isinstance(value, Mapping) else value
            known[id(value)] = 1 + sum(map(size, parts))
        return known[id(value)]

    return size(value)


def _check_numbers(values: tuple[Any, ...]) -> None:
    if any(isinstance(value, int) and abs(value) > MAX_CHARACTERS for value in values):
        raise too_long()


def _check_method(owner: str | bytes, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """A method of a string, before it is called."""
    match name, args:
        case (("format" | "format_map"), _):
            given = (*args, *kwargs.values())
            if name == "format_map" and args and isinstance(args[0], Mapping):
                given = tuple(args[0].values())
            _check_format(owner, given)
        case "replace", [old, new, *_]:
            _check_replaced(owner, old, new)
        case "expandtabs", _:
            _check_numbers((len(owner) * max([8, *(each for each in args if isinstance(each, int))]),))
        case "translate", _:
            raise SecurityError("it translates characters, which isn't known here")


def _check_format(form: Any, given: tuple[Any, ...]) -> None:
    """A form of `%` or of `format`: each number in it may be a width, each field may be the longest value."""
    form = form.decode("latin-1") if isinstance(form, bytes) else str(form)
    numbers = re.findall(r"\d+", form)
    if "*" in form or re.search(r"\{[^{}]*\{", form.replace("{{", "")) or any(len(each) > 6 for each in numbers):
        raise SecurityError(f"its format {form[:40]!r} pads without bound")
    num_fields = form.count("%") + form.count("{")
    if sum(map(int, numbers)) + num_fields * max(map(_size, given), default=0) > MAX_CHARACTERS:
        raise too_long()


def _check_replaced(whole: Any, old: Any, new: Any) -> None:
    num_found = whole.count(old) if isinstance(old, type(whole)) else 0
    if len(whole) + num_found * len(str(new)) > MAX_CHARACTERS:
        raise too_long()


def _check_indented(text: str, options: tuple[Any, ...]) -> None:
    widths = [len(each) if isinstance(each, str) else int(each) for each in options if isinstance(each, (str, int))]
    if len(text) + (text.count("\n") + 1) * max(widths, default=4) > MAX_CHARACTERS:
        raise too_long()


def _started(given: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a sum begins with, where it is no number."""
    start = given[2] if len(given) > 2 else kwargs.get("start", 0)
    return None if isinstance(start, (int, float)) else start


def _indentation(given: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Characters that each item of JSON may be indented by, one level of it."""
    indent = given[2] if len(given) > 2 else kwargs.get("indent")
    return len(indent) if isinstance(indent, str) else indent if isinstance(indent, int) else 0


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
