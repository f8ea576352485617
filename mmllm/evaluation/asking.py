"""How evaluation asks a model: for plain texts, in batches, blind where a control wants it, with progress.

Row by row other numbers are drawn, by the rows' places: draws of one evaluation don't go together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mmllm.checkpoints.settings import GenerationConfig, Sampling
from mmllm.data.samples.documents import Document, Segment
from mmllm.inference.api import Model
from mmllm.inference.generate import generate_text
from mmllm.inference.inputs import as_audio, parse_parts
from mmllm.inference.speaking import Waveform, speech_options
from mmllm.model.multimodal import MultimodalModel
from mmllm_tokenizers.folder import TokenizerFolder

GREEDY = Sampling()


@dataclass(frozen=True)
class AskedModel:
    """A model that is evaluated.

    Attributes:
        served: the model.
        progress: called with the number of prompts that have become done.
    """

    served: Model
    progress: Callable[[int], None] | None = None

    @property
    def model(self) -> MultimodalModel:
        """The weights."""
        return self.served.model

    @property
    def tokenizer(self) -> TokenizerFolder:
        """What it was trained with."""
        return self.served.tokenizer

    @property
    def generation(self) -> GenerationConfig:
        """Default settings."""
        return self.served.generation

    @property
    def longest_seconds(self) -> float | None:
        """The longest sound for which one of training's sequences had slots; None: not known.

        It is scored as one, also where it is longer than any that training heard.
        """
        tokenizer, length = self.tokenizer, self.generation.max_length
        if length is None or tokenizer.audio is None:
            return self.generation.max_heard_seconds
        return length * tokenizer.audio_pool / tokenizer.frame_rate

    def caption(self, images: Sequence[Any], max_new_tokens: int, batch_size: int, blind: bool = False) -> list[str]:
        """A greedy caption of each image.

        Args:
            images: as `Model.caption` takes them.
            max_new_tokens: of each at most.
            batch_size: of how many at once.
            blind: a grey picture stands for each image, and silence for each sound: what words alone give away.
        """
        prompts = [self.served.caption_prompt(image) for image in images]
        return self.write(prompts, max_new_tokens, batch_size, blind)

    def transcribe(self, sounds: Sequence[Any], max_new_tokens: int, batch_size: int, blind: bool = False) -> list[str]:
        """A greedy transcript of each sound, however long, as one; arguments as of `caption`."""
        prompter = self.served.prompter
        codes = prompter.codes([as_audio(sound) for sound in sounds])
        prompts = [prompter.transcript(codes_KF) for codes_KF in codes]
        return self.write(prompts, max_new_tokens, batch_size, blind)

    def answer(
        self, parts: Sequence[list[Any]], questions: Sequence[str], max_new_tokens: int, batch_size: int,
        blind: bool = False,
    ) -> list[str]:  # fmt: skip
        """A greedy answer to each question about its parts; arguments as of `caption`."""
        prompts = [self.served.question_prompt(one, question) for one, question in zip(parts, questions, strict=True)]
        return self.write(prompts, max_new_tokens, batch_size, blind)

    def continue_texts(self, prompts: Sequence[Segment], max_new_tokens: int, sampling: Sampling) -> list[str]:
        """How each text goes on."""
        documents = [self.served.continuation_prompt(parse_parts(prompt)) for prompt in prompts]
        return self.write(documents, max_new_tokens, self.generation.batch_size, sampling=sampling)

    def speak(
        self, texts: Sequence[str], voices: Sequence[str | None], seed: int, max_seconds: float | None = None
    ) -> list[Waveform]:
        """Each text in its voice (None leaves it to the model); `max_seconds` is needed without a pointer."""
        settings = {"seed": seed} if max_seconds is None else {"seed": seed, "max_seconds": max_seconds}
        options = speech_options(settings, self.generation, self.model.pointer is not None)
        speaker = self.served.speaker
        return speaker.speak(texts, voices, options, numbers=range(len(texts)), progress=self.progress)

    def write(
        self,
        prompts: Sequence[Document],
        max_new_tokens: int,
        batch_size: int,
        blind: bool = False,
        sampling: Sampling = GREEDY,
    ) -> list[str]:
        """What the model writes to each prompt."""
        answers = generate_text(
            self.model, self.tokenizer, prompts, sampling, max_new_tokens, batch_size, blind, self.progress
        )
        return [self.tokenizer.text.decode(ids) for ids in answers]
