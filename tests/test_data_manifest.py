from __future__ import annotations

import hashlib
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmllm.data import commands
from mmllm.data.rows.bad_rows import BadRows, ManifestError
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.holdout import split_rows
from mmllm.data.rows.keys import safe_key
from mmllm.data.rows.rows import KINDS
from mmllm.data.shards.find import shard_paths
from tests.data_fixtures import RATE, make_folder, mixed_manifest, write_manifest, write_picture, write_sound


def test_rows_of_each_kind(tmp_path):
    rows = read_rows(mixed_manifest(tmp_path, num=3))
    assert [row.kind for row in rows[:4]] == ["caption", "audio", "text", "interleaved"]
    assert rows[0].metadata == {"split": "train"} and rows[1].metadata == {"speaker": "bob"}
    assert rows[3].metadata == {"question": "which colour?", "answer": "red"}
    assert rows[0].where.endswith("manifest.jsonl:1")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "not JSON"),
        ("[1, 2]", "JSON object"),
        ('{"id": "a", "text": "  "}', "'text' is empty"),
        ('{"id": "a"}', "'text' is missing"),
        ('{"id": "a", "text": 5}', "string"),
        ('{"id": "a", "text": "x", "image": "no.png"}', r"no\.png doesn't exist"),
        ('{"id": "a", "text": "x", "image": "empty.png"}', "0 bytes"),
        ('{"id": "a", "text": "x", "image": 3}', "path"),
        ('{"id": "a", "text": "x", "image": "e", "audio": "f"}', "both"),
        ('{"id": "a", "segments": []}', "at least one"),
        ('{"id": "a", "segments": [{"video": "x"}]}', "segment 0"),
        ('{"id": "a", "segments": [{"text": "x"}], "question": "q"}', "go together"),
        ('{"id": "a", "text": "\\ud800"}', "'text' holds half a surrogate"),
        ('{"id": "a", "text": "x", "by": ["\\ud83d"]}', "'by' holds half a surrogate"),
        ('{"id": "\\udc00", "text": "x"}', "'id' holds half a surrogate"),
        ('{"id": "a", "text": "x", "\\ud800": 1}', "surrogate"),
        ('{"id": "a", "segments": [{"image": "good.png"}, {"text": " \\n"}]}', "segment 1 is .* not empty"),
        ('{"id": ["a"], "text": "x"}', r"'id' is \['a'\]; give a string or a number"),
        ('{"id": {}, "text": "x"}', "'id' is {}"),
        ('{"id": "a", "segments": [{"text": "\\ud800"}]}', "'segments' holds half a surrogate"),
        ('{"id": "a", "segments": [{"text": "x", "image": "y.png"}]}', "segment 0 has the keys text, image"),
        ('{"id": "a", "text": "x", "imag": "good.png"}', "'imag' names the file good.png"),
        ('{"id": "a", "text": "x", "image": "sub"}', "image .*sub is a folder; name the file"),
        ('{"id": "a", "segments": [{"image": "sub/"}]}', "segment 0 image .*sub is a folder"),
        ('{"id": "a", "text": "x", "audio": "/dev/null"}', "audio /dev/null is no file"),
        ('{"id": "a", "text": "x", "score": NaN}', "'score' holds NaN or Infinity, .* give null instead"),
        ('{"id": "a", "text": "x", "image": "good.png", "by": [{"score": -Infinity}]}', "'by' holds NaN or Infinity"),
        ('{"id": "a", "text": "x", "score": 1e999}', "'score' holds NaN or Infinity"),
        ('{"id": "a", "segments": [{"text": "x"}], "image": "y.png"}', "'image' beside 'segments'"),
    ],
)
def test_bad_rows_name_file_and_row(tmp_path, line, message):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "good.png").write_bytes(b"x")
    (tmp_path / "sub").mkdir()
    path = tmp_path / "m.jsonl"
    path.write_text('{"id": "good", "text": "x"}\n' + line + "\n")
    with pytest.raises(ManifestError, match=message) as caught:
        read_rows(path)
    assert f"{path}:2" in str(caught.value)
    bad = BadRows(max_fraction=0.5)
    assert len(read_rows(path, bad)) == 1 and len(bad.reasons) == 1


def test_ids_are_kept_also_zero_and_made_where_there_is_none(tmp_path):
    ids = ({"id": 0}, {"id": "a"}, {}, {"id": None}, {"id": ""})
    path = write_manifest(tmp_path, [{**values, "text": "x"} for values in ids])
    assert [row.id for row in read_rows(path)] == ["0", "a", "row3", "row4", "row5"]


