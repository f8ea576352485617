"""Sound files as people have them: whole ones are read whole, cut ones are named, and nothing is clipped or lost."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import soundfile
import torch

from mmllm_tokenizers import audio_tokenizer, sound_files
from mmllm_tokenizers.audio import (
    AudioTokenizer,
    KMeansConfig,
    KMeansUnits,
    SmallCodec,
    load_audio,
    read_sound,
    resample,
    resampled_length,
    sound_length,
    to_channels,
    to_mono,
)
from mmllm_tokenizers.codec import Codec, CodecConfig
from mmllm_tokenizers.sound_files import examine

RATE = 16_000


def noise(num_samples: int, num_channels: int = 1, seed: int = 0) -> np.ndarray:
    """float32 [T, C] of speech's loudness, dull enough for every codec."""
    white_TC = np.random.default_rng(seed).standard_normal((num_samples + 63, num_channels))
    smooth_TC = np.apply_along_axis(np.convolve, 0, white_TC, np.hanning(64), "valid")
    return (0.3 * smooth_TC / np.abs(smooth_TC).max()).astype(np.float32)


def encoded(kind: str, wave_TC: np.ndarray, rate: int = RATE, subtype: str | None = None, **options: object) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, wave_TC, rate, format=kind, subtype=subtype, **options)
    return stream.getvalue()


def is_read(data: bytes, num_samples: int, rate: int = RATE) -> bool:
    """Whether as many samples are read as the header tells, and as there should be."""
    wave_CT, found = load_audio(data)
    assert sound_length(data, "row 7") == (wave_CT.shape[1], found)
    return (wave_CT.shape[1], found) == (num_samples, rate)


def is_cut(data: bytes) -> bool:
    with pytest.raises(ValueError, match=r"^row 7 (is cut short: .*\d|cannot be read as sound: .*cut short)"):
        load_audio(data, name="row 7")
    return True


def chunk(name: bytes, content: bytes, size: int | None = None, order: str = "<") -> bytes:
    length = len(content) if size is None else size
    return name + struct.pack(f"{order}I", length) + content + b"\0" * (len(content) % 2)


def wav(*chunks: bytes, size: int = 0, name: bytes = b"RIFF", order: str = "<") -> bytes:
    return name + struct.pack(f"{order}I", size) + b"WAVE" + b"".join(chunks)


FORMAT = chunk(b"fmt ", struct.pack("<HHIIHH", 1, 1, RATE, 2 * RATE, 2, 16))
SAMPLES = np.arange(2000, dtype="<i2").tobytes()

# Formats


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("WAV", {}), ("WAV", {"subtype": "PCM_24"}), ("WAV", {"subtype": "FLOAT"}), ("WAV", {"subtype": "ULAW"}),
        ("WAV", {"subtype": "IMA_ADPCM"}), ("WAV", {"endian": "BIG"}), ("WAVEX", {}), ("RF64", {}), ("W64", {}),
        ("AIFF", {}), ("AU", {}), ("FLAC", {}), ("OGG", {"subtype": "VORBIS"}), ("OGG", {"subtype": "OPUS"}),
        ("MP3", {}), ("MP3", {"bitrate_mode": "CONSTANT", "compression_level": 0.5}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("num_channels", [1, 2])
def test_whole_files_are_read_and_cut_ones_named(kind, options, num_channels):
    data = encoded(kind, noise(40_000, num_channels), **options)
    num_samples = load_audio(data)[0].shape[1]
    assert num_samples == 40_000 or (options.get("subtype") == "IMA_ADPCM" and 40_000 <= num_samples < 42_000)
    assert is_read(data, num_samples)
    for length in (len(data) * 99 // 100, len(data) * 9 // 10, len(data) // 2, len(data) // 10, len(data) - 2):
        assert is_cut(data[:length]), length


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 24_000, 44_100, 48_000])
@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE", "AVERAGE"])
@pytest.mark.parametrize("num_channels", [1, 2])
def test_mp3_without_a_header_of_its_own(rate, mode, num_channels):
    """libsndfile guesses at its length, and gives no more than that: of a file of speech, half of it."""
    samples_TC = noise(60_000, num_channels)
    samples_TC[20_000:] *= 0.001  # so that a variable bitrate begins high
    whole = encoded("MP3", samples_TC, rate, bitrate_mode=mode, compression_level=0.5)
    told = sound_files._mp3_frame(whole, 0)
    assert told is not None and b"LAME" in whole[: told.size]
    place, bare = told.size, whole[told.size :]
    wave_CT, _ = load_audio(bare)
    assert 60_000 <= wave_CT.shape[1] < 60_000 + 3 * 1152
    assert is_read(bare, wave_CT.shape[1], rate)
    expected_CT, _ = load_audio(whole)
    delay = next(start for start in range(2500) if torch.allclose(
        wave_CT[:, start : start + 3000], expected_CT[:, :3000], atol=1e-4
    ))  # fmt: skip
    torch.testing.assert_close(wave_CT[:, delay : delay + 59_000], expected_CT[:, :59_000], rtol=0, atol=1e-4)
    tagged = b"ID3\x03\0\0\0\0\0\x0a" + bytes(10) + bare + b"TAG" + bytes(125)
    assert is_read(tagged, wave_CT.shape[1], rate)
    assert is_cut(bare[:-3]) and is_cut(bare[:1000]) and is_cut(tagged[: -128 - 3])
    frame = sound_files._mp3_frame(whole, place)
    assert frame is not None and is_cut(whole[: place + frame.size])  # between two frames, as its header tells


