"""Rows of a build stay on disk: they, their keys and bad ones are those that reading them all at once gives."""

from __future__ import annotations

import json
import os
import pickle
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmllm.cli.main import main
from mmllm.data import commands
from mmllm.data.rows import keys as keys_module
from mmllm.data.rows.bad_rows import BadRows, ManifestError
from mmllm.data.rows.cleaning import CleaningConfig
from mmllm.data.rows.column_names import ColumnNames
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.keys import copy_name, id_hash, key_numbers, numbered_key, safe_key
from mmllm.data.rows.rows import KINDS, Row, with_absolute_paths
from mmllm.data.rows.table import ChangedError, RowTable
from mmllm.data.shards import write as shards
from tests.data_fixtures import mixed_manifest, write_manifest, write_picture, write_sound

BASE64 = "iVBORw0KGgo" + "A" * 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path, rng = tmp_path_factory.mktemp("media"), np.random.default_rng(0)
    (path / "in").mkdir()
    for name in ("a.png", "in/b.png", "[c].png", "d:e.png", " f.png"):
        write_picture(path / name, rng)
    write_sound(path / "a.wav", rng)
    (path / "empty.png").write_bytes(b"")
    return path


def table_of(path: Path, bad: BadRows, **options) -> RowTable:
    table = RowTable(path.parent / "kept.jsonl", options.pop("num_copies", 1))
    table.read(path, bad, **options)
    return table


def rows_of(table: RowTable) -> list[tuple[Row, tuple[str, ...]]]:
    table.number_keys()
    return list(table.rows(range(len(table))))


def keys_in_turn(names: list[str]) -> Iterator[str]:
    """Keys as a table of all of them gives them."""
    taken: set[str] = set()
    counts: dict[str, int] = {}
    for name in names:
        key = base = safe_key(name)
        while key in taken:
            counts[base] = counts.get(base, 0) + 1
            key = f"{base}-{counts[base]}"
        taken.add(key)
        yield key


def num_kept(folder: Path) -> int:
    path = folder / "kept.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def check_same(path: Path, num_plain: int | None = None, **options) -> list[Row]:
    """The rows of a file, all good or bad as those of `read_rows` are."""
    (path.parent / "kept.jsonl").unlink(missing_ok=True)
    wanted_bad, bad = BadRows(1.0), BadRows(1.0)
    try:
        wanted = [with_absolute_paths(row) for row in read_rows(path, wanted_bad, **options)]
    except ManifestError as error:
        with pytest.raises(ManifestError) as raised:
            table_of(path, bad, **options)
        assert str(raised.value) == str(error)
        wanted, found = [], []
    else:
        found = rows_of(table_of(path, bad, **options))
    assert [row for row, _ in found] == wanted
    assert [key for _, keys in found for key in keys] == list(keys_in_turn([row.id for row in wanted]))
    assert (bad.reasons, bad.left_out) == (wanted_bad.reasons, wanted_bad.left_out)
    if num_plain is not None:
        assert len(wanted) - num_kept(path.parent) == num_plain
    return wanted


