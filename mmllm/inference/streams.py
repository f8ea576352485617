"""Answers that are handed on while they are made: text by whole characters, speech as sound.

Shapes: K codebooks, F frames, T samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np

from mmllm.inference.completion import Completion, TextPiece
from mmllm.inference.engine.requests import SpokenUnits, TextResult, TextUpdate, UnitsUpdate
from mmllm.inference.running import Updates
from mmllm.inference.speaking import Waveform
from mmllm.inference.streaming_sound import SoundStream


@dataclass(frozen=True, eq=False)
class SoundPiece:
    """More of a speech.

    Attributes:
        samples: float32 [T] in about [-1, 1].
        sample_rate: samples a second.
    """

    samples: np.ndarray
    sample_rate: int


class _Stream:
    """What texts and speech have in common. Leaving its `with` ends what isn't done."""

    def __init__(self, updates: Updates) -> None:
        self._updates = updates

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """As `close`."""
        self.close()

    def close(self) -> None:
        """Ends it if it isn't done; from any thread."""
        self._updates.close()


class TextStream(_Stream, Iterator[TextPiece]):
    """Pieces of a text; together they are the text of `result`."""

    def __init__(self, updates: Updates) -> None:
        super().__init__(updates)
        self._result: Completion | None = None

    def __next__(self) -> TextPiece:
        """The next piece; at the end StopIteration, or what went wrong."""
        try:
            update = next(self._updates)
        except StopIteration:
            self._end()
            raise
        assert isinstance(update, TextUpdate)
        return TextPiece.of(update)

    @property
    def result(self) -> Completion:
        """All of it: what the same call without a stream gives.

        Raises:
            ValueError: there are pieces left.
        """
        if self._result is None:
            raise ValueError("the text is still being written; take all pieces first")
        return self._result

    def _end(self) -> None:
        result = self._updates.result()
        assert isinstance(result, TextResult)
        self._result = Completion.of(result)


class SpeechStream(_Stream, Iterator[SoundPiece]):
    """Pieces of a speech; together they are the samples of `result`.

    Args:
        updates: of the units.
        sound: that they make.
    """

    def __init__(self, updates: Updates, sound: SoundStream) -> None:
        super().__init__(updates)
        self._sound = sound
        self._samples: list[np.ndarray] = []
        self._result: Waveform | None = None

    @property
    def sample_rate(self) -> int:
        """Samples a second."""
        return self._sound.sample_rate

    def __next__(self) -> SoundPiece:
        """The next piece, which has some samples; at the end StopIteration, or what went wrong."""
        while self._result is None:
            update = next(self._updates, None)
            if update is None:
                samples_T = self._end()
            else:
                assert isinstance(update, UnitsUpdate)
                samples_T = self._sound.push(update.codes_KF, update.pointer_F)
                self._samples.append(samples_T)
            if len(samples_T):
                return SoundPiece(samples_T, self.sample_rate)
        raise StopIteration

    @property
    def result(self) -> Waveform:
        """All of it: what `Model.speak` gives.

        Raises:
            ValueError: there are pieces left.
        """
        if self._result is None:
            raise ValueError("the text is still being spoken; take all pieces first")
        return self._result

    def _end(self) -> np.ndarray:
        units = self._updates.result()
        assert isinstance(units, SpokenUnits)
        samples_T = self._sound.finish(units.is_whole)
        self._samples.append(samples_T)
        self._result = Waveform(
            np.concatenate(self._samples),
            self.sample_rate,
            units.codes_KF.numpy(),
            self._sound.words,
            units.num_bounded,
            units.is_whole,
        )
        return samples_T
