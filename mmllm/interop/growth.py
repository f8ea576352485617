"""New rows of an embedding or a head, behind those of a checkpoint, which stay as they are to the last bit.

Special tokens begin as the mean of the text's rows: their logits are the mean logit, which is never the largest, and as
inputs they say nothing yet (Hewitt 2021, "Initializing new word embeddings for pretrained language models"). Audio
units begin beside the mean in the directions of their codec's codebooks, so that what sounds alike begins alike.

Shapes: V rows in all, B of the checkpoint, D width, K codebooks, U units a codebook, C channels of a codebook.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS_AT_ONCE = 16384
_SEED = 0


def grown(base_BD: Tensor, num_rows: int, codebooks_KUC: Tensor | None = None) -> Tensor:
    """The matrix with new rows behind its own.

    Args:
        base_BD: of the checkpoint.
        num_rows: V, of which the last K · (U + 1) are units, each codebook's with its filler behind them.
        codebooks_KUC: of the codec; None: there are no units.

    Returns:
        [V, D] in the dtype of the checkpoint.
    """
    mean_D, std_D = _moments(base_BD)
    new_ND = mean_D.expand(num_rows - len(base_BD), -1).clone()
    if codebooks_KUC is not None:
        units_KUD = _directions(codebooks_KUC.float(), base_BD.shape[1]) * std_D
        with_filler = torch.cat([units_KUD, torch.zeros_like(units_KUD[:, :1])], dim=1).flatten(0, 1)
        new_ND[len(new_ND) - len(with_filler) :] += with_filler
    whole_VD = torch.empty(num_rows, base_BD.shape[1], dtype=base_BD.dtype)
    whole_VD[: len(base_BD)] = base_BD
    whole_VD[len(base_BD) :] = new_ND.to(base_BD.dtype)
    return whole_VD


def _moments(base_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, float32, of rows that are not all zero (padding is)."""
    count, total_D, squares_D = 0, torch.zeros(base_BD.shape[1]).double(), torch.zeros(base_BD.shape[1]).double()
    for rows_ND in base_BD.split(_ROWS_AT_ONCE):
        used_ND = rows_ND[rows_ND.ne(0).any(dim=1)].double()
        count += len(used_ND)
        total_D += used_ND.sum(dim=0)
        squares_D += used_ND.square().sum(dim=0)
    mean_D = total_D / max(count, 1)
    variance_D = (squares_D / max(count, 1) - mean_D.square()).clamp(min=0)
    return mean_D.float(), variance_D.sqrt().float()


def _directions(codebooks_KUC: Tensor, width: int) -> Tensor:
    """Each unit's vector, centred and scaled in its codebook, turned to D channels at random: [K, U, D] of scale 1."""
    centred_KUC = codebooks_KUC - codebooks_KUC.mean(dim=1, keepdim=True)
    scale_K11 = centred_KUC.square().mean(dim=(1, 2), keepdim=True).sqrt().clamp(min=1e-6)
    generator = torch.Generator().manual_seed(_SEED)
    channels = codebooks_KUC.shape[2]
    turns_KCD = torch.randn(len(codebooks_KUC), channels, width, generator=generator) / channels**0.5
    return (centred_KUC / scale_K11) @ turns_KCD
