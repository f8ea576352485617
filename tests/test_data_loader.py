from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

import lightning as L
import numpy as np
import pytest
import torch
import yaml

from mmllm.batch import IGNORE, PackedBatch
from mmllm.cli.main import main
from mmllm.data import commands
from mmllm.data.index import count
from mmllm.data.index.index import index_path
from mmllm.data.loading import datamodules
from mmllm.data.loading import loader as loader_module
from mmllm.data.loading.augment import AugmentConfig
from mmllm.data.loading.balance import FRAME_COST, IMAGE_COST
from mmllm.data.loading.datamodules import AudioDataModule, ClipDataModule, PackedDataModule
from mmllm.data.loading.loader import PackedLoader, StepDataset
from mmllm.data.loading.reader import SampleReader
from mmllm.data.plan.plan import open_plan
from mmllm.data.plan.recipe import recipe_from_dict
from mmllm.data.samples.decode import ImageTransform
from mmllm.data.samples.document import Document
from mmllm.data.samples.documents import build_document
from mmllm.data.shards.tar import scan_tar
from mmllm_tokenizers.folder import TokenizerFolder
from tests.data_fixtures import (
    WORDS,
    make_folder,
    mixed_manifest,
    recipe_dict,
    write_manifest,
    write_picture,
    write_tar,
)
from tests.data_ranks import rows


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("loader")
    make_folder(root / "tok")
    commands.build(mixed_manifest(root / "m"), root / "s", root / "tok")
    commands.index(root / "s", root / "tok")
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe_dict(root / "s", root / "tok")))
    return root


def loader_of(root, num_steps=12, rank=0, world_size=1, num_workers=0, recipe=None, batch_size=4) -> PackedLoader:
    folder = TokenizerFolder.load(root / "tok")
    plan = open_plan(recipe_from_dict(recipe or recipe_dict(root / "s", root / "tok")), batch_size, folder)
    dataset = StepDataset(plan, folder, ImageTransform(folder.image_size))
    return PackedLoader(plan, dataset, num_steps, rank, world_size, num_workers)


def together(ranks: list[list]) -> list[list[str]]:
    """The sequences of all ranks, step by step: which rank takes which is the loader's affair."""
    return [sorted(digest for batch in step for digest in rows(batch)) for step in zip(*ranks, strict=True)]


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 1), (1, 2), (2, 0), (2, 2), (4, 0)])
def test_ranks_and_workers_change_nothing(made, world_size, num_workers):
    wanted = together([list(loader_of(made, 6))])
    ranks = [list(loader_of(made, 6, rank, world_size, num_workers)) for rank in range(world_size)]
    found = together(ranks)
    assert found == wanted
    states = [{key: value for key, value in step[0].state.items()} for step in zip(*ranks)]  # noqa: B905
    assert states == [batch.state for batch in loader_of(made, 6)]


@pytest.mark.parametrize("long_bytes", [8192, 10**9])
def test_pictures_stay_in_order_and_of_a_split_text_no_part_is_written_twice(tmp_path, monkeypatch, long_bytes):
    rng = np.random.default_rng(0)
    folder = make_folder(tmp_path / "tok")
    for name in "abcd":
        write_picture(tmp_path / f"{name}.png", rng)
    documents = [
        {"id": "pictures", "segments": [{"image": f"{name}.png"} for name in "abcd"]},
        {"id": "long", "text": " ".join(rng.choice(WORDS, 3000))},
    ]
    commands.build(write_manifest(tmp_path, documents), tmp_path / "s")
    monkeypatch.setattr(count, "LONG_BYTES", long_bytes)
    commands.index(tmp_path / "s", tmp_path / "tok")
    sources = [{"name": kind, "kind": kind, "shards": f"{tmp_path}/s/{kind}*.tar"} for kind in ("interleaved", "text")]
    recipe = {"tokenizer": str(tmp_path / "tok"), "sequence_length": 256, "sources": sources}
    recipe["packing"] = {"window": 64, "long_documents": "split"}
    built = []
    monkeypatch.setattr(loader_module, "build_document", lambda *args: built.append(args[1]) or build_document(*args))
    (batch,) = loader_of(tmp_path, 1, recipe=recipe, batch_size=16)
    wanted = np.stack([ImageTransform(folder.image_size)(str(tmp_path / f"{name}.png")) for name in "abcd"])
    assert len(batch.images_NCHW) and len(batch.images_NCHW) % 4 == 0
    for start in range(0, len(batch.images_NCHW), 4):
        assert np.array_equal(batch.images_NCHW[start : start + 4].numpy(), wanted)
    num_texts = int((batch.source_BT == 1).any(dim=1).sum())
    assert num_texts > 2 and sorted(built) == (["interleaved", "text"] if long_bytes > 10**6 else ["interleaved"])


