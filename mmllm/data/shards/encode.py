"""What becomes of rows: samples, each a key and its files. Sounds are encoded by the codec, pictures by a tower.

Shapes: C channels, T samples, N pictures, P features a picture, H and W pixels.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import soundfile
import torch
from PIL import Image

from mmllm.data.rows.bad_rows import is_of_machine
from mmllm.data.rows.keys import copy_name
from mmllm.data.rows.media import Media, media_source
from mmllm.data.rows.rows import Row
from mmllm.data.rows.table import RowTable
from mmllm.data.samples.decode import decode_file
from mmllm.data.samples.sample import ALIGNED, WORDS
from mmllm.data.samples.stored import COLUMN, ImageEncoder, features_ending, pack_codes, pack_features
from mmllm.data.shards.perturb import perturb
from mmllm_tokenizers.alignment import read_words, stretched
from mmllm_tokenizers.audio import Sound, read_sound, to_mono
from mmllm_tokenizers.folder import TokenizerFolder

PICTURES = 32
"""Pictures that are encoded together."""
_KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "AVIF": "avif"}
"""Forms that shards hold as they are, and their endings. An MPO is a JPEG with more behind it."""


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


@dataclass(frozen=True)
class KeyedRow:
    """A row, and the keys of what it becomes: one, or of a sound one for each of its copies."""

    row: Row
    keys: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON, for tasks of other processes and machines; `from_json` gives the same again."""
        return {"row": self.row.to_json(), "keys": self.keys}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> KeyedRow:
        """What `to_json` made this of."""
        return cls(Row.from_json(value["row"]), tuple(value["keys"]))


class TableRows(Sequence[KeyedRow]):
    """Some rows of a table, made when they are asked for, in whatever process.

    Args:
        table: Whose keys are numbered.
        numbers: Which of its rows.
    """

    def __init__(self, table: RowTable, numbers: np.ndarray) -> None:
        self._table, self._numbers = table, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, place: int) -> KeyedRow: ...
    @overload
    def __getitem__(self, place: slice) -> TableRows: ...
    def __getitem__(self, place: int | slice) -> KeyedRow | TableRows:
        if isinstance(place, slice):
            return TableRows(self._table, self._numbers[place])
        return next(iter(TableRows(self._table, self._numbers[place : place + 1])))

    def __iter__(self) -> Iterator[KeyedRow]:
        for row, keys in self._table.rows(self._numbers):
            yield KeyedRow(row, keys)


@dataclass(frozen=True)
class Note:
    """What a row's picture or sound lost on its way into the shard, though nothing is wrong with it."""

    kind: str
    message: str


@dataclass
class _Sound:
    wave_CT: np.ndarray
    rate: int
    ending: str
    """Its codes go to this ending."""


@dataclass
class _Sample:
    row: Row
    name: str
    files: dict[str, bytes]
    metadata: dict[str, Any]
    sounds: list[_Sound] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)


@dataclass(frozen=True)
class SampleFiles:
    """A sample as a tar holds it."""

    key: str
    files: dict[str, bytes]
    """By ending."""
    notes: tuple[Note, ...] = ()


def sample_files(
    rows: Sequence[KeyedRow], config: ShardsConfig, folder: TokenizerFolder | None, encoder: ImageEncoder | None
) -> tuple[list[SampleFiles], list[tuple[str, str]]]:
    """What rows become, and of those that can't be read where they are and the reason.

    Args:
        rows: The rows, all read before any is encoded.
        config: How.
        folder: With an audio tokenizer, each sound's codes are among the files.
        encoder: With it, each picture's features are.
    """
    samples: list[_Sample] = []
    keys: list[str] = []
    errors: list[tuple[str, str]] = []
    for keyed in rows:
        try:
            samples.extend(_read(keyed.row, config))
            keys.extend(keyed.keys)
        except (ValueError, OSError, RuntimeError) as error:  # a decoder may raise what it likes
            if is_of_machine(error):
                raise
            errors.append((keyed.row.where, str(error)))
    _add_codes(samples, folder)
    if encoder is not None:
        _add_features(samples, encoder)
    return [_with_header(key, sample) for key, sample in zip(keys, samples, strict=True)], errors


