"""Cross-entropy of a head's logits that never exist together: losses, log-probabilities, and weighted sums to train on.

Everything is a function of hidden states and the head's weight. Results are tuples, so that a module that returns one
from its `forward` shows its tensors to hooks (FSDP2 gathers a weight for the backward pass by such a hook).

Shapes: M targets, D width, V vocabulary, U frames of units, J codebooks beyond the first, C codes of a block.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmllm.batch import IGNORE
from mmllm.losses import chunked, vocabulary
from mmllm.model.embedding import Rows, joined

CrossEntropyBackend = Literal["auto", "chunked", "full", "torch", "liger"]
"""auto: chunked, or full where all logits together are smaller than one chunk and nothing is saved by chunks.
chunked: a chunk of logits at a time, on any device, without a host sync, in a compiled graph without a break.
full: all logits at once, for comparison and for second derivatives.
torch: `torch.nn.functional.linear_cross_entropy` (torch 2.14 or newer). It doesn't say which logit is the largest;
that costs another product.
liger: Liger Kernel's fused kernel (liger-kernel 0.8.5 or newer; CUDA). It asks the host once a call."""

CHUNK_BYTES = {"cpu": 64 * 2**20}
"""Bound of a chunk's logits. Smaller chunks read the weight and its gradient more often."""

GPU_CHUNK_BYTES = 256 * 2**20


class CrossEntropy(NamedTuple):
    """Of each target; 0 and False where its label is `IGNORE`."""

    losses_M: Tensor
    """Nats, float32 or wider; differentiable."""
    logsumexp_M: Tensor
    """Of the logits; differentiable."""
    is_best_M: Tensor
    """bool: the label's logit is the largest (the first one of equal logits)."""


class WeightedCrossEntropy(NamedTuple):
    """A sum to train on, and what it is made of."""

    total: Tensor
    """Differentiable scalar."""
    losses_M: Tensor
    """As in `CrossEntropy`, but detached; so are the following."""
    logsumexp_M: Tensor
    is_best_M: Tensor
    code_losses_UJ: Tensor


class CodeTargets(NamedTuple):
    """Targets among blocks of the vocabulary: code j of a frame is predicted by rows first_row + j·C … of the head."""

    frames_U: Tensor
    """int64: which of the M targets they belong to."""
    codes_UJ: Tensor
    """int64, 0 … C − 1; `IGNORE` where none."""
    weights_UJ: Tensor
    """Of each code's loss in the total."""
    first_row: int
    block: int
    """C."""


def linear_cross_entropy(
    hidden_MD: Tensor,
    weight_VD: Rows,
    labels_M: Tensor,
    *,
    rows: tuple[int, int] | None = None,
    softcap: float | None = None,
    backend: CrossEntropyBackend = "auto",
    chunk_bytes: int | None = None,
) -> CrossEntropy:
    """Cross-entropy of `hidden @ weight.T` for each target, whatever its gradient will be.

    The backward pass computes the logits again. Where the weights in the loss are known before,
    `weighted_cross_entropy` saves that. The product is in autocast's dtype where that is on, all else in float32 or
    wider.

    Args:
        hidden_MD: hidden states of the targets.
        weight_VD: of the head; in two blocks, they are copied into one.
        labels_M: int64, counted from the first of `rows`; `IGNORE` where none.
        rows: range of the vocabulary that the softmax is over; None: all of it.
        softcap: logits become softcap · tanh(logits / softcap) (Gemma 2, arXiv 2408.00118).
        backend: see `CrossEntropyBackend`.
        chunk_bytes: bound of a chunk's logits; None: by the device.

    Raises:
        ValueError: the backend is unknown or can't do this.
        ModuleNotFoundError: its library is missing or too old.
    """
    weight_VD = joined(weight_VD)
    first_row, last_row = rows if rows is not None else (0, len(weight_VD))
    dtype = product_dtype(hidden_MD, weight_VD)
    chunk_bytes = _chunk_bytes(hidden_MD, chunk_bytes)
    match _chosen(backend, len(labels_M) * (last_row - first_row), dtype, chunk_bytes):
        case "chunked":
            cap = softcap or 0.0
            args = (hidden_MD, weight_VD, labels_M, first_row, last_row, cap, dtype, chunk_bytes)
            return CrossEntropy(*chunked.per_target(*args))
        case "full":
            return _all_logits(hidden_MD, weight_VD[first_row:last_row], labels_M, softcap)
        case "torch":
            return _by_torch(hidden_MD, weight_VD[first_row:last_row], labels_M, softcap, chunk_bytes)
        case _:
            return _by_liger(hidden_MD, weight_VD[first_row:last_row], labels_M, softcap)


