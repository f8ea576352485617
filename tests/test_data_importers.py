from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from mmllm.cli.command import DATA_FORMS
from mmllm.data import commands
from mmllm.data.rows import tables
from mmllm.data.rows.bad_rows import BadRows, ManifestError
from mmllm.data.rows.forms import FORMS, read_rows, told_form
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
    assert tuple(FORMS) == DATA_FORMS


def test_csv(tmp_path):
    picture(tmp_path / "p" / "a.png")
    path = put(
        tmp_path / "m.csv", 'id,text,image,width,score,note\nx,"red, and blue",p/a.png,16,0.5,\ny,green,p/a.png,16,,n\n'
    )
    first, second = read_rows(path)
    assert (first.kind, first.text, first.metadata) == ("caption", "red, and blue", {"width": "16", "score": "0.5"})
    assert second.metadata == {"width": "16", "note": "n"}
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
        ("text", "system"), ("text", "user"), ("image", "user"), ("text", "user"), ("image", "user"), ("text", "user"),
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
    assert row.metadata == {"speaker": "abc", "language": "en", "age": "twenties", "up_votes": "2"}
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


def lines(path: Path, *records) -> Path:
    return put(path, "".join(json.dumps(record) + "\n" for record in records))


def kinds(row) -> list[str]:
    return [next(iter(segment)) for segment in row.segments]


@pytest.mark.parametrize("form", ["obelics", "mmc4", "llava"])
def test_documents_reach_no_file_outside_the_media_folder(tmp_path, form):
    secret = picture(tmp_path / "secret.png")
    media = picture(tmp_path / "media" / "a.png").parent
    (media / "link.png").symlink_to(secret)

    def record(name: str) -> dict:
        match form:
            case "obelics":
                return {"texts": ["a", None], "images": [None, name]}
            case "mmc4":
                return {"text_list": ["a"], "image_info": [{"image_name": name, "matched_text_index": 0}]}
        parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": name}}]
        return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cat."}]}

    outside = ["../secret.png", str(secret), "link.png", "a/../../secret.png"]
    good = ["a.png", str(media / "a.png")]
    bad = BadRows(1.0)
    path = lines(tmp_path / "d.jsonl", *map(record, good + outside))
    rows = read_rows(path, bad, media=media)
    assert [kinds(row).count("image") for row in rows] == [1, 1]
    assert [reason.rpartition(" leads out of ")[0].partition(": ")[0] for reason in bad.reasons] == [
        f"{path}:{number}" for number in range(3, 7)
    ]
    addresses = lines(tmp_path / "u.jsonl", *map(record, ["https://e.org/x/..", "https://e.org/" + "y" * 300, "a.png"]))
    bad = BadRows(1.0)
    rows = read_rows(addresses, bad, media=media)
    assert len(rows) == (3 if form != "llava" else 1) and kinds(rows[-1]).count("image") == 1


def test_one_odd_record_is_a_bad_row_and_not_the_end(tmp_path):
    picture(tmp_path / "a.png")
    good = {"texts": ["a", None], "images": [None, "a.png"]}
    odd = [{"nothing": 1}, [1, 2], {"texts": None, "images": []}, {"texts": ["a"], "images": [None, "a.png"]}]
    odd += [{"texts": ["a"], "images": [7]}, {"texts": [5], "images": [None]}, {"texts": [None], "images": ["\0"]}]
    bad = BadRows(1.0)
    assert kinds(read_rows(lines(tmp_path / "o.jsonl", odd[0], good, *odd[1:]), bad)[0]) == ["text", "image"]
    assert len(bad.reasons) == len(odd) and "o.jsonl:5" in bad.reasons[3] and "1 texts but 2 images" in bad.reasons[3]

    info = {"image_name": "a.png", "matched_text_index": 0}
    good = {"text_list": ["One."], "image_info": [info]}
    odd = [{**good, "image_info": [{**info, "matched_text_index": place}]} for place in (None, 7, -1, "x")]
    odd += [{**good, "text_list": None}, {**good, "text_list": [None]}, {**good, "image_info": [None]}]
    bad = BadRows(1.0)
    assert kinds(read_rows(lines(tmp_path / "m.jsonl", *odd, good), bad)[0]) == ["image", "text"]
    assert len(bad.reasons) == len(odd) and "m.jsonl:2" in bad.reasons[1] and "7 of 1 texts" in bad.reasons[1]

    images = [{"id": 1, "file_name": "a.png"}, {"id": 2}, 5, {"id": [1], "file_name": "a.png"}]
    captions = [{"id": n, "image_id": image, "caption": text} for n, (image, text) in enumerate(
        ((1, None), (2, "b"), (1, "ok"), ([1], "c"), (1, 3))
    )]  # fmt: skip
    path = put(tmp_path / "c.json", json.dumps({"images": images, "annotations": [*captions, None]}))
    bad = BadRows(1.0)
    assert [row.text for row in read_rows(path, bad)] == ["ok"] and len(bad.reasons) == 5
    assert "its caption is None" in bad.reasons[0] and "c.json:1" in bad.reasons[1] and "file_name" in bad.reasons[1]
    with pytest.raises(ManifestError, match=r"n\.json: COCO captions.*'images'"):
        read_rows(put(tmp_path / "n.json", json.dumps({"annotations": captions})))

    header = "client_id\tpath\tsentence\n"
    sound(tmp_path / "c1.wav")
    bad = BadRows(1.0)
    assert len(read_rows(put(tmp_path / "v.tsv", header + "abc\tc1.wav\nabc\tc1.wav\tHi\n"), bad)) == 1
    assert "v.tsv:2: has another number of fields" in bad.reasons[0]


