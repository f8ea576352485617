"""Learning from rewards: advantages, the objectives of GRPO, RLOO and PPO, estimates of KL, values.

All of it is arithmetic on log-probabilities that `mmllm.losses.answers` gives: of M tokens that were drawn, in the
order of their answers. Sums and counts are those of one rank, so that ranks can be added: a loss is Σ sums / Σ counts.

Shapes: A answers, M tokens of all answers, G groups (prompts), L tokens of the longest answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mmllm.losses.answers import sum_by_answer

ScaleRewards = Literal["group", "batch", "none"]
LossType = Literal["grpo", "dr_grpo", "dapo"]
Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks."""

_EPSILON = 1e-4
"""Of a spread that rewards are divided by, as in TRL."""
_WHITEN_EPSILON = 1e-8
_MOST_ERROR = 0.2
"""A step of the adaptive KL takes no larger relative error into account (arXiv 1909.08593)."""


def of_one_rank(sums: Tensor) -> Tensor:
    """The sum over ranks where there is one."""
    return sums


class PolicyLoss(NamedTuple):
    """A loss as a sum and what it is divided by, of this rank."""

    total: Tensor
    """Differentiable."""
    count: Tensor
    is_clipped: Tensor
    """Bool, of each token (of RLOO: of each answer): its ratio is out of bounds and its gradient 0."""


# ---- advantages


def group_advantages(
    rewards_A: Tensor, group_A: Tensor, scale_rewards: ScaleRewards = "group", reduce: Reduce = of_one_rank
) -> tuple[Tensor, Tensor]:
    """GRPO's advantages: how much better an answer is than the mean of its prompt's (arXiv 2402.03300, as TRL has it).

    Args:
        rewards_A: of answers.
        group_A: int64, the prompt of each, from 0; a prompt's answers are all here, on one rank.
        scale_rewards: "group" divides by the spread in the prompt's group, "batch" by that of all answers of all ranks
            (arXiv 2508.08221), "none" by nothing (Dr. GRPO, arXiv 2503.20783).
        reduce: sums over ranks.

    Returns:
        Advantages [A], and the spread of each group, [G], whatever they were divided by.
    """
    num_groups = int(group_A.max()) + 1 if len(group_A) else 0
    counts_G = sum_by_answer(torch.ones_like(rewards_A), group_A, num_groups)
    means_G = sum_by_answer(rewards_A, group_A, num_groups) / counts_G
    centred_A = rewards_A - means_G[group_A]
    squares_G = sum_by_answer(centred_A.square(), group_A, num_groups)
    std_G = (squares_G / (counts_G - 1).clamp(min=1)).sqrt()
    match scale_rewards:
        case "group":
            return centred_A / (std_G[group_A] + _EPSILON), std_G
        case "batch":
            _, variance = moments(rewards_A, reduce)
            return centred_A / (variance.sqrt() + _EPSILON), std_G
        case "none":
            return centred_A, std_G
    raise ValueError(f"scale_rewards is {scale_rewards!r}; choose group, batch or none")


def leave_one_out_advantages(rewards_A: Tensor, group_A: Tensor) -> Tensor:
    """RLOO's advantages: an answer's reward less the mean of its prompt's other answers (arXiv 2402.14740), [A]."""
    num_groups = int(group_A.max()) + 1 if len(group_A) else 0
    counts_G = sum_by_answer(torch.ones_like(rewards_A), group_A, num_groups)
    sums_G = sum_by_answer(rewards_A, group_A, num_groups)
    others_A = (counts_G[group_A] - 1).clamp(min=1)
    return torch.where(counts_G[group_A] > 1, rewards_A - (sums_G[group_A] - rewards_A) / others_A, 0.0)


def moments(values_M: Tensor, reduce: Reduce = of_one_rank) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance over all values of all ranks."""
    values_M = values_M.double()
    count, total = reduce(torch.stack([values_M.new_tensor(float(len(values_M))), values_M.sum()])).unbind()
    mean = total / count.clamp(min=1)
    squares = reduce((values_M - mean).square().sum())
    return mean.float(), (squares / (count - 1).clamp(min=1)).float()


def normalized(values_A: Tensor, reduce: Reduce = of_one_rank) -> Tensor:
    """Of mean 0 and spread 1 over all ranks, as RLOO's `normalize_advantages` has it."""
    mean, variance = moments(values_A, reduce)
    return (values_A - mean) / (variance.sqrt() + _EPSILON)


