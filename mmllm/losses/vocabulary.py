"""Cross-entropy over a vocabulary whose rows are split over ranks ("loss parallel"): no logits travel, only sums.

Each rank has the same targets and its own rows of the head. The largest logit and the sum of exponentials are brought
together over ranks, three small all-reduces for all targets and codebooks (as in Megatron-LM, arXiv 1909.08053), and
each rank then knows its rows' gradients; that of the hidden states is summed.

Shapes: M targets, D width, V vocabulary, W rows of it on this rank, U frames of units, J codebooks beyond the first, C
codes of a block, P of any of these targets one after the other; R rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed.tensor import DTensor, Shard

from mmllm.batch import IGNORE
from mmllm.losses import chunked


@dataclass(frozen=True)
class _Settings:
    """What is no tensor."""

    group: dist.ProcessGroup
    first_code_row: int
    block: int
    z_loss_coef: float
    softcap: float
    dtype: torch.dtype
    chunk_bytes: int


class _Question(NamedTuple):
    """Targets that share a softmax, and this rank's rows of it."""

    frames_U: Tensor | None
    """Which of the M targets they belong to; None: all."""
    rows: slice
    """On this rank, possibly none."""
    offset: int
    """The first of them, counted from the first row of the softmax."""
    labels_P: Tensor
    """Counted from the first of `rows`; their number where the label is another rank's; IGNORE where there is none."""
    wanted_P: Tensor
    """Counted from the first row of the softmax."""


