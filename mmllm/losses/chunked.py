"""Cross-entropy behind a linear layer, a chunk of logits at a time, as PyTorch operators that `torch.compile` traces.

The logits of all targets never exist together. There are two operators, since a gradient costs either a known weight or
a second product:

- `weighted` knows each target's weight, so that the gradient is made in the forward pass while a chunk's probabilities
  are at hand (as in Liger Kernel, arXiv 2410.10989): three products in all, as with all logits at once.
- `per_target` gives losses that anything may follow, so that the backward pass makes the logits again: four products.

The head's rows may lie in two blocks, of which `weighted` makes the gradients that are wanted.

Shapes: M targets, D width, V vocabulary, A rows of it in a block of their own, U frames of units, J codebooks that have
their own blocks of the vocabulary, C codes of such a block; R rows of a chunk, W columns of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mmllm.batch import IGNORE


class _Statistics(NamedTuple):
    """Of a chunk's targets, each [R, J]; loss and logsumexp are 0 where there is none."""

    losses: Tensor
    logsumexp: Tensor
    is_best: Tensor


def chunks(num_rows: int, row_bytes: int, chunk_bytes: int) -> Iterator[slice]:
    """Ranges of about equal length of which none is larger than `chunk_bytes`, but for a single row."""
    num_chunks = -(-num_rows // max(1, chunk_bytes // max(row_bytes, 1)))
    for index in range(num_chunks):  # the longest first, so that its buffers do for all
        yield slice(-(-num_rows * index // num_chunks), -(-num_rows * (index + 1) // num_chunks))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums, exponentials and gradients of weights are kept in."""
    return torch.promote_types(dtype, torch.float32)


def _capped(logits: Tensor, softcap: float) -> Tensor:
    """The logits as softcap · tanh(logits / softcap), as in Gemma 2 (arXiv 2408.00118); 0: as they are."""
    return torch.tanh(logits.to(_wide(logits.dtype)) / softcap) * softcap if softcap else logits


def _probabilities(logits_RJC: Tensor, labels_RJ: Tensor, out_RJC: Tensor) -> _Statistics:
    """Writes softmax(logits) to `out_RJC`."""
    has_label_RJ = labels_RJ != IGNORE
    index_RJ1 = torch.where(has_label_RJ, labels_RJ, 0)[..., None]
    max_RJ, best_RJ = logits_RJC.max(dim=-1)
    torch.softmax(logits_RJC, dim=-1, dtype=out_RJC.dtype, out=out_RJC)
    # The largest probability is 1 / Σ exp(logit - max), which saves another pass over the logits.
    logsumexp_RJ = max_RJ.to(out_RJC.dtype) - out_RJC.gather(-1, best_RJ[..., None]).squeeze(-1).log()
    losses_RJ = logsumexp_RJ - logits_RJC.gather(-1, index_RJ1).squeeze(-1).to(out_RJC.dtype)
    return _Statistics(
        torch.where(has_label_RJ, losses_RJ, 0),
        torch.where(has_label_RJ, logsumexp_RJ, 0),
        best_RJ == labels_RJ,
    )


def _to_gradient(
    probabilities_RJC: Tensor, logits_RJC: Tensor, labels_RJ: Tensor, on_all_RJ: Tensor, on_label_RJ: Tensor, cap: float
) -> None:
    """Turns probabilities p into on_all · p − on_label · (1 at the label), and goes back through the soft cap."""
    probabilities_RJC.mul_(on_all_RJ[..., None])
    index_RJ1 = torch.where(labels_RJ != IGNORE, labels_RJ, 0)[..., None]
    probabilities_RJC.scatter_add_(-1, index_RJ1, -on_label_RJ[..., None])
    if cap:
        probabilities_RJC.mul_(1 - (logits_RJC / cap).square())


# --- weights known: the gradient is made in the forward pass ----------------------------------------------------------


@torch.library.custom_op("mmllm::weighted_cross_entropy", mutates_args=())
def weighted(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    added_AD: Tensor,
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
    hidden_grad: bool,
    weight_grad: bool,
    added_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Σ w · (loss + z · logsumexp²) of targets and Σ w · loss of codes, and its gradient.

    Args:
        hidden_MD: of the targets.
        weight_VD: of the head.
        added_AD: its last rows, behind those of `weight_VD`; [0, D]: there are none.
        labels_M: rows of the weight; IGNORE: none.
        weights_M: of each target in the sum.
        frames_U: which of the M targets also have codes.
        codes_UJ: code j of a frame is among rows first_row + j · block + (0 … block − 1) of the weight.
        code_weights_UJ: of each code in the sum.
        first_row: where the codes' blocks begin.
        block: C.
        z_loss_coef: z; 0: none.
        softcap: of the logits; 0: none.
        dtype: of the products.
        chunk_bytes: bound of a chunk's logits.
        hidden_grad: whether the gradient of `hidden_MD` is wanted.
        weight_grad: whether that of `weight_VD` is.
        added_grad: whether that of `added_AD` is.

    Returns:
        The sum; losses, logsumexp and whether the label is the argmax, each [M]; losses [U, J]; the three gradients,
        empty where not wanted.
    """
    wide = _wide(dtype)
    with torch.autocast(hidden_MD.device.type, enabled=False):
        blocks = [(weight_VD.to(dtype), weight_grad), (added_AD.to(dtype), added_grad)]
        head = _Head(hidden_MD.to(dtype), blocks, softcap, chunk_bytes, hidden_grad)
        everything = slice(0, len(weight_VD) + len(added_AD))
        of_targets = head.add(None, everything, labels_M[:, None], weights_M.to(wide)[:, None], z_loss_coef)
        of_codes = head.add(
            frames_U, slice(first_row, first_row + codes_UJ.shape[1] * block), codes_UJ, code_weights_UJ.to(wide), 0.0
        )
        losses_M, logsumexp_M, is_best_M = (x.squeeze(1) for x in of_targets)
        total = (weights_M * (losses_M + z_loss_coef * logsumexp_M.square())).sum()
        total = total + (code_weights_UJ * of_codes.losses).sum()
        of_weight, of_added = head.blocks
        gradients = (of_weight.grad_WD.to(weight_VD.dtype), of_added.grad_WD.to(added_AD.dtype))
        grad_hidden_MD = head.grad_hidden_MD.to(hidden_MD.dtype)
        return total.to(wide), losses_M, logsumexp_M, is_best_M, of_codes.losses, grad_hidden_MD, *gradients


class _Block(NamedTuple):
    """Rows of the weight that lie in one tensor."""

    first: int
    """Their place among all rows."""
    weight_WD: Tensor
    has_grad: bool
    grad_WD: Tensor
    """Of sums so far; empty where it isn't wanted."""


class _Head:
    """Adds up the gradients of what is put through one linear layer, chunk by chunk.

    Args:
        hidden_MD: what is put through.
        blocks: the layer's rows, and whether the gradient of each block is wanted.
        softcap: of the logits.
        chunk_bytes: bound of a chunk's logits.
        hidden_grad: whether the gradient of `hidden_MD` is wanted.
    """

    def __init__(
        self,
        hidden_MD: Tensor,
        blocks: list[tuple[Tensor, bool]],
        softcap: float,
        chunk_bytes: int,
        hidden_grad: bool,
    ):
        self.hidden_MD, self.hidden_grad = hidden_MD, hidden_grad
        self.softcap, self.chunk_bytes = softcap, chunk_bytes
        self.wide = _wide(hidden_MD.dtype)
        self.grad_hidden_MD = hidden_MD.new_zeros(hidden_MD.shape if hidden_grad else 0, dtype=self.wide)
        self.blocks: list[_Block] = []
        first = 0
        for weight_WD, has_grad in blocks:
            grad_WD = hidden_MD.new_zeros(weight_WD.shape if has_grad else 0, dtype=self.wide)
            self.blocks.append(_Block(first, weight_WD, has_grad, grad_WD))
            first += len(weight_WD)
        self.weight_grad = any(has_grad for _, has_grad in blocks)

    def add(
        self, frames_U: Tensor | None, rows: slice, labels_UJ: Tensor, weights_UJ: Tensor, z_loss_coef: float
    ) -> _Statistics:
        """Losses of labels among J equal blocks of `rows`, of the targets `frames_U` (None: of all)."""
        num_frames, num_blocks = labels_UJ.shape
        columns = rows.stop - rows.start
        zeros_UJ = self.hidden_MD.new_zeros(labels_UJ.shape, dtype=self.wide)
        result = _Statistics(zeros_UJ, zeros_UJ.clone(), torch.zeros_like(labels_UJ, dtype=torch.bool))
        if not columns:
            return result
        logits = probabilities = self.hidden_MD.new_empty(0)
        for chunk in chunks(num_frames, columns * self.wide.itemsize, self.chunk_bytes):
            hidden_RD = self.hidden_MD[chunk] if frames_U is None else self.hidden_MD[frames_U[chunk]]
            if not len(logits):
                logits = self.hidden_MD.new_empty(len(hidden_RD), columns)
                probabilities = torch.empty_like(logits, dtype=self.wide)
            logits_RV, gradient_RV = logits[: len(hidden_RD)], probabilities[: len(hidden_RD)]
            for block, columns_W, rows_W in self._parts(rows):
                torch.mm(hidden_RD, block.weight_WD[rows_W].T, out=logits_RV[:, columns_W])
            shape = (len(hidden_RD), num_blocks, columns // num_blocks)
            logits_RJC, gradient_RJC = _capped(logits_RV, self.softcap).view(shape), gradient_RV.view(shape)
            labels_RJ, weights_RJ = labels_UJ[chunk], weights_UJ[chunk] * (labels_UJ[chunk] != IGNORE)
            statistics = _probabilities(logits_RJC, labels_RJ, gradient_RJC)
            for whole, part in zip(result, statistics, strict=True):
                whole[chunk] = part
            if not (self.hidden_grad or self.weight_grad):
                continue
            on_all_RJ = weights_RJ * (1 + 2 * z_loss_coef * statistics.logsumexp) if z_loss_coef else weights_RJ
            _to_gradient(gradient_RJC, logits_RJC, labels_RJ, on_all_RJ, weights_RJ, self.softcap)
            self._backward(
                gradient_RV.to(hidden_RD.dtype), hidden_RD, chunk if frames_U is None else frames_U[chunk], rows
            )
        return result

    def _parts(self, rows: slice) -> Iterator[tuple[_Block, slice, slice]]:
        """Blocks that hold some of `rows`: which of them each has, and where in the block they are."""
        for block in self.blocks:
            start, stop = max(rows.start, block.first), min(rows.stop, block.first + len(block.weight_WD))
            if start < stop:
                yield (
                    block,
                    slice(start - rows.start, stop - rows.start),
                    slice(start - block.first, stop - block.first),
                )

    def _backward(self, gradient_RV: Tensor, hidden_RD: Tensor, targets: slice | Tensor, rows: slice) -> None:
        for block, columns_W, rows_W in self._parts(rows):
            gradient_RW = gradient_RV[:, columns_W]
            if self.hidden_grad:
                grad_RD = gradient_RW @ block.weight_WD[rows_W]
                if isinstance(targets, slice):
                    self.grad_hidden_MD[targets] += grad_RD
                else:
                    self.grad_hidden_MD.index_add_(0, targets, grad_RD.to(self.wide))
            if not block.has_grad:
                continue
            grad_WD = block.grad_WD[rows_W]
            if gradient_RV.dtype == self.wide:
                grad_WD.addmm_(gradient_RW.T, hidden_RD)
                continue
            # A product in bf16 is added in float32, some rows at a time: whole, it and its copy in float32 would take
            # more than the weight.
            for part in chunks(len(grad_WD), 4 * grad_WD[0].nbytes, self.chunk_bytes):
                grad_WD[part] += gradient_RW[:, part].T @ hidden_RD


@weighted.register_fake
def _(
    hidden_MD, weight_VD, added_AD, labels_M, weights_M, frames_U, codes_UJ, code_weights_UJ,
    first_row, block, z_loss_coef, softcap, dtype, chunk_bytes, hidden_grad, weight_grad, added_grad,
):  # fmt: skip
    wide = _wide(dtype)
    losses_M = hidden_MD.new_empty(labels_M.shape, dtype=wide)
    return (
        hidden_MD.new_empty((), dtype=wide),
        losses_M,
        torch.empty_like(losses_M),
        torch.empty_like(labels_M, dtype=torch.bool),
        hidden_MD.new_empty(codes_UJ.shape, dtype=wide),
        hidden_MD.new_empty(hidden_MD.shape if hidden_grad else 0),
        weight_VD.new_empty(weight_VD.shape if weight_grad else 0),
        added_AD.new_empty(added_AD.shape if added_grad else 0),
    )


def _save_gradients(ctx, inputs, output) -> None:
    _, losses_M, logsumexp_M, is_best_M, code_losses_UJ, *gradients = output
    ctx.mark_non_differentiable(losses_M, logsumexp_M, is_best_M, code_losses_UJ)
    ctx.set_materialize_grads(False)
    ctx.are_wanted = inputs[-3:]
    ctx.save_for_backward(*gradients)


def _scale_gradients(ctx, grad_total, *others):
    if any(grad is not None for grad in others):
        raise RuntimeError("the weighted cross-entropy has no second derivative; use backend='full'")
    nones = (None,) * 14
    if grad_total is None:
        return (None, None, None, *nones)
    gradients = zip(ctx.saved_tensors, ctx.are_wanted, strict=True)
    return (*(grad * grad_total.to(grad.dtype) if is_wanted else None for grad, is_wanted in gradients), *nones)


weighted.register_autograd(_scale_gradients, setup_context=_save_gradients)


# --- weights unknown: the backward pass makes the logits again --------------------------------------------------------


@torch.library.custom_op("mmllm::linear_cross_entropy", mutates_args=())
def per_target(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    labels_M: Tensor,
    first_row: int,
    last_row: int,
    softcap: float,
    dtype: torch.dtype,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, logsumexp and whether the label is the argmax, each [M], over a range of the weight's rows.

    The range is first_row … last_row − 1; `labels_M` count from `first_row`. Other arguments are those of `weighted`.
    """
    with torch.autocast(hidden_MD.device.type, enabled=False):
        weight_WD = weight_VD[first_row:last_row].to(dtype)
        head = _Head(hidden_MD.to(dtype), [(weight_WD, False)], softcap, chunk_bytes, False)
        labels_M1 = labels_M[:, None]
        weights_M1 = torch.zeros_like(labels_M1, dtype=head.wide)
        losses_M, logsumexp_M, is_best_M = head.add(None, slice(0, len(weight_WD)), labels_M1, weights_M1, 0.0)
    return losses_M.squeeze(1), logsumexp_M.squeeze(1), is_best_M.squeeze(1)


@per_target.register_fake
def _(hidden_MD, weight_VD, labels_M, first_row, last_row, softcap, dtype, chunk_bytes):
    losses_M = hidden_MD.new_empty(labels_M.shape, dtype=_wide(dtype))
    return losses_M, torch.empty_like(losses_M), torch.empty_like(labels_M, dtype=torch.bool)


@torch.library.custom_op("mmllm::linear_cross_entropy_backward", mutates_args=())
def per_target_backward(
    grad_losses_M: Tensor,
    grad_logsumexp_M: Tensor,
    hidden_MD: Tensor,
    weight_VD: Tensor,
    labels_M: Tensor,
    logsumexp_M: Tensor,
    first_row: int,
    last_row: int,
    softcap: float,
    dtype: torch.dtype,
    chunk_bytes: int,
    hidden_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `per_target`'s first two inputs, empty where not wanted.

    The logsumexp is known, so chunks are columns: each row of the weight's gradient is then one product over all
    targets, and only the small gradient of `hidden_MD` is added up.
    """
    wide = _wide(dtype)
    with torch.autocast(hidden_MD.device.type, enabled=False):
        grad_hidden_MD = hidden_MD.new_zeros(hidden_MD.shape if hidden_grad else 0, dtype=wide)
        grad_weight_VD = weight_VD.new_zeros(weight_VD.shape if weight_grad else 0)
        hidden_MD = hidden_MD.to(dtype)
        has_label_M1 = (labels_M != IGNORE)[:, None]
        on_label_M1 = torch.where(has_label_M1, grad_losses_M[:, None].to(wide), 0)
        on_all_M1 = on_label_M1 + torch.where(has_label_M1, grad_logsumexp_M[:, None].to(wide), 0)
        for chunk in chunks(last_row - first_row, len(labels_M) * wide.itemsize, chunk_bytes):
            rows = slice(first_row + chunk.start, first_row + chunk.stop)
            weight_WD = weight_VD[rows].to(dtype)
            logits_MW = _capped(hidden_MD @ weight_WD.T, softcap)
            gradient_MW = logits_MW.clone() if softcap else logits_MW.to(wide)
            gradient_MW.sub_(logsumexp_M[:, None]).exp_()
            is_here_M1 = has_label_M1 & ((labels_M >= chunk.start) & (labels_M < chunk.stop))[:, None]
            labels_M1 = torch.where(is_here_M1, labels_M[:, None] - chunk.start, IGNORE)
            gradient_M1W, logits_M1W = gradient_MW[:, None], logits_MW[:, None]
            _to_gradient(gradient_M1W, logits_M1W, labels_M1, on_all_M1, on_label_M1 * is_here_M1, softcap)
            del logits_MW, logits_M1W
            gradient_MW = gradient_MW.to(dtype)
            if hidden_grad:
                grad_hidden_MD += gradient_MW @ weight_WD
            if weight_grad:
                grad_weight_VD[rows] = gradient_MW.T @ hidden_MD
    return grad_hidden_MD.to(hidden_MD.dtype), grad_weight_VD


@per_target_backward.register_fake
def _(
    grad_losses_M, grad_logsumexp_M, hidden_MD, weight_VD, labels_M, logsumexp_M,
    first_row, last_row, softcap, dtype, chunk_bytes, hidden_grad, weight_grad,
):  # fmt: skip
    return (
        hidden_MD.new_empty(hidden_MD.shape if hidden_grad else 0),
        weight_VD.new_empty(weight_VD.shape if weight_grad else 0),
    )


def _save_inputs(ctx, inputs, output) -> None:
    hidden_MD, weight_VD, labels_M, *ctx.settings = inputs
    _, logsumexp_M, is_best_M = output
    ctx.mark_non_differentiable(is_best_M)
    ctx.save_for_backward(hidden_MD, weight_VD, labels_M, logsumexp_M)


def _differentiate(ctx, grad_losses_M, grad_logsumexp_M, _):
    wanted = ctx.needs_input_grad[:2]
    grads = per_target_backward(grad_losses_M, grad_logsumexp_M, *ctx.saved_tensors, *ctx.settings, *wanted)
    return (*(grad if is_wanted else None for grad, is_wanted in zip(grads, wanted, strict=True)), *(None,) * 6)


per_target.register_autograd(_differentiate, setup_context=_save_inputs)