TEXTS = {
    "words": lambda rng: " ".join(rng.choice(WORDS, 6000)),
    "scripts": lambda rng: "".join(rng.choice(list("añ漢字🙂 \n\t'sé\u2028 "), 9000)),
    "one word": lambda rng: "x" * 9000,
    "spaces": lambda rng: " " * 9000 + "end",
}


@pytest.mark.parametrize("form", ["txt", "jsonl"])
@pytest.mark.parametrize("made_of", list(TEXTS))
def test_parts_of_long_texts_are_those_of_the_whole(tmp_path, monkeypatch, made_of, form):
    folder = make_folder(tmp_path / "tok")
    texts = ["short", TEXTS[made_of](np.random.default_rng(0)), "short too"]
    if form == "txt":
        files = {f"{number}.txt": text.encode() for number, text in enumerate(texts)}
    else:
        files = {"all.jsonl": "\n".join(json.dumps({"text": text}) for text in texts).encode()}
    write_tar(tmp_path / "t.tar", files)
    commands.index(tmp_path / "t.tar", tmp_path / "tok")
    recipe = {"tokenizer": str(tmp_path / "tok"), "sequence_length": 100}
    template = {"text": {"prompt": "<|text|> of old:", "target": "{text} so it ends<|end|>"}}
    for source in ({}, {"templates": template}):
        sources = [{"name": "t", "kind": "text", "shards": str(tmp_path / "t.tar"), **source}]
        plan = open_plan(recipe_from_dict({**recipe, "sources": sources}), 1, folder)
        dataset, read = StepDataset(plan, folder, ImageTransform(16)), SampleReader(plan, None)
        items = [item for item in plan.sources[0].items(np.arange(plan.sources[0].num_items)) if item.part >= 0]
        whole = build_document(read(items[0]), "text", folder, None, source.get("templates", {}).get("text"))
        assert len(items) > 10 and sum(item.num_tokens - 1 for item in items) == whole.num_tokens - 1
        monkeypatch.setattr(loader_module, "build_document", lambda *args: pytest.fail("the whole is not built"))
        if made_of in ("one word", "spaces"):
            monkeypatch.undo()  # it can't be cut
        for item in items:
            errors: list[str] = []
            part, start = dataset.document(item, errors), item.part * 99
            assert isinstance(part, Document) and not errors
            wanted = whole.part(start, start + item.num_tokens)
            for name in ("token_ids_T", "targets_T", "modality_T", "codes_TK"):
                assert np.array_equal(getattr(part, name), getattr(wanted, name)), name
        monkeypatch.undo()


