"""CTC losses of the clips that can be aligned.

Connectionist temporal classification: Graves et al. 2006, https://doi.org/10.1145/1143844.1143891. A clip can be
aligned only if it has a slot for each target and one more between equal neighbours, for the blank there. Others have no
finite loss. Counted with a loss of 0, as `zero_infinity` has it, they would make a bad model look good; so they are
left out before, by what the host knows of them, and it is said how many.

Shapes: N clips, T slots, V classes, L targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch.nn.functional as F
from torch import Tensor


def alignable(lengths: Iterable[tuple[int, int, int]]) -> tuple[list[int], int]:
    """Which clips have targets and slots enough for them, and how many have targets but too few slots.

    Args:
        lengths: of each clip its slots, its targets, and how many of these equal the one before.
    """
    rows, num_left_out = [], 0
    for row, (num_slots, num_targets, num_repeats) in enumerate(lengths):
        if num_targets and num_targets + num_repeats <= num_slots:
            rows.append(row)
        elif num_targets:
            num_left_out += 1
    return rows, num_left_out


def ctc_losses(
    log_probabilities_NTV: Tensor,
    targets_NL: Tensor,
    num_slots: Sequence[int],
    target_lengths: Sequence[int],
    *,
    blank: int = 0,
) -> Tensor:
    """CTC loss of clips that can be aligned, nats over the whole clip, [N]; asks the device nothing.

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
