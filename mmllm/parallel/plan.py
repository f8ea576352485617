"""What a training step would move, take and hold on many GPUs, by arithmetic: no process is started.

The cost of a collective call is the bytes that a GPU sends over the slowest link that its group crosses, and a latency
for each hop of a ring, which is what limits small messages among many ranks. Weights are gathered and gradients reduced
while a neighbouring layer computes; what tokens wait for (all-to-all, the tensor axis) is never hidden.

Units: bytes, seconds, FLOP; of one GPU unless another is named.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmllm.model.decoder import Decoder
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.flops import ModelFlops, Work
from mmllm.model.multimodal import ModelConfig
from mmllm.model.recompute import recompute_mode
from mmllm.parallel.mesh import ParallelConfig

BF16, FP32 = 2, 4
STATE_BYTES = 4 * FP32
"""A weight, its gradient and AdamW's two moments."""


@dataclass(frozen=True)
class Hardware:
    """GPUs in machines. The defaults are H200s (141 GB, NVLink 4) with 400 Gb/s of InfiniBand each.

    Attributes:
        flops_per_second: of bf16 matrix products, on the data sheet.
        efficiency: share of that which kernels reach where nothing waits.
        memory_bytes: of which a tenth is left to the allocator and the communication library.
        gpus_per_machine: that NVLink joins.
        link_bytes_per_second: between GPUs of a machine, one way.
        network_bytes_per_second: between machines, one way, a GPU.
        link_hop_seconds: latency of a ring's hop in a machine.
        network_hop_seconds: between machines.
    """

    flops_per_second: float = 989e12
    efficiency: float = 0.5
    memory_bytes: float = 141e9
    gpus_per_machine: int = 8
    link_bytes_per_second: float = 360e9
    network_bytes_per_second: float = 45e9
    link_hop_seconds: float = 2e-6
    network_hop_seconds: float = 6e-6


