from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmllm_tokenizers import source_filter
from mmllm_tokenizers.codec import Codec, CodecConfig, fused
from mmllm_tokenizers.frame_features import FrameFeatures, FrameLoudness, FramePitch
from mmllm_tokenizers.sound_quality import level_db, mel_error
from mmllm_tokenizers.source_filter import SourceFilterDecoder, minimum_phase, pulse_train
from mmllm_tokenizers.spectrum import FrameSpectrum

RATE, HOP = 8000, 160
CONFIG = CodecConfig(
    ratios=(2, 4, 4, 5), decoder="source_filter", num_bands=40, dimension=43, num_codebooks=2, codebook_size=16,
    decoder_hidden_size=16, search_width=3, warmup_batches=2, quantizer_dropout=0.0,
)  # fmt: skip


def vowel(hz_T: Tensor, formants: tuple[float, ...] = (600.0, 1200.0, 2500.0)) -> Tensor:
    """Cosines of all multiples of a pitch that may glide, loud near the formants, summed one by one: [T]."""
    phase_T = 2 * math.pi * torch.cumsum(hz_T.double() / RATE, dim=0)
    wave_T = torch.zeros_like(phase_T)
    for harmonic in range(1, 60):
        ours_T = hz_T.double() * harmonic
        loudness_T = sum(1 / (1 + ((ours_T - formant) / 120) ** 2) for formant in formants)
        wave_T += torch.where(ours_T < RATE / 2, loudness_T * (harmonic * phase_T).cos(), 0.0)
    return (0.1 * wave_T / wave_T.square().mean().sqrt()).float()


def glide(low: float, high: float, seconds: float = 1.0) -> Tensor:
    return torch.linspace(low, high, int(seconds * RATE))


