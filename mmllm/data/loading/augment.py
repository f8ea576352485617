"""Random crops and mirrored pictures, drawn from generators that their callers seed.

Shapes: N pictures, H and W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NUM_DRAWS = 4
"""Uniform numbers that a picture takes."""


@dataclass(frozen=True)
class AugmentConfig:
    """How pictures are altered in training."""

    min_scale: float = 1.0
    """Random crops keep at least this share of a picture's area; 1: no crops."""
    flip: bool = False
    """Mirror half of the pictures (not where texts say left and right)."""

    def __post_init__(self) -> None:
        if not 0 < self.min_scale <= 1:
            raise ValueError(f"min_scale is {self.min_scale}; it must be in (0, 1]")

    @property
    def is_on(self) -> bool:
        """Whether anything changes."""
        return self.min_scale < 1 or self.flip


def augment(images_N3HW: Tensor, draws_ND: np.ndarray, config: AugmentConfig) -> Tensor:
    """Crops, resized to what they were, and mirrored pictures.

    Args:
        images_N3HW: uint8.
        draws_ND: float32 uniform numbers in [0, 1), `NUM_DRAWS` for each picture.
        config: how much.

    Returns:
        uint8, of the same shape.
    """
    if not config.is_on or not len(images_N3HW):
        return images_N3HW
    draws = torch.from_numpy(draws_ND.astype(np.float32))
    scale_N = (config.min_scale + (1 - config.min_scale) * draws[:, 0]).sqrt()
    theta_N23 = torch.zeros(len(draws), 2, 3)
    theta_N23[:, 0, 0] = torch.where(draws[:, 3] < 0.5 * config.flip, -scale_N, scale_N)
    theta_N23[:, 1, 1] = scale_N
    theta_N23[:, :, 2] = (draws[:, 1:3] * 2 - 1) * (1 - scale_N)[:, None]
    grid = F.affine_grid(theta_N23, list(images_N3HW.shape), align_corners=False)
    moved = F.grid_sample(images_N3HW.float(), grid, padding_mode="border", align_corners=False)
    return moved.round().clamp(0, 255).to(torch.uint8)
