from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from mmllm.batch import PackedBatch
from mmllm.data.loading.collate import pack_documents
from mmllm.model.multimodal import LossConfig
from mmllm.parallel.mesh import ParallelMesh
from mmllm.training.ema import EMA
from mmllm.training.lightning_cli import quiet_lightning
from mmllm.training.optimizers import OptimizerConfig
from mmllm.training.strategy import MeshStrategy
from tests.training_fixtures import (
    ListData,
    LossRecorder,
    TinyData,
    merge,
    mixed_pairs,
    one_sided_pairs,
    quiet_trainer,
    run_two_ranks,
    tiny_batch,
    tiny_module,
    train_rank,
)

GOLDEN = Path(__file__).parent / "golden" / "decoder_20_steps.json"
NOISY = LossConfig(units=0.5, ctc=0.3, word_dropout=0.3)


def _fit(
    module: pl.LightningModule, data: pl.LightningDataModule, *callbacks: pl.Callback, ckpt: Any = None, **trainer: Any
) -> list[float]:
    recorder = LossRecorder()
    with quiet_lightning():
        quiet_trainer(recorder, *callbacks, **trainer).fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return recorder.losses


@pytest.mark.parametrize("muon", [False, True])
def test_resuming_equals_not_stopping(tmp_path: Path, muon: bool) -> None:
    optimizer = OptimizerConfig(lr=1e-2, warmup=0.2, muon=muon)

    def run(steps: int, name: str, ckpt: Any = None) -> tuple[list[float], dict[str, torch.Tensor]]:
        module = tiny_module(seed=3, loss=NOISY, optimizer=optimizer)
        torch.manual_seed(3)
        saving = ModelCheckpoint(tmp_path / name, save_last=True, save_top_k=0, every_n_train_steps=1)
        settings = {"enable_checkpointing": True, "limit_train_batches": 100, "gradient_clip_val": 1.0}
        module.optimizer = optimizer
        stopping = _StopAfter(steps)
        losses = _fit(module, TinyData(), saving, EMA(0.9), stopping, ckpt=ckpt, max_steps=8, **settings)
        return losses, module.state_dict()

    whole, weights = run(8, "whole")
    first, _ = run(5, "cut")
    second, resumed_weights = run(8, "cut", ckpt=tmp_path / "cut" / "last.ckpt")
    assert len(first) == 5
    assert first + second == whole
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)


def test_a_checkpoint_that_is_first_saved_at_the_end_holds_the_trained_weights(tmp_path: Path) -> None:
    def run(steps: int, saving: ModelCheckpoint, ckpt: Any = None) -> tuple[list[float], dict[str, torch.Tensor]]:
        module = tiny_module(seed=3)
        torch.manual_seed(3)
        settings = {"enable_checkpointing": True, "limit_train_batches": 100}
        module.optimizer = OptimizerConfig(lr=1e-2, warmup=0.0, min_lr_ratio=1.0)  # `steps` changes no rate
        losses = _fit(module, TinyData(), saving, EMA(0.9), ckpt=ckpt, max_steps=steps, **settings)
        return losses, module.state_dict()

    def rarely(name: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / name, save_last=True, save_top_k=0, every_n_train_steps=100)

    whole, weights = run(6, rarely("whole"))
    first, averaged = run(3, rarely("cut"))
    saved = torch.load(tmp_path / "cut" / "last.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == averaged.keys()
    assert not all(torch.equal(saved[name], averaged[name]) for name in saved), "the average is what is exported"
    second, extended = run(6, rarely("cut"), ckpt=tmp_path / "cut" / "last.ckpt")
    assert first + second == whole
    assert all(torch.equal(weights[name], extended[name]) for name in weights)


class _StopAfter(pl.Callback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("pairs", "tolerance", "of_weights"), [(mixed_pairs(), 1e-5, 1e-4), (one_sided_pairs(), 1e-3, 2e-3)]
)
def test_two_ranks_give_the_losses_and_weights_of_one_also_when_one_has_text_alone(
    tmp_path: Path, pairs: list[tuple[PackedBatch, PackedBatch]], tolerance: float, of_weights: float
) -> None:
    """AdamW's first step divides a gradient by itself: where gradients all but cancel, a weight moves by rounding."""
    alone = tiny_module()
    losses = _fit(alone, ListData([merge(list(pair)) for pair in pairs]), max_steps=len(pairs))
    ranks = run_two_ranks(train_rank, tmp_path, pairs)
    for name, weight in alone.state_dict().items():
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name]), name
        assert torch.allclose(ranks[0]["weights"][name], weight, atol=of_weights), name
    for rank in ranks:
        assert rank["losses"] == pytest.approx(losses, rel=tolerance)