def test_a_long_text_that_changed_is_masked(tmp_path):
    folder = make_folder(tmp_path / "tok")
    text = " ".join(np.random.default_rng(0).choice(WORDS, 6000))
    shard = write_tar(tmp_path / "t.tar", {"a.txt": text.encode()})
    told = shard.stat()
    commands.index(shard, tmp_path / "tok")
    source = {"name": "t", "kind": "text", "shards": str(shard)}
    recipe = {"tokenizer": str(tmp_path / "tok"), "sequence_length": 100, "sources": [source]}
    plan = open_plan(recipe_from_dict(recipe), 1, folder)
    data = bytearray(shard.read_bytes())
    data[5000:5100] = b"\xff" * 100
    shard.write_bytes(bytes(data))
    os.utime(shard, ns=(told.st_atime_ns, told.st_mtime_ns))
    dataset, all_errors = StepDataset(plan, folder, ImageTransform(16)), []
    for item in plan.sources[0].items(np.arange(plan.sources[0].num_items)):
        dataset.document(item, all_errors)
    assert 1 <= len(all_errors) < 40


def test_ranks_have_about_equal_work(made, monkeypatch):
    """Pictures and sounds are dear; taken by turns, one rank may have most of them."""

    def difference() -> float:
        loaders = [loader_of(made, 40, rank, 2) for rank in range(2)]
        work = np.array([[work_of(batch) for batch in loader] for loader in loaders])
        return float(np.abs(work[0] - work[1]).mean())

    def work_of(batch: PackedBatch) -> float:
        num_tokens, num_frames = (batch.document_ids_BT >= 0).sum(), (batch.clip_codes_CFK[..., 0] >= 0).sum()
        return float(num_tokens + IMAGE_COST * len(batch.images_NCHW) + FRAME_COST * num_frames)

    balanced = difference()
    monkeypatch.setattr(
        loader_module, "shares", lambda costs, ranks: [range(r, len(costs), ranks) for r in range(ranks)]
    )
    assert balanced < 0.6 * difference()


def test_a_state_is_what_was_consumed_and_continues_elsewhere(made):
    wanted = together([list(loader_of(made, 12))])
    loader = loader_of(made, 12, num_workers=2)  # prefetching workers are ahead of what was consumed
    for number, _ in enumerate(loader):
        if number == 4:
            break
    state = json.loads(json.dumps(loader.state_dict()))
    assert len(json.dumps(state)) < 1024
    ranks = []
    for rank in range(2):
        resumed = loader_of(made, 12, rank, 2)
        resumed.load_state_dict(state)
        ranks.append(list(resumed))
    assert len(ranks[0]) == 7
    found = together(ranks)
    assert found == wanted[5:]


def test_epochs_go_on_where_the_last_ended(made):
    wanted = [rows(batch) for batch in loader_of(made, 12)]
    loader = loader_of(made, 4)
    assert [rows(batch) for _ in range(3) for batch in loader] == wanted and len(loader) == 4


def test_augmented_pictures_depend_on_step_and_document_alone(made):
    recipe = recipe_dict(made / "s", made / "tok", mixture={"on_exhausted": "renormalize"})
    recipe["sources"] = [{**recipe["sources"][0], "max_epochs": 1}]

    def batches(rank: int, world_size: int, augment: AugmentConfig | None) -> list[list[str]]:
        folder = TokenizerFolder.load(made / "tok")
        plan = open_plan(recipe_from_dict(recipe), 4, folder)
        dataset = StepDataset(plan, folder, ImageTransform(folder.image_size), 0, augment)
        return [rows(batch) for batch in PackedLoader(plan, dataset, 100, rank, world_size)]

    config = AugmentConfig(min_scale=0.5, flip=True)
    whole, ranks = batches(0, 1, config), [batches(rank, 2, config) for rank in range(2)]
    assert [sorted(step) for step in whole] == [
        sorted(row for share in step for row in share) for step in zip(*ranks, strict=True)
    ]
    assert whole != batches(0, 1, None)


def test_a_stream_that_ended_says_so(made):
    recipe = recipe_dict(made / "s", made / "tok")
    recipe["sources"] = [{**recipe["sources"][0], "max_epochs": 1}]
    loader = loader_of(made, 100, recipe=recipe)
    assert 0 < len(list(loader)) < 100
    with pytest.raises(ValueError, match="used up after step"):
        list(loader)


