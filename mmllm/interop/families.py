"""What a foreign config.json means: the decoder config that computes the same, or an error that names the field.

A config.json is read as the JSON that it is; transformers is asked for nothing but defaults of absent fields, and no
code that comes with a checkpoint ever runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mmllm.interop.fields import Fields, known_fields
from mmllm.interop.rope_parameters import read_rope
from mmllm.model.decoder_config import FULL, SLIDING, DecoderConfig
from mmllm.model.router import MoEConfig

_LATENT = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "minicpm3", "longcat_flash", "glm4_moe_lite", "glm_moe_dsa")
"""Families whose attention is multi-head latent; all of their configs have `kv_lora_rank`, but may leave it out."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (None, 0),
    "final_logit_softcapping": (None, 0),
    "logit_softcapping": (None, 0),
    "clip_qkv": (None,),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "query_pre_attn_scalar": (None,),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "scale_emb": (None, 1),
    "scale_depth": (None,),
    "is_causal": (None, True),
    "use_bidirectional_attention": (None, False),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}
"""Fields that change the function of whatever has them, and values with which they don't."""
_SAID_OTHERWISE = {
    "model_type", "torch_dtype", "rope_scaling", "num_key_value_heads", "head_dim", "auto_map", "quantization_config",
    "tokenizer_class", "max_window_layers", "num_mtp_layers", "num_nextn_predict_layers", "mmllm_tokenizer",
    "output_attentions",
}  # fmt: skip
"""Fields that are read, or without effect, though a family's class doesn't list them."""


def family_of(config: Mapping[str, Any]) -> str:
    """The `model_type` of a config.json, one of those that can be imported.

    Raises:
        ValueError: another type, custom code, quantized weights, or a function that this decoder does not compute; the
            message names the field.
    """
    family = config.get("model_type")
    if not isinstance(family, str):
        raise ValueError(
            f"config.json: model_type is {family!r}; {', '.join(FAMILIES)} can be imported; take the config.json that "
            f"belongs to the checkpoint"
        )
    if config.get("auto_map"):
        raise ValueError(
            f"config.json: auto_map is {config['auto_map']!r}: the checkpoint wants code of its own to run, which is "
            f"never done; if its model_type, {family!r}, is all it needs, as with Phi-3, remove auto_map"
        )
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise ValueError(
            f"config.json: quantization_config.quant_method is {method!r}; wanted weights in bfloat16, float16 or "
            f"float32; take the checkpoint that was not quantized"
        )
    if config.get("kv_lora_rank") is not None or family in _LATENT:
        raise ValueError(
            f"config.json: kv_lora_rank is {config.get('kv_lora_rank')!r} and model_type {family!r}: multi-head latent "
            f"attention is not computed here; take a model with grouped-query attention, of "
            f"{', '.join(FAMILIES)}"
        )
    if family not in FAMILIES:
        raise ValueError(
            f"config.json: model_type is {family!r}; {', '.join(FAMILIES)} can be imported; take one of these"
        )
    for key, neutral in _NEUTRAL.items():
        if config.get(key) not in neutral:
            raise ValueError(
                f"config.json: {key} is {config[key]!r}, which this decoder does not compute; wanted "
                f"{' or '.join('null' if each is None else str(each).lower() for each in neutral)}; such a checkpoint "
                f"can't be imported"
            )
    return family


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder config that computes what a config.json describes.

    Of a mixture of experts the losses are this project's defaults, but where a bias balances the load (Glm4Moe, Dots1)
    there is no balance loss beside it.

    Args:
        config: of a decoder; of a model with pictures its `text_config`.

    Raises:
        ValueError: it describes what this decoder does not compute, or has a bad value; the message names the field.
        ModuleNotFoundError: it leaves fields out, whose defaults transformers knows, which is not installed.
    """
    fields = Fields(config, family_of(config))
    if fields.get("hidden_act") not in ("silu", "swish"):
        raise fields.wrong("hidden_act", "'silu'", "such a checkpoint can't be imported")
    rope = read_rope(fields)
    width, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.optional_integer("head_dim")
    if head_dim is None and width % num_heads and fields.family != "llama":  # which refuses it in transformers too
        head_dim = width // num_heads
    common: dict[str, Any] = {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": width,
        "num_hidden_layers": fields.integer("num_hidden_layers"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.optional_integer("num_key_value_heads"),
        "head_dim": head_dim,
        "intermediate_size": fields.integer("intermediate_size"),
        "rms_norm_eps": fields.number("rms_norm_eps"),
        "rope_theta": rope.theta,
        "rope_scaling": rope.scaling,
        "qk_norm": "none",
        "attention_bias": "none",
        "tie_word_embeddings": fields.flag("tie_word_embeddings"),
    }
    if fields.family in ("phi3", "glm4_moe"):
        common["partial_rotary_factor"] = rope.partial_rotary_factor
    elif rope.partial_rotary_factor != 1:
        raise ValueError(
            f"config.json: partial_rotary_factor is {rope.partial_rotary_factor}; {fields.family} is imported with 1; "
            f"take the config.json that belongs to the checkpoint"
        )
    own = FAMILIES[fields.family](fields)
    try:
        return DecoderConfig(**{**common, **own})
    except ValueError as error:
        raise ValueError(f"config.json describes no decoder: {error}") from error


def unread_fields(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields with a value that the family's class in transformers does not know either: they change nothing.

    Raises:
        ValueError: as `family_of`.
        ModuleNotFoundError: without transformers.
    """
    known = known_fields(family_of(config)) | _SAID_OTHERWISE
    return tuple(
        key for key, value in config.items() if key not in known and not key.startswith("_") and value is not None
    )


