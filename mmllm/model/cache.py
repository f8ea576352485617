"""Keys and values of sequences that are being generated.

Shapes: L layers, B sequences, G key-value heads, H query heads, S cached positions, T new ones, C channels a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm.model.masks import MaskRule, visible


class KVCache:
    """Keys and values of B sequences that are being generated, in memory reserved once.

    Rows may be padded anywhere (on the left, as prompts are): a key is visible to later queries of the
    same document only, and to earlier ones of the same span where a rule has spans.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        batch_size: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        shape = (num_layers, batch_size, num_kv_heads, max_length, head_dim)
        self.keys_LBGSC = torch.zeros(shape, device=device, dtype=dtype)
        self.values_LBGSC = torch.zeros(shape, device=device, dtype=dtype)
        self.document_ids_BS = torch.full((batch_size, max_length), -1, dtype=torch.int64, device=device)
        self.keys_by_layer: dict[int, Tensor] = {}
        """bool [B, S] for layers that some tokens skip: True where a token has keys."""
        self.length = 0
        self.num_virtual = 0
        """Learned tokens before each row, which take its first positions: of whichever document it holds."""
        self._begun: _Begun | None = None

    def reserve(self, num_virtual: int) -> None:
        """Counts the first positions of each row, which are filled with learned tokens, as used."""
        assert not self.length, "the cache is in use"
        self.length = self.num_virtual = num_virtual

    @property
    def max_length(self) -> int:
        """Positions a row has room for."""
        return self.document_ids_BS.shape[1]

    def begin(self, document_ids_BT: Tensor, spans_BT: Tensor | None = None) -> None:
        """Makes room for T more positions of each row.

        Args:
            document_ids_BT: -1 for padding.
            spans_BT: the bidirectional spans of the new positions, -1 none; a span does not go on in a later call.
        """
        batch_size, num_positions = document_ids_BT.shape
        if batch_size != self.document_ids_BS.shape[0]:
            raise ValueError(f"the cache holds {self.document_ids_BS.shape[0]} rows but the batch has {batch_size}")
        stop = self.length + num_positions
        if stop > self.max_length:
            raise ValueError(
                f"the cache has room for {self.max_length} positions, {self.length} are used and {num_positions} "
                f"more were given; make it with a larger max_length"
            )
        self.document_ids_BS[:, self.length : stop] = document_ids_BT
        if self.length == self.num_virtual:  # a row is one document, whose tokens see those before it
            self.document_ids_BS[:, : self.num_virtual] = document_ids_BT.amax(dim=1, keepdim=True)
        self._begun = _Begun(self.length, stop, document_ids_BT, spans_BT)

    def hide(self, layer: int, passes: Tensor) -> None:
        """See `CacheLayer.hide`."""
        assert self._begun is not None, "call begin first"
        if layer not in self.keys_by_layer:
            self.keys_by_layer[layer] = torch.ones_like(self.document_ids_BS, dtype=torch.bool)
        keys_BS = self.keys_by_layer[layer]
        keys_BS[:, self._begun.start : self._begun.stop] = passes.view(len(keys_BS), -1)

    def keep(self, rows: list[int]) -> None:
        """Drops all other rows."""
        self.keys_LBGSC, self.values_LBGSC = self.keys_LBGSC[:, rows], self.values_LBGSC[:, rows]
        self.document_ids_BS = self.document_ids_BS[rows]
        self.keys_by_layer = {layer: keys_BS[rows] for layer, keys_BS in self.keys_by_layer.items()}

    def layer(self, layer: int) -> CacheLayer:
        """One layer's keys and values."""
        return CacheLayer(self, layer)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: MaskRule) -> Tensor:
        """See `CacheLayer.attend`."""
        assert self._begun is not None, "call begin first"
        start, stop = self._begun.start, self._begun.stop
        batch_size = self.document_ids_BS.shape[0]
        q, k, v = (x.unflatten(0, (batch_size, stop - start)).transpose(1, 2) for x in (q, k, v))
        self.keys_LBGSC[layer, :, :, start:stop] = k
        self.values_LBGSC[layer, :, :, start:stop] = v
        keys, values = self.keys_LBGSC[layer, :, :, :stop], self.values_LBGSC[layer, :, :, :stop]
        mask_B1TS = self._begun.mask(rule, self.document_ids_BS[:, :stop])
        if layer in self.keys_by_layer:
            at_S = torch.arange(stop, device=mask_B1TS.device)
            is_key_B1TS = self.keys_by_layer[layer][:, None, None, :stop] | (at_S[start:, None] == at_S)
            mask_B1TS = mask_B1TS & is_key_B1TS
        shares = q.shape[1] != keys.shape[1]
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask_B1TS, enable_gqa=shares)
        return out.transpose(1, 2).reshape(batch_size * (stop - start), -1)

    def end(self) -> None:
        """Counts the positions that `begin` made room for as used."""
        assert self._begun is not None, "call begin first"
        self.length, self._begun = self._begun.stop, None


class CacheLayer:
    """One layer of a cache: a layer need not know its number, which compilers would take for a constant."""

    def __init__(self, cache: KVCache, layer: int):
        self._cache, self._layer = cache, layer

    def hide(self, passes: Tensor) -> None:
        """Says, before `attend`, which new positions have no keys here: they are seen by themselves alone.

        Args:
            passes: bool [B·T], False at those without keys.
        """
        self._cache.hide(self._layer, passes)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rule: MaskRule) -> Tensor:
        """Stores the new keys and values and attends to all of its row's.

        Args:
            q: queries [B·T, H, C].
            k: keys [B·T, G, C].
            v: values [B·T, G, C].
            rule: what a query sees.

        Returns:
            [B·T, H·C].
        """
        return self._cache.attend(self._layer, q, k, v, rule)


class _Begun:
    """The positions that are being computed, and their masks, which layers of one rule share."""

    def __init__(self, start: int, stop: int, document_ids_BT: Tensor, spans_BT: Tensor | None):
        self.start, self.stop = start, stop
        self.document_ids_BT, self.spans_BT = document_ids_BT, spans_BT
        self._masks: dict[MaskRule, Tensor] = {}

    def mask(self, rule: MaskRule, document_ids_BS: Tensor) -> Tensor:
        """Bool [B, 1, T, S]; a padding query sees itself, so that no row is empty."""
        if rule not in self._masks:
            slot_S = torch.arange(self.stop, device=document_ids_BS.device)
            slot_T = slot_S[self.start :]
            seen_BTS = visible(rule, slot_T[:, None], slot_S)[None]
            if rule.spans and self.spans_BT is not None:
                earlier = self.spans_BT.new_full((len(self.spans_BT), self.start), -1)
                spans_BS = torch.cat([earlier, self.spans_BT], dim=1)
                spans = self.spans_BT[:, :, None], spans_BS[:, None]
                seen_BTS = visible(rule, slot_T[:, None], slot_S, *spans)
            ids_BT = self.document_ids_BT
            same_BTS = (ids_BT[:, :, None] == document_ids_BS[:, None]) & (ids_BT >= 0)[:, :, None]
            self._masks[rule] = ((same_BTS & seen_BTS) | (slot_S == slot_T[:, None]))[:, None]
        return self._masks[rule]
