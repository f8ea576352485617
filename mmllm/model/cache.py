"""Keys and values of sequences that are being generated.

Shapes: L layers, B sequences, G key-value heads, H query heads, S cached positions, T new ones, C channels a
head, D width, J tokens kept for convolutions.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        """[1 + B·J, D] by layer and place; zeros first."""
        self._reads: _Reads | None = None

    def begin(self, document_ids_BT: Tensor) -> None:
        """Finds where every convolution reads, once for all layers."""
        self._reads = _Reads.of(self.document_ids_BJ, document_ids_BT)

    def before(self, x_ND: Tensor, count: int, key: tuple[int, str]) -> list[Tensor]:
        """For 1 … `count` tokens back, [B·T, D]; zeros where the document had not begun."""
        assert self._reads is not None, "call begin first"
        kept_MD = self._inputs.get(key)
        if kept_MD is None:
            kept_MD = x_ND.new_zeros(1 + self.document_ids_BJ.numel(), x_ND.shape[1])
        pool_PD = torch.cat([kept_MD, x_ND])
        self._inputs[key] = pool_PD.index_select(0, self._reads.kept_M)
        earlier = pool_PD.index_select(0, self._reads.earlier_JN[:count].flatten())
        return list(earlier.view(count, *x_ND.shape).unbind())

    def end(self) -> None:
        """Keeps the last tokens' documents."""
        assert self._reads is not None, "call begin first"
        self.document_ids_BJ, self._reads = self._reads.document_ids_BJ, None

    def keep(self, rows: list[int]) -> None:
        """Drops all other rows."""
        ids_BJ = self.document_ids_BJ
        at_BJ = torch.arange(1, 1 + ids_BJ.numel(), device=ids_BJ.device).view_as(ids_BJ)
        at_M = F.pad(at_BJ[rows].flatten(), (1, 0))
        self.document_ids_BJ = ids_BJ[rows]
        self._inputs = {key: kept_MD.index_select(0, at_M) for key, kept_MD in self._inputs.items()}


@dataclass(frozen=True)
class _Reads:
    """Where convolutions read, while new tokens are computed.

    They read from a pool of P rows: one of zeros, for what is not there, those kept of each sequence (B·J), and the new
    ones (B·T).
    """

    earlier_JN: Tensor
    """1 … J tokens back, in the pool; the zeros where the document had not begun."""
    kept_M: Tensor
    """[1 + B·J]: the zeros, and the last real tokens of each sequence, oldest first, in the pool."""
    document_ids_BJ: Tensor
    """Their documents; -1: there are not so many."""

    @staticmethod
    def of(kept_ids_BJ: Tensor, new_ids_BT: Tensor) -> _Reads:
        """Of the documents of the tokens kept, and of the new ones; -1: none, padding."""
        (num_rows, num_kept), device = kept_ids_BJ.shape, new_ids_BT.device
        ids_BE = torch.cat([kept_ids_BJ, new_ids_BT.long()], dim=1)
        pool_P = torch.arange(1, 1 + ids_BE.numel(), device=device)
        kept_at, new_at = pool_P.split([kept_ids_BJ.numel(), new_ids_BT.numel()])
        at_BE = torch.cat([kept_at.view_as(kept_ids_BJ), new_at.view(new_ids_BT.shape)], dim=1)
        # a sequence's n-th real token goes to column J + n, nothing to those before; the last column takes the padding
        is_real_BE = ids_BE >= 0
        rank_BE = is_real_BE.cumsum(dim=1) - is_real_BE.long()
        num_columns = num_kept + ids_BE.shape[1] + 1
        column_BE = torch.where(is_real_BE, num_kept + rank_BE, num_columns - 1)
        ids_BC = ids_BE.new_full((num_rows, num_columns), -1).scatter_(1, column_BE, ids_BE)
        at_BC = ids_BE.new_zeros(num_rows, num_columns).scatter_(1, column_BE, at_BE)
        back_J11 = torch.arange(1, num_kept + 1, device=device)[:, None, None]
        column_JBT = rank_BE[:, num_kept:] + num_kept - back_J11
        ids_JBT, at_JBT = (each.expand(num_kept, -1, -1).gather(2, column_JBT) for each in (ids_BC, at_BC))
        earlier_JBT = at_JBT * (ids_JBT == new_ids_BT)
        last_BJ = is_real_BE.sum(dim=1, keepdim=True) + torch.arange(num_kept, device=device)
        kept_M = F.pad(at_BC.gather(1, last_BJ).flatten(), (1, 0))
        return _Reads(earlier_JBT.flatten(1), kept_M, ids_BC.gather(1, last_BJ))


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
