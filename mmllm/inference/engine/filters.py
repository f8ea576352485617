"""From logits to one id: temperature, top-k, top-p, min-p and typical sampling, of rows that may each have their own.

All are row by row and each changes nothing of a row that doesn't ask for it, so that a row's bits are the same in any
batch. They are transformers' filters, in its order.

Shapes: B rows, V ids.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmllm.checkpoints.settings import Sampling

_LEAST_TEMPERATURE = 1e-30
"""Below it logits over the temperature would overflow; long before it, only the most probable id is left."""


@dataclass(frozen=True)
class Filters:
    """What of `Sampling` narrows what is drawn, as numbers that all rows have: those that don't narrow change nothing.

    Use `of`: it gives equal settings the same object, so that `is` tells them apart in a batch.
    """

    temperature: float
    top_k: float
    top_p: float
    min_p: float
    typical_p: float

    @staticmethod
    def of(sampling: Sampling) -> Filters | None:
        """Of these settings, whatever their seed; None: the most probable id is taken."""
        return _filters(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.typical_p)


@functools.lru_cache(maxsize=4096)
def _filters(
    temperature: float, top_k: int | None, top_p: float | None, min_p: float | None, typical_p: float | None
) -> Filters | None:
    if temperature == 0:
        return None
    return Filters(
        max(float(temperature), _LEAST_TEMPERATURE),
        torch.inf if top_k is None else int(top_k),
        torch.inf if top_p is None or top_p >= 1 else float(top_p),
        min_p or 0.0,
        torch.inf if typical_p is None or typical_p >= 1 else float(typical_p),
    )


def draw(logits_BV: Tensor, sampling: Sampling, uniforms_B: Tensor) -> Tensor:
    """One id a row.

    Args:
        logits_BV: -inf where an id is forbidden; at least one a row is not.
        sampling: how to draw, in all rows; penalties are not applied.
        uniforms_B: in [0, 1): a row's id is where the cumulated probability passes its number.

    Returns:
        int64 [B].
    """
    filters = Filters.of(sampling)
    if filters is None:
        return logits_BV.argmax(dim=-1)
    return pick(probabilities(logits_BV, [filters]), uniforms_B)


def draw_each(logits_BV: Tensor, filters: Sequence[Filters | None], uniforms_B: Tensor) -> Tensor:
    """As `draw`, each row with filters of its own: of equal ones the same bits, whatever the other rows'."""
    drawn = [place for place, each in enumerate(filters) if each is not None]
    if not drawn:
        return logits_BV.argmax(dim=-1)
    chosen = [each for each in filters if each is not None]
    if all([each is chosen[0] for each in chosen]):
        chosen = chosen[:1]
    if len(drawn) == len(filters):
        return pick(probabilities(logits_BV, chosen), uniforms_B)
    ids_B = logits_BV.argmax(dim=-1)
    places = torch.tensor(drawn, device=logits_BV.device)
    return ids_B.index_copy(0, places, pick(probabilities(logits_BV[places], chosen), uniforms_B[places]))


def pick(probs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """int64 [B]: where the cumulated probability (its sum need not be 1) passes a row's number in [0, 1)."""
    cumulated_BV = probs_BV.cumsum(dim=-1)
    passed_BV = cumulated_BV <= uniforms_B[:, None].to(cumulated_BV) * cumulated_BV[:, -1:]
    return passed_BV.sum(dim=-1)


def probabilities(logits_BV: Tensor, filters: Sequence[Filters]) -> Tensor:
    """Float64 [B, V]: how probable each id is, all filters applied.

    Args:
        logits_BV: -inf where an id is forbidden; at least one a row is not.
        filters: one a row, or one for all.
    """
    logits_BV = logits_BV.double() / _column([f.temperature for f in filters], logits_BV)
    num_ids = logits_BV.shape[-1]
    if any([f.top_k < num_ids for f in filters]):
        logits_BV = _keep_top_k(logits_BV, [f.top_k for f in filters])
    if any([f.top_p < 1 for f in filters]):
        sorted_BV, order_BV = logits_BV.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
        is_beyond_BV = before_BV >= _column([f.top_p for f in filters], logits_BV)
        logits_BV = logits_BV.masked_fill(is_beyond_BV.scatter(-1, order_BV, is_beyond_BV), -torch.inf)
    if any([f.min_p > 0 for f in filters]):
        probs_BV = logits_BV.softmax(dim=-1)
        least_B1 = probs_BV.amax(dim=-1, keepdim=True) * _column([f.min_p for f in filters], logits_BV)
        logits_BV = logits_BV.masked_fill(probs_BV < least_B1, -torch.inf)
    if any([f.typical_p < 1 for f in filters]):
        logits_BV = _keep_typical(logits_BV, _column([f.typical_p for f in filters], logits_BV))
    return logits_BV.softmax(dim=-1)


def _column(values: Sequence[float], like_BV: Tensor) -> Tensor | float:
    """Numbers by row. On the CPU one for all may be a plain number; a GPU would multiply by its inverse instead."""
    if len(values) == 1 and like_BV.device.type == "cpu":
        return values[0]
    return torch.tensor(values, dtype=torch.float64, device=like_BV.device)[:, None]


def _keep_top_k(logits_BV: Tensor, top_ks: Sequence[float]) -> Tensor:
    """-inf where an id is less probable than its row's top_k-th; equals of that one are kept."""
    num_ids = logits_BV.shape[-1]
    counts = [int(top_k) for top_k in top_ks if top_k < num_ids]
    values_BK = logits_BV.topk(max(counts), dim=-1).values
    if len(set(top_ks)) == 1:
        return logits_BV.masked_fill(logits_BV < values_BK[:, -1:], -torch.inf)
    places_B = torch.tensor([int(min(top_k, max(counts))) - 1 for top_k in top_ks], device=logits_BV.device)
    is_whole_B = torch.tensor([top_k >= num_ids for top_k in top_ks], device=logits_BV.device)
    least_B1 = values_BK.gather(-1, places_B[:, None]).masked_fill(is_whole_B[:, None], -torch.inf)
    return logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)


def _keep_typical(logits_BV: Tensor, mass: Tensor | float) -> Tensor:
    """-inf where an id's information is further from the entropy than that of the ids which have the mass together."""
    log_BV = logits_BV.log_softmax(dim=-1)
    entropy_B1 = -(log_BV.exp() * log_BV).nansum(dim=-1, keepdim=True)
    distance_BV = (-log_BV - entropy_B1).abs()
    sorted_BV, order_BV = distance_BV.sort(dim=-1, stable=True)
    cumulated_BV = log_BV.exp().gather(-1, order_BV).cumsum(dim=-1)
    last_B1 = (cumulated_BV < mass).sum(dim=-1, keepdim=True).clamp(max=logits_BV.shape[-1] - 1)
    return logits_BV.masked_fill(distance_BV > sorted_BV.gather(-1, last_B1), -torch.inf)
