from __future__ import annotations

import collections
import io
import itertools
import json
import math
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from mmllm.data import commands
from mmllm.data.index import arrays, index, make, stamps
from mmllm.data.index.arrays import open_arrays, write_arrays
from mmllm.data.index.columns import Column, Texts
from mmllm.data.index.count import count_tokens
from mmllm.data.index.index import RECORD, index_path, load_index
from mmllm.data.index.make import index_shard, write_indices
from mmllm.data.index.scan import scan_shard
from mmllm.data.index.write import make_records
from mmllm.data.plan.plan import open_plan
from mmllm.data.plan.recipe import recipe_from_dict
from mmllm.data.samples.documents import build_document
from mmllm.data.samples.schema import read_sample
from mmllm.data.shards import files
from mmllm.data.shards.find import find_shards
from mmllm.data.shards.headers import read_headers
from mmllm.data.shards.tar import headers_of, read_members, scan_tar
from mmllm_tokenizers.folder import TokenizerFolder
from tests.data_fixtures import make_folder, mixed_manifest, write_manifest, write_tar


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("index")
    make_folder(root / "tok")
    commands.build(mixed_manifest(root / "m"), root / "s", root / "tok", perturb=1, samples_per_shard=10)
    commands.index(root / "s", root / "tok")
    return root


def same_as_scanning(path: Path) -> bool:
    table, spans = read_headers(path.read_bytes(), str(path)), list(scan_tar(path))
    assert [span.key for span in spans] == table.keys
    assert [(span.offset, span.size) for span in spans] == list(
        zip(table.offsets_S.tolist(), table.spans_S.tolist(), strict=True)
    )
    for number, span in enumerate(spans):
        ours = [(table.endings[m], int(table.starts_M[m]), int(table.sizes_M[m])) for m in table.files(number)]
        assert ours == [(member.ending, member.offset, member.size) for member in span.members]
    return True


@pytest.mark.parametrize("size", [b"-0000003720\0", b"-0000000001\0"])
def test_a_negative_size_is_an_error_and_no_endless_loop(tmp_path, size):
    data = bytearray(write_tar(tmp_path / "t.tar", {"a.txt": b"x" * 600, "b.txt": b"y"}).read_bytes())
    second = 512 + 1024
    data[second + 124 : second + 136] = size
    data[second + 148 : second + 156] = b"        "
    data[second + 148 : second + 156] = b"%06o\0 " % sum(data[second : second + 512])
    for read in (lambda: read_headers(bytes(data), "t.tar"), lambda: list(headers_of(bytes(data), "t.tar"))):
        with pytest.raises(ValueError, match="no tar header at byte 1536"):
            read()


def test_bulk_headers_agree_with_the_slow_reader(made, tmp_path):
    for shard in sorted((made / "s").glob("*.tar")):
        assert same_as_scanning(shard)
    rng = np.random.default_rng(0)
    plain = {f"k{n // 3}.{n % 3}.txt": rng.bytes(int(rng.integers(0, 2000))) for n in range(200)}
    assert same_as_scanning(write_tar(tmp_path / "plain.tar", plain))
    folders = {f"a/b.c/d{n}.x.y": b"1" for n in range(5)}
    assert same_as_scanning(write_tar(tmp_path / "folders.tar", folders))
    long = {f"{'x' * 90}/{'y' * 60}{n}.txt": b"2" * n for n in range(5)}
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT):
        assert same_as_scanning(write_tar(tmp_path / "long.tar", {"short.txt": b"0", **long}, form))
    assert same_as_scanning(write_tar(tmp_path / "odd.tar", {"é\n.txt": b"1", "b\n.txt": b"2"}))


@pytest.mark.parametrize("cut", [0, 100, 512, 700, 1536, 2100])
def test_cut_tars_are_refused_in_bulk(tmp_path, cut):
    whole = write_tar(tmp_path / "t.tar", {"a.txt": b"1" * 600, "b.txt": b"2" * 600}).read_bytes()
    assert len(read_headers(whole, "t").keys) == 2
    with pytest.raises(ValueError, match="t: "):
        read_headers(whole[:cut], "t")


