"""Losses of preferences, on log-probabilities or rewards of whole answers; all are per pair or per answer, no means.

A *score* here is log πθ(answer) − log π_ref(answer) in nats: β times it is the reward that the policy implies.

Shapes: P pairs, A answers.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

PairLoss = Literal["sigmoid", "robust", "hinge", "ipo"]
"""sigmoid: DPO (arXiv 2305.18290, eq. 7); with label smoothing the conservative one, which expects so many labels to be
swapped. robust: unbiased under so many swapped labels (arXiv 2403.00409, eq. 12). hinge: that of SLiC (arXiv
2305.10425) on DPO's margin. ipo: the squared distance to 1 / 2β (arXiv 2310.12036, eq. 17), of scores by token."""


def check_pair_loss(loss: str, beta: float, label_smoothing: float) -> None:
    """Settings that fit together.

    Raises:
        ValueError: the loss is unknown, `beta` isn't positive, or the label smoothing isn't one, or not for this loss.
    """
    if loss not in get_args(PairLoss):
        raise ValueError(f"preference.loss is {loss!r}; choose {', '.join(get_args(PairLoss))}, or kto")
    if not beta > 0:
        raise ValueError(f"preference.beta is {beta}; give a positive number, 0.1 for example")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"preference.label_smoothing is {label_smoothing}; it is the share of pairs that are the wrong way round: "
            f"give 0 up to less than 0.5"
        )
    if label_smoothing and loss not in ("sigmoid", "robust"):
        raise ValueError(
            f"preference.label_smoothing is {label_smoothing}, which {loss} doesn't know; choose sigmoid or robust, or "
            f"set it to 0"
        )


def pair_losses(
    chosen_P: Tensor, rejected_P: Tensor, *, loss: PairLoss = "sigmoid", beta: float = 0.1, label_smoothing: float = 0.0
) -> Tensor:
    """The loss of each pair, [P], differentiable.

    Args:
        chosen_P: scores of the sides that are preferred; divided by their numbers of tokens for "ipo", or where length
            shall not count.
        rejected_P: those of the other sides, likewise.
        loss: see `PairLoss`.
        beta: how strongly the policy is held to the reference (τ of "ipo").
        label_smoothing: share of pairs that are expected to be the wrong way round.
    """
    delta_P = chosen_P - rejected_P
    match loss:
        case "sigmoid":
            right_P, wrong_P = -F.logsigmoid(beta * delta_P), -F.logsigmoid(-beta * delta_P)
            return (1 - label_smoothing) * right_P + label_smoothing * wrong_P
        case "robust":
            right_P, wrong_P = -F.logsigmoid(beta * delta_P), -F.logsigmoid(-beta * delta_P)
            return ((1 - label_smoothing) * right_P - label_smoothing * wrong_P) / (1 - 2 * label_smoothing)
        case "hinge":
            return torch.relu(1 - beta * delta_P)
        case "ipo":
            return (delta_P - 1 / (2 * beta)).square()


def kto_losses(
    scores_A: Tensor,
    is_liked_A: Tensor,
    kl: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimization (arXiv 2402.01306, eq. 7) without its constant: the loss of each answer, [A].

    Args:
        scores_A: of answers behind their prompts.
        is_liked_A: bool.
        kl: detached scalar: how far the policy is from the reference, the point from which gains and losses count.
            Estimated as the mean score of answers behind prompts that aren't theirs, not below 0.
        beta: how quickly gains and losses saturate.
        desirable_weight: of answers that are liked.
        undesirable_weight: of the others.
    """
    gains_A = torch.where(is_liked_A, scores_A - kl, kl - scores_A)
    weights_A = torch.where(is_liked_A, desirable_weight, undesirable_weight).to(scores_A)
    return weights_A * (1 - torch.sigmoid(beta * gains_A))


def reward_losses(
    chosen_P: Tensor, rejected_P: Tensor, *, margin: float | Tensor = 0.0, centering: float = 0.0
) -> Tensor:
    """The loss of a reward model for each pair: −log σ(r⁺ − r⁻ − margin) + centering · (r⁺ + r⁻)².

    The first term is Bradley and Terry's with the margin of Llama 2 (arXiv 2307.09288), the second holds rewards around
    0 (arXiv 2312.09244, eq. 2).

    Args:
        chosen_P: rewards of the sides that are preferred.
        rejected_P: of the others.
        margin: by which they should differ; one, or [P].
        centering: weight of the second term.
    """
    losses_P = -F.logsigmoid(chosen_P - rejected_P - margin)
    return losses_P + centering * (chosen_P + rejected_P).square()
