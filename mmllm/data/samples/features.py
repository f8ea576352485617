"""Image features that are stored with pictures, and the tower that makes them, as the data sees it.

Shapes: N images, P features an image, C channels, H and W pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmllm.data.samples.decode import ImageTransform
from mmllm.data.samples.npz import pack_arrays, unpack_array

COLUMN = "image_features_hash"
"""Key of a row's metadata: the hash of what made its pictures' features."""
_ENDING = "features.npz"


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
    value = [tower, dataclasses.asdict(transform)]
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
    return pack_arrays(features=features_PC.astype(np.float16), made_by=np.array(made_by))


def unpack_features(data: bytes, made_by: str, name: str) -> np.ndarray:
    """Features float16 `[P, C]` from a `features.npz`.

    Raises:
        ValueError: It is broken, or something else made it.
    """
    return unpack_array(data, "features", "made_by", made_by, f"{name}: the stored image features")
