"""What people hand over as image and sound, made uniform: PIL images, and waves with their rate.

A tuple is a sound as (samples, sample rate) and nothing else; several things are a list.
"""

from __future__ import annotations

import io
import logging
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from PIL import Image
from torch import Tensor

from mmllm.data.samples.decode import ImageInput, decode_image
from mmllm.data.samples.sample import Segment
from mmllm.inference import arguments
from mmllm_tokenizers.audio import load_audio
from mmllm_tokenizers.vocab import AUDIO, IMAGE

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif", ".opus"})
_LIKE_A_PATH = re.compile(r"\.[A-Za-z][A-Za-z0-9]{1,3}$")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Audio:
    """A sound that is handed to a model.

    Attributes:
        samples: float in [-1, 1] or integer PCM, [T] or [channels, T]; of a list, floats.
        sample_rate: samples a second.
    """

    samples: np.ndarray | Tensor | Sequence[float]
    sample_rate: int


@runtime_checkable
class File(Protocol):
    """An opened file, or what reads like one: its bytes are read from where it is to its end."""

    def read(self) -> bytes:
        """All that is left."""
        ...


PictureInput: TypeAlias = ImageInput | File
"""A path, bytes, an opened file, a PIL picture, or an array or tensor [H, W], [H, W, C] or [C, H, W]."""
Samples: TypeAlias = np.ndarray | Tensor | Sequence[float]
AudioInput: TypeAlias = str | os.PathLike | bytes | File | Audio | tuple[Samples, int]
"""A path, bytes, an opened file, `Audio`, or (samples, sample rate)."""
Part: TypeAlias = (
    str | os.PathLike | bytes | File | Image.Image | np.ndarray | Tensor | Audio | tuple[Samples, int] | Segment
)
"""One part of a prompt: text, an image or a sound. A `Segment` says which it is: its text is text, whatever it says."""


@dataclass(frozen=True)
class TextPart:
    """Text in which nothing is looked for: neither a file's name nor slots."""

    text: str


@dataclass(frozen=True)
class ImagePart:
    """An image at its place in a prompt."""

    image: Image.Image


@dataclass(frozen=True)
class AudioPart:
    """A sound at its place in a prompt: float32 [C, T] at `sample_rate` Hz; the audio tokenizer mixes what it needs."""

    wave_CT: Tensor
    sample_rate: int

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return self.wave_CT.shape[1] / self.sample_rate


def as_image(value: PictureInput, name: str = "image") -> Image.Image:
    """Any image as PIL.

    Args:
        value: the image.
        name: how errors call it where it has no path.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: not an image, or an array of another shape, type or range.
    """
    if isinstance(value, (str, os.PathLike)):
        _check_exists(value, "image")
        return decode_image(value)
    if isinstance(value, Tensor):
        value = value.detach().float() if value.is_floating_point() else value  # numpy knows no bfloat16
    elif isinstance(value, (bytearray, memoryview)):
        value = bytes(value)
    elif not isinstance(value, (bytes, Image.Image, np.ndarray)):
        if not isinstance(value, File):
            raise ValueError(
                f"{name} is given as {type(value).__name__}; wanted a path, bytes, an opened file, a PIL picture, an "
                f"array or a tensor{_several(value)}"
            )
        value = _content(value, name)
    return decode_image(value, name)


def as_audio(value: AudioInput | AudioPart, name: str = "sound") -> AudioPart:
    """Any sound as a wave.

    Args:
        value: the sound.
        name: how errors call it where it has no path.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: not a sound, empty, or not finite; or a tuple of something else.
    """
    source: Any = value
    match value:
        case AudioPart():
            return value
        case str() | os.PathLike():
            _check_exists(value, "sound")
            wave_CT, sample_rate = load_audio(str(value))
            return AudioPart(wave_CT, sample_rate)
        case Audio(samples=samples, sample_rate=rate):
            source = (_as_samples(samples, name), _as_rate(rate, name))
        case tuple():
            source = _pair(value, name)
        case bytes() | bytearray() | memoryview():
            source = bytes(value)
        case np.ndarray() | Tensor():
            raise ValueError(
                f"{name} is given as an array of shape {tuple(value.shape)} without its rate; "
                f"give (samples, sample_rate) or mmllm.Audio(samples, sample_rate)"
            )
        case _ if isinstance(value, File):
            source = _content(value, name)
        case _:
            raise ValueError(
                f"{name} is given as {type(value).__name__}; wanted a path, bytes, an opened file, "
                f"(samples, sample_rate) or mmllm.Audio{_several(value)}"
            )
    wave_CT, sample_rate = load_audio(source, name=name)
    return AudioPart(wave_CT, sample_rate)


def parse_parts(
    parts: Part | Sequence[Part],
    images: Sequence[PictureInput] = (),
    sounds: Sequence[AudioInput] = (),
) -> list[str | ImagePart | AudioPart]:
    """A prompt's parts in order, its `<|image|>` and `<|audio|>` slots filled.

    Where the text has slots, all images (or sounds) of the prompt fill them in order; without slots,
    images and sounds stay where they stand among the parts. A string without spaces that ends as an image or
    sound file does is that file. The text of a `Segment` stays as it is: neither a file's name nor with slots. Bytes
    and opened files are an image where they begin as one, else a sound.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: slots and images (or sounds) differ in number, or a part is of no known kind.
    """
    parsed = [_parse_part(part) for part in (parts if isinstance(parts, list) else [parts])]
    image_parts = [ImagePart(as_image(image, f"images[{place}]")) for place, image in enumerate(images)]
    audio_parts = [as_audio(sound, f"sounds[{place}]") for place, sound in enumerate(sounds)]
    parsed = _fill_slots(parsed, image_parts, IMAGE, ImagePart, "image")
    parsed = _fill_slots(parsed, audio_parts, AUDIO, AudioPart, "audio")
    return [part.text if isinstance(part, TextPart) else part for part in parsed]


