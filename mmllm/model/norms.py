"""Root-mean-square normalization."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmllm.model import cpu


class RMSNorm(nn.Module):
    """Root-mean-square normalization (arXiv 1910.07467) over the last dimension."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as the input."""
        return cpu.rms_norm(x, self.weight, self.eps)
