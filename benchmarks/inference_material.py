"""What is read, seen, heard and spoken by the benchmarks: rows of the model's own test set, or made on the spot."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image, ImageDraw

from mmllm_tokenizers.audio import load_audio

_WORDS = (
    "a the of red blue green small large old new house tree dog cat child street river mountain sky window table two "
    "three beside above under holds walks stands looks photo picture light dark morning evening water stone paper"
)
_MADE_RATE = 16_000
_PAUSE_SECONDS = 0.5

Sound = tuple[np.ndarray, int]
"""float32 [T], and samples a second."""


@dataclass(frozen=True)
class Material:
    """Texts, pictures and sounds.

    Attributes:
        texts: to be gone on with.
        pictures: to be looked at.
        sounds: to be heard.
        said: texts to be spoken.
        question: to ask about a picture.
        source: where it is from.
    """

    texts: tuple[str, ...]
    pictures: tuple[Image.Image, ...]
    sounds: tuple[Sound, ...]
    said: tuple[str, ...]
    question: str
    source: str

    def heard(self, most_seconds: float | None) -> list[Sound]:
        """Sounds, cut to what a model hears at once; None: of any length."""
        if most_seconds is None:
            return list(self.sounds)
        return [(samples_T[: int(most_seconds * rate)], rate) for samples_T, rate in self.sounds]

    def long_sound(self, seconds: float) -> Sound:
        """Sounds one after the other with pauses between them, so long in all."""
        rate = self.sounds[0][1]
        pause_T = np.zeros(round(_PAUSE_SECONDS * rate), dtype=np.float32)
        parts: list[np.ndarray] = []
        wanted, num_samples, number = round(seconds * rate), 0, 0
        while num_samples < wanted:
            samples_T, own_rate = self.sounds[number % len(self.sounds)]
            assert own_rate == rate, f"sounds of {rate} and {own_rate} Hz"
            parts += [samples_T, pause_T]
            num_samples += len(samples_T) + len(pause_T)
            number += 1
        return np.concatenate(parts)[:wanted], rate


def material(run: Path | None, model: Path, count: int) -> Material:
    """Of a run's held-out rows, or made on the spot.

    Args:
        run: a quickstart's folder; None: the model's own, if the model is `RUN/model`.
        model: folder of the model.
        count: of each kind, at most.

    Raises:
        SystemExit: the run has no rows.
    """
    if run is None and (model.parent / "manifests" / "test.jsonl").is_file():
        run = model.parent
    if run is None:
        return made(count)
    manifest = run / "manifests" / "test.jsonl"
    if not manifest.is_file():
        raise SystemExit(f"--data {run}: there is no manifests/test.jsonl; give the folder of a quickstart")
    return _of_rows(manifest, count)


def _of_rows(manifest: Path, count: int) -> Material:
    rows = [json.loads(each) for each in manifest.read_text(encoding="utf-8").splitlines()]

    def some(key: str, without: Sequence[str] = ()) -> list[dict[str, Any]]:
        found = [row for row in rows if key in row and not any(other in row for other in without)]
        if not found:
            raise SystemExit(f"{manifest}: no row has {key}; give a run that has texts, pictures and sounds")
        return found[:count]

    pictures = []
    for row in some("image"):
        with Image.open(manifest.parent / row["image"]) as opened:
            pictures.append(opened.convert("RGB"))
    heard = [row for row in some("audio")]
    sounds = []
    for row in heard:
        wave_CT, rate = load_audio(str(manifest.parent / row["audio"]))
        sounds.append((wave_CT.mean(dim=0).numpy(), rate))
    questions = [row["question"] for row in rows if "question" in row]
    return Material(
        tuple(row["text"] for row in some("text", ("image", "audio"))),
        tuple(pictures),
        tuple(sounds),
        tuple(row["text"] for row in heard),
        questions[0] if questions else "what is in the picture?",
        f"held-out rows of {manifest.parent.parent.name}",
    )


def made(count: int) -> Material:
    """Words in any order, rectangles, and tones that come and go as syllables do; all from seeds."""
    rng = np.random.default_rng(0)

    def words(least: int, most: int) -> str:
        return " ".join(rng.choice(_WORDS.split(), size=int(rng.integers(least, most))))

    return Material(
        tuple(words(150, 250) for _ in range(count)),
        tuple(_picture(rng) for _ in range(count)),
        tuple((_murmur(rng), _MADE_RATE) for _ in range(count)),
        tuple(words(3, 9) for _ in range(count)),
        "what is in the picture?",
        "made on the spot",
    )


def _picture(rng: np.random.Generator, size: int = 64) -> Image.Image:
    picture = Image.new("RGB", (size, size), tuple(rng.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(picture)
    for _ in range(4):
        left, top = rng.integers(0, size - 8, 2).tolist()
        width, height = rng.integers(8, size // 2, 2).tolist()
        draw.rectangle((left, top, left + width, top + height), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return picture


def _murmur(rng: np.random.Generator) -> np.ndarray:
    """One to three seconds of a voiced tone in syllables."""
    time_T = np.arange(round(float(rng.uniform(1, 3)) * _MADE_RATE)) / _MADE_RATE
    pitch = float(rng.uniform(90, 220))
    tone_T = sum(np.sin(2 * np.pi * pitch * harmonic * time_T) / harmonic for harmonic in range(1, 12))
    syllables_T = np.clip(np.sin(2 * np.pi * float(rng.uniform(2, 4)) * time_T), 0, 1)
    return (0.2 * tone_T * syllables_T).astype(np.float32)


def png(picture: Image.Image) -> bytes:
    """A picture's file."""
    sink = io.BytesIO()
    picture.save(sink, "PNG")
    return sink.getvalue()


def wav(sound: Sound) -> bytes:
    """A sound's file, 16 bits."""
    sink = io.BytesIO()
    soundfile.write(sink, sound[0], sound[1], format="WAV", subtype="PCM_16")
    return sink.getvalue()
