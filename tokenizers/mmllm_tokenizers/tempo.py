"""The tempo of a sound, changed without its pitch.

Shapes: T samples of one channel.
"""

from __future__ import annotations

import math

import numpy as np

_WINDOW_SECONDS, _SEARCH_SECONDS = 0.05, 0.01
"""Of speech: a window holds two periods of the lowest voices and a half, the search one period either way."""


class OverlapAdd:
    """Waveform-similarity overlap-add: each window is taken where it best continues the one before.

    The first and the last half window are faded in and out. A sound may come in pieces, of any size: what is given for
    them together is what is given for the whole. Source: Verhelst and Roelands, "An overlap-add technique based on
    waveform similarity (WSOLA)", ICASSP 1993; here with a short search and a Hann window.

    Args:
        tempo: 2 is twice as fast.
        window: samples that are laid over each other by half; even.
        search: samples that a window may be moved by, either way.
    """

    def __init__(self, tempo: float, window: int, search: int):
        self.tempo, self.window, self.hop, self.search = tempo, window, window // 2, search
        self.num_samples = 0
        self._hann = np.hanning(window + 1)[:-1].astype(np.float32)
        self._kept_T = np.zeros(search, dtype=np.float32)
        """Of the sound, with zeros before it, what windows to come may be taken from."""
        self._first = 0
        """Which sample that begins with."""
        self._frame, self._position = 0, search
        self._tail = np.zeros(self.hop, dtype=np.float32)

    def push(self, wave_T: np.ndarray) -> np.ndarray:
        """More of the sound; float32 samples that no later window changes."""
        self.num_samples += len(wave_T)
        self._kept_T = np.concatenate([self._kept_T, wave_T.astype(np.float32, copy=False)])
        given = [np.zeros(0, dtype=np.float32)]
        end = self._first + len(self._kept_T)
        while self._frame < self._num_frames and self._start() + self.window + 2 * self.search <= end:
            given.append(self._next())
        return np.concatenate(given)

    def finish(self) -> np.ndarray:
        """What remains: in all `num_samples / tempo`, down to a multiple of half a window, and half a window."""
        silence = np.zeros(self.window + self.hop + 2 * self.search, dtype=np.float32)
        self._kept_T = np.concatenate([self._kept_T, silence])
        frames = [self._next() for _ in range(self._frame, self._num_frames)]
        return np.concatenate([*frames, self._tail])

    @property
    def _num_frames(self) -> int:
        """As many windows as there will be if no more of the sound comes."""
        return int(self.num_samples / self.tempo / self.hop)

    def _start(self) -> int:
        """The first place that the next window may be taken from."""
        return int(self._frame * self.hop * self.tempo)

    def _next(self) -> np.ndarray:
        if self._frame:
            start = self._start()
            natural = self._samples(self._position + self.hop, self.hop)
            likeness = np.correlate(self._samples(start, self.hop + 2 * self.search), natural, mode="valid")
            self._position = start + int(likeness.argmax())
        window = self._hann * self._samples(self._position, self.window)
        given, self._tail = self._tail + window[: self.hop], window[self.hop :]
        self._frame += 1
        first = min(self._position + self.hop, self._start())
        self._kept_T, self._first = self._kept_T[first - self._first :], first
        return given

    def _samples(self, begin: int, count: int) -> np.ndarray:
        return self._kept_T[begin - self._first : begin - self._first + count]


def overlap_add(wave_T: np.ndarray, tempo: float, window: int, search: int) -> np.ndarray:
    """A whole sound by `OverlapAdd`.

    Args:
        wave_T: float32 samples.
        tempo: 2 is twice as fast.
        window: samples that are laid over each other by half; even.
        search: samples that a window may be moved by, either way.

    Returns:
        float32 samples, T / tempo down to a multiple of half a window, and half a window; as it was if that is less
        than four of them.
    """
    if int(len(wave_T) / tempo / (window // 2)) < 3:
        return wave_T
    adding = OverlapAdd(tempo, window, search)
    return np.concatenate([adding.push(wave_T), adding.finish()])


class Stretch:
    """Speech said so many times as fast, piece by piece: what was at second s is at s / rate.

    Args:
        sample_rate: samples a second.
        rate: 2 is twice as fast.
    """

    def __init__(self, sample_rate: int, rate: float):
        self.rate = rate
        window, search = 2 * round(_WINDOW_SECONDS * sample_rate / 2), round(_SEARCH_SECONDS * sample_rate)
        # The sound's mirror image around it takes the fades; silence would be no guide to where a window continues
        # another.
        self.margin = math.ceil(2 * window * max(rate, 1.0))
        self._adding = OverlapAdd(rate, window, search)
        self._edge_T = np.zeros(0, dtype=np.float32)
        """The sound so far, until its mirror image is known; then its last samples."""
        self._num_samples = 0
        self._num_cut = round(self.margin / rate)
        self._num_given = 0

    def push(self, wave_T: np.ndarray) -> np.ndarray:
        """More of the sound; float32 samples."""
        if self.rate == 1 or not len(wave_T):
            return wave_T
        is_first = self._num_samples < self.margin
        self._num_samples += len(wave_T)
        self._edge_T = np.concatenate([self._edge_T, wave_T.astype(np.float32, copy=False)])
        if self._num_samples < self.margin:
            return self._edge_T[:0]
        if is_first:
            wave_T = np.concatenate([self._edge_T[: self.margin][::-1], self._edge_T])
        self._edge_T = self._edge_T[-self.margin :]
        return self._cut(self._adding.push(wave_T))

    def finish(self) -> np.ndarray:
        """What remains: in all round(T / rate) samples."""
        if self.rate == 1 or not self._num_samples:
            return self._edge_T[:0]
        if self._num_samples < self.margin:
            last_T = np.pad(self._edge_T, self.margin, mode="symmetric")
        else:
            last_T = self._edge_T[::-1]
        rest_T = self._cut(np.concatenate([self._adding.push(last_T), self._adding.finish()]))
        return rest_T[: len(rest_T) - (self._num_given - round(self._num_samples / self.rate))]

    def _cut(self, out_T: np.ndarray) -> np.ndarray:
        num_cut = min(self._num_cut, len(out_T))
        self._num_cut -= num_cut
        self._num_given += len(out_T) - num_cut
        return out_T[num_cut:]


def at_rate(wave_T: np.ndarray, sample_rate: int, rate: float) -> np.ndarray:
    """Speech said so many times as fast, float32 [round(T / rate)]; what was at second s is at s / rate.

    Args:
        wave_T: float32 samples.
        sample_rate: samples a second.
        rate: 2 is twice as fast.
    """
    if rate == 1 or not len(wave_T):
        return wave_T
    stretch = Stretch(sample_rate, rate)
    return np.concatenate([stretch.push(wave_T), stretch.finish()])
