"""A source's `filter`: a small expression over a row's metadata, read with `ast`, never run as Python."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_Row = Mapping[str, Any]
_Value = Callable[[_Row], Any]
_MAX_KNOWN = 100_000

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
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

    Names are metadata keys (`None` where a row has none; comparing that in size gives false). Allowed:
    comparisons, `in`, `and`, `or`, `not`, arithmetic, numbers, strings, lists and parentheses.

    Args:
        expression: e.g. `"not perturbed and width >= 64"`, `"speaker == 'bob'"`, `"split in ['a', 'b']"`.

    Raises:
        ValueError: It isn't such an expression.
    """
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"filter {expression!r} can't be read: {error}") from error
    value = _compile(tree.body, expression)

    def keeps(row: _Row) -> bool:
        try:
            return bool(value(row))
        except (TypeError, ZeroDivisionError):
            return False

    return keeps


def _compile(node: ast.expr, expression: str) -> _Value:
    match node:
        case ast.Constant(value=str() | int() | float() | None as constant):
            return lambda row: constant
        case ast.Name(id=name):
            return lambda row: row.get(name)
        case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
            parts = [_compile(item, expression) for item in items]
            return lambda row: [part(row) for part in parts]
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            inner = _compile(operand, expression)
            return lambda row: not inner(row)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = _compile(operand, expression)
            return lambda row: -inner(row)
        case ast.BoolOp(op=op, values=values):
            parts = [_compile(item, expression) for item in values]
            decide = all if isinstance(op, ast.And) else any
            return lambda row: decide(_truth(part, row) for part in parts)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            function, first, second = _BINARY[type(op)], _compile(left, expression), _compile(right, expression)
            return lambda row: function(first(row), second(row))
        case ast.Compare(left=left, ops=ops, comparators=comparators) if all(type(op) in _COMPARE for op in ops):
            return _comparison([left, *comparators], ops, expression)
    raise ValueError(
        f"filter {expression!r}: {ast.unparse(node)!r} isn't allowed; use names, numbers, strings, lists, "
        f"comparisons, and, or, not and arithmetic"
    )


def _truth(part: _Value, row: _Row) -> bool:
    try:
        return bool(part(row))
    except (TypeError, ZeroDivisionError):
        return False


def _comparison(operands: list[ast.expr], ops: list[ast.cmpop], expression: str) -> _Value:
    parts = [_compile(operand, expression) for operand in operands]
    functions = [_COMPARE[type(op)] for op in ops]

    def compare(row: _Row) -> bool:
        values = [part(row) for part in parts]
        return all(function(left, right) for function, left, right in zip(functions, values, values[1:], strict=False))

    return compare


def filter_names(expression: str) -> list[str]:
    """The metadata keys that an expression reads."""
    tree = ast.parse(expression.strip(), mode="eval")
    return sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)})


def kept_rows(expression: str, columns: Mapping[str, Iterable[Any]], count: int) -> list[bool]:
    """For each row whether it is kept; equal rows are looked at once.

    Args:
        expression: As `compile_filter`.
        columns: The rows' values by key; a key that is missing here is `None` in all rows.
        count: Number of rows.
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
