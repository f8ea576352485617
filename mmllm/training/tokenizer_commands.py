"""What `mmllm tokenizer` does: makes text and audio tokenizers, and puts both into one folder.

Shapes: C channels, T samples.
"""

from __future__ import annotations

import json
import logging
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmllm.data.plan.recipe import load_recipe
from mmllm.data.rows.bad_rows import BadRows, is_of_machine
from mmllm.data.rows.column_names import ColumnNames
from mmllm.data.rows.forms import is_input, read_rows
from mmllm.data.rows.media import Media, media_source
from mmllm.data.rows.rows import Row, row_media
from mmllm.data.samples.schema import AUDIO_ENDINGS, jsonl_rows, parse_line
from mmllm.data.shards.find import shard_paths
from mmllm.data.shards.tar import Member, scan_tar
from mmllm.interop.tokenizers import reference_encoder
from mmllm_tokenizers.audio import (
    AudioTokenizer,
    DeduplicatedUnits,
    EncodecTokenizer,
    KMeansConfig,
    KMeansUnits,
    load_audio,
    load_audio_tokenizer,
    resample,
    to_mono,
)
from mmllm_tokenizers.folder import TEMPLATES_FILE, TokenizerConfig, TokenizerFolder
from mmllm_tokenizers.text import TextTokenizer
from mmllm_tokenizers.unit_bpe import check_sizes

DEFAULT_VOCAB_SIZE = 4096

_logger = logging.getLogger(__name__)
_MAX_BAD_FRACTION = 0.05
_Sound = tuple[str, Callable[[], tuple[Tensor, int]]]
"""What errors call it, and how to read it: (wave [C, T], sample rate)."""


def train_text(
    inputs: list[str],
    out: str,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    codec: str | None = None,
    config: TokenizerConfig | None = None,
    form: str = "auto",
    media: str | None = None,
    columns: ColumnNames | None = None,
) -> dict[str, Any]:
    """Trains byte-level BPE and writes a tokenizer folder.

    Args:
        inputs: manifests and inputs of other forms, recipes (`.yaml`), or shards (`.tar`, globs, folders).
        out: tokenizer folder.
        vocab_size: ids at most, special tokens and the 256 bytes included.
        codec: folder of an audio tokenizer, copied into `out`; None: a folder without sound.
        config: how images and sound become positions.
        form: of the inputs; "auto": told from each.
        media: what their paths are relative to; by default each input's folder.
        columns: what their columns are called here, and their types.

    Returns:
        `out`, `vocab_size` as trained, `documents`, `characters`, `hash`, and `skipped`: rows that can't be used.

    Raises:
        FileNotFoundError, ValueError: an input can't be used, or holds no text.
    """
    counts = {"documents": 0, "characters": 0}
    bad = BadRows(_MAX_BAD_FRACTION)

    def counted() -> Iterator[str]:
        for text in _texts(inputs, lambda name: read_rows(name, bad, form, media, columns)):
            counts["documents"] += 1
            counts["characters"] += len(text)
            yield text

    text = TextTokenizer.train(counted(), vocab_size)
    if not counts["characters"]:
        raise ValueError(f"there is no text in {', '.join(inputs)}; give manifests, recipes or shards with text")
    return {**_write(text, out, codec, config), **counts, "skipped": bad.reasons}


def assemble(out: str, text: str, codec: str | None = None, config: TokenizerConfig | None = None) -> dict[str, Any]:
    """Writes a tokenizer folder from a trained text tokenizer and a trained codec.

    Args:
        out: tokenizer folder.
        text: `tokenizer.json`, or the folder that holds it.
        codec: folder of an audio tokenizer; None: a folder without sound.
        config: how images and sound become positions.

    Returns:
        `out`, `vocab_size`, `hash`.

    Raises:
        FileNotFoundError, ValueError: a part is missing or damaged.
    """
    path = Path(text)
    return _write(TextTokenizer.load(path / "tokenizer.json" if path.is_dir() else path), out, codec, config)


