"""A source's filter over the columns of an index: what `expressions.compile_filter` answers, far sooner.

A comparison of one column is made for its different texts, or for all its numbers at once; the answers are then joined
for all rows. What can't be done so goes row by row.

Shapes: N rows. Answers are int8: 1 true, 0 false, -1 unknown.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmllm.data.expressions import filter_names, kept_rows, truth_of
from mmllm.data.index.columns import Column

_UNKNOWN = -1
_ORDER: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}  # fmt: skip
_MIRRORED: dict[type[ast.cmpop], type[ast.cmpop]] = {ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE}
_EXACT = 2.0**53
"""Whole numbers up to here are compared as floats without error."""


@dataclass(frozen=True)
class _Values:
    """A column: its different values and which of them each row has, or numbers alone."""

    different: Sequence[Any]
    places_N: np.ndarray
    numbers_N: np.ndarray | None = None
    """float64, not a number where a row has none."""
    is_whole: bool | None = None
    """Whether the numbers are integers; `None`: some are."""


def kept_documents(expression: str, columns: Mapping[str, Column | np.ndarray], count: int) -> np.ndarray:
    """Bools [N], whether each row is kept.

    Args:
        expression: As `compile_filter`.
        columns: By name: of the index, or numbers [N]; a name that is missing here is missing in all rows.
        count: N.

    Raises:
        ValueError: A text is compared with a number, or computed with.
    """
    names = [name for name in filter_names(expression) if name in columns]
    try:
        values = {name: _values(columns[name]) for name in names}
        return _Over(expression, values, count).answer(ast.parse(expression.strip(), mode="eval").body) == 1
    except (ValueError, _RowByRowError):  # row by row it may be that no row comes to it; and then the row is named
        rows = {name: column.tolist() if isinstance(column, np.ndarray) else column for name, column in columns.items()}
        return np.array(kept_rows(expression, {name: rows[name] for name in names}, count), dtype=bool)


class _RowByRowError(Exception):
    """It can't be answered for all rows at once."""


def _values(column: Column | np.ndarray) -> _Values:
    if isinstance(column, np.ndarray):
        return _of_numbers(column.astype(np.float64), column.dtype.kind in "iu")
    if column.is_all_numbers:
        return _of_numbers(column.values_N.astype(np.float64), column.values_N.dtype.kind in "iu")
    values_N, is_text_N, is_number_N, words = column.values_N, column.is_text_N, column.is_number_N, column.words
    if not is_text_N.any():
        return _of_numbers(np.where(is_number_N, values_N.astype(np.float64), np.nan), column.is_whole)
    if is_number_N.any():
        raise _RowByRowError
    return _Values([*words, None], np.where(is_text_N, values_N, len(words)).astype(np.int64))


def _of_numbers(numbers_N: np.ndarray, is_whole: bool | None) -> _Values:
    if is_whole is not False and (np.abs(numbers_N) >= _EXACT).any():
        raise _RowByRowError
    return _Values((), np.zeros(0, dtype=np.int64), numbers_N, is_whole)


class _Over:
    """Answers an expression for all rows."""

    def __init__(self, expression: str, values: Mapping[str, _Values], count: int) -> None:
        self._expression, self._columns, self._count = expression, values, count

    def answer(self, node: ast.expr) -> np.ndarray:
        """int8 [N]."""
        match node:
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                inner = self.answer(operand)
                return np.where(inner == _UNKNOWN, _UNKNOWN, 1 - inner).astype(np.int8)
            case ast.BoolOp(op=op, values=values):
                return _joined([self.answer(item) for item in values], isinstance(op, ast.Or))
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                operands = [left, *comparators]
                pairs = zip(operands, ops, operands[1:], strict=False)
                return _joined([self._compared(one, op, other) for one, op, other in pairs], False)
        return self._of_one_column(node)

    def _compared(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> np.ndarray:
        kind = type(op)
        if kind in _ORDER and not isinstance(left, ast.Name) and isinstance(right, ast.Name):
            left, right, kind = right, left, _MIRRORED.get(kind, kind)
        if isinstance(left, ast.Name) and kind in _ORDER and left.id in self._columns:
            numbers_N, constant = self._columns[left.id].numbers_N, _number(right)
            if numbers_N is not None and constant is not None:
                answers = _ORDER[kind](numbers_N, constant).astype(np.int8)
                answers[np.isnan(numbers_N)] = _UNKNOWN
                return answers
        return self._of_one_column(ast.Compare(left, [kind()], [right]))

    def _of_one_column(self, node: ast.expr) -> np.ndarray:
        """What is asked of no column, or of one: its different values are asked, each once."""
        names = sorted({item.id for item in ast.walk(node) if isinstance(item, ast.Name)})
        truth = truth_of(node, self._expression)
        if not names or (len(names) == 1 and names[0] not in self._columns):
            return np.full(self._count, _told(truth({})), dtype=np.int8)
        if len(names) > 1:
            raise _RowByRowError
        values = self._columns[names[0]]
        different, places_N = values.different, values.places_N
        if values.numbers_N is not None:
            found, places_N = np.unique(values.numbers_N, return_inverse=True)
            different = found.tolist()
            if values.is_whole is not False and any(isinstance(item, ast.BinOp) for item in ast.walk(node)):
                if values.is_whole is None:
                    raise _RowByRowError
                different = [None if np.isnan(value) else int(value) for value in different]  # exact, as Python's are
        used = np.flatnonzero(np.bincount(places_N, minlength=len(different)))
        answers = np.zeros(len(different), dtype=np.int8)
        answers[used] = [_told(truth({names[0]: different[place]})) for place in used.tolist()]
        return answers[places_N]


def _joined(parts: Sequence[np.ndarray], is_or: bool) -> np.ndarray:
    """`or` is true where a part is, else unknown where a part is; `and` is that of the opposites."""
    if len(parts) == 1:
        return parts[0]
    # Written as 0 false, 1 unknown, 2 true, `or` is the largest and `and` the least.
    orders = [_ORDERED[part] for part in parts]
    return _ANSWERS[np.maximum.reduce(orders) if is_or else np.minimum.reduce(orders)]


_ORDERED = np.array([0, 2, 1], dtype=np.int8)
"""By an answer, -1 the last."""
_ANSWERS = np.array([0, -1, 1], dtype=np.int8)


def _number(node: ast.expr) -> float | None:
    match node:
        case ast.Constant(value=int() | float() as value) if abs(value) < _EXACT:
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)) if abs(value) < _EXACT:
            return -value
    return None


def _told(holds: bool | None) -> int:
    return _UNKNOWN if holds is None else int(holds)
