from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmllm.data import commands
from mmllm.data.index import index
from mmllm.data.index.columns import Column, Texts, map_npz, save_npz
from mmllm.data.index.index import RECORD, index_path, index_shard, load_index, sidecar_path, write_indices
from mmllm.data.index.scan import read_facts
from mmllm.data.samples.documents import build_document
from mmllm.data.samples.schema import read_sample
from mmllm.data.shards.headers import read_headers
from mmllm.data.shards.tar import headers_of, read_members, scan_tar
from mmllm_tokenizers.folder import TokenizerFolder
from tests.data_fixtures import make_folder, mixed_manifest, write_manifest


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("index")
    make_folder(root / "tok")
    commands.build(mixed_manifest(root / "m"), root / "s", root / "tok", perturb=1, samples_per_shard=10)
    commands.index(root / "s", root / "tok")
    return root


def write_tar(path: Path, files: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


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
            offset, size, line = found.place(row)
            with shard.open("rb") as stream:
                key, files = read_members(os.pread(stream.fileno(), size, offset), str(shard))
            assert key == found.keys[row] and line == -1
            sample = read_sample(files, key, key, codec=folder.audio.hash)
            for task, tokens_N in found.lengths.items():
                if tokens_N[row]:
                    assert build_document(sample, task, folder).num_tokens == tokens_N[row]
                    num_checked += 1
            for name, value in sample.metadata.items():
                assert found.columns[name][row] == value, name
    assert num_checked == 24 * 6 + 8 + 24  # sounds twice, with a copy each; eight questions


def test_a_record_is_24_bytes_and_mapped(made):
    shard = sorted((made / "s").glob("audio-*.tar"))[0]
    assert RECORD.itemsize <= 24
    found = load_index(shard, TokenizerFolder.load(made / "tok").hash)
    assert index_path(shard).stat().st_size == 32 + 24 * found.num_documents
    assert not found.records_N.flags.writeable and found.records_N.base is not None
    with pytest.raises(ValueError, match="read-only"):
        found.records_N["tokens"][0] = 1
    assert list(found.columns["speaker"])[:2] == [found.columns["speaker"][0], found.columns["speaker"][1]]
    assert 0 < found.columns["rarity"][0] < 10


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
    monkeypatch.setattr(index, "index_shard", lambda shard, folder: indexed.append(shard) or load_index(shard, "x"))
    write_indices(shards, folder)
    assert not indexed
    os.utime(shards[0], ns=(1, 1))  # a copy: same bytes, another time
    write_indices(shards, folder)
    assert not indexed
    monkeypatch.setattr(index, "_digest", lambda path: pytest.fail("its new time is known"))
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
    assert [index_path(shard).read_bytes() for shard in alone] == [index_path(shard).read_bytes() for shard in shared]
    shared[1].write_bytes(shared[1].read_bytes()[:700])
    with pytest.raises(ValueError, match=rf"{shared[1].name}: 700 bytes are no tar"):
        write_indices(shared, folder, workers=2)


def test_a_shard_with_other_samples_is_refused_before_use(made, tmp_path):
    folder = TokenizerFolder.load(made / "tok")
    shard = write_tar(tmp_path / "t.tar", {"a.txt": b"one", "b.txt": b"two"})
    index_shard(shard, folder)
    write_tar(shard, {"a.txt": b"one", "c.txt": b"two"})
    os.utime(shard, ns=(1, 1))
    with pytest.raises(ValueError, match="'c' lies where 'b' was"):
        load_index(shard, folder.hash)


def test_a_shard_whose_bytes_changed_under_the_same_names_is_refused(made, tmp_path, monkeypatch, caplog):
    folder = TokenizerFolder.load(made / "tok")
    shard = write_tar(tmp_path / "t.tar", {"a.txt": b"one", "b.txt": b"two"})
    index_shard(shard, folder)
    data = shard.read_bytes()
    os.utime(shard, ns=(1, 1))
    digest, digested = index._digest, []
    monkeypatch.setattr(index, "_digest", lambda path: digested.append(path) or digest(path))
    for _ in range(3):
        assert load_index(shard, folder.hash).num_documents == 2
    assert digested == [shard]  # once: then the new time is noted
    shard.write_bytes(data.replace(b"two", b"TWO"))
    os.utime(shard, ns=(2, 2))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"t\.tar: its bytes changed since it was indexed.*mmllm data index"):
            load_index(shard, folder.hash)
    shard.write_bytes(data)
    os.utime(shard, ns=(3, 3))

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(index, "_put", refuse)
    assert load_index(shard, folder.hash).num_documents == 2 and "can't be noted (read-only)" in caplog.text


def test_the_digest_of_the_build_is_taken_where_the_shard_is_the_same(made, tmp_path):
    commands.build(write_manifest(tmp_path, [{"id": "a", "text": "one"}]), tmp_path / "s")
    shard = tmp_path / "s" / "text-000000.tar"
    built = json.loads((tmp_path / "s" / "shards.json").read_text())["shards"][shard.name]["sha256"]
    assert index._built_digest(shard) == built == index._digest(shard)
    os.utime(shard, ns=(2**62, 2**62))
    assert index._built_digest(shard) is None


def test_records_and_sidecar_of_two_indices_are_refused(made, tmp_path):
    folder = TokenizerFolder.load(made / "tok")
    shard = write_tar(tmp_path / "t.tar", {"a.txt": b"one", "b.txt": b"two"})
    index_shard(shard, folder)
    old = sidecar_path(shard).read_bytes()
    write_tar(shard, {"a.txt": b"one more", "b.txt": b"two"})
    index_shard(shard, folder)
    sidecar_path(shard).write_bytes(old)
    with pytest.raises(ValueError, match="two indices"):
        load_index(shard, folder.hash)
    assert write_indices([shard], folder)[0].num_documents == 2
    for path in (index_path(shard), sidecar_path(shard)):
        whole = path.read_bytes()
        for size in (0, 7, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(ValueError, match="broken"):
                load_index(shard, folder.hash)
        path.write_bytes(whole)


def test_columns_keep_types_and_gaps(tmp_path):
    values = [None, True, 3, 2.5, "x", "", "x", -7, False]
    save_npz(tmp_path / "c.npz", {**Column.arrays(values, "c"), **Texts.arrays(["a", "", "ü"], "t")}, {"a": 1})
    arrays = map_npz(tmp_path / "c.npz")
    column = Column(arrays["c.values"], arrays["c.types"], Texts(arrays["c.words.bytes"], arrays["c.words.ends"]))
    for found in (list(column), [column[row] for row in range(len(values))]):
        assert found == values and [type(item) for item in found] == [type(item) for item in values]
    assert column.numbers().tolist() == [np.inf, 1, 3, 2.5, np.inf, np.inf, np.inf, -7, 0]
    assert list(Texts(arrays["t.bytes"], arrays["t.ends"])) == ["a", "", "ü"]


def test_what_a_record_cannot_hold_is_said(made):
    folder = TokenizerFolder.load(made / "tok")
    facts = read_facts(sorted((made / "s").glob("text-*.tar"))[0].read_bytes(), "t.tar", folder)
    facts.images[1] = 70_000
    counts = index.count_tokens(facts, folder)
    with pytest.raises(ValueError, match=rf"{facts.keys[1]} has 70000 images"):
        index.make_records(facts, counts)