def test_mp3s_in_one_file_are_read_to_the_end():
    one, other = (encoded("MP3", noise(40_000, seed=seed)) for seed in (1, 2))
    tag = b"ID3\x03\0\0\0\0\0\x0a" + bytes(10)
    for data in (
        one + other,
        one + tag + other,
        one + b"TAG" + bytes(125) + other,
        tag + one + b"junk\xff\xfb" * 9 + other,
    ):
        wave_CT, _ = load_audio(data)
        assert sound_length(data, "x")[0] == wave_CT.shape[1] and 80_000 <= wave_CT.shape[1] < 80_000 + 4 * 1152


def test_a_tag_before_flac_is_no_mp3():
    data = b"ID3\x03\0\0\0\0\0\x0a" + bytes(10) + encoded("FLAC", noise(300_000))
    assert examine(data).data == data and not examine(data).wrong


# WAV


@pytest.mark.parametrize(
    ("riff", "size"),
    [
        (0xFFFFFFFF, 0xFFFFFFFF), (0, 0), (36, 0), (0x7FFFF024, 0x7FFFF000), (0x7FFFFFFF, 0x7FFFFFFF - 36),
        (0x80000024, 0x80000000), (0xFFFFFFFF, 0xFFFFFFFF - 36), (0xFFFFFFFF, 4000),
    ],
)  # fmt: skip
def test_wavs_written_to_a_pipe_are_read_whole(riff, size):
    for extra in ((), (chunk(b"LIST", b"INFOISFT\x05\0\0\0Lavf\0\0"),)):
        data = wav(FORMAT, *extra, chunk(b"data", SAMPLES, size), size=riff)
        assert is_read(data, 2000)
        assert (load_audio(data)[0][0] * 32768).round().tolist() == list(range(2000))
    big = chunk(b"fmt ", struct.pack(">HHIIHH", 1, 1, RATE, 2 * RATE, 2, 16), order=">")
    data = chunk(b"data", np.arange(2000, dtype=">i2").tobytes(), size, ">")
    assert is_read(wav(big, data, size=riff, name=b"RIFX", order=">"), 2000)


@pytest.mark.parametrize("name", [b"RF64", b"BW64"])
@pytest.mark.parametrize("size", [4000, 0, (1 << 64) - 1])
def test_sizes_of_64_bits(name, size):
    def long(size: int, there: int) -> bytes:
        sizes = chunk(b"ds64", struct.pack("<QQQI", there + 80, size, 0, 0))
        return wav(sizes, FORMAT, chunk(b"data", SAMPLES[:there], 0xFFFFFFFF), size=0xFFFFFFFF, name=name)

    assert is_read(long(size, 4000), 2000)
    with pytest.raises(ValueError, match="row 7 is cut short: its header says 4000 bytes of sound, 3000 are there"):
        load_audio(long(4000, 3000), name="row 7")


