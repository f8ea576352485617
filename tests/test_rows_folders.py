"""Folders and COCO: captions wherever they lie; what has none is named, what is no data is counted."""

from __future__ import annotations

import json

import pytest

from mmllm.data import commands
from mmllm.data.rows.bad_rows import BadRows, ManifestError
from mmllm.data.rows.forms import read_rows, told_form
from tests.rows_fixtures import as_lines, picture_bytes, pictures, put, read, sound_bytes


def test_imagefolder_and_audiofolder(tmp_path):
    folder = tmp_path / "d"
    pictures(folder / "train")
    put(folder / "train" / "metadata.csv", 'file_name,text,label\n0.png,"red, square",7\n./1.png,blue,\n')
    pictures(folder / "test" / "deep", 1)
    as_lines(folder / "test" / "metadata.jsonl", {"file_name": "deep/0.png", "caption": "green", "width": 3})
    (folder / "a.flac").write_bytes(sound_bytes())
    as_lines(folder / "metadata.jsonl", {"file_name": "a.flac", "transcription": "one"})
    put(folder / "notes.md", "of nobody")
    bad = BadRows(1.0)
    rows = read_rows(folder, bad)
    assert sorted((row.kind, row.text, row.id) for row in rows) == [
        ("audio", "one", "a"), ("caption", "blue", "./1"), ("caption", "green", "deep/0"),
        ("caption", "red, square", "0"),
    ]  # fmt: skip
    assert {row.text: row.metadata for row in rows}["green"] == {"width": 3}
    (reason,) = bad.reasons
    assert "2.png has no 2.txt beside it and no line of metadata" in reason and str(folder / "train") in reason
    assert bad.left_out == {"other files": 1}
    told = commands.build(folder, tmp_path / "s", max_bad_fraction=0.3)
    assert told["num_samples"] == 4 and told["num_bad"] == 1 and told["left_out"] == {"other files": 1}


