"""What the data engine bears: `python benchmarks/scale.py [--json F] [--quick] [--only MEASURE]`.

Ten thousand shards, fifty million documents, long texts, long lines, a slow server, many ranks, builds. Everything is
made on the spot from seeds; the largest case writes some 5 GB to the temporary folder. What is measured runs in a
process of its own. `--quick` takes small sizes, to see that all of it works: its numbers mean nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from data import Row, caption, row, run, tokenizer, write_tar

from mmllm.data import commands
from mmllm.data.index.arrays import write_arrays
from mmllm.data.index.columns import Column, Texts
from mmllm.data.index.index import FORMAT_VERSION, RECORD, index_path
from mmllm.data.loading.balance import shares
from mmllm.data.loading.loader import StepDataset
from mmllm.data.plan.plan import open_plan
from mmllm.data.plan.recipe import recipe_from_dict
from mmllm.data.samples.decode import ImageTransform
from mmllm_tokenizers.folder import TokenizerFolder

LATENCY_S = 0.03

_COMMON = """
import json, resource, sys, time
import psutil
from mmllm.data.plan.plan import open_plan
from mmllm.data.plan.recipe import recipe_from_dict
from mmllm_tokenizers.folder import TokenizerFolder
recipe = recipe_from_dict(json.loads(sys.argv[1]))
folder = TokenizerFolder.load(recipe.tokenizer_folder())
"""


def child(code: str, *arguments: str, common: str = _COMMON, **environment: str) -> dict[str, Any]:
    """What a process of its own prints, as JSON."""
    command = [sys.executable, "-W", "ignore", "-c", common + code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


# --- many shards --------------------------------------------------------------------------------------------------

_OPEN = """
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
from mmllm.data.loading.loader import PackedLoader, StepDataset
from mmllm.data.samples.decode import ImageTransform
began = time.perf_counter()
plan = open_plan(recipe, 8, folder)
batch = next(iter(PackedLoader(plan, StepDataset(plan, folder, ImageTransform(32)), 10)))
assert "errors" not in batch.state, batch.state["errors"][:3]
print(json.dumps({"shards": len(plan.sources[0].indices), "seconds": time.perf_counter() - began}))
"""
_LINKS = 20_000
"""Of one file; file systems allow some 65,000."""


def measure_shards(work: Path, quick: bool) -> list[Row]:
    """How many shards a recipe may name where a process may open 1,024 files. The shards are links to a few."""
    tokenizer(work / "tok")
    count, rng = 2_000 if quick else 100_000, np.random.default_rng(0)
    (work / "s").mkdir()
    for first in range(0, count, _LINKS):
        original = work / "s" / f"{first:06d}.tar"
        write_tar(original, ({"txt": caption(rng).encode()} for _ in range(4)))
        commands.index(original, work / "tok")
        for number in range(first + 1, min(first + _LINKS, count)):
            link = work / "s" / f"{number:06d}.tar"
            os.link(original, link)
            os.link(index_path(original), index_path(link))
    source = {"name": "many", "kind": "text", "shards": str(work / "s" / "*.tar")}
    recipe = {"tokenizer": str(work / "tok"), "sequence_length": 128, "sources": [source]}
    found = child(_OPEN, json.dumps(recipe))
    return [
        row("shards_open", "ulimit -n 1024", found["shards"], "shards"),
        row("shards_open_s", f"{count} shards, opened and a step read", found["seconds"], "s"),
    ]


# --- many documents -----------------------------------------------------------------------------------------------

_START = """
from itertools import islice
from mmllm.data.loading.loader import StepDataset
from mmllm.data.samples.decode import ImageTransform
began = time.perf_counter()
plan = open_plan(recipe, 8, folder)
opened = time.perf_counter() - began
steps = list(islice(plan.steps(), 20))
seconds = time.perf_counter() - began
dataset = StepDataset(plan, folder, ImageTransform(224))
process = psutil.Process()
documents = sum(index.num_documents for index in plan.sources[0].indices)
print(json.dumps({
    "seconds": seconds, "opened": opened, "uss": process.memory_full_info().uss, "documents": documents,
    "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "items": plan.sources[0].num_items,
}))
"""


def write_documents(folder: Path, num_shards: int, num_documents: int, tokenizer_hash: str) -> None:
    """Indices of captions with four metadata columns, beside sparse files that stand for the shards."""
    rng = np.random.default_rng(1)
    folder.mkdir()
    records = np.zeros(num_documents, dtype=RECORD)
    records["start"], records["bytes"] = np.arange(num_documents) * 10_240, 10_000
    records["line"], records["images"] = -1, 1
    arrays = {
        "records": records.view(np.uint8).reshape(num_documents, RECORD.itemsize),
        "tokens": np.minimum(2048, 144 + np.exp(rng.normal(np.log(30), 0.7, num_documents))).astype(np.uint32),
        "picture.sizes": rng.integers(64, 2000, (num_documents, 2)).astype(np.uint32),
        "sound.lengths": np.zeros((0, 3), dtype=np.uint32),
    }
    columns = {
        "lang": rng.choice(["en", "de", "fr", "zh"], num_documents).tolist(),
        "score": rng.random(num_documents).tolist(),
        "host": [f"host{number}.example" for number in rng.integers(0, 2000, num_documents)],
        "width": rng.integers(64, 2000, num_documents).tolist(),
    }
    arrays |= Texts.arrays([f"{number:09d}" for number in range(num_documents)], "keys")
    told = {}
    for number, (name, values) in enumerate(columns.items()):
        more, told[name] = Column.arrays(values, f"column{number}")
        arrays |= more
    size, changed = num_documents * 10_240 + 1024, 10**18
    for number in range(num_shards):
        shard = folder / f"{number:06d}.tar"
        with shard.open("wb") as stream:
            stream.truncate(size)
        os.utime(shard, ns=(changed, changed))
        info = {
            "format_version": FORMAT_VERSION, "tokenizer": tokenizer_hash, "sha256": f"{number:064d}",
            "kind": "caption", "shard": [size, str(changed)], "columns": told, "text_key": None, "probes": [],
            "bad": {"count": 0, "unread": 0, "named": []}, "skipped": {},
        }  # fmt: skip
        write_arrays(index_path(shard), arrays, info)


def measure_documents(work: Path, quick: bool) -> list[Row]:
    """Private memory of a rank and the time until its first steps are planned, with and without a filter."""
    num_shards, num_documents = (50, 1_000) if quick else (5_000, 10_000)
    folder = tokenizer(work / "tok")
    write_documents(work / "s", num_shards, num_documents, folder.hash)
    rows = []
    for name, chosen in (("all", None), ("score >= 0.2 and lang != 'zh'", "score >= 0.2 and lang != 'zh'")):
        source = {"name": "many", "kind": "caption", "shards": str(work / "s" / "*.tar")}
        if chosen:
            source["filter"] = chosen
        recipe = {"tokenizer": str(work / "tok"), "sequence_length": 2048, "sources": [source]}
        found = child(_START, json.dumps(recipe))
        case = f"{found['documents'] / 1e6:g}M documents, 4 columns, {num_shards} shards; {name}"
        rows += [
            row("rank_memory_bytes", case, found["uss"], "bytes"),
            row("rank_peak_bytes", case, found["peak"], "bytes"),
            row("rank_start_s", case, found["seconds"], "s"),
        ]
    return rows


# --- long texts, long lines ---------------------------------------------------------------------------------------


def text_plan(work: Path, length: int, **source: str) -> Any:
    """A plan over one shard of texts, and its dataset without a cache."""
    folder = TokenizerFolder.load(work / "tok")
    recipe = {
        "tokenizer": str(work / "tok"), "sequence_length": length,
        "sources": [{"name": "texts", "kind": "text", **source}],
    }  # fmt: skip
    plan = open_plan(recipe_from_dict(recipe), 1, folder)
    return plan, StepDataset(plan, folder, ImageTransform(32))


def measure_texts(work: Path, quick: bool) -> list[Row]:
    """A part of a text of 2 MB; documents a second from one `jsonl` of 20,000 lines."""
    tokenizer(work / "tok")
    rng = np.random.default_rng(2)
    target, words = 100_000 if quick else 2_000_000, []
    while sum(map(len, words)) + len(words) < target:
        words.append(caption(rng))
    text = " ".join(words)
    write_tar(work / "long.tar", iter([{"txt": text.encode()}]))
    write_tar(work / "line.tar", iter([{"jsonl": json.dumps({"text": text}).encode()}]))
    lines = [json.dumps({"text": caption(rng), "n": n}) for n in range(2_000 if quick else 20_000)]
    write_tar(work / "lines.tar", iter([{"jsonl": "\n".join(lines).encode()}]))
    commands.index([str(work / f"{name}.tar") for name in ("long", "line", "lines")], work / "tok")
    rows = []
    for name, case in (("long", "a txt of 2 MB"), ("line", "2 MB in a line of a jsonl")):
        plan, dataset = text_plan(work, 2048, shards=str(work / f"{name}.tar"))
        items = plan.sources[0].items(rng.permutation(plan.sources[0].num_items)[:60])
        seconds = []
        for item in items:
            errors: list[str] = []
            began = time.perf_counter()
            dataset.document(item, errors)
            seconds.append(time.perf_counter() - began)
            assert not errors, errors
        rows.append(row("long_text_s", f"a part of 2,048 tokens of {case}", float(np.median(seconds)), "s"))
    plan, dataset = text_plan(work, 2048, shards=str(work / "lines.tar"))
    items = plan.sources[0].items(rng.permutation(plan.sources[0].num_items)[:10_000])
    began, errors = time.perf_counter(), []
    for item in items:
        dataset.document(item, errors)
    rate = len(items) / (time.perf_counter() - began)
    assert not errors, errors[:3]
    return [*rows, row("jsonl_per_s", f"a jsonl of {len(lines)} lines, one process", rate, "documents/s")]


# --- a slow server ------------------------------------------------------------------------------------------------

_SERVER = """
import asyncio, os, re, sys
root, latency = sys.argv[1], float(sys.argv[2])
told = {"bytes": 0, "requests": 0}

