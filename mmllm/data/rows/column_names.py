"""Whose column is what: `--columns image=filepath,text=title,score:float`, and of which type."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, cast

from mmllm.data.rows.bad_rows import ManifestError

Type = Literal["text", "int", "float", "bool"]
TYPES: tuple[Type, ...] = ("text", "int", "float", "bool")
OWN = ("id", "text", "image", "audio")
"""Columns that are found however they are capitalized."""
_INT = re.compile(r"[+-]?\d+", re.ASCII)
_FLOAT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_INT64_MIN, _INT64_MAX, _INT64_DIGITS = -(2**63), 2**63 - 1, 19
_NO_NUMBER = ("", "nan", "na", "n/a", "null", "none")
"""What stands in a column of numbers where there is none: such a row has no value."""
_BOOLS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


@dataclass(frozen=True)
class ColumnNames:
    """What columns are called here, and of which type they are."""

    ours: dict[str, str] = field(default_factory=dict)
    """Our name of each of their columns that was named."""
    types: dict[str, Type] = field(default_factory=dict)
    """By our name."""

    @classmethod
    def parse(cls, texts: Sequence[str]) -> ColumnNames:
        """From items `[ours=]theirs[:type]`, several in one text apart by commas.

        Raises:
            ValueError: One can't be read, or a name is given twice.
        """
        ours: dict[str, str] = {}
        types: dict[str, Type] = {}
        for item in (part.strip() for text in texts for part in text.split(",")):
            named, colon, kind = item.rpartition(":")
            if colon and kind not in TYPES:
                raise ValueError(f"columns has {item!r}: {kind!r} is no type; give one of {', '.join(TYPES)}")
            name, equals, theirs = (named if colon else item).partition("=")
            theirs = (theirs if equals else name).strip()
            name = name.strip()
            if not name or not theirs:
                raise ValueError(f"columns has {item!r}; give [ours=]theirs[:type], e.g. image=filepath,score:float")
            if theirs in ours or name in ours.values():
                raise ValueError(f"columns names {theirs if theirs in ours else name!r} twice; name each column once")
            ours[theirs] = name
            if colon:
                types[name] = cast("Type", kind)
        return cls(ours, types)

    def unknown(self, names: Collection[str]) -> list[str]:
        """Columns that were named and aren't among these."""
        return [theirs for theirs in self.ours if theirs not in names]

    def applied(self, record: dict[str, Any]) -> dict[str, Any]:
        """A record with our names and types; a column whose name another one was given gets `source_` before its own.

        Raises:
            ManifestError: A value isn't of its column's type.
        """
        if not self.ours and not self.types and all(_own_name(key) == key for key in record):
            return record
        named = {ours: record[theirs] for theirs, ours in self.ours.items() if theirs in record}
        for key, value in record.items():
            if key not in self.ours:
                own = _own_name(key)
                name = key if own in record or own in self.ours.values() else own
                named[f"source_{name}" if name in named else name] = value
        for name, kind in self.types.items():
            if name in named and (value := _typed(named.pop(name), kind, name)) is not None:
                named[name] = value
        return named


@lru_cache(maxsize=4096)
def _own_name(key: str) -> str:
    """`Image` is `image`; other names stay."""
    name = key.strip().lower()
    return name if name in OWN else key


def _typed(value: Any, kind: Type, name: str) -> Any:
    """A value as the type that was asked for; None where it is none."""
    if value is None:
        return None
    text = value.strip() if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
    match kind:
        case "text":
            return value if isinstance(value, str) else text
        case "int" | "float" | "bool" if text.lower() in _NO_NUMBER:
            return None
        case "int" if _INT.fullmatch(text):
            if (whole := _int64(text)) is not None:
                return whole
            shown = text if len(text) <= 40 else f"{text[:40]}…"
            raise ManifestError(
                f"{name!r} is {shown}, which 64 bits don't hold; keep it as a text ({name}:text), or take the nearest "
                f"number ({name}:float)"
            )
        case "float" if _FLOAT.fullmatch(text) and math.isfinite(float(text)):
            return float(text)
        case "bool" if text.lower() in _BOOLS:
            return _BOOLS[text.lower()]
    wanted = {"int": "a whole number", "float": "a number", "bool": "true or false"}[kind]
    raise ManifestError(f"{name!r} is {value!r}; --columns {name}:{kind} wants {wanted}")


def _int64(text: str) -> int | None:
    """The integer that digits stand for; None where an index can't hold it."""
    digits = text.lstrip("+-0") or "0"
    if len(digits) > _INT64_DIGITS:  # also more than Python reads at all
        return None
    value = -int(digits) if text.startswith("-") else int(digits)
    return value if _INT64_MIN <= value <= _INT64_MAX else None
