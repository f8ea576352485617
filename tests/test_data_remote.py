"""Remote shards: ranged reads, retries, the bounded cache. The server is in this process."""

from __future__ import annotations

import email.utils
import errno
import hashlib
import http.server
import multiprocessing
import os
import re
import shutil
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import yaml

from mmllm.data import commands
from mmllm.data.index.index import index_path, load_index
from mmllm.data.index.make import is_current
from mmllm.data.loading.loader import PackedLoader, StepDataset
from mmllm.data.plan.plan import open_plan
from mmllm.data.plan.recipe import load_recipe, recipe_from_dict
from mmllm.data.samples.decode import ImageTransform
from mmllm.data.shards import remote as storage
from mmllm.data.shards.cache import CachedShard, shrink_cache
from mmllm.data.shards.files import OpenFiles
from mmllm.data.shards.find import find_shards, shard_paths
from mmllm.data.shards.reader import ShardReader
from mmllm.data.shards.remote import RemoteShard, cache_bytes, cache_folder, expand_remote, fetch_many
from mmllm_tokenizers.folder import TokenizerFolder
from tests.data_fixtures import make_folder, mixed_manifest, recipe_dict
from tests.data_ranks import rows

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder by ranges; fails as it is told to."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.num_requests, self.num_ranges, self.num_bytes = root, 0, 0, 0
        self.drop_every, self.has_ranges = 0, True
        self.num_failing, self.status, self.num_silent, self.num_heads = 0, 503, 0, 0
        self.identity = "ETag"
        self.ended = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.server.num_heads += 1
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        path = self.server.root / self.path.partition("?")[0].lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        if self.server.num_silent:
            self.server.num_silent -= 1
            self.server.ended.wait(60)
            return
        if self.server.num_failing:
            self.server.num_failing -= 1
            self.send_error(self.server.status)
            return
        data, status = path.read_bytes(), 200
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        total = len(data)
        if span and self.server.has_ranges and with_body:
            start, stop = int(span[1]), int(span[2] or total - 1) + 1
            data, status = data[start:stop], 206
            self.server.num_ranges += 1
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        match self.server.identity:
            case "ETag":
                self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
            case "Last-Modified":
                self.send_header("Last-Modified", email.utils.formatdate(path.stat().st_mtime, usegmt=True))
            case "Content-MD5" | "Digest" as header:
                self.send_header(header, hashlib.md5(path.read_bytes()).hexdigest())
        if self.server.has_ranges:
            self.send_header("Accept-Ranges", "bytes")
        if status == 206 and span:
            self.send_header("Content-Range", f"bytes {span[1]}-{int(span[1]) + len(data) - 1}/{total}")
        self.end_headers()
        if with_body:
            self.server.num_requests += 1
            self.server.num_bytes += len(data)
            is_dropped = self.server.drop_every and self.server.num_requests % self.server.drop_every == 0
            self.wfile.write(data[: len(data) // 2] if is_dropped else data)
            if is_dropped:
                self.connection.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("remote")
    make_folder(root / "tok")
    commands.build(mixed_manifest(root / "m", num=12), root / "s", root / "tok", samples_per_shard=7)
    commands.index(root / "s", root / "tok")
    return root


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "_WAIT_SECONDS", 0.001)
    return tmp_path / "cache"


@pytest.fixture
def server(made):
    with Server(made / "s") as served:
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()
        yield served
        served.ended.set()
        served.shutdown()


def batches(made: Path, folder: Path, prefix: str | None) -> list[list[str]]:
    """Rows of six steps; shards by address, or here."""
    recipe = recipe_dict(made / "s", made / "tok")
    for source in recipe["sources"] if prefix else ():
        names = sorted(path.name for path in (made / "s").glob(f"{source['kind']}-*.tar"))
        source["shards"] = [f"{prefix}/{name}" for name in names]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    read = load_recipe(folder / "recipe.yaml")
    if prefix:
        for source in read.sources:
            commands.index(source.shards, made / "tok")
    tokenizer = TokenizerFolder.load(made / "tok")
    plan = open_plan(read, 4, tokenizer)
    loader = PackedLoader(plan, StepDataset(plan, tokenizer, ImageTransform(tokenizer.image_size)), 6)
    found = list(loader)
    assert not any("errors" in batch.state for batch in found)
    return [rows(batch) for batch in found]


def put_in_memory(made: Path) -> str:
    system = fsspec.filesystem("memory")
    for path in (made / "s").glob("*.tar"):
        system.pipe_file(f"/shards/{path.name}", path.read_bytes())
    return "memory://shards"


@pytest.mark.parametrize("kind", ["memory", "file", "http", "http that drops every third"])
def test_remote_shards_give_the_same_batches(made, cache, server, tmp_path, kind):
    wanted = batches(made, tmp_path / "a", None)
    prefix = {"memory": put_in_memory(made), "file": (made / "s").as_uri()}.get(kind, server.url)
    server.drop_every = 3 if "third" in kind else 0
    assert batches(made, tmp_path / "b", prefix) == wanted
    if kind.startswith("http"):
        assert server.num_ranges > 0
        before = server.num_ranges
        assert batches(made, tmp_path / "c", prefix) == wanted
        assert server.num_ranges == before  # indices and blocks are here now


def test_addresses_are_expanded(made, cache):
    prefix = put_in_memory(made)
    found = expand_remote(f"{prefix}/text-*.tar")
    assert [shard.name for shard in found] == ["text-000000.tar", "text-000001.tar"]
    assert [shard.url for shard in expand_remote("s3://b/{00..02}.tar?key=x")][2] == "s3://b/02.tar?key=x"
    assert str(RemoteShard("s3://b/02.tar?key=secret")) == "s3://b/02.tar"
    assert expand_remote(f"{prefix}/text-00000?.tar") == found
    for query in ("https://h/a.tar?sig=a*b", "http://h/a.tar?b", "s3://b/02.tar?versionId=x"):
        assert [shard.url for shard in expand_remote(query)] == [query]
    with pytest.raises(FileNotFoundError, match="nothing matches"):
        expand_remote(f"{prefix}/none-*.tar")
    assert find_shards(f"{prefix}/text-*.tar") == found
    with pytest.raises(ValueError, match="only recipes' sources may be remote"):
        shard_paths(f"{prefix}/text-*.tar")


def test_what_is_gone_or_has_no_ranges_is_said(made, cache, server, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"none\.tar: no such shard"):
        commands.index(f"{server.url}/none.tar", made / "tok")
    server.has_ranges = False
    with pytest.raises(OSError, match="no ranges of bytes"):
        ShardReader().read(RemoteShard(f"{server.url}/text-000000.tar"), 1024, 512)
    server.has_ranges, server.drop_every = True, 1
    with pytest.raises(OSError, match=r"text-000000\.tar.*failed 5 times"):
        ShardReader().read(RemoteShard(f"{server.url}/text-000000.tar"), 1024, 512)


def test_a_remote_shard_that_changes_is_refused(made, cache):
    system = fsspec.filesystem("memory")
    put_in_memory(made)
    source = {"name": "t", "kind": "text", "shards": "memory://shards/text-000000.tar"}
    commands.index(source["shards"], made / "tok")
    system.pipe_file("/shards/text-000000.tar", (made / "s" / "text-000001.tar").read_bytes())
    recipe = recipe_dict(made / "s", made / "tok", sources=[source])
    with pytest.raises(ValueError, match=r"when it was indexed|changed since it was indexed"):
        open_plan(recipe_from_dict(recipe), 4)


@pytest.mark.parametrize("identity", ["ETag", "Last-Modified", "Content-MD5", "Digest", ""])
def test_a_shard_that_is_replaced_by_one_of_its_size_is_read_anew(made, cache, server, tmp_path, caplog, identity):
    server.root, server.identity = tmp_path, identity
    storage._warn_nameless.cache_clear()
    first = (made / "s" / "text-000000.tar").read_bytes()
    shards = [RemoteShard(f"{server.url}/{name}.tar") for name in "ab"]
    for number, data in enumerate((first, first.replace(b"red", b"RED"))):
        for shard in shards:
            (tmp_path / shard.name).write_bytes(data)
            os.utime(tmp_path / shard.name, (1e9 + 100 * number, 1e9 + 100 * number))
            is_seen = ShardReader().read(shard, 0, len(data)) == data
            assert is_seen or (number and not identity)
    told = [record.getMessage() for record in caplog.records if "neither an ETag nor a date" in record.getMessage()]
    assert len(told) == (not identity)


def test_what_hf_says_of_a_file_names_its_version(monkeypatch):
    info = {"size": 5, "blob_id": "b1", "lfs": {"sha256": "s1"}, "xet_hash": "x1"}
    files = types.SimpleNamespace(invalidate_cache=lambda: None, info=lambda path: info)
    monkeypatch.setattr(storage, "_open_system", lambda url: (files, url))
    shard = RemoteShard("hf://datasets/a/b/c.tar")
    seen = [storage.stat_shard(shard)]
    for key, value in (("blob_id", "b2"), ("lfs", {"sha256": "s2"}), ("xet_hash", "x2")):
        info[key] = value
        seen.append(storage.stat_shard(shard))
    assert len(set(seen)) == 4


@pytest.mark.parametrize("status", [503, 429, 403])
def test_a_server_that_fails_is_asked_again_for_what_it_has(made, cache, server, status):
    server.status = status
    shard = RemoteShard(f"{server.url}/text-000000.tar?token=secret")
    size = (made / "s" / "text-000000.tar").stat().st_size
    for num_failing in (0, 1, 2, 3):
        server.num_failing = num_failing
        found = storage.stat_shard(shard)
        assert found is not None and found[0] == size and not server.num_failing
    server.num_failing = 1000
    with pytest.raises(OSError, match=rf"text-000000\.tar: failed 5 times: .*status {status}") as caught:
        ShardReader().read(shard, 0, 512)
    assert not isinstance(caught.value, FileNotFoundError) and "secret" not in str(caught.value)
    server.num_failing = 0
    assert storage.stat_shard(RemoteShard(f"{server.url}/none.tar")) is None


def test_a_server_that_is_silent_is_asked_again(made, cache, server, monkeypatch):
    assert 30 <= storage.SILENT_SECONDS <= 120
    monkeypatch.setattr(storage, "SILENT_SECONDS", 0.2)
    server.num_silent = 3
    began = time.monotonic()
    data = ShardReader().read(RemoteShard(f"{server.url}/text-000000.tar"), 0, 512)
    assert data == (made / "s" / "text-000000.tar").read_bytes()[:512]
    assert time.monotonic() - began < 30 and not server.num_silent


def test_copies_that_killed_processes_left_are_removed(made, cache, server):
    old, young, writing = (cache / f"whole-{name}" for name in ("old", "young", "writing"))
    for folder in (old, young, writing):
        folder.mkdir(parents=True)
        (folder / "x.tar").write_bytes(b"half")
    for path in (old / "x.tar", old, writing):
        os.utime(path, (1e9, 1e9))
    with storage.local_copy(RemoteShard(f"{server.url}/text-000000.tar")) as path:
        assert path.read_bytes() == (made / "s" / "text-000000.tar").read_bytes()
        assert not old.exists() and young.exists() and writing.exists()
    assert not path.exists()


def test_the_cache_is_bounded(made, cache, monkeypatch):
    monkeypatch.setenv("MMLLM_CACHE_GB", str(30_000 / 1e9))
    put_in_memory(made)
    reader, shards = ShardReader(), [RemoteShard(f"memory://shards/caption-00000{n}.tar") for n in (0, 1)]
    for shard in shards:
        whole = (made / "s" / shard.name).read_bytes()
        for start in range(0, len(whole), 3000):
            assert reader.read(shard, start, 7000) == whole[start : start + 7000]
        kept = list((cache_folder() / "spans").glob("*"))
        assert sum(path.stat().st_blocks * 512 for path in kept) <= 30_000 + 3 * 8192
    assert shrink_cache(4096) <= 4096 and shrink_cache(0) == 0
    assert reader.read(shard, 100, 200) == whole[100:300]
    monkeypatch.setenv("MMLLM_CACHE_GB", "much")
    with pytest.raises(ValueError, match="MMLLM_CACHE_GB"):
        cache_bytes()


def test_what_is_kept_is_what_was_read(made, cache, monkeypatch):
    put_in_memory(made)
    shard = RemoteShard("memory://shards/caption-000000.tar")
    whole = (made / "s" / "caption-000000.tar").read_bytes()
    rng = np.random.default_rng(0)
    here, other = CachedShard(shard, OpenFiles()), CachedShard(shard, OpenFiles())
    have = np.zeros(len(whole), dtype=bool)
    for _ in range(300):
        start = int(rng.integers(0, len(whole)))
        size = int(rng.integers(1, 3000))
        stop = min(start + size, len(whole))
        found = other.read(start, size)
        if have[start:stop].all():
            assert found == whole[start:stop]
        else:
            assert found is None or found == whole[start:stop]
        if rng.random() < 0.3:
            here.add(start, whole[start:stop])
            first, last = -(-start // 64) * 64, stop if stop == len(whole) else stop // 64 * 64
            have[first:last] = True
    assert have.mean() > 0.5
    here.path.write_bytes(here.path.read_bytes()[:-1])  # a copy that was cut short is nothing, and is made anew
    assert here.read(len(whole) - 64, 64) is None
    here.add(0, whole)
    assert here.read(0, len(whole)) == whole and other.read(0, len(whole)) in (None, whole)
    other.add(0, whole)
    assert other.read(0, len(whole)) == whole
    here.path.unlink()  # by another process that made room
    assert here.read(0, 64) in (None, whole[:64])


def test_only_what_is_read_is_fetched_near_ranges_together(made, cache, server):
    shard = RemoteShard(f"{server.url}/caption-000000.tar")
    whole = (made / "s" / "caption-000000.tar").read_bytes()
    reader = ShardReader()
    ranges = [(shard, 5120, 1024), (shard, 0, 512), (shard, 6208, 1000), (shard, 9000, 50)]
    kept = 512 + (7232 - 5120) + (9088 - 8960)  # in grains of 64 bytes
    assert reader.read_many(ranges) == [whole[start : start + size] for _, start, size in ranges]
    assert server.num_ranges == 3 and server.num_bytes == kept
    assert ShardReader().read_many(ranges) == [whole[start : start + size] for _, start, size in ranges]
    assert server.num_ranges == 3


def test_ranges_that_fail_are_asked_for_again_and_others_not(made, cache, server):
    shard = RemoteShard(f"{server.url}/caption-000000.tar")
    whole = (made / "s" / "caption-000000.tar").read_bytes()
    assert storage.stat_shard(shard) is not None
    server.num_failing = 2
    spans = [(shard, start, start + 700) for start in range(0, 7000, 1000)]
    assert fetch_many(spans) == [whole[start:stop] for _, start, stop in spans]
    gone = RemoteShard(f"{server.url}/none.tar")
    found = fetch_many([(gone, 0, 10), *spans])
    assert isinstance(found[0], FileNotFoundError) and found[1:] == [whole[start:stop] for _, start, stop in spans]


def test_whole_shards_are_fetched_once_by_all_processes(made, cache, server):
    shard = RemoteShard(f"{server.url}/caption-000000.tar", whole=True)
    whole = (made / "s" / "caption-000000.tar").read_bytes()
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda start: ShardReader().read(shard, start, 100), range(0, 4000, 500)))
    assert found == [whole[start : start + 100] for start in range(0, 4000, 500)]
    assert server.num_ranges == 1 and server.num_bytes == len(whole)


