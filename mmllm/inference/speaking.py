"""Texts to speech: prompts, units, the best of several tries, sound.

Shapes: K codebooks, F frames, T samples.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from mmllm.checkpoints.settings import GenerationConfig, Sampling
from mmllm.data.samples.documents import Document, build_prompt
from mmllm.inference.units import Pace, SpokenUnits, generate_units
from mmllm.inference.voices import Recording, begin, ctc_scores
from mmllm.model.multimodal import MultimodalModel
from mmllm_tokenizers.alignment import WordTime, text_words
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.pointer import Spelling


@dataclass(frozen=True)
class Waveform:
    """Speech that a model made."""

    samples: np.ndarray
    """float32 [T] in about [-1, 1]."""
    sample_rate: int
    codes_KF: np.ndarray
    """int64, the units of which it was made."""
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
        max_seconds: speech at most; None, with a pointer alone: as long as the text takes.
        batch_size: texts at once.
        pace: how pointers move; None: the model's own pace.
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
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ValueError(f"max_seconds is {self.max_seconds}; it must be positive")
        if self.best_of < 1:
            raise ValueError(f"best_of is {self.best_of}; give at least 1 try")


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
            ValueError: the options are of a pointer, or of a CTC head, that the model hasn't.
        """
        self._check(options, recording)
        prompts = [self._prompt(text, voice, recording) for text, voice in zip(texts, voices, strict=True)]
        max_frames = None
        if options.max_seconds is not None:
            max_frames = max(1, round(options.max_seconds * self.tokenizer.frame_rate))
        pace, num_before = options.pace, 0 if recording is None else len(recording.text.split())
        if pace is not None and num_before:  # words are counted from the text's first
            pace = replace(pace, pauses={word + num_before: seconds for word, seconds in pace.pauses.items()})
        first, *others = options.samplings
        samplings = options.samplings if others else first
        tries = generate_units(
            self.model, self.tokenizer, prompts * options.best_of, samplings, max_frames, options.batch_size,
            self.progress, pace, options.stop,
        )  # fmt: skip
        return [
            self._waveform(sound, text, num_before, recording)
            for sound, text in zip(self._best(tries, texts), texts, strict=True)
        ]

    def _check(self, options: SpeechOptions, recording: Recording | None) -> None:
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

    def _waveform(self, sound: SpokenUnits, text: str, num_before: int, recording: Recording | None) -> Waveform:
        audio = self.tokenizer.require_audio()
        codes_KF, hop = sound.codes_KF, 0
        if recording is not None:  # decoded behind the recording, so that it begins as it goes on
            hop = round(recording.codes_KF.shape[1] / self.tokenizer.frame_rate * audio.sample_rate)
            codes_KF = torch.cat([recording.codes_KF[: len(codes_KF)], codes_KF], dim=1)
        wave = audio.decode(codes_KF)[..., hop:]
        mono = wave.mean(dim=0) if wave.dim() == 2 else wave
        return Waveform(
            mono.numpy().astype(np.float32),
            audio.sample_rate,
            sound.codes_KF.numpy(),
            self._words(sound, text, num_before, recording),
            sound.num_bounded,
            sound.is_whole,
        )

    def _words(
        self, sound: SpokenUnits, text: str, num_before: int, recording: Recording | None
    ) -> tuple[WordTime, ...]:
        """When each word was said, by the pointer."""
        if sound.pointer_F is None:
            return ()
        whole = text if recording is None else f"{recording.text} {text}"
        spelling = Spelling.of(whole)
        is_letter_L = spelling.letters_L != ord(" ")
        pointer_F = sound.pointer_F.numpy()
        owners_F, is_letter_F = spelling.words_L[pointer_F], is_letter_L[pointer_F]
        words = []
        for number, word in enumerate(whole.split()):
            frames = np.flatnonzero((owners_F == number) & is_letter_F)
            if number >= num_before and len(frames) and text_words(word):
                rate = self.tokenizer.frame_rate
                words.append(WordTime(word, frames[0].item() / rate, (frames[-1].item() + 1) / rate))
        return tuple(words)


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
