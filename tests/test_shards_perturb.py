"""Altered copies of a recording: what another recorder does, against slow references."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mmllm.data.shards import perturb as module
from mmllm.data.shards.perturb import PerturbConfig, perturb

PLAIN = PerturbConfig(
    speed=(1.0, 1.0), tempo=(1.0, 1.0), gain_db=(0.0, 0.0), tilt_db=0.0, band_db=0.0, lowpass_chance=0.0,
    noise_db=(200.0, 200.0), color_db=0.0,
)  # fmt: skip


def _wave(num_samples: int = 400, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(num_samples)).astype(np.float32)


def _spectrum(wave_T: np.ndarray) -> np.ndarray:
    """Magnitudes of the discrete Fourier transform, one sum a frequency."""
    times_T = np.arange(len(wave_T))
    return np.array(
        [abs(np.sum(wave_T * np.exp(-2j * np.pi * k * times_T / len(wave_T)))) for k in range(len(wave_T) // 2 + 1)]
    )


def _decibels(ratio: np.ndarray) -> np.ndarray:
    return 20 * np.log10(ratio)


def test_nothing_to_alter_alters_nothing() -> None:
    wave_T = _wave()
    np.testing.assert_allclose(perturb(wave_T, 0, "a", PLAIN), wave_T, rtol=0, atol=1e-6)


def test_a_low_pass_takes_what_lies_above_and_nothing_below() -> None:
    wave_T = _wave()
    config = replace(PLAIN, lowpass=(0.6, 0.6), lowpass_chance=1.0)
    change_W = _decibels(_spectrum(perturb(wave_T, 0, "a", config)) / _spectrum(wave_T))
    position_W = np.linspace(0, 1, len(change_W))
    np.testing.assert_allclose(change_W[position_W <= 0.6], 0, atol=0.01)
    np.testing.assert_allclose(change_W[position_W >= 0.7], -40, atol=0.05)
    np.testing.assert_allclose(change_W[position_W == 0.65], -20, atol=0.05)  # a straight line between
    halved = replace(config, lowpass_chance=0.5)
    num_cut = sum(
        _spectrum(perturb(wave_T, 0, str(copy), halved))[-9:].mean() < 0.1 * _spectrum(wave_T)[-9:].mean()
        for copy in range(60)
    )
    assert 18 <= num_cut <= 42  # 30 of 60, three deviations of 3.9 either way


@pytest.mark.parametrize("color_db", [0.0, 12.0])
def test_noise_lies_as_far_below_the_signal_as_it_says(color_db: float) -> None:
    wave_T = _wave(8000)
    for copy in range(4):
        noise_T = perturb(wave_T, 0, str(copy), replace(PLAIN, noise_db=(20.0, 20.0), color_db=color_db)) - wave_T
        assert abs(_decibels(noise_T.std() / wave_T.std()) + 20) < 0.05
        bands_W = np.abs(np.fft.rfft(noise_T))[: 8 * 500].reshape(8, 500)
        spread = np.ptp(_decibels(np.sqrt(np.square(bands_W).mean(axis=1))))
        assert spread < 1.5 if color_db == 0 else 2 < spread < 2 * color_db + 1.5, copy


def test_a_recorder_is_a_line_through_random_points_another_for_each_copy() -> None:
    wave_T = _wave()
    config = replace(PLAIN, band_db=8.0)
    changes = []
    for copy in range(12):
        change_W = _decibels(_spectrum(perturb(wave_T, 0, str(copy), config)) / _spectrum(wave_T))
        assert np.abs(change_W).max() <= 8.01
        bends = np.abs(np.diff(change_W, 2)) > 0.005  # straight but for 3 to 6 points, each seen in two places
        assert 1 <= bends.sum() <= 12, copy
        changes.append(change_W)
    spread_W = np.std(changes, axis=0)
    assert spread_W.min() > 2 and spread_W.max() < 7  # even draws of ±8 have 4.6


def test_a_random_response_equals_a_loop_over_its_segments() -> None:
    position_W = np.linspace(0, 1, 57)
    for seed in range(20):
        found_W = module._random_response(position_W, np.random.default_rng(seed), 9.0)
        rng = np.random.default_rng(seed)
        num_points = int(rng.integers(3, 7))
        places = sorted(rng.uniform(0, 1, num_points))
        gains = rng.uniform(-9, 9, num_points)
        for position, found in zip(position_W, found_W, strict=True):
            right = sum(place < position for place in places)
            if right in (0, num_points):
                wanted = gains[min(right, num_points - 1)]
            else:
                share = (position - places[right - 1]) / (places[right] - places[right - 1])
                wanted = (1 - share) * gains[right - 1] + share * gains[right]
            assert abs(found - wanted) < 1e-9


@pytest.mark.parametrize("num_samples", [0, 1, 15, 16, 17, 401])
def test_short_and_silent_sounds_pass(num_samples: int) -> None:
    for wave_T in (_wave(num_samples), np.zeros(num_samples, np.float32)):
        copy_T = perturb(wave_T, 0, "a")
        assert copy_T.dtype == np.float32 and np.isfinite(copy_T).all() and np.abs(copy_T).max(initial=0) <= 1
        assert copy_T.any() == wave_T.any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"speed": (1.2, 0.9)}, r"speed is 1\.2–0\.9"),
        ({"lowpass": (0.0, 1.0)}, r"lowpass is 0\.0–1\.0"),
        ({"lowpass_chance": 1.5}, r"lowpass_chance 1\.5"),
        ({"noise_db": (40.0, 20.0)}, r"noise_db is 40\.0–20\.0"),
        ({"color_db": -1.0}, r"color_db -1"),
    ],
)
def test_bad_ranges_are_named(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerturbConfig(**values)
