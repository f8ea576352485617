"""Keys and values of sequences that are being generated.

Shapes: L layers, B sequences, G key-value heads, H query heads, S cached positions, T new ones, C channels a
head, D width.
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
        conv_size: int = 0,
    ):
        shape = (num_layers, batch_size, num_kv_heads, max_length, head_dim)
        self.keys_LBGSC = torch.zeros(shape, device=device, dtype=dtype)
        self.values_LBGSC = torch.zeros(shape, device=device, dtype=dtype)
        self.document_ids_BS = torch.full((batch_size, max_length), -1, dtype=torch.int64, device=device)
        self.keys_by_layer: dict[int, Tensor] = {}
        """bool [B, S] for layers that some tokens skip: True where a token has keys."""
        self.recent = RecentTokens(batch_size, conv_size, device) if conv_size else None
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
        if self.recent is not None:
            self.recent.begin(document_ids_BT)

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
        if self.recent is not None:
            self.recent.keep(rows)

    def grow(self, max_length: int) -> None:
        """Makes room for more positions a row; what is cached stays."""
        more = max_length - self.max_length
        self.keys_LBGSC, self.values_LBGSC = (
            F.pad(each, (0, 0, 0, more)) for each in (self.keys_LBGSC, self.values_LBGSC)
        )
        self.document_ids_BS = F.pad(self.document_ids_BS, (0, more), value=-1)
        self.keys_by_layer = {layer: F.pad(keys, (0, more), value=True) for layer, keys in self.keys_by_layer.items()}

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
        if self.recent is not None:
            self.recent.end()


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

    def before(self, x_ND: Tensor, count: int, place: str) -> list[Tensor]:
        """See `mmllm.model.short_conv.Neighbors`; the last tokens are kept for the next call."""
        assert self._cache.recent is not None, "the cache was made without conv_size"
        return self._cache.recent.before(x_ND, count, (self._layer, place))


class RecentTokens:
    """What short convolutions read of each row's last J = K − 1 tokens; padding is passed over, wherever it is.

    Args:
        batch_size: B.
        conv_size: K.
        device: of the cache.
    """

    def __init__(self, batch_size: int, conv_size: int, device: torch.device | str = "cpu"):
        self.num_kept = conv_size - 1
        self.document_ids_BJ = torch.full((batch_size, self.num_kept), -1, dtype=torch.int64, device=device)
        """Oldest first; -1: there were not so many."""
        self._inputs: dict[tuple[int, str], Tensor] = {}
        """[B, J, D] by layer and place."""
        self._ids_BE = self.document_ids_BJ
        """E = J + T: of the tokens kept and, behind them, of the new ones."""
        self._at_BE = self._rank_BE = torch.zeros_like(self.document_ids_BJ)
        """Where the n-th real token is; how many real ones stand before each."""

    def begin(self, document_ids_BT: Tensor) -> None:
        """Finds the real tokens among those kept and the new ones."""
        ids_BE = torch.cat([self.document_ids_BJ, document_ids_BT.long()], dim=1)
        is_real_BE, size = ids_BE >= 0, ids_BE.shape[1]
        self._ids_BE, self._rank_BE = ids_BE, is_real_BE.cumsum(dim=1) - is_real_BE.long()
        at_BE = torch.arange(size, device=ids_BE.device).expand_as(ids_BE)
        ranked = ids_BE.new_zeros(len(ids_BE), size + 1)  # the last column takes the padding
        ranked.scatter_(1, torch.where(is_real_BE, self._rank_BE, size), at_BE)
        self._at_BE = ranked[:, :size]

    def before(self, x_ND: Tensor, count: int, key: tuple[int, str]) -> list[Tensor]:
        """For 1 … `count` tokens back, [B·T, D]; zeros where the document had not begun."""
        num_rows, num_new = len(self._ids_BE), self._ids_BE.shape[1] - self.num_kept
        new_BTD = x_ND.view(num_rows, num_new, -1)
        kept_BJD = self._inputs.get(key)
        if kept_BJD is None:
            kept_BJD = new_BTD.new_zeros(num_rows, self.num_kept, new_BTD.shape[2])
        x_BED = torch.cat([kept_BJD, new_BTD], dim=1)
        self._inputs[key] = _rows(x_BED, self._last_BJ()[0])
        own_BT, rank_BT = self._ids_BE[:, self.num_kept :], self._rank_BE[:, self.num_kept :]
        earlier = []
        for back in range(1, count + 1):
            at_BT = self._at_BE.gather(1, (rank_BT - back).clamp(min=0))
            is_there_BT = (rank_BT >= back) & (self._ids_BE.gather(1, at_BT) == own_BT)
            earlier.append((_rows(x_BED, at_BT) * is_there_BT[..., None]).flatten(0, 1))
        return earlier

    def end(self) -> None:
        """Keeps the last tokens' documents."""
        at_BJ, is_there_BJ = self._last_BJ()
        self.document_ids_BJ = self._ids_BE.gather(1, at_BJ).masked_fill(~is_there_BJ, -1)

    def keep(self, rows: list[int]) -> None:
        """Drops all other rows."""
        self.document_ids_BJ = self.document_ids_BJ[rows]
        self._inputs = {key: inputs_BJD[rows] for key, inputs_BJD in self._inputs.items()}

    def _last_BJ(self) -> tuple[Tensor, Tensor]:
        """Where the last J real tokens are, and whether there are so many."""
        num_real_B1 = (self._ids_BE >= 0).sum(dim=1, keepdim=True)
        rank_BJ = num_real_B1 + torch.arange(-self.num_kept, 0, device=num_real_B1.device)
        return self._at_BE.gather(1, rank_BJ.clamp(min=0)), rank_BJ >= 0


def _rows(x_BED: Tensor, at_BT: Tensor) -> Tensor:
    return x_BED.gather(1, at_BT[..., None].expand(-1, -1, x_BED.shape[2]))


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