def test_metadata_that_names_no_file_or_no_text(tmp_path):
    pictures(tmp_path)
    as_lines(
        tmp_path / "metadata.jsonl", {"file_name": "0.png", "text": "red"}, {"file_name": "9.png", "text": "gone"},
        {"text": "no file"}, {"file_name": "1.png", "label": 3}, {"file_name": "2.png", "messages": [
            {"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "a square"},
        ]},
    )  # fmt: skip
    bad = BadRows(1.0)
    rows = read_rows(tmp_path, bad)
    assert [row.kind for row in rows] == ["caption", "interleaved"] and rows[1].segments[0]["image"].name == "2.png"
    for said, line in zip(bad.reasons, ("2: ", "3: ", "4: "), strict=True):
        assert f"metadata.jsonl:{line}" in said
    assert "9.png doesn't exist" in bad.reasons[0] and "no 'file_name'" in bad.reasons[1]
    assert "'text' is missing; the row has" in bad.reasons[2] and "--columns text=" in bad.reasons[2]


def test_what_macos_puts_beside_files_is_counted(tmp_path):
    folder = tmp_path / "d"
    pictures(folder, 2)
    for name in ("0", "1"):
        put(folder / f"{name}.txt", f"picture {name}")
        (folder / f"._{name}.png").write_bytes(b"\0\5\x16\7")
        (folder / f"._{name}.txt").write_bytes(b"\0\5\x16\7")
    put(folder / ".DS_Store", "x")
    put(folder / "__MACOSX" / "sub" / "._0.png", "x")
    put(folder / ".cache" / "a.txt", "x")
    told = commands.build(folder, tmp_path / "s")
    assert (told["num_samples"], told["num_bad"]) == (2, 0)
    assert told["left_out"] == {"files of macOS": 6, "hidden files": 1}
    (folder / "0.txt").unlink()
    with pytest.raises(ManifestError, match=r"0\.png has no 0\.txt beside it"):
        commands.build(folder, tmp_path / "t", max_bad_fraction=0.0)


def test_links_to_folders_are_followed_once(tmp_path):
    folder, other = tmp_path / "d", tmp_path / "other"
    for place, count in ((folder, 1), (folder / "z", 2), (other / "deep", 3), (folder / ".store", 1)):
        pictures(place, count)
        for number in range(count):
            put(place / f"{number}.txt", f"{place.name} {number}")
    links = {
        "a": folder / "z", "linked": other, "b": other / "deep", "loop": folder, "up": tmp_path,
        "stored": folder / ".store",
    }  # fmt: skip
    for name, target in links.items():
        (folder / name).symlink_to(target)
    (other / "back").symlink_to(folder)
    bad = BadRows(1.0)
    rows = read_rows(folder, bad)
    assert sorted(row.id for row in rows) == ["0", "b/0", "b/1", "b/2", "stored/0", "z/0", "z/1"]
    assert not bad.reasons
    assert bad.left_out == {"hidden files": 2, "folders that links lead to a second time": 5}


def test_texts_without_a_picture_are_named_beside_pictures(tmp_path):
    pictures(tmp_path, 1)
    for name in ("0", "7", "README"):
        put(tmp_path / f"{name}.txt", "words")
    rows, reasons = read(tmp_path)
    assert len(rows) == 1 and [reason.rpartition("/")[2] for reason in reasons] == [
        "7.txt: 7.txt has no picture or sound beside it", "README.txt: README.txt has no picture or sound beside it",
    ]  # fmt: skip
    put(tmp_path / "film.mp4", "x")
    assert any("film.mp4 isn't of a kind that is read" in reason for reason in read(tmp_path)[1])


def test_a_folder_of_files_of_rows_says_so(tmp_path):
    as_lines(tmp_path / "a.jsonl", {"text": "x"})
    with pytest.raises(ManifestError, match="holds no rows of the form folder"):
        read_rows(tmp_path)
    with pytest.raises(ManifestError, match=r"is a folder; name the file in it"):
        read_rows(tmp_path, form="llava")
    with pytest.raises(ManifestError, match=r"is a file; name its folder"):
        read_rows(tmp_path / "a.jsonl", form="folder")


@pytest.mark.parametrize("separator", [" ", "\t", "   ", " \t"])
def test_librispeech_lines_and_sounds(tmp_path, separator):
    chapter = tmp_path / "LS" / "1" / "2"
    chapter.mkdir(parents=True)
    for number in range(3):
        (chapter / f"1-2-000{number}.flac").write_bytes(sound_bytes(number))
    (chapter / "._1-2-0000.flac").write_bytes(b"x")
    (chapter / "._1-2.trans.txt").write_bytes(b"x")
    lines = [f"1-2-0000{separator}HELLO  WORLD", f"1-2-0001{separator}BUT", "1-2-0009 GONE", f"1-2-0002{separator}"]
    put(chapter / "1-2.trans.txt", "\n".join(lines) + "\n")
    (chapter / "1-2-0005.flac").write_bytes(sound_bytes(5))
    assert told_form(tmp_path / "LS") == "librispeech"
    bad = BadRows(1.0)
    rows = read_rows(tmp_path / "LS", bad)
    assert [(row.id, row.text) for row in rows] == [("1-2-0000", "HELLO  WORLD"), ("1-2-0001", "BUT")]
    assert len(bad.reasons) == 3 and bad.left_out == {"files of macOS": 2}
    gone, empty, untold = bad.reasons
    assert "1-2.trans.txt:3" in gone and "1-2-0009.flac doesn't exist" in gone
    assert "1-2.trans.txt:4" in empty and "'text' is empty" in empty
    assert untold.startswith(str(chapter / "1-2-0005.flac")) and "has a line for 1-2-0005" in untold


def test_sounds_of_one_name_without_a_line_are_all_named(tmp_path):
    for name in ("1-2-0000.flac", "1-2-0001.flac", "1-2-0001.wav"):
        (tmp_path / name).write_bytes(sound_bytes(form=name[-4:].strip(".").upper()))
    put(tmp_path / "1-2.trans.txt", "1-2-0000 HELLO\n")
    rows, reasons = read(tmp_path)
    assert [row.id for row in rows] == ["1-2-0000"]
    assert [reason.partition(": ")[0] for reason in reasons] == [
        str(tmp_path / "1-2-0001.flac"), str(tmp_path / "1-2-0001.wav"),
    ]  # fmt: skip


def test_coco_images_with_two_files_are_named(tmp_path):
    """Which of the two a caption is of can't be told."""
    pictures(tmp_path)
    images = [{"id": number, "file_name": f"{name}.png"} for number, name in ((1, 0), (2, 1), (1, 2), (2, 1))]
    captions = [{"id": 5, "image_id": 1, "caption": "a"}, {"id": 6, "image_id": 2, "caption": "b"}]
    rows, reasons = read(put(tmp_path / "c.json", json.dumps({"images": images, "annotations": captions})))
    assert [(row.text, row.image.name) for row in rows] == [("b", "1.png")]
    assert len(reasons) == 1 and "annotation 5: image 1 is listed twice, as 0.png and 2.png" in reasons[0]


def test_coco_pictures_without_a_caption_are_named(tmp_path):
    pictures(tmp_path)
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(3)]
    captions = [{"id": 5, "image_id": 0, "caption": "a"}, {"id": 6, "image_id": 2, "caption": "b"}]
    rows, reasons = read(put(tmp_path / "c.json", json.dumps({"images": images, "annotations": captions})))
    assert [row.text for row in rows] == ["a", "b"]
    assert len(reasons) == 1 and "image 1 (1.png) has no caption" in reasons[0]


