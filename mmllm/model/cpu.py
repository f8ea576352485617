"""What the CPU computes faster by hand, behind the calls that every device has; chosen here and nowhere else.

PyTorch's own forms of these take more passes over memory, which is what they cost on a CPU. Under `torch.compile` the
plain forms are fused anyway.

Shapes: N tokens, H heads, C channels a head, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """X / sqrt(mean(x²) + eps) · weight over the last dimension (arXiv 1910.07467).

    Args:
        x: [..., D].
        weight: [D]; cast to x's dtype, without which PyTorch leaves its fused kernel.
        eps: added to the mean square.
    """
    if _by_hand(x) and x.dtype == weight.dtype:
        return _RMSNorm.apply(x, weight, eps)  # pyright: ignore[reportReturnType]
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def rotate(x_NHC: Tensor, cos_N1C: Tensor, sin_N1C: Tensor) -> Tensor:
    """Turns each pair of channels (i, i + R/2) of the first R, as in Llama's checkpoints, by its angle.

    See arXiv 2104.09864. The channels behind the first R stay, as in Phi and GLM; with R = 0 all do.

    Args:
        x_NHC: queries or keys.
        cos_N1C: [N, 1, R/2], in any dtype.
        sin_N1C: as the cosines.
    """
    num_turned = 2 * cos_N1C.shape[-1]
    if num_turned == 0:
        return x_NHC
    if num_turned < x_NHC.shape[-1]:
        turned = rotate(x_NHC[..., :num_turned], cos_N1C, sin_N1C)
        return torch.cat([turned, x_NHC[..., num_turned:]], dim=-1)
    cos_N1C, sin_N1C = cos_N1C.to(x_NHC.dtype), sin_N1C.to(x_NHC.dtype)
    if _by_hand(x_NHC):
        return _Rotation.apply(x_NHC, cos_N1C, sin_N1C)  # pyright: ignore[reportReturnType]
    first, second = x_NHC.chunk(2, dim=-1)
    return torch.cat([first * cos_N1C - second * sin_N1C, second * cos_N1C + first * sin_N1C], dim=-1)


def gather_rows(x_NF: Tensor, rows_P: Tensor, inverse_N: Tensor) -> Tensor:
    """x[rows], of which `inverse` says where each row of x first went; other rows of the result have no gradient.

    The gradient is a gather by the inverse in place of a slow scattered sum: rows that repeat another (padding) must
    lead nowhere.
    """
    return _GatherRows.apply(x_NF, rows_P, inverse_N)  # pyright: ignore[reportReturnType]


def scatter_rows(x_PF: Tensor, inverse_N: Tensor) -> Tensor:
    """x[inverse], each row at most once; the others' gradient is exactly zero."""
    return _ScatterRows.apply(x_PF, inverse_N)  # pyright: ignore[reportReturnType]


def _by_hand(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_D, eps):
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        inverse = inverse.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, inverse)
        return (x * inverse).mul_(weight_D)

    @staticmethod
    def backward(ctx, grad):
        x, weight_D, inverse = ctx.saved_tensors
        scaled = grad * inverse
        product = scaled * x
        dot = product @ weight_D
        grad_x = scaled.mul_(weight_D)
        grad_x.addcmul_(x, dot[..., None] * inverse.square(), value=-1 / x.shape[-1])
        return grad_x, product.flatten(0, -2).sum(dim=0), None


class _Rotation(torch.autograd.Function):
    """Its gradient is the rotation back."""

    @staticmethod
    def forward(ctx, x_NHC, cos_N1C, sin_N1C):
        ctx.save_for_backward(cos_N1C, sin_N1C)
        return _rotated(x_NHC, cos_N1C, sin_N1C)

    @staticmethod
    def backward(ctx, grad_NHC):
        cos_N1C, sin_N1C = ctx.saved_tensors
        return _rotated(grad_NHC, cos_N1C, -sin_N1C), None, None


def _rotated(x_NHC: Tensor, cos_N1C: Tensor, sin_N1C: Tensor) -> Tensor:
    out_NHC = torch.empty_like(x_NHC, memory_format=torch.contiguous_format)
    first, second = x_NHC.chunk(2, dim=-1)
    out_first, out_second = out_NHC.chunk(2, dim=-1)
    torch.mul(first, cos_N1C, out=out_first).addcmul_(second, sin_N1C, value=-1)
    torch.mul(second, cos_N1C, out=out_second).addcmul_(first, sin_N1C)
    return out_NHC


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NF, rows_P, inverse_N):
        ctx.save_for_backward(inverse_N)
        return x_NF.index_select(0, rows_P)

    @staticmethod
    def backward(ctx, grad_PF):
        return grad_PF.index_select(0, *ctx.saved_tensors), None, None


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_PF, inverse_N):
        ctx.save_for_backward(inverse_N)
        ctx.num_rows = x_PF.shape[0]
        return x_PF.index_select(0, inverse_N)

    @staticmethod
    def backward(ctx, grad_NF):
        (inverse_N,) = ctx.saved_tensors
        grad_PF = grad_NF.new_zeros(ctx.num_rows, grad_NF.shape[1])
        return grad_PF.index_copy_(0, inverse_N, grad_NF), None
