"""A sample from the files that a shard holds of it, as the schemas of shards have them.

Shapes: K codebooks, F frames, S features a picture, C channels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from mmllm.data.samples.conversations import Said
from mmllm.data.samples.sample import Sample, Segment
from mmllm.data.samples.stored import features_ending, unpack_codes, unpack_features

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "avif")
AUDIO_ENDINGS = ("flac", "wav", "ogg", "mp3")
_STORED = ("codec.npz", "features.npz")
_UNREAD = (
    "gif", "bmp", "tif", "tiff", "heic", "heif", "jp2", "jpe", "jfif", "jxl", "ppm", "pgm", "pbm", "pnm", "svg", "psd",
    "opus", "m4a", "aac", "aif", "aiff", "au", "caf", "wma", "amr", "mp4", "mov", "mkv", "webm", "avi",
)  # fmt: skip
"""Pictures, sounds and videos that shards don't hold: the text beside one is a caption, and no text of its own."""
_NUMBERED = re.compile(rf"\d+\.({'|'.join(map(re.escape, IMAGE_ENDINGS + AUDIO_ENDINGS + _STORED))})")


Names = Literal["plain", "numbered", "named"]


_BOM = b"\xef\xbb\xbf"


def parse_line(data: bytes, text_key: str | None = None) -> tuple[str, dict[str, Any]]:
    """The text and the other keys of a row of JSONL.

    Args:
        data: The line. Lines end at line feeds alone: JSON strings may hold what `splitlines` also takes for an end.
        text_key: Where the row has no `text`, the key that holds it.

    Raises:
        ValueError: It is no row; the message says why.
    """
    data = data.removeprefix(_BOM)
    if not data.strip():
        raise ValueError("is blank; leave it out")
    try:
        row = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"isn't JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"is {type(row).__name__} {str(row)[:40]!r}; a row is an object with a 'text'")
    key = "text" if "text" in row or text_key is None else text_key
    text = row.get(key)
    if not isinstance(text, str):
        raise ValueError(f"has no text: {key!r} is {'missing' if text is None else type(text).__name__}")
    return text, {name: value for name, value in row.items() if name != "text"}


def jsonl_rows(data: bytes) -> list[bytes]:
    """The lines of JSONL."""
    return data.removesuffix(b"\n").split(b"\n") if data else []


def check_endings(endings: Sequence[str], name: str) -> Names:
    """What the endings of a sample's files ask of its json: nothing, segments, or segments that name those files.

    Raises:
        ValueError: They fit no schema; the message says why.
    """
    if len(set(endings)) < len(endings):
        twice = next(ending for ending in endings if endings.count(ending) > 1)
        raise ValueError(f"{name}: has two files that end in .{twice}; give each sample a key of its own")
    for kinds, what in ((IMAGE_ENDINGS, "pictures"), (AUDIO_ENDINGS, "sounds")):
        several = [ending for ending in endings if ending in kinds]
        if len(several) > 1:
            raise ValueError(
                f"{name}: has {len(several)} {what} (.{', .'.join(several)}), of which one would be lost; give each a "
                f"sample of its own"
            )
    other = next((ending for ending in endings if ending != "jsonl" and "." not in ending), None)
    if "jsonl" in endings and other is not None:
        raise ValueError(f"{name}: has a .{other} beside its jsonl, which would be lost; give it a key of its own")
    dotted = [ending for ending in endings if "." in ending and ending not in _STORED]
    if not dotted and _unread(endings) is None:
        return "plain"
    if "json" not in endings:
        check_segment_files(endings, None, name)
    return "numbered" if all(_NUMBERED.fullmatch(ending) for ending in dotted) else "named"


def check_segment_files(endings: Sequence[str], segments: Any, name: str) -> None:
    """Refuses files with dots in their endings that no segment names, nor our writer writes: parts of another sample.

    Args:
        endings: Of all files of the sample.
        segments: Of its json; `None` where it has none.
        name: What the error calls the sample.

    Raises:
        ValueError: There is such a file, or only a picture or a sound of a kind that isn't read.
    """
    named: set[str] = set()
    for item in segments if isinstance(segments, list) else ():
        values = [item.get("image"), item.get("audio")] if isinstance(item, dict) else []
        named.update(value.lower() for value in values if isinstance(value, str))
    if segments is not None:
        named.update(f"{value.rpartition('.')[0]}.{stored}" for value in tuple(named) for stored in _STORED)
        named.update(ending for ending in endings if _NUMBERED.fullmatch(ending))
    odd = next((ending for ending in endings if "." in ending and ending not in _STORED and ending not in named), None)
    if odd is not None:
        raise ValueError(
            f"{name}: has a file that ends in .{odd}, which is never read: a key ends at the first dot of a file's "
            f"name. Keys must have no dots; rename the files, or build the shards with 'mmllm data build'"
        )
    unread = _unread(endings)
    if unread is not None and segments is None:
        raise ValueError(
            f"{name}: .{unread} files aren't read from shards; convert them to one of "
            f"{', '.join(IMAGE_ENDINGS + AUDIO_ENDINGS)}"
        )


