"""What a trained model does for Python code: caption, transcribe, speak, answer, generate, chat.

Shapes: K codebooks, F frames, T samples.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict, TypeVar, Unpack, overload

import torch
from torch import Tensor

from mmllm.checkpoints.adapters import adapter_names, set_adapter
from mmllm.checkpoints.folder import load_model
from mmllm.checkpoints.settings import GenerationConfig, Sampling
from mmllm.data.samples.decode import ImageInput, ImageTransform
from mmllm.data.samples.documents import Document, DocumentWriter, Segment, build_prompt, default_transform, media_slots
from mmllm.inference.generate import generate_text
from mmllm.inference.inputs import AudioInput, AudioPart, ImagePart, Part, as_audio, as_image, parse_parts
from mmllm.inference.prompts import join
from mmllm.inference.scoring import score_continuations
from mmllm.inference.speaking import Speaker, Waveform, speech_options
from mmllm.inference.voices import Recording, align_recording
from mmllm.model.multimodal import MultimodalModel
from mmllm_tokenizers.chat import chat_pieces
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.vocab import END

_Answer = TypeVar("_Answer")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    directory: str | os.PathLike[str],
    device: torch.device | str = "auto",
    dtype: torch.dtype | str | None = None,
    adapter: str | Sequence[str] | None = None,
) -> Model:
    """A model from its folder, ready to run.

    Args:
        directory: what training wrote, or `mmllm.checkpoints.folder.save_model`.
        device: "auto" takes a GPU if there is one.
        dtype: of the weights, "bfloat16" for example; None keeps the saved one.
        adapter: of the folder's `adapters/NAME`; of several, the first is used until `Model.set_adapter` chooses
            another. None: the model alone.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the folder is damaged, foreign or of another version; the message says what is wrong.
    """
    if isinstance(dtype, str):
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(_DTYPES)}")
        dtype = _DTYPES[dtype]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device}, but PyTorch finds no GPU here; choose cpu, or auto")
    loaded = load_model(directory, device, dtype, adapter)
    return Model(loaded.model, loaded.tokenizer, loaded.image_transform, loaded.generation)


class _Settings(TypedDict, total=False):
    top_k: int | None
    top_p: float | None
    seed: int
    batch_size: int


class TextSettings(_Settings, total=False):
    """Keyword arguments wherever text is written; what is left out comes from the model's `generation`.

    `temperature` 0 takes the most probable token, `top_k` and `top_p` draw among fewer, the same `seed`
    gives the same text; `batch_size` prompts are answered at once. `max_new_tokens` bounds the answer. `blind`
    shows a grey picture for each image and silence for each sound: the baseline of what words alone give.
    """

    temperature: float
    max_new_tokens: int
    blind: bool


class SpeechSettings(_Settings, total=False):
    """Keyword arguments of `Model.speak`: as `TextSettings`, for units; `max_seconds` bounds the speech.

    `temperature` may be one of each codebook. `best_of` tries are spoken of each text, of which the one is kept that
    the model's CTC head hears best. `stop()` is asked before each frame; True ends what is still spoken.

    Where the model has a pointer into what it says: `rate` 2 speaks twice as fast, at the same pitch; `pauses` are
    seconds of silence behind words by their numbers (`{2: 0.5}`: behind the third word; -1: before the first); a letter
    lasts `max_letter_seconds` at most (at rate 1), and `variation` (0 to 1) leaves the time that each takes to chance.
    Without `max_seconds`, speech takes as long as its text does.
    """

    temperature: float | Sequence[float]
    max_seconds: float
    rate: float
    pauses: Mapping[int, float]
    max_letter_seconds: float
    variation: float
    best_of: int
    stop: Callable[[], bool]


class Model:
    """A model with its tokenizer. Training can wrap one that it still trains: nothing here changes it.

    Wherever one input is taken, a list of inputs is too, and gives a list: lists run in batches of like
    length, much faster than one call each. Settings that are left out come from `generation`.

    Args:
        model: the weights.
        tokenizer: what it was trained with.
        image_transform: how images reach the tower; by default what the tokenizer folder implies.
        generation: default settings.
    """

    def __init__(
        self,
        model: MultimodalModel,
        tokenizer: TokenizerFolder,
        image_transform: ImageTransform | None = None,
        generation: GenerationConfig | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.image_transform = image_transform or default_transform(tokenizer)
        self.generation = generation or GenerationConfig()
        self.progress: Callable[[int], None] | None = None
        """Called with the number of prompts of each batch that is answered."""

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that are loaded."""
        return adapter_names(self.model.decoder)

    def set_adapter(self, name: str | None) -> None:
        """Chooses which adapter the model runs with from now on; None: the model alone.

        Raises:
            ValueError: none of this name is loaded.
        """
        set_adapter(self.model.decoder, name)

    @overload
    def caption(self, images: list[ImageInput], **settings: Unpack[TextSettings]) -> list[str]: ...
    @overload
    def caption(self, images: ImageInput, **settings: Unpack[TextSettings]) -> str: ...
    def caption(
        self,
        images: ImageInput | list[ImageInput],
        **settings: Unpack[TextSettings],
    ) -> str | list[str]:
        """Says what is in an image, or in each of a list.

        Args:
            images: a path, bytes, PIL image, or array or tensor [H, W], [H, W, C] or [C, H, W] (uint8, or
                float in [0, 1]).
            **settings: see `TextSettings`.

        Raises:
            ValueError: the model does not see, or an image cannot be read.
        """
        prompts = [self.caption_prompt(image) for image in _as_list(images)]
        return _like(images, self._write(prompts, settings))

    @overload
    def transcribe(self, sounds: list[AudioInput], **settings: Unpack[TextSettings]) -> list[str]: ...
    @overload
    def transcribe(self, sounds: AudioInput, **settings: Unpack[TextSettings]) -> str: ...
    def transcribe(
        self,
        sounds: AudioInput | list[AudioInput],
        **settings: Unpack[TextSettings],
    ) -> str | list[str]:
        """Writes down what is said in a sound, or in each of a list.

        Args:
            sounds: a path, bytes, `mmllm.Audio`, or (samples, sample rate): any rate, mono or stereo.
            **settings: see `TextSettings`.

        Raises:
            ValueError: the model does not hear, or a sound cannot be read.
        """
        self._need(self.model.config.audio, "hear", "sounds")
        codes = self._encode([as_audio(sound) for sound in _as_list(sounds)])
        prompts = [self._prompt("transcribe", audio=codes_KF) for codes_KF in codes]
        return _like(sounds, self._write(prompts, settings))

    @overload
    def speak(
        self,
        texts: list[str],
        out: Sequence[str | os.PathLike[str]] | None = None,
        *,
        voice: str | list[str | None] | None = None,
        recording: AudioInput | None = None,
        recording_text: str | None = None,
        **settings: Unpack[SpeechSettings],
    ) -> list[Waveform]: ...
    @overload
    def speak(
        self,
        texts: str,
        out: str | os.PathLike[str] | None = None,
        *,
        voice: str | None = None,
        recording: AudioInput | None = None,
        recording_text: str | None = None,
        **settings: Unpack[SpeechSettings],
    ) -> Waveform: ...
    def speak(
        self,
        texts: str | list[str],
        out: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        *,
        voice: str | list[str | None] | None = None,
        recording: AudioInput | None = None,
        recording_text: str | None = None,
        **settings: Unpack[SpeechSettings],
    ) -> Waveform | list[Waveform]:
        """Says a text, or each of a list.

        Args:
            texts: what to say.
            out: a sound file to write, or one for each text.
            voice: a speaker that the model speaks as, or one for each text; None leaves it to the model.
            recording: a few seconds of a voice, in which the texts are said as if it went on; in place of `voice`.
            recording_text: what is said in it.
            **settings: see `SpeechSettings`.

        Raises:
            ValueError: the model does not speak, or not as such a voice, or texts, voices and files differ in
                number.
        """
        _check_settings(settings, SpeechSettings)
        self._need(self.model.config.audio, "speak", "texts to be spoken")
        defaults = self.generation
        many = _as_list(texts)
        if not all(text.strip() for text in many):
            raise ValueError("a text to be spoken is empty; give words")
        voices = voice if isinstance(voice, list) else [voice] * len(many)
        unknown = {one for one in voices if one is not None and defaults.voices and one not in defaults.voices}
        if unknown:
            known = ", ".join(defaults.voices[:8]) + (", …" if len(defaults.voices) > 8 else "")
            raise ValueError(
                f"there is no voice {sorted(unknown)[0]!r}; this model speaks as {known}; or leave voice out"
            )
        paths = [None] * len(many) if out is None else _as_list(out)
        for noun, given in (("voices", voices), ("files", paths)):
            if len(given) != len(many):
                raise ValueError(f"there are {len(many)} texts but {len(given)} {noun}; give one for each text")
        options = speech_options(settings, defaults, self.model.pointer is not None)
        speaker = Speaker(self.model, self.tokenizer, self.progress)
        waveforms = speaker.speak(many, voices, options, self._recording(recording, recording_text))
        for waveform, path in zip(waveforms, paths, strict=True):
            if path is not None:
                waveform.save(path)
        return _like(texts, waveforms)

    def _recording(self, recording: AudioInput | None, text: str | None) -> Recording | None:
        if recording is None and text is None:
            return None
        if recording is None or text is None:
            raise ValueError("a voice from a recording needs both: recording, and recording_text, what is said in it")
        (codes_KF,) = self._encode([as_audio(recording)])
        return align_recording(self.model, self.tokenizer, codes_KF, text)

    def generate(
        self,
        parts: Part | Sequence[Part],
        *,
        images: Sequence[ImageInput] = (),
        sounds: Sequence[AudioInput] = (),
        **settings: Unpack[TextSettings],
    ) -> str:
        """Continues a prompt of text, images and sounds in any order.

        Args:
            parts: text, images and sounds. Text may hold `<|image|>` and `<|audio|>` slots, which the
                prompt's images and sounds then fill in order.
            images: fill `<|image|>` slots, after the images among `parts`.
            sounds: fill `<|audio|>` slots.
            **settings: see `TextSettings`.

        Raises:
            ValueError: slots and images (or sounds) differ in number, or a part cannot be read.
        """
        prompt = self.continuation_prompt(parse_parts(parts, images, sounds))
        return self._write([prompt], settings)[0]

    def generate_batch(
        self,
        prompts: Sequence[Part | Sequence[Part]],
        **settings: Unpack[TextSettings],
    ) -> list[str]:
        """`generate` for many prompts at once."""
        documents = [self.continuation_prompt(parse_parts(parts)) for parts in prompts]
        return self._write(documents, settings)

    @overload
    def answer(
        self, parts: Sequence[Sequence[Part]], questions: list[str], **settings: Unpack[TextSettings]
    ) -> list[str]: ...
    @overload
    def answer(self, parts: Sequence[Part], questions: str, **settings: Unpack[TextSettings]) -> str: ...
    def answer(
        self,
        parts: Sequence[Part] | Sequence[Sequence[Part]],
        questions: str | list[str],
        **settings: Unpack[TextSettings],
    ) -> str | list[str]:
        """Answers a question about text, images and sounds; with a list of questions, each about its own parts."""
        many = [parts] if isinstance(questions, str) else list(parts)
        if len(many) != len(_as_list(questions)):
            raise ValueError(f"there are {len(questions)} questions but parts for {len(many)}; give parts for each")
        prompts = [
            self.question_prompt(one, question)  # type: ignore[arg-type]
            for one, question in zip(many, _as_list(questions), strict=True)
        ]
        return _like(questions, self._write(prompts, settings))

    @overload
    def score(self, prompt: list[str], continuation: list[str], *, batch_size: int | None = None) -> list[float]: ...
    @overload
    def score(self, prompt: str, continuation: str, *, batch_size: int | None = None) -> float: ...
    def score(
        self, prompt: str | list[str], continuation: str | list[str], *, batch_size: int | None = None
    ) -> float | list[float]:
        """How probable a continuation is behind a prompt: the sum of its tokens' log-probabilities, in nats.

        Each is encoded by itself, and no special or task token is added.

        Args:
            prompt: text, or several.
            continuation: text, or as many.
            batch_size: pairs at once.

        Raises:
            ValueError: a prompt has no token, or the numbers differ.
        """
        size = batch_size or self.generation.batch_size
        scores = score_continuations(self.model, self.tokenizer, _as_list(prompt), _as_list(continuation), size)
        return _like(prompt, scores)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        **settings: Unpack[TextSettings],
    ) -> str:
        """The assistant's next message.

        A model that came with a chat template writes conversations by it, others as the task `chat`.

        Args:
            messages: `{"role": "system" | "user" | "assistant", "content": ...}`, the last one the user's. Content
                is text or a list of parts, as `generate` takes them. With a chat template there may be the role
                `tool`, which may be the last, and further keys that the template reads.
            **settings: see `TextSettings`.

        Raises:
            ValueError: a role is unknown, the last message is not the user's, or the template refuses the messages.
        """
        return self._write([self.chat_prompt(messages)], settings)[0]

    def caption_prompt(self, image: ImageInput) -> Document:
        """An image as a prompt for its caption."""
        self._need(self.model.config.vision, "see", "images")
        return self._prompt("caption", image=as_image(image))

    def question_prompt(self, parts: Part | Sequence[Part], question: str) -> Document:
        """Text, images and sounds with a question about them, as a prompt for the answer."""
        return self._prompt("question", segments=self._segments(parse_parts(parts)), question=question)

    def continuation_prompt(self, parts: Sequence[str | ImagePart | AudioPart]) -> Document:
        """A prompt that is to be continued: of the `text` task if it is text alone, else `interleaved`."""
        if all(isinstance(part, str) for part in parts):
            return self._prompt("text", text="".join(parts))  # type: ignore[arg-type]
        return self._prompt("interleaved", segments=self._segments(parts))

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> Document:
        """A conversation as a prompt for the assistant's next message."""
        template = self.tokenizer.chat_template
        if template is not None:
            return self._templated(template, messages)
        if not messages or messages[-1].get("role") != "user":
            got = repr(messages[-1].get("role")) if messages else "no message"
            raise ValueError(f"the last message is of {got}; it must be the user's")
        documents: list[Document] = []
        waiting: list[str | ImagePart | AudioPart] = []
        for message in messages:
            role, content = message.get("role"), message.get("content")
            if content is None or role not in ("system", "user", "assistant"):
                raise ValueError(
                    f"a message has role {role!r} and {'no ' if content is None else ''}content; "
                    f"wanted content, and the role system, user or assistant"
                )
            parts = [content] if isinstance(content, str) and role != "user" else parse_parts(content)
            if role == "assistant":
                documents.append(self._said(parts))
                continue
            waiting += parts
            if role == "user":
                documents.append(self._prompt("chat", segments=self._segments(waiting)))
                waiting = []
        return join(documents)

    def _templated(self, template: str, messages: Sequence[Mapping[str, Any]]) -> Document:
        """A conversation as the model's own chat template writes it."""
        if not messages or messages[-1].get("role") not in ("user", "tool"):
            got = repr(messages[-1].get("role")) if messages else "no message"
            raise ValueError(f"the last message is of {got}; it must be the user's")
        media: list[ImagePart | AudioPart] = []
        written = []
        for message in messages:
            if message.get("content") is None:
                written.append(dict(message))
                continue
            role, content = message.get("role"), message["content"]
            parts = [content] if isinstance(content, str) and role != "user" else parse_parts(content)
            media += [part for part in parts if not isinstance(part, str)]
            written.append({**message, "content": _as_content(parts)})
        segments = iter(self._segments(media))
        documents = []
        for piece in chat_pieces(self.tokenizer.text, template, written):
            if piece.kind == "text":
                writer = DocumentWriter(self.tokenizer)
                writer.ids(piece.ids, is_target=False)
                documents.append(writer.finish())
            else:
                documents.append(media_slots(next(segments), self.tokenizer, self.image_transform))
        return join(documents)

    def _said(self, parts: Sequence[str | ImagePart | AudioPart]) -> Document:
        if not all(isinstance(part, str) for part in parts):
            raise ValueError("an assistant's message holds an image or a sound; it can hold text alone")
        writer = DocumentWriter(self.tokenizer)
        writer.ids(self.tokenizer.text.encode("".join(parts)), is_target=True)  # type: ignore[arg-type]
        writer.ids([self.tokenizer.id(END)], is_target=True)
        return writer.finish()

    def _prompt(
        self,
        task: Literal["caption", "transcribe", "speak", "text", "interleaved", "question", "chat"],
        text: str | None = None,
        image: ImageInput | None = None,
        audio: Tensor | None = None,
        segments: Sequence[Segment] = (),
        question: str | None = None,
        voice: str | None = None,
    ) -> Document:
        return build_prompt(
            task,
            self.tokenizer,
            text=text,
            image=image,
            audio=audio,
            segments=segments,
            question=question,
            voice=voice,
            transform=self.image_transform,
        )

    def _segments(self, parts: Sequence[str | ImagePart | AudioPart]) -> list[Segment]:
        if any(isinstance(part, ImagePart) for part in parts):
            self._need(self.model.config.vision, "see", "images")
        sounds = [part for part in parts if isinstance(part, AudioPart)]
        if sounds:
            self._need(self.model.config.audio, "hear", "sounds")
        codes = iter(self._encode(sounds))
        segments = []
        for part in parts:
            match part:
                case str():
                    segments.append(Segment(text=part))
                case ImagePart():
                    segments.append(Segment(image=part.image))
                case AudioPart():
                    segments.append(Segment(audio=next(codes)))
        return segments

    def _encode(self, sounds: Sequence[AudioPart]) -> list[Tensor]:
        """Codes [K, F] of each sound, encoded in batches."""
        if not sounds:
            return []
        longest = self.generation.max_heard_seconds
        for number, sound in enumerate(sounds, start=1):
            if longest is not None and sound.seconds > longest + 1 / self.tokenizer.frame_rate:
                raise ValueError(
                    f"sound {number} of {len(sounds)} lasts {sound.seconds:.1f} s; this model hears {longest:g} s at "
                    f"once, which is what training's sequences held; cut it into pieces"
                )
        audio = self.tokenizer.require_audio()
        return audio.encode_batch([audio.prepare(sound.wave_CT, sound.sample_rate) for sound in sounds])

    def _write(self, prompts: list[Document], settings: TextSettings) -> list[str]:
        _check_settings(settings, TextSettings)
        defaults = self.generation
        answers = generate_text(
            self.model,
            self.tokenizer,
            prompts,
            _sampling(settings, defaults.text),
            settings.get("max_new_tokens", defaults.max_new_tokens),
            settings.get("batch_size", defaults.batch_size),
            settings.get("blind", False),
            self.progress,
        )
        return [self.tokenizer.text.decode(ids) for ids in answers]

    def _need(self, part: object | None, verb: str, noun: str) -> None:
        if part is None:
            raise ValueError(f"this model does not {verb}, but {noun} were given; use a model that was trained to")


def _as_content(parts: Sequence[str | ImagePart | AudioPart]) -> str | list[dict[str, str]]:
    """A message's parts as a chat template reads them."""
    if all(isinstance(part, str) for part in parts):
        return "".join(parts)  # type: ignore[arg-type]
    content = []
    for part in parts:
        match part:
            case str():
                content.append({"type": "text", "text": part})
            case ImagePart():
                content.append({"type": "image"})
            case AudioPart():
                content.append({"type": "audio"})
    return content


def _check_settings(settings: Mapping[str, Any], wanted: type) -> None:
    known = list(wanted.__annotations__) + list(_Settings.__annotations__)
    for name in settings:
        if name not in known:
            raise ValueError(f"unknown setting {name!r}; wanted one of {', '.join(known)}")


def _sampling(settings: TextSettings, default: Sampling) -> Sampling:
    return Sampling(
        settings.get("temperature", default.temperature),
        settings.get("top_k", default.top_k),
        settings.get("top_p", default.top_p),
        settings.get("seed", default.seed),
    )


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _like(given: object, answers: list[_Answer]) -> Any:
    return answers if isinstance(given, list) else answers[0]
