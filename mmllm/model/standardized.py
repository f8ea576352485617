"""Convolutions with standardized filters, which learn beside GroupNorm as plain ones do beside BatchNorm."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

NORM_GROUPS = 8
STANDARDIZED_EPS = 1e-4


class StandardizedConv2d(nn.Conv2d):
    """A convolution whose filters are used with mean 0 and norm 1 (weight standardization, arXiv 1903.10520)."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Conv2d`."""
        var_O111, mean_O111 = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        fan_in = self.weight[0].numel()
        weight_OIHW = (self.weight - mean_O111) * torch.rsqrt(fan_in * var_O111 + STANDARDIZED_EPS)
        return self._conv_forward(input, weight_OIHW, self.bias)


def group_norm(num_channels: int) -> nn.GroupNorm:
    """GroupNorm (arXiv 1803.08494) of `NORM_GROUPS` groups, or of fewer where they don't divide the channels."""
    return nn.GroupNorm(math.gcd(NORM_GROUPS, num_channels), num_channels)