def _unread(endings: Sequence[str]) -> str | None:
    """A picture or sound that isn't read, of a sample that has none that is."""
    if any(ending in (*IMAGE_ENDINGS, *AUDIO_ENDINGS, *_STORED) for ending in endings):
        return None
    return next((ending for ending in endings if ending in _UNREAD), None)


def read_sample(
    files: dict[str, bytes],
    key: str,
    name: str,
    codec: str | None = None,
    features: str | None = None,
    text_key: str | None = None,
) -> Sample:
    """A sample from its files by ending, as the schemas of shards have them.

    Args:
        files: Bytes by ending: `jpg`, `txt`, `json`, `0.png`, `codec.npz`, …
        key: Its key.
        name: What errors call it.
        codec: The audio tokenizer's hash, which stored codes must have; `None` ignores them.
        features: The hash that the features stored with each picture must have; `None` ignores them.
        text_key: Where there is no `txt`, the key of the json that holds the text.

    Raises:
        ValueError: A file is broken, or the endings fit no schema.
    """
    try:
        metadata = json.loads(files["json"]) if "json" in files else {}
        text = files["txt"].decode() if "txt" in files else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: broken text or json: {error!r}") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"{name}: its json is {type(metadata).__name__}; it must be an object")
    if text is None and text_key is not None and isinstance(metadata.get(text_key), str):
        text = metadata[text_key]
    if "segments" in metadata:
        segments = tuple(_segment(item, files, name, codec, features) for item in metadata.pop("segments"))
        return Sample(key, text, segments=segments, metadata=metadata)
    picture = next((ending for ending in IMAGE_ENDINGS if ending in files), None)
    image = files[picture] if picture is not None else None
    audio = next((files[ending] for ending in AUDIO_ENDINGS if ending in files), None)
    if image is None and audio is None and text is None:
        raise ValueError(
            f"{name}: has only {sorted(files)}; a sample needs a picture, a sound or a txt, and a key without dots"
        )
    codes_KF = unpack_codes(files["codec.npz"], codec, name) if codec and "codec.npz" in files else None
    features_SC = _features(files, picture, features, name) if picture is not None else None
    return Sample(key, text, image, audio, codes_KF, metadata=metadata, features_SC=features_SC)


def _features(files: dict[str, bytes], picture: str, made_by: str | None, name: str) -> np.ndarray | None:
    if made_by is None:
        return None
    ending = features_ending(picture)
    if ending not in files:
        raise ValueError(f"{name}: has no {ending} beside {picture}; build the shards again with --image_features")
    return unpack_features(files[ending], made_by, name)


def as_said(item: dict[str, Any]) -> Said:
    """Who says a segment of a sample's json, and what it is."""
    kind: Literal["text", "image", "audio"] = "image" if "image" in item else "audio" if "audio" in item else "text"
    is_trained, new_turn = item.get("loss") is not False, item.get("new_turn") is True
    return Said(item.get("role"), kind, str(item.get("text", "")), new_turn, is_trained)


def _segment(item: Any, files: dict[str, bytes], name: str, codec: str | None, features: str | None) -> Segment:
    said = as_said(item) if isinstance(item, dict) else Said(None, "text")
    turn: dict[str, Any] = {"role": said.role, "is_trained": said.is_trained, "new_turn": said.new_turn}
    match item:
        case {"text": str() as text}:
            return Segment(text=text, **turn)
        case {"image": str() as named} if (ending := named.lower()) in files:
            features_SC = _features(files, ending, features, name)
            return Segment(image=files[ending], features_SC=features_SC, **turn)
        case {"audio": str() as named} if (ending := named.lower()) in files:
            stored = files.get(f"{ending.partition('.')[0]}.codec.npz")
            audio = unpack_codes(stored, codec, name) if codec and stored else files[ending]
            return Segment(audio=audio, **turn)
    raise ValueError(f"{name}: segment {item!r} names no file of the sample ({', '.join(sorted(files))})")
