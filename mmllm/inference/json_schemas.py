"""Which JSON schemas texts can be held to: of the rest a compiler of grammars would leave out what it doesn't know.

What is known here is what xgrammar 0.2.9 was seen to follow; each keyword has a text that it forbids in the tests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

MAX_BYTES = 65_536
MAX_DEPTH = 64
"""Objects and lists within each other, the schema itself among them."""
_ANNOTATIONS = frozenset({
    "$comment", "$defs", "$id", "$schema", "default", "definitions", "deprecated", "description", "examples",
    "readOnly", "title", "writeOnly",
})  # fmt: skip
_OF_TYPE = {
    "string": ("format", "maxLength", "minLength", "pattern"),
    "number": ("exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "multipleOf"),
    "array": ("items", "maxItems", "minItems", "prefixItems", "unevaluatedItems"),
    "object": ("additionalProperties", "maxProperties", "minProperties", "properties", "propertyNames", "required",
               "unevaluatedProperties"),
}  # fmt: skip
_NEED_TYPE = frozenset(keyword for keywords in _OF_TYPE.values() for keyword in keywords)
_ALONE = ("$ref", "allOf", "anyOf", "oneOf")
"""Beside one of them nothing else is followed."""
_BESIDE_TYPE = ("const", "enum")
_KNOWN = _ANNOTATIONS | _NEED_TYPE | {"type", *_ALONE, *_BESIDE_TYPE}


def schema_text(schema: Any) -> str:
    """A schema as JSON, checked.

    Raises:
        ValueError: it is no JSON schema, too large or too deep, or says what can't be followed.
    """
    if not isinstance(schema, Mapping):
        raise ValueError(f"a JSON schema must be a mapping (a JSON object), not {type(schema).__name__}")
    if _is_deeper(schema, MAX_DEPTH):
        raise ValueError(f"the JSON schema is more than {MAX_DEPTH} objects and lists deep; make it flatter")
    try:
        text = json.dumps(schema, default=dict, allow_nan=False, sort_keys=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the JSON schema is no JSON: {error}") from error
    if len(text.encode(errors="surrogatepass")) > MAX_BYTES:
        raise ValueError(f"the JSON schema has {len(text)} characters as JSON; at most {MAX_BYTES} bytes are compiled")
    for place, part in _parts(json.loads(text), "$"):
        _check(place, part)
    return text


def _is_deeper(value: Any, bound: int) -> bool:
    level = [value]
    for _ in range(bound):
        level = [
            each
            for part in level
            for each in (part.values() if isinstance(part, Mapping) else part if isinstance(part, list | tuple) else ())
            if isinstance(each, Mapping | list | tuple)
        ]
        if not level:
            return False
        if len(level) > MAX_BYTES:
            break
    return True


def _parts(schema: Any, place: str) -> Iterator[tuple[str, Any]]:
    """A schema and all within it, each with its place."""
    yield place, schema
    if not isinstance(schema, dict):
        return
    for keyword in ("properties", "$defs", "definitions"):
        if isinstance(schema.get(keyword), dict):
            for name, part in schema[keyword].items():
                yield from _parts(part, f"{place}.{keyword}.{name}")
    for keyword in ("items", "additionalProperties", "propertyNames", "unevaluatedItems", "unevaluatedProperties"):
        if keyword in schema:
            yield from _parts(schema[keyword], f"{place}.{keyword}")
    for keyword in ("prefixItems", "allOf", "anyOf", "oneOf"):
        if isinstance(schema.get(keyword), list):
            for number, part in enumerate(schema[keyword]):
                yield from _parts(part, f"{place}.{keyword}[{number}]")


def _check(place: str, part: Any) -> None:
    if isinstance(part, bool):
        return
    if not isinstance(part, dict):
        raise ValueError(f"the JSON schema has {part!r} at {place}; wanted a schema: an object, true or false")
    for keyword in part:
        if keyword not in _KNOWN:
            raise ValueError(
                f"the JSON schema has {keyword!r} at {place}, which no text can be held to here; leave it out, or say "
                f"it by {', '.join(sorted(_KNOWN - _ANNOTATIONS))}"
            )
    said = [keyword for keyword in part if keyword not in _ANNOTATIONS]
    alone = [keyword for keyword in said if keyword in _ALONE]
    if alone and len(said) > 1:
        others = [keyword for keyword in said if keyword != alone[0]]
        raise ValueError(
            f"the JSON schema has {', '.join(others)} beside {alone[0]} at {place}, which would not be followed; put "
            f"them into each schema that {alone[0]} names"
        )
    typed = [keyword for keyword in said if keyword in _NEED_TYPE]
    fixed = [keyword for keyword in said if keyword in _BESIDE_TYPE]
    if fixed and (typed or len(fixed) > 1):
        raise ValueError(
            f"the JSON schema has {', '.join(fixed + typed)} at {place}; only a type goes beside {fixed[0]}: leave out "
            f"the rest"
        )
    if typed and "type" not in part:
        raise ValueError(f"the JSON schema has {', '.join(typed)} at {place} without a type; say its type")
    if "format" in part and "pattern" in part:
        raise ValueError(f"the JSON schema has format and pattern at {place}; only one of them is followed: choose")
    reference = part.get("$ref")
    if reference is not None and not (isinstance(reference, str) and (reference == "#" or reference.startswith("#/"))):
        raise ValueError(f"the JSON schema has $ref {reference!r} at {place}; only those within it are followed: '#/…'")
