"""Altered copies of a recording: other speeds, pitches, colours and noise, so that few speakers become many.

Shapes: T samples of one channel.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torchaudio

_STEPS = 20
"""Speeds are multiples of 1/20: the resampler's filter stays short."""


@dataclass(frozen=True)
class PerturbConfig:
    """How far a copy may go from its original. Ranges are drawn from evenly, once a copy."""

    speed: tuple[float, float] = (0.8, 1.25)
    """Resampling: pitch, formants and tempo together (another vocal tract)."""
    tempo: tuple[float, float] = (0.85, 1.2)
    """Overlap-add: tempo alone."""
    gain_db: tuple[float, float] = (-9.0, 6.0)
    tilt_db: float = 6.0
    """Up to this much up or down from the lowest to the highest frequency (another microphone)."""
    bump_db: float = 4.0
    """Up to this much in each of a few broad bands."""
    noise_db: tuple[float, float] = (25.0, 50.0)
    """White noise, this far below the signal."""

    def __post_init__(self) -> None:
        for name in ("speed", "tempo"):
            low, high = getattr(self, name)
            if not 0.5 <= low <= high <= 2.0:
                raise ValueError(f"{name} is {low}–{high}; give a range within 0.5–2.0, the lower first")


def perturb(wave_T: np.ndarray, seed: int, name: str, config: PerturbConfig | None = None) -> np.ndarray:
    """An altered copy of a recording, the same for the same (seed, name).

    Args:
        wave_T: float32 samples.
        seed: The build's seed.
        name: The copy's name, e.g. `id#1`.
        config: How far to go.

    Returns:
        float32 samples, of another length; peaks stay within ±1.
    """
    config = config or PerturbConfig()
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    low, high = (round(value * _STEPS) for value in config.speed)
    speed = int(rng.integers(low, high + 1))
    tempo = rng.uniform(*config.tempo)
    wave_T = _speed(np.asarray(wave_T, dtype=np.float32), speed)
    wave_T = _tempo(wave_T, tempo)
    wave_T = _equalize(wave_T, rng, config)
    power = float(np.sqrt(np.mean(wave_T**2))) if len(wave_T) else 0.0
    noise = power * 10 ** (-rng.uniform(*config.noise_db) / 20)
    wave_T = wave_T + noise * rng.standard_normal(len(wave_T), dtype=np.float32)
    wave_T = wave_T * 10 ** (rng.uniform(*config.gain_db) / 20)
    peak = float(np.abs(wave_T).max(initial=0.0))
    return (wave_T / max(1.0, peak)).astype(np.float32)


@lru_cache(maxsize=64)
def _resampler(speed: int) -> torchaudio.transforms.Resample:
    return torchaudio.transforms.Resample(speed, _STEPS, lowpass_filter_width=16)


def _speed(wave_T: np.ndarray, speed: int) -> np.ndarray:
    if speed == _STEPS:
        return wave_T
    return _resampler(speed)(torch.from_numpy(wave_T)).numpy()


def _tempo(wave_T: np.ndarray, tempo: float, window: int = 400, search: int = 80) -> np.ndarray:
    """Waveform-similarity overlap-add: each window is taken where it best continues the one before.

    The window is 25–50 ms at 8–16 kHz. Source: Verhelst and Roelands, "An overlap-add technique based on
    waveform similarity (WSOLA)", ICASSP 1993; here with a short search and a Hann window.
    """
    hop = window // 2
    num_frames = int(len(wave_T) / tempo / hop)
    if abs(tempo - 1) < 0.02 or num_frames < 3:
        return wave_T
    padded = np.pad(wave_T, (search, window + hop + 2 * search))
    hann = np.hanning(window + 1)[:-1].astype(np.float32)
    out = np.zeros((num_frames + 1) * hop, dtype=np.float32)
    position = search
    for frame in range(num_frames):
        out[frame * hop : frame * hop + window] += hann * padded[position : position + window]
        natural = padded[position + hop : position + hop + hop]
        centre = search + int((frame + 1) * hop * tempo)
        start = max(0, min(centre - search, len(padded) - window - 2 * search))
        likeness = np.correlate(padded[start : start + hop + 2 * search], natural, mode="valid")
        position = start + int(likeness.argmax())
    return out


def _equalize(wave_T: np.ndarray, rng: np.random.Generator, config: PerturbConfig, num_bands: int = 6) -> np.ndarray:
    tilt = rng.uniform(-config.tilt_db, config.tilt_db)
    bumps = rng.uniform(-config.bump_db, config.bump_db, num_bands)
    if len(wave_T) < 16:
        return wave_T
    spectrum = np.fft.rfft(wave_T)
    position = np.linspace(0, 1, len(spectrum))
    gain_db = tilt * (position - 0.5) + np.interp(position, np.linspace(0, 1, num_bands), bumps)
    return np.fft.irfft(spectrum * 10 ** (gain_db / 20), n=len(wave_T)).astype(np.float32)
