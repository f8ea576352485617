"""How many floating-point operations a batch costs, counted from the model's shapes; and what devices can do.

Counted are products alone, two operations for each multiply-add: what is called model FLOPs when utilization is told
(PaLM, arXiv 2204.02311, appendix B). Of experts only those that a token passes count, of attention only the pairs that
see each other. What activation checkpointing computes again is told apart.

A backward pass is twice its forward pass where everything is trained: of each matrix a product for the gradient of its
input, and one for its own. A frozen matrix has the first alone, as under LoRA, and none where nothing before it is
trained. Of towers and projectors, which are trained or frozen whole, the first matrix counts like the others.

Shapes: N images, H and W pixels, C clips, F frames a clip, K codebooks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
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
class PassFlops:
    """Operations of one pass, forward or backward, through a model's parts.

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

    def layers(self, work: Work) -> int:
        """Through all layers."""
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

    def whole(self, work: Work) -> int:
        """Through the whole model."""
        return (
            self.layers(work)
            + self.per_target * work.num_targets
            + self.per_unit_target * work.num_unit_targets
            + self.per_image * (work.num_images - work.num_stored_images)
            + self.per_projected_image * work.num_images
            + self.per_heard_frame * work.num_heard_frames
            + self.per_spoken_frame * work.num_spoken_frames
        )


@dataclass(frozen=True)
class ModelFlops(PassFlops):
    """Operations of a model's parts: those of the forward pass, and beside them the backward pass; see `of`.

    Attributes:
        backward: the backward pass.
        computes_again: layers are run again, products included, in the backward pass.
    """

    backward: PassFlops
    computes_again: bool

    @staticmethod
    def of(config: ModelConfig) -> ModelFlops:
        """Counts a model's, from its shapes on the meta device; all is trained but a tower whose config is frozen."""
        with torch.device("meta"):
            return ModelFlops.of_model(MultimodalModel(config))

    @staticmethod
    def of_model(model: MultimodalModel) -> ModelFlops:
        """Counts those of a model as it is trained: with its adapters, and without gradients of what is frozen.

        Of adapters of experts' stacks the sum with the stack, once a pass, isn't counted, nor are virtual tokens
        themselves.

        Args:
            model: on the meta device, as `mmllm.training.parts.build_model` makes it there.
        """
        assert next(model.parameters()).is_meta, "shapes are counted by running towers and projectors on meta tensors"
        decoder = model.config.decoder
        layers = _Layers(model)
        tower, image_projector = _of_pictures(model)
        heard, spoken = _of_heard_frame(model), _of_matrices(model.unit_projector)
        codes, rows = _is_trained(model.code_embedding), model.decoder.lm_head.rows
        blocks = (rows,) if isinstance(rows, torch.Tensor) else rows
        forward = layers.counted(
            num_products=lambda weight: 1,
            per_pair=lambda layer: 1,
            per_target=2 * decoder.vocab_size * decoder.hidden_size,
            per_unit_target=_of_codebooks(model.config),
            per_image=tower,
            per_projected_image=image_projector,
            per_heard_frame=heard,
            per_spoken_frame=spoken,
        )
        backward = layers.counted(
            num_products=lambda weight: weight.num_backward,
            per_pair=lambda layer: 2 if layer in layers.attending else 0,
            per_target=sum(2 * block.numel() * (layers.carries + block.requires_grad) for block in blocks),
            per_unit_target=_of_codebooks(model.config) * (layers.carries + blocks[-1].requires_grad),
            per_image=_backward(tower, model.vision),
            per_projected_image=_backward(image_projector, model.image_projector, _is_trained(model.vision)),
            per_heard_frame=_backward(heard, model.clip_projector, codes),
            per_spoken_frame=_backward(spoken, model.unit_projector, codes),
        )
        computes_again = recompute_mode(decoder.gradient_checkpointing) == "full"
        return ModelFlops(**vars(forward), backward=backward, computes_again=computes_again)

    def training(self, work: Work) -> int:
        """Of forward and backward pass, each product of the model once."""
        return self.whole(work) + self.backward.whole(work)

    def computed_again(self, work: Work) -> int:
        """What activation checkpointing adds."""
        return self.layers(work) if self.computes_again else 0


def seen_pairs(length: int, window: int | None = None) -> int:
    """Pairs of a query and a key that it sees, in a causal document."""
    window = length if window is None else min(window, length)
    return window * (window + 1) // 2 + (length - window) * window


@dataclass(frozen=True)
class _Weight:
    """A layer's matrix."""

    layer: int
    name: str
    count: int
    """Weights that one token passes: of experts, those of the experts that it goes to."""
    num_backward: int
    """Products of its size in the backward pass: for the gradient of its input, and for its own."""


