"""What the experts do with the modalities: load, dead experts, mutual information. Pure functions of counts.

L MoE layers, M modalities, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmllm.batch import Modality

DEAD_SHARE = 0.01
"""An expert is dead that gets less than this part of an even share (1 / E) of its layer's tokens."""


def load_by_modality(counts_LME: np.ndarray | Tensor) -> np.ndarray:
    """Each modality's share of tokens by expert: rows sum to 1, or are 0 where a modality is absent.

    Args:
        counts_LME: how many of a modality's (token, choice) pairs each layer sent to each expert.

    Returns:
        float64 [L, M, E].
    """
    counts_LME = _as_array(counts_LME)
    return counts_LME / np.maximum(counts_LME.sum(axis=-1, keepdims=True), 1.0)


def dead_experts(counts_LME: np.ndarray | Tensor, dead_share: float = DEAD_SHARE) -> list[list[int]]:
    """The experts of each layer that get less than `dead_share` of an even share over all modalities."""
    counts_LE = _as_array(counts_LME).sum(axis=1)
    total_L1 = counts_LE.sum(axis=-1, keepdims=True)
    starved_LE = counts_LE < dead_share * total_L1 / counts_LE.shape[-1]
    starved_LE |= counts_LE == 0
    return [np.flatnonzero(row).tolist() for row in starved_LE]


def mutual_information_bits(counts_LME: np.ndarray | Tensor) -> np.ndarray:
    """I(expert; modality) of each layer in bits: 0 where routing ignores what a token is.

    At most the entropy of the modalities in these counts, which `routing_summary` gives beside it. A plug-in
    estimate: biased upwards by about (E - 1)(M - 1) / (2 ln 2 · tokens), which is small for thousands of tokens.

    Args:
        counts_LME: as for `load_by_modality`.

    Returns:
        float64 [L].
    """
    counts_LME = _as_array(counts_LME)
    joint_LME = counts_LME / np.maximum(counts_LME.sum(axis=(1, 2), keepdims=True), 1.0)
    independent_LME = joint_LME.sum(axis=2, keepdims=True) * joint_LME.sum(axis=1, keepdims=True)
    ratio_LME = np.divide(joint_LME, independent_LME, out=np.ones_like(joint_LME), where=joint_LME > 0)
    return np.maximum((joint_LME * np.log2(ratio_LME)).sum(axis=(1, 2)), 0.0)


def routing_summary(counts_LME: np.ndarray | Tensor, layers: Sequence[int] | None = None) -> dict[str, Any]:
    """The `routing` part of report.json; plain lists and numbers.

    Args:
        counts_LME: as for `load_by_modality`; modality m is `Modality(m)`.
        layers: the index in the decoder of each MoE layer; None counts from 0.

    Returns:
        `layers`, `num_experts`, `modalities` (names, those absent left out), `load` [L][E] and `load_by_modality`
        [L][modalities][E] as shares, `dead_experts` [L] (lists of experts) and `num_dead_experts`,
        `max_load_ratio` [L] (the busiest expert's load over an even share), `mutual_information_bits` [L] and
        `modality_entropy_bits` [L] (what it could at most be).

    Raises:
        ValueError: the counts aren't [L, M, E] or `layers` has another length.
    """
    counts_LME = _as_array(counts_LME)
    num_layers, num_modalities, num_experts = counts_LME.shape
    if num_modalities > len(Modality):
        raise ValueError(f"counts have {num_modalities} modalities; there are {len(Modality)} in mmllm.batch.Modality")
    layer_ids = list(range(num_layers)) if layers is None else [int(layer) for layer in layers]
    if len(layer_ids) != num_layers:
        raise ValueError(f"got {len(layer_ids)} layer indices for counts of {num_layers} layers; give one for each")
    present = [m for m in range(num_modalities) if counts_LME[:, m].sum() > 0]
    counts_LE = counts_LME.sum(axis=1)
    load_LE = counts_LE / np.maximum(counts_LE.sum(axis=-1, keepdims=True), 1.0)
    dead = dead_experts(counts_LME)
    share_LM = counts_LME.sum(axis=2) / np.maximum(counts_LME.sum(axis=(1, 2))[:, None], 1.0)
    entropy_L = -(share_LM * np.log2(np.where(share_LM > 0, share_LM, 1.0))).sum(axis=1)
    return {
        "layers": layer_ids,
        "num_experts": num_experts,
        "modalities": [Modality(m).name.lower() for m in present],
        "load": _rounded(load_LE),
        "load_by_modality": _rounded(load_by_modality(counts_LME)[:, present]),
        "dead_experts": dead,
        "num_dead_experts": sum(len(experts) for experts in dead),
        "max_load_ratio": _rounded(load_LE.max(axis=-1) * num_experts),
        "mutual_information_bits": _rounded(mutual_information_bits(counts_LME)),
        "modality_entropy_bits": _rounded(np.maximum(entropy_L, 0.0)),
    }


def load_routing(path: str | Path) -> dict[str, Any]:
    """The summary of a run's `routing.json`, as training's RoutingLog writes it.

    The last window stands for the trained model; where it holds fewer than 100 tokens an expert and layer, the whole
    run does.

    Raises:
        ValueError: the file isn't such a record.
    """
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
        last_LME, total_LME = _as_array(raw.get("last_counts", raw["counts"])), _as_array(raw["counts"])
        is_enough = last_LME.sum() >= 100 * last_LME.shape[0] * last_LME.shape[2]
        return routing_summary(last_LME if is_enough else total_LME, raw["layers"])
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no routing record ({error}); give the routing.json that training wrote") from error


def _as_array(counts_LME: np.ndarray | Tensor) -> np.ndarray:
    if isinstance(counts_LME, Tensor):
        counts_LME = counts_LME.detach().cpu().numpy()
    array = np.asarray(counts_LME, dtype=np.float64)
    if array.ndim != 3 or array.shape[-1] == 0 or (array < 0).any():
        raise ValueError(f"got counts of shape {array.shape}; wanted non-negative [layers, modalities, experts]")
    return array


def _rounded(array: np.ndarray, digits: int = 5) -> list[Any]:
    return np.round(array, digits).tolist()
