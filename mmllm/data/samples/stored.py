"""What a model computed of a sample and a shard stores beside it: codec units, image features, and whose they are.

Shapes: K codebooks, F frames; N images, P features an image, C channels, H and W pixels.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmllm.data.samples.decode import ImageTransform

COLUMN = "image_features_hash"
"""Key of a row's metadata: the hash of what made its pictures' features."""
_ENDING = "features.npz"


def _pack_arrays(**arrays: np.ndarray) -> bytes:
    """An `.npz`, the same to the byte each time."""
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # pyright: ignore[reportArgumentType]
    return stream.getvalue()


def _unpack_array(data: bytes, name: str, maker: str, wanted: str, what: str) -> np.ndarray:
    """The array `name` of an `.npz`.

    Args:
        data: The file.
        name: Of the array.
        maker: Key of the hash of what made it.
        wanted: The hash that it must have.
        what: How errors begin: where the file is, and what it holds.

    Raises:
        ValueError: It is broken, or something else made it.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            found, array = str(arrays[maker]), arrays[name]
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{what} are broken ({type(error).__name__})") from error
    if found != wanted:
        raise ValueError(
            f"{what} were made by {found[:12]}, but {wanted[:12]} is wanted; build the shards again with that model"
        )
    return array


def pack_codes(codes_KF: np.ndarray, codec: str, frame_rate: float, pointer_F: np.ndarray | None = None) -> bytes:
    """A `codec.npz`: uint16 codes `[codebooks, frames]`, the codec's hash, frames a second.

    Of speech that a model made, also `pointer`: which letter of its text each frame says.
    """
    pointer = {} if pointer_F is None else {"pointer": pointer_F.astype(np.int64)}
    codes_KF = codes_KF.astype(np.uint16)
    return _pack_arrays(codes=codes_KF, codec=np.array(codec), frame_rate=np.array(frame_rate), **pointer)


def unpack_codes(data: bytes, codec: str, name: str) -> np.ndarray:
    """Codes int64 `[K, F]` from a `codec.npz`.

    Raises:
        ValueError: It is broken, or another codec made it.
    """
    return _unpack_array(data, "codes", "codec", codec, f"{name}: the stored codes").astype(np.int64)


@dataclass(frozen=True)
class ImageEncoder:
    """A tower behind a function, since the data knows no model: whoever builds shards hands it in."""

    transform: ImageTransform
    hash: str
    """As `features_hash` gives it."""
    encode: Callable[[np.ndarray], np.ndarray]
    """uint8 [N, 3, H, W] to float32 [N, P, C]; picklable, and alike to the bit in all processes."""
    factory: str | None = None
    """By what name tasks of other machines find the function that makes the same encoder; without it none can."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What that function takes, as JSON."""


def features_hash(tower: str, transform: ImageTransform) -> str:
    """Names what makes features: the tower (by its own hash) and how pictures reach it."""
    value = [tower, transform.to_dict()]
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def features_ending(picture: str) -> str:
    """Where the features of a picture lie: those of `jpg` in `features.npz`, of `0.jpg` in `0.features.npz`."""
    number, dot, _ = picture.rpartition(".")
    return f"{number}{dot}{_ENDING}"


def pack_features(features_PC: np.ndarray, made_by: str, name: str) -> bytes:
    """A `features.npz`: float16 `[P, C]`, and the hash of what made them.

    Raises:
        ValueError: They don't fit into float16.
    """
    largest = np.abs(features_PC).max()
    if not largest <= np.finfo(np.float16).max:
        raise ValueError(f"{name}: its image features reach {largest:g}, more than float16 holds; take another layer")
    return _pack_arrays(features=features_PC.astype(np.float16), made_by=np.array(made_by))


def unpack_features(data: bytes, made_by: str, name: str) -> np.ndarray:
    """Features float16 `[P, C]` from a `features.npz`.

    Raises:
        ValueError: It is broken, or something else made it.
    """
    return _unpack_array(data, "features", "made_by", made_by, f"{name}: the stored image features")
