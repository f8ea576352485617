"""Altered copies of a recording: other speakers and other recorders, so that few of each become many.

Shapes: T samples of one channel, W bins of its spectrum.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torchaudio

from mmllm_tokenizers.tempo import overlap_add

_STEPS = 20
"""Speeds are multiples of 1/20: the resampler's filter stays short."""

_STOP_DB, _SLOPE = 40.0, 0.1
"""How far a low-pass goes down, and over which share of the band."""


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
    band_db: float = 8.0
    """Up to this much up or down at each of 3 to 6 random frequencies, straight lines between them."""
    lowpass: tuple[float, float] = (0.625, 1.0)
    """Where a recorder's band ends, as a share of the recording's own: 2.5 to 4 kHz at 8 kHz sampling."""
    lowpass_chance: float = 0.5
    """Share of the copies whose band ends early."""
    noise_db: tuple[float, float] = (18.0, 45.0)
    """Noise of a random colour, this far below the signal: real recordings differ by as much."""
    color_db: float = 10.0
    """`band_db` of the noise; 0: it is white."""

    def __post_init__(self) -> None:
        for name in ("speed", "tempo"):
            low, high = getattr(self, name)
            if not 0.5 <= low <= high <= 2.0:
                raise ValueError(f"{name} is {low}–{high}; give a range within 0.5–2.0, the lower first")
        low, high = self.lowpass
        if not 0 < low <= high <= 1 or not 0 <= self.lowpass_chance <= 1:
            raise ValueError(
                f"lowpass is {low}–{high} and lowpass_chance {self.lowpass_chance}; give shares of the band above 0 "
                f"and up to 1, the lower first, and a chance in [0, 1]"
            )
        low, high = self.noise_db
        if low > high or min(self.tilt_db, self.band_db, self.color_db) < 0:
            raise ValueError(
                f"noise_db is {low}–{high}, tilt_db {self.tilt_db}, band_db {self.band_db} and color_db "
                f"{self.color_db}; give the lower noise_db first, and 0 or more decibels of the others"
            )


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
    wave_T = _recorded(wave_T, rng, config)
    wave_T = wave_T * 10 ** (rng.uniform(*config.gain_db) / 20)
    peak = float(np.abs(wave_T).max(initial=0.0))
    return (wave_T / max(1.0, peak)).astype(np.float32)


@lru_cache(maxsize=64)
def _resampler(speed: int) -> torchaudio.transforms.Resample:
    return torchaudio.transforms.Resample(speed, _STEPS, lowpass_filter_width=16)


def _speed(wave_T: np.ndarray, speed: int) -> np.ndarray:
    if speed == _STEPS or not len(wave_T):
        return wave_T
    return _resampler(speed)(torch.from_numpy(wave_T)).numpy()


def _tempo(wave_T: np.ndarray, tempo: float) -> np.ndarray:
    """The window is 25–50 ms at 8–16 kHz."""
    return wave_T if abs(tempo - 1) < 0.02 else overlap_add(wave_T, tempo, window=400, search=80)


def _recorded(wave_T: np.ndarray, rng: np.random.Generator, config: PerturbConfig) -> np.ndarray:
    """By another recorder: its response to each frequency, the end of its band, and its noise."""
    if len(wave_T) < 16:
        return wave_T
    position_W = np.linspace(0, 1, len(wave_T) // 2 + 1)
    tilt = rng.uniform(-config.tilt_db, config.tilt_db)
    gain_db_W = tilt * (position_W - 0.5) + _random_response(position_W, rng, config.band_db)
    if rng.random() < config.lowpass_chance:
        gain_db_W -= _STOP_DB * np.clip((position_W - rng.uniform(*config.lowpass)) / _SLOPE, 0, 1)
    wave_T = _filtered(wave_T, gain_db_W)
    noise_T = _filtered(rng.standard_normal(len(wave_T)), _random_response(position_W, rng, config.color_db))
    noise_T *= _root_mean_square(wave_T) / max(_root_mean_square(noise_T), 1e-9)
    return (wave_T + noise_T * 10 ** (-rng.uniform(*config.noise_db) / 20)).astype(np.float32)


def _random_response(position_W: np.ndarray, rng: np.random.Generator, most_db: float) -> np.ndarray:
    """Decibels at positions in [0, 1] of the band: random at 3 to 6 random places, straight lines between."""
    places = np.sort(rng.uniform(0, 1, int(rng.integers(3, 7))))
    return np.interp(position_W, places, rng.uniform(-most_db, most_db, len(places)))


def _filtered(wave_T: np.ndarray, gain_db_W: np.ndarray) -> np.ndarray:
    return np.fft.irfft(np.fft.rfft(wave_T) * 10 ** (gain_db_W / 20), n=len(wave_T))


def _root_mean_square(wave_T: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(wave_T))))