def test_damaged_headers_are_refused_in_bulk(tmp_path):
    whole = write_tar(tmp_path / "t.tar", {"a.txt": b"1", "b.txt": b"2"}).read_bytes()
    for place in (1024 + 3, 1024 + 125, 1024 + 150, 1024 + 156):
        broken = bytearray(whole)
        broken[place] ^= 0x15
        with pytest.raises(ValueError, match=r"t: .*(checksum|header|truncated)"):
            read_headers(bytes(broken), "t")


@pytest.mark.parametrize("name", ["../x.txt", "/etc/x.txt", "a/../../x.txt"])
def test_names_that_leave_their_folder_are_refused(made, tmp_path, name):
    shard = write_tar(tmp_path / "t.tar", {"fine.txt": b"1", name: b"2"})
    with pytest.raises(ValueError, match="leads out of its folder"):
        index_shard(shard, TokenizerFolder.load(made / "tok"))


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    "files",
    [
        ["a.txt", "a.b.txt"],
        ["a.b.png", "a.b.txt", "a.c.png", "a.c.txt"],
        ["a.b.png"],
        ["v.0.png", "v.0.txt", "v.1.png", "v.1.txt"],
        ["a.png", "a.txt", "a.0.png"],
        ["a.json", "a.0.png", "a.b.json"],
        ["a.json", "a.0.png", "a.1.json", "a.1.0.png"],
        ["fine.txt", "a.jsonl", "a.b.jsonl"],
        ["a.txt", "a.json", "a.b.txt"],
        ["a.png", "a.txt", "a.json", "a.1.png"],
    ],
)
def test_keys_with_dots_in_foreign_tars_are_refused(made, tmp_path, files):
    segments = json.dumps({"segments": [{"image": "0.png"}]}) if "a.0.png" in files else "{}"
    contents = {"png": png(), "txt": b"red", "json": segments.encode(), "jsonl": b'{"text": "red"}'}
    shard = write_tar(tmp_path / "d.tar", {name: contents[name.rpartition(".")[2]] for name in files})
    with pytest.raises(ValueError, match=r"d\.tar:[av]: has a file that ends in \.[bc01].*Keys must have no dots"):
        index_shard(shard, TokenizerFolder.load(made / "tok"))


def test_endings_of_any_case_and_names_that_segments_give(made, tmp_path):
    folder = TokenizerFolder.load(made / "tok")
    upper = index_shard(write_tar(tmp_path / "u.tar", {"x.PNG": png(), "x.txt": b"red", "y.Txt": b"", "y.Png": png()}),
                        folder)  # fmt: skip
    assert upper.kind == "caption" and upper.num_documents == 2 and upper.columns["width"][1] == 8
    assert commands.verify(tmp_path / "u.tar", made / "tok")["broken"] == 1  # y has no text
    dotted = {"v1.2/img.png": png(), "v1.2/img.txt": b"red"}
    assert index_shard(write_tar(tmp_path / "v.tar", dotted), folder).keys[0] == "v1.2/img"
    segments = [{"image": "left.PNG"}, {"text": "beside"}, {"image": "1.png"}]
    files = {f"k.{name}.png": png() for name in ("left", "1", "2")}
    files |= {"k.json": json.dumps({"segments": segments}).encode(), "k.cls": b"1"}
    found = index_shard(write_tar(tmp_path / "s.tar", files), folder)
    assert found.kind == "interleaved" and found.num_images_N.tolist() == [2]
    assert commands.verify(tmp_path / "s.tar", made / "tok")["broken"] == 0


@pytest.mark.parametrize("files", [{"x.gif": b"1", "x.txt": b"2"}, {"x.tiff": b"1", "x.txt": b"2", "x.json": b"{}"}])
def test_pictures_that_shards_do_not_hold_are_no_plain_texts(made, tmp_path, files):
    with pytest.raises(ValueError, match=r"t\.tar:x: \.(gif|tiff) files aren't read from shards; convert"):
        index_shard(write_tar(tmp_path / "t.tar", files), TokenizerFolder.load(made / "tok"))