def _llama(fields: Fields) -> dict[str, Any]:
    return {"attention_bias": _bias(fields, "all"), "mlp_bias": fields.flag("mlp_bias")}


def _mistral(fields: Fields) -> dict[str, Any]:
    return {"sliding_window": fields.optional_integer("sliding_window")}


def _qwen2(fields: Fields) -> dict[str, Any]:
    return {"attention_bias": "qkv", **_switched_windows(fields)}


def _qwen3(fields: Fields) -> dict[str, Any]:
    return {"qk_norm": "head", "attention_bias": _bias(fields, "all"), **_switched_windows(fields)}


def _smollm3(fields: Fields) -> dict[str, Any]:
    num_layers = fields.integer("num_hidden_layers")
    has_rope = fields.items("no_rope_layers", int, "a list of 0 and 1")
    if has_rope is None:
        interval = fields.integer("no_rope_layer_interval")
        has_rope = tuple(int((layer + 1) % interval != 0) for layer in range(num_layers))
    if len(has_rope) < num_layers:
        raise fields.wrong("no_rope_layers", f"a 0 or 1 for each of the {num_layers} layers")
    has_rope = tuple(int(bool(each)) for each in has_rope[:num_layers])
    window = fields.optional_integer("sliding_window")
    types = tuple(SLIDING if fields.flag("use_sliding_window") and window and not each else FULL for each in has_rope)
    return {
        "attention_bias": _bias(fields, "all"),
        "mlp_bias": fields.flag("mlp_bias"),
        "no_rope_layers": None if all(has_rope) else has_rope,
        **_windows(fields, window, types),
    }


def _phi3(fields: Fields) -> dict[str, Any]:
    return {"sliding_window": fields.optional_integer("sliding_window")}


def _mixtral(fields: Fields) -> dict[str, Any]:
    return {
        "moe": _experts(fields, "num_local_experts", "num_experts", width="intermediate_size", norm_topk_prob=True),
        "sliding_window": fields.optional_integer("sliding_window"),
    }


