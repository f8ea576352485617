"""`attend(q, k, v, context, …)`: attention over packed documents or a cache, by one of several backends.

What a query sees is said by a `MaskRule`, the documents by a context; the backends compute the same. `dense` is the
definition of correct: every other one is tested against it.

Shapes: Q tokens of the whole batch (see `mmllm.sequences`), H query heads, G key-value heads, C channels a head, D
documents of a block, L their padded length, P rows of all blocks.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm.model import cpu
from mmllm.model.masks import MaskRule, visible
from mmllm.sequences import SequenceMetadata

AttentionBackend = Literal["auto", "buckets", "varlen", "flex", "dense"]
HALF = (torch.bfloat16, torch.float16)


class PackedContext:
    """The documents of one batch, and what a backend makes of them once for all layers.

    Args:
        sequences: where the documents are.
        backend: by name; "auto" is length buckets on a CPU and in float32, otherwise torch's varlen kernel, or
            FlexAttention where a rule has spans.
        spans_Q: int, the bidirectional span that each token belongs to, -1 none, for rules with `spans`; a span lies in
            one document, and no two spans of it have the same number.
        dtype: in which attention will be computed, for "auto".
    """

    def __init__(
        self,
        sequences: SequenceMetadata,
        backend: AttentionBackend = "auto",
        spans_Q: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        device = sequences.tokens_Q.device
        if backend == "auto":
            backend = "buckets"
            if device.type == "cuda" and dtype in HALF:
                backend = "varlen" if spans_Q is None else "flex"
        check_backend(backend, spans_Q is not None)
        self.backend: AttentionBackend = backend
        self.sequences = sequences
        self.spans_Q = spans_Q
        self.keys_Q: Tensor | None = None
        # Few different values, since compilers know it as a constant: the kernel only bounds its grid by it.
        self.max_seqlen = max(128, 1 << (sequences.max_seqlen - 1).bit_length())
        self._made: dict[MaskRule, Any] = {}

    def with_keys(self, keys_Q: Tensor) -> PackedContext:
        """The same documents, of which only some tokens are seen by others.

        Args:
            keys_Q: bool; a token that is False is seen by itself alone. The device knows which these are, so
                FlexAttention stands in for torch's varlen kernel, which would need their number.
        """
        backend: AttentionBackend = "flex" if self.backend == "varlen" else self.backend
        context = PackedContext(self.sequences, backend, self.spans_Q)
        context.keys_Q = keys_Q
        return context

    def prepare(self, rule: MaskRule) -> None:
        """Makes what the backend needs for a rule: outside of compiled blocks, once for all layers that have it."""
        if rule not in self._made:
            made = {"flex": self._flex_mask, "dense": self._dense_mask, "buckets": self._block_masks}.get(self.backend)
            self._made[rule] = None if made is None else made(rule)

    def made(self, rule: MaskRule) -> Any:
        """What `prepare` made: a mask of the backend's own kind, or None."""
        return self._made[rule]

    def documents_Q(self) -> Tensor:
        """The number of each token's document."""
        sequences = self.sequences
        tokens_Q = torch.arange(sequences.size, device=sequences.cu_seqlens.device)
        return torch.bucketize(tokens_Q, sequences.cu_seqlens[1:].long(), right=True)

    def _dense_mask(self, rule: MaskRule) -> Tensor:
        documents_Q = self.documents_Q()
        at_Q = torch.arange(len(documents_Q), device=documents_Q.device)
        seen_QQ = visible(rule, at_Q[:, None], at_Q, *_pairs(self.spans_Q))
        if self.keys_Q is not None:
            seen_QQ = seen_QQ & (self.keys_Q | (at_Q[:, None] == at_Q))
        return seen_QQ & (documents_Q[:, None] == documents_Q)

    def _flex_mask(self, rule: MaskRule) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        documents_Q, spans_Q, keys_Q = self.documents_Q(), self.spans_Q, self.keys_Q

        def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            spans = (None, None) if spans_Q is None else (spans_Q[query], spans_Q[key])
            seen = visible(rule, query, key, *spans) & (documents_Q[query] == documents_Q[key])
            return seen if keys_Q is None else seen & (keys_Q[key] | (query == key))

        size = self.sequences.size
        # Compiled, it never holds all pairs of tokens at once.
        is_cuda = documents_Q.is_cuda
        return create_block_mask(seen, None, None, size, size, device=str(documents_Q.device), _compile=is_cuda)

    def _block_masks(self, rule: MaskRule) -> list[Tensor | None]:
        """A mask [D, 1, L, L] or [L, L] of each block; None where causal attention is all."""
        spans_P = self._of_rows(self.spans_Q.long(), -1) if rule.spans and self.spans_Q is not None else None
        keys_P = None if self.keys_Q is None else self._of_rows(self.keys_Q, False)
        masks: list[Tensor | None] = []
        start = 0
        for count, length in self.sequences.blocks:
            rows, shape = slice(start, start + count * length), (count, length)
            at_L = torch.arange(length, device=self.sequences.tokens_Q.device)
            mask = None
            if spans_P is not None:
                spans_DL = spans_P[rows].view(shape)
                mask = visible(rule, at_L[:, None], at_L, spans_DL[:, :, None], spans_DL[:, None])[:, None]
            elif keys_P is not None or (rule.window is not None and rule.window < length):
                mask = visible(rule, at_L[:, None], at_L)
            if keys_P is not None and mask is not None:
                mask = mask & (keys_P[rows].view(shape)[:, None, None] | (at_L[:, None] == at_L))
            masks.append(mask)
            start += count * length
        return masks

    def _of_rows(self, values_Q: Tensor, padding: int | bool) -> Tensor:
        """What each token has, for each row of the blocks."""
        values_P = values_Q.new_full(self.sequences.gather_P.shape, padding)
        return values_P.index_copy(0, self.sequences.scatter_Q, values_Q)


