"""What a trained model does for Python code: caption, transcribe, answer, speak, generate, chat, stream, embed, score.

Shapes: K codebooks, F frames, C channels of an embedding.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, Unpack, overload

import torch
from torch import Tensor

from mmllm.checkpoints.adapters import adapter_names, set_adapter
from mmllm.checkpoints.folder import load_model
from mmllm.checkpoints.settings import GenerationConfig
from mmllm.data.samples.decode import ImageTransform
from mmllm.data.samples.document import Document
from mmllm.data.samples.documents import default_transform
from mmllm.inference import arguments
from mmllm.inference.answering import (
    Answerer,
    OnError,
    as_given,
    as_items,
    check_on_error,
    each,
    is_many,
)
from mmllm.inference.completion import Completion, TextPiece
from mmllm.inference.drafts import load_draft
from mmllm.inference.embedding import Embedder, Pooling, Space
from mmllm.inference.engine.engine import Engine
from mmllm.inference.engine.ngrams import NGrams
from mmllm.inference.engine.requests import EngineConfig
from mmllm.inference.inputs import AudioInput, AudioPart, ImagePart, Part, PictureInput, as_audio, parse_parts
from mmllm.inference.long_sound import LongSoundSettings
from mmllm.inference.prompting import Prompter
from mmllm.inference.quantized_layers import WeightKind
from mmllm.inference.running import Runner, bounded
from mmllm.inference.speaking import Speaker, SpeechSettings, Waveform
from mmllm.inference.speech_answering import SpeechAnswerer
from mmllm.inference.streams import SoundPiece, SpeechStream, TextStream
from mmllm.inference.text_settings import TextSettings
from mmllm.inference.transcripts import Transcript
from mmllm.model.multimodal import MultimodalModel
from mmllm_tokenizers.folder import TokenizerFolder

Messages = Sequence[Mapping[str, Any]]
TextTask = Literal["caption", "transcribe", "answer", "generate", "chat"]
PathLike = str | os.PathLike[str]
_Caller = TypeVar("_Caller")
_Answer = TypeVar("_Answer")
_Arguments = ParamSpec("_Arguments")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TASKS = ("caption", "transcribe", "answer", "generate", "chat", "speak")


def _device(name: torch.device | str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:  # torch lists all kinds that there ever were
        raise ValueError(f"device is {name!r}, which PyTorch doesn't know; give cpu, cuda or cuda:0") from error


def load(
    directory: PathLike,
    device: torch.device | str = "auto",
    dtype: torch.dtype | str | None = None,
    adapter: str | Sequence[str] | None = None,
    *,
    quantize: WeightKind | None = None,
    draft: PathLike | None = None,
    engine: EngineConfig | None = None,
    clip: PathLike | None = None,
) -> Model:
    """A model from its folder, ready to run.

    Args:
        directory: what training wrote, or `mmllm.checkpoints.folder.save_model`.
        device: "auto" takes a GPU if there is one.
        dtype: of the weights, "bfloat16" for example; None keeps the saved one.
        adapter: of the folder's `adapters/NAME`; of several, the first is used until `Model.set_adapter` chooses
            another. None: the model alone.
        quantize: "int8" or "int4" rounds the weights of the decoder, on the CPU: less memory, and faster where reading
            them is what takes time. None: as they are.
        draft: folder of a smaller model that `mmllm draft` made of this one: it drafts what this one verifies.
        engine: how many requests are answered at once, and other bounds; None: the folder's `batch_size`.
        clip: folder of the CLIP that the model's tower comes from, for `Model.embed(..., space="clip")`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the folder is damaged, foreign or of another version; the message says what is wrong.

    >>> import mmllm
    >>> model = mmllm.load(folder)
    >>> caption = model.caption("cat.jpg")
    """
    if isinstance(dtype, str):
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(_DTYPES)}")
        dtype = _DTYPES[dtype]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif _device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device}, but PyTorch finds no GPU here; choose cpu, or auto")
    loaded = load_model(directory, device, dtype, adapter)
    if quantize is not None:
        from mmllm.inference.quantize import quantize as quantize_weights

        quantize_weights(loaded.model, quantize)
    drafting = None if draft is None else load_draft(draft, loaded.tokenizer, device, dtype)
    return Model(loaded.model, loaded.tokenizer, loaded.image_transform, loaded.generation, engine, clip, drafting)


def _in_thread(
    method: Callable[Concatenate[_Caller, _Arguments], _Answer],
) -> Callable[Concatenate[_Caller, _Arguments], Coroutine[Any, Any, _Answer]]:
    """A method's async twin: it runs in a thread, so that the event loop goes on; many share the engine's steps."""

    @functools.wraps(method)
    async def twin(self: _Caller, *args: _Arguments.args, **settings: _Arguments.kwargs) -> _Answer:
        return await asyncio.to_thread(method, self, *args, **settings)

    return twin


class Model:
    """A model with its tokenizer, for any number of threads. Training can wrap one: nothing here changes it.

    Wherever one input is taken, a list of inputs is too, and gives a list: lists are answered together, much faster
    than one call each, and with the same answers. Settings that are left out come from `generation`. Of a list,
    `on_error="return"` gives the exception in the place of an item that can't be read or answered, in place of raising
    it. `n` gives a list of so many completions in the place of one. Each method has an async twin: `acaption` and so
    on, and `astream`.

    Args:
        model: the weights.
        tokenizer: what it was trained with.
        image_transform: how images reach the tower; by default what the tokenizer folder implies.
        generation: default settings.
        engine: bounds of the engine; None: it answers `generation.batch_size` requests at once.
        clip: see `load`.
        draft: a smaller model with the same ids, which drafts what this one verifies.
    """

    def __init__(
        self,
        model: MultimodalModel,
        tokenizer: TokenizerFolder,
        image_transform: ImageTransform | None = None,
        generation: GenerationConfig | None = None,
        engine: EngineConfig | None = None,
        clip: PathLike | None = None,
        draft: MultimodalModel | NGrams | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.image_transform = image_transform or default_transform(tokenizer)
        self.generation = generation or GenerationConfig()
        self.prompter = Prompter(model.config, tokenizer, self.image_transform, self.generation)
        engine = engine or EngineConfig(max_rows=self.generation.batch_size)
        if draft is not None and engine.speculation == "none":
            engine = dataclasses.replace(engine, speculation="ngram" if isinstance(draft, NGrams) else "draft")
        self._runner = Runner(model, tokenizer, bounded(engine, self.generation, model.config.decoder), draft)
        self._answerer = Answerer(model, self.prompter, self._runner)
        self._speech = SpeechAnswerer(self.prompter, self._runner, self.speaker)
        self._embedder = Embedder(model, self.prompter, self.image_transform, clip)

    @property
    def engine(self) -> Engine:
        """The engine that answers all calls of all threads."""
        return self._runner.engine

    @property
    def speaker(self) -> Speaker:
        """What turns texts into requests to speak, and units into sound."""
        return Speaker(self.model, self.tokenizer, self._runner)

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that are loaded."""
        return adapter_names(self.model.decoder)

    def set_adapter(self, name: str | None) -> None:
        """Chooses which adapter the model runs with from now on; None: the model alone.

        Raises:
            ValueError: none of this name is loaded, or something is being answered.
        """
        self._runner.change(lambda: set_adapter(self.model.decoder, name))

    # ---- what is seen and heard, in words

    @overload
    def caption(
        self, images: list[Any], *, n: int, anchor: str | None = None, **settings: Unpack[TextSettings]
    ) -> list[list[Completion]]: ...
    @overload
    def caption(
        self,
        images: list[Any],
        *,
        on_error: Literal["return"],
        anchor: str | None = None,
        **settings: Unpack[TextSettings],
    ) -> list[Completion | Exception]: ...
    @overload
    def caption(
        self, images: list[Any], *, anchor: str | None = None, **settings: Unpack[TextSettings]
    ) -> list[Completion]: ...
    @overload
    def caption(
        self, images: PictureInput, *, n: int, anchor: str | None = None, **settings: Unpack[TextSettings]
    ) -> list[Completion]: ...
    @overload
    def caption(
        self, images: PictureInput, *, anchor: str | None = None, **settings: Unpack[TextSettings]
    ) -> Completion: ...
    def caption(
        self,
        images: Any,
        *,
        n: int | None = None,
        on_error: OnError = "raise",
        anchor: str | None = None,
        **settings: Unpack[TextSettings],
    ) -> Any:
        """Says what is in an image, or in each of a list.

        Args:
            images: a path, bytes, an opened file, PIL image, or array or tensor [H, W], [H, W, C] or [C, H, W]
                (uint8, or float in [0, 1]).
            n: a list of so many completions, drawn by their chance.
            on_error: see `Model`.
            anchor: a text in front of the prompt: the `anchor_prompt` of the recipe's source that the model was
                tuned on.
            **settings: see `TextSettings`.

        Raises:
            ValueError: the model does not see, or an image cannot be read.

        >>> model = mmllm.load(folder)
        >>> caption = model.caption("cat.jpg", max_new_tokens=8)
        >>> len(caption.ids) <= 8 and 0 < caption.confidence <= 1
        True
        >>> [cat, missing] = model.caption(["cat.jpg", "dog.jpg"], on_error="return")
        >>> missing
        FileNotFoundError('no image file at dog.jpg; check the path')
        """
        options, on_error = self._answerer.options(settings, n), check_on_error(on_error)
        self.prompter.need_sight()
        prompter = self.prompter.anchored(anchor)
        prompts = each(as_items(images), lambda n, one: prompter.caption(one, f"images[{n}]"), on_error)
        return as_given(images, self._answerer.write(prompts, options, on_error, n is not None))

    @overload
    def transcribe(
        self, sounds: list[Any], *, timestamps: Literal[True], long_sound: LongSoundSettings | None = None,
        anchor: str | None = None, **settings: Unpack[TextSettings],
    ) -> list[Transcript]: ...  # fmt: skip
    @overload
    def transcribe(
        self, sounds: AudioInput, *, timestamps: Literal[True], long_sound: LongSoundSettings | None = None,
        anchor: str | None = None, **settings: Unpack[TextSettings],
    ) -> Transcript: ...  # fmt: skip
    @overload
    def transcribe(
        self, sounds: list[Any], *, n: int, anchor: str | None = None, **settings: Unpack[TextSettings]
    ) -> list[list[Completion]]: ...
    @overload
    def transcribe(
        self, sounds: list[Any], *, on_error: Literal["return"], timestamps: bool = False,
        long_sound: LongSoundSettings | None = None, anchor: str | None = None, **settings: Unpack[TextSettings],
    ) -> list[Completion | Transcript | Exception]: ...  # fmt: skip
    @overload
    def transcribe(
        self,
        sounds: list[Any],
        *,
        long_sound: LongSoundSettings | None = None,
        anchor: str | None = None,
        **settings: Unpack[TextSettings],
    ) -> list[Completion | Transcript]: ...
    @overload
    def transcribe(
        self, sounds: AudioInput, *, n: int, anchor: str | None = None, **settings: Unpack[TextSettings]
    ) -> list[Completion]: ...
    @overload
    def transcribe(
        self,
        sounds: AudioInput,
        *,
        long_sound: LongSoundSettings | None = None,
        anchor: str | None = None,
        **settings: Unpack[TextSettings],
    ) -> Completion | Transcript: ...
    def transcribe(
        self,
        sounds: Any,
        *,
        timestamps: bool = False,
        long_sound: LongSoundSettings | None = None,
        n: int | None = None,
        on_error: OnError = "raise",
        anchor: str | None = None,
        **settings: Unpack[TextSettings],
    ) -> Any:
        """Writes down what is said in a sound, or in each of a list.

        A sound that is longer than any that training heard (`generation.max_heard_seconds`) is cut at its pauses, and
        gives a `Transcript`.

        Args:
            sounds: a path, bytes, an opened file, `mmllm.Audio`, or (samples, sample rate): any rate, mono or stereo.
            timestamps: all sounds give a `Transcript`: a string too, with segments and words that know when they are
                said.
            long_sound: how transcripts are made.
            n: a list of so many completions, drawn by their chance.
            on_error: see `Model`.
            anchor: a text in front of the prompt: the `anchor_prompt` of the recipe's source that the model was
                tuned on.
            **settings: see `TextSettings`.

        Raises:
            ValueError: the model does not hear, or a sound cannot be read.

        >>> model = mmllm.load(folder)
        >>> said = model.transcribe("talk.wav", max_new_tokens=8)
        >>> said.finish_reason in ("stop", "length")
        True
        >>> timed = model.transcribe(["talk.wav"], timestamps=True)[0]
        >>> timed.seconds
        0.5
        """
        options, on_error = self._answerer.options(settings, n), check_on_error(on_error)
        if long_sound is not None and not isinstance(long_sound, LongSoundSettings):
            raise arguments.wrong("long_sound", long_sound, "LongSoundSettings")
        timestamps = arguments.flag("timestamps", timestamps)
        long_sound = long_sound or LongSoundSettings()
        answerer = self._answerer.anchored(anchor)
        outcomes = answerer.transcribe(as_items(sounds), options, on_error, n is not None, timestamps, long_sound)
        return as_given(sounds, outcomes)

    @overload
    def answer(
        self,
        parts: list[Any],
        questions: list[str],
        *,
        n: int,
        anchor: str | None = None,
        **settings: Unpack[TextSettings],
    ) -> list[list[Completion]]: ...
    @overload
    def answer(
        self, parts: list[Any], questions: list[str], *, on_error: Literal["return"],
        anchor: str | None = None, **settings: Unpack[TextSettings],
    ) -> list[Completion | Exception]: ...  # fmt: skip
    @overload
    def answer(
        self, parts: list[Any], questions: list[str], *, anchor: str | None = None, **settings: Unpack[TextSettings]
    ) -> list[Completion]: ...
    @overload
    def answer(
        self,
        parts: Part | list[Any],
        questions: str,
        *,
        n: int,
        anchor: str | None = None,
        **settings: Unpack[TextSettings],
    ) -> list[Completion]: ...
    @overload
    def answer(
        self, parts: Part | list[Any], questions: str, *, anchor: str | None = None, **settings: Unpack[TextSettings]
    ) -> Completion: ...
    def answer(
        self,
        parts: Any,
        questions: Any,
        *,
        n: int | None = None,
        on_error: OnError = "raise",
        anchor: str | None = None,
        **settings: Unpack[TextSettings],
    ) -> Any:
        """Answers a question about text, images and sounds; with a list of questions, each about its own parts.

        Args:
            parts: one part or a list of parts, as `generate` takes them; with a list of questions a list of these.
            questions: what is asked.
            n: a list of so many completions, drawn by their chance.
            on_error: see `Model`.
            anchor: a text in front of the prompt: the `anchor_prompt` of the recipe's source that the model was
                tuned on.
            **settings: see `TextSettings`.

        Raises:
            ValueError: there are not as many questions as parts to ask about, or a part cannot be read.

        >>> model = mmllm.load(folder)
        >>> answer = model.answer(["see ", "cat.jpg"], "how many cats?", choices=["one", "two"])
        >>> answer in ("one", "two")
        True
        >>> answers = model.answer(["cat.jpg", ["talk.wav", " said he"]], ["how many cats?", "who?"])
        """
        options, on_error = self._answerer.options(settings, n), check_on_error(on_error)
        many = parts if isinstance(questions, list) else [parts]
        asked = as_items(questions)
        if not isinstance(many, Sequence) or isinstance(many, (str, bytes)) or len(many) != len(asked):
            num_parts = len(many) if isinstance(many, list) else 1
            raise ValueError(f"there are {len(asked)} questions but parts for {num_parts}; give parts for each")

        prompter = self.prompter.anchored(anchor)

        def prompt(place: int, question: Any) -> Document:
            return prompter.question(many[place], arguments.text(f"questions[{place}]", question))

        return as_given(
            questions, self._answerer.write(each(asked, prompt, on_error), options, on_error, n is not None)
        )

    # ---- what is to be continued

    @overload
    def generate(
        self, parts: list[list[Any]], *, n: int, **settings: Unpack[TextSettings]
    ) -> list[list[Completion]]: ...
    @overload
    def generate(
        self, parts: list[list[Any]], *, on_error: Literal["return"], **settings: Unpack[TextSettings]
    ) -> list[Completion | Exception]: ...
    @overload
    def generate(self, parts: list[list[Any]], **settings: Unpack[TextSettings]) -> list[Completion]: ...
    @overload
    def generate(
        self, parts: Part | list[Any], *, images: Sequence[PictureInput] = (), sounds: Sequence[AudioInput] = (),
        n: int, **settings: Unpack[TextSettings],
    ) -> list[Completion]: ...  # fmt: skip
    @overload
    def generate(
        self, parts: Part | list[Any], *, images: Sequence[PictureInput] = (), sounds: Sequence[AudioInput] = (),
        **settings: Unpack[TextSettings],
    ) -> Completion: ...  # fmt: skip
    def generate(
        self,
        parts: Any,
        *,
        images: Sequence[PictureInput] = (),
        sounds: Sequence[AudioInput] = (),
        n: int | None = None,
        on_error: OnError = "raise",
        **settings: Unpack[TextSettings],
    ) -> Any:
        """Continues a prompt of text, images and sounds in any order, or each of a list of prompts.

        Args:
            parts: a prompt: text, an image, a sound, or a list of these. Text may hold `<|image|>` and `<|audio|>`
                slots, which the prompt's images and sounds then fill in order. A list of lists is several prompts.
            images: fill `<|image|>` slots of a single prompt, after the images among `parts`.
            sounds: fill `<|audio|>` slots, likewise.
            n: a list of so many completions, drawn by their chance.
            on_error: see `Model`.
            **settings: see `TextSettings`.

        Raises:
            ValueError: slots and images (or sounds) differ in number, or a part cannot be read.

        >>> model = mmllm.load(folder)
        >>> text = model.generate("Compare <|image|> with <|image|>.", images=["cat.jpg", "cat.jpg"])
        >>> text == model.generate(["Compare ", "cat.jpg", " with ", "cat.jpg", "."])
        True
        >>> two = model.generate([["a red"], ["see ", "cat.jpg"]], stop=".")
        >>> three = model.generate("a red", n=3, temperature=0.8, seed=1)
        """
        options, on_error = self._answerer.options(settings, n), check_on_error(on_error)
        several = is_many(parts, "parts")
        if several and (images or sounds):
            raise ValueError("images and sounds fill the slots of one prompt; give each prompt its own among its parts")

        def prompt(place: int, one: Any) -> Document:
            return self.prompter.continuation(parse_parts(one, images, sounds))

        prompts = each(parts if several else [parts], prompt, on_error)
        outcomes = self._answerer.write(prompts, options, on_error, n is not None)
        return outcomes if several else outcomes[0]

    @overload
    def chat(
        self, messages: list[list[Mapping[str, Any]]], *, n: int, **settings: Unpack[TextSettings]
    ) -> list[list[Completion]]: ...
    @overload
    def chat(
        self, messages: list[list[Mapping[str, Any]]], *, on_error: Literal["return"], **settings: Unpack[TextSettings]
    ) -> list[Completion | Exception]: ...
    @overload
    def chat(self, messages: list[list[Mapping[str, Any]]], **settings: Unpack[TextSettings]) -> list[Completion]: ...
    @overload
    def chat(self, messages: Messages, *, n: int, **settings: Unpack[TextSettings]) -> list[Completion]: ...
    @overload
    def chat(self, messages: Messages, **settings: Unpack[TextSettings]) -> Completion: ...
    def chat(
        self, messages: Any, *, n: int | None = None, on_error: OnError = "raise", **settings: Unpack[TextSettings]
    ) -> Any:
        """The assistant's next message of a conversation, or of each of a list of conversations.

        A model that came with a chat template writes conversations by it, others as the task `chat`.

        Args:
            messages: `{"role": "system" | "user" | "assistant", "content": ...}`, the last one the user's. Content
                is text or a list of parts, as `generate` takes them, and of OpenAI's types `text`, `image_url` (with a
                data URL) and `input_audio`. With a chat template there may be the role `tool`, which may be the last,
                and further keys that the template reads. A list of such lists is several conversations.
            n: a list of so many completions, drawn by their chance.
            on_error: see `Model`.
            **settings: see `TextSettings`.

        Raises:
            ValueError: a role is unknown, the last message is not the user's, or the template refuses the messages.

        >>> model = mmllm.load(folder)
        >>> messages = [{"role": "user", "content": ["what is this?", "cat.jpg"]}]
        >>> messages.append({"role": "assistant", "content": model.chat(messages)})
        >>> messages.append({"role": "user", "content": [{"type": "text", "text": "what colour?"}]})
        >>> reply = model.chat(messages, max_new_tokens=8)
        """
        options, on_error = self._answerer.options(settings, n), check_on_error(on_error)
        several = is_many(messages, "messages")
        conversations = messages if several else [messages]
        prompts = each(conversations, lambda _, one: self.prompter.chat(one), on_error)
        outcomes = self._answerer.write(prompts, options, on_error, n is not None)
        return outcomes if several else outcomes[0]

    # ---- speech

    @overload
    def speak(
        self, texts: list[str], out: Sequence[PathLike] | None = None, *, voice: str | list[str | None] | None = None,
        recording: AudioInput | None = None, recording_text: str | None = None, on_error: Literal["return"],
        **settings: Unpack[SpeechSettings],
    ) -> list[Waveform | Exception]: ...  # fmt: skip
    @overload
    def speak(
        self, texts: list[str], out: Sequence[PathLike] | None = None, *, voice: str | list[str | None] | None = None,
        recording: AudioInput | None = None, recording_text: str | None = None, **settings: Unpack[SpeechSettings],
    ) -> list[Waveform]: ...  # fmt: skip
    @overload
    def speak(
        self, texts: str, out: PathLike | None = None, *, voice: str | None = None,
        recording: AudioInput | None = None, recording_text: str | None = None, **settings: Unpack[SpeechSettings],
    ) -> Waveform: ...  # fmt: skip
    def speak(
        self,
        texts: Any,
        out: Any = None,
        *,
        voice: str | list[str | None] | None = None,
        recording: AudioInput | None = None,
        recording_text: str | None = None,
        on_error: OnError = "raise",
        **settings: Unpack[SpeechSettings],
    ) -> Any:
        """Says a text, or each of a list.

        Args:
            texts: what to say.
            out: a sound file to write, or one for each text.
            voice: a speaker that the model speaks as, or one for each text; None leaves it to the model.
            recording: a few seconds of a voice, in which the texts are said as if it went on; in place of `voice`.
            recording_text: what is said in it.
            on_error: see `Model`.
            **settings: see `SpeechSettings`.

        Raises:
            ValueError: the model does not speak, or not as such a voice, or texts, voices and files differ in
                number.

        >>> model = mmllm.load(folder)
        >>> speech = model.speak("two red squares", "out.wav", max_seconds=0.2)
        >>> speech.seconds <= 0.2 + 0.01
        True
        >>> one, two = model.speak(["one", "two"], seed=1)
        """
        heard = (recording, recording_text)
        return self._speech.speak(texts, out, voice, heard, check_on_error(on_error), settings)

    # ---- piece by piece

    @overload
    def stream(self, task: Literal["caption"], given: PictureInput, **settings: Unpack[TextSettings]) -> TextStream: ...
    @overload
    def stream(
        self, task: Literal["transcribe"], given: AudioInput, **settings: Unpack[TextSettings]
    ) -> TextStream: ...
    @overload
    def stream(
        self, task: Literal["answer"], given: Part | list[Any], question: str, **settings: Unpack[TextSettings]
    ) -> TextStream: ...
    @overload
    def stream(
        self, task: Literal["generate"], given: Part | list[Any], **settings: Unpack[TextSettings]
    ) -> TextStream: ...
    @overload
    def stream(self, task: Literal["chat"], given: Messages, **settings: Unpack[TextSettings]) -> TextStream: ...
    @overload
    def stream(
        self, task: Literal["speak"], given: str, *, voice: str | None = None, recording: AudioInput | None = None,
        recording_text: str | None = None, **settings: Unpack[SpeechSettings],
    ) -> SpeechStream: ...  # fmt: skip
    def stream(
        self,
        task: TextTask | Literal["speak"],
        given: Any,
        question: str | None = None,
        *,
        voice: str | None = None,
        recording: AudioInput | None = None,
        recording_text: str | None = None,
        **settings: Any,
    ) -> TextStream | SpeechStream:
        """An answer piece by piece, while it is made; all pieces together are what the task's own method gives.

        Args:
            task: the method: "caption", "transcribe", "answer", "generate", "chat" or "speak".
            given: its first argument, one item.
            question: of "answer".
            voice: of "speak", as `recording` and `recording_text`.
            recording: see `speak`.
            recording_text: likewise.
            **settings: of the method, but those that choose among several answers.

        Returns:
            An iterator of text in whole characters (strings with their token ids), or of sound; its `result` is all of
            it. Nothing is computed but when a piece is asked for; `close`, or leaving its `with`, ends it early.

        Raises:
            ValueError: as the method's; or a sound is longer than the model hears at once.

        >>> model = mmllm.load(folder)
        >>> pieces = model.stream("caption", "cat.jpg")
        >>> "".join(pieces) == model.caption("cat.jpg") == pieces.result
        True
        >>> with model.stream("speak", "two red squares", seed=1) as sound:
        ...     num_samples = sum(len(piece.samples) for piece in sound)
        >>> num_samples == len(sound.result.samples)
        True
        """
        arguments.choice("task", task, _TASKS)
        if (question is None) == (task == "answer"):
            raise ValueError(f"question is {question!r} and task {task!r}; give one with 'answer', and with it alone")
        if task == "speak":
            return self._speech.stream(given, voice, (recording, recording_text), settings)
        if (voice, recording, recording_text) != (None, None, None):
            raise ValueError(f"voice and recording are of 'speak', and task is {task!r}; leave them out")
        options = self._answerer.options(settings)
        if options.num_tries > 1:
            raise ValueError(f"best_of is {options.num_tries}; the best of several can't be streamed: leave it out")
        prompt = self._prompt(task, given, question)
        (request,) = options.requests(prompt, options.compiled(self.tokenizer))
        return TextStream(self._runner.stream(request))

    @overload
    def astream(
        self, task: TextTask, given: Any, question: str | None = None, **settings: Unpack[TextSettings]
    ) -> AsyncIterator[TextPiece]: ...
    @overload
    def astream(
        self, task: Literal["speak"], given: str, *, voice: str | None = None, recording: AudioInput | None = None,
        recording_text: str | None = None, **settings: Unpack[SpeechSettings],
    ) -> AsyncIterator[SoundPiece]: ...  # fmt: skip
    async def astream(self, task: Any, given: Any, question: str | None = None, **settings: Any) -> AsyncIterator[Any]:
        """As `stream`, for `async for`; the event loop goes on while a piece is made.

        >>> async def first(text):
        ...     async for piece in mmllm.load(folder).astream("generate", text):
        ...         return piece
        >>> piece = asyncio.run(first("a red"))
        """
        begin: Callable[..., Any] = self.stream
        stream = await asyncio.to_thread(begin, task, given, question, **settings)
        try:
            while (piece := await asyncio.to_thread(next, stream, None)) is not None:
                yield piece
        finally:
            stream.close()

    # ---- numbers

    @overload
    def embed(
        self, inputs: list[Any], *, space: Space = "decoder", pooling: Pooling = "mean", normalize: bool = True,
        on_error: OnError = "raise",
    ) -> list[Tensor]: ...  # fmt: skip
    @overload
    def embed(
        self, inputs: Part, *, space: Space = "decoder", pooling: Pooling = "mean", normalize: bool = True
    ) -> Tensor: ...
    def embed(
        self,
        inputs: Any,
        *,
        space: Space = "decoder",
        pooling: Pooling = "mean",
        normalize: bool = True,
        on_error: OnError = "raise",
    ) -> Any:
        """A vector of an image, a sound or a text, or of each of a list.

        In the decoder's space it is the hidden state behind the last norm, of the prompt that `generate` continues.
        CLIP's space is that of the CLIP whose image side the model's tower is (`load(..., clip=FOLDER)`): it holds
        images and text.

        Args:
            inputs: an image, a sound or text. An item of a list may be a list of parts itself, which make one prompt.
            space: "decoder" or "clip".
            pooling: in the decoder's space the "mean" over all positions, or the "last" one's.
            normalize: whether vectors have length 1, so that their products are cosines.
            on_error: see `Model`.

        Returns:
            float32 [C] on the CPU, or a list of them; C is the decoder's width, or that of CLIP's space.

        Raises:
            ValueError: there is no CLIP, the space has no place for an input, or it cannot be read.

        >>> model = mmllm.load(folder)
        >>> cat, text = model.embed(["cat.jpg", "a red circle"])
        >>> similarity = float(cat @ text)
        >>> -1 <= similarity <= 1
        True
        """
        arguments.choice("space", space, ("decoder", "clip"))
        arguments.choice("pooling", pooling, ("mean", "last"))
        arguments.flag("normalize", normalize)
        on_error = check_on_error(on_error)
        outcomes = self._embedder.embed(as_items(inputs), space, pooling, normalize, on_error)
        return as_given(inputs, outcomes)

    @overload
    def score(self, prompts: Sequence[Any], continuations: list[str]) -> list[float]: ...
    @overload
    def score(self, prompts: Part | list[Any] | Document, continuations: str) -> float: ...
    def score(self, prompts: Any, continuations: Any) -> Any:
        """How probable a continuation is behind a prompt: the sum of its tokens' log-probabilities, in nats.

        Each is encoded by itself, and no special or task token is added to text alone; a prompt with images or sounds
        is what `generate` would continue.

        Args:
            prompts: text, or parts as `generate` takes them, or a prompt such as `caption_prompt` gives; with a list of
                continuations a list of these.
            continuations: text, or several.

        Raises:
            ValueError: a prompt has no token, or the numbers differ.

        >>> model = mmllm.load(folder)
        >>> red, blue = model.score(["a "] * 2, ["red circle", "blue circle"])
        >>> best = max(("a cat", "a dog"), key=lambda text: model.score(model.caption_prompt("cat.jpg"), text))
        """
        many = as_items(continuations)
        given = prompts if isinstance(continuations, list) else [prompts]
        if not isinstance(given, Sequence) or isinstance(given, (str, bytes)) or len(given) != len(many):
            num_given = len(given) if isinstance(given, list) else 1
            raise ValueError(f"there are {num_given} prompts but {len(many)} continuations; give one for each")
        from mmllm.inference.scoring import score_continuations  # with losses, which import torch's distributed tensors

        texts = [arguments.text(f"continuations[{n}]", text) for n, text in enumerate(many)]
        size = self._runner.engine.config.max_rows
        scores = score_continuations(self.model, self.tokenizer, [self._scored(one) for one in given], texts, size)
        return as_given(continuations, scores)

    # ---- async twins

    acaption = _in_thread(caption)
    atranscribe = _in_thread(transcribe)
    aanswer = _in_thread(answer)
    agenerate = _in_thread(generate)
    achat = _in_thread(chat)
    aspeak = _in_thread(speak)
    aembed = _in_thread(embed)
    ascore = _in_thread(score)

    # ---- prompts, for what works on them: votes, scores, the server

    def caption_prompt(self, image: PictureInput) -> Document:
        """An image as a prompt for its caption."""
        return self.prompter.caption(image)

    def transcript_prompt(self, sound: AudioInput) -> Document:
        """A sound as a prompt for its transcript.

        Raises:
            ValueError: it is longer than the model hears at once.
        """
        self.prompter.need_hearing()
        part = as_audio(sound)
        self.prompter.check_length(part, "the sound")
        (codes_KF,) = self.prompter.codes([part])
        return self.prompter.transcript(codes_KF)

    def question_prompt(self, parts: Part | Sequence[Part], question: str) -> Document:
        """Text, images and sounds with a question about them, as a prompt for the answer."""
        return self.prompter.question(parts, question)

    def continuation_prompt(self, parts: Sequence[str | ImagePart | AudioPart]) -> Document:
        """A prompt that is to be continued: of the `text` task if it is text alone, else `interleaved`."""
        return self.prompter.continuation(parts)

    def chat_prompt(self, messages: Messages) -> Document:
        """A conversation as a prompt for the assistant's next message."""
        return self.prompter.chat(messages)

    def _prompt(self, task: str, given: Any, question: str | None) -> Document:
        if task in ("caption", "transcribe") and type(given) is list:
            raise ValueError(f"{task} is streamed of one item, and a list is given; stream each of them")
        match task:
            case "caption":
                return self.caption_prompt(given)
            case "transcribe":
                return self.transcript_prompt(given)
            case "answer":
                return self.question_prompt(given, arguments.text("question", question))
            case "chat":
                return self.chat_prompt(given)
        if is_many(given, "parts"):
            raise ValueError("generate is streamed of one prompt, and several are given; stream each of them")
        return self.continuation_prompt(parse_parts(given))

    def _scored(self, prompt: Any) -> str | Document:
        if isinstance(prompt, (Document, str)):
            return prompt
        parts = parse_parts(prompt)
        if all(isinstance(part, str) for part in parts):
            return "".join(parts)  # type: ignore[arg-type]
        return self.prompter.continuation(parts)
