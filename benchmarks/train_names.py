"""Names that differ between revisions of this project, for `benchmarks/train.py --against`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import torch

EARLIER_NAMES = {
    "hidden_size": "width", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads", "head_dim": "head_width", "intermediate_size": "mlp_width",
    "tie_word_embeddings": "tie_embeddings", "num_experts_per_tok": "top_k", "moe_intermediate_size": "expert_width",
    "router_aux_loss_coef": "balance_weight", "router_z_loss_coef": "z_weight", "optimizer": "optimiser",
}  # fmt: skip
"""Of config keys."""


def named(values: dict[str, Any]) -> dict[str, Any]:
    """A config with the keys of this checkout."""
    from mmllm.model.decoder_config import DecoderConfig

    if any(each.name == "hidden_size" for each in dataclasses.fields(DecoderConfig)):
        return values
    return {
        EARLIER_NAMES.get(key, key): named(value) if isinstance(value, dict) else value for key, value in values.items()
    }


def first_of(thing: Any, *names: str) -> Any:
    """The attribute under the first of these names that it has."""
    return next(getattr(thing, name) for name in names if hasattr(thing, name))


def attention_backends() -> list[str]:
    """Names of the backends that a config can ask for; none where there is nothing to choose."""
    from mmllm.model.decoder_config import DecoderConfig

    names = get_args(get_type_hints(DecoderConfig).get("attention_backend"))
    return [name for name in names if name != "auto"]


def blocks_of(decoder: Any) -> torch.nn.ModuleList:
    """The decoder's layers."""
    return first_of(decoder, "layers", "blocks")


def head_of(decoder: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """From hidden states to logits."""
    return first_of(decoder, "head", "lm_head")


def embedding_of(decoder: Any) -> torch.nn.Embedding:
    """Token embeddings."""
    return first_of(decoder, "embed_tokens", "embedding")


def take_blocks_out(decoder: Any) -> None:
    """Leaves embedding, last norm and head."""
    setattr(decoder, "layers" if hasattr(decoder, "layers") else "blocks", torch.nn.ModuleList())


def load_weights(decoder: Any, folder: str) -> None:
    """The weights of a Mixtral checkpoint."""
    try:
        from mmllm.interop.decoders import read_decoder
    except ModuleNotFoundError:
        from mmllm.interop.transformers import (  # pyright: ignore[reportMissingImports]
            from_mixtral as read_decoder,
        )

    decoder.load_state_dict(read_decoder(folder).state_dict())
