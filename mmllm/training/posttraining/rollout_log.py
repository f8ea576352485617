"""What a training from rewards tells: means of a step over all ranks, and answers to read.

Shapes: A answers of this rank, M tokens of all of them, G groups.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mmllm.losses.policy import Reduce, kl_k3
from mmllm.training.posttraining.rollout_scoring import Scored
from mmllm.training.posttraining.rollouts import Rewarded

ROLLOUTS_FILE = "rollouts.jsonl"


def step_sums(
    rewarded: Rewarded, before: Scored, reference_M: Tensor | None, is_flat_G: Tensor, reduce: Reduce
) -> dict[str, tuple[float, float]]:
    """Sums over all ranks, and what they are divided by.

    Args:
        rewarded: what was drawn.
        before: as the policy that drew it sees it.
        reference_M: log-probabilities by the model that training started from; None: not known.
        is_flat_G: groups whose rewards are all the same, from which GRPO learns nothing.
        reduce: sums over ranks.
    """
    rollouts = rewarded.rollouts
    num_answers, num_tokens = len(rollouts), len(before.logprobs_M)
    own: dict[str, tuple[float, float]] = {
        "reward": (sum(rewarded.totals), num_answers),
        "entropy": (float(before.entropy_M.sum()), num_tokens),
        "length": (num_tokens, num_answers),
        "truncated": (sum(one.is_truncated for one in rollouts), num_answers),
        "seconds/rollout": (rewarded.draw_seconds, 1),
        "seconds/reward": (rewarded.reward_seconds, 1),
    }
    if num_answers > len(is_flat_G):  # one answer alone is no group
        own["zero_std_groups"] = (float(is_flat_G.sum()), len(is_flat_G))
    if reference_M is not None:
        own["kl"] = (float(kl_k3(before.logprobs_M, reference_M).sum()), num_answers)
    columns = {f"/{name}": values for name, values in rewarded.by_name.items()} | {"": rewarded.totals}
    for name, values in columns.items():
        own[f"reward{name}"] = (sum(values), num_answers)
        own[f"reward_square{name}"] = (sum(value * value for value in values), num_answers)
    device = before.logprobs_M.device
    sums = reduce(torch.tensor(list(own.values()), dtype=torch.float64, device=device)).tolist()
    return {name: (total, count) for name, (total, count) in zip(own, sums, strict=True)}


def step_means(sums: dict[str, tuple[float, float]]) -> dict[str, float]:
    """What is logged of `step_sums`: means, and the spread of rewards."""
    means = {name: total / max(count, 1.0) for name, (total, count) in sums.items()}
    for name in [name for name in means if name.startswith("reward_square")]:
        suffix = name.removeprefix("reward_square")
        variance = means.pop(name) - means[f"reward{suffix}"] ** 2
        means[f"reward_std{suffix}"] = max(variance, 0.0) ** 0.5
    return means


@dataclass
class RolloutStats:
    """Means of what callbacks watch, since they were last asked for."""

    names: tuple[str, ...] = ("reward", "kl", "entropy", "length")
    _sums: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, sums: dict[str, tuple[float, float]]) -> None:
        """Takes in a step's `step_sums`."""
        for name in self.names:
            if name in sums:
                total, count = self._sums.get(name, (0.0, 0.0))
                self._sums[name] = (total + sums[name][0], count + sums[name][1])

    def take(self) -> dict[str, float]:
        """The means; from now on they are counted anew."""
        sums, self._sums = self._sums, {}
        return {name: total / count for name, (total, count) in sums.items() if count}


def write_rollouts(folder: Path, step: int, rewarded: Rewarded, num_prompts: int) -> None:
    """Appends the answers to a step's first prompts to `rollouts.jsonl`.

    Args:
        folder: of the log.
        step: that drew them.
        rewarded: what it drew.
        num_prompts: how many.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ROLLOUTS_FILE).open("a", encoding="utf-8") as stream:
        for place, (one, total) in enumerate(zip(rewarded.rollouts, rewarded.totals, strict=True)):
            if one.group >= num_prompts:
                break
            line = {
                "step": step,
                "id": one.row["id"],
                "answer": one.answer if isinstance(one.answer, str) else one.answer.text,
                "reward": total,
                "rewards": {name: values[place] for name, values in rewarded.by_name.items()},
                "is_truncated": one.is_truncated,
                "num_tokens": len(one.logprobs),
            }
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
