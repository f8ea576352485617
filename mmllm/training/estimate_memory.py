"""What a device holds while a decoder trains: a step of it, followed without computing.

Shapes: B sequences a device and batch, T positions, N images, S slots an image, K codebooks.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mmllm.batch import IGNORE, Modality, PackedBatch
from mmllm.model.flops import Work
from mmllm.model.multimodal import ModelConfig, MultimodalModel
from mmllm.training.decoder_module import DecoderModule
from mmllm.training.layout import Layout
from mmllm.training.live_memory import LiveMemory, Part
from mmllm.training.optimizers import build_optimizer, parameter_groups
from mmllm.training.parts import build_model


@dataclass(frozen=True)
class Load:
    """What the data gives a device in one batch.

    Attributes:
        batch_size: sequences of all ranks.
        sequence_length: T.
        max_images: pictures of a sequence at most.
        work: what decides the cost of the sequences looked at.
        num_sequences: how many these are.
        is_planned: they are the recipe's own; False: full sequences of one text each, with as many pictures as may be.
    """

    batch_size: int
    sequence_length: int
    max_images: int
    work: Work
    num_sequences: int
    is_planned: bool

    def told(self) -> dict[str, Any]:
        """For the report."""
        return {
            "sequence_length": self.sequence_length,
            "images_a_sequence": round(self.work.num_images / self.num_sequences, 3),
            "max_images_a_sequence": self.max_images,
            "documents": "as the recipe's first steps" if self.is_planned else "one a sequence",
        }


def memory_bytes(module: DecoderModule, config: ModelConfig, layout: Layout, load: Load) -> dict[str, int]:
    """What a device holds: each part when that is largest, and in total when all together are, at one moment.

    A step is followed on tensors without storage: forward pass, loss, backward pass, optimizer. Not in it: what CUDA
    and communication libraries keep for themselves, what the allocator loses between blocks.

    Args:
        module: gives the optimizer.
        config: of its model.
        layout: over which devices.
        load: how large its batches are.

    Raises:
        ValueError: the base is quantized.
    """
    if module.adapter is not None and module.adapter.quantization is not None:
        raise ValueError(
            f"adapter.quantization is {module.adapter.quantization}, whose memory --print_estimate does not know; "
            f"leave it out for the estimate: linear layers' weights take about a quarter of what they do in bfloat16"
        )
    num_sequences = -(-load.batch_size // layout.num_batch_ranks)
    stored = 4 if layout.autocast is not None else layout.dtype.itemsize
    scale = stored / layout.dtype.itemsize / layout.num_shards
    scales = {"weights": scale, "gradients": scale, "optimizer": scale}
    config = _on_device(config, layout)
    with torch.device("meta"), _default_dtype(layout.dtype):
        model = build_model(config, module.optimizer, None, module.adapter)
    batch = largest_batch(model, num_sequences, load)
    followed = DecoderModule(config.decoder, loss=config.loss, optimizer=module.optimizer)
    followed.source_names.extend(config.loss.source_weights or ())
    memory = LiveMemory(scales, layout.is_gpu)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, memory:
        batch = batch.map(mode.from_tensor)
        kept = [value for value in vars(batch).values() if isinstance(value, Tensor)]
        for value in kept:
            memory.mark(value, "pictures")
        with memory.allocating("weights"):  # PEFT moves what it makes, which tensors without storage don't bear
            followed.model = model.to_empty(device="cpu")
        _follow_step(followed, batch, layout, memory)
    # The watch keeps a step's batches until the next one ends.
    more = {"pictures": (2 * layout.accumulated - 1) * sum(value.nbytes for value in kept)}
    if layout.num_shards > 1:
        more["weights"], more["gradients"] = _gathered_bytes(model, layout)
    trained = round(scale * sum(p.nbytes for p in model.parameters() if p.requires_grad))
    if layout.is_replicated:  # DDP's buckets
        more["gradients"] = trained
    if layout.keeps_average:
        more["average"] = trained
    if module.keeps_start:  # what a penalty, or the reference of preferences, is measured from
        more["start"] = trained * (2 if module.keep.ewc else 1)  # with the Fisher information
    parts = {name: round(scales.get(name, 1.0) * memory.most[name]) for name in _PARTS}
    parts |= {name: parts.get(name, 0) + size for name, size in more.items()}
    return {**parts, "total": round(memory.peak_bytes) + sum(more.values())}


_PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "pictures")


def _on_device(config: ModelConfig, layout: Layout) -> ModelConfig:
    """With the attention that its devices would choose."""
    decoder = config.decoder
    is_half = layout.dtype.itemsize == 2 or layout.autocast is not None
    is_causal = decoder.prefix == "none" and not decoder.encoder_layers
    if decoder.attention_backend == "auto" and layout.is_gpu and is_half and is_causal:
        decoder = dataclasses.replace(decoder, attention_backend="varlen")
    return dataclasses.replace(config, decoder=decoder)


def largest_batch(model: MultimodalModel, num_sequences: int, load: Load) -> PackedBatch:
    """Full sequences of one text each, all of it targets, that begin with as many pictures as may be."""
    config, slots = model.config, model.num_image_tokens
    shape, num_images = (num_sequences, load.sequence_length), num_sequences * load.max_images
    positions_BT = torch.arange(shape[1]).expand(shape).clone()
    is_slot_BT = positions_BT < load.max_images * slots
    labels_BT = torch.where(is_slot_BT, IGNORE, config.num_text - 1)
    size = model.vision.image_size if model.vision is not None else 0
    starts_N1 = torch.arange(num_images)[:, None] // max(load.max_images, 1) * shape[1]
    places_NS = torch.arange(num_images)[:, None] % max(load.max_images, 1) * slots + torch.arange(slots)
    codes_BTK = torch.full((*shape, config.audio.num_codebooks if config.audio is not None else 0), -1)
    return PackedBatch(
        token_ids_BT=torch.full(shape, config.num_text - 1),
        labels_BT=labels_BT,
        positions_BT=positions_BT,
        document_ids_BT=torch.zeros(shape, dtype=torch.int64),
        modality_BT=torch.where(is_slot_BT, int(Modality.IMAGE), int(Modality.TEXT)),
        source_BT=torch.zeros(shape, dtype=torch.int64),
        audio_codes_BTK=codes_BTK,
        audio_labels_BTK=torch.full_like(codes_BTK, IGNORE),
        images_NCHW=torch.zeros(num_images, 3, size, size, dtype=torch.uint8),
        image_slots_NS=starts_N1 + places_NS,
        clip_codes_CFK=torch.zeros(0, 0, codes_BTK.shape[-1], dtype=torch.int64),
        clip_slots_CS=torch.zeros(0, 0, dtype=torch.int64),
        clip_targets_CL=torch.zeros(0, 0, dtype=torch.int64),
    ).with_metadata()


def _follow_step(module: DecoderModule, batch: PackedBatch, layout: Layout, memory: LiveMemory) -> None:
    """One step of a training under way: the optimizer has its state, and the last step's gradients are there."""
    assert module.model is not None
    groups = parameter_groups(module, module.optimizer, module.tower_of)
    for group in groups:
        group.pop("peak_lr")
    optimizer = build_optimizer(groups, module.optimizer)
    for parameter in (parameter for group in groups for parameter in group["params"]):
        parameter.grad = torch.zeros_like(parameter)
        memory.mark(parameter.grad, "gradients")
        parameter.register_post_accumulate_grad_hook(lambda p: memory.mark(p.grad, "gradients"))
    optimizer.step()
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                memory.mark(value, "optimizer")
    memory.restart()
    with _named_parts(module.model, memory), _autocast(layout.autocast):
        loss = module.loss_of(batch)[0]
    if layout.accumulated == 1:  # Lightning forgets the last step's gradients between forward and backward pass
        optimizer.zero_grad()
    loss.backward()
    del loss
    optimizer.step()


