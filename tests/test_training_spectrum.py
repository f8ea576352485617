import numpy as np
import pytest
import torch

from mmllm.model.audio_projectors import AudioProjector, AudioProjectorConfig, CodeEmbedding
from mmllm_tokenizers.spectrum import FrameSpectrum, mel_filters


@pytest.mark.parametrize("num_samples", [1, 160, 161, 1000, 1600])
def test_frame_spectrum_equals_a_loop_over_frames(num_samples):
    rate, hop, num_mels = 8000, 160, 20
    wave_T = np.random.default_rng(0).standard_normal(num_samples).astype(np.float32)
    spectrum = FrameSpectrum(rate, hop, num_mels)
    found_MF = spectrum(torch.from_numpy(wave_T)[None])[0].numpy()
    num_frames = -(-num_samples // hop)
    assert found_MF.shape == (num_mels, num_frames)
    filters_MW = mel_filters(rate, 512, num_mels).numpy()
    hann = np.hanning(2 * hop + 1)[:-1]
    padded = np.concatenate([np.zeros(1000), wave_T, np.zeros(2000)])
    for frame in range(num_frames):
        start = 1000 + frame * hop - hop // 2  # two hops, centred on the frame
        magnitude_W = np.abs(np.fft.rfft(padded[start : start + 2 * hop] * hann, 512))
        expected_M = (np.log(filters_MW @ magnitude_W + 1e-3) + 2.0) / 2.0
        np.testing.assert_allclose(found_MF[:, frame], expected_M, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("spectrum", [0, 8])
@pytest.mark.parametrize("pool", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 7])
def test_a_clip_depends_on_its_own_frames_alone(spectrum, pool, kernel):
    torch.manual_seed(0)
    embedding = CodeEmbedding(2, 8, 16)
    config = AudioProjectorConfig(spectrum=spectrum, pool=pool, kernel_size=kernel, clip_norm=True, num_hidden_layers=2)
    projector = AudioProjector(config, 16, 12).eval()
    codes_CFK = torch.randint(0, 8, (3, 11, 2))
    lengths = (11, 5, 1)
    for clip, length in enumerate(lengths):
        codes_CFK[clip, length:] = -1
    together_CSD = projector(codes_CFK, embedding)
    loss = sum(together_CSD[clip, : -(-length // pool)].square().sum() for clip, length in enumerate(lengths))
    gradients = torch.autograd.grad(loss, list(projector.parameters()), allow_unused=True)
    alone = torch.zeros(())
    for clip, length in enumerate(lengths):
        one_CSD = projector(codes_CFK[clip : clip + 1, :length], embedding)
        torch.testing.assert_close(one_CSD[0], together_CSD[clip, : -(-length // pool)], rtol=0, atol=2e-6)
        alone = alone + one_CSD.square().sum()
    expected = torch.autograd.grad(alone, list(projector.parameters()), allow_unused=True)
    for found, wanted in zip(gradients, expected, strict=True):
        if wanted is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_clip_norm_takes_out_what_stays_the_same():
    torch.manual_seed(0)
    embedding = CodeEmbedding(2, 8, 16)
    projector = AudioProjector(AudioProjectorConfig(clip_norm=True, num_hidden_layers=1), 16, 12).eval()
    codes_CFK = torch.randint(0, 8, (1, 9, 2))
    before = projector(codes_CFK, embedding)
    with torch.no_grad():
        embedding.table.weight[:9] += 3.0  # every code of the first codebook, by the same vector
    torch.testing.assert_close(projector(codes_CFK, embedding), before, rtol=0, atol=1e-4)


def test_bands_under_the_range_are_raised_to_its_floor() -> None:
    """A clip's codes decode to decibels: what lies 30 dB below the loudest band, and more, becomes the same."""
    torch.manual_seed(0)
    num_bands, num_codes = 4, 50
    decibels_VM = 80 * torch.rand(num_codes, num_bands) - 60
    codebook_KVD = torch.cat([decibels_VM / FrameSpectrum.DECIBELS, torch.randn(num_codes, 2)], dim=1)[None]
    embedding = CodeEmbedding(1, num_codes, num_bands + 2, keeps_scale=True)
    embedding.initialize(codebook_KVD)
    projector = AudioProjector(AudioProjectorConfig(spectrum=num_bands, range_db=30.0), num_bands + 2, 8).eval()
    codes_CFK = torch.randint(0, num_codes, (2, 7, 1))
    codes_CFK[1, 3:] = -1
    mask_CF1 = (codes_CFK >= 0).float()
    assert embedding.scale is not None
    found_CFL = projector._within_range(embedding(codes_CFK), mask_CF1, embedding.scale)
    found_dB = found_CFL[..., :num_bands] * embedding.scale * FrameSpectrum.DECIBELS
    for clip, length in enumerate((7, 3)):
        wanted_FM = decibels_VM[codes_CFK[clip, :length, 0]]
        wanted_FM = wanted_FM.clamp(min=float(wanted_FM.max()) - 30)
        torch.testing.assert_close(found_dB[clip, :length], wanted_FM, rtol=0, atol=1e-3)
    assert torch.equal(found_CFL[..., num_bands:], embedding(codes_CFK)[..., num_bands:])  # what is no band stays


def test_quiet_noise_is_not_heard_within_the_range() -> None:
    """Two recorders of one sound, one with noise 40 dB down and one with noise 60 dB down, sound alike."""
    sound_FM, noise_FM = torch.zeros(9, 4), torch.full((9, 4), -60.0)
    noise_FM[:5] = sound_FM[:5]
    louder_FM = noise_FM.clamp(min=-40.0)
    torch.manual_seed(0)
    projector = AudioProjector(
        AudioProjectorConfig(spectrum=4, range_db=30.0, clip_norm=True, num_hidden_layers=1), 4, 8
    ).eval()
    heard = []
    for spectrum_FM in (noise_FM, louder_FM):
        embedding = CodeEmbedding(1, 9, 4, keeps_scale=True)
        with torch.no_grad():
            embedding.table.weight[:9] = spectrum_FM / FrameSpectrum.DECIBELS
        heard.append(projector(torch.arange(9)[None, :, None], embedding))
    torch.testing.assert_close(heard[0], heard[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"range_db": 30.0}, "need spectrum"),
        ({"spectrum": 8, "range_db": -1.0}, "range_db is -1"),
        ({"spectrum": 6}, "multiple of 4"),
        ({"spectrum": 8, "kind": "mlp"}, "kind 'conv'"),
        ({"mask_span": 0}, "span"),
    ],
)
def test_bad_projector_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AudioProjectorConfig(**options)
