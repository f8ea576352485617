"""A block's parts for one new position a row, by few operator calls; `fast_step` beside it puts them together.

Shapes: N rows, D width, F features, H query heads, G key-value heads, C channels a head, S cached positions of a row,
T new positions of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm.inference.engine.products import FastLinear
from mmllm.model.attention import Attention
from mmllm.model.norms import RMSNorm
from mmllm.model.rope import RopeScaling, inverse_frequencies


class FastNorm:
    """Root-mean-square normalization, and the short convolution behind it.

    On a CPU x / sqrt(mean(x²) + eps) is √D · x / hypot(|x|, sqrt(D · eps)): three calls, none of which PyTorch has in
    one.
    """

    def __init__(self, norm: RMSNorm, own_D: Tensor | None = None):
        weight_D = norm.weight.detach()
        self._width, self._eps = len(weight_D), norm.eps
        self._by_hand = weight_D.is_cpu and weight_D.dtype == torch.float32
        self._least = weight_D.new_tensor(math.sqrt(self._width * self._eps))
        self.weight_D = weight_D * math.sqrt(self._width) if self._by_hand else weight_D
        """Of what `unit` gives."""
        self._own_D = None if own_D is None else self.weight_D * (1 + own_D)

    def __call__(self, x_ND: Tensor) -> Tensor:
        """The norm alone; the result's memory is its own."""
        if self._by_hand:
            return self.unit(x_ND).mul_(self.weight_D)
        return F.rms_norm(x_ND, (self._width,), self.weight_D, self._eps)

    def unit(self, x_ND: Tensor) -> Tensor:
        """What `weight_D` times is the norm."""
        if not self._by_hand:
            return F.rms_norm(x_ND, (self._width,), None, self._eps)
        return x_ND / torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True).hypot_(self._least)

    def mixed(self, unit_ND: Tensor, earlier_ND: Tensor) -> Tensor:
        """The convolution of a position, of which the positions before it have given their part."""
        assert self._own_D is not None
        return torch.addcmul(earlier_ND, unit_ND, self._own_D)


class Angles(NamedTuple):
    """Of the rotation of each row's query and key."""

    cos_N1C: Tensor
    """1 where channels are not turned."""
    sin_N1C: Tensor
    """Negative at the first channel of each pair; 0 where channels are not turned."""


@dataclass(frozen=True)
class Rope:
    """A layer's rotary positions; see `mmllm.model.rope`.

    Attributes:
        head_dim: C.
        num_turned: of them, the first ones; even.
        theta: base of the angles.
        scaling: of the frequencies.
    """

    head_dim: int
    num_turned: int
    theta: float
    scaling: RopeScaling | None = None

    def tables(self, device: torch.device) -> RopeTables:
        """What all positions share."""
        frequencies, factor = inverse_frequencies(self.num_turned, self.theta, self.scaling, device)
        num_left, half = self.head_dim - self.num_turned, self.num_turned // 2
        frequencies_C = F.pad(frequencies.repeat(2), (0, num_left))
        cos_factor_C, sin_factor_C = torch.ones_like(frequencies_C), torch.zeros_like(frequencies_C)
        cos_factor_C[: self.num_turned] = sin_factor_C[half : self.num_turned] = factor
        sin_factor_C[:half] = -factor
        partner_C = torch.arange(self.head_dim, device=device)
        partner_C[: self.num_turned] = partner_C[: self.num_turned].roll(half)
        return RopeTables(frequencies_C, cos_factor_C if factor != 1 else None, sin_factor_C, partner_C, half * 2)


