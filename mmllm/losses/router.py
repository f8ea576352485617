"""Losses of routers, from sums over tokens, so that ranks can be added.

Each function takes this rank's sums (differentiable) and, where a loss is no sum over tokens, the sums of all ranks
(detached): the ranks' values and gradients then add up to those of one process with all their tokens.

Shapes: N tokens, L layers with experts, E experts, G groups of tokens (sequences, or modalities).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

BalanceScope = Literal["layer", "global"]
"""layer: each layer's experts are balanced; the mean over layers.
global: counts and probabilities are taken over all layers together, as transformers does; one collapsed layer hides
behind the others."""


def balance_losses(counts_E: Tensor, probability_sums_E: Tensor, num_tokens: int | Tensor, top_k: int) -> Tensor:
    """E · Σᵢ fᵢ Pᵢ: 1 at perfect balance, E / top_k at most (Switch, arXiv 2101.03961).

    fᵢ is expert i's share of (token, choice) pairs, Pᵢ its mean probability. (transformers' loss leaves the division by
    top_k out.) 0 where there are no tokens.

    Args:
        counts_E: [..., E] (token, choice) pairs, of all ranks.
        probability_sums_E: [..., E] the router's probabilities summed over this rank's tokens.
        num_tokens: of all ranks; a scalar, or as many as the other dimensions have.
        top_k: experts a token.
    """
    pairs_E = counts_E.to(probability_sums_E.dtype) * probability_sums_E
    return counts_E.shape[-1] * pairs_E.sum(dim=-1) / (_at_least_one(num_tokens, pairs_E) ** 2 * top_k)


def balance_loss(
    counts_LE: Tensor,
    probability_sums_LE: Tensor,
    num_tokens: int | Tensor,
    top_k: int,
    scope: BalanceScope = "layer",
) -> Tensor:
    """The balance loss over layers, a scalar: 1 at perfect balance, 0 without layers. See `balance_losses`.

    With the counts of all ranks the balance is that of the global batch, not of each rank's (arXiv 2501.11873).

    Raises:
        ValueError: the scope is unknown.
    """
    if scope not in ("layer", "global"):
        raise ValueError(f"scope of the balance loss is {scope!r}; choose layer or global")
    num_layers = len(counts_LE)
    if not num_layers:
        return probability_sums_LE.sum() * 0.0
    if scope == "layer":
        return balance_losses(counts_LE, probability_sums_LE, num_tokens, top_k).mean()
    return balance_losses(counts_LE.sum(dim=0), probability_sums_LE.sum(dim=0), num_layers * num_tokens, top_k)


def sequence_balance_loss(
    counts_LGE: Tensor, probability_sums_LGE: Tensor, num_tokens_G: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """Balance within each sequence, and how many sequences have tokens (DeepSeek-V3, arXiv 2412.19437, (17)–(20)).

    Of each layer and sequence E · Σᵢ fᵢ Pᵢ with the sequence's own counts; summed over sequences, and its mean over
    layers. A sequence lies on one rank, so that sums and counts of ranks are simply added.

    Args:
        counts_LGE: (token, choice) pairs of each sequence.
        probability_sums_LGE: probabilities summed over its tokens. (DeepSeek-V3 takes sigmoid scores, divided by their
            sum over experts.)
        num_tokens_G: its tokens; 0: the sequence counts nowhere.
        top_k: experts a token.
    """
    losses_LG = balance_losses(counts_LGE, probability_sums_LGE, num_tokens_G, top_k)
    return losses_LG.sum() / max(len(counts_LGE), 1), (num_tokens_G > 0).sum().to(losses_LG.dtype)


def z_loss(z_sums_L: Tensor, num_tokens: int | Tensor) -> Tensor:
    """Mean over tokens and layers of logsumexp(router logits)² (ST-MoE, arXiv 2202.08906).

    Args:
        z_sums_L: summed over this rank's tokens.
        num_tokens: of all ranks; a scalar, or [L], of each layer.
    """
    if isinstance(num_tokens, Tensor) and num_tokens.ndim:
        return (z_sums_L / _at_least_one(num_tokens, z_sums_L)).mean()
    return z_sums_L.sum() / max(len(z_sums_L), 1) / _at_least_one(num_tokens, z_sums_L)


def local_entropy_losses(entropy_sums_LG: Tensor, num_tokens_G: Tensor) -> Tensor:
    """LIMoE's local loss by modality, [L, G]: the mean entropy of a token's routing (arXiv 2206.02770).

    Low where each token of the modality is routed with confidence. 0 where there are no tokens.

    Args:
        entropy_sums_LG: entropy of a token's routing in nats, summed over this rank's tokens.
        num_tokens_G: of all ranks.
    """
    return entropy_sums_LG / num_tokens_G.to(entropy_sums_LG.dtype).clamp(min=1)


def global_entropy_losses(
    probability_sums_LGE: Tensor,
    num_tokens_G: Tensor,
    all_probability_sums_LGE: Tensor | None = None,
    threshold: float | None = None,
) -> Tensor:
    """LIMoE's global loss by modality, [L, G]: minus the entropy of the modality's mean routing (arXiv 2206.02770).

    Low where the modality as a whole uses many experts. With a threshold τ the loss is max(0, τ − entropy): a modality
    uses at least e^τ experts, and which more is its own affair. 0 where there are no tokens.

    Args:
        probability_sums_LGE: the router's probabilities summed over this rank's tokens.
        num_tokens_G: of all ranks.
        all_probability_sums_LGE: the sums of all ranks, detached; None: there is one rank.
        threshold: τ, nats; None: none.
    """
    sums_LGE = probability_sums_LGE
    all_sums_LGE = (sums_LGE if all_probability_sums_LGE is None else all_probability_sums_LGE).detach()
    tokens_G1 = num_tokens_G.to(sums_LGE.dtype).clamp(min=1)[:, None]
    log_mean_LGE = (all_sums_LGE / tokens_G1).clamp(min=_tiny(sums_LGE)).log()
    # Each rank's part of Σ p log p, p the mean over all ranks; d(p log p) = (log p + 1) dp, the 1 without a value.
    own_LGE = sums_LGE * log_mean_LGE + (sums_LGE - sums_LGE.detach())
    losses_LG = (own_LGE / tokens_G1).sum(dim=-1)
    if threshold is None:
        return losses_LG
    entropy_LG = -(all_sums_LGE / tokens_G1 * log_mean_LGE).sum(dim=-1)
    share_LG = sums_LGE.detach().sum(dim=-1) / all_sums_LGE.sum(dim=-1).clamp(min=_tiny(sums_LGE))
    return torch.where(entropy_LG < threshold, losses_LG + threshold * share_LG, 0)


def _at_least_one(num_tokens: int | Tensor, like: Tensor) -> Tensor | int:
    if isinstance(num_tokens, Tensor):
        return num_tokens.to(like.dtype).clamp(min=1)
    return max(num_tokens, 1)


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny
