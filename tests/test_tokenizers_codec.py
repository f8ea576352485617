from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn.functional import l1_loss

from mmllm_tokenizers.codec import Codec, CodecConfig, ResidualQuantizer, fused
from mmllm_tokenizers.kmeans import kmeans
from mmllm_tokenizers.spectrum import FrameSpectrum

TINY = CodecConfig(
    num_filters=4,
    ratios=(4, 8),
    dimension=16,
    num_codebooks=4,
    codebook_size=16,
    warmup_batches=10,
    quantizer_dropout=0.3,
)


def tones(num_clips: int, num_samples: int, generator: torch.Generator) -> torch.Tensor:
    """Sine waves [N, T] of random pitch, phase and loudness at 8 kHz."""
    pitch_N1 = 100 + 300 * torch.rand(num_clips, 1, generator=generator)
    phase_N1 = 2 * math.pi * torch.rand(num_clips, 1, generator=generator)
    loudness_N1 = 0.1 + 0.4 * torch.rand(num_clips, 1, generator=generator)
    time_T = torch.arange(num_samples) / 8000
    return loudness_N1 * torch.sin(2 * math.pi * pitch_N1 * time_T + phase_N1)


@pytest.fixture(scope="module")
def trained() -> Codec:
    """A tiny codec after some hundred steps on tones."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec = Codec(TINY).train()
        optimizer = torch.optim.AdamW(codec.parameters(), lr=5e-3, betas=(0.8, 0.99))
        for _ in range(120):
            wave_NT = tones(8, 512, generator)
            output = codec(wave_NT)
            loss = l1_loss(output.wave, wave_NT) + 0.1 * output.commit_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return codec.eval()


def test_the_first_channels_are_the_spectrum_and_the_encoder_learns_the_others() -> None:
    config = dataclasses.replace(TINY, num_bands=12)
    codec = Codec(config)
    wave_NT = tones(3, 500, torch.Generator().manual_seed(0))  # no multiple of the hop
    latents_NDF = codec.latents(wave_NT)
    assert latents_NDF.shape == (3, config.dimension, codec.num_frames(500))
    expected_NMF = FrameSpectrum(config.sample_rate, config.hop_samples, 12)(wave_NT)
    torch.testing.assert_close(latents_NDF[:, :12], expected_NMF, rtol=0, atol=1e-6)
    assert codec.encoder is not None
    gradients = torch.autograd.grad(latents_NDF.square().sum(), list(codec.encoder.parameters()))
    assert any(bool(gradient.abs().sum() > 0) for gradient in gradients)
    same = fused(codec).latents(wave_NT)
    torch.testing.assert_close(same, latents_NDF, rtol=1e-4, atol=1e-5)
    learnt = {name for name in codec.state_dict() if "spectrum" in name}
    assert not learnt, "the spectrum is computed: nothing of it belongs into a saved codec"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_bands": 16}, r"num_bands is 16; it must lie in \[0, 15\]"), ({"num_bands": 8, "causal": True}, "causal")],
)
def test_impossible_bands_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **options)


def test_more_codebooks_reconstruct_better(trained):
    wave_NT = tones(64, 1024, torch.Generator().manual_seed(1))
    codes_NKF = trained.encode(wave_NT)
    errors = [float(l1_loss(trained.decode(codes_NKF[:, :k]), wave_NT)) for k in range(1, 5)]
    silence = float(wave_NT.abs().mean())
    assert errors[0] < 0.9 * silence
    assert errors == sorted(errors, reverse=True), errors
    assert errors[3] < 0.8 * errors[0], errors


def test_training_uses_the_codebooks(trained):
    codes_NKF = trained.encode(tones(64, 1024, torch.Generator().manual_seed(1)))
    for codebook in range(4):
        assert len(codes_NKF[:, codebook].unique()) >= 8


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("ratios", "lstm_layers"), [((4, 8), 0), ((5, 3), 0), ((2, 4, 5), 1)])
@pytest.mark.parametrize("num_samples", [1, 2, 31, 32, 33, 777])
def test_frames_are_samples_over_hop_rounded_up(causal, ratios, lstm_layers, num_samples):
    config = dataclasses.replace(TINY, ratios=ratios, causal=causal, lstm_layers=lstm_layers)
    codec = Codec(config).eval()
    wave_NT = torch.randn(2, num_samples)
    codes_NKF = codec.encode(wave_NT)
    num_frames = math.ceil(num_samples / math.prod(ratios))
    assert codes_NKF.shape == (2, 4, num_frames)
    assert codec.num_frames(num_samples) == num_frames
    assert codec.decode(codes_NKF).shape == (2, num_frames * math.prod(ratios))
    assert codec(wave_NT).wave.shape == wave_NT.shape
    assert codec.frame_rate == 8000 / math.prod(ratios)


def test_forward_and_encode_give_the_same_codes(trained):
    wave_NT = tones(4, 999, torch.Generator().manual_seed(2))
    output = trained(wave_NT)
    codes_NKF = trained.encode(wave_NT)
    assert torch.equal(output.codes, codes_NKF)
    torch.testing.assert_close(trained.quantizer.decode(codes_NKF), output.quantized)
    torch.testing.assert_close(trained.decode(codes_NKF)[:, :999], output.wave)


def test_quantizer_is_straight_through_once_and_commits_every_codebook():
    """The `encodec` package's fault (issue 25) leaves all commitment gradients but the first codebook's zero."""
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, quantizer_dropout=0.0, decay=0.0, warmup_batches=0)
    quantizer = ResidualQuantizer(config).train()
    quantizer.num_batches += 1  # as after the first batch: the random codebooks stay
    codebooks_KVD = quantizer.codebooks.clone()
    latents_NDF = torch.randn(3, 16, 7, requires_grad=True)
    weight_NDF = torch.randn(3, 16, 7)
    output = quantizer(latents_NDF)

    (gradient_NDF,) = torch.autograd.grad((output.quantized_NDF * weight_NDF).sum(), latents_NDF, retain_graph=True)
    assert torch.equal(gradient_NDF, weight_NDF)  # identity on the sum, not once for each codebook

    residual_NDF = latents_NDF.detach().clone()
    expected_NDF = torch.zeros_like(residual_NDF)
    loss = 0.0
    for codebook_VD, codes_NF in zip(codebooks_KVD, output.codes_NKF.unbind(1), strict=True):
        residual_NDF -= codebook_VD[codes_NF].transpose(1, 2)
        loss += float(residual_NDF.square().mean()) / 4
        expected_NDF += 2 * residual_NDF / residual_NDF.numel() / 4
    (gradient_NDF,) = torch.autograd.grad(output.commit_loss, latents_NDF)
    torch.testing.assert_close(gradient_NDF, expected_NDF, rtol=1e-5, atol=1e-8)
    assert output.commit_loss.item() == pytest.approx(loss, rel=1e-5)


def test_codebooks_follow_their_vectors():
    """With decay 0 a code becomes the mean of the vectors that chose it."""
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, num_codebooks=1, decay=0.0, warmup_batches=0)
    quantizer = ResidualQuantizer(config).train()
    quantizer.num_batches += 1
    latents_NDF = torch.randn(4, 16, 50)
    codes_R = quantizer(latents_NDF).codes_NKF[:, 0].reshape(-1)
    vectors_RD = latents_NDF.transpose(1, 2).reshape(-1, 16)
    for code in codes_R.unique().tolist():
        torch.testing.assert_close(quantizer.codebooks[0, code], vectors_RD[codes_R == code].mean(0))


def test_dead_codes_come_back():
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, num_codebooks=1, warmup_batches=0, dead_code_batches=3)
    quantizer = ResidualQuantizer(config).train()
    quantizer.num_batches += 1
    quantizer.codebooks[0, 8:] = 1e3  # half of the codes are far from everything
    quantizer.sums.copy_(quantizer.codebooks)
    for _ in range(4):
        quantizer(torch.randn(8, 16, 20))
    assert float(quantizer.codebooks.abs().max()) < 10
    assert len(quantizer.encode(torch.randn(8, 16, 50)).unique()) > 8


def test_warmup_passes_latents_then_kmeans_sets_the_codebooks():
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(dataclasses.replace(TINY, warmup_batches=2, quantizer_dropout=0.0)).train()
    latents_NDF = torch.randn(4, 16, 50)
    before_KVD = quantizer.codebooks.clone()
    for _ in range(2):
        assert torch.equal(quantizer(latents_NDF).quantized_NDF, latents_NDF)
    assert torch.equal(quantizer.codebooks, before_KVD)
    error = float((quantizer(latents_NDF).quantized_NDF - latents_NDF).square().mean())
    assert error < 0.5
    assert not torch.equal(quantizer.codebooks, before_KVD)


COMPUTED = dataclasses.replace(
    TINY, ratios=(4, 8), decoder="source_filter", num_bands=13, warmup_batches=2, quantizer_dropout=0.0
)


def test_codebooks_of_computed_latents_are_made_of_all_warmup_batches_and_stay() -> None:
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(COMPUTED).train()
    batches = [torch.randn(4, 16, 50) + shift for shift in (-9.0, 0.0, 9.0, 30.0)]
    for latents_NDF in batches[:3]:
        quantizer(latents_NDF)
    assert not len(quantizer.first_vectors)
    vectors_RD = torch.cat([latents_NDF.transpose(1, 2).reshape(-1, 16) for latents_NDF in batches[:3]])
    torch.testing.assert_close(quantizer.codebooks[0], kmeans(vectors_RD, 16, num_iterations=10, seed=0)[0])
    before_KVD = quantizer.codebooks.clone()
    quantizer(batches[3])
    assert torch.equal(quantizer.codebooks, before_KVD)
    other = ResidualQuantizer(dataclasses.replace(TINY, warmup_batches=2)).train()
    for latents_NDF in batches[:2]:
        other(latents_NDF)
    assert len(other.first_vectors) == 200, "an encoder that learns makes vectors of earlier batches stale"


def test_a_warmup_that_is_cut_short_still_gives_codebooks() -> None:
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(COMPUTED).train()
    latents_NDF = torch.randn(4, 16, 50)
    quantizer(latents_NDF)
    quantizer.end_warmup()
    wanted_VD, _ = kmeans(latents_NDF.transpose(1, 2).reshape(-1, 16), 16, num_iterations=10, seed=0)
    torch.testing.assert_close(quantizer.codebooks[0], wanted_VD)
    before_KVD = quantizer.codebooks.clone()
    quantizer.end_warmup()
    assert torch.equal(quantizer.codebooks, before_KVD)


def test_a_wide_search_finds_the_nearest_sum_of_all() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, num_codebooks=3, codebook_size=4, dimension=5)
    latents_NDF, codebooks_KVD = torch.randn(3, 5, 40), torch.randn(3, 4, 5)
    errors = []
    for width in (1, 2, 4, 16):
        quantizer = ResidualQuantizer(dataclasses.replace(config, search_width=width))
        quantizer.codebooks.copy_(codebooks_KVD)
        codes_NKF = quantizer.encode(latents_NDF)
        assert codes_NKF.shape == (3, 3, 40) and codes_NKF.is_contiguous()
        errors.append(float((quantizer.decode(codes_NKF) - latents_NDF).square().sum(dim=1).mean()))
        assert torch.equal(quantizer.eval()(latents_NDF).codes_NKF, codes_NKF)
        torch.testing.assert_close(quantizer(latents_NDF).quantized_NDF, quantizer.decode(codes_NKF))
    first_VD, second_VD, third_VD = codebooks_KVD
    sums_SD = (first_VD[:, None, None] + second_VD[None, :, None] + third_VD[None, None]).reshape(-1, 5)
    vectors_RD = latents_NDF.transpose(1, 2).reshape(-1, 5)
    nearest_R = torch.tensor([float((sums_SD - vector_D).square().sum(dim=1).min()) for vector_D in vectors_RD])
    assert errors == sorted(errors, reverse=True) and errors[0] > 1.05 * errors[-1], errors
    assert errors[-1] == pytest.approx(float(nearest_R.mean()), rel=1e-5)  # 16 sums kept of 16: all


@pytest.mark.parametrize("width", [1, 4])
def test_what_is_spoken_is_what_a_codec_of_these_codebooks_alone_would_give(width: int) -> None:
    """Those that are only heard make the sum better, and what is spoken no worse."""
    torch.manual_seed(0)
    latents_NDF, codebooks_KVD = torch.randn(3, 5, 60), torch.randn(4, 4, 5)
    config = dataclasses.replace(
        TINY, codebook_size=4, dimension=5, search_width=width, quantizer_dropout=0.0, decay=0.999999
    )

    def quantizer(num_codebooks: int, spoken: int) -> ResidualQuantizer:
        made = ResidualQuantizer(dataclasses.replace(config, num_codebooks=num_codebooks, spoken_codebooks=spoken))
        made.codebooks.copy_(codebooks_KVD[:num_codebooks])
        return made.eval()

    alone, both, free = quantizer(2, 0), quantizer(4, 2), quantizer(4, 0)
    codes_NKF = both.encode(latents_NDF)
    assert torch.equal(codes_NKF[:, :2], alone.encode(latents_NDF)) and codes_NKF.shape == (3, 4, 60)
    is_same = torch.equal(free.encode(latents_NDF)[:, :2], alone.encode(latents_NDF))
    assert is_same == (width == 1), "a free search gives up the nearest two for a nearer four"
    errors = [float((both.decode(codes_NKF[:, :k]) - latents_NDF).square().sum(dim=1).mean()) for k in (2, 4)]
    assert errors[1] < errors[0]
    both.num_batches += 1 + both.config.warmup_batches
    for training in (False, True):  # the decoder learns from what is spoken
        output = both.train(training)(latents_NDF)
        torch.testing.assert_close(output.quantized_NDF, alone(latents_NDF).quantized_NDF, rtol=0, atol=1e-3)
        torch.testing.assert_close(output.commit_loss, alone(latents_NDF).commit_loss, rtol=1e-3, atol=0)
        assert torch.equal(output.codes_NKF, codes_NKF)


def test_quantizer_dropout_drops_no_more_than_what_is_spoken() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, quantizer_dropout=1.0, spoken_codebooks=2)
    active_NK = ResidualQuantizer(config).train()._active_codebooks(64, torch.device("cpu"))
    assert {tuple(row) for row in active_NK.tolist()} == {(1.0, 0.0, 0.0, 0.0), (1.0, 1.0, 0.0, 0.0)}


def test_quantizer_dropout_keeps_a_prefix_of_codebooks():
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, quantizer_dropout=1.0, warmup_batches=0, decay=0.999999)
    quantizer = ResidualQuantizer(config).train()
    quantizer.num_batches += 1
    output = quantizer(torch.randn(32, 16, 5))
    depths = set()
    for clip in range(32):
        sums = [quantizer.decode(output.codes_NKF[clip : clip + 1, :k])[0] for k in range(1, 5)]
        close = [torch.allclose(output.quantized_NDF[clip], total, atol=1e-3) for total in sums]
        assert sum(close) == 1
        depths.add(close.index(True))
    assert len(depths) == 4


def test_evaluation_changes_nothing_and_training_repeats():
    def run() -> Codec:
        torch.manual_seed(3)
        codec = Codec(dataclasses.replace(TINY, warmup_batches=1)).train()
        for _ in range(3):
            codec(torch.randn(4, 640))
        return codec

    first, second = run(), run()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    first.eval()(torch.randn(4, 640))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_fused_weights_are_the_same_function(trained):
    wave_NT = tones(4, 1000, torch.Generator().manual_seed(4))
    codes_NKF, wave = trained.encode(wave_NT), trained.decode(trained.encode(wave_NT))
    random_state = torch.random.get_rng_state()
    copy = fused(trained)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert (copy.config.norm, trained.config.norm) == ("none", "weight_norm")
    assert "encoder.model.0.conv.conv.weight" in copy.state_dict()
    for codec in (copy, fused(copy), trained):  # the original still works
        assert torch.equal(codec.encode(wave_NT), codes_NKF)
        torch.testing.assert_close(codec.decode(codes_NKF), wave)


def test_wrong_configurations_and_inputs_are_named(trained):
    with pytest.raises(ValueError, match="codebook_size is 0"):
        dataclasses.replace(TINY, codebook_size=0)
    with pytest.raises(ValueError, match="ratios are"):
        dataclasses.replace(TINY, ratios=(1, 4))
    with pytest.raises(ValueError, match="norm is 'batch'"):
        dataclasses.replace(TINY, norm="batch")
    with pytest.raises(ValueError, match=r"wave has shape \[5\]"):
        trained.encode(torch.zeros(5))
    with pytest.raises(ValueError, match=r"wave has shape \[2, 0\]"):
        trained.encode(torch.zeros(2, 0))
    with pytest.raises(ValueError, match=r"codes lie in \[0, 16\]"):
        trained.decode(torch.tensor([[[0, 16]]]))
    with pytest.raises(ValueError, match=r"codes have shape \[1, 5, 2\]"):
        trained.decode(torch.zeros(1, 5, 2, dtype=torch.int64))


def test_kmeans_finds_clusters_and_repeats():
    generator = torch.Generator().manual_seed(0)
    centres_VD = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0], [100.0, 100.0]])
    x_TD = centres_VD.repeat_interleave(50, 0) + torch.randn(200, 2, generator=generator)
    centroids_VD, counts_V = kmeans(x_TD, 4, seed=3)
    distance_VV = torch.cdist(centres_VD, centroids_VD)
    assert float(distance_VV.min(1).values.max()) < 0.6
    assert counts_V.tolist() == [50, 50, 50, 50]
    assert torch.equal(kmeans(x_TD, 4, seed=3)[0], centroids_VD)
    few_VD, counts_V = kmeans(x_TD[:3], 8)
    assert few_VD.shape == (8, 2)
    assert int(counts_V.sum()) == 3
    with pytest.raises(ValueError, match="got 0 vectors"):
        kmeans(x_TD[:0], 4)