_STAGES = tuple(map(re.compile, (
    r"input_layernorm\.",
    r"attention_conv\.",
    r"self_attn\.[qkv]_(proj|norm)\.",
    r"self_attn\.o_proj\.",
    r"post_attention_layernorm\.",
    r"mlp_conv\.",
    r"mlp\.(gate|gate_proj|up_proj|(shared_)?experts\.gate_up_proj)\b",
    r"mlp\.((shared_)?experts\.)?down_proj\b",
    r"depth\.",
)))  # fmt: skip
"""A block's weights in the order in which its tokens pass them; those of one stage read the same."""


class _Layers:
    """The layers' matrices, and where gradients go through them.

    Attributes:
        weights: of all layers.
        attending: layers whose attention has a backward pass.
        carries: whether a gradient goes back from the last layer's output.
    """

    def __init__(self, model: MultimodalModel) -> None:
        self._config, self._experts = model.config.decoder, _experts(model)
        self.weights: list[_Weight] = []
        self.attending: set[int] = set()
        kinds = {tokens.kind for tokens in model.decoder.virtual_tokens.values()}  # pyright: ignore[reportAttributeAccessIssue]
        self._has_prefix = "prefix_tuning" in kinds
        inputs = (
            model.decoder.embed_tokens, model.vision, model.image_projector, model.code_embedding,
            model.clip_projector, model.unit_projector, model.pointer,
        )  # fmt: skip
        self.carries = "prompt_tuning" in kinds or any(map(_is_trained, inputs))
        for layer, block in enumerate(model.decoder.layers):
            self._pass(layer, block)
        self.carries = self.carries or _is_trained(model.decoder.norm)

    def _pass(self, layer: int, block: nn.Module) -> None:
        stacks = {  # what is adapted is the sum of a stack and its adapter, which has a gradient whole
            f"{_plain(path)}.{module.parameter_name}"
            for path, module in block.named_modules()
            if hasattr(module, "parameter_name")
        }
        stages: list[list[tuple[str, nn.Parameter]]] = [[] for _ in _STAGES]
        for name, weight in block.named_parameters():
            plain = _plain(name)
            if ".experts.lora_" not in plain:
                [stage] = [number for number, pattern in enumerate(_STAGES) if pattern.match(plain)]
                stages[stage].append((plain, weight))
        for pattern, stage in zip(_STAGES, stages, strict=True):
            before = self.carries
            for name, weight in stage:
                is_trained = weight.requires_grad or name in stacks
                has_input = before or (".lora_B." in name and is_trained)  # it reads what lora_A gives
                count = _passed(weight, self._experts)
                self.weights.append(_Weight(layer, name, count, has_input + is_trained))
                self.carries = self.carries or is_trained
            if pattern.match("self_attn.q_proj."):
                self.carries = self.carries or self._has_prefix
                self.attending |= {layer} if self.carries else set()

    def counted(
        self, num_products: Callable[[_Weight], int], per_pair: Callable[[int], int], **parts: int
    ) -> PassFlops:
        """One pass.

        Args:
            num_products: of a matrix.
            per_pair: of a layer's attention, as often as its forward pass.
            parts: what else `PassFlops` has.
        """
        config, first = self._config, self._config.encoder_layers
        per_token = per_passing_token = per_prompt_token = 0
        for weight in self.weights:
            products = 2 * weight.count * num_products(weight)
            if weight.layer < first or (first and weight.name.startswith(_KEYS_VALUES)):
                per_prompt_token += products
            if weight.layer >= first and config.skips_tokens(weight.layer) and not weight.name.startswith("depth."):
                per_passing_token += products
            elif weight.layer >= first:
                per_token += products
        pair = 4 * config.num_attention_heads * config.head_channels
        by_window: dict[int | None, int] = {}
        for layer in set(range(first, config.num_hidden_layers)).difference(config.mod_layers):
            window = config.rule(layer).window
            by_window[window] = by_window.get(window, 0) + pair * per_pair(layer)
        return PassFlops(
            per_token=per_token,
            per_pair=tuple(by_window.items()),
            per_passing_token=per_passing_token,
            per_passing_pair=sum(pair * per_pair(layer) for layer in config.mod_layers),
            mod_capacity=config.mod_capacity,
            per_prompt_token=per_prompt_token,
            per_prompt_pair=sum(pair * per_pair(layer) for layer in range(first)),
            **parts,
        )


_KEYS_VALUES = ("self_attn.k_proj.", "self_attn.v_proj.")


def _plain(name: str) -> str:
    """A name without PEFT's wrappers."""
    return name.replace(".base_layer", "")


def _is_trained(module: nn.Module | None) -> bool:
    return module is not None and any(weight.requires_grad for weight in module.parameters())


def _backward(forward: int, module: nn.Module | None, has_input: bool = False) -> int:
    """Of a part's forward pass: its weights' gradients where it is trained, its inputs' also where these are."""
    is_trained = _is_trained(module)
    return forward * (is_trained + (is_trained or has_input))


def _of_codebooks(config: ModelConfig) -> int:
    """Of the head's blocks of all codebooks but the first."""
    audio = config.audio
    return (
        0 if audio is None else 2 * (audio.num_codebooks - 1) * (audio.codebook_size + 1) * config.decoder.hidden_size
    )


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