def test_two_files_of_one_ending_are_refused(made, tmp_path):
    for other in ("x.txt", "x.TXT"):
        with tarfile.open(tmp_path / "t.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for name in ("x.txt", other):
                tar.addfile(tarfile.TarInfo(name), io.BytesIO())
        with pytest.raises(ValueError, match=r"t\.tar:x: has two files that end in \.txt"):
            index_shard(tmp_path / "t.tar", TokenizerFolder.load(made / "tok"))


def test_counts_are_those_of_the_built_documents(made):
    folder = TokenizerFolder.load(made / "tok")
    assert folder.audio is not None
    num_checked = 0
    for shard in sorted((made / "s").glob("*.tar")):
        found = load_index(shard, folder.hash)
        for row in range(found.num_documents):
            place = found.place(row)
            with shard.open("rb") as stream:
                key, files = read_members(os.pread(stream.fileno(), place.num_bytes, place.start), str(shard))
            assert key == found.keys[row] == found.key(row) and place.line == -1
            sample = read_sample(files, key, key, codec=folder.audio.hash)
            for task, tokens_N in found.lengths.items():
                if tokens_N[row]:
                    assert build_document(sample, task, folder).num_tokens == tokens_N[row]
                    num_checked += 1
            for name, value in sample.metadata.items():
                assert found.columns[name][row] == value, name
    assert num_checked == 24 * 6 + 8 + 24  # sounds twice, with a copy each; eight questions


def test_a_document_is_one_read_of_24_bytes_and_nothing_stays_mapped(made):
    shard = sorted((made / "s").glob("audio-*.tar"))[0]
    assert RECORD.itemsize == 24
    found = load_index(shard, TokenizerFolder.load(made / "tok").hash)
    for row in range(found.num_documents):
        record = found.records_N[row]
        place = found.place(row)
        assert (place.start, place.num_bytes, place.line) == (record["start"], record["bytes"], record["line"])
        assert (place.num_frames, place.num_images) == (record["frames"], record["images"])
    assert str(index_path(shard)) not in Path("/proc/self/maps").read_text()
    with pytest.raises(ValueError, match="read-only"):
        found.records_N["bytes"][0] = 1
    assert list(found.columns["speaker"])[:2] == [found.columns["speaker"][0], found.columns["speaker"][1]]
    assert 0 < found.columns["mean_rarity"][0] < 10 < found.columns["rarity"][0]


def test_rarity_is_the_sum_of_surprise_and_mean_rarity_its_mean(made):
    shard = sorted((made / "s").glob("text-*.tar"))[0]
    folder = TokenizerFolder.load(made / "tok")
    found = load_index(shard, folder.hash)
    with tarfile.open(shard) as tar:
        texts = [tar.extractfile(member).read().decode() for member in tar if member.name.endswith(".txt")]
    ids = [folder.text.encode(text) for text in texts]
    counts = collections.Counter(itertools.chain.from_iterable(ids))
    total = sum(counts.values())
    for row, values in enumerate(ids):
        surprise = [-math.log(counts[value] / total) for value in values]
        assert found.columns["rarity"][row] == pytest.approx(sum(surprise))
        assert found.columns["mean_rarity"][row] == pytest.approx(sum(surprise) / len(surprise))


def test_any_reader_of_safetensors_reads_an_index(made):
    shard = sorted((made / "s").glob("caption-*.tar"))[0]
    found, theirs = load_index(shard, TokenizerFolder.load(made / "tok").hash), load_file(index_path(shard))
    assert theirs["tokens"].tolist() == found.tokens_N.tolist()
    assert theirs["picture.sizes"].tolist() == found.picture_sizes_P2.tolist() == [[16, 16]] * found.num_documents


def test_sizes_of_all_pictures_and_sounds_are_in_the_index(made):
    folder = TokenizerFolder.load(made / "tok")
    for kind in ("interleaved", "audio"):
        for shard in sorted((made / "s").glob(f"{kind}-*.tar")):
            found = load_index(shard, folder.hash)
            assert found.picture_sizes_P2.tolist() == [[16, 16]] * int(found.num_images_N.sum())
            assert found.sounds_Q3[:, 2].sum() == found.num_frames_N.sum() > 0
            assert set(found.sounds_Q3[:, 1].tolist()) == {8000}
            frames = [folder.require_audio().num_frames(samples) for samples in found.sounds_Q3[:, 0].tolist()]
            assert frames == found.sounds_Q3[:, 2].tolist()


def test_facts_that_the_rows_lack_are_read_from_the_files(made, tmp_path):
    folder = TokenizerFolder.load(made / "tok")
    files: dict[str, dict[str, bytes]] = {"caption": {}, "audio": {}}
    for kind, kept in files.items():
        for shard in sorted((made / "s").glob(f"{kind}-*.tar")):
            with tarfile.open(shard) as tar:
                for name in tar.getnames():
                    if name.split(".")[-1] in ("png", "flac", "txt"):
                        kept[name] = tar.extractfile(name).read()  # pyright: ignore[reportOptionalMemberAccess]
    bare = index_shard(write_tar(tmp_path / "c.tar", files["caption"]), folder)
    assert set(bare.columns["width"]) == set(bare.columns["height"]) == {16}
    bare = index_shard(write_tar(tmp_path / "a.tar", files["audio"]), folder)
    told = {key: row for row, key in enumerate(bare.keys)}
    for shard in sorted((made / "s").glob("audio-*.tar")):
        whole = load_index(shard, folder.hash)
        for row, key in enumerate(whole.keys):
            assert bare.columns["duration"][told[key]] == pytest.approx(whole.columns["duration"][row], abs=1e-5)
            assert bare.num_frames_N[told[key]] == whole.num_frames_N[row]


def test_only_what_changed_is_indexed_again(made, tmp_path, monkeypatch):
    manifest = write_manifest(tmp_path, [{"id": f"r{n}", "text": f"row {n}"} for n in range(6)])
    commands.build(manifest, tmp_path / "s", samples_per_shard=2)
    shards = sorted((tmp_path / "s").glob("*.tar"))
    folder = TokenizerFolder.load(made / "tok")
    write_indices(shards, folder)
    indexed: list[Path] = []
    monkeypatch.setattr(
        make, "index_shard", lambda shard, folder, text_key: indexed.append(shard) or load_index(shard, "x")
    )
    write_indices(shards, folder)
    assert not indexed
    os.utime(shards[0], ns=(1, 1))  # a copy: same bytes, another time
    write_indices(shards, folder)
    assert not indexed
    monkeypatch.setattr(index, "file_digest", lambda path: pytest.fail("its new time is known"))
    write_indices(shards, folder)
    monkeypatch.undo()
    data, before = shards[1].read_bytes(), load_index(shards[1], folder.hash).sha256
    shards[1].write_bytes(data.replace(b"row 2", b"ROW 2"))
    write_indices(shards, folder)
    assert load_index(shards[1], folder.hash).sha256 != before


def test_workers_index_the_same_and_say_what_is_wrong(made, tmp_path):
    folder = TokenizerFolder.load(made / "tok")
    for name in ("one", "two"):
        commands.build(
            write_manifest(tmp_path, [{"id": f"r{n}", "text": f"row {n}"} for n in range(6)]),
            tmp_path / name, samples_per_shard=2,
        )  # fmt: skip
    alone, shared = (sorted((tmp_path / name).glob("*.tar")) for name in ("one", "two"))
    ticks: list[tuple[int, int]] = []
    write_indices(alone, folder)
    write_indices(shared, folder, lambda *counts: ticks.append(counts), workers=2)
    assert ticks == [(1, 3), (2, 3), (3, 3)]
    for one, other in zip(alone, shared, strict=True):
        ours, theirs = (open_arrays(index_path(shard)) for shard in (one, other))
        assert {**ours.info, "shard": None} == {**theirs.info, "shard": None} and list(ours.places) == list(
            theirs.places
        )
        assert all(np.array_equal(ours.read(name), theirs.read(name)) for name in ours.places)
    shared[1].write_bytes(shared[1].read_bytes()[:700])
    with pytest.raises(ValueError, match=rf"{shared[1].name}: 700 bytes are no tar"):
        write_indices(shared, folder, workers=2)


def test_a_shard_with_other_samples_is_refused_before_use(made, tmp_path):
    folder = TokenizerFolder.load(made / "tok")
    shard = write_tar(tmp_path / "t.tar", {"a.txt": b"one", "b.txt": b"two"})
    index_shard(shard, folder)
    write_tar(shard, {"a.txt": b"one", "c.txt": b"two"})
    os.utime(shard, ns=(1, 1))
    with pytest.raises(ValueError, match="changed since it was indexed: other bytes lie at 1024"):
        load_index(shard, folder.hash)


def test_a_shard_whose_bytes_changed_under_the_same_names_is_refused(made, tmp_path, monkeypatch, caplog):
    folder = TokenizerFolder.load(made / "tok")
    shard = write_tar(tmp_path / "t.tar", {f"{n:02d}.txt": b"text %02d" % n for n in range(40)})
    index_shard(shard, folder)
    data = shard.read_bytes()
    os.utime(shard, ns=(1, 1))
    digest, digested = index.file_digest, []
    monkeypatch.setattr(index, "file_digest", lambda path: digested.append(path) or digest(path))
    for _ in range(3):
        assert load_index(shard, folder.hash).num_documents == 40
    assert digested == [shard]  # once: then the new time is noted
    for number, told in ((0, r"other bytes lie at 0"), (1, r"its bytes changed since it was indexed")):
        shard.write_bytes(data.replace(b"text %02d" % number, b"TEXT %02d" % number))
        os.utime(shard, ns=(2, 2))
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"t\.tar: .*{told}.*mmllm data index"):
                load_index(shard, folder.hash)
    shard.write_bytes(data)
    os.utime(shard, ns=(3, 3))

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(stamps, "put_file", refuse)
    assert load_index(shard, folder.hash).num_documents == 40 and "can't be noted" in caplog.text


