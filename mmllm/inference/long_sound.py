"""Transcripts of sounds of any length: windows at pauses, their texts merged, words and segments with times and doubt.

A sound longer than what training heard is cut (`mmllm.inference.windows`); all windows are written at once. Words get
their times by forced alignment with the model's own CTC head, as WhisperX does with another model
(https://arxiv.org/abs/2303.00747). Windows that overlap, for want of a pause, are joined at the words that both have.

Shapes: K codebooks, F frames, S slots, V ids, T samples.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Protocol, cast

import numpy as np

from mmllm.checkpoints.settings import GenerationConfig
from mmllm.data.samples.documents import build_prompt
from mmllm.inference.engine.engine import Engine
from mmllm.inference.engine.requests import TextResult
from mmllm.inference.inputs import AudioPart
from mmllm.inference.text_settings import TextOptions
from mmllm.inference.transcripts import Segment, Transcript, Word
from mmllm.inference.voice_activity import Vad
from mmllm.inference.windows import Window, plan_windows
from mmllm.inference.word_times import Alignment, align_words
from mmllm.model.multimodal import MultimodalModel
from mmllm_tokenizers.alignment import WordTime
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.sound import to_mono

SENTENCE_PAUSE_SECONDS = 0.4
"""Words with so long a pause between them are of two segments."""
SAME_WORD_SECONDS = 0.5
"""A word of two windows that overlap is the same one if its two middles are nearer than this."""
WORDS_A_SECOND = 5.0
"""Where words have no times, at most so many of each window are taken for those that both have."""
AGAIN_CONFIDENCE = 0.8
"""A window whose words are less sure is heard once more."""
AGAIN_SECONDS = 0.02
"""More at each end then."""
_SENTENCE_END = re.compile(r"[.!?…。！？]['\"”’)\]»]*$")
_WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class LongSoundSettings:
    """How long sounds are cut, and what of their transcripts is doubted.

    Attributes:
        vad: how speech is found: "energy", by its level; "silero", by a small network (`mmllm[vad]`).
        window_seconds: the longest window; None: the longest sound that training heard.
        overlap_seconds: of windows between which there is no pause; None: a third of a window, 2 at most.
        min_logprob: a segment whose tokens' mean log-probability lies below is doubtful. -1 and 0.6 are the defaults
            of Whisper (https://arxiv.org/abs/2212.04356, section 4.5); they were not chosen on any rows here.
        max_no_speech: a segment is doubtful if the CTC head doesn't hear this share of its tokens, or more.
        min_confidence: a segment is doubtful if its mean confidence lies below: by default, if the CTC head finds its
            words less likely than not.
    """

    vad: Vad = "energy"
    window_seconds: float | None = None
    overlap_seconds: float | None = None
    min_logprob: float = -1.0
    max_no_speech: float = 0.6
    min_confidence: float = 0.5

    def __post_init__(self) -> None:
        if self.vad not in ("energy", "silero"):
            raise ValueError(f"vad is {self.vad!r}; it must be 'energy' or 'silero'")
        for name in ("window_seconds", "overlap_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be positive, or None for the default")
        if not self.min_logprob <= 0:
            raise ValueError(f"min_logprob is {self.min_logprob}; it must be 0 or below")
        for name in ("max_no_speech", "min_confidence"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from 0 to 1")


@dataclass(frozen=True)
class Heard:
    """What a model heard in one window.

    Attributes:
        text: that it wrote.
        ends: of each token, how many of the text's characters are written with it.
        logprobs: of each token, in nats.
        alignment: of the text with the window, from its beginning; None: there is no CTC head, or no word.
        is_whole: the text has ended, and was not cut off.
    """

    text: str
    ends: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    alignment: Alignment | None = None
    is_whole: bool = True


@dataclass(frozen=True)
class _Piece:
    """A word of a window's text, with bare punctuation (a dash) beside it; times are of the whole sound."""

    text: str
    word: str
    logprobs: tuple[float, ...]
    time: WordTime | None
    missed: float


@dataclass
class _Passage:
    """What is kept of one window."""

    window: Window
    heard: Heard
    pieces: list[_Piece] = field(default_factory=list)


def transcribe_windows(
    sounds: Sequence[AudioPart],
    longest_seconds: float | None,
    usual_seconds: float | None,
    hear: Callable[[list[AudioPart]], list[Heard]],
    settings: LongSoundSettings,
) -> list[Transcript]:
    """The transcript of each sound; all windows of all sounds are heard at once, and what is doubted once more.

    Args:
        sounds: of any length.
        longest_seconds: that the model hears at once; None: of any length.
        usual_seconds: that it hears well; None: all up to the longest.
        hear: transcribes sounds.
        settings: how they are cut, and what is doubted.

    Raises:
        ValueError: windows are to be longer than what the model hears.
        ModuleNotFoundError: silero-vad is asked for, but not installed.
    """
    if settings.window_seconds is not None:
        if longest_seconds is not None and settings.window_seconds > longest_seconds:
            raise ValueError(
                f"window_seconds is {settings.window_seconds}, but this model was trained on sounds of at most "
                f"{longest_seconds:g} s; give no more, or leave it out"
            )
        longest_seconds = settings.window_seconds
    bounds = longest_seconds, usual_seconds, settings.vad, settings.overlap_seconds
    plans = [plan_windows(to_mono(sound.wave_CT).numpy(), sound.sample_rate, *bounds) for sound in sounds]
    cuts = [(sound, window) for sound, windows in zip(sounds, plans, strict=True) for window in windows]
    found = iter(_heard_twice(cuts, hear))
    transcripts = []
    for sound, windows in zip(sounds, plans, strict=True):
        own = [next(found) for _ in windows]
        segments = merge([window for window, _ in own], [heard for _, heard in own], settings)
        transcripts.append(Transcript(" ".join(segment.text for segment in segments), segments, sound.seconds))
    return transcripts


def _heard_twice(
    cuts: list[tuple[AudioPart, Window]], hear: Callable[[list[AudioPart]], list[Heard]]
) -> list[tuple[Window, Heard]]:
    """What is heard in each window; where the CTC head doubts it, once more with a little around, if that is surer.

    (Small models are sensitive to where a sound begins; Whisper tries anew what it doubts, too, at a higher
    temperature.)
    """
    found = list(zip((window for _, window in cuts), hear([_cut(*cut) for cut in cuts]) if cuts else [], strict=True))
    again = [number for number, (_, heard) in enumerate(found) if _confidence(heard) < AGAIN_CONFIDENCE]
    wider = [(sound, _widened(window, sound.seconds)) for sound, window in (cuts[number] for number in again)]
    others = hear([_cut(*cut) for cut in wider]) if wider else []
    for number, (_, window), other in zip(again, wider, others, strict=True):
        if _confidence(other) > _confidence(found[number][1]):
            found[number] = window, other
    return found


def _confidence(heard: Heard) -> float:
    """Mean of the words'; 1 without a CTC head, 0 where the text has no room."""
    if heard.alignment is None:
        return 1.0
    sure = [word.confidence or 0.0 for word in heard.alignment.words or ()]
    return math.fsum(sure) / max(1, len(sure))


def _widened(window: Window, seconds: float) -> Window:
    start, end = max(0.0, window.start - AGAIN_SECONDS), min(seconds, window.end + AGAIN_SECONDS)
    return Window(start, end, window.overlap and window.overlap + 2 * AGAIN_SECONDS)


def _cut(sound: AudioPart, window: Window) -> AudioPart:
    first, last = round(window.start * sound.sample_rate), round(window.end * sound.sample_rate)
    return AudioPart(sound.wave_CT[:, first : max(last, first + 1)], sound.sample_rate)


def merge(windows: Sequence[Window], heard: Sequence[Heard], settings: LongSoundSettings) -> tuple[Segment, ...]:
    """The segments of a sound from what was heard in its windows.

    Args:
        windows: in order.
        heard: in each of them.
        settings: what is doubted.
    """
    passages = [
        _Passage(window, each, _pieces(each, window.start)) for window, each in zip(windows, heard, strict=True)
    ]
    for before, after in pairwise(passages):
        if after.window.overlap > 0 and before.pieces and after.pieces:
            num_kept, num_left_out = _join(before.pieces, after.pieces, after.window)
            before.pieces, after.pieces = before.pieces[:num_kept], after.pieces[num_left_out:]
    return tuple(segment for passage in passages for segment in _segments(passage, settings))


def _pieces(heard: Heard, start: float) -> list[_Piece]:
    """A text's words, each with its tokens; nothing where no word has a letter or a digit."""
    spans: list[tuple[int, int]] = []
    words: list[str] = []
    begin: int | None = None
    for match in _WORD.finditer(heard.text):
        if any(map(str.isalnum, match[0])):
            spans.append((match.start() if begin is None else begin, match.end()))
            words.append(match[0])
            begin = None
        elif spans:
            spans[-1] = spans[-1][0], match.end()
        elif begin is None:
            begin = match.start()
    if not spans:
        return []
    ends = [end for _, end in spans]
    logprobs: list[list[float]] = [[] for _ in spans]
    for end, logprob in zip(heard.ends, heard.logprobs, strict=True):
        logprobs[min(bisect.bisect_left(ends, end), len(ends) - 1)].append(logprob)
    times: Sequence[WordTime | None] = [None] * len(spans)
    missed: Sequence[float] = [0.0] * len(spans)
    if heard.alignment is not None and heard.alignment.words is not None:
        times = [replace(time, start=start + time.start, end=start + time.end) for time in heard.alignment.words]
        missed = heard.alignment.missed
    return [
        _Piece(" ".join(heard.text[first:last].split()), word, tuple(own), time, share)
        for (first, last), word, own, time, share in zip(spans, words, logprobs, times, missed, strict=True)
    ]


def _join(before: Sequence[_Piece], after: Sequence[_Piece], window: Window) -> tuple[int, int]:
    """(how many words of the one window are kept, how many of the next one are left out) where the two overlap.

    They are joined within the longest run of words that both have at the same time; a word counts the less, the more
    its two times differ. Where they have none, each has the words in its half of the overlap; if times aren't known
    either, all are kept.
    """
    is_timed = all(piece.time is not None for piece in (*before, *after))
    lefts, rights = _shared_places(before, after, window, is_timed)
    best, join = (0.0, 0), (len(before), 0)
    for left in lefts:
        for right in rights:
            likeness, length = 0.0, 0
            for one, other in zip(before[left:], after[right:], strict=False):
                same = _likeness(one, other)
                if not same:
                    break
                likeness, length = likeness + same, length + 1
            # of equal runs the one that leaves out the least
            score = likeness, left - len(before) - right
            if length and score > best:
                half = (length + 1) // 2
                best, join = score, (left + half, right + half)
    if best[0] > 0 or not is_timed:
        return join
    middle = window.start + window.overlap / 2
    return (
        sum(_middle(piece) < middle for piece in before),
        sum(_middle(piece) < middle for piece in after),
    )


def _shared_places(
    before: Sequence[_Piece], after: Sequence[_Piece], window: Window, is_timed: bool
) -> tuple[Sequence[int], Sequence[int]]:
    """Places of words that may be said in the overlap."""
    if not is_timed:
        most = math.ceil(window.overlap * WORDS_A_SECOND)
        return range(max(0, len(before) - most), len(before)), range(min(most, len(after)))
    start, end = window.start - SAME_WORD_SECONDS, window.start + window.overlap + SAME_WORD_SECONDS
    return (
        [place for place, piece in enumerate(before) if _middle(piece) > start],
        [place for place, piece in enumerate(after) if _middle(piece) < end],
    )


def _likeness(one: _Piece, other: _Piece) -> float:
    """1: the same word at the same time; 0: another word, or at another time."""
    first, second = ("".join(filter(str.isalnum, piece.word.casefold())) for piece in (one, other))
    if first != second:
        return 0.0
    if one.time is None or other.time is None:
        return 1.0
    return max(0.0, 1.0 - abs(_middle(one) - _middle(other)) / SAME_WORD_SECONDS)


def _middle(piece: _Piece) -> float:
    assert piece.time is not None
    return (piece.time.start + piece.time.end) / 2


def _segments(passage: _Passage, settings: LongSoundSettings) -> list[Segment]:
    """The sentences of a window, where its words have times; else all of it."""
    window, heard, pieces = passage.window, passage.heard, passage.pieces
    if not pieces:
        text = " ".join(heard.text.split())
        has_no_words = text and not any(map(str.isalnum, text))  # nothing but punctuation; not all merged away
        return [Segment(window.start, window.end, text, doubtful=True)] if has_no_words else []
    segments = []
    for sentence in _sentences(pieces):
        logprobs = [logprob for piece in sentence for logprob in piece.logprobs]
        logprob = math.fsum(logprobs) / len(logprobs) if logprobs else None
        confidence, words = _mean_probability(logprobs), None
        no_speech = None if heard.alignment is None else heard.alignment.no_speech
        start, end = window.start, window.end
        times = [piece.time for piece in sentence if piece.time is not None]
        if len(times) == len(sentence):
            start, end = times[0].start, times[-1].end
            words = tuple(Word(time.word, time.start, time.end, time.confidence) for time in times)
            no_speech = math.fsum(piece.missed for piece in sentence) / len(sentence)
            sure = [time.confidence for time in times if time.confidence is not None]
            confidence = math.fsum(sure) / len(sure) if sure else confidence
        is_doubtful = (
            (not heard.is_whole and sentence[-1] is pieces[-1])
            or (words is None and heard.alignment is not None)  # the sound has no room for the text
            or (logprob is not None and logprob < settings.min_logprob)
            or (no_speech is not None and no_speech >= settings.max_no_speech)
            or (confidence is not None and confidence < settings.min_confidence)
        )
        text = " ".join(piece.text for piece in sentence)
        segments.append(Segment(start, end, text, words, confidence, is_doubtful, logprob, no_speech))
    return segments


def _sentences(pieces: Sequence[_Piece]) -> list[list[_Piece]]:
    """Words up to the end of a sentence, or a pause; all of them where times aren't known."""
    if any(piece.time is None for piece in pieces):
        return [list(pieces)]
    sentences = [[pieces[0]]]
    for before, piece in pairwise(pieces):
        assert before.time is not None and piece.time is not None
        if _SENTENCE_END.search(before.text) or piece.time.start - before.time.end >= SENTENCE_PAUSE_SECONDS:
            sentences.append([])
        sentences[-1].append(piece)
    return sentences


def _mean_probability(logprobs: Sequence[float]) -> float | None:
    return float(np.exp(logprobs).mean()) if len(logprobs) else None


class SpeechModel(Protocol):
    """What a model must have to transcribe: as `mmllm.inference.api.Model`."""

    @property
    def model(self) -> MultimodalModel:
        """The weights."""
        ...

    @property
    def tokenizer(self) -> TokenizerFolder:
        """What it was trained with."""
        ...

    @property
    def generation(self) -> GenerationConfig:
        """Its `max_heard_seconds` bounds windows."""
        ...

    @property
    def engine(self) -> Engine:
        """Writes texts."""
        ...


def transcribe_long(
    model_api: SpeechModel,
    sounds: Sequence[AudioPart],
    options: TextOptions,
    settings: LongSoundSettings | None = None,
    anchor: str | None = None,
) -> list[Transcript]:
    """Writes down what is said in sounds of any length.

    Args:
        model_api: that hears.
        sounds: of any length, rate and number of channels.
        options: how texts are drawn; bounds are of each window.
        settings: how sounds are cut, and what is doubted.
        anchor: a text in front of each window's prompt, as of `Model.transcribe`.

    Raises:
        ValueError: windows are to be longer than what the model hears.
        ModuleNotFoundError: silero-vad is asked for, but not installed.
    """
    generation, hear = model_api.generation, partial(_hear, model_api, options=options, anchor=anchor)
    return transcribe_windows(
        sounds, generation.max_heard_seconds, generation.usual_heard_seconds, hear, settings or LongSoundSettings()
    )


def _hear(model_api: SpeechModel, clips: list[AudioPart], options: TextOptions, anchor: str | None) -> list[Heard]:
    tokenizer = model_api.tokenizer
    audio = tokenizer.require_audio()
    timed = audio.encode_timed([audio.prepare(clip.wave_CT, clip.sample_rate) for clip in clips])
    options = replace(options, num_logprobs=options.num_logprobs or 0)
    maker = options.compiled(tokenizer)
    prompts = [build_prompt("transcribe", tokenizer, audio=codes_KF, anchor=anchor) for codes_KF, _ in timed]
    requests = [options.requests(prompt, maker) for prompt in prompts]
    results = iter(model_api.engine.run([request for tries in requests for request in tries]))
    heard = []
    for clip, (codes_KF, durations_F), tries in zip(clips, timed, requests, strict=True):
        written = [cast("TextResult", next(results)) for _ in tries]
        result = max(written, key=lambda each: float(np.mean(each.logprobs or (-math.inf,))))
        durations_F = None if audio.keeps_durations else durations_F
        alignment = align_words(model_api.model, tokenizer, codes_KF, clip, result.text, durations_F)
        ends = tuple(
            min(len(tokenizer.text.decode(list(result.ids[:count]))), len(result.text))
            for count in range(1, len(result.ids) + 1)
        )
        logprobs = (result.logprobs or ())[: len(ends)]  # without that of the end
        heard.append(Heard(result.text, ends, logprobs, alignment, result.finish_reason == "stop"))
    return heard
