"""The filters of a whitened image tower, computed from the training's own pictures before its first step."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from mmllm.data.loading.datamodules import PackedDataModule
from mmllm.data.loading.loader import StepDataset
from mmllm.model.vision import VisionTower

log = logging.getLogger(__name__)

NUM_PICTURES = 1000
MAX_STEPS = 200
"""Steps that are looked through for them: pictures may be rare."""


def whiten_tower(vision: VisionTower, data: PackedDataModule | None) -> None:
    """Computes the filters of a tower that has none of its pictures yet; others are left as they are.

    Every rank reads the same pictures, those of the recipe's first steps, and so computes the same filters. What is
    resumed, or starts from a model folder, has its filters among its weights.

    Args:
        vision: any tower.
        data: the training's; None where it isn't a recipe's.
    """
    if not vision.needs_pictures:
        return
    device = next(vision.parameters()).device
    pictures = () if data is None else first_pictures(data, NUM_PICTURES)
    count = vision.whiten(images_N3HW.to(device) for images_N3HW in pictures)
    if count:
        log.info("the image tower's filters whiten %d pictures of the training data", count)
        return
    log.warning(
        "the image tower's filters stay as they are for any pictures: %s",
        "the data has no recipe to read some from" if data is None
        else f"there are none in the first {MAX_STEPS} steps; give pictures in the recipe, or leave vision out",
    )  # fmt: skip


def first_pictures(data: PackedDataModule, count: int) -> Iterator[Tensor]:
    """The pictures of a recipe's first steps, unaltered, uint8 [N, 3, H, W] a step, `count` of them at most."""
    dataset = StepDataset(data.plan, data.folder, data.image_transform, raises=False)
    for step in islice(data.plan.steps(), MAX_STEPS):
        images_N3HW = torch.as_tensor(dataset[step].images_NCHW)[:count]
        count -= len(images_N3HW)
        if len(images_N3HW):
            yield images_N3HW
        if not count:
            return
