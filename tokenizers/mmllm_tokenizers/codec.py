"""A small neural audio codec that can be trained: a residual vector quantizer between encoder and decoder.

Those are the `encodec` package's SEANet, or computed features and a source-filter decoder.

Shapes: N clips, T samples, F frames, K codebooks, V codes a codebook, D latent width.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from encodec.modules import SEANetDecoder, SEANetEncoder
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from mmllm_tokenizers.codec_config import CodecConfig
from mmllm_tokenizers.frame_features import FrameFeatures
from mmllm_tokenizers.residual_quantizer import ResidualQuantizer
from mmllm_tokenizers.source_filter import SourceFilterDecoder
from mmllm_tokenizers.spectrum import FrameSpectrum

__all__ = ["Codec", "CodecConfig", "CodecOutput", "ResidualQuantizer", "fused"]

_INIT_GAIN = 1.1
"""Makes up for what ELU takes off a signal's variance."""
_INPUT_GAIN = 8.0
"""Brings speech (root mean square about 0.1) to unit variance at the first layer, and back at the last."""


@dataclass
class CodecOutput:
    """What `Codec.forward` gives."""

    wave: Tensor
    """[N, T], the reconstruction, as long as the input."""
    codes: Tensor
    """int64 [N, K, F]."""
    latents: Tensor
    """[N, D, F], before quantization."""
    quantized: Tensor
    """[N, D, F], after it; gradients pass to `latents` unchanged."""
    commit_loss: Tensor
    """Scalar."""
    pitch: Tensor | None
    """[N, F], log2 Hz, of the wave that a source-filter decoder gave."""