def test_the_digest_of_the_build_is_taken_where_the_shard_is_the_same(made, tmp_path):
    commands.build(write_manifest(tmp_path, [{"id": "a", "text": "one"}]), tmp_path / "s")
    shard = tmp_path / "s" / "text-000000.tar"
    built = json.loads((tmp_path / "s" / "shards.json").read_text())["shards"][shard.name]["sha256"]
    assert make._built_digest(shard) == built == index.file_digest(shard)
    os.utime(shard, ns=(2**62, 2**62))
    assert make._built_digest(shard) is None


def test_broken_and_older_indices_are_named(made, tmp_path):
    folder = TokenizerFolder.load(made / "tok")
    shard = write_tar(tmp_path / "t.tar", {"a.txt": b"one", "b.txt": b"two"})
    index_shard(shard, folder)
    path = index_path(shard)
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"the index is broken .*mmllm data index"):
            load_index(shard, folder.hash)
    path.write_bytes(b"mmllmidx" + b"\2\0\0\0\x18\0\0\0" + bytes(60))
    sidecar = tmp_path / "t.tar.index.npz"
    sidecar.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"of an earlier format than 4; run 'mmllm data index'"):
        load_index(shard, folder.hash)
    assert write_indices([shard], folder)[0].num_documents == 2
    assert path.read_bytes() == whole and not sidecar.exists()
    arrays = open_arrays(path)
    for version in (3, 5):
        write_arrays(
            path, {name: arrays.read(name) for name in arrays.places}, {**arrays.info, "format_version": version}
        )
        with pytest.raises(ValueError, match=f"is of format {version}, not 4; run 'mmllm data index' again"):
            load_index(shard, folder.hash)
    assert write_indices([shard], folder)[0].num_documents == 2
    assert path.read_bytes() == whole


