"""Samples to a file's bytes, as they come: what is streamed is what is sent whole."""

from __future__ import annotations

import io
import struct
from typing import Any, Literal

import numpy as np
import soundfile

from mmllm.serving.errors import bad_request

Format = Literal["wav", "pcm", "pcm16", "flac", "mp3", "opus", "aac"]
MEDIA_TYPES = {
    "wav": "audio/wav", "pcm": "audio/pcm", "pcm16": "audio/pcm", "flac": "audio/flac", "mp3": "audio/mpeg",
    "opus": "audio/ogg",
}  # fmt: skip
_FILES = {"flac": ("FLAC", "PCM_16"), "mp3": ("MP3", "MPEG_LAYER_III"), "opus": ("OGG", "OPUS")}
_OPUS_RATES = (8000, 12000, 16000, 24000, 48000)
_MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
_UNKNOWN = 0xFFFFFFFF


def check_format(form: Format, sample_rate: int, param: str) -> None:
    """Refuses a format that can't be written here.

    Raises:
        ApiError: 400; it names what can.
    """
    if form in ("wav", "pcm", "pcm16"):
        return
    container, subtype = _FILES.get(form, ("", ""))
    is_there = container in soundfile.available_formats() and subtype in soundfile.available_subtypes(container)
    rates = {"opus": _OPUS_RATES, "mp3": _MP3_RATES}.get(form)
    if not is_there or (rates is not None and sample_rate not in rates):
        raise bad_request(
            f"{param} is {form}, which this server can't write at {sample_rate} Hz; take wav, pcm or flac",
            param,
            "unsupported_format",
        )


class SoundWriter:
    """Writes mono sound of 16 bits into bytes that can be sent as they come.

    A WAV's header says that its length isn't known, as is usual for streams; a FLAC's likewise.

    Args:
        form: of the file.
        sample_rate: of the samples.
    """

    def __init__(self, form: Format, sample_rate: int) -> None:
        self._form = form
        self._rate = sample_rate
        self._is_begun = False
        self._sink = _Sink()
        self._file: soundfile.SoundFile | None = None
        if form in _FILES:
            container, subtype = _FILES[form]
            sink: Any = self._sink
            self._file = soundfile.SoundFile(sink, "w", sample_rate, 1, subtype, format=container)

    def write(self, samples_T: np.ndarray) -> bytes:
        """More samples, float within [-1, 1]; the bytes that are ready, perhaps none."""
        pcm_T = (samples_T.clip(-1.0, 1.0) * 32767.0).round().astype("<i2")
        if self._file is not None:
            self._file.write(pcm_T)
            return self._sink.taken()
        head = b"" if self._is_begun or self._form != "wav" else _wav_header(self._rate)
        self._is_begun = True
        return head + pcm_T.tobytes()

    def finish(self) -> bytes:
        """The last bytes."""
        if self._file is None:
            return self.write(np.zeros(0, dtype=np.float32))
        self._file.close()
        return self._sink.taken()


class _Sink(io.RawIOBase):
    """A file that keeps what is appended; what is written over later (a header's counts) was sent already."""

    def __init__(self) -> None:
        super().__init__()
        self._new = bytearray()
        self._place = 0
        self._size = 0

    def taken(self) -> bytes:
        """What was appended since it was asked last."""
        new, self._new = bytes(self._new), bytearray()
        return new

    def write(self, data: bytes | bytearray | memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Appends, or forgets what lies before the end."""
        data = bytes(data)
        if self._place + len(data) > self._size:
            self._new += data[max(0, self._size - self._place) :]
            self._size = self._place + len(data)
        self._place += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As of a file."""
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        """As of a file."""
        return self._place

    def readinto(self, buffer: bytearray | memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Nothing: what was written was sent."""
        return 0

    def seekable(self) -> bool:
        """True."""
        return True

    def writable(self) -> bool:
        """True."""
        return True


def _wav_header(sample_rate: int) -> bytes:
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", _UNKNOWN, b"WAVE") + form + struct.pack("<4sI", b"data", _UNKNOWN)
