"""Pictures from bytes, whatever they hold, to the uint8 squares that the image tower sees.

Shapes: C channels, H and W pixels, M tiles of a picture.
"""

from __future__ import annotations

import dataclasses
import io
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from mmllm.data.samples.library_transforms import (
    Fit,
    Library,
    Resample,
    fit_as_open_clip,
    fit_as_transformers,
    pil_resample,
)
from mmllm_tokenizers.tiling import TileGrid

ImageInput = str | PathLike | bytes | Image.Image | np.ndarray | torch.Tensor
"""What callers may pass as a picture. Arrays and tensors: H×W, H×W×C or C×H×W; bool, uint8, uint16, or float in
[0, 1]. Wider integers are taken for what fits them: 0 and 1, 8, 16 or 32 bits."""

MAX_PIXELS = 64_000_000
"""More than this is refused before it is decoded: a decompression bomb, or a map sheet."""

_ALWAYS_TOLD = ("size", "mean", "std", "mode")
"""Keys of a transform that are written whatever they are, as all models' are that were saved before there were more."""
_MUCH_LARGER = 1.5
_OVERSHOOT = 0.25
"""So far floats may lie outside [0, 1]: sharp edges ring when a picture is resized."""
_WHITE = (255, 255, 255, 255)
_ORIENTATION = 0x0112
_ORIENTATION_KEYS = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT = 258, 262, 339
_DEEP = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
_LOSSY = ("JPEG", "MPO", "AVIF")
_END_OF_PNG = b"IEND\xaeB`\x82"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")
"""Chunks that the pixels depend on. Pillow checks the sums of those before the first IDAT alone."""


class _PictureError(ValueError):
    """Raised here, with the picture's name in it."""


@dataclass(frozen=True)
class DecodedFile:
    """A picture, and what its file is."""

    picture: Image.Image
    """RGB, upright."""
    form: str
    """Pillow's name: JPEG, PNG, WEBP, …"""
    is_plain: bool
    """Whether any reader sees the same 8-bit picture in the file: RGB or grey, upright, and nothing transparent."""
    is_lossy: bool
    """Whether what is in it was compressed with loss."""
    is_animated: bool
    """Whether it has more pictures, which aren't used."""


def decode_image(source: ImageInput, name: str = "image") -> Image.Image:
    """An RGB picture, upright, from a path, bytes, a PIL picture, an array or a tensor.

    Transparency is laid over white; CMYK, palette, grey, 16- and 32-bit pictures become 8-bit RGB; an
    animation gives its first frame; EXIF orientation is applied.

    Args:
        source: The picture.
        name: What errors call it, when `source` isn't a path.

    Raises:
        ValueError: The picture is unreadable, truncated, empty, or larger than `MAX_PIXELS`; or an array's values are
            out of range.
        FileNotFoundError: There is no such file.
        OSError: The machine can't read it.
    """
    match source:
        case bytes():
            return decode_file(source, name).picture
        case str() | PathLike():
            path = Path(source)
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such picture")
            return decode_file(path.read_bytes(), str(path)).picture
        case Image.Image():
            with _named_errors(name):
                return _to_rgb(source, name)
        case torch.Tensor():
            tensor = source.detach().cpu()
            return _from_array((tensor.float() if tensor.is_floating_point() else tensor).numpy(), name)
        case np.ndarray():
            return _from_array(source, name)
    raise ValueError(
        f"{name}: cannot read a picture from {type(source).__name__}; pass a path, bytes, a PIL picture, "
        f"an array or a tensor"
    )


def picture_size(source: ImageInput, name: str = "image") -> tuple[int, int]:
    """Width and height of the upright picture, of a file from its header alone.

    Args:
        source: As `decode_image` takes it.
        name: What errors call it.

    Raises:
        ValueError, FileNotFoundError, OSError: As `decode_image`, where the header tells it.
    """
    match source:
        case Image.Image():
            return _upright_size(source)
        case bytes() | str() | PathLike():
            if not isinstance(source, bytes) and not Path(source).is_file():
                raise FileNotFoundError(f"{source}: no such picture")
            with (
                _named_errors(name if isinstance(source, bytes) else str(source)),
                Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture,
            ):
                return _upright_size(picture)
    return decode_image(source, name).size


