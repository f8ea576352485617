"""The decoder: pre-norm blocks of grouped-query attention and SwiGLU, dense or a mixture of experts.

Shapes: B sequences, T positions, N tokens of the whole batch (padding removed), D width,
E experts, L layers with experts, M modalities, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmllm.model.attention import Attention, KVCache, PackedLayout, rotary
from mmllm.model.experts import MLP, MoE
from mmllm.model.norms import RMSNorm
from mmllm.model.router import MoEConfig, TokenInfo
from mmllm.model.routing_stats import LayerSums, RoutingStats

INIT_STD = 0.02


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder.

    Attributes:
        vocab_size: ids in the one id space; `Vocabulary.size`.
        hidden_size: width of the residual stream.
        num_hidden_layers: blocks.
        num_attention_heads: query heads.
        num_key_value_heads: key-value heads; None: as many as query heads.
        head_dim: channels a head; None: hidden_size / num_attention_heads.
        intermediate_size: inner width of the dense layers.
        moe: the experts; None: every layer is dense.
        moe_layers: which layers have experts: "all", or their indices.
        rope_theta: base of the rotary angles.
        rms_norm_eps: of every RMSNorm.
        qk_norm: RMS-normalize queries and keys of each head (as Qwen3 does).
        tie_word_embeddings: the head is the embedding.
        dropout: on the embeddings and on what each block adds, in training.
        gradient_checkpointing: of each block keep its input alone, and compute the rest again for the gradient
            (arXiv 1604.06174): a third more work for a fraction of the memory.
    """

    vocab_size: int
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int = 768
    moe: MoEConfig | None = None
    moe_layers: Literal["all"] | tuple[int, ...] = "all"
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    qk_norm: bool = False
    tie_word_embeddings: bool = True
    dropout: float = 0.0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.moe_layers, list):  # as YAML and JSON give it
            object.__setattr__(self, "moe_layers", tuple(self.moe_layers))
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"decoder.hidden_size is {self.hidden_size}, which {self.num_attention_heads} heads do not divide; "
                f"change num_attention_heads or give head_dim"
            )
        if self.head_channels % 2:
            raise ValueError(f"decoder.head_dim is {self.head_channels}; rotary positions need an even number")
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"decoder.num_attention_heads is {self.num_attention_heads}, which num_key_value_heads, "
                f"{self.kv_heads}, does not divide"
            )
        layers = () if isinstance(self.moe_layers, str) else self.moe_layers
        wrong = [layer for layer in layers if not 0 <= layer < self.num_hidden_layers]
        if wrong:
            raise ValueError(f"decoder.moe_layers names layer {wrong[0]}; layers are 0 to {self.num_hidden_layers - 1}")

    @property
    def head_channels(self) -> int:
        """Channels a head."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def kv_heads(self) -> int:
        """Key-value heads."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    def has_experts(self, layer: int) -> bool:
        """Whether a layer is a mixture of experts."""
        return self.moe is not None and (self.moe_layers == "all" or layer in self.moe_layers)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.dropout = config.dropout
        self.is_checkpointed = config.gradient_checkpointing
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(
            config.hidden_size,
            config.num_attention_heads,
            config.kv_heads,
            config.head_channels,
            config.qk_norm,
            config.rms_norm_eps,
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.has_experts = config.has_experts(layer)
        if self.has_experts:
            assert config.moe is not None
            self.mlp = MoE(config.hidden_size, config.moe)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(
        self, x_ND: Tensor, cos: Tensor, sin: Tensor, layout: PackedLayout | KVCache, tokens: TokenInfo
    ) -> tuple[Tensor, LayerSums | None]:
        """The new residual stream, and sums of the routing if the layer has experts and they are wanted."""
        if self.is_checkpointed and torch.is_grad_enabled():
            return checkpoint(self._forward, x_ND, cos, sin, layout, tokens, use_reentrant=False)
        return self._forward(x_ND, cos, sin, layout, tokens)

    def _forward(
        self, x_ND: Tensor, cos: Tensor, sin: Tensor, layout: PackedLayout | KVCache, tokens: TokenInfo
    ) -> tuple[Tensor, LayerSums | None]:
        attended = self.self_attn(self.input_layernorm(x_ND), cos, sin, layout, self.layer)
        x_ND = x_ND + F.dropout(attended, self.dropout, self.training)
        normed_ND = self.post_attention_layernorm(x_ND)
        sums = None
        if self.has_experts:
            out_ND, sums = self.mlp(normed_ND, tokens)
        else:
            out_ND = self.mlp(normed_ND)
        return x_ND + F.dropout(out_ND, self.dropout, self.training), sums


class Decoder(nn.Module):
    """Embeddings, blocks, final norm and head.

    Padding is removed before the first block: it costs nothing, no expert sees it, and its hidden
    states come back as zeros.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal, std 0.02; what writes to the residual stream 1 / sqrt(2 · layers) of that (GPT-2)."""
        residual_std = INIT_STD / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))
                nn.init.normal_(parameter, std=residual_std if is_residual else INIT_STD)
        for block in self.layers:
            if block.has_experts:
                block.mlp.gate.reset_buffers()

    @property
    def head_weight_VD(self) -> Tensor:
        """The head's rows, in id order."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings, [..., D]."""
        return self.embed_tokens(ids)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits over the whole vocabulary, [..., V]."""
        return F.linear(hidden, self.head_weight_VD)

    def make_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache on this decoder's device and in its dtype."""
        weight, config = self.embed_tokens.weight, self.config
        return KVCache(
            config.num_hidden_layers,
            config.kv_heads,
            config.head_channels,
            batch_size,
            max_length,
            weight.device,
            weight.dtype,
        )

    def forward(
        self,
        x_BTD: Tensor,
        positions_BT: Tensor,
        document_ids_BT: Tensor,
        cache: KVCache | None = None,
        modality_BT: Tensor | None = None,
    ) -> tuple[Tensor, RoutingStats]:
        """Hidden states after the final norm (zeros at padding), and the routing.

        Args:
            x_BTD: embeddings with images and sounds spliced in.
            positions_BT: restart at zero with each document.
            document_ids_BT: -1 for padding; a position sees earlier ones of its own document.
            cache: the keys and values so far; the new ones are appended. Nothing is counted then.
            modality_BT: given, routing is counted by modality too; needed where `moe.modality_experts` is set.
        """
        num_sequences, num_positions, width = x_BTD.shape
        if cache is None:
            layout: PackedLayout | KVCache = PackedLayout.build(document_ids_BT)
            tokens_N = layout.tokens_N
        else:
            cache.begin(document_ids_BT)
            layout, tokens_N = cache, None
        x_ND = _take(x_BTD.flatten(0, 1), tokens_N)
        positions_N = _take(positions_BT.flatten(), tokens_N)
        cos, sin = rotary(positions_N, self.config.head_channels, self.config.rope_theta, x_ND.dtype)
        x_ND = F.dropout(x_ND, self.config.dropout, self.training)
        tokens = self._token_info(tokens_N, num_positions, num_sequences, modality_BT, is_counted=cache is None)
        by_layer: dict[int, LayerSums] = {}
        for layer, block in enumerate(self.layers):
            x_ND, sums = block(x_ND, cos, sin, layout, tokens)
            if sums is not None:
                by_layer[layer] = sums
        hidden_ND = self.norm(x_ND)
        if cache is not None:
            cache.end()
        stats = RoutingStats.of(self.config.moe, by_layer, tokens, x_ND.shape[0], x_ND)
        if tokens_N is not None and tokens_N.numel() != num_sequences * num_positions:
            padded = hidden_ND.new_zeros(num_sequences * num_positions, width)
            hidden_ND = padded.index_copy(0, tokens_N, hidden_ND)
        return hidden_ND.view(num_sequences, num_positions, width), stats

    def _token_info(
        self,
        tokens_N: Tensor | None,
        num_positions: int,
        num_sequences: int,
        modality_BT: Tensor | None,
        is_counted: bool,
    ) -> TokenInfo:
        modality_N = None if modality_BT is None else _take(modality_BT.flatten(), tokens_N)
        sequence_N = None
        if is_counted and tokens_N is not None and self.config.moe is not None and self.config.moe.counts_by_sequence:
            sequence_N = tokens_N // num_positions
        return TokenInfo(modality_N, sequence_N, num_sequences, is_counted=is_counted)


def _take(x: Tensor, indices_N: Tensor | None) -> Tensor:
    return x if indices_N is None or indices_N.numel() == x.shape[0] else x[indices_N]