def _with_header(key: str, sample: _Sample) -> SampleFiles:
    header = json.dumps({"id": sample.name, **sample.metadata}, ensure_ascii=False, sort_keys=True)
    return SampleFiles(key, {**sample.files, "json": header.encode()}, tuple(sample.notes))


def _read(row: Row, config: ShardsConfig) -> list[_Sample]:
    metadata = row.metadata
    match row.kind:
        case "text":
            return [_Sample(row, row.id, {"txt": row.text.encode()}, metadata)]
        case "caption":
            assert row.image is not None
            notes: list[Note] = []
            ending, data, (width, height) = _picture(row, row.image, config, notes)
            files = {ending: data, "txt": row.text.encode()}
            return [_Sample(row, row.id, files, {**metadata, "width": width, "height": height}, notes=notes)]
        case "audio":
            return _audio_samples(row, metadata, config)
    return [_interleaved_sample(row, metadata, config)]


def _picture(row: Row, media: Media, config: ShardsConfig, notes: list[Note]) -> tuple[str, bytes, tuple[int, int]]:
    """Ending, bytes, size. Stored as they are where any reader sees the same 8-bit picture in them.

    What must change and was lossy becomes a JPEG of high quality, its colours as fine as its grey; else a PNG.
    """
    data = media.read_bytes()
    decoded = decode_file(data, str(media))
    if decoded.is_animated:
        message = f"{row.where}: {media} holds several pictures ({decoded.form}); the first is used"
        notes.append(Note("first_pictures", message))
    picture, is_single = decoded.picture, not decoded.is_animated or decoded.form == "MPO"
    fits = max(picture.size) <= config.max_image_side
    if decoded.form in _KEPT and decoded.is_plain and is_single and fits:
        return _KEPT[decoded.form], data, picture.size
    if not fits:
        picture.thumbnail((config.max_image_side, config.max_image_side), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    if decoded.is_lossy:
        picture.save(stream, "JPEG", quality=95, subsampling=0)
        return "jpg", stream.getvalue(), picture.size
    picture.save(stream, "PNG")
    return "png", stream.getvalue(), picture.size


def _wave(media: Media, config: ShardsConfig) -> Sound:
    if isinstance(media, Path):
        media.open("rb").close()  # a file that is gone is not the row's fault: this says so in the system's own terms
    return read_sound(media_source(media), name=str(media), max_seconds=config.max_seconds)


def _noted(row: Row, media: Media, sound: Sound) -> list[Note]:
    if sound.peak <= 1:
        return []
    message = f"{row.where}: {media} reaches {sound.peak:.4g}, more than a FLAC holds; it was scaled down to 1"
    return [Note("scaled_sounds", message)]


def _flac(wave_CT: np.ndarray, rate: int, name: str) -> bytes:
    stream = io.BytesIO()
    try:
        soundfile.write(stream, wave_CT.T, rate, format="FLAC", subtype="PCM_16")
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{name}: {len(wave_CT)} channels at {rate} Hz can't be stored as FLAC, which takes at most 8 channels and "
            f"655350 Hz; convert it to a WAV or FLAC of fewer channels or a usual rate"
        ) from error
    return stream.getvalue()


