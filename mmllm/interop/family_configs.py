"""Which family of transformers computes a decoder of ours, and the config.json that says so."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mmllm.interop.rope_parameters import rope_fields
from mmllm.model.decoder_config import FULL, SLIDING, DecoderConfig
from mmllm.model.router import MoEConfig

_SCALED = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class _Trait:
    """A way in which decoders differ.

    Attributes:
        key: of the decoder's config, for messages.
        of: its value.
        shown: the key's value, for messages; None: that of the trait.
        words: what to give the key for a value of the trait, for messages.
    """

    key: str
    of: Callable[[DecoderConfig], Any]
    shown: Callable[[DecoderConfig], Any] | None = None
    words: Mapping[Any, str] = field(default_factory=dict)

    def got(self, config: DecoderConfig) -> Any:
        """The key's value."""
        return (self.shown or self.of)(config)

    def wanted(self, values: tuple[Any, ...]) -> str:
        """What to give the key."""
        return " or ".join(self.words.get(each, json.dumps(each).strip('"')) for each in values)


def _moe(config: DecoderConfig) -> MoEConfig:
    """The experts, or such as change nothing where there are none."""
    has_experts = any(map(config.has_experts, range(config.num_hidden_layers)))
    return config.moe if config.moe is not None and has_experts else MoEConfig()


def _experts(config: DecoderConfig) -> str:
    has_experts = any(map(config.has_experts, range(config.num_hidden_layers)))
    return config.moe.scoring_func if config.moe is not None and has_experts else "none"


def _dense_layers(config: DecoderConfig) -> str:
    """Beside layers with experts: none, the first ones, or others."""
    dense = [layer for layer in range(config.num_hidden_layers) if not config.has_experts(layer)]
    if not dense or _experts(config) == "none":
        return "none"
    return "the first" if dense == list(range(len(dense))) else "some"


def _windows(config: DecoderConfig) -> str:
    sliding = [config.is_sliding(layer) for layer in range(config.num_hidden_layers)]
    return "all" if all(sliding) else "some" if any(sliding) else "none"


def _has_dense(config: DecoderConfig) -> bool:
    return not all(map(config.has_experts, range(config.num_hidden_layers)))


