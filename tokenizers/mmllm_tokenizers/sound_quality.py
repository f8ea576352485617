"""How near a decoded sound is to the recording: its level, and the spectrum of what is spoken.

Shapes: N clips, T samples, F frames, M mel bands.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm_tokenizers.spectrum import mel_filters

NUM_BANDS = 40
WINDOW_SECONDS, HOP_SECONDS = 0.032, 0.01
VOICED_DB = 30.0
"""A frame counts whose power is no more than this below that of the clip's loudest: there speech is understood."""
RANGE_DB = 60.0
"""Bands are raised to this below the loudest band of all: nobody hears what lies below."""
_FLOOR = 1e-5
"""Of a root mean square, 100 dB below full scale: silence has a level too."""


def level_db(wave_NT: Tensor, target_NT: Tensor) -> Tensor:
    """By how much a wave is louder than its target: the ratio of their root mean squares, dB [N].

    Args:
        wave_NT: decoded, [N, T] or [T].
        target_NT: the recording, as long.

    Raises:
        ValueError: the shapes differ, or there is no sample.
    """
    wave_NT, target_NT = _clips(wave_NT, target_NT)
    level_N, target_N = (x_NT.square().mean(dim=1).sqrt().clamp(min=_FLOOR) for x_NT in (wave_NT, target_NT))
    return 20 * torch.log10(level_N / target_N)


def mel_error(wave_NT: Tensor, target_NT: Tensor, sample_rate: int) -> Tensor:
    """Mean distance of log-mel spectra, dB [N], over the bands of the target's voiced frames.

    Frames of 32 ms every 10 ms and 40 bands up to half the sample rate; a frame is voiced within 30 dB of the target's
    loudest. Level counts: a sound that is 12 dB too quiet in all bands has an error of 12 dB.

    Args:
        wave_NT: decoded, [N, T] or [T].
        target_NT: the recording, as long.
        sample_rate: of both, samples a second.

    Raises:
        ValueError: the shapes differ, or there is no sample.
    """
    wave_NT, target_NT = _clips(wave_NT, target_NT)
    window = round(WINDOW_SECONDS * sample_rate)
    filters_MW = mel_filters(sample_rate, window, NUM_BANDS).to(wave_NT.device)
    mel_NMF, target_NMF = (
        _mel(x_NT, window, round(HOP_SECONDS * sample_rate), filters_MW) for x_NT in (wave_NT, target_NT)
    )
    power_NF = target_NMF.square().sum(dim=1)
    is_voiced_NF = 10 * torch.log10(power_NF) >= 10 * torch.log10(power_NF.amax(dim=1, keepdim=True)) - VOICED_DB
    floor_N11 = target_NMF.amax(dim=(1, 2), keepdim=True) * 10 ** (-RANGE_DB / 20)
    decibels_NMF, wanted_NMF = (20 * torch.log10(torch.maximum(x_NMF, floor_N11)) for x_NMF in (mel_NMF, target_NMF))
    error_NF = (decibels_NMF - wanted_NMF).abs().mean(dim=1)
    return (error_NF * is_voiced_NF).sum(dim=1) / is_voiced_NF.sum(dim=1)


def _mel(wave_NT: Tensor, window: int, hop: int, filters_MW: Tensor) -> Tensor:
    """[N, M, F] magnitudes in bands, frames centred on every `hop` samples; never 0."""
    hann = torch.hann_window(window, device=wave_NT.device)
    padded_NT = F.pad(wave_NT, (window // 2, window // 2 + window % 2))
    spectrum_NWF = torch.stft(padded_NT, window, hop, window=hann, center=False, return_complex=True)
    return (filters_MW @ spectrum_NWF.abs()).clamp(min=_FLOOR)


def _clips(wave: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if wave.shape != target.shape or wave.dim() not in (1, 2) or wave.shape[-1] < 1:
        raise ValueError(
            f"wave has shape {list(wave.shape)} and target {list(target.shape)}; both must be [samples] or [clips, "
            f"samples], the same, not empty: cut a decoded sound to its recording's length"
        )
    return torch.atleast_2d(wave.float()), torch.atleast_2d(target.float())