def test_manifests_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(ManifestError, match="folder"):
        read_rows(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(ManifestError, match="is empty"):
        read_rows(tmp_path / "empty.jsonl", BadRows(1.0))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ManifestError, match="UTF-8"):
        read_rows(tmp_path / "binary.jsonl", BadRows(1.0))


def test_the_bound_on_bad_rows(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"id": "a", "text": "x"}\n' * 8 + "bad\n" * 2)
    assert len(read_rows(path, BadRows(0.2))) == 8
    with pytest.raises(ManifestError, match="2 of 10 rows"):
        read_rows(path, BadRows(0.1))


def test_holdouts(tmp_path):
    rows = read_rows(mixed_manifest(tmp_path, num=12))
    train, heldout = split_rows(rows, "speaker=bob")
    assert {row.metadata.get("speaker") for row in heldout} == {"bob"} and len(train) + len(heldout) == len(rows)
    train, heldout = split_rows(rows, 0.25)
    assert 3 <= len(heldout) <= 24 and split_rows(rows[5:], 0.25)[1] == [row for row in heldout if row in rows[5:]]
    for wrong in ("speaker=carl", "much", "1.0"):
        with pytest.raises(ManifestError, match="holdout"):
            split_rows(rows, wrong)


def test_of_few_rows_one_is_held_out_at_least(tmp_path):
    for count in range(2, 12):
        rows = [{"id": f"r{number}", "text": f"row {number} of {count}"} for number in range(count)]
        train, heldout = split_rows(read_rows(write_manifest(tmp_path, rows)), 0.01)
        assert len(heldout) == 1 and len(train) == count - 1


def test_of_each_kind_one_is_held_out_at_least(tmp_path):
    """Eight sounds among many pictures would else stay unscored in nearly every other run."""
    for seed in range(8):
        rows = read_rows(mixed_manifest(tmp_path / str(seed), num=3, seed=seed))
        train, heldout = split_rows(rows, 0.001, seed)
        assert Counter(row.kind for row in heldout) == dict.fromkeys(KINDS, 1)
        assert {row.kind for row in train} == set(KINDS)
    alone = next(row for row in rows if row.kind == "audio")
    train, _ = split_rows([alone, *(row for row in rows if row.kind != "audio")], 0.001)
    assert alone in train, "the only one of its kind is better trained on"


def test_files_of_one_name_in_many_folders_are_not_one_file(tmp_path):
    rows = []
    for number in range(40):
        (tmp_path / f"utt_{number}").mkdir()
        write_sound(tmp_path / f"utt_{number}" / "audio.wav", np.random.default_rng(number))
        rows.append({"id": f"r{number}", "text": "word", "audio": f"utt_{number}/audio.wav"})
    rows.append({**rows[0], "id": "again", "text": "another word"})
    _, heldout = split_rows(read_rows(write_manifest(tmp_path, rows)), 0.3)
    assert 5 <= len(heldout) <= 20
    assert ("r0" in {row.id for row in heldout}) == ("again" in {row.id for row in heldout})


def test_building_is_reproducible_to_the_byte(tmp_path):
    manifest = mixed_manifest(tmp_path / "m", num=4)
    make_folder(tmp_path / "tok")
    first = commands.build(manifest, tmp_path / "a", tmp_path / "tok", perturb=1)
    second = commands.build(manifest, tmp_path / "b", tmp_path / "tok", perturb=1)
    assert first == second and first["num_samples"] == 20 and len(first["shards"]) == 4
    other = commands.build(manifest, tmp_path / "b", tmp_path / "tok", perturb=1, seed=1)
    assert other["shards"]["audio-000000.tar"] != first["shards"]["audio-000000.tar"]
    assert other["shards"]["text-000000.tar"] == first["shards"]["text-000000.tar"]
    for name, info in first["shards"].items():
        assert hashlib.sha256((tmp_path / "a" / name).read_bytes()).hexdigest() == info["sha256"]


def test_workers_write_the_same_shards(tmp_path):
    manifest = mixed_manifest(tmp_path / "m", num=80)  # 320 rows: a chunk of each kind
    (tmp_path / "m" / "7.png").write_bytes(b"no picture")
    make_folder(tmp_path / "tok")
    told = []
    progress = lambda *counts: told.append(counts)  # noqa: E731
    alone = commands.build(manifest, tmp_path / "a", tmp_path / "tok", perturb=1, progress=progress)
    assert told[-1] == (320, 320) and len(told) == 4 and {num_all for _, num_all in told} == {320}
    together = commands.build(manifest, tmp_path / "b", tmp_path / "tok", perturb=1, workers=2)
    assert alone == together and len(alone["bad"]) == 2


