"""From prompts to completions: what `Model`'s methods share.

Each item's outcome is its own: one that can't be read, or fails, is raised, or stands as an exception in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, get_args

from mmllm.checkpoints.settings import GenerationConfig
from mmllm.data.samples.document import Document
from mmllm.inference import arguments
from mmllm.inference.completion import Completion, best_first
from mmllm.inference.engine.engine import Engine
from mmllm.inference.engine.requests import Result, TextResult
from mmllm.inference.inputs import AudioInput, AudioPart, as_audio
from mmllm.inference.long_sound import LongSoundSettings, transcribe_long
from mmllm.inference.prompting import Prompter
from mmllm.inference.running import Runner
from mmllm.inference.text_settings import TextOptions, text_options
from mmllm.inference.transcripts import Transcript
from mmllm.model.multimodal import MultimodalModel
from mmllm_tokenizers.folder import TokenizerFolder

OnError = Literal["raise", "return"]
_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


def as_items(value: Any) -> list[Any]:
    """A list, or one item as a list."""
    return value if isinstance(value, list) else [value]


def as_given(given: object, outcomes: Sequence[Any]) -> Any:
    """One outcome for one item, a list for a list."""
    return list(outcomes) if isinstance(given, list) else outcomes[0]


def is_many(value: Any, name: str, kind: type | tuple[type, ...] = list) -> bool:
    """Whether a list is one of several prompts: all of its items are lists themselves, or it is empty.

    Raises:
        ValueError: some items are, and others aren't.
    """
    if not isinstance(value, list):
        return False
    nested = [isinstance(each, kind) for each in value]
    if any(nested) and not all(nested):
        raise ValueError(
            f"{name}[{nested.index(not nested[0])}] is {'no' if nested[0] else 'a'} list, {name}[0] is "
            f"{'one' if nested[0] else 'none'}; give the parts of one prompt, or a list of lists for several"
        )
    return all(nested)


def each(items: Sequence[_Item], make: Callable[[int, _Item], _Made], on_error: OnError) -> list[_Made | Exception]:
    """What is made of each item, or why it can't be."""
    made: list[_Made | Exception] = []
    for place, item in enumerate(items):
        try:
            made.append(make(place, item))
        except (ValueError, OSError) as error:
            if on_error == "raise":
                raise
            made.append(error)
    return made


def checked(outcomes: Sequence[_Made | Exception], on_error: OnError) -> list[Any]:
    """The outcomes; the first exception is raised unless exceptions are to be returned."""
    if on_error == "raise":
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
    return list(outcomes)


def check_on_error(value: Any) -> OnError:
    """What is to be done about items that fail.

    Raises:
        ValueError: another value.
    """
    return arguments.choice("on_error", value, get_args(OnError))


@dataclass(frozen=True)
class Answerer:
    """Writes texts.

    Attributes:
        model: that writes.
        prompter: that writes its prompts.
        runner: of its engine.
    """

    model: MultimodalModel
    prompter: Prompter
    runner: Runner

    @property
    def tokenizer(self) -> TokenizerFolder:
        """Of the model."""
        return self.prompter.tokenizer

    @property
    def generation(self) -> GenerationConfig:
        """Default settings."""
        return self.prompter.generation

    @property
    def engine(self) -> Engine:
        """Of the model."""
        return self.runner.engine

    def anchored(self, anchor: str | None) -> Answerer:
        """The same with a text in front of all prompts; see `Prompter.anchored`."""
        return replace(self, prompter=self.prompter.anchored(anchor))

    def options(self, settings: Mapping[str, Any], n: int | None = None) -> TextOptions:
        """What `TextSettings` say, with the model's defaults.

        Raises:
            ValueError: a setting is unknown, or of a wrong type or value.
        """
        return text_options(settings, self.generation, self.tokenizer, n)

    def write(
        self, prompts: Sequence[Document | Exception], options: TextOptions, on_error: OnError, several: bool = False
    ) -> list[Any]:
        """A completion of each prompt, or a list of completions.

        Args:
            prompts: or what went wrong with them before.
            options: how they are continued.
            on_error: what becomes of those that fail.
            several: whether each gets a list.
        """
        maker = options.compiled(self.tokenizer)
        requests = [
            one for prompt in prompts if isinstance(prompt, Document) for one in options.requests(prompt, maker)
        ]
        results = iter(self.runner.complete(requests))
        outcomes: list[Any] = []
        for prompt in prompts:
            if isinstance(prompt, Exception):
                outcomes.append(prompt)
                continue
            chosen = _chosen([next(results) for _ in range(options.num_tries)], options.num_texts)
            outcomes.append(chosen if several or isinstance(chosen, Exception) else chosen[0])
        return checked(outcomes, on_error)

    def transcribe(
        self,
        sounds: Sequence[AudioInput],
        options: TextOptions,
        on_error: OnError,
        several: bool,
        timestamps: bool,
        long_sound: LongSoundSettings,
    ) -> list[Any]:
        """A completion (or several) of each sound; a transcript of those that are longer than the model hears at once.

        Args:
            sounds: of any length.
            options: how texts are written.
            on_error: what becomes of sounds that fail.
            several: whether each gets a list.
            timestamps: all get transcripts.
            long_sound: how transcripts are made.
        """
        self.prompter.need_hearing()
        heard = each(sounds, lambda place, sound: as_audio(sound, f"sounds[{place}]"), on_error)
        outcomes: list[Any] = list(heard)
        whole = [n for n, one in enumerate(heard) if isinstance(one, AudioPart) and not self._is_cut(one, timestamps)]
        cut = [n for n, one in enumerate(heard) if isinstance(one, AudioPart) and self._is_cut(one, timestamps)]
        if cut and several:
            raise ValueError(
                "several completions are asked for of a sound that is transcribed in windows; leave n out, or cut it"
            )
        short: list[Any] = [heard[place] for place in whole]
        prompts = [self.prompter.transcript(codes_KF) for codes_KF in self.prompter.codes(short)]
        for place, outcome in zip(whole, self.write(prompts, options, on_error, several), strict=True):
            outcomes[place] = outcome
        if cut:
            transcripts = self._transcripts([heard[place] for place in cut], options, on_error, long_sound)
            for place, transcript in zip(cut, transcripts, strict=True):
                outcomes[place] = transcript
        return outcomes

    def _is_cut(self, sound: AudioPart, timestamps: bool) -> bool:
        return timestamps or self.prompter.is_long(sound)

    def _transcripts(
        self, sounds: Sequence[Any], options: TextOptions, on_error: OnError, settings: LongSoundSettings
    ) -> list[Transcript | Exception]:
        try:
            return list(
                transcribe_long(self, sounds, options, settings, self.prompter.anchor)
            )  # all windows of all sounds at once
        except Exception:
            if on_error == "raise":
                raise
        found: list[Transcript | Exception] = []
        for sound in sounds:
            try:
                found += transcribe_long(self, [sound], options, settings, self.prompter.anchor)
            except Exception as error:
                found.append(error)
        return found


def _chosen(tries: Sequence[Result | Exception], num_texts: int) -> list[Completion] | Exception:
    """The best of a prompt's tries; where all are wanted, in the order in which they were drawn."""
    completions = []
    for one in tries:
        if isinstance(one, Exception):
            return one
        assert isinstance(one, TextResult)
        completions.append(Completion.of(one))
    return completions if len(completions) == num_texts else best_first(completions)[:num_texts]
