"""What a forward pass did with the experts, as sums: for the router's losses and for reports.

Shapes: N tokens of the whole batch (padding removed), E experts, K experts a token, L layers with experts,
M modalities, B sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm.batch import Modality
from mmllm.model.depth import DepthStats
from mmllm.model.router import MoEConfig, Routing, TokenInfo


class LayerSums(NamedTuple):
    """One layer's part of `RoutingStats`."""

    counts_E: Tensor
    probability_sums_E: Tensor
    z_sum: Tensor
    counts_ME: Tensor | None
    entropy_sums_M: Tensor | None
    probability_sums_ME: Tensor | None
    counts_BE: Tensor | None
    probability_sums_BE: Tensor | None


def layer_sums(routing: Routing, tokens: TokenInfo, config: MoEConfig) -> LayerSums:
    """The sums of one layer. Made inside it, so that [N, E] need not outlive a block that is checkpointed."""
    logits_NE, experts_NK = routing.logits_NE, routing.experts_NK
    with torch.autocast(logits_NE.device.type, enabled=False):
        if config.scoring_func == "softmax":
            probs_NE = logits_NE.softmax(dim=-1)
        else:
            probs_NE = F.normalize(logits_NE.sigmoid(), p=1.0, dim=-1)
        z_N = logits_NE.logsumexp(dim=-1).square()
        if tokens.is_real_N is not None:
            probs_NE = probs_NE * tokens.is_real_N[:, None]
            z_N = z_N * tokens.is_real_N
        counts_ME = entropy_sums_M = probability_sums_ME = counts_BE = probability_sums_BE = None
        if tokens.modality_N is not None:
            counts_ME = _count(experts_NK, tokens.modality_N, len(Modality), tokens.is_real_N, config.num_experts)
            counts_E = counts_ME.sum(dim=0)
            with torch.set_grad_enabled(torch.is_grad_enabled() and config.local_entropy_loss_coef > 0):
                entropy_N = -(probs_NE * probs_NE.clamp(min=torch.finfo(probs_NE.dtype).tiny).log()).sum(dim=-1)
                entropy_sums_M = _sums_by(entropy_N[:, None], tokens.modality_N, len(Modality))[:, 0]
            if config.global_entropy_loss_coef > 0:
                probability_sums_ME = _sums_by(probs_NE, tokens.modality_N, len(Modality))
        else:
            counts_E = _count(experts_NK, torch.zeros_like(experts_NK[:, 0]), 1, tokens.is_real_N, config.num_experts)[
                0
            ]
        if config.counts_by_sequence and tokens.sequence_N is not None:
            sequence_N, num_sequences = tokens.sequence_N, tokens.num_sequences
            counts_BE = _count(experts_NK, sequence_N, num_sequences, tokens.is_real_N, config.num_experts)
            probability_sums_BE = _sums_by(probs_NE, sequence_N, num_sequences)
        return LayerSums(
            counts_E, probs_NE.sum(dim=0), z_N.sum(), counts_ME, entropy_sums_M, probability_sums_ME,
            counts_BE, probability_sums_BE,
        )  # fmt: skip


def _count(
    experts_NK: Tensor, bucket_N: Tensor, num_buckets: int, is_real_N: Tensor | None, num_experts: int
) -> Tensor:
    """How often each expert was chosen from each bucket, int64 [buckets, E]; dropped choices are in none."""
    is_counted_NK = experts_NK >= 0
    if is_real_N is not None:
        is_counted_NK = is_counted_NK & is_real_N[:, None]
    nowhere = num_buckets * num_experts
    place_NK = torch.where(is_counted_NK, bucket_N[:, None] * num_experts + experts_NK, nowhere)
    counts = experts_NK.new_zeros(nowhere + 1)
    counts = counts.scatter_add(0, place_NK.flatten(), torch.ones_like(place_NK).flatten())
    return counts[:nowhere].view(num_buckets, num_experts)


def _sums_by(values_NE: Tensor, bucket_N: Tensor, num_buckets: int) -> Tensor:
    """Sums over each bucket's tokens [buckets, E]: a product, since adding to places at random has no fixed order."""
    return _one_hot(bucket_N, num_buckets).T.to(values_NE.dtype) @ values_NE


def _one_hot(bucket_N: Tensor, num_buckets: int) -> Tensor:
    """Bool [N, buckets]; `F.one_hot` asks for the largest value."""
    return bucket_N[:, None] == torch.arange(num_buckets, device=bucket_N.device)


