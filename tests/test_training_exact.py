"""A run that is stopped anywhere, also between the batches of one optimizer step, ends with the same weights."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from mmllm.batch import PackedBatch
from mmllm.model.multimodal import LossConfig
from mmllm.training.codec_module import CodecModule
from mmllm.training.ema import EMA
from mmllm.training.lightning_cli import quiet_lightning
from mmllm.training.optimizers import OptimizerConfig
from tests.test_training_codec import TINY, Waves
from tests.training_fixtures import fit_rank, merge, quiet_trainer, run_two_ranks, tiny_batch, tiny_module

EPOCH, ACCUMULATED = 7, 3
"""Batches an epoch and an optimizer step: 3, 3 and, at the end of an epoch, 1."""
NUM_STEPS = 6
NUM_BATCHES = 2 * EPOCH
Weights = dict[str, torch.Tensor]
pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint:UserWarning")
NOISY = LossConfig(units=0.5, ctc=0.3, word_dropout=0.3)


class NumberedBatches:
    """The batches of one of one or two ranks, epoch after epoch, each told by its number, which is the state."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size, self.next = rank, world_size, 0

    def __len__(self) -> int:
        return EPOCH

    def __iter__(self) -> Iterator[PackedBatch]:
        for _ in range(EPOCH - self.next % EPOCH):
            self.next += 1
            rows = [tiny_batch(2 * self.next + row, 1, text_only=self.next % 4 == 0) for row in range(2)]
            yield merge(rows[self.rank :: self.world_size])

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


class NumberedData(pl.LightningDataModule):
    source_names = ("captions", "clips", "words")

    def train_dataloader(self) -> NumberedBatches:
        assert self.trainer is not None
        return NumberedBatches(self.trainer.global_rank, self.trainer.world_size)

    def val_dataloader(self) -> torch.utils.data.DataLoader:
        rows: Any = [tiny_batch(900, 2)]
        return torch.utils.data.DataLoader(rows, batch_size=None, collate_fn=lambda batch: batch)


class Killed(Exception):
    """Ends a run as SIGKILL would, save for what callbacks do on an exception."""


class SaveAndDie(pl.Callback):
    """Saves after a batch, wherever that is between two optimizer steps, and ends the run."""

    def __init__(self, number: int, path: Path) -> None:
        self.number, self.path = number, path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.number:
            trainer.save_checkpoint(self.path)
            raise Killed


class DuringBatch(pl.Callback):
    """Calls a function when a batch's forward pass is done."""

    def __init__(self, number: int, function: Callable[[], Any]) -> None:
        self.number, self.function = number, function

    def on_before_backward(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.number:
            self.function()


class AfterBatch(DuringBatch):
    """Calls a function after a batch, before checkpoints are saved."""

    def on_before_backward(self, trainer: pl.Trainer, *_: Any) -> None: ...

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        super().on_before_backward(trainer)


def die() -> None:
    raise Killed


def saving(folder: Path, **settings: Any) -> ModelCheckpoint:
    """Saves `folder`/last.ckpt when `settings` say so."""
    return ModelCheckpoint(folder, save_last=True, **{"save_top_k": 0, **settings})


def settings_of(accumulated: int, **settings: Any) -> dict[str, Any]:
    num_steps = 2 * math.ceil(EPOCH / accumulated)
    defaults = {"accumulate_grad_batches": accumulated, "max_steps": num_steps, "limit_val_batches": 0}
    return {**defaults, "gradient_clip_val": 1.0, **settings}


def decoder(**settings: Any) -> pl.LightningModule:
    module = tiny_module(seed=3, optimizer=OptimizerConfig(lr=1e-2, warmup=0.2), **{"loss": NOISY, **settings})
    torch.manual_seed(3)
    return module


def fit(*callbacks: pl.Callback, accumulated: int = ACCUMULATED, ckpt: Path | None = None, **settings: Any) -> Weights:
    """The average of the weights after two epochs, or where the callbacks stop them."""
    module = decoder()
    with quiet_lightning():
        saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
        given = settings_of(accumulated, enable_checkpointing=saves, **settings)
        trainer = quiet_trainer(EMA(0.9), *callbacks, **given)
        trainer.fit(module, datamodule=NumberedData(), ckpt_path=ckpt, weights_only=True)
    return module.state_dict()


@pytest.fixture(scope="module")
def wanted() -> dict[int, Weights]:
    """The weights of runs that nothing stopped, by the number of batches that an optimizer step takes."""
    return {accumulated: fit(accumulated=accumulated) for accumulated in (1, ACCUMULATED)}


def assert_equal(got: Weights, wanted: Weights) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 7, 8, 9, 13])
def test_a_checkpoint_after_any_batch_continues_to_the_same_weights(
    tmp_path: Path, wanted: dict[int, Weights], number: int
) -> None:
    with pytest.raises(Killed):
        fit(SaveAndDie(number, tmp_path / "cut.ckpt"))
    assert_equal(fit(ckpt=tmp_path / "cut.ckpt"), wanted[ACCUMULATED])


