"""What the experts do with the modalities: load, dead experts, violations, entropy, mutual information, drift.

L MoE layers, M modalities, E experts, N tokens, K experts a token.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mmllm.batch import Modality, PackedBatch

if TYPE_CHECKING:
    from mmllm.model.multimodal import MultimodalModel
    from mmllm.model.router import Routing

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


def max_violation(counts_LME: np.ndarray | Tensor) -> np.ndarray:
    """The busiest expert's load over the mean load, minus 1 (MaxVio, arXiv 2408.15664), of each layer: 0 is balance.

    Args:
        counts_LME: as for `load_by_modality`.

    Returns:
        float64 [L]; 0 where there are no tokens.
    """
    counts_LE = _as_array(counts_LME).sum(axis=1)
    mean_L = counts_LE.mean(axis=-1)
    return np.where(mean_L > 0, counts_LE.max(axis=-1) / np.maximum(mean_L, 1e-300) - 1, 0.0)


def load_divergence_bits(counts_LME: np.ndarray | Tensor, other_LME: np.ndarray | Tensor) -> np.ndarray:
    """Jensen-Shannon divergence of two loads of each layer over its experts, in bits: 0 alike, 1 disjoint.

    Args:
        counts_LME: as for `load_by_modality`.
        other_LME: of the same layers and experts, at another step or of another model.

    Returns:
        float64 [L]; 0 where one of them has no tokens.

    Raises:
        ValueError: the shapes differ.
    """
    first_LE, second_LE = _as_array(counts_LME).sum(axis=1), _as_array(other_LME).sum(axis=1)
    if first_LE.shape != second_LE.shape:
        raise ValueError(
            f"got counts of {list(first_LE.shape)} and {list(second_LE.shape)} layers and experts; drift is between "
            f"checkpoints of one shape"
        )
    p_LE, q_LE = (x_LE / np.maximum(x_LE.sum(axis=-1, keepdims=True), 1.0) for x_LE in (first_LE, second_LE))
    mean_LE = (p_LE + q_LE) / 2
    divergence_L = (_divergence(p_LE, mean_LE) + _divergence(q_LE, mean_LE)) / 2
    return np.where((first_LE.sum(axis=-1) > 0) & (second_LE.sum(axis=-1) > 0), np.maximum(divergence_L, 0.0), 0.0)


def _divergence(p_LE: np.ndarray, q_LE: np.ndarray) -> np.ndarray:
    ratio_LE = np.divide(p_LE, q_LE, out=np.ones_like(p_LE), where=p_LE > 0)
    return (p_LE * np.log2(ratio_LE)).sum(axis=-1)


def chosen_experts(model: MultimodalModel, batch: PackedBatch) -> Tensor:
    """The experts that each token of a batch goes to, int64 [L, N, K], the lowest index first; -1: none.

    The model is run in evaluation mode and left as it was; nothing random is drawn.
    """
    chosen: list[Tensor] = []
    was_training = model.training
    with _recorded(model, chosen), torch.no_grad():
        try:
            model.eval()
            model(batch)  # its forward pass, which gathers weights that are sharded
        finally:
            model.train(was_training)
    if not chosen:
        return torch.zeros(0, 0, 0, dtype=torch.int64)
    return torch.stack(chosen).sort(dim=-1).values


@contextlib.contextmanager
def _recorded(model: MultimodalModel, chosen: list[Tensor]) -> Iterator[None]:
    """Compiled layers run as they are written: with each new hook they would be compiled anew, and soon refused."""

    def keep(router: nn.Module, inputs: Any, routing: Routing) -> None:
        chosen.append(routing.experts_NK)

    blocks: list[Any] = list(model.decoder.layers)
    compiled = [block.compiled for block in blocks]
    hooks = [moe.gate.register_forward_hook(keep) for moe in model.decoder.expert_layers().values()]
    try:
        for block in blocks:
            block.compiled = None
        yield
    finally:
        for block, function in zip(blocks, compiled, strict=True):
            block.compiled = function
        for hook in hooks:
            hook.remove()


def changed_share(experts_LNK: Tensor, other_LNK: Tensor) -> Tensor:
    """Share of tokens of each layer whose set of experts is another one, float64 [L] on their device.

    Args:
        experts_LNK: of a fixed batch, as `chosen_experts` gives them.
        other_LNK: of the same batch, at another step or of another model.

    Raises:
        ValueError: the shapes differ.
    """
    if experts_LNK.shape != other_LNK.shape:
        raise ValueError(
            f"got choices of {list(experts_LNK.shape)} and {list(other_LNK.shape)} layers, tokens and experts a token; "
            f"drift is between models of one shape on one batch"
        )
    if not experts_LNK.shape[1]:
        return experts_LNK.new_zeros(experts_LNK.shape[0], dtype=torch.float64)
    return (experts_LNK != other_LNK).any(dim=-1).double().mean(dim=1)


def routing_drift(model: MultimodalModel, other: MultimodalModel, batch: PackedBatch) -> dict[str, Any]:
    """How far apart two checkpoints route one batch.

    Returns:
        `layers`, `changed_share` [L] (tokens whose set of experts differs) and `load_divergence_bits` [L].

    Raises:
        ValueError: their layers or experts differ.
    """
    first_LNK, second_LNK = chosen_experts(model, batch), chosen_experts(other, batch)
    shares_L = changed_share(first_LNK, second_LNK)
    decoders = (model.config.decoder, other.config.decoder)
    num_experts = max(decoder.moe.num_experts if decoder.moe else 1 for decoder in decoders)
    counts = [
        np.stack([np.bincount(e[e >= 0], minlength=num_experts) for e in experts_LNK.cpu().numpy()])[:, None]
        for experts_LNK in (first_LNK, second_LNK)
        if len(experts_LNK)
    ]
    return {
        "layers": list(model.decoder.expert_layers()),
        "changed_share": _rounded(shares_L.cpu().numpy()),
        "load_divergence_bits": _rounded(load_divergence_bits(*counts)) if counts else [],
    }


def routing_summary(
    counts_LME: np.ndarray | Tensor,
    layers: Sequence[int] | None = None,
    entropy_sums_LM: np.ndarray | Tensor | None = None,
    tokens_M: np.ndarray | Tensor | None = None,
) -> dict[str, Any]:
    """The `routing` part of report.json; plain lists and numbers.

    Args:
        counts_LME: as for `load_by_modality`; modality m is `Modality(m)`.
        layers: the index in the decoder of each MoE layer; None counts from 0.
        entropy_sums_LM: entropy of the router's probabilities for a token, in nats, summed over each modality's tokens.
        tokens_M: how many these are.

    Returns:
        `layers`, `num_experts`, `modalities` (names, those absent left out), `load` [L][E] and `load_by_modality`
        [L][modalities][E] as shares, `dead_experts` [L] (lists of experts) and `num_dead_experts`,
        `max_load_ratio` [L] (the busiest expert's load over an even share), `max_violation` [L] (that less 1),
        `mutual_information_bits` [L] and `modality_entropy_bits` [L] (what it could at most be); with entropies
        `router_entropy_bits` [L] and `router_entropy_bits_by_modality` [L][modalities] (at most log2 E).

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
    summary = {
        "layers": layer_ids,
        "num_experts": num_experts,
        "modalities": [Modality(m).name.lower() for m in present],
        "load": _rounded(load_LE),
        "load_by_modality": _rounded(load_by_modality(counts_LME)[:, present]),
        "dead_experts": dead,
        "num_dead_experts": sum(len(experts) for experts in dead),
        "max_load_ratio": _rounded(load_LE.max(axis=-1) * num_experts),
        "max_violation": _rounded(max_violation(counts_LME)),
        "mutual_information_bits": _rounded(mutual_information_bits(counts_LME)),
        "modality_entropy_bits": _rounded(np.maximum(entropy_L, 0.0)),
    }
    if entropy_sums_LM is not None and tokens_M is not None:
        sums_LM, tokens_M = _plain(entropy_sums_LM), _plain(tokens_M)
        means_LM = sums_LM / np.maximum(tokens_M, 1.0) / math.log(2)
        summary["router_entropy_bits"] = _rounded(sums_LM.sum(axis=1) / max(tokens_M.sum(), 1.0) / math.log(2))
        summary["router_entropy_bits_by_modality"] = _rounded(means_LM[:, present])
    return summary


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
        counts_LME, prefix = (last_LME, "last_") if is_enough and "last_counts" in raw else (total_LME, "")
        entropies = (raw.get(f"{prefix}entropy_sums"), raw.get(f"{prefix}tokens"))  # not in files of earlier versions
        return routing_summary(counts_LME, raw["layers"], *entropies)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no routing record ({error}); give the routing.json that training wrote") from error


def _plain(values: np.ndarray | Tensor) -> np.ndarray:
    return np.asarray(values.detach().cpu().numpy() if isinstance(values, Tensor) else values, dtype=np.float64)


def _as_array(counts_LME: np.ndarray | Tensor) -> np.ndarray:
    array = _plain(counts_LME)
    if array.ndim != 3 or array.shape[-1] == 0 or (array < 0).any():
        raise ValueError(f"got counts of shape {array.shape}; wanted non-negative [layers, modalities, experts]")
    return array


def _rounded(array: np.ndarray, digits: int = 5) -> list[Any]:
    return np.round(array, digits).tolist()
