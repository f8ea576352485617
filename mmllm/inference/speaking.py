"""Texts to speech: prompts, units, the best of several tries, sound.

Shapes: K codebooks, F frames, T samples.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from mmllm.checkpoints.settings import GenerationConfig, Sampling
from mmllm.data.samples.documents import Document, build_prompt
from mmllm.inference.pacing import Pace, Said, paced
from mmllm.inference.units import SpokenUnits, generate_units
from mmllm.inference.voices import Recording, begin, ctc_scores
from mmllm.model.multimodal import MultimodalModel
from mmllm_tokenizers.alignment import WordTime, text_words
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
        soundfile.write(path, self.samples.clip(-1.0, 1.0), self.sample_rate)


@dataclass(frozen=True)
class SpeechOptions:
    """How texts are spoken.

    Attributes:
        samplings: of each codebook, or one of all.
        max_seconds: speech at most, pauses apart; None, with a pointer alone: as long as the text takes.
        batch_size: texts at once.
        pace: how pointers move, how fast the speech is and where it rests; None: the model's own pace.
        best_of: tries of each text, of which the one is kept that the model's CTC head hears best.
        stop: asked before each frame; True ends what is still spoken.
    """

    samplings: tuple[Sampling, ...]
    max_seconds: float | None
    batch_size: int
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
    progress: Callable[[int], None] | None = field(default=None, repr=False)

    def speak(
        self,
        texts: Sequence[str],
        voices: Sequence[str | None],
        options: SpeechOptions,
        recording: Recording | None = None,
    ) -> list[Waveform]:
        """Says each text.

        Args:
            texts: what to say.
            voices: of each text the speaker's name; None leaves it to the model.
            options: how.
            recording: whose voice it is to be said in.

        Raises:
            ValueError: the options are of a pointer, or of a CTC head, that the model hasn't, a pause stands behind no
                word, or there are a recording and a voice's name.
        """
        self._check(texts, voices, options, recording)
        prompts = [self._prompt(text, voice, recording) for text, voice in zip(texts, voices, strict=True)]
        pace, max_frames = options.pace or Pace(), None
        if options.max_seconds is not None:
            max_frames = max(1, round(options.max_seconds * pace.rate * self.tokenizer.frame_rate))
        first, *others = options.samplings
        samplings = options.samplings if others else first
        tries = generate_units(
            self.model, self.tokenizer, prompts * options.best_of, samplings, max_frames, options.batch_size,
            self.progress, pace, options.stop,
        )  # fmt: skip
        return [
            self._waveform(sound, text, pace, recording)
            for sound, text in zip(self._best(tries, texts), texts, strict=True)
        ]

    def _check(
        self,
        texts: Sequence[str],
        voices: Sequence[str | None],
        options: SpeechOptions,
        recording: Recording | None,
    ) -> None:
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
            for text in texts:
                (options.pace or Pace()).check(text)
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

    def _best(self, tries: list[SpokenUnits], texts: Sequence[str]) -> list[SpokenUnits]:
        """Of each text's tries, which follow each other round by round, the one that is heard best."""
        num_texts = len(texts)
        if len(tries) == num_texts:
            return tries
        said = list(texts) * (len(tries) // num_texts)
        scores = ctc_scores(self.model, self.tokenizer, [each.codes_KF for each in tries], said)
        best = []
        for number in range(num_texts):
            places = range(number, len(tries), num_texts)
            best.append(tries[min(places, key=lambda place: scores[place])])
        return best

    def _waveform(self, sound: SpokenUnits, text: str, pace: Pace, recording: Recording | None) -> Waveform:
        audio = self.tokenizer.require_audio()
        codes_KF, hop, whole = sound.codes_KF, 0, text
        if recording is not None:  # decoded behind the recording, so that it begins as it goes on
            hop = round(recording.codes_KF.shape[1] / self.tokenizer.frame_rate * audio.sample_rate)
            codes_KF = torch.cat([recording.codes_KF[: len(codes_KF)], codes_KF], dim=1)
            whole = f"{recording.text} {text}"
        wave = audio.decode(codes_KF)[..., hop:]
        mono_T = (wave.mean(dim=0) if wave.dim() == 2 else wave).numpy().astype(np.float32)
        words: list[WordTime] = []
        if sound.pointer_F is not None:
            num_before = len(whole.split()) - len(text.split())
            said = Said.of(sound.pointer_F.numpy(), whole, num_before, self.tokenizer.frame_rate, sound.is_whole)
            mono_T, words = paced(mono_T, audio.sample_rate, _words(said, text), said, pace)
        return Waveform(
            mono_T, audio.sample_rate, sound.codes_KF.numpy(), tuple(words), sound.num_bounded, sound.is_whole
        )


def _words(said: Said, text: str) -> dict[int, WordTime]:
    """When each word was said, by its number, as far as it came."""
    times = {number: said.word(number) for number, word in enumerate(text.split()) if text_words(word)}
    return {number: WordTime(text.split()[number], *time) for number, time in times.items() if time is not None}


def speech_options(settings: Mapping[str, Any], defaults: GenerationConfig, has_pointer: bool) -> SpeechOptions:
    """The options that settings of `Model.speak` make, with a model's defaults.

    Args:
        settings: see `mmllm.inference.api.SpeechSettings`.
        defaults: of the model.
        has_pointer: without a pointer speech is bounded by the default's `max_seconds`.
    """
    speech = defaults.speech
    temperature = settings.get("temperature", defaults.speech_temperatures or speech.temperature)
    temperatures = list(temperature) if isinstance(temperature, Sequence) else [temperature]
    samplings = tuple(
        Sampling(
            each,
            settings.get("top_k", speech.top_k),
            settings.get("top_p", speech.top_p),
            settings.get("seed", speech.seed),
        )
        for each in temperatures
    )
    pace = {name: settings[name] for name in ("rate", "pauses", "max_letter_seconds", "variation") if name in settings}
    return SpeechOptions(
        samplings=samplings,
        max_seconds=settings.get("max_seconds", None if has_pointer else defaults.max_seconds),
        batch_size=settings.get("batch_size", defaults.batch_size),
        pace=Pace(**pace) if pace else None,
        best_of=settings.get("best_of", 1),
        stop=settings.get("stop"),
    )
