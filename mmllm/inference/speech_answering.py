"""From texts to speech: what `Model.speak` and streams of it share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmllm.inference import arguments
from mmllm.inference.answering import OnError, as_given, as_items, checked, each
from mmllm.inference.inputs import AudioInput, as_audio
from mmllm.inference.pacing import Pace
from mmllm.inference.prompting import Prompter
from mmllm.inference.running import Runner
from mmllm.inference.speaking import Speaker, SpeechOptions, Waveform, speech_options
from mmllm.inference.streaming_sound import SoundStream
from mmllm.inference.streams import SpeechStream
from mmllm.inference.voices import Recording, align_recording

RecordedVoice = tuple[AudioInput | None, str | None]
"""A recording, and what is said in it; None and None: none."""


@dataclass(frozen=True)
class SpeechAnswerer:
    """Speaks texts.

    Attributes:
        prompter: what the model can, and in which voices.
        runner: of its engine.
        speaker: turns texts into requests, and units into sound.
    """

    prompter: Prompter
    runner: Runner
    speaker: Speaker

    def speak(
        self,
        texts: Any,
        out: Any,
        voice: str | list[str | None] | None,
        recorded: RecordedVoice,
        on_error: OnError,
        settings: Mapping[str, Any],
    ) -> Any:
        """As `Model.speak`."""
        options, many = self._options(settings), as_items(texts)
        voices = voice if isinstance(voice, list) else [voice] * len(many)
        paths = [None] * len(many) if out is None else as_items(out)
        for noun, given in (("voices", voices), ("files", paths)):
            if len(given) != len(many):
                raise ValueError(f"there are {len(many)} texts but {len(given)} {noun}; give one for each text")
        self._check_voices(voices)
        outcomes: list[Any] = each(many, lambda place, text: _words(text, f"texts[{place}]"), on_error)
        places = [place for place, text in enumerate(outcomes) if isinstance(text, str)]
        wanted = [outcomes[place] for place in places], [voices[place] for place in places]
        for place, spoken in zip(
            places, self.speaker.attempt(*wanted, options, self._recording(recorded)), strict=True
        ):
            outcomes[place] = spoken
        for outcome, path in zip(checked(outcomes, on_error), paths, strict=True):
            if path is not None and isinstance(outcome, Waveform):
                outcome.save(path)
        return as_given(texts, outcomes)

    def stream(
        self, text: Any, voice: str | None, recorded: RecordedVoice, settings: Mapping[str, Any]
    ) -> SpeechStream:
        """As `Model.stream` of "speak"."""
        options = self._options(settings)
        if options.best_of > 1:
            raise ValueError(f"best_of is {options.best_of}; the best of several can't be streamed: leave it out")
        if options.stop is not None:
            raise ValueError("stop is given; close the stream in its place")
        self._check_voices([voice])
        recording = self._recording(recorded)
        (request,) = self.speaker.requests(_words(text, "text"), voice, options, recording)
        sound = SoundStream(self.prompter.tokenizer, text, options.pace or Pace(), recording)
        return SpeechStream(self.runner.stream(request), sound)

    def _options(self, settings: Mapping[str, Any]) -> SpeechOptions:
        options = speech_options(settings, self.prompter.generation, self.speaker.model.pointer is not None)
        self.prompter.need_speech()
        return options

    def _check_voices(self, voices: Sequence[Any]) -> None:
        known = self.prompter.generation.voices
        for voice in voices:
            if voice is not None and arguments.text("voice", voice) not in known and known:
                named = ", ".join(known[:8]) + (", …" if len(known) > 8 else "")
                near = arguments.near(voice, known)
                raise ValueError(f"there is no voice {voice!r}{near}; this model speaks as {named}; or leave voice out")

    def _recording(self, recorded: RecordedVoice) -> Recording | None:
        sound, text = recorded
        if sound is None and text is None:
            return None
        if sound is None or text is None:
            raise ValueError("a voice from a recording needs both: recording, and recording_text, what is said in it")
        part = as_audio(sound, "recording")
        self.prompter.check_length(part, "the recording")
        (codes_KF,) = self.prompter.codes([part])
        text = arguments.text("recording_text", text)
        return align_recording(self.speaker.model, self.prompter.tokenizer, codes_KF, text)


def _words(text: Any, name: str) -> str:
    if not arguments.text(name, text).strip():
        raise ValueError(f"{name} is empty; give words")
    return text