@dataclass(frozen=True)
class Sizes:
    """Parameters of a decoder."""

    layer: int
    """Of a layer, its experts left out."""
    experts: int
    """Of a layer's experts."""
    vocabulary: int
    """Of embedding and head."""
    total: int
    active: int
    """That one token passes, the embedding left out."""

    @staticmethod
    def of(config: DecoderConfig) -> Sizes:
        """Counts the parameters of a decoder that is built on the meta device."""
        with torch.device("meta"):
            decoder = Decoder(config)
        names = {name: parameter.numel() for name, parameter in decoder.named_parameters()}
        experts = sum(size for name, size in names.items() if ".experts." in name)
        vocabulary = sum(size for name, size in names.items() if name.startswith(("embed_tokens.", "lm_head.")))
        total = sum(names.values())
        share = config.moe.num_experts_per_tok / config.moe.num_experts if config.moe else 1.0
        head = config.vocab_size * config.hidden_size
        active = total - experts - vocabulary + head + int(experts * share)
        num_layers = config.num_hidden_layers
        return Sizes((total - experts - vocabulary) // num_layers, experts // num_layers, vocabulary, total, active)


@dataclass(frozen=True)
class Step:
    """One optimizer step."""

    fsdp_bytes: float
    """Sent for weights and gradients."""
    expert_bytes: float
    """Sent for tokens that travel to experts."""
    tensor_bytes: float
    """Sent for sums over the tensor axis."""
    compute_seconds: float
    hidden_seconds: float
    """Communication under which something computes."""
    waiting_seconds: float
    """Communication that nothing hides."""
    memory_bytes: float
    fits: bool
    tokens: int
    """Of all GPUs."""

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.compute_seconds + self.waiting_seconds

    @property
    def efficiency(self) -> float:
        """Share of the time in which the GPU computes."""
        return self.compute_seconds / self.seconds


def plan(
    decoder: DecoderConfig,
    mesh: ParallelConfig,
    sequence_length: int,
    sequences: int,
    num_accumulated: int = 1,
    hardware: Hardware | None = None,
) -> Step:
    """Reckons a step of a decoder; the image tower and the projectors are left out.

    Args:
        decoder: whose sizes count; `gradient_checkpointing` too.
        mesh: with its fsdp axis given.
        sequence_length: tokens a sequence.
        sequences: of one batch of each rank of data and fsdp.
        num_accumulated: batches a step.
        hardware: None: H200s.
    """
    hardware = hardware or Hardware()
    sizes, recompute = Sizes.of(decoder), recompute_mode(decoder.gradient_checkpointing)
    tokens = sequence_length * sequences
    links = _Links(mesh, hardware)

    model, work = ModelFlops.of(ModelConfig(decoder)), Work((sequence_length,) * sequences, num_targets=tokens)
    flops = (model.training(work) + model.computed_again(work)) / mesh.tensor
    compute = flops / (hardware.flops_per_second * hardware.efficiency)

    gathers = links.fsdp(sizes, decoder, tokens)
    moe_layers = sum(decoder.has_experts(layer) for layer in range(decoder.num_hidden_layers))
    trips = 2 * (3 if recompute == "full" else 2)  # there and back; forward, backward, forward again
    row = tokens * decoder.hidden_size * BF16
    expert = links.expert(row * _ranks_reached(decoder, mesh.expert), trips * moe_layers)
    sums = 2 * decoder.num_hidden_layers * (3 if recompute == "full" else 2) + 2
    tensor = links.tensor(row, sums)

    exposed = max(gathers.seconds - 0.95 * compute, 0.05 * gathers.seconds)  # the first gather, the last reduction
    memory = _memory(decoder, sizes, mesh, tokens, recompute)
    return Step(
        fsdp_bytes=num_accumulated * gathers.bytes,
        expert_bytes=num_accumulated * expert.bytes,
        tensor_bytes=num_accumulated * tensor.bytes,
        compute_seconds=num_accumulated * compute,
        hidden_seconds=num_accumulated * (gathers.seconds - exposed),
        waiting_seconds=num_accumulated * (exposed + expert.seconds + tensor.seconds),
        memory_bytes=memory,
        fits=memory <= 0.9 * hardware.memory_bytes,
        tokens=num_accumulated * tokens * mesh.data * mesh.fsdp,
    )


@dataclass(frozen=True)
class _Cost:
    bytes: float
    seconds: float

    def __add__(self, other: _Cost) -> _Cost:
        return _Cost(self.bytes + other.bytes, self.seconds + other.seconds)


@dataclass(frozen=True)
class _Links:
    mesh: ParallelConfig
    hardware: Hardware

    def _ring(self, size: int, stride: int, payload: float, rounds: float) -> _Cost:
        """`rounds` rings (gather or reduce: 1, all-reduce: 2) of `size` ranks that lie `stride` apart."""
        if size == 1:
            return _Cost(0.0, 0.0)
        hardware = self.hardware
        sent = rounds * payload * (size - 1) / size
        in_machine = size * stride <= hardware.gpus_per_machine
        speed = hardware.link_bytes_per_second if in_machine else hardware.network_bytes_per_second
        if not in_machine and stride < hardware.gpus_per_machine:  # a ring enters and leaves a machine once
            speed = min(hardware.link_bytes_per_second, speed * hardware.gpus_per_machine / stride)
        machines = 1 if in_machine else -(-size * stride // hardware.gpus_per_machine)
        hops = (size - machines) * hardware.link_hop_seconds + (machines - 1) * hardware.network_hop_seconds
        return _Cost(sent, sent / speed + rounds * hops)

    def fsdp(self, sizes: Sizes, decoder: DecoderConfig, tokens: int) -> _Cost:
        """Weights gathered in bf16 twice, gradients reduced in fp32 once, copies' gradients summed."""
        mesh = self.mesh
        total = _Cost(0.0, 0.0)
        num_layers = decoder.num_hidden_layers
        holders = mesh.fsdp // mesh.expert
        parts = [(sizes.vocabulary / mesh.tensor, mesh.fsdp, mesh.tensor, 1)]
        if mesh.expert == 1:  # a layer is one unit
            parts.append(((sizes.layer + sizes.experts) / mesh.tensor, mesh.fsdp, mesh.tensor, num_layers))
        else:
            parts.append((sizes.layer, mesh.fsdp, 1, num_layers))
            parts.append((sizes.experts / mesh.expert, holders, mesh.expert, num_layers))
        for weights, size, stride, times in parts:
            if not weights:
                continue
            gather = self._ring(size, stride, weights * BF16, 1)
            reduce = self._ring(size, stride, weights * FP32, 1)
            copies = self._ring(mesh.data, stride * size, weights / size * FP32, 2)
            for _ in range(times):
                total = total + gather + gather + reduce + copies
        return total

    def expert(self, payload: float, times: int) -> _Cost:
        """All-to-alls, each rank sending `payload` to others."""
        mesh, hardware = self.mesh, self.hardware
        if mesh.expert == 1:
            return _Cost(0.0, 0.0)
        in_machine = mesh.expert * mesh.tensor <= hardware.gpus_per_machine
        speed = hardware.link_bytes_per_second if in_machine else hardware.network_bytes_per_second
        hop = hardware.link_hop_seconds if in_machine else hardware.network_hop_seconds
        return _Cost(times * payload, times * (payload / speed + (mesh.expert - 1) * hop))

    def tensor(self, payload: float, times: int) -> _Cost:
        """All-reduces of activations."""
        one = self._ring(self.mesh.tensor, 1, payload, 2)
        return _Cost(times * one.bytes, times * one.seconds)


def _ranks_reached(decoder: DecoderConfig, num_ranks: int) -> float:
    """To how many other ranks a token travels, where its experts are drawn evenly."""
    if decoder.moe is None or num_ranks == 1:
        return 0.0
    here, top_k = decoder.moe.num_experts // num_ranks, decoder.moe.num_experts_per_tok
    missed = 1.0
    for draw in range(top_k):  # that a rank has none of the token's experts
        missed *= max(decoder.moe.num_experts - here - draw, 0) / (decoder.moe.num_experts - draw)
    return (num_ranks - 1) * (1 - missed)


def _memory(decoder: DecoderConfig, sizes: Sizes, mesh: ParallelConfig, tokens: int, recompute: str) -> float:
    """Shards and their optimizer state, gathered weights, activations, a chunk of logits."""
    dense = sizes.layer * decoder.num_hidden_layers + sizes.vocabulary
    experts = sizes.experts * decoder.num_hidden_layers
    shards = STATE_BYTES * (dense + experts) / mesh.fsdp / mesh.tensor
    layer = sizes.layer / mesh.tensor + sizes.experts / mesh.expert / mesh.tensor
    gathered = 2 * layer * BF16 + layer * FP32 + sizes.vocabulary / mesh.tensor * (BF16 + FP32)
    width, inner, top_k = decoder.hidden_size, decoder.intermediate_size, 1
    if decoder.moe is not None:
        inner, top_k = decoder.moe.moe_intermediate_size, decoder.moe.num_experts_per_tok
    heads = (decoder.num_attention_heads + 2 * decoder.kv_heads) * decoder.head_channels
    products = (2 * heads + 3 * top_k * inner) / mesh.tensor + 2 * width
    one_layer = tokens * BF16 * (products + 4 * width + 2 * top_k * inner / mesh.tensor)
    kept = {"none": one_layer, "selective": tokens * BF16 * products, "full": tokens * BF16 * width}[recompute]
    return shards + gathered + kept * decoder.num_hidden_layers + one_layer + 256 * 2**20
