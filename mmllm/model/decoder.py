"""The decoder: pre-norm blocks of grouped-query attention and SwiGLU, dense or a mixture of experts.

Shapes: B sequences, T positions, N tokens of the whole batch (padding removed), D width,
Q of them with filler (`mmllm.sequences`), E experts, L layers with experts, M modalities, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.model.attend import PackedContext
from mmllm.model.attention import Attention
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.depth import DepthLayout, DepthRouter, DepthStats, DepthSums
from mmllm.model.embedding import Embedding, Head
from mmllm.model.encoder_decoder import EncodedPrompts, HalvesLayout, prefill, run_packed
from mmllm.model.experts import MLP, MoE
from mmllm.model.norms import RMSNorm
from mmllm.model.recompute import Recompute, checkpointed, recompute_mode
from mmllm.model.rope import rotary
from mmllm.model.router import TokenInfo
from mmllm.model.routing_stats import LayerSums, RoutingStats
from mmllm.model.row_cache import LayerOfStep, PromptStep, RowCache, RunningStep
from mmllm.model.short_conv import Neighbors, PackedNeighbors, ShortConv
from mmllm.model.virtual_tokens import PrefixLayer, VirtualLayout, VirtualTokens
from mmllm.sequences import SequenceMetadata

INIT_STD = 0.02
Context = PackedContext | LayerOfStep | PrefixLayer | EncodedPrompts


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); short convolutions, if any, follow the norms."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.dropout = config.dropout
        self.recompute: Recompute = recompute_mode(config.gradient_checkpointing)
        self.has_experts = config.has_experts(layer)
        self.compiled: Callable[..., Any] | None = None
        """`_run_selective` of any block; the hooks of sharding stay outside of it, and so does full recomputing."""
        self.depth = None
        if config.skips_tokens(layer):
            self.depth = DepthRouter(config.hidden_size, layer, config.mod_capacity, config.mod_router)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config.attention(layer))
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if self.has_experts:
            assert config.moe is not None
            self.mlp = MoE(config.hidden_size, config.moe)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.attention_conv = self.mlp_conv = None
        if config.conv_size:
            self.attention_conv = ShortConv(config.hidden_size, config.conv_size, "attention")
            self.mlp_conv = ShortConv(config.hidden_size, config.conv_size, "mlp")

    def forward(
        self,
        x_ND: Tensor,
        cos: Tensor,
        sin: Tensor,
        context: Context,
        tokens: TokenInfo,
        layout: DepthLayout | None = None,
        neighbors: Neighbors | None = None,
    ) -> tuple[Tensor, LayerSums | DepthSums | None]:
        """The new residual stream, and sums of the routing to experts or past the block, if they are wanted."""
        if self.compiled is None:
            return checkpointed(self.recompute, self, self._run, x_ND, cos, sin, context, tokens, layout, neighbors)
        mode: Recompute = "full" if self.recompute == "full" else "none"
        run = functools.partial(self.compiled, self)
        return checkpointed(mode, self, run, x_ND, cos, sin, context, tokens, layout, neighbors)

    def _run_selective(self, *args: Any) -> tuple[Tensor, LayerSums | DepthSums | None]:
        """`_run`, with a selective checkpoint inside of what is compiled: compilers refuse its modes around them."""
        return checkpointed("selective" if self.recompute == "selective" else "none", self, self._run, *args)

    def _run(
        self,
        x_ND: Tensor,
        cos: Tensor,
        sin: Tensor,
        context: Context,
        tokens: TokenInfo,
        layout: DepthLayout | None,
        neighbors: Neighbors | None,
    ) -> tuple[Tensor, LayerSums | DepthSums | None]:
        if self.depth is None:
            return self._forward(x_ND, cos, sin, context, tokens, neighbors)
        assert not self.has_experts and not isinstance(context, PrefixLayer | EncodedPrompts)

        def run(x_PD: Tensor, angles: tuple[Tensor, Tensor], context: PackedContext | LayerOfStep) -> Tensor:
            return self._forward(x_PD, *angles, context, TokenInfo(is_counted=False))[0]

        return self.depth(x_ND, (cos, sin), context, layout, tokens, self.self_attn.settings.rule, run)

    def _forward(
        self,
        x_ND: Tensor,
        cos: Tensor,
        sin: Tensor,
        context: Context,
        tokens: TokenInfo,
        neighbors: Neighbors | None = None,
    ) -> tuple[Tensor, LayerSums | None]:
        assert self.attention_conv is None or neighbors is not None, "a block with short convolutions needs neighbors"
        normed_ND = self.input_layernorm(x_ND)
        if self.attention_conv is not None:
            normed_ND = self.attention_conv(normed_ND, neighbors)
        here = context.by(self.input_layernorm, self.self_attn) if isinstance(context, EncodedPrompts) else context
        attended = self.self_attn(normed_ND, cos, sin, here)
        x_ND = x_ND + F.dropout(attended, self.dropout, self.training)
        normed_ND = self.post_attention_layernorm(x_ND)
        if self.mlp_conv is not None:
            normed_ND = self.mlp_conv(normed_ND, neighbors)
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

    Args:
        config: its shape.
        splits_vocabulary: rows of base ids and added rows are parameters of their own (`Embedding`).

    Attributes:
        virtual_tokens: learned tokens before each document, by name.
        active_virtual: which of them it runs with; None: with none.
    """

    def __init__(self, config: DecoderConfig, splits_vocabulary: bool = False):
        super().__init__()
        self.config = config
        num_base_ids = config.num_base_ids if splits_vocabulary else 0
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, num_base_ids)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Head(self.embed_tokens, config.tie_word_embeddings)
        self.virtual_tokens = nn.ModuleDict()
        self.active_virtual: str | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal, std 0.02; what writes to the residual stream 1 / sqrt(2 · layers) of that (GPT-2); biases 0.

        Short convolutions have their own.
        """
        residual_std = INIT_STD / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))
                nn.init.normal_(parameter, std=residual_std if is_residual else INIT_STD)
        for module in self.layers.modules():
            if isinstance(module, ShortConv):
                module.reset_parameters()
        for moe in self.expert_layers().values():
            moe.gate.reset_buffers()

    def compile_layers(self, **options: Any) -> None:
        """Compiles each layer by itself, in place; names of weights stay.

        Batches should have their tokens rounded up (`PackedDataModule`'s `token_multiple`): every new number of tokens
        is a shape to compile for. Blocks that only some tokens pass stay as they are: how many do is another number in
        every batch.

        Args:
            options: of `torch.compile`.

        Raises:
            ValueError: there is an encoder: how many tokens are its, and the decoder's, differs in every batch.
        """
        if self.config.encoder_layers:
            raise ValueError(
                f"decoder.encoder_layers is {self.config.encoder_layers}, of which every batch has other shapes to "
                f"compile for; leave compile out"
            )
        compiled = torch.compile(Block._run_selective, **{"fullgraph": True, **options})
        for layer, block in enumerate(self.layers):
            if not self.config.skips_tokens(layer):
                block.compiled = compiled  # pyright: ignore[reportArgumentType]

    def expert_layers(self) -> dict[int, MoE]:
        """The mixtures of experts, by layer."""
        return {layer: block.mlp for layer, block in enumerate(self.layers) if self.config.has_experts(layer)}  # pyright: ignore

    @property
    def head_weight_VD(self) -> Tensor:
        """The head's rows, in id order; a copy where they are in two blocks."""
        return self.lm_head.weight_VD

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings, [..., D]."""
        return self.embed_tokens(ids)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits over the whole vocabulary, [..., V]."""
        return self.lm_head(hidden)

    @property
    def _virtual(self) -> VirtualTokens | None:
        """The learned tokens that it runs with."""
        return None if self.active_virtual is None else self.virtual_tokens[self.active_virtual]  # pyright: ignore

    def forward(
        self,
        x_BTD: Tensor,
        positions_BT: Tensor,
        document_ids_BT: Tensor,
        modality_BT: Tensor | None = None,
        spans_BT: Tensor | None = None,
    ) -> tuple[Tensor, RoutingStats]:
        """Hidden states after the final norm (zeros at padding), and the routing.

        Args:
            x_BTD: embeddings with images and sounds spliced in.
            positions_BT: restart at zero with each document.
            document_ids_BT: -1 for padding; a position sees earlier ones of its own document.
            modality_BT: given, routing is counted by modality too; needed where `moe.modality_experts` is set.
            spans_BT: the bidirectional span of each position, -1 none; needed where `config.prefix` is set. With
                `config.encoder_layers`, -1 at the decoder's positions and another number at the encoder's.
        """
        sequences = SequenceMetadata.of(document_ids_BT)
        hidden_QD, stats = self.packed(x_BTD, positions_BT, sequences, modality_BT, spans_BT)
        return unpacked(hidden_QD, sequences, x_BTD.shape[:2]), stats

    def make_row_cache(self, kv_dtype: torch.dtype | None = None) -> RowCache:
        """An empty cache of rows on this decoder's device and in its dtype, or one of fewer bits."""
        weight = self.embed_tokens.weight
        return RowCache(self.config, weight.device, weight.dtype, kv_dtype)

    def continue_rows(
        self, x_ND: Tensor, positions_N: Tensor, modality_N: Tensor, step: RunningStep | PromptStep
    ) -> Tensor:
        """Hidden states after the final norm, [N, D], of new positions of rows; nothing is counted.

        Learned tokens before a document are the caller's: they are positions like others here.

        Args:
            x_ND: embeddings, in the order of the step's rows.
            positions_N: of each in its row.
            modality_N: of each.
            step: whose rows they are; their keys and values are kept.
        """
        if self.config.encoder_layers and isinstance(step, PromptStep) and step.num_fresh:
            return prefill(self, x_ND, positions_N, modality_N, step)
        tokens = TokenInfo(modality_N, is_counted=False)
        hidden_ND, _ = self._run(x_ND, positions_N, step, tokens, x_ND.shape[0])
        step.end()
        return hidden_ND

    def packed(
        self,
        x_BTD: Tensor,
        positions_BT: Tensor,
        sequences: SequenceMetadata,
        modality_BT: Tensor | None = None,
        spans_BT: Tensor | None = None,
    ) -> tuple[Tensor, RoutingStats]:
        """As `forward` without a cache, of documents that are known: asks the device nothing.

        Returns:
            Hidden states of the `sequences.size` tokens, [Q, D], and the routing of the real ones.
        """
        x_QD, positions_Q = _taken(x_BTD.flatten(0, 1), sequences), _taken(positions_BT.flatten(), sequences)
        spans_Q = None if spans_BT is None else _taken(spans_BT.flatten(), sequences)
        if self.config.encoder_layers:
            layout = HalvesLayout.of(sequences, _num_prompt(sequences, spans_Q))
            tokens, dtype = self._token_info(sequences, modality_BT, x_BTD.shape), _attention_dtype(x_QD)
            return run_packed(self, x_QD, positions_Q, layout, tokens, sequences.num_tokens, dtype)
        if self.config.prefix != "none" and spans_Q is None:
            raise ValueError(f"decoder.prefix is {self.config.prefix!r}, but no spans were given; pass spans_BT")
        tokens, virtual = self._token_info(sequences, modality_BT, x_BTD.shape), self._virtual
        if virtual is not None:
            return self._packed_behind(virtual, x_QD, positions_Q, sequences, tokens)
        context = self._context(sequences, spans_Q, x_QD)
        layout = None
        if self.config.mod_layers:
            layout = DepthLayout.of(sequences, context.documents_Q(), self.config.mod_capacity)
        neighbors = self._neighbors(sequences)
        return self._run(x_QD, positions_Q, context, tokens, sequences.num_tokens, layout, neighbors)

    def _neighbors(self, sequences: SequenceMetadata) -> PackedNeighbors | None:
        return PackedNeighbors(sequences, self.config.conv_size) if self.config.conv_size else None

    def _context(self, sequences: SequenceMetadata, spans_Q: Tensor | None, x_QD: Tensor) -> PackedContext:
        context = PackedContext(sequences, self.config.attention_backend, spans_Q, _attention_dtype(x_QD))
        for layer in range(self.config.num_hidden_layers):
            context.prepare(self.config.rule(layer))
        return context

    def _packed_behind(
        self,
        virtual: VirtualTokens,
        x_QD: Tensor,
        positions_Q: Tensor,
        sequences: SequenceMetadata,
        tokens: TokenInfo,
    ) -> tuple[Tensor, RoutingStats]:
        """`packed`, of documents that begin with learned tokens."""
        layout = VirtualLayout.of(sequences, virtual.num_tokens)
        context, positions_Q = self._context(layout.sequences, None, x_QD), positions_Q + virtual.num_tokens
        if virtual.kind == "prefix_tuning":
            prefixes = [PrefixLayer(context, layout, *pair) for pair in virtual.keys_values_L2VGC]
            return self._run(
                x_QD, positions_Q, prefixes, tokens, sequences.num_tokens, neighbors=self._neighbors(sequences)
            )
        x_XD = layout.extended(x_QD, virtual.prompt_embeddings)
        positions_X = layout.extended(positions_Q, torch.arange(virtual.num_tokens, device=positions_Q.device))
        neighbors = self._neighbors(layout.sequences)
        hidden_XD, stats = self._run(
            x_XD, positions_X, context, layout.tokens(tokens), sequences.num_tokens, neighbors=neighbors
        )
        return hidden_XD.index_select(0, layout.real_Q), stats

    def _token_info(self, sequences: SequenceMetadata, modality_BT: Tensor | None, shape: torch.Size) -> TokenInfo:
        modality_Q = None if modality_BT is None else _taken(modality_BT.flatten(), sequences)
        is_real_Q = sequence_Q = None
        if sequences.size != sequences.num_tokens:
            is_real_Q = torch.arange(sequences.size, device=sequences.tokens_Q.device) < sequences.num_tokens
        if self.config.moe is not None and self.config.moe.counts_by_sequence:
            sequence_Q = sequences.tokens_Q // shape[1]
        return TokenInfo(modality_Q, sequence_Q, shape[0], is_real_Q)

    def _run(
        self,
        x_QD: Tensor,
        positions_Q: Tensor,
        context: PackedContext | RunningStep | PromptStep | list[PrefixLayer],
        tokens: TokenInfo,
        num_tokens: int,
        layout: DepthLayout | None = None,
        neighbors: PackedNeighbors | None = None,
    ) -> tuple[Tensor, RoutingStats]:
        config, dtype = self.config, _attention_dtype(x_QD)
        ropes = [(config.rotary_channels(layer), *config.rope(layer)) for layer in range(config.num_hidden_layers)]
        angles = {each: rotary(positions_Q, each[0], each[1], dtype, each[2]) for each in set(ropes)}
        if config.mod_layers and config.mod_router == "random":
            tokens = dataclasses.replace(tokens, positions_N=positions_Q)
        x_QD = F.dropout(x_QD, config.dropout, self.training)
        by_layer: dict[int, LayerSums] = {}
        depth_by_layer: dict[int, DepthSums] = {}
        first = config.encoder_layers  # new positions of an encoder-decoder pass the decoder alone, and so do caches
        for layer, block in itertools.islice(enumerate(self.layers), first, None):
            match context:
                case RunningStep() | PromptStep():
                    here = context.layer(layer - first)
                case list():
                    here = context[layer]
                case _:
                    here = context
            nearby = here if isinstance(here, LayerOfStep) and config.conv_size else neighbors
            x_QD, sums = block(x_QD, *angles[ropes[layer]], here, tokens, layout, nearby)
            if sums is not None:
                (depth_by_layer if config.skips_tokens(layer) else by_layer)[layer] = sums
        stats = RoutingStats.of(config.moe, by_layer, tokens, num_tokens, x_QD)
        stats.depth = DepthStats.of(depth_by_layer, num_tokens)
        return self.norm(x_QD), stats


def _attention_dtype(x: Tensor) -> torch.dtype:
    """In which queries and keys of a residual stream are."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def _num_prompt(sequences: SequenceMetadata, spans_Q: Tensor | None) -> tuple[int, ...]:
    """Of each document how many tokens are the encoder's; where the host doesn't know, the device is asked."""
    if sequences.num_prompt is not None:
        return sequences.num_prompt
    if spans_Q is None:
        raise ValueError("decoder.encoder_layers is set, but no spans were given; pass spans_BT")
    return tuple(int((each >= 0).sum()) for each in spans_Q.split(sequences.lengths))


def _taken(x: Tensor, sequences: SequenceMetadata) -> Tensor:
    return x if sequences.num_tokens == x.shape[0] else x.index_select(0, sequences.tokens_Q)


def unpacked(hidden_QD: Tensor, sequences: SequenceMetadata, shape: torch.Size) -> Tensor:
    """Hidden states where their tokens were, [B, T, D], zeros at padding."""
    hidden_ND, tokens_N = hidden_QD[: sequences.num_tokens], sequences.tokens_Q[: sequences.num_tokens]
    if sequences.num_tokens != shape.numel():
        padded = hidden_ND.new_zeros(shape.numel(), hidden_ND.shape[1])
        hidden_ND = padded.index_copy(0, tokens_N, hidden_ND)
    return hidden_ND.view(*shape, -1)
