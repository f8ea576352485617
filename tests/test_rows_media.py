"""Embedded pictures and sounds: rows hold where they lie, and every command reads them there."""

from __future__ import annotations

import base64
import csv
import errno
import io
import json
import pickle
import sys
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mmllm.cli.main import main
from mmllm.data import commands
from mmllm.data.executors.stages import Executor
from mmllm.data.rows.bad_rows import BadRows, ManifestError
from mmllm.data.rows.cleaning import CleaningConfig
from mmllm.data.rows.column_names import ColumnNames
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.media import Digests, Embedded, sound_seconds
from mmllm.data.rows.readable import readable_rows
from mmllm.data.rows.rows import row_media
from mmllm.data.rows.split import split
from tests.rows_fixtures import as_lines, only, picture_bytes, pictures, put, read, said, sound_bytes


def parquet(path: Path, rows: list[dict], **options) -> Path:
    pyarrow, file = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    keys = dict.fromkeys(key for row in rows for key in row)
    file.write_table(pyarrow.Table.from_pylist([{**dict.fromkeys(keys), **row} for row in rows]), path, **options)
    return path


def stored(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {name: tar.extractfile(name).read() for name in tar.getnames()}  # pyright: ignore


def captions(*numbers: int) -> list[dict]:
    """Rows of parquet, of a picture each."""
    return [{"image": {"bytes": picture_bytes(n), "path": None}, "text": "x"} for n in numbers]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize("row_group_size", [None, 3])
def test_pictures_and_sounds_in_parquet(tmp_path, row_group_size):
    rows = [
        {"image": {"bytes": picture_bytes(n), "path": f"{n}.png" if n % 2 else None}, "text": f"picture {n}", "n": n}
        for n in range(40)
    ]
    path = parquet(tmp_path / "m.parquet", rows, row_group_size=row_group_size)
    found = read_rows(path)
    assert [row.kind for row in found] == ["caption"] * 40 and found[3].metadata == {"n": 3}
    assert all(len(pickle.dumps(row.image)) < 400 and not isinstance(row.image, Path) for row in found)
    for n in (*range(40), 39, 0, 20, 19, 21):
        assert found[n].image.read_bytes() == picture_bytes(n), n
    told = commands.build(path, tmp_path / "s", workers=2)
    assert told["num_samples"] == 40 and told["num_bad"] == 0
    assert stored(tmp_path / "s" / "caption-000000.tar")["row7.png"] == picture_bytes(7)
    sounds = [{"audio": {"bytes": sound_bytes(n), "path": None}, "sentence": f"sound {n}"} for n in range(3)]
    found = read_rows(parquet(tmp_path / "a.parquet", sounds))
    assert [(row.kind, row.text, round(sound_seconds(row.audio), 3)) for row in found] == [
        ("audio", f"sound {n}", 0.2) for n in range(3)
    ]
    assert commands.build(tmp_path / "a.parquet", tmp_path / "t")["num_samples"] == 3


def test_other_columns_of_parquet(tmp_path):
    """As datasets writes them: paths without bytes, arrays, lists, dates, and columns that are no picture."""
    import datetime
    import decimal

    pictures(tmp_path)
    wave = [0.1, -0.5, 0.25] * 100
    rows = [
        {"image": {"bytes": None, "path": "1.png"}, "text": "by path"},
        {"audio": {"array": wave, "sampling_rate": 8000, "bytes": None, "path": None}, "text": "by array"},
        {"image": {"bytes": picture_bytes(0), "path": None}, "text": "with a mask", "mask": {"bytes": b"xx"}},
        {"text": "alone", "at": datetime.datetime(2024, 5, 1, 12), "price": decimal.Decimal("1.50")},
        {"images": [{"bytes": picture_bytes(2), "path": None}], "caption": "a list of one"},
        {"images": [{"bytes": picture_bytes(n), "path": None} for n in range(2)], "text": "<image> beside <image>"},
    ]  # fmt: skip
    bad = BadRows(0.0)
    left_out = {"bytes of the column 'mask'": 1, "rows with neither picture nor sound, kept as texts": 1}
    found = read_rows(parquet(tmp_path / "m.parquet", rows), bad)
    assert [row.kind for row in found] == ["caption", "audio", "caption", "text", "caption", "interleaved"]
    assert found[0].image == tmp_path / "1.png" and bad.left_out == left_out
    sound, rate = soundfile.read(io.BytesIO(found[1].audio.read_bytes()), dtype="float32")
    assert rate == 8000 and np.array_equal(sound, np.array(wave, dtype=np.float32))
    assert found[3].metadata == {"at": "2024-05-01T12:00:00", "price": "1.50"}
    assert said(found[5]) == ["-:bytes", "-: beside ", "-:bytes"]
    assert found[5].segments[2]["image"].read_bytes() == picture_bytes(1)
    assert commands.build(tmp_path / "m.parquet", tmp_path / "s")["left_out"] == left_out
    wrong = [
        {"img": {"bytes": picture_bytes(0), "path": None}, "text": "unnamed"},
        {"image": {"bytes": b"", "path": None}, "text": "nothing"},
        {"images": [{"bytes": picture_bytes(n), "path": None} for n in range(2)], "text": "no marks"},
        {"image": {"bytes": None, "path": "9.png"}, "text": "gone"},
        {"image": {"bytes": picture_bytes(1), "path": None}, "text": "good"},
    ]
    rows_read, reasons = read(parquet(tmp_path / "w.parquet", wrong))
    assert [row.text for row in rows_read] == ["good"]
    wanted = ("--columns image=img", "neither bytes nor the path", "2 files in 'images' and one text", "9.png doesn't")
    for number, (reason, why) in enumerate(zip(reasons, wanted, strict=True)):
        assert f"w.parquet:{number}: " in reason and why in reason
    renamed = read_rows(parquet(tmp_path / "r.parquet", wrong[:1]), columns=ColumnNames.parse(["image=img"]))
    assert renamed[0].image.read_bytes() == picture_bytes(0)


@pytest.mark.parametrize("form", ["csv", "tsv", "parquet"])
@pytest.mark.parametrize("key", ["image", "Image", "file_name"])
def test_a_row_of_a_table_that_lacks_its_picture_is_named(tmp_path, form, key):
    """Its column says that rows have one: taken as a text, it would pass unnoticed."""
    pictures(tmp_path)
    if form == "parquet":
        path = parquet(tmp_path / "m.parquet", [{key: "0.png", "text": "red"}, {key: None, "text": "blue"}])
    else:
        path = put(tmp_path / f"m.{form}", f"{key},text\n0.png,red\n,blue\n")
    rows, reasons = read(path)
    assert [(row.kind, row.text) for row in rows] == [("caption", "red")]
    assert (
        len(reasons) == 1
        and f"{key.lower()!r} must be a path, got None" in reasons[0]
        and "out of a table" in reasons[0]
    )


def test_texts_of_a_table_of_several_kinds_are_counted(tmp_path):
    pictures(tmp_path)
    (tmp_path / "a.flac").write_bytes(sound_bytes())
    bad = BadRows(0.0)
    table = "image,audio,text,n\n0.png,,red,1\n,a.flac,one,2\n,,words,3\n"
    rows = read_rows(put(tmp_path / "m.csv", table), bad)
    assert [(row.kind, row.text) for row in rows] == [("caption", "red"), ("audio", "one"), ("text", "words")]
    assert [row.metadata for row in rows] == [{"n": "1"}, {"n": "2"}, {"n": "3"}]
    assert bad.left_out == {"rows with neither picture nor sound, kept as texts": 1}


@pytest.mark.parametrize("nothing", [None, "", {"bytes": None, "path": None}])
def test_a_picture_that_is_nothing_is_named_in_json(tmp_path, nothing):
    pictures(tmp_path)
    path = as_lines(tmp_path / "m.jsonl", {"image": nothing, "text": "red"}, {"images": [], "text": "blue"})
    rows, reasons = read(path)
    assert [(row.kind, row.text) for row in rows] == [("text", "blue")]
    assert len(reasons) == 1 and "m.jsonl:1: 'image' must be a path, got None; leave it out" in reasons[0]
    beside = as_lines(tmp_path / "b.jsonl", {"image": nothing, "images": ["0.png"], "audio": nothing, "text": "red"})
    assert only(beside).image == tmp_path / "0.png"


def test_the_cauldron_and_chats_beside_embedded_pictures(tmp_path):
    def embedded(*numbers: int) -> list[dict]:
        return [{"bytes": picture_bytes(n), "path": None} for n in numbers]

    pairs = [{"user": f"ask {n}", "assistant": f"answer {n}", "source": "vqa"} for n in range(2)]
    row = only(parquet(tmp_path / "c.parquet", [{"images": embedded(0, 1), "texts": pairs}]))
    assert said(row) == ["u:bytes", "u:bytes", "u:ask 0", "a:answer 0", "u:ask 1", "a:answer 1"]
    assert row.metadata == {"source": "vqa"}
    assert [segment["image"].read_bytes() for segment in row.segments[:2]] == [picture_bytes(0), picture_bytes(1)]
    talk = [{"from": "human", "value": "<image>Which?"}, {"from": "gpt", "value": "Red", "weight": 1}]
    for name, told in (("t", talk), ("j", json.dumps(talk))):
        path = parquet(tmp_path / f"{name}.parquet", [{"image": embedded(2)[0], "conversations": told}])
        row = only(path)
        assert said(row) == ["u:bytes", "u:Which?", "a:Red"]
        assert row.segments[0]["image"].read_bytes() == picture_bytes(2)
        assert commands.build(path, tmp_path / name)["num_samples"] == 1


def test_base64_and_data_urls_in_json_and_tables(tmp_path):
    picture, sound = picture_bytes(5), sound_bytes(2)
    url = "data:image/png;base64," + b64(picture)
    rows = [
        {"image": url, "text": "é" * 5},
        {"image": b64(picture), "text": "bare"},
        {"image": {"bytes": b64(picture), "path": "x.png"}, "text": "struct"},
        {"audio": "data:audio/flac;base64," + b64(sound), "text": "sound"},
        {"images": [url], "text": "list"},
        {"segments": [{"text": "See "}, {"image": url}, {"audio": {"bytes": b64(sound), "path": None}}]},
    ]
    for path in (
        as_lines(tmp_path / "m.jsonl", *rows),
        put(tmp_path / "i.json", json.dumps(rows, indent=1, ensure_ascii=False)),
    ):
        found = read_rows(path)
        assert [row.kind for row in found] == ["caption"] * 3 + ["audio", "caption", "interleaved"]
        assert all(row.image.read_bytes() == picture for row in (*found[:3], found[4]))
        assert found[3].audio.read_bytes() == found[5].segments[2]["audio"].read_bytes() == sound
        assert commands.build(path, tmp_path / path.stem)["num_samples"] == 6
    stream = io.StringIO()
    table = csv.writer(stream, delimiter="\t")
    table.writerows([["index", "picture", "caption"], ["0", b64(picture), 'a, "b"\nc'], ["1", url, "d"]])
    found = read_rows(put(tmp_path / "t.tsv", stream.getvalue()), columns=ColumnNames.parse(["image=picture"]))
    assert [(row.image.read_bytes(), row.text) for row in found] == [(picture, 'a, "b"\nc'), (picture, "d")]
    wrong = as_lines(
        tmp_path / "w.jsonl", {"image": url[:-7] + "!", "text": "cut"}, {"image": "https://e.org/a.png", "text": "x"},
        {"image": "data:image/png;base64,", "text": "x"}, {"image": "x" * 5000, "text": "x"}, {"text": "good"},
    )  # fmt: skip
    told = commands.build(wrong, tmp_path / "w", max_bad_fraction=0.9)
    assert told["num_samples"] == 1 and all(len(reason) < 600 for reason in told["bad"])
    for line, why in ((2, "is an address"), (3, "isn't the base64"), (4, "too long"), (1, "isn't base64")):
        assert any(f"w.jsonl:{line}: " in reason and why in reason for reason in told["bad"]), told["bad"]


def test_a_reference_is_a_text_that_manifests_hold(tmp_path):
    for media in (
        Embedded(Path("a b#1.parquet"), 12, ("images", "0", "bytes"), 0x1A2B),
        Embedded(Path("x/y.jsonl"), (1052, 88), ("messages", "0", "a/b", "ü"), 2**32 - 1),
    ):
        assert Embedded.parse(str(media)) == media
    assert all(Embedded.parse(text) is None for text in ("a.png", "a#b.png", "a.parquet#1/image", "#1/a@00000000"))
    url = "data:image/png;base64," + b64(picture_bytes(1))
    row = only(as_lines(tmp_path / "d" / "m.jsonl", {"image": url, "text": "one"}))
    named = str(row.image).removeprefix(f"{tmp_path / 'd'}/")
    again = only(as_lines(tmp_path / "d" / "again.jsonl", {"image": named, "text": "one"}))
    assert again.image.read_bytes() == picture_bytes(1)
    named = as_lines(tmp_path / "n.jsonl", {"image": "m#1/image@00000000.png", "text": "x"})
    with pytest.raises(ManifestError, match="doesn't exist"):
        read_rows(named)


def test_a_file_that_was_changed_is_named_and_never_misread(tmp_path):
    def urls(*numbers: int) -> list[dict]:
        return [{"image": "data:image/png;base64," + b64(picture_bytes(n)), "text": "x"} for n in numbers]

    path = as_lines(tmp_path / "m.jsonl", *urls(1, 2))
    first, second = read_rows(path)
    as_lines(path, *urls(2, 1))
    for row in (first, second):
        with pytest.raises(ValueError, match=r"m\.jsonl.*(holds something else there|isn't there any more)"):
            row.image.read_bytes()
    table = parquet(tmp_path / "m.parquet", captions(1, 2))
    first, second = read_rows(table)
    assert second.image.read_bytes() == picture_bytes(2)
    parquet(table, captions(3))
    for row in (first, second):
        with pytest.raises(ValueError, match=r"m\.parquet"):
            row.image.read_bytes()


def test_reading_parquet_again_takes_little_memory(tmp_path):
    """One row group of 64 MB, of which a row at a time is read, in order and backwards."""
    rng = np.random.default_rng(0)
    blobs = [rng.bytes(1 << 20) for _ in range(64)]
    path = parquet(tmp_path / "m.parquet", [{"image": {"bytes": blob, "path": None}, "text": "x"} for blob in blobs])
    tracemalloc.start()
    rows = read_rows(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 48 << 20
    assert [row.image.read_bytes() == blob for row, blob in zip(rows, blobs, strict=True)] == [True] * 64
    assert rows[5].image.read_bytes() == blobs[5]


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    put(tmp_path / "m.parquet", "PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"m\.parquet: reading parquet needs pyarrow; pip install 'mmllm\["):
        read_rows(tmp_path / "m.parquet")


@pytest.fixture
def talks(tmp_path) -> Path:
    """Forty pictures and conversations about them in parquet."""
    rows = [
        {
            "image": {"bytes": picture_bytes(n), "path": None},
            "conversations": [{"from": "human", "value": "<image>Which?"}, {"from": "gpt", "value": f"Number {n}."}],
        }
        for n in range(40)
    ]
    return parquet(tmp_path / "talks.parquet", rows)


def test_every_command_reads_them(tmp_path, talks, capsys, monkeypatch):
    """split, build, train-text and quickstart's look at the rows; from another working directory."""
    url = "data:image/png;base64,"
    shown = [{"image": url + b64(picture_bytes(n)), "text": f"picture {n}"} for n in range(30, 70)]
    lines = as_lines(tmp_path / "captions.jsonl", *shown)
    out = tmp_path / "deep" / "manifests"
    monkeypatch.chdir(tmp_path)
    assert main(["data", "split", talks.name, lines.name, "--out", str(out), "--holdout", "0.2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert sum(told["test"].values()) + told["repeated"] + sum(told["train"].values()) + sum(told["val"].values()) == 80
    assert told["test"]["caption"] and told["test"]["interleaved"]
    assert all(path.stat().st_size < 20_000 for path in out.iterdir()), "rows hold references, not pictures"
    parts = {path.name: read_rows(path) for path in out.iterdir()}
    shown = {name: {Digests()(media) for row in rows for _, media in row_media(row)} for name, rows in parts.items()}
    assert not shown["test.jsonl"] & (shown["train-caption.jsonl"] | shown["train-interleaved.jsonl"])
    assert len(readable_rows(parts["test.jsonl"], BadRows(0.0), "test")) == len(parts["test.jsonl"])
    built = commands.build([out / "train-caption.jsonl", out / "train-interleaved.jsonl"], tmp_path / "s")
    assert built["num_bad"] == 0 and built["num_samples"] == sum(told["train"].values())
    assert main(["tokenizer", "train-text", str(talks), "captions.jsonl", "--out", "tok", "--vocab_size", "300"]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 120
    from mmllm.quickstart.plan import Contents, read_contents

    assert isinstance(contents := read_contents(out), Contents)
    assert contents.kinds == ("caption", "interleaved") and contents.has_images


def test_cleaning_and_tasks_elsewhere_read_them(tmp_path, talks):
    rows = [{"image": {"bytes": picture_bytes(n % 20), "path": None}, "text": f"picture {n % 20}"} for n in range(30)]
    path = parquet(tmp_path / "c.parquet", rows)
    cleaning = CleaningConfig(dedup="exact", quality="words >= 2")
    here = commands.build(path, tmp_path / "a", cleaning=cleaning, holdout="0.3")
    assert here["left_out"]["exact"] == 10 and here["left_out"]["held out"] == 20 - here["num_samples"]
    pytest.importorskip("datatrove")
    there = commands.build(
        path, tmp_path / "b", cleaning=cleaning, holdout="0.3",
        executor=Executor("datatrove", workers=1, tasks=2, work=tmp_path / "work"),
    )  # fmt: skip
    assert there == here
    assert [p.read_bytes() for p in sorted((tmp_path / "a").glob("*.tar"))] == [
        p.read_bytes() for p in sorted((tmp_path / "b").glob("*.tar"))
    ]


def test_evaluation_reads_them(tmp_path):
    """Questions about an embedded picture, a caption and a sound; the report shows them."""
    from mmllm.evaluation.answer_task import prompt_segments
    from mmllm.evaluation.media import MediaBudget
    from mmllm.evaluation.tasks import short_enough

    url = "data:image/png;base64," + b64(picture_bytes(1))
    sound = "data:audio/flac;base64," + b64(sound_bytes())
    path = as_lines(
        tmp_path / "m.jsonl", {"image": url, "text": "red"}, {"audio": sound, "text": "one"},
        {"segments": [{"text": "See "}, {"image": url}], "question": "what?", "answer": "red"},
    )  # fmt: skip
    rows = read_rows(path)
    assert len(readable_rows(rows, BadRows(0.0), "rows")) == 3
    assert [segment.image for segment in prompt_segments(rows[2])] == [None, picture_bytes(1)]
    with pytest.raises(ManifestError, match=r"lasts 0\.2 s"):
        short_enough([rows[1]], 0.1, BadRows(0.0), "rows")
    budget = MediaBudget()
    assert budget.image(str(rows[0].image)).uri.startswith("data:image/")
    assert budget.sound(str(rows[1].audio), "red").seconds == pytest.approx(0.2)


def test_split_takes_all_forms(tmp_path):
    pictures(tmp_path, 12)
    lines = ["file;words;split"] + [f"{n}.png;picture {n};{'test' if n % 3 == 0 else 'train'}" for n in range(12)]
    path = put(tmp_path / "m.csv", "\n".join(lines) + "\n")
    told = split([path], tmp_path / "out", holdout="split=test", columns=ColumnNames.parse(["image=file,text=words"]))
    assert told["test"] == {"caption": 4} and told["train"]["caption"] + told["val"]["caption"] == 8
    assert told["skipped"] == [] and "left_out" not in told


def test_a_machines_fault_is_no_bad_row(tmp_path, monkeypatch):
    url = "data:image/png;base64," + b64(picture_bytes(1))
    path = as_lines(tmp_path / "m.jsonl", {"image": url, "text": "a"}, {"text": "b"})
    rows = read_rows(path)
    opened = Path.open

    def broken(self: Path, *args, **options):
        if self.name == "m.jsonl":
            raise OSError(errno.EMFILE, "Too many open files", str(self))
        return opened(self, *args, **options)

    is_file = Path.is_file

    def gone(self: Path) -> bool:
        if self.name == "0.png":
            raise OSError(errno.EIO, "Input/output error", str(self))
        return is_file(self)

    def short(*args, **options):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", broken)
        for attempt in (lambda: read_rows(path, BadRows(1.0)), lambda: readable_rows(rows, BadRows(1.0), "rows")):
            with pytest.raises(OSError, match="Too many open files"):
                attempt()
    named = [{"role": "user", "content": "<img>0.png</img>"}, {"role": "assistant", "content": "a"}]
    for record in ({"messages": named}, {"image": "0.png", "text": "a"}):
        talk = as_lines(tmp_path / "t.jsonl", record, {"text": "b"} if "text" in record else {"messages": named[1:]})
        with monkeypatch.context() as patch:
            patch.setattr(Path, "is_file", gone)
            with pytest.raises(OSError, match="Input/output error"):
                read_rows(talk, BadRows(1.0))
    from mmllm.data.shards import encode

    with monkeypatch.context() as patch:
        patch.setattr(encode, "decode_file", short)
        with pytest.raises(RuntimeError, match="allocate memory"):
            commands.build(path, tmp_path / "s", max_bad_fraction=1.0)
