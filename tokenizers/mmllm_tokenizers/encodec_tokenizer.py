"""Meta's EnCodec models as audio tokenizers.

Shapes: N clips, C channels, T samples, K codebooks, F frames, V codes a codebook, D code width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from encodec.model import ROOT_URL, EncodecModel
from torch import Tensor

from mmllm_tokenizers.audio_tokenizer import AudioTokenizer, check_codes, load_weights, read_tokenizer_folder
from mmllm_tokenizers.decoder_streams import DecoderStream, SEANetStream


@dataclass(frozen=True)
class _Release:
    """One published model: what `encodec.EncodecModel` is built with."""

    checkpoint: str
    sample_rate: int
    num_channels: int
    bandwidths_kbps: tuple[float, ...]
    kbps_per_codebook: float
    segment_seconds: float | None


RELEASES = {
    "encodec_24khz": _Release("encodec_24khz-d7cc33bc.th", 24_000, 1, (1.5, 3.0, 6.0, 12.0, 24.0), 0.75, None),
    "encodec_48khz": _Release("encodec_48khz-7e698e3e.th", 48_000, 2, (3.0, 6.0, 12.0, 24.0), 1.5, 1.0),
}


class EncodecTokenizer(AudioTokenizer):
    """EnCodec: codes are those of the `encodec` package, bit for bit.

    encodec_48khz hears stereo and works on segments of one second that overlap by 1%, each scaled to
    unit loudness. Codes are the segments' codes in a row, so a second costs about 151.5 frames, not 150.
    The segments' loudness is in no code: `decode` gives every segment `loudness`.

    Args:
        name: "encodec_24khz" or "encodec_48khz".
        weights: a state dict of that model, as `read_checkpoint` gives it, with or without weight
            normalization.
        num_codebooks: how many codebooks to use.
        loudness: root mean square of what encodec_48khz speaks.

    Raises:
        ValueError: unknown name, foreign weights, or a number of codebooks that the model lacks.
    """

    def __init__(self, name: str, weights: Mapping[str, Tensor], num_codebooks: int = 8, loudness: float = 0.1) -> None:
        release = _release(name)
        super().__init__(
            sample_rate=release.sample_rate,
            hop_samples=320,
            num_codebooks=num_codebooks,
            codebook_size=1024,
            num_channels=release.num_channels,
        )
        self.name = name
        self.loudness = loudness
        self.model = _build(release)
        load_weights(self.model, _fuse(weights), f"{name} checkpoint")
        self.use_codebooks(num_codebooks)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        path: str | Path | None = None,
        *,
        num_codebooks: int | None = None,
        bandwidth_kbps: float | None = None,
        download: bool = False,
    ) -> EncodecTokenizer:
        """A published model, from a local file or folder, or from torch hub's cache.

        Args:
            name: "encodec_24khz" or "encodec_48khz".
            path: the `.th` file or a folder that holds it; by default torch hub's cache.
            num_codebooks: how many codebooks to use (8 if neither this nor the bandwidth is given).
            bandwidth_kbps: the same, as one of the model's bandwidths in kbit/s.
            download: fetch the file into torch hub's cache if it is in neither place.

        Raises:
            ValueError: unknown name or bandwidth, or a file that is no checkpoint of that model.
            FileNotFoundError: the file is not there and `download` is false.
        """
        release = _release(name)
        if bandwidth_kbps is not None:
            if num_codebooks is not None:
                raise ValueError("give num_codebooks or bandwidth_kbps, not both")
            if bandwidth_kbps not in release.bandwidths_kbps:
                raise ValueError(
                    f"bandwidth is {bandwidth_kbps} kbit/s; {name} has {', '.join(map(str, release.bandwidths_kbps))}"
                )
            num_codebooks = int(bandwidth_kbps / release.kbps_per_codebook)
        weights = read_checkpoint(find_checkpoint(name, path, download=download))
        return cls(name, weights, 8 if num_codebooks is None else num_codebooks)

    @classmethod
    def load(cls, folder: str | Path) -> EncodecTokenizer:
        """Reads what `save` wrote."""
        config, weights = read_tokenizer_folder(folder, "encodec")
        try:
            return cls(config["name"], weights, config["num_codebooks"], config["loudness"])
        except KeyError as error:
            raise ValueError(f"{folder}: the configuration lacks {error}; save the tokenizer again") from error

    def num_frames(self, num_samples: int) -> int:
        """Frames of a clip of `num_samples` at the model's own rate."""
        return sum(-(-length // self.hop_samples) for length in self._segments(num_samples))

    def _segments(self, num_samples: int) -> list[int]:
        """Lengths of the segments that the model cuts a clip into."""
        segment, stride = self.model.segment_length, self.model.segment_stride
        if segment is None or stride is None:
            return [num_samples]
        return [min(segment, num_samples - start) for start in range(0, num_samples, stride)]

    def _pieces(self, wave_CT: Tensor) -> tuple[Tensor, ...]:
        """As others do, but for models that cut a clip into short segments of their own, which lie across minutes."""
        return super()._pieces(wave_CT) if self.model.segment_length is None else (wave_CT,)

    def _group_samples(self, num_samples: int) -> int:
        return num_samples  # no zeros added: the package adds none

    def _encode_equal(self, waves_NCT: Tensor) -> Tensor:
        codes = []
        start = 0
        for length in self._segments(waves_NCT.shape[2]):
            segment_NCT = waves_NCT[:, :, start : start + length]
            start += self.model.segment_stride or length
            if self.model.normalize:
                segment_NCT = segment_NCT / (
                    1e-8 + segment_NCT.mean(1, keepdim=True).pow(2).mean(2, keepdim=True).sqrt()
                )
            latents_NDF = self.model.encoder(segment_NCT)
            codes.append(self.model.quantizer.vq.encode(latents_NDF, n_q=self.num_codebooks).transpose(0, 1))
        return torch.cat(codes, dim=2)

    @torch.inference_mode()
    def _decode(self, codes_KF: Tensor) -> Tensor:
        frames_per_segment = codes_KF.shape[1]
        scale = None
        if self.model.segment_length is not None:
            frames_per_segment = -(-self.model.segment_length // self.hop_samples)
            scale = torch.full((1, 1), self.loudness)
        segments = [(codes_KF[None, :, s : s + frames_per_segment], scale)
                    for s in range(0, codes_KF.shape[1], frames_per_segment)]  # fmt: skip
        return self.model.decode(segments)[0]

    def decode(self, codes_KF: Tensor) -> Tensor:
        """Sound float32 [T], of the 48 kHz model [2, T], of codes of all codebooks, or of the first few."""
        check_codes(codes_KF, self.model.quantizer.n_q, self.codebook_size)
        sound_CT = torch.zeros(self.num_channels, 0)
        if codes_KF.shape[1]:
            sound_CT = self._decode(codes_KF.long()).clone()
        return sound_CT[0] if self.num_channels == 1 else sound_CT

    def decoder_stream(self) -> DecoderStream:
        """See `AudioTokenizer.decoder_stream`; encodec_48khz normalizes over a second of sound, and waits for all."""
        if self.model.segment_length is not None:
            return super().decoder_stream()
        return SEANetStream(self.model.decoder, self._latents, has_lstm=True)

    def _latents(self, codes_KF: Tensor) -> Tensor:
        return self.model.quantizer.decode(codes_KF[:, None])

    def _all_codebooks_KVD(self) -> Tensor:
        state = self.model.quantizer.state_dict()
        return torch.stack([state[f"vq.layers.{k}._codebook.embed"] for k in range(self.model.quantizer.n_q)])

    def _config(self) -> dict[str, Any]:
        return {"kind": "encodec", "name": self.name, "num_codebooks": self.num_codebooks, "loudness": self.loudness}

    def _weights(self) -> Mapping[str, Tensor]:
        return self.model.state_dict()


def find_checkpoint(name: str, path: str | Path | None = None, *, download: bool = False) -> Path:
    """Where the `.th` file of a published model lies; see `EncodecTokenizer.from_pretrained`."""
    file_name = _release(name).checkpoint
    cached = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    if path is None:
        if not cached.is_file() and download:
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(ROOT_URL + file_name, str(cached), hash_prefix=cached.stem.split("-")[1])
        if cached.is_file():
            return cached
        raise FileNotFoundError(
            f"{file_name} is not in torch hub's cache ({cached.parent}); give the path of the file or its folder, "
            f"or download=True to fetch it from {ROOT_URL}"
        )
    path = Path(path)
    if path.is_file():
        return path
    found = sorted(path.glob(f"{name}*.th")) if path.is_dir() else []
    if len(found) != 1:
        what = "does not exist" if not path.exists() else f"holds {len(found)} files {name}*.th"
        raise FileNotFoundError(f"{path} {what}; give the path of {file_name} or of the folder that holds it")
    return found[0]


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.th` checkpoint; nothing in it is executed (`weights_only`).

    Raises:
        ValueError: the file is no state dict.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each raise errors of their own
        raise ValueError(f"{path} cannot be read as an EnCodec checkpoint: {error}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path} holds no state dict of tensors; give the published .th file")
    return dict(weights)


def _release(name: str) -> _Release:
    if name not in RELEASES:
        raise ValueError(f"EnCodec model is {name!r}; it must be one of {', '.join(RELEASES)}")
    return RELEASES[name]


def _build(release: _Release) -> EncodecModel:
    """The published model's architecture, without weight normalization (`_fuse` takes it out of the weights)."""
    stereo = release.num_channels == 2
    model = EncodecModel._get_model(
        list(release.bandwidths_kbps),
        release.sample_rate,
        release.num_channels,
        causal=not stereo,
        model_norm="time_group_norm" if stereo else "none",
        audio_normalize=stereo,
        segment=release.segment_seconds,
    )
    return model.eval().requires_grad_(False)


def _fuse(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights `w = g v / |v|` in place of the pairs (g, v): what torch's weight_norm computes at each call."""
    fused = {}
    for name, tensor in weights.items():
        if name.endswith(".weight_g"):
            stem = name.removesuffix("_g")
            if f"{stem}_v" in weights:
                fused[stem] = torch._weight_norm(weights[f"{stem}_v"], tensor, 0)
        elif not name.endswith(".weight_v"):
            fused[name] = tensor
    return fused
