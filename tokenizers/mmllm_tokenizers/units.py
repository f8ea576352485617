"""K-means units: each frame of sound is its nearest cluster, of log-mel features or of a codec's latents.

Source: discrete speech units as in HuBERT (https://arxiv.org/abs/2106.07447) and in speech recognition
(https://arxiv.org/abs/2309.15800); here over features that need no pretrained model.

Shapes: N clips, C channels, T samples, M mel bands, D features, F frames, U units after de-duplication,
V clusters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor

from mmllm_kernels import nearest_code
from mmllm_tokenizers.audio_tokenizer import AudioTokenizer, check_codes, load_weights, read_tokenizer_folder
from mmllm_tokenizers.codec import Codec, CodecConfig
from mmllm_tokenizers.kmeans import kmeans

Vocoder = Callable[[Tensor], Tensor]
"""Codes [1, F] to sound [T]."""


@dataclass(frozen=True)
class KMeansConfig:
    """What the units are made of."""

    sample_rate: int = 8000
    hop_samples: int = 160
    num_clusters: int = 256
    num_mels: int = 40
    window_samples: int = 400
    num_iterations: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("sample_rate", "hop_samples", "num_clusters", "num_mels", "num_iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.window_samples < self.hop_samples:
            raise ValueError(
                f"window_samples is {self.window_samples} and hop_samples {self.hop_samples}; a window must reach "
                f"from frame to frame"
            )


class KMeansUnits(AudioTokenizer):
    """Units of one codebook. They can be heard, but not spoken without a vocoder.

    Args:
        config: what the units are made of.
        centroids_VD: clusters of normalized features.
        mean_D: of the features.
        std_D: of the features.
        codec: take features from this codec's latents, not from the mel spectrogram; its sample rate
            and hop must be the configuration's.
        vocoder: turns codes into sound; not saved.

    Raises:
        ValueError: the codec does not fit the configuration.
    """

    def __init__(
        self,
        config: KMeansConfig,
        centroids_VD: Tensor,
        mean_D: Tensor,
        std_D: Tensor,
        codec: Codec | None = None,
        vocoder: Vocoder | None = None,
    ) -> None:
        super().__init__(config.sample_rate, config.hop_samples, 1, centroids_VD.shape[0])
        self.config = config
        self.centroids_VD = centroids_VD
        self.mean_D = mean_D
        self.std_D = std_D
        self.features = _Features(config, codec)
        self.vocoder = vocoder

    @classmethod
    def fit(cls, waves: Sequence[Tensor], config: KMeansConfig, codec: Codec | None = None) -> KMeansUnits:
        """Clusters the frames of sounds.

        Args:
            waves: each [T], at `config.sample_rate`.
            config: what the units are made of.
            codec: whose latents to cluster, if not mel features.

        Raises:
            ValueError: there are fewer frames than clusters.
        """
        features = _Features(config, codec)
        with torch.no_grad():
            frames_RD = torch.cat([features(wave[None, None])[0] for wave in waves])
        if len(frames_RD) < config.num_clusters:
            raise ValueError(
                f"{len(frames_RD)} frames of sound are too few for {config.num_clusters} clusters; give more sound "
                f"or fewer clusters"
            )
        mean_D, std_D = frames_RD.mean(0), frames_RD.std(0).clamp(min=1e-5)
        centroids_VD, _ = kmeans((frames_RD - mean_D) / std_D, config.num_clusters, config.num_iterations, config.seed)
        return cls(config, centroids_VD, mean_D, std_D, codec)

    @classmethod
    def load(cls, folder: str | Path, vocoder: Vocoder | None = None) -> KMeansUnits:
        """Reads what `save` wrote."""
        return cls.from_parts(*read_tokenizer_folder(folder, "kmeans"), str(folder), vocoder)

    @classmethod
    def from_parts(
        cls, config: Mapping[str, Any], weights: Mapping[str, Tensor], where: str, vocoder: Vocoder | None = None
    ) -> KMeansUnits:
        """The units that a folder's configuration and weights hold, perhaps beside others.

        Args:
            config: its keys `kmeans` and `codec` are read.
            weights: centroids, their statistics, and the codec's.
            where: what errors call it.
            vocoder: as of the class.

        Raises:
            ValueError: something is missing or unknown.
        """
        codec = None
        try:
            if config["codec"] is not None:
                codec = Codec(CodecConfig(**config["codec"]))
                prefix = "codec."
                parts = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
                load_weights(codec, parts, where)
            stats = [weights[name] for name in ("centroids", "mean", "std")]
            return cls(KMeansConfig(**config["kmeans"]), *stats, codec=codec, vocoder=vocoder)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{where} is no folder of k-means units that this release knows: {error}") from error

    def encode_units(self, wave: Tensor, sample_rate: int) -> tuple[Tensor, Tensor]:
        """(units int64 [U], durations int64 [U] in frames) of one sound, without repetitions."""
        return deduplicate(self.encode(wave, sample_rate)[0])

    def _encode_equal(self, waves_NCT: Tensor) -> Tensor:
        features_NFD = (self.features(waves_NCT) - self.mean_D) / self.std_D
        codes_R = nearest_code(features_NFD.reshape(-1, features_NFD.shape[2]), self.centroids_VD)
        return codes_R.view(len(waves_NCT), 1, -1)

    def decode(self, codes_KF: Tensor) -> Tensor:
        """Sound float32 [T], by the vocoder.

        Raises:
            ValueError: no vocoder was given: units alone hold no sound.
        """
        check_codes(codes_KF, 1, self.codebook_size)
        if self.vocoder is None:
            raise ValueError(
                "k-means units have no decoder of their own; give KMeansUnits a vocoder, or use a codec to speak"
            )
        return self.vocoder(codes_KF)

    def _all_codebooks_KVD(self) -> Tensor:
        return self.centroids_VD[None]

    def _config(self) -> dict[str, Any]:
        codec = self.features.codec
        return {
            "kind": "kmeans",
            "kmeans": dataclasses.asdict(self.config),
            "codec": None if codec is None else dataclasses.asdict(codec.config),
        }

    def _weights(self) -> Mapping[str, Tensor]:
        weights = {"centroids": self.centroids_VD, "mean": self.mean_D, "std": self.std_D}
        if self.features.codec is not None:
            weights |= {f"codec.{name}": tensor for name, tensor in self.features.codec.state_dict().items()}
        return weights


def deduplicate(codes_F: Tensor) -> tuple[Tensor, Tensor]:
    """Runs of one code as (units [U], durations [U] in frames); `repeat_units` is the exact inverse."""
    return torch.unique_consecutive(codes_F, return_counts=True)


def repeat_units(units_U: Tensor, durations_U: Tensor) -> Tensor:
    """Each unit as many times as it lasts: codes [F]."""
    return units_U.repeat_interleave(durations_U)


class _Features:
    """Sound [N, 1, T] to features [N, F, D] with F = ceil(T / hop)."""

    def __init__(self, config: KMeansConfig, codec: Codec | None) -> None:
        self.config = config
        self.codec = None if codec is None else codec.eval()
        if codec is not None:
            own = (codec.config.sample_rate, codec.config.hop_samples)
            if own != (config.sample_rate, config.hop_samples):
                raise ValueError(
                    f"the codec has sample rate and hop {own}, the units {(config.sample_rate, config.hop_samples)}; "
                    f"they must be equal"
                )
            return
        self.mel = torchaudio.transforms.MelSpectrogram(
            sample_rate=config.sample_rate,
            n_fft=max(512, 1 << (config.window_samples - 1).bit_length()),
            win_length=config.window_samples,
            hop_length=config.hop_samples,
            n_mels=config.num_mels,
            center=True,
            pad_mode="constant",  # reflection needs sounds longer than half a window
        )

    def __call__(self, waves_N1T: Tensor) -> Tensor:
        if self.codec is not None:
            return self.codec.latents(waves_N1T[:, 0]).transpose(1, 2)
        num_frames = -(-waves_N1T.shape[2] // self.config.hop_samples)
        padded_NT = F.pad(waves_N1T[:, 0], (0, num_frames * self.config.hop_samples - waves_N1T.shape[2]))
        mel_NMF = self.mel(padded_NT)[:, :, :num_frames]
        return (mel_NMF + 1e-6).log().transpose(1, 2)
