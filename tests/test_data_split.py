import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmllm.data.loading.augment import NUM_DRAWS, AugmentConfig, augment
from mmllm.data.rows.bad_rows import ManifestError
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.split import split


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def manifest(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    rows: list[dict] = [
        {"id": f"t{i}", "text": f"text {i}", "speaker": "bob" if i % 4 == 0 else "ann"} for i in range(100)
    ]
    segments = [{"text": "a picture"}, {"image": "a.png"}]
    rows.append({"id": "s", "segments": segments, "question": "what?", "answer": "red", "speaker": "ann"})
    return write(tmp_path / "own" / ".." / "m.jsonl", rows)


def test_split_by_key_keeps_every_row_once_and_its_files(manifest, tmp_path):
    counts = split([manifest], tmp_path / "out", holdout="speaker=bob", num_val=2)
    assert counts["train"] == {"interleaved": 1, "text": 74}
    assert counts["val"] == {"text": 1}
    assert counts["test"] == {"text": 25}
    names = ("train-interleaved", "train-text", "val", "test")
    parts = {name: read_rows(tmp_path / "out" / f"{name}.jsonl") for name in names}
    ids = [row.id for rows in parts.values() for row in rows]
    assert sorted(ids) == sorted(row.id for row in read_rows(manifest))
    (document,) = parts["train-interleaved"]
    assert document.segments[1]["image"].is_file()
    assert document.metadata["answer"] == "red"
    assert all(row.metadata["speaker"] == "bob" for row in parts["test"])
    assert not Path(json.loads((tmp_path / "out" / "train-interleaved.jsonl").read_text())["segments"][1]["image"]).root


def test_split_by_default_holds_a_tenth_out_the_same_each_time(manifest, tmp_path):
    first = split([manifest], tmp_path / "a")
    split([manifest], tmp_path / "b")
    assert 2 <= sum(first["test"].values()) <= 25
    assert (tmp_path / "a" / "test.jsonl").read_bytes() == (tmp_path / "b" / "test.jsonl").read_bytes()


def test_split_leaves_out_training_rows_that_a_test_row_repeats(manifest, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "copy.png")
    rows = [
        {"id": "other-id", "text": "text 7"},
        {"id": "s2", "segments": [{"text": "a picture"}, {"image": "copy.png"}], "question": "what?", "answer": "red"},
    ]
    test = write(tmp_path / "test.jsonl", rows)
    counts = split([manifest], tmp_path / "out", test=[test], num_val=0)
    assert counts["repeated"] == 2
    assert counts["train"] == {"text": 99}
    assert "text 7" not in {row.text for row in read_rows(tmp_path / "out" / "train-text.jsonl")}


def test_split_refuses_to_test_on_all_that_is_trained_on(manifest, tmp_path):
    with pytest.raises(ManifestError, match="each of the 101 training rows shows"):
        split([manifest], tmp_path / "out", test=[manifest])


def test_rows_of_one_picture_stay_together(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    Image.new("RGB", (5, 4)).save(tmp_path / "b.png")
    rows = [{"id": f"{name}{i}", "image": f"{name}.png", "text": f"words {i}"} for name in "ab" for i in range(30)]
    path = write(tmp_path / "m.jsonl", rows)
    for seed in range(20):
        try:
            counts = split([path], tmp_path / "out", holdout="0.5", num_val=0, seed=seed)
        except ManifestError:
            continue  # both on one side
        assert counts["train"] == counts["test"] == {"caption": 30}
        return
    raise AssertionError("no seed parted the two pictures")


def test_a_picture_is_never_on_both_sides(tmp_path):
    """Captions, and documents that hold the same pictures: under other names too, by fraction and by --test."""
    for i in range(20):
        Image.new("RGB", (4 + i, 4)).save(tmp_path / f"{i}.png")
        Image.new("RGB", (4 + i, 4)).save(tmp_path / f"copy{i}.png")
    captions = [{"id": f"c{i}", "image": f"{i}.png", "text": f"picture {i}"} for i in range(20)]
    documents = [
        {
            "id": f"d{i}-{k}",
            "segments": [{"text": "see"}, {"image": f"copy{i}.png"}],
            "question": f"{k}?",
            "answer": "yes",
        }
        for i in range(20)
        for k in range(5)
    ]
    path = write(tmp_path / "m.jsonl", captions + documents)
    counts = split([path], tmp_path / "out", holdout="0.3", num_val=0)
    assert counts["repeated"] == 0 and counts["test"]["interleaved"] == 5 * counts["test"]["caption"]
    shown = {
        part: {
            (tmp_path / "out" / value).read_bytes()
            for file in (tmp_path / "out").glob(f"{part}*.jsonl")
            for row in map(json.loads, file.read_text().splitlines())
            for value in [row.get("image"), *(segment.get("image") for segment in row.get("segments", []))]
            if value
        }
        for part in ("train", "test")
    }
    assert shown["train"] and shown["test"] and not shown["train"] & shown["test"]
    test = write(tmp_path / "t.jsonl", captions[:3])
    counts = split([write(tmp_path / "d.jsonl", documents)], tmp_path / "out2", test=[test], num_val=0)
    assert counts["repeated"] == 15 and counts["train"] == {"interleaved": 85}


def captions(tmp_path: Path, num_pictures: int, num_captions: int) -> list[dict]:
    for i in range(num_pictures):
        Image.new("RGB", (4 + i, 4)).save(tmp_path / f"{i}.png")
    return [{"id": f"c{i}-{k}", "image": f"{i}.png", "text": f"picture {i}, {k}"}
            for i in range(num_pictures) for k in range(num_captions)]  # fmt: skip


def val_and_train(out: Path) -> tuple[list[dict], list[dict]]:
    read = [[json.loads(line) for file in sorted(out.glob(name)) for line in file.read_text().splitlines()]
            for name in ("val.jsonl", "train-*.jsonl")]  # fmt: skip
    return read[0], read[1]


@pytest.mark.parametrize(("num_captions", "lost"), [(1, 0), (2, 0), (5, 4)])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_picture_to_look_at_is_not_trained_on_under_another_caption(tmp_path, num_captions, lost, seed):
    """As many rows are looked at as are asked for; of a picture's captions that are too many, none are trained on."""
    train = write(tmp_path / "m.jsonl", captions(tmp_path, 160, num_captions))
    test = write(tmp_path / "t.jsonl", [{"id": "t", "text": "apart"}])
    num_val = min(16, 160 * num_captions // 50) // 2 * 2
    counts = split([train], tmp_path / "out", test=[test], num_val=num_val, seed=seed)
    assert counts["val"] == {"caption": num_val} and counts["repeated"] == lost
    assert counts["train"] == {"caption": 160 * num_captions - num_val - lost}
    val, trained = val_and_train(tmp_path / "out")
    assert not {row["image"] for row in val} & {row["image"] for row in trained}
    assert (tmp_path / "out" / "test.jsonl").read_text() == '{"id": "t", "text": "apart"}\n'


def test_documents_of_a_picture_to_look_at_are_not_trained_on(tmp_path):
    rows = captions(tmp_path, 60, 1)
    rows += [
        {"id": f"d{i}", "segments": [{"text": f"see {i}"}, {"image": f"{i}.png"}, {"text": "it"}]} for i in range(60)
    ]
    test = write(tmp_path / "t.jsonl", [{"id": "t", "text": "apart"}])
    counts = split([write(tmp_path / "m.jsonl", rows)], tmp_path / "out", test=[test], num_val=1)
    assert counts["val"] == {"caption": 1, "interleaved": 1} and counts["train"] == {"caption": 59, "interleaved": 59}
    val, _ = val_and_train(tmp_path / "out")
    assert val[0]["image"] == val[1]["segments"][1]["image"]


def test_a_picture_that_nearly_all_rows_show_is_trained_on(tmp_path):
    """A logo at the top of each document; only what has none is looked at, and nothing is lost."""
    rows = captions(tmp_path, 1, 0) + [
        {"id": f"d{i}", "segments": [{"image": "0.png"}, {"text": f"page {i}"}]} for i in range(97)
    ]
    rows += [{"id": f"p{i}", "segments": [{"text": f"plain {i}"}, {"text": "page"}]} for i in range(3)]
    test = write(tmp_path / "t.jsonl", [{"id": "t", "text": "apart"}])
    counts = split([write(tmp_path / "m.jsonl", rows)], tmp_path / "out", test=[test], num_val=16)
    assert counts["val"] == {"interleaved": 2} and counts["train"] == {"interleaved": 98} and not counts["repeated"]
    counts = split([write(tmp_path / "m.jsonl", rows[:97])], tmp_path / "out", test=[test], num_val=16)
    assert not counts["val"] and counts["train"] == {"interleaved": 97}


def test_broken_test_files_are_found_before_training(tmp_path):
    """Scoring would stumble over them when all is trained."""
    for i in range(40):
        Image.new("RGB", (4 + i, 4)).save(tmp_path / f"{i}.png")
    rows = [{"id": str(i), "image": f"{i}.png", "text": f"picture {i}"} for i in range(40)]
    train, test = write(tmp_path / "train.jsonl", rows[:20]), write(tmp_path / "test.jsonl", rows[20:])
    (tmp_path / "25.png").write_bytes(b"broken")
    counts = split([train], tmp_path / "out", test=[test])
    assert counts["test"] == {"caption": 19} and "test.jsonl:6" in counts["skipped"][0]
    for i in range(25, 30):
        (tmp_path / f"{i}.png").write_bytes(b"broken")
    with pytest.raises(ManifestError, match=r"the test rows: 5 of 20 rows .* raise --max_bad_fraction \(now 0.05\)"):
        split([train], tmp_path / "out", test=[test])
    assert split([train], tmp_path / "out", test=[test], max_bad_fraction=0.3)["test"] == {"caption": 15}


def test_bad_rows_count_against_their_own_manifest(tmp_path):
    def rows(prefix: str, num_bad: int) -> list[dict]:
        return [{"id": f"{prefix}{i}", "text": "" if i < num_bad else f"{prefix} {i}"} for i in range(200)]

    first, second = write(tmp_path / "1.jsonl", rows("a", 9)), write(tmp_path / "2.jsonl", rows("b", 9))
    small = write(tmp_path / "3.jsonl", [{"id": "c", "text": "c"}, {"id": "d", "text": "d"}])
    assert len(split([first, second, small], tmp_path / "out", holdout="0.2")["skipped"]) == 18


def test_split_names_bad_rows(manifest, tmp_path):
    broken = write(tmp_path / "broken.jsonl", [{"id": "x", "image": "no.png", "text": "a"}])
    with pytest.raises(ManifestError, match=r"broken.jsonl:1.*no\.png"):
        split([broken], tmp_path / "out")


def test_augment_crops_and_flips_by_its_draws():
    images = torch.arange(2 * 3 * 8 * 8).reshape(2, 3, 8, 8).remainder(251).to(torch.uint8)
    draws = np.zeros((2, NUM_DRAWS), dtype=np.float32)
    assert augment(images, draws, AugmentConfig()) is images
    flipped = augment(images, draws, AugmentConfig(flip=True))
    assert torch.equal(flipped, images.flip(3))
    draws[1, 3] = 0.9
    assert torch.equal(augment(images, draws, AugmentConfig(flip=True))[1], images[1])
    whole = augment(images, np.full((2, NUM_DRAWS), 0.999999, dtype=np.float32), AugmentConfig(min_scale=0.5))
    assert (whole.int() - images.int()).abs().max() <= 1
    corner = np.zeros((2, NUM_DRAWS), dtype=np.float32)
    cropped = augment(images, corner, AugmentConfig(min_scale=0.25))
    assert torch.equal(cropped[:, :, 0, 0], images[:, :, 0, 0])
    assert not torch.equal(cropped, images)
    assert len(augment(images[:0], draws[:0], AugmentConfig(flip=True))) == 0


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_augment_config_names_a_bad_scale(value):
    with pytest.raises(ValueError, match="min_scale"):
        AugmentConfig(min_scale=value)
