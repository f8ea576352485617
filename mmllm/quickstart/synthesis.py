"""Speech synthesis with espeak-ng, called through ctypes from the `espeakng-loader` wheel.

espeak-ng keeps its state (voice tables, phases of flutter, a random generator) in the library's static variables and
`espeak_Terminate` does not reset them. So each `Espeak` loads a copy of the library of its own and unloads it when it
is closed: what it says depends on the calls before it within one `Espeak`, never on anything else.
C interface: https://github.com/espeak-ng/espeak-ng/blob/1.52.0/src/include/espeak-ng/speak_lib.h

Shapes: T samples.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
import wave
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from mmllm.quickstart.spoken_words import Phoneme

ESPEAK_RATE = 22050
"""Samples a second of espeak-ng's output."""
_SYNCHRONOUS, _PHONEME_EVENTS, _DONT_EXIT, _UTF8 = 2, 1, 0x8000, 1
_END_OF_EVENTS, _PHONEME = 0, 7
_WORDS_A_MINUTE, _PITCH = 1, 3
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)

VARIANTS = (
    "Alex", "Alicia", "Andrea", "Andy", "Annie", "Denis", "Gene", "Henrique", "Hugo", "Jacky", "Lee", "Marco", "Mario",
    "Michael", "Mike", "adam", "anika", "belinda", "benjamin", "david", "edward", "f1", "f2", "f3", "f4", "f5",
    "grandma", "grandpa", "john", "linda", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "max", "miguel", "norbert",
    "paul", "quincy", "rob", "steph",
)  # fmt: skip
"""Variants with formants of their own (another throat, not another pitch), one of each family; no robots, no whisper,
none whose breath noise comes from the C library's random generator."""
ACCENTS = ("en-us", "en-gb-x-rp", "en-us", "en-gb-scotland")


def voices(heldout: bool) -> list[str]:
    """espeak-ng's names of the voices to train on, or of the held-out ones: every fifth variant."""
    return [
        f"{ACCENTS[i % len(ACCENTS)]}+{variant}"
        for i, variant in enumerate(VARIANTS)
        if (i % 5 == 4) == heldout
    ]  # fmt: skip


class _Event(ctypes.Structure):
    """espeak-ng's `espeak_EVENT`."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    )


class Espeak:
    """One freshly loaded espeak-ng; a context manager.

    Raises:
        ModuleNotFoundError: The `espeakng-loader` wheel is not installed.
        OSError: Its library cannot be loaded.
        RuntimeError: The library cannot be initialized, or has no data.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "speech synthesis needs the espeakng-loader wheel, which is not installed; pip install 'mmllm[speech]'",
                name="espeakng_loader",
            ) from error
        data = str(espeakng_loader.get_data_path()).encode()
        self._folder: tempfile.TemporaryDirectory[str] | None = tempfile.TemporaryDirectory(
            prefix="espeak-", ignore_cleanup_errors=True
        )
        try:
            self._library = ctypes.CDLL(shutil.copy(espeakng_loader.get_library_path(), self._folder.name))
        except OSError as error:
            self._folder.cleanup()
            raise OSError(f"espeak-ng's library does not load: {error}; reinstall espeakng-loader") from error
        self._blocks: list[bytes] = []
        self._phonemes: list[Phoneme] = []
        self._callback = _CALLBACK(self._receive)
        rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, data, _PHONEME_EVENTS | _DONT_EXIT)
        if rate != ESPEAK_RATE:
            self._unload()
            raise RuntimeError(f"espeak_Initialize returned {rate}; expected {ESPEAK_RATE} samples a second; "
                               f"reinstall espeakng-loader")  # fmt: skip
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, wave_address: int | None, num_samples: int, events_address: int | None) -> int:
        if wave_address and num_samples > 0:
            self._blocks.append(ctypes.string_at(wave_address, 2 * num_samples))
        while events_address and (event := _Event.from_address(events_address)).type != _END_OF_EVENTS:
            if event.type == _PHONEME:
                name = event.id.decode("utf-8", "replace")
                self._phonemes.append(Phoneme(name, event.text_position - 1, event.sample / ESPEAK_RATE))
            events_address += ctypes.sizeof(_Event)
        return 0

    @property
    def phonemes(self) -> list[Phoneme]:
        """What was said last: its phonemes and pauses, in order."""
        return list(self._phonemes)

    def say(self, text: str, voice: str, words_per_minute: int = 175, pitch: int = 50) -> NDArray[np.int16]:
        """The samples of a text, int16 [T] at 22,050 Hz; `phonemes` are its phonemes then.

        Args:
            text: What to say.
            voice: espeak-ng's name of it with a variant, such as "en-us+f2".
            words_per_minute: Speed, 80 to 450.
            pitch: 0 to 100.

        Raises:
            ValueError: There is no such voice.
        """
        library = self._library
        if library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}; expected a name such as 'en-us+f2'")
        library.espeak_SetParameter(_WORDS_A_MINUTE, words_per_minute, 0)
        library.espeak_SetParameter(_PITCH, pitch, 0)
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        self._blocks.clear()
        self._phonemes.clear()
        data = text.encode() + b"\0"
        status = library.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, 0, 0, _UTF8, None, None)
        if status != 0:
            raise RuntimeError(f"espeak_Synth returned status {status} for {text!r} with voice {voice!r}")
        return np.frombuffer(b"".join(self._blocks), dtype=np.int16)

    def close(self) -> None:
        """Ends espeak-ng and unloads its library. No call may follow."""
        if self._folder is not None:
            self._library.espeak_Terminate()
            self._unload()

    def _unload(self) -> None:
        if self._folder is None:
            return
        handle = self._library._handle
        del self._library
        if os.name == "posix":
            ctypes.CDLL(None).dlclose(ctypes.c_void_p(handle))
        self._folder.cleanup()
        self._folder = None

    def __enter__(self) -> Espeak:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def synthesize(text: str, voice: str, words_per_minute: int = 175, pitch: int = 50) -> NDArray[np.int16]:
    """One text said by a fresh `Espeak`: equal arguments give equal samples. See `Espeak.say`."""
    with Espeak() as espeak:
        return espeak.say(text, voice, words_per_minute, pitch)