def check_backend(backend: str, has_spans: bool) -> None:
    """Raises ValueError for an unknown backend, or one that doesn't know bidirectional spans where there are some."""
    if backend not in get_args(AttentionBackend):
        choices = ", ".join(get_args(AttentionBackend))
        raise ValueError(f"decoder.attention_backend is {backend!r}; choose one of {choices}")
    if backend == "varlen" and has_spans:
        raise ValueError(
            "decoder.attention_backend is 'varlen', whose kernel knows causal attention and windows alone, and "
            "decoder.prefix asks for more; set attention_backend to flex or auto, or prefix to none"
        )


@dataclass(frozen=True)
class _Call:
    q_QHC: Tensor
    k_QGC: Tensor
    v_QGC: Tensor
    context: PackedContext
    rule: MaskRule


class LayerContext(Protocol):
    """One layer's attention that isn't over the packed batch alone: over a cache, or behind a learned prefix."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rule: MaskRule, /) -> Tensor:
        """As the function `attend`."""
        ...


def attend(
    q_QHC: Tensor, k_QGC: Tensor, v_QGC: Tensor, context: PackedContext | LayerContext, rule: MaskRule
) -> Tensor:
    """Attention of each token to those of its own document that the rule lets it see.

    Args:
        q_QHC: queries, rotated.
        k_QGC: keys, rotated; G divides H.
        v_QGC: values.
        context: the documents, prepared for the rule; or a layer of a cache, to which keys and values are appended, or
            of a batch with a learned prefix.
        rule: what a query sees.

    Returns:
        [Q, H·C].
    """
    if not isinstance(context, PackedContext):
        return context.attend(q_QHC, k_QGC, v_QGC, rule)
    return _BACKENDS[context.backend](_Call(q_QHC, k_QGC, v_QGC, context, rule))


def _dense(call: _Call) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (call.q_QHC, call.k_QGC, call.v_QGC))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=call.context.made(call.rule), enable_gqa=_shares(q, k))
    return out[0].transpose(0, 1).flatten(1)


def _buckets(call: _Call) -> Tensor:
    sequences, (num_heads, channels) = call.context.sequences, call.q_QHC.shape[1:]
    if not sequences.blocks:
        return call.q_QHC.flatten(1)
    rows = [
        cpu.gather_rows(x.flatten(1), sequences.gather_P, sequences.scatter_Q)
        for x in (call.q_QHC, call.k_QGC, call.v_QGC)
    ]
    sizes = [count * length for count, length in sequences.blocks]
    masks = call.context.made(call.rule)
    outputs = []
    for *parts, mask, (count, length) in zip(*(x.split(sizes) for x in rows), masks, sequences.blocks, strict=True):
        q, k, v = (part.view(count, length, -1, channels).transpose(1, 2) for part in parts)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=_shares(q, k))
        outputs.append(out.transpose(1, 2).reshape(count * length, num_heads * channels))
    return cpu.scatter_rows(outputs[0] if len(outputs) == 1 else torch.cat(outputs), sequences.scatter_Q)


def _varlen(call: _Call) -> Tensor:
    attention, settings = _varlen_settings(call.rule.window)
    q, k, v = call.q_QHC, call.k_QGC, call.v_QGC
    if q.dtype not in HALF:
        raise ValueError(
            f"decoder.attention_backend 'varlen' got {q.dtype}; its kernel takes bfloat16 and float16: set "
            f"trainer.precision to bf16-mixed, or attention_backend to auto"
        )
    if _shares(q, k) and not settings.get("enable_gqa"):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    starts, longest = call.context.sequences.cu_seqlens, call.context.max_seqlen
    return attention(q, k, v, starts, starts, longest, longest, **settings).flatten(1)


@functools.cache
def _varlen_settings(window: int | None) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    """Torch's kernel and its arguments for causal attention: they differ between versions."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    settings: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}
    if "window_size" in known:
        settings["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None:
        settings["is_causal"] = True
    else:
        raise ValueError(
            f"decoder.sliding_window is {window}, which torch {torch.__version__}'s varlen kernel does not know; set "
            f"attention_backend to flex, or take a newer torch"
        )
    return varlen_attn, settings  # pyright: ignore[reportReturnType]


def _flex(call: _Call) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (call.q_QHC, call.k_QGC, call.v_QGC))
    mask, shares = call.context.made(call.rule), _shares(q, k)
    try:
        with warnings.catch_warnings():  # on a CPU it says that it is not fused
            warnings.simplefilter("ignore", UserWarning)
            out = _flex_attention(q.is_cuda)(q, k, v, block_mask=mask, enable_gqa=shares)
    except NotImplementedError as error:
        raise ValueError(
            f"decoder.attention_backend is 'flex', which has no gradient on {q.device.type}; set it to buckets or auto"
        ) from error
    return out[0].transpose(0, 1).flatten(1)


@functools.cache
def _flex_attention(is_compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if is_compiled else flex_attention  # pyright: ignore[reportReturnType]


_BACKENDS: dict[str, Callable[[_Call], Tensor]] = {
    "dense": _dense,
    "buckets": _buckets,
    "varlen": _varlen,
    "flex": _flex,
}


def _shares(q: Tensor, k: Tensor) -> bool:
    """Whether several query heads share a key-value head; both tensors have heads in dimension -3 or 1."""
    dim = 1 if q.ndim == 3 else -3
    return q.shape[dim] != k.shape[dim]


def _pairs(spans_Q: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if spans_Q is None else (spans_Q[:, None], spans_Q)
