"""Light edits of texts and pictures, as copies on the web have them, and texts and pictures of another topic."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

NOISE_LEVELS = 3
"""Of 255, up or down, in each pixel of a picture's near copy."""
JPEG_QUALITIES = (85, 96)
NOISE_GRID = 8
"""Colours along a side of a picture of noise."""
_MARKS = (".", "!", ",", " .")


def edited_text(text: str, generator: np.random.Generator) -> str:
    """A text with one light edit: two neighbours change places, a word goes, or case or punctuation changes.

    It always differs from the text; edits that would change nothing, or need more words than there are, aren't drawn.

    Args:
        text: with a word or more.
        generator: draws the edit and its place.
    """
    words = text.split()
    place = int(generator.integers(len(words)))
    swapped = [*words[: place - 1], words[place], words[place - 1], *words[place + 1 :]] if place else words
    dropped = words[:place] + words[place + 1 :]
    upper = [*words[:place], words[place].upper(), *words[place + 1 :]]
    marked = [*words[:place], words[place] + _MARKS[generator.integers(len(_MARKS))], *words[place + 1 :]]
    edits = [" ".join(edit) for edit in (swapped, dropped, upper, marked) if edit and edit != words]
    return edits[generator.integers(len(edits))]


def edited_picture(picture: Image.Image, generator: np.random.Generator) -> bytes:
    """A picture with noise of a few levels in each pixel, encoded anew as a JPEG.

    Args:
        picture: RGB.
        generator: draws noise and quality.
    """
    levels_HW3 = np.asarray(picture).astype(np.int16)
    levels_HW3 += generator.integers(-NOISE_LEVELS, NOISE_LEVELS + 1, levels_HW3.shape, dtype=np.int16)
    stream = io.BytesIO()
    noisy = Image.fromarray(levels_HW3.clip(0, 255).astype(np.uint8))
    noisy.save(stream, "JPEG", quality=int(generator.integers(*JPEG_QUALITIES)))
    return stream.getvalue()


def noise_picture(size: tuple[int, int], generator: np.random.Generator) -> bytes:
    """A PNG of random colours that run into each other, and show nothing.

    Args:
        size: width and height.
        generator: draws the colours.
    """
    coarse = generator.integers(256, size=(NOISE_GRID, NOISE_GRID, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(stream, "PNG")
    return stream.getvalue()


def other_text(num_words: int, texts: Sequence[str], generator: np.random.Generator) -> str:
    """A run of words from one of some texts: so many of them, or all where a text has fewer.

    Args:
        num_words: that are wanted.
        texts: of another topic, each with a word or more.
        generator: draws the text and where the run begins.
    """
    words = texts[int(generator.integers(len(texts)))].split()
    start = int(generator.integers(max(1, len(words) - num_words + 1)))
    return " ".join(words[start : start + num_words])
