from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from mmllm import arguments
from mmllm.data import commands
from mmllm.data.importers import FORMS, read_rows, told_form
from mmllm.data.manifest import BadRows, ManifestError
from tests.data_fixtures import write_picture, write_sound

RNG = np.random.default_rng(0)


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_picture(path, RNG)
    return path


def sound(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sound(path, RNG)
    return path


def built(source: Path, out: Path, **options) -> dict:
    """The build's summary; every form must go the whole way."""
    told = commands.build(source, out, max_bad_fraction=options.pop("max_bad_fraction", 0.0), **options)
    assert told["num_samples"] == told["num_rows"] - told["num_bad"]
    return told


def test_the_command_line_knows_every_form():
    assert tuple(FORMS) == arguments.DATA_FORMS


def test_csv(tmp_path):
    picture(tmp_path / "p" / "a.png")
    path = put(
        tmp_path / "m.csv", 'id,text,image,width,score,note\nx,"red, and blue",p/a.png,16,0.5,\ny,green,p/a.png,16,,n\n'
    )
    first, second = read_rows(path)
    assert (first.kind, first.text, first.metadata) == ("caption", "red, and blue", {"width": 16, "score": 0.5})
    assert second.metadata == {"width": 16, "note": "n"}
    assert built(path, tmp_path / "s")["num_samples"] == 2
    tabs = put(tmp_path / "m.tsv", "id\ttext\nx\tone\ny\ttwo\tthree\n")
    bad = BadRows(0.5)
    assert [row.text for row in read_rows(tabs, bad)] == ["one"] and "number of fields" in bad.reasons[0]


def test_folders_of_pictures_and_sounds_with_texts_beside_them(tmp_path):
    for name in ("a/1.png", "a/2.jpg", "b/1.png"):
        put(picture(tmp_path / "d" / name).with_suffix(".txt"), f"a picture {name}\n")
    put(sound(tmp_path / "d" / "b" / "3.wav").with_suffix(".txt"), "a sound")
    rows = read_rows(tmp_path / "d")
    assert [(row.id, row.kind, row.text) for row in rows] == [
        ("a/1", "caption", "a picture a/1.png"), ("a/2", "caption", "a picture a/2.jpg"),
        ("b/1", "caption", "a picture b/1.png"), ("b/3", "audio", "a sound"),
    ]  # fmt: skip
    picture(tmp_path / "d" / "alone.png")
    with pytest.raises(ManifestError, match=r"alone\.png has no alone\.txt"):
        read_rows(tmp_path / "d")
    assert built(tmp_path / "d", tmp_path / "s", max_bad_fraction=0.3)["num_bad"] == 1


def test_texts(tmp_path):
    put(tmp_path / "d" / "one.txt", "\ufeffFirst text.\n\nMore.")
    put(tmp_path / "d" / "two.txt", "Second text.")
    assert [row.text for row in read_rows(tmp_path / "d")] == ["First text.\n\nMore.", "Second text."]
    assert [row.id for row in read_rows(tmp_path / "d" / "two.txt")] == ["two"]
    lines = put(tmp_path / "t.jsonl", '{"text": "one"}\n{"text": "two", "lang": "en"}\n')
    assert [row.metadata for row in read_rows(lines)] == [{}, {"lang": "en"}]
    put(tmp_path / "d" / "manifest.jsonl", '{"id": "m", "text": "of the manifest"}\n')
    assert [row.id for row in read_rows(tmp_path / "d")] == ["m"]


def test_llava_conversations(tmp_path):
    picture(tmp_path / "coco" / "a.png")
    record = {
        "id": "77",
        "image": "coco/a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A square."},
            {"from": "human", "value": "Which colour?"},
            {"from": "gpt", "value": "Red."},
        ],
    }
    path = put(tmp_path / "llava.json", json.dumps([record]))
    assert told_form(path) == "llava"
    (row,) = read_rows(path)
    assert [{**s, "image": s["image"].name} if "image" in s else s for s in row.segments] == [
        {"image": "a.png", "role": "user"},
        {"text": "What is it?", "role": "user"},
        {"text": "A square.", "role": "assistant"},
        {"text": "Which colour?", "role": "user"},
        {"text": "Red.", "role": "assistant"},
    ]
    assert built(path, tmp_path / "s")["shards"]["interleaved-000000.tar"]["num_samples"] == 1


def test_sharegpt_messages(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Compare <image> with <image>."},
        {"role": "assistant", "content": "Both are red."},
    ]
    good = {"messages": messages, "images": ["a.png", "b.png"]}
    broken = [
        {"messages": messages, "images": ["a.png"]},
        {"messages": messages[:2], "images": ["a.png", "b.png"]},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": 5},
    ]
    path = put(tmp_path / "m.jsonl", "".join(json.dumps(value) + "\n" for value in (good, *broken)))
    bad = BadRows(0.9)
    (row,) = read_rows(path, bad)
    kinds = [(next(iter(segment)), segment["role"]) for segment in row.segments]
    assert kinds == [
        ("text", "user"), ("text", "user"), ("image", "user"), ("text", "user"), ("image", "user"), ("text", "user"),
        ("text", "assistant"),
    ]  # fmt: skip
    for reason, said in zip(
        bad.reasons, ("2 marks for image but 1", "nobody answers", "'robot'", "no conv"), strict=True
    ):
        assert said in reason