def test_the_index_beside_a_remote_shard_is_taken(made, cache, server):
    tokenizer = TokenizerFolder.load(made / "tok")
    shard = RemoteShard(f"{server.url}/text-000000.tar")
    local = made / "s" / "text-000000.tar"
    found = load_index(shard, tokenizer.hash)
    assert found.lengths["text"].tolist() == load_index(local, tokenizer.hash).lengths["text"].tolist()
    assert server.num_bytes <= index_path(local).stat().st_size + 8 * (1024 + 128)
    assert is_current(shard, tokenizer.hash) and load_index(shard, tokenizer.hash).sha256 == found.sha256
    assert server.num_bytes <= index_path(local).stat().st_size + 8 * (1024 + 128)  # its new identity is noted


def test_an_index_beside_another_shard_is_refused(made, cache, server, tmp_path):
    server.root = tmp_path
    data = (made / "s" / "text-000000.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data.replace(b".txt", b".TXT"))
    (tmp_path / "a.tar.index").write_bytes(index_path(made / "s" / "text-000000.tar").read_bytes())
    with pytest.raises(ValueError, match="changed since it was indexed"):
        load_index(RemoteShard(f"{server.url}/a.tar"), TokenizerFolder.load(made / "tok").hash)


def test_a_disk_that_is_nearly_full_leaves_no_zeros(made, cache, monkeypatch):
    put_in_memory(made)
    here = CachedShard(RemoteShard("memory://shards/caption-000000.tar"), OpenFiles())
    whole = (made / "s" / "caption-000000.tar").read_bytes()
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: write(file, data[:1000], offset))
    here.add(0, whole)
    assert here.read(0, len(whole)) == whole
    here.path.unlink()
    left = [3000]

    def full(file: int, data: bytes, offset: int) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = write(file, data[: left[0]], offset)
        left[0] -= count
        return count

    monkeypatch.setattr(os, "pwrite", full)
    here.add(0, whole)
    assert here.read(0, 64) is None and here.read(2944, 64) is None


