"""The decoder: pre-norm blocks of grouped-query attention and SwiGLU, dense or a mixture of experts.

Shapes: B sequences, T positions, N tokens of the whole batch (padding removed), D width,
Q of them with filler (`mmllm.sequences`), E experts, L layers with experts, M modalities, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.model.attend import AttentionBackend, PackedContext, check_backend
from mmllm.model.attention import Attention, AttentionSettings
from mmllm.model.cache import CacheLayer, KVCache
from mmllm.model.depth import DepthLayout, DepthRouter, DepthStats, DepthSums
from mmllm.model.experts import MLP, MoE
from mmllm.model.masks import MaskRule
from mmllm.model.norms import RMSNorm
from mmllm.model.recompute import Recompute, checkpointed, recompute_mode
from mmllm.model.roles import mark
from mmllm.model.rope import RopeScaling, rotary
from mmllm.model.router import MoEConfig, TokenInfo
from mmllm.model.routing_stats import LayerSums, RoutingStats
from mmllm.sequences import SequenceMetadata

INIT_STD = 0.02
FULL, SLIDING = "full_attention", "sliding_attention"
Result = TypeVar("Result")


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder. Keys are transformers' where it has the same thing.

    Attributes:
        vocab_size: ids in the one id space; `Vocabulary.size`.
        hidden_size: width of the residual stream.
        num_hidden_layers: blocks.
        num_attention_heads: query heads.
        num_key_value_heads: key-value heads; None: as many as query heads.
        head_dim: channels a head; None: hidden_size / num_attention_heads.
        intermediate_size: inner width of the dense layers.
        moe: the experts; None: every layer is dense.
        moe_layers: which layers have experts: "all", or their indices.
        mod_layers: blocks that only some tokens pass (mixture of depths, arXiv 2404.02258; there every other one). They
            have no experts and no sliding window.
        mod_capacity: share of a document's tokens that pass them in training; of each document at least one.
        mod_predictor_coef: weight of the loss of the predictors, which decide in its place when nothing is trained.
        rope_theta: base of the rotary angles.
        rope_scaling: how the rotary frequencies are stretched to longer contexts; not in sliding layers where
            `sliding_rope_theta` is given.
        rms_norm_eps: of every RMSNorm.
        qk_norm: RMS-normalize queries and keys over each "head" (as Qwen3 does; true says the same), over the "width"
            of all heads (OLMoE), or "none" (false).
        attention_bias: biases of queries, keys and values ("qkv"), of the output too ("all"; true says the same), or
            "none" (false).
        layer_types: of each layer "full_attention" or "sliding_attention"; None: all full, or with `sliding_window`
            all sliding.
        sliding_window: tokens that a query of a sliding layer sees, itself included.
        sliding_rope_theta: base of the rotary angles in sliding layers; None: `rope_theta`.
        prefix: what is seen in both directions: the slots of each picture and sound ("media"), all of a document up to
            its first target ("prompt"), or nothing ("none").
        attention_backend: "buckets" of padded documents (any device), torch's "varlen" kernel (a GPU in half
            precision), "flex" (FlexAttention; any rule), "dense" (for tests); "auto" chooses.
        tie_word_embeddings: the head is the embedding.
        dropout: on the embeddings and on what each block adds, in training.
        gradient_checkpointing: what a block keeps for its gradient; the rest is computed again (arXiv 1604.06174).
            "none": everything. "selective": what matrix products, attention and experts gave: about half the memory
            for a few percent more time. "full": its input alone: a third more work for a fraction of the memory. true
            means full, false none.
    """

    vocab_size: int
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int = 768
    moe: MoEConfig | None = None
    moe_layers: Literal["all"] | tuple[int, ...] = "all"
    mod_layers: tuple[int, ...] = ()
    mod_capacity: float = 0.125
    mod_predictor_coef: float = 0.01
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    qk_norm: bool | Literal["none", "head", "width"] = False
    attention_bias: bool | Literal["none", "qkv", "all"] = False
    layer_types: tuple[str, ...] | None = None
    sliding_window: int | None = None
    sliding_rope_theta: float | None = None
    prefix: Literal["none", "media", "prompt"] = "none"
    attention_backend: AttentionBackend = "auto"
    tie_word_embeddings: bool = True
    dropout: float = 0.0
    gradient_checkpointing: bool | Recompute = "none"

    def __post_init__(self) -> None:
        for name in ("moe_layers", "mod_layers", "layer_types"):  # lists, as YAML and JSON give them
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        recompute_mode(self.gradient_checkpointing)
        self._check_numbers()
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"decoder.hidden_size is {self.hidden_size}, which {self.num_attention_heads} heads do not divide; "
                f"change num_attention_heads or give head_dim"
            )
        if self.head_channels % 2:
            raise ValueError(f"decoder.head_dim is {self.head_channels}; rotary positions need an even number")
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"decoder.num_attention_heads is {self.num_attention_heads}, which num_key_value_heads, "
                f"{self.kv_heads}, does not divide"
            )
        layers = () if isinstance(self.moe_layers, str) else self.moe_layers
        wrong = [layer for layer in layers if not 0 <= layer < self.num_hidden_layers]
        if wrong:
            raise ValueError(f"decoder.moe_layers names layer {wrong[0]}; layers are 0 to {self.num_hidden_layers - 1}")
        self._check_attention()
        self._check_depth()

    def _check_numbers(self) -> None:
        for key in (
            "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "intermediate_size",
        ):  # fmt: skip
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"decoder.{key} is {value}; it must be at least 1")
        if self.vocab_size < 0:
            raise ValueError(f"decoder.vocab_size is {self.vocab_size}; give the tokenizer's, or 0 for that")
        for key in ("rope_theta", "sliding_rope_theta"):
            value = getattr(self, key)
            if value is not None and not (math.isfinite(value) and value > 1):
                raise ValueError(f"decoder.{key} is {value}; give a number above 1, such as 10000")
        if not (math.isfinite(self.rms_norm_eps) and self.rms_norm_eps > 0):
            raise ValueError(f"decoder.rms_norm_eps is {self.rms_norm_eps}; give a small positive number, such as 1e-5")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"decoder.dropout is {self.dropout}; it must be at least 0 and below 1")

    def _check_attention(self) -> None:
        for key, value, choices in (
            ("qk_norm", self.qk_norm_over, ("none", "head", "width")),
            ("attention_bias", self.bias_of, ("none", "qkv", "all")),
            ("prefix", self.prefix, ("none", "media", "prompt")),
        ):
            if value not in choices:
                raise ValueError(f"decoder.{key} is {value!r}; choose {', '.join(choices)}")
        types = self.layer_types
        if types is not None and len(types) != self.num_hidden_layers:
            raise ValueError(
                f"decoder.layer_types has {len(types)} entries; give one for each of the "
                f"{self.num_hidden_layers} layers"
            )
        unknown = [each for each in types or () if each not in (FULL, SLIDING)]
        if unknown:
            raise ValueError(f"decoder.layer_types has {unknown[0]!r}; a layer is {FULL!r} or {SLIDING!r}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(
                f"decoder.sliding_window is {self.sliding_window}; a token sees at least itself: give 1 or more"
            )
        if types is not None and (SLIDING in types) != (self.sliding_window is not None):
            raise ValueError(
                f"decoder.sliding_window is {self.sliding_window} and layer_types has {types.count(SLIDING)} sliding "
                f"layers; give both or neither"
            )
        if self.sliding_rope_theta is not None and self.sliding_window is None:
            raise ValueError("decoder.sliding_rope_theta is given, but no layer is sliding; give sliding_window too")
        check_backend(self.attention_backend, self.prefix != "none")

    def _check_depth(self) -> None:
        if not 0 < self.mod_capacity <= 1:
            raise ValueError(f"decoder.mod_capacity is {self.mod_capacity}; it must be above 0 and at most 1")
        if not (math.isfinite(self.mod_predictor_coef) and self.mod_predictor_coef >= 0):
            raise ValueError(f"decoder.mod_predictor_coef is {self.mod_predictor_coef}; it must be finite, 0 or more")
        for layer in self.mod_layers:
            if not 0 <= layer < self.num_hidden_layers:
                last = self.num_hidden_layers - 1
                raise ValueError(f"decoder.mod_layers names layer {layer}; layers are 0 to {last}")
            if self.has_experts(layer):
                raise ValueError(
                    f"decoder.mod_layers names layer {layer}, which has experts, whose balance is that of all tokens; "
                    f"leave it out of moe_layers or of mod_layers"
                )
            if self.is_sliding(layer):
                raise ValueError(
                    f"decoder.mod_layers names layer {layer}, which is sliding: its window would hold other tokens in "
                    f"training than with the predictor; make it full_attention in layer_types"
                )

    @property
    def head_channels(self) -> int:
        """Channels a head."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def kv_heads(self) -> int:
        """Key-value heads."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    def has_experts(self, layer: int) -> bool:
        """Whether a layer is a mixture of experts."""
        return self.moe is not None and (self.moe_layers == "all" or layer in self.moe_layers)

    def skips_tokens(self, layer: int) -> bool:
        """Whether only some tokens pass a layer."""
        return layer in self.mod_layers

    def is_sliding(self, layer: int) -> bool:
        """Whether a layer's queries see a window of tokens alone."""
        if self.layer_types is not None:
            return self.layer_types[layer] == SLIDING
        return self.sliding_window is not None

    def rope(self, layer: int) -> tuple[float, RopeScaling | None]:
        """Base and scaling of a layer's rotary angles."""
        if self.is_sliding(layer) and self.sliding_rope_theta is not None:
            return self.sliding_rope_theta, None
        return self.rope_theta, self.rope_scaling

    def rule(self, layer: int) -> MaskRule:
        """What a layer's queries see."""
        return MaskRule(self.sliding_window if self.is_sliding(layer) else None, self.prefix != "none")

    def attention(self, layer: int) -> AttentionSettings:
        """A layer's attention."""
        return AttentionSettings(
            hidden_size=self.hidden_size,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_channels,
            qk_norm=self.qk_norm_over,
            bias=self.bias_of,
            norm_eps=self.rms_norm_eps,
            rule=self.rule(layer),
        )

    @property
    def qk_norm_over(self) -> Literal["none", "head", "width"]:
        """`qk_norm` without the short forms."""
        return {True: "head", False: "none"}.get(self.qk_norm, self.qk_norm)  # pyright: ignore

    @property
    def bias_of(self) -> Literal["none", "qkv", "all"]:
        """`attention_bias` without the short forms."""
        return {True: "all", False: "none"}.get(self.attention_bias, self.attention_bias)  # pyright: ignore


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.dropout = config.dropout
        self.recompute: Recompute = recompute_mode(config.gradient_checkpointing)
        self.has_experts = config.has_experts(layer)
        self.compiled: Callable[..., Any] | None = None
        """`_run_selective` of any block; the hooks of sharding stay outside of it, and so does full recomputing."""
        self.rule = config.rule(layer)
        self.depth = DepthRouter(config.hidden_size) if config.skips_tokens(layer) else None
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config.attention(layer))
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if self.has_experts:
            assert config.moe is not None
            self.mlp = MoE(config.hidden_size, config.moe)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x_ND: Tensor,
        cos: Tensor,
        sin: Tensor,
        context: PackedContext | CacheLayer,
        tokens: TokenInfo,
        layout: DepthLayout | None = None,
    ) -> tuple[Tensor, LayerSums | DepthSums | None]:
        """The new residual stream, and sums of the routing to experts or past the block, if they are wanted."""
        if self.compiled is None:
            return checkpointed(self.recompute, self._run, x_ND, cos, sin, context, tokens, layout)
        mode: Recompute = "full" if self.recompute == "full" else "none"
        return checkpointed(mode, functools.partial(self.compiled, self), x_ND, cos, sin, context, tokens, layout)

    def _run_selective(self, *args: Any) -> tuple[Tensor, LayerSums | DepthSums | None]:
        """`_run`, with a selective checkpoint inside of what is compiled: compilers refuse its modes around them."""
        return checkpointed("selective" if self.recompute == "selective" else "none", self._run, *args)

    def _run(
        self,
        x_ND: Tensor,
        cos: Tensor,
        sin: Tensor,
        context: PackedContext | CacheLayer,
        tokens: TokenInfo,
        layout: DepthLayout | None,
    ) -> tuple[Tensor, LayerSums | DepthSums | None]:
        if self.depth is None:
            return self._forward(x_ND, cos, sin, context, tokens)
        assert not self.has_experts

        def run(x_PD: Tensor, angles: tuple[Tensor, Tensor], context: PackedContext | CacheLayer) -> Tensor:
            return self._forward(x_PD, *angles, context, TokenInfo(is_counted=False))[0]

        return self.depth(x_ND, (cos, sin), context, layout, tokens.is_real_N, self.rule, run)

    def _forward(
        self,
        x_ND: Tensor,
        cos: Tensor,
        sin: Tensor,
        context: PackedContext | CacheLayer,
        tokens: TokenInfo,
    ) -> tuple[Tensor, LayerSums | None]:
        attended = self.self_attn(self.input_layernorm(x_ND), cos, sin, context)
        x_ND = x_ND + F.dropout(attended, self.dropout, self.training)
        normed_ND = self.post_attention_layernorm(x_ND)
        sums = None
        if self.has_experts:
            out_ND, sums = self.mlp(normed_ND, tokens)
        else:
            out_ND = self.mlp(normed_ND)
        return x_ND + F.dropout(out_ND, self.dropout, self.training), sums


