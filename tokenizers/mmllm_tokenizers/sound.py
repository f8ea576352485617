"""Sound in: files, bytes and arrays become one checked float32 waveform; rates and channels are converted.

Shapes: C channels, T samples.
"""

from __future__ import annotations

import io
import math
import os
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import gcd
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor

from mmllm_tokenizers.sound_files import examine

AudioSource = str | Path | bytes | np.ndarray | Tensor | tuple[Any, int]
"""A file's path or content, or (array, sample rate). Arrays are [T] or [C, T], float or integer PCM."""

MAX_CHANNELS = 32
MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 100, 1_000_000
_MAX_PHASES_TIMES_TAPS = 4_000_000
_MOST_SAMPLES = 1 << 40
_LARGE = 16_000_000
"""Bytes. Larger files are asked for their length before they are read."""
_CUT = re.compile(r": (\d+) \(should be (\d+)\)")
"""What libsndfile notes of a chunk that says it is longer than the file."""
_UNKNOWN = 0xFFFFFFFF
_TOLD_OTHERWISE = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3")


@dataclass(frozen=True)
class Sound:
    """A sound that was read."""

    wave_CT: Tensor
    """float32 within [-1, 1]."""
    sample_rate: int
    peak: float
    """The largest absolute sample as it was read. Above 1, the wave was divided by it."""


def load_audio(
    source: AudioSource,
    sample_rate: int | None = None,
    *,
    name: str | None = None,
    max_seconds: float | None = None,
) -> tuple[Tensor, int]:
    """Reads a sound: (wave_CT float32 within [-1, 1], sample rate). Arguments and errors are `read_sound`'s."""
    sound = read_sound(source, sample_rate, name=name, max_seconds=max_seconds)
    return sound.wave_CT, sound.sample_rate


def read_sound(
    source: AudioSource,
    sample_rate: int | None = None,
    *,
    name: str | None = None,
    max_seconds: float | None = None,
) -> Sound:
    """Reads a sound. Samples above ±1, which float files and decoders of MP3 and Ogg give, scale the whole sound down.

    Args:
        source: path, file content, array, tensor, or (array or tensor, sample rate).
        sample_rate: of a bare array or tensor, samples a second.
        name: how errors call the sound; by default its path.
        max_seconds: longer sounds are refused before they are decoded.

    Raises:
        FileNotFoundError: the path does not exist.
        OSError: the machine can't read the file.
        ValueError: the sound is unreadable, cut short, empty, not finite, too long, or has no rate or an odd shape.
    """
    if isinstance(source, tuple):
        source, sample_rate = source
    if isinstance(source, str | Path):
        name = name or str(source)
        wave_CT, rate = _decode(_content(source, name, max_seconds), name, max_seconds)
    elif isinstance(source, bytes | bytearray | memoryview):
        name = name or "sound of bytes"
        wave_CT, rate = _decode(bytes(source), name, max_seconds)
    elif isinstance(source, np.ndarray | Tensor):
        name = name or "sound array"
        if sample_rate is None:
            raise ValueError(f"{name} has no sample rate; give (array, sample_rate)")
        wave_CT, rate = _from_array(source, name), sample_rate
    else:
        raise ValueError(
            f"a sound cannot be read from {type(source).__name__}; give a path, bytes, or (array, sample_rate)"
        )
    peak = _checked_peak(wave_CT, rate, name, max_seconds)
    return Sound(wave_CT / peak if peak > 1 else wave_CT, int(rate), peak)


def sound_length(data: bytes, name: str) -> tuple[int, int]:
    """(samples, samples a second) of a sound file, from its header; as many as `read_sound` gives of a whole file.

    Raises:
        ValueError: it is no sound file, or its header does not say its length.
    """
    with _opened(io.BytesIO(examine(data).data), name) as sound:
        return _num_samples(sound, name), sound.samplerate


