"""Codec units that are stored with sounds. Shapes: K codebooks, F frames."""

from __future__ import annotations

import numpy as np

from mmllm.data.samples.npz import pack_arrays, unpack_array


def pack_codes(codes_KF: np.ndarray, codec: str, frame_rate: float) -> bytes:
    """A `codec.npz`: uint16 codes `[codebooks, frames]`, the codec's hash, frames a second."""
    return pack_arrays(codes=codes_KF.astype(np.uint16), codec=np.array(codec), frame_rate=np.array(frame_rate))


def unpack_codes(data: bytes, codec: str, name: str) -> np.ndarray:
    """Codes int64 `[K, F]` from a `codec.npz`.

    Raises:
        ValueError: It is broken, or another codec made it.
    """
    return unpack_array(data, "codes", "codec", codec, f"{name}: the stored codes").astype(np.int64)