PLAIN = [
    {"id": "a", "text": "a text"}, {"text": "without an id"}, {"id": None, "text": "x"}, {"id": "", "text": "x"},
    {"id": 7, "text": "x"}, {"id": "a/b c", "text": "x", "n": 1.5, "ok": True, "none": None},
    {"id": "ü" * 50, "text": "ü 😀 \u2028 \\ud800"}, {"id": "p", "text": "x", "image": "a.png"},
    {"id": "q", "text": "x", "image": "./in/../in/b.png", "lang": "en"}, {"id": "r", "text": "x", "audio": "a.wav"},
    {"id": "s", "text": "x", "tags": ["a", {"b": [1]}], "file": "a.png.txt"}, {"id": "t", "text": "a < b <b>"},
    {"id": "u", "text": "/9j/ base64, \"bytes\""}, {"id": "v", "text": "x", "caption": "y", "title": "z"},
    {"id": "w", "text": "x", "big": 1e308}, {"text": "x", "image": "a.png", "mask": "in/b.png"},
]  # fmt: skip
ODD = [
    {"id": "1", "text": ""}, {"id": "1", "text": " \t"}, {"id": "1", "text": None}, {"id": "1"}, {}, [], 3, "x", None,
    {"id": ["1"], "text": "x"}, {"id": True, "text": "x"}, {"id": 1.0, "text": "x"}, {"id": "1", "text": 5},
    {"id": "1", "text": "x", "image": "none.png"}, {"id": "1", "text": "x", "image": "empty.png"},
    {"id": "1", "text": "x", "image": "in"}, {"id": "1", "text": "x", "image": "a.png/"},
    {"id": "1", "text": "x", "image": "a\0.png"}, {"id": "1", "text": "x", "image": "n" * 300},
    {"id": "1", "text": "x", "image": None}, {"id": "1", "text": "x", "image": ""}, {"text": "x", "image": []},
    {"id": "1", "text": "x", "image": ["a.png"]}, {"id": "1", "text": "x", "image": "[c].png"},
    {"id": "1", "text": "x", "image": "d:e.png"}, {"id": "1", "text": "x", "image": " f.png"},
    {"id": "1", "text": "x", "image": '["a.png"]'}, {"id": "1", "text": "x", "image": "file://a.png"},
    {"id": "1", "text": "x", "image": "http://example.com/a.png"}, {"id": "1", "text": "x", "image": "data:x"},
    {"id": "1", "text": "x", "image": BASE64}, {"id": "1", "text": "x", "pixels": BASE64},
    {"id": "1", "text": "x", "image": "a.png", "pixels": BASE64}, {"text": "x", "pixels": [BASE64]},
    {"id": "1", "text": "x", "image": "a.png", "more": {"bytes": BASE64, "path": None}},
    {"id": "1", "text": "x", "image": "a.png", "data": "AAAA", "format": "wav"},
    {"text": "x", "data": "A", "format": ""},
    {"id": "1", "text": "x", "image": {"path": "a.png"}}, {"id": "1", "text": "x", "image": {"bytes": BASE64}},
    {"id": "1", "text": "x", "image": "a.png", "audio": "a.wav"}, {"text": "x", "image": "a.png", "audio": None},
    {"id": "1", "text": "x <image> y", "image": "a.png"}, {"id": "1", "text": "x <image1> y"},
    {"id": "1", "text": "<img>a.png</img> y", "image": "a.png"}, {"id": "1", "text": "x", "images": ["a.png"]},
    {"id": "1", "text": "x", "images": []}, {"id": "1", "text": "x", "image": "a.png", "images": ["in/b.png"]},
    {"id": "1", "text": "x", "audios": ["a.wav", "a.wav"]}, {"id": "1", "caption": "x", "image": "a.png"},
    {"id": "1", "text": "x", "video": "a.mp4"}, {"id": "1", "text": "x", "videos": ["a.mp4"]},
    {"id": "1", "text": "x", "picture": "a.png"}, {"id": "1", "text": "x", "picture": "A.PNG"},
    {"id": "1", "text": "x", "filepath": "a.png"}, {"id": "1", "text": "x", "file_name": "a.txt"},
    {"id": "1", "text": "x", "Image": "a.png"}, {"ID": "1", "text": "x"}, {" text ": "x"}, {"Text": "x"},
    {"id": "1", "segments": [{"text": "x"}, {"image": "a.png"}]}, {"id": "1", "segments": '[{"text": "x"}]'},
    {"id": "1", "segments": []}, {"id": "1", "text": "x", "segments": [{"text": "x"}]},
    {"id": "1", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"id": "1", "text": "x", "conversations": []}, {"id": "1", "instruction": "x", "output": "y"},
    {"id": "1", "text": "x", "prompt": "y", "response": "z"}, {"id": "1", "text": "x", "chosen": "y", "rejected": "z"},
    {"id": "1", "text": "x", "texts": "[1]"}, {"id": "1", "text": "x", "history": "[oops"},
    {"id": "1", "text": "x \ud800"}, {"id": "\udfff", "text": "x"}, {"id": "1", "text": "x", "\ud800": 1},
    {"id": "1", "text": "x", "n": float("nan")}, {"text": "x", "image": "a.png", "n": [{"m": float("-inf")}]},
    {"id": "1", "text": "x", "tags": ["\ud800"]}, {"id": "1", "text": "x", "image": "\ud800.png"},
]  # fmt: skip