def _audio_samples(row: Row, metadata: dict[str, Any], config: ShardsConfig) -> list[_Sample]:
    assert row.audio is not None
    sound = _wave(row.audio, config)
    wave_CT, rate = sound.wave_CT.numpy(), sound.sample_rate
    samples = []
    for copy in range(config.perturb + 1):
        name = copy_name(row.id, copy)
        changed_CT = perturb(to_mono(sound.wave_CT).numpy(), config.seed, name)[None] if copy else wave_CT
        facts = {"sample_rate": rate, "duration": round(changed_CT.shape[-1] / rate, 6)}
        if copy:
            facts["perturbed"] = True
        if isinstance(metadata.get(WORDS), list):
            facts |= _words(row, metadata, wave_CT.shape[-1] / rate, changed_CT.shape[-1] / wave_CT.shape[-1])
        files = {"flac": _flac(changed_CT, rate, str(row.audio)), "txt": row.text.encode()}
        notes = _noted(row, row.audio, sound) if not copy else []
        samples.append(_Sample(row, name, files, {**metadata, **facts}, [_Sound(changed_CT, rate, "codec.npz")], notes))
    return samples


def _words(row: Row, metadata: Mapping[str, Any], seconds: float, slower: float) -> dict[str, Any]:
    """When words of a sound of so many seconds are said in one that lasts `slower` times as long.

    They are checked, and marked for filters.
    """
    times = stretched(read_words(metadata[WORDS], row.text, f"row {row.id!r}", seconds), slower)
    return {WORDS: [time.to_json() for time in times], ALIGNED: True}


def _interleaved_sample(row: Row, metadata: dict[str, Any], config: ShardsConfig) -> _Sample:
    files: dict[str, bytes] = {}
    sounds, segments = [], []
    notes: list[Note] = []
    for segment in row.segments:
        number = len(files)
        role = {key: segment[key] for key in ("role", "loss", "new_turn") if key in segment}
        if "image" in segment:
            ending, data, _ = _picture(row, segment["image"], config, notes)
            files[f"{number}.{ending}"] = data
            segments.append({"image": f"{number}.{ending}", **role})
        elif "audio" in segment:
            sound = _wave(segment["audio"], config)
            wave_CT, rate = sound.wave_CT.numpy(), sound.sample_rate
            files[f"{number}.flac"] = _flac(wave_CT, rate, str(segment["audio"]))
            notes += _noted(row, segment["audio"], sound)
            sounds.append(_Sound(wave_CT, rate, f"{number}.codec.npz"))
            segments.append({"audio": f"{number}.flac", **role})
        else:
            segments.append(segment)
    return _Sample(row, row.id, files, {**metadata, "segments": segments}, sounds, notes)


def _add_codes(samples: Sequence[_Sample], folder: TokenizerFolder | None) -> None:
    """Encodes all sounds of the samples together (the tokenizer batches them by length), and adds them as files."""
    if folder is None or folder.audio is None:
        return
    tokenizer = folder.audio
    pairs = [(sample, sound) for sample in samples for sound in sample.sounds]
    if not pairs:
        return
    waves = []
    for _, sound in pairs:
        waves.append(tokenizer.prepare(torch.from_numpy(np.ascontiguousarray(sound.wave_CT)), sound.rate))
    for (sample, sound), codes_KF in zip(pairs, tokenizer.encode_batch(waves), strict=True):
        sample.files[sound.ending] = pack_codes(codes_KF.numpy(), tokenizer.hash, tokenizer.frame_rate)


def _add_features(samples: Sequence[_Sample], encoder: ImageEncoder) -> None:
    """Encodes all pictures of the samples, as they are stored, and adds their features as files."""
    endings = tuple(_KEPT.values())
    pictures = [(sample, ending) for sample in samples for ending in sample.files if ending.endswith(endings)]
    for start in range(0, len(pictures), PICTURES):
        batch = pictures[start : start + PICTURES]
        pixels_N3HW = np.stack([encoder.transform(sample.files[ending], sample.row.where) for sample, ending in batch])
        for (sample, ending), features_PC in zip(batch, encoder.encode(pixels_N3HW), strict=True):
            sample.files[features_ending(ending)] = pack_features(features_PC, encoder.hash, sample.row.where)
            sample.metadata[COLUMN] = encoder.hash
