"""What is in a shard, without opening it again: where each document is, how long, and its metadata.

An index lies beside its shard as `<shard>.index.npz`. It depends on the tokenizer (token counts), whose hash it
stores; another tokenizer or another size of the shard is refused.

Shapes: N documents, F frames.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from mmllm.data.documents import KIND_TASKS, Sample, Segment, document_length
from mmllm.data.shards import unpack_codes
from mmllm.data.tars import Span, read_members, scan_tar
from mmllm_tokenizers.folder import TokenizerFolder

FORMAT_VERSION = 1
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
AUDIO_ENDINGS = ("flac", "wav", "ogg", "mp3")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardIndex:
    """The documents of one shard. A `jsonl` file's lines are documents of their own."""

    path: Path
    sha256: str
    kind: str
    offsets_N: np.ndarray
    """int64, first header of the sample."""
    sizes_N: np.ndarray
    """int64, bytes of its headers and files."""
    lines_N: np.ndarray
    """int32, line of its `jsonl`, or -1."""
    num_images_N: np.ndarray
    num_frames_N: np.ndarray
    """Frames of its sounds, together."""
    lengths: dict[str, np.ndarray]
    """int64 [N] token counts by task; 0 where the document can't be written as that task."""
    keys: list[str]
    columns: dict[str, list[Any]]
    """The rows' scalar metadata, `None` where a row has none."""

    @property
    def num_documents(self) -> int:
        """N."""
        return len(self.keys)


def index_path(shard: Path) -> Path:
    """Where a shard's index lies."""
    return shard.with_name(shard.name + ".index.npz")


def jsonl_lines(text: str) -> list[str]:
    """The lines of JSONL. `splitlines` won't do: it also cuts at U+0085 and U+2028, which JSON strings may hold."""
    return text.removesuffix("\n").split("\n") if text else []


