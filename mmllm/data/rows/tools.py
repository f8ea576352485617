"""Tools and their calls as text: what models that call no tools by themselves learn to write.

In the form of Hermes (https://github.com/NousResearch/Hermes-Function-Calling), which Qwen's chat templates write too:
schemas one a line within `<tools>`, each call within `<tool_call>`.
"""

from __future__ import annotations

import json
from typing import Any

from mmllm.data.rows.bad_rows import ManifestError
from mmllm.data.rows.records import is_null

LISTS = ("tools", "functions")
"""Keys of a record whose value lists tools."""
CALLS = ("tool_calls", "function_call")
"""Keys of a turn whose value is calls of tools."""


def tools_text(record: dict[str, Any]) -> str | None:
    """A record's tools as a text of the system; their key leaves the record.

    Raises:
        ManifestError: They are no list of schemas.
    """
    found = {key: parsed(record.pop(key), key) for key in LISTS if key in record}
    listed = {key: value for key, value in found.items() if not _is_nothing(value)}
    if not listed:
        return None
    key, tools = next(iter(listed.items()))
    if len(listed) > 1 and any(value != tools for value in listed.values()):
        raise ManifestError(f"has both {LISTS[0]!r} and {LISTS[1]!r}; give one of the two")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ManifestError(f"{key!r} is {_shown(tools)}; a list of schemas is wanted")
    return "\n".join(["<tools>", *map(_json, tools), "</tools>"])


def calls_text(turn: dict[str, Any], number: int) -> str:
    """A turn's calls of tools as text, "" where it has none; their key leaves the turn.

    Raises:
        ManifestError: They are no calls.
    """
    calls: list[Any] = []
    for key in CALLS:
        value = parsed(turn.pop(key, None), key)
        if not _is_nothing(value):
            calls += value if isinstance(value, list) else [value]
    return "\n".join(call_text(call, number) for call in calls)


def call_text(call: Any, number: int) -> str:
    """One call as text.

    Args:
        call: `{"name", "arguments"}`, alone, as JSON in a text, or as `function` of OpenAI's.
        number: Of its turn, for messages.

    Raises:
        ManifestError: It is no call.
    """
    call = parsed(call, "a call")
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise ManifestError(f"turn {number} calls {_shown(call)}; a call has a 'name' and 'arguments'")
    arguments = parsed(inner.get("arguments", inner.get("parameters", {})), "arguments")
    return f"<tool_call>\n{_json({'name': inner['name'], 'arguments': arguments})}\n</tool_call>"


def parsed(value: Any, what: str) -> Any:
    """What JSON in a text holds; other values as they are.

    Raises:
        ManifestError: A text is no JSON.
    """
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ManifestError(
            f"{what} is {_shown(value)}, which is no JSON ({error}); write it with json.dumps"
        ) from error


def _is_nothing(value: Any) -> bool:
    return is_null(value) or value in ("", [], {})


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return repr(text if len(text) <= 80 else f"{text[:80]}…")
