"""Tars as people make them: read as the standard library reads them, or refused by name; never guessed."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys

from mmllm.data import commands
from mmllm.data.index.make import index_shard
from mmllm.data.shards.headers import read_headers
from mmllm.data.shards.tar import BLOCK, read_members, scan_tar
from mmllm_tokenizers.folder import TokenizerFolder
from tests.data_fixtures import make_folder

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
LONG = "x" * 110
Entry = tuple[str, bytes, dict]
"""A file's name and bytes, and what else its `TarInfo` holds."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> TokenizerFolder:
    return make_folder(tmp_path_factory.mktemp("tok"))


def tar_of(entries: list[Entry], form: int = tarfile.PAX_FORMAT, **options: object) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form, **options) as tar:  # pyright: ignore
        for name, data, more in entries:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for key, value in more.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def plain(**files: bytes) -> list[Entry]:
    return [(name.replace("_", "."), data, {}) for name, data in files.items()]


def samples_of(data: bytes) -> dict[str, dict[str, bytes]]:
    """Each sample's files by ending, from its span of bytes; the table's places must hold the same."""
    table = read_headers(data, "t.tar")
    found: dict[str, dict[str, bytes]] = {}
    for sample, (key, offset, size) in enumerate(
        zip(table.keys, table.offsets_S.tolist(), table.spans_S.tolist(), strict=True)
    ):
        there, files = read_members(data[offset : offset + size], "t.tar")
        assert there == key and key not in found
        places = {table.endings[m]: (int(table.starts_M[m]), int(table.sizes_M[m])) for m in table.files(sample)}
        assert {ending: data[start : start + length] for ending, (start, length) in places.items()} == files
        found[key] = files
    return found


def spans_of(data: bytes, path: Path) -> list[tuple[str, int, int]]:
    path.write_bytes(data)
    return [(span.key, span.offset, span.size) for span in scan_tar(path)]