class RopeTables(NamedTuple):
    """What all positions of a layer's rotary positions share."""

    frequencies_C: Tensor
    cos_factor_C: Tensor | None
    sin_factor_C: Tensor
    partner_C: Tensor
    """The other channel of each one's pair."""
    num_turned: int

    def angles(self, positions_N: Tensor, dtype: torch.dtype) -> Angles:
        """Computed in float32."""
        angles_N1C = positions_N.float().view(-1, 1, 1) * self.frequencies_C
        cos_N1C, sin_N1C = angles_N1C.cos(), angles_N1C.sin().mul_(self.sin_factor_C)
        if self.cos_factor_C is not None:
            cos_N1C.mul_(self.cos_factor_C)
        return Angles(cos_N1C.to(dtype), sin_N1C.to(dtype))

    def turn_(self, x_NHC: Tensor, angles: Angles) -> None:
        """Turns each pair of channels, in place."""
        if self.num_turned == x_NHC.shape[-1]:
            partners_NHC = x_NHC.roll(self.num_turned // 2, -1)
        else:
            partners_NHC = x_NHC.index_select(-1, self.partner_C)
        x_NHC.mul_(angles.cos_N1C).addcmul_(partners_NHC, angles.sin_N1C)


class LayerRows(NamedTuple):
    """One layer's cache, of the rows of a step."""

    kv_SF: Tensor
    """All rows' positions."""
    places_N: Tensor
    """Where the new ones go."""
    keys_NGSC: Tensor
    """The new position is the last one, or is told by the mask."""
    values_NGSC: Tensor
    mask_N11S: Tensor | None
    """-inf where a row doesn't see a position; None: it sees all. Of several new positions [N, 1, T, S]."""
    num_new: int = 1
    """T, new positions of each row: those of one row follow each other."""


class FastAttention:
    """An attention layer."""

    def __init__(self, attention: Attention, tables: RopeTables | None, copied_elements: int):
        settings = attention.settings
        self._tables = tables
        self._channels = settings.head_dim
        self._q_width = settings.num_heads * settings.head_dim
        self._qk_width = self._q_width + settings.num_kv_heads * settings.head_dim
        self._shares = settings.num_heads != settings.num_kv_heads
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        self._project = FastLinear(*projections, copied_elements=copied_elements)
        self._output = FastLinear(attention.o_proj, copied_elements=copied_elements)
        self._head_norm, self._width_norms, self._head_weight_HC = None, (), None
        if attention.q_norm is not None and attention.k_norm is not None:
            norms = FastNorm(attention.q_norm), FastNorm(attention.k_norm)
            if settings.qk_norm == "head":
                counts = settings.num_heads, settings.num_kv_heads
                weights = [norm.weight_D.expand(count, -1) for norm, count in zip(norms, counts, strict=True)]
                self._head_norm, self._head_weight_HC = norms[0], torch.cat(weights)
            else:
                self._width_norms = norms

    def _projected(self, x_ND: Tensor, angles: Angles | None) -> Tensor:
        """Queries and keys, normalized and turned, and values, side by side."""
        qkv_NF = self._project(x_ND)
        q_NF = qkv_NF[:, : self._q_width]
        qk_NHC = qkv_NF[:, : self._qk_width].view(len(x_ND), -1, self._channels)
        if self._head_norm is not None and self._head_weight_HC is not None:
            torch.mul(self._head_norm.unit(qk_NHC), self._head_weight_HC, out=qk_NHC)
        elif self._width_norms:
            k_NF = qkv_NF[:, self._q_width : self._qk_width]
            for norm, part_NF in zip(self._width_norms, (q_NF, k_NF), strict=True):
                part_NF.copy_(norm(part_NF))
        if angles is not None and self._tables is not None:
            self._tables.turn_(qk_NHC, angles)
        return qkv_NF

    def add_prompt(
        self,
        residual_ND: Tensor,
        x_ND: Tensor,
        angles: Angles | None,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """As `add_to`, where `attend` keeps keys and values and attends: [N, H, C] and [N, G, C] twice to [N, H·C]."""
        qkv_NF = self._projected(x_ND, angles)
        q_NHC, k_NGC, v_NGC = (
            part.unflatten(1, (-1, self._channels))
            for part in qkv_NF.tensor_split((self._q_width, self._qk_width), dim=1)
        )
        return self._output.add_to(residual_ND, attend(q_NHC, k_NGC, v_NGC))

    def add_to(self, residual_ND: Tensor, x_ND: Tensor, angles: Angles | None, rows: LayerRows) -> Tensor:
        """The residual stream and the output; the new positions' keys and values go into the cache."""
        num_rows, q_width = len(x_ND), self._q_width
        qkv_NF = self._projected(x_ND, angles)
        q_NF = qkv_NF[:, :q_width]
        rows.kv_SF.index_copy_(0, rows.places_N, qkv_NF[:, q_width:])
        if rows.num_new == 1:
            q_NHTC = q_NF.view(num_rows, -1, 1, self._channels)
        else:
            q_NHTC = q_NF.reshape(-1, rows.num_new, q_width // self._channels, self._channels).transpose(1, 2)
        attended = F.scaled_dot_product_attention(
            q_NHTC, rows.keys_NGSC, rows.values_NGSC, attn_mask=rows.mask_N11S, enable_gqa=self._shares
        )
        if rows.num_new > 1:
            attended = attended.transpose(1, 2)
        return self._output.add_to(residual_ND, attended.reshape(num_rows, q_width))
