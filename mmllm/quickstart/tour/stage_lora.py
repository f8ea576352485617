"""Stage `lora`: the 3,000 questions learnt by an adapter, beside the training of all weights in stage `sft`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm.checkpoints.files import ADAPTERS
from mmllm.checkpoints.weights import Checkpoint
from mmllm.quickstart.tour import stage_sft as sft
from mmllm.quickstart.tour.questions import NUM_TRAIN
from mmllm.quickstart.tour.stage import Tour

NAME = "lora"
ADAPTER: dict[str, Any] = {"parts": ["attention"], "r": 28, "lora_alpha": 56}
OPTIMIZER: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.0, "warmup": 0.05}


@dataclass(frozen=True)
class LoraStage:
    """Trains an adapter as long as all weights were trained, on the same rows."""

    name: str = "lora"

    def run(self, tour: Tour) -> dict[str, Any]:
        """Trains the adapter; trains all weights too where stage `sft` hasn't."""
        test = sft.write_test(tour)
        minutes = sft.MINUTES[NUM_TRAIN]
        full = sft.train(tour, f"sft_{NUM_TRAIN}", NUM_TRAIN, sft.OPTIMIZER, minutes)
        adapted = sft.train(tour, NAME, NUM_TRAIN, OPTIMIZER, minutes, ADAPTER)
        before = sft.measure(tour, "start", tour.model, test)
        whole = sft.measure(tour, f"sft_{NUM_TRAIN}", full, test)
        after = sft.measure(tour, NAME, adapted, test, adapter=NAME)
        gain = whole["accuracy"] - before["accuracy"]
        lost = sft.points_lost(before, after)
        return {
            "accuracy": after["accuracy"],
            "full_accuracy": whole["accuracy"],
            "gain_share": (after["accuracy"] - before["accuracy"]) / gain if gain > 0 else None,
            "parameter_share": parameter_share(adapted, NAME),
            "forgetting_points": max(lost.values()),
            "lost": lost,
        }


def parameter_share(folder: Path, adapter: str) -> float:
    """Parameters of an adapter over those of its model."""
    own = Checkpoint.open_file(folder / ADAPTERS / adapter / "adapter_model.safetensors")
    sizes = [sum(spec.num_elements for spec in each.specs.values()) for each in (own, Checkpoint.open(folder))]
    return sizes[0] / sizes[1]


STAGE = LoraStage()
