"""A source's `filter`: a small expression over a row's metadata, read with `ast`, never run as Python."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_Row = Mapping[str, Any]
_Value = Callable[[_Row], Any]
_Truth = Callable[[_Row], bool | None]
"""Says whether something holds; None where that is unknown."""
_MAX_KNOWN = 100_000
_LIKE_TRUTHS = ("true", "false", "yes", "no", "1", "0")
"""Texts that are likely meant as true or false, while as texts all of them are true."""

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda left, right: left in right,
    ast.NotIn: lambda left, right: left not in right,
}
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
}


def compile_filter(expression: str) -> Callable[[_Row], bool]:
    """A function that says whether a row is kept.

    Names are metadata keys. Allowed: comparisons, `in`, `and`, `or`, `not`, arithmetic, numbers, strings, lists and
    parentheses.

    A row may lack a value: it has no such key, or `None`, or NaN. A comparison with what it lacks, or with what is
    computed from that or divided by zero, is unknown: neither true nor false. `not` of unknown is unknown; `and` is
    false where a part is false, `or` is true where a part is true, and both are else unknown where a part is (Kleene's
    logic, as SQL's). A row is kept where the whole is true, so `score >= 0.5` and `not (score < 0.5)` keep the same
    rows. A name alone is true where the row has a value that isn't false, 0 or empty: `not perturbed` keeps rows
    without that key. `score == None` and `score != None` ask whether a value is missing.

    Args:
        expression: e.g. `"not perturbed and width >= 64"`, `"speaker == 'bob'"`, `"split in ['a', 'b']"`.

    Returns:
        The function; it raises ValueError where a text is compared with a number, or computed with.

    Raises:
        ValueError: It isn't such an expression.
    """
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"filter {expression!r} can't be read: {error}") from error
    truth = truth_of(tree.body, expression)
    return lambda row: truth(row) is True


def truth_of(node: ast.expr, expression: str) -> Callable[[_Row], bool | None]:
    """What says whether a part of an expression holds of a row; `None` where that is unknown."""
    match node:
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            inner = truth_of(operand, expression)

            def negated(row: _Row) -> bool | None:
                holds = inner(row)
                return None if holds is None else not holds

            return negated
        case ast.BoolOp(op=op, values=values):
            return _joined([truth_of(item, expression) for item in values], isinstance(op, ast.Or))
        case ast.Compare(left=left, ops=ops, comparators=comparators) if all(type(op) in _COMPARE for op in ops):
            operands = [left, *comparators]
            pairs = zip(operands, ops, operands[1:], strict=False)
            return _joined([_comparison(left, op, right, expression) for left, op, right in pairs], False)
    value = _value(node, expression)

    def is_true(row: _Row) -> bool:
        found = value(row)
        if isinstance(found, str) and found.strip().lower() in _LIKE_TRUTHS:
            raise ValueError(
                f"filter {expression!r} asks whether {ast.unparse(node)!r} is true, and here it is the text {found!r}; "
                f"{_advice(node)}"
            )
        return bool(found)

    return is_true


def _joined(parts: list[_Truth], decisive: bool) -> _Truth:
    """`or` (the first true one decides) or `and` (the first false one)."""

    def joined(row: _Row) -> bool | None:
        is_unknown = False
        for part in parts:
            holds = part(row)
            if holds is decisive:
                return decisive
            is_unknown = is_unknown or holds is None
        return None if is_unknown else not decisive

    return joined


def _value(node: ast.expr, expression: str) -> _Value:
    """What an expression gives: a bool, a number, a text, a list, or None where a row lacks it."""
    match node:
        case ast.Constant(value=str() | int() | float() | None as constant):
            return lambda row: constant
        case ast.Name(id=name):
            return lambda row: _known(row.get(name))
        case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
            parts = [_value(item, expression) for item in items]
            return lambda row: [part(row) for part in parts]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _computed(operator.neg, [operand], node, expression)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _computed(_BINARY[type(op)], [left, right], node, expression)
        case ast.Compare(ops=ops) if all(type(op) in _COMPARE for op in ops):
            return truth_of(node, expression)
        case ast.BoolOp() | ast.UnaryOp(op=ast.Not()):
            return truth_of(node, expression)
    raise ValueError(
        f"filter {expression!r}: {ast.unparse(node)!r} isn't allowed; use names, numbers, strings, lists, "
        f"comparisons, and, or, not and arithmetic"
    )


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _computed(function: Callable[..., Any], operands: list[ast.expr], node: ast.expr, expression: str) -> _Value:
    parts = [_value(operand, expression) for operand in operands]

    def computed(row: _Row) -> Any:
        values = [part(row) for part in parts]
        if any(value is None for value in values):
            return None
        for value, operand in zip(values, operands, strict=True):
            if not isinstance(value, int | float):
                raise ValueError(
                    f"filter {expression!r} computes {ast.unparse(node)!r} with {_told(operand, value)}, which is no "
                    f"number; {_advice(node)}"
                )
        try:
            return _known(function(*values))
        except (ZeroDivisionError, OverflowError):
            return None

    return computed


def _comparison(left: ast.expr, op: ast.cmpop, right: ast.expr, expression: str) -> _Truth:
    function, first, second = _COMPARE[type(op)], _value(left, expression), _value(right, expression)
    asks_whether_missing = isinstance(op, ast.Eq | ast.NotEq) and (_is_none(left) or _is_none(right))

    def compare(row: _Row) -> bool | None:
        one, other = first(row), second(row)
        if asks_whether_missing:
            return function(one, other)
        if one is None or other is None:
            return None
        _check_alike(one, other, op, left, right, expression)
        return function(one, other)

    return compare


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _check_alike(one: Any, other: Any, op: ast.cmpop, left: ast.expr, right: ast.expr, expression: str) -> None:
    """Raises ValueError where a text would be compared with a number, which is never what is meant."""
    if isinstance(op, ast.In | ast.NotIn):
        if isinstance(other, str):
            is_alike = isinstance(one, str)
        else:
            is_alike = isinstance(other, list) and (not other or any(_sort(item) == _sort(one) for item in other))
    else:
        is_alike = _sort(one) == _sort(other) and (_sort(one) != "other" or isinstance(op, ast.Eq | ast.NotEq))
    if is_alike:
        return
    named = left if _names(left) or not _names(right) else right
    raise ValueError(f"filter {expression!r} compares {_told(left, one)} with {_told(right, other)}; {_advice(named)}")


def _sort(value: Any) -> str:
    if isinstance(value, int | float):
        return "number"
    return "text" if isinstance(value, str) else "other"


def _told(node: ast.expr, value: Any) -> str:
    """An operand and what it is in the row, for messages."""
    shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}…"
    kind = {"number": "the number", "text": "the text"}.get(_sort(value), "")
    told = f"{kind} {shown}".strip()
    return f"the column {ast.unparse(node)!r}, here {told}," if _names(node) else told


def _advice(node: ast.expr) -> str:
    name = next(iter(_names(node)), "NAME")
    return (
        f"compare texts with texts ({name} == '64') and numbers with numbers; columns of tables are texts unless they "
        f"are built with --columns {name}:float (or int, bool)"
    )


def _names(node: ast.expr) -> list[str]:
    return sorted({item.id for item in ast.walk(node) if isinstance(item, ast.Name)})


def filter_names(expression: str) -> list[str]:
    """The metadata keys that an expression reads."""
    return _names(ast.parse(expression.strip(), mode="eval").body)


def kept_rows(expression: str, columns: Mapping[str, Iterable[Any]], count: int) -> list[bool]:
    """For each row whether it is kept; equal rows are looked at once.

    Args:
        expression: As `compile_filter`.
        columns: The rows' values by key; a key that is missing here is `None` in all rows.
        count: Number of rows.

    Raises:
        ValueError: As the filter's function.
    """
    keeps = compile_filter(expression)
    names = [name for name in filter_names(expression) if name in columns]
    rows = zip(*(columns[name] for name in names), strict=True) if names else ((),) * count
    known: dict[tuple[Any, ...], bool] = {}
    kept = []
    for row in rows:
        answer = known.get(row)
        if answer is None:
            answer = keeps(dict(zip(names, row, strict=True)))
            if len(known) < _MAX_KNOWN:
                known[row] = answer
        kept.append(answer)
    return kept
