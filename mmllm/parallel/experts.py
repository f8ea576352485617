"""Dispatchers that bring tokens to experts on other ranks.

Shapes: N tokens of this rank, D width, E experts, K choices a token, R ranks of the axis, S rows that this rank sends,
T rows that it receives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from mmllm.model.experts import Compute
from mmllm.model.multimodal import MultimodalModel
from mmllm.parallel.collectives import all_to_all, copy_to, exchanged, reduce_from
from mmllm.parallel.mesh import ParallelMesh


def spread_experts(experts: nn.Module, mesh: DeviceMesh) -> None:
    """Leaves each rank of a one-axis mesh its E / R whole experts, in place."""
    for name, parameter in list(experts.named_parameters(recurse=False)):
        part = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
        experts.register_parameter(name, nn.Parameter(part, requires_grad=parameter.requires_grad))


def spread(model: MultimodalModel, mesh: ParallelMesh) -> None:
    """Spreads the experts of all layers over the mesh's expert axis, in place; before the model is sharded."""
    axis = mesh.sparse["expert"]
    for layer, block in enumerate(model.decoder.layers):
        if model.config.decoder.has_experts(layer):
            moe: Any = block.mlp
            spread_experts(moe.experts, axis)
            moe.dispatcher = AllToAllDispatcher(axis.get_group(), moe.config.num_experts)


class TensorDispatcher:
    """Ranks that have the same tokens and each some of the experts: each computes its own, and they add up.

    Args:
        group: the ranks.
        num_experts: E, of all.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int):
        self._group = group
        self._num_here = num_experts // group.size()
        self._first = group.rank() * self._num_here

    def __call__(self, x_ND: Tensor, gates_NK: Tensor, experts_NK: Tensor, compute: Compute) -> Tensor:
        """Weighted sums [N, D] of all chosen experts' outputs."""
        here_NK = _local(experts_NK, self._first, self._num_here)
        out_ND = compute(copy_to(x_ND, self._group), copy_to(gates_NK, self._group), here_NK)
        return reduce_from(out_ND, self._group)


class AllToAllDispatcher:
    """Ranks that have different tokens and different experts: a token travels to each rank that has one of its experts.

    It travels once to a rank, however many of its experts are there, and comes back as their weighted sum. How many
    rows go where must be known to the host: one read a layer (and one more where the layer is computed again for its
    gradient), the only one of a training step.

    A rank's experts are in the gradient the sum over the tokens of all ranks of the axis, but everything else is one
    rank's, of which FSDP takes the mean over ranks. So the gradient is divided by R on its way to the experts, and
    multiplied by R on its way back.

    Args:
        group: the ranks.
        num_experts: E, of all.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int):
        self._group = group
        self._num_ranks = group.size()
        self._num_here = num_experts // self._num_ranks

    def __call__(self, x_ND: Tensor, gates_NK: Tensor, experts_NK: Tensor, compute: Compute) -> Tensor:
        """Weighted sums [N, D] of all chosen experts' outputs."""
        num_tokens, num_ranks, group = len(x_ND), self._num_ranks, self._group
        ranks_R1 = torch.arange(num_ranks, device=x_ND.device)[:, None]
        owner_NK = torch.where(experts_NK >= 0, experts_NK // self._num_here, -1)
        goes_RN = (owner_NK[None] == ranks_R1[..., None]).any(dim=2)
        sent, received = self._splits(goes_RN.sum(dim=1))
        pairs_S = _positions(goes_RN.flatten(), sum(sent))
        token_S, rank_S1 = pairs_S % max(num_tokens, 1), (pairs_S // max(num_tokens, 1))[:, None]
        goes_SK = owner_NK[token_S] == rank_S1
        gates_SK = torch.where(goes_SK, _Spread.apply(gates_NK, token_S, sent), 0)  # pyright: ignore
        local_SK = torch.where(goes_SK, experts_NK[token_S] - rank_S1 * self._num_here, -1)
        x_SD = _Spread.apply(x_ND, token_S, sent)

        choices_S2K = torch.cat([gates_SK, local_SK.to(gates_SK.dtype)], dim=1)
        x_TD = all_to_all(x_SD, sent, received, group, num_ranks)  # pyright: ignore
        gates_TK, local_TK = all_to_all(choices_S2K, sent, received, group, num_ranks).chunk(2, dim=1)
        out_TD = compute(x_TD, gates_TK.contiguous(), local_TK.detach().long())
        out_SD = all_to_all(out_TD, received, sent, group, 1 / num_ranks)
        return _Collect.apply(out_SD, token_S, sent, num_tokens)  # pyright: ignore

    def _splits(self, counts_R: Tensor) -> tuple[list[int], list[int]]:
        """Rows to and from each rank, on the host."""
        ones = [1] * self._num_ranks
        both_2R = torch.stack([counts_R, exchanged(counts_R, ones, ones, self._group)])
        sent, received = both_2R.tolist()  # the one read of the host
        return sent, received


def _local(experts_NK: Tensor, first: int, num_here: int) -> Tensor:
    """Indices among the experts first, …, first + num_here - 1; -1 where it is another."""
    here_NK = experts_NK - first
    return torch.where((here_NK >= 0) & (here_NK < num_here), here_NK, -1)


def _positions(mask_P: Tensor, num_true: int) -> Tensor:
    """Where the mask is true, ascending, [num_true]; the host isn't asked how many there are."""
    places_P = torch.where(mask_P, mask_P.cumsum(0) - 1, num_true)
    indices_P = torch.arange(len(mask_P), device=mask_P.device)
    return indices_P.new_empty(num_true + 1).scatter_(0, places_P, indices_P)[:num_true]


def _sum_rows(x_SF: Tensor, token_S: Tensor, counts: list[int], num_tokens: int) -> Tensor:
    """Adds rows of one token, segment by segment: within one, each token occurs once, so that the order is fixed."""
    dtype = torch.promote_types(x_SF.dtype, torch.float32)
    out_NF = x_SF.new_zeros(num_tokens, x_SF.shape[1], dtype=dtype)
    for rows_SF, tokens_S in zip(x_SF.split(counts), token_S.split(counts), strict=True):
        out_NF.index_add_(0, tokens_S, rows_SF.to(dtype))
    return out_NF.to(x_SF.dtype)


class _Spread(Function):
    """Rows of tokens; the gradients of a token's rows are summed in a fixed order."""

    @staticmethod
    def forward(ctx, x_NF, token_S, counts):
        ctx.save_for_backward(token_S)
        ctx.counts, ctx.num_tokens = counts, len(x_NF)
        return x_NF.index_select(0, token_S)

    @staticmethod
    def backward(ctx, grad_SF):  # pyright: ignore
        (token_S,) = ctx.saved_tensors
        return _sum_rows(grad_SF, token_S, ctx.counts, ctx.num_tokens), None, None


class _Collect(Function):
    """The inverse: sums of tokens' rows."""

    @staticmethod
    def forward(ctx, x_SF, token_S, counts, num_tokens):
        ctx.save_for_backward(token_S)
        return _sum_rows(x_SF, token_S, counts, num_tokens)

    @staticmethod
    def backward(ctx, grad_NF):  # pyright: ignore
        return grad_NF.index_select(0, *ctx.saved_tensors), None, None, None