async def serve(reader, writer):
    try:
        while True:
            head = (await reader.readuntil(b"\\r\\n\\r\\n")).decode()
            method, path, _ = head.split(" ", 2)
            if path == "/told":
                data = f"{told['bytes']} {told['requests']}".encode()
                writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(data) + data)
                continue
            await asyncio.sleep(latency)
            try:
                file = os.open(root + path, os.O_RDONLY)
            except OSError:
                writer.write(b"HTTP/1.1 404 Not Found\\r\\nContent-Length: 0\\r\\n\\r\\n")
                continue
            total = os.fstat(file).st_size
            span = re.search(r"[Rr]ange: bytes=(\\d+)-(\\d*)", head)
            start, stop = (int(span[1]), int(span[2] or total - 1) + 1) if span else (0, total)
            data = os.pread(file, stop - start, start) if method == "GET" else b""
            os.close(file)
            told["bytes"] += len(data)
            told["requests"] += 1
            status = b"206 Partial Content" if span else b"200 OK"
            size = len(data) if method == "GET" else total
            more = b"Content-Range: bytes %d-%d/%d\\r\\n" % (start, stop - 1, total) if span else b""
            head = b"HTTP/1.1 %s\\r\\nContent-Length: %d\\r\\nETag: \\"1\\"\\r\\n" % (status, size)
            writer.write(head + b"Accept-Ranges: bytes\\r\\n%s\\r\\n" % more + data)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


