"""The loss on held-out documents, in nats a target without any weight: in all, by kind of target, by source."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from mmllm.batch import PackedBatch
from mmllm.checkpoints.folder import load_model
from mmllm.data.loading.datamodules import PackedDataModule
from mmllm.inference.generate import evaluating
from mmllm.losses.batch import TASKS, LossFunction
from mmllm.model.multimodal import MultimodalModel


@dataclass(frozen=True)
class HeldoutLoss:
    """What a model loses on held-out documents.

    Attributes:
        loss: of text and units together.
        by_task: of text, and of units (a frame is one target, whose codebooks are added up).
        by_source: of the recipe's sources.
        num_targets: that it was measured on.
    """

    loss: float
    by_task: dict[str, float]
    by_source: dict[str, float]
    num_targets: int


def heldout_loss(folder: str | Path, recipe: str | Path, num_sequences: int, batch_size: int = 8) -> HeldoutLoss:
    """The loss of a model folder on a recipe's documents, each taken once.

    Args:
        folder: of the model.
        recipe: of held-out documents.
        num_sequences: at most.
        batch_size: sequences at once.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: it has no documents.
    """
    data = heldout_data(recipe, num_sequences, batch_size)
    return loss_of(load_model(folder, "cpu").model, data)


def heldout_data(recipe: str | Path, num_sequences: int, batch_size: int = 8) -> PackedDataModule:
    """A recipe's documents as validation data, opened.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: it isn't one, or has no documents.
    """
    data = PackedDataModule(
        recipe=recipe, val_recipe=recipe, batch_size=batch_size, num_val_sequences=num_sequences, num_workers=0
    )
    data.setup("validate")
    return data


def loss_of(model: MultimodalModel, data: PackedDataModule) -> HeldoutLoss:
    """As `heldout_loss`, of a model and the validation data of a data module.

    Raises:
        ValueError: there are no documents.
    """
    names = data.source_names
    measure = LossFunction(model.config, names)
    sums: dict[str, Any] = {name: torch.zeros((), dtype=torch.float64) for name in TASKS}
    counts: dict[str, Any] = {name: torch.zeros((), dtype=torch.float64) for name in TASKS}
    source_sums_S, source_counts_S = (torch.zeros(len(names), dtype=torch.float64) for _ in range(2))
    with evaluating(model):
        for batch in cast("Iterable[PackedBatch]", data.val_dataloader()):
            losses = measure(model, model(batch), batch)
            for name in TASKS:
                sums[name] += losses.sums[name].double()
                counts[name] += losses.counts[name].double()
            source_sums_S += losses.source_sums.double()
            source_counts_S += losses.source_counts.double()
    num_targets = sum(float(count) for count in counts.values())
    if not num_targets:
        raise ValueError("the held-out recipe has no targets; give one with documents")
    return HeldoutLoss(
        sum(float(value) for value in sums.values()) / num_targets,
        {name: float(sums[name] / counts[name]) for name in TASKS if counts[name]},
        {
            name: float(source_sums_S[place] / source_counts_S[place])
            for place, name in enumerate(names)
            if source_counts_S[place]
        },
        round(num_targets),
    )
