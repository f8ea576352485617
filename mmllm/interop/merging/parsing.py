"""A merge's YAML, read and checked: every key, number and model is named where it can't be."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from mmllm.interop.merging.formulas import METHODS
from mmllm.interop.merging.settings import (
    ADAPTER_METHODS,
    BRANCHES,
    DTYPES,
    Alignment,
    MergeConfig,
    Part,
    Setting,
)

_KEYS = (
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "seed", "engine",
    "align_experts", "evolve", "adapter", "experts_per_token",
)  # fmt: skip
_REFUSED = {
    "modules": "a model folder is merged whole: leave it out, and give parameters filters for its parts",
    "tokenizer_source": "parents have one and the same tokenizer here: leave it out",
    "tokenizer": "parents have one and the same tokenizer here: leave it out",
    "chat_template": "parents have one and the same here: leave it out",
    "write_readme": "the card is always written: leave it out",
}
_IGNORED = ("int8_mask",)
"""How much memory mergekit takes; nothing else depends on it."""


def read_config(path: str | Path) -> MergeConfig:
    """A merge's YAML.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it isn't one; the message names the key.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} holds a {type(values).__name__}; wanted keys such as merge_method and models")
    try:
        return parse_config(values, text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_config(values: Mapping[str, Any], text: str = "") -> MergeConfig:
    """A merge's YAML, loaded.

    Args:
        values: its keys.
        text: the YAML itself.

    Raises:
        ValueError: an unknown method or key, or a value that can't be; the message names it.
    """
    for key, why in _REFUSED.items():
        if key in values:
            raise ValueError(f"{key} is given, which mmllm doesn't do: {why}")
    _check_keys("the file", values, _KEYS)
    method, adapter = values.get("merge_method"), values.get("adapter")
    known = ADAPTER_METHODS if adapter is not None else (*METHODS, BRANCHES)
    if not isinstance(method, str) or method not in known:
        what = "of adapters (adapter is given)" if adapter is not None else "of models"
        raise ValueError(f"merge_method is {method!r}{_near(str(method), known)}; {what} there are {', '.join(known)}")
    base = None if values.get("base_model") is None else _path("base_model", values["base_model"])
    allowed = _parameters_of(method, adapter is not None)
    parts = tuple(_parts(values, allowed, base))
    parents = tuple(parts[0].models)
    _check_parents(method, base, parents, is_adapters=adapter is not None)
    shared = _settings("parameters", values.get("parameters"), allowed)
    seed, engine = values.get("seed", 0), values.get("engine", "mmllm")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed is {seed!r}; give a whole number, 0 or more")
    if engine not in ("mmllm", "mergekit"):
        raise ValueError(f"engine is {engine!r}; choose mmllm (the formulas here) or mergekit (its own process)")
    of_models = adapter is None and method in METHODS
    for key, is_given in (("engine", engine == "mergekit"), ("align_experts", "align_experts" in values),
                          ("evolve", "evolve" in values)):  # fmt: skip
        if is_given and not of_models:
            what = "of adapters" if adapter is not None else f"by {method}"
            raise ValueError(f"{key} is {values[key]!r}, which merges {what} don't have; leave it out")
    for key in ("slices", "dtype", "out_dtype") if adapter is not None else ():
        if key in values:
            raise ValueError(f"{key} is {values[key]!r}, which merges of adapters don't have; leave it out")
    per_token = values.get("experts_per_token", 2)
    if "experts_per_token" in values and method != BRANCHES:
        raise ValueError(f"experts_per_token is given, but merge_method is {method}; only {BRANCHES} has it")
    if method == BRANCHES and not (isinstance(per_token, int) and 1 <= per_token <= len(parents)):
        raise ValueError(f"experts_per_token is {per_token!r}; it must be between 1 and {len(parents)}, the models")
    evolve = values.get("evolve")
    if evolve is not None and (engine == "mergekit" or "slices" in values):
        raise ValueError("evolve is given with engine mergekit, or with slices; it takes models and mmllm's formulas")
    return MergeConfig(
        method, parents, base, parts, shared, _dtype(values), seed, engine, _alignment(values), evolve,
        adapter, per_token, text or yaml.safe_dump(dict(values), sort_keys=False),
    )  # fmt: skip


def _parameters_of(method: str, is_adapters: bool) -> tuple[str, ...]:
    if is_adapters:
        density = () if method in ("svd", "linear", "cat") else ("density",)
        signs = ("majority_sign_method",) if "ties" in method else ()
        return ("weight", *density, *signs, *(("svd_rank",) if method.endswith("svd") else ()))
    if method == BRANCHES:
        return ("weight",)
    return (*METHODS[method].of_models, *METHODS[method].shared, *_IGNORED)


def _parts(values: Mapping[str, Any], allowed: Sequence[str], base: str | None) -> Iterator[Part]:
    if ("models" in values) == ("slices" in values):
        raise ValueError("give models, or slices: one of them, a list")
    if "models" in values:
        yield Part(None, _models("models", values["models"], allowed, base, ("model", "parameters")))
        return
    first: list[str] | None = None
    for number, values_of_slice in enumerate(_listed("slices", values["slices"])):
        where = f"slices[{number}]"
        _check_keys(where, values_of_slice, ("sources", "parameters"))
        sources = _listed(f"{where}.sources", values_of_slice.get("sources"))
        models = _models(f"{where}.sources", sources, allowed, base, ("model", "layer_range", "parameters"))
        first = first or list(models)
        if list(models) != first:
            raise ValueError(f"{where} has the models {', '.join(models)}, slices[0] {', '.join(first)}; name the same")
        ranges = {tuple(_range(f"{where}.sources", source.get("layer_range"))) for source in sources}
        if len(ranges) > 1:
            raise ValueError(f"{where} takes other layers of other models: {sorted(ranges)}; give one layer_range")
        shared = _settings(f"{where}.parameters", values_of_slice.get("parameters"), allowed)
        start, end = ranges.pop()
        yield Part((start, end), models, shared)


def _range(where: str, value: Any) -> list[int]:
    is_range = isinstance(value, list) and len(value) == 2 and all(type(each) is int for each in value)
    if not is_range or not 0 <= value[0] < value[1]:
        raise ValueError(f"{where} has layer_range {value!r}; wanted [first, behind the last]")
    return value


def _models(
    where: str, values: Any, allowed: Sequence[str], base: str | None, keys: tuple[str, ...]
) -> dict[str, Mapping[str, Setting]]:
    """Parameters of each parent but the base."""
    models: dict[str, Mapping[str, Setting]] = {}
    seen: set[str] = set()
    for number, entry in enumerate(_listed(where, values)):
        _check_keys(f"{where}[{number}]", entry, keys)
        path = _path(f"{where}[{number}].model", entry.get("model"))
        parameters = _settings(f"{where}[{number}].parameters", entry.get("parameters"), allowed)
        if path in seen:
            raise ValueError(f"{where} names {path} twice; name each parent once")
        seen.add(path)
        if path != base:
            models[path] = parameters
        elif parameters:
            raise ValueError(f"{where}[{number}] is base_model, {path}, and has parameters; the base has none")
    return models


def _check_parents(method: str, base: str | None, parents: tuple[str, ...], is_adapters: bool) -> None:
    if is_adapters or method == BRANCHES:
        needs_base, fewest, most = is_adapters, 2, None
    else:
        rule = METHODS[method]
        needs_base, fewest, most = rule.needs_base, rule.min_parents, rule.max_parents
    if needs_base and base is None:
        raise ValueError(f"base_model is missing; {method} needs the model that the others began with")
    if base is not None and not needs_base:
        raise ValueError(f"base_model is {base}, but {method} has no base; leave it out, and name it among the models")
    if len(parents) < fewest or (most is not None and len(parents) > most):
        beside = " beside base_model" if needs_base else ""
        wanted = f"exactly {fewest}" if fewest == most else f"at least {fewest}"
        raise ValueError(f"models names {len(parents)}{beside}; {method} wants {wanted}")


def _settings(where: str, values: Any, allowed: Sequence[str]) -> dict[str, Setting]:
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is {values!r}; wanted keys such as {allowed[0] if allowed else 'none'}")
    _check_keys(where, values, allowed)
    return {key: _setting(f"{where}.{key}", key, value) for key, value in values.items() if key not in _IGNORED}


def _setting(where: str, key: str, value: Any) -> Setting:
    """A parameter with its numbers as numbers (YAML takes 1e-3 for text)."""
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list):
        if not value:
            raise ValueError(f"{where} is an empty list; give numbers, or filters")
        if not any(isinstance(each, Mapping) for each in value):
            return [_scalar(where, key, each) for each in value]
        for each in value:
            if not isinstance(each, Mapping):
                raise ValueError(f"{where} has {each!r} among filters; give {{value: {each!r}}}")
            _check_keys(where, each, ("filter", "value"))
        return [{"filter": each.get("filter"), "value": _setting(where, key, each.get("value"))} for each in value]
    return _scalar(where, key, value)


