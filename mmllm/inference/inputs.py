"""What people hand over as image and sound, made uniform: PIL images, and waves with their rate."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmllm.data.samples.decode import ImageInput, decode_image
from mmllm.data.samples.documents import Segment
from mmllm_tokenizers.audio import load_audio
from mmllm_tokenizers.vocab import AUDIO, IMAGE

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif", ".opus"})
_LIKE_A_PATH = re.compile(r"\.[A-Za-z][A-Za-z0-9]{1,3}$")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Audio:
    """A sound that is handed to a model.

    `samples` are float in [-1, 1], [T] or [channels, T].
    """

    samples: np.ndarray | Tensor | Sequence[float]
    sample_rate: int


AudioInput: TypeAlias = str | os.PathLike | bytes | Audio | tuple[np.ndarray | Tensor, int]
"""A file, its bytes, `Audio`, or (samples, sample rate)."""
Part: TypeAlias = (
    str | os.PathLike | Image.Image | np.ndarray | Tensor | Audio | tuple[np.ndarray | Tensor, int] | Segment
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


def as_image(value: ImageInput) -> Image.Image:
    """Any image as PIL.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: not an image, or an array of another shape, type or range.
    """
    if isinstance(value, (str, os.PathLike)):
        _check_exists(Path(value), "image")
    if isinstance(value, Tensor):
        value = value.detach().float() if value.is_floating_point() else value  # numpy knows no bfloat16
    return decode_image(value)


def as_audio(value: AudioInput) -> AudioPart:
    """Any sound as a wave.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: not a sound, empty, or not finite.
    """
    if isinstance(value, Audio):
        value = (_as_samples(value.samples), value.sample_rate)
    if isinstance(value, (str, os.PathLike)):
        _check_exists(Path(value), "sound")
        value = str(value)
    elif isinstance(value, np.ndarray | Tensor):
        raise ValueError(
            f"a sound is given as an array of shape {tuple(value.shape)} without its rate; "
            f"give (samples, sample_rate) or mmllm.Audio(samples, sample_rate)"
        )
    elif not isinstance(value, (bytes, tuple)):
        raise ValueError(
            f"a sound is given as {type(value).__name__}; wanted a path, bytes, (samples, sample_rate) or mmllm.Audio"
        )
    wave_CT, sample_rate = load_audio(value)
    return AudioPart(wave_CT, int(sample_rate))


def parse_parts(
    parts: Part | Sequence[Part],
    images: Sequence[ImageInput] = (),
    sounds: Sequence[AudioInput] = (),
) -> list[str | ImagePart | AudioPart]:
    """A prompt's parts in order, its `<|image|>` and `<|audio|>` slots filled.

    Where the text has slots, all images (or sounds) of the prompt fill them in order; without slots,
    images and sounds stay where they stand among the parts. A string without spaces that ends as an image or
    sound file does is that file. The text of a `Segment` stays as it is: neither a file's name nor with slots.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: slots and images (or sounds) differ in number, or a part is of no known kind.
    """
    single = isinstance(parts, (str, bytes, os.PathLike, tuple, Image.Image, np.ndarray, Tensor, Audio, Segment))
    parsed = [_parse_part(part) for part in ([parts] if single else parts)]  # type: ignore[list-item]
    image_parts = [ImagePart(as_image(image)) for image in images]
    audio_parts = [as_audio(sound) for sound in sounds]
    parsed = _fill_slots(parsed, image_parts, IMAGE, ImagePart, "image")
    parsed = _fill_slots(parsed, audio_parts, AUDIO, AudioPart, "audio")
    return [part.text if isinstance(part, TextPart) else part for part in parsed]


def _parse_part(part: Any) -> str | TextPart | ImagePart | AudioPart:
    match part:
        case ImagePart() | AudioPart():
            return part
        case Segment(text=str() as text):
            return TextPart(text)
        case Segment(image=None, audio=audio):
            return as_audio(audio)  # type: ignore[arg-type]
        case Segment(image=image):
            return ImagePart(as_image(image))  # type: ignore[arg-type]
    if isinstance(part, (str, os.PathLike)):
        suffix = Path(part).suffix.lower()
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
    raise ValueError(
        f"a part of the prompt is {type(part).__name__}; wanted text, an image (path, PIL, array, tensor) "
        f"or a sound (path, (samples, sample_rate), mmllm.Audio)"
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


def _as_samples(samples: np.ndarray | Tensor | Sequence[float]) -> np.ndarray | Tensor:
    return samples if isinstance(samples, (np.ndarray, Tensor)) else torch.tensor(samples, dtype=torch.float32)


def _check_exists(path: Path, noun: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"no {noun} file at {path}; check the path")


def _exists(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long, or with a null byte: text, not a path
        return False
