"""One position more for each of many rows, by as few operator calls as there can be: what decoding repeats.

A small decoder's step takes the time of its operator calls, not of its arithmetic (docs/RESULTS.md): of the demo, in
four layers, the modules' own code issues 520 at one row and 810 at eight, this one 215. What depends on the past alone
(the convolutions' earlier inputs) or on positions alone (angles, masks) is computed once a step for all layers.

Shapes: N rows, L layers, S cached positions (of all rows where they are slots × capacity), D width, G key-value heads,
C channels a head, F = 2·G·C of a position's keys and values, M = 2·L convolutions, J inputs that each keeps of a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mmllm.inference.engine.fast_experts import FastMLP, FastMoE
from mmllm.inference.engine.fast_layers import FastAttention, FastNorm, LayerRows, Rope, RopeTables
from mmllm.inference.engine.products import SMALL_ELEMENTS
from mmllm.model.decoder import Decoder
from mmllm.model.decoder_config import DecoderConfig

_DTYPES = (torch.float32, torch.bfloat16)


class Slab(Protocol):
    """Caches of the running rows of one capacity; row r is in slot r."""

    @property
    def kv_LSF(self) -> Tensor:
        """Slot s, position p at s · capacity + p; rotated keys [G, C], then values [G, C]."""
        ...

    @property
    def conv_state_MSJD(self) -> Tensor | None:
        """Layer · 2 + (0: before attention, 1: before the feed-forward), by slot; the oldest input first."""
        ...

    @property
    def capacity(self) -> int:
        """Positions a slot."""
        ...

    @property
    def num_rows(self) -> int:
        """N."""
        ...

    @property
    def lengths_N(self) -> Tensor:
        """int64: positions cached so far."""
        ...

    @property
    def max_length(self) -> int:
        """The largest of them; below the capacity."""
        ...


class FastStep:
    """A decoder's step for one new position a row.

    Weights are read once: after a change of them (an adapter chosen, a checkpoint loaded) make another.

    Args:
        decoder: in eval mode, on the device and in the dtype that it stays in.
        copied_bytes: the blocks' weights are copied into the order that products are quickest in (on a CPU in float32:
            half the time), if all of them take no more; else only matrices of up to a million weights are.

    Raises:
        ValueError: it is a decoder that only its own code runs; see `supports`.
    """

    def __init__(self, decoder: Decoder, copied_bytes: int = 2**30):
        reason = self.supports(decoder)
        if reason is not None:
            raise ValueError(f"the decoder can't be run by FastStep: {reason}; use its own forward")
        self._config, device = decoder.config, decoder.norm.weight.device
        first = self._config.encoder_layers  # an encoder is run once, by prompts
        ropes = [_rope(self._config, number) for number in range(first, self._config.num_hidden_layers)]
        self.rope_tables = {rope: rope.tables(device) for rope in ropes if rope is not None}
        num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in decoder.layers.parameters())
        copied = num_bytes if num_bytes <= copied_bytes else SMALL_ELEMENTS
        self.layers = [
            _layer(*each, self.rope_tables, copied) for each in zip(decoder.layers[first:], ropes, strict=True)
        ]
        self._convs = _Convs(decoder, self.layers) if self._config.conv_size else None
        self.norm = FastNorm(decoder.norm)

    @staticmethod
    def supports(decoder: Decoder) -> str | None:
        """Why a decoder is not taken; None: it is."""
        config = decoder.config
        if config.mod_layers:
            return f"some tokens skip layers {list(config.mod_layers)} (mixture of depths)"
        if decoder.training:
            return "it is in training mode"
        if any(block.compiled is not None for block in decoder.layers):  # pyright: ignore[reportAttributeAccessIssue]
            return "its layers are compiled"
        if any(moe.dispatcher is not None for moe in decoder.expert_layers().values()):
            return "its experts are spread over ranks"
        for name, parameter in decoder.named_parameters():
            if hasattr(parameter, "placements"):
                return f"{name} is spread over ranks"
            if parameter.is_meta:
                return f"{name} has no values"
        dtypes = {decoder.embed_tokens.weight.dtype, decoder.norm.weight.dtype}
        if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
            return f"its dtype is {', '.join(sorted(map(str, dtypes)))}, neither torch.float32 nor torch.bfloat16"
        return None

    @torch.inference_mode()
    def step(self, x_ND: Tensor, positions_N: Tensor, modality_N: Tensor | None, slab: Slab) -> Tensor:
        """Hidden states after the final norm, [N, D]; keys, values and what convolutions keep go into the slab.

        The slab's lengths stay: who counts its rows counts their positions too. The result is an inference tensor
        (`torch.inference_mode`, which takes a fifth off a small step): outside of that mode it can't be written to.

        Args:
            x_ND: embeddings of one new position of each running row.
            positions_N: of the rotary angles; learned tokens before a row are counted.
            modality_N: needed where `moe.modality_experts` is set.
            slab: of the rows.
        """
        assert slab.kv_LSF.dtype == x_ND.dtype, "keys and values in fewer bits are for the decoder's own code"
        rows = _Rows(slab, self._config)
        angles = {rope: tables.angles(positions_N, x_ND.dtype) for rope, tables in self.rope_tables.items()}
        earlier_M, units_M = self._convs.earlier(rows.state_MNJD) if self._convs is not None else (), []
        for number, layer in enumerate(self.layers):
            y_ND = _normed(layer.attention_norm, x_ND, earlier_M, units_M)
            angle = None if layer.rope is None else angles[layer.rope]
            x_ND = layer.attention.add_to(x_ND, y_ND, angle, rows.layer(number, layer.window))
            y_ND = _normed(layer.mlp_norm, x_ND, earlier_M, units_M)
            x_ND = layer.feed_forward.add_to(x_ND, y_ND, modality_N)
        if self._convs is not None:
            self._convs.keep(rows.state_MNJD, units_M)
        return self.norm(x_ND)


def _normed(norm: FastNorm, x_ND: Tensor, earlier_M: Sequence[Tensor], units_M: list[Tensor]) -> Tensor:
    """Behind the norm and its convolution, if any, for which the next of `earlier_M` is taken and a unit put down."""
    if not earlier_M:
        return norm(x_ND)
    unit_ND = norm.unit(x_ND)
    units_M.append(unit_ND)
    return norm.mixed(unit_ND, earlier_M[len(units_M) - 1])


class _Layer(NamedTuple):
    """A block."""

    attention_norm: FastNorm
    attention: FastAttention
    mlp_norm: FastNorm
    feed_forward: FastMLP | FastMoE
    rope: Rope | None
    window: int | None
    """Positions that a query sees at most, its own included."""


def _rope(config: DecoderConfig, layer: int) -> Rope | None:
    num_turned = config.rotary_channels(layer)
    return Rope(config.head_channels, num_turned, *config.rope(layer)) if num_turned else None


def _layer(block: Any, rope: Rope | None, tables: dict[Rope, RopeTables], copied_elements: int) -> _Layer:
    """Of a `Block`, wrapped or not."""
    dtype = block.input_layernorm.weight.dtype
    convs = block.attention_conv, block.mlp_conv
    own_D, mlp_own_D = (None if conv is None else conv.weight.detach()[0].to(dtype) for conv in convs)
    return _Layer(
        FastNorm(block.input_layernorm, own_D),
        FastAttention(block.self_attn, None if rope is None else tables[rope], copied_elements),
        FastNorm(block.post_attention_layernorm, mlp_own_D),
        (FastMoE if block.has_experts else FastMLP)(block.mlp, copied_elements),
        rope,
        block.self_attn.settings.rule.window,
    )


class _Convs:
    """All short convolutions' parts that the positions before the new ones have."""

    def __init__(self, decoder: Decoder, layers: Sequence[_Layer]):
        blocks = decoder.layers[decoder.config.encoder_layers :]
        convs = [conv for block in blocks for conv in (block.attention_conv, block.mlp_conv)]  # pyright: ignore
        weight_MKD = torch.stack([conv.weight.detach() for conv in convs])  # pyright: ignore
        weight_MJD = weight_MKD[:, 1:].flip(1).to(decoder.norm.weight.dtype)
        self._weights_JM1D = weight_MJD.transpose(0, 1).unsqueeze(2).contiguous().unbind()
        norms = [norm for layer in layers for norm in (layer.attention_norm, layer.mlp_norm)]
        self._norms_M1D = torch.stack([norm.weight_D for norm in norms]).unsqueeze(1)

    def earlier(self, state_MNJD: Tensor) -> tuple[Tensor, ...]:
        """Of each convolution, what it adds to the new positions' own part, [N, D]."""
        first, *others = zip(state_MNJD.unbind(2), self._weights_JM1D, strict=True)
        total_MND = torch.mul(*first)
        for kept_MND, weight_M1D in others:
            total_MND.addcmul_(kept_MND, weight_M1D)
        return total_MND.unbind()

    def keep(self, state_MNJD: Tensor, units_M: list[Tensor]) -> None:
        """Puts the new positions' inputs behind the others, the oldest of which go."""
        places_J = state_MNJD.unbind(2)
        for older, newer in itertools.pairwise(places_J):
            older.copy_(newer)
        torch.mul(torch.stack(units_M), self._norms_M1D, out=places_J[-1])


