"""Stage `kto`: the model's own captions, each of which is liked or not, without pairs.

Unlike in stage `dpo`, nobody writes shorter ones: what is liked the model could have drawn, so that it need not go far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmllm.quickstart.tour import caption_pairs, stage_dpo
from mmllm.quickstart.tour.stage import Tour

MINUTES = 4.0
OPTIMIZER: dict[str, Any] = {**stage_dpo.OPTIMIZER, "lr": 1e-4}
PREFERENCE: dict[str, Any] = {"loss": "kto", "beta": 0.1}
BATCH_SIZE = 16
NUM_JUDGED = 200
"""Captions that are drawn before and after."""


@dataclass(frozen=True)
class KtoStage:
    """Trains on captions that are liked or not, and measures the reward and how far the model has gone for it."""

    name: str = "kto"

    def run(self, tour: Tour) -> dict[str, Any]:
        """Does the stage."""
        answers, held_out = caption_pairs.exported(tour, caption_pairs.drawn_captions(tour), form="kto")
        data = {"pairs": str(answers), "val_pairs": str(held_out), "tokenizer": str(tour.model), "form": "answers",
                "batch_size": BATCH_SIZE, "sequence_length": stage_dpo.SEQUENCE_LENGTH, "seed": tour.seed}  # fmt: skip
        settings = {"preference": PREFERENCE, "optimizer": OPTIMIZER}
        config = tour.training("kto", stage_dpo.MODULE, settings, stage_dpo.DATA, data,
                               minutes=MINUTES)  # fmt: skip
        model = tour.fit("kto", config, inputs=[answers])
        before = caption_pairs.caption_scores(tour, "start", tour.model)
        after = caption_pairs.caption_scores(tour, "kto", model)
        rewards = {
            name: caption_pairs.drawn_reward(tour, name, folder, NUM_JUDGED)
            for name, folder in (("start", tour.model), ("kto", model))
        }
        return {
            "reward_before": rewards["start"],
            "reward_after": rewards["kto"],
            "reward_gain": rewards["kto"] - rewards["start"],
            "kl": caption_pairs.divergence(tour, "kto", model, NUM_JUDGED),
            "length_change": after["words"] / before["words"] - 1,
            "exact_change": 100 * (after["exact"] - before["exact"]),
        }


STAGE = KtoStage()
