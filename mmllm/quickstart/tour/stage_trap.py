"""Stage `trap`: a reward that counts words, which a model satisfies by saying more and not better; who notices?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from mmllm.quickstart.tour import rollout_runs
from mmllm.quickstart.tour.stage import Tour

MINUTES = 8.0
MAX_STEPS = 100
LOOK_STEPS = 5
NUM_ROWS = 96
"""Held-out captions of a look."""
OPTIMIZER: dict[str, Any] = {"lr": 3e-4, "weight_decay": 0.0, "warmup": 0.05, "min_lr_ratio": 1.0}
ROLLOUT: dict[str, Any] = {"algorithm": "grpo", "group_size": 8, "max_new_tokens": 48}
PROMPTS = 8
COSTS = "mmllm.training.posttraining.costs"


@dataclass(frozen=True)
class TrapStage:
    """Trains by GRPO on a reward that is none, until the run says so."""

    name: str = "trap"

    def run(self, tour: Tour) -> dict[str, Any]:
        """Does the stage."""
        manifests = rollout_runs.scenes(tour)
        folder = tour.out / "costs" / "trap"
        truth = {"task": "caption", "manifest": str(tour.test_manifest), "limit": NUM_ROWS}
        callbacks = [
            {"class_path": f"{COSTS}.TaskScores",
             "init_args": {"tasks": [truth], "directory": str(folder), "every_steps": LOOK_STEPS, "num_answers": 16}},
            {"class_path": f"{COSTS}.RewardHackingStop", "init_args": {"directory": str(folder)}},
        ]  # fmt: skip
        data = {"manifest": str(manifests["train"]), "task": "caption", "batch_size": PROMPTS}
        rollout_runs.fit(tour, "trap", [{"name": "words"}], ROLLOUT, OPTIMIZER, data, MINUTES, max_steps=MAX_STEPS,
                         callbacks=callbacks)  # fmt: skip
        hacking = json.loads((folder / "hacking.json").read_text(encoding="utf-8"))
        noticed = hacking["noticed_at_step"]
        reward = rollout_runs.curve(tour, "trap", "train/reward")
        found = {"noticed_at_step": noticed, "evidence": hacking}
        note = f"Within {MAX_STEPS} steps the run noticed nothing."
        if noticed is not None:
            note = f"A reward that counts words rose while captions became wrong: the run said so at step {noticed}."
        return {**found, "plots": [{"title": "Trap: words a caption", "curves": {"reward": reward}}], "notes": [note]}


STAGE = TrapStage()