class _Rows:
    """What one step knows of its rows, for all layers."""

    def __init__(self, slab: Slab, config: DecoderConfig):
        num_rows, capacity, kv_LSF, num_places = slab.num_rows, slab.capacity, slab.kv_LSF, slab.max_length + 1
        assert num_rows and num_places <= capacity, "a row has no room for its new position"
        self._slab, self._num_rows, self._num_places = slab, num_rows, num_places
        self._lengths_N = self._places_N = slab.lengths_N
        if num_rows > 1:
            self._places_N = self._lengths_N + torch.arange(0, num_rows * capacity, capacity, device=kv_LSF.device)
        self._kv_L = kv_LSF.unbind()
        kv_LNS2GC = kv_LSF.view(len(kv_LSF), -1, capacity, 2, config.kv_heads, config.head_channels)
        kv_LNS2GC = kv_LNS2GC[:, :num_rows, :num_places]
        self._keys_L, self._values_L = (each.unbind() for each in kv_LNS2GC.permute(3, 0, 1, 4, 2, 5))
        self._masks: dict[int | None, Tensor] = {}

    @property
    def state_MNJD(self) -> Tensor:
        """What convolutions keep of these rows."""
        state_MSJD = self._slab.conv_state_MSJD
        assert state_MSJD is not None, "the slab has no room for what convolutions keep"
        return state_MSJD[:, : self._num_rows]

    def layer(self, number: int, window: int | None) -> LayerRows:
        """One layer's cache.

        Args:
            number: of the layer.
            window: positions that a row sees at most, the new one included.
        """
        keys_NGSC, values_NGSC, mask_N11S = self._keys_L[number], self._values_L[number], None
        if self._num_rows > 1:
            if window not in self._masks:
                self._masks[window] = self._mask(window)
            mask_N11S = self._masks[window]
        elif window is not None and window < self._num_places:
            keys_NGSC, values_NGSC = keys_NGSC[:, :, -window:], values_NGSC[:, :, -window:]
        return LayerRows(self._kv_L[number], self._places_N, keys_NGSC, values_NGSC, mask_N11S)

    def _mask(self, window: int | None) -> Tensor:
        at_S, lengths_N1 = torch.arange(self._num_places, device=self._lengths_N.device), self._lengths_N[:, None]
        is_hidden_NS = at_S > lengths_N1
        if window is not None:
            is_hidden_NS = is_hidden_NS.logical_or_(at_S <= lengths_N1 - window)
        mask_NS = torch.zeros(is_hidden_NS.shape, dtype=self._slab.kv_LSF.dtype, device=at_S.device)
        return mask_NS.masked_fill_(is_hidden_NS, -torch.inf)[:, None, None]
