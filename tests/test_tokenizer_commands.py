"""`mmllm tokenizer encodec` and `kmeans`: audio tokenizer folders that `mmllm tokenizer assemble` takes."""

from __future__ import annotations

import json
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encodec.model import EncodecModel

from mmllm.cli.main import main
from mmllm.data import commands
from mmllm_tokenizers.audio import EncodecTokenizer, KMeansUnits, load_audio, load_audio_tokenizer
from mmllm_tokenizers.encodec_tokenizer import RELEASES
from mmllm_tokenizers.folder import TokenizerFolder
from tests.data_fixtures import RATE, make_folder, mixed_manifest, write_manifest, write_sound


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["tokenizer", *map(str, arguments)]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["tokenizer", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of encodec_24khz, in a file like the published one."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the package uses torch's old weight_norm
        torch.manual_seed(0)
        model = EncodecModel.encodec_model_24khz(pretrained=False)
        for layer in model.quantizer.vq.layers:  # an untrained codebook is all zeros
            torch.nn.init.normal_(layer._codebook.embed)
    path = tmp_path_factory.mktemp("encodec") / RELEASES["encodec_24khz"].checkpoint
    torch.save(model.state_dict(), path)
    return path


def test_encodec_weights_become_a_tokenizer_folder(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "encodec"
    said = run(capsys, "encodec", "encodec_24khz", "--weights", weights, "--num_codebooks", 4, "--out", out)
    facts = {"sample_rate": 24_000, "frame_rate": 75.0, "num_codebooks": 4, "codebook_size": 1024}
    direct = EncodecTokenizer.from_pretrained("encodec_24khz", weights, num_codebooks=4)
    assert said == {"out": str(out), **facts, "hash": direct.hash}
    wave_T = 0.3 * torch.randn(4000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(load_audio_tokenizer(out).encode(wave_T, 16_000), direct.encode(wave_T, 16_000))

    make_folder(tmp_path / "text")
    assembled = tmp_path / "tokenizer"
    run(capsys, "assemble", "--text", tmp_path / "text", "--codec", out, "--num_codebooks", 2, "--out", assembled)
    folder = TokenizerFolder.load(assembled)
    assert (folder.num_codebooks, folder.sample_rate) == (2, 24_000)
    assert folder.vocabulary.size == folder.text.vocab_size + 2 * 1025
    assert torch.equal(folder.require_audio().encode(wave_T, 16_000), direct.encode(wave_T, 16_000)[:2])


def test_what_is_no_encodec_model_exits_with_2(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    out = ["--out", tmp_path / "out"]
    assert "encodec_24khz, encodec_48khz" in refused(capsys, "encodec", "encodec_16khz", "--weights", weights, *out)
    assert "not in torch hub's cache" in refused(capsys, "encodec", "encodec_24khz", *out)
    assert str(tmp_path / "no.th") in refused(capsys, "encodec", "encodec_24khz", "--weights", tmp_path / "no.th", *out)
    assert "another configuration" in refused(capsys, "encodec", "encodec_48khz", "--weights", weights, *out)
    said = refused(capsys, "encodec", "encodec_24khz", "--weights", weights, "--num_codebooks", 33, *out)
    assert "num_codebooks is 33; this audio tokenizer has 32" in said
    assert not (tmp_path / "out").exists()


def test_units_of_a_manifest_and_of_its_shards_are_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = mixed_manifest(tmp_path / "data", num=8)
    commands.build(manifest, tmp_path / "shards")
    options = ["--num_clusters", 12, "--hop_samples", 80]
    said = run(capsys, "kmeans", manifest, *options, "--out", tmp_path / "units")
    assert (said["codebook_size"], said["num_codebooks"], said["sample_rate"], said["frame_rate"]) == (12, 1, 8000, 100)
    assert (said["sounds"], said["bad"]) == (16, []), "8 recordings, and the same in 8 documents"
    assert run(capsys, "kmeans", manifest, *options, "--out", tmp_path / "again")["hash"] == said["hash"]
    shards = [tmp_path / "shards"]
    of_shards = run(capsys, "kmeans", *shards, *options, "--out", tmp_path / "of_shards")
    assert (of_shards["sounds"], of_shards["minutes"]) == (said["sounds"], said["minutes"])

    units = load_audio_tokenizer(tmp_path / "units")
    assert isinstance(units, KMeansUnits)
    wave_CT, rate = load_audio(tmp_path / "data" / "0.wav")
    assert len(units.encode(wave_CT, rate).unique()) > 1

    make_folder(tmp_path / "text")
    folder = ["--text", tmp_path / "text", "--codec", tmp_path / "units", "--out", tmp_path / "tokenizer"]
    run(capsys, "assemble", *folder)
    assert commands.index(shards, tmp_path / "tokenizer")["frames"] > 0
    assert TokenizerFolder.load(tmp_path / "tokenizer").require_audio().hash == said["hash"]


def test_codes_without_durations_are_not_pooled_unless_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = mixed_manifest(tmp_path / "data", num=4)
    make_folder(tmp_path / "text")
    for options, said, wanted in (
        ([], [], 2), (["--deduplicate"], [], 1), (["--deduplicate"], ["--audio_pool", 2], 2),
        ([], ["--audio_pool", 4], 4),
    ):  # fmt: skip
        run(capsys, "kmeans", manifest, "--num_clusters", 4, *options, "--out", tmp_path / "units")
        folder = ["--text", tmp_path / "text", "--codec", tmp_path / "units", "--out", tmp_path / "tokenizer"]
        run(capsys, "assemble", *folder, *said)
        assert TokenizerFolder.load(tmp_path / "tokenizer").audio_pool == wanted
    run(capsys, "assemble", "--text", tmp_path / "text", "--out", tmp_path / "silent")
    assert TokenizerFolder.load(tmp_path / "silent").audio_pool == 2


def test_no_more_sound_than_asked_for_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = mixed_manifest(tmp_path, num=8)
    options = ["--num_clusters", 4, "--max_minutes", 0.01, "--out", tmp_path / "units"]
    said = run(capsys, "kmeans", manifest, *options)
    assert said["minutes"] == 0.01 and said["sounds"] < 8


def test_broken_sounds_are_counted_named_and_bounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    rows = [{"id": str(number), "text": "one", "audio": f"{number}.wav"} for number in range(30)]
    for number in range(30):
        write_sound(tmp_path / f"{number}.wav", rng)
    (tmp_path / "7.wav").write_bytes(b"no sound")
    manifest = write_manifest(tmp_path, rows)
    out = ["--num_clusters", 4, "--out", tmp_path / "units"]
    said = run(capsys, "kmeans", manifest, *out)
    assert said["sounds"] == 29 and len(said["bad"]) == 1
    assert f"{manifest}:8" in said["bad"][0] and "7.wav" in said["bad"][0]
    for number in range(3):
        (tmp_path / f"{number}.wav").write_bytes(b"no sound")
    assert "4 of 30 rows can't be used" in refused(capsys, "kmeans", manifest, *out)


def test_what_holds_no_units_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", tmp_path / "units"]
    texts = write_manifest(tmp_path, [{"id": "a", "text": "one"}])
    assert f"no sound in {texts}" in refused(capsys, "kmeans", texts, *out)
    assert "nowhere.jsonl" in refused(capsys, "kmeans", tmp_path / "nowhere.jsonl", *out)
    write_sound(tmp_path / "a.wav", np.random.default_rng(0), seconds=160 / RATE)
    short = write_manifest(tmp_path, [{"id": "a", "text": "one", "audio": "a.wav"}])
    assert "1 frames of sound are too few for 256 clusters" in refused(capsys, "kmeans", short, *out)
    assert "num_clusters is 0" in refused(capsys, "kmeans", short, "--num_clusters", 0, *out)
    assert "max_minutes is 0.0" in refused(capsys, "kmeans", short, "--max_minutes", 0, *out)
    with tarfile.open(tmp_path / "cut.tar", "w") as tar:
        tar.add(tmp_path / "a.wav", "a.wav")
    shard = tmp_path / "cut.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    assert str(shard) in refused(capsys, "kmeans", shard, *out)
    assert not (tmp_path / "units").exists()
