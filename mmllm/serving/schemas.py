"""What clients send, field by field as OpenAI's do: an unknown field or a wrong type is named, never guessed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_STOPS = 16
MAX_BIASES = 1024
_Stop = Annotated[str, Field(min_length=1, max_length=256)]
_Name = Annotated[str, Field(max_length=256)]
_TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
_Bias = Annotated[float, Field(ge=-100, le=100)]


class Body(BaseModel):
    """A JSON object of which each field is known."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True, hide_input_in_errors=True)


class _Unused(Body):
    """Fields that say something to the client's own side alone, and change no answer."""

    user: _Name | None = None
    metadata: dict[_Name, _Name] | None = Field(None, max_length=16)
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: _Name | None = None
    prompt_cache_key: _Name | None = None


class TextPart(Body):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImageUrl(Body):
    """A picture: `data:image/png;base64,…`, or an address where the server may fetch it."""

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(Body):
    """A picture in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class InputAudio(Body):
    """A sound in base64. What it is is told by its content; a `format` that it isn't is refused."""

    data: str
    format: Literal["wav", "mp3", "flac", "ogg", "opus", "aiff"]


class AudioPart(Body):
    """A sound in a message."""

    type: Literal["input_audio"]
    input_audio: InputAudio


class RefusalPart(Body):
    """What an assistant said instead of an answer: text."""

    type: Literal["refusal"]
    refusal: str


UserPart = Annotated[TextPart | ImagePart | AudioPart, Field(discriminator="type")]
SaidPart = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


class SystemMessage(Body):
    """Text before the conversation."""

    role: Literal["system", "developer"]
    content: str | list[TextPart]
    name: _Name | None = None


class UserMessage(Body):
    """What a user says and shows."""

    role: Literal["user"]
    content: str | list[UserPart]
    name: _Name | None = None


class AssistantMessage(Body):
    """What was answered before."""

    role: Literal["assistant"]
    content: str | list[SaidPart]
    name: _Name | None = None
    refusal: Literal[None] = None
    annotations: list[Any] | None = Field(None, max_length=0)
    tool_calls: list[Any] | None = Field(None, max_length=0)


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(Body):
    """Of a stream of events."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class VoiceId(Body):
    """A voice as an object."""

    id: _Name


class AudioOutput(Body):
    """How an answer is spoken; without a voice as the model likes."""

    format: Literal["wav", "pcm16", "flac", "mp3", "opus", "aac"] = "wav"
    voice: _Name | VoiceId | None = None


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(Body):
    """A JSON schema that the answer follows."""

    name: _Name
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Body):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class _Drawn(_Unused):
    """How text is drawn, and where it ends."""

    model: _Name
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: (
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None
    ) = Field(None, max_length=MAX_BIASES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MAX_STOPS)] | None = None
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> _Drawn:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is given, but stream isn't true; leave it out")
        return self


class ChatRequest(_Drawn):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(None, ge=1)
    modalities: list[Literal["text", "audio"]] | None = Field(None, min_length=1, max_length=2)
    audio: AudioOutput | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None

    @property
    def is_spoken(self) -> bool:
        """Whether the answer is to be heard."""
        return "audio" in (self.modalities or ())

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.audio is not None and not self.is_spoken:
            raise ValueError('audio is given, but modalities has no "audio"; give ["text", "audio"]')
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is given, but logprobs isn't true; give both")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are one thing; give one of them")
        if self.is_spoken and (self.n or 1) > 1:
            raise ValueError(f"n is {self.n}, but one answer is spoken at a time; give 1")
        if self.is_spoken and self.logprobs:
            raise ValueError("logprobs are of written answers; leave them out, or ask for text alone")
        return self


_Token = Annotated[int, Field(ge=0)]
_Tokens = Annotated[list[_Token], Field(min_length=1)]


class CompletionRequest(_Drawn):
    """`POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=64)]
        | _Tokens
        | Annotated[list[_Tokens], Field(min_length=1, max_length=64)]
    )
    best_of: int | None = Field(None, ge=1)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    suffix: Literal[None] = None

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError(f"best_of is {self.best_of}, fewer than n, {self.n}; give as many or more")
        if self.best_of is not None and self.best_of > (self.n or 1) and self.stream:
            raise ValueError("the best of several answers is known when all have ended; leave best_of or stream out")
        if self.echo and self.stream:
            raise ValueError("echo and stream are both true; leave one out: you have the prompt")
        return self


class SpeechRequest(Body):
    """`POST /v1/audio/speech`."""

    model: _Name
    input: str = Field(min_length=1)
    voice: _Name | VoiceId | None = None
    response_format: Literal["wav", "pcm", "flac", "mp3", "opus", "aac"] = "wav"
    speed: float = Field(1.0, ge=0.25, le=4)
    stream_format: Literal["audio", "sse"] = "audio"
    temperature: float | None = Field(None, ge=0, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)


class EmbeddingRequest(Body):
    """`POST /v1/embeddings`."""

    model: _Name
    input: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=256)]
        | _Tokens
        | Annotated[list[_Tokens], Field(min_length=1, max_length=256)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    user: _Name | None = None


class TranscriptionForm(BaseModel):
    """The fields of `POST /v1/audio/transcriptions` beside its file."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True, hide_input_in_errors=True)

    model: _Name
    response_format: Literal["json", "text", "verbose_json", "srt", "vtt"] = "json"
    language: Annotated[str, Field(pattern=r"^[a-z]{2,3}$")] | None = None
    temperature: float | None = Field(None, ge=0, le=1)
    timestamp_granularities: list[Literal["word", "segment"]] = Field(default_factory=list, max_length=2)
    stream: bool = False

    @model_validator(mode="after")
    def _check(self) -> TranscriptionForm:
        if self.timestamp_granularities and self.response_format != "verbose_json":
            raise ValueError("timestamp_granularities is given, but response_format isn't verbose_json")
        if self.stream and self.response_format not in ("json", "text"):
            raise ValueError(f"a stream gives text, not {self.response_format}; leave stream out")
        return self