class Head(nn.Module):
    """From hidden states to logits, with a weight of its own or the embedding's.

    A loss that never holds all logits runs inside of its forward: sharding gathers the weight for just that.
    """

    def __init__(self, embed_tokens: nn.Embedding, is_tied: bool):
        super().__init__()
        # Not registered a second time: the weight has one name, and one owner that shards and moves it.
        self._embedding = (embed_tokens,)
        vocab_size, width = embed_tokens.weight.shape
        self.register_parameter("weight", None if is_tied else nn.Parameter(torch.empty(vocab_size, width)))
        mark(self, weight="head")

    @property
    def weight_VD(self) -> Tensor:
        """The rows, in id order."""
        return self._embedding[0].weight if self.weight is None else self.weight  # pyright: ignore

    def forward(self, hidden: Tensor, reduce: Callable[[Tensor, Tensor], Result] | None = None) -> Tensor | Result:
        """Logits [..., V], or what `reduce` makes of the hidden states and the weight [V, D]."""
        return F.linear(hidden, self.weight_VD) if reduce is None else reduce(hidden, self.weight_VD)


class Decoder(nn.Module):
    """Embeddings, blocks, final norm and head.

    Padding is removed before the first block: it costs nothing, no expert sees it, and its hidden
    states come back as zeros.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Head(self.embed_tokens, config.tie_word_embeddings)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal, std 0.02; what writes to the residual stream 1 / sqrt(2 · layers) of that (GPT-2); biases 0."""
        residual_std = INIT_STD / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))
                nn.init.normal_(parameter, std=residual_std if is_residual else INIT_STD)
        for moe in self.expert_layers().values():
            moe.gate.reset_buffers()

    def compile_layers(self, **options: Any) -> None:
        """Compiles each layer by itself, in place; names of weights stay.

        Batches should have their tokens rounded up (`PackedDataModule`'s `token_multiple`): every new number of tokens
        is a shape to compile for. Blocks that only some tokens pass stay as they are: how many do is another number in
        every batch.

        Args:
            options: of `torch.compile`.
        """
        compiled = torch.compile(Block._run_selective, **{"fullgraph": True, **options})
        for layer, block in enumerate(self.layers):
            if not self.config.skips_tokens(layer):
                block.compiled = compiled  # pyright: ignore[reportArgumentType]

    def expert_layers(self) -> dict[int, MoE]:
        """The mixtures of experts, by layer."""
        blocks = [self.layers[layer] for layer in range(len(self.layers)) if self.config.has_experts(layer)]
        return {block.layer: block.mlp for block in blocks}  # pyright: ignore[reportReturnType]

    @property
    def head_weight_VD(self) -> Tensor:
        """The head's rows, in id order."""
        return self.lm_head.weight_VD

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings, [..., D]."""
        return self.embed_tokens(ids)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits over the whole vocabulary, [..., V]."""
        return self.lm_head(hidden)

    def make_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache on this decoder's device and in its dtype."""
        weight, config = self.embed_tokens.weight, self.config
        return KVCache(
            config.num_hidden_layers,
            config.kv_heads,
            config.head_channels,
            batch_size,
            max_length,
            weight.device,
            weight.dtype,
        )

    def forward(
        self,
        x_BTD: Tensor,
        positions_BT: Tensor,
        document_ids_BT: Tensor,
        cache: KVCache | None = None,
        modality_BT: Tensor | None = None,
        spans_BT: Tensor | None = None,
    ) -> tuple[Tensor, RoutingStats]:
        """Hidden states after the final norm (zeros at padding), and the routing.

        Args:
            x_BTD: embeddings with images and sounds spliced in.
            positions_BT: restart at zero with each document.
            document_ids_BT: -1 for padding; a position sees earlier ones of its own document.
            cache: the keys and values so far; the new ones are appended. Nothing is counted then.
            modality_BT: given, routing is counted by modality too; needed where `moe.modality_experts` is set.
            spans_BT: the bidirectional span of each position, -1 none; needed where `config.prefix` is set.
        """
        if cache is None:
            sequences = SequenceMetadata.of(document_ids_BT)
            hidden_QD, stats = self.packed(x_BTD, positions_BT, sequences, modality_BT, spans_BT)
            return unpacked(hidden_QD, sequences, x_BTD.shape[:2]), stats
        cache.begin(document_ids_BT, spans_BT)
        tokens = TokenInfo(None if modality_BT is None else modality_BT.flatten(), is_counted=False)
        x_ND, positions_N = x_BTD.flatten(0, 1), positions_BT.flatten()
        hidden_ND, stats = self._run(x_ND, positions_N, cache, tokens, x_ND.shape[0])
        cache.end()
        return hidden_ND.view(x_BTD.shape), stats

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
        if self.config.prefix != "none" and spans_Q is None:
            raise ValueError(f"decoder.prefix is {self.config.prefix!r}, but no spans were given; pass spans_BT")
        dtype = x_QD.dtype
        if torch.is_autocast_enabled(x_QD.device.type):
            dtype = torch.get_autocast_dtype(x_QD.device.type)
        context = PackedContext(sequences, self.config.attention_backend, spans_Q, dtype)
        for layer in range(self.config.num_hidden_layers):
            context.prepare(self.config.rule(layer))
        tokens = self._token_info(sequences, modality_BT, x_BTD.shape)
        layout = None
        if self.config.mod_layers:
            layout = DepthLayout.of(sequences, context.documents_Q(), self.config.mod_capacity)
        return self._run(x_QD, positions_Q, context, tokens, sequences.num_tokens, layout)

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
        context: PackedContext | KVCache,
        tokens: TokenInfo,
        num_tokens: int,
        layout: DepthLayout | None = None,
    ) -> tuple[Tensor, RoutingStats]:
        config = self.config
        ropes = {config.rope(layer) for layer in range(config.num_hidden_layers)}
        angles = {rope: rotary(positions_Q, config.head_channels, rope[0], x_QD.dtype, rope[1]) for rope in ropes}
        x_QD = F.dropout(x_QD, config.dropout, self.training)
        by_layer: dict[int, LayerSums] = {}
        depth_by_layer: dict[int, DepthSums] = {}
        for layer, block in enumerate(self.layers):
            here = context.layer(layer) if isinstance(context, KVCache) else context
            x_QD, sums = block(x_QD, *angles[config.rope(layer)], here, tokens, layout)
            if sums is not None:
                (depth_by_layer if config.skips_tokens(layer) else by_layer)[layer] = sums
        stats = RoutingStats.of(config.moe, by_layer, tokens, num_tokens, x_QD)
        stats.depth = DepthStats.of(depth_by_layer, num_tokens)
        return self.norm(x_QD), stats


def _taken(x: Tensor, sequences: SequenceMetadata) -> Tensor:
    return x if sequences.num_tokens == x.shape[0] else x.index_select(0, sequences.tokens_Q)


def unpacked(hidden_QD: Tensor, sequences: SequenceMetadata, shape: torch.Size) -> Tensor:
    """Hidden states where their tokens were, [B, T, D], zeros at padding."""
    hidden_ND, tokens_N = hidden_QD[: sequences.num_tokens], sequences.tokens_Q[: sequences.num_tokens]
    if sequences.num_tokens != shape.numel():
        padded = hidden_ND.new_zeros(shape.numel(), hidden_ND.shape[1])
        hidden_ND = padded.index_copy(0, tokens_N, hidden_ND)
    return hidden_ND.view(*shape, -1)