def test_what_a_shard_holds(tmp_path):
    make_folder(tmp_path / "tok")
    commands.build(mixed_manifest(tmp_path / "m", num=2), tmp_path / "s", tmp_path / "tok", perturb=1)
    with tarfile.open(tmp_path / "s" / "audio-000000.tar") as tar:
        names = tar.getnames()
        assert len({name.partition(".")[0] for name in names}) == 4  # two rows, a copy of each
        assert all(member.mtime == 0 for member in tar)
        marks = [json.load(tar.extractfile(name)) for name in names if name.endswith(".json")]  # pyright: ignore
    assert {name.partition(".")[2] for name in names} == {"flac", "txt", "json", "codec.npz"}
    assert [mark.get("perturbed", False) for mark in marks] == [False, True, False, True]
    assert marks[0]["id"] == "a/0" and marks[1]["id"] == "a/0#1" and marks[0]["speaker"] == "bob"
    assert marks[0]["duration"] != marks[1]["duration"] and marks[0]["sample_rate"] == RATE
    with tarfile.open(tmp_path / "s" / "interleaved-000000.tar") as tar:
        assert any(name.endswith(".1.flac") or name.endswith(".1.png") for name in tar.getnames())


def test_shards_are_cut_by_count_and_rebuilt_cleanly(tmp_path):
    manifest = write_manifest(tmp_path, [{"id": f"r{n}", "text": f"row {n}"} for n in range(7)])
    assert len(commands.build(manifest, tmp_path / "s", samples_per_shard=2)["shards"]) == 4
    (tmp_path / "s" / "mine.tar").write_bytes(b"keep")
    assert len(commands.build(manifest, tmp_path / "s")["shards"]) == 1
    assert sorted(path.name for path in (tmp_path / "s").glob("*.tar")) == ["mine.tar", "text-000000.tar"]


def test_keys_are_safe_and_unlike():
    names = ["a.b", "a/b", "a b", "ab", "../x", "é" * 200, "", "..", "x" * 300]
    keys = [safe_key(name) for name in names]
    assert len(set(keys)) == len(names)
    assert all(key and len(key) <= 80 and "." not in key and "/" not in key and key.isascii() for key in keys)
    assert safe_key("plain-key_1") == "plain-key_1"


def test_rows_with_one_id_get_keys_of_their_own(tmp_path):
    ids = ["same", "same", "same", "same-1", "same-2", "same"]
    manifest = write_manifest(tmp_path, [{"id": name, "text": str(n)} for n, name in enumerate(ids)])
    commands.build(manifest, tmp_path / "s")
    with tarfile.open(tmp_path / "s" / "text-000000.tar") as tar:
        assert len({name.partition(".")[0] for name in tar.getnames()}) == len(ids)


def test_what_is_held_out_is_in_no_training_shard(tmp_path):
    """By its second picture too: documents go by their first."""
    rng = np.random.default_rng(0)
    for i in range(12):
        write_picture(tmp_path / f"{i}.png", rng)
    rows = [
        {"id": f"d{i}", "segments": [{"image": f"{i}.png"}, {"image": f"{(i + 1) % 12}.png"}, {"text": "two"}]}
        for i in range(12)
    ]
    manifest = write_manifest(tmp_path, rows)
    kept = {}
    for part in ("train", "heldout"):
        out = tmp_path / part
        commands.build(manifest, out, holdout="0.2", part=part)
        with tarfile.open(out / "interleaved-000000.tar") as tar:
            pictures = [name for name in tar.getnames() if name.endswith(".png")]
            kept[part] = {tar.extractfile(name).read() for name in pictures}  # pyright: ignore
    assert kept["train"] and kept["heldout"] and not kept["train"] & kept["heldout"]


