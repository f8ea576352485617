"""How many tokens a document will have, without its pictures and sounds at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmllm.data.samples.conversations import Said, joined_texts, template_pieces
from mmllm.data.samples.templates import (
    chat_pieces,
    interleaved_question,
    literal_ids,
    parse_template,
    spoken_voice,
    template_of,
)
from mmllm_tokenizers.folder import TokenizerFolder

PieceSize = str | int | tuple[int, int] | None
"""What of an interleaved document's segment counts: the text, a sound's frames, a picture's width and height. `None`: a
picture, where pictures aren't cut into tiles."""


def document_length(
    task: str,
    folder: TokenizerFolder,
    *,
    key: str = "",
    text: str | int | None = None,
    num_frames: int = 0,
    segments: Sequence[PieceSize] = (),
    metadata: dict[str, Any] | None = None,
    said: Sequence[Said] = (),
    image_size: tuple[int, int] = (1, 1),
) -> int:
    """Tokens that `build_document` will give, without a picture or a sound at hand.

    Args:
        task: A key of the folder's templates.
        folder: Tokenizers and templates.
        key: The sample's key (it decides whether the voice is dropped).
        text: The sample's text, or how many tokens it has.
        num_frames: Frames of its sound.
        segments: Of an interleaved sample, in order.
        metadata: The row's other keys.
        said: Of a conversation, who says each segment.
        image_size: Width and height of its picture, where pictures are cut into tiles.

    Raises:
        ValueError: No answer of the conversation is trained on, or the folder's chat template refuses it.
    """
    metadata = metadata or {}
    if task == "chat" and said:
        if not any(segment.is_answer and segment.is_trained for segment in said):
            raise ValueError("no answer of this conversation is trained on")
        sizes = sum(_segment_length(segment, folder) for segment in segments if not isinstance(segment, str))
        return sizes + conversation_tokens(said, folder)
    if task == "interleaved" and "question" in metadata:
        rendered = interleaved_question(folder)
    else:
        template = template_of(task, folder)
        rendered = template["prompt"] + template["target"]
    total = 0
    for literal, name in parse_template(rendered):
        total += len(literal_ids(folder.text, literal)) if literal else 0
        match name:
            case None:
                pass
            case "text":
                total += text if isinstance(text, int) else len(folder.text.encode(text or ""))
            case "image":
                total += folder.num_image_slots(*image_size)
            case "audio":
                total += folder.num_audio_slots(num_frames)
            case "units":
                total += folder.num_unit_positions(num_frames)
            case "voice":
                total += len(folder.text.encode(spoken_voice(key, metadata)))
            case "segments":
                total += sum(_segment_length(segment, folder) for segment in segments)
            case _:
                total += len(folder.text.encode(str(metadata.get(name, ""))))
    return total


def conversation_tokens(
    said: Sequence[Said], folder: TokenizerFolder, template: Mapping[str, str] | None = None
) -> int:
    """Tokens of a conversation's texts, and of what its template writes around them: all but pictures and sounds.

    Args:
        said: Who says each segment.
        folder: Tokenizers and templates.
        template: `prompt` and `target` instead of the folder's.

    Raises:
        ValueError: The folder's chat template refuses the conversation.
    """
    if template is None and folder.chat_template is not None:
        return sum(len(piece.ids) for piece in template_pieces(said, folder))
    literals = chat_pieces([segment.role for segment in said], folder, template)
    total = sum(len(literal_ids(folder.text, piece)) for piece, _ in literals)
    return total + sum(len(folder.text.encode(text)) for text in joined_texts(said) if text)


def _segment_length(segment: PieceSize, folder: TokenizerFolder) -> int:
    match segment:
        case None:
            return folder.num_image_tokens
        case (width, height):
            return folder.num_image_slots(width, height)
        case int():
            return folder.num_audio_slots(segment)
    return len(folder.text.encode(segment))
