"""Plain dicts and lists, as YAML and JSON give them, to frozen dataclasses; every key and type is checked."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

T = TypeVar("T")


class _UniqueKeys(yaml.SafeLoader):
    """Refuses what YAML forbids and its reader takes: a key twice in one mapping, also where it is written two ways.

    Dates stay text, as they are in manifests.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        assert node is not None
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            is_merge = key.tag == "tag:yaml.org,2002:merge"
            name = (key.tag,) if is_merge else self.construct_object(key)
            if name in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark)
            seen.add(name)
        return node


_UniqueKeys.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        ValueError: it isn't YAML, or a mapping has a key twice, whose first value would be lost; the message names the
            file.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {error}") from error


def parse(cls: type[T], value: Any, where: str = "", hidden: tuple[str, ...] = (), what: str = "it") -> T:
    """A dataclass from a mapping of its fields; those of other dataclasses are mappings in turn.

    Args:
        cls: the dataclass.
        value: the mapping.
        where: the key that it stands under; "": it is the whole.
        hidden: fields that a mapping may not give.
        what: the whole is called in messages: "the recipe".

    Raises:
        ValueError: a key is unknown or missing, or a value is of another type; the message names the key.
    """
    name = where or what
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a mapping of keys, got {type(value).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.name not in hidden}  # pyright: ignore[reportArgumentType]
    for key in value:
        if key not in fields:
            raise ValueError(f"{name} has the unknown key {key!r}; known are {', '.join(fields)}")
    for key, spec in fields.items():
        if spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING and key not in value:
            raise ValueError(f"{name} lacks the key {key!r}")
    prefix = f"{where}." if where else ""
    return cls(**{key: _convert(hints[key], item, f"{prefix}{key}") for key, item in value.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        fitting = [option for option in options if option is not type(None) and _fits(option, value)]
        return _convert(fitting[0] if fitting else options[0], value, where)
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return parse(hint, value, where)
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} must be a list, got {value!r}")
        inner = typing.get_args(hint)[0]
        return origin(_convert(inner, item, f"{where}[{number}]") for number, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be a mapping, got {value!r}")
        _, inner = typing.get_args(hint)
        twice = next((key for key in value if not isinstance(key, str) and str(key) in value), None)
        if twice is not None:
            raise ValueError(f"{where} has the key {twice} twice, as text and as {type(twice).__name__}")
        return {str(key): _convert(inner, item, f"{where}.{key}") for key, item in value.items()}
    if origin is Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"{where} is {value!r}; it must be one of {', '.join(typing.get_args(hint))}")
        return value
    if not _fits(hint, value):
        raise ValueError(f"{where} is {value!r}; it must be of type {hint.__name__}")
    if hint is float and not abs(value) <= sys.float_info.max:
        raise ValueError(f"{where} is {value}; it must be a finite number")
    return hint(value)


def _fits(hint: Any, value: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (list, tuple):
        return isinstance(value, list | tuple)
    if origin is dict:
        return isinstance(value, Mapping)
    if dataclasses.is_dataclass(hint):
        return isinstance(value, Mapping)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else False