def weighted(
    hidden_MD: Tensor,
    weight_VD: DTensor,
    labels_M: Tensor,
    weights_M: Tensor,
    frames_U: Tensor,
    codes_UJ: Tensor,
    code_weights_UJ: Tensor,
    first_row: int,
    block: int,
    z_loss_coef: float,
    softcap: float,
    dtype: torch.dtype,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `chunked.weighted`, without its gradients; a collective call over the weight's mesh.

    Args:
        hidden_MD: the same on all ranks; so are all others but the weight.
        weight_VD: split over its rows, over the one axis of its mesh.
        labels_M: as in `chunked.weighted`; so are the others.
        weights_M: of each target.
        frames_U: of the codes.
        codes_UJ: codes.
        code_weights_UJ: their weights.
        first_row: where the codes' blocks begin.
        block: C.
        z_loss_coef: of the whole softmax.
        softcap: of the logits.
        dtype: of the products.
        chunk_bytes: bound of a chunk's logits.
    """
    assert weight_VD.placements == (Shard(0),) and len(weight_VD) % weight_VD.device_mesh.size() == 0
    group = weight_VD.device_mesh.get_group()
    settings = _Settings(group, first_row, block, z_loss_coef, softcap, dtype, chunk_bytes)
    targets = (labels_M, weights_M.detach(), frames_U, codes_UJ, code_weights_UJ.detach())
    return _Weighted.apply(hidden_MD, weight_VD.to_local(), *targets, settings)  # pyright: ignore


class _Weighted(Function):
    @staticmethod
    def forward(ctx, hidden_MD, weight_WD, labels_M, weights_M, frames_U, codes_UJ, code_weights_UJ, settings):
        wide = torch.promote_types(settings.dtype, torch.float32)
        questions = _questions(labels_M, frames_U, codes_UJ, len(weight_WD), settings)
        logsumexp_P, logits_P, is_best_P = _together(
            [_local(hidden_MD, weight_WD, question, settings) for question in questions], questions, settings
        )
        sizes = [len(question.labels_P) for question in questions]
        has_label_P = torch.cat([question.labels_P for question in questions]) != IGNORE
        losses_P = torch.where(has_label_P, logsumexp_P - logits_P, 0)
        logsumexp_P = torch.where(has_label_P, logsumexp_P, 0)
        losses_M, *by_code = losses_P.split(sizes)
        logsumexp_M = logsumexp_P[: sizes[0]]
        code_losses_UJ = torch.stack(by_code, dim=1) if by_code else losses_P.new_zeros(codes_UJ.shape)
        total = (weights_M.to(wide) * (losses_M + settings.z_loss_coef * logsumexp_M.square())).sum()
        total = total + (code_weights_UJ.to(wide) * code_losses_UJ).sum()
        is_best_M = (is_best_P & has_label_P)[: sizes[0]]
        ctx.settings, ctx.questions = settings, questions
        ctx.save_for_backward(hidden_MD, weight_WD, weights_M, code_weights_UJ, logsumexp_P)
        ctx.mark_non_differentiable(losses_M, logsumexp_M, is_best_M, code_losses_UJ)
        ctx.set_materialize_grads(False)
        return total, losses_M, logsumexp_M, is_best_M, code_losses_UJ

    @staticmethod
    def backward(ctx, grad_total, *_):  # pyright: ignore
        if grad_total is None:
            return (None,) * 8
        hidden_MD, weight_WD, weights_M, code_weights_UJ, logsumexp_P = ctx.saved_tensors
        settings: _Settings = ctx.settings
        wide = logsumexp_P.dtype
        hidden_grad, weight_grad = ctx.needs_input_grad[:2]
        grad_hidden_MD = torch.zeros_like(hidden_MD, dtype=wide)
        grad_weight_WD = torch.zeros_like(weight_WD) if weight_grad else weight_WD.new_zeros(0)
        weights = [weights_M, *code_weights_UJ.unbind(1)]
        by_question = logsumexp_P.split([len(question.labels_P) for question in ctx.questions])
        for turn, (question, own_P, logsumexp) in enumerate(zip(ctx.questions, weights, by_question, strict=True)):
            on_loss_P = own_P.to(wide) * grad_total
            z_coef = settings.z_loss_coef if turn == 0 else 0.0
            part_WD = weight_WD[question.rows]
            chosen_PD = hidden_MD if question.frames_U is None else hidden_MD[question.frames_U]
            grads = chunked.per_target_backward(
                *(on_loss_P, on_loss_P * 2 * z_coef * logsumexp, chosen_PD, part_WD, question.labels_P, logsumexp),
                *(0, len(part_WD), settings.softcap, settings.dtype, settings.chunk_bytes, hidden_grad, weight_grad),
            )
            if hidden_grad and question.frames_U is None:
                grad_hidden_MD += grads[0]
            elif hidden_grad:
                assert question.frames_U is not None
                grad_hidden_MD.index_add_(0, question.frames_U, grads[0].to(wide))
            if weight_grad:
                grad_weight_WD[question.rows] += grads[1]
        if hidden_grad:
            dist.all_reduce(grad_hidden_MD, group=settings.group)
        grad_hidden = grad_hidden_MD.to(hidden_MD.dtype) if hidden_grad else None
        return grad_hidden, grad_weight_WD if weight_grad else None, None, None, None, None, None, None


def _questions(
    labels_M: Tensor, frames_U: Tensor, codes_UJ: Tensor, num_rows: int, settings: _Settings
) -> list[_Question]:
    """The softmax over all rows, then those over the blocks, as this rank sees them."""
    first = settings.group.rank() * num_rows
    questions = [_Question(None, slice(0, num_rows), first, _here(labels_M, first, num_rows), labels_M)]
    for j, codes_U in enumerate(codes_UJ.unbind(1)):
        block_start = settings.first_code_row + j * settings.block
        start = min(max(block_start, first), first + num_rows)
        stop = max(min(block_start + settings.block, first + num_rows), start)
        labels_U = _here(codes_U, start - block_start, stop - start)
        rows = slice(start - first, stop - first)
        questions.append(_Question(frames_U, rows, start - block_start, labels_U, codes_U))
    return questions


def _here(labels_P: Tensor, first: int, num_rows: int) -> Tensor:
    local_P = labels_P - first
    local_P = torch.where((local_P >= 0) & (local_P < num_rows), local_P, num_rows)
    return torch.where(labels_P == IGNORE, IGNORE, local_P)


class _Part(NamedTuple):
    """What this rank's rows say of each target."""

    max_P: Tensor
    sum_P: Tensor
    """Of exp(logit - max)."""
    logit_P: Tensor
    """The label's, 0 where it is another rank's."""
    best_P: Tensor
    """int64: the first row of the largest logit, counted from the first of the softmax."""


def _local(hidden_MD: Tensor, weight_WD: Tensor, question: _Question, settings: _Settings) -> _Part:
    wide = torch.promote_types(settings.dtype, torch.float32)
    frames_U, rows, offset, labels_P, _ = question
    num_rows = rows.stop - rows.start
    part = _Part(
        hidden_MD.new_full(labels_P.shape, -torch.inf, dtype=wide),
        hidden_MD.new_zeros(labels_P.shape, dtype=wide),
        hidden_MD.new_zeros(labels_P.shape, dtype=wide),
        torch.zeros_like(labels_P),
    )
    if not num_rows:
        return part
    with torch.autocast(hidden_MD.device.type, enabled=False):
        part_DW = weight_WD[rows].to(settings.dtype).T
        for chunk in chunked.chunks(len(labels_P), num_rows * wide.itemsize, settings.chunk_bytes):
            hidden_RD = hidden_MD[chunk] if frames_U is None else hidden_MD[frames_U[chunk]]
            logits_RW = (hidden_RD.to(settings.dtype) @ part_DW).to(wide)
            if settings.softcap:
                logits_RW = torch.tanh(logits_RW / settings.softcap) * settings.softcap
            max_R, best_R = logits_RW.max(dim=-1)
            labels_R = labels_P[chunk]
            is_here_R = (labels_R >= 0) & (labels_R < num_rows)
            logit_R = logits_RW.gather(1, torch.where(is_here_R, labels_R, 0)[:, None]).squeeze(1)
            part.max_P[chunk], part.best_P[chunk] = max_R, best_R + offset
            part.sum_P[chunk] = (logits_RW - max_R[:, None]).exp_().sum(dim=-1)
            part.logit_P[chunk] = torch.where(is_here_R, logit_R, 0)
    return part


def _together(parts: list[_Part], questions: list[_Question], settings: _Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Over all ranks: logsumexp, the label's logit, and whether it is the first of the largest; each [P]."""
    max_P, sum_P, logit_P, best_P = (torch.cat(each) for each in zip(*parts, strict=True))
    global_max_P = max_P.clone()
    dist.all_reduce(global_max_P, dist.ReduceOp.MAX, group=settings.group)
    sums_2P = torch.stack([sum_P * (max_P - global_max_P).exp(), logit_P])
    dist.all_reduce(sums_2P, group=settings.group)
    nowhere = torch.iinfo(torch.int64).max
    first_P = torch.where(max_P == global_max_P, best_P, nowhere)
    dist.all_reduce(first_P, dist.ReduceOp.MIN, group=settings.group)
    is_best_P = first_P == torch.cat([question.wanted_P for question in questions])
    return global_max_P + sums_2P[0].log(), sums_2P[1], is_best_P
