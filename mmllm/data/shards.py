"""Manifest rows to WebDataset tars, reproducible to the byte, with a summary of what became of each row.

Shapes: C channels, T samples, K codebooks, F frames, N pictures, P features a picture, H and W pixels.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
import torch
from braceexpand import braceexpand
from PIL import Image
from webdataset.writer import ShardWriter

from mmllm.data.chunks import in_chunks
from mmllm.data.decode import decode_image
from mmllm.data.features import COLUMN, ImageEncoder, features_ending, pack_features
from mmllm.data.manifest import BadRows, Kind, Row
from mmllm.data.npz import pack_arrays, unpack_array
from mmllm.data.perturb import perturb
from mmllm.data.storage import RemoteShard, Shard, expand_remote, is_remote
from mmllm_tokenizers.audio import load_audio
from mmllm_tokenizers.folder import TokenizerFolder

SUMMARY = "shards.json"
JOURNAL = "shards.partial"
"""Names of the shards that a build has begun; it is there while the build runs."""
FORMAT_VERSION = 1

_logger = logging.getLogger(__name__)
_CHUNK = 128
_PICTURES = 32
_KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_MAX_KEY = 80


@dataclass(frozen=True)
class ShardsConfig:
    """How rows become shards."""

    samples_per_shard: int = 10_000
    bytes_per_shard: int = 1_000_000_000
    max_image_side: int = 1024
    """Larger pictures are scaled down to this."""
    max_seconds: float = 60.0
    """Longer sounds are skipped, counted and named."""
    perturb: int = 0
    """Altered copies of each sound, marked `"perturbed": true`."""
    seed: int = 0
    max_bad_fraction: float = 0.05

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1 or self.bytes_per_shard < 1 or self.max_image_side < 1:
            raise ValueError("samples_per_shard, bytes_per_shard and max_image_side must be at least 1")
        if self.perturb < 0 or self.max_seconds <= 0 or not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(
                f"perturb is {self.perturb}, max_seconds {self.max_seconds}, max_bad_fraction "
                f"{self.max_bad_fraction}; they must be >= 0, > 0 and within 0–1"
            )


@dataclass
class _Sound:
    wave_CT: np.ndarray
    rate: int
    ending: str
    """Its codes go to this ending."""


@dataclass
class _Record:
    row: Row
    name: str
    files: dict[str, bytes]
    metadata: dict[str, Any]
    sounds: list[_Sound] = field(default_factory=list)


def write_shards(
    rows: Iterable[Row],
    out: str | Path,
    config: ShardsConfig,
    folder: TokenizerFolder | None = None,
    bad: BadRows | None = None,
    progress: Callable[[int, int], None] | None = None,
    workers: int = 0,
    left_out: dict[str, int] | None = None,
    encoder: ImageEncoder | None = None,
) -> dict[str, Any]:
    """Writes `out/<kind>-000000.tar`, … and `out/shards.json`, and returns what that file holds.

    Args:
        rows: Checked rows; kinds may be mixed, each goes to its own shards.
        out: The folder; made if need be. Shards of an earlier build there are replaced.
        config: How.
        folder: With an audio tokenizer, each sound's codes are stored beside it.
        bad: Takes the rows whose files can't be read; by default a fresh one with the config's bound.
        progress: Called with the numbers of rows done so far and in all.
        workers: Processes that read and encode; 0: this one does. The shards are the same.
        left_out: What cleaning left out, for the summary.
        encoder: With it, each picture's features are stored beside it.

    Raises:
        ManifestError: Too many rows are bad, or all.
        OSError: The folder can't be written.
    """
    bad = bad if bad is not None else BadRows(config.max_bad_fraction)
    rows, num_known_bad = list(rows), len(bad.reasons)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    _remove_earlier(out)
    writers = _Writers(out, config)
    read = partial(_read_chunk, config=config, folder=folder, encoder=encoder)
    num_rows, where, is_whole = 0, str(out), False
    try:
        size = _CHUNK if encoder is None else _PICTURES  # features are large, and towers slow
        for chunk, (records, errors) in in_chunks(read, rows, size, workers):
            where = chunk[-1].where.rpartition(":")[0] or where
            for row, error in errors:
                bad.add(row.where, error)
            for record in records:
                writers.write(record)
            num_rows += len(chunk)
            if progress:
                progress(num_rows, len(rows))
        writers.close()
        bad.check(num_rows + num_known_bad, where)
        summary = {
            "format_version": FORMAT_VERSION,
            "num_rows": num_rows + num_known_bad,
            "num_samples": sum(info["num_samples"] for info in writers.shards.values()),
            "num_bad": len(bad.reasons),
            "bad": bad.reasons,
            **({"left_out": left_out} if left_out is not None else {}),
            "perturb": config.perturb,
            "seed": config.seed,
            "tokenizer": folder.hash if folder is not None and folder.audio is not None else None,
            **({"image_features": encoder.hash} if encoder is not None else {}),
            "shards": {name: {**info, **_digest(out / name)} for name, info in sorted(writers.shards.items())},
        }
        _write_summary(out, summary)
        is_whole = True
    finally:
        if not is_whole:
            writers.abort()
    return summary


def _write_summary(out: Path, summary: dict[str, Any]) -> None:
    """All or nothing; until it is there the journal tells which shards to remove."""
    partial = out / f"{SUMMARY}.partial"
    try:
        with _open_new(partial) as stream:
            stream.write((json.dumps(summary, indent=1, ensure_ascii=False) + "\n").encode())
        partial.replace(out / SUMMARY)
    finally:
        partial.unlink(missing_ok=True)
    (out / JOURNAL).unlink(missing_ok=True)


def _remove_earlier(out: Path) -> None:
    """Removes the shards of an earlier build, ended or not, and those shards' indices; nothing else."""
    names: list[str] = []
    with suppress(OSError, ValueError, KeyError, TypeError):
        names += json.loads((out / SUMMARY).read_text(encoding="utf-8"))["shards"]
    with suppress(OSError, ValueError):
        names += (out / JOURNAL).read_text(encoding="utf-8").splitlines()
    _remove(out, names)
    for unfinished in (*out.glob("*-*.tar.partial"), out / f"{SUMMARY}.partial"):
        unfinished.unlink(missing_ok=True)
    (out / SUMMARY).unlink(missing_ok=True)


