"""Grouped-query attention with rotary positions, over packed documents or a key-value cache.

Shapes: N tokens of the whole batch (padding removed), D width, H query heads, G key-value heads,
C channels a head, B sequences, T positions, S cached positions, P rows of the per-document layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.model.norms import RMSNorm


@dataclass(frozen=True)
class PackedLayout:
    """Where the real tokens are, and how their documents are laid side by side for attention.

    Attention runs on [documents, length] blocks with a plain causal mask: documents of like length
    share a block, right-padded to its longest. A real query never looks right, so the padding needs no
    mask, no document can see another, and short documents never pay for a T x T product.
    """

    tokens_N: Tensor
    """int64 flat indices into B·T of the positions that are not padding."""
    gather_P: Tensor
    """int64, for each row of the blocks the token in [0, N) that it holds (any token in padding)."""
    scatter_N: Tensor
    """int64, the row of the blocks where each token lies."""
    blocks: tuple[tuple[int, int], ...]
    """(number of documents, their padded length) of each block, in the order of the rows."""

    @staticmethod
    def build(document_ids_BT: Tensor) -> PackedLayout:
        """Finds the documents; they must be contiguous, with padding marked -1."""
        num_sequences, num_positions = document_ids_BT.shape
        device = document_ids_BT.device
        row_B1 = torch.arange(num_sequences, device=device)[:, None]
        tokens_N = (document_ids_BT >= 0).flatten().nonzero().squeeze(1)
        keys_N = (document_ids_BT + row_B1 * (num_positions + 1)).flatten()[tokens_N]
        _, lengths = keys_N.unique_consecutive(return_counts=True)
        if lengths.numel() == 0:
            empty = torch.zeros(0, dtype=torch.int64, device=device)
            return PackedLayout(tokens_N, empty, empty, ())
        starts = lengths.cumsum(0) - lengths
        order = lengths.argsort(stable=True)
        sorted_lengths = lengths[order].tolist()  # one synchronization a forward on a GPU
        blocks = _blocks(sorted_lengths)
        padded = torch.tensor([length for count, length in blocks for _ in range(count)], device=device)
        row_starts = padded.cumsum(0) - padded
        document_P = torch.repeat_interleave(padded)
        offset_P = torch.arange(document_P.numel(), device=device) - row_starts[document_P]
        gather_P = starts[order][document_P] + offset_P.minimum(lengths[order][document_P] - 1)
        first_row = torch.empty_like(starts)
        first_row[order] = row_starts
        document_N = torch.repeat_interleave(lengths)
        scatter_N = first_row[document_N] + torch.arange(tokens_N.numel(), device=device) - starts[document_N]
        return PackedLayout(tokens_N, gather_P, scatter_N, blocks)


def _blocks(sorted_lengths: list[int]) -> tuple[tuple[int, int], ...]:
    """Documents whose lengths round up to one power of two share a block."""
    blocks: list[tuple[int, int]] = []
    previous = 0
    for length in sorted_lengths:
        size = max(32, 1 << (length - 1).bit_length())
        count = blocks.pop()[0] if size == previous else 0
        blocks.append((count + 1, length))
        previous = size
    return tuple(blocks)


class _ToBlocks(torch.autograd.Function):
    """x[gather]; backward gathers too, by the inverse, instead of a slow scattered sum."""

    @staticmethod
    def forward(ctx, x_NF, layout):
        ctx.layout = layout
        return x_NF.index_select(0, layout.gather_P)

    @staticmethod
    def backward(ctx, grad_PF):
        return grad_PF.index_select(0, ctx.layout.scatter_N), None


class _FromBlocks(torch.autograd.Function):
    """x[scatter]; the padding rows' gradient is exactly zero."""

    @staticmethod
    def forward(ctx, x_PF, layout):
        ctx.layout = layout
        return x_PF.index_select(0, layout.scatter_N)

    @staticmethod
    def backward(ctx, grad_NF):
        grad_PF = grad_NF.new_zeros(ctx.layout.gather_P.numel(), grad_NF.shape[1])
        grad_PF.index_copy_(0, ctx.layout.scatter_N, grad_NF)
        return grad_PF, None


def attend_packed(qkv_NXC: Tensor, num_heads: int, layout: PackedLayout) -> Tensor:
    """Causal attention inside each document.

    Args:
        qkv_NXC: X = H + 2G heads: queries, keys, values.
        num_heads: H.
        layout: of the same N tokens.

    Returns:
        [N, H·C].
    """
    _, num_all, channels = qkv_NXC.shape
    if not layout.blocks:
        return qkv_NXC[:, :num_heads].flatten(1)
    rows_PF = _ToBlocks.apply(qkv_NXC.flatten(1), layout)
    outputs = []
    sizes = [count * length for count, length in layout.blocks]
    for rows, (count, length) in zip(rows_PF.split(sizes), layout.blocks, strict=True):  # pyright: ignore
        heads = rows.view(count, length, num_all, channels).transpose(1, 2)
        out = _attention(heads, num_heads)
        outputs.append(out.transpose(1, 2).reshape(count * length, num_heads * channels))
    return _FromBlocks.apply(outputs[0] if len(outputs) == 1 else torch.cat(outputs), layout)  # pyright: ignore