@pytest.mark.parametrize("is_flat", [True, False])
def test_karpathys_coco(tmp_path, is_flat):
    pictures(tmp_path if is_flat else tmp_path / "val2014")
    images = [
        {
            "filepath": "val2014", "filename": f"{number}.png", "imgid": number, "cocoid": 100 + number,
            "split": "restval" if number else "test",
            "sentences": [{"raw": f" words {number} {n}\n", "tokens": [], "sentid": 10 * number + n} for n in range(2)],
        }
        for number in range(2)
    ]  # fmt: skip
    odd = [{"filename": "2.png", "sentences": []}, {"sentences": [{"raw": "x"}]}, 7, {**images[0], "sentences": [{}]}]
    path = put(tmp_path / "dataset_coco.json", json.dumps({"dataset": "coco", "images": images + odd}))
    assert told_form(path) == "coco"
    rows, reasons = read(path)
    assert [(row.id, row.text, row.metadata) for row in rows] == [
        (f"{100 + number}-{10 * number + n}", f"words {number} {n}",
         {"image_id": 100 + number, "split": "restval" if number else "test"})
        for number in range(2) for n in range(2)
    ]  # fmt: skip
    assert all(row.image.read_bytes() == picture_bytes(int(row.text.split()[1])) for row in rows)
    wanted = ("no sentences", "its filename is None", "no sentences", "sentence 0 is None")
    for reason, why in zip(reasons, wanted, strict=True):
        assert why in reason


def test_coco_images_without_an_id_or_a_name_are_counted(tmp_path):
    pictures(tmp_path)
    images = [{"id": 0, "file_name": "0.png"}, {"file_name": "1.png"}, {"id": 2}, 7, {"id": 3, "file_name": None}]
    captions = [{"id": 5, "image_id": 0, "caption": "a"}, {"id": 6, "image_id": 3, "caption": "b"}]
    bad = BadRows(1.0)
    rows = read_rows(put(tmp_path / "c.json", json.dumps({"images": images, "annotations": captions})), bad)
    assert [row.text for row in rows] == ["a"]
    (reason,) = bad.reasons
    assert "annotation 6: its image 3 isn't listed with an id and a file_name" in reason
    assert bad.left_out == {"images without an id or a file_name": 3}


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ("caf\u00e9".encode("latin-1"), "isn't UTF-8 (unexpected end of data, byte 3); save it as UTF-8"),
        ("words".encode("utf-16"), "isn't UTF-8 (invalid start byte, byte 0); save it as UTF-8"),
        ("words".encode("utf-16-le"), "holds NUL bytes (the first is byte 1); save it as UTF-8"),
        (b"one\0two", "holds NUL bytes (the first is byte 3); save it as UTF-8"),
    ],
)
@pytest.mark.parametrize("has_pictures", [True, False])
def test_texts_that_are_not_utf_8_are_named(tmp_path, data, why, has_pictures):
    if has_pictures:
        pictures(tmp_path, 2)
    (tmp_path / "0.txt").write_bytes("\ufeffcaf\u00e9\n".encode())
    (tmp_path / "1.txt").write_bytes(data)
    rows, reasons = read(tmp_path)
    assert [row.text for row in rows] == ["caf\u00e9"]
    (reason,) = reasons
    assert reason.startswith(str(tmp_path / ("1.png" if has_pictures else "1.txt"))) and f"1.txt {why}" in reason
    with pytest.raises(ManifestError, match=r"1\.txt (isn't UTF-8|holds NUL bytes)"):
        read_rows(tmp_path / "1.txt")