def test_accumulated_batches_give_the_gradients_of_one_large_batch() -> None:
    loss = LossConfig(units=0.5)
    batches = [tiny_batch(0, 1), tiny_batch(1, 3), tiny_batch(2, 2, text_only=True), tiny_batch(3, 1)]
    large = [merge(batches[:2]), merge(batches[2:])]
    gradients = []
    for data, accumulate in ((batches, 2), (large, 1)):
        module = tiny_module(loss=loss)
        module.decoder = _without_auxiliary_losses(module.decoder)
        kept = _KeepGradients()
        _fit(module, ListData(data), kept, max_steps=2, accumulate_grad_batches=accumulate)
        gradients.append(kept.gradients)
    assert len(gradients[0]) == len(gradients[1]) == 2
    for accumulated, at_once in zip(*gradients, strict=True):
        for name in at_once:
            assert torch.allclose(accumulated[name], at_once[name], rtol=1e-4, atol=1e-6), name


def _without_auxiliary_losses(decoder: Any) -> Any:
    import dataclasses

    return dataclasses.replace(
        decoder, moe=dataclasses.replace(decoder.moe, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    )


class _KeepGradients(pl.Callback):
    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        grads = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}
        if grads and any(grad.abs().sum() for grad in grads.values()):
            self.gradients.append(grads)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None})


def test_twenty_steps_reach_the_golden_loss() -> None:
    losses = _fit(tiny_module(seed=1), TinyData(), max_steps=20)
    golden = json.loads(GOLDEN.read_text())["losses"]
    assert losses == pytest.approx(golden, rel=2e-4)
    assert losses[-2] < losses[0] - 0.3


def test_bf16_follows_fp32() -> None:
    exact = _fit(tiny_module(), TinyData(), max_steps=4)
    half = _fit(tiny_module(), TinyData(), max_steps=4, precision="bf16-mixed")
    assert half != exact
    assert half == pytest.approx(exact, rel=2e-2)


def test_training_ends_when_the_seconds_are_over_and_the_schedule_with_it() -> None:
    module = tiny_module(max_seconds=0.5)
    losses = _fit(module, TinyData(), max_steps=100_000)
    assert 1 <= len(losses) < 1000
    assert module.elapsed_seconds >= 0.5
    assert module.progress == 1.0


def test_training_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="training has no end"):
        _fit(tiny_module(), TinyData())


def test_a_mesh_that_does_not_divide_the_model_is_refused() -> None:
    import torch.testing._internal.distributed.fake_pg  # registers the backend

    torch.distributed.init_process_group("fake", rank=0, world_size=3, store=torch.distributed.HashStore())
    try:
        module = tiny_module()
        strategy = MeshStrategy(fsdp=1, tensor=3)
        strategy._mesh = ParallelMesh.build(strategy.config, "cpu")
        module._trainer = SimpleNamespace(strategy=strategy)  # pyright: ignore
        with pytest.raises(ValueError, match=r"num_attention_heads is 2, which strategy.tensor, 3, does not divide"):
            module.configure_model()
        assert module.model is None
    finally:
        torch.distributed.destroy_process_group()


def test_a_frozen_tower_stays() -> None:
    module = tiny_module(optimizer=OptimizerConfig(lr=1e-2, tower_lr=0.0))
    module.configure_model()
    before = {name: p.clone() for name, p in module.named_parameters()}
    _fit(module, TinyData(), max_steps=3)
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert not any(name.startswith("model.vision.") for name in moved)
    assert any(name.startswith("model.image_projector.") for name in moved)


def test_metrics_of_a_window(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    from mmllm.training.callbacks import RoutingLog

    logger = CSVLogger(tmp_path, name="", version="")
    module = tiny_module()
    _fit(module, TinyData(), RoutingLog(str(tmp_path), every_steps=4), max_steps=8, logger=logger, log_every_n_steps=4)
    columns = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    wanted = {"loss/text", "loss/units", "loss/ctc", "loss/source/captions", "padding_share", "tokens_per_second", "lr"}
    assert wanted <= {column.removeprefix("train/") for column in columns}
    assert "routing/mutual_information_bits" in columns
    counts = torch.tensor(json.loads((tmp_path / "routing.json").read_text())["counts"])
    assert counts.shape == (1, 4, 4)
    assert (counts.sum(dim=-1) > 0).all(), "every modality was routed"


def test_a_batch_of_padding_alone_has_a_loss_of_nothing() -> None:
    """As a rank gets where there are fewer sequences than ranks: nobody then knows how many codebooks there are."""
    module = tiny_module()
    module.configure_model()
    loss, losses, _ = module.loss_of(pack_documents([[], []], 16))
    loss.backward()
    assert float(loss.detach()) == 0 and float(losses.counts["task"]) == 0
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("kind", ["mixed", "text alone", "padding alone"])
def test_every_batch_passes_the_ctc_head_forwards_and_backwards(kind: str) -> None:
    """Where it is sharded, each rank has to: else one waits for the other for ever."""
    module = tiny_module()
    module.configure_model()
    assert module.model is not None and module.model.ctc_head is not None
    seen: list[str] = []
    module.model.ctc_head.register_forward_hook(lambda *_: seen.append("forward"))
    module.model.ctc_head.register_full_backward_hook(lambda _, grads, __: seen.append(f"input {grads[0] is not None}"))
    batch = pack_documents([[], []], 16) if kind == "padding alone" else tiny_batch(0, text_only=kind == "text alone")
    module.loss_of(batch)[0].backward()
    assert seen == ["forward", "input True"]
