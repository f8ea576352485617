"""Reptile against a plain loop, resumed, on two ranks; and the plan that gives it one task at a time."""

from __future__ import annotations

import copy
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from mmllm.batch import PackedBatch
from mmllm.data import commands
from mmllm.data.loading.datamodules import PackedDataModule
from mmllm.data.plan.recipe import recipe_from_dict
from mmllm.data.plan.tasks import TaskConfig
from mmllm.model.multimodal import LossConfig
from mmllm.training.averaging import AverageLast
from mmllm.training.ema import EMA
from mmllm.training.lightning_cli import quiet_lightning
from mmllm.training.optimizers import OptimizerConfig
from mmllm.training.posttraining.reptile_module import ReptileConfig, ReptileModule
from tests.data_fixtures import make_folder, mixed_manifest, recipe_dict
from tests.training_fixtures import TinyData, quiet_trainer, tiny_batch, tiny_module

torch.set_num_threads(1)

FLAT = OptimizerConfig(lr=1e-2, warmup=0.0, min_lr_ratio=1.0, weight_decay=0.0, eps=1e-4)
PLAIN = LossConfig(units=0.5)


class TaskData(TinyData):
    """Numbered batches that say how many of them are one task's."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.tasks = TaskConfig(steps)


def reptile(config: ReptileConfig, optimizer: OptimizerConfig = FLAT) -> ReptileModule:
    like = tiny_module(seed=3, loss=PLAIN, moe=None, moe_layers=())
    torch.manual_seed(3)
    return ReptileModule(
        config, decoder=like.decoder, vision=like.vision, image_projector=like.image_projector, audio=like.audio,
        loss=like.loss, optimizer=optimizer,
    )  # fmt: skip


def fit(module: ReptileModule, *callbacks: pl.Callback, data: Any = None, ckpt: Any = None, **trainer: Any) -> None:
    with quiet_lightning():
        quiet_trainer(*callbacks, limit_train_batches=100, **trainer).fit(
            module, datamodule=data or TaskData(module.reptile.inner_steps), ckpt_path=ckpt, weights_only=True
        )


def by_a_plain_loop(config: ReptileConfig, num_rounds: int) -> dict[str, torch.Tensor]:
    """Algorithm 2 of the paper with everything written out."""
    module = reptile(config)
    module.configure_model()
    assert module.model is not None
    module.train()
    outer = {name: weight.clone() for name, weight in module.state_dict().items()}
    batches, moments = iter(range(10_000)), None
    for number in range(num_rounds):
        moves = []
        for _ in range(config.meta_batch_size):
            module.load_state_dict(outer)
            parameters = [p for p in module.parameters() if p.requires_grad]
            if config.inner_optimizer == "sgd":
                inner: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=FLAT.lr)
            else:
                inner = torch.optim.AdamW(parameters, lr=FLAT.lr, betas=FLAT.betas, eps=FLAT.eps, weight_decay=0.0)
                if not config.reset_optimizer and moments is not None:
                    inner.load_state_dict(moments)
            for _ in range(config.inner_steps):
                index = next(batches)
                loss, _, _ = module.loss_of(tiny_batch(index, 2, text_only=(index + 1) % 4 == 0))
                inner.zero_grad()
                loss.backward()
                inner.step()
            moments = copy.deepcopy(inner.state_dict())
            moves.append({name: module.state_dict()[name] - outer[name] for name in outer})
        epsilon = config.outer_lr * ((1 - number / num_rounds) if config.anneal else 1)
        outer = {
            name: weight + epsilon * sum(move[name] for move in moves) / len(moves)
            if weight.is_floating_point() else weight
            for name, weight in outer.items()
        }  # fmt: skip
    return outer


@pytest.mark.parametrize(
    "config",
    [
        ReptileConfig(inner_steps=3, outer_lr=0.7, anneal=False, inner_optimizer="sgd"),
        ReptileConfig(inner_steps=2, outer_lr=0.5),
        ReptileConfig(inner_steps=2, outer_lr=0.5, meta_batch_size=2),
        ReptileConfig(inner_steps=2, reset_optimizer=False),
    ],
    ids=["sgd", "adam", "rounds of two tasks", "moments that go on"],
)
def test_it_is_the_papers_algorithm(config: ReptileConfig) -> None:
    module = reptile(config)
    fit(module, max_steps=3 * config.round_steps)
    wanted, got = by_a_plain_loop(config, 3), module.state_dict()
    assert wanted.keys() == got.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(got[name], weight, rtol=1e-5, atol=1e-6, msg=name)


def test_inner_steps_alone_would_be_plain_training() -> None:
    """With ε 1 and one task of all steps nothing but the inner optimizer moves the weights."""
    config = ReptileConfig(inner_steps=4, anneal=False)
    module = reptile(config)
    fit(module, max_steps=4)
    plain = tiny_module(seed=3, loss=PLAIN, moe=None, moe_layers=(), optimizer=FLAT)
    torch.manual_seed(3)
    with quiet_lightning():
        quiet_trainer(max_steps=4, limit_train_batches=100).fit(plain, datamodule=TinyData())
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], weight, rtol=0, atol=1e-7, msg=name)


class StopAfter(pl.Callback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.steps


@pytest.mark.parametrize("stop", [2, 3, 5, 6])
def test_resuming_within_a_round_equals_not_stopping(tmp_path: Path, stop: int) -> None:
    config = ReptileConfig(inner_steps=2, meta_batch_size=2, outer_lr=0.5)

    def run(steps: int, folder: str, ckpt: Any = None) -> dict[str, torch.Tensor]:
        module = reptile(config)
        saving = ModelCheckpoint(tmp_path / folder, save_last=True, save_top_k=0, every_n_train_steps=1)
        fit(module, saving, StopAfter(steps), ckpt=ckpt, max_steps=8, enable_checkpointing=True)
        return module.state_dict()

    whole = run(8, "whole")
    run(stop, "cut")
    resumed = run(8, "cut", tmp_path / "cut" / "last.ckpt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_what_is_stopped_within_a_round_keeps_the_last_rounds_weights() -> None:
    config = ReptileConfig(inner_steps=3, anneal=False)
    whole = reptile(config)
    fit(whole, max_steps=3)
    cut = reptile(config)
    fit(cut, StopAfter(5), max_steps=9)
    assert cut.trainer.global_step == 5
    assert all(torch.equal(whole.state_dict()[name], weight) for name, weight in cut.state_dict().items())


def test_seconds_end_it_with_a_round() -> None:
    module = reptile(ReptileConfig(inner_steps=3))
    module.max_seconds = 1e-6
    fit(module)
    assert module.trainer.global_step == 3


def test_what_does_not_fit_is_refused() -> None:
    module = reptile(ReptileConfig(inner_steps=3))
    with pytest.raises(ValueError, match="max_steps is 7, and a round has 3"):
        fit(module, max_steps=7)
    with pytest.raises(ValueError, match=r"4 batches of a task .* data\.init_args\.tasks\.steps to 3"):
        fit(reptile(ReptileConfig(inner_steps=3)), data=TaskData(4), max_steps=3)
    with pytest.raises(ValueError, match="all tasks mixed"):
        fit(reptile(ReptileConfig(inner_steps=3)), data=TinyData(), max_steps=3)
    for averaging in (EMA(0.9), AverageLast(2, 1)):
        with pytest.raises(ValueError, match=f"has {type(averaging).__name__}, which would average weights within"):
            fit(reptile(ReptileConfig(inner_steps=3)), averaging, max_steps=3)
    for wrong in ({"inner_steps": 0}, {"outer_lr": 0.0}, {"outer_lr": 1.5}, {"inner_optimizer": "adagrad"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ReptileConfig(**wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"tasks\.steps is 0"):
        TaskConfig(0)


# --- the plan --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("tasks")
    make_folder(home / "tokenizer")
    commands.build(mixed_manifest(home / "rows"), home / "shards", home / "tokenizer")
    commands.index(home / "shards", home / "tokenizer")
    return home


def data_of(home: Path, tasks: TaskConfig | None, **changes: Any) -> PackedDataModule:
    values = recipe_dict(home / "shards", home / "tokenizer", **{"mixture": {"on_exhausted": "repeat"}, **changes})
    return PackedDataModule(recipe_from_dict(values), batch_size=2, tasks=tasks)


def sources_of(batch: PackedBatch) -> set[int]:
    return set(batch.source_BT.unique().tolist()) - {-1}


def test_steps_are_of_one_source_at_a_time_by_their_weights(shards: Path) -> None:
    data = data_of(shards, TaskConfig(3))
    batches = list(islice(iter(data.train_dataloader()), 12))
    turns = [set.union(*(sources_of(batch) for batch in batches[at : at + 3])) for at in range(0, 12, 3)]
    assert all(len(turn) == 1 for turn in turns) and len(set.union(*turns)) > 1
    plan: Any = data.plan
    drawn = np.bincount([plan.task_of(turn) for turn in range(2000)], minlength=4) / 2000
    np.testing.assert_allclose(drawn, [0.3, 0.3, 0.1, 0.3], atol=0.04)
    mixed = list(islice(iter(data_of(shards, None).train_dataloader()), 4))
    assert any(len(sources_of(batch)) > 1 for batch in mixed)


def test_a_task_draws_what_a_recipe_of_its_source_alone_does(shards: Path) -> None:
    values = recipe_dict(shards / "shards", shards / "tokenizer", mixture={"on_exhausted": "repeat"})
    plan: Any = PackedDataModule(recipe_from_dict(values), batch_size=1, tasks=TaskConfig(2)).plan
    alone = PackedDataModule(recipe_from_dict({**values, "sources": values["sources"][:1]}), batch_size=1).plan
    window = [step.sequences for step in takewhile(lambda step: step.state["window"] == 0, alone.steps())]
    of_task = (step for step in plan.steps() if plan.task_of(step.step // 2) == 0)
    # A window's sequences are shuffled otherwise where a recipe has several sources; the last one is not in `window`.
    drawn = [step.sequences for step in islice(of_task, len(window) + 1)]
    assert len(window) > 2 and set(window) < set(drawn)


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_the_plan_resumes_anywhere(shards: Path, stop: int) -> None:
    def named(batches: list[PackedBatch]) -> list[list[int]]:
        return [batch.token_ids_BT.flatten().tolist() for batch in batches]

    whole = named(list(islice(iter(data_of(shards, TaskConfig(3)).train_dataloader()), 10)))
    first = data_of(shards, TaskConfig(3)).train_dataloader()
    stream = iter(first)
    taken = named([next(stream) for _ in range(stop)])
    state = first.state_dict()
    second = data_of(shards, TaskConfig(3)).train_dataloader()
    second.load_state_dict(state)
    assert taken + named(list(islice(iter(second), 10 - stop))) == whole
    plan = data_of(shards, TaskConfig(3)).plan
    assert plan.at(stop).sequences == next(islice(plan.steps(), stop, None)).sequences
    other = data_of(shards, TaskConfig(2)).train_dataloader()
    with pytest.raises(ValueError, match="3 steps at a time of each of 4 tasks, this run 2"):
        other.load_state_dict(state)


def test_a_columns_values_are_tasks(shards: Path) -> None:
    values = recipe_dict(shards / "shards", shards / "tokenizer", mixture={"on_exhausted": "repeat"})
    values["sources"] = [{"name": "said", "kind": "audio", "shards": str(shards / "shards/audio-*.tar"), "weight": 0.4}]
    data = PackedDataModule(recipe_from_dict(values), batch_size=2, tasks=TaskConfig(2, "speaker"))
    data.setup("fit")
    assert data.source_names == ["said:ann", "said:bob"] and data.plan.recipe.shares() == [0.5, 0.5]
    batches = list(islice(iter(data.train_dataloader()), 12))
    assert {len(sources_of(batch)) for batch in batches} == {1}
    with pytest.raises(ValueError, match="'accent', which no document of source 'said' has"):
        _ = PackedDataModule(recipe_from_dict(values), tasks=TaskConfig(2, "accent")).plan
    with pytest.raises(ValueError, match="one task, 'said'"):
        _ = PackedDataModule(recipe_from_dict(values), tasks=TaskConfig(2)).plan