def resample(wave: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Resamples along the last axis (windowed sinc, torchaudio's defaults).

    The result has `resampled_length` samples. Rates that share no small ratio (44,101 to 8,000 Hz) are
    taken for the nearest that does, less than 0.02% off: the exact filter bank would need gigabytes.
    """
    if from_rate == to_rate:
        return wave
    resampler, wanted = (
        _resampler(*_simple_ratio(from_rate, to_rate)),
        resampled_length(wave.shape[-1], from_rate, to_rate),
    )
    out = resampler(wave)
    if out.shape[-1] < wanted:  # torchaudio counts in float32
        out = resampler(torch.nn.functional.pad(wave, (0, from_rate)))
    return out[..., :wanted]


def resampled_length(num_samples: int, from_rate: int, to_rate: int) -> int:
    """How many samples `resample` makes of so many: T * to / from, rounded up."""
    if from_rate == to_rate:
        return num_samples
    numerator, denominator = _simple_ratio(from_rate, to_rate)
    return -(-num_samples * denominator // numerator)


def to_channels(wave_CT: Tensor, num_channels: int) -> Tensor:
    """The wave with `num_channels` channels: `to_mono`'s for one, copies of it for more.

    Channels that are already right stay as they are.
    """
    if wave_CT.shape[0] == num_channels:
        return wave_CT
    mono_1T = to_mono(wave_CT)[None]
    return mono_1T if num_channels == 1 else mono_1T.expand(num_channels, -1)


def to_mono(wave_CT: Tensor) -> Tensor:
    """[T] of [C, T] or of [T]: the channels' mean, or the loudest one where they cancel each other out.

    They do where the mean has less than half the power that channels without anything in common would leave in it
    (1/C of their mean power), as of stereo whose one side is reversed.
    """
    if wave_CT.dim() == 1:
        return wave_CT
    mean_T = wave_CT.mean(dim=0)
    power_C = wave_CT.square().mean(dim=1)
    if len(power_C) > 1 and mean_T.square().mean() < 0.5 * power_C.mean() / len(power_C):
        return wave_CT[power_C.argmax()]
    return mean_T


def _content(path: str | Path, name: str, max_seconds: float | None) -> bytes:
    if not Path(path).is_file():
        raise FileNotFoundError(f"sound file {name} does not exist")
    with open(path, "rb") as stream:
        if max_seconds is not None and os.fstat(stream.fileno()).st_size > _LARGE:
            with _opened(stream, name) as sound:
                _check_length(sound.frames / max(sound.samplerate, 1), name, max_seconds)
            stream.seek(0)
        return stream.read()


def _decode(data: bytes, name: str, max_seconds: float | None) -> tuple[Tensor, int]:
    examined = examine(data)
    if examined.wrong:
        raise ValueError(f"{name} {examined.wrong}")
    with _opened(io.BytesIO(examined.data), name) as sound:
        rate, told = sound.samplerate, _num_samples(sound, name)
        _check_length(told / max(rate, 1), name, max_seconds)
        try:
            samples_TC = sound.read(told, dtype="float32", always_2d=True)  # GSM 6.10 must be told how many
        except MemoryError as error:
            raise MemoryError(f"{name} has {told} samples, for which there is no memory; split it") from error
        except (soundfile.LibsndfileError, RuntimeError, TypeError, ValueError) as error:
            raise _unreadable(name, error) from error
        if sound.format not in _TOLD_OTHERWISE:
            for said, there in _CUT.findall(sound.extra_info):
                if int(there) < int(said) != _UNKNOWN:
                    raise ValueError(
                        f"{name} is cut short: its header says {said} bytes, {there} are there; copy it again"
                    )
    if len(samples_TC) < told:
        raise ValueError(
            f"{name} is cut short: its header says {told} samples, {len(samples_TC)} are there; copy it again"
        )
    return torch.from_numpy(np.ascontiguousarray(samples_TC.T)), rate


def _opened(stream: BinaryIO, name: str) -> soundfile.SoundFile:
    try:
        return soundfile.SoundFile(stream)
    except (soundfile.LibsndfileError, RuntimeError, TypeError, ValueError) as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> Exception:
    why = str(error.error_string if isinstance(error, soundfile.LibsndfileError) else error)
    why = why.removeprefix("Error : ").rstrip(".")
    if "malloc" in why:
        return MemoryError(f"{name}: {why}")
    return ValueError(
        f"{name} cannot be read as sound: {why}; it is broken, cut short or of an unknown kind: copy or download it "
        f"again, or convert it to WAV or FLAC"
    )


def _num_samples(sound: soundfile.SoundFile, name: str) -> int:
    if sound.frames > _MOST_SAMPLES:
        raise ValueError(
            f"{name} does not say how long it is, as a FLAC written to a pipe doesn't; write it to a file, or as WAV"
        )
    return sound.frames


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


def _checked_peak(wave_CT: Tensor, rate: int, name: str, max_seconds: float | None) -> float:
    """The largest absolute sample, where nothing is wrong."""
    if not MIN_SAMPLE_RATE <= rate <= MAX_SAMPLE_RATE:
        raise ValueError(
            f"{name} has a sample rate of {rate} Hz; it must lie in [{MIN_SAMPLE_RATE}, {MAX_SAMPLE_RATE}]"
        )
    if wave_CT.numel() == 0:
        raise ValueError(f"{name} holds no sound: its length is zero")
    _check_length(wave_CT.shape[1] / rate, name, max_seconds)
    low, high = wave_CT.aminmax()
    peak = max(-float(low), float(high))
    if not math.isfinite(peak):
        bad = int((~torch.isfinite(wave_CT)).sum())
        raise ValueError(f"{name} holds {bad} samples that are NaN or infinite; write it again from its source")
    return peak


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