_TRAITS: dict[str, _Trait] = {
    "experts": _Trait("moe.scoring_func", _experts, words={"none": "moe: null"}),
    "prefix": _Trait("prefix", lambda c: c.prefix),
    "encoder": _Trait(
        "encoder_layers", lambda c: c.encoder_layers > 0, lambda c: c.encoder_layers, {False: "0", True: "1 or more"}
    ),
    "conv_size": _Trait("conv_size", lambda c: c.conv_size > 0, lambda c: c.conv_size, {False: "0"}),
    "mod_layers": _Trait("mod_layers", lambda c: bool(c.mod_layers), lambda c: list(c.mod_layers), {False: "[]"}),
    "modality_experts": _Trait("moe.modality_experts", lambda c: _moe(c).modality_experts),
    "dense_layers": _Trait(
        "moe_layers",
        _dense_layers,
        lambda c: c.moe_layers,
        {"none": "all", "the first": "all but the first ones", "some": "any layers"},
    ),
    "norm_topk_prob": _Trait("moe.norm_topk_prob", lambda c: _moe(c).norm_topk_prob),
    "shared": _Trait(
        "moe.n_shared_experts",
        lambda c: _moe(c).n_shared_experts > 0,
        lambda c: _moe(c).n_shared_experts,
        {False: "0", True: "1 or more"},
    ),
    "scaling": _Trait(
        "moe.routed_scaling_factor",
        lambda c: _moe(c).routed_scaling_factor != 1,
        lambda c: _moe(c).routed_scaling_factor,
        {False: "1", True: "any number"},
    ),
    "expert_bias": _Trait("moe.use_expert_bias", lambda c: _moe(c).use_expert_bias),
    "groups": _Trait(
        "moe.topk_group",
        lambda c: _moe(c).topk_group < _moe(c).n_group,
        lambda c: _moe(c).topk_group,
        {False: "n_group", True: "fewer than n_group"},
    ),
    "qk_norm": _Trait("qk_norm", lambda c: c.qk_norm_over),
    "attention_bias": _Trait("attention_bias", lambda c: c.bias_of),
    "mlp_bias": _Trait("mlp_bias", lambda c: c.mlp_bias and _has_dense(c)),
    "windows": _Trait(
        "sliding_window",
        _windows,
        lambda c: c.sliding_window,
        {"none": "null", "all": "a window in all layers", "some": "a window in some layers"},
    ),
    "sliding_rope": _Trait("sliding_rope_theta", lambda c: c.sliding_rope_theta),
    "partial": _Trait(
        "partial_rotary_factor",
        lambda c: c.partial_rotary_factor != 1,
        lambda c: c.partial_rotary_factor,
        {False: "1", True: "any factor"},
    ),
    "no_rope": _Trait(
        "no_rope_layers",
        lambda c: not all(c.no_rope_layers or (1,)),
        lambda c: c.no_rope_layers,
        {False: "null", True: "any layers"},
    ),
    "rope": _Trait(
        "rope_scaling.rope_type", lambda c: "default" if c.rope_scaling is None else c.rope_scaling.rope_type
    ),
    "own_head_dim": _Trait(
        "head_dim",
        lambda c: c.head_channels * c.num_attention_heads != c.hidden_size,
        lambda c: c.head_dim,
        {False: "null", True: "any number"},
    ),
    "odd_width": _Trait(
        "hidden_size",
        lambda c: c.hidden_size % c.num_attention_heads != 0,
        lambda c: c.hidden_size,
        {False: "a multiple of num_attention_heads", True: "any number"},
    ),
}
_PLAIN: dict[str, tuple[Any, ...]] = {
    "experts": ("none",), "prefix": ("none",), "encoder": (False,), "conv_size": (False,), "mod_layers": (False,),
    "modality_experts": (None,), "dense_layers": ("none",), "norm_topk_prob": (True,), "shared": (False,),
    "scaling": (False,), "expert_bias": (False,), "groups": (False,), "qk_norm": ("none",), "attention_bias": ("none",),
    "mlp_bias": (False,), "windows": ("none",), "sliding_rope": (None,), "partial": (False,), "no_rope": (False,),
    "rope": _SCALED, "own_head_dim": (False, True), "odd_width": (False, True),
}  # fmt: skip
"""What every family computes, where `_COMPUTED` says nothing else."""
_BOTH = (False, True)
_BIAS, _ANY_WINDOWS = ("none", "all"), ("none", "all", "some")
_SIGMOID = {
    "experts": ("sigmoid",), "dense_layers": ("none", "the first"), "norm_topk_prob": _BOTH, "shared": (True,),
    "scaling": _BOTH, "expert_bias": _BOTH, "groups": _BOTH,
}  # fmt: skip
_COMPUTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {"attention_bias": _BIAS, "mlp_bias": _BOTH, "odd_width": (False,)},
    "mistral": {"windows": ("none", "all")},
    "qwen2": {"attention_bias": ("qkv",), "windows": _ANY_WINDOWS},
    "qwen3": {"qk_norm": ("head",), "attention_bias": _BIAS, "windows": _ANY_WINDOWS},
    "smollm3": {"attention_bias": _BIAS, "mlp_bias": _BOTH, "windows": _ANY_WINDOWS, "no_rope": _BOTH},
    "phi3": {"windows": ("none", "all"), "partial": _BOTH, "rope": ("default",)},
    "mixtral": {"experts": ("softmax",), "windows": ("none", "all")},
    "qwen3_moe": {
        "experts": ("softmax",), "qk_norm": ("head",), "attention_bias": _BIAS, "windows": ("none", "all"),
        "dense_layers": ("none", "the first", "some"), "norm_topk_prob": _BOTH,
    },
    "olmoe": {
        "experts": ("softmax",), "qk_norm": ("width",), "attention_bias": _BIAS, "norm_topk_prob": _BOTH,
        "own_head_dim": (False,),
    },
    "glm4_moe": {
        **_SIGMOID, "qk_norm": ("none", "head"), "attention_bias": ("none", "qkv"), "partial": _BOTH,
    },
    "dots1": {**_SIGMOID, "qk_norm": ("head",), "attention_bias": _BIAS, "windows": _ANY_WINDOWS},
}  # fmt: skip
"""What each family computes beside `_PLAIN`. The first that fits is taken."""
_CLASSES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "smollm3": "SmolLM3ForCausalLM", "phi3": "Phi3ForCausalLM",
    "mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "olmoe": "OlmoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM", "dots1": "Dots1ForCausalLM",
}  # fmt: skip


def family_for(config: DecoderConfig) -> str:
    """The `model_type` of a family that computes the same function.

    Noise and dropout are of training alone, and so are losses.

    Raises:
        ValueError: there is none; the message names the switch in which the nearest family differs.
    """
    misfits = {family: _misfits(config, family) for family in _COMPUTED}
    for family, found in misfits.items():
        if not found:
            return family
    # Experts aren't given up for a smaller difference.
    family, found = min(misfits.items(), key=lambda item: len(item[1]) + len(_TRAITS) * ("experts" in item[1]))
    trait = _TRAITS[found[0]]
    wanted = trait.wanted(_COMPUTED[family].get(found[0]) or _PLAIN[found[0]])
    raise ValueError(
        f"decoder.{trait.key} is {trait.got(config)!r}, which no family of transformers computes beside the rest; the "
        f"nearest is {family}, with {trait.key} {wanted}: train with that to export"
    )


