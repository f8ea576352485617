import numpy as np
import pytest
import torch

from mmllm.model.projectors import AudioProjector, AudioProjectorConfig, CodeEmbedding
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
    config = AudioProjectorConfig(spectrum=spectrum, pool=pool, kernel=kernel, clip_norm=True, num_layers=2)
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
    projector = AudioProjector(AudioProjectorConfig(clip_norm=True, num_layers=1), 16, 12).eval()
    codes_CFK = torch.randint(0, 8, (1, 9, 2))
    before = projector(codes_CFK, embedding)
    with torch.no_grad():
        embedding.table.weight[:9] += 3.0  # every code of the first codebook, by the same vector
    torch.testing.assert_close(projector(codes_CFK, embedding), before, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"spectrum": 6}, "multiple of 4"), ({"spectrum": 8, "kind": "mlp"}, "kind 'conv'"), ({"mask_span": 0}, "span")],
)
def test_bad_projector_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AudioProjectorConfig(**options)
