"""Advantages, estimates and objectives of learning from rewards, against plain loops."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mmllm.losses.policy import (
    AdaptiveKL,
    advantage_estimates,
    clipped,
    group_advantages,
    grpo_loss,
    kl_k3,
    leave_one_out_advantages,
    moments,
    ppo_loss,
    rloo_loss,
    token_rewards,
    value_loss,
    whiten,
)

LENGTHS = [3, 1, 5, 2]
STARTS = [0, 3, 4, 9, 11]


def tokens(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Values of 11 tokens of four answers, and whose they are."""
    generator = torch.Generator().manual_seed(seed)
    answer_M = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    return torch.randn(11, generator=generator, dtype=torch.float64), answer_M


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_groups_of_any_size(scale: str) -> None:
    rewards_A = torch.tensor([1.0, 0.0, 0.5, 2.0, 2.0, 2.0, 4.0, 1.0])
    group_A = torch.tensor([1, 1, 0, 2, 2, 2, 0, 1])
    advantages_A, std_G = group_advantages(rewards_A, group_A, scale)  # pyright: ignore[reportArgumentType]
    for group in range(3):
        own = rewards_A[group_A == group]
        divisor = {"group": own.std() + 1e-4, "batch": rewards_A.std() + 1e-4, "none": 1.0}[scale]
        torch.testing.assert_close(advantages_A[group_A == group], (own - own.mean()) / divisor)
        torch.testing.assert_close(std_G[group], own.std())


def test_an_answer_is_compared_with_the_others_of_its_prompt() -> None:
    rewards_A, group_A = torch.tensor([1.0, 0.0, 0.5, 2.0, 5.0, 7.0]), torch.tensor([0, 0, 0, 1, 1, 2])
    wanted = [1 - 0.25, 0 - 0.75, 0.5 - 0.5, 2 - 5, 5 - 2, 0.0]
    assert leave_one_out_advantages(rewards_A, group_A).tolist() == pytest.approx(wanted)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.8, 0.0)])
def test_advantage_estimates_are_those_of_a_slow_loop(gamma: float, lam: float) -> None:
    rewards_M, answer_M = tokens(0)
    values_M, _ = tokens(1)
    found = advantage_estimates(rewards_M, values_M, answer_M, gamma, lam).tolist()
    wanted = []
    for start, stop in pairwise(STARTS):
        for place in range(start, stop):  # the sum over all that follows, term by term
            total = 0.0
            for later in range(place, stop):
                value_behind = float(values_M[later + 1]) if later + 1 < stop else 0.0
                delta = float(rewards_M[later]) + gamma * value_behind - float(values_M[later])
                total += (gamma * lam) ** (later - place) * delta
            wanted.append(total)
    assert found == pytest.approx(wanted, abs=1e-12)
    assert advantage_estimates(rewards_M[:0], values_M[:0], answer_M[:0]).shape == (0,)


def test_the_reward_is_that_of_the_last_token_and_each_pays_for_its_divergence() -> None:
    logprobs_M, answer_M = tokens(0)
    reference_M, _ = tokens(1)
    rewards_A = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    found = token_rewards(rewards_A, logprobs_M, reference_M, answer_M, 0.1)
    wanted = [-0.1 * (a - b) for a, b in zip(logprobs_M.tolist(), reference_M.tolist(), strict=True)]
    for answer, stop in enumerate(STARTS[1:]):
        wanted[stop - 1] += float(rewards_A[answer])
    assert found.tolist() == pytest.approx(wanted)


def test_k3_is_unbiased_and_never_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    policy_V, reference_V = (torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2))
    each_V = kl_k3(policy_V, reference_V)
    assert (each_V >= 0).all()
    exact = float((policy_V.exp() * (policy_V - reference_V)).sum())
    assert float((policy_V.exp() * each_V).sum()) == pytest.approx(exact)  # the mean over what the policy draws