def _upright_size(picture: Image.Image) -> tuple[int, int]:
    width, height = picture.size
    is_lying = _may_be_turned(picture) and picture.getexif().get(_ORIENTATION) in range(5, 9)
    return (height, width) if is_lying else (width, height)


def decode_file(data: bytes, name: str) -> DecodedFile:
    """As `decode_image`, of a file's bytes, and with what kind of file it is."""
    if not data:
        raise ValueError(f"{name}: the picture is empty (0 bytes)")
    with _named_errors(name):
        opened = Image.open(io.BytesIO(data))
        form = opened.format or ""
        is_animated = getattr(opened, "is_animated", False)
        picture = _to_rgb(opened, name)
        is_turned = _may_be_turned(opened) and opened.getexif().get(_ORIENTATION) in range(2, 9)
        is_plain = opened.mode in ("RGB", "L") and "transparency" not in opened.info and not is_turned
    if form == "PNG" and not data.endswith(_END_OF_PNG) and _END_OF_PNG not in data:
        raise ValueError(f"{name}: the picture is truncated: its end is missing; copy or download it again")
    if form == "PNG" and (wrong := _wrong_png_chunk(data)):
        raise ValueError(
            f"{name}: the picture is broken: the checksum of {wrong} doesn't fit its data; copy or download it again"
        )
    return DecodedFile(picture, form, is_plain, _is_lossy(form, data, opened), is_animated)


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """What Pillow raises, as a ValueError that names the picture; what the machine does wrong, as it is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own bound on pixels stands in for Pillow's warning
            yield
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{name}: not a picture that can be read; it is broken or cut short, or not JPEG, PNG, WebP, AVIF, GIF or "
            f"the like"
        ) from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: {error}") from error
    except (_PictureError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise what they like
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{name}: the picture is broken or truncated: {error or type(error).__name__}") from error


def _wrong_png_chunk(data: bytes) -> str:
    """The first chunk of pixels that isn't what was written; "" where all are."""
    view, place = memoryview(data), 8
    while place + 12 <= len(data):
        kind, end = data[place + 4 : place + 8], place + 8 + int.from_bytes(data[place : place + 4], "big")
        if kind in _PNG_PIXELS and zlib.crc32(view[place + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return f"chunk {kind.decode()} at byte {place}"
        place = end + 4
    return ""


def _is_lossy(form: str, data: bytes, opened: Image.Image) -> bool:
    match form:
        case "WEBP":
            return not _is_lossless_webp(data)
        case "TIFF":
            return opened.info.get("compression") in ("jpeg", "tiff_jpeg", "webp")
        case "JPEG2000":
            place = data.find(b"\xff\x52")  # coding style: the wavelet is the last thing that it says
            return place < 0 or data[place + 13 : place + 14] != b"\x01"
    return form in _LOSSY


def _is_lossless_webp(data: bytes) -> bool:
    """By the chunks of the container, and of an animation's first frame."""
    place = 12
    while place + 8 <= len(data):
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        if name in (b"VP8L", b"VP8 "):
            return name == b"VP8L"
        place += 24 if name == b"ANMF" else 8 + size + size % 2
    return False


def _may_be_turned(picture: Image.Image) -> bool:
    return any(key in picture.info for key in _ORIENTATION_KEYS)


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise _PictureError(f"{name}: the picture is {width}x{height} pixels; it needs at least one")
    if width * height > MAX_PIXELS:
        raise _PictureError(f"{name}: the picture is {width}x{height} pixels, more than {MAX_PIXELS}; scale it down")


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    _check_size(picture.size, name)
    picture.load()
    scale = _deep_scale(picture)
    transparent = picture.info.get("transparency")
    if _may_be_turned(picture):
        picture = ImageOps.exif_transpose(picture)
    match picture.mode:
        case "RGB" if transparent is None:
            return picture
        case mode if mode in _DEEP:
            values = np.asarray(picture)
            if scale.is_unsigned:  # Pillow has them as signed ones
                values = values.view(np.uint32)
            if isinstance(transparent, int):
                values = np.where(values == transparent, 65535, values)
            shown = _from_array(values, name, scale.white)
            return ImageOps.invert(shown) if scale.is_negative else shown
        case "RGBA" | "LA" | "PA" | "La" | "RGBa":
            return _over_white(picture)
        case _ if transparent is not None:
            return _over_white(picture)
    return picture.convert("RGB")


@dataclass(frozen=True)
class _DeepScale:
    """How a grey picture of more than 8 bits is meant."""

    white: int | None = None
    """None: the values must tell."""
    is_unsigned: bool = False
    """32 bits without a sign."""
    is_negative: bool = False
    """0 is white."""


def _deep_scale(picture: Image.Image) -> _DeepScale:
    if picture.mode not in _DEEP:
        return _DeepScale()
    if isinstance(picture, TiffImageFile):
        bits, kind = _first(picture.tag_v2.get(_TIFF_BITS, 16)), _first(picture.tag_v2.get(_TIFF_SAMPLE_FORMAT, 1))
        white = (1 << bits - (kind == 2)) - 1 if bits <= 16 else None
        return _DeepScale(white, kind == 1 and bits > 16, picture.tag_v2.get(_TIFF_PHOTOMETRIC) == 0)
    return _DeepScale(65535 if picture.mode.startswith("I;") or picture.format in ("PNG", "PPM") else None)


def _first(value: int | tuple[int, ...]) -> int:
    return int(value[0] if isinstance(value, tuple) else value)


def _over_white(picture: Image.Image) -> Image.Image:
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, _WHITE), picture).convert("RGB")