def part_of_bytes(data: bytes, name: str) -> ImagePart | AudioPart:
    """A file's content: an image where it begins as one that Pillow knows, else a sound.

    Raises:
        ValueError: it is neither.
    """
    if _begins_as_image(data):
        return ImagePart(as_image(data, name))
    try:
        return as_audio(data, name)
    except ValueError as error:
        raise ValueError(f"{name} is neither an image nor a sound that can be read: {error}") from error


def _parse_part(part: Any) -> str | TextPart | ImagePart | AudioPart:
    match part:
        case ImagePart() | AudioPart() | TextPart():
            return part
        case Segment(text=str() as text):
            return TextPart(text)
        case Segment(image=None, audio=audio):
            return as_audio(audio)  # type: ignore[arg-type]
        case Segment(image=image):
            return ImagePart(as_image(image))  # type: ignore[arg-type]
    if isinstance(part, (str, os.PathLike)):
        suffix = Path(part).suffix.lower()
        if isinstance(part, str):
            part = arguments.text("a part of the prompt", part)
        is_path = isinstance(part, os.PathLike) or not any(c.isspace() for c in part) or _exists(part)
        if is_path and suffix in IMAGE_SUFFIXES:
            return ImagePart(as_image(part))
        if is_path and suffix in AUDIO_SUFFIXES:
            return as_audio(part)
        if isinstance(part, str):
            if is_path and _LIKE_A_PATH.search(part):
                _logger.warning("%s is taken for text: it ends as no picture or sound that can be read does", part)
            return part
        raise ValueError(
            f"{part} is neither an image nor a sound: its name ends in {suffix or 'nothing'!r}, wanted one of "
            f"{sorted(IMAGE_SUFFIXES | AUDIO_SUFFIXES)}; give text as a string"
        )
    if isinstance(part, (Audio, tuple)):
        return as_audio(part)
    if isinstance(part, (Image.Image, np.ndarray, Tensor)):
        return ImagePart(as_image(part))
    if isinstance(part, (bytes, bytearray, memoryview)):
        return part_of_bytes(bytes(part), "a part of the prompt")
    if isinstance(part, File):
        return part_of_bytes(_content(part, "a part of the prompt"), "a part of the prompt")
    raise ValueError(
        f"a part of the prompt is {type(part).__name__}; wanted text, an image (path, bytes, opened file, PIL, array, "
        f"tensor) or a sound (path, bytes, opened file, (samples, sample_rate), mmllm.Audio)"
    )


def _fill_slots(
    parts: list[str | TextPart | ImagePart | AudioPart], given: list, slot: str, kind: type, noun: str
) -> list[str | TextPart | ImagePart | AudioPart]:
    num_slots = sum(part.count(slot) for part in parts if isinstance(part, str))
    if not num_slots and not given:
        return parts
    given = [part for part in parts if isinstance(part, kind)] + given
    if num_slots != len(given):
        raise ValueError(
            f"prompt has {num_slots} {noun} slots but {len(given)} {noun}s were given; pass one {noun} for each {slot}"
        )
    filled: list[str | TextPart | ImagePart | AudioPart] = []
    fillers = iter(given)
    for part in parts:
        if isinstance(part, str):
            first, *rest = part.split(slot)
            filled.append(first)
            for text in rest:
                filled += [next(fillers), text]
        elif not isinstance(part, kind):
            filled.append(part)
    return [part for part in filled if part != ""]


def _pair(value: tuple[Any, ...], name: str) -> tuple[np.ndarray | Tensor, int]:
    """A sound as (samples, sample rate); a tuple of anything else isn't guessed."""
    match value:
        case (np.ndarray() | Tensor() | list() as samples, rate) if not isinstance(rate, (str, bytes, os.PathLike)):
            return _as_samples(samples, name), _as_rate(rate, name)
    kinds = ", ".join(type(each).__name__ for each in value[:4]) + (", …" if len(value) > 4 else "")
    raise ValueError(
        f"{name} is a tuple of ({kinds}); a tuple is (samples, sample_rate) alone: give several things as a list"
    )


def _as_samples(samples: Any, name: str) -> np.ndarray | Tensor:
    if isinstance(samples, (np.ndarray, Tensor)):
        return samples
    try:
        return np.asarray(samples, dtype=np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{name}'s samples are {type(samples).__name__} that is no array of numbers ({error}); give an array, a "
            f"tensor or a list of numbers"
        ) from None


def _as_rate(rate: Any, name: str) -> int:
    """A rate of 8000.0 is meant as 8000."""
    argument = f"{name}'s sample rate"
    if isinstance(rate, float) and rate.is_integer():
        rate = int(rate)
    return arguments.whole(argument, rate, 1)


def _content(file: File, name: str) -> bytes:
    data = file.read()
    if not isinstance(data, bytes):
        raise ValueError(f"{name} is a file that was opened as text; open it with mode 'rb'")
    return data


def _several(value: object) -> str:
    """What to say where a list stands in the place of one thing."""
    return "; a list stands where one thing does" if isinstance(value, (list, tuple)) else ""


def _begins_as_image(data: bytes) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bombs: decoding refuses them by our own bound
            Image.open(io.BytesIO(data)).close()
    except Exception:  # Pillow's plugins raise what they like
        return False
    return True


def _check_exists(path: str | os.PathLike, noun: str) -> None:
    if not _exists(os.fspath(path)):
        raise FileNotFoundError(f"no {noun} file at {path}; check the path")


def _exists(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long, or with a null byte: text, not a path
        return False
