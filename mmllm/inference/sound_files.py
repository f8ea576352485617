"""Sound out: samples as 16-bit WAV, FLAC or raw PCM, whole or while they are being made.

Shapes: T samples.
"""

from __future__ import annotations

import io
import struct
from typing import BinaryIO, Literal, cast, get_args

import numpy as np
import soundfile

SoundFormat = Literal["wav", "pcm", "flac"]
CONTENT_TYPES: dict[str, str] = {"wav": "audio/wav", "pcm": "audio/pcm", "flac": "audio/flac"}
"""Media types; that of raw samples tells neither rate nor width: 16 bits, little-endian, one channel."""

_UNKNOWN_SIZE = 0xFFFFFFFF
"""Players read on to the end of a stream whose header says so."""
_FLAC_LEVEL = 0.25
"""Of 0 to 1: as high as blocks have 1,152 samples (libFLAC's level 2); above, they have 4,096, which is half a second
of 8 kHz to wait for."""


def to_pcm(samples_T: np.ndarray) -> np.ndarray:
    """int16 of float samples in [-1, 1]; what lies beyond is clipped."""
    return np.rint(samples_T * 32768.0).clip(-32768, 32767).astype("<i2")


def encode_sound(samples_T: np.ndarray, sample_rate: int, format: SoundFormat) -> bytes:
    """A whole sound as a file of one channel and 16 bits.

    Args:
        samples_T: float in [-1, 1].
        sample_rate: samples a second.
        format: "wav", "flac", or "pcm" for samples without a header, little-endian.

    Raises:
        ValueError: another format, or samples of another shape.
    """
    _check(format)
    pcm_T = _checked_pcm(samples_T)
    if format == "pcm":
        return pcm_T.tobytes()
    file = io.BytesIO()
    soundfile.write(file, pcm_T, sample_rate, format=format.upper(), subtype="PCM_16")
    return file.getvalue()


class StreamEncoder:
    """A sound as bytes while it is being made: all bytes in a row are one file, whose header knows no length.

    Its samples are those of `encode_sound`. A FLAC gives its bytes block by block, of 1,152 samples; without libsndfile
    looking back they lack the checksum of all samples, which players do without.

    Args:
        sample_rate: samples a second.
        format: "wav", "flac" or "pcm".

    Raises:
        ValueError: another format.
    """

    def __init__(self, sample_rate: int, format: SoundFormat):
        _check(format)
        self.content_type = CONTENT_TYPES[format]
        self._header = _wav_header(sample_rate) if format == "wav" else b""
        self._sink = _Sink()
        self._flac: soundfile.SoundFile | None = None
        if format == "flac":
            self._flac = soundfile.SoundFile(
                cast(BinaryIO, self._sink), "w", sample_rate, 1, "PCM_16", format="FLAC", compression_level=_FLAC_LEVEL
            )

    def push(self, samples_T: np.ndarray) -> bytes:
        """Bytes that are final once these samples have come, perhaps none.

        Args:
            samples_T: float in [-1, 1].

        Raises:
            ValueError: samples of another shape.
        """
        pcm_T = _checked_pcm(samples_T)
        if self._flac is None:
            header, self._header = self._header, b""
            return header + pcm_T.tobytes()
        if len(pcm_T):
            self._flac.write(pcm_T)
        return self._sink.take()

    def finish(self) -> bytes:
        """The last bytes."""
        if self._flac is None:
            return self._header
        self._flac.close()
        return self._sink.take()


class _Sink:
    """A file that a writer may look back into, of which each byte is given away as it was written first."""

    def __init__(self):
        self._file = io.BytesIO()
        self._num_taken = 0
        self.seek, self.tell = self._file.seek, self._file.tell

    def write(self, data: bytes) -> int:
        place = self._file.tell()
        num_late = min(len(data), max(0, self._num_taken - place))
        self._file.seek(num_late, io.SEEK_CUR)
        self._file.write(data[num_late:])
        return len(data)

    def take(self) -> bytes:
        data = self._file.getvalue()[self._num_taken :]
        self._num_taken += len(data)
        return data


def _wav_header(sample_rate: int) -> bytes:
    form = struct.pack("<HHIIHH", 1, 1, sample_rate, 2 * sample_rate, 2, 16)
    riff, data = (struct.pack("<4sI", name, _UNKNOWN_SIZE) for name in (b"RIFF", b"data"))
    return riff + b"WAVE" + struct.pack("<4sI", b"fmt ", len(form)) + form + data


def _check(format: str) -> None:
    if format not in get_args(SoundFormat):
        raise ValueError(f"the sound format is {format!r}; it must be one of {', '.join(get_args(SoundFormat))}")


def _checked_pcm(samples_T: np.ndarray) -> np.ndarray:
    if samples_T.ndim != 1 or not np.issubdtype(samples_T.dtype, np.floating):
        raise ValueError(
            f"samples have shape {list(samples_T.shape)} and type {samples_T.dtype}; they must be [samples], float"
        )
    return to_pcm(samples_T)
