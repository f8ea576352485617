"""Sound in: files, bytes and arrays become one checked float32 waveform; rates and channels are converted.

Shapes: C channels, T samples.
"""

from __future__ import annotations

import io
from fractions import Fraction
from functools import lru_cache
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor

AudioSource = str | Path | bytes | np.ndarray | Tensor | tuple[Any, int]
"""A file's path or content, or (array, sample rate). Arrays are [T] or [C, T], float or integer PCM."""

MAX_CHANNELS = 32
MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 100, 1_000_000
_MAX_PHASES_TIMES_TAPS = 4_000_000


def load_audio(
    source: AudioSource,
    sample_rate: int | None = None,
    *,
    name: str | None = None,
    max_seconds: float | None = None,
) -> tuple[Tensor, int]:
    """Reads a sound.

    Args:
        source: path, file content, array, tensor, or (array or tensor, sample rate).
        sample_rate: of a bare array or tensor, samples a second.
        name: how errors call the sound; by default its path.
        max_seconds: longer sounds are refused before they are decoded.

    Returns:
        (wave_CT float32 in about [-1, 1], sample rate).

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the sound is unreadable, empty, not finite, too long, or has no rate or an odd shape.
    """
    if isinstance(source, tuple):
        source, sample_rate = source
    if isinstance(source, str | Path):
        name = name or str(source)
        if not Path(source).is_file():
            raise FileNotFoundError(f"sound file {name} does not exist")
        wave_CT, rate = _read(str(source), name, max_seconds)
    elif isinstance(source, bytes | bytearray | memoryview):
        name = name or "sound of bytes"
        wave_CT, rate = _read(io.BytesIO(bytes(source)), name, max_seconds)
    elif isinstance(source, np.ndarray | Tensor):
        name = name or "sound array"
        if sample_rate is None:
            raise ValueError(f"{name} has no sample rate; give (array, sample_rate)")
        wave_CT, rate = _from_array(source, name), sample_rate
    else:
        raise ValueError(
            f"a sound cannot be read from {type(source).__name__}; give a path, bytes, or (array, sample_rate)"
        )
    _check(wave_CT, rate, name, max_seconds)
    return wave_CT, int(rate)


def resample(wave: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Resamples along the last axis (windowed sinc, torchaudio's defaults).

    The result has ceil(T * to / from) samples. Rates that share no small ratio (44,101 to 8,000 Hz) are
    taken for the nearest that does, less than 0.02% off: the exact filter bank would need gigabytes.
    """
    if from_rate == to_rate:
        return wave
    return _resampler(*_simple_ratio(from_rate, to_rate))(wave)


def to_channels(wave_CT: Tensor, num_channels: int) -> Tensor:
    """The wave with `num_channels` channels: the mean for mono, copies of it for more.

    Channels that are already right stay as they are.
    """
    if wave_CT.shape[0] == num_channels:
        return wave_CT
    mono_1T = wave_CT.mean(dim=0, keepdim=True)
    return mono_1T if num_channels == 1 else mono_1T.expand(num_channels, -1)


def to_mono(wave_CT: Tensor) -> Tensor:
    """[T] of [C, T] (the channels' mean) or of [T]."""
    return wave_CT if wave_CT.dim() == 1 else to_channels(wave_CT, 1)[0]


def _read(file: str | io.BytesIO, name: str, max_seconds: float | None) -> tuple[Tensor, int]:
    try:
        with soundfile.SoundFile(file) as sound:
            rate = sound.samplerate
            _check_length(sound.frames / max(rate, 1), name, max_seconds)
            samples_TC = sound.read(dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
        raise ValueError(f"{name} cannot be read as sound: {error}; give WAV, FLAC, OGG or MP3") from error
    return torch.from_numpy(np.ascontiguousarray(samples_TC.T)), rate


def _from_array(array: np.ndarray | Tensor, name: str) -> Tensor:
    wave = torch.from_numpy(np.ascontiguousarray(array)) if isinstance(array, np.ndarray) else array.detach().cpu()
    if wave.dtype == torch.uint8:
        wave = (wave.float() - 128.0) / 128.0
    elif wave.dtype in (torch.int8, torch.int16, torch.int32):
        wave = wave.double().div(-float(torch.iinfo(wave.dtype).min)).float()
    elif wave.is_floating_point():
        wave = wave.float()
    else:
        raise ValueError(f"{name} holds {wave.dtype}; samples must be float, or integer PCM of 8, 16 or 32 bits")
    if wave.dim() == 1:
        wave = wave[None]
    if wave.dim() != 2 or wave.shape[0] > MAX_CHANNELS:
        raise ValueError(
            f"{name} has shape {list(array.shape)}; it must be [samples] or [channels, samples] with at most "
            f"{MAX_CHANNELS} channels (transpose an array of [samples, channels])"
        )
    return wave


def _check(wave_CT: Tensor, rate: int, name: str, max_seconds: float | None) -> None:
    if not MIN_SAMPLE_RATE <= rate <= MAX_SAMPLE_RATE:
        raise ValueError(
            f"{name} has a sample rate of {rate} Hz; it must lie in [{MIN_SAMPLE_RATE}, {MAX_SAMPLE_RATE}]"
        )
    if wave_CT.numel() == 0:
        raise ValueError(f"{name} holds no sound: its length is zero")
    _check_length(wave_CT.shape[1] / rate, name, max_seconds)
    if not bool(torch.isfinite(wave_CT).all()):
        bad = int((~torch.isfinite(wave_CT)).sum())
        raise ValueError(f"{name} holds {bad} samples that are NaN or infinite; write it again from its source")


def _check_length(seconds: float, name: str, max_seconds: float | None) -> None:
    if max_seconds is not None and seconds > max_seconds:
        raise ValueError(f"{name} lasts {seconds:.1f} s; the longest allowed is {max_seconds:g} s: split it")


def _simple_ratio(from_rate: int, to_rate: int) -> tuple[int, int]:
    """The two rates in lowest terms, rounded so that the filter bank stays small."""
    common = gcd(from_rate, to_rate)
    numerator, denominator = from_rate // common, to_rate // common
    if numerator * denominator > _MAX_PHASES_TIMES_TAPS:
        # The filter bank has `denominator` phases of at least `numerator` taps.
        limit = int((_MAX_PHASES_TIMES_TAPS * to_rate / from_rate) ** 0.5)
        ratio = Fraction(from_rate, to_rate).limit_denominator(limit)
        numerator, denominator = ratio.numerator, ratio.denominator
    return numerator, denominator


@lru_cache(maxsize=64)
def _resampler(from_rate: int, to_rate: int) -> torchaudio.transforms.Resample:
    return torchaudio.transforms.Resample(from_rate, to_rate)