def test_a_batch_size_that_ranks_cannot_share_is_refused(made):
    with pytest.raises(ValueError, match="3 ranks"):
        loader_of(made, world_size=3)


def broken_copy(made, tmp_path, num_broken: int):
    """The caption shard with some pictures overwritten after indexing."""
    shard = tmp_path / "caption-000000.tar"
    data = bytearray((made / "s" / shard.name).read_bytes())
    for span in list(scan_tar(made / "s" / shard.name))[:num_broken]:
        (picture,) = [member for member in span.members if member.ending == "png"]
        data[picture.offset : picture.offset + picture.size] = b"\0" * picture.size
    shard.write_bytes(bytes(data))
    told = (made / "s" / shard.name).stat()
    os.utime(shard, ns=(told.st_atime_ns, told.st_mtime_ns))  # as a disk that goes bad does it: nothing tells of it
    path = index_path(made / "s" / shard.name)
    (tmp_path / path.name).write_bytes(path.read_bytes())
    recipe = recipe_dict(made / "s", made / "tok")
    recipe["sources"][0]["shards"] = str(shard)
    return recipe


def test_a_sample_that_fails_becomes_masked_padding(made, tmp_path, caplog):
    recipe = broken_copy(made, tmp_path, 1)
    recipe["on_error"] = {"max_fraction": 0.5}
    whole, holed = list(loader_of(made, 6)), []
    loader = loader_of(made, 6, recipe=recipe)
    with caplog.at_level(logging.WARNING):
        holed = list(loader)
    errors = [message for batch in holed for message in batch.state.get("errors", [])]
    assert errors and all("caption: caption-000000.tar:c_0" in message for message in errors)
    assert "masked caption" in caplog.text and loader.state_dict()["failed"] == len(errors)
    num_tokens = 0
    for before, after in zip(whole, holed, strict=True):
        is_gap = (before.document_ids_BT >= 0) & (after.document_ids_BT < 0)
        assert (after.labels_BT[is_gap] == IGNORE).all() and (after.source_BT[is_gap] == -1).all()
        assert (before.token_ids_BT[~is_gap] == after.token_ids_BT[~is_gap]).all()
        assert (before.labels_BT[~is_gap] == after.labels_BT[~is_gap]).all()
        num_tokens += int(is_gap.sum())
    assert num_tokens


@pytest.mark.parametrize("num_workers", [0, 1])
def test_failures_are_bounded(made, tmp_path, num_workers):
    recipe = broken_copy(made, tmp_path, 20)
    recipe["on_error"] = {"max_fraction": 0.01}
    with pytest.raises(ValueError, match=r"on_error\.max_fraction 0\.01.*caption-000000\.tar:c_"):
        list(loader_of(made, 12, recipe=recipe, num_workers=num_workers))
    recipe["on_error"] = {"action": "raise"}
    with pytest.raises(ValueError, match=r"caption-000000\.tar:c_"):
        list(loader_of(made, 12, recipe=recipe, num_workers=num_workers))


def test_few_failures_early_end_no_run(made, tmp_path):
    recipe = broken_copy(made, tmp_path, 1)  # on_error.max_fraction is 0.001, of about 100 documents
    loader = loader_of(made, 12, recipe=recipe)
    assert len(list(loader)) == 12 and 2 <= loader.state_dict()["failed"] <= 10
    recipe["sources"] = [{**recipe["sources"][0], "max_epochs": 2}]
    with pytest.raises(ValueError, match=r"2 of 48 documents failed, more than on_error\.max_fraction 0\.001"):
        list(loader_of(made, 100, recipe=recipe))  # the stream has ended: there is nothing to wait for
    recipe["on_error"] = {"max_fraction": 0.0}
    with pytest.raises(ValueError, match="1 of"):
        list(loader_of(made, 100, recipe=recipe))


