"""Stage `grpo`: captions learnt from a reward that counts right attributes, on pictures that nobody has described."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmllm.quickstart.tour import rollout_runs
from mmllm.quickstart.tour.stage import Tour

MINUTES = 8.0
OPTIMIZER: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.0, "warmup": 0.05, "min_lr_ratio": 0.2}
ROLLOUT: dict[str, Any] = {"algorithm": "grpo", "group_size": 8, "max_new_tokens": 48}
PROMPTS = 24
NUM_EXAMPLES = 8


@dataclass(frozen=True)
class GrpoStage:
    """Trains by GRPO, and scores fresh scenes before and after, with pairs of shape and colour never shown beside."""

    name: str = "grpo"

    def run(self, tour: Tour) -> dict[str, Any]:
        """Does the stage."""
        manifests = rollout_runs.scenes(tour)
        data = {"manifest": str(manifests["train"]), "task": "caption", "batch_size": PROMPTS}
        rewards = [{"name": "caption_attributes"}]
        model = rollout_runs.fit(tour, "grpo", rewards, ROLLOUT, OPTIMIZER, data, MINUTES)
        found: dict[str, Any] = {}
        examples: list[dict[str, Any]] = []
        for split, group in (("test", "test"), ("heldout", "heldout_pairs")):
            before, after = (
                tour.eval_json(f"{name}_reward_{split}", folder, "caption", manifests[split])
                for name, folder in (("start", tour.model), ("grpo", model))
            )
            was_right, is_right = rollout_runs.right(before, group), rollout_runs.right(after, group)
            cut = rollout_runs.error_cut(was_right, is_right, tour.seed)
            found |= {key if split == "test" else f"heldout_{key}": value for key, value in cut.items()}
            if split == "test":
                examples = mended(before["predictions"], after["predictions"])
        reward = rollout_runs.curve(tour, "grpo", "train/reward")
        kl = rollout_runs.curve(tour, "grpo", "train/kl")
        return {
            **found,
            "exact_before": 1 - found["errors_before"] / found["n"],
            "exact_after": 1 - found["errors_after"] / found["n"],
            "kl": kl[-1][1] if kl else None,
            "steps": reward[-1][0] if reward else None,
            "examples": examples,
            "plots": [{"title": "GRPO: reward of what is drawn", "curves": {"reward": reward}}],
        }


def mended(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pictures that only one of the two models says right."""
    now = {each["id"]: each for each in after}
    changed = [each for each in before if each["correct"] != now[each["id"]]["correct"]]
    return [
        {
            "group": "mended by GRPO" if now[each["id"]]["correct"] else "broken by GRPO",
            "image": each["image"],
            "prompt": "caption",
            "wanted": each["reference"],
            "answers": {"before": each["prediction"], "after GRPO": now[each["id"]]["prediction"]},
        }
        for each in changed[:NUM_EXAMPLES]
    ]


STAGE = GrpoStage()
