"""Rotary positions in config.json: `rope_parameters` of transformers 5, `rope_theta` and `rope_scaling` before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmllm.interop.fields import Fields
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.rope import RopeScaling

_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    ),
}  # fmt: skip
"""Of each `rope_type` that can be imported the keys that change the angles."""
_ELSEWHERE = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_WITHOUT_EFFECT = ("original_max_position_embeddings", "max_position_embeddings", "finetuned")
"""Written beside types that don't use them."""


@dataclass(frozen=True)
class Rope:
    """Rotary positions as a config.json has them; see the fields of `DecoderConfig`."""

    theta: float
    scaling: RopeScaling | None
    partial_rotary_factor: float


def read_rope(fields: Fields) -> Rope:
    """The rotary positions of a config.json, as transformers understands it.

    Raises:
        ValueError: a type (longrope, dynamic, …) or key that this decoder does not compute, or a bad value; the message
            names the field.
    """
    where = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
    given = fields.values.get(where) or {}
    if not isinstance(given, Mapping):
        raise fields.wrong(where, "an object or null")
    nested = [key for key, value in given.items() if isinstance(value, Mapping)]
    if nested:
        raise ValueError(
            f"config.json: {where} has positions of their own for {nested[0]!r}; {fields.family} is imported with the "
            f"same in all layers; such a checkpoint can't be imported yet"
        )
    rope_type = given.get("rope_type", given.get("type")) or "default"
    if fields.family == "phi3" and rope_type in ("su", "yarn"):  # as it was called when Phi-3 came
        rope_type = "longrope"
    if not isinstance(rope_type, str) or rope_type not in _KEYS or (fields.family == "phi3" and rope_type != "default"):
        raise ValueError(
            f"config.json: {where}.rope_type is {rope_type!r}; {fields.family} is imported with "
            f"{'default' if fields.family == 'phi3' else ', '.join(_KEYS)} alone; take a checkpoint of the original "
            f"context length"
        )
    theta = _number(given, "rope_theta", where) if given.get("rope_theta") else fields.number("rope_theta")
    if not 0 < theta < math.inf:
        raise ValueError(
            f"config.json: rope_theta is {theta}; wanted a number above 0; take the config.json that belongs to the "
            f"checkpoint"
        )
    if given.get("partial_rotary_factor") is not None:
        factor = _number(given, "partial_rotary_factor", where)
    else:
        factor = fields.number("partial_rotary_factor") if fields.get("partial_rotary_factor") is not None else 1.0
    return Rope(theta, _scaling(fields, given, rope_type, where), factor)


def _scaling(fields: Fields, given: Mapping[str, Any], rope_type: str, where: str) -> RopeScaling | None:
    known = _KEYS[rope_type]
    unknown = sorted(
        key for key, value in given.items() if value is not None and key not in (*known, *_ELSEWHERE, *_WITHOUT_EFFECT)
    )
    if unknown:
        raise ValueError(
            f"config.json: {where}.{unknown[0]} is {given[unknown[0]]!r}, which rope_type {rope_type!r} does not know "
            f"here; known are {', '.join(known) or 'no further keys'}; such a checkpoint can't be imported"
        )
    if rope_type == "default":
        return None
    values = {key: _number(given, key, where) for key in known if given.get(key) is not None}
    if "original_max_position_embeddings" in known:
        length = fields.values.get("original_max_position_embeddings") or values.get("original_max_position_embeddings")
        values["original_max_position_embeddings"] = length or fields.integer("max_position_embeddings")
    if rope_type == "yarn":
        length = values["original_max_position_embeddings"]
        values.setdefault("factor", fields.integer("max_position_embeddings") / length)
        mscale, all_dim = values.pop("mscale", None), values.pop("mscale_all_dim", None)
        if mscale and all_dim and "attention_factor" not in values:
            values["attention_factor"] = _mscale(values["factor"], mscale) / _mscale(values["factor"], all_dim)
        if "truncate" in values:
            values["truncate"] = bool(values["truncate"])
    missing = [key for key in ("factor", "low_freq_factor", "high_freq_factor") if key in known and key not in values]
    if missing:
        raise ValueError(
            f"config.json: {where} lacks {missing[0]}, which rope_type {rope_type!r} needs; take the config.json that "
            f"belongs to the checkpoint"
        )
    return RopeScaling(rope_type, **values)  # pyright: ignore[reportArgumentType]


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _number(given: Mapping[str, Any], key: str, where: str) -> Any:
    value = given[key]
    is_flag = key == "truncate"
    if isinstance(value, bool) != is_flag or not isinstance(value, (int, float)):
        raise ValueError(
            f"config.json: {where}.{key} is {value!r}; wanted {'true or false' if is_flag else 'a number'}; take the "
            f"config.json that belongs to the checkpoint"
        )
    return value


def rope_fields(config: DecoderConfig) -> dict[str, Any]:
    """The fields of config.json that say the rotary positions, in the form of transformers 5 and in that before it.

    Readers that know `rope_theta` alone would otherwise silently take their own default.
    """
    fields: dict[str, Any] = {"rope_theta": config.rope_theta}
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        keys = [key for key in _KEYS[scaling.rope_type] if hasattr(scaling, key)]
        values = {key: value for key in keys if (value := getattr(scaling, key)) is not None}
        if values.get("truncate") is True:  # the default, which older readers don't know
            del values["truncate"]
        parameters |= {"rope_type": scaling.rope_type, **values}
        fields["rope_scaling"] = {"rope_type": scaling.rope_type, **values}
    return {**fields, "rope_parameters": parameters}
