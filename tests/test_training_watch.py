"""A loss or gradient that is no number stops training, names what it came of, and leaves the last good weights."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from mmllm.batch import Modality, PackedBatch
from mmllm.data import commands
from mmllm.data.loading.datamodules import PackedDataModule
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.flops import ModelFlops, Work
from mmllm.model.multimodal import LossConfig
from mmllm.model.router import MoEConfig
from mmllm.training.decoder_module import DecoderModule
from mmllm.training.lightning_cli import quiet_lightning
from mmllm.training.optimizers import OptimizerConfig
from mmllm.training.watch import NonFiniteError, Watch, load_batch, save_batch
from mmllm_tokenizers.folder import TokenizerConfig, TokenizerFolder
from mmllm_tokenizers.text import TextTokenizer
from tests.data_fixtures import write_manifest
from tests.training_fixtures import (
    IMAGE_SLOTS,
    LENGTH,
    ListData,
    TinyData,
    fit_rank,
    mixed_pairs,
    quiet_trainer,
    run_two_ranks,
    tiny_batch,
    tiny_module,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from host_syncs import HostSyncs

torch.set_num_threads(1)
BROKEN_STEP = 4


class Plant(pl.Callback):
    """Makes a weight no number when a step begins."""

    def __init__(self, rank: int = 0, token: int | None = None, step: int = BROKEN_STEP) -> None:
        self.rank, self.token, self.step = rank, token, step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step - 1 and trainer.global_rank == self.rank:
            decoder = pl_module.model.decoder
            with torch.no_grad():
                if self.token is None:
                    decoder.norm.weight[0] = math.nan
                else:
                    decoder.embed_tokens.weight[self.token] = math.inf


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of texts; the letter z is in one alone."""
    folder = tmp_path_factory.mktemp("texts")
    words = {"good": "a line of words", "odd": "zzz and zzz"}
    tokenizer = TextTokenizer.train([f"{text} {n}" for text in words.values() for n in range(9)], vocab_size=275)
    TokenizerFolder(tokenizer, None, TokenizerConfig()).save(folder / "tokenizer")
    sources = []
    for name, text in words.items():
        rows = [{"id": f"{name}{number}", "text": f"{text} {number}"} for number in range(40)]
        commands.build(write_manifest(folder / name, rows), folder / "shards" / name)
        sources.append({"name": name, "kind": "text", "shards": str(folder / "shards" / name / "*.tar")})
    commands.index(folder / "shards" / "good", folder / "tokenizer")
    commands.index(folder / "shards" / "odd", folder / "tokenizer")
    recipe = {"tokenizer": str(folder / "tokenizer"), "sequence_length": 48, "sources": sources}
    recipe["mixture"] = {"on_exhausted": "repeat"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def text_module(folder: Path) -> DecoderModule:
    torch.manual_seed(0)
    moe = MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    decoder = DecoderConfig(0, **shape, moe=moe, moe_layers=(1,), intermediate_size=32, tie_word_embeddings=False)
    return DecoderModule(decoder, tokenizer=str(folder / "tokenizer"), optimizer=OptimizerConfig(lr=1e-2))


def fit_texts(folder: Path, out: Path, *callbacks: pl.Callback, steps: int = 8, **settings: Any) -> None:
    saving = ModelCheckpoint(out / "checkpoints", "{step}", save_top_k=1, monitor="step", mode="max", save_last=True,
                             every_n_train_steps=1)  # fmt: skip
    trainer = quiet_trainer(
        *callbacks, saving, max_steps=steps, logger=CSVLogger(out, "logs", ""), log_every_n_steps=1,
        enable_checkpointing=True, default_root_dir=out, **settings,
    )  # fmt: skip
    with quiet_lightning():
        trainer.fit(text_module(folder), PackedDataModule(folder / "recipe.yaml", batch_size=2))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_planted_infinity_stops_the_run_and_names_step_source_and_documents(
    texts: Path, tmp_path: Path, accumulated: int
) -> None:
    token = TokenizerFolder.load(texts / "tokenizer").text.encode("zzz")[0]
    with pytest.raises(NonFiniteError, match=rf"stopped at step {BROKEN_STEP}: loss nan.*sources odd, documents text-"):
        fit_texts(texts, tmp_path, Plant(token=token), accumulate_grad_batches=accumulated)
    (path,) = (tmp_path / "logs" / "non_finite").glob("*batch_0.safetensors")
    report = json.loads(path.with_suffix(".json").read_text())
    assert (report["step"], report["rank"], report["loss"], report["sources"]) == (BROKEN_STEP, 0, "nan", ["odd"])
    batch = load_batch(path)
    assert isinstance(batch, PackedBatch)
    step = (BROKEN_STEP - 1) * accumulated
    wanted = next(iter_from(texts, step))
    for name in ("token_ids_BT", "labels_BT", "source_BT", "document_ids_BT", "images_NCHW"):
        assert torch.equal(getattr(batch, name), getattr(wanted, name)), name
    assert batch.state["step"] == step + 1
    named = {(each["row"], each["number"]): each["key"] for each in report["documents"]}
    rows, places = (wanted.source_BT == 1).nonzero(as_tuple=True)
    ids = wanted.document_ids_BT[rows, places].tolist()
    assert set(named) == set(zip(rows.tolist(), ids, strict=True)) and named
    assert all(key.startswith("odd") for key in named.values())


def iter_from(folder: Path, step: int) -> Any:
    """The batches of one process from a step on, by a data module of its own."""
    loader = PackedDataModule(folder / "recipe.yaml", batch_size=2).train_dataloader()
    loader.load_state_dict(loader._plan.state_before(step))
    return iter(loader)


def test_broken_weights_are_not_saved_over_good_ones(texts: Path, tmp_path: Path) -> None:
    token = TokenizerFolder.load(texts / "tokenizer").text.encode("zzz")[0]
    with pytest.raises(NonFiniteError):
        fit_texts(texts, tmp_path, Plant(token=token))
    saved = sorted((tmp_path / "checkpoints").glob("*.ckpt"))
    assert [path.name for path in saved] == ["last.ckpt", f"step={BROKEN_STEP - 1}.ckpt"]
    for path in saved:
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["global_step"] == BROKEN_STEP - 1
        assert all(weight.isfinite().all() for weight in checkpoint["state_dict"].values())


def test_broken_weights_of_the_last_step_are_not_exported(texts: Path, tmp_path: Path) -> None:
    module = text_module(texts)
    module.out = str(tmp_path / "model")
    trainer = quiet_trainer(Plant(step=3), max_steps=3, default_root_dir=tmp_path)
    with pytest.raises(NonFiniteError, match="step 3"), quiet_lightning():
        trainer.fit(module, PackedDataModule(texts / "recipe.yaml", batch_size=2))
    assert not (tmp_path / "model").exists()


def test_the_documents_of_a_step_are_found_with_and_without_the_state_before(texts: Path) -> None:
    loader = PackedDataModule(texts / "recipe.yaml", batch_size=2).train_dataloader()
    states: list[Any] = [None]
    for number, batch in zip(range(5), loader, strict=False):
        told = loader.documents_of(number, states[-1])
        assert told == loader.documents_of(number) == loader.documents_of(number, {"step": -1})
        assert len(told) == batch.num_documents
        assert {each["source"] for each in told} <= {"good", "odd"}
        states.append(batch.state)


def test_a_document_whose_stored_features_are_infinite_is_named() -> None:
    batch = dataclasses.replace(tiny_batch(0), images_NCHW=torch.zeros(0, 3, 16, 16, dtype=torch.uint8))
    batch.image_features_NPC = torch.zeros(2, 4, 8, dtype=torch.float16)
    batch.image_features_NPC[1, 2, 3] = torch.inf
    batch.state = {"step": 1}
    assert batch.document_ids_BT.flatten()[batch.image_slots_NS[1, 0]] == 0
    watch = Watch(source_names=("captions",), loader=Named())
    watch.begin_batch(batch)
    watch.note_loss(torch.tensor(torch.nan))
    watch.note_sources(torch.tensor([torch.nan]))
    watch.end_step(1, torch.tensor(1.0))
    with pytest.raises(NonFiniteError, match="documents whose own input is not finite: shard:row1-0;"):
        watch.settle()


class Named:
    """Knows three documents in each of two rows."""

    def documents_of(self, step: int, before: Any) -> list[dict[str, Any]]:
        return [
            {"source": "captions", "shard": "shard", "key": f"row{row}-{number}", "row": row, "number": number}
            for row in range(2)
            for number in range(3)
        ]


def test_a_gradient_alone_stops_too_but_not_where_a_scaled_loss_may_overflow() -> None:
    for checks_norm in (False, True):
        watch = Watch()
        watch.begin_batch(torch.ones(2))
        watch.note_loss(torch.tensor(1.0))
        watch.end_step(1, torch.tensor(torch.inf), checks_norm)
        if checks_norm:
            with pytest.raises(NonFiniteError, match=r"step 1: loss 1\.0, gradient norm inf .*in all sources"):
                watch.end_step(2, torch.tensor(1.0))
            with pytest.raises(NonFiniteError, match="step 1"):  # the weights are still broken
                watch.settle()
        else:
            watch.end_step(2, torch.tensor(1.0))
            watch.settle()


def fit_planted_rank(rank: int, port: int, out: str) -> None:
    """One of two processes, of which the second's weights break."""
    module, data = tiny_module(), ListData(mixed_pairs() * 2)
    try:
        fit_rank(rank, port, out, module, data, Plant(rank=1, step=3), max_steps=8, default_root_dir=out)
    except NonFiniteError as error:
        torch.save({"told": str(error), "step": module.global_step}, f"{out}/rank{rank}.pt")


def test_one_ranks_loss_stops_all(tmp_path: Path) -> None:
    told = run_two_ranks(fit_planted_rank, tmp_path)
    assert "step 3: the loss of rank 1 is not finite" in told[0]["told"]
    assert "step 3: loss nan" in told[1]["told"] and "(rank 1)" in told[1]["told"]
    assert [path.name for path in (tmp_path / "non_finite").glob("*.safetensors")] == [
        "step_3_rank_1_batch_0.safetensors"
    ]


class Syncs(pl.Callback):
    """What a step asks of the device, from its batch to its end, once a first step has made what is made once."""

    def __init__(self) -> None:
        self.counted: list[HostSyncs] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.counted.append(HostSyncs())
        self.counted[-1].__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        self.counted[-1].__exit__(None, None, None)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_watching_asks_the_device_nothing(accumulated: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def counted() -> list[int]:
        syncs, module = Syncs(), tiny_module()
        trainer = quiet_trainer(
            syncs, max_steps=4, gradient_clip_val=1.0, log_every_n_steps=100, accumulate_grad_batches=accumulated
        )
        batches = [tiny_batch(number).with_metadata() for number in range(4 * accumulated)]
        with quiet_lightning():
            trainer.fit(module, ListData(batches))
        return [each.count for each in syncs.counted]

    watched = counted()
    for name in ("begin_batch", "note_loss", "note_sources", "end_step"):
        monkeypatch.setattr(Watch, name, lambda *args, **settings: None)
    assert watched == counted()


def test_the_norm_before_clipping_memory_and_losses_are_logged(texts: Path, tmp_path: Path) -> None:
    norms = Norms()
    fit_texts(texts, tmp_path, norms, steps=4, gradient_clip_val=1e-3)
    with (tmp_path / "logs" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert [float(row["train/grad_norm"]) for row in rows] == pytest.approx(norms.before, rel=1e-6)
    assert max(norms.after) < 1.001e-3 < min(norms.before)
    assert all(0.01 < float(row["train/memory_resident_gb"]) < 100 for row in rows)


def test_the_share_of_the_devices_peak_is_logged_where_that_is_known(tmp_path: Path) -> None:
    batches = [tiny_batch(number).with_metadata() for number in range(3)]
    rows = []
    for peak in (None, 1e9):
        module = tiny_module(peak_flops=peak)
        logger = CSVLogger(tmp_path, f"peak {peak}", "")
        with quiet_lightning():
            quiet_trainer(max_steps=3, logger=logger, log_every_n_steps=3).fit(module, ListData(batches))
        with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
            rows.append(next(csv.DictReader(file)))
    assert "train/mfu" not in rows[0]
    assert module.model is not None
    flops = ModelFlops.of(module.model.config)
    work = [Work.of(batch) for batch in batches]
    seconds = 3 / float(rows[1]["train/steps_per_second"])
    wanted = sum(map(flops.training, work)) / seconds / 1e9
    assert float(rows[1]["train/mfu"]) == pytest.approx(wanted, rel=0.01)
    with pytest.raises(ValueError, match="peak_flops is 0; give what the device can do"):
        tiny_module(peak_flops=0)


class Norms(pl.Callback):
    """Of the whole gradient, before Lightning clips and when the step is made."""

    def __init__(self) -> None:
        self.before: list[float] = []
        self.after: list[float] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.before.append(_norm(pl_module))

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        if self.before and len(self.after) < len(self.before):
            self.after.append(_norm(pl_module))


def _norm(module: torch.nn.Module) -> float:
    grads = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
    return float(torch.cat(grads).norm()) if grads else 0.0


def test_a_batch_comes_back_as_it_was(tmp_path: Path) -> None:
    batch = tiny_batch(3).with_metadata()
    batch.state = {"step": 7, "cursors": [[1, 0.5]]}
    save_batch(tmp_path / "batch.safetensors", batch, {"step": 2})
    read = load_batch(tmp_path / "batch.safetensors")
    assert isinstance(read, PackedBatch) and read.state == batch.state
    for each in dataclasses.fields(batch):
        if isinstance(value := getattr(batch, each.name), torch.Tensor):
            assert torch.equal(getattr(read, each.name), value), each.name
    assert read.with_metadata().metadata is not None
    save_batch(tmp_path / "pair.safetensors", (torch.ones(2), torch.zeros(1)), {})
    with pytest.raises(ValueError, match="holds a tuple; load_batch reads PackedBatch"):
        load_batch(tmp_path / "pair.safetensors")


def test_train_and_validation_loss_are_the_same_weighted_quantity(tmp_path: Path) -> None:
    """Units at half weight, and a z-loss on the head: neither may be left out of one of the two."""
    batch = tiny_batch(5)
    assert (batch.modality_BT == Modality.UNITS).any() and IMAGE_SLOTS < LENGTH
    optimizer = OptimizerConfig(lr=1e-30, weight_decay=0.0)
    module = tiny_module(loss=LossConfig(units=0.5, ctc=0.3, head_z_loss_coef=0.01), optimizer=optimizer)
    trainer = quiet_trainer(
        max_steps=1, logger=CSVLogger(tmp_path, "logs", ""), log_every_n_steps=1, val_check_interval=1
    )
    with quiet_lightning():
        trainer.fit(module, datamodule=Same(batch))
    with (tmp_path / "logs" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("loss", "loss/text", "loss/units"):
        trained = [float(row[f"train/{name}"]) for row in rows if row.get(f"train/{name}")]
        short = name.removeprefix("loss/")
        validated = [float(row[f"val/{short}"]) for row in rows if row.get(f"val/{short}")]
        assert len(trained) == len(validated) == 1
        assert trained == pytest.approx(validated, rel=1e-6), name


class Same(TinyData):
    """One batch to train and to validate on."""

    def __init__(self, batch: PackedBatch) -> None:
        super().__init__()
        self.batch = batch

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader([self.batch], batch_size=None, collate_fn=lambda batch: batch)  # pyright: ignore

    def val_dataloader(self) -> Any:
        return self.train_dataloader()
