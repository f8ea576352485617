"""Muon of sharded matrices against one process that holds them whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from mmllm.training.optimizers import MuonAdamW, OptimizerConfig
from tests.training_fixtures import run_ranks

CONFIG = OptimizerConfig(lr=0.1, weight_decay=0.1, muon=True)
LAYOUTS = {"fsdp": 20, "fsdp_tensor": 20, "fsdp_expert": 20, "hsdp": 4, "fsdp_expert_rows": 4, "tensor_alone": 4}
LAYOUTS |= {"part_of_the_world": 4}
"""And for how many steps each is trained."""


class Layers(nn.Module):
    """Matrices, stacks and filters, of which four ranks get uneven shares, or some ranks nothing."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

        self.tall, self.wide, self.few = weight(10, 4), weight(6, 9), weight(3, 5)
        self.stack, self.filters, self.twin = weight(6, 8, 4), weight(7, 2, 3, 3), weight(10, 4)
        self.column, self.row = nn.Linear(6, 8).double(), nn.Linear(8, 4).double()
        for parameter in (*self.column.parameters(), *self.row.parameters()):
            parameter.data.copy_(weight(*parameter.shape))


def _experts_over(mesh: DeviceMesh) -> Any:
    def split(name: str, module: nn.Module, _: DeviceMesh) -> None:
        if isinstance(module, Layers):
            module.stack = nn.Parameter(distribute_tensor(module.stack.data, mesh, [Shard(0)]))

    return split


def _sharded(layout: str) -> Layers:
    layers = Layers()
    match layout:
        case "fsdp":
            fully_shard(layers, mesh=init_device_mesh("cpu", (4,)))
        case "hsdp":
            fully_shard(layers, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
        case "fsdp_tensor" | "tensor_alone":
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
            parallelize_module(layers, mesh["tensor"], {"column": ColwiseParallel(), "row": RowwiseParallel()})
            if layout == "fsdp_tensor":
                fully_shard(layers, mesh=mesh["data"])
        case "fsdp_expert" | "fsdp_expert_rows":
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))
            distribute_module(layers, mesh["expert"], _experts_over(mesh["expert"]))
            inner = 1 if layout.endswith("rows") else 0
            fully_shard(layers, mesh=mesh["data"], shard_placement_fn=lambda p: Shard(inner if p.ndim == 3 else 0))
        case "part_of_the_world":
            mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("copies", "data", "tensor"))
            placements = [Shard(0), Shard(1)]
            for name, parameter in list(layers.named_parameters(recurse=False)):
                placed = distribute_tensor(parameter.data, mesh["data", "tensor"], placements)
                setattr(layers, name, nn.Parameter(placed))
    return layers


def _gradient(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return whole
    (chunk,) = parameter.__create_chunk_list__()
    part = whole[tuple(slice(o, o + size) for o, size in zip(chunk.offsets, chunk.sizes, strict=True))]
    form = {"shape": whole.shape, "stride": whole.stride()}
    return DTensor.from_local(part.contiguous(), parameter.device_mesh, parameter.placements, run_check=False, **form)


def _train(layers: Layers, num_steps: int) -> dict[str, torch.Tensor]:
    """The whole weights after the first and the last, and the whole momentum."""
    weights = dict(layers.named_parameters())
    groups = [
        {"params": [p for p in weights.values() if (p.ndim > 1) == is_matrix], "use_muon": is_matrix}
        for is_matrix in (True, False)
    ]
    optimizer = MuonAdamW(groups, CONFIG)
    generator, kept = torch.Generator().manual_seed(1), {}
    for step in range(num_steps):
        for parameter in weights.values():
            whole = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = _gradient(parameter, whole)
        optimizer.step()
        if step in (0, num_steps - 1):
            kept |= {f"{step}/{name}": p.detach().clone() for name, p in weights.items()}
    for name, parameter in weights.items():
        kept |= {f"{name}/{key}": value for key, value in optimizer.state[parameter].items() if key != "step"}
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in kept.items()}


def _rank(rank: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=4)
    torch.save(
        {layout: _train(_sharded(layout), num_steps) for layout, num_steps in LAYOUTS.items()}, f"{out}/rank{rank}.pt"
    )
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_sharded_matrices_move_as_whole_ones_do(tmp_path: Path) -> None:
    alone = {num_steps: _train(Layers(), num_steps) for num_steps in set(LAYOUTS.values())}
    for of_rank in run_ranks(_rank, tmp_path, num_ranks=4):
        for layout, moved in of_rank.items():
            expected = alone[LAYOUTS[layout]]
            assert moved.keys() == expected.keys()
            apart = {name: float((moved[name] - value).abs().max()) for name, value in expected.items()}
            assert max(apart.values()) < 1e-10, (layout, apart)
