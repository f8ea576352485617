"""Where something is said in a sound: by its level against a floor that follows it, or by silero-vad.

Shapes: T samples, H hops (100 a second), B blocks of hops.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch

from mmllm_tokenizers.sound import resample

HOP_SECONDS = 0.01
Vad = Literal["energy", "silero"]

MIN_PAUSE_SECONDS = 0.15
"""Shorter silences are no pause: lips and tongue are closed before a p, t or k."""
MIN_SPEECH_SECONDS = 0.05
"""What is heard for a shorter time alone is a click."""
ABOVE_FLOOR_DB = 9.0
"""Speech is so much louder than the quietest near it; noise of 80 samples a hop varies by some 3 dB."""
BELOW_LOUD_DB = 40.0
"""What lies so far below the loudest near it is silent, however quiet the rest is."""
NEAR_LOUD_DB = 15.0
"""What is no quieter than so far below the loudest near it is never silent: in noise the floor is high."""
FLAT_SECONDS, FLAT_DB = 0.2, 6.0
"""What varies by less than so many dB for so long is noise, unless it is near the loudest: so a pause is found between
clean words, too, whose own dips are quieter than the noise in it."""
SILENT_DB = -70.0
"""Of full scale: nothing so quiet is said."""
_BLOCK, _CONTEXT = 100, 5
"""Hops between two looks at floor and loudness, and how many blocks around one are looked at."""
_LOWEST_DB = -120.0
_SILERO_RATE = 16_000


@dataclass(frozen=True)
class Levels:
    """The level of a sound, and what is near it.

    Attributes:
        level_H: dB of full scale.
        floor_H: the quietest within some 5 seconds (5% quantile).
        loud_H: the loudest there (99% quantile).
    """

    level_H: np.ndarray
    floor_H: np.ndarray
    loud_H: np.ndarray

    @property
    def threshold_H(self) -> np.ndarray:
        """Level in dB above which something is said; infinite where the level hardly varies: noise says nothing."""
        above_H = np.maximum(self.floor_H + ABOVE_FLOOR_DB, self.loud_H - BELOW_LOUD_DB)
        threshold_H = np.maximum(np.minimum(above_H, self.loud_H - NEAR_LOUD_DB), SILENT_DB)
        return np.where(self.loud_H - self.floor_H < ABOVE_FLOOR_DB, np.inf, threshold_H)


def loud_hops(levels: Levels) -> np.ndarray:
    """Bool [H]: neither below the threshold, nor steady noise."""
    is_loud_H = levels.level_H > levels.threshold_H
    width = round(FLAT_SECONDS / HOP_SECONDS)
    if len(is_loud_H) < width:
        return is_loud_H
    near_HW = np.lib.stride_tricks.sliding_window_view(levels.level_H, width)
    is_flat_H = np.zeros(len(is_loud_H) + 1, dtype=np.int64)
    starts = np.flatnonzero(near_HW.max(axis=1) - near_HW.min(axis=1) < FLAT_DB)
    np.add.at(is_flat_H, starts, 1)
    np.add.at(is_flat_H, starts + width, -1)
    is_noise_H = (is_flat_H.cumsum()[:-1] > 0) & (levels.level_H < levels.loud_H - NEAR_LOUD_DB)
    return is_loud_H & ~is_noise_H


def measure_levels(wave_T: np.ndarray, sample_rate: int) -> Levels:
    """Levels of a sound of one channel; its last hop may be shorter."""
    bounds = np.round(np.arange(0, len(wave_T) / sample_rate, HOP_SECONDS) * sample_rate).astype(np.int64)
    bounds = bounds[bounds < len(wave_T)]
    if not len(bounds):
        nothing = np.zeros(0)
        return Levels(nothing, nothing, nothing)
    counts_H = np.diff([*bounds, len(wave_T)])
    wave_T = wave_T - wave_T.mean(dtype=np.float64)
    means_H = np.add.reduceat(wave_T, bounds) / counts_H
    powers_H = np.add.reduceat(np.square(wave_T), bounds) / counts_H - np.square(means_H)  # an offset is no level
    level_H = np.maximum(10 * np.log10(np.maximum(powers_H, 1e-30)), _LOWEST_DB)
    blocks = range(0, len(level_H), _BLOCK)
    near = [level_H[max(0, first - _CONTEXT * _BLOCK) : first + (_CONTEXT + 1) * _BLOCK] for first in blocks]
    floor_B, loud_B = np.array([np.quantile(levels, (0.05, 0.99)) for levels in near]).T
    floor_H, loud_H = (np.repeat(each_B, _BLOCK)[: len(level_H)] for each_B in (floor_B, loud_B))
    return Levels(level_H, floor_H, loud_H)


def runs(is_on_H: np.ndarray) -> list[tuple[int, int]]:
    """(first, behind the last) hop of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_on_H, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def spoken_hops(is_loud_H: np.ndarray) -> list[tuple[int, int]]:
    """Runs of loud hops as speech: what no pause parts is together, and what is too short alone is left out."""
    joined: list[tuple[int, int]] = []
    for first, last in runs(is_loud_H):
        if joined and (first - joined[-1][1]) * HOP_SECONDS < MIN_PAUSE_SECONDS - 1e-9:
            joined[-1] = joined[-1][0], last
        else:
            joined.append((first, last))
    return [(first, last) for first, last in joined if (last - first) * HOP_SECONDS > MIN_SPEECH_SECONDS - 1e-9]


def speech_hops(wave_T: np.ndarray, sample_rate: int, levels: Levels, vad: Vad = "energy") -> list[tuple[int, int]]:
    """(first, behind the last) hop of what is said without a pause.

    Args:
        wave_T: float, one channel.
        sample_rate: its rate.
        levels: of the sound.
        vad: "energy": by level alone, which takes music and other noises that come and go for speech; "silero": by a
            small network that was trained to tell them apart.

    Raises:
        ModuleNotFoundError: silero-vad is asked for, but not installed.
        ValueError: an unknown `vad`.
    """
    match vad:
        case "energy":
            return spoken_hops(loud_hops(levels))
        case "silero":
            is_loud_H = np.zeros(len(levels.level_H), dtype=bool)
            for start, end in _silero_spans(wave_T, sample_rate):
                is_loud_H[round(start / HOP_SECONDS) : round(end / HOP_SECONDS)] = True
            return spoken_hops(is_loud_H)
    raise ValueError(f"vad is {vad!r}; it must be 'energy' or 'silero'")


_silero_lock = threading.Lock()
"""The network keeps a state from one piece of a sound to the next."""


@lru_cache(maxsize=1)
def _silero() -> tuple[Any, Any]:
    num_threads = torch.get_num_threads()
    try:
        import silero_vad  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "vad='silero' needs the package silero-vad, which is not installed; pip install 'mmllm[vad]', or leave vad "
            "out to go by the sound's level"
        ) from error
    finally:
        torch.set_num_threads(num_threads)  # importing it sets one thread for everything
    return silero_vad.load_silero_vad(), silero_vad.get_speech_timestamps


def _silero_spans(wave_T: np.ndarray, sample_rate: int) -> Sequence[tuple[float, float]]:
    with _silero_lock:
        network, get_speech_timestamps = _silero()
        wave = resample(torch.from_numpy(np.ascontiguousarray(wave_T, dtype=np.float32)), sample_rate, _SILERO_RATE)
        found = get_speech_timestamps(wave, network, sampling_rate=_SILERO_RATE)
    return [(span["start"] / _SILERO_RATE, span["end"] / _SILERO_RATE) for span in found]
