"""Mixture of depths (arXiv 2404.02258): blocks that only some tokens of a document pass; the others skip them.

In training those with the largest weights pass, ceil(C · length) of each document: which they are depends on tokens
that come later. So a predictor learns, from the token alone, whether it will be among them, and it alone decides
wherever the model is not trained: in validation, in scoring, and with a cache. All tokens are computed there, and the
keys and changes of those that don't pass left out, since how many pass is known to the device alone.

The published control is a random choice of as many tokens. There nothing is predicted: in training the choice is drawn
anew at every step, and elsewhere a hash of layer and position lets a share C pass, so that a cache gives the same.

Shapes: Q tokens of the whole batch (`mmllm.sequences`), P of them that pass a block, D width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.model.attend import PackedContext
from mmllm.model.masks import MaskRule
from mmllm.model.roles import mark, mark_all
from mmllm.model.router import TokenInfo
from mmllm.model.row_cache import LayerOfStep
from mmllm.sequences import SequenceMetadata

PREDICTOR_SHARE = 4
"""The predictor's inner width is the model's divided by it."""

Choice = Literal["learned", "random"]
"""What decides who passes: the router's weights, or chance."""
Angles = tuple[Tensor, Tensor]
Run = Callable[[Tensor, Angles, PackedContext | LayerOfStep], Tensor]
"""A block's own computation: tokens, their cosines and sines, and what they attend to, to the new residual stream."""


def num_passing(length: int, capacity: float) -> int:
    """How many tokens of a document pass: ceil(C · length), at least one."""
    return max(1, math.ceil(capacity * length - 1e-9))  # 0.1 · 30 is a little more than 3


