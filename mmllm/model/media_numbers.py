"""Which picture or sound of its document something is: the first, the second, … .

Without it a decoder has to count what came before. Kept in the demo unproved: see docs/RESULTS.md.

Shapes: N pictures (or tiles of them) or clips, O slots of each, D decoder width, B sequences, T positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.model.roles import mark


class MediaNumbers(nn.Module):
    """A learned embedding of the number, added to all slots.

    Args:
        max_number: numbers told apart; those beyond share the last.
        width: D.
    """

    def __init__(self, max_number: int, width: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(max_number, width))  # zeros: a model that had none goes on from there
        mark(self, embedding="embedding")

    def forward(self, slots_NOD: Tensor, numbers_N: Tensor | None) -> Tensor:
        """[N, O, D].

        Args:
            slots_NOD: of pictures or clips.
            numbers_N: int64, from 0; None: each is the first of its document.
        """
        if numbers_N is None:
            return slots_NOD + self.embedding[0]
        return slots_NOD + F.embedding(numbers_N.clamp(max=len(self.embedding) - 1), self.embedding)[:, None]


def numbers_in_documents(starts_N: Tensor, document_ids_BT: Tensor, pictures_N: Tensor | None = None) -> Tensor:
    """Counts, from 0, the pictures or the clips of each document in their order, int64 [N].

    Args:
        starts_N: int64 flat index into B·T of each one's first slot.
        document_ids_BT: as in `PackedBatch`.
        pictures_N: int64, the picture of which each is a tile, whose tiles have neighbouring places in N; None: none
            is cut.
    """
    num_positions = document_ids_BT.shape[1]
    keys_N = starts_N // num_positions * (num_positions + 1) + document_ids_BT.flatten()[starts_N]
    is_counted_N = torch.ones_like(starts_N, dtype=torch.bool)
    if pictures_N is not None:
        is_counted_N = F.pad(pictures_N, (1, 0), value=-1)[:-1] != pictures_N
    is_before_NN = (keys_N[None] == keys_N[:, None]) & (starts_N[None] <= starts_N[:, None]) & is_counted_N[None]
    return is_before_NN.sum(dim=1) - 1
