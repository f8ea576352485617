"""Everything that others need about sound: reading it, and the audio tokenizers."""

from __future__ import annotations

from pathlib import Path

from mmllm_tokenizers.audio_tokenizer import AudioTokenizer, read_tokenizer_folder
from mmllm_tokenizers.deduplicated_units import DeduplicatedUnits
from mmllm_tokenizers.encodec_tokenizer import EncodecTokenizer
from mmllm_tokenizers.small_codec import SmallCodec
from mmllm_tokenizers.sound import (
    AudioSource,
    Sound,
    load_audio,
    read_sound,
    resample,
    resampled_length,
    sound_length,
    to_channels,
    to_mono,
)
from mmllm_tokenizers.units import KMeansConfig, KMeansUnits, deduplicate, repeat_units

__all__ = [
    "AudioSource",
    "AudioTokenizer",
    "DeduplicatedUnits",
    "EncodecTokenizer",
    "KMeansConfig",
    "KMeansUnits",
    "SmallCodec",
    "Sound",
    "deduplicate",
    "load_audio",
    "load_audio_tokenizer",
    "read_sound",
    "repeat_units",
    "resample",
    "resampled_length",
    "sound_length",
    "to_channels",
    "to_mono",
]


def load_audio_tokenizer(folder: str | Path) -> AudioTokenizer:
    """The audio tokenizer that `save` wrote into a folder, of whichever kind.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the folder is damaged, foreign or of a newer release.
    """
    config, _ = read_tokenizer_folder(folder)
    match config["kind"]:
        case "codec":
            return SmallCodec.load(folder)
        case "encodec":
            return EncodecTokenizer.load(folder)
        case "kmeans":
            return KMeansUnits.load(folder)
        case "deduplicated_kmeans":
            return DeduplicatedUnits.load(folder)
    raise ValueError(f"{folder} holds an audio tokenizer of unknown kind {config['kind']!r}; upgrade mmllm")