def _attention(qkv_BXTC: Tensor, num_heads: int) -> Tensor:
    num_kv_heads = (qkv_BXTC.shape[1] - num_heads) // 2
    q, k, v = qkv_BXTC.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=num_kv_heads != num_heads)


class KVCache:
    """Keys and values of B sequences that are being generated, in memory reserved once.

    Rows may be padded anywhere (on the left, as prompts are): a key is visible to later queries of the
    same document only.
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
        self.length = 0
        self._mask_B1TS: Tensor | None = None

    @property
    def max_length(self) -> int:
        """Positions a row has room for."""
        return self.document_ids_BS.shape[1]

    def begin(self, document_ids_BT: Tensor) -> None:
        """Makes room for T more positions of each row and builds the mask that all layers share."""
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
        slot_S = torch.arange(stop, device=document_ids_BT.device)
        slot_T = slot_S[self.length :]
        same_BTS = document_ids_BT[:, :, None] == self.document_ids_BS[:, None, :stop]
        visible_BTS = same_BTS & (document_ids_BT >= 0)[:, :, None] & (slot_S <= slot_T[:, None])
        self._mask_B1TS = (visible_BTS | (slot_S == slot_T[:, None]))[:, None]

    def attend(self, layer: int, qkv_NXC: Tensor, num_heads: int) -> Tensor:
        """Stores the new keys and values of a layer and attends to all of its row's, [N, H·C]."""
        assert self._mask_B1TS is not None, "call begin first"
        batch_size, _, num_positions, stop = self._mask_B1TS.shape
        qkv = qkv_NXC.view(batch_size, num_positions, *qkv_NXC.shape[1:]).transpose(1, 2)
        num_kv_heads = (qkv.shape[1] - num_heads) // 2
        q, k, v = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        self.keys_LBGSC[layer, :, :, self.length : stop] = k
        self.values_LBGSC[layer, :, :, self.length : stop] = v
        keys, values = self.keys_LBGSC[layer, :, :, :stop], self.values_LBGSC[layer, :, :, :stop]
        out = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=self._mask_B1TS, enable_gqa=num_kv_heads != num_heads
        )
        return out.transpose(1, 2).reshape(batch_size * num_positions, -1)

    def end(self) -> None:
        """Counts the positions that `begin` made room for as used."""
        assert self._mask_B1TS is not None, "call begin first"
        self.length = self._mask_B1TS.shape[-1]
        self._mask_B1TS = None


def rotary(positions_N: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [N, 1, C/2] of the rotary angles (arXiv 2104.09864), computed in float32."""
    exponents = torch.arange(0, head_dim, 2, device=positions_N.device, dtype=torch.float32) / head_dim
    angles_NC = positions_N[:, None].float() * (1.0 / theta**exponents)
    return angles_NC.cos().to(dtype)[:, None], angles_NC.sin().to(dtype)[:, None]


def _rotate(x_NXC: Tensor, cos_N1C: Tensor, sin_N1C: Tensor, num_rotated: int) -> Tensor:
    """Rotates the first heads; channel i pairs with i + C/2, as in Llama's and Mixtral's checkpoints."""
    out_NXC = torch.empty_like(x_NXC)
    first, second = x_NXC[:, :num_rotated].chunk(2, dim=-1)
    out_first, out_second = out_NXC[:, :num_rotated].chunk(2, dim=-1)
    torch.mul(first, cos_N1C, out=out_first).addcmul_(second, sin_N1C, value=-1)
    torch.mul(second, cos_N1C, out=out_second).addcmul_(first, sin_N1C)
    out_NXC[:, num_rotated:] = x_NXC[:, num_rotated:]
    return out_NXC


class _Rotate(torch.autograd.Function):
    """Rotation; its gradient is the rotation back."""

    @staticmethod
    def forward(ctx, x_NXC, cos_N1C, sin_N1C, num_rotated):
        ctx.save_for_backward(cos_N1C, sin_N1C)
        ctx.num_rotated = num_rotated
        return _rotate(x_NXC, cos_N1C, sin_N1C, num_rotated)

    @staticmethod
    def backward(ctx, grad_NXC):
        cos_N1C, sin_N1C = ctx.saved_tensors
        return _rotate(grad_NXC, cos_N1C, -sin_N1C, ctx.num_rotated), None, None, None


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245), optionally with RMS-normalized queries and keys."""

    def __init__(self, width: int, num_heads: int, num_kv_heads: int, head_dim: int, qk_norm: bool, norm_eps: float):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.q_proj = nn.Linear(width, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, width, bias=False)
        self.q_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None

    def forward(
        self, x_ND: Tensor, cos_N1C: Tensor, sin_N1C: Tensor, layout: PackedLayout | KVCache, layer: int
    ) -> Tensor:
        """Same shape as the input. `layer` is the row of the cache; a packed layout does not need it."""
        q, k, v = (
            project(x_ND).unflatten(1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        qkv_NXC = torch.cat([q, k, v], dim=1)
        dtype = qkv_NXC.dtype
        qkv_NXC = _Rotate.apply(qkv_NXC, cos_N1C.to(dtype), sin_N1C.to(dtype), self.num_heads + self.num_kv_heads)
        if isinstance(layout, KVCache):
            return self.o_proj(layout.attend(layer, qkv_NXC, self.num_heads))  # pyright: ignore
        return self.o_proj(attend_packed(qkv_NXC, self.num_heads, layout))  # pyright: ignore
