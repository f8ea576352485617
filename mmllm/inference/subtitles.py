"""Transcripts as files: JSON in the shape of OpenAI's `verbose_json`, SubRip (SRT) and WebVTT.

Sources: https://www.w3.org/TR/webvtt1 for WebVTT; 42 characters a line, two lines and 7 seconds are what Netflix's
timed text style guide allows. SubRip has no standard: what its players agree on is written.
"""

from __future__ import annotations

import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mmllm.inference.transcripts import Segment, Transcript

MAX_LINE = 42
"""Characters of a line, of which a cue has two; those of double width count twice."""
MAX_CUE_SECONDS = 7.0
MIN_CUE_SECONDS = 1.0
"""A cue is shown for so long, if none follows sooner."""
UNKNOWN_LANGUAGE = "und"
"""ISO 639: undetermined."""


@dataclass(frozen=True)
class Cue:
    """What is shown at once.

    Attributes:
        start: milliseconds; not before the last one's end.
        end: milliseconds, after the start.
        lines: of text, none empty.
    """

    start: int
    end: int
    lines: tuple[str, ...]


@dataclass(frozen=True)
class _Part:
    """A word, or a piece of one that is longer than a line, and when it is said."""

    text: str
    start: float
    end: float
    is_begun: bool = False
    """It goes on what stands before it, without a space."""


def to_verbose_json(transcript: Transcript, task: str = "transcribe") -> dict[str, Any]:
    """A transcript as OpenAI's `verbose_json`, with `confidence` and `doubtful` beside it; None where nothing is known.

    Args:
        transcript: of a sound.
        task: as it is to be called.
    """
    value: dict[str, Any] = {
        "task": task,
        "language": transcript.language or UNKNOWN_LANGUAGE,
        "duration": round(transcript.seconds, 3),
        "text": transcript.text,
        "segments": [_segment(number, segment) for number, segment in enumerate(transcript.segments)],
    }
    if transcript.words is not None:
        value["words"] = [
            {"word": word.word, "start": round(word.start, 3), "end": round(word.end, 3), "confidence": word.confidence}
            for word in transcript.words
        ]
    return value


def _segment(number: int, segment: Segment) -> dict[str, Any]:
    data = segment.text.encode()
    return {
        "id": number,
        "seek": 0,
        "start": round(segment.start, 3),
        "end": round(segment.end, 3),
        "text": segment.text,
        "tokens": [],
        "temperature": 0.0,
        "avg_logprob": segment.logprob,
        "compression_ratio": len(data) / len(zlib.compress(data)),
        "no_speech_prob": segment.no_speech,
        "confidence": segment.confidence,
        "doubtful": segment.doubtful,
    }


def to_srt(transcript: Transcript) -> str:
    """A transcript as SubRip. An arrow `-->`, which it has no way to write in a text, becomes `→`."""
    blocks = []
    for number, cue in enumerate(make_cues(transcript), start=1):
        text = "\n".join(cue.lines).replace("-->", "→")
        blocks.append(f"{number}\n{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}\n{text}\n")
    return "\n".join(blocks)


def to_vtt(transcript: Transcript) -> str:
    """A transcript as WebVTT; `&`, `<` and `>` are escaped."""
    blocks = ["WEBVTT\n"]
    for cue in make_cues(transcript):
        text = "\n".join(cue.lines).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        blocks.append(f"{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}\n{text}\n")
    return "\n".join(blocks)


def make_cues(transcript: Transcript) -> list[Cue]:
    """A transcript in pieces of at most two lines of 42 characters and 7 seconds, in order of time.

    Words whose times aren't known share their segment's by their length.
    """
    timed = [(group[0].start, group[-1].end, _lines(group)) for s in transcript.segments for group in _groups(s)]
    cues: list[Cue] = []
    for number, (start, end, lines) in enumerate(timed):
        assert lines is not None, "groups fit"
        first = max(round(1000 * start), cues[-1].end if cues else 0)
        last = round(1000 * end)
        if last - first < 1000 * MIN_CUE_SECONDS:
            following = round(1000 * timed[number + 1][0]) if number + 1 < len(timed) else round(1000 * end)
            last = max(last, min(first + round(1000 * MIN_CUE_SECONDS), following))
        last = min(max(last, first + 1), first + round(1000 * MAX_CUE_SECONDS))
        cues.append(Cue(first, last, lines))
    return cues


def _groups(segment: Segment) -> Iterator[list[_Part]]:
    """The words of a segment, as many together as are shown at once."""
    group: list[_Part] = []
    for part in _parts(segment):
        grown = [*group, part]
        if group and (_lines(grown) is None or part.end - group[0].start > MAX_CUE_SECONDS):
            yield group
            grown = [part]
        group = grown
    if group:
        yield group


def _parts(segment: Segment) -> Iterator[_Part]:
    """Words with their times, none longer than a line."""
    tokens = "".join(" " if unicodedata.category(c) == "Cc" else c for c in segment.text).split()
    for token, (start, end) in zip(tokens, _token_times(segment, tokens), strict=True):
        pieces = _pieces(token)
        bounds = [start + (end - start) * number / len(pieces) for number in range(len(pieces) + 1)]
        for number, (piece, (first, last)) in enumerate(zip(pieces, pairwise(bounds), strict=True)):
            yield _Part(piece, first, last, is_begun=number > 0)


def _token_times(segment: Segment, tokens: Sequence[str]) -> list[tuple[float, float]]:
    """When each token is said: punctuation alone with the word before it."""
    is_word = [any(map(str.isalnum, token)) for token in tokens]
    words = segment.words or ()
    if words and len(words) == sum(is_word):
        spans, number = [], 0
        for said in is_word:
            if said:
                spans.append((words[number].start, words[number].end))
                number += 1
            else:
                time = words[number - 1].end if number else words[0].start
                spans.append((time, time))
        return spans
    ends = [0]
    for token in tokens:
        ends.append(ends[-1] + len(token))
    seconds = segment.end - segment.start
    bounds = [segment.start + seconds * end / max(1, ends[-1]) for end in ends]
    return list(pairwise(bounds))


def _lines(parts: Sequence[_Part]) -> tuple[str, ...] | None:
    """One line, or the two of most equal width; None: there is no room."""
    texts = [("" if part.is_begun or not number else " ") + part.text for number, part in enumerate(parts)]
    whole = "".join(texts)
    if _width(whole) <= MAX_LINE:
        return (whole,)
    best: tuple[int, tuple[str, str]] | None = None
    for number in range(1, len(parts)):
        first, second = "".join(texts[:number]), "".join(texts[number:]).lstrip(" ")
        width = max(_width(first), _width(second))
        if width <= MAX_LINE and (best is None or width < best[0]):
            best = width, (first, second)
    return None if best is None else best[1]


def _pieces(token: str) -> list[str]:
    """A word in pieces that fit a line; marks stay with the letter that they are on."""
    pieces = [""]
    for character in token:
        is_mark = unicodedata.combining(character) > 0
        if pieces[-1] and not is_mark and _width(pieces[-1] + character) > MAX_LINE:
            pieces.append("")
        pieces[-1] += character
    return pieces


def _width(text: str) -> int:
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in ("W", "F") else 1 for c in text
    )


def _clock(milliseconds: int, point: str) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}{point}{rest:03d}"