def encodec(name: str, out: str, weights: str | None = None, num_codebooks: int = 8) -> dict[str, Any]:
    """Writes an audio tokenizer folder with one of Meta's EnCodec models.

    Args:
        name: "encodec_24khz" or "encodec_48khz".
        out: audio tokenizer folder, for `assemble(codec=…)`.
        weights: the published `.th` file, or a folder that holds it; None: torch hub's cache. Nothing is downloaded.
        num_codebooks: how many codebooks are used unless `assemble` says otherwise.

    Returns:
        `out`, `sample_rate`, `frame_rate`, `num_codebooks`, `codebook_size`, `hash`.

    Raises:
        FileNotFoundError, ValueError: no such model, or a file that isn't its weights.
    """
    return _save_audio(EncodecTokenizer.from_pretrained(name, weights, num_codebooks=num_codebooks), out)


def kmeans(
    inputs: list[str],
    out: str,
    config: KMeansConfig | None = None,
    max_minutes: float = 60.0,
    deduplicate: bool = False,
    bpe: int | None = None,
) -> dict[str, Any]:
    """Clusters the frames of sounds and writes an audio tokenizer folder of k-means units.

    Args:
        inputs: manifests and inputs of other forms, or shards (`.tar`, globs, folders); of interleaved documents,
            their sounds.
        out: audio tokenizer folder, for `assemble(codec=…)`.
        config: what the units are made of.
        max_minutes: at most this much sound is used, drawn at random from all.
        deduplicate: a run of one unit is that unit once; such units can't be spoken.
        bpe: tokens of BPE over de-duplicated units, these included, learnt from the same sounds; None: there is none.

    Returns:
        `out`, `sample_rate`, `frame_rate`, `num_codebooks`, `codebook_size`, `hash`, `sounds`, `minutes`, `bad`; of
        de-duplicated units also what became of the sounds: `frames`, `units_per_frame`, `codes_per_frame`.

    Raises:
        FileNotFoundError, ValueError: an input can't be used, too many sounds are broken, or there are too few frames.
    """
    config = config or KMeansConfig()
    if not max_minutes > 0:
        raise ValueError(f"max_minutes is {max_minutes}; it must be above 0")
    if bpe is not None and not deduplicate:
        raise ValueError(f"bpe is {bpe}, which is over de-duplicated units; give deduplicate as well, or leave bpe out")
    if bpe is not None:
        check_sizes(config.num_clusters, bpe)
    bad = BadRows(_MAX_BAD_FRACTION)
    sounds = list(_sounds(inputs, bad))
    if not sounds:
        raise ValueError(f"there is no sound in {', '.join(inputs)}; give manifests or shards with sound")
    waves: list[Tensor] = []
    num_samples, num_looked_at = 0, len(bad.reasons)
    for place in np.random.default_rng(config.seed).permutation(len(sounds)):
        where, read = sounds[place]
        num_looked_at += 1
        try:
            wave_CT, rate = read()
        except (ValueError, OSError) as error:
            if is_of_machine(error):
                raise
            bad.add(where, error)
            continue
        left = max(1, int(max_minutes * 60 * config.sample_rate)) - num_samples
        waves.append(resample(to_mono(wave_CT), rate, config.sample_rate)[:left])
        num_samples += len(waves[-1])
        if len(waves[-1]) == left:
            break
    bad.check(num_looked_at, ", ".join(inputs))
    facts = {"sounds": len(waves), "minutes": round(num_samples / config.sample_rate / 60, 3), "bad": bad.reasons}
    units = KMeansUnits.fit(waves, config)
    if not deduplicate:
        return {**_save_audio(units, out), **facts}
    short, shortening = DeduplicatedUnits.fit(units, waves, bpe)
    return {**_save_audio(short, out), **facts, **shortening.to_dict()}


def _save_audio(audio: AudioTokenizer, out: str) -> dict[str, Any]:
    audio.save(out)
    names = ("sample_rate", "frame_rate", "num_codebooks", "codebook_size", "hash")
    return {"out": out, **{name: getattr(audio, name) for name in names}}


def _sounds(inputs: list[str], bad: BadRows) -> Iterator[_Sound]:
    for name in inputs:
        if is_input(Path(name)):
            for row in read_rows(name, bad):
                sounds = [media for kind, media in row_media(row) if kind == "audio"]
                yield from ((row.where, partial(_load, media)) for media in sounds)
        else:
            for shard in shard_paths(f"{name}/*.tar" if Path(name).is_dir() else name):
                yield from _shard_sounds(shard)


def _load(media: Media) -> tuple[Tensor, int]:
    return load_audio(media_source(media), name=str(media))


