"""What the stages that learn from rewards share: new scenes, their trainings' configs, comparisons row by row."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.quickstart.scenes import make_scenes
from mmllm.quickstart.tour.stage import Tour

MODULE = "mmllm.training.posttraining.rollout_module.RolloutModule"
DATA = "mmllm.data.loading.prompts.PromptDataModule"
SCENE_SEED = 501
"""Beside the tour's: other pictures than the demo's and than those of preferences."""
NUM_TRAIN, NUM_TEST, NUM_HELD_OUT = 9_000, 2_400, 600
"""Scenes that are drawn; those of training with two or three objects are asked about."""
NUM_RESAMPLES = 2_000


def scenes(tour: Tour) -> dict[str, Path]:
    """Manifests of new pictures: `train` of two and three objects, `test` of scenes that no training shows, `heldout`.

    The model of the demo fails at hardly a scene of one object: there is nothing to learn from these.
    """
    folder = tour.out / "data" / "reward_scenes"
    most = NUM_TRAIN if tour.limit is None else 3 * tour.limit
    num_train, num_test, num_held_out = (min(count, most) for count in (NUM_TRAIN, NUM_TEST, NUM_HELD_OUT))
    made = make_scenes(folder, num_train, num_test, num_held_out, SCENE_SEED + tour.seed)
    manifests = {}
    for split, path in made.items():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if split == "train":
            rows = [row for row in rows if not row["plain"] and len(row["objects"]) > 1]
        rows = [{**row, "image": f"reward_scenes/{row['image']}"} for row in rows]
        manifests[split] = tour.write_rows(f"reward_scenes_{split}", rows)
    return manifests


def fit(
    tour: Tour,
    name: str,
    rewards: Sequence[Mapping[str, Any]],
    rollout: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    data: Mapping[str, Any],
    minutes: float,
    more: Mapping[str, Any] | None = None,
    max_steps: int | None = None,
    callbacks: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Trains the tour's model from rewards, and gives the model's folder."""
    arguments = {"rewards": [dict(each) for each in rewards], "rollout": {"seed": tour.seed, **rollout},
                 "optimizer": dict(optimizer), **(more or {})}  # fmt: skip
    config = tour.training(name, MODULE, arguments, DATA, {"seed": tour.seed, **data}, minutes=minutes,
                           max_steps=max_steps, callbacks=callbacks)  # fmt: skip
    return tour.fit(name, config, inputs=[Path(data["manifest"])])


def right(evaluated: Mapping[str, Any], group: str = "test") -> dict[str, bool]:
    """Of each row of an evaluation whether its answer is right."""
    return {each["id"]: bool(each["correct"]) for each in evaluated["predictions"] if each["group"] == group}


def error_cut(before: Mapping[str, bool], after: Mapping[str, bool], seed: int) -> dict[str, Any]:
    """How many errors fewer, as a share of those before, with its 95% interval and how probable that is by chance.

    Rows are drawn with replacement for the interval; the test is of rows that changed (McNemar 1947, exact).
    """
    names = sorted(before)
    wrong_N = np.array([[not before[name], not after[name]] for name in names], dtype=float)
    draws = np.random.default_rng(seed).integers(0, len(names), (NUM_RESAMPLES, len(names)))
    sums_R2 = np.stack([np.bincount(draw, minlength=len(names)) @ wrong_N for draw in draws])
    sums_R2 = sums_R2[sums_R2[:, 0] > 0]
    errors = wrong_N.sum(axis=0)
    mended = int(((wrong_N[:, 0] == 1) & (wrong_N[:, 1] == 0)).sum())
    broken = int(((wrong_N[:, 0] == 0) & (wrong_N[:, 1] == 1)).sum())
    cuts = 1 - sums_R2[:, 1] / sums_R2[:, 0]
    return {
        "n": len(names),
        "errors_before": int(errors[0]),
        "errors_after": int(errors[1]),
        "mended": mended,
        "broken": broken,
        "error_cut": cut(float(errors[0]), float(errors[1])),
        "error_cut_ci": [float(each) for each in np.quantile(cuts, [0.025, 0.975])] if len(cuts) else [0.0, 0.0],
        "p": sign_test(mended, broken),
    }


def cut(before: float, after: float) -> float:
    """By which share errors became fewer; where there were none, 0, or minus what there are now."""
    return 1 - after / before if before else -after


def sign_test(num_better: int, num_worse: int) -> float:
    """How probable so uneven a split is where either way is as likely; two-sided, exact."""
    count, least = num_better + num_worse, min(num_better, num_worse)
    tail = sum(math.comb(count, each) for each in range(least + 1)) / 2**count
    return min(1.0, 2 * tail)


def curve(tour: Tour, name: str, column: str) -> list[list[float]]:
    """A column of a training's log, by step."""
    path = tour.out / "logs" / name / "metrics.csv"
    with path.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    return [[float(row["step"]), float(row[column])] for row in rows if row.get(column)]
