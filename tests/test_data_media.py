"""What becomes of pictures and sounds in a build: kept as they are where that can be, and what is lost is told."""

from __future__ import annotations

import builtins
import errno
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image, ImageOps

from mmllm.data import commands
from mmllm.data.rows.bad_rows import ManifestError
from mmllm.data.samples.decode import decode_image
from mmllm_tokenizers.audio import load_audio
from tests.data_fixtures import RATE, make_folder, write_manifest


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tok")
    make_folder(path)
    return path


def files_of(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {name: tar.extractfile(name).read() for name in tar.getnames()}  # pyright: ignore


def photo(size: tuple[int, int] = (120, 90), mode: str = "RGB") -> Image.Image:
    """Colours that change within a few pixels, as subsampling would blur them."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC).convert(mode)


def difference(one: bytes, other: bytes) -> float:
    levels = [np.asarray(decode_image(data), dtype=np.float64) for data in (one, other)]
    return float(np.abs(levels[0] - levels[1]).mean())


def tone(num_samples: int = 1600) -> np.ndarray:
    return np.sin(np.arange(num_samples) * 0.3).astype(np.float32)


def test_sounds_above_one_are_scaled_and_counted(tmp_path):
    soundfile.write(tmp_path / "ok.wav", 0.8 * tone(), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "loud.wav", 1.5 * tone(), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "pair.wav", np.stack([1.5 * tone(), -1.5 * tone()], 1), RATE, subtype="DOUBLE")
    rows = [{"id": name, "audio": f"{name}.wav", "text": "x"} for name in ("ok", "loud", "pair")]
    rows.append({"id": "i", "segments": [{"audio": "loud.wav"}, {"text": "x"}]})
    told = commands.build(write_manifest(tmp_path, rows), tmp_path / "s", perturb=2, workers=2)
    assert told["num_bad"] == 0 and told["noted"] == json.loads((tmp_path / "s/shards.json").read_text())["noted"]
    assert told["noted"]["scaled_sounds"]["num"] == 3
    first = told["noted"]["scaled_sounds"]["first"]
    assert [line for line in ("2", "3", "4") if any(f"manifest.jsonl:{line}: " in message for message in first)] == [
        "2", "3", "4",
    ]  # fmt: skip
    assert all("loud.wav reaches 1.5" in message for message in first if "pair" not in message)

    files = files_of(tmp_path / "s" / "audio-000000.tar") | files_of(tmp_path / "s" / "interleaved-000000.tar")
    sounds = {name: soundfile.read(io.BytesIO(data))[0] for name, data in files.items() if name.endswith("flac")}
    assert len(sounds) == 10
    np.testing.assert_allclose(sounds["ok.flac"], 0.8 * tone(), atol=1e-4)
    for name in ("loud.flac", "i.0.flac"):
        np.testing.assert_allclose(sounds[name], tone() / np.abs(tone()).max(), atol=1e-4)
    np.testing.assert_allclose(sounds["pair.flac"][:, 1], -tone() / np.abs(tone()).max(), atol=1e-4)
    for name, wave in sounds.items():  # reversed channels leave something to make copies of, and no copy is cut off
        assert np.sqrt(np.mean(wave**2)) > 0.05, name
        assert np.sum(np.abs(wave) > 0.9999 * np.abs(wave).max()) < 0.02 * wave.size, name


def test_sounds_that_are_cut_short_are_bad_rows(tmp_path):
    rng = np.random.default_rng(0)
    wave = (0.2 * rng.standard_normal(40_000)).astype(np.float32)
    rows = []
    for name, kind, subtype in (("a.wav", "WAV", None), ("b.mp3", "MP3", None), ("c.ogg", "OGG", "VORBIS"),
                                ("d.opus", "OGG", "OPUS"), ("e.flac", "FLAC", None)):  # fmt: skip
        soundfile.write(tmp_path / name, wave, RATE, format=kind, subtype=subtype)
        data = (tmp_path / name).read_bytes()
        (tmp_path / f"cut-{name}").write_bytes(data[: len(data) * 2 // 3])
        rows += [{"id": name, "audio": name, "text": "x"}, {"id": f"cut-{name}", "audio": f"cut-{name}", "text": "x"}]
    data = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "pipe.wav").write_bytes(data[:4] + b"\xff" * 4 + data[8:40] + b"\xff" * 4 + data[44:])
    rows.append({"id": "pipe", "audio": "pipe.wav", "text": "x"})
    told = commands.build(write_manifest(tmp_path, rows), tmp_path / "s", max_bad_fraction=0.5)
    assert (told["num_samples"], told["num_bad"]) == (6, 5)
    for number, message in enumerate(told["bad"]):
        assert f"manifest.jsonl:{2 * number + 2}: " in message and "cut-" in message and "cut short" in message
    files = files_of(tmp_path / "s" / "audio-000000.tar")
    sounds = {name: data for name, data in files.items() if name.endswith("flac")}
    assert {len(soundfile.read(io.BytesIO(data))[0]) for data in sounds.values()} == {40_000}


def test_the_index_counts_the_frames_of_foreign_sounds(tmp_path, folder):
    """Of tars that others made: without codes, at odd rates, of forms whose header says nothing or guesses."""
    rng = np.random.default_rng(0)
    wave = (0.2 * rng.standard_normal(34_928)).astype(np.float32)
    wave[9000:] *= 0.001
    mp3 = io.BytesIO()
    soundfile.write(mp3, wave, 16_000, format="MP3", bitrate_mode="VARIABLE", compression_level=0.3)
    wav = {rate: io.BytesIO() for rate in (7350, 11_025, 11_027, 44_101)}
    for rate, stream in wav.items():
        soundfile.write(stream, wave, rate, format="WAV")
    pipe = wav[11_025].getvalue()
    sounds = {"a.mp3": mp3.getvalue(), "b.mp3": mp3.getvalue()[mp3.getvalue().index(b"\xff\xf3", 100) :]}
    sounds |= {f"w{rate}.wav": stream.getvalue() for rate, stream in wav.items()}
    sounds["p.wav"] = pipe[:4] + bytes(4) + pipe[8:40] + bytes(4) + pipe[44:]
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, data in sounds.items():
            for path, content in ((name, data), (f"{name.partition('.')[0]}.txt", b"red")):
                member = tarfile.TarInfo(path)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    assert commands.index(tmp_path / "t.tar", folder)["documents"] == 7
    assert commands.verify(tmp_path / "t.tar", folder) == {"documents": 14, "broken": 0, "errors": []}


def test_pictures_stay_as_they_are_where_nothing_must_change(tmp_path, folder):
    upright, more = Image.Exif(), [ImageOps.mirror(photo())]
    upright[0x0112], upright[0x010F] = 1, "camera"
    photo().save(tmp_path / "camera.jpg", exif=upright, quality=70)
    photo(mode="L").save(tmp_path / "grey.jpg")
    photo().save(tmp_path / "two.mpo", "MPO", save_all=True, append_images=more)
    photo().save(tmp_path / "lossy.webp")
    photo().save(tmp_path / "exact.webp", lossless=True)
    photo().save(tmp_path / "a.avif")
    photo().save(tmp_path / "p.png")
    photo(mode="L").save(tmp_path / "grey.png")
    names = ["camera.jpg", "grey.jpg", "two.mpo", "lossy.webp", "exact.webp", "a.avif", "p.png", "grey.png"]
    rows = [{"id": f"r{n}", "image": name, "text": "red"} for n, name in enumerate(names)]
    rows.append({"id": "i", "segments": [{"image": "a.avif"}, {"text": "red"}]})
    told = commands.build(write_manifest(tmp_path, rows), tmp_path / "s")
    assert told["num_bad"] == 0 and told["noted"]["first_pictures"]["num"] == 1
    assert "manifest.jsonl:3: " in told["noted"]["first_pictures"]["first"][0]
    files = files_of(tmp_path / "s" / "caption-000000.tar")
    for number, name in enumerate(names):
        ending = {"mpo": "jpg"}.get(name[-3:], name.partition(".")[2])
        assert files[f"r{number}.{ending}"] == (tmp_path / name).read_bytes(), name
    assert files_of(tmp_path / "s" / "interleaved-000000.tar")["i.0.avif"] == (tmp_path / "a.avif").read_bytes()
    commands.index(tmp_path / "s", folder)
    assert commands.verify(tmp_path / "s", folder) == {"documents": 9, "broken": 0, "errors": []}


def test_what_was_lossy_stays_lossy_and_what_was_not_exact(tmp_path):
    turned, large, more = Image.Exif(), photo((1600, 1200)), [ImageOps.mirror(photo())]
    turned[0x0112] = 6
    photo().save(tmp_path / "turned.jpg", exif=turned)
    photo(mode="CMYK").save(tmp_path / "cmyk.jpg")
    large.save(tmp_path / "large.jpg", quality=60)
    large.save(tmp_path / "large.mpo", "MPO", save_all=True, append_images=more)
    large.save(tmp_path / "large.webp")
    large.save(tmp_path / "large.avif")
    photo().save(tmp_path / "moving.webp", save_all=True, append_images=more)
    photo().save(tmp_path / "film.avif", save_all=True, append_images=more)
    photo().save(tmp_path / "scan.tiff", compression="jpeg")
    lossy = sorted(path.name for path in tmp_path.iterdir())
    large.save(tmp_path / "large.png")
    large.save(tmp_path / "exact.webp", lossless=True)
    photo().quantize(32).save(tmp_path / "palette.png")
    photo().quantize(32).save(tmp_path / "moving.gif", save_all=True, append_images=[photo().quantize(8)])
    photo().save(tmp_path / "moving.png", save_all=True, append_images=more)
    photo().save(tmp_path / "b.bmp")
    names = sorted(path.name for path in tmp_path.iterdir())
    rows = [{"id": f"r{n}", "image": name, "text": "red"} for n, name in enumerate(names)]
    told = commands.build(write_manifest(tmp_path, rows), tmp_path / "s")
    assert told["num_bad"] == 0 and told["noted"]["first_pictures"]["num"] == 5
    files = files_of(tmp_path / "s" / "caption-000000.tar")
    for number, name in enumerate(names):
        ending = next(ending for ending in ("jpg", "png") if f"r{number}.{ending}" in files)
        stored, original = files[f"r{number}.{ending}"], (tmp_path / name).read_bytes()
        assert ending == ("jpg" if name in lossy else "png"), name
        with Image.open(io.BytesIO(stored)) as picture:
            assert picture.mode == "RGB" and not picture.getexif() and max(picture.size) <= 1024
            if ending == "jpg":
                assert len(set(layer[1:3] for layer in picture.layer)) == 1, "its colours are as fine as its grey"
        if "large" in name or name == "exact.webp":
            picture = decode_image(original)
            picture.thumbnail((1024, 1024), Image.Resampling.BICUBIC)
            assert ending == "png" or len(stored) < 0.6 * len(picture_bytes(picture))
            assert difference(stored, picture_bytes(picture)) < (3 if ending == "jpg" else 1e-9), name
        else:
            assert difference(stored, original) < (3 if ending == "jpg" else 1e-9), name


def picture_bytes(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def test_files_that_the_machine_cannot_open_are_no_bad_rows(tmp_path, monkeypatch):
    photo().save(tmp_path / "a.jpg")
    soundfile.write(tmp_path / "a.wav", 0.5 * tone(), RATE)
    opened = builtins.open

    def failing(path: object, *args: object, **options: object) -> object:
        if str(path).endswith("a.wav"):
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        return opened(path, *args, **options)  # pyright: ignore

    monkeypatch.setattr(builtins, "open", failing)
    rows = [{"id": str(n), "audio": "a.wav", "text": "x"} for n in range(9)]
    with pytest.raises(OSError, match="Too many open files"):
        commands.build(write_manifest(tmp_path, rows), tmp_path / "s", max_bad_fraction=1.0)
    with pytest.raises(OSError, match="Too many open files"):
        load_audio(tmp_path / "a.wav")


@pytest.mark.parametrize(("num_channels", "rate"), [(9, 16_000), (1, 700_000)])
def test_sounds_that_no_flac_holds_are_named_in_plain_words(tmp_path, num_channels, rate):
    soundfile.write(tmp_path / "a.wav", np.stack([tone()] * num_channels, 1), rate, subtype="PCM_16")
    manifest = write_manifest(tmp_path, [{"audio": "a.wav", "text": "a tone"}])
    with pytest.raises(ManifestError) as caught:
        commands.build(manifest, tmp_path / "out")
    said = str(caught.value)
    assert f"a.wav: {num_channels} channels at {rate} Hz can't be stored as FLAC" in said and "convert it" in said
    assert "object at" not in said


def test_a_png_with_a_wrong_checksum_is_a_bad_row(tmp_path):
    photo().save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    place = data.index(b"IDAT") + 4 + int.from_bytes(data[33:37], "big")
    (tmp_path / "a.png").write_bytes(data[:place] + b"abcd" + data[place + 4 :])
    with pytest.raises(ManifestError, match=r"a\.png: the picture is broken: the checksum of chunk IDAT"):
        commands.build(write_manifest(tmp_path, [{"image": "a.png", "text": "x"}]), tmp_path / "out")
