"""A small image tower that is learnt from nothing: convolutions behind fixed filters that whiten patches of pixels.

Neighbouring pixels are much alike, so that a random filter sees brightness and little else. Filters that whiten small
patches, computed from pictures, give edges and colours of like strength from the first step (arXiv 2404.00498).

Shapes: N images, P values of a patch, F filters (twice P), C channels, H and W pixels, h and w rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.model.standardized import StandardizedConv2d, group_norm

PATCH = 2
"""Pixels of a patch's side, and of the step from one patch to the next."""
PATCH_VALUES = 3 * PATCH**2
WHITENING_EPS = 5e-4
"""Added to variances: what pictures hardly hold is not blown up without bound."""
CHUNK_PIXELS = 32 * 64 * 64
"""Of pictures whose patches are in memory at once, as float64 (13 MB, and as much again to multiply them)."""
PIXEL_CORRELATION = 0.95
COLOR_CORRELATION = 0.8
"""Of neighbouring pixels, and of two colours of one pixel, where no picture has been looked at."""


@dataclass(frozen=True)
class WhitenedConfig:
    """A tower of convolutions behind whitening filters.

    Attributes:
        image_size: pixels of a picture's side.
        widths: channels of each stage; a stage halves rows and columns, as the patches before them do.
        fold: the last stage's features are laid side by side in channels, `fold` x `fold` neighbours in one.
    """

    image_size: int
    widths: tuple[int, ...] = (64, 128)
    fold: int = 2

    def __post_init__(self) -> None:
        if isinstance(self.widths, list):  # as YAML gives it
            object.__setattr__(self, "widths", tuple(self.widths))
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"vision.whitened.widths is {list(self.widths)}; give each stage at least 1 channel")
        if self.fold < 1:
            raise ValueError(f"vision.whitened.fold is {self.fold}; it must be at least 1")
        if self.image_size < 1 or self.image_size % self.pixels_of_feature:
            raise ValueError(
                f"vision.whitened.image_size is {self.image_size}, but a feature of {len(self.widths)} widths and fold "
                f"{self.fold} is of {self.pixels_of_feature} pixels a side; choose a multiple of that, fewer widths, "
                f"or a smaller fold"
            )

    @property
    def pixels_of_feature(self) -> int:
        """How many pixels a side a feature stands for."""
        return PATCH * 2 ** len(self.widths) * self.fold

    @property
    def num_sides(self) -> int:
        """Rows of features, and columns."""
        return self.image_size // self.pixels_of_feature

    @property
    def feature_width(self) -> int:
        """Channels of a feature."""
        return self.widths[-1] * self.fold**2


class WhitenedTower(nn.Module):
    """Whitened patches, stages of convolutions, a residual block, and features folded as `nn.PixelUnshuffle` does.

    Its filters are a buffer: they aren't trained, and are saved with the weights. Until `whiten` is called they are
    those of pictures whose pixels and colours correlate by `PIXEL_CORRELATION` and `COLOR_CORRELATION`.
    """

    filters: Tensor
    num_pictures: Tensor

    def __init__(self, config: WhitenedConfig):
        super().__init__()
        self.fold = config.fold
        self.register_buffer("filters", whitening_filters(assumed_covariance()))
        self.register_buffer("num_pictures", torch.zeros((), dtype=torch.int64))
        self.stages = nn.ModuleList(_Stage(*widths) for widths in pairwise((2 * PATCH_VALUES, *config.widths)))
        self.block = _ResidualBlock(config.widths[-1])

    @property
    def blocks(self) -> list[nn.Module]:
        """Stages and the residual block, in the order in which they run."""
        return [*self.stages, self.block]

    @torch.no_grad()
    def whiten(self, pixels_N3HW: Iterable[Tensor]) -> int:
        """Computes the filters from normalized pictures, in parts that fit into memory; gives how many there were.

        Without any, they stay as they are.
        """
        num_pictures, total_PP = 0, torch.zeros(PATCH_VALUES, PATCH_VALUES, dtype=torch.float64)
        for part_N3HW in pixels_N3HW:
            total_PP += patch_covariance(part_N3HW) * len(part_N3HW)
            num_pictures += len(part_N3HW)
        if num_pictures:
            self.filters.copy_(whitening_filters(total_PP / num_pictures))
            self.num_pictures.fill_(num_pictures)
        return num_pictures

    def forward(self, pixels_N3HW: Tensor) -> Tensor:
        """[N, C, h, w]."""
        x_NCHW = F.gelu(F.conv2d(pixels_N3HW, self.filters.to(pixels_N3HW.dtype), stride=PATCH))
        for block in self.blocks:
            x_NCHW = block(x_NCHW)
        return F.pixel_unshuffle(x_NCHW, self.fold)


class _Stage(nn.Module):
    """Convolution, the largest of 2 x 2 neighbours, norm, GELU."""

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.conv = StandardizedConv2d(width_in, width, 3, padding=1, bias=False)
        self.norm = group_norm(width)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return F.gelu(self.norm(F.max_pool2d(self.conv(x_NCHW), 2)))


class _ResidualBlock(nn.Module):
    """Its input plus convolution, norm, GELU."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = StandardizedConv2d(width, width, 3, padding=1, bias=False)
        self.norm = group_norm(width)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW + F.gelu(self.norm(self.conv(x_NCHW)))


def patch_covariance(pixels_N3HW: Tensor) -> Tensor:
    """Mean products of the values of overlapping patches, no mean taken off: [P, P] in float64, on the CPU."""
    num_images, _, height, width = pixels_N3HW.shape
    total_PP = torch.zeros(PATCH_VALUES, PATCH_VALUES, dtype=torch.float64)
    for part_N3HW in pixels_N3HW.split(max(1, CHUNK_PIXELS // (height * width))):
        patches_NPL = F.unfold(part_N3HW.cpu().double(), PATCH)
        total_PP += torch.einsum("npl,nql->pq", patches_NPL, patches_NPL)
    return total_PP / (num_images * (height - PATCH + 1) * (width - PATCH + 1))


def assumed_covariance() -> Tensor:
    """As `patch_covariance`, of pictures that are only known to be smooth and hardly coloured: pixels of variance 1."""
    places_L2 = torch.cartesian_prod(torch.arange(PATCH), torch.arange(PATCH)).double()
    distances_LL = torch.cdist(places_L2, places_L2, p=1)
    colors_33 = torch.full((3, 3), COLOR_CORRELATION, dtype=torch.float64).fill_diagonal_(1.0)
    return torch.kron(colors_33, PIXEL_CORRELATION**distances_LL)


def whitening_filters(covariance_PP: Tensor) -> Tensor:
    """[F, 3, 2, 2], float32: eigenvectors over the root of their values, the largest first, and their negatives.

    A vector's sign means nothing to whitening: that with the greatest entry positive is taken, so that rounding, which
    differs from machine to machine, doesn't decide it.
    """
    values_P, vectors_PP = torch.linalg.eigh(covariance_PP.double())
    rows_PP = vectors_PP.T.flip(0)
    greatest_P1 = rows_PP.gather(1, rows_PP.abs().argmax(dim=1, keepdim=True))
    rows_PP = rows_PP * greatest_P1.sign() * torch.rsqrt(values_P.flip(0).clamp(min=0) + WHITENING_EPS)[:, None]
    return torch.cat([rows_PP, -rows_PP]).view(-1, 3, PATCH, PATCH).float()