def _from_array(array: np.ndarray, name: str, full_scale: int | None = None) -> Image.Image:
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise _PictureError(f"{name}: an array of shape {array.shape} is no picture; give HxW, HxWxC or CxHxW")
    _check_size((array.shape[1], array.shape[0]), name)
    picture = Image.fromarray(np.ascontiguousarray(_to_uint8(array, name, full_scale)))
    return _over_white(picture) if picture.mode == "RGBA" else picture.convert("RGB")


def _to_uint8(array: np.ndarray, name: str, full_scale: int | None) -> np.ndarray:
    """Levels 0 to 255 of whatever numbers; `full_scale` is what is white, where that is known."""
    wanted = "give uint8, uint16, or floats in [0, 1]"
    kind = array.dtype.kind
    if kind not in "buif":
        raise _PictureError(f"{name}: the array holds {array.dtype}; {wanted}")
    if kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    if kind == "f" and not np.isfinite(array).all():
        raise _PictureError(f"{name}: the array holds NaN or infinite values")
    low, high = array.min(), array.max()
    if kind == "f":
        if low < -_OVERSHOOT or high > 1 + _OVERSHOOT:
            raise _PictureError(f"{name}: the array holds {low if low < -_OVERSHOOT else high:g}; {wanted}")
        return (array.astype(np.float32).clip(0, 1) * 255).round().astype(np.uint8)
    if low < 0:
        raise _PictureError(f"{name}: the array holds {low}; {wanted}")
    if full_scale is None:
        full_scale = _full_scale(array, int(high))
    if full_scale is None:
        raise _PictureError(f"{name}: the array holds {high} as {array.dtype}, so what is white is unclear; {wanted}")
    if full_scale == 255:
        return array.astype(np.uint8, copy=False)
    return (array.astype(np.float64) * (255 / full_scale)).clip(0, 255).round().astype(np.uint8)