def weighted_cross_entropy(
    hidden_MD: Tensor,
    weight_VD: Rows,
    labels_M: Tensor,
    weights_M: Tensor,
    codes: CodeTargets | None = None,
    *,
    z_loss_coef: float = 0.0,
    softcap: float | None = None,
    backend: CrossEntropyBackend = "auto",
    chunk_bytes: int | None = None,
) -> WeightedCrossEntropy:
    """Σ w · (loss + z_loss_coef · logsumexp²) over targets, plus Σ w · loss over codes: a sum, never a mean.

    Its gradient is made while the logits are there, so that it costs no more products than all logits at once; the
    total may be scaled by anything, also by what is known later (a count over all ranks). The z-loss on the head is
    PaLM's (arXiv 2204.02311).

    Args:
        hidden_MD: hidden states of the targets.
        weight_VD: of the head; a DTensor split over its rows: each rank has some, and all have the same targets. Of
            two blocks "auto" and "chunked" make only the gradient of the one that is trained; others copy both.
        labels_M: int64; `IGNORE` where none.
        weights_M: of each target; no gradient goes to it.
        codes: further targets, among blocks of the vocabulary.
        z_loss_coef: of the z-loss on the softmax over the whole vocabulary.
        softcap: see `linear_cross_entropy`.
        backend: see `CrossEntropyBackend`.
        chunk_bytes: bound of a chunk's logits; None: by the device.

    Raises:
        ValueError: the backend is unknown or can't do this.
        ModuleNotFoundError: its library is missing or too old.
    """
    if codes is None:
        none_U = labels_M.new_zeros(0)
        codes = CodeTargets(none_U, none_U.view(0, 0), weights_M.new_zeros(0, 0), 0, 0)
    blocks = (weight_VD,) if isinstance(weight_VD, Tensor) else weight_VD
    dtype, cap = product_dtype(hidden_MD, blocks[0]), softcap or 0.0
    chunk_bytes = _chunk_bytes(hidden_MD, chunk_bytes)
    if isinstance(weight_VD, DTensor):
        if backend not in ("auto", "chunked"):
            raise ValueError(
                f"cross-entropy backend is {backend}, which needs the head's weight in one piece, but strategy.tensor "
                f"splits it; choose chunked"
            )
        return WeightedCrossEntropy(
            *vocabulary.weighted(
                *(hidden_MD, weight_VD, labels_M, weights_M, codes.frames_U, codes.codes_UJ, codes.weights_UJ),
                *(codes.first_row, codes.block, z_loss_coef, cap, dtype, chunk_bytes),
            )
        )
    if backend in ("auto", "chunked"):
        base_VD, added_AD = (*blocks, blocks[0].new_zeros(0, blocks[0].shape[1]))[:2]
        result = chunked.weighted(
            *(hidden_MD, base_VD, added_AD, labels_M, weights_M.detach(), codes.frames_U, codes.codes_UJ),
            *(codes.weights_UJ.detach(), codes.first_row, codes.block, z_loss_coef, cap, dtype, chunk_bytes),
            *(torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden_MD, base_VD, added_AD)),
        )
        return WeightedCrossEntropy(*result[:5])
    weight_VD = joined(weight_VD)
    options: dict[str, Any] = {"softcap": softcap, "backend": backend, "chunk_bytes": chunk_bytes}
    losses_M, logsumexp_M, is_best_M = linear_cross_entropy(hidden_MD, weight_VD, labels_M, **options)
    total = (weights_M.detach() * (losses_M + z_loss_coef * logsumexp_M.square())).sum()
    code_losses_UJ = losses_M.new_zeros(codes.codes_UJ.shape)
    if codes.codes_UJ.shape[1]:
        hidden_UD, first, block = hidden_MD[codes.frames_U], codes.first_row, codes.block
        by_codebook = [
            linear_cross_entropy(hidden_UD, weight_VD[first + j * block :][:block], codes_U, **options).losses_M
            for j, codes_U in enumerate(codes.codes_UJ.unbind(1))
        ]
        code_losses_UJ = torch.stack(by_codebook, dim=1)
        total = total + (codes.weights_UJ.detach() * code_losses_UJ).sum()
    return WeightedCrossEntropy(total, losses_M.detach(), logsumexp_M.detach(), is_best_M, code_losses_UJ.detach())


