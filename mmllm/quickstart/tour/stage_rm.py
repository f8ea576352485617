"""Stage `rm`: a reward model learns which captions are shorter and still right, and chooses the best of 8."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm.checkpoints.files import REWARD_CONFIG
from mmllm.data.loading.preference_rows import read_row
from mmllm.evaluation.rewards import shorter_and_right
from mmllm.inference.reward_model import RewardModel
from mmllm.quickstart.tour import caption_pairs, stage_dpo
from mmllm.quickstart.tour.stage import Tour

MODULE = "mmllm.training.posttraining.reward_module.RewardModule"
MINUTES = 4.0
REWARD: dict[str, Any] = {"centering": 0.01}
OPTIMIZER: dict[str, Any] = {"lr": 2e-4, "weight_decay": 0.0, "warmup": 0.05, "parts": {"image_tower": 0.0}}
BATCH_SIZE = 16
BEST_OF = 8
NUM_CHOSEN = 150
"""Pictures of the test of which the best caption is chosen."""


@dataclass(frozen=True)
class RewardStage:
    """Trains on pairs of the model's own captions; held-out pairs say how far its margins can be believed."""

    name: str = "rm"

    def run(self, tour: Tour) -> dict[str, Any]:
        """Does the stage."""
        pairs, held_out = caption_pairs.exported(tour, caption_pairs.drawn_captions(tour))
        data = {"pairs": str(pairs), "val_pairs": str(held_out), "tokenizer": str(tour.model),
                "batch_size": BATCH_SIZE, "sequence_length": stage_dpo.SEQUENCE_LENGTH, "seed": tour.seed}  # fmt: skip
        config = tour.training("rm", MODULE, {"reward": REWARD, "optimizer": OPTIMIZER}, stage_dpo.DATA, data,
                               minutes=MINUTES)  # fmt: skip
        folder = tour.fit("rm", config, inputs=[pairs])
        told = json.loads((folder / REWARD_CONFIG).read_text(encoding="utf-8"))["calibration"]
        curve = [[each["confidence"], each["accuracy"]] for each in told["bins"]]
        plot = {
            "title": "a reward model's pairs: how sure it is, and how often it is right",
            "curves": {"pairs": curve},
        }
        return {
            "pair_accuracy": told["accuracy"],
            "ece": told["ece"],
            "num_pairs": told["num_pairs"],
            **best_of(tour, RewardModel.load(folder)),
            "plots": [plot],
        }


def best_of(tour: Tour, judge: RewardModel) -> dict[str, Any]:
    """True rewards of the test's captions: of all that are drawn, of those that the model takes, and the best."""
    limit = NUM_CHOSEN if tour.limit is None else min(NUM_CHOSEN, tour.limit)
    drawn = caption_pairs.drawn_test_captions(tour, "start", tour.model, BEST_OF, limit)
    rows = [json.loads(line) for line in drawn.read_text(encoding="utf-8").splitlines()]
    sums = {"reward_drawn": 0.0, "reward_chosen": 0.0, "reward_best": 0.0, "words_drawn": 0.0, "words_chosen": 0.0}
    for row in rows:
        texts = [each["text"] for each in row["candidates"]]
        counts = [each.get("count", 1) for each in row["candidates"]]
        true = shorter_and_right(texts, [row["row"]] * len(texts))
        liked = judge.score_rows([_asked(row, text, drawn.parent) for text in texts])
        chosen = max(range(len(texts)), key=lambda number: liked[number][0])
        sums["reward_drawn"] += sum(r * n for r, n in zip(true, counts, strict=True)) / sum(counts)
        sums["reward_chosen"] += true[chosen]
        sums["reward_best"] += max(true)
        sums["words_drawn"] += sum(len(t.split()) * n for t, n in zip(texts, counts, strict=True)) / sum(counts)
        sums["words_chosen"] += len(texts[chosen].split())
    means = {name: total / len(rows) for name, total in sums.items()}
    return {**means, "reward_gain": means["reward_chosen"] - means["reward_drawn"]}


def _asked(row: dict[str, Any], text: str, folder: Path) -> Any:
    """A candidate as a row of preference data."""
    answer = [{"role": "assistant", "content": text}]
    value = {"task": row["task"], "prompt": row["prompt"], "completion": answer, "label": True}
    return read_row(json.dumps(value), row["id"], folder)


STAGE = RewardStage()