def test_odd_pictures_are_stored_so_that_any_reader_sees_them(tmp_path):
    rng = np.random.default_rng(0)
    write_picture(tmp_path / "plain.png", rng)
    Image.new("RGBA", (5, 4), (1, 2, 3, 128)).save(tmp_path / "rgba.png")
    Image.new("CMYK", (5, 4)).save(tmp_path / "cmyk.jpg")
    Image.new("I;16", (5, 4)).save(tmp_path / "deep.png")
    Image.new("P", (1, 1)).save(tmp_path / "palette.gif")
    Image.new("RGB", (20_000, 40)).save(tmp_path / "long.png")
    names = ["plain.png", "rgba.png", "cmyk.jpg", "deep.png", "palette.gif", "long.png"]
    manifest = write_manifest(tmp_path, [{"id": str(n), "image": name, "text": "x"} for n, name in enumerate(names)])
    summary = commands.build(manifest, tmp_path / "s")
    assert summary["num_bad"] == 0
    with tarfile.open(tmp_path / "s" / "caption-000000.tar") as tar:
        pictures = {name: tar.extractfile(name).read() for name in tar.getnames() if name[-3:] in ("png", "jpg")}  # pyright: ignore
    assert pictures["0.png"] == (tmp_path / "plain.png").read_bytes()
    for number, name in enumerate(names):
        stored = next(key for key in pictures if key.startswith(f"{number}."))
        (tmp_path / stored).write_bytes(pictures[stored])
        with Image.open(tmp_path / stored) as picture:
            assert picture.mode == "RGB" and max(picture.size) <= 1024, name


def test_broken_files_are_skipped_counted_and_named(tmp_path):
    rng = np.random.default_rng(0)
    write_picture(tmp_path / "good.png", rng, size=64)
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:3000])
    write_sound(tmp_path / "good.wav", rng)
    write_sound(tmp_path / "long.wav", rng, seconds=3.0)
    write_sound(tmp_path / "short.wav", rng, seconds=0.005)
    soundfile.write(tmp_path / "zero.wav", np.zeros(0, dtype=np.float32), RATE)
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan, dtype=np.float32), RATE, subtype="FLOAT")
    (tmp_path / "noise.wav").write_bytes(b"RIFF nonsense")
    sounds = ["good", "short", "zero", "nan", "noise", "long"]
    rows = [{"id": name, "audio": f"{name}.wav", "text": "x"} for name in sounds]
    rows += [{"id": name, "image": f"{name}.png", "text": "x"} for name in ("good", "cut")]
    rows += [{"id": "gone", "image": "gone.png", "text": "x"}]
    manifest = write_manifest(tmp_path, rows)
    make_folder(tmp_path / "tok")
    summary = commands.build(manifest, tmp_path / "s", tmp_path / "tok", max_bad_fraction=0.7, max_seconds=2.0)
    assert (summary["num_rows"], summary["num_samples"], summary["num_bad"]) == (9, 3, 6)
    told = "\n".join(summary["bad"])
    for line, name in ((3, "zero.wav"), (4, "nan.wav"), (5, "noise.wav"), (6, "long.wav"), (8, "cut.png"), (9, "gone")):
        assert any(f"manifest.jsonl:{line}: " in reason and name in reason for reason in summary["bad"]), told
    with pytest.raises(ManifestError, match="6 of 9 rows"):
        commands.build(manifest, tmp_path / "s", tmp_path / "tok", max_seconds=2.0)
    only_bad = write_manifest(tmp_path, [rows[2]], "bad.jsonl")
    with pytest.raises(ManifestError, match="1 of 1 rows"):
        commands.build(only_bad, tmp_path / "s", max_bad_fraction=1.0)


def test_shard_specs(tmp_path):
    for number in range(3):
        (tmp_path / f"x-{number:03d}.tar").write_bytes(b"")
    assert len(shard_paths(str(tmp_path / "x-{000..002}.tar"))) == 3
    assert len(shard_paths([str(tmp_path / "x-*.tar"), str(tmp_path / "x-001.tar")])) == 3
    assert shard_paths("x-000.tar", tmp_path) == [tmp_path / "x-000.tar"]
    for wrong in ("x-{000..003}.tar", "y-*.tar", "y.tar"):
        with pytest.raises(FileNotFoundError, match=r"[xy]-?.*tar"):
            shard_paths(str(tmp_path / wrong))


def test_perturbed_copies_differ_from_their_source_and_repeat(tmp_path):
    from mmllm.data.shards.perturb import perturb

    wave = np.sin(np.arange(4000) * 0.3).astype(np.float32) * 0.5
    copies = [perturb(wave, 0, f"a#{number}") for number in range(12)]
    assert np.array_equal(copies[0], perturb(wave, 0, "a#0"))
    assert len({len(copy) for copy in copies}) > 4
    for copy in copies:
        assert copy.dtype == np.float32 and np.isfinite(copy).all() and np.abs(copy).max() <= 1
        assert 0.6 < len(copy) / len(wave) < 1.6
    for length in (1, 2, 15, 40, 399):  # 5 ms and less
        assert len(perturb(wave[:length], 1, "b")) >= 1
