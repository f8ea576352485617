"""The norm of all gradients, some of which are sharded, over meshes that differ."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

_EPS = 1e-6
"""As in `torch.nn.utils.clip_grad_norm_`."""


@torch.no_grad()
def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients as one vector, a scalar on their device; asks the host nothing.

    Of a DTensor each rank has a shard, so squares are summed over the axes that it is sharded over: one all-reduce for
    each axis, of all gradients that are sharded alike. (`torch.nn.utils.get_total_norm` takes one mesh alone.) Where
    there are DTensors, it is a collective call.

    Args:
        gradients: plain, or DTensors that are sharded or replicated over each axis of their meshes.
    """
    by_groups: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    for gradient in gradients:
        groups: tuple[dist.ProcessGroup, ...] = ()
        if isinstance(gradient, DTensor):
            mesh = gradient.device_mesh
            assert not any(place.is_partial() for place in gradient.placements), "gradients are reduced by now"
            groups = tuple(
                mesh.get_group(axis)
                for axis, place in enumerate(gradient.placements)
                if not place.is_replicate() and mesh.size(axis) > 1
            )
            gradient = gradient.to_local()
        by_groups.setdefault(groups, []).append(gradient)
    if not by_groups:
        return torch.zeros(())
    squares = []
    for groups, same in by_groups.items():
        dtype = torch.promote_types(same[0].dtype, torch.float32)
        square = same[0].new_zeros((), dtype=dtype)
        if filled := [each for each in same if each.numel()]:
            square += torch.stack(torch._foreach_norm(filled, 2, dtype=dtype)).square().sum()
        for group in groups:
            dist.all_reduce(square, group=group)
        squares.append(square)
    return torch.stack(squares).sum().sqrt()


@torch.no_grad()
def scale_to_norm_(gradients: Iterable[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scales gradients in place so that their norm is at most `max_norm`, as `clip_grad_norm_` does.

    Args:
        gradients: as of `total_norm`.
        norm: theirs.
        max_norm: the most that is left of it.
    """
    factor = (max_norm / (norm + _EPS)).clamp(max=1.0)
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    if local:
        torch._foreach_mul_(local, factor)