def whiten(values_M: Tensor, shift_mean: bool = True, reduce: Reduce = of_one_rank) -> Tensor:
    """Of spread 1, and of mean 0 or the mean that they have, over all ranks, as PPO has it."""
    mean, variance = moments(values_M, reduce)
    whitened_M = (values_M - mean) * torch.rsqrt(variance + _WHITEN_EPSILON)
    return whitened_M if shift_mean else whitened_M + mean


# ---- objectives


def kl_k3(logprobs_M: Tensor, reference_M: Tensor) -> Tensor:
    """Estimates KL(policy ‖ reference) at tokens that the policy drew: unbiased, never negative, in nats.

    It is exp(d) − d − 1 of d = log reference − log policy (http://joschu.net/blog/kl-approx.html).
    """
    difference_M = reference_M - logprobs_M
    return difference_M.exp() - difference_M - 1


def clipped(log_ratio: Tensor, advantages: Tensor, epsilon: float, epsilon_high: float) -> tuple[Tensor, Tensor]:
    """PPO's clipped objective, to be made small (arXiv 1707.06347), and where it is flat.

    Args:
        log_ratio: log policy − log of the policy that drew.
        advantages: of the same shape.
        epsilon: a ratio below 1 − `epsilon` gains nothing more.
        epsilon_high: nor one above 1 + `epsilon_high`.
    """
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    is_clipped = ((ratio < 1 - epsilon) & (advantages < 0)) | ((ratio > 1 + epsilon_high) & (advantages > 0))
    return -torch.minimum(ratio * advantages, bounded * advantages), is_clipped.detach()


def grpo_loss(
    logprobs_M: Tensor,
    old_M: Tensor,
    advantages_A: Tensor,
    answer_M: Tensor,
    *,
    reference_M: Tensor | None = None,
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    loss_type: LossType = "dapo",
    max_new_tokens: int = 1,
    corrects_kl: bool = True,
) -> PolicyLoss:
    """GRPO's loss, as TRL's `GRPOTrainer` has it.

    Args:
        logprobs_M: by the policy, differentiable.
        old_M: by the policy that drew the tokens.
        advantages_A: of the answers.
        answer_M: the answer of each token.
        reference_M: by the model that training started from; may be None where `beta` is 0.
        beta: weight of the KL to it.
        epsilon: of the clipping.
        epsilon_high: of the clipping from above; None: `epsilon`.
        loss_type: "dapo" is a mean over tokens (arXiv 2503.14476), "grpo" a mean over answers of means over their
            tokens, which favours short right answers and long wrong ones, "dr_grpo" a sum over tokens divided by the
            most that there could be, `max_new_tokens` an answer (arXiv 2503.20783).
        max_new_tokens: of an answer, for "dr_grpo".
        corrects_kl: the KL is weighted by the ratio of the policies, so that it is that of the policy.
    """
    log_ratio_M = logprobs_M - old_M
    high = epsilon if epsilon_high is None else epsilon_high
    loss_M, is_clipped_M = clipped(log_ratio_M, advantages_A[answer_M], epsilon, high)
    if beta:
        assert reference_M is not None, "a KL needs the reference's log-probabilities"
        kl_M = kl_k3(logprobs_M, reference_M)
        loss_M = loss_M + beta * (kl_M * log_ratio_M.exp() if corrects_kl else kl_M)
    num_answers = len(advantages_A)
    if loss_type == "grpo":
        lengths_A = sum_by_answer(torch.ones_like(loss_M), answer_M, num_answers).detach().clamp(min=1)
        total = (sum_by_answer(loss_M, answer_M, num_answers) / lengths_A).sum()
        return PolicyLoss(total, total.new_tensor(float(num_answers)), is_clipped_M)
    count = num_answers * max_new_tokens if loss_type == "dr_grpo" else len(loss_M)
    return PolicyLoss(loss_M.sum(), loss_M.new_tensor(float(count)), is_clipped_M)


