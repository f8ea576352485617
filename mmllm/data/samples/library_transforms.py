"""How other libraries make pictures as large as their image encoders want them, to the pixel.

An encoder that was pretrained elsewhere saw pictures by these. Both end before pixels are normalized.

Shapes: H and W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from torchvision.transforms.v2 import InterpolationMode

Resample = Literal["bicubic", "bilinear", "nearest", "lanczos"]
Library = Literal["open_clip", "transformers"]
MAX_RESIZED_PIXELS = 64_000_000
"""What a strip would grow to while its short side becomes as long as wanted, before the middle is cut out."""
_PIL_RESAMPLES = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Fit:
    """What becomes of a picture.

    Attributes:
        size: side of the square that comes out.
        mode: "squash" scales both sides to `resized`; "crop" the short side, and takes the middle; "pad" lays the
            picture on a square of `fill` first (transformers' LLaVA), or last (open_clip).
        resized: as long sides are before the middle is taken.
        resample: the filter.
        fill: colour of what is padded.
    """

    size: int
    mode: Literal["squash", "pad", "crop"]
    resized: int
    resample: Resample
    fill: tuple[int, int, int]


def pil_resample(name: Resample) -> Image.Resampling:
    """Pillow's filter of that name."""
    return _PIL_RESAMPLES[name]


def fit_as_open_clip(picture: Image.Image, fit: Fit, name: str) -> np.ndarray:
    """As open_clip's `image_transform` for evaluation, uint8 [3, size, size].

    Args:
        picture: RGB.
        fit: `resized` is `size`: open_clip has no other.
        name: what errors call the picture.

    Raises:
        ValueError: the picture is a strip that would become too large.
    """
    (width, height), size, resample = picture.size, fit.size, pil_resample(fit.resample)
    match fit.mode:
        case "squash":
            picture = picture.resize((size, size), resample)
        case "crop":
            picture = _resized(picture, _with_short_side(width, height, size), resample, name)
            left, top = (round((side - size) / 2) for side in picture.size)
            picture = picture.crop((left, top, left + size, top + size))
        case "pad":
            ratio = max(width, height) / size
            inner = (max(1, round(width / ratio)), max(1, round(height / ratio)))
            picture = picture.resize(inner, resample)
            left, top = ((size - side) // 2 for side in inner)
            right, bottom = ((size - side + 1) // 2 for side in inner)
            picture = ImageOps.expand(picture, (left, top, right, bottom), fit.fill)
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


def _with_short_side(width: int, height: int, side: int) -> tuple[int, int]:
    """Width and height of a picture whose short side becomes `side`; the other is rounded down."""
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side


def _check_pixels(width: int, height: int, size: tuple[int, int], name: str) -> None:
    if size[0] * size[1] > MAX_RESIZED_PIXELS:
        raise ValueError(
            f"{name}: the picture is {width}x{height} pixels and would be {size[0]}x{size[1]} with its short side as "
            f"long as the image tower wants it, more than {MAX_RESIZED_PIXELS} pixels; cut it"
        )


def _resized(picture: Image.Image, size: tuple[int, int], resample: Image.Resampling, name: str) -> Image.Image:
    _check_pixels(*picture.size, size, name)
    return picture if picture.size == size else picture.resize(size, resample)


def fit_as_transformers(picture: Image.Image, fit: Fit, name: str) -> np.ndarray:
    """As transformers' image processors with their torchvision backend (versions 5), uint8 [3, size, size].

    Where that backend is not there, transformers takes Pillow, whose pixels differ by a level here and there.

    Args:
        picture: RGB.
        fit: how.
        name: what errors call the picture.

    Raises:
        ValueError: the picture is a strip that would become too large.
    """
    from torchvision.transforms.v2 import functional as tvf

    pixels_3HW = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    if fit.mode == "pad":
        width, height = picture.size
        side = max(width, height)
        left, top = (side - width) // 2, (side - height) // 2
        edges = [left, top, side - width - left, side - height - top]
        pixels_3HW = tvf.pad(pixels_3HW, edges, fill=list(fit.fill))
    size = (fit.resized, fit.resized)
    if fit.mode == "crop":
        size = _with_short_side(*picture.size, fit.resized)
        _check_pixels(*picture.size, size, name)
    pixels_3HW = tvf.resize(pixels_3HW, [size[1], size[0]], interpolation=_interpolation(fit.resample), antialias=True)
    return np.ascontiguousarray(_middle(pixels_3HW.numpy(), fit.size))


def _interpolation(name: Resample) -> InterpolationMode:
    """What torchvision calls Pillow's filter, as transformers translates it."""
    from torchvision.transforms.v2 import InterpolationMode

    modes = {
        "bicubic": InterpolationMode.BICUBIC,
        "bilinear": InterpolationMode.BILINEAR,
        "nearest": InterpolationMode.NEAREST_EXACT,
        "lanczos": InterpolationMode.LANCZOS,
    }
    return modes[name]


def _middle(pixels_3HW: np.ndarray, size: int) -> np.ndarray:
    """The square in the middle; black is added where there is less."""
    missing = [max(0, size - side) for side in pixels_3HW.shape[1:]]
    if any(missing):
        pixels_3HW = np.pad(pixels_3HW, [(0, 0), *((gap // 2, (gap + 1) // 2) for gap in missing)])
    top, left = (int((side - size) / 2) for side in pixels_3HW.shape[1:])
    return pixels_3HW[:, top : top + size, left : left + size]
