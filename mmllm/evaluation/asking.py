"""How evaluation asks a model: for plain texts, in batches, blind where a control wants it, with progress.

Row by row other numbers are drawn, by the rows' places: draws of one evaluation don't go together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mmllm.checkpoints.settings import GenerationConfig, Sampling
from mmllm.data.rows.rows import Row
from mmllm.data.samples.document import Document
from mmllm.data.samples.sample import Segment
from mmllm.evaluation.shots import RowShots
from mmllm.inference.api import Model
from mmllm.inference.generate import generate_text
from mmllm.inference.inputs import as_audio, parse_parts
from mmllm.inference.prompting import Prompter
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
        anchor: a text in front of prompts; see `Prompter`.
        shots: what is shown in front of prompts for captions, transcripts and answers; None: nothing.
    """

    served: Model
    progress: Callable[[int], None] | None = None
    anchor: str | None = None
    shots: RowShots | None = None

    @property
    def prompter(self) -> Prompter:
        """Writes its prompts."""
        return self.served.prompter.anchored(self.anchor)

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

        It is scored as one, also where it is longer than any that training heard. Of codes without durations, a sound
        for which there surely are slots.
        """
        tokenizer, length = self.tokenizer, self.generation.max_length
        if length is None or tokenizer.audio is None:
            return self.generation.max_heard_seconds
        fits = length * tokenizer.audio_pool / tokenizer.frame_rate
        if tokenizer.keeps_durations:
            return fits
        return max(fits, self.generation.max_heard_seconds or 0.0)  # what was heard fits, however few codes it had

    def caption(
        self, images: Sequence[Any], max_new_tokens: int, batch_size: int, blind: bool = False,
        rows: Sequence[Row] | None = None,
    ) -> list[str]:  # fmt: skip
        """A greedy caption of each image.

        Args:
            images: as `Model.caption` takes them.
            max_new_tokens: of each at most.
            batch_size: of how many at once.
            blind: a grey picture stands for each image, and silence for each sound, those of shots too: what words
                alone give away.
            rows: whose images they are; needed where there are shots.
        """
        return self.write(self.caption_prompts(images, max_new_tokens, rows), max_new_tokens, batch_size, blind)

    def transcribe(
        self, sounds: Sequence[Any], max_new_tokens: int, batch_size: int, blind: bool = False,
        rows: Sequence[Row] | None = None,
    ) -> list[str]:  # fmt: skip
        """A greedy transcript of each sound, however long, as one; arguments as of `caption`."""
        return self.write(self.transcript_prompts(sounds, max_new_tokens, rows), max_new_tokens, batch_size, blind)

    def answer(
        self, parts: Sequence[list[Any]], questions: Sequence[str], max_new_tokens: int, batch_size: int,
        blind: bool = False, rows: Sequence[Row] | None = None,
    ) -> list[str]:  # fmt: skip
        """A greedy answer to each question about its parts; arguments as of `caption`."""
        return self.write(
            self.answer_prompts(parts, questions, max_new_tokens, rows), max_new_tokens, batch_size, blind
        )

    def caption_prompts(
        self, images: Sequence[Any], max_new_tokens: int, rows: Sequence[Row] | None = None
    ) -> list[Document]:
        """What `caption` asks."""
        prompter = self.prompter
        return self._behind_shots([prompter.caption(image) for image in images], max_new_tokens, rows)

    def transcript_prompts(
        self, sounds: Sequence[Any], max_new_tokens: int, rows: Sequence[Row] | None = None
    ) -> list[Document]:
        """What `transcribe` asks."""
        prompter = self.prompter
        codes = prompter.codes([as_audio(sound) for sound in sounds])
        return self._behind_shots([prompter.transcript(codes_KF) for codes_KF in codes], max_new_tokens, rows)

    def answer_prompts(
        self,
        parts: Sequence[list[Any]],
        questions: Sequence[str],
        max_new_tokens: int,
        rows: Sequence[Row] | None = None,
    ) -> list[Document]:
        """What `answer` asks."""
        prompter = self.prompter
        prompts = [prompter.question(one, question) for one, question in zip(parts, questions, strict=True)]
        return self._behind_shots(prompts, max_new_tokens, rows)

    def _behind_shots(self, prompts: list[Document], max_new_tokens: int, rows: Sequence[Row] | None) -> list[Document]:
        if self.shots is None:
            return prompts
        assert rows is not None, "shots are drawn by rows"
        return self.shots.before(rows, prompts, max_new_tokens)

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