def test_tables_of_another_encoding_or_with_long_fields(tmp_path):
    (tmp_path / "l.csv").write_bytes("id,text\n1,ascii\n2,caf\u00e9\n3,more\n".encode("latin-1"))
    bad = BadRows(1.0)
    assert [row.text for row in read_rows(tmp_path / "l.csv", bad)] == ["ascii", "more"]
    assert len(bad.reasons) == 1 and "l.csv:3: holds bytes that are no UTF-8" in bad.reasons[0]
    before = csv.field_size_limit()
    long = put(tmp_path / "long.csv", f"id,text\n1,{'word ' * 40_000}\n2,short\n")
    assert [len(row.text) for row in read_rows(long)] == [200_000, 5]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_MAX_FIELD", 1000)
        with pytest.raises(ManifestError, match=r"long\.csv:\d: not CSV from there on: field larger.*quote missing"):
            read_rows(long)
    assert csv.field_size_limit() == before
    (tmp_path / "l.jsonl").write_bytes(
        b'{"texts": ["a"], "images": [null]}\n{"texts": ["caf\xe9"], "images": [null]}\n'
    )
    bad = BadRows(1.0)
    assert len(read_rows(tmp_path / "l.jsonl", bad)) == 1 and "l.jsonl:2: not JSON" in bad.reasons[0]


def test_messages_with_parts(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    text = {"type": "text", "text": "What?"}
    url = {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}

    def said(*parts, **more) -> dict:
        return {"messages": [{"role": "user", "content": list(parts)}, answer], **more}

    path = lines(tmp_path / "m.jsonl", said(text, url), said({"type": "image"}, text, images=["b.png"]))
    first, second = read_rows(path)
    assert first.segments == (
        {"text": "What?", "role": "user"}, {"image": tmp_path / "a.png", "role": "user"},
        {"text": "A cat.", "role": "assistant"},
    )  # fmt: skip
    assert [s.get("image", s.get("text")) for s in second.segments] == [tmp_path / "b.png", "What?", "A cat."]
    assert built(path, tmp_path / "s")["num_samples"] == 2
    remote = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}
    data = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    spoken = {"type": "input_audio", "input_audio": {"data": "AAAA"}}
    silent = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}, answer]}
    bad = BadRows(1.0)
    odd = [said(text, remote), said(text, data), said(text, spoken), said({"type": "image"}), said(5), silent]
    assert len(read_rows(lines(tmp_path / "o.jsonl", *odd, said(text, url)), bad)) == 1
    for reason, part in zip(
        bad.reasons, ("cat.png' names no picture", "base64", "input_audio", "1 marks", "part 5", "is None"), strict=True
    ):
        assert part in reason


def test_manifests_as_a_json_list(tmp_path):
    picture(tmp_path / "a.png")
    rows = [{"text": "one", "n": 1}, {"text": "red", "image": "a.png"}]
    for name, text in (("l.json", json.dumps(rows)), ("i.json", json.dumps(rows, indent=1))):
        found = read_rows(put(tmp_path / name, text))
        assert [(row.kind, row.text) for row in found] == [("text", "one"), ("caption", "red")]
    found = read_rows(lines(tmp_path / "j.json", *rows))  # an object a line, whatever it is called
    assert [row.text for row in found] == ["one", "red"]


def test_manifests_as_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    picture(tmp_path / "a.png")
    rows = [{"text": "one", "image": None, "n": 1}, {"text": "red", "image": "a.png", "n": None}]

    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    bad = BadRows(0.5)
    found = read_rows(tmp_path / "p.parquet", bad)
    assert [(row.kind, row.text, row.metadata) for row in found] == [("caption", "red", {})]
    assert len(bad.reasons) == 1 and "p.parquet:0: 'image' must be a path, got None" in bad.reasons[0]
    parquet.write_table(pyarrow.Table.from_pylist(rows).drop_columns(["image"]), tmp_path / "t.parquet")
    assert [(row.text, row.metadata) for row in read_rows(tmp_path / "t.parquet")] == [("one", {"n": 1}), ("red", {})]
    with pytest.raises(ManifestError, match=r"q\.parquet:0: not to be read as parquet: "):
        read_rows(put(tmp_path / "q.parquet", "no parquet"))


def test_folders_of_pictures_that_few_read(tmp_path):
    put(picture(tmp_path / "t" / "A.tiff").with_suffix(".txt"), "a scan")
    assert [(row.kind, row.text) for row in read_rows(tmp_path / "t")] == [("caption", "a scan")]
    told = built(tmp_path / "t", tmp_path / "s")
    assert list(told["shards"]) == ["caption-000000.tar"]
    put(tmp_path / "h" / "b.heic", "?")
    put(tmp_path / "h" / "b.txt", "a photo")
    put(tmp_path / "h" / "c.txt", "a text")
    bad = BadRows(1.0)
    assert [row.text for row in read_rows(tmp_path / "h", bad)] == ["a text"]
    assert "b.heic isn't of a kind that is read" in bad.reasons[0]


def test_obelics_with_text_and_picture_in_one_place(tmp_path):
    picture(tmp_path / "a.png")
    (row,) = read_rows(lines(tmp_path / "o.jsonl", {"texts": ["a", "b"], "images": [None, "a.png"]}))
    assert [segment.get("text", "IMAGE") for segment in row.segments] == ["a", "IMAGE", "b"]


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