def by_tarfile(data: bytes) -> dict[str, dict[str, bytes]]:
    """As webdataset groups what the standard library reads, but for macOS's files and hidden ones."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        files = [
            {"fname": member.name, "data": tar.extractfile(member).read(), "__url__": "t"}  # pyright: ignore
            for member in tar
            if member.isreg() and "__MACOSX" not in member.name.split("/") and "/." not in f"/{member.name}"
        ]
    return {
        sample["__key__"]: {key: value for key, value in sample.items() if not key.startswith("__")}
        for sample in group_by_keys(files)
    }


letters = st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Zl", "Zp"), exclude_characters="./")
parts = st.one_of(
    st.text(letters, min_size=1, max_size=8), st.text("ab_é红", min_size=1, max_size=60), st.just(LONG), st.just("v1.2")
)
endings = st.lists(st.sampled_from(["jpg", "PNG", "txt", "json", "0.png", "seg.红", "cls"]), min_size=1, unique=True)
noise = st.sampled_from(
    [
        ("._a.jpg", b"junk", {}),
        ("__MACOSX/a.jpg", b"junk", {}),
        ("x/__MACOSX/._" + LONG + ".jpg", b"junk", {}),
        (".DS_Store", b"junk" * 300, {}),
        ("folder", b"", {"type": tarfile.DIRTYPE}),
        ("LICENSE", b"junk", {}),
    ]
)


@st.composite
def shards(draw: st.DrawFn) -> tuple[list[Entry], int]:
    form = draw(st.sampled_from(FORMATS))
    entries: list[Entry] = []
    stems = draw(st.lists(st.text(letters, min_size=1, max_size=60), unique=True, min_size=1, max_size=6))
    for stem in stems:
        where = "".join(f"{part}/" for part in draw(st.lists(parts, max_size=3)))
        for ending in draw(endings):
            if draw(st.integers(0, 3)) == 0:
                entries.append(draw(noise))
            more: dict = {"mtime": 1.5} if draw(st.booleans()) else {}
            if form == tarfile.PAX_FORMAT and draw(st.integers(0, 4)) == 0:
                more["pax_headers"] = {"comment": draw(st.text(letters, max_size=600)), "SCHILY.xattr.a": "b\n=c"}
            entries.append((f"{where}{stem}.{ending}", draw(st.binary(max_size=1200)), more))
    return entries, form


@settings(max_examples=150, deadline=None)
@given(shards())
def test_any_tar_reads_as_with_the_standard_library_and_webdataset(tmp_path_factory, made):
    entries, form = made
    try:
        data = tar_of(entries, form, pax_headers={"comment": "all"} if form == tarfile.PAX_FORMAT else None)
    except ValueError:  # a name too long for USTAR
        return
    assert samples_of(data) == by_tarfile(data)
    table = read_headers(data, "t.tar")
    spans = spans_of(data, tmp_path_factory.getbasetemp() / "any.tar")
    assert spans == list(zip(table.keys, table.offsets_S.tolist(), table.spans_S.tolist(), strict=True))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert len(tar.getmembers()) == len(table.endings) + sum(table.num_skipped.values())


@settings(max_examples=150, deadline=None)
@given(shards(), st.randoms(use_true_random=False))
def test_what_is_accepted_of_a_damaged_tar_can_be_read(made, random):
    entries, form = made
    try:
        data = bytearray(tar_of(entries, form))
    except ValueError:
        return
    for _ in range(random.randint(1, 3)):
        start = random.randrange(len(data) // BLOCK) * BLOCK
        if random.random() < 0.3:
            del data[start + random.randrange(BLOCK) : start + random.randrange(2 * BLOCK)]
            continue
        place = start + random.choice([*range(12), 124, 130, 134, 135, 156, 157, 257, 263, 345])
        if place < len(data):
            data[place] = random.choice(b"\0 /.0123457LKxgS\x80\xffaz")
            data[start + 148 : start + 156] = b"        "
            data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + BLOCK])
    try:
        samples_of(bytes(data))
    except ValueError as error:
        assert str(error).startswith("t.tar:"), error


@pytest.mark.parametrize("form", FORMATS)
def test_long_and_foreign_names_stay_apart(form, tmp_path):
    names = [
        "红色.png",
        "蓝色.txt",
        f"{LONG}a.png",
        f"{LONG}a.txt",
        f"{LONG}b.png",
        f"{LONG}b.txt",
        "d/" * 60 + "c.txt",
    ]
    if form == tarfile.USTAR_FORMAT:
        names = [name for name in names if LONG not in name]
    data = tar_of([(name, name.encode(), {}) for name in names], form)
    found = samples_of(data)
    assert found == by_tarfile(data)
    assert found["红色"] == {"png": "红色.png".encode()} and found["蓝色"] == {"txt": "蓝色.txt".encode()}


def test_names_that_are_not_utf8_stay_apart():
    data = tar_of([(name, b"1", {}) for name in ("\xe9.txt", "\xe8.txt")], tarfile.GNU_FORMAT, encoding="latin-1")
    assert list(samples_of(data)) == ["\\xe9", "\\xe8"]


def header(name: bytes, kind: bytes, size: int, data: bytes = b"", raw_size: bytes | None = None, **at: bytes) -> bytes:
    """A header made by hand, and its data. `at`: bytes by place, `p157=…`."""
    block = bytearray(BLOCK)
    block[: len(name)] = name
    block[124:136] = raw_size if raw_size is not None else b"%011o\0" % size
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    for place, value in at.items():
        block[int(place[1:]) : int(place[1:]) + len(value)] = value
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + data + bytes(-len(data) % BLOCK)


def records(**values: str) -> bytes:
    out = b""
    for key, value in values.items():
        record = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(record) + 1
        while len(b"%d" % length) + len(record) != length:
            length += 1
        out += b"%d" % length + record
    return out


END = bytes(2 * BLOCK)
TXT = header(b"a.txt", b"0", 3, b"red")


def pax(kind: bytes = b"x", **values: str) -> bytes:
    content = records(**values)
    return header(b"PaxHeaders/a", kind, len(content), content)


@pytest.mark.parametrize(
    "sizes", [b"\x80" + (700).to_bytes(11, "big"), b"000000001274", b"       1274\0", b"1274\0junk\0\0\0"]
)
def test_sizes_however_they_are_written(sizes):
    data = header(b"a.txt", b"0", 700, b"r" * 700, sizes) + header(b"b.txt", b"0", 3, b"red") + END
    assert samples_of(data) == by_tarfile(data) == {"a": {"txt": b"r" * 700}, "b": {"txt": b"red"}}


def test_a_size_that_only_pax_tells():
    """As of files above 8 GB, whose size the header has no room for."""
    data = pax(size="700") + header(b"a.txt", b"0", 0, b"r" * 700) + header(b"b.txt", b"0", 3, b"red") + END
    assert samples_of(data) == by_tarfile(data) == {"a": {"txt": b"r" * 700}, "b": {"txt": b"red"}}


def test_prefixes_are_names_and_times_of_gnu_are_none():
    data = header(b"a.txt", b"0", 3, b"red", p345=b"some/folder") + header(b"b.txt", b"0", 3, b"red") + END
    assert list(samples_of(data)) == ["some/folder/a", "b"]
    data = header(b"a.txt", b"0", 3, b"red", p257=b"ustar  \0", p345=b"14716523127\0") + END
    assert list(samples_of(data)) == ["a"]


def test_signed_checksums_and_other_forms_of_them():
    name = "é.txt".encode()
    for form, signed in ((b"%06o\0 ", True), (b"%07o\0", False), (b"%6o\0 ", False)):
        block = bytearray(header(name, b"0", 3, b"red"))
        block[148:156] = b"        "
        total = sum(block[:BLOCK]) - (256 * sum(byte > 127 for byte in block[:BLOCK]) if signed else 0)
        block[148:156] = form % total
        assert list(samples_of(bytes(block) + END)) == ["é"]


def test_what_holds_no_sample_is_passed_over_and_counted(tmp_path):
    entries: list[Entry] = [
        ("pictures", b"", {"type": tarfile.DIRTYPE}),
        ("pictures/._a.jpg", b"junk" * 200, {}),
        ("pictures/a.jpg", b"picture", {"mtime": 0.5}),
        ("pictures/._a.txt", b"junk", {"mtime": 0.5}),
        ("pictures/a.txt", b"red", {"mtime": 0.5}),
        ("__MACOSX/pictures/._a.txt", b"junk", {}),
        ("pictures/.DS_Store", b"junk", {}),
        ("pictures/._b.txt", b"junk", {}),
        ("pictures/b.txt", b"blue", {}),
        ("README", b"how", {}),
    ]
    for form in FORMATS:
        data = tar_of(entries, form)
        assert samples_of(data) == {"pictures/a": {"jpg": b"picture", "txt": b"red"}, "pictures/b": {"txt": b"blue"}}
        assert read_headers(data, "t.tar").num_skipped == {
            "folders": 1, "._* files of macOS": 3, "files in __MACOSX": 1, "hidden files": 1,
            "files without an ending": 1,
        }  # fmt: skip
        assert [key for key, _, _ in spans_of(data, tmp_path / "t.tar")] == ["pictures/a", "pictures/b"]
    assert read_headers(tar_of(plain(a_txt=b"1")), "t.tar").num_skipped == {}


@pytest.mark.parametrize(
    "name", ["LICENSE", "__MACOSX/b.txt", "._a.txt", ".txt", "d/._b.txt", "d/.DS_Store", "d/README"]
)
def test_one_such_file_among_plain_ones_is_seen(name):
    for names in ([name, "a.txt", "d/b.txt"], ["a.txt", name, "d/b.txt"], ["a.txt", name]):
        data = tar_of([(each, b"red", {}) for each in names], tarfile.USTAR_FORMAT)
        assert samples_of(data) == by_tarfile(data)
        assert sum(read_headers(data, "t.tar").num_skipped.values()) == 1


def test_folders_of_old_tars_have_a_slash_and_no_data():
    data = header(b"a/", b"\0", 0) + header(b"b/", b"5", 700) + header(b"a/a.txt", b"\0", 3, b"red") + END
    assert samples_of(data) == by_tarfile(data) == {"a/a": {"txt": b"red"}}
    assert read_headers(data, "t.tar").num_skipped == {"folders": 2}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TXT + header(b"a.jpg", b"1", 0, p157=b"b.jpg") + END, r"'a\.jpg' at byte 1024 is a hard link to 'b\.jpg'"),
        (TXT + header(b"a.jpg", b"2", 9, p157=b"b.jpg") + END, r"'a\.jpg' at byte 1024 is a symbolic link to 'b\.jpg'"),
        (
            header(b"long", b"K", 4, b"b.jp") + header(b"a.jpg", b"1", 0) + END,
            r"'a\.jpg' at byte 1024 is a hard link to 'b\.jp'",
        ),
        (TXT + header(b"a.jpg", b"S", 512, bytes(512), p483=b"00000001000\0") + END, r"'a\.jpg' .* stored sparse"),
        (TXT + header(b"._a.jpg", b"S", 512, bytes(512)) + END, r"'\._a\.jpg' .* stored sparse"),
        (
            pax(GNU__sparse__major="1", GNU__sparse__name="a.jpg", GNU__sparse__realsize="9") + TXT + END,
            r"'a\.jpg' at byte 1024 is stored sparse",
        ),
        (TXT + header(b"a.jpg", b"3", 0) + END, r"'a\.jpg' at byte 1024 is no plain file \(its type is '3'\)"),
        (TXT + header(b"a.jpg", b"M", 3, b"red") + END, r"'a\.jpg' at byte 1024 is no plain file \(its type is 'M'\)"),
        (TXT + header(b"a.json.gz", b"0", 3, b"red") + END, r"'a\.json\.gz' at byte 1024 is compressed"),
        (TXT + header(b"a.TXT", b"0", 3, b"red") + END, r"two files that end in \.txt"),
        (TXT + header(b"b.txt", b"0", 0) + header(b"a.jpg", b"0", 0) + END, r"files of 'a' lie apart.*at byte 1536"),
        (pax(path="b.txt") + pax(path="c.txt") + TXT + END, r"at byte 1024 gives the file after it a second path"),
        (pax(b"g", path="b.txt") + TXT + END, r"gives all files after it one path"),
        (pax(b"g", size="7") + TXT + END, r"gives all files after it one size"),
        (header(b"x", b"x", 9, b"11 path=a\n") + TXT + END, r"header at byte 0 is broken: no record at its byte 0"),
        (header(b"x", b"x", 9, b"-9 path=a") + TXT + END, r"header at byte 0 is broken: no record at its byte 0"),
        (pax(size="-7") + TXT + END, r"it gives a size of b'-7'"),
        (TXT + pax(path="b.txt") + END, r"truncated: ends after the extended header at byte 1024"),
        (TXT + pax(path="b.txt", size="99999") + TXT + END, r"b\.txt at byte 2048 needs 99999 bytes"),
        (header(b"a.txt", b"0", 3, b"red", b"\xff" * 12) + END, r"no tar header at byte 0"),
        (TXT + END + TXT + END, r"goes on after its end mark at byte 1024"),
        (TXT + bytes(BLOCK) + TXT + END, r"goes on after its end mark at byte 1024"),
        (TXT + bytes(BLOCK), r"no end mark after byte 1024"),
        (TXT, r"no end mark after byte 1024"),
        (TXT + header(b"", b"0", 0, raw_size=b"x" * 12) + END, r"no tar header at byte 1024"),
        (gzip.compress(TXT + END, mtime=0) + bytes(BLOCK), r"is compressed, .*gzip -d"),
        (gzip.compress(TXT + END, mtime=0)[:100], r"is compressed, .*gzip -d"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(tmp_path, folder, data, message):
    (tmp_path / "t.tar").write_bytes(data)
    with pytest.raises(ValueError, match=rf"t\.tar\b.*{message}"):
        index_shard(tmp_path / "t.tar", folder)
    with pytest.raises(ValueError, match=rf"t\.tar\b.*({message}|are no tar)"):
        list(scan_tar(tmp_path / "t.tar"))


def test_a_name_that_looks_like_bzip2_is_a_name():
    assert list(samples_of(header(b"BZhang.txt", b"0", 3, b"red") + END)) == ["BZhang"]


def test_a_span_of_two_samples_or_of_twice_one_file_is_refused():
    with pytest.raises(ValueError, match="holds 'b' after 'a'"):
        read_members(TXT + header(b"b.txt", b"0", 3, b"red"), "t")
    with pytest.raises(ValueError, match=r"two files that end in \.txt"):
        read_members(TXT + TXT, "t")


@pytest.mark.parametrize("form", FORMATS)
def test_indexed_and_verified(tmp_path, folder, form):
    rng = np.random.default_rng(0)
    long = LONG if form != tarfile.USTAR_FORMAT else "d/" * 60
    entries: list[Entry] = [("made", b"", {"type": tarfile.DIRTYPE})]
    for number in range(5):
        entries += [
            (f"{long}{number}é.txt", b"red " * int(rng.integers(1, 400)), {"mtime": 1.25}),
            ("._x", b"junk", {}),
        ]
        entries += [(f"{long}{number}é.json", b"{}", {"mtime": 1.25})]
    (tmp_path / "t.tar").write_bytes(tar_of(entries, form))
    folder.save(tmp_path / "tok")
    assert commands.index(tmp_path / "t.tar", tmp_path / "tok")["documents"] == 5
    assert commands.verify(tmp_path / "t.tar", tmp_path / "tok") == {"documents": 5, "broken": 0, "errors": []}
