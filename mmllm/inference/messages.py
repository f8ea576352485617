"""Conversations as prompts: our own messages and OpenAI's, by a model's chat template or as the task `chat`."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote_to_bytes

from mmllm.inference import arguments
from mmllm.inference.inputs import AudioPart, ImagePart, TextPart, as_audio, as_image, parse_parts

ROLES = ("system", "developer", "user", "assistant")
_TYPES = ("text", "image_url", "input_audio")
"""Of OpenAI's parts."""


def check_messages(messages: Any, roles: Sequence[str] | None, last: Sequence[str]) -> list[Mapping[str, Any]]:
    """A conversation whose messages have roles and end where the assistant is to go on.

    Args:
        messages: what was given.
        roles: that messages can have; None: the chat template tells.
        last: roles that the last message can have.

    Raises:
        ValueError: it isn't such a conversation.
    """
    wanted = 'messages such as {"role": "user", "content": "..."}'
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise arguments.wrong("messages", messages, f"a list of {wanted}")
    checked: list[Mapping[str, Any]] = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise arguments.wrong(f"messages[{number}]", message, wanted)
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or (roles is not None and (role not in roles or content is None)):
            raise ValueError(
                f"messages[{number}] has role {role!r} and {'no ' if content is None else ''}content; wanted content, "
                f"and the role {', '.join(roles or ROLES)}{arguments.near(role, roles or ROLES)}"
            )
        checked.append(message)
    if not checked or checked[-1]["role"] not in last:
        got = repr(checked[-1]["role"]) if checked else "no message"
        raise ValueError(f"the last message is of {got}; it must be the user's")
    return checked


def message_parts(content: Any, name: str, reads_files: bool = True) -> list[str | ImagePart | AudioPart]:
    """A message's content as parts of a prompt.

    Args:
        content: text, or a list of parts: those that `Model.generate` takes, and OpenAI's
            `{"type": "text", "text": …}`, `{"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}}` and
            `{"type": "input_audio", "input_audio": {"data": "…", "format": "wav"}}`. The text of OpenAI's is text,
            whatever it says.
        name: what errors call it.
        reads_files: False: strings are text too, and nothing but them and OpenAI's parts is taken, so that no file is
            ever read for who wrote the message.

    Raises:
        ValueError: a part is of another kind, or can't be read.
        FileNotFoundError: a part names a file that isn't there.
    """
    parts: list[Any] = []
    for number, part in enumerate(content if isinstance(content, list) else [content]):
        where = f"{name}[{number}]" if isinstance(content, list) else name
        if isinstance(part, Mapping):
            parts.append(_openai_part(part, where))
        elif isinstance(part, str) and not reads_files:
            parts.append(TextPart(arguments.text(where, part)))
        elif reads_files:
            parts.append(part)
        else:
            raise ValueError(f"{where} is {type(part).__name__}; wanted text, or an object of type {', '.join(_TYPES)}")
    return parse_parts(parts)


def data_of_url(url: Any, name: str) -> bytes:
    """The content of a data URL.

    Raises:
        ValueError: it is another URL (nothing is fetched), or broken.
    """
    address = arguments.text(name, url)
    if not address.startswith("data:"):
        raise ValueError(f"{name} begins with {address[:24]!r}; give a data URL (data:image/png;base64,…)")
    header, comma, data = address.partition(",")
    if not comma:
        raise ValueError(f"{name} is a data URL without a comma before its data")
    if header.endswith(";base64"):
        return data_of_base64(data, name)
    return unquote_to_bytes(data)


def data_of_base64(text: Any, name: str) -> bytes:
    """What base64 stands for; line breaks in it don't matter.

    Raises:
        ValueError: it is no base64, or of nothing.
    """
    try:
        data = base64.b64decode("".join(arguments.text(name, text).split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name} is no base64: {error}") from None
    if not data:
        raise ValueError(f"{name} is empty")
    return data


def as_content(parts: Sequence[str | ImagePart | AudioPart]) -> str | list[dict[str, str]]:
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


def _openai_part(part: Mapping[str, Any], name: str) -> TextPart | ImagePart | AudioPart:
    kind = part.get("type")
    match kind:
        case "text":
            return TextPart(arguments.text(f"{name}.text", part.get("text")))
        case "image_url":
            given = part.get("image_url")
            url = given.get("url") if isinstance(given, Mapping) else given
            where = f"{name}.image_url.url"
            return ImagePart(as_image(data_of_url(url, where), where))
        case "input_audio":
            given = part.get("input_audio")
            if not isinstance(given, Mapping):
                raise arguments.wrong(f"{name}.input_audio", given, "an object with data and format")
            where, data = f"{name}.input_audio.data", given.get("data")
            is_url = isinstance(data, str) and data.startswith("data:")
            return as_audio(data_of_url(data, where) if is_url else data_of_base64(data, where), where)
    raise ValueError(f"{name} has type {kind!r}; wanted {', '.join(_TYPES)}{arguments.near(kind, _TYPES)}")
