"""The moving average of sharded weights: kept, saved and restored, on other numbers of ranks too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.tensor import DTensor

from mmllm.training.ema import EMA
from mmllm.training.lightning_cli import quiet_lightning
from mmllm.training.optimizers import OptimizerConfig
from tests.training_fixtures import TinyData, fit_rank, quiet_trainer, run_ranks, tiny_module

NUM_STEPS, SAVED_EVERY = 6, 2
pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed:UserWarning", "ignore:.*fork:DeprecationWarning"
)
ATOL = 1e-5
"""Of fp32; weights move by some 1e-3 a step."""


class SeedsTheBuild(pl.Callback):
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        torch.manual_seed(4)


class KeepsTheAverage(pl.Callback):
    """The whole average that training begins with; and whether it and what it replaces are sharded."""

    def __init__(self, ema: EMA, path: Path) -> None:
        self.ema, self.path = ema, path

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.ema._average is not None
        sharded = {isinstance(p, DTensor) for p in (*self.ema._average.values(), *pl_module.parameters())}
        assert sharded == {isinstance(trainer.strategy, ModelParallelStrategy)}
        average = {n: a.full_tensor() if isinstance(a, DTensor) else a for n, a in self.ema._average.items()}
        if trainer.is_global_zero:
            torch.save(average, self.path)


def _module() -> Any:
    return tiny_module(optimizer=OptimizerConfig(lr=1e-3, warmup=0.1, muon=True))


def _callbacks(out: Path) -> list[pl.Callback]:
    saving = ModelCheckpoint(out, "{step}", save_top_k=-1, every_n_train_steps=SAVED_EVERY)
    ema = EMA(0.8)
    return [SeedsTheBuild(), ema, saving, KeepsTheAverage(ema, out / "begins.pt")]


SETTINGS: dict[str, Any] = {"max_steps": NUM_STEPS, "enable_checkpointing": True, "limit_train_batches": 100}


def _fit_alone(out: Path, ckpt: Path | None = None) -> dict[str, torch.Tensor]:
    out.mkdir(exist_ok=True)
    module = _module()
    with quiet_lightning():
        trainer = quiet_trainer(*_callbacks(out), **SETTINGS)
        trainer.fit(module, datamodule=TinyData(), ckpt_path=ckpt, weights_only=True)
    return module.state_dict()


def _fit_rank(rank: int, port: int, out: str, num_ranks: int, is_distributed: bool, ckpt: Path | None) -> None:
    strategy = ModelParallelStrategy(num_ranks, 1, save_distributed_checkpoint=is_distributed)
    settings = {**SETTINGS, "strategy": strategy, "num_ranks": num_ranks}
    fit_rank(rank, port, out, _module(), TinyData(), *_callbacks(Path(out)), ckpt=ckpt, **settings)


def _fit_sharded(
    out: Path, num_ranks: int = 2, is_distributed: bool = True, ckpt: Path | None = None
) -> dict[str, torch.Tensor]:
    out.mkdir(exist_ok=True)
    ranks = run_ranks(_fit_rank, out, num_ranks, is_distributed, ckpt, num_ranks=num_ranks)
    return ranks[0]["weights"]


def _assert_close(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=ATOL, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """One process's folder and what it ends with: the average."""
    out = tmp_path_factory.mktemp("alone")
    return out, _fit_alone(out)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The same of two ranks."""
    out = tmp_path_factory.mktemp("sharded")
    return out, _fit_sharded(out)


def _average_at(alone: Path, step: int) -> dict[str, torch.Tensor]:
    return torch.load(alone / f"step={step}.ckpt", weights_only=True)["callbacks"]["EMA"]["average"]


def _begins(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "begins.pt", weights_only=True)


def test_a_sharded_average_is_that_of_one_process_and_saved_in_shards(alone: Any, sharded: Any) -> None:
    _assert_close(sharded[1], alone[1])
    (folder, _), (file, _) = sharded, alone
    state = torch.load(folder / "step=4.ckpt" / "meta.pt", weights_only=True)["callbacks"]["EMA"]
    assert not any(isinstance(value, (torch.Tensor, dict, list)) for value in state.values()), (
        "the average is elsewhere"
    )
    names = {f"state_dict.ema.{name}" for name in _average_at(file, 4)}
    stored = FileSystemReader(folder / "step=4.ckpt").read_metadata().state_dict_metadata
    assert names < stored.keys()
    some: Any = stored["state_dict.ema.model.decoder.embed_tokens.weight"]
    assert len(some.chunks) == 2, "each rank writes its own rows"


def test_it_goes_on_in_as_many_ranks_and_from_their_whole_file_in_one(alone: Any, sharded: Any, tmp_path: Path) -> None:
    weights = _fit_sharded(tmp_path / "two", is_distributed=False, ckpt=sharded[0] / "step=2.ckpt")
    _assert_close(_begins(tmp_path / "two"), _average_at(alone[0], 2))
    _assert_close(weights, sharded[1])
    whole = tmp_path / "two" / "step=4.ckpt"
    assert whole.is_file()
    _assert_close(_fit_alone(tmp_path / "one", ckpt=whole), alone[1])
    _assert_close(_begins(tmp_path / "one"), _average_at(alone[0], 4))


def test_it_goes_on_in_fewer_ranks(alone: Any, sharded: Any, tmp_path: Path) -> None:
    weights = _fit_sharded(tmp_path, num_ranks=1, ckpt=sharded[0] / "step=4.ckpt")
    _assert_close(_begins(tmp_path), _average_at(alone[0], 4))
    _assert_close(weights, alone[1])


def test_it_goes_on_in_ranks_from_the_file_of_one_process(alone: Any, tmp_path: Path) -> None:
    weights = _fit_sharded(tmp_path, ckpt=alone[0] / "step=4.ckpt")
    assert all(
        torch.equal(a, b) for a, b in zip(_begins(tmp_path).values(), _average_at(alone[0], 4).values(), strict=True)
    )
    _assert_close(weights, alone[1])


def test_a_list_as_it_was_saved_earlier_is_read(alone: Any, tmp_path: Path) -> None:
    checkpoint = torch.load(alone[0] / "step=4.ckpt", weights_only=True)
    checkpoint["callbacks"]["EMA"]["average"] = list(_average_at(alone[0], 4).values())
    torch.save(checkpoint, tmp_path / "earlier.ckpt")
    weights = _fit_alone(tmp_path / "on", ckpt=tmp_path / "earlier.ckpt")
    assert all(torch.equal(weights[name], weight) for name, weight in alone[1].items())
    checkpoint["callbacks"]["EMA"]["average"].pop()
    torch.save(checkpoint, tmp_path / "shorter.ckpt")
    with pytest.raises(ValueError, match=r"moving average and the weights that are trained now differ in"):
        _fit_alone(tmp_path / "on", ckpt=tmp_path / "shorter.ckpt")


def test_a_distributed_checkpoint_that_was_made_one_file_is_read(alone: Any, sharded: Any, tmp_path: Path) -> None:
    checkpoint: Any = _load_distributed_checkpoint(sharded[0] / "step=4.ckpt")
    torch.save(checkpoint, tmp_path / "one.ckpt")
    module, ema, trainer = _module(), EMA(0.8), quiet_trainer()
    module.configure_model()
    trainer.ckpt_path = tmp_path / "one.ckpt"
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    ema.on_load_checkpoint(trainer, module, checkpoint)
    assert ema._average is not None
    _assert_close(ema._average, _average_at(alone[0], 4))
