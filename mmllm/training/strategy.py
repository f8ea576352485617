"""Training on many devices: `strategy: {class_path: mmllm.training.strategy.MeshStrategy, init_args: {fsdp: 8}}`.

Processes come from torchrun, from Slurm, or from Lightning itself, which starts one for each of `trainer.devices`.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch.optim import Optimizer

from mmllm.parallel import checkpoint as files
from mmllm.parallel.mesh import ParallelConfig, ParallelMesh
from mmllm.parallel.shard import ShardConfig


class MeshStrategy(ModelParallelStrategy):
    """Lightning's strategy for a `ParallelMesh`: the module shards itself over it in `configure_model`.

    Checkpoints hold the same things whatever the axes, so that a run goes on under others, or in one process.
    """

    def __init__(
        self,
        data: int = 1,
        fsdp: int = -1,
        expert: int = 1,
        tensor: int = 1,
        context: int = 1,
        reshard_after_forward: bool = True,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        """Keeps the settings.

        Args:
            data: copies of the model, each sharded over the fsdp ranks.
            fsdp: ranks that share one copy's weights, gradients and optimizer state; -1: all that are left.
            expert: over how many of the fsdp ranks a layer's experts are spread; tokens travel to them.
            tensor: ranks that compute one sequence together. Their traffic is the densest: keep them in one machine.
            context: 1; see `ParallelConfig`.
            reshard_after_forward: free a layer's gathered weights after its forward pass; False saves a third of the
                traffic and costs the memory of a whole model in the compute dtype.
            save_distributed_checkpoint: each rank writes its shards into a folder; False: rank 0 gathers all and writes
                one file, as a single process does.
            process_group_backend: of the processes' connection; None: nccl on GPUs, gloo on CPUs.
            timeout: after which a collective call that a rank doesn't join ends the run.

        Raises:
            ValueError: a size is out of range, or the axes contradict each other.
        """
        super().__init__(1, 1, save_distributed_checkpoint, process_group_backend, timeout)
        self.config = ParallelConfig(data, fsdp, expert, tensor, context)
        self._reshards = reshard_after_forward
        self._mesh: ParallelMesh | None = None

    @property
    def mesh(self) -> ParallelMesh:
        """The processes' mesh, once they are connected."""
        assert self._mesh is not None, "setup_environment makes it"
        return self._mesh

    @property
    def shard_config(self) -> ShardConfig:
        """What the trainer's precision means for shards.

        Raises:
            ValueError: the precision needs a scaled loss, which sharded gradients don't have.
        """
        precision = str(self.precision_plugin.precision)
        match precision:
            case "bf16-mixed":
                return ShardConfig(torch.bfloat16, torch.float32, self._reshards)
            case "bf16-true":
                return ShardConfig(None, torch.float32, self._reshards)
            case "32-true" | "64-true":
                return ShardConfig(reshard_after_forward=self._reshards)
        raise ValueError(
            f"trainer.precision is {precision}, which MeshStrategy doesn't know; choose bf16-mixed, bf16-true or "
            f"32-true"
        )

    # --- processes --------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Connects the processes and makes the mesh."""
        self._setup_distributed()
        self._mesh = ParallelMesh.build(self.config, self.root_device.type)
        self._device_mesh = self._mesh.dense
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._mesh.dense

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Ranks of one tensor group read the same sequences."""
        return {"num_replicas": self.mesh.num_batch_ranks, "rank": self.mesh.batch_rank}

    # --- checkpoints ------------------------------------------------------------------------------------------

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning restores the optimizer of what `load_checkpoint` gives, as in one process."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's weights, sharded as they are."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state, sharded as it is, with parameters numbered as in one process."""
        return (optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Writes a folder, or one file (`save_distributed_checkpoint: false`); a collective call."""
        path = Path(self.broadcast(str(filepath)))
        if self._save_distributed_checkpoint:
            files.save_folder(checkpoint, path)
            return
        whole = files.gathered(checkpoint)
        if self.global_rank == 0:
            if files.is_folder(path):
                self.checkpoint_io.remove_checkpoint(path)
            self.checkpoint_io.save_checkpoint(whole, path, storage_options=storage_options)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a folder or a file that any strategy wrote; of what is sharded here, this rank's shards."""
        path = Path(self.broadcast(str(checkpoint_path)))
        if files.is_folder(path):
            return files.load_folder(path, self._like)
        checkpoint = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
        return files.sharded(checkpoint, self._like(checkpoint))

    def _like(self, checkpoint: Mapping[str, Any]) -> files.Like:
        """For a checkpoint's tensor, the weight of which it is the value, moment or average."""
        assert self.lightning_module is not None
        weights = dict(self.lightning_module.named_parameters())
        numbered = []  # whatever numbers a checkpoint gives the parameters, groups have them in the same order
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
            own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            saved = [number for group in state["param_groups"] for number in group["params"]]
            numbered.append(dict(zip(saved, own, strict=False)))

        def like(name: str) -> Tensor | None:
            parts = name.split("/")
            if parts[0] == "optimizer_states" and int(parts[1]) < len(numbered):
                return numbered[int(parts[1])].get(int(parts[3]))
            return weights.get(parts[-1])

        return like

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """As in one process: `load_checkpoint` has sharded the weights already."""
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """As in one process."""
        Strategy.load_optimizer_state_dict(self, checkpoint)


class AnyCheckpointIO(TorchCheckpointIO):
    """Also reads the folders that `MeshStrategy` writes, whole, for strategies that don't shard."""

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """A file's or a folder's checkpoint."""
        if files.is_folder(Path(path)):
            return files.load_folder(Path(path))
        return super().load_checkpoint(path, map_location, weights_only)


def mesh_and_sharding(strategy: Strategy | None) -> tuple[ParallelMesh | None, ShardConfig]:
    """A strategy's; None where each process holds the whole model."""
    if isinstance(strategy, MeshStrategy):
        return strategy.mesh, strategy.shard_config
    if isinstance(strategy, ModelParallelStrategy):  # Lightning's own has two axes
        mesh = strategy.device_mesh
        config = ParallelConfig(fsdp=mesh["data_parallel"].size(), tensor=mesh["tensor_parallel"].size())
        return ParallelMesh.build(config, mesh.device_type), ShardConfig()
    return None, ShardConfig()
