"""Schedules with a stable phase, several decays from one run, and the mean of the last weights."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from mmllm.training.averaging import AverageLast
from mmllm.training.lightning_cli import quiet_lightning
from mmllm.training.optimizers import OptimizerConfig, learning_rate_factor
from tests.training_fixtures import TinyData, quiet_trainer, tiny_module

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]
WSD = OptimizerConfig(lr=1e-2, schedule="wsd", warmup_steps=2, decay_steps=3, min_lr_ratio=0.1)


class KeepsRates(pl.Callback):
    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def fit(
    count: int, *callbacks: pl.Callback, optimizer: OptimizerConfig = WSD, ckpt: Any = None, **settings: Any
) -> Any:
    module = tiny_module(optimizer=optimizer, **settings)
    with quiet_lightning():
        trainer = quiet_trainer(*callbacks, max_steps=count, enable_checkpointing=any(
            isinstance(each, ModelCheckpoint) for each in callbacks))  # fmt: skip
        trainer.fit(module, datamodule=TinyData(), ckpt_path=ckpt, weights_only=True)
    return module


@pytest.mark.parametrize("shape", ["sqrt", "linear"])
def test_the_rate_rises_stays_and_falls(shape: Any) -> None:
    config = OptimizerConfig(schedule="wsd", warmup=0.2, decay=0.4, decay_shape=shape, min_lr_ratio=0.1)
    assert [learning_rate_factor(done, config) for done in (0.0, 0.1, 0.2, 0.4, 0.6)] == [0.0, 0.5, 1.0, 1.0, 1.0]
    half = math.sqrt(0.5) if shape == "sqrt" else 0.5
    assert learning_rate_factor(0.8, config) == pytest.approx(1 - 0.9 * half)
    assert learning_rate_factor(1.0, config) == pytest.approx(0.1)
    linear = OptimizerConfig(schedule="linear", warmup=0.2, min_lr_ratio=0.0)
    assert [learning_rate_factor(done, linear) for done in (0.1, 0.2, 0.6, 1.0)] == pytest.approx([0.5, 1, 0.5, 0])
    constant = OptimizerConfig(schedule="constant", warmup=0.2)
    assert [learning_rate_factor(done, constant) for done in (0.1, 0.2, 1.0)] == [0.5, 1.0, 1.0]


def test_the_cosine_is_as_it_was() -> None:
    config = OptimizerConfig(warmup=0.03, min_lr_ratio=0.05)
    for done in (0.0, 0.01, 0.03, 0.2, 0.999, 1.0):
        decayed = (done - 0.03) / 0.97
        wanted = done / 0.03 if done < 0.03 else 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * decayed))
        assert learning_rate_factor(done, config) == wanted


def test_several_decays_of_one_run_equal_runs_of_their_own(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    kept = KeepsRates()
    fit(12, saving, kept)
    assert kept.rates[:9] == [0.005] + [0.01] * 8 and kept.rates[-1] == pytest.approx(0.001)
    for horizon, begins in ((7, 4), (7, 3), (10, 7), (15, 9)):
        alone, branch = KeepsRates(), KeepsRates()
        wanted = fit(horizon, alone)
        got = fit(horizon, branch, ckpt=tmp_path / f"step={begins}.ckpt")
        assert branch.rates == alone.rates[begins:], horizon
        for (name, weight), other in zip(wanted.state_dict().items(), got.state_dict().values(), strict=True):
            assert torch.equal(weight, other), f"{name} of {horizon} steps from {begins}"


def test_a_branch_that_begins_in_a_decay_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    fit(8, saving)
    with caplog.at_level(logging.WARNING):
        fit(12, ckpt=tmp_path / "step=5.ckpt")
        assert not [record for record in caplog.records if "jumps" in record.getMessage()]
        fit(12, ckpt=tmp_path / "step=7.ckpt")
    assert any("jumps at step 7 from 0.265 to 1 of its peak" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"schedule": "wds"}, r"schedule is 'wds'; choose cosine, wsd"),
        ({"schedule": "wsd", "warmup": 0.6, "decay": 0.5}, r"decay is 0\.5 and warmup 0\.6"),
        ({"decay_steps": 10}, r"decay_steps is 10 and schedule is cosine"),
        ({"schedule": "wsd", "decay_steps": 0}, r"decay_steps is 0; give 1 or more"),
        ({"schedule": "wsd", "decay_shape": "square"}, r"decay_shape is 'square'"),
    ],
)
def test_bad_schedules_are_named(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        OptimizerConfig(**values)


def test_steps_of_a_schedule_need_a_number_of_steps() -> None:
    with pytest.raises(ValueError, match=r"warmup_steps is 2 .* decay_steps 3 .* with trainer\.max_steps 4"):
        fit(4)
    with pytest.raises(ValueError, match=r"max_seconds 5\.0; set max_steps to at least their sum"):
        fit(9, max_seconds=5.0)


@pytest.mark.parametrize(
    ("told", "fits"),
    [
        ({"warmup": 0.5, "decay_steps": 6}, False),
        ({"warmup_steps": 4, "decay": 0.7}, False),
        ({"warmup": 0.07, "decay_steps": 93}, True),
        ({"schedule": "linear", "warmup_steps": 11}, False),
    ],
)
def test_a_warm_up_and_a_decay_that_overlap_are_refused_also_where_one_is_a_share(
    told: dict[str, Any], fits: bool
) -> None:
    """The rate would jump from one to the other."""
    config = OptimizerConfig(**{"schedule": "wsd", **told})
    num_steps = 100 if fits else 10
    assert config.fits(num_steps) == fits
    if not fits:
        with pytest.raises(ValueError, match="set max_steps to at least their sum"):
            fit(num_steps, optimizer=config)


class KeepsWeights(pl.Callback):
    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.weights[trainer.global_step] = {n: w.detach().clone() for n, w in pl_module.named_parameters()}


@pytest.mark.parametrize(("count", "steps"), [(8, (4, 6, 8)), (9, (6, 8, 9)), (2, (2,))])
def test_the_mean_of_the_last_weights_is_what_is_left(count: int, steps: tuple[int, ...]) -> None:
    kept, average = KeepsWeights(), AverageLast(num=3, every_steps=2)
    module = fit(count, kept, average, optimizer=OptimizerConfig(lr=1e-2))
    assert tuple(average.steps) == steps
    for name, weight in module.named_parameters():
        wanted = sum(kept.weights[step][name] for step in steps) / len(steps)
        torch.testing.assert_close(weight.detach(), wanted, atol=1e-7, rtol=1e-6, msg=name)
    name = "model.decoder.layers.0.self_attn.q_proj.weight"
    assert len(steps) == 1 or not torch.allclose(kept.weights[count][name], dict(module.named_parameters())[name])


def test_the_mean_of_a_resumed_run_is_that_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    optimizer = OptimizerConfig(lr=1e-2, schedule="constant")
    wanted = fit(8, AverageLast(3, 2), optimizer=optimizer)
    saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=5)
    fit(7, AverageLast(3, 2), saving, optimizer=optimizer)
    got = fit(8, AverageLast(3, 2), optimizer=optimizer, ckpt=tmp_path / "step=5.ckpt")
    for (name, weight), other in zip(wanted.state_dict().items(), got.state_dict().values(), strict=True):
        assert torch.equal(weight, other), name


def test_what_was_trained_can_be_exported_beside_the_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = KeepsWeights()
    written: dict[str, dict[str, Tensor]] = {}

    def export(self: Any, directory: Path) -> None:
        written[directory.name] = {name: weight.detach().clone() for name, weight in self.named_parameters()}

    monkeypatch.setattr("mmllm.training.decoder_module.DecoderModule.export", export)
    average = AverageLast(2, 2, last_out=str(tmp_path / "last"))
    module = fit(6, kept, average, optimizer=OptimizerConfig(lr=1e-2), out=str(tmp_path / "mean"))
    for name, weight in module.named_parameters():
        assert torch.equal(written["last"][name], kept.weights[6][name]), name
        assert torch.equal(written["mean"][name], weight), name


def test_what_cant_be_averaged_is_said() -> None:
    with pytest.raises(ValueError, match="AverageLast has num 1"):
        AverageLast(num=1)
    with pytest.raises(ValueError, match="last_out is given, but LightningModule exports nothing"):
        AverageLast(2, 2, last_out="out").on_train_start(pl.Trainer(), pl.LightningModule())
