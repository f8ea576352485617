"""A small neural audio codec that can be trained: SEANet around a residual vector quantizer.

Encoder and decoder are the `encodec` package's. The quantizer is ours, because the package's leaves the
commitment losses of all codebooks but the first without gradient (its own warning: encodec issue 25).

Shapes: N clips, T samples, F frames, K codebooks, V codes a codebook, D latent width, R vectors (N * F).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from encodec.modules import SEANetDecoder, SEANetEncoder
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from mmllm_kernels import nearest_code
from mmllm_tokenizers.kmeans import kmeans
from mmllm_tokenizers.spectrum import FrameSpectrum

_INIT_GAIN = 1.1
"""Makes up for what ELU takes off a signal's variance."""
_INPUT_GAIN = 8.0
"""Brings speech (root mean square about 0.1) to unit variance at the first layer, and back at the last."""


@dataclass(frozen=True)
class CodecConfig:
    """Shape of a codec, and how its codebooks learn.

    A cheap codec has its large ratios last: the encoder strides by the last ratio first, and the layers
    before that stride run at the full sample rate.
    """

    sample_rate: int = 8000
    """Samples a second."""
    num_filters: int = 16
    """Channels at the full rate; each ratio doubles them."""
    ratios: tuple[int, ...] = (2, 4, 4, 5)
    """The decoder's upsampling; the product is the hop, in samples a frame."""
    dimension: int = 64
    """D, the width of latents and codebooks."""
    num_bands: int = 0
    """So many of the latents' channels, the first, are the frame's log-mel spectrum; the encoder learns the others.
    Codes then say what was heard in a form that a few sounds suffice to learn from, and an encoder that has seen
    few voices does not decide what is kept of a new one. 0: the encoder learns all, as EnCodec's does."""
    num_codebooks: int = 4
    """K."""
    codebook_size: int = 512
    """V."""
    num_residual_layers: int = 1
    lstm_layers: int = 0
    causal: bool = False
    norm: str = "weight_norm"
    """"weight_norm", or "none" (a trained codec whose weights were fused for inference)."""
    decay: float = 0.99
    """Of the moving averages that are the codebooks."""
    dead_code_batches: int = 20
    """A code that so many training batches left unused is replaced by a vector of the batch."""
    warmup_batches: int = 50
    """Training batches that pass unquantized, before k-means sets up the codebooks."""
    quantizer_dropout: float = 0.5
    """Share of training clips that are decoded from a random number of codebooks."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", tuple(int(ratio) for ratio in self.ratios))
        for name in (
            "sample_rate", "num_filters", "dimension", "num_codebooks", "codebook_size", "dead_code_batches",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("num_residual_layers", "lstm_layers", "warmup_batches"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if not self.ratios or min(self.ratios) < 2:
            raise ValueError(f"ratios are {self.ratios}; give at least one, each 2 or more")
        if not 0 <= self.num_bands < self.dimension:
            raise ValueError(
                f"num_bands is {self.num_bands}; it must lie in [0, {self.dimension - 1}], below dimension"
            )
        if self.num_bands and self.causal:
            raise ValueError("num_bands needs causal: false; a frame's spectrum reaches into its neighbours")
        if self.norm not in ("weight_norm", "none"):
            raise ValueError(f"norm is {self.norm!r}; it must be 'weight_norm' or 'none'")
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"decay is {self.decay}; it must lie in [0, 1)")
        if not 0.0 <= self.quantizer_dropout <= 1.0:
            raise ValueError(f"quantizer_dropout is {self.quantizer_dropout}; it must lie in [0, 1]")

    @property
    def hop_samples(self) -> int:
        """Samples a frame."""
        return math.prod(self.ratios)


@dataclass
class QuantizerOutput:
    """What `ResidualQuantizer.forward` gives."""

    quantized_NDF: Tensor
    """The sum of the chosen codes; its gradient with respect to the latents is the identity."""
    codes_NKF: Tensor
    commit_loss: Tensor
    """Scalar: mean squared distance of each residual from its code, averaged over the codebooks in use."""


class ResidualQuantizer(nn.Module):
    """Residual vector quantization: each codebook quantizes what the ones before it left over.

    Codebooks are moving averages of the vectors assigned to them; they begin as k-means centroids of
    the first training batch; codes that fall out of use are replaced. Under torch.distributed the
    statistics of all ranks are summed and rank 0's random choices are used, so that codebooks stay equal.

    Source: SoundStream (https://arxiv.org/abs/2107.03312) and EnCodec (https://arxiv.org/abs/2210.13438).
    Differs from the `encodec` package in the straight-through estimator, which is applied once, to the sum
    (quantized residuals are detached), and in dead codes, whose averages are reset with them.
    """

    codebooks: Tensor
    counts: Tensor
    sums: Tensor
    idle: Tensor
    num_batches: Tensor

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        shape = (config.num_codebooks, config.codebook_size, config.dimension)
        # Random until the first training batch, so that an untrained codec works, if badly.
        codebooks_KVD = torch.randn(shape) * (0.5 ** torch.arange(config.num_codebooks))[:, None, None]
        self.register_buffer("codebooks", codebooks_KVD)
        self.register_buffer("counts", torch.ones(shape[:2]))
        self.register_buffer("sums", codebooks_KVD.clone())
        self.register_buffer("idle", torch.zeros(shape[:2], dtype=torch.int64))
        self.register_buffer("num_batches", torch.tensor(0))

    def forward(self, latents_NDF: Tensor) -> QuantizerOutput:
        """Quantizes; in training mode also updates the codebooks.

        Args:
            latents_NDF: the encoder's output.
        """
        num_clips, dimension, num_frames = latents_NDF.shape
        if self.training:
            num_batches = int(self.num_batches)
            self.num_batches += 1
            if num_batches < self.config.warmup_batches:
                codes_NKF = latents_NDF.new_zeros(num_clips, self.config.num_codebooks, num_frames, dtype=torch.int64)
                return QuantizerOutput(latents_NDF, codes_NKF, 0.0 * latents_NDF.mean())
            if num_batches == self.config.warmup_batches:
                self._initialize(_vectors(latents_NDF).detach())
        active_NK = self._active_codebooks(num_clips, latents_NDF.device)
        quantized_NDF = torch.zeros_like(latents_NDF)
        codes, losses = [], []
        residual_NDF = latents_NDF
        for codebook in range(self.config.num_codebooks):
            vectors_RD = _vectors(residual_NDF).detach()
            codes_R = nearest_code(vectors_RD, self.codebooks[codebook])
            chosen_RD = self.codebooks[codebook][codes_R]
            if self.training:
                self._update(codebook, vectors_RD, codes_R)
            chosen_NDF = chosen_RD.view(num_clips, num_frames, dimension).transpose(1, 2)
            active_N11 = active_NK[:, codebook, None, None]
            losses.append(((residual_NDF - chosen_NDF).square() * active_N11).mean())
            quantized_NDF = quantized_NDF + chosen_NDF * active_N11
            # `chosen` is a constant here: the next commitment loss still reaches the encoder through the residual.
            residual_NDF = residual_NDF - chosen_NDF
            codes.append(codes_R.view(num_clips, num_frames))
        straight_through_NDF = latents_NDF + (quantized_NDF - latents_NDF).detach()
        commit_loss = torch.stack(losses).sum() * (num_clips / active_NK.sum())
        return QuantizerOutput(straight_through_NDF, torch.stack(codes, dim=1), commit_loss)

    @torch.no_grad()
    def encode(self, latents_NDF: Tensor) -> Tensor:
        """Codes [N, K, F] of latents."""
        num_clips, _, num_frames = latents_NDF.shape
        residual_RD = _vectors(latents_NDF)
        codes = []
        for codebook_VD in self.codebooks:
            codes_R = nearest_code(residual_RD, codebook_VD)
            residual_RD = residual_RD - codebook_VD[codes_R]
            codes.append(codes_R.view(num_clips, num_frames))
        return torch.stack(codes, dim=1)

    def decode(self, codes_NKF: Tensor) -> Tensor:
        """Latents [N, D, F] of codes, of all codebooks or of the first few."""
        quantized_NFD = self.codebooks[0][codes_NKF[:, 0]]
        for codebook in range(1, codes_NKF.shape[1]):
            quantized_NFD = quantized_NFD + self.codebooks[codebook][codes_NKF[:, codebook]]
        return quantized_NFD.transpose(1, 2)

    def _active_codebooks(self, num_clips: int, device: torch.device) -> Tensor:
        """Float [N, K]: 1 where a clip uses a codebook; in training some clips use the first few alone."""
        num_codebooks = self.config.num_codebooks
        active_NK = torch.ones(num_clips, num_codebooks, device=device)
        if not self.training or num_codebooks == 1 or self.config.quantizer_dropout == 0.0:
            return active_NK
        dropped_N = torch.rand(num_clips, device=device) < self.config.quantizer_dropout
        num_kept_N = torch.randint(1, num_codebooks + 1, (num_clips,), device=device)
        kept_NK = torch.arange(num_codebooks, device=device)[None] < num_kept_N[:, None]
        return torch.where(dropped_N[:, None], kept_NK.float(), active_NK)

    @torch.no_grad()
    def _initialize(self, vectors_RD: Tensor) -> None:
        residual_RD = vectors_RD.float()
        for codebook in range(self.config.num_codebooks):
            centroids_VD, counts_V = kmeans(residual_RD, self.config.codebook_size, num_iterations=10, seed=codebook)
            _broadcast(centroids_VD)
            _broadcast(counts_V)
            counts_V = counts_V.float().clamp(min=1.0)
            self.codebooks[codebook] = centroids_VD
            self.counts[codebook] = counts_V
            self.sums[codebook] = centroids_VD * counts_V[:, None]
            residual_RD = residual_RD - centroids_VD[nearest_code(residual_RD, centroids_VD)]

    @torch.no_grad()
    def _update(self, codebook: int, vectors_RD: Tensor, codes_R: Tensor) -> None:
        """Moves one codebook's averages towards the batch, then replaces dead codes."""
        size, decay = self.config.codebook_size, self.config.decay
        vectors_RD = vectors_RD.float()
        counts_V = torch.bincount(codes_R, minlength=size).float()
        sums_VD = torch.zeros_like(self.sums[codebook]).index_add_(0, codes_R, vectors_RD)
        if _is_distributed():
            distributed.all_reduce(counts_V)
            distributed.all_reduce(sums_VD)
        self.counts[codebook].mul_(decay).add_(counts_V, alpha=1.0 - decay)
        self.sums[codebook].mul_(decay).add_(sums_VD, alpha=1.0 - decay)
        self.idle[codebook] = torch.where(counts_V > 0, 0, self.idle[codebook] + 1)
        dead_V = self.idle[codebook] >= self.config.dead_code_batches
        if bool(dead_V.any()):
            fresh_VD = vectors_RD[torch.randint(len(vectors_RD), (size,), device=vectors_RD.device)]
            _broadcast(fresh_VD)
            mean_count = self.counts[codebook].mean()
            self.counts[codebook] = torch.where(dead_V, mean_count, self.counts[codebook])
            self.sums[codebook] = torch.where(dead_V[:, None], fresh_VD * mean_count, self.sums[codebook])
            self.idle[codebook].masked_fill_(dead_V, 0)
        self.codebooks[codebook] = self.sums[codebook] / self.counts[codebook][:, None].clamp(min=1e-5)


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


class Codec(nn.Module):
    """A codec: wave -> K codes a frame -> wave.

    Source: EnCodec (https://arxiv.org/abs/2210.13438); SEANet modules from the `encodec` package.

    Args:
        config: its shape.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        # The package's own weight_norm is deprecated in torch: build without, then parametrize.
        shape: dict[str, Any] = {
            "channels": 1,
            "dimension": config.dimension,
            "n_filters": config.num_filters,
            "n_residual_layers": config.num_residual_layers,
            "ratios": list(config.ratios),
            "norm": "none",
            "causal": config.causal,
            "lstm": config.lstm_layers,
            "pad_mode": "constant",  # reflection costs a fifth of a training step on the CPU
        }
        self.encoder = SEANetEncoder(**{**shape, "dimension": config.dimension - config.num_bands})
        self.spectrum = None
        if config.num_bands:
            self.spectrum = FrameSpectrum(config.sample_rate, config.hop_samples, config.num_bands)
        self.decoder = SEANetDecoder(**shape)
        self.quantizer = ResidualQuantizer(config)
        _initialize_convolutions(self)
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

    def num_frames(self, num_samples: int) -> int:
        """Frames of a clip: its samples divided by the hop, rounded up."""
        return -(-num_samples // self.config.hop_samples)

    def latents(self, wave_NT: Tensor) -> Tensor:
        """[N, D, F] before quantization: the spectrum's bands, if any, then the encoder's; zeros fill the last frame.

        Raises:
            ValueError: the wave is not [N, T] with T >= 1.
        """
        if wave_NT.dim() != 2 or wave_NT.shape[1] < 1:
            raise ValueError(f"wave has shape {list(wave_NT.shape)}; it must be [clips, samples], 1 sample or more")
        num_frames = self.num_frames(wave_NT.shape[1])
        missing = num_frames * self.config.hop_samples - wave_NT.shape[1]
        wave_NT = F.pad(wave_NT, (0, missing))
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
        return self.decoder(self.quantizer.decode(codes_NKF.long()))[:, 0]

    def forward(self, wave_NT: Tensor) -> CodecOutput:
        """Encodes, quantizes (learning, in training mode) and decodes."""
        latents_NDF = self.latents(wave_NT)
        quantized = self.quantizer(latents_NDF)
        decoded_NT = self.decoder(quantized.quantized_NDF)[:, 0, : wave_NT.shape[1]]
        return CodecOutput(decoded_NT, quantized.codes_NKF, latents_NDF, quantized.quantized_NDF, quantized.commit_loss)


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


def _initialize_convolutions(codec: Codec) -> None:
    """Weights that keep a signal's variance through the layers, biases zero.

    torch's default shrinks it by 0.58 a layer: latents then hardly depend on the sound, and the first
    codebook collapses onto their common mean.
    """
    for module in _convolutions(codec):
        if isinstance(module, nn.Conv1d):
            fan_in = module.in_channels * module.kernel_size[0]
        else:
            fan_in = module.in_channels * module.kernel_size[0] / module.stride[0]
        nn.init.normal_(module.weight, std=_INIT_GAIN / math.sqrt(fan_in))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    with torch.no_grad():
        _convolutions(codec.encoder)[0].weight.mul_(_INPUT_GAIN)
        _convolutions(codec.decoder)[-1].weight.div_(_INPUT_GAIN)


def _vectors(latents_NDF: Tensor) -> Tensor:
    """[N, D, F] as vectors [N * F, D]."""
    return latents_NDF.transpose(1, 2).reshape(-1, latents_NDF.shape[1])


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _broadcast(tensor: Tensor) -> None:
    """Rank 0's value on every rank."""
    if _is_distributed():
        distributed.broadcast(tensor, src=0)
