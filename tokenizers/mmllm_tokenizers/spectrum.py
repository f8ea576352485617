"""Spectra of sound in a codec's frames.

Shapes: N clips, T samples, F frames, M mel bands, W bins of a spectrum.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mel_filters(sample_rate: int, num_fft: int, num_mels: int) -> Tensor:
    """Triangular filters on the HTK mel scale, float32 [num_mels, num_fft // 2 + 1].

    Bands narrower than a bin of the spectrum would be empty: each gets at least its nearest bin.
    """
    hz_W = torch.linspace(0, sample_rate / 2, num_fft // 2 + 1, dtype=torch.float64)
    top_mel = 2595 * math.log10(1 + sample_rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top_mel, num_mels + 2, dtype=torch.float64) / 2595) - 1)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    filters_MW = torch.minimum((hz_W - low) / (centre - low), (high - hz_W) / (high - centre)).clamp(min=0)
    nearest = (hz_W[None] - centre).abs().argmin(dim=1, keepdim=True)
    empty = filters_MW.sum(dim=1, keepdim=True) == 0
    return torch.where(empty, torch.zeros_like(filters_MW).scatter(1, nearest, 1.0), filters_MW).float()


class FrameSpectrum(nn.Module):
    """The log-mel spectrum of each of a codec's frames, scaled to about unit variance over speech.

    Args:
        sample_rate: samples a second.
        hop_samples: samples a frame; a frame's window of twice that is centred on it.
        num_mels: M, bands.
    """

    FLOOR, MEAN, STD = 1e-3, -2.0, 2.0
    DECIBELS = 20 * STD / math.log(10)
    """One unit of the scaled spectrum."""

    def __init__(self, sample_rate: int, hop_samples: int, num_mels: int):
        super().__init__()
        self.hop_samples = hop_samples
        self.window = 2 * hop_samples
        self.num_fft = 1 << (self.window - 1).bit_length()
        self.register_buffer("filters_MW", mel_filters(sample_rate, self.num_fft, num_mels), persistent=False)
        self.register_buffer("hann", torch.hann_window(self.window), persistent=False)

    @torch.no_grad()
    def forward(self, wave_NT: Tensor) -> Tensor:
        """[N, M, ceil(T / hop)]."""
        missing = -wave_NT.shape[1] % self.hop_samples
        side = (self.num_fft - self.hop_samples) // 2
        padded_NT = F.pad(wave_NT.float(), (side, missing + self.num_fft - self.hop_samples - side))
        spectrum_NWF = torch.stft(
            padded_NT, self.num_fft, self.hop_samples, self.window, self.get_buffer("hann"), center=False,
            return_complex=True,
        )  # fmt: skip
        mel_NMF = self.get_buffer("filters_MW") @ spectrum_NWF.abs()
        return ((mel_NMF + self.FLOOR).log() - self.MEAN) / self.STD