def _shard_sounds(shard: Path) -> Iterator[_Sound]:
    for span in scan_tar(shard):
        for member in span.members:
            if member.ending.rpartition(".")[2] in AUDIO_ENDINGS:
                where = f"{shard}:{span.key}.{member.ending}"
                yield where, partial(_read_sound, shard, member, where)


def _read_sound(shard: Path, member: Member, where: str) -> tuple[Tensor, int]:
    with shard.open("rb") as stream:
        stream.seek(member.offset)
        return load_audio(stream.read(member.size), name=where)


def _write(text: TextTokenizer, out: str, codec: str | None, config: TokenizerConfig | None) -> dict[str, Any]:
    audio = load_audio_tokenizer(codec) if codec is not None else None
    folder = TokenizerFolder(text, audio, config)
    folder.save(out)
    return {"out": out, "vocab_size": text.vocab_size, "ids": folder.vocabulary.size, "hash": folder.hash}


def _texts(inputs: list[str], read: Callable[[str], list[Row]]) -> Iterator[str]:
    for name in inputs:
        if is_input(Path(name)):
            for row in read(name):
                yield from _document_texts({"text": row.text, "segments": row.segments, **row.metadata})
        elif name.endswith((".yaml", ".yml")):
            path = Path(name)
            for source in load_recipe(path).sources:
                for shard in shard_paths(source.shards, path.parent):
                    yield from _shard_texts(shard)
        else:
            for shard in shard_paths(f"{name}/*.tar" if Path(name).is_dir() else name):
                yield from _shard_texts(shard)


def _shard_texts(shard: Path) -> Iterator[str]:
    try:
        with tarfile.open(shard) as tar:
            for member in tar:
                suffix = member.name.rsplit(".", 1)[-1]
                file = tar.extractfile(member) if suffix in ("txt", "json", "jsonl") else None
                if file is None:
                    continue
                content = file.read()
                match suffix:
                    case "txt":
                        yield content.decode("utf-8")
                    case "json":
                        yield from _document_texts(json.loads(content), own=False)
                    case _:
                        yield from _line_texts(content, f"{shard}:{member.name}")
    except (tarfile.TarError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{shard} can't be read: {error}; `mmllm data verify` names every bad sample") from error


def _line_texts(content: bytes, name: str) -> Iterator[str]:
    """The texts of JSONL; a line that is no row is named and left out, as it is of an index."""
    for number, line in enumerate(jsonl_rows(content), start=1):
        try:
            text, others = parse_line(line)
        except ValueError as error:
            _logger.warning("%s line %d %s", name, number, error)
        else:
            yield from _document_texts({"text": text, **others})


def _document_texts(values: Any, own: bool = True) -> Iterator[str]:
    """The texts of a row. Beside a `txt` (`own` False) the row's `text` would be counted twice."""
    if not isinstance(values, dict):
        return
    found = [values.get("text")] if own else []
    found += [segment.get("text") for segment in values.get("segments") or () if isinstance(segment, dict)]
    found += [values.get("question"), values.get("answer")]
    yield from (text for text in found if isinstance(text, str) and text)


def encode(inputs: Sequence[str], tokenizer: str) -> Iterator[str]:
    """Lines of text as JSON lists of ids: special tokens count, and what frames a text is added.

    Args:
        inputs: text files in UTF-8; none: standard input.
        tokenizer: one of our folders, or a checkpoint of transformers.

    Raises:
        FileNotFoundError, ValueError: there is no tokenizer in the folder, or a line is no UTF-8.
        ModuleNotFoundError: transformers, for a checkpoint of it.
    """
    folder = Path(tokenizer)
    if (folder / TEMPLATES_FILE).is_file():
        ids_of = TokenizerFolder.load(folder).text.encode_as_transformers
    else:
        backend = reference_encoder(folder)

        def ids_of(text: str) -> list[int]:
            return backend.encode(text).ids

    for name, line in _lines(inputs):
        try:
            text = line.removesuffix(b"\n").decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is no UTF-8: {error}; convert it") from error
        yield json.dumps(ids_of(text))


def _lines(inputs: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Each line of the files, or of standard input, and where it is."""
    if not inputs:
        yield from ((f"line {number} of standard input", line) for number, line in enumerate(sys.stdin.buffer, 1))
    for path in inputs:
        with open(path, "rb") as file:
            yield from ((f"{path}:{number}", line) for number, line in enumerate(file, 1))