def test_clipping_is_flat_where_a_ratio_has_gone_far_enough() -> None:
    ratios = torch.tensor([0.5, 0.9, 1.1, 1.5, 0.5, 1.5])
    advantages = torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0, -1.0])
    log_ratio = ratios.log().requires_grad_()
    loss, is_clipped = clipped(log_ratio, advantages, 0.2, 0.3)
    loss.sum().backward()
    assert is_clipped.tolist() == [True, False, False, True, False, False]
    wanted = [-min(r * a, min(max(r, 0.8), 1.3) * a) for r, a in zip(ratios.tolist(), advantages.tolist(), strict=True)]
    assert loss.tolist() == pytest.approx(wanted)
    assert log_ratio.grad is not None
    assert ((log_ratio.grad == 0) == is_clipped).all()


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_grpo_is_a_mean_over_tokens_over_answers_or_over_what_there_could_be(loss_type: str) -> None:
    logprobs_M, answer_M = tokens(0)
    old_M, reference_M = logprobs_M + 0.3 * tokens(1)[0], logprobs_M + 0.5 * tokens(2)[0]
    advantages_A = torch.tensor([1.0, -0.5, 0.2, -2.0], dtype=torch.float64)
    loss = grpo_loss(
        logprobs_M, old_M, advantages_A, answer_M, reference_M=reference_M, beta=0.1, epsilon=0.2, epsilon_high=0.28,
        loss_type=loss_type, max_new_tokens=8,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    by_answer: list[list[float]] = []
    for answer, (start, stop) in enumerate(pairwise(STARTS)):
        by_answer.append([])
        for m in range(start, stop):
            ratio, advantage = math.exp(float(logprobs_M[m] - old_M[m])), float(advantages_A[answer])
            objective = min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage)
            d = float(reference_M[m] - logprobs_M[m])
            by_answer[-1].append(-objective + 0.1 * ratio * (math.exp(d) - d - 1))
    everything = sum(map(sum, by_answer))
    wanted = {
        "dapo": everything / 11,
        "grpo": sum(sum(each) / len(each) for each in by_answer) / 4,
        "dr_grpo": everything / (4 * 8),
    }[loss_type]
    assert float(loss.total / loss.count) == pytest.approx(wanted)


def test_rloo_takes_an_answer_and_ppo_a_token_for_one_action() -> None:
    logprobs_M, answer_M = tokens(0)
    old_M = logprobs_M + 0.1 * tokens(1)[0]
    advantages_A = torch.tensor([1.0, -0.5, 0.2, -2.0], dtype=torch.float64)
    loss = rloo_loss(logprobs_M, old_M, advantages_A, answer_M)
    wanted = 0.0
    for answer, (start, stop) in enumerate(pairwise(STARTS)):
        ratio = math.exp(float((logprobs_M - old_M)[start:stop].sum()))
        advantage = float(advantages_A[answer])
        wanted -= min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
    assert float(loss.total) == pytest.approx(wanted)
    assert float(loss.count) == 4
    advantages_M = tokens(3)[0]
    by_token = ppo_loss(logprobs_M, old_M, advantages_M)
    assert float(by_token.count) == 11
    assert float(by_token.total) == pytest.approx(float(clipped(logprobs_M - old_M, advantages_M, 0.2, 0.2)[0].sum()))


def test_a_value_that_moves_far_counts_only_where_it_is_worse() -> None:
    values_M = torch.tensor([1.0, 1.0, 0.1, -1.0], requires_grad=True)
    loss = value_loss(values_M, torch.zeros(4), torch.tensor([2.0, 0.5, 1.0, 0.0]), 0.2)
    wanted = [0.5 * (0.2 - 2) ** 2, 0.5 * (1 - 0.5) ** 2, 0.5 * (0.1 - 1) ** 2, 0.5]
    loss.total.backward()
    assert float(loss.total.detach()) == pytest.approx(sum(wanted))
    assert values_M.grad is not None
    assert values_M.grad.tolist() == pytest.approx([0.0, 0.5, -0.9, -1.0])


def test_what_is_normalized_is_so_over_all_ranks() -> None:
    values, _ = tokens(0)
    shares = [values[:4], values[4:]]

    def reduced(rank: int) -> Tensor:
        """As `whiten` on one rank, whose sums another rank's are added to, in its own order of calls."""
        sent: list[Tensor] = []
        other = shares[1 - rank]

        def reduce(sums: Tensor) -> Tensor:
            sent.append(sums)
            if len(sent) == 1:
                return sums + torch.tensor([float(len(other)), float(other.sum())], dtype=torch.float64)
            return sums + (other - values.mean()).square().sum()

        return whiten(shares[rank], reduce=reduce)

    torch.testing.assert_close(torch.cat([reduced(0), reduced(1)]), whiten(values), rtol=1e-6, atol=1e-6)
    mean, variance = moments(values)
    assert float(mean) == pytest.approx(float(values.mean()), abs=1e-6)
    assert float(variance) == pytest.approx(float(values.var()), rel=1e-6)
    torch.testing.assert_close(whiten(values, shift_mean=False).mean(), values.mean(), rtol=1e-5, atol=1e-6)


def test_the_cost_of_divergence_follows_its_target() -> None:
    kl = AdaptiveKL(0.1, target=6.0, horizon=100)
    kl.update(9.0, 10)  # 1.5 times the target: an error of 0.2 at most
    assert kl.coef == pytest.approx(0.1 * 1.02)
    kl.update(5.4, 10)
    assert kl.coef == pytest.approx(0.1 * 1.02 * 0.99)
    kl.coef = 0.1
    kl.update(0.0, 1000)
    assert kl.coef == pytest.approx(0.08), "a step of more answers than the horizon turns no cost into a gain"
    fixed = AdaptiveKL(0.1)
    fixed.update(100.0, 10)
    assert fixed.coef == 0.1
