"""Arguments of public calls: a wrong type or value is a ValueError that names the argument."""

from __future__ import annotations

import difflib
import math
import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

_Value = TypeVar("_Value", bound=str)


def whole(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """A whole number, numpy's too; neither True, nor 5.0, nor "5"."""
    wanted = f"a whole number{_range(least, most)}"
    if isinstance(value, bool):
        raise wrong(name, value, wanted)
    try:
        number = operator.index(value)
    except TypeError:
        raise wrong(name, value, wanted) from None
    if (least is not None and number < least) or (most is not None and number > most):
        raise wrong(name, value, wanted)
    return number


def real(name: str, value: Any, least: float | None = None, most: float | None = None) -> float:
    """A finite number."""
    wanted = f"a number{_range(least, most)}"
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise wrong(name, value, wanted)
    number = float(value)
    if (least is not None and number < least) or (most is not None and number > most):
        raise wrong(name, value, wanted)
    return value if isinstance(value, (int, float)) else number


def text(name: str, value: Any) -> str:
    """A string that can be written as UTF-8."""
    if not isinstance(value, str):
        raise wrong(name, value, "text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has {error.object[error.start]!r} at {error.start}, half of a character; leave it out"
        ) from None
    return value


def texts(name: str, value: Any) -> tuple[str, ...]:
    """A string, or several."""
    if isinstance(value, str):
        return (text(name, value),)
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise wrong(name, value, "text, or a list of texts")
    return tuple(text(f"{name}[{number}]", each) for number, each in enumerate(value))


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise wrong(name, value, "True or False")
    return value


def choice(name: str, value: Any, allowed: Sequence[_Value]) -> _Value:
    """One of a few words."""
    if not isinstance(value, str) or value not in allowed:
        raise wrong(name, value, " or ".join(repr(each) for each in allowed) + near(value, allowed))
    return allowed[allowed.index(value)]  # pyright: ignore[reportArgumentType]


def near(value: Any, known: Iterable[str]) -> str:
    """What may have been meant by a word that isn't known: " (did you mean …?)", or nothing."""
    found = difflib.get_close_matches(value, list(known), n=1) if isinstance(value, str) else []
    return f" (did you mean {found[0]}?)" if found else ""


def wrong(name: str, value: Any, wanted: str) -> ValueError:
    """The error that names an argument."""
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}…"
    kind = "" if value is None or isinstance(value, (bool, int, float, str)) else f" of type {type(value).__name__}"
    return ValueError(f"{name} is {shown}{kind}; give {wanted}")


def _range(least: float | None, most: float | None) -> str:
    match least, most:
        case None, None:
            return ""
        case _, None:
            return f" of at least {least}"
        case None, _:
            return f" of at most {most}"
    return f" from {least} to {most}"
