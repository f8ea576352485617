from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from mmllm_tokenizers import audio_tokenizer, sound
from mmllm_tokenizers.audio import (
    KMeansConfig,
    KMeansUnits,
    SmallCodec,
    deduplicate,
    load_audio,
    load_audio_tokenizer,
    repeat_units,
    resample,
    to_mono,
)
from mmllm_tokenizers.codec import Codec, CodecConfig

TINY = CodecConfig(num_filters=4, ratios=(4, 8), dimension=16, num_codebooks=3, codebook_size=16)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def codec() -> Codec:
    """A codec whose codebooks k-means fitted to the latents of an untrained encoder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec = Codec(dataclasses.replace(TINY, warmup_batches=0)).train()
        codec(noise(32, 4000))
    return codec.eval()


@pytest.fixture(scope="module")
def units() -> KMeansUnits:
    config = KMeansConfig(num_clusters=16, num_mels=20, num_iterations=5)
    return KMeansUnits.fit([noise(4000 + 100 * i, seed=i) for i in range(4)], config)


@pytest.fixture(params=["codec", "kmeans", "kmeans of latents"])
def tokenizer(request, codec, units):
    if request.param == "codec":
        return SmallCodec(codec)
    if request.param == "kmeans":
        return units
    config = KMeansConfig(num_clusters=16, hop_samples=32, num_iterations=5)
    return KMeansUnits.fit([noise(4000)], config, codec=codec)


# Tokenizers


def test_batched_equals_one_by_one_at_any_length(tokenizer):
    """Exact: only clips of one length in frames share a batch, so no clip sees another's padding."""
    lengths = [1, 2, 159, 160, 161, 5000, 4999, 31, 33, 1, 4990, 800, 5000]
    waves = [noise(length, seed=seed) for seed, length in enumerate(lengths)]
    batched = tokenizer.encode_batch(waves)
    for wave_T, codes_KF in zip(waves, batched, strict=True):
        assert codes_KF.shape == (tokenizer.num_codebooks, -(-len(wave_T) // tokenizer.hop_samples))
        assert codes_KF.dtype == torch.int64
        assert torch.equal(codes_KF, tokenizer.encode(wave_T, tokenizer.sample_rate))
        assert not codes_KF.is_inference()
    assert tokenizer.encode_batch([]) == []


def test_batches_are_bounded(codec, monkeypatch):
    tokenizer = SmallCodec(codec)
    sizes = []
    encode_equal = tokenizer._encode_equal
    monkeypatch.setattr(tokenizer, "_encode_equal", lambda waves: sizes.append(waves.shape[0]) or encode_equal(waves))
    monkeypatch.setattr(audio_tokenizer, "_BATCH_SECONDS", 1.0)
    tokenizer.encode_batch([noise(4000)] * 5)
    assert sizes == [2, 2, 1]


def test_any_rate_and_channels(tokenizer):
    stereo_CT = noise(2, 11_025)
    codes_KF = tokenizer.encode(stereo_CT, 22_050)
    assert codes_KF.shape[1] == -(-4000 // tokenizer.hop_samples)
    assert torch.equal(codes_KF, tokenizer.encode(stereo_CT.mean(0), 22_050))
    assert tokenizer.encode(noise(1), 48_000).shape[1] == 1
    assert tokenizer.encode(noise(1), 1_000).shape[1] == 1


def test_long_sounds_are_encoded_in_pieces(codec, monkeypatch):
    monkeypatch.setattr(audio_tokenizer, "_PIECE_SECONDS", 0.5)
    tokenizer = SmallCodec(codec)
    wave_T = noise(9_001)
    codes_KF = tokenizer.encode(wave_T, 8000)
    assert codes_KF.shape[1] == tokenizer.num_frames(9_001)
    assert torch.equal(codes_KF[:, :125], tokenizer.encode(wave_T[:4000], 8000))
    assert torch.equal(codes_KF[:, 250:], tokenizer.encode(wave_T[8000:], 8000))


def test_save_load_hash(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "elsewhere")
    loaded = load_audio_tokenizer(tmp_path / "elsewhere")
    assert type(loaded) is type(tokenizer)
    assert loaded.hash == tokenizer.hash
    assert loaded.frame_rate == tokenizer.frame_rate
    wave_T = noise(3000)
    assert torch.equal(loaded.encode(wave_T, 8000), tokenizer.encode(wave_T, 8000))
    torch.testing.assert_close(loaded.codebooks_KVD, tokenizer.codebooks_KVD, rtol=0, atol=0)
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "first/model.safetensors").read_bytes()


def test_the_hash_sees_weights_and_configuration(codec):
    tokenizer = SmallCodec(codec)
    other = Codec(codec.config)
    other.load_state_dict(codec.state_dict())
    assert SmallCodec(other).hash == tokenizer.hash
    with torch.no_grad():
        other.quantizer.codebooks[0, 0, 0] += 1e-3
    assert SmallCodec(other).hash != tokenizer.hash


def test_settings_that_came_later_are_written_only_where_they_say_something(codec, tmp_path):
    """So that hashes of codecs made before stay what they were."""
    SmallCodec(codec).save(tmp_path / "before")
    later = ("spoken_codebooks", "num_bands", "decoder", "search_width")
    assert not set(later) & set(json.loads((tmp_path / "before" / "config.json").read_text())["codec"])
    spoken = Codec(dataclasses.replace(codec.config, spoken_codebooks=1))
    spoken.load_state_dict(codec.state_dict())
    SmallCodec(spoken).save(tmp_path / "now")
    loaded = load_audio_tokenizer(tmp_path / "now")
    assert (loaded.spoken_codebooks, loaded.num_codebooks) == (1, codec.config.num_codebooks)
    assert load_audio_tokenizer(tmp_path / "before").spoken_codebooks == codec.config.num_codebooks
    assert loaded.hash == SmallCodec(spoken).hash != SmallCodec(codec).hash


@pytest.mark.parametrize("kind", ["codec", "kmeans of latents"])
def test_folders_with_the_first_names_keep_their_hash(tmp_path, codec, kind):
    """The hash is in every shard and model; it is computed here as it was first, by hand."""
    config = KMeansConfig(num_clusters=16, hop_samples=32, num_iterations=5)
    tokenizer = SmallCodec(codec) if kind == "codec" else KMeansUnits.fit([noise(4000)], config, codec=codec)
    tokenizer.save(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["codec"]["quantiser_dropout"] = settings["codec"].pop("quantizer_dropout")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    earlier = {"codebooks": "codebooks_KVD", "counts": "counts_KV", "sums": "sums_KVD", "idle": "idle_KV"}
    weights = load_file(tmp_path / "model.safetensors")
    for name in list(weights):
        prefix, _, last = name.rpartition(".")
        if prefix.endswith("quantizer"):
            weights[f"{prefix[:-9]}quantiser.{earlier.get(last, last)}"] = weights.pop(name)
    save_file(weights, tmp_path / "model.safetensors")
    del settings["format_version"]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(weights):
        digest.update(f"{name} {weights[name].dtype} {list(weights[name].shape)}".encode())
        digest.update(weights[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    assert tokenizer.hash == digest.hexdigest()
    loaded = load_audio_tokenizer(tmp_path)
    assert loaded.hash == tokenizer.hash
    assert torch.equal(loaded.encode(noise(1000), 8000), tokenizer.encode(noise(1000), 8000))


def test_codec_decodes_and_limits_codebooks(codec):
    tokenizer = SmallCodec(codec)
    codes_KF = tokenizer.encode(noise(1000), 8000)
    assert tokenizer.decode(codes_KF).shape == (32 * 32,)
    assert tokenizer.decode(codes_KF).dtype == torch.float32
    full_hash = tokenizer.hash
    tokenizer.use_codebooks(2)
    assert torch.equal(tokenizer.encode(noise(1000), 8000), codes_KF[:2])
    assert tokenizer.codebooks_KVD.shape == (2, 16, 16)
    assert tokenizer.decode(codes_KF[:2]).shape == (1024,)
    assert tokenizer.hash == full_hash
    assert tokenizer.decode(codes_KF[:, :0]).shape == (0,)
    with pytest.raises(ValueError, match="num_codebooks is 4; this audio tokenizer has 3"):
        tokenizer.use_codebooks(4)
    with pytest.raises(ValueError, match="remove fillers and pattern first"):
        tokenizer.decode(torch.full((2, 5), 16))


def test_training_on_does_not_change_the_tokenizer(codec):
    other = Codec(codec.config)
    other.load_state_dict(codec.state_dict())
    tokenizer = SmallCodec(other)
    before = tokenizer.encode(noise(1000), 8000)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    assert torch.equal(tokenizer.encode(noise(1000), 8000), before)


def test_damaged_folders_are_named(codec, tmp_path):
    SmallCodec(codec).save(tmp_path)
    with pytest.raises(ValueError, match="kind 'codec', not 'kmeans'"):
        KMeansUnits.load(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(ValueError, match="truncated or foreign"):
        load_audio_tokenizer(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors does not exist"):
        load_audio_tokenizer(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"dimension": 16', '"dimension": 8'))
    with pytest.raises(ValueError, match="wrong shape for weights"):
        load_audio_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(config.replace('"dimension"', '"dimensions"'))
    with pytest.raises(ValueError, match="does not know"):
        load_audio_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(config.replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(ValueError, match="format version 9"):
        load_audio_tokenizer(tmp_path)


# K-means units


def test_deduplication_inverts(units):
    units_U, durations_U = units.encode_units(noise(8000, seed=9), 8000)
    assert bool((units_U[1:] != units_U[:-1]).all())
    assert torch.equal(repeat_units(units_U, durations_U), units.encode(noise(8000, seed=9), 8000)[0])
    units_U, durations_U = deduplicate(torch.tensor([5, 5, 5, 2, 5, 5]))
    assert units_U.tolist() == [5, 2, 5]
    assert durations_U.tolist() == [3, 1, 2]


def test_units_tell_sounds_apart():
    """Steady tones of three pitches: each is one unit for its whole length, and all differ."""
    time_T = torch.arange(8000) / 8000
    waves = [torch.sin(2 * torch.pi * pitch * time_T) for pitch in (200, 800, 2400)]
    units = KMeansUnits.fit(waves, KMeansConfig(num_clusters=6, num_mels=20))
    runs = [units.encode(wave, 8000)[0, 5:-5].unique().tolist() for wave in waves]
    flat = [unit for run in runs for unit in run]
    assert len(flat) == len(set(flat))


def test_units_speak_only_with_a_vocoder(units, tmp_path):
    codes_KF = units.encode(noise(1600), 8000)
    with pytest.raises(ValueError, match="k-means units have no decoder of their own"):
        units.decode(codes_KF)
    units.save(tmp_path)
    spoken = KMeansUnits.load(tmp_path, vocoder=lambda codes: torch.zeros(codes.shape[1] * 160)).decode(codes_KF)
    assert spoken.shape == (1600,)


def test_units_refuse_what_does_not_fit(codec):
    with pytest.raises(ValueError, match="frames of sound are too few for 256 clusters"):
        KMeansUnits.fit([noise(4000)], KMeansConfig())
    with pytest.raises(ValueError, match="they must be equal"):
        KMeansUnits.fit([noise(4000)], KMeansConfig(), codec=codec)
    with pytest.raises(ValueError, match="window_samples is 100"):
        KMeansConfig(window_samples=100)


# Reading and resampling


def test_load_audio_takes_every_kind_of_source(tmp_path):
    wave_CT = noise(2, 800).clamp(-1, 1)
    path = tmp_path / "sound.wav"
    soundfile.write(path, wave_CT.T.numpy(), 16_000, subtype="FLOAT")
    pcm = (wave_CT * 32768).round().to(torch.int16)
    sources = [
        path, str(path), path.read_bytes(), (wave_CT, 16_000), (wave_CT.numpy(), 16_000), (wave_CT.double(), 16_000),
        (pcm, 16_000), (pcm.numpy(), 16_000), (pcm.to(torch.int32) * 65536, 16_000),
    ]  # fmt: skip
    for source in sources:
        loaded_CT, rate = load_audio(source)
        assert rate == 16_000
        assert loaded_CT.dtype == torch.float32
        torch.testing.assert_close(loaded_CT, wave_CT, rtol=0, atol=2e-5)
    assert load_audio(wave_CT[0], 8000)[0].shape == (1, 800)
    torch.testing.assert_close(to_mono(wave_CT), wave_CT.mean(0))
    for kind in ("FLAC", "OGG"):
        buffer = io.BytesIO()
        soundfile.write(buffer, wave_CT.T.numpy(), 16_000, format=kind)
        assert load_audio(buffer.getvalue())[0].shape == (2, 800)


def test_bad_sound_is_named(tmp_path):
    def written(name: str, samples: np.ndarray) -> str:
        soundfile.write(tmp_path / name, samples, 8000, subtype="FLOAT")
        return str(tmp_path / name)

    bad = np.zeros(100, dtype=np.float32)
    bad[7] = np.nan
    (tmp_path / "text.wav").write_text("not a sound")
    (tmp_path / "empty.wav").write_bytes(b"")
    good = written("good.wav", np.zeros(8000, dtype=np.float32))
    (tmp_path / "cut.flac").write_bytes(b"fLaC" + b"\0" * 10)
    cases = [
        (written("zero.wav", np.zeros(0, dtype=np.float32)), r"zero\.wav holds no sound: its length is zero"),
        (written("nan.wav", bad), r"nan\.wav holds 1 samples that are NaN or infinite"),
        (tmp_path / "text.wav", r"text\.wav cannot be read as sound"),
        (tmp_path / "empty.wav", r"empty\.wav cannot be read as sound"),
        (tmp_path / "cut.flac", r"cut\.flac cannot be read as sound"),
        (b"abc", "sound of bytes cannot be read as sound"),
        (np.zeros(5), "has no sample rate"),
        ((np.zeros((8000, 2)), 8000), r"transpose an array of \[samples, channels\]"),
        ((np.zeros(5, dtype=bool), 8000), "samples must be float, or integer PCM"),
        ((np.zeros(5), 0), "sample rate of 0 Hz"),
        ({"array": 1}, "cannot be read from dict"),
    ]
    for source, message in cases:
        with pytest.raises(ValueError, match=message):
            load_audio(source)
    with pytest.raises(FileNotFoundError, match=r"none\.wav does not exist"):
        load_audio(tmp_path / "none.wav")
    with pytest.raises(ValueError, match=r"row 3 lasts 1\.0 s; the longest allowed is 0\.5 s"):
        load_audio(good, name="row 3", max_seconds=0.5)


@pytest.mark.parametrize(
    ("from_rate", "to_rate"), [(44_100, 8_000), (22_050, 24_000), (8_000, 24_000), (48_000, 8_000)]
)
def test_resampling_keeps_a_tone(from_rate, to_rate):
    seconds = 0.5
    time_from = torch.arange(int(seconds * from_rate)) / from_rate
    time_to = torch.arange(int(seconds * to_rate)) / to_rate
    resampled = resample(torch.sin(2 * torch.pi * 440 * time_from), from_rate, to_rate)
    assert abs(len(resampled) - len(time_to)) <= 1
    inner = slice(200, len(time_to) - 200)
    torch.testing.assert_close(resampled[inner], torch.sin(2 * torch.pi * 440 * time_to)[inner], atol=5e-3, rtol=0)


@pytest.mark.parametrize("from_rate", [44_101, 47_999, 8_001, 96_001, 191_999, 11_027, 999_983])
def test_odd_rates_use_a_small_filter_bank(from_rate):
    numerator, denominator = sound._simple_ratio(from_rate, 8_000)
    assert numerator * denominator <= 4_100_000
    assert numerator / denominator == pytest.approx(from_rate / 8_000, rel=2e-4)
    assert len(resample(torch.zeros(from_rate // 10), from_rate, 8_000)) == pytest.approx(800, abs=2)
