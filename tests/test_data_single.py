"""CLIP's pairs and the codec's sounds come from the same index, plan and loader as the decoder's documents."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from mmllm.batch import CaptionBatch, SoundBatch
from mmllm.data import commands
from mmllm.data.index import write as write_module
from mmllm.data.index.index import index_path, load_index
from mmllm.data.index.make import is_current
from mmllm.data.loading import datamodules
from mmllm.data.loading.datamodules import AudioDataModule, ClipDataModule
from mmllm.data.loading.loader import PackedLoader
from mmllm.data.loading.reader import SampleReader
from mmllm.data.plan.recipe import OnErrorConfig
from mmllm.data.plan.single import open_captions
from mmllm.data.shards.tar import scan_tar
from mmllm_tokenizers.audio import load_audio
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.text import TextTokenizer
from tests.data_fixtures import make_folder, mixed_manifest, write_manifest, write_picture

KINDS = ("caption", "audio")
ALL_MAY_FAIL = OnErrorConfig(max_fraction=1.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("single")
    make_folder(root / "tok")
    commands.build(mixed_manifest(root / "m"), root / "s", root / "tok")
    return root


def data_of(kind: str, shards: Path | str, tok: Path, **changes) -> ClipDataModule | AudioDataModule:
    spec = shards if isinstance(shards, str) else str(shards / f"{kind}-*.tar")
    if kind == "caption":
        return ClipDataModule(spec, tok, **{"batch_size": 4, "min_scale": 0.5, "flip": True, **changes})
    return AudioDataModule(spec, 8000, **{"seconds": 0.25, "batch_size": 4, "gain_db": 3.0, **changes})


def loader_of(monkeypatch, kind: str, made: Path, rank=0, world_size=1, shards=None, **changes) -> PackedLoader:
    with monkeypatch.context() as patch:
        patch.setattr(datamodules, "rank_of", lambda _: (rank, world_size))
        return data_of(kind, made / "s" if shards is None else shards, made / "tok", **changes).train_dataloader()


def rows(batch: CaptionBatch | SoundBatch) -> list[str]:
    """A hash of all that each row holds."""
    if isinstance(batch, CaptionBatch):
        columns = (batch.images_N3HW[batch.is_pair_N], batch.token_ids_NL[batch.is_pair_N])
    else:
        columns = (batch.waves_N1T,)
    count = len(columns[0])
    parts = [b"".join(column[row].numpy().tobytes() for column in columns) for row in range(count)]
    return [hashlib.sha256(part).hexdigest() for part in parts]


def steps_of(loaders: list[PackedLoader], num_epochs: int = 1) -> list[list[str]]:
    """The rows of all ranks, step by step."""
    ranks = [[rows(batch) for _ in range(num_epochs) for batch in loader] for loader in loaders]
    return [sorted(digest for share in step for digest in share) for step in zip(*ranks, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 2), (2, 0), (2, 1), (4, 0)])
def test_ranks_and_workers_change_nothing_also_after_resuming(made, monkeypatch, kind, world_size, num_workers):
    alone = loader_of(monkeypatch, kind, made)
    states, wanted = [], []
    for batch in [batch for _ in range(2) for batch in alone]:
        states.append(json.loads(json.dumps(batch.state)))
        wanted.append(sorted(rows(batch)))
    assert len({tuple(step) for step in wanted}) == len(wanted) > len(alone), "each epoch has an order of its own"
    more = {"world_size": world_size, "num_workers": num_workers}
    ranks = [loader_of(monkeypatch, kind, made, rank, **more) for rank in range(world_size)]
    assert steps_of(ranks, 2) == wanted
    assert all(rank.state_dict() == {**alone.state_dict(), "seen": rank.state_dict()["seen"]} for rank in ranks)
    middle = len(alone) + 1
    resumed = [loader_of(monkeypatch, kind, made, rank, **more) for rank in range(world_size)]
    for loader in resumed:
        loader.load_state_dict(states[middle - 1])
    assert steps_of(resumed) == wanted[middle:]


RUN = """
import json, sys, time
from pathlib import Path
from tests.test_data_single import data_of, rows
kind, root, out = sys.argv[1:]
loader = data_of(kind, Path(root) / "s", Path(root) / "tok", num_workers=1).train_dataloader()
while True:
    for batch in loader:
        partial = Path(out + ".partial")
        partial.write_text(json.dumps(loader.state_dict()))
        partial.replace(out)
        time.sleep(0.05)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_process_goes_on_exactly_on_other_ranks(made, monkeypatch, tmp_path, kind):
    state_path = tmp_path / "state.json"
    running = subprocess.Popen([sys.executable, "-c", RUN, kind, str(made), str(state_path)], start_new_session=True)
    deadline = time.monotonic() + 120
    while not (state_path.is_file() and json.loads(state_path.read_text())["step"] % 6 == 2):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    state = json.loads(state_path.read_text())
    ranks = [loader_of(monkeypatch, kind, made, rank, 2) for rank in range(2)]
    for loader in ranks:
        loader.load_state_dict(state)
    found = steps_of(ranks)
    whole = loader_of(monkeypatch, kind, made)
    wanted = [sorted(rows(batch)) for _ in range(state["step"] // len(whole) + 1) for batch in whole]
    assert found and found == wanted[state["step"] :]


def broken_shards(made: Path, folder: Path, kind: str, num_broken: int) -> Path:
    """Shards with some pictures or sounds overwritten after indexing, as by a disk that goes bad."""
    folder.mkdir(exist_ok=True)
    for shard in sorted((made / "s").glob(f"{kind}-*.tar")):
        commands.index(shard, made / "tok")
        data = bytearray(shard.read_bytes())
        for span in list(scan_tar(shard))[:num_broken]:
            (member,) = [member for member in span.members if member.ending in ("png", "flac", "wav")]
            start = member.offset + 42  # behind a header
            data[start : member.offset + member.size] = b"\0" * (member.size - 42)
        (folder / shard.name).write_bytes(bytes(data))
        os.utime(folder / shard.name, ns=(shard.stat().st_atime_ns, shard.stat().st_mtime_ns))
        (folder / index_path(shard).name).write_bytes(index_path(shard).read_bytes())
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_sample_is_masked_and_named_and_shifts_nothing(made, monkeypatch, tmp_path, caplog, kind):
    shards = broken_shards(made, tmp_path / "b", kind, 1)
    wanted = list(loader_of(monkeypatch, kind, made))
    loader = loader_of(monkeypatch, kind, made, shards=shards, on_error=ALL_MAY_FAIL)
    errors = []
    with caplog.at_level("WARNING"):
        for whole, holed in zip(wanted, loader, strict=True):
            here, there = set(rows(holed)), set(rows(whole))
            told = holed.state.get("errors", [])
            errors += told
            assert here <= there and len(there - here) <= len(told) and bool(told) == (here != there)
            assert {**whole.state, "position": 0} == {
                **{key: value for key, value in holed.state.items() if key != "errors"}, "position": 0
            }  # fmt: skip
            if isinstance(holed, CaptionBatch):
                assert len(holed.is_pair_N) == 4 and int((~holed.is_pair_N).sum()) == len(told)
                assert not holed.images_N3HW[~holed.is_pair_N].any()
            else:
                assert isinstance(holed, SoundBatch) and len(holed.waves_N1T) == len(here)
    key = "c_0" if kind == "caption" else "a_0"
    assert errors and all(f"{kind}-000000.tar:{key}-" in error for error in errors)
    assert loader.state_dict()["failed"] == len(errors)
    assert len([record for record in caplog.records if "masked" in record.getMessage()]) == len(errors)
    with pytest.raises(ValueError, match=rf"{kind}-000000.tar:{key}-"):
        list(loader_of(monkeypatch, kind, made, shards=shards, on_error=OnErrorConfig("raise")))


@pytest.mark.parametrize("kind", KINDS)
def test_more_failures_than_on_error_allows_end_the_run(made, monkeypatch, tmp_path, kind):
    shards = broken_shards(made, tmp_path / "b", kind, 12)
    loader = loader_of(monkeypatch, kind, made, shards=shards)
    with pytest.raises(ValueError, match=r"documents failed, more than on_error.max_fraction 0.001; the last: "):
        for _ in range(3):
            list(loader)
    assert loader.state_dict()["failed"] > 10
    list(loader_of(monkeypatch, kind, made, shards=broken_shards(made, tmp_path / "c", kind, 1)))


@pytest.mark.parametrize("kind", KINDS)
def test_remote_shards_give_the_same_batches(made, monkeypatch, tmp_path, kind):
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    for path in (made / "s").glob(f"{kind}-*.tar"):
        system.pipe_file(f"/single/{path.name}", path.read_bytes())
    remote = loader_of(monkeypatch, kind, made, shards=f"memory://single/{kind}-*.tar")
    assert steps_of([remote]) == steps_of([loader_of(monkeypatch, kind, made)])


@pytest.mark.parametrize("kind", KINDS)
def test_any_tokenizers_index_serves_and_changes_nothing(made, monkeypatch, tmp_path, kind):
    shards = tmp_path / "s"
    shards.mkdir()
    for path in (made / "s").glob(f"{kind}-*.tar"):
        (shards / path.name).write_bytes(path.read_bytes())
    shard = shards / f"{kind}-000000.tar"
    loader = loader_of(monkeypatch, kind, made, shards=shards)
    first = [rows(batch) for batch in loader]
    state, made_with = loader.state_dict(), load_index(shard, None).arrays.info["tokenizer"]
    bytes_only = TokenizerFolder(TextTokenizer.train((), 270))
    assert made_with == (bytes_only if kind == "audio" else TokenizerFolder.load(made / "tok")).hash
    other = TokenizerFolder(TextTokenizer.train(["another text"], 280), TokenizerFolder.load(made / "tok").audio)
    other.save(tmp_path / "other")
    commands.index(shards, tmp_path / "other")
    assert is_current(shard, other.hash) and not is_current(shard, made_with)
    again = loader_of(monkeypatch, kind, made, shards=shards)
    assert [rows(batch) for batch in again] == first
    assert is_current(shard, other.hash), "it is left alone"
    again.load_state_dict(state)
    shard.write_bytes(b"".join(path.read_bytes() for path in [made / "s" / shard.name])[:-1024])  # built again
    assert list(loader_of(monkeypatch, kind, made, shards=shards)), "an index that is out of date is made anew"


def test_filters_are_those_of_recipes(made, monkeypatch):
    found = loader_of(monkeypatch, "audio", made, filter="speaker == 'ann'", texts=True)
    assert len(found) == 3
    with pytest.raises(ValueError, match=r"reads 'speakr', which no document has; known are .*speaker"):
        loader_of(monkeypatch, "audio", made, filter="speakr == 'ann'")
    with pytest.raises(ValueError, match=r"reads 'num_tokens', which depends on the tokenizer"):
        loader_of(monkeypatch, "caption", made, filter="num_tokens < 9")
    with pytest.raises(ValueError, match="holds audio samples, not caption"):
        loader_of(monkeypatch, "caption", made, shards=str(made / "s" / "audio-*.tar"))
    with pytest.raises(ValueError, match="24 documents, too few for 32 ranks"):
        loader_of(monkeypatch, "caption", made, 0, 32, batch_size=32)
    with pytest.raises(ValueError, match="batch_size is 4 sequences, which 3 ranks can't share"):
        loader_of(monkeypatch, "caption", made, 0, 3)


def test_a_crop_is_part_of_its_row_as_decoded_clip_by_clip(made):
    data = data_of("audio", made / "s", made / "tok", gain_db=0.0)
    plan, dataset = data._plan(data._shards, True, 1), data._dataset(data._plan(data._shards, True, 1), True)
    read, num_filled = SampleReader(plan, None), 0
    for step in (plan.at(number) for number in range(12)):
        for row, wave_T in zip(step.sequences, dataset[step].waves_N1T[:, 0].numpy(), strict=True):
            sounds = [load_audio(read(item).audio)[0][0].numpy() for item in row]
            assert sum(map(len, sounds[:-1])) < 2000 <= sum(map(len, sounds))
            whole = np.concatenate(sounds)
            windows = np.lib.stride_tricks.sliding_window_view(whole, 2000)
            assert np.abs(windows - wave_T).max(axis=1).min() < 1e-4
            num_filled += len(row) > 1
    assert 0 < num_filled < 48
    first = [row[0].row for number in range(6) for row in plan.at(number).sequences]
    assert sorted(first) == list(range(24)), "each clip once an epoch"


def test_validation_is_in_the_shards_order_and_ends_with_what_is_left(made):
    changes = {"val_shards": str(made / "s" / "audio-*.tar"), "seconds": 0.4, "texts": True, "batch_size": 7}
    loader = data_of("audio", made / "s", made / "tok", **changes).val_dataloader()
    for _ in range(2):
        batches = list(loader)
        assert [len(batch.waves_N1T) for batch in batches] == [7, 7, 7, 3]
        rows_ = [json.loads(line) for line in (made / "m" / "manifest.jsonl").read_text().splitlines()]
        assert [text for batch in batches for text in batch.texts] == [r["text"] for r in rows_ if "audio" in r]


def test_few_captions_make_smaller_steps_that_ranks_share(tmp_path, monkeypatch):
    make_folder(tmp_path / "tok")
    write_picture(tmp_path / "a.png", np.random.default_rng(0))
    path = write_manifest(tmp_path, [{"id": str(n), "image": "a.png", "text": f"one {n}"} for n in range(9)])
    commands.build(path, tmp_path / "s")
    wanted = steps_of([loader_of(monkeypatch, "caption", tmp_path, batch_size=32)], 3)
    ranks = [loader_of(monkeypatch, "caption", tmp_path, rank, 4, batch_size=32) for rank in range(4)]
    assert steps_of(ranks, 3) == wanted and [len(set(step)) for step in wanted] == [9, 9, 9]
    data = data_of("caption", tmp_path / "s", tmp_path / "tok", batch_size=32)
    plan = data._plan(data._shards, True, 1)
    orders = [[item.row for row in plan.at(epoch).sequences for item in row] for epoch in range(3)]
    assert all(sorted(order) == list(range(9)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3, "each epoch is shuffled anew"


def test_captions_of_large_sources_are_spread_within_blocks_of_shards(made, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    write_picture(tmp_path / "a.png", rng)
    texts = [f"one {n % 5}" for n in range(40)]
    path = write_manifest(tmp_path, [{"id": str(n), "image": "a.png", "text": text} for n, text in enumerate(texts)])
    commands.build(path, tmp_path / "s", samples_per_shard=10)
    folder = TokenizerFolder.load(made / "tok")
    monkeypatch.setattr("mmllm.data.plan.source.BLOCK_ITEMS", 20)
    _, source = open_captions(str(tmp_path / "s" / "*.tar"), None, 3, OnErrorConfig(), folder)
    orders = [source.upcoming(epoch * 40, 40, None, None).items[:40] for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(40))
        assert all(len({texts[number] for number in order[start : start + 5]}) == 5 for start in range(0, 40, 5))
    assert len({tuple(order.tolist()) for order in orders}) == 3


def test_an_index_that_knows_no_equal_captions_is_named_and_made_anew(made, tmp_path, monkeypatch):
    shard = tmp_path / "caption-000000.tar"
    shard.write_bytes((made / "s" / shard.name).read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(write_module, "DIGESTS", "not.yet")
        commands.index(shard, made / "tok")
    with pytest.raises(ValueError, match=r"which captions are equal; run 'mmllm data index' again"):
        loader_of(monkeypatch, "caption", made, shards=str(shard))
    commands.index(shard, made / "tok")
    assert len(loader_of(monkeypatch, "caption", made, shards=str(shard))) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_workers_get_no_plan(made, kind):
    data = data_of(kind, made / "s", made / "tok")
    plan = data._plan(data._shards, True, 1)
    loaded = pickle.loads(pickle.dumps(data._dataset(plan, True)))
    (source,) = loaded.__dict__["_pairs" if kind == "caption" else "_sounds"]._plan.sources
    assert source.num_items == 0 and getattr(source, "_caption_M", None) is None
    step = plan.at(3)
    assert rows(loaded[step]) == rows(data._dataset(plan, True)[step])
    assert torch.is_tensor(next(iter(vars(loaded[step]).values())))