def rloo_loss(
    logprobs_M: Tensor,
    old_M: Tensor,
    advantages_A: Tensor,
    answer_M: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> PolicyLoss:
    """RLOO's loss (arXiv 2402.14740) as TRL's `RLOOTrainer` has it: an answer is one action, its ratio is clipped."""
    log_ratio_A = sum_by_answer(logprobs_M - old_M, answer_M, len(advantages_A))
    high = epsilon if epsilon_high is None else epsilon_high
    loss_A, is_clipped_A = clipped(log_ratio_A, advantages_A, epsilon, high)
    return PolicyLoss(loss_A.sum(), loss_A.new_tensor(float(len(loss_A))), is_clipped_A)


def ppo_loss(
    logprobs_M: Tensor, old_M: Tensor, advantages_M: Tensor, *, epsilon: float = 0.2, epsilon_high: float | None = None
) -> PolicyLoss:
    """PPO's policy loss (arXiv 1707.06347): a mean over tokens, each with an advantage of its own."""
    high = epsilon if epsilon_high is None else epsilon_high
    loss_M, is_clipped_M = clipped(logprobs_M - old_M, advantages_M, epsilon, high)
    return PolicyLoss(loss_M.sum(), loss_M.new_tensor(float(len(loss_M))), is_clipped_M)


# ---- values


def value_loss(values_M: Tensor, old_M: Tensor, returns_M: Tensor, clip_range: float) -> PolicyLoss:
    """PPO's loss of values: half the squared error, the larger of that and of a value near the old one.

    Args:
        values_M: differentiable.
        old_M: values when the tokens were drawn.
        returns_M: what they should be.
        clip_range: how far a value may move before only its being worse counts.
    """
    bounded_M = torch.minimum(torch.maximum(values_M, old_M - clip_range), old_M + clip_range)
    own_M, bounded_error_M = (values_M - returns_M).square(), (bounded_M - returns_M).square()
    loss_M = 0.5 * torch.maximum(own_M, bounded_error_M)
    return PolicyLoss(loss_M.sum(), loss_M.new_tensor(float(len(loss_M))), (bounded_error_M > own_M).detach())


def token_rewards(
    rewards_A: Tensor, logprobs_M: Tensor, reference_M: Tensor, answer_M: Tensor, kl_coef: float
) -> Tensor:
    """PPO's rewards of tokens [M]: the KL to the start at each (log policy − log reference), the answer's at its last.

    Args:
        rewards_A: of answers; each has a token.
        logprobs_M: by the policy that drew.
        reference_M: by the model that training started from.
        answer_M: the answer of each token, ascending.
        kl_coef: what a nat costs.
    """
    rewards_M = -kl_coef * (logprobs_M - reference_M)
    is_last_M = torch.ones_like(answer_M, dtype=torch.bool)
    is_last_M[:-1] = answer_M[1:] != answer_M[:-1]
    return rewards_M + torch.where(is_last_M, rewards_A[answer_M].to(rewards_M), 0.0)


def advantage_estimates(
    rewards_M: Tensor, values_M: Tensor, answer_M: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> Tensor:
    """Generalized advantage estimates (arXiv 1506.02438) [M]; returns are these plus the values.

    Args:
        rewards_M: of tokens.
        values_M: before each token is drawn; behind an answer's last one the value is 0.
        answer_M: the answer of each token, ascending: an answer's tokens lie together.
        gamma: what a reward is worth a token later.
        lam: 0 trusts the values alone, 1 the rewards alone.
    """
    if not len(answer_M):
        return rewards_M
    _, lengths_A = torch.unique_consecutive(answer_M, return_counts=True)
    starts_A = lengths_A.cumsum(0) - lengths_A
    longest = int(lengths_A.max())
    at_L = torch.arange(longest, device=answer_M.device)
    has_AL = at_L < lengths_A[:, None]
    places_AL = (starts_A[:, None] + at_L).clamp(max=len(answer_M) - 1)
    rewards_AL, values_AL = (torch.where(has_AL, each[places_AL], 0.0) for each in (rewards_M, values_M))
    next_AL = torch.cat([values_AL[:, 1:], torch.zeros_like(values_AL[:, :1])], dim=1)
    deltas_AL = rewards_AL + gamma * next_AL - values_AL
    estimate_A, estimates = torch.zeros_like(deltas_AL[:, 0]), []
    for place in reversed(range(longest)):
        estimate_A = torch.where(has_AL[:, place], deltas_AL[:, place] + gamma * lam * estimate_A, 0.0)
        estimates.append(estimate_A)
    estimates_AL = torch.stack(estimates[::-1], dim=1)
    return estimates_AL[has_AL]


@dataclass
class AdaptiveKL:
    """What a nat of KL costs, raised while the KL is above its target and lowered below it (arXiv 1909.08593).

    Attributes:
        coef: now.
        target: nats an answer; None: the cost stays as it is.
        horizon: answers over which it adapts.
    """

    coef: float
    target: float | None = None
    horizon: int = 10_000

    def update(self, kl: float, num_answers: int) -> None:
        """Takes in the mean KL of so many answers."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -_MOST_ERROR), _MOST_ERROR)
            self.coef *= 1 + error * min(num_answers / self.horizon, 1.0)  # never below 0, however many answers
