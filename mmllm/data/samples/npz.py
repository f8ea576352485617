"""What a model computed of a sample and a shard stores beside it: an array, and the hash of what made it."""

from __future__ import annotations

import io
import zipfile

import numpy as np


def pack_arrays(**arrays: np.ndarray) -> bytes:
    """An `.npz`, the same to the byte each time."""
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # pyright: ignore[reportArgumentType]
    return stream.getvalue()


def unpack_array(data: bytes, name: str, maker: str, wanted: str, what: str) -> np.ndarray:
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
