"""Texts to speech: prompts, units, the best of several tries, sound.

Shapes: K codebooks, F frames, T samples.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import soundfile

from mmllm.checkpoints.settings import GenerationConfig, Sampling
from mmllm.data.samples.document import Document
from mmllm.data.samples.documents import build_prompt
from mmllm.inference import arguments
from mmllm.inference.engine.requests import Result, SpeechRequest, SpokenUnits
from mmllm.inference.pacing import Pace
from mmllm.inference.running import Runner
from mmllm.inference.sound_files import to_pcm
from mmllm.inference.streaming_sound import sound_of
from mmllm.inference.text_settings import MAX_TRIES, check_names, sampling_of, try_number
from mmllm.inference.voices import Recording, begin, ctc_scores
from mmllm.model.multimodal import MultimodalModel
from mmllm_tokenizers.alignment import WordTime
from mmllm_tokenizers.folder import TokenizerFolder


@dataclass(frozen=True)
class Waveform:
    """Speech that a model made."""

    samples: np.ndarray
    """float32 [T] in about [-1, 1]."""
    sample_rate: int
    codes_KF: np.ndarray
    """int64, the units that the model spoke: what the samples are before the rate stretched them, without pauses."""
    words: tuple[WordTime, ...] = ()
    """When each word is said, as far as it came; empty: the model has no pointer."""
    num_bounded: int = 0
    """Letters that lasted as long as they may (`max_letter_seconds`)."""
    is_whole: bool = True
    """False: it was stopped, or ran into `max_seconds`, before its end."""

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return len(self.samples) / self.sample_rate

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes 16-bit sound in the format that the path's suffix names (`.wav`, `.flac`, `.ogg`).

        Raises:
            ValueError: the suffix names no format.
        """
        path = Path(path)
        if path.suffix[1:].upper() not in soundfile.available_formats():
            raise ValueError(f"cannot write sound to {path}: its suffix is {path.suffix!r}; use .wav, .flac or .ogg")
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, to_pcm(self.samples), self.sample_rate)


class SpeechSettings(TypedDict, total=False):
    """Keyword arguments of `Model.speak`; what is left out comes from the model's `generation`.

    `temperature` (one, or one of each codebook), `top_k`, `top_p`, `min_p`, `typical_p` and `seed` say how units are
    drawn, as in `TextSettings`. `max_seconds` bounds the speech. `best_of` tries are spoken of each text, of which the
    one is kept that the model's CTC head hears best. `stop()` is asked before each frame; True ends what is still
    spoken.

    Where the model has a pointer into what it says: `rate` 2 speaks twice as fast, at the same pitch; `pauses` are
    seconds of silence behind words by their numbers (`{2: 0.5}`: behind the third word; -1: before the first); a letter
    lasts `max_letter_seconds` at most (at rate 1), and `variation` (0 to 1) leaves the time that each takes to chance.
    Without `max_seconds`, speech takes as long as its text does.
    """

    temperature: float | Sequence[float]
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    seed: int
    max_seconds: float
    rate: float
    pauses: Mapping[int, float]
    max_letter_seconds: float
    variation: float
    best_of: int
    stop: Callable[[], bool]


@dataclass(frozen=True)
class SpeechOptions:
    """How texts are spoken.

    Attributes:
        samplings: of each codebook, or one of all.
        max_seconds: speech at most, pauses apart; None, with a pointer alone: as long as the text takes.
        pace: how pointers move, how fast the speech is and where it rests; None: the model's own pace.
        best_of: tries of each text, of which the one is kept that the model's CTC head hears best.
        stop: asked before each frame; True ends what is still spoken.
    """

    samplings: tuple[Sampling, ...]
    max_seconds: float | None
    pace: Pace | None = None
    best_of: int = 1
    stop: Callable[[], bool] | None = None

    def __post_init__(self) -> None:
        if not self.samplings:
            raise ValueError("there is no temperature; give one, or one for each codebook")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ValueError(f"max_seconds is {self.max_seconds}; it must be positive")
        if self.best_of < 1:
            raise ValueError(f"best_of is {self.best_of}; give at least 1 try")
        is_drawn = any(sampling.temperature > 0 and sampling.top_k != 1 for sampling in self.samplings)
        if self.best_of > 1 and not is_drawn and not (self.pace and self.pace.variation):
            raise ValueError(
                f"best_of is {self.best_of}, but nothing is left to chance, so that all tries are the same; give a "
                f"temperature or a variation above 0"
            )