def test_an_index_that_is_replaced_in_use_is_no_index_of_the_old_one(made, tmp_path):
    folder = TokenizerFolder.load(made / "tok")
    shard = write_tar(tmp_path / "t.tar", {"a.txt": b"one", "b.txt": b"two"})
    found = index_shard(shard, folder)
    assert found.place(1).start == 1024
    write_tar(shard, {"c.txt": b"three", "d.txt": b"four", "e.txt": b"5"})
    assert index_shard(shard, folder).num_documents == 3
    assert found.key(1) == "b"  # what is open stays what it was
    arrays._of_thread.kept.clear()
    files._of_thread.files.close()
    for read in (lambda: found.key(1), lambda: found.place(1)):
        with pytest.raises(ValueError, match="was replaced while it was in use"):
            read()


def test_columns_keep_types_and_gaps(tmp_path):
    columns = {
        "mixed": [None, True, 3, 2.5, "x", "", "x", -7, False],
        "large": [2**53 + 1, -(2**63), 2**63 - 1], "some": [None, 2**53 + 1, 5], "small": [1, 255, 0],
        "flags": [True, False], "texts": ["b", "a", "b"], "numbers": [0.5, 1e300, -0.0], "few": [-1, 70_000],
    }  # fmt: skip
    arrays, more = Texts.arrays(["a", "", "ü"], "t"), {}
    for name, values in columns.items():
        made, more[name] = Column.arrays(values, name)
        arrays |= made
    write_arrays(tmp_path / "c", arrays, {})
    read = open_arrays(tmp_path / "c").read
    for name, values in columns.items():
        column = Column(read, name, len(values), **more[name])
        for found in (list(column), [column[row] for row in range(len(values))], column[:]):
            assert found == values and [type(item) for item in found] == [type(item) for item in values]
        assert column[-1] == values[-1]
        with pytest.raises(IndexError):
            column[len(values)]
    mixed = Column(read, "mixed", 9, **more["mixed"])
    assert mixed.numbers().tolist() == [np.inf, 1, 3, 2.5, np.inf, np.inf, np.inf, -7, 0]
    assert list(Texts(read, "t", 3)) == ["a", "", "ü"]
    assert Column.arrays([2**53 + 1, 0.5], "x")[0]["x.values"].tolist() == [float(2**53 + 1), 0.5]


