"""How far a model's predictions are from another's of the same batch, over all that might have come next.

Shapes: M targets, R of them in a chunk, D width, V vocabulary, U frames of units, J codebooks beyond the first, C ids
of a codebook.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from mmllm.batch import IGNORE
from mmllm.losses.chunked import chunks
from mmllm.losses.cross_entropy import CHUNK_BYTES, GPU_CHUNK_BYTES
from mmllm.losses.tokens import HeadLayout, TokenTargets
from mmllm.model.embedding import Rows, joined


class Divergence(NamedTuple):
    """A sum over targets, and their number, by which it is to be divided once all ranks' are added."""

    total: Tensor
    """Nats, differentiable."""
    count: Tensor
    """Text targets and frames of units."""


def kl_divergence(
    hidden_MD: Tensor,
    rows: Rows,
    other_hidden_MD: Tensor,
    other_weight_VD: Tensor,
    targets: TokenTargets,
    layout: HeadLayout,
    codebooks_K: Tensor,
    *,
    chunk_bytes: int | None = None,
) -> Divergence:
    """Σ KL(other‖model) over the targets' positions, of the distributions that `token_losses` trains.

    Text and codebook 0 have the softmax over the whole vocabulary, codebook k > 0 the one over its own block; a frame's
    divergence is the weighted mean over its codebooks. What the target itself is plays no part. A chunk's logits are
    made again for its gradient, so that those of all targets never exist together.

    Args:
        hidden_MD: the model's hidden states where there are targets.
        rows: of its head.
        other_hidden_MD: the other model's; no gradient goes to it, nor to the next.
        other_weight_VD: of its head.
        targets: which positions are text or frames, and which codes they have.
        layout: of the vocabulary.
        codebooks_K: weights of the codebooks, of sum 1.
        chunk_bytes: bound of a chunk's logits; None: by the device.

    Raises:
        ValueError: the head is split over ranks.
    """
    weight_VD = joined(rows)
    if isinstance(weight_VD, DTensor):
        raise ValueError(
            "the divergence from the start needs the head's weight in one piece, but strategy.tensor splits it; set "
            "strategy.tensor to 1 (fsdp shards it all the same), or keep.kl to 0"
        )
    has_label_M = targets.labels_M != IGNORE
    wide = torch.promote_types(hidden_MD.dtype, torch.float32)
    share_M = has_label_M.to(wide)
    if layout.num_codebooks:
        share_M = torch.where(targets.labels_M >= layout.num_text, codebooks_K[0].to(wide), 1.0) * share_M
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES.get(hidden_MD.device.type, GPU_CHUNK_BYTES)
    heads = weight_VD, other_weight_VD
    total = _weighted(hidden_MD, other_hidden_MD, *heads, share_M, chunk_bytes)
    count = share_M.sum()
    frames_U = targets.frames_U
    for j, codes_U in enumerate(targets.codes_UJ.unbind(1) if layout.num_codebooks > 1 else ()):
        first = layout.second_codebook + j * layout.block
        share_U = (codes_U != IGNORE) * codebooks_K[j + 1].to(wide)
        now_CD, other_CD = (weight[first : first + layout.block] for weight in heads)
        hidden_UD, other_UD = hidden_MD[frames_U], other_hidden_MD[frames_U]
        total = total + _weighted(hidden_UD, other_UD, now_CD, other_CD, share_U, chunk_bytes)
        count = count + share_U.sum()
    return Divergence(total, count)


def _weighted(
    hidden_MD: Tensor, other_MD: Tensor, weight_VD: Tensor, other_weight_VD: Tensor, share_M: Tensor, chunk_bytes: int
) -> Tensor:
    """Σ share · KL(other‖model), chunk by chunk."""
    total = hidden_MD.new_zeros((), dtype=share_M.dtype)
    parts = list(chunks(len(hidden_MD), 8 * len(weight_VD), chunk_bytes)) or [slice(0, 0)]
    for part in parts:
        args = (hidden_MD[part], other_MD[part], weight_VD, other_weight_VD, share_M[part])
        if len(parts) > 1 and torch.is_grad_enabled():
            total = total + checkpoint(_of_chunk, *args, use_reentrant=False, preserve_rng_state=False)
        else:
            total = total + _of_chunk(*args)
    return total


def _of_chunk(
    hidden_RD: Tensor, other_RD: Tensor, weight_VD: Tensor, other_weight_VD: Tensor, share_R: Tensor
) -> Tensor:
    log_now_RV = torch.nn.functional.linear(hidden_RD, weight_VD).to(share_R.dtype).log_softmax(dim=-1)
    with torch.no_grad():
        log_other_RV = torch.nn.functional.linear(other_RD, other_weight_VD).to(share_R.dtype).log_softmax(dim=-1)
    return (share_R * (log_other_RV.exp() * (log_other_RV - log_now_RV)).sum(dim=-1)).sum()