class Codec(nn.Module):
    """A codec: wave -> K codes a frame -> wave.

    Source: EnCodec (https://arxiv.org/abs/2210.13438); SEANet modules from the `encodec` package.

    Args:
        config: its shape.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.spectrum, self.features = None, None, None
        if config.has_computed_latents:
            self.features = FrameFeatures(config.sample_rate, config.hop_samples, config.num_bands)
            self.decoder: nn.Module = SourceFilterDecoder(config)
        else:
            shape = _seanet_shape(config)
            self.encoder = SEANetEncoder(**{**shape, "dimension": config.dimension - config.num_bands})
            if config.num_bands:
                self.spectrum = FrameSpectrum(config.sample_rate, config.hop_samples, config.num_bands)
            self.decoder = SEANetDecoder(**shape)
        self.quantizer = ResidualQuantizer(config)
        if self.encoder is not None:
            _initialize_convolutions(self.encoder, self.decoder)
            if config.norm == "weight_norm":
                for module in _convolutions(self):
                    parametrizations.weight_norm(module)

    @property
    def frame_rate(self) -> float:
        """Frames a second."""
        return self.config.sample_rate / self.config.hop_samples

    @property
    def codebooks_KVD(self) -> Tensor:
        """The codebooks."""
        return self.quantizer.codebooks

    @property
    def is_warming_up(self) -> bool:
        """Whether the next training batch is for the codebooks of computed latents alone."""
        is_early = int(self.quantizer.num_batches) < self.config.warmup_batches
        return self.config.has_computed_latents and self.training and is_early

    def num_frames(self, num_samples: int) -> int:
        """Frames of a clip: its samples divided by the hop, rounded up."""
        return -(-num_samples // self.config.hop_samples)

    def latents(self, wave_NT: Tensor) -> Tensor:
        """[N, D, F] before quantization: the spectrum's bands, if any, then the encoder's; zeros fill the last frame.

        With a source-filter decoder what follows the bands is computed too: pitch, voicing and loudness.

        Raises:
            ValueError: the wave is not [N, T] with T >= 1.
        """
        if wave_NT.dim() != 2 or wave_NT.shape[1] < 1:
            raise ValueError(f"wave has shape {list(wave_NT.shape)}; it must be [clips, samples], 1 sample or more")
        num_frames = self.num_frames(wave_NT.shape[1])
        missing = num_frames * self.config.hop_samples - wave_NT.shape[1]
        wave_NT = F.pad(wave_NT, (0, missing))
        if self.encoder is None:
            assert self.features is not None
            latents_NDF = self.features(wave_NT)
        else:
            latents_NDF = self.encoder(wave_NT[:, None])
            if self.spectrum is not None:
                latents_NDF = torch.cat([self.spectrum(wave_NT).to(latents_NDF), latents_NDF], dim=1)
        assert latents_NDF.shape[2] == num_frames, (latents_NDF.shape, num_frames)
        return latents_NDF

    @torch.no_grad()
    def encode(self, wave_NT: Tensor) -> Tensor:
        """Codes int64 [N, K, F], F = ceil(T / hop), of clips of one length."""
        return self.quantizer.encode(self.latents(wave_NT))

    @torch.no_grad()
    def decode(self, codes_NKF: Tensor) -> Tensor:
        """Wave [N, F * hop] of codes of all codebooks, or of the first few (worse, but a sound).

        Raises:
            ValueError: codes of a wrong shape or out of range.
        """
        config = self.config
        if codes_NKF.dim() != 3 or not 1 <= codes_NKF.shape[1] <= config.num_codebooks:
            raise ValueError(
                f"codes have shape {list(codes_NKF.shape)}; they must be [clips, 1 to {config.num_codebooks} "
                f"codebooks, frames]"
            )
        if codes_NKF.numel() == 0:
            return self.codebooks_KVD.new_zeros(codes_NKF.shape[0], codes_NKF.shape[2] * config.hop_samples)
        if not 0 <= int(codes_NKF.min()) <= int(codes_NKF.max()) < config.codebook_size:
            raise ValueError(
                f"codes lie in [{int(codes_NKF.min())}, {int(codes_NKF.max())}]; they must lie in "
                f"[0, {config.codebook_size - 1}]: remove fillers and pattern first (invert_pattern)"
            )
        return self._decoded(self.quantizer.decode(codes_NKF.long()))[0]

    def _decoded(self, latents_NDF: Tensor) -> tuple[Tensor, Tensor | None]:
        """The wave [N, F * hop], and its pitch [N, F] where the decoder has one."""
        if self.config.decoder == "source_filter":
            with torch.autocast(latents_NDF.device.type, enabled=False):  # Fourier transforms want float32
                return self.decoder(latents_NDF.float())
        return self.decoder(latents_NDF)[:, 0], None

    def forward(self, wave_NT: Tensor) -> CodecOutput:
        """Encodes, quantizes (learning, in training mode) and decodes."""
        latents_NDF = self.latents(wave_NT)
        quantized = self.quantizer(latents_NDF)
        decoded_NT, pitch_NF = self._decoded(quantized.quantized_NDF)
        return CodecOutput(
            decoded_NT[:, : wave_NT.shape[1]],
            quantized.codes_NKF,
            latents_NDF,
            quantized.quantized_NDF,
            quantized.commit_loss,
            pitch_NF,
        )


def fused(codec: Codec) -> Codec:
    """A copy of the codec with plain weights in place of normalized ones: the same function, cheaper to run.

    Built anew, since torch's `remove_parametrizations` on a deep copy also breaks the original (they
    share a class). The copy is on the CPU, in evaluation mode, without gradients.
    """
    with torch.random.fork_rng(devices=[]):  # building draws random weights
        copy = Codec(dataclasses.replace(codec.config, norm="none"))
    modules = dict(codec.named_modules())
    weights = {
        # Read from the module: there a normalized weight is computed.
        name: getattr(modules[name.rpartition(".")[0]], name.rpartition(".")[2])
        for name in copy.state_dict()
    }
    copy.load_state_dict(weights)
    return copy.eval().requires_grad_(False)


def _convolutions(module: nn.Module) -> list[nn.Conv1d | nn.ConvTranspose1d]:
    return [part for part in module.modules() if isinstance(part, nn.Conv1d | nn.ConvTranspose1d)]


def _seanet_shape(config: CodecConfig) -> dict[str, Any]:
    """What `encodec`'s SEANet classes take."""
    return {
        "channels": 1,
        "dimension": config.dimension,
        "n_filters": config.num_filters,
        "n_residual_layers": config.num_residual_layers,
        "ratios": list(config.ratios),
        "norm": "none",  # the package's own weight_norm is deprecated in torch: build without, then parametrize
        "causal": config.causal,
        "lstm": config.lstm_layers,
        "pad_mode": "constant",  # reflection costs a fifth of a training step on the CPU
    }


def _initialize_convolutions(encoder: nn.Module, decoder: nn.Module) -> None:
    """Weights that keep a signal's variance through the layers, biases zero.

    torch's default shrinks it by 0.58 a layer: latents then hardly depend on the sound, and the first
    codebook collapses onto their common mean.
    """
    for module in [*_convolutions(encoder), *_convolutions(decoder)]:
        if isinstance(module, nn.Conv1d):
            fan_in = module.in_channels * module.kernel_size[0]
        else:
            fan_in = module.in_channels * module.kernel_size[0] / module.stride[0]
        nn.init.normal_(module.weight, std=_INIT_GAIN / math.sqrt(fan_in))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    with torch.no_grad():
        _convolutions(encoder)[0].weight.mul_(_INPUT_GAIN)
        _convolutions(decoder)[-1].weight.div_(_INPUT_GAIN)
