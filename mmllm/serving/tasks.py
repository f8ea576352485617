"""What a request asks a model for: its messages become a prompt to write on, or a text to speak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmllm.data.samples.document import Document, DocumentWriter
from mmllm.data.samples.sample import Segment
from mmllm.inference.inputs import AudioPart, ImagePart
from mmllm.inference.prompts import join
from mmllm.serving import schemas
from mmllm.serving.errors import bad_request
from mmllm.serving.parts import MediaReader, data_of_base64
from mmllm.serving.served import ServedModel

_BY_TASK = (
    "{name} was not trained on conversations; it answers one user message by task: a picture alone or with the text "
    "`caption`, for its caption; a sound alone or with `transcribe`, for its transcript; a text alone with "
    '`modalities` of ["text", "audio"], which it speaks; pictures, sounds and another text, for the answer to that '
    "question. {got}"
)
_PARAM = "messages"
Part = str | ImagePart | AudioPart


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes:
        prompt: to be written on; None: nothing is written.
        spoken: a text to be spoken as it is; None: what is written is spoken, if anything.
    """

    prompt: Document | None = None
    spoken: str | None = None


def plan_chat(body: schemas.ChatRequest, served: ServedModel, reader: MediaReader) -> Plan:
    """What the messages of a conversation ask for. Takes long: pictures and sounds are decoded.

    Args:
        body: of the request.
        served: the model that is asked.
        reader: decodes its pictures and sounds.

    Raises:
        ApiError: the model can't answer them.
        ValueError: likewise.
    """
    if served.takes_conversations:
        messages = [_message(message, number, reader) for number, message in enumerate(body.messages)]
        return Plan(served.prompter.chat(messages))
    if len(body.messages) != 1 or not isinstance(body.messages[0], schemas.UserMessage):
        roles = ", ".join(message.role for message in body.messages[:5])
        raise _not_by_task(served, f"Got {len(body.messages)} messages ({roles}): send one, of the user")
    return _plan_task(_parts(body.messages[0].content, 0, reader), body.is_spoken, served)


def _plan_task(parts: Sequence[Part], is_spoken: bool, served: ServedModel) -> Plan:
    """What a message asks a model for that was trained on tasks alone."""
    text = " ".join(part.strip() for part in parts if isinstance(part, str)).strip()
    media = [part for part in parts if not isinstance(part, str)]
    if not media:
        if not is_spoken:
            raise _not_by_task(served, "Got text alone")
        if not text:
            raise bad_request("the text to be spoken is empty; give words", _PARAM)
        return Plan(spoken=text)
    word = text.lower().rstrip(".")
    match media:
        case [ImagePart(image=image)] if word in ("", "caption"):
            return Plan(served.prompter.caption(image))
        case [AudioPart() as sound] if word in ("", "transcribe"):
            served.prompter.need_hearing()
            served.prompter.check_length(sound, "the sound")
            return Plan(served.prompter.transcript(served.prompter.codes([sound])[0]))
    if word in ("", "caption", "transcribe"):
        num_images = sum(isinstance(part, ImagePart) for part in media)
        what = f"with {text!r}" if text else "without a text"
        raise _not_by_task(served, f"Got {num_images} pictures and {len(media) - num_images} sounds {what}")
    return Plan(served.prompter.question(media, text))  # pyright: ignore[reportArgumentType]


def _not_by_task(served: ServedModel, got: str) -> Exception:
    return bad_request(_BY_TASK.format(name=served.name, got=got), _PARAM, "unsupported_messages")


def _message(message: Any, number: int, reader: MediaReader) -> dict[str, Any]:
    """A message as `Prompter.chat` reads it; its text is text, whatever it says: no file's name, and no slot."""
    parts = _parts(message.content, number, reader)
    if message.role != "user":
        return {"role": message.role, "content": "".join(part for part in parts if isinstance(part, str))}
    return {"role": "user", "content": [Segment(text=part) if isinstance(part, str) else part for part in parts]}


def _parts(content: str | Sequence[Any], number: int, reader: MediaReader) -> list[Part]:
    if isinstance(content, str):
        return [content]
    return [_part(part, f"messages[{number}].content[{place}]", reader) for place, part in enumerate(content)]


def _part(part: Any, param: str, reader: MediaReader) -> Part:
    match part:
        case schemas.TextPart():
            return part.text
        case schemas.RefusalPart():
            return part.refusal
        case schemas.ImagePart():
            return reader.picture(part.image_url.url, f"{param}.image_url.url")
        case schemas.AudioPart():
            where = f"{param}.input_audio.data"
            return reader.sound(data_of_base64(part.input_audio.data, where), where, part.input_audio.format)
    raise AssertionError(f"a part is {type(part).__name__}")


def plan_completions(body: schemas.CompletionRequest, served: ServedModel) -> list[Document]:
    """The prompts of a request to go on with text.

    Raises:
        ApiError: there are too many, or ids are none of text.
        ValueError: a prompt can't be written.
    """
    prompts = _many(body.prompt)
    return [
        served.prompter.continuation([prompt]) if isinstance(prompt, str) else of_ids(prompt, served, "prompt")
        for prompt in prompts
    ]


def plan_embeddings(body: schemas.EmbeddingRequest, served: ServedModel) -> list[Document]:
    """The texts of a request for embeddings, as prompts that could be gone on with.

    Raises:
        ApiError: ids are none of text.
        ValueError: a text can't be written.
    """
    return [
        served.prompter.continuation([text]) if isinstance(text, str) else of_ids(text, served, "input")
        for text in _many(body.input)
    ]


def _many(given: str | list[Any]) -> list[Any]:
    return [given] if isinstance(given, str) or isinstance(given[0], int) else given


def of_ids(ids: Sequence[int], served: ServedModel, param: str) -> Document:
    """A prompt of a text's token ids, as of the text itself.

    Raises:
        ApiError: one is none of text.
    """
    text = served.model.tokenizer.text
    for number, each in enumerate(ids):
        if each >= text.num_tokens or each in text.hidden_ids:
            raise bad_request(f"{param}[{number}] is {each}, which is no id of text", param)
    writer = DocumentWriter(served.model.tokenizer)
    writer.ids(ids, is_target=False)
    return join([served.prompter.continuation([""]), writer.finish()])
