"""What becomes of pictures and sounds in a build: kept as they are where that can be, and what is lost is told."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import soundfile

from mmllm.data import commands
from tests.data_fixtures import RATE, make_folder, write_manifest


def files_of(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {name: tar.extractfile(name).read() for name in tar.getnames()}  # pyright: ignore


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


def test_the_index_counts_the_frames_of_foreign_sounds(tmp_path):
    """Of tars that others made: without codes, at odd rates, of forms whose header says nothing or guesses."""
    make_folder(tmp_path / "tok")
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
    assert commands.index(tmp_path / "t.tar", tmp_path / "tok")["documents"] == 7
    assert commands.verify(tmp_path / "t.tar", tmp_path / "tok") == {"documents": 14, "broken": 0, "errors": []}