def _misfits(config: DecoderConfig, family: str) -> list[str]:
    """The traits of a decoder that a family does not compute."""
    computed = _PLAIN | _COMPUTED[family]
    return [name for name, trait in _TRAITS.items() if trait.of(config) not in computed[name]]


def family_config(
    config: DecoderConfig,
    family: str | None = None,
    max_positions: int = 32768,
    dtype: torch.dtype = torch.float32,
    num_rows: int | None = None,
) -> dict[str, Any]:
    """The config.json of a family that computes this decoder; ids of special tokens are null, for others to fill in.

    Args:
        config: the decoder.
        family: its `model_type`; None: `family_for` finds it.
        max_positions: `max_position_embeddings`.
        dtype: of the weights.
        num_rows: of the vocabulary that goes out; None: all.

    Raises:
        ValueError: the family does not compute it, or none does; the message names the switch.
    """
    if family is None or _misfits(config, family):
        found = family_for(config)
        if family not in (None, found):
            trait = _TRAITS[_misfits(config, str(family))[0]]
            raise ValueError(
                f"decoder.{trait.key} is {trait.got(config)!r}, which {family} does not compute; "
                f"{found} does: export as that"
            )
        family = found
    values: dict[str, Any] = {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size if num_rows is None else num_rows,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_channels,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "dtype": str(dtype).removeprefix("torch."),
        **rope_fields(config),
        **_own_fields(config, family),
    }
    if family in ("phi3", "glm4_moe"):
        values["partial_rotary_factor"] = config.partial_rotary_factor
        values["rope_parameters"]["partial_rotary_factor"] = config.partial_rotary_factor
    return values


def _own_fields(config: DecoderConfig, family: str) -> dict[str, Any]:
    """What is not common to all families."""
    layers = range(config.num_hidden_layers)
    bias = {"attention_bias": config.bias_of != "none"}
    types = {"layer_types": [SLIDING if config.is_sliding(layer) else FULL for layer in layers]}
    window = {"sliding_window": config.sliding_window}
    switched = {**window, "use_sliding_window": config.sliding_window is not None}
    mlp_bias = {"mlp_bias": config.mlp_bias}
    match family:
        case "llama":
            return {**bias, **mlp_bias}
        case "mistral" | "phi3":
            return window
        case "qwen2" | "qwen3":
            bias = bias if family == "qwen3" else {}
            return {**bias, **switched, **types, "max_window_layers": config.num_hidden_layers}
        case "smollm3":
            has_rope = {"no_rope_layers": list(config.no_rope_layers or [1] * config.num_hidden_layers)}
            return {**bias, **mlp_bias, **switched, **types, **has_rope}
    moe = _moe(config)
    common = {"num_experts_per_tok": moe.num_experts_per_tok, "router_aux_loss_coef": moe.router_aux_loss_coef}
    inner, normed = {"moe_intermediate_size": moe.moe_intermediate_size}, {"norm_topk_prob": moe.norm_topk_prob}
    dense = [layer for layer in layers if not config.has_experts(layer)]
    match family:
        case "mixtral":
            width = {"intermediate_size": moe.moe_intermediate_size}
            return {**common, **width, **window, "num_local_experts": moe.num_experts}
        case "olmoe":
            width = {"intermediate_size": moe.moe_intermediate_size}
            return {**common, **width, **normed, **bias, "num_experts": moe.num_experts, "clip_qkv": None}
        case "qwen3_moe":
            experts = {"num_experts": moe.num_experts, "mlp_only_layers": dense, "decoder_sparse_step": 1}
            return {**common, **inner, **normed, **bias, **switched, **experts}
    sigmoid = {
        "num_experts_per_tok": moe.num_experts_per_tok,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.n_shared_experts,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "n_group": moe.n_group,
        "topk_group": moe.topk_group,
        "first_k_dense_replace": len(dense),
    }
    if family == "glm4_moe":
        norm = {"use_qk_norm": config.qk_norm_over == "head", "num_nextn_predict_layers": 0}
        return {**sigmoid, **inner, **normed, **bias, **norm}
    return {**sigmoid, **inner, **normed, **bias, **window, **types, "max_window_layers": config.num_hidden_layers}