def test_what_a_record_cannot_hold_is_said(made):
    folder = TokenizerFolder.load(made / "tok")
    found = scan_shard(sorted((made / "s").glob("text-*.tar"))[0].read_bytes(), "t.tar", folder)
    found.pictures[1] = [(1, 1)] * 70_000
    counts = count_tokens(found, folder)
    with pytest.raises(ValueError, match=rf"{found.keys[1]} has 70000 images"):
        make_records(found, counts)


def test_a_shard_that_is_replaced_while_it_is_indexed_is_refused(made, tmp_path, monkeypatch):
    folder = TokenizerFolder.load(made / "tok")
    shard = write_tar(tmp_path / "t.tar", {"a.txt": b"one", "b.txt": b"two"})

    def replaced(*args: Any) -> Any:
        shard.write_bytes(shard.read_bytes().replace(b"two", b"TWO"))
        os.utime(shard, ns=(5, 5))
        return count_tokens(*args)

    monkeypatch.setattr(make, "count_tokens", replaced)
    with pytest.raises(ValueError, match=r"t\.tar: was replaced while it was indexed"):
        index_shard(shard, folder)
    assert not index_path(shard).exists()


def test_flipped_bits_in_an_index_are_noticed(made, tmp_path):
    folder = TokenizerFolder.load(made / "tok")
    shard = write_tar(tmp_path / "t.tar", {"a.txt": b"one", "a.json": b'{"score": 1.5}'})
    found = index_shard(shard, folder)
    path, whole = index_path(shard), index_path(shard).read_bytes()
    for name in ("tokens", "column0.values", "keys.bytes"):
        data = bytearray(whole)
        data[found.arrays.places[name][2]] ^= 1
        path.write_bytes(bytes(data))
        again = load_index(shard, folder.hash)
        with pytest.raises(ValueError, match=rf"{name} is damaged; run 'mmllm data index' again"):
            _ = again.tokens_N, list(again.columns["score"]), list(again.keys)


def test_integers_of_any_size_are_metadata(made, tmp_path):
    folder = TokenizerFolder.load(made / "tok")
    values = [3, 2**53 + 1, 10**400, -(10**301), 2**64]
    files = {f"{n}.{end}": data for n, value in enumerate(values)
             for end, data in (("txt", b"one"), ("json", b'{"n": %d}' % value))}  # fmt: skip
    found = index_shard(write_tar(tmp_path / "t.tar", files), folder)
    assert list(found.columns["n"]) == [3.0, float(2**53 + 1), str(10**400), str(-(10**301)), float(2**64)]


