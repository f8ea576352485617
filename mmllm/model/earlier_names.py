"""What config keys and weights were called before they took the names that transformers has for them.

Model folders of format 1, YAML files and folders of imported decoders that were written then are still read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

KEYS: dict[str, dict[str, str]] = {
    "decoder": {
        "width": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_width": "head_dim",
        "mlp_width": "intermediate_size",
        "norm_eps": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
        "checkpoint_blocks": "gradient_checkpointing",
    },
    "moe": {
        "top_k": "num_experts_per_tok",
        "expert_width": "moe_intermediate_size",
        "balance_weight": "router_aux_loss_coef",
        "z_weight": "router_z_loss_coef",
        "renormalise": "norm_topk_prob",
    },
    "image_projector": {"hidden_width": "hidden_size", "num_heads": "num_attention_heads"},
    "audio": {"latent_width": "codebook_dim"},
    "projector": {"width": "hidden_size", "num_layers": "num_hidden_layers", "kernel": "kernel_size"},
    "codec": {"quantiser_dropout": "quantizer_dropout"},
    "init_args": {"optimiser": "optimizer"},
}
"""By the key that holds them: earlier names to those of today."""

_IN_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "attention.q_norm_C": "self_attn.q_norm.weight",
    "attention.k_norm_C": "self_attn.k_norm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.router_ED": "mlp.gate.weight",
    "mlp.gate_up_E2ID": "mlp.experts.gate_up_proj",
    "mlp.down_EDI": "mlp.experts.down_proj",
    "mlp.down.weight": "mlp.down_proj.weight",
}
_WHOLE = {
    "embedding.weight": "embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "image_projector.rows_HC": "image_projector.row_embedding",
    "image_projector.columns_WC": "image_projector.column_embedding",
    "image_projector.queries_OC": "image_projector.queries",
}
_LAYER = re.compile(r"(.*\b|)blocks\.(\d+)\.((?:attention|attention_norm|mlp|mlp_norm)\..+)")
_STACKS = {
    "attention.qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "mlp.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}


def current_keys(values: Mapping[str, Any], parent: str = "") -> dict[str, Any]:
    """Nested config values with today's keys.

    Args:
        values: of a config, a YAML file, or a part of one; not changed.
        parent: the key under which they stand.

    Raises:
        ValueError: a key is there under both of its names.
    """
    table, renamed = KEYS.get(parent, {}), {}
    for key, value in values.items():
        name = table.get(key, key)
        if name in renamed or (name != key and name in values):
            raise ValueError(f"{parent}.{key} is what {parent}.{name} was called earlier, and both are given; drop one")
        renamed[name] = current_keys(value, key) if isinstance(value, Mapping) else value
    return renamed


def current_key(dotted: str) -> str:
    """A dotted key (`model.init_args.decoder.width`) with today's names."""
    parts = dotted.split(".")
    return ".".join([parts[0], *(KEYS.get(parent, {}).get(part, part) for parent, part in zip(parts, parts[1:]))])  # noqa: B905, RUF007


def is_earlier(name: str) -> bool:
    """Whether a weight has an earlier name."""
    return _whole(name) is not None or _in_layer(name) is not None or name.startswith("codec.quantiser.")


def current_weights(weights: Mapping[str, Tensor], num_heads: int, num_kv_heads: int) -> dict[str, Tensor]:
    """Weights of a whole model or of a decoder, with today's names; those that were stacked are split.

    Args:
        weights: as they were saved. Of a damaged file some may be missing: they stay missing.
        num_heads: query heads, by which queries, keys and values are told apart.
        num_kv_heads: key-value heads.
    """
    renamed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        match = _in_layer(name)
        if match is None:
            earlier = _whole(name)
            renamed[name if earlier is None else name.removesuffix(earlier) + _WHOLE[earlier]] = weight
            continue
        prefix, layer, rest = match.groups()
        start = f"{prefix}layers.{layer}."
        if rest in _IN_LAYER:
            renamed[start + _IN_LAYER[rest]] = weight
        else:
            shares = (num_heads, num_kv_heads, num_kv_heads) if len(_STACKS[rest]) == 3 else (1, 1)
            rows = [len(weight) * share // sum(shares) for share in shares]
            renamed |= {start + part: each for part, each in zip(_STACKS[rest], weight.split(rows), strict=True)}
    return renamed


def _whole(name: str) -> str | None:
    """The end of a weight's earlier name, if it has one."""
    parts = name.split(".")
    ends = (".".join(parts[-count:]) for count in (1, 2))
    end = next((end for end in ends if end in _WHOLE), None)
    return end if end is None or end.startswith("image") or parts[-3:-2] in ([], ["decoder"]) else None


def _in_layer(name: str) -> re.Match[str] | None:
    """Prefix, layer and the rest of a decoder layer's weight that has an earlier name."""
    match = _LAYER.fullmatch(name)
    return match if match is not None and (match[3] in _IN_LAYER or match[3] in _STACKS) else None
