"""Small random checkpoints of every family, saved by transformers itself, and what both sides compute of them."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm.interop.decoders import read_decoder
from mmllm.model.decoder import Decoder
from tests.cached_decoding import CachedRows

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 50.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 64}
SIZES = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 40, "max_position_embeddings": 256, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
SIGMOID = {
    "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
    "n_shared_experts": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "first_k_dense_replace": 1,
}  # fmt: skip
THETA = {"rope_type": "default", "rope_theta": 100.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": THETA, "num_key_value_heads": 4}),
    "llama 3.1, biases, tied": (
        "Llama",
        {
            "rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True, "head_dim": 12,
            "tie_word_embeddings": True,
        },
    ),
    "llama linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.5}}),
    "llama yarn": ("Llama", {"rope_parameters": YARN | {"beta_fast": 8.0, "beta_slow": 0.5}}),
    "mistral": ("Mistral", {"rope_parameters": THETA, "sliding_window": 5, "head_dim": 12}),
    "mistral without a window": ("Mistral", {"rope_parameters": THETA, "sliding_window": None}),
    "qwen2": ("Qwen2", {"rope_parameters": THETA, "tie_word_embeddings": True}),
    "qwen2 windows": (
        "Qwen2",
        {
            "rope_parameters": YARN | {"truncate": False}, "use_sliding_window": True, "sliding_window": 4,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("Qwen3", {"rope_parameters": THETA, "head_dim": 20, "tie_word_embeddings": True}),
    "qwen3 windows, biases": (
        "Qwen3",
        {
            "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}, "head_dim": 8, "attention_bias": True,
            "use_sliding_window": True, "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "smollm3": ("SmolLM3", {"rope_parameters": THETA, "no_rope_layer_interval": 2}),
    "smollm3 windows, untied": (
        "SmolLM3",
        {
            "rope_parameters": LLAMA3, "no_rope_layers": [1, 0, 0], "use_sliding_window": True, "sliding_window": 5,
            "attention_bias": True, "tie_word_embeddings": False,
        },
    ),
    "phi3": ("Phi3", {"rope_parameters": THETA}),
    "phi3 window, partial": (
        "Phi3",
        {"rope_parameters": THETA, "partial_rotary_factor": 0.5, "sliding_window": 6, "tie_word_embeddings": True},
    ),
    "mixtral": ("Mixtral", {"rope_parameters": THETA, "num_local_experts": 5, "sliding_window": 7, "head_dim": 12}),
    "mixtral tied, yarn": (
        "Mixtral",
        {
            "rope_parameters": YARN | {"attention_factor": 1.3}, "num_local_experts": 4, "tie_word_embeddings": True,
            "head_dim": 8,
        },
    ),
    "olmoe": ("Olmoe", {"rope_parameters": THETA, "num_experts": 6, "num_experts_per_tok": 3}),
    "olmoe normalized, biases": (
        "Olmoe",
        {
            "rope_parameters": THETA, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True,
            "attention_bias": True,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "rope_parameters": THETA, "head_dim": 12, "num_experts": 6, "num_experts_per_tok": 3,
            "moe_intermediate_size": 24, "norm_topk_prob": True,
        },
    ),
    "qwen3_moe dense layers, window": (
        "Qwen3Moe",
        {
            "rope_parameters": THETA, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
            "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1], "attention_bias": True,
            "use_sliding_window": True, "sliding_window": 5, "tie_word_embeddings": True,
        },
    ),
    "glm4_moe": (
        "Glm4Moe",
        SIGMOID
        | {
            "rope_parameters": THETA, "head_dim": 16, "use_qk_norm": True, "attention_bias": True,
            "num_hidden_layers": 4,
        },
    ),
    "glm4_moe plain": (
        "Glm4Moe",
        SIGMOID
        | {
            "rope_parameters": {**YARN, "partial_rotary_factor": 1.0}, "n_group": 1, "topk_group": 1,
            "n_shared_experts": 1, "norm_topk_prob": False, "first_k_dense_replace": 0, "tie_word_embeddings": True,
        },
    ),
    "dots1": (
        "Dots1",
        SIGMOID | {"rope_parameters": THETA, "sliding_window": 5, "max_window_layers": 2, "head_dim": 12},
    ),
    "dots1 biases": (
        "Dots1",
        SIGMOID
        | {"rope_parameters": THETA, "attention_bias": True, "first_k_dense_replace": 0, "num_hidden_layers": 2},
    ),
}  # fmt: skip
"""By name: the family's prefix in transformers, and what its config has beside `SIZES`."""