def noise(num_samples: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(num_samples, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("low", "high"), [(80, 100), (130, 110), (210, 300), (400, 380)])
def test_pitch_follows_a_gliding_voice(low: float, high: float) -> None:
    hz_T = glide(low, high)
    pitch_NF, voicing_NF = FramePitch(RATE, HOP)(vowel(hz_T)[None])
    assert pitch_NF.shape == voicing_NF.shape == (1, 50)
    wanted_F = hz_T.view(-1, HOP).mean(dim=1).log2()
    errors_F = 1200 * (pitch_NF[0] - wanted_F).abs()[3:-3]
    assert float(errors_F.max()) < 40, errors_F  # cents; the window with its lags is not centred to the sample
    assert float(voicing_NF[0, 3:-3].min()) > 0.9


def test_noise_and_silence_have_no_voice() -> None:
    pitch = FramePitch(RATE, HOP)
    assert float(pitch(noise(RATE)[None])[1].mean()) < 0.15
    for quiet_T in (torch.zeros(RATE), 1e-6 * vowel(glide(100, 120))):
        pitch_NF, voicing_NF = pitch(quiet_T[None])
        assert not voicing_NF.any() and pitch_NF.isfinite().all()


@pytest.mark.parametrize("num_samples", [1, 159, 160, 1000])
def test_correlation_and_loudness_equal_loops(num_samples: int) -> None:
    wave_T = noise(num_samples)
    pitch, loudness = FramePitch(RATE, HOP), FrameLoudness(HOP)
    found_FL, levels_F = pitch._correlation(wave_T[None])[0], loudness(wave_T[None])[0]
    length = pitch.window + pitch.max_lag + 1
    assert found_FL.shape == (math.ceil(num_samples / HOP), pitch.FINER * (pitch.max_lag + 1) + 1)

    def cut(frame: int, samples: int) -> Tensor:
        """Centred on a frame, one sample after the other."""
        first = frame * HOP - (samples - HOP) // 2
        inside = [float(wave_T[i]) if 0 <= i < num_samples else 0.0 for i in range(first, first + samples)]
        return torch.tensor(inside, dtype=torch.float64)

    for frame in {0, len(found_FL) - 1}:
        frame_S = cut(frame, length)
        frame_S = frame_S - frame_S.mean()
        one_S = frame_S[: pitch.window]
        for lag in (0, 1, pitch.min_lag, pitch.max_lag + 1):
            other_S = frame_S[lag : lag + pitch.window]
            energy = float((one_S.square().sum() * other_S.square().sum()).sqrt()) + pitch.window * pitch.QUIET**2
            assert float(found_FL[frame, pitch.FINER * lag]) == pytest.approx(float(one_S @ other_S) / energy, abs=1e-4)
        hann_S = torch.hann_window(2 * HOP, dtype=torch.float64)
        power = float((cut(frame, 2 * HOP) * hann_S).square().sum() / hann_S.square().sum())
        assert float(levels_F[frame]) == pytest.approx(0.5 * math.log(power + 1e-8), abs=1e-4)


def test_features_are_bands_then_pitch_voicing_and_loudness() -> None:
    wave_NT = torch.stack([vowel(glide(100, 140)), noise(RATE)])
    features_NCF = FrameFeatures(RATE, HOP, 40)(wave_NT)
    pitch_NF, voicing_NF = FramePitch(RATE, HOP)(wave_NT)
    torch.testing.assert_close(features_NCF[:, :40], FrameSpectrum(RATE, HOP, 40)(wave_NT))
    torch.testing.assert_close(features_NCF[:, 40], 4 * voicing_NF * (pitch_NF - math.log2(147)))
    torch.testing.assert_close(features_NCF[:, 41], voicing_NF)
    assert float(features_NCF[0, 42, 5:-5].mean()) == pytest.approx(2 * (math.log(0.1) + 4), abs=0.2)
    with pytest.raises(ValueError, match="sample_rate is 1000"):
        FramePitch(1000, 20)


def test_a_pulse_train_is_the_sum_of_its_harmonics() -> None:
    hz_NT = torch.stack([glide(100, 180, 0.3), torch.full((2400,), 200.0)])  # 200 Hz: tops lie on samples
    found_NT = pulse_train(hz_NT, RATE)
    cycles_NT = torch.cumsum(hz_NT.double() / RATE, dim=1)
    num_NT = (RATE / 2 / hz_NT - 1e-3).floor()
    wanted_NT = torch.zeros_like(cycles_NT)
    for harmonic in range(1, 41):
        wanted_NT += torch.where(num_NT >= harmonic, (2 * math.pi * harmonic * cycles_NT).cos(), 0.0)
    torch.testing.assert_close(found_NT.double(), wanted_NT, rtol=0, atol=5e-3)


def test_minimum_phase_finds_a_filter_whose_zeros_lie_inside_the_unit_circle() -> None:
    impulse_S = torch.tensor([1.0, -0.9, 0.5, 0.1])
    spectrum_W = torch.fft.rfft(impulse_S, 512)
    found_W = minimum_phase(spectrum_W.abs().log()[None, None], 512)[0, 0]
    torch.testing.assert_close(found_W, spectrum_W, rtol=0, atol=1e-4)
    flipped_W = torch.fft.rfft(impulse_S.flip(0), 512)  # the same magnitudes, late energy
    torch.testing.assert_close(
        minimum_phase(flipped_W.abs().log()[None, None], 512)[0, 0], spectrum_W, rtol=0, atol=1e-4
    )


def test_filtering_is_convolution_where_filters_stay_and_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    decoder = SourceFilterDecoder(CONFIG)
    sources = (noise(5 * HOP, 1)[None], noise(5 * HOP, 2)[None])
    for source_NT in sources:  # at the ends fewer windows overlap
        source_NT[:, :HOP] = source_NT[:, -HOP:] = 0.0
    bands = [torch.randn(1, 40, 1).expand(1, 40, 20) * 0.5 for _ in sources]
    found_T = decoder._filtered(sources, (bands[0], bands[1]))[0]
    wanted_T = torch.zeros(5 * HOP, dtype=torch.float64)
    for source_NT, bands_NMB in zip(sources, bands, strict=True):
        log_bins_W = decoder.get_buffer("bins_WM") @ bands_NMB[0, :, 0]
        impulse_S = torch.fft.irfft(minimum_phase(log_bins_W[None, None], 512), 512)[0, 0].double()
        for sample in range(5 * HOP):
            past = source_NT[0, max(0, sample - 511) : sample + 1].double().flip(0)
            wanted_T[sample] += past @ impulse_S[: len(past)]
    torch.testing.assert_close(found_T.double(), wanted_T, rtol=0, atol=1e-3)
    changing = [torch.randn(1, 40, 20) * 0.5 for _ in sources]
    whole_NT = decoder._filtered(sources, (changing[0], changing[1]))
    monkeypatch.setattr(source_filter, "_PIECE_BLOCKS", 3)
    torch.testing.assert_close(decoder._filtered(sources, (changing[0], changing[1])), whole_NT, rtol=0, atol=1e-6)


@pytest.mark.parametrize("wave", ["vowel", "noise", "both"])
def test_an_untrained_decoder_is_as_loud_as_the_recording_and_near_its_spectrum(wave: str) -> None:
    parts = {"vowel": vowel(glide(110, 150)), "noise": noise(RATE)}
    wave_NT = (torch.cat([*parts.values()]) if wave == "both" else parts[wave])[None]
    features_NCF = FrameFeatures(RATE, HOP, 40)(wave_NT)
    with torch.no_grad():
        decoded_NT, pitch_NF = SourceFilterDecoder(CONFIG)(features_NCF)
        quiet_NT, _ = SourceFilterDecoder(CONFIG)(FrameFeatures(RATE, HOP, 40)(wave_NT / 8))
    assert decoded_NT.shape == wave_NT.shape
    assert abs(float(level_db(decoded_NT, wave_NT))) < 0.5
    assert abs(float(level_db(quiet_NT, wave_NT / 8))) < 0.5
    assert float(mel_error(decoded_NT, wave_NT, RATE)) < 4.0
    if wave == "vowel":
        wanted_F = glide(110, 150).view(-1, HOP).mean(dim=1).log2()
        assert float((pitch_NF[0] - wanted_F)[5:-5].abs().max()) < 0.05
        heard_NF, voicing_NF = FramePitch(RATE, HOP)(decoded_NT)
        assert float((heard_NF[0] - wanted_F)[5:-5].abs().max()) < 0.05 and float(voicing_NF[0, 5:-5].min()) > 0.6


def test_silence_stays_silent_and_a_single_frame_is_a_sound() -> None:
    decoder, features = SourceFilterDecoder(CONFIG), FrameFeatures(RATE, HOP, 40)
    for num_samples in (1, HOP, 10 * HOP):
        with torch.no_grad():
            decoded_NT, _ = decoder(features(torch.zeros(1, num_samples)))
        assert float(decoded_NT.abs().max()) < 1e-3 and decoded_NT.shape[1] == math.ceil(num_samples / HOP) * HOP
        assert decoder(features(noise(num_samples)[None]))[0].isfinite().all()


def trained_a_little() -> Codec:
    """Codebooks of two batches of voices, a decoder whose network does something."""
    torch.manual_seed(0)
    codec = Codec(CONFIG).train()
    with torch.no_grad():
        for start in (90, 150, 210):
            codec(torch.stack([vowel(glide(start, start + 30)), noise(RATE, start)]))
        head = codec.get_submodule("decoder.head")
        assert isinstance(head, torch.nn.Linear)
        head.weight.normal_(std=0.05)
    return codec.eval()


def test_clips_decode_alike_alone_and_together_and_every_time() -> None:
    codec = fused(trained_a_little())
    waves_NT = torch.stack([vowel(glide(100, 130)), noise(RATE, 9), vowel(glide(220, 200))])
    codes_NKF = codec.encode(waves_NT)
    assert codes_NKF.shape == (3, 2, 50)
    together_NT = codec.decode(codes_NKF)
    assert torch.equal(codec.decode(codes_NKF), together_NT)
    for clip in range(3):
        assert torch.equal(codec.encode(waves_NT[clip : clip + 1])[0], codes_NKF[clip])
        torch.testing.assert_close(codec.decode(codes_NKF[clip : clip + 1])[0], together_NT[clip], rtol=0, atol=1e-3)
    assert codec.decode(codes_NKF[:, :1]).isfinite().all()


def test_a_wave_depends_on_few_later_frames() -> None:
    """So many frames may be sent before all are known."""
    torch.manual_seed(1)
    codec = trained_a_little()
    latents_NCF = FrameFeatures(RATE, HOP, 40)(vowel(glide(100, 130))[None])
    changed_NCF = latents_NCF.clone()
    changed_NCF[:, :, 30:] += torch.randn(1, 43, 1)
    decoder = codec.decoder
    assert isinstance(decoder, SourceFilterDecoder)
    with torch.no_grad():
        first_NT, changed_NT = decoder(latents_NCF)[0], decoder(changed_NCF)[0]
    later = 2 + CONFIG.decoder_num_layers * 3 + 3  # the stem, the blocks; the interpolations and the last gain
    same = (30 - later) * HOP
    torch.testing.assert_close(changed_NT[:, :same], first_NT[:, :same], rtol=0, atol=1e-6)
    assert float((changed_NT - first_NT)[:, 30 * HOP :].abs().max()) > 1e-2


def test_everything_in_the_decoder_learns() -> None:
    torch.manual_seed(0)
    codec = trained_a_little().train()
    output = codec(vowel(glide(100, 130))[None])
    assert output.pitch is not None
    loss = output.wave.square().log1p().mean() + output.pitch.mean()
    for name, gradient in zip(
        dict(codec.named_parameters()), torch.autograd.grad(loss, list(codec.parameters())), strict=True
    ):
        assert gradient.isfinite().all() and gradient.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder": "wavenet"}, "decoder is 'wavenet'"),
        ({"dimension": 48}, "dimension num_bands [+] 3, here 43"),
        ({"num_bands": 0}, "needs 2 bands or more"),
        ({"ratios": (2, 5)}, "a hop of 10 samples"),
        ({"search_width": 0}, "search_width is 0"),
        ({"decoder_hidden_size": 0}, "decoder_hidden_size is 0"),
        ({"spoken_codebooks": 5}, "spoken_codebooks is 5; it must be 0 .all. to num_codebooks, 4"),
    ],
)
def test_impossible_settings_are_named(options: dict, message: str) -> None:
    settings = {"decoder": "source_filter", "num_bands": 40, "dimension": 43, "ratios": (2, 4, 4, 5), **options}
    with pytest.raises(ValueError, match=message):
        CodecConfig(**settings)
