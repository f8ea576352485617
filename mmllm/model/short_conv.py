"""Short causal convolutions: each token takes in the few before it, without attention (arXiv 2512.17351).

A name of several words ("a small red circle") is then one vector at its last word, by which attention finds what it
names: a small decoder learns to bind words to what they name from far fewer samples.

Shapes: N tokens of the whole batch (padding removed), B sequences, T positions, D width, K tokens that are mixed.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.model.roles import mark
from mmllm.sequences import SequenceMetadata

INIT_BOUND = 0.3


class Neighbors(Protocol):
    """Who stands before each token in its document."""

    def before(self, x_ND: Tensor, count: int, place: str) -> list[Tensor]:
        """For 1 … `count` tokens back, what `x_ND` has there, [N, D]; zeros where the document had not begun.

        `place` tells the convolutions of one block apart.
        """
        ...


class PackedNeighbors:
    """Of the tokens of packed documents.

    Args:
        sequences: the documents.
        size: K of the widest convolution.
    """

    def __init__(self, sequences: SequenceMetadata, size: int):
        starts_S = sequences.cu_seqlens.long()
        tokens_Q = torch.arange(sequences.size, device=starts_S.device)
        documents_Q = torch.bucketize(tokens_Q, starts_S[1:], right=True)
        age_Q = tokens_Q - starts_S.index_select(0, documents_Q)
        self._is_there_JQ1 = (age_Q >= torch.arange(1, size, device=age_Q.device)[:, None])[..., None]

    def before(self, x_ND: Tensor, count: int, place: str) -> list[Tensor]:
        """See `Neighbors`."""
        padded = F.pad(x_ND, (0, 0, count, 0))
        size = len(x_ND)
        return [padded[count - j : count - j + size] * self._is_there_JQ1[j - 1] for j in range(1, count + 1)]


class ShortConv(nn.Module):
    """X + Σⱼ wⱼ · x of the token j before, over the token itself and the K − 1 before it in its document.

    Each channel has its own weights, as in "Canon" layers.
    """

    def __init__(self, width: int, size: int, place: str):
        super().__init__()
        self.place = place
        self.weight = nn.Parameter(torch.empty(size, width))
        mark(self, weight="vector")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform between ±0.3."""
        nn.init.uniform_(self.weight, -INIT_BOUND, INIT_BOUND)

    def forward(self, x_ND: Tensor, neighbors: Neighbors) -> Tensor:
        """Same shape and dtype as the input."""
        own_D, *earlier = self.weight.to(x_ND.dtype).unbind()
        out_ND = x_ND * (1 + own_D)
        for earlier_ND, weight_D in zip(neighbors.before(x_ND, len(earlier), self.place), earlier, strict=True):
            out_ND = torch.addcmul(out_ND, earlier_ND, weight_D)
        return out_ND