def test_each_record_is_the_row_that_its_importer_makes(folder):
    for number, record in enumerate(PLAIN):
        assert len(check_same(write_manifest(folder, [record], "one.jsonl"), form="manifest", num_plain=1)) == 1, number
    for record in ODD:
        check_same(write_manifest(folder, [record], "one.jsonl"), form="manifest")
    both = [record for pair in zip(PLAIN * 5, ODD, strict=False) for record in pair]
    rows = check_same(write_manifest(folder, both, "all.jsonl"), form="manifest")
    assert len(rows) > len(ODD) and 0 < num_kept(folder) < len(rows) - len(ODD) + 1
    deep = '{"id": "1", "text": "x", "deep": ' + "[" * 500 + "]" * 500 + "}\n"
    (folder / "deep.jsonl").write_text(json.dumps(PLAIN[0]) + "\n" + deep)
    check_same(folder / "deep.jsonl")


def test_lines_however_they_end(folder):
    good = json.dumps({"id": "a", "text": "x"}).encode()
    half, escaped = '{"id": "b", "text": "x\u2028y\x85z"}'.encode(), b'{"id": "c", "text": "\\u2028 \\ud83d\\ude00"}'
    lines = [
        b"\xef\xbb\xbf" + good, b"", b"  ", half, b"\x0b", escaped, b"{", b"\xff", good + b" x",
        b" " + good, good + b" ",
        b"\xef\xbb\xbf" + good, b'{"id": "d", "text": "a\\ud800"}', b'{"id": "d", "text": "a\\uDFFF"}', good + good,
        b'{"id": "a", "id": "e", "text": "x"}', b'{"text": "no id"}', good,
    ]  # fmt: skip
    for name, data in (
        ("lf.jsonl", b"\n".join(lines)), ("crlf.jsonl", b"\r\n".join(lines) + b"\r\n"),
        ("end.json", b"\n".join(lines[3:])),
        ("cr.jsonl", b"\r".join(lines)), ("one.jsonl", good), ("other.lines", b"\n".join(lines)),
    ):  # fmt: skip
        (folder / name).write_bytes(data)
        rows = check_same(folder / name, form="manifest")
        if name in ("lf.jsonl", "crlf.jsonl", "other.lines"):
            assert {row.id for row in rows} == {"a", "b", "c", "e", "row17"}
    text = "\n".join(json.dumps({"id": str(n), "text": "x" * (n % 700)}) for n in range(6000))  # more than a block
    (folder / "long.jsonl").write_text(text)
    assert len(check_same(folder / "long.jsonl", num_plain=6000 - 9)) == 6000 - 9


def test_other_forms_and_columns_are_kept(folder):
    (folder / "t.csv").write_text("id,image,text\n1,a.png,x\n2,none.png,x\n3,in/b.png,y\n")
    assert [row.where[-1] for row in check_same(folder / "t.csv", num_plain=0)] == ["2", "4"]
    path = write_manifest(folder, [{"id": "1", "title": "x", "image": "a.png", "n": "7"}], "c.jsonl")
    (row,) = check_same(path, columns=ColumnNames.parse(["text=title", "n:int"]), num_plain=0)
    assert row.text == "x" and row.metadata == {"n": 7}
    (folder / "l.json").write_text(json.dumps([{"id": "1", "text": "x"}]))
    check_same(folder / "l.json", num_plain=0)
    os.mkfifo(folder / "pipe")  # can be read but once
    writer = threading.Thread(target=lambda: (folder / "pipe").write_text('{"id": "1", "text": "x"}\n' * 3))
    writer.start()
    (folder / "kept.jsonl").unlink()
    found = rows_of(table_of(folder / "pipe", BadRows(0.0), form="manifest"))
    writer.join()
    assert [keys for _, keys in found] == [("1",), ("1-1",), ("1-2",)]