def test_odd_and_foreign_chunks_of_a_wav():
    junk, odd = chunk(b"JUNK", bytes(28)), chunk(b"LIST", b"INFO" + chunk(b"ISFT", b"Lavf5") + b"x")
    extensible = chunk(b"fmt ", struct.pack("<HHIIHHHHI", 0xFFFE, 1, RATE, 2 * RATE, 2, 16, 22, 16, 4)
                       + b"\x01\0\0\0\0\0\x10\0\x80\0\0\xaa\0\x38\x9b\x71")  # fmt: skip
    for chunks in ((junk, FORMAT, odd), (odd, extensible, chunk(b"fact", struct.pack("<I", 2000)))):
        data = wav(*chunks, chunk(b"data", SAMPLES), odd, size=9999)
        assert is_read(data, 2000)
        whole = wav(*chunks, chunk(b"data", SAMPLES), size=9999)
        assert is_cut(whole[:-1])
    unpadded = b"note" + struct.pack("<I", 9) + b"123456789"
    assert is_read(wav(unpadded, FORMAT, unpadded, chunk(b"data", SAMPLES)), 2000)
    assert is_read(wav(chunk(b"fmt ", FORMAT[8:16] + struct.pack("<IHH", RATE, 1, 8)), chunk(b"data", bytes(777))), 777)
    with pytest.raises(ValueError, match="holds no sound: its length is zero"):
        load_audio(wav(FORMAT, chunk(b"data", b""), odd, size=60))
    with pytest.raises(ValueError, match="cannot be read as sound"):
        load_audio(wav(FORMAT, odd, size=60))


def test_a_wav_says_what_is_missing():
    with pytest.raises(ValueError, match="row 7 is cut short: its header says 4000 bytes of sound, 3000 are there"):
        load_audio(wav(FORMAT, chunk(b"data", SAMPLES[:3000], 4000), size=4036), name="row 7")


def test_ogg_streams_one_after_another_are_named():
    data = encoded("OGG", noise(20_000))
    with pytest.raises(ValueError, match=f"row 7 holds several sounds.*split it at byte {len(data)}"):
        load_audio(data + data, name="row 7")
    pages = [place for place in range(len(data)) if data[place : place + 4] == b"OggS"]
    with pytest.raises(ValueError, match="row 7 is cut short: its last page has no end mark"):
        load_audio(data[: pages[-1]], name="row 7")


def test_a_flac_that_does_not_know_its_length_is_named():
    data = bytearray(encoded("FLAC", noise(20_000)))
    data[21] &= 0xF0
    data[22:26] = bytes(4)  # as written to a pipe
    for read in (load_audio, lambda source, name: sound_length(source, name)):
        with pytest.raises(ValueError, match="row 7 does not say how long it is"):
            read(bytes(data), name="row 7")


# Loudness and channels


def test_sound_above_one_is_scaled_not_clipped():
    wave_TC = noise(8000, 2) * 5
    for source in (
        encoded("WAV", wave_TC, subtype="FLOAT"),
        (wave_TC.T.copy(), RATE),
        (torch.from_numpy(wave_TC.T), RATE),
    ):
        sound = read_sound(source)
        assert sound.peak == pytest.approx(1.5) and float(sound.wave_CT.abs().max()) == 1.0
        np.testing.assert_allclose(sound.wave_CT.numpy() * sound.peak, wave_TC.T, atol=1e-6)
    within = read_sound(encoded("WAV", noise(8000, 2), subtype="FLOAT"))
    assert within.peak == pytest.approx(0.3) and np.array_equal(within.wave_CT.numpy(), noise(8000, 2).T)


def test_channels_that_cancel_each_other_do_not_vanish():
    left_T, other_T = torch.from_numpy(noise(8000, 2).T)
    for right_T in (-left_T, -0.8 * left_T, -left_T + 0.3 * other_T):
        mono_T = to_mono(torch.stack([left_T, right_T]))
        assert mono_T.square().mean() > 0.7 * left_T.square().mean()
        assert torch.equal(to_channels(torch.stack([right_T, left_T]), 1)[0].abs(), mono_T.abs())
    for right_T in (left_T, 0.5 * left_T, other_T, 0 * left_T, left_T + other_T):  # what has a mean keeps it
        pair_CT = torch.stack([left_T, right_T])
        assert torch.equal(to_mono(pair_CT), pair_CT.mean(0))
    five_CT = torch.from_numpy(noise(8000, 5).T)
    assert torch.equal(to_mono(five_CT), five_CT.mean(0))
    assert torch.equal(to_mono(torch.zeros(2, 9)), torch.zeros(9))


# Frames