def read_sample(files: dict[str, bytes], key: str, name: str, line: int = -1, codec: str | None = None) -> Sample:
    """A sample from its files by ending, as the schemas of shards have them.

    Args:
        files: Bytes by ending: `jpg`, `txt`, `json`, `0.png`, `codec.npz`, …
        key: Its key.
        name: What errors call it.
        line: For `jsonl`, which line.
        codec: The audio tokenizer's hash, which stored codes must have; `None` ignores them.

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
        segments = tuple(_segment(item, files, name, codec) for item in metadata.pop("segments"))
        return Sample(key, text, segments=segments, metadata=metadata)
    image = next((files[ending] for ending in IMAGE_ENDINGS if ending in files), None)
    audio = next((files[ending] for ending in AUDIO_ENDINGS if ending in files), None)
    if image is None and audio is None and text is None:
        raise ValueError(f"{name}: has only {sorted(files)}; a sample needs a picture, a sound or a txt")
    codes_KF = unpack_codes(files["codec.npz"], codec, name) if codec and "codec.npz" in files else None
    return Sample(key, text, image, audio, codes_KF, metadata=metadata)


def _segment(item: Any, files: dict[str, bytes], name: str, codec: str | None) -> Segment:
    match item:
        case {"text": str() as text}:
            return Segment(text=text)
        case {"image": str() as ending} if ending in files:
            return Segment(image=files[ending])
        case {"audio": str() as ending} if ending in files:
            stored = files.get(f"{ending.partition('.')[0]}.codec.npz")
            return Segment(audio=unpack_codes(stored, codec, name) if codec and stored else files[ending])
    raise ValueError(f"{name}: segment {item!r} names no file of the sample ({', '.join(sorted(files))})")


def num_frames_of(audio: Any, folder: TokenizerFolder) -> int:
    """Frames that encoding a sound (bytes or codes) will give, from its header alone."""
    if isinstance(audio, np.ndarray):
        return audio.shape[1]
    tokenizer = folder.require_audio()
    info = soundfile.info(io.BytesIO(audio))
    return tokenizer.num_frames(math.ceil(info.frames * tokenizer.sample_rate / info.samplerate))


def _kind(files: dict[str, bytes], sample: Sample) -> str:
    if sample.segments:
        return "interleaved"
    if sample.codes_KF is not None or sample.audio is not None:
        return "audio"
    return "caption" if sample.image is not None else "text"


def _lengths(sample: Sample, kind: str, folder: TokenizerFolder) -> tuple[dict[str, int], int, int]:
    """Token counts by task, pictures and frames of one sample."""
    hears = folder.audio is not None
    if kind == "audio":
        heard = sample.codes_KF if sample.codes_KF is not None else sample.audio
        num_frames = num_frames_of(heard, folder) if hears else 0
        segments, num_images = [], 0
    else:
        segments = [_segment_size(segment, folder) for segment in sample.segments]
        num_images = segments.count(None) + (sample.image is not None)
        num_frames = sum(size for size in segments if isinstance(size, int))
    lengths = {}
    for task in KIND_TASKS[kind]:
        needs_text = task not in ("interleaved", "question")
        impossible = (
            (needs_text and not sample.text)
            or (task == "question" and "question" not in sample.metadata)
            or (not hears and (kind == "audio" or any(segment.audio is not None for segment in sample.segments)))
        )
        lengths[task] = 0 if impossible else document_length(
            task, folder, key=sample.key, text=sample.text, num_frames=num_frames, segments=segments,
            metadata=sample.metadata,
        )  # fmt: skip
    return lengths, num_images, num_frames


def _segment_size(segment: Segment, folder: TokenizerFolder) -> str | int | None:
    if segment.audio is not None:
        return num_frames_of(segment.audio, folder) if folder.audio is not None else 0
    return None if segment.image is not None else segment.text


def index_shard(shard: str | Path, folder: TokenizerFolder) -> ShardIndex:
    """Scans one shard and counts its tokens.

    Raises:
        FileNotFoundError: There is no such shard.
        ValueError: It is truncated, damaged, empty, or mixes kinds; the message names shard and sample.
    """
    shard = Path(shard)
    codec = folder.audio.hash if folder.audio is not None else None
    rows: list[tuple[int, int, int, int, int]] = []
    tokens: list[dict[str, int]] = []
    keys: list[str] = []
    metadata: list[dict[str, Any]] = []
    kind = ""
    with shard.open("rb") if shard.is_file() else io.BytesIO() as stream:
        for span in scan_tar(shard):
            for line, sample, found in _span_samples(stream, span, shard, codec):
                kind = kind or found
                if found != kind:
                    raise ValueError(f"{shard}: {span.key} is a sample of kind {found}, others are {kind}; split them")
                try:
                    lengths, num_images, num_frames = _lengths(sample, kind, folder)
                except RuntimeError as error:  # soundfile's
                    raise ValueError(f"{shard}:{span.key}: unreadable sound: {error}") from error
                rows.append((span.offset, span.size, line, num_images, num_frames))
                tokens.append(lengths)
                keys.append(span.key)
                metadata.append(sample.metadata)
    if not rows:
        raise ValueError(f"{shard}: has no samples; build it again")
    table = np.array(rows, dtype=np.int64)
    with shard.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return ShardIndex(
        path=shard, sha256=digest, kind=kind, offsets_N=table[:, 0], sizes_N=table[:, 1],
        lines_N=table[:, 2].astype(np.int32), num_images_N=table[:, 3], num_frames_N=table[:, 4],
        lengths={task: np.array([row[task] for row in tokens], dtype=np.int64) for task in KIND_TASKS[kind]},
        keys=keys, columns=_columns(metadata),
    )  # fmt: skip


def _span_samples(stream: Any, span: Span, shard: Path, codec: str | None) -> list[tuple[int, Sample, str]]:
    """(line, sample, kind) of each document in a span."""
    name = f"{shard}:{span.key}"
    stream.seek(span.offset)
    _, files = read_members(stream.read(span.size), name)
    if "jsonl" in files:
        count = len(jsonl_lines(files["jsonl"].decode("utf-8", "replace")))
        return [(line, read_sample(files, span.key, name, line), "text") for line in range(count)]
    sample = read_sample(files, span.key, name, codec=codec)
    return [(-1, sample, _kind(files, sample))]


def _columns(metadata: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    names = sorted({name for row in metadata for name, value in row.items() if isinstance(value, str | int | float)})
    return {
        name: [row.get(name) if isinstance(row.get(name), str | int | float) else None for row in metadata]
        for name in names
    }


def save_index(index: ShardIndex, tokenizer_hash: str) -> Path:
    """Writes an index beside its shard, all or nothing, and returns where."""
    info = {
        "format_version": FORMAT_VERSION, "tokenizer": tokenizer_hash, "sha256": index.sha256, "kind": index.kind,
        "shard_bytes": index.path.stat().st_size, "keys": index.keys, "columns": index.columns,
    }  # fmt: skip
    arrays: dict[str, Any] = {f"length_{task}": lengths for task, lengths in index.lengths.items()}
    stream = io.BytesIO()
    np.savez(
        stream, offsets=index.offsets_N, sizes=index.sizes_N, lines=index.lines_N, num_images=index.num_images_N,
        num_frames=index.num_frames_N, info=np.frombuffer(json.dumps(info).encode(), dtype=np.uint8), **arrays,
    )  # fmt: skip
    target = index_path(index.path)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    partial.write_bytes(stream.getvalue())
    partial.replace(target)
    return target


def load_index(shard: str | Path, tokenizer_hash: str) -> ShardIndex:
    """The index that lies beside a shard.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is broken, or was made with another tokenizer or for another version of the shard.
    """
    shard = Path(shard)
    path = index_path(shard)
    advice = "run 'mmllm data index' again"
    if not shard.is_file():
        raise FileNotFoundError(f"{shard}: no such shard{', only its index is left' if path.is_file() else ''}")
    if not path.is_file():
        raise FileNotFoundError(f"{shard}: has no index; run 'mmllm data index'")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            data = {name: arrays[name] for name in arrays.files}
        info = json.loads(data["info"].tobytes())
        lengths = {name[7:]: array for name, array in data.items() if name.startswith("length_")}
        index = ShardIndex(
            shard, info["sha256"], info["kind"], data["offsets"], data["sizes"], data["lines"], data["num_images"],
            data["num_frames"], lengths, info["keys"], info["columns"],
        )  # fmt: skip
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: the index is broken ({type(error).__name__}); {advice}") from error
    if info["format_version"] != FORMAT_VERSION:
        raise ValueError(f"{path}: format {info['format_version']}, this version reads {FORMAT_VERSION}; {advice}")
    if info["tokenizer"] != tokenizer_hash:
        raise ValueError(
            f"{path}: was made with tokenizer {info['tokenizer'][:12]}, the recipe's is {tokenizer_hash[:12]}; {advice}"
        )
    if info["shard_bytes"] != shard.stat().st_size:
        raise ValueError(
            f"{shard}: has {shard.stat().st_size} bytes, {info['shard_bytes']} when it was indexed; {advice}"
        )
    return index


def write_indices(
    shards: Sequence[Path], folder: TokenizerFolder, progress: Callable[[int], None] | None = None
) -> list[ShardIndex]:
    """Indexes shards whose index is missing or out of date; the others' are read.

    Args:
        shards: The tars.
        folder: The tokenizer.
        progress: Called with the number of shards done.
    """
    done = []
    for number, shard in enumerate(shards, start=1):
        try:
            index = load_index(shard, folder.hash)
        except (FileNotFoundError, ValueError):
            index = index_shard(shard, folder)
            save_index(index, folder.hash)
        done.append(index)
        if progress:
            progress(number)
    return done