def passes_by_position(positions_Q: Tensor, layer: int, capacity: float) -> Tensor:
    """Bools [Q]: a share C of all positions, without order, others in every layer.

    By two rounds of multiplying and shifting, which mix 32 bits; nothing overflows, so that every device agrees.
    """
    bits_Q = (positions_Q + 1 + 0x9E3779B1 * (layer + 1)) & 0xFFFFFFFF
    for _ in range(2):
        bits_Q = ((bits_Q ^ (bits_Q >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return (bits_Q ^ (bits_Q >> 16)) < round(capacity * 2**32)


@dataclass(frozen=True)
class DepthLayout:
    """Where the tokens that pass will be, which the host knows before the device knows which they are."""

    picked_P: Tensor
    """int64: places of those that pass among all tokens, ordered by document and falling weight."""
    documents_Q: Tensor
    """int64: the document of each token."""
    sequences: SequenceMetadata
    """The documents of those that pass alone."""

    @staticmethod
    def of(sequences: SequenceMetadata, documents_Q: Tensor, capacity: float) -> DepthLayout:
        """For a batch and a capacity; copies what the host computes to the device, and waits for nothing.

        Args:
            sequences: all documents, filler included.
            documents_Q: the document of each token.
            capacity: C.
        """
        lengths = tuple(num_passing(length, capacity) for length in sequences.lengths)
        starts = itertools.accumulate(sequences.lengths, initial=0)
        places = [range(start, start + count) for start, count in zip(starts, lengths, strict=False)]
        picked_P = torch.tensor([*itertools.chain.from_iterable(places)], dtype=torch.int64)
        picked_P = picked_P.to(documents_Q.device, non_blocking=True)
        return DepthLayout(picked_P, documents_Q, SequenceMetadata.of_lengths(lengths, picked_P))

    def chosen(self, weights_Q: Tensor) -> Tensor:
        """The tokens of each document with the largest weights (of equal ones the first), in order, int64 [P]."""
        order_Q = weights_Q.argsort(descending=True, stable=True)
        order_Q = order_Q[self.documents_Q[order_Q].argsort(stable=True)]
        return order_Q[self.picked_P].sort().values

    def context(self, whole: PackedContext, chosen_P: Tensor, rule: MaskRule) -> PackedContext:
        """What those that pass attend to: one another, by their order in the document."""
        spans_P = None if whole.spans_Q is None else whole.spans_Q.index_select(0, chosen_P)
        context = PackedContext(self.sequences, whole.backend, spans_P)
        context.prepare(rule)
        return context


class DepthSums(NamedTuple):
    """One block's predictor, over real tokens; see `DepthStats`."""

    loss_sum: Tensor
    num_right: Tensor
    num_passed: Tensor


@dataclass
class DepthStats:
    """How the predictors of a mixture of depths did, in sums over real tokens, so that ranks can be added."""

    layers: tuple[int, ...]
    num_tokens: int
    loss_sums_L: Tensor
    """Differentiable: binary cross-entropy of a token's being among those with the largest weights."""
    num_right_L: Tensor
    """int64: tokens of which the predictor said so rightly."""
    num_passed_L: Tensor
    """int64: tokens that passed the block, by weight in training, by the predictor otherwise."""

    @staticmethod
    def of(by_layer: dict[int, DepthSums], num_tokens: int) -> DepthStats | None:
        """Puts the blocks' sums together; None without any."""
        if not by_layer:
            return None
        columns = [torch.stack(column) for column in zip(*by_layer.values(), strict=True)]
        return DepthStats(tuple(by_layer), num_tokens, *columns)

    def loss(self, num_tokens: int | Tensor) -> Tensor:
        """The mean over blocks and tokens.

        Args:
            num_tokens: of all ranks: their losses then add up to that of one process.
        """
        count = num_tokens.clamp(min=1) if isinstance(num_tokens, Tensor) else max(num_tokens, 1)
        return self.loss_sums_L.mean() / count


class DepthRouter(nn.Module):
    """Lets some tokens pass a block: x' = x + r · f(x), with r = wᵀx and f what the block adds; the rest stays.

    Args:
        width: D.
        layer: of the block; a random choice differs by it.
        capacity: C; of a random choice where nothing is trained.
        choice: who passes. With "random" r is learned all the same, so that the choice alone differs; in the paper's
            control the weights themselves are drawn (from a Gaussian).
    """

    def __init__(self, width: int, layer: int, capacity: float, choice: Choice = "learned"):
        super().__init__()
        self.layer, self.capacity = layer, capacity
        self.router = nn.Linear(width, 1, bias=False)
        mark(self.router, weight="head")
        self.predictor: nn.Sequential | None = None
        if choice == "learned":
            inner = max(1, width // PREDICTOR_SHARE)
            self.predictor = nn.Sequential(nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, 1))
            mark_all(self.predictor, "head")

    def weights(self, x_QD: Tensor) -> Tensor:
        """The r of each token, float32 or wider, also under autocast."""
        weight_1D = self.router.weight
        dtype = torch.promote_types(torch.promote_types(x_QD.dtype, weight_1D.dtype), torch.float32)
        with torch.autocast(x_QD.device.type, enabled=False):
            return F.linear(x_QD.to(dtype), weight_1D.to(dtype))[:, 0]

    def predictions(self, x_QD: Tensor) -> Tensor | None:
        """Logit of a token's passing, from itself alone; its gradient ends here. None: the choice is random."""
        if self.predictor is None:
            return None
        normed_QD = F.rms_norm(x_QD.detach(), x_QD.shape[-1:])
        return self.predictor(normed_QD)[:, 0]

    def forward(
        self,
        x_QD: Tensor,
        angles: Angles,
        context: PackedContext | LayerOfStep,
        layout: DepthLayout | None,
        tokens: TokenInfo,
        rule: MaskRule,
        run: Run,
    ) -> tuple[Tensor, DepthSums | None]:
        """The new residual stream of all tokens, and the predictor's sums where there is one.

        Args:
            x_QD: the residual stream.
            angles: rotary cosines and sines; a token keeps those of its place, whoever passes.
            context: the batch's documents, or the layer's cache.
            layout: of the documents; None with a cache.
            tokens: says which are filler, and the positions for a random choice.
            rule: what the block's queries see.
            run: the block.
        """
        weights_Q, logits_Q = self.weights(x_QD), self.predictions(x_QD)
        if isinstance(context, LayerOfStep):
            passes_Q = self._passes(logits_Q, tokens)
            context.hide(passes_Q)
            return _moved(x_QD, run(x_QD, angles, context), weights_Q, passes_Q), None
        assert layout is not None, "packed documents have a layout"
        if self.training:
            chosen_P = layout.chosen(torch.rand_like(weights_Q) if logits_Q is None else weights_Q.detach())
            sums = None if logits_Q is None else _sums(logits_Q, chosen_P, None, tokens.is_real_N)
            x_PD = x_QD.index_select(0, chosen_P)
            cos_P, sin_P = (each.index_select(0, chosen_P) for each in angles)
            new_PD = run(x_PD, (cos_P, sin_P), layout.context(context, chosen_P, rule))
            weights_P1 = weights_Q.index_select(0, chosen_P)[:, None].to(x_PD.dtype)
            return x_QD.index_copy(0, chosen_P, torch.lerp(x_PD, new_PD.to(x_PD.dtype), weights_P1)), sums
        passes_Q = self._passes(logits_Q, tokens)
        sums = None
        if logits_Q is not None:
            sums = _sums(logits_Q, layout.chosen(weights_Q.detach()), passes_Q, tokens.is_real_N)
        hidden = context.with_keys(passes_Q)
        hidden.prepare(rule)
        return _moved(x_QD, run(x_QD, angles, hidden), weights_Q, passes_Q), sums

    def _passes(self, logits_Q: Tensor | None, tokens: TokenInfo) -> Tensor:
        """Bools [Q], who passes where nothing is trained: that depends on no token that comes later."""
        if logits_Q is not None:
            return logits_Q > 0
        assert tokens.positions_N is not None, "a random choice goes by positions"
        return passes_by_position(tokens.positions_N, self.layer, self.capacity)


def _moved(x_QD: Tensor, new_QD: Tensor, weights_Q: Tensor, passes_Q: Tensor) -> Tensor:
    """Each token's part of the way that its weight says; none for those that don't pass."""
    gates_Q1 = torch.where(passes_Q, weights_Q, 0.0)[:, None].to(x_QD.dtype)
    return torch.lerp(x_QD, new_QD.to(x_QD.dtype), gates_Q1)


def _sums(logits_Q: Tensor, chosen_P: Tensor, passes_Q: Tensor | None, is_real_Q: Tensor | None) -> DepthSums:
    """Of a predictor; `passes_Q` None: those pass that have the largest weights."""
    wide_Q = logits_Q.to(torch.promote_types(logits_Q.dtype, torch.float32))
    is_chosen_Q = torch.zeros_like(logits_Q, dtype=torch.bool).index_fill(0, chosen_P, True)
    passes_Q = is_chosen_Q if passes_Q is None else passes_Q
    losses_Q = F.binary_cross_entropy_with_logits(wide_Q, is_chosen_Q.to(wide_Q.dtype), reduction="none")
    is_right_Q = (logits_Q > 0) == is_chosen_Q
    if is_real_Q is not None:
        losses_Q, is_right_Q, passes_Q = losses_Q * is_real_Q, is_right_Q & is_real_Q, passes_Q & is_real_Q
    return DepthSums(losses_Q.sum(), is_right_Q.sum(), passes_Q.sum())
