"""Whole matrices of parameters that are split over ranks, each computed on by one rank.

Muon's direction is a function of a whole matrix, while a rank may hold a few of its rows (FSDP2), of its columns
(tensor parallelism), some matrices of a stack (expert parallelism), or, as every other rank does, all of it (DDP).
Ranks share the work: each matrix has an owner among those that hold a part of it, which gets the other parts and sends
back what it made of them. A rank so sends, gets and holds about its own share of the parameters. (In Liu et al. 2025,
https://arxiv.org/abs/2502.16982, each rank gathers, and computes on, all matrices of which it has a part.)

Shapes: N matrices of a stack, O rows, I columns; of a rank's part: n, o, i. A convolution's filters [out, in, height,
width] are one matrix with a row for each output.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def matrix_shape(parameter: Tensor) -> tuple[int, int, int]:
    """N, O and I of a matrix, of a stack of them, or of filters; of a sharded parameter those of the whole."""
    shape = parameter.shape
    if parameter.ndim == 4:
        return 1, shape[0], math.prod(shape[1:])
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, in the same memory; the whole of one that isn't sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Part(NamedTuple):
    """What a rank holds of a parameter: ranges of matrices, rows and columns."""

    matrices: tuple[int, int]
    rows: tuple[int, int]
    columns: tuple[int, int]

    def holds(self, start: int, stop: int) -> bool:
        """Whether these matrices, or rows and columns of them, are in it."""
        (first, last), rows, columns = self
        return first <= start and stop <= last and rows[0] < rows[1] and columns[0] < columns[1]


@dataclass(frozen=True)
class Run:
    """Neighbouring matrices of one parameter on which one rank computes."""

    parameter: int
    start: int
    stop: int
    owner: int


class MatrixExchange:
    """Who computes on which matrices of some parameters, and what goes from whom to whom.

    Building it is collective where parameters are held by several ranks, and reads the parts' places on the host; using
    it asks the host nothing.
    """

    def __init__(self, parameters: Sequence[Tensor], group: dist.ProcessGroup | None, num_ranks: int):
        """Asks every rank what it holds, and shares the matrices out.

        Args:
            parameters: of one dtype; sharded over, or whole on, the ranks of the group.
            group: None: the default one.
            num_ranks: of the group; 1: there is no need for one.
        """
        self.group, self.num_ranks = group, num_ranks
        self.rank = dist.get_rank(group) if num_ranks > 1 else 0
        self.shapes = [matrix_shape(parameter) for parameter in parameters]
        own = [_part(parameter) for parameter in parameters]
        self.parts = _of_all_ranks(own, parameters[0].device, group, num_ranks)
        """By rank, then parameter."""
        self.runs = self._shared_out()
        self.own_runs = [run for run in self.runs if run.owner == self.rank]
        gathered, returned = ([list(moves(run)) for run in self.runs] for moves in (self._to_owner, self._from_owner))
        self.gathers, self.returns = (
            any(sender != receiver for moves in of_runs for sender, receiver, _ in moves)
            for of_runs in (gathered, returned)
        )
        """Whether anything is sent between any two ranks: known, and the same, on all of them."""
        self.gathered, self.returned = (
            [[move for move in moves if self.rank in move[:2]] for moves in of_runs] for of_runs in (gathered, returned)
        )
        """Of each run, what this rank sends or gets: sender, receiver and part."""

    def apply(self, parts_noi: list[Tensor], compute: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """This rank's parts of `compute` of the whole matrices.

        Args:
            parts_noi: of each parameter what this rank holds, [n, o, i], in one dtype.
            compute: of [N, O, I], N matrices of one shape, the same shape; each matrix by itself.
        """
        whole = self._gathered(parts_noi)
        by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, run in enumerate(self.own_runs):
            by_shape[self.shapes[run.parameter][1:]].append(number)
        for numbers in by_shape.values():
            stacks = [whole[number] for number in numbers]
            computed = compute(torch.cat(stacks) if len(stacks) > 1 else stacks[0]).to(parts_noi[0].dtype)
            for number, stack in zip(numbers, computed.split([len(stack) for stack in stacks]), strict=True):
                whole[number] = stack
        if self.num_ranks == 1 and len(whole) == len(parts_noi):  # each is one run
            return whole
        return self._returned(whole, parts_noi)

    def _shared_out(self) -> list[Run]:
        """Largest first, each to the rank that has the least to do among those that hold a part of it."""
        found: list[tuple[float, int, int, int, list[int]]] = []
        for number, (_, rows, columns) in enumerate(self.shapes):
            cost = float(max(rows, columns)) * min(rows, columns) ** 2
            for start, stop, holders in self._segments(number):
                num_runs = min(stop - start, len(holders))
                bounds = [start + (stop - start) * turn // num_runs for turn in range(num_runs + 1)]
                found += [(cost * (b - a), number, a, b, holders) for a, b in pairwise(bounds)]
        load, runs = [0.0] * self.num_ranks, []
        for cost, number, start, stop, holders in sorted(found, key=lambda item: (-item[0], *item[1:4])):
            owner = min(holders, key=lambda rank: (load[rank], rank))
            load[owner] += cost
            runs.append(Run(number, start, stop, owner))
        return sorted(runs, key=lambda run: (run.parameter, run.start))

    def _segments(self, number: int) -> Iterator[tuple[int, int, list[int]]]:
        """Ranges of a stack's matrices that the same ranks hold, whole or in part, and those ranks."""
        parts = [of_rank[number] for of_rank in self.parts]
        bounds = sorted({bound for part in parts for bound in part.matrices})
        for start, stop in pairwise(bounds):
            holders = [rank for rank, part in enumerate(parts) if part.holds(start, stop)]
            if holders:
                yield start, stop, holders

    def _to_owner(self, run: Run) -> Iterator[tuple[int, int, Part]]:
        """Sender, owner and part of each different part of the run; what the owner holds as well, it takes itself."""
        senders: dict[tuple[Any, Any], int] = {}
        for rank, of_rank in enumerate(self.parts):
            part = of_rank[run.parameter]
            if part.holds(run.start, run.stop) and (rank == run.owner or part[1:] not in senders):
                senders[part[1:]] = rank
        for (rows, columns), rank in sorted(senders.items()):
            yield rank, run.owner, Part((run.start, run.stop), rows, columns)

    def _from_owner(self, run: Run) -> Iterator[tuple[int, int, Part]]:
        """Owner, each rank that holds a part of the run, and this part."""
        for rank, of_rank in enumerate(self.parts):
            part = of_rank[run.parameter]
            if part.holds(run.start, run.stop):
                yield run.owner, rank, Part((run.start, run.stop), part.rows, part.columns)

    def _gathered(self, parts_noi: list[Tensor]) -> list[Tensor]:
        """The whole matrices of this rank's runs."""
        sent: list[list[Tensor]] = [[] for _ in range(self.num_ranks)]
        wanted: list[list[Tensor]] = [[] for _ in range(self.num_ranks)]
        whole: list[Tensor] = []
        for run, moves in zip(self.runs, self.gathered, strict=True):
            if not moves:
                continue
            held = self._own_part(run, parts_noi)
            if run.owner == self.rank:
                shape = (run.stop - run.start, *self.shapes[run.parameter][1:])
                whole.append(held if held.shape == shape else held.new_empty(shape))
            for sender, owner, part in moves:
                if owner == self.rank != sender:
                    wanted[sender].append(_cut(whole[-1], part))
                elif sender == self.rank != owner:
                    sent[owner].append(held)
                elif sender == owner == self.rank and whole[-1] is not held:
                    _cut(whole[-1], part).copy_(held)
        if self.gathers:
            self._swap(sent, wanted, parts_noi[0])
        return whole

    def _returned(self, whole: list[Tensor], parts_noi: list[Tensor]) -> list[Tensor]:
        """This rank's parts of what the owners computed."""
        sent: list[list[Tensor]] = [[] for _ in range(self.num_ranks)]
        wanted: list[list[Tensor]] = [[] for _ in range(self.num_ranks)]
        results = [torch.empty_like(part) for part in parts_noi]
        computed = iter(whole)
        for run, moves in zip(self.runs, self.returned, strict=True):
            mine = next(computed) if run.owner == self.rank else None
            for owner, rank, part in moves:
                if mine is None:
                    wanted[owner].append(self._own_part(run, results))
                elif rank == self.rank:
                    self._own_part(run, results).copy_(_cut(mine, part))
                else:
                    sent[rank].append(_cut(mine, part))
        if self.returns:
            self._swap(sent, wanted, parts_noi[0])
        return results

    def _own_part(self, run: Run, parts_noi: list[Tensor]) -> Tensor:
        """What this rank holds of a run."""
        first = self.parts[self.rank][run.parameter].matrices[0]
        return parts_noi[run.parameter][max(run.start - first, 0) : max(run.stop - first, 0)]

    def _swap(self, sent: list[list[Tensor]], wanted: list[list[Tensor]], like: Tensor) -> None:
        """Sends to each rank its list of tensors, and fills those wanted of each."""
        out = [tensor.reshape(-1) for of_rank in sent for tensor in of_rank]
        sizes_out, sizes_in = ([sum(t.numel() for t in of_rank) for of_rank in lists] for lists in (sent, wanted))
        flat_out = torch.cat(out) if out else like.new_empty(0)
        flat_in = like.new_empty(sum(sizes_in))
        dist.all_to_all_single(flat_in, flat_out, sizes_in, sizes_out, group=self.group)
        start = 0
        for tensor in (tensor for of_rank in wanted for tensor in of_rank):
            tensor.copy_(flat_in[start : start + tensor.numel()].view(tensor.shape))
            start += tensor.numel()


