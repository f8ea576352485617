"""An encoder and a decoder in one stack of blocks (`decoder.encoder_layers`).

The first blocks are the encoder: prompts alone pass them, and see themselves in both directions. The others are the
decoder: the rest of each document passes them, from the position that predicts its first target on, and sees what came
before it there and all of the encoder's final states. Attention is merged, as in T5Gemma 2 (arXiv 2512.14856): keys of
the encoder's states stand before the decoder's own, under one softmax, by the same projections. T5's separate
cross-attention (arXiv 1910.10683) would be a third sublayer in half of the blocks, and a second cache; merged, an
encoder-decoder has the weights of a decoder by their names, and a new position while generating is computed as ever,
by half of the blocks. Other than in T5Gemma 2, a block normalizes the encoder's states by its own norm.

A text that is learned whole has no prompt: all of it but nothing before it is the decoder's.

Shapes: S documents, Q tokens of the batch, E of them the encoder's, A the decoder's, D width, G key-value heads, H
query heads, C channels a head, L layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm.model.attend import LayerContext, PackedContext, attend
from mmllm.model.attention import Attention
from mmllm.model.masks import MaskRule
from mmllm.model.norms import RMSNorm
from mmllm.model.rope import rotary
from mmllm.model.router import TokenInfo
from mmllm.model.routing_stats import LayerSums, RoutingStats
from mmllm.model.row_cache import Chunk, LayerOfStep, PromptStep
from mmllm.model.short_conv import Neighbors, PackedNeighbors
from mmllm.sequences import SequenceMetadata

if TYPE_CHECKING:
    from mmllm.model.decoder import Decoder


@dataclass(frozen=True)
class HalvesLayout:
    """Which tokens of packed documents are the encoder's and which the decoder's."""

    whole: SequenceMetadata
    """All documents."""
    prompts: SequenceMetadata
    """Of the E tokens alone; documents without a prompt are none of them."""
    answers: SequenceMetadata
    """Of the A tokens alone."""
    encoder_E: Tensor
    """int64, which of the Q tokens they are."""
    decoder_A: Tensor
    order_Q: Tensor
    """int64, where each of the Q tokens is in the E and A tokens one after the other."""
    prompts_E: Tensor
    """int64, the number of each token's document."""
    num_prompt: tuple[int, ...]
    """Of each document how many tokens are the encoder's."""

    @staticmethod
    def of(sequences: SequenceMetadata, num_prompt: Sequence[int]) -> HalvesLayout:
        """Splits documents; asks the device nothing.

        Args:
            sequences: the documents, filler included.
            num_prompt: of each how many tokens, its first ones, are the encoder's.
        """
        device = sequences.tokens_Q.device
        lengths_S, prompts_S = (np.array(each, dtype=np.int64) for each in (sequences.lengths, num_prompt))
        documents_Q = np.repeat(np.arange(len(lengths_S)), lengths_S)
        age_Q = np.arange(len(documents_Q)) - (lengths_S.cumsum() - lengths_S)[documents_Q]
        is_prompt_Q = age_Q < prompts_S[documents_Q]
        chosen = [np.flatnonzero(is_prompt_Q), np.flatnonzero(~is_prompt_Q)]
        order_Q = np.empty_like(documents_Q)
        order_Q[np.concatenate(chosen)] = np.arange(len(documents_Q))
        encoder_E, decoder_A, order_Q, prompts_E = (
            torch.from_numpy(each).to(device, non_blocking=True) for each in (*chosen, order_Q, documents_Q[chosen[0]])
        )
        answers = tuple(length - count for length, count in zip(sequences.lengths, num_prompt, strict=True))
        return HalvesLayout(
            whole=sequences,
            prompts=SequenceMetadata.of_lengths(tuple(count for count in num_prompt if count), encoder_E),
            answers=SequenceMetadata.of_lengths(tuple(count for count in answers if count), decoder_A),
            encoder_E=encoder_E,
            decoder_A=decoder_A,
            order_Q=order_Q,
            prompts_E=prompts_E,
            num_prompt=tuple(num_prompt),
        )

    def joined(self, encoder: Tensor, decoder: Tensor) -> Tensor:
        """[E, …] and [A, …] as [Q, …]."""
        return torch.cat([encoder, decoder]).index_select(0, self.order_Q)

    def num_real(self, num_tokens: int) -> tuple[int, int]:
        """How many of E and A are real ones.

        Args:
            num_tokens: real ones of Q; filler is the last document.
        """
        of_prompts = self.prompts.size - (self.num_prompt[-1] if self.whole.size > num_tokens else 0)
        return of_prompts, num_tokens - of_prompts


