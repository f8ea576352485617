"""Collective calls that autograd knows."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed import _functional_collectives as functional


def all_to_all(
    x_SF: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup, grad_factor: float = 1.0
) -> Tensor:
    """Rows for each rank, in the order of ranks, to rows from each rank; the gradient travels back.

    Args:
        x_SF: rows.
        sent: how many go to each rank.
        received: how many come from each.
        group: the ranks.
        grad_factor: by which the gradient is multiplied on its way.
    """
    return _AllToAll.apply(x_SF, sent, received, group, grad_factor)  # pyright: ignore[reportReturnType]


def copy_to(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What all ranks have alike, into computations that they divide: their gradients are summed."""
    return _CopyTo.apply(x, group)  # pyright: ignore[reportReturnType]


def reduce_from(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Each rank's part of a sum, to the sum; all ranks then compute alike, and have its whole gradient."""
    return _ReduceFrom.apply(x, group)  # pyright: ignore[reportReturnType]


def summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks, without a gradient."""
    return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", group))


def exchanged(x_SF: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """`all_to_all` without a gradient."""
    return functional.wait_tensor(functional.all_to_all_single(x_SF.contiguous(), received, sent, group))


class _AllToAll(Function):
    @staticmethod
    def forward(ctx, x_SF, sent, received, group, grad_factor):
        ctx.sent, ctx.received, ctx.group, ctx.grad_factor = sent, received, group, grad_factor
        return exchanged(x_SF, sent, received, group)

    @staticmethod
    def backward(ctx, grad_RF):  # pyright: ignore
        back_SF = exchanged(grad_RF, ctx.received, ctx.sent, ctx.group)
        return back_SF * ctx.grad_factor, None, None, None, None


class _CopyTo(Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore
        return summed(grad, ctx.group), None


class _ReduceFrom(Function):
    @staticmethod
    def forward(ctx, x, group):
        return summed(x, group)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore
        return grad, None
