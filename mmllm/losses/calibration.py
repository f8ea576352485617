"""How far the margins of a reward model can be believed: whether pairs that it is sure of are right so often.

Shapes: P pairs, N bins.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NUM_BINS = 10


def margin_histogram(margins_P: Tensor, num_bins: int = NUM_BINS) -> Tensor:
    """Sums by confidence, which can be added over batches and ranks: [N, 3].

    A pair's confidence is that in the side which the model takes for the better one, σ(|margin|): from 0.5 to 1, in
    bins of equal width. Columns: pairs, their confidences' sum, and how many of them are right (a margin of 0: half).

    Args:
        margins_P: the chosen side's reward less the other's.
        num_bins: N.
    """
    margins_P = margins_P.double()
    confidence_P = torch.sigmoid(margins_P.abs())
    bins_P = ((confidence_P - 0.5) * 2 * num_bins).long().clamp(0, num_bins - 1)
    is_right_P = (margins_P > 0).double() + 0.5 * (margins_P == 0).double()
    columns_P3 = torch.stack([torch.ones_like(confidence_P), confidence_P, is_right_P], dim=1)
    return columns_P3.new_zeros(num_bins, 3).index_add(0, bins_P, columns_P3)


def calibration(histogram_N3: Tensor) -> dict[str, Any]:
    """The reliability curve of a histogram, and its expected calibration error (arXiv 1706.04599, eq. 3).

    Args:
        histogram_N3: sums of `margin_histogram`, one pair at least.

    Returns:
        `num_pairs`, `accuracy`, `ece`, and `bins` of `{"from", "to", "pairs", "confidence", "accuracy"}`, means within
        each bin; bins without a pair are left out.
    """
    num_bins, total = len(histogram_N3), float(histogram_N3[:, 0].sum())
    assert total > 0, "there are pairs"
    bins, error = [], 0.0
    for place, (pairs, confidence, right) in enumerate(histogram_N3.tolist()):
        if pairs:
            edges = {"from": 0.5 + place / num_bins / 2, "to": 0.5 + (place + 1) / num_bins / 2}
            bins.append({**edges, "pairs": int(pairs), "confidence": confidence / pairs, "accuracy": right / pairs})
            error += abs(right - confidence) / total
    accuracy = float(histogram_N3[:, 2].sum()) / total
    return {"num_pairs": int(total), "accuracy": accuracy, "ece": error, "bins": bins}
