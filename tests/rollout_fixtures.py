"""A tiny model with all senses in its folder, prompts for it, and a `RolloutModule` that needs no trainer."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from mmllm.checkpoints.folder import save_model
from mmllm.checkpoints.settings import GenerationConfig
from mmllm.data.loading.prompts import PromptBatch, PromptDataModule, PromptLoader
from mmllm.training.optimizers import OptimizerConfig
from mmllm.training.posttraining.rollout_module import RolloutModule
from mmllm.training.posttraining.rollouts import RolloutConfig
from mmllm_tokenizers.pointer import PointerRule
from tests.inference_fixtures import images, make_model, make_tokenizer

torch.set_num_threads(1)
RATES = OptimizerConfig(lr=3e-3, warmup=0.0, min_lr_ratio=1.0)


def model_folder(folder: Path, pattern: str = "delay", pointer: bool = True) -> Path:
    tokenizer = make_tokenizer(pattern, pointer=PointerRule() if pointer else None)
    save_model(folder, make_model(tokenizer), tokenizer, generation=GenerationConfig(max_seconds=0.2))
    return folder


def manifest(folder: Path, count: int = 6) -> Path:
    """Captions, and texts to answer or to speak."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for number, picture in enumerate(images(count)):
        Image.fromarray(picture).save(folder / f"{number}.png")
        rows.append({"id": f"picture {number}", "image": f"{number}.png", "text": "a red circle"})
        rows.append({"id": f"text {number}", "text": ["one", "two, three", "he said"][number % 3]})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def length_of(answers: Any, rows: Any) -> list[float]:
    """A reward that any untrained model can raise: fewer characters."""
    return [-float(len(answer)) for answer in answers]


SHORT: dict[str, Any] = {"name": "tests.rollout_fixtures:length_of"}


def make_module(folder: Path, config: RolloutConfig | None = None, **settings: Any) -> RolloutModule:
    torch.manual_seed(0)
    config = config or RolloutConfig(max_new_tokens=8, group_size=4)
    return RolloutModule(str(folder), settings.pop("rewards", [SHORT]), config, optimizer=RATES, **settings)


def without_trainer(module: RolloutModule, task: str, log_dir: Path, world_size: int = 1) -> RolloutModule:
    """Built, with what its steps ask of a trainer."""
    module.configure_model()
    trainer: Any = SimpleNamespace(
        accumulate_grad_batches=1, world_size=world_size, global_rank=0, is_global_zero=True, log_dir=str(log_dir),
        datamodule=None, strategy=None,
    )  # fmt: skip
    module._trainer = trainer
    module.log = lambda *args, **kwargs: None  # pyright: ignore[reportAttributeAccessIssue]
    module._make_engine(task)
    return module


def prompts(path: Path, task: str, batch_size: int = 4) -> PromptLoader:
    data = PromptDataModule(path, task, batch_size)  # pyright: ignore[reportArgumentType]
    return data.train_dataloader()


def batch_of(path: Path, task: str, batch_size: int = 4, step: int = 0) -> PromptBatch:
    return prompts(path, task, batch_size).batch(step)