class EncodedPrompts:
    """What a block of the decoder attends to beside its own tokens: the encoder's final states.

    Args:
        inner: where all documents' tokens are attended to: of the packed batch, or with the layer's cache.
        layout: of the batch.
        states_ED: the encoder's.
        angles: rotary cosines and sines of their places.
    """

    def __init__(
        self,
        inner: PackedContext | LayerContext,
        layout: HalvesLayout,
        states_ED: Tensor,
        angles: tuple[Tensor, Tensor],
    ):
        self._inner, self._layout, self._states_ED, self._angles = inner, layout, states_ED, angles

    def by(self, norm: RMSNorm, attention: Attention) -> MergedLayer:
        """With keys and values as a block makes them: called inside of it, where its weights are gathered."""
        k_EGC, v_EGC = attention.keys_values(norm(self._states_ED), *self._angles)
        return MergedLayer(self._inner, self._layout, k_EGC, v_EGC)


class MergedLayer:
    """One layer's attention of the decoder's tokens to the encoder's states and to themselves, under one softmax.

    The encoder's tokens have no queries: zeros stand in for them, so that any backend serves, and what they see is
    thrown away.
    """

    def __init__(self, inner: PackedContext | LayerContext, layout: HalvesLayout, k_EGC: Tensor, v_EGC: Tensor):
        self._inner, self._layout, self._k_EGC, self._v_EGC = inner, layout, k_EGC, v_EGC

    def attend(self, q_AHC: Tensor, k_AGC: Tensor, v_AGC: Tensor, rule: MaskRule, /) -> Tensor:
        """[A, H·C]."""
        layout = self._layout
        q_QHC = layout.joined(q_AHC.new_zeros(len(self._k_EGC), *q_AHC.shape[1:]), q_AHC)
        k_QGC, v_QGC = layout.joined(self._k_EGC, k_AGC), layout.joined(self._v_EGC, v_AGC)
        return attend(q_QHC, k_QGC, v_QGC, self._inner, rule).index_select(0, layout.decoder_A)


def run_packed(
    decoder: Decoder,
    x_QD: Tensor,
    positions_Q: Tensor,
    layout: HalvesLayout,
    tokens: TokenInfo,
    num_tokens: int,
    dtype: torch.dtype,
) -> tuple[Tensor, RoutingStats]:
    """Packed documents: hidden states after the final norm, [Q, D] (of prompts the encoder's), and the routing.

    Args:
        decoder: with `encoder_layers`.
        x_QD: embeddings.
        positions_Q: of each in its document.
        layout: whose tokens they are.
        tokens: what routing knows of them.
        num_tokens: real ones.
        dtype: of queries and keys.
    """
    config = decoder.config
    context = PackedContext(layout.whole, config.attention_backend, None, dtype)
    for layer in range(config.encoder_layers, config.num_hidden_layers):
        context.prepare(config.rule(layer))
    of_encoder, of_decoder = _tokens_of(tokens, layout.encoder_E), _tokens_of(tokens, layout.decoder_A)
    halves = _Halves(decoder, x_QD, positions_Q, layout, dtype)
    by_layer = halves.encode(of_encoder)
    neighbors = PackedNeighbors(layout.answers, config.conv_size) if config.conv_size else None
    for layer in range(config.encoder_layers, config.num_hidden_layers):
        by_layer |= halves.decode(layer, context, of_decoder, neighbors)
    stats = RoutingStats.of(config.moe, by_layer, tokens, num_tokens, x_QD)
    if stats.layers:
        counts = layout.num_real(num_tokens)
        by_half_HM = torch.stack([_tokens_by_modality(each, stats) for each in (of_encoder, of_decoder)])
        _tell_halves(stats, config.encoder_layers, counts, by_half_HM)
    return halves.hidden_QD() + halves.unused(), stats


@torch.no_grad()
def prefill(decoder: Decoder, x_ND: Tensor, positions_N: Tensor, modality_N: Tensor, step: PromptStep) -> Tensor:
    """Prompts into the cache: the encoder runs once, and leaves keys and values in each layer of the decoder.

    Args:
        decoder: with `encoder_layers`.
        x_ND: embeddings, in the order of the step's rows.
        positions_N: of each in its row.
        modality_N: of each.
        step: of whole prompts that begin; `spans_N` says which positions are the encoder's.

    Returns:
        As `Decoder.continue_rows`.
    """
    config = decoder.config
    assert step.num_fresh == len(step.chunks) and step.spans_N is not None, "an encoder takes whole prompts"
    lengths = tuple(chunk.num_tokens for chunk in step.chunks)
    encoded = [int(each) for each in torch.stack([(s >= 0).sum() for s in step.spans_N.split(lengths)]).tolist()]
    sequences = SequenceMetadata.of_lengths(lengths, torch.arange(len(x_ND), device=x_ND.device))
    layout = HalvesLayout.of(sequences, encoded)
    halves = _Halves(decoder, x_ND, positions_N, layout, x_ND.dtype)
    halves.encode(TokenInfo(modality_N[layout.encoder_E], is_counted=False))
    own = None
    if config.conv_size:
        chunks = [
            Chunk(chunk.row, length - count) for chunk, length, count in zip(step.chunks, lengths, encoded, strict=True)
        ]
        own = PromptStep(chunks, None, config.attention_backend)
    of_decoder = TokenInfo(modality_N[layout.decoder_A], is_counted=False)
    for layer in range(config.encoder_layers, config.num_hidden_layers):
        place = layer - config.encoder_layers
        halves.decode(layer, step.layer(place), of_decoder, None if own is None else own.layer(place))
    step.end()
    return halves.hidden_QD()