def test_a_shard_that_vanishes_is_named(made, tmp_path):
    recipe = broken_copy(made, tmp_path, 0)
    loader = loader_of(made, 12, recipe=recipe)
    (tmp_path / "caption-000000.tar").unlink()
    with pytest.raises(ValueError, match=r"caption-000000\.tar"):
        list(loader)


class Recorder(L.LightningModule):
    """Keeps the rows that it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[str]] = []
        self.validated: list[list[str]] = []

    def training_step(self, batch: PackedBatch, batch_idx: int) -> torch.Tensor:
        self.seen.append(rows(batch))
        return self.weight.sum()

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        self.validated.append(rows(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(root, **changes) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=root, enable_checkpointing=False, num_sanity_val_steps=0, **changes,
    )  # fmt: skip


def packed(made, **changes) -> PackedDataModule:
    values = {"batch_size": 4, "steps_per_epoch": 5, **changes}
    return PackedDataModule(made / "recipe.yaml", **values)


@pytest.mark.parametrize("stopped_at", [3, 5, 7])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*LeafSpec:FutureWarning")
def test_lightning_saves_and_restores_the_state(made, tmp_path, stopped_at):
    whole = Recorder()
    trainer(tmp_path, max_steps=12).fit(whole, packed(made))
    first, second = Recorder(), Recorder()
    stopping = trainer(tmp_path, max_steps=stopped_at)
    stopping.fit(first, packed(made))
    stopping.save_checkpoint(tmp_path / "last.ckpt")
    trainer(tmp_path, max_steps=12).fit(second, packed(made), ckpt_path=tmp_path / "last.ckpt")
    assert len(whole.seen) == 12 and len(first.seen) == stopped_at
    assert first.seen + second.seen == whole.seen


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*LeafSpec:FutureWarning")
def test_validation_is_the_same_each_time_and_holds_each_document_once(made, tmp_path):
    module = Recorder()
    data = packed(made, val_recipe=made / "recipe.yaml", num_val_sequences=6)
    trainer(tmp_path, max_steps=10).fit(module, data)
    assert len(module.validated) == 4 and module.validated[:2] == module.validated[2:]
    everything = packed(made, val_recipe=made / "recipe.yaml")
    everything.setup("validate")
    loader = everything.val_dataloader()
    assert isinstance(loader, PackedLoader)
    num_documents = sum(int((batch.document_ids_BT.amax(1) + 1).sum()) for batch in loader)
    assert num_documents == 24 * 5  # sounds are two documents each
    assert data.source_names == ["caption", "interleaved", "text", "audio"] and len(data.plan.hash) == 64
    assert data.voices == ("ann", "bob")


@pytest.mark.parametrize("schedule", [[[0, 0.0], [900, 0.0], [901, 1.0]], [[0, 1.0], [1, 0.0]]])
def test_validation_sees_sources_that_rest(made, schedule):
    """Also the first few sequences of it, by `num_val_sequences`."""
    recipe = recipe_dict(made / "s", made / "tok")
    recipe["sources"] = [{**recipe["sources"][0], "weight_schedule": schedule}, *recipe["sources"][1:]]
    data = packed(made, val_recipe=recipe_from_dict(recipe))
    data.setup("validate")
    loader = data.val_dataloader()
    assert isinstance(loader, PackedLoader)
    sources = [document for batch in loader for document in told(batch)]
    assert [sources.count(number) for number in range(4)] == [24, 24, 24, 48]
    assert 0 in sources[:20]


def told(batch) -> list[int]:
    """Each document's source."""
    ids_BT, source_BT = batch.document_ids_BT, batch.source_BT
    pairs = [set(zip(*pair, strict=True)) for pair in zip(ids_BT.tolist(), source_BT.tolist(), strict=True)]
    return [source for row in pairs for number, source in sorted(row) if number >= 0]