def resample(wave_T: NDArray[np.floating], from_rate: int, to_rate: int) -> NDArray[np.float32]:
    """A whole sound at another rate, by cutting or padding its spectrum; float32 [ceil(T * to_rate / from_rate)].

    Band-limited exactly, with a short slope below the new limit against ringing. Costs no import of torch, which
    matters for the processes that synthesize.
    """
    wave_T = np.asarray(wave_T, dtype=np.float32)
    num_out = -(-len(wave_T) * to_rate // from_rate)
    if from_rate == to_rate or not len(wave_T):
        return wave_T
    common = int(np.gcd(from_rate, to_rate))
    block_in, block_out = from_rate // common, to_rate // common
    num_blocks = -(-(len(wave_T) + block_in) // (8 * block_in)) * 8
    spectrum = np.fft.rfft(wave_T, num_blocks * block_in)
    num_bins = num_blocks * block_out // 2 + 1
    shared = min(num_bins, len(spectrum))
    slope = min(shared, max(1, shared // 25))
    kept = np.zeros(num_bins, dtype=spectrum.dtype)
    kept[:shared] = spectrum[:shared]
    kept[shared - slope : shared] *= 0.5 + 0.5 * np.cos(np.pi * np.arange(1, slope + 1) / slope)
    out = np.fft.irfft(kept, num_blocks * block_out) * (block_out / block_in)
    return out[:num_out].astype(np.float32)


def trim_silence(
    wave_T: NDArray[np.floating], rate: int, keep_seconds: float = 0.04
) -> tuple[NDArray[np.floating], int]:
    """A sound with `keep_seconds` of silence at both ends: cut off or, where there is less, added as zeros.

    Silence is what lies 40 dB below the loudest 10 ms.

    Returns:
        The trimmed sound, and how many samples later than before its content begins (negative where it is earlier).
    """
    hop_samples = max(1, rate // 100)
    num_hops = len(wave_T) // hop_samples
    if num_hops == 0:
        return wave_T, 0
    energy = (wave_T[: num_hops * hop_samples].reshape(num_hops, hop_samples).astype(np.float64) ** 2).mean(axis=1)
    loud = np.flatnonzero(energy > 1e-4 * energy.max())
    if not len(loud):
        return wave_T, 0
    keep_samples, first_sample = round(keep_seconds * rate), int(loud[0]) * hop_samples
    padded_T = np.pad(wave_T, keep_samples)
    return padded_T[first_sample : (int(loud[-1]) + 1) * hop_samples + 2 * keep_samples], keep_samples - first_sample


def clean_speech(samples_T: NDArray[np.int16], rate: int, level_db: float) -> tuple[NDArray[np.int16], float]:
    """espeak-ng's samples resampled, trimmed and set to a level.

    Args:
        samples_T: At 22,050 Hz.
        rate: Samples a second of the result.
        level_db: Root mean square of the result in decibels of full scale, less where it would clip.

    Returns:
        The samples, int16, and how many seconds later than in `samples_T` all is said.
    """
    wave_T, num_later = trim_silence(resample(samples_T.astype(np.float32) / 32768, ESPEAK_RATE, rate), rate)
    power = float(np.sqrt(np.mean(wave_T.astype(np.float64) ** 2))) if len(wave_T) else 0.0
    peak = float(np.abs(wave_T).max(initial=0.0))
    gain = min(10 ** (level_db / 20) / power, 0.97 / peak) if power > 0 else 1.0
    return np.round(wave_T * gain * 32767).astype(np.int16), num_later / rate


def write_wav(path: Path, samples_T: NDArray[np.int16], rate: int) -> None:
    """Writes mono 16-bit samples as WAV."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples_T.astype("<i2").tobytes())