def _olmoe(fields: Fields) -> dict[str, Any]:
    heads, width = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    if fields.optional_integer("head_dim") not in (None, width // heads):
        raise fields.wrong("head_dim", f"hidden_size / num_attention_heads, {width // heads}")
    return {
        "moe": _experts(fields, "num_experts", "num_local_experts", width="intermediate_size"),
        "qk_norm": "width",
        "attention_bias": _bias(fields, "all"),
    }


def _qwen3_moe(fields: Fields) -> dict[str, Any]:
    dense = fields.items("mlp_only_layers", int, "a list of layers") or ()
    step = fields.integer("decoder_sparse_step")
    layers = range(fields.integer("num_hidden_layers"))
    experts = tuple(layer for layer in layers if layer not in dense and (layer + 1) % step == 0)
    count = fields.integer(fields.first("num_experts", "num_local_experts"), minimum=0)
    return {
        "moe": None if not (experts and count) else _experts(fields, "num_experts", "num_local_experts"),
        "moe_layers": "all" if len(experts) == len(layers) else experts,
        "qk_norm": "head",
        "attention_bias": _bias(fields, "all"),
        "sliding_window": fields.optional_integer("sliding_window") if fields.flag("use_sliding_window") else None,
    }


def _glm4_moe(fields: Fields) -> dict[str, Any]:
    return {
        **_sigmoid_experts(fields),
        "qk_norm": "head" if fields.flag("use_qk_norm") else "none",
        "attention_bias": _bias(fields, "qkv"),
    }


def _dots1(fields: Fields) -> dict[str, Any]:
    return {
        **_sigmoid_experts(fields),
        "qk_norm": "head",
        "attention_bias": _bias(fields, "all"),
        **_windows(fields, fields.optional_integer("sliding_window"), _upper_layers(fields)),
    }


FAMILIES: dict[str, Callable[[Fields], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "smollm3": _smollm3,
    "phi3": _phi3,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen3_moe": _qwen3_moe,
    "glm4_moe": _glm4_moe,
    "dots1": _dots1,
}
"""By `model_type`: what is the family's own in the decoder's config."""


def _bias(fields: Fields, kind: str) -> str:
    return kind if fields.flag("attention_bias") else "none"


def _switched_windows(fields: Fields) -> dict[str, Any]:
    """Windows that `use_sliding_window` switches on, as of Qwen2 and Qwen3."""
    window = fields.optional_integer("sliding_window") if fields.flag("use_sliding_window") else None
    return _windows(fields, window, _upper_layers(fields) if window else None)


def _upper_layers(fields: Fields) -> tuple[str, ...]:
    """Windows from layer `max_window_layers` on."""
    first = fields.integer("max_window_layers", minimum=0)
    return tuple(SLIDING if layer >= first else FULL for layer in range(fields.integer("num_hidden_layers")))


def _windows(fields: Fields, window: int | None, default: tuple[str, ...] | None) -> dict[str, Any]:
    """The windows of `layer_types`, or where it is absent those of `default`."""
    types = fields.items("layer_types", str, f"a list of {FULL!r} and {SLIDING!r}")
    if types is not None and set(types) - {FULL, SLIDING}:
        raise fields.wrong("layer_types", f"a list of {FULL!r} and {SLIDING!r}", "such a checkpoint can't be imported")
    if types is not None and SLIDING in types and window is None:
        raise fields.wrong("layer_types", "sliding layers only where sliding_window is given and used")
    types = types or default
    if window is None or types is None or SLIDING not in types:
        return {}
    return {"sliding_window": window, "layer_types": types}


def _experts(
    fields: Fields, *count: str, width: str = "moe_intermediate_size", norm_topk_prob: bool | None = None, **more: Any
) -> MoEConfig:
    """Experts; `count` are the names that their number has."""
    num_experts = fields.integer(fields.first(*count))
    try:
        return MoEConfig(
            num_experts=num_experts,
            num_experts_per_tok=fields.integer("num_experts_per_tok"),
            moe_intermediate_size=fields.integer(width),
            norm_topk_prob=fields.flag("norm_topk_prob") if norm_topk_prob is None else norm_topk_prob,
            **more,
        )
    except ValueError as error:
        raise ValueError(f"config.json describes no experts: {error}") from error


def _sigmoid_experts(fields: Fields) -> dict[str, Any]:
    """DeepSeek-V3's router: sigmoids, a bias where experts are chosen, groups, shared experts."""
    num_layers, num_dense = fields.integer("num_hidden_layers"), fields.integer("first_k_dense_replace", minimum=0)
    if num_dense >= num_layers:
        return {}
    moe = _experts(
        fields,
        "n_routed_experts",
        "num_local_experts",
        "num_experts",
        scoring_func="sigmoid",
        use_expert_bias=True,
        router_aux_loss_coef=0.0,
        router_z_loss_coef=0.0,
        routed_scaling_factor=fields.number("routed_scaling_factor"),
        n_group=fields.integer("n_group"),
        topk_group=fields.integer("topk_group"),
        n_shared_experts=fields.integer("n_shared_experts"),
    )
    return {"moe": moe, "moe_layers": tuple(range(num_dense, num_layers)) if num_dense else "all"}