def _remove(out: Path, names: Iterable[str]) -> None:
    for name in names:
        if re.fullmatch(r"(caption|interleaved|text|audio)-\d{6,}\.tar", str(name)):
            for ending in ("", ".partial", ".index", ".index.npz"):
                (out / f"{name}{ending}").unlink(missing_ok=True)
    (out / JOURNAL).unlink(missing_ok=True)


def _open_new(path: Path) -> BinaryIO:
    return path.open("wb")


class _ShardFile:
    """What a tar is written to. Once it is dropped it swallows what the tar's own end still writes."""

    def __init__(self, path: Path) -> None:
        self._stream: BinaryIO | None = _open_new(path)

    def write(self, data: bytes) -> int:
        return len(data) if self._stream is None else self._stream.write(data)

    def flush(self) -> None:
        if self._stream is not None:
            self._stream.flush()

    def close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()


def _read_chunk(
    rows: Sequence[Row], config: ShardsConfig, folder: TokenizerFolder | None, encoder: ImageEncoder | None
) -> tuple[list[_Record], list[tuple[Row, str]]]:
    """What rows became, and those that can't be read with the reason."""
    records: list[_Record] = []
    errors: list[tuple[Row, str]] = []
    for row in rows:
        try:
            records.extend(_read(row, config))
        except (ValueError, OSError, RuntimeError) as error:  # a decoder may raise what it likes
            errors.append((row, str(error)))
    _add_codes(records, folder)
    if encoder is not None:
        _add_features(records, encoder)
    for record in records:
        record.sounds.clear()  # encoded: not to be sent to another process
    return records, errors


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


