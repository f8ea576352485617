"""Losses of the codec: spectra at several scales, level, and how losses are balanced.

Shapes: N clips, T samples, F frames, M mel bands, W bins of a spectrum.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmllm_tokenizers.spectrum import mel_filters


class MultiScaleMelLoss(nn.Module):
    """L1 of mel spectrograms plus L2 of their logarithms, over windows of 2^5 … 2^11 samples.

    After EnCodec (Défossez et al. 2022, https://arxiv.org/abs/2210.13438, section 3.4). Differs: windows longer
    than about a quarter of a second are left out (8 kHz speech), fewer bands on short windows, both terms weigh
    the same at every scale.
    """

    def __init__(self, sample_rate: int, num_mels: int = 64, min_window: int = 64, max_window: int | None = None):
        super().__init__()
        longest = 2 ** int(math.log2(sample_rate / 8)) if max_window is None else max_window
        if longest < min_window:
            raise ValueError(f"max_window is {longest} samples; it must be at least min_window, {min_window}")
        self.windows = [2**i for i in range(int(math.log2(min_window)), int(math.log2(longest)) + 1)]
        for window in self.windows:
            filters_MW = mel_filters(sample_rate, window, min(num_mels, window // 8))
            self.register_buffer(f"filters_{window}", filters_MW, persistent=False)
            self.register_buffer(f"hann_{window}", torch.hann_window(window), persistent=False)

    def forward(self, wave_NT: Tensor, target_NT: Tensor) -> Tensor:
        """Mean over scales; zero for equal waves. Both [N, T], T at least half the longest window."""
        both_2NT = torch.cat([wave_NT, target_NT]).float()
        total = both_2NT.new_zeros(())
        for window in self.windows:
            mel, target_mel = self._mel(both_2NT, window).chunk(2)
            log_mel, target_log_mel = (m.clamp(min=1e-5).log() for m in (mel, target_mel))
            distance = log_mel - target_log_mel
            # a norm has a gradient where silence stays silence; the root of a mean has none
            total = total + (mel - target_mel).abs().mean() + distance.norm() / distance.numel() ** 0.5
        return total / len(self.windows)

    def _mel(self, wave_NT: Tensor, window: int) -> Tensor:
        hann = self.get_buffer(f"hann_{window}")
        spectrum_NWF = torch.stft(wave_NT, window, window // 4, window=hann, normalized=True, return_complex=True)
        magnitude_NWF = (spectrum_NWF.real.square() + spectrum_NWF.imag.square() + 1e-9).sqrt()
        return self.get_buffer(f"filters_{window}") @ magnitude_NWF


class LogSpectrumLoss(nn.Module):
    """L1 of log magnitudes, in mel bands and in single bins, over windows of 16, 32 and 64 milliseconds or so.

    The log-magnitude part of Parallel WaveGAN's loss (https://arxiv.org/abs/1910.11480); its spectral convergence did
    not help here (docs/RESULTS.md). Differs in the bands, and in no window being shorter than a period of a voice.
    """

    MEL_FLOOR, BIN_FLOOR = 1e-3, 1e-5
    """Added to a band's magnitude; to a bin's power, for a window of 64 samples."""

    def __init__(self, sample_rate: int, max_mels: int = 64):
        super().__init__()
        shortest = 2 ** round(math.log2(0.016 * sample_rate))
        self.windows = [shortest, 2 * shortest, 4 * shortest]
        for window in self.windows:
            filters_MW = mel_filters(sample_rate, window, max(1, min(max_mels, window // 8)))
            self.register_buffer(f"filters_{window}", filters_MW, persistent=False)
            self.register_buffer(f"hann_{window}", torch.hann_window(window), persistent=False)

    def forward(self, wave_NT: Tensor, target_NT: Tensor) -> tuple[Tensor, Tensor]:
        """The bands' part and the bins', means over scales. Both waves [N, T], T at least half the longest window."""
        both_2NT = torch.cat([wave_NT, target_NT]).float()
        bands, bins = [], []
        for window in self.windows:
            hann = self.get_buffer(f"hann_{window}")
            spectrum_NWF = torch.stft(both_2NT, window, window // 4, window=hann, return_complex=True)
            power_NWF = spectrum_NWF.real.square() + spectrum_NWF.imag.square() + self.BIN_FLOOR * window / 64
            bins.append(_distance(power_NWF.log() / 2))
            bands.append(_distance((self.get_buffer(f"filters_{window}") @ power_NWF.sqrt() + self.MEL_FLOOR).log()))
        return torch.stack(bands).mean(), torch.stack(bins).mean()


def level_loss(wave_NT: Tensor, target_NT: Tensor) -> Tensor:
    """Mean over clips of the distance between the logarithms of their mean squares.

    Spectra's distances leave the level free: the median of a logarithm, which an L1 loss finds, is quieter than the
    mean power, and of a wave whose phase it cannot know, an L1 loss finds silence.
    """
    log_power, log_target = ((x_NT.float().square().mean(dim=1) + 1e-6).log() for x_NT in (wave_NT, target_NT))
    return (log_power - log_target).abs().mean()


def _distance(both_2NWF: Tensor) -> Tensor:
    ours, target = both_2NWF.chunk(2)
    return (ours - target).abs().mean()


class Balancer(nn.Module):
    """Gives every loss a fixed share of the gradient that reaches the output wave, whatever its scale.

    EnCodec's loss balancer (section 3.4 there): loss i's gradient g_i is scaled to wᵢ / Σw ÷ mean(‖gᵢ‖), the mean
    being exponential. The means are buffers, so that a resumed run goes on as if it had not stopped.
    """

    norm_sums: Tensor
    num_averaged: Tensor

    def __init__(self, weights: dict[str, float], decay: float = 0.999):
        super().__init__()
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        self.decay = decay
        self.register_buffer("norm_sums", torch.zeros(len(self.weights)))
        self.register_buffer("num_averaged", torch.zeros(()))

    def forward(self, losses: dict[str, Tensor], output: Tensor) -> Tensor:
        """A surrogate whose gradient with respect to `output` is the balanced one; its value means nothing.

        Args:
            losses: scalars that depend on `output`; all that have a weight.
            output: of the network, with its graph.
        """
        grads = [torch.autograd.grad(losses[name], output, retain_graph=True)[0] for name in self.weights]
        norms = torch.stack([grad.flatten(1).norm(dim=1).mean() for grad in grads])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(norms)
            norms /= dist.get_world_size()
        if self.training:
            self.norm_sums.mul_(self.decay).add_(norms)
            self.num_averaged.mul_(self.decay).add_(1.0)
        means = self.norm_sums / self.num_averaged.clamp(min=1e-8)
        total_weight = sum(self.weights.values())
        balanced = torch.zeros_like(output)
        for (_, weight), grad, mean in zip(self.weights.items(), grads, means, strict=True):
            balanced += grad * (weight / total_weight / (mean + 1e-12))
        return (output * balanced.detach()).sum()