@pytest.mark.parametrize(("accumulated", "number"), [(1, 4), (1, 8), (3, 4), (3, 6), (3, 7), (3, 8), (3, 9)])
def test_an_error_within_a_batch_loses_no_batch(
    tmp_path: Path, wanted: dict[int, Weights], accumulated: int, number: int
) -> None:
    """The batch was taken from the loader, and made no step."""
    with pytest.raises(Killed):
        fit(DuringBatch(number, die), saving(tmp_path, save_on_exception=True), accumulated=accumulated)
    assert_equal(fit(ckpt=tmp_path / "last.ckpt", accumulated=accumulated), wanted[accumulated])


@pytest.mark.parametrize("number", [4, 6, 7, 8])
def test_sigterm_loses_no_batch(tmp_path: Path, wanted: dict[int, Weights], number: int) -> None:
    terminated = DuringBatch(number, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SIGTERMException):
        fit(terminated, saving(tmp_path, save_on_exception=True))
    assert_equal(fit(ckpt=tmp_path / "last.ckpt"), wanted[ACCUMULATED])


def test_checkpoints_by_time_and_by_steps_after_a_resume(tmp_path: Path, wanted: dict[int, Weights]) -> None:
    """Those by time come between steps; those by steps do so too when a resumed run forgets what it saved."""
    by_time = saving(tmp_path / "time", train_time_interval=timedelta(hours=1))
    past = AfterBatch(5, lambda: setattr(by_time, "_last_time_checked", -math.inf))
    with pytest.raises(Killed):
        fit(past, by_time, DuringBatch(6, die))
    with pytest.raises(Killed):  # batch 4 is in the middle of a step
        fit(saving(tmp_path / "steps", every_n_train_steps=1), AfterBatch(5, die), ckpt=tmp_path / "time" / "last.ckpt")
    assert_equal(fit(ckpt=tmp_path / "time" / "last.ckpt"), wanted[ACCUMULATED])
    assert_equal(fit(ckpt=tmp_path / "steps" / "last.ckpt"), wanted[ACCUMULATED])


@pytest.mark.parametrize("number", [5, 6, 7, 8, 9, 10, 11])
def test_validation_between_steps(tmp_path: Path, wanted: dict[int, Weights], number: int) -> None:
    """At every second batch; its checkpoints hold the best loss."""
    validation = {"limit_val_batches": 1, "val_check_interval": 2, "check_val_every_n_epoch": None}
    best = saving(tmp_path, save_top_k=1, monitor="val/loss", save_on_train_epoch_end=False)
    with pytest.raises(Killed):
        fit(best, DuringBatch(number, die), **validation)
    assert_equal(fit(ckpt=tmp_path / "last.ckpt", **validation), wanted[ACCUMULATED])


@pytest.mark.parametrize("number", [4, 6, 7, 9])
def test_a_run_that_ends_between_steps_can_be_extended(tmp_path: Path, wanted: dict[int, Weights], number: int) -> None:
    stopping = Stop(number)
    fit(stopping, saving(tmp_path, every_n_train_steps=100))
    assert_equal(fit(ckpt=tmp_path / "last.ckpt"), wanted[ACCUMULATED])


@pytest.mark.parametrize("has_validation", [False, True])
@pytest.mark.parametrize("number", [8, 9])
def test_the_end_of_an_epoch(tmp_path: Path, wanted: dict[int, Weights], has_validation: bool, number: int) -> None:
    validation: dict[str, Any] = {"limit_val_batches": int(has_validation)}
    with pytest.raises(Killed):
        fit(saving(tmp_path, every_n_epochs=1, save_top_k=1), DuringBatch(number, die), **validation)
    logged = CountedValidations()
    assert_equal(fit(logged, ckpt=tmp_path / "last.ckpt", **validation), wanted[ACCUMULATED])
    assert logged.num == int(has_validation), "the first epoch's was done"


@pytest.mark.parametrize("number", [3, 5, 7])
def test_a_run_that_is_stopped_again_before_its_next_step(
    tmp_path: Path, wanted: dict[int, Weights], number: int
) -> None:
    with pytest.raises(Killed):
        fit(SaveAndDie(number, tmp_path / "first.ckpt"))
    with pytest.raises(Killed):
        fit(SaveAndDie(number + 1, tmp_path / "second.ckpt"), ckpt=tmp_path / "first.ckpt")
    first, second = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["loops"] for name in ("first", "second"))
    assert first["fit_loop"] == second["fit_loop"] or number == 5, "there is no step between them"
    assert_equal(fit(ckpt=tmp_path / "second.ckpt"), wanted[ACCUMULATED])


