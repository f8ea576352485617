"""EnCodec: our codes are the `encodec` package's, with checkpoints made on the spot in the published format."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from encodec.model import EncodecModel
from encodec.utils import convert_audio

from mmllm_tokenizers import audio_tokenizer
from mmllm_tokenizers.audio import EncodecTokenizer, load_audio_tokenizer
from mmllm_tokenizers.encodec_tokenizer import RELEASES, find_checkpoint, read_checkpoint

NAMES = ("encodec_24khz", "encodec_48khz")


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> tuple[Path, dict[str, EncodecModel]]:
    """A folder with both checkpoints, and the package's models with the same (random) weights."""
    folder = tmp_path_factory.mktemp("encodec")
    models = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name in NAMES:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # the package uses torch's old weight_norm
                model = getattr(EncodecModel, f"{name.replace('encodec', 'encodec_model')}")(pretrained=False)
            with torch.no_grad():
                for parameter_name, parameter in model.named_parameters():
                    if parameter_name.endswith("weight_g"):
                        parameter.mul_(1 + torch.rand_like(parameter))  # g differs from |v|, as in trained weights
                _spread_codebooks(model)
            torch.save(model.state_dict(), folder / RELEASES[name].checkpoint)
            models[name] = model
    return folder, models


def _spread_codebooks(model: EncodecModel) -> None:
    """Codebooks that tell the latents of random weights apart: at their mean, as wide as they spread."""
    wave_NCT = 0.3 * torch.randn(1, model.channels, 24_000)
    residual_RD = model.encoder(wave_NCT)[0].T
    for layer in model.quantizer.vq.layers:
        spread_VD = torch.randn(1024, 128) * residual_RD.std(0) + residual_RD.mean(0)
        layer._codebook.embed.copy_(spread_VD)
        layer._codebook.inited.fill_(1.0)
        residual_RD = residual_RD - layer.decode(layer.encode(residual_RD.T[None]))[0].T


def package_codes(model: EncodecModel, wave_CT: torch.Tensor, sample_rate: int, num_codebooks: int) -> torch.Tensor:
    """The codes [K, F] as the package's README computes them."""
    with torch.no_grad():
        converted_1CT = convert_audio(wave_CT, sample_rate, model.sample_rate, model.channels)[None]
        model.set_target_bandwidth(num_codebooks * RELEASES[model_name(model)].kbps_per_codebook)
        return torch.cat([codes for codes, _ in model.encode(converted_1CT)], dim=-1)[0]


def model_name(model: EncodecModel) -> str:
    return NAMES[model.channels - 1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("channels", "sample_rate", "num_samples"),
    [
        (1, 24_000, 9_601),
        (2, 48_000, 12_000),
        (1, 8_000, 1_500),
        (2, 44_100, 7_000),
        (1, 48_000, 1),
        (2, 24_000, 25_000),
    ],
)
def test_codes_equal_the_package(packages, name, channels, sample_rate, num_samples):
    folder, models = packages
    num_codebooks = 4
    tokenizer = EncodecTokenizer.from_pretrained(name, folder, num_codebooks=num_codebooks)
    wave_CT = 0.3 * torch.randn(channels, num_samples, generator=torch.Generator().manual_seed(1))
    expected_KF = package_codes(models[name], wave_CT, sample_rate, num_codebooks)
    codes_KF = tokenizer.encode(wave_CT, sample_rate)
    assert codes_KF.dtype == torch.int64
    assert torch.equal(codes_KF, expected_KF)
    assert codes_KF.shape[1] == tokenizer.num_frames(tokenizer.prepare(wave_CT, sample_rate).shape[-1])
    if num_samples > 1000:
        assert len(codes_KF.unique()) > 10  # the codebooks do tell frames apart


@pytest.mark.parametrize("name", NAMES)
def test_frames_of_long_sounds_are_as_many_as_counted(packages, name, monkeypatch):
    """Above a minute, here above 1.2 s, sounds are encoded in pieces, but for models with segments of their own."""
    monkeypatch.setattr(audio_tokenizer, "_PIECE_SECONDS", 1.2)
    folder, models = packages
    tokenizer = EncodecTokenizer.from_pretrained(name, folder, num_codebooks=2)
    for rate, num_samples in ((tokenizer.sample_rate, 2 * tokenizer.sample_rate + 7), (11_027, 33_081)):
        wave_CT = 0.3 * torch.randn(1, num_samples, generator=torch.Generator().manual_seed(1))
        codes_KF = tokenizer.encode(wave_CT, rate)
        assert codes_KF.shape[1] == tokenizer.num_frames_of(num_samples, rate)
        if name == "encodec_48khz" and rate == tokenizer.sample_rate:
            assert torch.equal(codes_KF, package_codes(models[name], wave_CT, rate, 2))


