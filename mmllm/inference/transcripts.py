"""What was said in a sound: its text, in segments and words that know when they are said and how sure the model is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Word:
    """A word of a transcript.

    Attributes:
        word: as it stands in the text, with its punctuation.
        start: seconds from the beginning of the sound.
        end: likewise.
        confidence: mean probability that the CTC head gives its tokens where they are heard, from 0 to 1.
    """

    word: str
    start: float
    end: float
    confidence: float | None = None


@dataclass(frozen=True)
class Segment:
    """A sentence of a transcript, or what was written of one window where words have no times.

    Attributes:
        start: seconds from the beginning of the sound.
        end: likewise.
        text: what is said.
        words: when; None: the model can't tell (it has no CTC head, or the text doesn't fit the sound).
        confidence: mean of its words'; where there are none, mean probability that the decoder gave its tokens. From 0
            to 1; None: not known.
        doubtful: the text may be wrong or made up; see `mmllm.inference.long_sound.LongSoundSettings`.
        logprob: mean log-probability that the decoder gave its tokens, in nats; None: not known.
        no_speech: share of its tokens that the CTC head doesn't hear, from 0 to 1: high where the decoder makes up
            what nobody says. None: the model has no CTC head.
    """

    start: float
    end: float
    text: str
    words: tuple[Word, ...] | None = None
    confidence: float | None = None
    doubtful: bool = False
    logprob: float | None = None
    no_speech: float | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Transcript(str):
    """The transcript of a sound: a string that knows its segments, as `mmllm.inference.completion.Completion` is one.

    Attributes:
        text: itself, as a plain string; "" where nothing is said.
        segments: in order.
        seconds: that the sound lasts.
        language: as a code (`en`); None: the model doesn't tell.
    """

    text: str
    segments: tuple[Segment, ...] = ()
    seconds: float = 0.0
    language: str | None = None

    def __new__(cls, text: str, *_: object, **__: object) -> Self:
        """The string; the rest is `__init__`'s."""
        return super().__new__(cls, text)

    @property
    def words(self) -> tuple[Word, ...] | None:
        """All words with their times; None where those of some segment aren't known."""
        if any(segment.words is None for segment in self.segments):
            return None
        return tuple(word for segment in self.segments for word in segment.words or ())

    @property
    def doubtful(self) -> bool:
        """Whether any of its segments is."""
        return any(segment.doubtful for segment in self.segments)