def test_cached_documents_are_the_same(made):
    plain, cached = packed(made, cache_mb=0), packed(made, cache_mb=64)
    for data in (plain, cached):
        data.setup("fit")
    for _ in range(2):
        assert [rows(b) for b in plain.train_dataloader()] == [rows(b) for b in cached.train_dataloader()]


def test_showing_a_step(made):
    told = commands.show(made / "recipe.yaml", step=5, batch_size=4)
    again = commands.show(made / "recipe.yaml", step=5, batch_size=4, text=True, world_size=2, num_workers=1)
    assert [item["hash"] for item in told["sequences"]] == [item["hash"] for item in again["sequences"]]
    assert told["global_batch"] == 4 and set(told["sequences"][0]["documents"][0]) >= {"source", "shard", "key", "task"}
    assert all(item["targets"] > 0 and item["text"] for item in again["sequences"])
    for world_size, num_workers in ((1, 1), (4, 0)):
        real = commands.show(made / "recipe.yaml", 5, 4, world_size=world_size, num_workers=num_workers)
        assert real == told
    with pytest.raises(ValueError, match="world_size is 3"):
        commands.show(made / "recipe.yaml", batch_size=4, world_size=3)


@pytest.mark.parametrize("action", ["mask", "raise"])
def test_errors_are_shown_with_the_sequence_that_has_them(made, tmp_path, action):
    recipe = tmp_path / "broken.yaml"
    recipe.write_text(
        yaml.safe_dump({**broken_copy(made, tmp_path, 20), "on_error": {"action": action, "max_fraction": 0}})
    )
    for choices in ({}, {"world_size": 2}, {"world_size": 4, "num_workers": 1}):
        told = commands.show(recipe, step=2, batch_size=8, text=True, **choices)
        broken = 0
        for sequence in told["sequences"]:
            keys = [document["key"] for document in sequence["documents"] if document["source"] == "caption"]
            assert len(sequence["errors"]) <= len(keys)
            assert all(any(f":{key} as caption" in message for key in keys) for message in sequence["errors"])
            broken += len(sequence["errors"])
        assert broken > 1 and any(not sequence["errors"] for sequence in told["sequences"])
    assert any("errors" in sequence for sequence in commands.show(recipe, 2, 8, world_size=2)["sequences"])


def test_a_step_as_a_page(made, tmp_path):
    told = commands.show(made / "recipe.yaml", step=3, batch_size=4, html=tmp_path / "step.html")
    page = (tmp_path / "step.html").read_text()
    for sequence in told["sequences"]:
        assert sequence["hash"] in page
        for document in sequence["documents"]:
            assert f"{document['shard']}:{document['key']} at byte {document['offset']}" in page
    assert page.count("<section>") == sum(len(sequence["documents"]) for sequence in told["sequences"])
    assert "data:image/jpeg;base64," in page and "data:audio/flac;base64," in page and "<mark>" in page
    recipe = made / "broken.yaml"
    recipe.write_text(yaml.safe_dump(broken_copy(made, tmp_path, 20)))
    commands.show(recipe, step=0, batch_size=4, html=tmp_path / "broken.html")
    assert 'class="error"' in (tmp_path / "broken.html").read_text()


def test_statistics_as_plots(made, tmp_path):
    told = commands.stats(made / "recipe.yaml", steps=9, batch_size=4, html=tmp_path / "stats.html")
    page = (tmp_path / "stats.html").read_text()
    assert page.count("<svg") == 3 + len(told["lengths"]) and told["recipe_hash"] in page
    assert len(told["fill_by_step"]) == 9
    for name, rows_ in told["lengths"].items():
        assert sum(count for _, _, count in rows_) == told["documents"][name]
        assert all(low <= high for low, high, _ in rows_)