def tar_of(path: Path, **changed: bytes | None) -> Path:
    """Captions c0 … c9, of which c3 has other files."""
    files: dict[str, bytes] = {}
    for number in range(10):
        own = {"png": png(), "txt": b"red", "json": b'{"score": 1}'} | (changed if number == 3 else {})
        files |= {f"c{number}.{ending}": data for ending, data in own.items() if data is not None}
    return write_tar(path, files)


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"txt": b"caf\xe9"}, "its txt isn't UTF-8"),
        ({"json": b"{"}, "its json can't be read"),
        ({"json": b"[1]"}, "its json is list; it must be an object"),
        ({"png": b""}, "its picture can't be read"),
        ({"png": b"junk"}, "its picture can't be read"),
        ({"txt": None}, "its text is missing or empty"),
    ],
)
def test_one_bad_sample_is_counted_and_named(made, tmp_path, changed, told):
    shard = tar_of(tmp_path / "t.tar", **changed)
    found = commands.index(shard, made / "tok", max_bad_fraction=0.1)
    assert found["bad"] == len(found["errors"]) == 1
    assert told in found["errors"][0] and f"{shard}:c3: " in found["errors"][0]
    folder = TokenizerFolder.load(made / "tok")
    index_of = load_index(shard, folder.hash)
    assert [key for key, tokens in zip(index_of.keys, index_of.tokens_N, strict=True) if tokens] == [
        f"c{n}" for n in range(10) if n != 3
    ]
    for row, key in enumerate(index_of.keys):
        place = index_of.place(row)
        with shard.open("rb") as stream:
            assert read_members(os.pread(stream.fileno(), place.num_bytes, place.start), "t")[0] == key
    with pytest.raises(ValueError, match=r"1 of 10 rows become no document, at most 0 may be: .*c3"):
        commands.index(shard, made / "tok", max_bad_fraction=0.0)


def test_files_that_are_nothing_of_a_sample_are_counted_and_media_refused(made, tmp_path):
    shard = write_tar(tmp_path / "t.tar", {"a.png": png(), "a.txt": b"red", "a.cls": b"1", "a.npy": b"2"})
    assert commands.index(shard, made / "tok")["skipped"] == {".cls files": 1, ".npy files": 1}
    for ending in ("jpe", "jfif", "ppm", "jxl", "aiff", "svg"):
        with pytest.raises(ValueError, match=rf"x: \.{ending} files aren't read from shards"):
            commands.index(write_tar(tmp_path / "u.tar", {f"x.{ending}": b"1", "x.txt": b"2"}), made / "tok")
    for names, told in ((("x.png", "x.jpg", "x.txt"), "2 pictures"), (("x.jsonl", "x.txt"), "beside its jsonl")):
        with pytest.raises(ValueError, match=told):
            commands.index(write_tar(tmp_path / "v.tar", dict.fromkeys(names, b"1")), made / "tok")


def test_folders_and_names_with_signs_of_patterns(made, tmp_path):
    folder = tmp_path / "we ird[1] {a,b}"
    folder.mkdir()
    for name in ("s-00000.tar", "s[1].tar"):
        write_tar(folder / name, {"a.txt": b"one"})
    assert commands.index(str(folder), made / "tok")["shards"] == 2
    assert commands.index(str(folder / "s[1].tar"), made / "tok")["shards"] == 1
    for shards, count in ((str(folder), 2), (f"{folder}/s[1].tar", 1)):
        assert len(find_shards(shards)) == count
    recipe = {"tokenizer": str(made / "tok"), "sequence_length": 64, "sources": [
        {"name": "t", "kind": "text", "shards": str(folder)}]}  # fmt: skip
    assert open_plan(recipe_from_dict(recipe), 1).sources[0].num_items == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: a folder without \.tar files"):
        find_shards(str(tmp_path / "empty"))
