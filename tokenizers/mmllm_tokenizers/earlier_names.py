"""What a codec's settings and weights were called in the folders that were written first.

Folders with either names are read, and a codec's hash is taken under the first ones: shards and models that name it
stay valid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_SETTINGS = {"quantiser_dropout": "quantizer_dropout"}
_WEIGHTS = {
    f"{prefix}quantiser.{earlier}": f"{prefix}quantizer.{name}"
    for prefix in ("", "codec.")
    for earlier, name in {
        "codebooks_KVD": "codebooks",
        "counts_KV": "counts",
        "sums_KVD": "sums",
        "idle_KV": "idle",
        "num_batches": "num_batches",
    }.items()
}


def current(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An audio tokenizer's configuration and weights with today's names."""
    return _renamed(config, _SETTINGS), {_WEIGHTS.get(name, name): weight for name, weight in weights.items()}


def first(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The same with the first names."""
    settings, names = ({new: old for old, new in table.items()} for table in (_SETTINGS, _WEIGHTS))
    return _renamed(config, settings), {names.get(name, name): weight for name, weight in weights.items()}


def _renamed(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {
        names.get(key, key): _renamed(value, names) if isinstance(value, Mapping) else value
        for key, value in config.items()
    }
