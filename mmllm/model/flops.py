"""How many floating-point operations a batch costs, counted from the model's shapes; and what devices can do.

Counted are products alone, two operations for each multiply-add: what is called model FLOPs when utilization is told
(PaLM, arXiv 2204.02311, appendix B). Of experts only those that a token passes count, of attention only the pairs that
see each other. A backward pass is twice its forward pass; what activation checkpointing computes again is told apart.

Shapes: N images, H and W pixels, C clips, F frames a clip, K codebooks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmllm.batch import PackedBatch
from mmllm.model.depth import num_passing
from mmllm.model.multimodal import ModelConfig, MultimodalModel
from mmllm.model.recompute import recompute_mode
from mmllm.model.router import MoEConfig

PEAK_FLOPS: dict[str, float] = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "L4": 121e12,
    "MI300X": 1307e12,
    "MI250X": 383e12,
}
"""Dense bfloat16 products a second, by what a device's name contains (the first that fits; makers' data sheets)."""

NUM_PROBED_SLOTS = 16
"""Slots of the clip by which the audio projector's work is counted."""


def peak_flops(device_name: str) -> float | None:
    """Of a device, by its name; None: not known."""
    words = device_name.replace("-", " ")
    padded = f" {words} "
    return next((peak for name, peak in PEAK_FLOPS.items() if f" {name} " in padded), None)


@dataclass(frozen=True)
class Work:
    """What of a batch, or of several, decides its cost.

    Attributes:
        lengths: tokens of each document.
        num_targets: positions that predict something.
        num_unit_targets: of them, frames whose further codebooks are predicted.
        num_images: pictures, or tiles of them.
        num_stored_images: of them, those whose features were stored, so that the tower has no work.
        num_heard_frames: frames of clips that are heard.
        num_spoken_frames: frames of units in the stream.
        prompts: of each document how many tokens, its first ones, are an encoder's, where there is one; empty: none.
    """

    lengths: tuple[int, ...]
    num_targets: int = 0
    num_unit_targets: int = 0
    num_images: int = 0
    num_stored_images: int = 0
    num_heard_frames: int = 0
    num_spoken_frames: int = 0
    prompts: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        return sum(self.lengths)

    @staticmethod
    def of(batch: PackedBatch) -> Work:
        """A batch's, by its metadata: the device is not asked."""
        assert batch.metadata is not None, "the collator makes it"
        sequences, media = batch.metadata.sequences, batch.metadata.media
        lengths = sequences.lengths[:-1] if sequences.size > sequences.num_tokens else sequences.lengths
        return Work(
            lengths,
            num_targets=len(batch.metadata.targets_M),
            num_unit_targets=len(batch.metadata.unit_targets_U),
            num_images=batch.num_images,
            num_stored_images=len(batch.image_features_NPC),
            num_heard_frames=sum(media.clip_frames),
            num_spoken_frames=len(media.frames_F),
            prompts=(sequences.num_prompt or ())[: len(lengths)],
        )


@dataclass(frozen=True)
class ModelFlops:
    """Forward operations of a model's parts; see `of`.

    Attributes:
        per_token: of all layers that every token passes, without attention's scores; of the others what decides who.
        per_pair: of attention's scores and sums, of each (window, all layers that have it); window None: no bound.
        per_passing_token: as `per_token`, of the blocks that only some tokens pass.
        per_passing_pair: as `per_pair`, of these blocks.
        mod_capacity: share of a document's tokens that pass them.
        per_prompt_token: of an encoder's layers, and of the keys and values that the decoder makes of its states; the
            numbers above are then the decoder's.
        per_prompt_pair: of an encoder's scores and sums, of each pair of a prompt's tokens, in both directions.
        per_target: of the head.
        per_unit_target: of the further codebooks' blocks of the head.
        per_image: of the tower.
        per_projected_image: of the projector.
        per_heard_frame: of the audio projector.
        per_spoken_frame: of the unit projector.
        is_tower_trained: the tower has a backward pass.
        computes_again: layers are run again, products included, in the backward pass.
    """

    per_token: int
    per_pair: tuple[tuple[int | None, int], ...]
    per_passing_token: int
    per_passing_pair: int
    mod_capacity: float
    per_prompt_token: int
    per_prompt_pair: int
    per_target: int
    per_unit_target: int
    per_image: int
    per_projected_image: int
    per_heard_frame: int
    per_spoken_frame: int
    is_tower_trained: bool
    computes_again: bool

    @staticmethod
    def of(config: ModelConfig) -> ModelFlops:
        """Counts a model's, from its shapes on the meta device."""
        with torch.device("meta"):
            model = MultimodalModel(config)
        decoder, audio = config.decoder, config.audio
        by_window: dict[int | None, int] = {}
        pair = 4 * decoder.num_attention_heads * decoder.head_channels
        for layer in set(range(decoder.encoder_layers, decoder.num_hidden_layers)).difference(decoder.mod_layers):
            window = decoder.rule(layer).window
            by_window[window] = by_window.get(window, 0) + pair
        codebooks = (audio.num_codebooks - 1) * (audio.codebook_size + 1) if audio is not None else 0
        per_image, per_projected_image = _of_pictures(model)
        per_token, per_passing_token = _of_layers(model)
        return ModelFlops(
            per_token=per_token,
            per_pair=tuple(by_window.items()),
            per_passing_token=per_passing_token,
            per_passing_pair=len(decoder.mod_layers) * pair,
            mod_capacity=decoder.mod_capacity,
            per_prompt_token=_of_prompt_token(model),
            per_prompt_pair=decoder.encoder_layers * pair,
            per_target=2 * decoder.vocab_size * decoder.hidden_size,
            per_unit_target=2 * codebooks * decoder.hidden_size,
            per_image=per_image,
            per_projected_image=per_projected_image,
            per_heard_frame=_of_heard_frame(model),
            per_spoken_frame=_of_matrices(model.unit_projector),
            is_tower_trained=config.vision is not None and config.vision.trainable,
            computes_again=recompute_mode(decoder.gradient_checkpointing) == "full",
        )

    def layers(self, work: Work) -> int:
        """Of a forward pass through all layers."""
        if self.per_prompt_token:
            return self._halves(work)
        pairs = sum(each * sum(seen_pairs(length, window) for length in work.lengths) for window, each in self.per_pair)
        total = self.per_token * work.num_tokens + pairs
        if self.per_passing_token:
            passing = [num_passing(length, self.mod_capacity) for length in work.lengths]
            total += self.per_passing_token * sum(passing) + self.per_passing_pair * sum(map(seen_pairs, passing))
        return total

    def _halves(self, work: Work) -> int:
        """As `layers`, of an encoder and a decoder."""
        prompts = work.prompts or (0,) * len(work.lengths)
        total = self.per_prompt_token * sum(prompts) + self.per_token * (work.num_tokens - sum(prompts))
        total += self.per_prompt_pair * sum(prompt * prompt for prompt in prompts)
        for length, prompt in zip(work.lengths, prompts, strict=True):
            for window, each in self.per_pair:
                total += each * (seen_pairs(length, window) - seen_pairs(prompt, window))
        return total

    def training(self, work: Work) -> int:
        """Of forward and backward pass, each product of the model once."""
        trained = (
            self.layers(work)
            + self.per_target * work.num_targets
            + self.per_unit_target * work.num_unit_targets
            + self.per_projected_image * work.num_images
            + self.per_heard_frame * work.num_heard_frames
            + self.per_spoken_frame * work.num_spoken_frames
        )
        num_seen = work.num_images - work.num_stored_images
        return 3 * trained + (3 if self.is_tower_trained else 1) * self.per_image * num_seen

    def computed_again(self, work: Work) -> int:
        """What activation checkpointing adds."""
        return self.layers(work) if self.computes_again else 0


