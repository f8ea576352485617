"""The tempo of a sound, changed without its pitch.

Shapes: T samples of one channel.
"""

from __future__ import annotations

import math

import numpy as np

_WINDOW_SECONDS, _SEARCH_SECONDS = 0.05, 0.01
"""Of speech: a window holds two periods of the lowest voices and a half, the search one period either way."""


def overlap_add(wave_T: np.ndarray, tempo: float, window: int, search: int) -> np.ndarray:
    """Waveform-similarity overlap-add: each window is taken where it best continues the one before.

    The first and the last half window are faded in and out. Source: Verhelst and Roelands, "An overlap-add technique
    based on waveform similarity (WSOLA)", ICASSP 1993; here with a short search and a Hann window.

    Args:
        wave_T: float32 samples.
        tempo: 2 is twice as fast.
        window: samples that are laid over each other by half; even.
        search: samples that a window may be moved by, either way.

    Returns:
        float32 samples, T / tempo down to a multiple of half a window, and half a window; as it was if that is less
        than four of them.
    """
    hop = window // 2
    num_frames = int(len(wave_T) / tempo / hop)
    if num_frames < 3:
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


def at_rate(wave_T: np.ndarray, sample_rate: int, rate: float) -> np.ndarray:
    """Speech said so many times as fast, float32 [round(T / rate)]; what was at second s is at s / rate.

    Args:
        wave_T: float32 samples.
        sample_rate: samples a second.
        rate: 2 is twice as fast.
    """
    if rate == 1 or not len(wave_T):
        return wave_T
    window, search = 2 * round(_WINDOW_SECONDS * sample_rate / 2), round(_SEARCH_SECONDS * sample_rate)
    # Its mirror image around it takes the fades; silence would be no guide to where a window continues another.
    margin = math.ceil(2 * window * max(rate, 1.0))
    out = overlap_add(np.pad(wave_T.astype(np.float32), margin, mode="symmetric"), rate, window, search)
    first = round(margin / rate)
    return out[first : first + round(len(wave_T) / rate)]