def test_coco_captions(tmp_path):
    picture(tmp_path / "train" / "1.png")
    whole = {
        "images": [{"id": 1, "file_name": "1.png"}],
        "annotations": [
            {"id": 10, "image_id": 1, "caption": " a cat "},
            {"id": 11, "image_id": 1, "caption": "one cat"},
            {"id": 12, "image_id": 2, "caption": "no picture"},
        ],
    }
    path = put(tmp_path / "captions.json", json.dumps(whole))
    bad = BadRows(0.5)
    rows = read_rows(path, bad, media=tmp_path / "train")
    assert [(row.id, row.text, row.metadata) for row in rows] == [
        ("1-10", "a cat", {"image_id": 1}), ("1-11", "one cat", {"image_id": 1}),
    ]  # fmt: skip
    assert "annotation 12" in bad.reasons[0]
    assert built(path, tmp_path / "s", media=tmp_path / "train", max_bad_fraction=0.5)["num_samples"] == 2


def test_librispeech(tmp_path):
    chapter = tmp_path / "dev-clean" / "84" / "121123"
    for number in range(2):
        sound(chapter / f"84-121123-{number:04d}.flac")
    put(chapter / "84-121123.trans.txt", "84-121123-0000 GO DO YOU HEAR\n84-121123-0001 BUT\n84-121123-0002 GONE\n")
    bad = BadRows(0.5)
    rows = read_rows(tmp_path / "dev-clean", bad)
    assert [(row.id, row.text, row.metadata) for row in rows] == [
        ("84-121123-0000", "GO DO YOU HEAR", {"speaker": "84", "chapter": "121123"}),
        ("84-121123-0001", "BUT", {"speaker": "84", "chapter": "121123"}),
    ]
    assert "84-121123-0002" in bad.reasons[0]
    assert built(tmp_path / "dev-clean", tmp_path / "s", max_bad_fraction=0.5)["num_samples"] == 2


def test_common_voice(tmp_path):
    sound(tmp_path / "clips" / "c1.wav")
    header = "client_id\tpath\tsentence\tup_votes\tage\tgender\taccents\tlocale\n"
    path = put(tmp_path / "train.tsv", header + 'abc\tc1.wav\tHe said "hi.\t2\ttwenties\t\t\ten\n')
    (row,) = read_rows(path)
    assert (row.id, row.text) == ("c1", 'He said "hi.')
    assert row.metadata == {"speaker": "abc", "language": "en", "age": "twenties"}
    assert built(path, tmp_path / "s")["num_samples"] == 1


def test_obelics(tmp_path):
    url = "https://example.org/x/photo.png?size=9"
    picture(tmp_path / "media" / "a.png").rename(tmp_path / "media" / hashlib.sha256(url.encode()).hexdigest())
    picture(tmp_path / "media" / "b.png")
    record = {
        "texts": [None, "first", None, "second", " \n", None],
        "images": [url, None, "b.png", None, None, "https://example.org/gone.png"],
    }
    empty = {"texts": [None], "images": ["https://example.org/gone.png"]}
    path = put(tmp_path / "o.jsonl", json.dumps(record) + "\n" + json.dumps(empty) + "\n")
    bad = BadRows(0.5)
    (row,) = read_rows(path, bad, media=tmp_path / "media")
    assert [next(iter(segment)) for segment in row.segments] == ["image", "text", "image", "text"]
    assert row.metadata == {"missing_images": 1} and "nothing is left" in bad.reasons[0]
    assert built(path, tmp_path / "s", media=tmp_path / "media", max_bad_fraction=0.5)["num_samples"] == 1


def test_mmc4(tmp_path):
    picture(tmp_path / "x.png")
    record = {
        "url": "https://example.org",
        "text_list": ["One.", "Two.", "", "Three."],
        "image_info": [{"image_name": "x.png", "raw_url": "u", "matched_text_index": 1}],
    }
    path = put(tmp_path / "docs.jsonl", json.dumps(record) + "\n")
    (row,) = read_rows(path)
    assert [segment.get("text", "IMAGE") for segment in row.segments] == ["One.", "IMAGE", "Two.", " Three."]
    assert built(path, tmp_path / "s")["num_samples"] == 1


def test_forms_that_are_wrong_or_unknown(tmp_path):
    path = put(tmp_path / "a.csv", "id,text\n")
    with pytest.raises(ManifestError, match="holds no rows"):
        read_rows(path)
    with pytest.raises(ManifestError, match="format is 'video'"):
        read_rows(path, form="video")
    with pytest.raises(ManifestError, match="can't tell its form"):
        read_rows(put(tmp_path / "a.bin", "x"))
    with pytest.raises(ManifestError, match="not JSON"):
        read_rows(put(tmp_path / "a.json", "{"))
    with pytest.raises(FileNotFoundError, match="no such"):
        read_rows(tmp_path / "none.csv")
