"""Root-mean-square normalization.

Shapes: N tokens of the whole batch, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _RMSNorm(torch.autograd.Function):
    """The same as `F.rms_norm`, in half the passes over memory that its CPU form needs for the gradient."""

    @staticmethod
    def forward(ctx, x_ND, weight_D, eps):
        inverse_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True).square_()
        inverse_N1 = inverse_N1.div_(x_ND.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_ND, weight_D, inverse_N1)
        return (x_ND * inverse_N1).mul_(weight_D)

    @staticmethod
    def backward(ctx, grad_ND):
        x_ND, weight_D, inverse_N1 = ctx.saved_tensors
        scaled_ND = grad_ND * inverse_N1
        product_ND = scaled_ND * x_ND
        dot_N = product_ND @ weight_D
        grad_x_ND = scaled_ND.mul_(weight_D)
        grad_x_ND.addcmul_(x_ND, dot_N[:, None] * inverse_N1.square(), value=-1 / x_ND.shape[-1])
        return grad_x_ND, product_ND.sum(dim=0), None


class RMSNorm(nn.Module):
    """Root-mean-square normalization (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Over the last dimension."""
        if x.device.type == "cpu" and x.dtype == self.weight.dtype and x.ndim == 2:
            return _RMSNorm.apply(x, self.weight, self.eps)  # pyright: ignore[reportReturnType]
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