@dataclass(frozen=True)
class Speaker:
    """A model that speaks."""

    model: MultimodalModel
    tokenizer: TokenizerFolder
    runner: Runner = field(repr=False)

    def speak(
        self,
        texts: Sequence[str],
        voices: Sequence[str | None],
        options: SpeechOptions,
        recording: Recording | None = None,
        numbers: Sequence[int] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Waveform]:
        """Says each text; arguments and errors are those of `attempt`, of which the first is raised."""
        waveforms = []
        for each in self.attempt(texts, voices, options, recording, numbers, progress):
            if isinstance(each, Exception):
                raise each
            waveforms.append(each)
        return waveforms

    def attempt(
        self,
        texts: Sequence[str],
        voices: Sequence[str | None],
        options: SpeechOptions,
        recording: Recording | None = None,
        numbers: Sequence[int] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Waveform | Exception]:
        """Says each text, or gives what went wrong with it.

        Args:
            texts: what to say.
            voices: of each text the speaker's name; None leaves it to the model.
            options: how.
            recording: whose voice it is to be said in.
            numbers: of each text, which with the seed decides what is drawn; None: 0, so that what is said of a text
                doesn't depend on those beside it.
            progress: called with the number of tries that have become done.

        Raises:
            ValueError: the options are of a pointer, or of a CTC head, that the model hasn't, or there are a recording
                and a voice's name.
        """
        self._check(voices, options, recording)
        asked: list[SpeechRequest] = []
        said: list[Exception | None] = []
        for place, (text, voice) in enumerate(zip(texts, voices, strict=True)):
            try:
                asked += self.requests(text, voice, options, recording, 0 if numbers is None else numbers[place])
                said.append(None)
            except ValueError as error:
                said.append(error)
        tries = iter(self.runner.complete(asked, options.stop, progress))
        return [
            error or self._best([next(tries) for _ in range(options.best_of)], text, options.pace or Pace(), recording)
            for error, text in zip(said, texts, strict=True)
        ]

    def requests(
        self, text: str, voice: str | None, options: SpeechOptions, recording: Recording | None = None, number: int = 0
    ) -> list[SpeechRequest]:
        """One for each try at a text.

        Raises:
            ValueError: a pause stands behind no word, or the recording's text is too long for it.
        """
        pace, max_frames = options.pace or Pace(), None
        if self.model.pointer is not None:
            pace.check(text)
        if options.max_seconds is not None:
            max_frames = max(1, round(options.max_seconds * pace.rate * self.tokenizer.frame_rate))
        prompt = self._prompt(text, voice, recording)
        return [
            SpeechRequest(prompt, options.samplings, max_frames, pace, (number + try_number(place)) % 2**32)
            for place in range(options.best_of)
        ]

    def _check(self, voices: Sequence[str | None], options: SpeechOptions, recording: Recording | None) -> None:
        if options.best_of > 1 and self.model.ctc_head is None:
            raise ValueError(
                f"best_of is {options.best_of}, but the model has no CTC head to hear its tries; give 1, or train it "
                f"with loss.ctc above 0"
            )
        named = next((voice for voice in voices if voice is not None), None)
        if recording is not None and named is not None:
            raise ValueError(
                f"the voice {named!r} and a recording are both given; leave one out: a recording is gone on from in "
                f"its own voice"
            )
        if self.model.pointer is not None:
            return
        needing = {"rate, pauses, max_letter_seconds or variation": options.pace, "a voice from a recording": recording}
        for what, given in needing.items():
            if given is not None:
                raise ValueError(f"{what}: this model has no pointer into what it says; train one with audio.pointer")
        if options.max_seconds is None:
            raise ValueError("this model has no pointer into what it says; give max_seconds")

    def _prompt(self, text: str, voice: str | None, recording: Recording | None) -> Document:
        if recording is None:
            return build_prompt("speak", self.tokenizer, text=text, voice=voice)
        joined = build_prompt("speak", self.tokenizer, text=f"{recording.text} {text}", voice=voice)
        return begin(joined, text, recording, self.tokenizer)

    def _best(
        self, tries: Sequence[Result | Exception], text: str, pace: Pace, recording: Recording | None
    ) -> Waveform | Exception:
        """Of a text's tries the one that is heard best."""
        sounds: list[SpokenUnits] = []
        for each in tries:
            if isinstance(each, Exception):
                return each
            assert isinstance(each, SpokenUnits)
            sounds.append(each)
        if len(sounds) > 1:
            codes = [each.codes_KF for each in sounds]
            scores = ctc_scores(self.model, self.tokenizer, codes, [text] * len(sounds))
            sounds.insert(0, sounds[scores.index(min(scores))])
        return self.waveform(sounds[0], text, pace, recording)

    def waveform(self, sound: SpokenUnits, text: str, pace: Pace, recording: Recording | None) -> Waveform:
        """Units as sound."""
        samples, words = sound_of(
            sound.codes_KF, self.tokenizer, sound.pointer_F, text, pace, recording, sound.is_whole
        )
        rate = self.tokenizer.require_audio().sample_rate
        return Waveform(samples, rate, sound.codes_KF.numpy(), words, sound.num_bounded, sound.is_whole)


