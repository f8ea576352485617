"""Where a long sound is cut into windows that a model can hear: at pauses, or with overlap where there is none.

Shapes: T samples, H hops (100 a second).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mmllm.inference.voice_activity import (
    HOP_SECONDS,
    MIN_PAUSE_SECONDS,
    NEAR_LOUD_DB,
    Levels,
    Vad,
    loud_hops,
    measure_levels,
    speech_hops,
    spoken_hops,
)

LONG_PAUSE_SECONDS = 1.0
"""Such a pause always ends a window."""
PAD_SECONDS = 0.04
"""Of the silence that a window keeps at each end. (The demo's model was trained on sounds with so much: 0.1 s more at
both ends, and it gets a third of the words wrong.)"""
_TRIMMED_SECONDS = 0.04
"""Less than this isn't cut off from a sound's ends."""
MAX_OVERLAP_SECONDS = 2.0
_RISE_DB = 3.0
"""By which the level that counts as silent is raised where a stretch of speech has no pause, again and again."""
_QUIET_HOPS = 5

Span = tuple[int, int]
"""(first, behind the last) hop."""


@dataclass(frozen=True)
class Window:
    """A piece of a sound that is transcribed by itself.

    Attributes:
        start: seconds.
        end: likewise.
        overlap: so many seconds at its beginning are the end of the window before it, too: there is no pause.
    """

    start: float
    end: float
    overlap: float = 0.0


def plan_windows(
    wave_T: np.ndarray,
    sample_rate: int,
    longest_seconds: float | None,
    usual_seconds: float | None = None,
    vad: Vad = "energy",
    overlap_seconds: float | None = None,
) -> list[Window]:
    """Where a sound is cut so that no window is longer than a model hears.

    A sound that is short enough is one window, without the silence at its ends. Of others the cuts lie in pauses, the
    longer the better, so that windows are about as long as is usual; a stretch without any becomes windows that
    overlap. Where nothing is said there is no window.

    Args:
        wave_T: float, one channel.
        sample_rate: its rate.
        longest_seconds: of a window; None: no bound.
        usual_seconds: longer windows are avoided where a pause allows it; None: as the longest.
        vad: how speech is found; see `mmllm.inference.voice_activity.speech_hops`.
        overlap_seconds: of windows between which there is no pause; None: a third of the longest, 2 at most.

    Raises:
        ValueError: a bound isn't positive, or the overlap isn't shorter than half a window.
    """
    seconds = len(wave_T) / sample_rate
    for name, value in (("longest_seconds", longest_seconds), ("usual_seconds", usual_seconds)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value}; it must be positive, or None for no bound")
    levels = measure_levels(wave_T, sample_rate)
    spans = speech_hops(wave_T, sample_rate, levels, vad)
    if not spans:
        return []
    if longest_seconds is None or seconds <= longest_seconds:
        ((first, last),) = _padded([(spans[0][0], spans[-1][1])], levels, len(levels.level_H))
        return [Window(first * HOP_SECONDS, min(last * HOP_SECONDS, seconds))]
    overlap = min(longest_seconds / 3, MAX_OVERLAP_SECONDS) if overlap_seconds is None else overlap_seconds
    if not 0 < overlap < longest_seconds / 2:
        raise ValueError(
            f"overlap_seconds is {overlap}; it must be above 0 and below half of the longest window, "
            f"{longest_seconds / 2:g} s"
        )
    most = max(1, math.floor(longest_seconds / HOP_SECONDS + 1e-6))
    usual = most if usual_seconds is None else min(most, max(1, math.floor(usual_seconds / HOP_SECONDS + 1e-6)))
    groups = [
        group
        for stretch in _stretches(spans)
        for group in _grouped([part for span in stretch for part in _parted(span, levels, most)], most, usual)
    ]
    windows: list[Window] = []
    for start, end in _padded(groups, levels, most):
        windows += _overlapping(start * HOP_SECONDS, min(end * HOP_SECONDS, seconds), longest_seconds, overlap)
    return windows


def _stretches(spans: Sequence[Span]) -> list[list[Span]]:
    """Spans of speech between which there is no long pause."""
    stretches = [[spans[0]]]
    for span in spans[1:]:
        if (span[0] - stretches[-1][-1][1]) * HOP_SECONDS >= LONG_PAUSE_SECONDS - 1e-9:
            stretches.append([])
        stretches[-1].append(span)
    return stretches


def _parted(span: Span, levels: Levels, most: int) -> list[Span]:
    """A span at its weaker pauses, where it is too long: what is near the loudest is never taken for one."""
    first, last = span
    if last - first <= most:
        return [span]
    level_H, highest_H = levels.level_H[first:last], levels.loud_H[first:last] - NEAR_LOUD_DB
    silent_H = np.minimum(levels.threshold_H[first:last], highest_H)
    while (silent_H < highest_H).any():
        silent_H = np.minimum(silent_H + _RISE_DB, highest_H)
        parts = [(first + start, first + stop) for start, stop in spoken_hops(level_H > silent_H)]
        if len(parts) > 1:
            parts[0], parts[-1] = (first, parts[0][1]), (parts[-1][0], last)
            return [piece for part in parts for piece in _parted(part, levels, most)]
    return [span]


def _grouped(spans: Sequence[Span], most: int, usual: int) -> list[Span]:
    """Neighboring spans together, none longer than a window unless it is one span: the least cost that can be."""
    costs, froms = [0.0], [0]
    for stop in range(1, len(spans) + 1):
        best, best_start = math.inf, stop - 1
        for start in range(stop - 1, -1, -1):
            length = spans[stop - 1][1] - spans[start][0]
            if start < stop - 1 and length > most:
                break
            pause = spans[start][0] - spans[start - 1][1] if start else None
            cost = costs[start] + _cost(length, usual, pause)
            if cost < best:
                best, best_start = cost, start
        costs.append(best)
        froms.append(best_start)
    groups, stop = [], len(spans)
    while stop:
        groups.append((spans[froms[stop]][0], spans[stop - 1][1]))
        stop = froms[stop]
    return groups[::-1]


def _cost(length: int, usual: int, pause: int | None) -> float:
    """Of a window with a pause before it (None: it is the first), all in hops.

    The shortest pause costs 1, one of twice the length half of it. A window of twice the usual length costs 2.
    """
    cut = 0.0 if pause is None else MIN_PAUSE_SECONDS / HOP_SECONDS / max(1, pause)
    return cut + 2 * max(0.0, length / usual - 1)


def _padded(groups: Sequence[Span], levels: Levels, most: int) -> list[Span]:
    """Groups with some of the pauses around them: up to the quietest place of each, and no longer than a window.

    Of a weak pause, which is no silence, they keep all.
    """
    pad, num_hops, is_loud_H = round(PAD_SECONDS / HOP_SECONDS), len(levels.level_H), loud_hops(levels)
    cuts = [0, *(_quietest(levels.level_H, end, start) for (_, end), (start, _) in pairwise(groups)), num_hops]
    padded = []
    for (start, end), (before, after) in zip(groups, pairwise(cuts), strict=True):
        room = max(0, most - (end - start)) // 2 if end - start <= most else num_hops
        first, last = max(before, start - room), min(after, end + room)
        start, end = max(first, start - pad), min(last, end + pad)
        while start > first and is_loud_H[start - 1]:
            start -= 1
        while end < last and is_loud_H[end]:
            end += 1
        padded.append((start, end))
    little = round(_TRIMMED_SECONDS / HOP_SECONDS)
    if padded[0][0] <= little and padded[0][1] <= most:
        padded[0] = 0, padded[0][1]
    if num_hops - padded[-1][1] <= little and num_hops - padded[-1][0] <= most:
        padded[-1] = padded[-1][0], num_hops
    return padded


def _quietest(level_H: np.ndarray, first: int, last: int) -> int:
    """The hop in the middle of the quietest 50 ms; of places that are as quiet as each other, the middle one."""
    width = max(1, min(_QUIET_HOPS, last - first))
    sums = np.convolve(level_H[first:last], np.ones(width), mode="valid")
    lowest = np.flatnonzero(sums <= sums.min() + 1e-6)
    return first + int(lowest[len(lowest) // 2]) + width // 2


def _overlapping(start: float, end: float, longest: float, overlap: float) -> list[Window]:
    """One window, or as many of the same length as are needed."""
    if end - start <= longest + 1e-9:
        return [Window(start, end)]
    count = math.ceil((end - start - overlap) / (longest - overlap))
    step = (end - start - longest) / (count - 1)
    starts = [start + number * step for number in range(count)]
    return [Window(each, each + longest, longest - step if number else 0.0) for number, each in enumerate(starts)]
