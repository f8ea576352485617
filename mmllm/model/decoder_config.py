"""What a decoder is made of: sizes, attention, positions, experts and which layers have them."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Literal

from mmllm.model.attend import AttentionBackend, check_backend
from mmllm.model.attention import AttentionSettings
from mmllm.model.masks import MaskRule
from mmllm.model.recompute import Recompute, recompute_mode
from mmllm.model.rope import RopeScaling
from mmllm.model.router import MoEConfig

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder. Keys are transformers' where it has the same thing.

    Attributes:
        vocab_size: ids in the one id space; `Vocabulary.size`.
        num_base_ids: ids of the checkpoint that was imported; special tokens and units lie behind them and may be
            trained while their rows are frozen. 0: there is no such checkpoint, and all rows are one block.
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
        mod_router: who passes them: "learned" weights say it, or chance ("random"), the published control: drawn anew
            at every step of a training, by a hash of layer and position elsewhere, without a predictor.
        mod_predictor_coef: weight of the loss of the predictors, which decide in its place when nothing is trained.
        rope_theta: base of the rotary angles.
        rope_scaling: how the rotary frequencies are stretched to longer contexts; not in sliding layers where
            `sliding_rope_theta` is given.
        partial_rotary_factor: share of a head's channels that positions turn, the first ones (Phi, GLM); even in
            number.
        no_rope_layers: of each layer 1 where positions turn queries and keys and 0 where they don't, so that it knows
            no positions but those of what it sees (SmolLM3); None: 1 everywhere.
        rms_norm_eps: of every RMSNorm.
        qk_norm: RMS-normalize queries and keys over each "head" (as Qwen3 does; true says the same), over the "width"
            of all heads (OLMoE), or "none" (false).
        attention_bias: biases of queries, keys and values ("qkv"), of the output too ("all"; true says the same), or
            "none" (false).
        mlp_bias: biases of the three projections of dense layers.
        layer_types: of each layer "full_attention" or "sliding_attention"; None: all full, or with `sliding_window`
            all sliding.
        sliding_window: tokens that a query of a sliding layer sees, itself included.
        sliding_rope_theta: base of the rotary angles in sliding layers; None: `rope_theta`.
        conv_size: tokens that short causal convolutions mix before attention and before the feed-forward of every
            block, the token itself included ("Canon" layers A and C, arXiv 2512.17351; 4 there); 0: there are none.
        prefix: what is seen in both directions: the slots of each picture and sound ("media"), all of a document up to
            its first target ("prompt"), or nothing ("none").
        encoder_layers: so many blocks, the first ones, are an encoder: what of a document stands before the position
            that predicts its first target passes them alone, seen in both directions; the rest passes the other blocks
            and sees the encoder's final states there (`mmllm.model.encoder_decoder`). 0: all tokens pass all blocks.
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
    mod_router: Literal["learned", "random"] = "learned"
    mod_predictor_coef: float = 0.01
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = 1.0
    no_rope_layers: tuple[int, ...] | None = None
    rms_norm_eps: float = 1e-5
    qk_norm: bool | Literal["none", "head", "width"] = False
    attention_bias: bool | Literal["none", "qkv", "all"] = False
    mlp_bias: bool = False
    layer_types: tuple[str, ...] | None = None
    sliding_window: int | None = None
    sliding_rope_theta: float | None = None
    conv_size: int = 0
    prefix: Literal["none", "media", "prompt"] = "none"
    encoder_layers: int = 0
    attention_backend: AttentionBackend = "auto"
    tie_word_embeddings: bool = True
    dropout: float = 0.0
    gradient_checkpointing: bool | Recompute = "none"
    num_base_ids: int = 0

    def __post_init__(self) -> None:
        for name in ("moe_layers", "mod_layers", "layer_types", "no_rope_layers"):  # lists, as YAML and JSON give them
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
        self._check_rotary()
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
        self._check_encoder()

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
        if not self.num_base_ids >= 0 or (self.vocab_size and self.num_base_ids > self.vocab_size):
            raise ValueError(
                f"decoder.num_base_ids is {self.num_base_ids} and vocab_size {self.vocab_size}; give the ids of the "
                f"checkpoint that was imported, or 0"
            )
        for key in ("rope_theta", "sliding_rope_theta"):
            value = getattr(self, key)
            if value is not None and not (math.isfinite(value) and value > 1):
                raise ValueError(f"decoder.{key} is {value}; give a number above 1, such as 10000")
        if not (math.isfinite(self.rms_norm_eps) and self.rms_norm_eps > 0):
            raise ValueError(f"decoder.rms_norm_eps is {self.rms_norm_eps}; give a small positive number, such as 1e-5")
        if self.conv_size < 0 or self.conv_size == 1:
            raise ValueError(
                f"decoder.conv_size is {self.conv_size}; give the number of tokens that are mixed, 2 or more (such "
                f"as 4), or 0 for none"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"decoder.dropout is {self.dropout}; it must be at least 0 and below 1")

    def _check_rotary(self) -> None:
        factor = self.partial_rotary_factor
        if not 0 < factor <= 1:
            raise ValueError(f"decoder.partial_rotary_factor is {factor}; it must be above 0 and at most 1")
        channels = int(self.head_channels * factor)
        if channels < 2 or channels % 2:
            raise ValueError(
                f"decoder.partial_rotary_factor is {factor}, which turns {channels} of {self.head_channels} channels; "
                f"wanted an even number of at least 2"
            )
        layers = self.no_rope_layers
        if layers is not None and (len(layers) != self.num_hidden_layers or not set(layers) <= {0, 1}):
            raise ValueError(
                f"decoder.no_rope_layers is {list(layers)}; give 1 (positions) or 0 (none) for each of the "
                f"{self.num_hidden_layers} layers"
            )

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
        if self.mod_router not in ("learned", "random"):
            raise ValueError(f"decoder.mod_router is {self.mod_router!r}; choose learned or random")
        if not (math.isfinite(self.mod_predictor_coef) and self.mod_predictor_coef >= 0):
            raise ValueError(f"decoder.mod_predictor_coef is {self.mod_predictor_coef}; it must be finite, 0 or more")
        if self.mod_layers and self.conv_size:
            raise ValueError(
                f"decoder.conv_size is {self.conv_size} and mod_layers {list(self.mod_layers)}; what stands before a "
                f"token would be another one where some are skipped: leave one of them out"
            )
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

    def _check_encoder(self) -> None:
        count = self.encoder_layers
        if not count:
            return
        if not 0 < count < self.num_hidden_layers:
            raise ValueError(
                f"decoder.encoder_layers is {count} of {self.num_hidden_layers} layers; give fewer, so that some are "
                f"left to the decoder, or 0 for none"
            )
        moe = self.moe or MoEConfig(router_aux_loss_coef=0.0)
        for key, is_there, instead in (
            ("prefix", self.prefix != "none", "the encoder sees all of the prompt in both directions: set it to none"),
            ("mod_layers", bool(self.mod_layers), "who skips a block is chosen of whole documents: leave it out"),
            ("attention_backend", self.attention_backend == "varlen", "its kernel is causal: set it to flex or auto"),
            ("moe.aux_loss_scope", moe.aux_loss_scope != "layer", "layers have different tokens: set it to layer"),
            ("moe.local_entropy_loss_coef", moe.local_entropy_loss_coef, "layers have different tokens: set it to 0"),
            ("moe.global_entropy_loss_coef", moe.global_entropy_loss_coef, "layers have different tokens: set it to 0"),
        ):
            if is_there:
                value = operator.attrgetter(key)(self)
                raise ValueError(f"decoder.{key} is {value!r}, and encoder_layers {count}; {instead}")

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

    def rotary_channels(self, layer: int) -> int:
        """How many channels of a head positions turn in a layer, the first ones; 0: none."""
        if self.no_rope_layers is not None and not self.no_rope_layers[layer]:
            return 0
        return int(self.head_channels * self.partial_rotary_factor)

    def rule(self, layer: int) -> MaskRule:
        """What a layer's queries see."""
        has_spans = self.prefix != "none" or layer < self.encoder_layers
        return MaskRule(self.sliding_window if self.is_sliding(layer) else None, has_spans)

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