def test_a_step_and_statistics_to_read(made, capsys, tmp_path):
    recipe = str(made / "recipe.yaml")
    told = commands.show(recipe, step=5, batch_size=4)
    assert main(["data", "show", "--recipe", recipe, "--step", "5", "--batch_size", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == told
    page = ["--html", str(tmp_path / "step.html")]
    assert main(["data", "show", "--recipe", recipe, "--step", "5", "--batch_size", "4", *page]) == 0
    lines = capsys.readouterr().out.splitlines()
    documents = [document for sequence in told["sequences"] for document in sequence["documents"]]
    assert len(lines) == 1 + 4 + len(documents) and (tmp_path / "step.html").is_file()
    for document in documents:
        place = f"{document['shard']}:{document['key']}"
        (line,) = [line for line in lines if f"{place} " in line and f" {document['task']} " in line]
        assert all(f" {document[key]} " in line for key in ("source", "tokens")) and f"@{document['offset']} " in line
        assert line.split("@")[1].split(maxsplit=1)[1].split()[0].strip("…") in " ".join(WORDS)
    assert main(["data", "stats", "--recipe", recipe, "--steps", "30", "--json"]) == 0
    stats = json.loads(capsys.readouterr().out)
    assert main(["data", "stats", "--recipe", recipe, "--steps", "30"]) == 0
    table = capsys.readouterr().out
    assert len(table.splitlines()) < 12 and f"padding {100 * stats['padding']:.2f}%" in table
    for name, share in stats["share"].items():
        wanted = f"{100 * stats['wanted_share'][name]:.2f}%"
        assert any(line.split()[:3] == [name, wanted, f"{100 * share:.2f}%"] for line in table.splitlines())


@pytest.mark.parametrize("json_too", [[], ["--json"]])
def test_a_reader_that_leaves_early_is_no_fault(made, json_too):
    command = [sys.executable, "-m", "mmllm.cli", "data", "show", "--recipe", str(made / "recipe.yaml"), *json_too]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert done.returncode == 141 and not done.stderr


def test_verifying_names_what_is_broken(made, tmp_path):
    assert commands.verify(made / "s", made / "tok") == {"documents": 24 * 5 + 8, "broken": 0, "errors": []}
    broken_copy(made, tmp_path, 2)
    told = commands.verify(tmp_path, made / "tok")
    assert told["broken"] == 2 and "caption-000000.tar:c_0" in told["errors"][0]
    assert commands.verify(tmp_path, made / "tok", workers=2) == told


def clip_batches(root, **changes):
    data = ClipDataModule(str(root / "s" / "caption-*.tar"), root / "tok", **{"batch_size": 8, **changes})
    return list(data.train_dataloader())


def test_clip_pairs(made):
    batches = clip_batches(made, context_length=10)
    assert len(batches) == 3
    images, ids = batches[0].images_N3HW, batches[0].token_ids_NL
    assert all(batch.is_pair_N.all() for batch in batches)
    assert images.shape == (8, 3, 16, 16) and images.dtype == torch.uint8 and ids.shape == (8, 10)
    folder = TokenizerFolder.load(made / "tok")
    assert ((ids == folder.id("<|end|>")).sum(1) == 1).all()
    assert len({tuple(row.tolist()) for batch in clip_batches(made) for row in batch.token_ids_NL}) >= 23
    for workers in (0, 2):
        again = clip_batches(made, context_length=10, num_workers=workers)
        for one, two in zip(batches, again, strict=True):
            assert torch.equal(one.images_N3HW, two.images_N3HW) and torch.equal(one.token_ids_NL, two.token_ids_NL)
    moved = clip_batches(made, min_scale=0.5, flip=True)
    assert not torch.equal(moved[0].images_N3HW, images) and moved[0].images_N3HW.dtype == torch.uint8


def test_validation_shows_each_caption_once_and_leaves_no_rank_without(tmp_path, monkeypatch):
    make_folder(tmp_path / "tok")
    write_picture(tmp_path / "a.png", np.random.default_rng(0))
    path = write_manifest(tmp_path, [{"id": str(n), "image": "a.png", "text": f"one {n}"} for n in range(9)])
    commands.build(path, tmp_path / "s")
    shards = str(tmp_path / "s" / "*.tar")
    for batch_size, world_size, num_steps in ((4, 1, 3), (4, 2, 2), (4, 4, 2), (6, 2, 2), (6, 6, 1), (32, 2, 1)):
        seen = []
        for rank in range(world_size):
            monkeypatch.setattr(datamodules, "rank_of", lambda _, ranks=(rank, world_size): ranks)
            data = ClipDataModule(shards, tmp_path / "tok", batch_size=batch_size, val_shards=shards)
            steps = list(data.val_dataloader())
            assert len(steps) == len(data.val_dataloader()) == num_steps
            assert all(len(batch.images_N3HW) == len(batch.token_ids_NL) for batch in steps)
            assert all(batch.is_pair_N.any() for batch in steps)
            seen += [tuple(row.tolist()) for batch in steps for row in batch.token_ids_NL[batch.is_pair_N]]
        assert len(seen) == len(set(seen)) == 9


def test_equal_captions_are_kept_apart(tmp_path):
    make_folder(tmp_path / "tok")
    write_picture(tmp_path / "a.png", np.random.default_rng(0))
    texts = ["red"] * 6 + ["blue"] * 6 + [f"two {n}" for n in range(36)]
    path = write_manifest(tmp_path, [{"id": str(n), "image": "a.png", "text": text} for n, text in enumerate(texts)])
    commands.build(path, tmp_path / "s")
    ids = [batch.token_ids_NL for batch in clip_batches(tmp_path)]
    repeats = sum(8 - len({tuple(row.tolist()) for row in rows}) for rows in ids)
    assert repeats <= 2  # shuffled at random, about ten


def waves_of(loader):
    return [batch.waves_N1T for batch in loader]


def test_sound_crops_and_whole_clips(made):
    shards = str(made / "s" / "audio-*.tar")
    crops = waves_of(AudioDataModule(shards, 8000, seconds=0.25, batch_size=4).train_dataloader())
    again = waves_of(AudioDataModule(shards, 8000, seconds=0.25, batch_size=4, num_workers=1).train_dataloader())
    assert crops[0].shape == (4, 1, 2000) and all(torch.equal(a, b) for a, b in zip(crops, again, strict=True))
    assert (crops[0].abs().amax(dim=2) > 0.05).all()
    batch = next(iter(AudioDataModule(shards, 16000, seconds=0.5, batch_size=4, texts=True).train_dataloader()))
    waves, texts = batch.waves_N1T, batch.texts
    assert waves.shape == (4, 1, 8000) and len(texts) == 4 and all(texts)
    cut = next(iter(AudioDataModule(shards, 8000, seconds=0.05, batch_size=4, texts=True).train_dataloader()))
    assert cut.texts == [""] * 4
    data = AudioDataModule(shards, 8000, 0.25, 4)
    loader = data.train_dataloader()
    states, stream = [], []
    for batch in [batch for _ in range(2) for batch in loader]:
        states.append(batch.state)
        stream.append(batch.waves_N1T)
    resumed = AudioDataModule(shards, 8000, 0.25, 4).train_dataloader()
    resumed.load_state_dict(json.loads(json.dumps(states[-3])))
    assert all(torch.equal(a, b) for a, b in zip(waves_of(resumed), stream[-2:], strict=True))


def test_data_modules_refuse_nonsense(made):
    with pytest.raises(ValueError, match="batch_size"):
        PackedDataModule(made / "recipe.yaml", batch_size=0)
    with pytest.raises(ValueError, match="min_scale"):
        ClipDataModule("x", "y", min_scale=0.0)
    with pytest.raises(ValueError, match="gain_db"):
        AudioDataModule("x", 8000, gain_db=-1)
    with pytest.raises(ValueError, match="no documents are left"):
        AudioDataModule(str(made / "s" / "audio-*.tar"), 8000, filter="speaker == 'carl'").train_dataloader()