@dataclass
class Case:
    """A checkpoint, and what both sides read of it."""

    folder: Path
    theirs: Any
    ours: Decoder


def their_config(name: str, **changes: Any) -> Any:
    """The config of a case in `CASES`, an object of transformers."""
    import transformers

    prefix, values = copy.deepcopy(CASES[name])  # it writes into what it is given
    return getattr(transformers, f"{prefix}Config")(**(SIZES | values | changes))


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A random model of a case in `CASES`, which transformers saved to a folder.

    Args:
        name: of the case.
        folder: where to.
        dtype: of the weights, but for the router's bias, which stays in float32.
        options: of `save_pretrained`.
    """
    import transformers

    config = their_config(name)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{CASES[name][0]}ForCausalLM")(config).eval()
    randomize(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    quiet()
    model.save_pretrained(str(folder), **options)
    return model


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Weights far from zero and one, so that each of them is seen in the logits."""
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if not weight.is_floating_point():
            continue
        if "norm" in name:
            weight.copy_(1 + 0.3 * torch.randn_like(weight))
        elif name.endswith(("bias", "embed_tokens.weight")):
            weight.copy_(0.5 * torch.randn_like(weight))
        elif weight.ndim > 1:
            weight.copy_(torch.randn_like(weight) * 1.5 * weight.shape[-1] ** -0.5)


def quiet() -> None:
    """Without the bars of transformers."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@functools.cache
def case(name: str, root: Path) -> Case:
    """A case, made once for all tests of a module."""
    folder = root / name.replace(" ", "_").replace(",", "")
    theirs = saved(name, folder)
    return Case(folder, theirs, read_decoder(folder).eval())


@torch.no_grad()
def our_logits(decoder: Decoder, ids_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
    """Logits [B, T, V]; positions restart with each document, -1 is padding."""
    documents_BT = torch.zeros_like(ids_BT) if documents_BT is None else documents_BT
    hidden_BTD, _ = decoder(decoder.embed(ids_BT), positions_in(documents_BT), documents_BT)
    return decoder.head(hidden_BTD)


def positions_in(documents_BT: Tensor) -> Tensor:
    """Of each token in its document."""
    positions_BT = torch.zeros_like(documents_BT)
    for row, documents_T in enumerate(documents_BT.tolist()):
        for place in range(1, len(documents_T)):
            if documents_T[place] == documents_T[place - 1] >= 0:
                positions_BT[row, place] = positions_BT[row, place - 1] + 1
    return positions_BT


@torch.no_grad()
def our_generation(decoder: Decoder, ids_BT: Tensor, documents_BT: Tensor, num_tokens: int) -> Tensor:
    """Greedy tokens [B, N] behind prompts that are padded on the left, by the cache."""
    given = ids_BT.shape[1]
    cached = CachedRows(decoder, len(ids_BT), given + num_tokens)
    documents_BS = continued(documents_BT, num_tokens)
    start = 0
    for _ in range(num_tokens):
        now = slice(start, ids_BT.shape[1])
        hidden_BTD = cached(decoder.embed(ids_BT[:, now]), documents_BS[:, now])
        start = ids_BT.shape[1]
        ids_BT = torch.cat([ids_BT, decoder.head(hidden_BTD[:, -1]).argmax(dim=-1, keepdim=True)], dim=1)
    return ids_BT[:, given:]


def continued(documents_BT: Tensor, num_tokens: int) -> Tensor:
    """The documents, the last of each row longer by some tokens."""
    return torch.cat([documents_BT, documents_BT[:, -1:].expand(-1, num_tokens)], dim=1)
