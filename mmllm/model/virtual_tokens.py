"""Learned tokens before each document: embeddings (prompt tuning), or keys and values of each layer (prefix tuning).

Both take positions 0 … V − 1, and the document's own tokens those behind them, as in PEFT. In a packed batch they are
put before each document: of prompt tuning for the whole decoder, of prefix tuning inside of attention alone, whose
queries at these positions are thrown away.

Shapes: V virtual tokens, S documents, D width, L layers, G key-value heads, C channels a head, H query heads, Q tokens
of the batch, X of them and the virtual ones.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from mmllm.model.attend import PackedContext, attend
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.masks import MaskRule
from mmllm.model.roles import mark
from mmllm.model.router import TokenInfo
from mmllm.sequences import SequenceMetadata

VirtualKind = Literal["prompt_tuning", "prefix_tuning"]
INIT_STD = 0.02


class VirtualTokens(nn.Module):
    """What is learned.

    Args:
        kind: "prompt_tuning" (arXiv 2104.08691): embeddings [V, D]. "prefix_tuning" (arXiv 2101.00190, without its
            MLP): keys and values of all layers [V, L·2·G·C], keys as they are after rotation.
        num_virtual_tokens: V.
        config: of the decoder.

    Raises:
        ValueError: the decoder's queries don't see all of their document.
    """

    def __init__(self, kind: VirtualKind, num_virtual_tokens: int, config: DecoderConfig):
        super().__init__()
        check_sees_all(config)
        self.kind: VirtualKind = kind
        self.num_tokens = num_virtual_tokens
        self.heads = (config.num_hidden_layers, 2, config.kv_heads, config.head_channels)
        width = config.hidden_size if kind == "prompt_tuning" else 2 * self.heads[0] * self.heads[2] * self.heads[3]
        self.prompt_embeddings = nn.Parameter(torch.empty(num_virtual_tokens, width))
        nn.init.normal_(self.prompt_embeddings, std=INIT_STD)
        mark(self, prompt_embeddings="embedding")

    @property
    def keys_values_L2VGC(self) -> Tensor:
        """Of prefix tuning, by layer."""
        return self.prompt_embeddings.unflatten(1, self.heads).movedim(0, 2)


def check_sees_all(config: DecoderConfig) -> None:
    """Raises ValueError where a document's tokens don't all see what lies before them."""
    for key, is_there in (
        ("sliding_window", config.sliding_window is not None),
        ("prefix", config.prefix != "none"),
        ("mod_layers", bool(config.mod_layers)),
        ("encoder_layers", config.encoder_layers > 0),
    ):
        if is_there:
            raise ValueError(
                f"decoder.{key} is {getattr(config, key)}, with which tokens don't see all that lies before them; "
                f"virtual tokens need that: choose adapter.kind lora"
            )


@dataclass(frozen=True)
class VirtualLayout:
    """A packed batch with V tokens before each document."""

    sequences: SequenceMetadata
    """Of all X tokens."""
    real_Q: Tensor
    """int64, where the batch's own tokens are among the X."""
    virtual_P: Tensor
    """int64 [S·V], where the others are, document by document."""
    num_tokens: int
    """V."""

    @staticmethod
    def of(sequences: SequenceMetadata, num_tokens: int) -> VirtualLayout:
        """Makes room; asks the device nothing."""
        lengths, device = sequences.lengths, sequences.tokens_Q.device
        extended = tuple(length + num_tokens for length in lengths)
        ends = torch.tensor([0, *itertools.accumulate(extended)], dtype=torch.int64)
        sizes = torch.tensor(lengths, dtype=torch.int64)
        real_Q = torch.arange(int(sizes.sum())) + (num_tokens * (1 + torch.arange(len(lengths)))).repeat_interleave(
            sizes
        )
        virtual_P = (ends[:-1, None] + torch.arange(num_tokens)).flatten()
        real_Q, virtual_P = (each.to(device, non_blocking=True) for each in (real_Q, virtual_P))
        tokens_X = torch.arange(int(ends[-1]), device=device)
        return VirtualLayout(SequenceMetadata.of_lengths(extended, tokens_X), real_Q, virtual_P, num_tokens)

    def extended(self, real: Tensor, virtual: Tensor | None = None) -> Tensor:
        """[Q, …] of the batch's tokens, and [V, …] of the virtual ones (None: 0), as [X, …]."""
        whole = real.new_zeros(self.sequences.size, *real.shape[1:]).index_copy(0, self.real_Q, real)
        if virtual is None:
            return whole
        num_documents = len(self.sequences.lengths)
        repeated = virtual.to(real.dtype).expand(num_documents, *virtual.shape).flatten(0, 1)
        return whole.index_copy(0, self.virtual_P, repeated)

    def tokens(self, tokens: TokenInfo) -> TokenInfo:
        """What routing knows of the X tokens; the virtual ones are in no count."""
        is_real_Q = tokens.is_real_N
        if is_real_Q is None:
            is_real_Q = torch.ones_like(self.real_Q, dtype=torch.bool)
        others = {
            key: None if value is None else self.extended(value)
            for key, value in (("modality_N", tokens.modality_N), ("sequence_N", tokens.sequence_N))
        }
        return replace(tokens, is_real_N=self.extended(is_real_Q), **others)


class PrefixLayer:
    """One layer's attention over a packed batch with a prefix before each document."""

    def __init__(self, context: PackedContext, layout: VirtualLayout, keys_VGC: Tensor, values_VGC: Tensor):
        self.context, self.layout = context, layout
        """The context is of all X tokens."""
        self.keys_VGC, self.values_VGC = keys_VGC, values_VGC

    def attend(self, q_QHC: Tensor, k_QGC: Tensor, v_QGC: Tensor, rule: MaskRule) -> Tensor:
        """[Q, H·C]."""
        layout = self.layout
        k_XGC, v_XGC = layout.extended(k_QGC, self.keys_VGC), layout.extended(v_QGC, self.values_VGC)
        out_XD = attend(layout.extended(q_QHC), k_XGC, v_XGC, self.context, rule)
        return out_XD.index_select(0, layout.real_Q)