def test_keys_are_those_of_a_table_of_all(monkeypatch):
    rng = np.random.default_rng(0)
    parts = ["a", "b", "a.", "1", "2", "01", "", "10"]
    for trial in range(300):
        size = int(rng.integers(1, 60))
        names = ["-".join(rng.choice(parts, rng.integers(1, 5))) for _ in range(size)]
        wanted = list(keys_in_turn(names))
        numbers = key_numbers([id_hash(name) for name in names])
        found = [numbered_key(safe_key(name), 0 if numbers is None else numbers[n]) for n, name in enumerate(names)]
        assert found == wanted, (trial, names)
    assert key_numbers([id_hash(f"row{n}") for n in range(1000)]) is None and key_numbers([]) is None
    many = ["same"] * 8000 + [f"same-{n}" for n in range(1, 8001)]
    numbers = key_numbers([id_hash(name) for name in many])
    assert numbers is not None
    assert [numbered_key(name, number) for name, number in zip(many, numbers, strict=True)] == list(keys_in_turn(many))
    # where hashes are alike without need, keys are unlike all the same
    monkeypatch.setattr(keys_module, "_hash", lambda key: len(key))
    names = ["ab", "cd", "ab-1", "cd-1", "ef"]
    numbers = key_numbers([id_hash(name) for name in names])
    assert numbers is not None
    assert len({numbered_key(name, number) for name, number in zip(names, numbers, strict=True)}) == len(names)


def test_groups_hold_the_rows_and_the_keys_of_each_copy(tmp_path):
    manifest = mixed_manifest(tmp_path, num=9)
    again = write_manifest(tmp_path, [{"id": "a/1", "text": "x", "audio": "1.wav"}, {"text": "t"}], "again.jsonl")
    table, wanted = RowTable(tmp_path / "kept", 3), []
    for path in (manifest, again, again):
        table.read(path, BadRows(0.0))
        wanted += [with_absolute_paths(row) for row in read_rows(path)]
    names = [copy_name(row.id, copy) for row in wanted for copy in range(3 if row.kind == "audio" else 1)]
    keys = keys_in_turn(names)
    keyed = [(row, tuple(next(keys) for _ in range(3 if row.kind == "audio" else 1))) for row in wanted]
    groups = shards.group_rows(table, shards.ShardsConfig(samples_per_shard=6, perturb=2))
    assert [(group.kind, len(group.rows)) for group in groups] == [
        *(("caption", size) for size in (6, 3)), *(("interleaved", size) for size in (6, 3)),
        *(("text", size) for size in (6, 5)), *(("audio", 2) for _ in range(5)), ("audio", 1),
    ]  # fmt: skip
    found = [(one.row, one.keys) for group in groups for one in group.rows]
    assert found == [pair for kind in KINDS for pair in keyed if pair[0].kind == kind]
    again = pickle.loads(pickle.dumps(groups[-2].rows))  # as processes that are spawned get it
    assert [(one.row, one.keys) for one in again] == found[-3:-1]
    assert groups[-2].rows[1].keys == groups[-2].rows[1:][0].keys == found[-2][1]