def seen_pairs(length: int, window: int | None = None) -> int:
    """Pairs of a query and a key that it sees, in a causal document."""
    window = length if window is None else min(window, length)
    return window * (window + 1) // 2 + (length - window) * window


def _of_layers(model: MultimodalModel) -> tuple[int, int]:
    """Two operations for each weight of a matrix: of each token, and of each that passes a block that some skip.

    Of experts those count that a token passes; of an encoder-decoder the decoder's layers.
    """
    experts = _experts(model)
    per_token = per_passing_token = 0
    for layer, block in itertools.islice(enumerate(model.decoder.layers), model.config.decoder.encoder_layers, None):
        for name, weight in block.named_parameters():
            count = _passed(weight, experts)
            if model.config.decoder.skips_tokens(layer) and not name.startswith("depth."):
                per_passing_token += 2 * count
            else:
                per_token += 2 * count
    return per_token, per_passing_token


def _of_prompt_token(model: MultimodalModel) -> int:
    """Likewise of an encoder's layers, and of the decoder's projections to keys and values; 0 without an encoder."""
    first, experts = model.config.decoder.encoder_layers, _experts(model)
    total = 0
    for layer, block in enumerate(model.decoder.layers):
        for name, weight in block.named_parameters():
            if layer < first or (first and name in ("self_attn.k_proj.weight", "self_attn.v_proj.weight")):
                total += 2 * _passed(weight, experts)
    return total


def _experts(model: MultimodalModel) -> dict[int, MoEConfig]:
    """The experts' weights, by id, with their config."""
    layers = model.decoder.expert_layers().values()
    return {id(weight): moe.config for moe in layers for weight in moe.experts.parameters()}


def _passed(weight: nn.Parameter, experts: dict[int, MoEConfig]) -> int:
    """Weights of a matrix that one token passes."""
    config, count = experts.get(id(weight)), weight.numel() if weight.ndim > 1 else 0
    return count if config is None else count * config.num_experts_per_tok // config.num_experts


def _of_pictures(model: MultimodalModel) -> tuple[int, int]:
    if model.vision is None or model.image_projector is None:
        return 0, 0
    size = model.vision.image_size
    images_NCHW = torch.zeros(1, 3, size, size, dtype=torch.uint8, device="meta")
    with torch.no_grad():
        tower, features = _counted(model.vision, images_NCHW)
        projector, _ = _counted(model.image_projector, features)
    return tower, projector


def _of_heard_frame(model: MultimodalModel) -> int:
    if model.clip_projector is None or model.config.audio is None:
        return 0
    audio = model.config.audio
    num_frames = NUM_PROBED_SLOTS * audio.projector.pool
    codes_CFK = torch.zeros(1, num_frames, audio.num_heard, dtype=torch.int64, device="meta")
    with torch.no_grad():
        count, _ = _counted(lambda codes: model.eval().clip_embedding(codes, (num_frames,)), codes_CFK)
    return count // num_frames


def _counted(function: Any, *args: Any) -> tuple[int, Any]:
    with FlopCounterMode(display=False) as counter:
        result = function(*args)
    return counter.get_total_flops(), result


def _of_matrices(module: nn.Module | None) -> int:
    weights: Iterable[nn.Parameter] = () if module is None else module.parameters()
    return 2 * sum(weight.numel() for weight in weights if weight.ndim > 1)
