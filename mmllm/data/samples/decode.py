"""Pictures from bytes, whatever they hold, to the uint8 squares that the image tower sees.

Shapes: C channels, H and W pixels.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize_image as resize

ImageInput = str | PathLike | bytes | Image.Image | np.ndarray | torch.Tensor
"""What callers may pass as a picture. Arrays and tensors: H×W, H×W×C or C×H×W; uint8, or float in [0, 1]."""

MAX_PIXELS = 64_000_000
"""More than this is refused before it is decoded: a decompression bomb, or a map sheet."""

_MUCH_LARGER = 1.5
_WHITE = (255, 255, 255, 255)
_ORIENTATION_KEYS = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")


def decode_image(source: ImageInput, name: str = "image") -> Image.Image:
    """An RGB picture, upright, from a path, bytes, a PIL picture, an array or a tensor.

    Transparency is laid over white; CMYK, palette, grey and 16-bit pictures become 8-bit RGB; an
    animation gives its first frame; EXIF orientation is applied.

    Args:
        source: The picture.
        name: What errors call it, when `source` isn't a path.

    Raises:
        ValueError: The picture is unreadable, truncated, empty, or larger than `MAX_PIXELS`.
        FileNotFoundError: There is no such file.
    """
    match source:
        case bytes():
            return _from_file(io.BytesIO(source), name)
        case str() | PathLike():
            path = Path(source)
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such picture")
            return _from_file(io.BytesIO(path.read_bytes()), str(path))
        case Image.Image():
            return _to_rgb(source, name)
        case torch.Tensor():
            return _from_array(source.detach().cpu().numpy(), name)
        case np.ndarray():
            return _from_array(source, name)
    raise ValueError(
        f"{name}: cannot read a picture from {type(source).__name__}; pass a path, bytes, a PIL picture, "
        f"an array or a tensor"
    )


def _from_file(stream: io.BytesIO, name: str) -> Image.Image:
    if not stream.getbuffer().nbytes:
        raise ValueError(f"{name}: the picture is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own bound on pixels stands in for Pillow's warning
            picture = Image.open(stream)
            _check_size(picture.size, name)
            return _to_rgb(picture, name)
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: not a picture that can be read; give JPEG, PNG, WebP, GIF or the like") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: {error}") from error
    except (OSError, SyntaxError, EOFError, IndexError, TypeError, RuntimeError) as error:
        raise ValueError(f"{name}: the picture is broken or truncated: {error}") from error


def _is_turned(picture: Image.Image) -> bool:
    return any(key in picture.info for key in _ORIENTATION_KEYS)


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"{name}: the picture is {width}x{height} pixels; it needs at least one")
    if width * height > MAX_PIXELS:
        raise ValueError(f"{name}: the picture is {width}x{height} pixels, more than {MAX_PIXELS}; scale it down")


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    _check_size(picture.size, name)
    picture.load()
    if _is_turned(picture):
        picture = ImageOps.exif_transpose(picture)
    match picture.mode:
        case "RGB" if "transparency" not in picture.info:
            return picture
        case "I;16" | "I;16B" | "I;16L" | "I;16N" | "I" | "F":
            return _from_array(np.asarray(picture), name)
        case "RGBA" | "LA" | "PA" | "La" | "RGBa":
            return _over_white(picture)
        case _ if "transparency" in picture.info:
            return _over_white(picture)
    return picture.convert("RGB")


def _over_white(picture: Image.Image) -> Image.Image:
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, _WHITE), picture).convert("RGB")


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise ValueError(f"{name}: an array of shape {array.shape} is no picture; give HxW, HxWxC or CxHxW")
    _check_size((array.shape[1], array.shape[0]), name)
    picture = Image.fromarray(_to_uint8(array, name))
    return _over_white(picture) if picture.mode == "RGBA" else picture.convert("RGB")


def _to_uint8(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    values = array.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: the array holds NaN or infinite values")
    if values.min() < 0:
        raise ValueError(f"{name}: the array holds {values.min():g}; give uint8, uint16, or floats in [0, 1]")
    if array.dtype == np.uint16:
        values = values / 257
    elif array.dtype.kind == "f" and values.max() <= 1:
        values = values * 255
    elif values.max() > 255:  # 16-bit grey that PIL gives as 32-bit
        values = values / 257 if values.max() <= 65535 else values * (255 / values.max())
    return values.clip(0, 255).round().astype(np.uint8)


@dataclass(frozen=True)
class ImageTransform:
    """Any picture to uint8 [3, size, size]; the tower normalises by `mean` and `std` itself.

    `squash` scales both sides to `size`; `pad` keeps the proportions on a ground of the mean colour; `crop`
    scales the short side and takes the middle (open_clip's evaluation transform: bicubic, antialiased).
    """

    size: int
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    mode: Literal["squash", "pad", "crop"] = "squash"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}; it must be at least 1 pixel")
        if self.mode not in ("squash", "pad", "crop"):
            raise ValueError(f"mode is {self.mode!r}; it must be 'squash', 'pad' or 'crop'")

    def __call__(self, source: ImageInput, name: str = "image") -> np.ndarray:
        """A picture as uint8 [3, size, size].

        Args:
            source: Anything `decode_image` reads.
            name: What errors call it.

        Raises:
            ValueError: The picture cannot be read.
        """
        picture = decode_image(source, name)
        if picture.size != (self.size, self.size):
            if self.mode == "squash" and min(picture.size) >= _MUCH_LARGER * self.size:
                return self._squashed(picture)
            picture = self._resize(picture)
        return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))

    def _squashed(self, picture: Image.Image) -> np.ndarray:
        """By torch: three times as fast as Pillow, and on photographs scaled down this far within one level of it."""
        pixels_3HW = torch.from_numpy(np.array(picture)).permute(2, 0, 1)  # channels last in memory: the fast path
        size = [self.size, self.size]
        return resize(pixels_3HW, size, interpolation=InterpolationMode.BICUBIC, antialias=True).contiguous().numpy()

    def _resize(self, picture: Image.Image) -> Image.Image:
        width, height = picture.size
        match self.mode:
            case "squash":
                return picture.resize((self.size, self.size), Image.Resampling.BICUBIC)
            case "pad":
                scale = self.size / max(width, height)
                inner = (max(1, round(width * scale)), max(1, round(height * scale)))
                red, green, blue = (round(255 * value) for value in self.mean)
                ground = Image.new("RGB", (self.size, self.size), (red, green, blue))
                corner = ((self.size - inner[0]) // 2, (self.size - inner[1]) // 2)
                ground.paste(picture.resize(inner, Image.Resampling.BICUBIC), corner)
                return ground
        # crop: the box in the source's own pixels, so that a 20,000 x 1 strip never grows to 20,000 x size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        return picture.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
