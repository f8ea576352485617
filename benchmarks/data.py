"""What the data engine reaches, with peers in the same run: `python benchmarks/data.py [--json F] [--quick]`.

Everything is made on the spot from seeds; where `MMLLM_DATA` names the folder of real sets, their lengths are drawn
from too. Timings take turns with their peers and are medians; nothing else should run on the machine. `--quick` takes
small sizes, to see that all of it works: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import io
import json
import mmap
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from data_peers import IMAGE_TOKENS, energon_pipeline, webdataset_pipeline
from PIL import Image

from mmllm.data import commands
from mmllm.data.executors.parallel import in_chunks
from mmllm.data.index.count import TokenCounts, count_tokens
from mmllm.data.index.index import ShardIndex, load_index
from mmllm.data.index.scan import Scan, scan_shard
from mmllm.data.index.write import save_index
from mmllm.data.loading.ahead import Ahead
from mmllm.data.loading.loader import PackedLoader, StepDataset, has_next_window
from mmllm.data.plan.best_fit import best_fit_decreasing, pack_window
from mmllm.data.plan.plan import Plan, Source, StepPlan, open_plan
from mmllm.data.plan.recipe import Recipe, recipe_from_dict
from mmllm.data.samples.decode import ImageTransform
from mmllm.data.shards.files import stamp_of
from mmllm_tokenizers.folder import TokenizerConfig, TokenizerFolder
from mmllm_tokenizers.text import TextTokenizer

_TEXT = (
    "a the of red blue green small large old new house tree dog cat child street river mountain sky window table two "
    "three beside above under holds walks stands looks photo picture light dark morning evening water stone paper"
)
WORDS = _TEXT.split()
SEEDS = range(10)
WINDOW = 4096

Row = dict[str, Any]


def row(
    measure: str, case: str, value: float, unit: str, peer: str | None = None, peer_value: float | None = None
) -> Row:
    """One line of the result."""
    ratio = value / peer_value if peer_value else None
    return {
        "measure": measure, "case": case, "value": value, "unit": unit, "peer": peer, "peer_value": peer_value,
        "ratio": ratio,
    }  # fmt: skip


def alternate(functions: list[Callable[[], int]], rounds: int) -> list[float]:
    """Items a second of each function, the median of rounds in which they take turns."""
    rates: list[list[float]] = [[] for _ in functions]
    for turn in range(rounds):
        order = range(len(functions)) if turn % 2 == 0 else reversed(range(len(functions)))
        for number in order:
            began = time.perf_counter()
            count = functions[number]()
            rates[number].append(count / (time.perf_counter() - began))
    return [statistics.median(values) for values in rates]


# --- what is measured on ------------------------------------------------------------------------------------------


def caption(rng: np.random.Generator) -> str:
    """A caption of 4 to 24 words."""
    return " ".join(rng.choice(WORDS, size=int(rng.integers(4, 25))))


def jpeg(rng: np.random.Generator, width: int = 500, height: int = 375) -> bytes:
    """A picture with large shapes and some noise, as photographs have."""
    rough = rng.integers(0, 255, (height // 32 + 1, width // 32 + 1, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noisy).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def tokenizer(path: Path) -> TokenizerFolder:
    """A text tokenizer trained on the words, and 144 slots a picture."""
    rng = np.random.default_rng(0)
    text = TextTokenizer.train([caption(rng) for _ in range(500)], vocab_size=600)
    folder = TokenizerFolder(text, None, TokenizerConfig(image_tokens=IMAGE_TOKENS, image_size=224))
    folder.save(path)
    return folder


def write_tar(path: Path, samples: Iterator[dict[str, bytes]]) -> None:
    """A shard by `tarfile`, as anybody would write one."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, files in enumerate(samples):
            for ending, data in files.items():
                member = tarfile.TarInfo(f"{number:08d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def caption_shards(work: Path, count: int) -> tuple[Path, Recipe]:
    """A shard of pictures of 500 x 375, indexed, and its recipe."""
    rng = np.random.default_rng(1)
    shard = work / "photos.tar"
    pictures = [jpeg(rng) for _ in range(min(count, 64))]  # reading and decoding don't know that they come again
    write_tar(shard, ({"jpg": pictures[n % len(pictures)], "txt": caption(rng).encode()} for n in range(count)))
    commands.index(shard, work / "tok")
    source = {"name": "photos", "kind": "caption", "shards": str(shard)}
    packing = {"window": count}  # a window that is planned is also read
    recipe = {"tokenizer": str(work / "tok"), "sequence_length": 2048, "sources": [source], "packing": packing}
    return shard, recipe_from_dict(recipe)


# --- decoding, against doing nothing else and against others ------------------------------------------------------


def measure_decoding(work: Path, quick: bool) -> list[Row]:
    """Pictures a second: read, decode, resize, tokenize and pack, one core."""
    count = 48 if quick else 512
    folder = tokenizer(work / "tok")
    shard, recipe = caption_shards(work, count)
    transform = ImageTransform(224)
    with tarfile.open(shard) as tar:
        stored = [tar.extractfile(member).read() for member in tar if member.name.endswith("jpg")]  # pyright: ignore

    def alone() -> int:
        for data in stored:
            transform(data)
        return len(stored)

    plan = open_plan(recipe, 4, folder)

    def ours() -> int:
        loader = PackedLoader(plan, StepDataset(plan, folder, transform), 10**9)
        done = 0
        for batch in loader:
            done += len(batch.images_NCHW)
            if done >= count:
                break
        return done

    peers = {"webdataset": webdataset_pipeline(shard, folder, None, count)}
    peers["webdataset with our decoder"] = webdataset_pipeline(shard, folder, transform, count)
    try:
        peers["megatron-energon"] = energon_pipeline(shard, folder, count)
    except ModuleNotFoundError as error:
        if error.name not in ("megatron", "megatron.energon"):  # something that it needs
            raise
        print("megatron-energon isn't installed and is left out", file=sys.stderr)
    rates = alternate([ours, alone, *peers.values()], 2 if quick else 15)
    rows = [
        row("decode, tokenize and pack", "JPEG 500x375 to 224", rates[0], "images/s", "decode and resize", rates[1])
    ]
    for name, rate in zip(peers, rates[2:], strict=True):
        rows.append(row("against other pipelines", "JPEG 500x375 to 224", rates[0], "images/s", name, rate))
    return rows


# --- packing, shares, planning ------------------------------------------------------------------------------------


def lognormal(median: float, sigma: float) -> Callable[[np.random.Generator, int], np.ndarray]:
    """Lengths of exp(N(log median, sigma)), at least 1."""
    return lambda rng, count: np.exp(rng.normal(np.log(median), sigma, count)).astype(np.int64) + 1


def captions(rng: np.random.Generator, count: int) -> np.ndarray:
    """144 slots and a caption of median 30 tokens."""
    return IMAGE_TOKENS + lognormal(30, 0.7)(rng, count)


def mixed(rng: np.random.Generator, count: int) -> np.ndarray:
    """Half captions; the others interleaved (median 900), texts (600) and speech (200)."""
    kind = rng.choice(4, count, p=[0.5, 0.2, 0.1, 0.2])
    draws = [captions(rng, count), *(lognormal(*of)(rng, count) for of in ((900, 0.8), (600, 1.0), (200, 0.5)))]
    return np.choose(kind, draws)


def real_lengths() -> dict[str, np.ndarray]:
    """About how many tokens the rows of the four real sets have (a token is four bytes; 144 slots, 50 frames/s)."""
    if "MMLLM_DATA" not in os.environ:
        return {}
    lengths = {}
    for name, slots in (("cifar10", IMAGE_TOKENS), ("emoji", IMAGE_TOKENS), ("shakespeare", 0), ("fsdd", 25)):
        lines = (Path(os.environ["MMLLM_DATA"]) / name / "manifest.jsonl").read_text().splitlines()
        lengths[name] = np.array([slots + 2 + len(json.loads(line)["text"]) // 4 for line in lines])
    return lengths


def fill(draw: Callable[[np.random.Generator, int], np.ndarray], length: int, plain: bool = False) -> float:
    """Mean share of positions that are filled, of one window for each of ten seeds."""
    shares = []
    for seed in SEEDS:
        tokens = np.minimum(draw(np.random.default_rng(seed), WINDOW), length)
        bins, count = (best_fit_decreasing(tokens, length), len(tokens)) if plain else pack_window(tokens, length)
        shares.append(tokens[:count].sum() / (len(bins) * length))
    return float(np.mean(shares))


def measure_packing(work: Path, quick: bool) -> list[Row]:
    """How full sequences are."""
    rows = []
    cases = [("mixed 2048", mixed, 2048), ("mixed 8192", mixed, 8192), ("captions 2048", captions, 2048)]
    real = real_lengths()
    if real:
        four = np.array([0.3, 0.2, 0.2, 0.3])

        def of_real(rng: np.random.Generator, count: int) -> np.ndarray:
            sets = rng.choice(4, count, p=four)
            return np.choose(sets, [rng.choice(lengths, count) for lengths in real.values()])

        cases += [("four real sets 2048", of_real, 2048), ("four real sets 8192", of_real, 8192)]
    for name, draw, length in cases:
        plain = fill(draw, length, plain=True)
        rows.append(row("packing", name, fill(draw, length), "filled", "best-fit-decreasing alone", plain))
    return rows


def costly(rng: np.random.Generator, captioned: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, pictures and heard frames of a window: a share of captions, else as `mixed`."""
    rest = 1 - captioned
    kind = rng.choice(4, WINDOW, p=[captioned, 0.4 * rest, 0.2 * rest, 0.4 * rest])
    draws = [captions(rng, WINDOW), *(lognormal(*of)(rng, WINDOW) for of in ((900, 0.8), (600, 1.0), (200, 0.5)))]
    pictures = np.where(kind == 0, 1, np.where(kind == 1, 1 + np.minimum(7, rng.poisson(1.5, WINDOW)), 0))
    frames = np.where(kind == 3, lognormal(300, 0.6)(rng, WINDOW), 0)
    return np.choose(kind, draws), pictures, frames


def measure_budgets(work: Path, quick: bool) -> list[Row]:
    """Documents packed a second under budgets of which a sequence full of tokens would want a third more."""
    rows = []
    for length in (2048, 8192):
        for name, captioned in (("captions", 0.9), ("mixed", 0.5)):
            for wanted in ("pictures", "frames", "pictures and frames"):
                rates = []
                for seed in SEEDS:
                    tokens, pictures, frames = costly(np.random.default_rng(seed), captioned)
                    tokens, num_full = np.minimum(tokens, length), tokens.sum() / length
                    budgets = [
                        (values, max(int(values.max()), int(0.75 * values.sum() / num_full)))
                        for kind, values in (("pictures", pictures), ("frames", frames))
                        if kind in wanted
                    ]
                    began = time.perf_counter()
                    pack_window(tokens, length, budgets, seed)
                    rates.append(WINDOW / (time.perf_counter() - began))
                rows.append(
                    row("packing within budgets", f"{name} {length}, {wanted}", statistics.median(rates), "documents/s")
                )
    return rows


def planned(work: Path, draws: dict[str, Callable], shares: list[float], count: int) -> Plan:
    """A plan over documents that exist only as indices."""
    folder, sources, indices = tokenizer(work / "tok"), [], []
    for number, (name, draw) in enumerate(draws.items()):
        tokens = np.minimum(draw(np.random.default_rng(number), count), 2048)
        indices.append(empty_index(work / f"{name}.tar", tokens, folder))
        sources.append({"name": name, "kind": "caption", "shards": "x", "weight": shares[number]})
    recipe = recipe_from_dict({"tokenizer": "x", "sequence_length": 2048, "sources": sources})
    opened = [Source(c, n, [i], recipe) for n, (c, i) in enumerate(zip(recipe.sources, indices, strict=True))]
    return Plan(recipe, opened, 8, "x")


def empty_index(shard: Path, tokens: np.ndarray, folder: TokenizerFolder) -> ShardIndex:
    """The index of a shard of captions that isn't there."""
    count = len(tokens)
    shard.touch()
    found = Scan(str(shard), "caption", [f"{shard.stem}-{key}" for key in range(count)])
    found.starts, found.spans, found.lines = [0] * count, [0] * count, [-1] * count
    found.pictures, found.sounds, found.metadata = [[(64, 64)]] * count, [[]] * count, [{}] * count
    save_index(
        shard, stamp_of(shard.stat()), "0" * 64, found, TokenCounts({"caption": tokens}, np.full(count, np.nan)), folder
    )
    return load_index(shard, folder.hash)


def measure_planning(work: Path, quick: bool) -> list[Row]:
    """Documents planned a second, and the shares of tokens after 1,000 sequences."""
    count = 20_000 if quick else 400_000
    rows = []
    several = {"captions": captions, "web": lognormal(900, 0.8), "text": lognormal(600, 1.0)}
    for name, draws, shares in (("mixed", several, [0.45, 0.45, 0.1]), ("captions", {"captions": captions}, [1.0])):
        rates = []
        for _ in range(3):
            plan, done, began = planned(work, draws, shares, count), 0, time.perf_counter()
            for step in plan.steps():
                done += sum(len(sequence) for sequence in step.sequences)
                if done >= count:
                    break
            rates.append(done / (time.perf_counter() - began))
        rows.append(row("planning", name, statistics.median(rates), "documents/s"))
    plan = planned(work, several, [0.45, 0.45, 0.1], count)
    tokens = np.zeros(3)
    for step in islice(plan.steps(), 125):
        for sequence in step.sequences:
            for item in sequence:
                tokens[item.source] += item.num_tokens
    off = 100 * np.abs(tokens / tokens.sum() - plan.recipe.shares()).max()
    return [*rows, row("shares of tokens after 1,000 sequences", ".45/.45/.10", float(off), "points off")]


def longest_wait(steps: Iterator[StepPlan], count: int, seconds: float) -> float:
    """The longest wait for one of `count` steps, the first apart, in ms; each is followed by so much work of torch."""
    waits = []
    values = torch.randn(256, 256)
    for _ in range(count + 1):
        began = time.perf_counter()
        next(steps)
        waits.append(time.perf_counter() - began)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            values = torch.tanh(values @ values)
    return 1000 * max(waits[1:])


def measure_waiting(work: Path, quick: bool) -> list[Row]:
    """How long a step waits for its plan, with windows planned in a thread and in `next()`."""
    count, seconds = (50, 0.002) if quick else (400, 0.01)
    several = {"captions": captions, "web": lognormal(900, 0.8), "text": lognormal(600, 1.0)}
    longest: list[list[float]] = [[], []]
    for _ in range(1 if quick else 5):
        steps = [planned(work, several, [0.45, 0.45, 0.1], 20_000 if quick else 200_000).steps() for _ in range(2)]
        longest[1].append(longest_wait(steps[1], count, seconds))
        with Ahead(steps[0], has_next_window) as ahead:
            longest[0].append(longest_wait(ahead, count, seconds))
    ours, in_next = (statistics.median(values) for values in longest)
    return [row("longest wait for a step's plan", f"steps of {1000 * seconds:g} ms", ours, "ms", "in next()", in_next)]


# --- resume, memory, index ----------------------------------------------------------------------------------------

_RESUME = """
import json, sys, time
from pathlib import Path
import psutil
from mmllm.data.samples.decode import ImageTransform
from mmllm.data.loading.ahead import Ahead
from mmllm.data.loading.loader import PackedLoader, StepDataset, has_next_window
from mmllm.data.plan.plan import open_plan
from mmllm.data.plan.recipe import load_recipe
from mmllm_tokenizers.folder import TokenizerFolder
recipe, state = load_recipe(sys.argv[1]), json.loads(sys.argv[2])
folder = TokenizerFolder.load(recipe.tokenizer_folder())
plan, transform = open_plan(recipe, 4, folder), ImageTransform(224)
began = time.perf_counter()
loader = PackedLoader(plan, StepDataset(plan, folder, transform, hashes=True), 10**6)
loader.load_state_dict(state)
batches = iter(loader)
hashes = next(batches).state["hashes"]
seconds, whole = time.perf_counter() - began, time.time() - psutil.Process().create_time()
for _ in range(int(sys.argv[3]) - 1):
    hashes += next(batches).state["hashes"]
print(json.dumps({"seconds": seconds, "whole": whole, "hashes": hashes}))
"""


def text_recipe(work: Path, count: int) -> Path:
    """Indexed texts and small pictures, and their recipe."""
    rng = np.random.default_rng(2)
    pictures = [jpeg(rng, 64, 48) for _ in range(16)]
    write_tar(work / "texts.tar", ({"txt": " ".join(caption(rng) for _ in range(9)).encode()} for _ in range(count)))
    write_tar(work / "small.tar", ({"jpg": pictures[n % 16], "txt": caption(rng).encode()} for n in range(count)))
    commands.index([str(work / "texts.tar"), str(work / "small.tar")], work / "tok")
    path = work / "texts.json"  # JSON is YAML
    sources = [
        {"name": "texts", "kind": "text", "shards": str(work / "texts.tar"), "weight": 0.9},
        {"name": "small", "kind": "caption", "shards": str(work / "small.tar"), "weight": 0.1},
    ]
    path.write_text(json.dumps({"tokenizer": str(work / "tok"), "sequence_length": 512, "sources": sources}))
    return path


def measure_resume(work: Path, quick: bool) -> list[Row]:
    """A fresh process goes on from a state."""
    tokenizer(work / "tok")
    path = text_recipe(work, 2_000 if quick else 20_000)
    plan = open_plan(recipe_from_dict(json.loads(path.read_text())), 4)
    stop, more = 137, 20
    steps = list(islice(plan.steps(), stop + more))
    state = {**steps[stop - 1].state, "position": stop}
    command = [sys.executable, "-W", "ignore", "-c", _RESUME, str(path), json.dumps(state), str(more)]
    found = [json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout) for _ in range(3)]
    wanted = [plan.sequence_hash(sequence) for step in steps[stop:] for sequence in step.sequences]
    wrong = sum(a != b for item in found for a, b in zip(item["hashes"], wanted, strict=True))
    return [
        row("resume", "first batch in a fresh process, index opened", found[1]["seconds"], "s"),
        row("resume", "first batch since the process started, imports and index too", found[1]["whole"], "s"),
        row("resume", "state", len(json.dumps(state)), "bytes"),
        row("resume", "sequences lost or repeated", wrong, "sequences"),
    ]


def measure_memory(work: Path, quick: bool) -> list[Row]:
    """How far resident memory moves over 10,000 steps."""
    folder = tokenizer(work / "tok")
    path = text_recipe(work, 500 if quick else 4_000)
    plan = open_plan(recipe_from_dict(json.loads(path.read_text())), 1, folder)
    num_steps = 120 if quick else 10_000
    loader = PackedLoader(plan, StepDataset(plan, folder, ImageTransform(32)), num_steps)
    process, resident = psutil.Process(), []
    for number, _ in enumerate(loader):
        if number >= num_steps // 10 and number % max(1, num_steps // 200) == 0:
            resident.append(process.memory_info().rss)
    tenth = max(1, len(resident) // 10)
    first, last = statistics.mean(resident[:tenth]), statistics.mean(resident[-tenth:])
    drift = 100 * (last - first) / first
    return [row("resident memory", f"{num_steps} steps, the first tenth apart", drift, "% more")]


def scan(shards: Sequence[Path], folder: TokenizerFolder) -> int:
    """Indexes shards without counting tokens, as `index_shard` does otherwise."""
    done = 0
    for shard in shards:
        with shard.open("rb") as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        found = scan_shard(data, str(shard), folder)
        ones = TokenCounts({"caption": np.ones(len(found), dtype=np.int64)}, np.full(len(found), np.nan))
        save_index(shard, stamp_of(shard.stat()), "0" * 64, found, ones, folder)
        done += load_index(shard, folder.hash).num_documents
    return done


def measure_index(work: Path, quick: bool) -> list[Row]:
    """Samples indexed a second, tokenizing apart: by one process, and by one a core; rows that say their sizes or not.

    Of shards that were built here the digest is known. Of others it is computed, which takes the time to read them.
    """
    folder, count = tokenizer(work / "tok"), 1_000 if quick else 20_000
    rng, cores = np.random.default_rng(3), len(os.sched_getaffinity(0))
    picture = jpeg(rng, 64, 48)

    def shard(name: str, count: int, **known: int) -> Path:
        samples = (
            {
                "jpg": picture, "txt": caption(rng).encode(),
                "json": json.dumps({**known, "score": n / 7, "lang": "en"}).encode(),
            }
            for n in range(count)
        )  # fmt: skip
        write_tar(work / name, samples)
        return work / name

    shards = [shard(f"many{number}.tar", count, width=64, height=48) for number in range(2 * cores)]
    unknown = [shard(f"unknown{number}.tar", count // 4) for number in range(2 * cores)]

    def by_workers(workers: int, shards: Sequence[Path] = shards) -> int:
        return sum(done for _, done in in_chunks(partial(scan, folder=folder), shards, 1, workers))

    def tokenize() -> int:
        found = scan_shard(shards[0].read_bytes(), str(shards[0]), folder)
        began = time.perf_counter()
        count_tokens(found, folder)
        seconds.append(time.perf_counter() - began)
        return len(found)

    def by_tarfile() -> int:
        with tarfile.open(shards[0]) as tar:
            return sum(1 for _ in tar) // 3

    seconds: list[float] = []
    one, all_cores, measured, peer = alternate(
        [lambda: by_workers(0), lambda: by_workers(cores), lambda: by_workers(cores, unknown), by_tarfile],
        2 if quick else 5,
    )
    tokenize()
    return [
        row("index build", f"headers and small files, {cores} workers", all_cores, "samples/s"),
        row("index build", f"pictures measured too, {cores} workers", measured, "samples/s"),
        row("index build", "headers and small files, one process", one, "samples/s", "tarfile, headers alone", peer),
        row("index build", "tokenizing", count / seconds[0], "samples/s"),
    ]


MEASURES: dict[str, Callable[[Path, bool], list[Row]]] = {
    "decoding": measure_decoding,
    "packing": measure_packing,
    "budgets": measure_budgets,
    "planning": measure_planning,
    "waiting": measure_waiting,
    "resume": measure_resume,
    "memory": measure_memory,
    "index": measure_index,
}


def table(rows: list[Row]) -> str:
    """The rows as text."""
    lines = [("measure", "case", "value", "unit", "peer", "its value", "ratio")]
    for item in rows:
        numbers = [item["value"], item["peer_value"], item["ratio"]]
        value, peer_value, ratio = ("" if number is None else f"{number:,.4g}" for number in numbers)
        lines.append((item["measure"], item["case"], value, item["unit"], item["peer"] or "", peer_value, ratio))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def run(measures: dict[str, Callable[[Path, bool], list[Row]]], description: str | None) -> None:
    """Measures what the command line asks for, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--json", metavar="FILE", help="also write the rows here")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--only", action="append", choices=list(measures), help="may be repeated")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name in args.only or measures:
        print(f"{name} …", file=sys.stderr)
        with tempfile.TemporaryDirectory() as work:
            rows += measures[name](Path(work), args.quick)
    print(table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    run(MEASURES, __doc__)