def _full_scale(array: np.ndarray, high: int) -> int | None:
    """What is white in an array of whole numbers up to `high`; None where neither its type nor its values say so.

    Nothing but 0 and 1 is a mask, but in colours of 8 bits: those may be that dark.
    """
    if high == 1 and (array.ndim == 2 or array.dtype.itemsize > 1):
        return 1
    if array.dtype.kind == "u" and array.dtype.itemsize <= 2:
        return int(np.iinfo(array.dtype).max)
    for full_scale in (255, 65535):
        if high <= full_scale:
            return full_scale
    full_scale = int(np.iinfo(array.dtype).max)
    is_dark = high * 255 < full_scale  # not a single level
    return full_scale if array.dtype.itemsize == 4 and not is_dark else None


@dataclass(frozen=True)
class ImageTransform:
    """Any picture to uint8 [3, size, size]; the tower normalizes by `mean` and `std` itself.

    `squash` scales both sides to `size`; `pad` keeps the proportions on a ground of the mean colour; `crop`
    scales the short side and takes the middle.

    Attributes:
        size: side in pixels.
        mean: of red, green and blue in [0, 1].
        std: likewise.
        mode: how pictures become square.
        resample: the filter, antialiased.
        library: whose pixels come out, to the bit: those of open_clip's `image_transform`, or of transformers' image
            processors. None: neither's; large pictures are then scaled by torch, small ones by Pillow.
        resized: with a library, as long sides are scaled (of `crop` the short one) before the middle is cut out of
            them; None: `size`.
        fill: with a library, the colour beside padded pictures; None: the mean.
    """

    size: int
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    mode: Literal["squash", "pad", "crop"] = "squash"
    resample: Resample = "bicubic"
    library: Library | None = None
    resized: int | None = None
    fill: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}; it must be at least 1 pixel")
        if self.resized is not None and self.resized < 1:
            raise ValueError(f"resized is {self.resized}; it must be at least 1 pixel")
        for key in ("mean", "std", "fill"):
            value = getattr(self, key)
            if value is not None and len(value) != 3:
                raise ValueError(f"{key} is {value}; it must be three numbers, of red, green and blue")
        allowed = {"mode": ("squash", "pad", "crop"), "resample": get_args(Resample)}
        allowed["library"] = (None, *get_args(Library))
        for key, values in allowed.items():
            if getattr(self, key) not in values:
                wanted = ", ".join("null" if value is None else repr(value) for value in values)
                raise ValueError(f"{key} is {getattr(self, key)!r}; it must be one of {wanted}")
        for key in ("resized", "fill"):
            if self.library is None and getattr(self, key) is not None:
                raise ValueError(f"{key} is {getattr(self, key)} without a library; leave it out, or name the library")
        if self.library == "open_clip" and self.resized not in (None, self.size):
            raise ValueError(
                f"resized is {self.resized} and size {self.size}, but open_clip cuts nothing off; leave it out"
            )

    @staticmethod
    def from_dict(values: Any) -> ImageTransform:
        """The inverse of `to_dict`.

        Raises:
            ValueError: it is no object of these keys, or one has another value than it can have.
        """
        keys = [field.name for field in dataclasses.fields(ImageTransform)]
        if not isinstance(values, dict) or not set(_ALWAYS_TOLD) <= set(values) <= set(keys):
            raise ValueError(f"image_transform is {values!r}; wanted an object with the keys {', '.join(keys)}")
        given: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return ImageTransform(**given)

    def to_dict(self) -> dict[str, Any]:
        """As JSON: what was there from the beginning, and what else isn't as by default."""
        values = dataclasses.asdict(self)
        return {
            field.name: values[field.name]
            for field in dataclasses.fields(self)
            if field.name in _ALWAYS_TOLD or values[field.name] != field.default
        }

    def __call__(self, source: ImageInput, name: str = "image", tiles: TileGrid | None = None) -> np.ndarray:
        """A picture as uint8 [3, size, size], or cut into tiles as [M, 3, size, size].

        Args:
            source: Anything `decode_image` reads.
            name: What errors call it.
            tiles: Rows and columns; the whole picture comes first where the grid has a thumbnail. Each of `mode`'s
                ways is then one to the whole grid, so that without `crop` every part of the picture is in a tile.
                No library cuts such tiles: the grid is filled as without one.

        Raises:
            ValueError: The picture cannot be read.
        """
        picture = decode_image(source, name)
        if tiles is None:
            return self._whole(picture, name)
        cut_M3HW = self._fitted(picture, tiles.rows, tiles.columns)
        if not tiles.thumbnail:
            return cut_M3HW
        return np.concatenate([self._whole(picture, name)[None], cut_M3HW])

    def _whole(self, picture: Image.Image, name: str) -> np.ndarray:
        """The picture as one square, [3, size, size]."""
        if self.library is None:
            return self._fitted(picture, 1, 1)[0]
        fit = Fit(self.size, self.mode, self.resized or self.size, self.resample, self._ground)
        fitted_by = fit_as_open_clip if self.library == "open_clip" else fit_as_transformers
        return fitted_by(picture, fit, name)

    @property
    def _ground(self) -> tuple[int, int, int]:
        """The colour beside padded pictures."""
        if self.fill is not None:
            return self.fill
        red, green, blue = (round(255 * value) for value in self.mean)
        return red, green, blue

    def _fitted(self, picture: Image.Image, rows: int, columns: int) -> np.ndarray:
        """The picture, made as large as so many tiles, as those: [rows · columns, 3, size, size]."""
        size = (columns * self.size, rows * self.size)
        is_much_larger = all(has >= _MUCH_LARGER * wanted for has, wanted in zip(picture.size, size, strict=True))
        if self.mode == "squash" and self.resample == "bicubic" and is_much_larger:
            pixels_3HW = self._squashed(picture, size)
        else:
            picture = picture if picture.size == size else self._resize(picture, size)
            pixels_3HW = np.asarray(picture).transpose(2, 0, 1)
        cut = pixels_3HW.reshape(3, rows, self.size, columns, self.size).transpose(1, 3, 0, 2, 4)
        return np.ascontiguousarray(cut).reshape(rows * columns, 3, self.size, self.size)

    def _squashed(self, picture: Image.Image, size: tuple[int, int]) -> np.ndarray:
        """By torch: three times as fast as Pillow, and on photographs scaled down this far within one level of it.

        To the bit what `torchvision.transforms.v2` makes, whose import would take as long as that of torch.
        """
        pixels_13HW = torch.from_numpy(np.array(picture)[None]).permute(0, 3, 1, 2)  # channels last: the fast path
        resized_13HW = F.interpolate(
            pixels_13HW, size=[size[1], size[0]], mode="bicubic", align_corners=False, antialias=True
        )
        return resized_13HW[0].contiguous().numpy()

    def _resize(self, picture: Image.Image, size: tuple[int, int]) -> Image.Image:
        (width, height), (max_width, max_height) = picture.size, size
        resample = pil_resample(self.resample)
        match self.mode:
            case "squash":
                return picture.resize(size, resample)
            case "pad":
                scale = min(max_width / width, max_height / height)
                inner = (max(1, round(width * scale)), max(1, round(height * scale)))
                ground = Image.new("RGB", size, self._ground)
                corner = ((max_width - inner[0]) // 2, (max_height - inner[1]) // 2)
                ground.paste(picture.resize(inner, resample), corner)
                return ground
        # crop: the box in the source's own pixels, so that a 20,000 x 1 strip never grows to 20,000 x size
        box_width = min(width, height * max_width / max_height)
        box_height = min(height, width * max_height / max_width)
        left, top = (width - box_width) / 2, (height - box_height) / 2
        box = (left, top, left + box_width, top + box_height)
        return picture.resize(size, resample, box=box)