@contextlib.contextmanager
def _named_parts(model: MultimodalModel, memory: LiveMemory) -> Iterator[None]:
    """What the image tower and its projector make is the pictures'; what the head makes is the logits'."""
    modules: list[tuple[Any, Part]] = [(model.decoder.lm_head, "logits")]
    modules += [(model.vision, "pictures"), (model.image_projector, "pictures")]
    with contextlib.ExitStack() as hooks, contextlib.ExitStack() as inside:
        for module, part in modules:
            if module is None:
                continue

            def enter(*_: Any, part: Part = part) -> None:
                inside.enter_context(memory.allocating(part))

            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(lambda *_: inside.pop_all().close()).remove)
        yield


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _autocast(dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    # The tensors are the CPU's, since autograd asks for the device of others; which products are cast is the same.
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def _gathered_bytes(model: MultimodalModel, layout: Layout) -> tuple[int, int]:
    """What FSDP2 holds of others' shards: gathered weights, and gradients before they are reduced.

    While a layer computes, the next one's weights are gathered; embedding, head and projectors stay. A frozen tower is
    whole everywhere. Gradients of one layer are reduced, in float32, while the next one's are made.
    """
    layers = model.decoder.layers
    largest = max(sum(p.numel() for p in layer.parameters()) for layer in layers)
    reduced = max(sum(p.numel() for p in layer.parameters() if p.requires_grad) for layer in layers)
    tower = list(model.vision.parameters()) if model.vision is not None else []
    frozen = sum(p.numel() for p in tower if not p.requires_grad)
    rest = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in [*layers.parameters(), *tower])
    size = layout.dtype.itemsize
    return size * (rest + 2 * largest) + round(size * frozen * (1 - 1 / layout.num_shards)), reduced * (size + 4)