def _scalar(where: str, key: str, value: Any) -> Any:
    if key in ("normalize", "rescale", "filter_wise"):
        if not isinstance(value, bool):
            raise ValueError(f"{where} is {value!r}; give true or false")
        return value
    if key == "majority_sign_method":
        if value not in ("total", "frequency"):
            raise ValueError(f"{where} is {value!r}; choose total or frequency")
        return value
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where} is {value!r}; give a number")
    if key in ("density", "t", "epsilon") and not 0 <= number <= 1:
        raise ValueError(f"{where} is {number:g}; it must be between 0 and 1")
    if key == "svd_rank" and (number < 1 or number != int(number)):
        raise ValueError(f"{where} is {number:g}; a rank is a whole number, 1 or more")
    return number


def _alignment(values: Mapping[str, Any]) -> Alignment:
    given = values.get("align_experts") or "none"
    if isinstance(given, str):
        return Alignment(given)
    _check_keys("align_experts", given, ("by", "manifest", "limit"))
    return Alignment(**given)


def _dtype(values: Mapping[str, Any]) -> torch.dtype | None:
    """Of what is written; `dtype` is also what mergekit computes in, where here it is float32 or wider always."""
    for key in ("out_dtype", "dtype"):
        name = values.get(key)
        if name is not None:
            if name not in DTYPES:
                raise ValueError(f"{key} is {name!r}; choose {', '.join(DTYPES)}, or leave it out: as the parents'")
            return DTYPES[name]
    return None


def _listed(where: str, value: Any) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} is {value!r}; wanted a list with at least one entry")
    return value


def _path(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where} is {value!r}; give a model folder, or DIR+NAME with one of its adapters")
    return value.rstrip("/")


def _check_keys(where: str, values: Any, known: Sequence[str]) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is {values!r}; wanted the keys {', '.join(known)}")
    for key in values:
        if key not in known:
            near = _near(str(key), known)
            raise ValueError(f"{where} has the key {key!r}{near}; known are {', '.join(known) or 'none'}")


def _near(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {found[0]}?)" if found else ""
