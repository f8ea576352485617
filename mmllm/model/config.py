"""Frozen dataclasses to and from plain dicts: how a config is stored in a model folder and in YAML."""

from __future__ import annotations

import dataclasses
import types
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

ConfigT = TypeVar("ConfigT")


def config_to_dict(config: Any) -> dict[str, Any]:
    """A nested frozen dataclass as JSON-serializable dicts and lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def config_from_dict(cls: type[ConfigT], values: dict[str, Any], path: str = "") -> ConfigT:
    """The inverse of `config_to_dict`: fields are filled by name, lists become tuples.

    Args:
        cls: a dataclass whose fields are plain values or other dataclasses (optional ones included).
        values: field names to values; nested dataclasses may be given as dicts or as themselves.
        path: where `values` came from, for messages: `"model.decoder"`.

    Raises:
        ValueError: for a key that `cls` does not have, or one without a default that is missing.
    """
    where = f" of {path}" if path else ""
    if not isinstance(values, dict):
        raise ValueError(f"{path or cls.__name__} is {values!r}; give a mapping of {cls.__name__}'s keys")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    for key in values:
        if key not in fields:
            raise ValueError(f"unknown key {key!r}{where}; {cls.__name__} has {', '.join(fields)}")
    required = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    for name in required:
        if name not in values:
            raise ValueError(f"key {name!r}{where} is missing; {cls.__name__} needs {', '.join(required)}")
    hints = get_type_hints(cls)
    return cls(**{key: _convert(hints[key], value, f"{path}.{key}".strip(".")) for key, value in values.items()})


def _convert(hint: Any, value: Any, path: str) -> Any:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    nested = next((option for option in options if dataclasses.is_dataclass(option)), None)
    if nested is not None and isinstance(value, dict):
        return config_from_dict(nested, value, path)  # pyright: ignore[reportArgumentType]
    return tuple(value) if isinstance(value, list) else value