@pytest.mark.parametrize("from_rate", [7350, 8000, 11_025, 11_027, 22_050, 44_100, 44_101, 48_000])
@pytest.mark.parametrize("to_rate", [8000, 16_000, 24_000])
def test_resampled_length_is_exact(from_rate, to_rate):
    """torchaudio counts in float32: 16,777,217 samples are too many for it."""
    ratio = {(44_101, 8000), (44_101, 16_000), (44_101, 24_000), (11_027, 8000), (11_027, 16_000), (11_027, 24_000)}
    for num_samples in (1, 2, 159, 8000, from_rate * 61 + 1, from_rate * 90 + 7, 361_355, 4_200_001):
        found = resample(torch.zeros(num_samples), from_rate, to_rate).shape[0]
        assert found == resampled_length(num_samples, from_rate, to_rate)
        if (from_rate, to_rate) not in ratio:
            assert found == -(-num_samples * to_rate // from_rate)


def test_a_resampled_tail_is_kept():
    wave_T = torch.from_numpy(noise(361_355)[:, 0])
    wanted = resampled_length(len(wave_T), 11_027, 16_000)
    assert sound_resampler(wave_T).shape[0] < wanted, "this length shows nothing: take another"
    out_T = resample(wave_T, 11_027, 16_000)
    torch.testing.assert_close(out_T[: wanted - 1], sound_resampler(wave_T)[: wanted - 1], rtol=0, atol=1e-6)


def sound_resampler(wave_T: torch.Tensor) -> torch.Tensor:
    from mmllm_tokenizers import sound

    return sound._resampler(*sound._simple_ratio(11_027, 16_000))(wave_T)


@pytest.fixture(scope="module")
def tokenizers() -> list[AudioTokenizer]:
    torch.manual_seed(0)
    codec = Codec(CodecConfig(sample_rate=8000, num_filters=2, ratios=(8, 8), dimension=8, codebook_size=16))
    waves = [torch.from_numpy(noise(40_000, seed=seed)[:, 0]) for seed in range(2)]
    return [SmallCodec(codec), KMeansUnits.fit(waves, KMeansConfig(sample_rate=16_000, num_clusters=8))]


@pytest.mark.parametrize("rate", [7350, 8000, 11_025, 16_000, 22_050, 44_100, 44_101])
def test_frames_are_as_many_as_counted(tokenizers, rate, monkeypatch):
    monkeypatch.setattr(audio_tokenizer, "_PIECE_SECONDS", 1.5)
    rng = np.random.default_rng(rate)
    for tokenizer in tokenizers:
        for num_samples in (1, 50, *rng.integers(100, 5 * rate, 6).tolist(), 3 * rate, 3 * rate + 1):
            codes_KF = tokenizer.encode(torch.zeros(1, num_samples), rate)
            assert codes_KF.shape[1] == tokenizer.num_frames_of(num_samples, rate)


def test_frames_at_odd_rates_and_beyond_a_minute(tokenizers):
    for rate, num_samples in ((11_027, 3264), (11_027, 361_355), (44_101, 34_928), (11_025, 61 * 11_025 + 3)):
        codes_KF = tokenizers[0].encode(torch.zeros(1, num_samples), rate)
        assert codes_KF.shape[1] == tokenizers[0].num_frames_of(num_samples, rate)


def written(form: str, subtype: str, num_channels: int = 1) -> tuple[np.ndarray, bytes]:
    wave_T = 0.5 * np.sin(np.arange(4800) / 9)
    stream = io.BytesIO()
    soundfile.write(stream, np.stack([wave_T] * num_channels, 1), 8000, format=form, subtype=subtype)
    return wave_T, stream.getvalue()


@pytest.mark.parametrize("form", ["WAV", "AIFF"])
def test_gsm_which_cannot_be_sought_in_is_read(form):
    wave_T, data = written(form, "GSM610")
    found_CT, rate = load_audio(data, name="row 7")
    assert rate == 8000 and sound_length(data, "row 7") == (found_CT.shape[1], rate)
    assert 4800 <= found_CT.shape[1] < 4800 + 2 * 320  # whole blocks
    assert np.abs(found_CT[0, :4800].numpy() - wave_T).mean() < 0.03


def test_sounds_of_kinds_that_cannot_be_read_are_named():
    with pytest.raises(ValueError, match=r"^row 7 cannot be read as sound: .*convert it to WAV or FLAC$"):
        load_audio(written("AIFF", "DWVW_16")[1], name="row 7")


@pytest.mark.parametrize("error", [ValueError("odd"), TypeError("odd"), RuntimeError("odd")])
def test_whatever_the_decoder_raises_is_named(error, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(soundfile.SoundFile, "read", fail)
    with pytest.raises(ValueError, match=r"^row 7 cannot be read as sound: odd; .*convert it"):
        load_audio(written("WAV", "PCM_16")[1], name="row 7")


def test_a_sound_for_which_there_is_no_memory_is_named(monkeypatch):
    def fail(*_, **__):
        raise MemoryError("Unable to allocate")

    monkeypatch.setattr(soundfile.SoundFile, "read", fail)
    with pytest.raises(MemoryError, match=r"^row 7 has 4800 samples, for which there is no memory; split it"):
        load_audio(written("WAV", "PCM_16")[1], name="row 7")
