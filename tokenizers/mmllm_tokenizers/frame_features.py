"""What a codec's frames sound like, computed: spectrum, pitch, voicing and loudness.

Shapes: N clips, T samples, F frames, M mel bands, L lags, S samples of a frame's window.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm_tokenizers.spectrum import FrameSpectrum

NUM_VOICE_CHANNELS = 3
"""Pitch, voicing and loudness: the channels behind the bands."""


class FramePitch(nn.Module):
    """Fundamental frequency and voicing of each frame, from the normalized cross-correlation function.

    After Talkin, "A robust algorithm for pitch tracking (RAPT)", 1995. Differs: no search through time. Of the
    correlation's peaks the first is taken that reaches nearly the best one's height, since twice a period correlates
    as well as the period; a median over three frames removes the frames where that goes wrong.

    Args:
        sample_rate: samples a second; at least four times `MAX_HZ`.
        hop_samples: samples a frame.
    """

    MIN_HZ, MAX_HZ = 60.0, 500.0
    WINDOW_SECONDS = 0.04
    NEARLY = 0.08
    """Share of the best peak's height that an earlier one may lack."""
    FINER = 2
    """Lags a sample: the peak of a high voice lies between samples, and its height there decides."""
    LONG_LAG = 0.05
    """What the longest lag loses in height against the shortest."""
    UNVOICED, VOICED = 0.3, 0.7
    """Correlations from which voicing rises, and at which it is full."""
    QUIET = 1e-3
    """Root mean square below which a frame counts as silent, not voiced."""

    def __init__(self, sample_rate: int, hop_samples: int):
        super().__init__()
        self.sample_rate, self.hop_samples = sample_rate, hop_samples
        self.window = round(self.WINDOW_SECONDS * sample_rate)
        self.min_lag, self.max_lag = int(sample_rate / self.MAX_HZ), int(sample_rate / self.MIN_HZ) + 1
        if self.min_lag < 4:
            raise ValueError(
                f"sample_rate is {sample_rate}; pitch up to {self.MAX_HZ:g} Hz needs {4 * self.MAX_HZ:g} or more"
            )
        self.num_fft = 1 << (2 * self.window + self.max_lag).bit_length()

    @torch.no_grad()
    def forward(self, wave_NT: Tensor) -> tuple[Tensor, Tensor]:
        """The logarithm to base 2 of the frequency in Hz, and the voicing in [0, 1]; both [N, ceil(T / hop)]."""
        correlation_NFL = self._correlation(wave_NT.float())
        lags_L = torch.arange(correlation_NFL.shape[-1], device=wave_NT.device) / self.FINER
        height_NFL = correlation_NFL - self.LONG_LAG * lags_L / self.max_lag
        inner_NFL = correlation_NFL[..., 1:-1]
        is_peak_NFL = (inner_NFL >= correlation_NFL[..., :-2]) & (inner_NFL >= correlation_NFL[..., 2:])
        is_peak_NFL = is_peak_NFL & (lags_L[1:-1] >= self.min_lag)
        height_NFL = height_NFL[..., 1:-1].masked_fill(~is_peak_NFL, -2.0)
        best_NF1 = height_NFL.amax(dim=-1, keepdim=True)
        is_high_NFL = height_NFL >= best_NF1 - self.NEARLY * best_NF1.abs()
        lag_NF = is_high_NFL.float().argmax(dim=-1) + 1
        below_NF, peak_NF, above_NF = (
            correlation_NFL.gather(-1, (lag_NF + step)[..., None])[..., 0] for step in (-1, 0, 1)
        )
        # The top of the parabola through a peak and its neighbours lies between the samples.
        offset_NF = 0.5 * (below_NF - above_NF) / (below_NF - 2 * peak_NF + above_NF - 1e-6)
        pitch_NF = torch.log2(self.FINER * self.sample_rate / (lag_NF + offset_NF.clamp(-0.5, 0.5)))
        voicing_NF = ((peak_NF - self.UNVOICED) / (self.VOICED - self.UNVOICED)).clamp(0, 1)
        return _median_of_three(pitch_NF), voicing_NF

    def _correlation(self, wave_NT: Tensor) -> Tensor:
        """[N, F, FINER * (max_lag + 1) + 1]: of the window around a frame's centre with that a lag later."""
        length = self.window + self.max_lag + 1
        frames_NFS = _frames(wave_NT, length, self.hop_samples)
        frames_NFS = frames_NFS - frames_NFS.mean(dim=-1, keepdim=True)
        first, both = (torch.fft.rfft(x, self.num_fft) for x in (frames_NFS[..., : self.window], frames_NFS))
        # A transform back to more points interpolates between lags without error: sound has no faster waves.
        product_NFW = first.conj() * both
        product_NFW[..., -1] /= 2  # the highest frequency is shared with its negative
        product_NFL = self.FINER * torch.fft.irfft(product_NFW, self.FINER * self.num_fft)
        product_NFL = product_NFL[..., : self.FINER * (self.max_lag + 1) + 1]
        sums_NFS = F.pad(frames_NFS.square().cumsum(dim=-1), (1, 0))
        energy_NFL = (sums_NFS[..., self.window :] - sums_NFS[..., : -self.window]).clamp(min=0)
        energy_NFL = F.interpolate(energy_NFL, size=product_NFL.shape[-1], mode="linear", align_corners=True)
        return product_NFL / ((energy_NFL[..., :1] * energy_NFL).sqrt() + self.window * self.QUIET**2)