def log_probabilities(
    hidden_MD: Tensor,
    weight_VD: Rows,
    ids_M: Tensor,
    *,
    rows: tuple[int, int] | None = None,
    softcap: float | None = None,
    backend: CrossEntropyBackend = "auto",
    chunk_bytes: int | None = None,
) -> Tensor:
    """Log-probability of each given id, [M], differentiable; 0 where the id is `IGNORE`. For preferences and scoring.

    Arguments and errors are those of `linear_cross_entropy`.
    """
    options: dict[str, Any] = {"rows": rows, "softcap": softcap, "backend": backend, "chunk_bytes": chunk_bytes}
    return -linear_cross_entropy(hidden_MD, weight_VD, ids_M, **options).losses_M


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What `F.linear` would multiply in: autocast's dtype where that is on (it leaves float64 alone)."""
    dtype, device = torch.promote_types(hidden.dtype, weight.dtype), hidden.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype


def _chunk_bytes(hidden: Tensor, chunk_bytes: int | None) -> int:
    if chunk_bytes is None:
        return CHUNK_BYTES.get(hidden.device.type, GPU_CHUNK_BYTES)
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes is {chunk_bytes}; it must be positive, or None for the device's default")
    return chunk_bytes


def _chosen(backend: CrossEntropyBackend, num_logits: int, dtype: torch.dtype, chunk_bytes: int) -> str:
    """The backend that `auto` stands for."""
    if backend not in ("auto", "chunked", "full", "torch", "liger"):
        raise ValueError(f"cross-entropy backend is {backend!r}; choose auto, chunked, full, torch or liger")
    if backend != "auto":
        return backend
    return "full" if num_logits * max(dtype.itemsize, 4) <= chunk_bytes else "chunked"


def _all_logits(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, softcap: float | None) -> CrossEntropy:
    dtype = torch.promote_types(hidden_MD.dtype, weight_VD.dtype)
    logits_MV = F.linear(hidden_MD.to(dtype), weight_VD.to(dtype))
    logits_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    if softcap:
        logits_MV = torch.tanh(logits_MV / softcap) * softcap
    has_label_M = labels_M != IGNORE
    index_M1 = torch.where(has_label_M, labels_M, 0)[:, None]
    log_probabilities_MV = logits_MV.log_softmax(dim=-1)
    losses_M = -log_probabilities_MV.gather(1, index_M1).squeeze(1)
    # logit = log-probability + logsumexp: what the softmax knows already, without a second one.
    logsumexp_M = losses_M + logits_MV.gather(1, index_M1).squeeze(1)
    is_best_M = logits_MV.detach().argmax(dim=-1) == labels_M
    return CrossEntropy(torch.where(has_label_M, losses_M, 0), torch.where(has_label_M, logsumexp_M, 0), is_best_M)


