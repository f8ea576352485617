"""CTC losses as sums and counts, over the clips that can be aligned.

Connectionist temporal classification: Graves et al. 2006, https://doi.org/10.1145/1143844.1143891. A clip can be
aligned only if it has a slot for each target and one more between equal neighbours, for the blank there. Others have no
finite loss. Counted with a loss of 0, as `zero_infinity` has it, they would make a bad model look good; here they are
left out, and it is said how many.

Shapes: N clips, T slots, V classes, L targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class CTCLosses(NamedTuple):
    """Of each clip, and how many there were of each kind."""

    losses_N: Tensor
    """Nats over the whole clip, float32 or wider, differentiable; 0 for clips that are not counted."""
    is_counted_N: Tensor
    """bool: the clip has targets, and slots enough for them."""
    num_left_out: Tensor
    """Clips with targets, but too few slots."""


def required_slots(targets_NL: Tensor, target_lengths_N: Tensor) -> Tensor:
    """The fewest slots that each clip's targets can be aligned with, int64 [N]: one each, and one between equals."""
    columns_L = torch.arange(max(targets_NL.shape[1] - 1, 0), device=targets_NL.device)
    both_there_NL = columns_L + 1 < target_lengths_N[:, None]
    repeats_NL = (targets_NL[:, 1:] == targets_NL[:, :-1]) & both_there_NL
    return target_lengths_N + repeats_NL.sum(dim=1)


def ctc_losses(
    log_probabilities_NTV: Tensor,
    targets_NL: Tensor,
    num_slots_N: Tensor,
    target_lengths_N: Tensor,
    *,
    blank: int = 0,
    required_slots_N: Tensor | None = None,
) -> CTCLosses:
    """CTC loss of each clip that can be aligned.

    On CUDA, `F.ctc_loss` reads lengths on the host: give `num_slots_N`, `target_lengths_N` and `required_slots_N` as
    CPU tensors, as the collator has them, and nothing waits for the device.

    Args:
        log_probabilities_NTV: of the classes at each slot.
        targets_NL: int64; anything behind a clip's length.
        num_slots_N: int64, slots of each clip.
        target_lengths_N: int64; 0: no targets.
        blank: its class.
        required_slots_N: int64, of `required_slots`; None: computed here.
    """
    device, (num_clips, num_slots, _) = log_probabilities_NTV.device, log_probabilities_NTV.shape
    wide = torch.promote_types(log_probabilities_NTV.dtype, torch.float32)
    if required_slots_N is None:
        required_slots_N = required_slots(targets_NL, target_lengths_N.to(targets_NL.device, non_blocking=True))
    required_slots_N = required_slots_N.to(num_slots_N.device, non_blocking=True)
    has_targets_N = target_lengths_N > 0
    fits_N = required_slots_N <= num_slots_N
    counted_N = has_targets_N & fits_N
    num_left_out = (has_targets_N & ~fits_N).sum().to(device, non_blocking=True)
    is_counted_N = counted_N.to(device, non_blocking=True)
    if not num_clips or not num_slots or not targets_NL.shape[1]:
        zeros_N = log_probabilities_NTV.new_zeros(num_clips, dtype=wide) + log_probabilities_NTV[:0].sum()
        return CTCLosses(zeros_N, is_counted_N, num_left_out)
    # The others stand there as empty targets of even probabilities: finite, and without a gradient.
    safe_NTV = torch.where(is_counted_N[:, None, None], log_probabilities_NTV.to(wide), 0.0)
    losses_N = F.ctc_loss(
        safe_NTV.transpose(0, 1),
        targets_NL.clamp(min=0),
        torch.where(counted_N, num_slots_N, num_slots),
        torch.where(counted_N, target_lengths_N, 0),
        blank=blank,
        reduction="none",
    )
    return CTCLosses(torch.where(is_counted_N, losses_N, 0), is_counted_N, num_left_out)


def known_ctc_losses(
    log_probabilities_NTV: Tensor,
    targets_NL: Tensor,
    num_slots: Sequence[int],
    target_lengths: Sequence[int],
    *,
    blank: int = 0,
) -> Tensor:
    """CTC loss of clips that the host knows to have room for their targets, nats [N]; asks the device nothing.

    Args:
        log_probabilities_NTV: of the classes at each slot.
        targets_NL: int64; anything behind a clip's length.
        num_slots: of each clip.
        target_lengths: of each clip, above 0.
        blank: its class.
    """
    return F.ctc_loss(
        log_probabilities_NTV.transpose(0, 1),
        targets_NL.clamp(min=0),
        tuple(num_slots),  # pyright: ignore[reportArgumentType]
        tuple(target_lengths),  # pyright: ignore[reportArgumentType]
        blank=blank,
        reduction="none",
    )


def mean_over_targets(losses: CTCLosses, target_lengths_N: Tensor) -> tuple[Tensor, Tensor]:
    """Σ over counted clips of loss / length, and their number: every clip weighs alike."""
    lengths_N = target_lengths_N.to(losses.losses_N.device, non_blocking=True).clamp(min=1)
    return (losses.losses_N / lengths_N).sum(), losses.is_counted_N.sum().to(losses.losses_N.dtype)


def sum_over_targets(losses: CTCLosses, target_lengths_N: Tensor) -> tuple[Tensor, Tensor]:
    """Σ over counted clips of loss, and the number of their targets: every target weighs alike."""
    lengths_N = target_lengths_N.to(losses.losses_N.device, non_blocking=True)
    return losses.losses_N.sum(), (lengths_N * losses.is_counted_N).sum().to(losses.losses_N.dtype)