class FrameLoudness(nn.Module):
    """Natural logarithm of each frame's root mean square, its window (twice the hop, Hann) centred on it."""

    FLOOR = 1e-4

    def __init__(self, hop_samples: int):
        super().__init__()
        self.hop_samples = hop_samples
        weights_S = torch.hann_window(2 * hop_samples).square()
        self.register_buffer("weights_S", weights_S / weights_S.sum(), persistent=False)

    def forward(self, wave_NT: Tensor) -> Tensor:
        """[N, ceil(T / hop)]."""
        frames_NFS = _frames(wave_NT.float(), 2 * self.hop_samples, self.hop_samples)
        return 0.5 * (frames_NFS.square() @ self.get_buffer("weights_S") + self.FLOOR**2).log()


class FrameFeatures(nn.Module):
    """All that the source-filter decoder speaks from, as a codec's latents: M bands, then pitch, voicing, loudness.

    Pitch is multiplied with voicing, so that frames without any agree. The scales decide how much of a code's
    distance each channel is worth: at these, 4 codebooks of 256 keep pitch within half a semitone, and a clip's level
    within half a decibel, while the bands lose 2% against codebooks of bands alone.

    Args:
        sample_rate: samples a second.
        hop_samples: samples a frame.
        num_mels: M.
    """

    PITCH_MEAN, PITCH_SCALE = math.log2(147.0), 4.0
    """Octaves (log2 Hz) in the middle of voices; units an octave."""
    LOUDNESS_MEAN, LOUDNESS_SCALE = -4.0, 2.0
    """Natural logarithm of the root mean square; units for a factor of e."""

    def __init__(self, sample_rate: int, hop_samples: int, num_mels: int):
        super().__init__()
        self.num_mels = num_mels
        self.spectrum = FrameSpectrum(sample_rate, hop_samples, num_mels)
        self.pitch = FramePitch(sample_rate, hop_samples)
        self.loudness = FrameLoudness(hop_samples)

    @torch.no_grad()
    def forward(self, wave_NT: Tensor) -> Tensor:
        """[N, M + 3, ceil(T / hop)]."""
        pitch_NF, voicing_NF = self.pitch(wave_NT)
        pitch_NF = voicing_NF * (pitch_NF - self.PITCH_MEAN) * self.PITCH_SCALE
        loudness_NF = (self.loudness(wave_NT) - self.LOUDNESS_MEAN) * self.LOUDNESS_SCALE
        voice_NCF = torch.stack([pitch_NF, voicing_NF, loudness_NF], dim=1)
        return torch.cat([self.spectrum(wave_NT), voice_NCF], dim=1)


def _frames(wave_NT: Tensor, window: int, hop: int) -> Tensor:
    """Windows [N, ceil(T / hop), window], each centred on its frame; zeros lie around the wave."""
    missing = -wave_NT.shape[1] % hop
    side = (window - hop) // 2
    left, right = max(side, 0), max(window - hop - side, 0)
    padded_NT = F.pad(wave_NT, (left, missing + right))
    return padded_NT[:, left - side :].unfold(1, window, hop)


def _median_of_three(x_NF: Tensor) -> Tensor:
    padded_NF = F.pad(x_NF[:, None], (1, 1), mode="replicate")[:, 0]
    return padded_NF.unfold(1, 3, 1).median(dim=-1).values
