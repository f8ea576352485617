from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmllm_tokenizers.sound_quality import level_db, mel_error
from mmllm_tokenizers.spectrum import mel_filters


def waves(num_clips: int, num_samples: int, seed: int = 0) -> Tensor:
    """Noise that grows and fades, so that some frames are quiet."""
    noise_NT = torch.randn(num_clips, num_samples, generator=torch.Generator().manual_seed(seed))
    return 0.1 * noise_NT * torch.linspace(-7, 7, num_samples).square().neg().div(8).exp()


def slow_mel_error(wave_T: Tensor, target_T: Tensor, rate: int) -> float:
    """Frame by frame, by the discrete Fourier transform's definition."""
    window, hop = round(0.032 * rate), round(0.01 * rate)
    filters_MW = mel_filters(rate, window, 40).double()
    sample_S = torch.arange(window, dtype=torch.float64)
    hann_S = 0.5 - 0.5 * torch.cos(2 * math.pi * sample_S / window)
    waves_WS = torch.exp(-2j * math.pi / window * torch.arange(window // 2 + 1)[:, None] * sample_S)

    def bands(x_T: Tensor) -> Tensor:
        frames = []
        for centre in range(0, len(x_T) + 1, hop):
            places = range(centre - window // 2, centre - window // 2 + window)
            frame_S = torch.tensor([float(x_T[i]) if 0 <= i < len(x_T) else 0.0 for i in places], dtype=torch.float64)
            frames.append(filters_MW @ (waves_WS @ (frame_S * hann_S).to(waves_WS)).abs())
        return torch.stack(frames).clamp(min=1e-5)

    ours_FM, target_FM = bands(wave_T), bands(target_T)
    floor = float(target_FM.max()) / 1000
    loudest = float(target_FM.square().sum(dim=1).max())
    errors = []
    for ours_M, target_M in zip(ours_FM, target_FM, strict=True):
        if 10 * math.log10(float(target_M.square().sum()) / loudest) >= -30:
            pairs = zip(ours_M.tolist(), target_M.tolist(), strict=True)
            errors += [abs(20 * math.log10(max(a, floor) / max(b, floor))) for a, b in pairs]
    return sum(errors) / len(errors)


@pytest.mark.parametrize(("rate", "num_samples"), [(8000, 1600), (8000, 81), (11025, 603)])
def test_mel_error_equals_its_definition(rate: int, num_samples: int) -> None:
    target_NT, wave_NT = waves(2, num_samples), waves(2, num_samples, seed=1)
    found_N = mel_error(wave_NT, target_NT, rate)
    for clip in range(2):
        wanted = slow_mel_error(wave_NT[clip], target_NT[clip], rate)
        assert float(found_N[clip]) == pytest.approx(wanted, rel=1e-3)
        assert float(mel_error(wave_NT[clip], target_NT[clip], rate)) == pytest.approx(wanted, rel=1e-3)


def test_a_gain_is_the_level_and_the_error() -> None:
    target_NT = waves(3, 4000)
    for gain in (0.25, 1.0, 4.0):
        decibels = 20 * math.log10(gain)
        torch.testing.assert_close(level_db(gain * target_NT, target_NT), torch.full((3,), decibels), atol=1e-4, rtol=0)
        error_N = mel_error(gain * target_NT, target_NT, 8000)
        assert float((error_N - abs(decibels)).abs().max()) < 0.05 * abs(decibels) + 1e-5  # the floor hides some


def test_what_is_quiet_in_the_recording_does_not_count() -> None:
    target_T = waves(1, 8000)[0]
    target_T[6000:] *= 1e-4
    wave_T = target_T.clone()
    wave_T[6500:] = 1e-3 * waves(1, 1500)[0]
    assert float(mel_error(wave_T, target_T, 8000)) < 1e-3


def test_what_nobody_hears_beside_louder_bands_does_not_count() -> None:
    tone_NT = 0.3 * (2 * math.pi * 500 / 8000 * torch.arange(8000)).sin()[None] * torch.hann_window(8000)
    faint_NT = waves(1, 8000)
    assert float(mel_error(tone_NT + 1e-4 * faint_NT, tone_NT, 8000)) < 0.05
    assert float(mel_error(tone_NT + 1e-1 * faint_NT, tone_NT, 8000)) > 3
    wave_NT, target_NT = tone_NT + 1e-2 * faint_NT, tone_NT + 1e-3 * faint_NT  # 20 dB apart, half of them 60 dB down
    assert float(mel_error(wave_NT, target_NT, 8000)) == pytest.approx(
        slow_mel_error(wave_NT[0], target_NT[0], 8000), rel=1e-3
    )


def test_silence_has_a_number() -> None:
    silence_NT, wave_NT = torch.zeros(1, 2000), waves(1, 2000)
    assert float(level_db(silence_NT, silence_NT)) == 0 and float(mel_error(silence_NT, silence_NT, 8000)) == 0
    assert float(level_db(silence_NT, wave_NT)) < -60 and float(mel_error(silence_NT, wave_NT, 8000)) > 20
    assert level_db(wave_NT, silence_NT).isfinite().all() and mel_error(wave_NT, silence_NT, 8000).isfinite().all()


@pytest.mark.parametrize("shapes", [((5,), (6,)), ((0,), (0,)), ((1, 1, 5), (1, 1, 5)), ((5,), (1, 5))])
def test_odd_shapes_are_named(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    wave, target = (torch.zeros(shape) for shape in shapes)
    for measure in (lambda: level_db(wave, target), lambda: mel_error(wave, target, 8000)):
        with pytest.raises(ValueError, match=r"wave has shape .* and target .*; both must be"):
            measure()