class CountedValidations(pl.Callback):
    num = 0

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.num += 1


class Stop(pl.Callback):
    """Ends training after a batch, as `max_seconds` does."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.number


def test_the_codebooks_of_a_codec_go_back_too(tmp_path: Path) -> None:
    """They are averages that move with every batch, not with every step."""

    def run(*callbacks: pl.Callback, ckpt: Path | None = None) -> Weights:
        torch.manual_seed(0)
        module = CodecModule(TINY, optimizer=OptimizerConfig(lr=3e-3, warmup=0.05))
        with quiet_lightning():
            trainer = quiet_trainer(*callbacks, max_steps=4, accumulate_grad_batches=3)
            trainer.fit(module, datamodule=Waves(), ckpt_path=ckpt, weights_only=True)
        return module.state_dict()

    whole = run()
    for number in (1, 5):
        with pytest.raises(Killed):
            run(SaveAndDie(number, tmp_path / "cut.ckpt"))
        assert_equal(run(ckpt=tmp_path / "cut.ckpt"), whole)


class SaveEach(pl.Callback):
    """Saves after each batch, slowly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)
        time.sleep(0.04)


def train_on(path: Path) -> None:
    if path.exists() and torch.load(path, weights_only=True)["global_step"] >= settings_of(ACCUMULATED)["max_steps"]:
        return  # it was killed after its last step
    fit(SaveEach(path), ckpt=path if path.exists() else None)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_run_that_is_killed_again_and_again(tmp_path: Path) -> None:
    """SIGKILL at moments that nobody chose, each time after another step at least."""
    train_on(tmp_path / "whole.ckpt")
    rng, path = np.random.default_rng(0), tmp_path / "cut.ckpt"
    exit_codes: list[int | None] = []
    while not exit_codes or exit_codes[-1] != 0:
        seen = {path.stat().st_mtime_ns} if path.exists() else {0}
        process = torch.multiprocessing.get_context("fork").Process(target=train_on, args=(path,))
        process.start()
        while process.is_alive() and len(seen) <= ACCUMULATED:  # fewer batches may be no step, and no progress
            seen |= {path.stat().st_mtime_ns} if path.exists() else set()
            time.sleep(0.001)
        process.join(rng.uniform(0, 0.15))
        process.kill()
        process.join()
        exit_codes.append(process.exitcode)
        assert process.exitcode in (0, -signal.SIGKILL)
    assert len(exit_codes) > 3
    whole, cut = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("whole", "cut"))
    assert_equal(cut["state_dict"], whole["state_dict"])
    assert cut["loops"] == whole["loops"]
    averages = zip(*(saved["callbacks"]["EMA"]["average"].values() for saved in (cut, whole)), strict=True)
    assert all(torch.equal(*pair) for pair in averages)


def train_rank(rank: int, port: int, out: str, ckpt: Path | None, saving: SaveAndDie | None) -> None:
    """One of two gloo processes; what is drawn at random would be other than in one."""
    callbacks = [] if saving is None else [saving]
    module = decoder(loss=LossConfig(units=0.5, ctc=0.3))
    with contextlib.suppress(Killed):
        fit_rank(rank, port, out, module, NumberedData(), *callbacks, ckpt=ckpt, **settings_of(ACCUMULATED))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_ranks_that_stop_between_steps_go_on_as_two_or_as_one(tmp_path: Path) -> None:
    """As two they get the same weights as two that nobody stopped; as one the same but for the order of sums."""
    whole = run_two_ranks(train_rank, tmp_path, None, None)[0]["weights"]
    for number in (5, 8):
        path = tmp_path / f"{number}.ckpt"
        with pytest.raises(FileNotFoundError):  # they end without weights
            (tmp_path / "rank0.pt").unlink()
            run_two_ranks(train_rank, tmp_path, None, SaveAndDie(number, path))
        assert_equal(run_two_ranks(train_rank, tmp_path, path, None)[0]["weights"], whole)
        alone = decoder(loss=LossConfig(units=0.5, ctc=0.3))
        with quiet_lightning():
            trainer = quiet_trainer(**settings_of(ACCUMULATED))
            trainer.fit(alone, datamodule=NumberedData(), ckpt_path=path, weights_only=True)
        for name, weight in alone.state_dict().items():
            assert torch.allclose(weight, whole[name], atol=1e-4), name
