"""Times of words on their way from a manifest to a batch: shards, altered copies, filters, voices."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mmllm.data import commands
from mmllm.data.loading.datamodules import PackedDataModule
from mmllm.data.rows.bad_rows import ManifestError
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.pointer import PointerRule
from tests.data_fixtures import make_folder, write_manifest, write_sound

TEXT = "red circle"
TIMES = [
    {"word": "red", "start": 0.05, "end": 0.2},
    {"word": "circle", "start": 0.25, "end": 0.55, "letters": [0.25, 0.3, 0.35, 0.4, 0.45, 0.5], "confidence": 0.9},
]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A manifest of six sounds by three voices, four of which have times, and a tokenizer folder with a pointer."""
    folder = make_folder(tmp_path / "text")
    config = TokenizerFolder.load(tmp_path / "text").config
    pointed = TokenizerFolder(folder.text, folder.audio, type(config)(**{**vars(config), "pointer": PointerRule()}))
    pointed.save(tmp_path / "tok")
    rng, rows = np.random.default_rng(0), []
    for number in range(6):
        write_sound(tmp_path / f"{number}.wav", rng, 0.6)
        row = {"id": f"s{number}", "audio": f"{number}.wav", "text": TEXT, "speaker": ("ann", "bob", "cid")[number % 3]}
        rows.append(row if number >= 4 else {**row, "words": TIMES})
    rows[5]["words"] = 7  # somebody's count of words: no times
    write_manifest(tmp_path, rows)
    return tmp_path


def stored(shards: Path) -> list[dict]:
    with tarfile.open(next(shards.glob("audio-*.tar"))) as tar:
        members = [member for member in tar if member.name.endswith(".json")]
        return [json.loads(tar.extractfile(member).read()) for member in members]  # type: ignore[union-attr]


def test_times_are_stored_and_move_with_the_tempo_of_copies(made: Path):
    commands.build(made / "manifest.jsonl", made / "s", made / "tok", perturb=2)
    rows = stored(made / "s")
    assert len(rows) == 18
    timed = [row for row in rows if row.get("aligned")]
    assert len(timed) == 12 and all(isinstance(row["words"], list) for row in timed)
    assert [row.get("words") for row in rows if not row.get("aligned")] == [None] * 3 + [7] * 3
    slower = [row["duration"] / 0.6 for row in timed]
    assert len({round(each, 3) for each in slower}) > 4, "copies have other lengths"
    for row, factor in zip(timed, slower, strict=True):
        for time, was in zip(row["words"], TIMES, strict=True):
            assert time["start"] == pytest.approx(was["start"] * factor, abs=0.002)
            assert time["end"] == pytest.approx(was["end"] * factor, abs=0.002)
        np.testing.assert_allclose(row["words"][1]["letters"], np.array(TIMES[1]["letters"]) * factor, atol=0.002)
        assert row["words"][1]["confidence"] == 0.9


def test_times_that_contradict_the_text_are_named(made: Path):
    rows = [json.loads(line) for line in (made / "manifest.jsonl").read_text().splitlines()]
    rows[1]["words"] = TIMES[:1]
    with pytest.raises(ManifestError, match=r"s1.*'words' has 1 entries but the text has 2 words"):
        commands.build(write_manifest(made, rows, "wrong.jsonl"), made / "s", made / "tok", max_bad_fraction=0.0)


def test_times_behind_the_sound_are_named(made: Path):
    """Milliseconds, or another file's."""
    rows = [json.loads(line) for line in (made / "manifest.jsonl").read_text().splitlines()]
    rows[2]["words"] = [
        {"word": time["word"], "start": 1000 * time["start"], "end": 1000 * time["end"]} for time in TIMES
    ]
    with pytest.raises(ManifestError, match=r"s2.*words\[0\] \('red'\) ends at 200 s, but the sound lasts 0.6 s"):
        commands.build(write_manifest(made, rows, "wrong.jsonl"), made / "s", made / "tok", max_bad_fraction=0.0)
    rows[2]["words"] = [TIMES[0], {**TIMES[1], "end": 0.69}]
    commands.build(write_manifest(made, rows, "late.jsonl"), made / "s", made / "tok", max_bad_fraction=0.0)


def test_what_is_spoken_is_filtered_and_its_voices_are_known(made: Path):
    commands.build(made / "manifest.jsonl", made / "s", made / "tok", perturb=1)
    commands.index(str(made / "s"), made / "tok")
    speech = {"kind": "audio", "shards": str(made / "s" / "audio-*.tar"), "weight": 1.0}
    recipe = {
        "tokenizer": str(made / "tok"),
        "sequence_length": 256,
        "sources": [
            {"name": "heard", **speech, "tasks": ["transcribe"]},
            {"name": "spoken", **speech, "tasks": ["speak"],
             "filter": "not perturbed and aligned and speaker in ['ann', 'cid']"},
        ],
    }  # fmt: skip
    (made / "recipe.yaml").write_text(json.dumps(recipe))
    data = PackedDataModule(recipe=str(made / "recipe.yaml"), batch_size=2)
    assert data.voices == ("ann", "cid")
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert (batch.pointer_BT >= 0).any() and batch.metadata is not None
    assert len(batch.metadata.advances_A) == int((batch.advance_labels_BT >= 0).sum()) > 0
