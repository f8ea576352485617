"""Small manifests, shards and tokenizers for the data tests."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import soundfile
import torch
from PIL import Image

from mmllm_tokenizers.audio import SmallCodec
from mmllm_tokenizers.codec import Codec, CodecConfig
from mmllm_tokenizers.folder import TokenizerConfig, TokenizerFolder
from mmllm_tokenizers.text import TextTokenizer
from mmllm_tokenizers.tiling import Tiling

WORDS = ("red", "blue", "green", "square", "circle", "one", "two", "above", "left", "of", "a", "the")
RATE = 8000


def make_folder(
    path: Path, pattern: str = "delay", num_codebooks: int = 2, image_size: int = 16, tiling: Tiling | None = None
) -> TokenizerFolder:
    """A tokenizer folder with an untrained codec of 125 frames a second, saved at `path`."""
    torch.manual_seed(0)
    codec = Codec(
        CodecConfig(
            sample_rate=RATE, num_filters=4, ratios=(8, 8), dimension=8, num_codebooks=num_codebooks, codebook_size=16
        )
    )
    text = TextTokenizer.train([" ".join(WORDS)] * 4, vocab_size=300)
    config = TokenizerConfig(image_tokens=4, image_size=image_size, audio_pool=2, pattern=pattern, tiling=tiling)
    folder = TokenizerFolder(text, SmallCodec(codec), config)
    folder.save(path)
    return folder


def words(rng: np.random.Generator, low: int = 3, high: int = 12) -> str:
    return " ".join(rng.choice(WORDS, size=rng.integers(low, high)))


def write_manifest(folder: Path, rows: list[dict], name: str = "manifest.jsonl") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_tar(path: Path, files: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_picture(path: Path, rng: np.random.Generator, size: int = 16) -> None:
    Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(path)


def write_sound(path: Path, rng: np.random.Generator, seconds: float = 0.2) -> None:
    wave = 0.3 * np.sin(np.arange(int(RATE * seconds)) * rng.uniform(0.1, 0.9))
    soundfile.write(path, wave.astype(np.float32), RATE)


def mixed_manifest(folder: Path, num: int = 24, seed: int = 0) -> Path:
    """`num` rows of each kind."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    for number in range(num):
        write_picture(folder / f"{number}.png", rng)
        write_sound(folder / f"{number}.wav", rng, rng.uniform(0.1, 0.4))
        speaker = "ann" if number % 2 else "bob"
        rows.append({"id": f"c.{number}", "text": words(rng), "image": f"{number}.png", "split": "train"})
        rows.append({"id": f"a/{number}", "text": words(rng), "audio": f"{number}.wav", "speaker": speaker})
        rows.append({"id": f"t{number}", "text": words(rng, 5, 60)})
        segments = [{"text": words(rng)}, {"image": f"{number}.png"}, {"text": words(rng)}, {"audio": f"{number}.wav"}]
        row = {"id": f"i{number}", "segments": segments}
        rows.append({**row, "question": "which colour?", "answer": "red"} if number % 3 == 0 else row)
    return write_manifest(folder, rows)


def recipe_dict(shards: Path, tokenizer: Path, **changes: object) -> dict:
    kinds = ("caption", "interleaved", "text", "audio")
    return {
        "tokenizer": str(tokenizer),
        "sequence_length": 128,
        "seed": 7,
        "sources": [
            {"name": kind, "kind": kind, "shards": str(shards / f"{kind}-*.tar"), "weight": weight}
            for kind, weight in zip(kinds, (0.3, 0.3, 0.1, 0.3), strict=True)
        ],
        "packing": {"window": 32},
        **changes,
    }