class _Writers:
    """One `ShardWriter` a kind, with keys that are safe and unlike."""

    def __init__(self, out: Path, config: ShardsConfig) -> None:
        self._out, self._config = out, config
        self._writers: dict[str, ShardWriter] = {}
        self._open: dict[str, tuple[str, _ShardFile]] = {}
        self._begun: list[str] = []
        self._keys: set[str] = set()
        self.shards: dict[str, dict[str, Any]] = {}

    def write(self, record: _Record) -> None:
        kind = record.row.kind
        if kind not in self._writers:
            self._writers[kind] = ShardWriter(
                f"{kind}-%06d.tar",
                maxcount=self._config.samples_per_shard,
                maxsize=self._config.bytes_per_shard,
                verbose=0,
                opener=lambda name: self._opener(kind, name),
                mtime=0,
                encoder=False,
            )
        writer = self._writers[kind]
        header = {"id": record.name, **record.metadata}
        files = {**record.files, "json": json.dumps(header, ensure_ascii=False, sort_keys=True).encode()}
        writer.write({"__key__": self._key(record.name), **files})
        assert isinstance(writer.fname, str)
        info = self.shards.setdefault(writer.fname, {"kind": kind, "num_samples": 0})
        info["num_samples"] += 1

    def _opener(self, kind: Kind, name: str) -> _ShardFile:
        self._close_file(kind)
        with (self._out / JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(f"{name}\n")
        self._begun.append(name)
        self._open[kind] = (name, _ShardFile(self._out / f"{name}.partial"))
        return self._open[kind][1]

    def _close_file(self, kind: str) -> None:
        """A shard gets its name when it is whole."""
        if kind in self._open:
            name, stream = self._open.pop(kind)
            stream.close()
            (self._out / f"{name}.partial").replace(self._out / name)

    def _key(self, name: str) -> str:
        key = base = safe_key(name)
        count = 0
        while key in self._keys:
            count += 1
            key = f"{base}-{count}"
        self._keys.add(key)
        return key

    def close(self) -> None:
        for kind, writer in self._writers.items():
            writer.close()
            self._close_file(kind)

    def abort(self) -> None:
        """Removes what was written: nobody shall take a part for the whole."""
        for _, stream in self._open.values():
            with suppress(OSError):
                stream.close()
        self._open.clear()
        (self._out / SUMMARY).unlink(missing_ok=True)
        _remove(self._out, self._begun)


def safe_key(name: str) -> str:
    """An id as a tar key: ASCII letters, digits, `_` and `-` alone, at most 80 of them."""
    key = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_") or "row"
    if len(key) > _MAX_KEY or key != name:
        key = f"{key[: _MAX_KEY - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return key


def _read(row: Row, config: ShardsConfig) -> list[_Record]:
    metadata = row.metadata
    match row.kind:
        case "text":
            return [_Record(row, row.id, {"txt": row.text.encode()}, metadata)]
        case "caption":
            assert row.image is not None
            ending, data, (width, height) = _picture(row.image, config)
            files = {ending: data, "txt": row.text.encode()}
            return [_Record(row, row.id, files, {**metadata, "width": width, "height": height})]
        case "audio":
            return _audio_records(row, metadata, config)
    return [_interleaved_record(row, metadata, config)]


def _picture(path: Path, config: ShardsConfig) -> tuple[str, bytes, tuple[int, int]]:
    """Ending, bytes, size. Stored as they are where any reader sees the same 8-bit RGB picture in them."""
    data = path.read_bytes()
    picture = decode_image(data, str(path))
    fits = max(picture.size) <= config.max_image_side
    with Image.open(io.BytesIO(data)) as original:
        form = original.format or ""
        is_rgb = original.mode == "RGB" and "transparency" not in original.info
        plain = is_rgb and not getattr(original, "is_animated", False) and not original.getexif()
    if form in _KEPT and plain and fits:
        return _KEPT[form], data, picture.size
    if not fits:
        picture.thumbnail((config.max_image_side, config.max_image_side), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    if form == "JPEG":
        picture.save(stream, "JPEG", quality=95)
        return "jpg", stream.getvalue(), picture.size
    picture.save(stream, "PNG")
    return "png", stream.getvalue(), picture.size


def _wave(path: Path, config: ShardsConfig) -> tuple[np.ndarray, int]:
    wave_CT, rate = load_audio(path, max_seconds=config.max_seconds)
    return wave_CT.numpy(), rate


def _flac(wave_CT: np.ndarray, rate: int, name: str) -> bytes:
    stream = io.BytesIO()
    try:
        soundfile.write(stream, wave_CT.T, rate, format="FLAC", subtype="PCM_16")
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{name}: {len(wave_CT)} channels at {rate} Hz can't be stored as FLAC: {error}") from error
    return stream.getvalue()


def _audio_records(row: Row, metadata: dict[str, Any], config: ShardsConfig) -> list[_Record]:
    assert row.audio is not None
    wave_CT, rate = _wave(row.audio, config)
    records = []
    for copy in range(config.perturb + 1):
        name = f"{row.id}#{copy}" if copy else row.id
        changed_CT = perturb(wave_CT.mean(0), config.seed, name)[None] if copy else wave_CT
        facts = {"sample_rate": rate, "duration": round(changed_CT.shape[-1] / rate, 6)}
        if copy:
            facts["perturbed"] = True
        files = {"flac": _flac(changed_CT, rate, str(row.audio)), "txt": row.text.encode()}
        sound = _Sound(changed_CT, rate, "codec.npz")
        records.append(_Record(row, name, files, {**metadata, **facts}, [sound]))
    return records


def _interleaved_record(row: Row, metadata: dict[str, Any], config: ShardsConfig) -> _Record:
    files: dict[str, bytes] = {}
    sounds, segments = [], []
    for segment in row.segments:
        number = len(files)
        role = {"role": segment["role"]} if "role" in segment else {}
        if "image" in segment:
            ending, data, _ = _picture(segment["image"], config)
            files[f"{number}.{ending}"] = data
            segments.append({"image": f"{number}.{ending}", **role})
        elif "audio" in segment:
            wave_CT, rate = _wave(segment["audio"], config)
            files[f"{number}.flac"] = _flac(wave_CT, rate, str(segment["audio"]))
            sounds.append(_Sound(wave_CT, rate, f"{number}.codec.npz"))
            segments.append({"audio": f"{number}.flac", **role})
        else:
            segments.append(segment)
    return _Record(row, row.id, files, {**metadata, "segments": segments}, sounds)


def _add_codes(records: Sequence[_Record], folder: TokenizerFolder | None) -> None:
    """Encodes all sounds of the records together (the tokenizer batches them by length), and adds them as files."""
    if folder is None or folder.audio is None:
        return
    tokenizer = folder.audio
    pairs = [(record, sound) for record in records for sound in record.sounds]
    if not pairs:
        return
    waves = []
    for _, sound in pairs:
        waves.append(tokenizer.prepare(torch.from_numpy(np.ascontiguousarray(sound.wave_CT)), sound.rate))
    for (record, sound), codes_KF in zip(pairs, tokenizer.encode_batch(waves), strict=True):
        record.files[sound.ending] = pack_codes(codes_KF.numpy(), tokenizer.hash, tokenizer.frame_rate)


def _add_features(records: Sequence[_Record], encoder: ImageEncoder) -> None:
    """Encodes all pictures of the records, as they are stored, and adds their features as files."""
    endings = tuple(_KEPT.values())
    pictures = [(record, ending) for record in records for ending in record.files if ending.endswith(endings)]
    for start in range(0, len(pictures), _PICTURES):
        batch = pictures[start : start + _PICTURES]
        pixels_N3HW = np.stack([encoder.transform(record.files[ending], record.row.where) for record, ending in batch])
        for (record, ending), features_PC in zip(batch, encoder.encode(pixels_N3HW), strict=True):
            record.files[features_ending(ending)] = pack_features(features_PC, encoder.hash, record.row.where)
            record.metadata[COLUMN] = encoder.hash


def pack_codes(codes_KF: np.ndarray, codec: str, frame_rate: float) -> bytes:
    """A `codec.npz`: uint16 codes `[codebooks, frames]`, the codec's hash, frames a second."""
    return pack_arrays(codes=codes_KF.astype(np.uint16), codec=np.array(codec), frame_rate=np.array(frame_rate))


def unpack_codes(data: bytes, codec: str, name: str) -> np.ndarray:
    """Codes int64 `[K, F]` from a `codec.npz`.

    Raises:
        ValueError: It is broken, or another codec made it.
    """
    return unpack_array(data, "codes", "codec", codec, f"{name}: the stored codes").astype(np.int64)


def shard_paths(spec: str | Sequence[str], folder: Path | None = None) -> list[Path]:
    """The local shards that a path, a glob, or brace ranges such as `{00000..00999}` name, in order.

    Args:
        spec: One or several.
        folder: Relative specs that match nothing from the working directory are tried from here.

    Raises:
        FileNotFoundError: Nothing matches one of them.
        ValueError: One is an address, not a path.
    """
    found: list[Path] = []
    for shard in find_shards(spec, folder):
        if isinstance(shard, RemoteShard):
            raise ValueError(f"{shard}: only recipes' sources may be remote; copy the shard to a local folder")
        found.append(shard)
    return found


def find_shards(spec: str | Sequence[str], folder: Path | None = None) -> list[Shard]:
    """As `shard_paths`, and addresses that fsspec opens: `s3://bucket/{000..099}.tar`.

    Raises:
        FileNotFoundError: Nothing matches one of them.
    """
    found: list[Shard] = []
    for item in [spec] if isinstance(spec, str) else spec:
        if is_remote(item):
            found.extend(expand_remote(item))
            continue
        matches = _expand(item)
        if not any(match.is_file() for match in matches) and folder is not None and not Path(item).is_absolute():
            matches = _expand(f"{folder}{os.sep}{item}") or matches
        missing = [str(match) for match in matches if not match.is_file()]
        if missing or not matches:
            raise FileNotFoundError(
                f"{missing[0] if missing else item}: no such shard ({len(missing)} of {len(matches)} that "
                f"{item!r} names are missing); build them with 'mmllm data build'"
            )
        found.extend(matches)
    return list(dict.fromkeys(found))


def _expand(pattern: str) -> list[Path]:
    paths: list[Path] = []
    for name in braceexpand(pattern):
        paths.extend(Path(match) for match in (sorted(glob.glob(name)) if glob.has_magic(name) else [name]))
    return paths
