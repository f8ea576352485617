"""One mesh of processes with named axes: data, fsdp, expert, tensor, context.

    data     copies of the model, each with its own sequences (HSDP's outer axis)
    fsdp     weights, gradients and optimizer state are sharded; each rank has its own sequences
    expert   a part of fsdp: its ranks hold different experts of a layer, and tokens travel between them
    tensor   heads, experts, inner widths and vocabulary are split; its ranks have the same sequences
    context  a sequence over several ranks: always 1, see `ParallelConfig`

Ranks are numbered with tensor innermost, so that its traffic, the densest, stays within a machine, then expert.
As in torchtitan, the expert axis takes no ranks of its own: what is no expert ignores it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

if TYPE_CHECKING:
    from mmllm.model.multimodal import ModelConfig

AXES = ("data", "fsdp", "expert", "tensor", "context")


@dataclass(frozen=True)
class ParallelConfig:
    """How many ranks lie along each axis. data · fsdp · tensor is the number of processes.

    Attributes:
        data: copies of the model.
        fsdp: ranks that share one copy's weights, gradients and optimizer state; -1: all that the others leave.
        expert: of the fsdp ranks, over how many the experts of a layer are spread; it divides fsdp.
        tensor: ranks that compute one sequence together, each with its heads, experts and part of the vocabulary.
        context: 1. A sequence over several ranks needs an attention that passes keys and values around. torch's own
            (`torch.distributed.tensor.experimental.context_parallel`) does so for one causal sequence alone: it takes
            no mask and no document lengths, so that packed documents would see one another, and what is sent back for
            a sliding window or a bidirectional prefix would be wrong without a word.
    """

    data: int = 1
    fsdp: int = -1
    expert: int = 1
    tensor: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        for name in AXES:
            size = getattr(self, name)
            if size < 1 and not (name == "fsdp" and size == -1):
                wanted = "1 or more, or -1 for all that the others leave" if name == "fsdp" else "1 or more"
                raise ValueError(f"strategy.{name} is {size}; it must be {wanted}")
        if self.context != 1:
            raise ValueError(
                f"strategy.context is {self.context}, but a sequence can't be spread over ranks: torch's context "
                f"parallelism takes no mask, so packed documents would see each other; leave context at 1, and for "
                f"longer sequences use tensor, gradient_checkpointing or a smaller batch_size"
            )
        if self.expert > 1 and self.tensor > 1:
            raise ValueError(
                f"strategy.expert is {self.expert} and strategy.tensor {self.tensor}, which both spread the experts; "
                f"set one of them to 1"
            )
        if self.fsdp != -1:
            self._check_expert(self.fsdp)

    def resolved(self, num_processes: int) -> ParallelConfig:
        """The config with its -1 filled in.

        Raises:
            ValueError: the axes' product is not the number of processes.
        """
        others = self.data * self.tensor
        fsdp = self.fsdp if self.fsdp != -1 else num_processes // others
        if fsdp < 1 or others * fsdp != num_processes:
            sizes = f"data {self.data}, fsdp {self.fsdp}, tensor {self.tensor}"
            raise ValueError(
                f"strategy has {sizes}, which {num_processes} processes can't fill: data x fsdp x tensor must be "
                f"{num_processes}; change one of them, or the number of processes (devices, num_nodes)"
            )
        self._check_expert(fsdp)
        return ParallelConfig(self.data, fsdp, self.expert, self.tensor, self.context)

    def _check_expert(self, fsdp: int) -> None:
        if fsdp % self.expert:
            raise ValueError(
                f"strategy.expert is {self.expert}, which does not divide strategy.fsdp, {fsdp}: experts are spread "
                f"over a part of the fsdp ranks; choose a divisor of {fsdp}"
            )

    def check_model(self, model: ModelConfig) -> None:
        """Refuses a model that the axes do not divide.

        Raises:
            ValueError: names the model's field, its size and the axis.
        """
        decoder, moe = model.decoder, model.decoder.moe
        for axis in ("fsdp", "expert", "tensor"):
            if decoder.encoder_layers and getattr(self, axis) != 1:
                raise ValueError(
                    f"decoder.encoder_layers is {decoder.encoder_layers}, which strategy.{axis}, "
                    f"{getattr(self, axis)}, would split; set {axis} to 1 (data is free), or encoder_layers to 0"
                )
        if self.tensor > 1:
            if decoder.qk_norm == "width":
                raise ValueError(
                    f"decoder.qk_norm is 'width', which normalizes over all heads, but strategy.tensor, {self.tensor}, "
                    f"splits them over ranks; set tensor to 1, or qk_norm to 'head'"
                )
            for key, value, plain in (
                ("attention_bias", decoder.bias_of, "none"), ("mlp_bias", decoder.mlp_bias, False)
            ):  # fmt: skip
                if value != plain:
                    raise ValueError(
                        f"decoder.{key} is {value!r}, whose vectors strategy.tensor, {self.tensor}, would split over "
                        f"the one dimension that fsdp splits; set tensor to 1, or {key} to {str(plain).lower()}"
                    )
            sizes = {
                "decoder.num_attention_heads": decoder.num_attention_heads,
                "decoder.num_key_value_heads": decoder.kv_heads,
                "decoder.vocab_size": decoder.vocab_size,
            }
            if any(not decoder.has_experts(layer) for layer in range(decoder.num_hidden_layers)):
                sizes["decoder.intermediate_size"] = decoder.intermediate_size
            if moe is not None:
                sizes["decoder.moe.num_experts"] = moe.num_experts
            _check_divides(sizes, "tensor", self.tensor)
            _check_divides({"decoder.hidden_size": decoder.hidden_size}, "fsdp", self.fsdp)
        if self.expert > 1:
            if moe is None:
                raise ValueError(
                    f"strategy.expert is {self.expert}, but the model has no experts; set decoder.moe, or expert to 1"
                )
            _check_divides({"decoder.moe.num_experts": moe.num_experts}, "expert", self.expert)
            inner = {
                "decoder.hidden_size": decoder.hidden_size,
                "decoder.moe.moe_intermediate_size": 2 * moe.moe_intermediate_size,
            }
            _check_divides(inner, "fsdp / expert", self.fsdp // self.expert)


def _check_divides(sizes: dict[str, int], axis: str, ranks: int) -> None:
    for field, size in sizes.items():
        if size % ranks:
            common = [divisor for divisor in range(2, size + 1) if size % divisor == 0 and divisor <= ranks]
            choice = f"choose {max(common)}" if common else "leave it at 1"
            raise ValueError(
                f"{field} is {size}, which strategy.{axis}, {ranks}, does not divide; {choice}, or change the model"
            )


@dataclass(frozen=True)
class ParallelMesh:
    """The process groups of a `ParallelConfig`.

    Two device meshes cover all ranks: `dense` (data, fsdp, tensor) for what is no expert, and `sparse` (data,
    expert_fsdp, expert, tensor), in which fsdp is split into those ranks that hold the same experts and those that
    hold different ones.
    """

    config: ParallelConfig
    dense: DeviceMesh
    sparse: DeviceMesh
    batch: DeviceMesh
    """One axis, data and fsdp: ranks with different sequences."""

    @staticmethod
    def build(config: ParallelConfig, device_type: str) -> ParallelMesh:
        """Makes the groups; a collective call after `torch.distributed.init_process_group`.

        Raises:
            ValueError: the config does not fit the number of processes.
        """
        config = config.resolved(dist.get_world_size())
        dense = init_device_mesh(
            device_type, (config.data, config.fsdp, config.tensor), mesh_dim_names=("data", "fsdp", "tensor")
        )
        sizes = (config.data, config.fsdp // config.expert, config.expert, config.tensor)
        sparse = init_device_mesh(device_type, sizes, mesh_dim_names=("data", "expert_fsdp", "expert", "tensor"))
        return ParallelMesh(config, dense, sparse, dense["data", "fsdp"]._flatten("batch"))

    @property
    def num_batch_ranks(self) -> int:
        """Ranks with sequences of their own."""
        return self.batch.size()

    @property
    def batch_rank(self) -> int:
        """Which of them this one is; the same on all ranks of a tensor group."""
        return self.batch.get_local_rank()

    @property
    def batch_group(self) -> dist.ProcessGroup:
        """Over which losses, counts and metrics are summed."""
        return self.batch.get_group()

    @property
    def device_type(self) -> str:
        """Of the devices that communicate."""
        return self.dense.device_type

    def fsdp_mesh(self) -> DeviceMesh:
        """Over which dense weights are sharded (and, with data above 1, replicated over its first axis)."""
        return self.dense["fsdp"] if self.config.data == 1 else self.dense["data", "fsdp"]

    def expert_fsdp_mesh(self) -> DeviceMesh:
        """The same for the experts' weights, each rank of the expert axis having its own."""
        return self.sparse["expert_fsdp"] if self.config.data == 1 else self.sparse["data", "expert_fsdp"]
