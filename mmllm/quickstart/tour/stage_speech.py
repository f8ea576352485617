"""Stage `speech`: the model speaks, hears itself, and learns from how much it understood; another ear is the judge."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm.quickstart.tour import rollout_runs
from mmllm.quickstart.tour.stage import Tour

MINUTES = 8.0
OPTIMIZER: dict[str, Any] = {
    "lr": 1e-4, "weight_decay": 0.0, "warmup": 0.05, "min_lr_ratio": 0.2,
    "parts": {"image_tower": 0.0, "audio_front_end": 0.0},
}  # fmt: skip
ROLLOUT: dict[str, Any] = {"algorithm": "grpo", "group_size": 6, "temperature": 0.7}
"""At the temperature at which the demo speaks: it is that policy which is scored."""
PROMPTS = 8


@dataclass(frozen=True)
class SpeechStage:
    """Trains speech by GRPO with the model's own ear, and has it judged by one that shares nothing with it."""

    name: str = "speech"

    def run(self, tour: Tour) -> dict[str, Any]:
        """Does the stage."""
        manifest = sentences(tour)
        data = {"manifest": str(manifest), "task": "speak", "batch_size": PROMPTS}
        model = rollout_runs.fit(tour, "speech", [{"name": "own_wer"}], ROLLOUT, OPTIMIZER, data, MINUTES)
        found: dict[str, Any] = {}
        for when, name, folder in (("before", "start", tour.model), ("after", "speech", model)):
            scores = tour.eval_json(f"{name}_speak", folder, "speak", tour.test_manifest, judge=tour.judge)["speak"]
            found |= {f"judge_wer_{when}": scores["judge_wer"], f"judge_wer_{when}_ci": scores["judge_wer_ci"],
                      f"own_wer_{when}": scores["round_trip_wer"]}  # fmt: skip
        reward = rollout_runs.curve(tour, "speech", "train/reward")
        return {
            **found,
            "error_cut": rollout_runs.cut(found["judge_wer_before"], found["judge_wer_after"]),
            "own_error_cut": rollout_runs.cut(found["own_wer_before"], found["own_wer_after"]),
            "plots": [{"title": "Speech: 1 - WER by its own ear", "curves": {"reward": reward}}],
        }


def sentences(tour: Tour) -> Path:
    """The sentences of the training's recordings: their texts and voices are what is asked for, not their sounds."""
    source = tour.data / "manifests" / "train-audio.jsonl"
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    base = tour.out / "data"
    rows = [
        {**row, "audio": os.path.relpath((source.parent / row["audio"]).resolve(), base.resolve())}
        for row in rows
        if row.get("level") == "sentence"
    ]
    return tour.write_rows("reward_sentences", rows)


STAGE = SpeechStage()