def ranks_of(parameter: Tensor, num_replicas: int) -> tuple[dist.ProcessGroup | None, int]:
    """The group over which a parameter is split or repeated, and its size."""
    if not isinstance(parameter, DTensor):
        return None, num_replicas
    mesh = parameter.device_mesh
    if mesh.size() == 1 or mesh.size() == dist.get_world_size():
        return None, mesh.size()
    return (mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group()), mesh.size()


def local_matrices(parameter: Tensor, tensor: Tensor) -> Tensor:
    """[n, o, i] of a local tensor that has the shape of this rank's part of a parameter."""
    if parameter.ndim == 4:
        return tensor.reshape(1, tensor.shape[0], -1) if tensor.numel() else tensor.new_empty(1, tensor.shape[0], 0)
    return tensor.reshape(-1, *tensor.shape[-2:]) if parameter.ndim == 3 else tensor[None]


def _part(parameter: Tensor) -> Part:
    offsets, sizes = [0] * parameter.ndim, list(parameter.shape)
    if isinstance(parameter, DTensor):
        (chunk,) = parameter.__create_chunk_list__()  # as distributed checkpoints ask
        offsets, sizes = list(chunk.offsets), list(chunk.sizes)
    if parameter.ndim == 4:
        if sizes[2:] != list(parameter.shape[2:]):
            raise ValueError(
                f"filters of shape {tuple(parameter.shape)} are split along their height or width, which Muon doesn't "
                f"put together; split them along their outputs or inputs"
            )
        area = math.prod(sizes[2:])
        offsets, sizes = [0, offsets[0], offsets[1] * area], [1, sizes[0], sizes[1] * area]
    elif parameter.ndim == 2:
        offsets, sizes = [0, *offsets], [1, *sizes]
    ranges = [(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True)]
    return Part(*ranges)


def _of_all_ranks(
    own: list[Part], device: torch.device, group: dist.ProcessGroup | None, num_ranks: int
) -> list[list[Part]]:
    if num_ranks == 1:
        return [own]
    mine = torch.tensor(own, device=device)
    of_ranks = [torch.empty_like(mine) for _ in range(num_ranks)]
    dist.all_gather(of_ranks, mine, group=group)
    return [[Part(*(tuple(bounds) for bounds in part)) for part in places.tolist()] for places in of_ranks]


def _cut(whole_noi: Tensor, part: Part) -> Tensor:
    """The rows and columns of a part, of all the given matrices."""
    return whole_noi[:, slice(*part.rows), slice(*part.columns)]