def _by_torch(
    hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, softcap: float | None, chunk_bytes: int
) -> CrossEntropy:
    function: Any = getattr(F, "linear_cross_entropy", None)
    make_options: Any = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or make_options is None:
        raise ModuleNotFoundError(
            f"cross-entropy backend torch needs torch.nn.functional.linear_cross_entropy, which torch "
            f"{torch.__version__} lacks; install torch 2.14 or newer, or choose chunked"
        )
    if softcap:
        raise ValueError(f"softcap is {softcap}, which cross-entropy backend torch does not know; choose chunked")
    if not len(labels_M):
        return _all_logits(hidden_MD, weight_VD, labels_M, softcap)
    dtype = product_dtype(hidden_MD, weight_VD)
    with torch.autocast(hidden_MD.device.type, enabled=False):
        hidden_MD, weight_VD = hidden_MD.to(dtype), weight_VD.to(dtype)
        losses_M = function(
            hidden_MD, weight_VD, labels_M, reduction="none", ignore_index=IGNORE, options=make_options()
        )
        losses_M = losses_M.to(torch.promote_types(dtype, torch.float32))
        args = (hidden_MD.detach(), weight_VD.detach(), labels_M, 0, len(weight_VD), 0.0, dtype, chunk_bytes)
        is_best_M = chunked.per_target(*args)[2]
        return CrossEntropy(losses_M, _logsumexp(losses_M, hidden_MD, weight_VD, labels_M, None), is_best_M)


def _by_liger(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, softcap: float | None) -> CrossEntropy:
    try:
        from liger_kernel.ops import fused_linear_cross_entropy as liger  # pyright: ignore[reportMissingImports]
        from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
            liger_fused_linear_cross_entropy,
        )
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "cross-entropy backend liger needs Liger Kernel; pip install 'liger-kernel>=0.8.5', or choose chunked"
        ) from error
    # Older versions multiply the weight's gradient by the first target's gradient alone.
    if "token_grad_output" not in inspect.signature(liger.fused_linear_cross_entropy_forward).parameters:
        raise ModuleNotFoundError(
            "cross-entropy backend liger needs gradients by target, which this Liger Kernel lacks; "
            "pip install 'liger-kernel>=0.8.5', or choose chunked"
        )
    if not len(labels_M):
        return _all_logits(hidden_MD, weight_VD, labels_M, softcap)
    dtype = product_dtype(hidden_MD, weight_VD)
    with torch.autocast(hidden_MD.device.type, enabled=False):
        hidden_MD, weight_VD = hidden_MD.to(dtype), weight_VD.to(dtype)
        result = liger_fused_linear_cross_entropy(
            hidden_MD,
            weight_VD,
            labels_M,
            ignore_index=IGNORE,
            reduction="none",
            softcap=softcap,
            accum_dtype=torch.promote_types(dtype, torch.float32),
            return_predicted_tokens=True,
        )
        is_best_M = (result.predicted_tokens == labels_M) & (labels_M != IGNORE)
        return CrossEntropy(result.loss, _logsumexp(result.loss, hidden_MD, weight_VD, labels_M, softcap), is_best_M)


def _logsumexp(
    losses_M: Tensor, hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, softcap: float | None
) -> Tensor:
    """The loss plus the label's logit: a row of the weight for each target, no logits of the vocabulary."""
    has_label_M = labels_M != IGNORE
    rows_MD = weight_VD.index_select(0, torch.where(has_label_M, labels_M, 0))
    logits_M = (hidden_MD.to(losses_M.dtype) * rows_MD.to(losses_M.dtype)).sum(dim=1)
    if softcap:
        logits_M = torch.tanh(logits_M / softcap) * softcap
    return torch.where(has_label_M, losses_M + logits_M, 0)