@pytest.mark.parametrize("name", NAMES)
def test_decoding_equals_the_package(packages, name):
    folder, models = packages
    tokenizer = EncodecTokenizer.from_pretrained(name, folder, num_codebooks=8)
    wave_CT = 0.1 * torch.randn(1, int(0.3 * tokenizer.sample_rate), generator=torch.Generator().manual_seed(2))
    codes_KF = tokenizer.encode(wave_CT, tokenizer.sample_rate)
    scale = torch.full((1, 1), tokenizer.loudness) if name == "encodec_48khz" else None
    with torch.no_grad():
        expected_CT = models[name].decode([(codes_KF[None], scale)])[0]
    expected = expected_CT if name == "encodec_48khz" else expected_CT[0]
    torch.testing.assert_close(tokenizer.decode(codes_KF), expected, rtol=1e-4, atol=1e-5)
    assert tokenizer.decode(codes_KF[:2]).shape == expected.shape  # fewer codebooks decode too
    assert tokenizer.decode(codes_KF[:, :0]).shape == (*expected.shape[:-1], 0)


def test_bandwidth_and_codebooks(packages):
    folder, _ = packages
    tokenizer = EncodecTokenizer.from_pretrained(
        "encodec_24khz", folder / RELEASES["encodec_24khz"].checkpoint, bandwidth_kbps=3.0
    )
    assert (tokenizer.num_codebooks, tokenizer.codebook_size, tokenizer.frame_rate) == (4, 1024, 75.0)
    assert tokenizer.codebooks_KVD.shape == (4, 1024, 128)
    with pytest.raises(ValueError, match=r"bandwidth is 5 kbit/s; encodec_24khz has 1\.5"):
        EncodecTokenizer.from_pretrained("encodec_24khz", folder, bandwidth_kbps=5)
    with pytest.raises(ValueError, match="num_codebooks is 33; this audio tokenizer has 32"):
        tokenizer.use_codebooks(33)


def test_save_and_load(packages, tmp_path):
    folder, _ = packages
    tokenizer = EncodecTokenizer.from_pretrained("encodec_24khz", folder, num_codebooks=2)
    tokenizer.save(tmp_path / "codec")
    loaded = load_audio_tokenizer(tmp_path / "codec")
    wave_T = 0.3 * torch.randn(5000, generator=torch.Generator().manual_seed(3))
    assert loaded.hash == tokenizer.hash
    assert torch.equal(loaded.encode(wave_T, 24_000), tokenizer.encode(wave_T, 24_000))


def test_missing_and_foreign_checkpoints_are_named(packages, tmp_path, monkeypatch):
    folder, _ = packages
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(FileNotFoundError, match="not in torch hub's cache"):
        EncodecTokenizer.from_pretrained("encodec_24khz")
    with pytest.raises(FileNotFoundError, match=r"holds 0 files encodec_24khz\*\.th"):
        EncodecTokenizer.from_pretrained("encodec_24khz", tmp_path)
    with pytest.raises(ValueError, match="must be one of encodec_24khz, encodec_48khz"):
        EncodecTokenizer.from_pretrained("encodec_32khz", folder)
    (tmp_path / "encodec_24khz.th").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="cannot be read as an EnCodec checkpoint"):
        EncodecTokenizer.from_pretrained("encodec_24khz", tmp_path)
    torch.save({"weights": [1, 2]}, tmp_path / "encodec_24khz.th")
    with pytest.raises(ValueError, match="holds no state dict of tensors"):
        EncodecTokenizer.from_pretrained("encodec_24khz", tmp_path)
    with pytest.raises(ValueError, match="belong to another configuration"):
        EncodecTokenizer("encodec_24khz", read_checkpoint(folder / RELEASES["encodec_48khz"].checkpoint))


def test_torch_hub_cache_is_found(packages, tmp_path, monkeypatch):
    folder, _ = packages
    cached = tmp_path / "checkpoints" / RELEASES["encodec_24khz"].checkpoint
    cached.parent.mkdir()
    cached.symlink_to(folder / cached.name)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert find_checkpoint("encodec_24khz") == cached