def start_rank(made: Path, urls: list[str], barrier: Any, told: Any) -> None:
    tokenizer = TokenizerFolder.load(made / "tok")
    source = {"name": "t", "kind": "text", "shards": urls}
    plan_recipe = recipe_from_dict(recipe_dict(made / "s", made / "tok", sources=[source]))
    barrier.wait()
    try:
        plan = open_plan(plan_recipe, 2, tokenizer)
        loader = PackedLoader(plan, StepDataset(plan, tokenizer, ImageTransform(16)), 3)
        told.put([rows(batch) for batch in loader])
    except Exception as error:
        told.put(repr(error))


@pytest.mark.parametrize("where", ["remote", "copied"])
def test_ranks_that_start_together_find_the_same(made, cache, server, tmp_path, where):
    names = ["text-000000.tar", "text-000001.tar"]
    urls = [f"{server.url}/{name}" for name in names]
    if where == "copied":
        for name in names:
            for ending in ("", ".index"):
                shutil.copy(made / "s" / f"{name}{ending}", tmp_path / f"{name}{ending}")
            os.utime(tmp_path / name, ns=(1, 1))
        urls = [str(tmp_path / name) for name in names]
    context = multiprocessing.get_context("spawn")
    barrier, told = context.Barrier(3), context.Queue()
    ranks = [context.Process(target=start_rank, args=(made, urls, barrier, told)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    found = [told.get(timeout=120) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert isinstance(found[0], list) and found[0] == found[1] == found[2]


def test_an_index_that_was_uploaded_anew_is_taken(made, cache, server, tmp_path):
    tokenizer = TokenizerFolder.load(made / "tok")
    server.root = tmp_path
    shard = RemoteShard(f"{server.url}/a.tar")
    for number in range(2):
        for ending in ("", ".index"):
            source = made / "s" / f"{'text' if number else 'audio'}-00000{number}.tar{ending}"
            (tmp_path / f"a.tar{ending}").write_bytes(source.read_bytes())
        server.num_bytes = 0
        found = load_index(shard, tokenizer.hash)
        assert found.kind == ("text" if number else "audio")
        assert server.num_bytes <= (tmp_path / "a.tar.index").stat().st_size + 8 * (1024 + 128)


def test_a_shard_is_looked_up_once_for_all_processes(made, cache, server):
    tokenizer = TokenizerFolder.load(made / "tok")
    found = load_index(RemoteShard(f"{server.url}/text-000000.tar"), tokenizer.hash)
    reader = ShardReader()
    reader.know(found.path, found.stamp)
    server.num_heads = 0
    place = found.place(0)
    assert reader.read(found.path, place.start, place.num_bytes)
    assert server.num_heads == 0
