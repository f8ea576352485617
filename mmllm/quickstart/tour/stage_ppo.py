"""Stage `ppo`: shorter captions that stay right, by PPO: values, advantages token by token, a KL that is kept low."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmllm.quickstart.tour import caption_pairs, rollout_runs
from mmllm.quickstart.tour.stage import Tour

MINUTES = 8.0
OPTIMIZER: dict[str, Any] = {
    "lr": 1e-4, "weight_decay": 0.0, "warmup": 0.05, "min_lr_ratio": 0.2, "parts": {"value_head": 1e-3},
}  # fmt: skip
ROLLOUT: dict[str, Any] = {"algorithm": "ppo", "group_size": 1, "max_new_tokens": 48, "num_iterations": 2, "beta": 0.02}
PPO: dict[str, Any] = {"kl_target": 4.0, "kl_horizon": 2000}
PROMPTS = 128


@dataclass(frozen=True)
class PpoStage:
    """Trains by PPO on `shorter_and_right`, and scores the test's captions before and after."""

    name: str = "ppo"

    def run(self, tour: Tour) -> dict[str, Any]:
        """Does the stage."""
        manifests = rollout_runs.scenes(tour)
        data = {"manifest": str(manifests["train"]), "task": "caption", "batch_size": PROMPTS}
        model = rollout_runs.fit(tour, "ppo", [{"name": caption_pairs.REWARD}], ROLLOUT, OPTIMIZER, data, MINUTES,
                                 more={"ppo": PPO})  # fmt: skip
        before = caption_pairs.caption_scores(tour, "start", tour.model)
        after = caption_pairs.caption_scores(tour, "ppo", model)
        reward, kl = (rollout_runs.curve(tour, "ppo", f"train/{name}") for name in ("reward", "kl"))
        return {
            "reward_before": before["reward"],
            "reward_after": after["reward"],
            "reward_change": after["reward"] - before["reward"],
            "words_before": before["words"],
            "words_after": after["words"],
            "exact_before": before["exact"],
            "exact_after": after["exact"],
            "kl": kl[-1][1] if kl else None,
            "plots": [{"title": "PPO: reward and KL", "curves": {"reward": reward, "KL, nats a caption": kl}}],
        }


STAGE = PpoStage()
