"""The values of a config.json, each checked when it is read; what is absent is the family's default."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from mmllm.interop.library import transformers_library


class Fields:
    """The fields of one config.json.

    What it leaves out is what transformers' config class of that `model_type` takes, and only then is transformers
    asked: a config.json that says everything is read without it.

    Args:
        values: of config.json.
        family: its `model_type`.
    """

    def __init__(self, values: Mapping[str, Any], family: str):
        self.values = values
        self.family = family

    def get(self, key: str) -> Any:
        """As config.json has it, or the family's default; None where there is neither.

        Raises:
            ModuleNotFoundError: without transformers, for a field that is absent.
            ValueError: transformers does not know the family.
        """
        return self.values[key] if key in self.values else defaults_of(self.family).get(key)

    def first(self, *keys: str) -> str:
        """The first of several names of a field that config.json has; otherwise the first that has a default."""
        given = [key for key in keys if key in self.values]
        return given[0] if given else next((key for key in keys if key in defaults_of(self.family)), keys[0])

    def integer(self, key: str, minimum: int = 1) -> int:
        """A whole number."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.wrong(key, f"a whole number, {minimum} or more")
        return value

    def optional_integer(self, key: str) -> int | None:
        """A whole number of at least 1, or None."""
        return None if self.get(key) is None else self.integer(key)

    def number(self, key: str) -> float:
        """A number."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(key, "a number")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false; null is false."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return bool(value)

    def items(self, key: str, kind: type, what: str) -> tuple[Any, ...] | None:
        """A list of one kind, or None.

        Args:
            key: the field.
            kind: of its items.
            what: the wanted, for the message.
        """
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(each) is kind for each in value):
            raise self.wrong(key, what)
        return tuple(value)

    def wrong(self, key: str, wanted: str, hint: str = "") -> ValueError:
        """An error about a field: what it is, what was wanted, what to do."""
        got = repr(self.get(key)) if key in self.values else f"absent, so {self.get(key)!r} (the default)"
        return ValueError(
            f"config.json: {key} is {got}; {self.family} is imported with {wanted}; "
            f"{hint or 'take the config.json that belongs to the checkpoint'}"
        )


@functools.cache
def defaults_of(family: str) -> dict[str, Any]:
    """What transformers' config class of a family takes for fields that are absent.

    Raises:
        ModuleNotFoundError: without transformers.
        ValueError: this version of transformers does not know the family.
    """
    config_class = _config_class(family)
    parameters = inspect.signature(config_class).parameters.values()
    plain = (str, int, float, bool, list, type(None))
    values = {each.name: each.default for each in parameters if isinstance(each.default, plain)}
    values["rope_theta"] = float(getattr(config_class, "default_theta", 10000.0))
    if family == "glm4_moe":  # set in its constructor
        values["partial_rotary_factor"] = 0.5
    return values


def known_fields(family: str) -> set[str]:
    """Names that transformers' config class of a family gives a meaning."""
    aliases: Mapping[str, str] = getattr(_config_class(family), "attribute_map", {})
    return {*defaults_of(family), *aliases, *aliases.values()}


def _config_class(family: str) -> Any:
    known = transformers_library().CONFIG_MAPPING
    if family not in known:
        raise ValueError(f"the installed transformers does not know model_type {family!r}; install a newer one")
    return known[family]
