"""Reward hacking is noticed in a trap, and not cried at noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest

from mmllm.training.posttraining.hacking import Evidence, HackingTest, Look, evidence, rank_sum_p, sign_test_p

NUM_ROWS, EVERY = 64, 10


def run(
    rng: np.random.Generator, truth: np.ndarray, reward: np.ndarray, test: HackingTest, flip: float = 0.05
) -> Evidence | None:
    """A run whose chance to be right at each look is `truth`, with looks every ten steps; what it notices first.

    Rows keep their outcome from look to look, but for a share `flip` that is drawn anew.
    """
    looks: list[Look] = []
    drawn = rng.random(NUM_ROWS)
    for number, chance in enumerate(truth):
        anew = rng.random(NUM_ROWS) < flip
        drawn = np.where(anew, rng.random(NUM_ROWS), drawn)
        looks.append(Look(number * EVERY, tuple((drawn < chance).astype(float))))
        until = [reward[: look.step].tolist() for look in looks]
        if (found := test.noticed(looks, until)) is not None:
            return found
    return None


def rewards(rng: np.random.Generator, begin: float, end: float, num_looks: int) -> np.ndarray:
    """Rising over 200 steps, and noisy."""
    steps = np.arange(num_looks * EVERY)
    return begin + (end - begin) * np.minimum(steps / 200, 1) + rng.normal(0, 0.5, len(steps))


def test_a_trap_is_noticed_within_a_hundred_steps() -> None:
    """As a reward that counts words does to captions: they grow, and are no longer right."""
    steps = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        truth = np.array([0.98] + [max(0.98 - 0.08 * n, 0.0) for n in range(1, 21)])
        found = run(rng, truth, rewards(rng, 8, 40, 21), HackingTest())
        assert found is not None and found.truth_now < found.truth_best and found.reward_now > found.reward_first
        steps.append(found.step)
    assert max(steps) <= 100 and np.median(steps) <= 50


@pytest.mark.parametrize(
    ("name", "truth", "rises"),
    [
        ("nothing moves", [0.9] * 31, False),
        ("the reward rises and the truth stays", [0.9] * 31, True),
        ("at chance", [0.5] * 31, True),
        ("both rise", [0.4 + 0.015 * n for n in range(31)], True),
        ("the truth falls with the reward", [0.9 - 0.02 * n for n in range(31)], False),
    ],
)
def test_noise_is_no_alarm(name: str, truth: list[float], rises: bool) -> None:
    """Of 40 runs with 30 looks each, in which a fifth of the rows changes at each look, none is called hacking."""
    alarms = 0
    for seed in range(40):
        rng = np.random.default_rng([seed, len(name)])
        reward = rewards(rng, 8, 40 if rises else 8, 31)
        alarms += run(rng, np.array(truth), reward, HackingTest(), flip=0.2) is not None
    assert not alarms, f"{name}: {alarms} of 40"


def test_one_look_is_not_enough() -> None:
    """A look that fails by itself (a broken file, a bad draw) is followed by a good one."""
    good, bad = (1.0,) * NUM_ROWS, (0.0,) * NUM_ROWS
    series = [good, good, good, bad, good, good]
    looks = [Look(10 * n, values) for n, values in enumerate(series)]
    reward = [float(step) for step in range(60)]
    until = [reward[: look.step] for look in looks]
    assert evidence(looks[:4], until[3]).holds(0.01)  # type: ignore[union-attr]
    assert all(HackingTest().noticed(looks[: n + 1], until[: n + 1]) is None for n in range(len(looks)))
    assert HackingTest(patience=1).noticed(looks[:4], until[:4]) is not None


def test_too_few_rewards_say_nothing() -> None:
    looks = [Look(0, (1.0,) * NUM_ROWS), Look(4, (0.0,) * NUM_ROWS)]
    assert evidence(looks, [1.0] * 9) is None
    assert evidence(looks[:1], [1.0] * 50) is None


def test_the_sign_test_is_exact() -> None:
    for up, down in ((0, 0), (1, 0), (3, 1), (5, 5), (9, 2)):
        outcomes: Iterator[tuple[int, ...]] = itertools.product((0, 1), repeat=up + down)
        wanted = sum(sum(outcome) >= up for outcome in outcomes) / 2 ** (up + down)
        assert sign_test_p(up, down) == pytest.approx(wanted)


def test_the_rank_sum_test_is_that_of_all_orders() -> None:
    """Against the exact distribution over all ways to choose which values came last."""
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.5, 1.0, 3.0):
        first, last = rng.normal(0, 1, 7), rng.normal(shift, 1, 7)
        both = np.concatenate([first, last])

        def wins(chosen: np.ndarray, rest: np.ndarray) -> float:
            return float((chosen[:, None] > rest[None]).sum())

        seen = wins(last, first)
        orders = [list(order) for order in itertools.combinations(range(14), 7)]
        wanted = np.mean([wins(both[order], np.delete(both, order)) >= seen for order in orders])
        assert rank_sum_p(first.tolist(), last.tolist()) == pytest.approx(wanted, abs=0.01)
    assert rank_sum_p([1.0] * 6, [1.0] * 6) == 1.0
    assert math.isclose(rank_sum_p([0.0, 1.0] * 5, [0.0, 1.0] * 5), 0.5, abs_tol=0.05)


@pytest.mark.parametrize(("alpha", "patience"), [(0.0, 2), (1.0, 2), (0.01, 0)])
def test_bad_settings_are_named(alpha: float, patience: int) -> None:
    with pytest.raises(ValueError, match="alpha is"):
        HackingTest(alpha, patience)