@dataclass
class RoutingStats:
    """Routing of one forward pass, padding left out. Sums, not means, so that ranks can be added.

    A choice is a (token, expert) pair; those that `expert_dropout` dropped are in no count. "Differentiable" are sums
    with a gradient to the router; of the others some are made only where the config has a use for them.
    """

    layers: tuple[int, ...]
    """Which decoder layers the L rows are."""
    top_k: int
    num_tokens: int
    counts_LE: Tensor
    """int64: choices."""
    probability_sums_LE: Tensor
    """Differentiable: the router's probabilities (of sigmoids: divided by their sum) summed over tokens."""
    z_sums_L: Tensor
    """Differentiable: logsumexp(router logits)² summed over tokens."""
    counts_LME: Tensor | None = None
    """int64, by modality; None unless `modality_BT` was given."""
    tokens_M: Tensor | None = None
    """int64: tokens of each modality; None unless `modality_BT` was given."""
    entropy_sums_LM: Tensor | None = None
    """Entropy of a token's probabilities in nats, summed by modality; differentiable with `local_entropy_loss_coef`;
    None unless `modality_BT` was given."""
    probability_sums_LME: Tensor | None = None
    """Differentiable; None without `global_entropy_loss_coef`."""
    counts_LBE: Tensor | None = None
    """int64, by sequence; None unless `aux_loss_scope` is sequence."""
    probability_sums_LBE: Tensor | None = None
    """Differentiable; None unless `aux_loss_scope` is sequence."""
    tokens_B: Tensor | None = None
    """int64: tokens of each sequence; None unless `aux_loss_scope` is sequence."""
    tokens_L: Tensor | None = None
    """int64: tokens of each layer, where not all pass all layers (an encoder and a decoder); else None."""
    depth: DepthStats | None = None
    """Of the blocks that only some tokens pass; None without any."""

    @staticmethod
    def of(
        config: MoEConfig | None, by_layer: dict[int, LayerSums], tokens: TokenInfo, num_tokens: int, like: Tensor
    ) -> RoutingStats:
        """Puts the layers' sums together.

        Args:
            config: of the experts; None: there are none.
            by_layer: by index in the decoder; may be empty.
            tokens: as the layers had them.
            num_tokens: real ones.
            like: of the device and dtype of the hidden states.
        """
        if config is None or not by_layer:
            empty = like.new_zeros(0, 0)
            return RoutingStats((), 1, num_tokens, empty.long(), empty, like.new_zeros(0))
        columns = [_stacked(column) for column in zip(*by_layer.values(), strict=True)]
        sums = LayerSums(*columns)  # pyright: ignore[reportArgumentType]
        has_sequences = sums.counts_BE is not None
        return RoutingStats(
            layers=tuple(by_layer),
            top_k=config.num_experts_per_tok,
            num_tokens=num_tokens,
            counts_LE=sums.counts_E,
            probability_sums_LE=sums.probability_sums_E,
            z_sums_L=sums.z_sum,
            counts_LME=sums.counts_ME,
            tokens_M=_tokens_by(tokens.modality_N, len(Modality), tokens.is_real_N),
            entropy_sums_LM=sums.entropy_sums_M,
            probability_sums_LME=sums.probability_sums_ME,
            counts_LBE=sums.counts_BE,
            probability_sums_LBE=sums.probability_sums_BE,
            tokens_B=_tokens_by(tokens.sequence_N if has_sequences else None, tokens.num_sequences, tokens.is_real_N),
        )


def _stacked(column: Sequence[Tensor | None]) -> Tensor | None:
    present = [value for value in column if value is not None]
    assert len(present) in (0, len(column)), "layers of one model make the same sums"
    return torch.stack(present) if present else None


def _tokens_by(bucket_N: Tensor | None, num_buckets: int, is_real_N: Tensor | None) -> Tensor | None:
    if bucket_N is None:
        return None
    is_in_NB = _one_hot(bucket_N, num_buckets)
    return (is_in_NB if is_real_N is None else is_in_NB & is_real_N[:, None]).sum(dim=0)


class RoutingWindow:
    """Detached counts of several batches, on the device until somebody reads them."""

    def __init__(self) -> None:
        self.layers: tuple[int, ...] = ()
        self.counts_LME: Tensor | None = None
        self.entropy_sums_LM: Tensor | None = None
        self.tokens_M: Tensor | None = None

    @torch.no_grad()
    def add(self, stats: RoutingStats) -> None:
        """Adds one batch; nothing without experts, or where modalities were not given."""
        if not stats.layers or stats.counts_LME is None or stats.entropy_sums_LM is None or stats.tokens_M is None:
            return
        self.layers = stats.layers
        new = (stats.counts_LME, stats.entropy_sums_LM.detach().double(), stats.tokens_M)
        if self.counts_LME is None or self.entropy_sums_LM is None or self.tokens_M is None:
            self.counts_LME, self.entropy_sums_LM, self.tokens_M = new
        else:  # not in place: what `take` gave may still be read
            old = (self.counts_LME, self.entropy_sums_LM, self.tokens_M)
            self.counts_LME, self.entropy_sums_LM, self.tokens_M = (a + b for a, b in zip(old, new, strict=True))

    def take(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """`counts_LME`, `entropy_sums_LM` and `tokens_M` since the last call; None: nothing was added."""
        if self.counts_LME is None or self.entropy_sums_LM is None or self.tokens_M is None:
            return None
        taken = (self.counts_LME, self.entropy_sums_LM, self.tokens_M)
        self.counts_LME = self.entropy_sums_LM = self.tokens_M = None
        return taken
