"""What `mmllm tokenizer` does: trains the text tokenizer, and puts text tokens and codec into one folder."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmllm.data.manifest import read_manifest
from mmllm.data.recipe import load_recipe
from mmllm.data.shards import shard_paths
from mmllm_tokenizers.audio import load_audio_tokenizer
from mmllm_tokenizers.folder import TokenizerConfig, TokenizerFolder
from mmllm_tokenizers.text import TextTokenizer

DEFAULT_VOCAB_SIZE = 4096


def train_text(
    inputs: list[str],
    out: str,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    codec: str | None = None,
    config: TokenizerConfig | None = None,
) -> dict[str, Any]:
    """Trains byte-level BPE and writes a tokenizer folder.

    Args:
        inputs: manifests (`.jsonl`), recipes (`.yaml`), or shards (`.tar`, globs, folders).
        out: tokenizer folder.
        vocab_size: ids at most, special tokens and the 256 bytes included.
        codec: folder of an audio tokenizer, copied into `out`; None: a folder without sound.
        config: how images and sound become positions.

    Returns:
        `out`, `vocab_size` as trained, `documents`, `characters`, `hash`.

    Raises:
        FileNotFoundError, ValueError: an input can't be used, or holds no text.
    """
    counts = {"documents": 0, "characters": 0}

    def counted() -> Iterator[str]:
        for text in _texts(inputs):
            counts["documents"] += 1
            counts["characters"] += len(text)
            yield text

    text = TextTokenizer.train(counted(), vocab_size)
    if not counts["characters"]:
        raise ValueError(f"there is no text in {', '.join(inputs)}; give manifests, recipes or shards with text")
    return {**_write(text, out, codec, config), **counts}


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


def _write(text: TextTokenizer, out: str, codec: str | None, config: TokenizerConfig | None) -> dict[str, Any]:
    audio = load_audio_tokenizer(codec) if codec is not None else None
    folder = TokenizerFolder(text, audio, config)
    folder.save(out)
    return {"out": out, "vocab_size": text.vocab_size, "ids": folder.vocabulary.size, "hash": folder.hash}


def _texts(inputs: list[str]) -> Iterator[str]:
    for name in inputs:
        if name.endswith(".jsonl"):
            for row in read_manifest(name):
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
                content = file.read().decode("utf-8")
                if suffix == "txt":
                    yield content
                else:
                    for line in content.splitlines() if suffix == "jsonl" else [content]:
                        yield from _document_texts(json.loads(line), own=suffix == "jsonl")
    except (tarfile.TarError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{shard} can't be read: {error}; `mmllm data verify` names every bad sample") from error


def _document_texts(values: Any, own: bool = True) -> Iterator[str]:
    """The texts of a row. Beside a `txt` (`own` False) the row's `text` would be counted twice."""
    if not isinstance(values, dict):
        return
    found = [values.get("text")] if own else []
    found += [segment.get("text") for segment in values.get("segments") or () if isinstance(segment, dict)]
    found += [values.get("question"), values.get("answer")]
    yield from (text for text in found if isinstance(text, str) and text)