@contextmanager
def server(root: Path) -> Iterator[str]:
    """The address of a server of a folder that answers after 30 ms."""
    command = [sys.executable, "-c", _SERVER, str(root), str(LATENCY_S)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


_READ = """
import urllib.request
from torch.utils.data import DataLoader, Dataset
from mmllm.data.loading.reader import SampleReader
url, wanted, num_workers = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def told():
    with urllib.request.urlopen(url + "/told") as answer:
        return [int(number) for number in answer.read().split()]

class Undecoded(Dataset):
    def __init__(self, plan):
        self.plan, self.read = plan, SampleReader(plan, None)
    def __getitem__(self, step):
        items = [item for sequence in step.sequences for item in sequence]
        found = self.read.read_many(items)
        for each in found:
            if isinstance(each, Exception):
                raise each
        indices = self.plan.sources[0].indices
        return len(found), sum(indices[item.shard].place(item.row).num_bytes for item in items)

opening = told()
plan = open_plan(recipe, 8, folder)
opened = told()
steps, planned = [], 0
for step in plan.steps():
    steps.append(step)
    planned += sum(map(len, step.sequences))
    if planned >= wanted:
        break
loader = DataLoader(Undecoded(plan), batch_size=None, sampler=steps, num_workers=num_workers,
                    prefetch_factor=4 if num_workers else None, collate_fn=lambda batch: batch)
done, needed, began = 0, 0, time.perf_counter()
for count, size in loader:
    done, needed = done + count, needed + size
seconds = time.perf_counter() - began
after = told()
print(json.dumps({"rate": done / seconds, "fetched": after[0] - opened[0], "needed": needed, "done": done,
                  "index": opened[0] - opening[0], "requests": after[1] - opened[1]}))
"""


def measure_remote(work: Path, quick: bool) -> list[Row]:
    """Texts of 2 KB from a server that takes 30 ms, undecoded; bytes fetched by what was needed."""
    tokenizer(work / "tok")
    rng = np.random.default_rng(3)
    root = work / "served"
    root.mkdir()
    num_shards, each = (2, 300) if quick else (10, 2_000)
    pool = " ".join(caption(rng) for _ in range(2_000))
    for number in range(num_shards):
        starts = rng.integers(0, len(pool) - 2048, each).tolist()
        write_tar(root / f"{number:06d}.tar", ({"txt": pool[start : start + 2000].encode()} for start in starts))
    commands.index(str(root), work / "tok")
    rows = []
    with server(root) as url:
        for remote, share in (("spans", 0.5), ("shards", 1.0)):
            source = {"name": "far", "kind": "text", "shards": f"{url}/{{000000..{num_shards - 1:06d}}}.tar"}
            recipe = {
                "tokenizer": str(work / "tok"), "sequence_length": 2048, "sources": [{**source, "remote": remote}],
            }  # fmt: skip
            wanted = int(num_shards * each * share)
            cache = {"MMLLM_CACHE": str(work / f"cache-{remote}")}
            found = child(_READ, json.dumps(recipe), url, str(wanted), "4", **cache)
            case = f"2 KB texts, 30 ms, 4 workers; {remote}"
            rows += [
                row("remote_per_s", case, found["rate"], "samples/s"),
                row("remote_bytes_ratio", case, found["fetched"] / found["needed"], "fetched / needed"),
                row("remote_requests", case, found["requests"] / found["done"], "requests / sample"),
            ]
            if remote == "spans":
                cache = {"MMLLM_CACHE": str(work / "cache-first")}
                found = child(_READ, json.dumps(recipe), url, "1", "0", **cache)
                index = sum(index_path(shard).stat().st_size for shard in root.glob("*.tar"))
                total = found["fetched"] + found["index"]
                rows.append(
                    row("remote_first_step", "index beside the shards", total / (index + found["needed"]), "ratio")
                )
    return rows


# --- many ranks ---------------------------------------------------------------------------------------------------


def measure_shares(work: Path, quick: bool) -> list[Row]:
    """Sharing a step of 4,096 sequences among 512 ranks."""
    rng, seconds = np.random.default_rng(4), []
    for _ in range(20):
        costs = rng.normal(2048, 400, 4096).tolist()
        began = time.perf_counter()
        shares(costs, 512)
        seconds.append(time.perf_counter() - began)
    return [row("share_step_s", "4,096 sequences over 512 ranks", float(np.median(seconds)), "s")]


# --- builds -------------------------------------------------------------------------------------------------------

_BUILD = """
import json, sys, time
import psutil
from mmllm.data import commands
from mmllm.data.shards import write

class Begins(Exception):
    pass

def stop(*_, **__):
    raise Begins(time.perf_counter(), time.process_time(), psutil.Process().memory_full_info().uss)

write._WriteGroups.each = stop

def until_the_first_group(manifest):
    before, began, used = psutil.Process().memory_full_info().uss, time.perf_counter(), time.process_time()
    try:
        commands.build(manifest, sys.argv[3])
    except Begins as told:
        now, cpu, memory = told.args
        return {"seconds": now - began, "cpu": cpu - used, "bytes": memory - before}

until_the_first_group(sys.argv[1])  # what is loaded once
print(json.dumps(until_the_first_group(sys.argv[2])))
"""


def measure_build(work: Path, quick: bool) -> list[Row]:
    """Memory and time that `mmllm data build` takes of each row until its first group is written."""
    num_rows, num_pictures, rng, rows = 20_000 if quick else 1_000_000, 1_000, np.random.default_rng(5), []
    (work / "images").mkdir()
    for number in range(num_pictures):
        (work / "images" / f"{number:06d}.jpg").write_bytes(b"never read")
    texts = [caption(rng) for _ in range(1_000)]
    for kind in ("caption", "text"):
        for name, count in (("few", 100), ("many", num_rows)):
            with (work / f"{name}.jsonl").open("w", encoding="utf-8") as stream:
                for number in range(count):
                    found = {"id": f"row{number:09d}", "text": texts[number % 997], "lang": "en"}
                    if kind == "caption":
                        found["image"] = f"images/{number % num_pictures:06d}.jpg"
                    stream.write(json.dumps(found) + "\n")
        told = child(_BUILD, *(str(work / name) for name in ("few.jsonl", "many.jsonl", "out")), common="")
        case = f"{num_rows:,} {kind} rows, until the first group"
        rows += [
            row("build_row_bytes", case, told["bytes"] / num_rows, "bytes"),
            row("build_rows_per_s", case, num_rows / told["seconds"], "rows/s"),
            row("build_rows_per_cpu_s", case, num_rows / told["cpu"], "rows/s of CPU"),
        ]
    return rows


MEASURES: dict[str, Callable[[Path, bool], list[Row]]] = {
    "shards": measure_shards,
    "documents": measure_documents,
    "texts": measure_texts,
    "remote": measure_remote,
    "shares": measure_shares,
    "build": measure_build,
}


if __name__ == "__main__":
    run(MEASURES, __doc__)