def test_a_row_takes_less_than_100_bytes(tmp_path):
    rng, count = np.random.default_rng(0), 20_000
    write_picture(tmp_path / "a.png", rng)
    for rows in (
        [{"id": f"row-{n}", "text": "some text of a row " * 5, "image": "a.png", "lang": "en"} for n in range(count)],
        [{"id": f"row{n // 5}", "text": "some text of a row " * 5} for n in range(count)],
        [{"id": f"row{n}", "segments": [{"text": "some text of a row " * 5}]} for n in range(count)],
    ):
        path = write_manifest(tmp_path, rows)
        del rows
        tracemalloc.start()
        table = table_of(path, BadRows(0.0))
        groups = shards.group_rows(table, shards.ShardsConfig())
        used, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(table) == count and len(groups) == 2 and used / count < 60
        (tmp_path / "kept.jsonl").unlink(missing_ok=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_manifest_that_changes_is_noticed(tmp_path, workers, capfd):
    rows = [{"id": f"r{n}", "text": "word"} for n in range(40)]
    changes = {
        "longer": lambda path: path.write_text(path.read_text() + json.dumps(rows[0]) + "\n"),
        "as long": lambda path: path.write_text(path.read_text()[::-1].strip() + "\n"),
        "gone": lambda path: path.unlink(),
    }
    for name, change in changes.items():
        manifest, write = write_manifest(tmp_path, rows), shards._WriteGroups.each

        def change_and_write(*args, change=change, manifest=manifest, write=write, **options):
            change(manifest)
            return write(*args, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shards._WriteGroups, "each", change_and_write)
            command = ["data", "build", str(manifest), "--out", str(tmp_path / name), "--workers", str(workers)]
            assert main(command) == 2
        told = capfd.readouterr().err.splitlines()
        assert "manifest.jsonl: was changed while its rows were built; leave it as it is" in told[-1]
        assert not any("Traceback" in line for line in told) and not list((tmp_path / name).iterdir())


def test_what_changes_while_a_chunk_is_read_is_noticed_too(tmp_path):
    manifest = write_manifest(tmp_path, [{"id": f"r{n}", "text": "word"} for n in range(40)])
    table = table_of(manifest, BadRows(0.0))
    table.number_keys()
    found = table.rows(range(40))
    next(found)
    os.utime(manifest, ns=(1, 1))
    with pytest.raises(ChangedError, match=r"manifest\.jsonl: was changed"):
        list(found)
    os.utime(manifest, ns=(10**18, 10**18))
    table = table_of(manifest, BadRows(0.0))
    text = manifest.read_text()
    manifest.write_text(text.replace('"text"', '"xxxx"'))
    os.utime(manifest, ns=(10**18, 10**18))
    table.number_keys()
    with pytest.raises(ChangedError, match=r"manifest\.jsonl: was changed"):
        list(table.rows([3]))


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_rows_end_a_build_at_once(tmp_path, workers):
    rng = np.random.default_rng(0)
    write_picture(tmp_path / "good.png", rng)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    rows = [{"id": str(n), "text": "x", "image": "bad.png" if n < 60 else "good.png"} for n in range(1000)]
    manifest, done = write_manifest(tmp_path, rows), []
    options: dict[str, Any] = {"workers": workers, "progress": lambda count, _: done.append(count)}
    said = r"manifest\.jsonl: 60 of 1000 rows can't be used, at most 50 may be: .*manifest\.jsonl:1: .*; …\. "
    with pytest.raises(ManifestError, match=said + "The build ended there"):
        commands.build(manifest, tmp_path / "s", **options)
    assert max(done) < 300 and not list((tmp_path / "s").iterdir())
    told = commands.build(manifest, tmp_path / "s", max_bad_fraction=0.06, **options)
    assert told["num_bad"] == 60 and told["num_samples"] == 940
    assert [text.partition(": ")[0] for text in told["bad"]] == [f"{manifest}:{n}" for n in range(1, 61)]
    missing = write_manifest(
        tmp_path, [{"id": str(n), "text": "x", "image": f"{n}.png"} for n in range(1000)], "m.jsonl"
    )
    done.clear()
    with pytest.raises(ManifestError, match="1000 of 1000 rows"):
        commands.build([missing, manifest], tmp_path / "t", max_bad_fraction=0.9, **options)
    assert not done and not (tmp_path / "t").exists()


def test_nothing_kept_stays(tmp_path):
    text = "".join(f"{n},some text\n" for n in range(20))
    (tmp_path / "good.csv").write_text("id,text\n" + text)
    (tmp_path / "bad.csv").write_text("id,text\n" + "1,\n" * 20)
    out, seen = tmp_path / "s", set()

    def look(count: int, _: int) -> None:
        seen.update(tmp_path.glob(f"*/{shards.STAGING}/*/rows.jsonl"))

    def look_and_stop(count: int, num_all: int) -> None:
        look(count, num_all)
        raise KeyboardInterrupt

    with pytest.raises(ManifestError, match="20 of 20"):
        commands.build([tmp_path / "good.csv", tmp_path / "bad.csv"], out)
    assert not out.exists()
    with pytest.raises(KeyboardInterrupt):
        commands.build(tmp_path / "good.csv", out, progress=look_and_stop)
    assert len(seen) == 1 and not out.exists()
    plain = write_manifest(tmp_path, [{"id": str(n), "text": "some text"} for n in range(20)])
    commands.build(plain, tmp_path / "plain", progress=look)
    assert len(seen) == 1
    wanted = (tmp_path / "plain" / "text-000000.tar").read_bytes()
    for number, (workers, cleaning) in enumerate(((0, None), (0, CleaningConfig(quality="words > 1")), (2, None))):
        commands.build(tmp_path / "good.csv", out, progress=look, workers=workers, cleaning=cleaning)
        assert len(seen) == 2 + number
        assert sorted(path.name for path in out.iterdir()) == ["shards.json", "text-000000.tar"]
        assert (out / "text-000000.tar").read_bytes() == wanted
