"""Stage `dpo`: captions become shorter and stay right, by pairs alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmllm.quickstart.tour import caption_pairs
from mmllm.quickstart.tour.stage import Tour

MODULE = "mmllm.training.posttraining.preference_module.PreferenceModule"
DATA = "mmllm.data.loading.preferences.PreferenceDataModule"
MINUTES = 4.0
"""Of the training, in a tour of the usual minutes."""
OPTIMIZER: dict[str, Any] = {"lr": 4e-4, "weight_decay": 0.0, "warmup": 0.05, "parts": {"image_tower": 0.0}}
PREFERENCE: dict[str, Any] = {"loss": "sigmoid", "beta": 0.5, "sft_weight": 1.0}
"""The shortest wordings are ones that the model never draws: they must become likely, and not only the others unlikely.
With a smaller β those, which are right too, are pushed away further and captions become wrong."""
BATCH_SIZE = 8
SEQUENCE_LENGTH = 512


@dataclass(frozen=True)
class DpoStage:
    """Draws captions, exports pairs, trains on them, and scores the test's captions before and after."""

    name: str = "dpo"

    def run(self, tour: Tour) -> dict[str, Any]:
        """Does the stage."""
        drawn = caption_pairs.with_shortest(tour, caption_pairs.drawn_captions(tour))
        pairs, held_out = caption_pairs.exported(tour, drawn, per_row=2)
        data = {"pairs": str(pairs), "val_pairs": str(held_out), "tokenizer": str(tour.model),
                "batch_size": BATCH_SIZE, "sequence_length": SEQUENCE_LENGTH, "seed": tour.seed}  # fmt: skip
        config = tour.training("dpo", MODULE, {"preference": PREFERENCE, "optimizer": OPTIMIZER}, DATA, data,
                               minutes=MINUTES)  # fmt: skip
        model = tour.fit("dpo", config, inputs=[pairs])
        before = caption_pairs.caption_scores(tour, "start", tour.model)
        after = caption_pairs.caption_scores(tour, "dpo", model)
        return {
            "words_before": before["words"],
            "words_after": after["words"],
            "length_change": after["words"] / before["words"] - 1,
            "exact_before": before["exact"],
            "exact_after": after["exact"],
            "exact_change": 100 * (after["exact"] - before["exact"]),
        }


STAGE = DpoStage()
