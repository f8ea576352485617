"""A row with its files in memory, of which documents are made.

Shapes: K codebooks, F frames, S features a picture, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmllm.data.samples.conversations import Said
from mmllm.data.samples.decode import ImageInput

AudioInput = Any
"""A path, bytes, a waveform at the codec's rate, `(waveform, sample_rate)`, or int64 codes `[K, F]`."""

WORDS = "words"
"""Key of a row's metadata: when each of its words is said."""

ALIGNED = "aligned"
"""Of a stored row that has `WORDS`: True, for filters."""


@dataclass(frozen=True)
class Segment:
    """A piece of an interleaved document: one of text, a picture, or a sound."""

    text: str | None = None
    image: ImageInput | None = None
    audio: AudioInput = None
    role: str | None = None
    """Of a conversation: `system`, `user`, `assistant` or `tool`."""
    features_SC: np.ndarray | None = None
    """As `Sample.features_SC`."""
    is_trained: bool = True
    """Whether an answer of a conversation is to be predicted."""
    new_turn: bool = False
    """Whether it begins a turn though the one before it is of the same role."""

    @property
    def said(self) -> Said:
        """Whose turn it is, and its text."""
        kind = "image" if self.image is not None else "audio" if self.audio is not None else "text"
        return Said(self.role, kind, self.text or "", self.new_turn, self.is_trained)


@dataclass(frozen=True)
class Sample:
    """A row with its files in memory; what `build_document` reads."""

    key: str
    text: str | None = None
    image: ImageInput | None = None
    audio: AudioInput = None
    codes_KF: np.ndarray | None = None
    """Codes of `audio` stored with it; they stand in for encoding it."""
    segments: tuple[Segment, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    """The row's other keys; `speaker` is the voice, `question` and `answer` end an interleaved row."""
    features_SC: np.ndarray | None = None
    """Features of `image` stored with it; they stand in for decoding it and for the image tower."""


def as_segment(value: Any) -> Segment:
    """A `Segment` from a dict with one key, a string (text), or a picture.

    Raises:
        ValueError: It is none of these.
    """
    match value:
        case Segment():
            return value
        case str():
            return Segment(text=value)
        case {"text": text}:
            return Segment(text=text)
        case {"image": image}:
            return Segment(image=image)
        case {"audio": audio}:
            return Segment(audio=audio)
        case dict():
            raise ValueError(f"a segment has the keys {sorted(value)}; give one of 'text', 'image' or 'audio'")
    return Segment(image=value)