class _Halves:
    """Both halves on their way through the blocks."""

    def __init__(self, decoder: Decoder, x_QD: Tensor, positions_Q: Tensor, layout: HalvesLayout, dtype: torch.dtype):
        config = decoder.config
        self._decoder, self._layout, self._dtype = decoder, layout, dtype
        x_QD = F.dropout(x_QD, config.dropout, decoder.training)
        self._x_ED, self._x_AD = (x_QD.index_select(0, each) for each in (layout.encoder_E, layout.decoder_A))
        self._positions = [positions_Q.index_select(0, each) for each in (layout.encoder_E, layout.decoder_A)]
        self._angles: dict[tuple[int, Any], tuple[Tensor, Tensor]] = {}

    def _turns(self, half: int, layer: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a half's places (0: the encoder's) in a layer."""
        config = self._decoder.config
        channels, (theta, scaling) = config.rotary_channels(layer), config.rope(layer)
        key = half, (channels, theta, scaling)
        if key not in self._angles:
            self._angles[key] = rotary(self._positions[half], channels, theta, self._dtype, scaling)
        return self._angles[key]

    def encode(self, tokens: TokenInfo) -> dict[int, LayerSums]:
        """Runs the encoder; sums of its layers' routing."""
        config, prompts = self._decoder.config, self._layout.prompts
        context = PackedContext(prompts, config.attention_backend, self._layout.prompts_E, self._dtype)
        for layer in range(config.encoder_layers):
            context.prepare(config.rule(layer))
        neighbors = PackedNeighbors(prompts, config.conv_size) if config.conv_size else None
        by_layer = {}
        for layer, block in itertools.islice(enumerate(self._decoder.layers), config.encoder_layers):
            self._x_ED, sums = block(self._x_ED, *self._turns(0, layer), context, tokens, None, neighbors)
            by_layer |= {} if sums is None else {layer: sums}
        return by_layer

    def decode(
        self, layer: int, inner: PackedContext | LayerOfStep, tokens: TokenInfo, neighbors: Neighbors | None
    ) -> dict[int, LayerSums]:
        """Runs one block of the decoder; sums of its routing."""
        here = EncodedPrompts(inner, self._layout, self._x_ED, self._turns(0, layer))
        block = self._decoder.layers[layer]
        self._x_AD, sums = block(self._x_AD, *self._turns(1, layer), here, tokens, None, neighbors)
        return {} if sums is None else {layer: sums}

    def unused(self) -> Tensor:
        """Zero, through the blocks of a half without a token: other ranks wait for their gradients."""
        zero, first = self._x_ED.new_zeros(()), self._decoder.config.encoder_layers
        for x_ND, layers in ((self._x_ED, slice(first)), (self._x_AD, slice(first, None))):
            if not len(x_ND) and torch.is_grad_enabled():
                used = (p for p in self._decoder.layers[layers].parameters() if p.requires_grad)
                zero = sum((parameter.sum() * 0.0 for parameter in used), start=zero)
        return zero.to(self._x_ED.dtype)

    def hidden_QD(self) -> Tensor:
        """After the final norm."""
        return self._decoder.norm(self._layout.joined(self._x_ED, self._x_AD))


def _tokens_of(tokens: TokenInfo, chosen: Tensor) -> TokenInfo:
    parts = {
        key: None if value is None else value.index_select(0, chosen)
        for key, value in (("modality_N", tokens.modality_N), ("is_real_N", tokens.is_real_N))
    }
    return replace(tokens, **parts)


def _tokens_by_modality(tokens: TokenInfo, stats: RoutingStats) -> Tensor:
    """int64 [M]; zeros where modalities aren't known."""
    if tokens.modality_N is None or stats.tokens_M is None:
        return stats.counts_LE.new_zeros(1)
    modalities_M = torch.arange(len(stats.tokens_M), device=tokens.modality_N.device)
    is_in_NM = tokens.modality_N[:, None] == modalities_M
    return (is_in_NM if tokens.is_real_N is None else is_in_NM & tokens.is_real_N[:, None]).sum(dim=0)


def _tell_halves(stats: RoutingStats, num_encoder: int, counts: tuple[int, int], by_half_HM: Tensor) -> None:
    """Of each layer as many tokens as it had, and entropies as if all had passed, since reports divide by all."""
    halves = [int(layer >= num_encoder) for layer in stats.layers]
    device = stats.counts_LE.device
    stats.tokens_L = torch.tensor([counts[half] for half in halves]).to(device, non_blocking=True)
    if stats.entropy_sums_LM is not None and stats.tokens_M is not None:
        tokens_LM = torch.stack([by_half_HM[half] for half in halves])
        share_LM = stats.tokens_M / tokens_LM.clamp(min=1)
        stats.entropy_sums_LM = stats.entropy_sums_LM * share_LM.to(stats.entropy_sums_LM.dtype)
