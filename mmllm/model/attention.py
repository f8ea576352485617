"""Grouped-query attention with rotary positions, over packed documents or a key-value cache.

Shapes: N tokens, D width, H query heads, G key-value heads, C channels a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from mmllm.model import cpu
from mmllm.model.attend import LayerContext, PackedContext, attend
from mmllm.model.masks import MaskRule
from mmllm.model.norms import RMSNorm


@dataclass(frozen=True)
class AttentionSettings:
    """One layer's attention.

    Attributes:
        hidden_size: D.
        num_heads: H.
        num_kv_heads: G, which divides H.
        head_dim: C.
        qk_norm: RMS-normalize queries and keys over each head's channels (as Qwen3 does), over all heads' together
            (OLMoE), or not.
        bias: which projections have a bias: none, queries, keys and values (Qwen2), or the output too (Llama's
            `attention_bias`).
        norm_eps: of the norms.
        rule: what a query sees.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: Literal["none", "head", "width"] = "none"
    bias: Literal["none", "qkv", "all"] = "none"
    norm_eps: float = 1e-5
    rule: MaskRule = field(default_factory=MaskRule)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245), optionally with RMS-normalized queries and keys."""

    def __init__(self, settings: AttentionSettings):
        super().__init__()
        self.settings = settings
        width, channels = settings.hidden_size, settings.head_dim
        q_width, kv_width = settings.num_heads * channels, settings.num_kv_heads * channels
        has_bias = settings.bias != "none"
        self.q_proj = nn.Linear(width, q_width, bias=has_bias)
        self.k_proj = nn.Linear(width, kv_width, bias=has_bias)
        self.v_proj = nn.Linear(width, kv_width, bias=has_bias)
        self.o_proj = nn.Linear(q_width, width, bias=settings.bias == "all")
        self.q_norm = self.k_norm = None
        match settings.qk_norm:
            case "head":
                self.q_norm, self.k_norm = (RMSNorm(channels, settings.norm_eps) for _ in range(2))
            case "width":
                self.q_norm, self.k_norm = (RMSNorm(each, settings.norm_eps) for each in (q_width, kv_width))

    def forward(self, x_ND: Tensor, cos_N1C: Tensor, sin_N1C: Tensor, context: PackedContext | LayerContext) -> Tensor:
        """Same shape as the input."""
        q = self._rotated(self.q_proj(x_ND), self.q_norm, cos_N1C, sin_N1C)
        k, v = self.keys_values(x_ND, cos_N1C, sin_N1C)
        return self.o_proj(attend(q, k, v, context, self.settings.rule))

    def keys_values(self, x_ND: Tensor, cos_N1C: Tensor, sin_N1C: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, rotated, and values, [N, G, C]."""
        k = self._rotated(self.k_proj(x_ND), self.k_norm, cos_N1C, sin_N1C)
        return k, self.v_proj(x_ND).unflatten(-1, (-1, self.settings.head_dim))

    def _rotated(self, x: Tensor, norm: RMSNorm | None, cos_N1C: Tensor, sin_N1C: Tensor) -> Tensor:
        """Queries or keys [N, H·C], normalized over all heads or each, as [N, H, C]."""
        if norm is not None and self.settings.qk_norm == "width":
            x = norm(x)
        x = x.unflatten(-1, (-1, self.settings.head_dim))
        if norm is not None and self.settings.qk_norm == "head":
            x = norm(x)
        return cpu.rotate(x, cos_N1C, sin_N1C)
