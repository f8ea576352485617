"""Near copies and rows of another topic that are planted are what near deduplication and topics find."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmllm.cli.main import main
from mmllm.data.rows.cleaning import CleaningConfig, choose, measure
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.near_copies import THUMBNAIL_RMS, thumbnail
from mmllm.data.rows.rows import Row
from mmllm.data.rows.topics import TopicsConfig, topics_of
from mmllm.data.samples.decode import picture_size
from mmllm.studies.planting import COPIED_SHARE, Planting, plant, plant_rows
from mmllm.studies.planting_edits import edited_text, other_text
from tests.data_fixtures import write_manifest
from tests.test_data_near_copies import caption, picture

NEAR = CleaningConfig("minhash", 0.5, shingles="chars:5")


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of 120 captions."""
    folder, rng, rows = tmp_path_factory.mktemp("captions"), np.random.default_rng(0), []
    for number in range(120):
        Image.fromarray(picture(rng)).save(folder / f"{number}.png")
        rows.append({"id": f"r{number}", "text": caption(rng), "image": f"{number}.png", "plain": True})
    return write_manifest(folder, rows)


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    said = ["the class of an object is looked up in its type", "a method of the class takes the object and its type"]
    return write_manifest(tmp_path_factory.mktemp("prose"), [{"text": f"{text} {text}"} for text in said])


def kept(rows: list[Row], config: CleaningConfig) -> list[Row]:
    return choose(rows, [measure(row, False, True, config.shingles) for row in rows], config)[0]


def levels(row: Row) -> np.ndarray:
    assert row.image is not None
    return thumbnail(row.image).astype(float)


def test_an_edit_is_light_and_never_none():
    rng = np.random.default_rng(0)
    text = "a small red circle above a ring"
    edits = [edited_text(text, rng) for _ in range(200)]
    assert text not in edits and len(set(edits)) > 15
    for edit in edits:
        first, second = sorted(text.split()), sorted(edit.lower().rstrip(".!, ").replace(",", "").split())
        assert len(second) in (len(first) - 1, len(first), len(first) + 1)
        assert len(set(second) - {*first, "circle.", "circle!", ".", "!"}) <= 1
    assert {edited_text("ring", rng) for _ in range(200)} == {"RING", "ring.", "ring!", "ring,", "ring ."}
    assert "" not in {edited_text("A A", rng) for _ in range(40)}


def test_near_copies_are_those_that_near_deduplication_finds(captions: Path, tmp_path: Path):
    out = tmp_path / "planted.jsonl"
    (line,) = plant(captions, out, Planting(near_copies=0.5, seed=1))
    assert line.endswith("180 rows; planted: 60 near_copy")
    rows, before = read_rows(out), {row.id: row for row in read_rows(captions)}
    copies = [row for row in rows if row.metadata.get("planted") == "near_copy"]
    of = {row.id: before[row.id.rpartition("_near")[0]] for row in copies}
    assert len({original.id for original in of.values()}) == max(1, round(COPIED_SHARE * 120))
    for row in copies:
        assert row.text != of[row.id].text and row.metadata["plain"] is True
        assert row.image is not None and row.image.name.endswith(".jpg")  # pyright: ignore[reportAttributeAccessIssue]
        assert 0 < ((levels(row) - levels(of[row.id])) ** 2).mean() ** 0.5 < THUMBNAIL_RMS
    assert [row.text for row in rows if row not in copies] == [row.text for row in before.values()]
    assert len(kept(rows, CleaningConfig("exact"))) == len(rows)
    left = kept(rows, NEAR)
    assert [row.id for row in kept(list(before.values()), NEAR)] == list(before)  # none of the rows is near another
    assert len(left) <= 123  # an edit of a short text may be too much
    assert plant(captions, tmp_path / "again.jsonl", Planting(near_copies=0.5, seed=1))[0].endswith(line[-20:])
    names = sorted(path.name for path in (tmp_path / "again_pictures").iterdir())
    for name in names:
        first, second = (tmp_path / f"{stem}_pictures" / name for stem in ("planted", "again"))
        assert first.read_bytes() == second.read_bytes()


def test_what_else_is_planted_is_the_same_beside_them(captions: Path):
    rows = read_rows(captions)
    plain = Planting(copies=0.5, wrong=0.2, garbled=0.1, seed=5)
    more = Planting(copies=0.5, wrong=0.2, garbled=0.1, near_copies=0.3, off_topic=0.2, seed=5)
    both = plant_rows(rows, more, ["one two three four"])
    added = [row for row in both if row.metadata.get("planted") in ("near_copy", "off_topic")]
    assert len(added) == 36 + 24 and [row for row in both if row not in added] == plant_rows(rows, plain)
    assert both.index(added[0]) < 20 and len({row.id for row in both}) == len(both)


def test_rows_of_another_topic_are_a_topic_of_their_own(
    captions: Path, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "planted.jsonl"
    command = ["study", "plant", str(captions), "--out", str(out), "--off_topic", "0.25", "--filter", "plain"]
    assert main([*command, "--noise", str(prose)]) == 0
    assert "150 rows; planted: 30 off_topic" in capsys.readouterr().out
    rows = read_rows(out)
    marks = [row.metadata.get("planted") == "off_topic" for row in rows]
    lengths = {len(row.text.split()) for row in rows if row.metadata.get("planted") is None}
    said = {word for row in read_rows(prose) for word in row.text.split()}
    for row, is_added in zip(rows, marks, strict=True):
        assert row.kind == "caption" and row.metadata["plain"] is True and isinstance(row.image, Path)
        if is_added:
            assert set(row.text.split()) <= said and len(row.text.split()) in lengths
            assert picture_size(row.image) == (48, 48) and row.image.parent.name == "planted_pictures"
    topics_N = topics_of([row.text for row in rows], TopicsConfig(4)).of([row.text for row in rows])
    of_noise = set(topics_N[marks].tolist())
    assert not of_noise & set(topics_N[~np.array(marks)].tolist())
    assert kept(rows, NEAR) == rows  # pictures of noise are unlike each other
    assert main(command) == 2 and "give both, or neither" in capsys.readouterr().err
    assert main([*command[:-4], "--noise", str(prose)]) == 2 and "give both, or neither" in capsys.readouterr().err


def test_what_cannot_be_added_is_named():
    with pytest.raises(ValueError, match=r"near_copies is -1"):
        Planting(near_copies=-1)
    heard = Row("a", "audio", "f:1", "one two", audio=Path("a.wav"))
    with pytest.raises(ValueError, match="f:1 is a recording"):
        plant_rows([heard], Planting(off_topic=1), ["three"])
    assert plant_rows([heard], Planting(near_copies=2))[1].audio == heard.audio
    silent = Row("d", "interleaved", "f:2", segments=({"text": "a"},))
    for planting in (Planting(near_copies=1), Planting(off_topic=1)):
        with pytest.raises(ValueError, match="f:2 has no text of its own"):
            plant_rows([silent], planting, ["three"])
    rng = np.random.default_rng(0)
    assert {other_text(2, ["one two three"], rng) for _ in range(30)} == {"one two", "two three"}
    assert other_text(9, ["one two three"], rng) == "one two three"