def speech_options(settings: Mapping[str, Any], defaults: GenerationConfig, has_pointer: bool) -> SpeechOptions:
    """The options that settings of `Model.speak` make, with a model's defaults.

    Args:
        settings: see `SpeechSettings`.
        defaults: of the model.
        has_pointer: without a pointer speech is bounded by the default's `max_seconds`.

    Raises:
        ValueError: a setting is unknown, of a wrong type or value; it is named.
    """
    check_names(settings, SpeechSettings)
    speech, given = defaults.speech, dict(settings)
    temperature = given.pop("temperature", defaults.speech_temperatures or speech.temperature)
    is_list = isinstance(temperature, Sequence) and not isinstance(temperature, (str, bytes))
    samplings = tuple(
        sampling_of({**given, "temperature": each}, speech) for each in (temperature if is_list else [temperature])
    )
    for name in ("max_seconds", "rate", "max_letter_seconds", "variation"):
        if name in given:
            given[name] = arguments.real(name, given[name])
    if "pauses" in given:
        given["pauses"] = _pauses(given["pauses"])
    if "stop" in given and not callable(given["stop"]):
        raise arguments.wrong("stop", given["stop"], "a function that says whether to stop")
    pace = {name: given[name] for name in ("rate", "pauses", "max_letter_seconds", "variation") if name in given}
    return SpeechOptions(
        samplings=samplings,
        max_seconds=given.get("max_seconds", None if has_pointer else defaults.max_seconds),
        pace=Pace(**pace) if pace else None,
        best_of=arguments.whole("best_of", given.get("best_of", 1), 1, MAX_TRIES),
        stop=given.get("stop"),
    )


def _pauses(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise arguments.wrong("pauses", value, "a dict of words' numbers and seconds, such as {2: 0.5}")
    return {
        arguments.whole("a word's number in pauses", word): arguments.real(f"pauses[{word}]", seconds)
        for word, seconds in value.items()
    }
