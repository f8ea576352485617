"""A sample from the files that a shard holds of it, as the schemas of shards have them.

Shapes: K codebooks, F frames, S features a picture, C channels.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from mmllm.data.documents import Sample, Segment
from mmllm.data.features import features_ending, unpack_features
from mmllm.data.shards import unpack_codes

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
AUDIO_ENDINGS = ("flac", "wav", "ogg", "mp3")


def jsonl_lines(text: str) -> list[str]:
    """The lines of JSONL. `splitlines` won't do: it also cuts at U+0085 and U+2028, which JSON strings may hold."""
    return text.removesuffix("\n").split("\n") if text else []


def read_sample(
    files: dict[str, bytes],
    key: str,
    name: str,
    line: int = -1,
    codec: str | None = None,
    features: str | None = None,
) -> Sample:
    """A sample from its files by ending, as the schemas of shards have them.

    Args:
        files: Bytes by ending: `jpg`, `txt`, `json`, `0.png`, `codec.npz`, …
        key: Its key.
        name: What errors call it.
        line: For `jsonl`, which line.
        codec: The audio tokenizer's hash, which stored codes must have; `None` ignores them.
        features: The hash that the features stored with each picture must have; `None` ignores them.

    Raises:
        ValueError: A file is broken, or the endings fit no schema.
    """
    try:
        metadata = json.loads(files["json"]) if "json" in files else {}
        if line >= 0:
            row = json.loads(jsonl_lines(files["jsonl"].decode())[line])
            return Sample(f"{key}-{line}", row["text"], metadata={k: v for k, v in row.items() if k != "text"})
        text = files["txt"].decode() if "txt" in files else None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{name}: broken text or json: {error!r}") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"{name}: its json is {type(metadata).__name__}; it must be an object")
    if "segments" in metadata:
        segments = tuple(_segment(item, files, name, codec, features) for item in metadata.pop("segments"))
        return Sample(key, text, segments=segments, metadata=metadata)
    picture = next((ending for ending in IMAGE_ENDINGS if ending in files), None)
    image = files[picture] if picture is not None else None
    audio = next((files[ending] for ending in AUDIO_ENDINGS if ending in files), None)
    if image is None and audio is None and text is None:
        raise ValueError(f"{name}: has only {sorted(files)}; a sample needs a picture, a sound or a txt")
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


def _segment(item: Any, files: dict[str, bytes], name: str, codec: str | None, features: str | None) -> Segment:
    match item:
        case {"text": str() as text}:
            return Segment(text=text, role=item.get("role"))
        case {"image": str() as ending} if ending in files:
            features_SC = _features(files, ending, features, name)
            return Segment(image=files[ending], role=item.get("role"), features_SC=features_SC)
        case {"audio": str() as ending} if ending in files:
            stored = files.get(f"{ending.partition('.')[0]}.codec.npz")
            audio = unpack_codes(stored, codec, name) if codec and stored else files[ending]
            return Segment(audio=audio, role=item.get("role"))
    raise ValueError(f"{name}: segment {item!r} names no file of the sample ({', '.join(sorted(files))})")
