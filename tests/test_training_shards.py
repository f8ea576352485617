"""Training from real shards: stopping and resuming, two ranks, and the scores of a checkpoint."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from mmllm.cli.main import main
from mmllm.data import commands
from mmllm.data.loading.datamodules import PackedDataModule
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.image_projectors import ImageProjectorConfig
from mmllm.model.multimodal import LossConfig
from mmllm.model.router import MoEConfig
from mmllm.model.vision import VisionConfig
from mmllm.training.decoder_module import DecoderModule
from mmllm.training.exporting import gathered
from mmllm.training.lightning_cli import quiet_lightning
from mmllm.training.optimizers import OptimizerConfig
from mmllm_tokenizers.folder import TokenizerConfig, TokenizerFolder
from mmllm_tokenizers.text import TextTokenizer
from tests.data_fixtures import WORDS, words, write_manifest, write_picture
from tests.training_fixtures import CLIP_CONFIG, IMAGE_SIZE, LossRecorder, fit_rank, quiet_trainer, run_two_ranks

NUM_STEPS = 6
DECODER: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "moe_layers": [1],
}
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


class StopsBefore(pl.Callback):
    """Ctrl-C, just before a step, or before the batch of a number in the whole run."""

    def __init__(self, step: int | None = None, batch: int | None = None) -> None:
        self.step, self.batch = step, batch

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step or trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, shards of captions and texts, and recipes for training and validation."""
    folder = tmp_path_factory.mktemp("shards")
    text = TextTokenizer.train([" ".join(WORDS)] * 4, vocab_size=300)
    TokenizerFolder(text, None, TokenizerConfig(image_tokens=4, image_size=IMAGE_SIZE)).save(folder / "tokenizer")
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for number in range(16):
        write_picture(folder / f"{number}.png", rng, IMAGE_SIZE + number)
        rows.append({"id": f"c{number}", "text": words(rng), "image": f"{number}.png"})
        rows.append({"id": f"t{number}", "text": words(rng, 5, 40)})
    for part, chosen in (("train", rows[:24]), ("val", rows[24:])):
        manifest = write_manifest(folder, chosen, f"{part}.jsonl")
        commands.build(manifest, folder / part)
        commands.index(folder / part, folder / "tokenizer")
        sources = [
            {"name": f"{kind}s", "kind": kind, "shards": f"{folder / part}/{kind}-*.tar"}
            for kind in ("caption", "text")
        ]
        recipe = {"tokenizer": str(folder / "tokenizer"), "sequence_length": 64, "seed": 3, "sources": sources}
        (folder / f"{part}.yaml").write_text(yaml.safe_dump({**recipe, "packing": {"window": 8}}))
    return folder


def write_config(folder: Path, name: str) -> Path:
    """What `mmllm fit` reads; everything that it writes goes to `folder / name`."""
    out = folder / name
    saving = {"dirpath": f"{out}/checkpoints", "save_last": True, "save_top_k": 0, "every_n_train_steps": 1}
    value = {
        "seed_everything": 5,
        "trainer": {
            "accelerator": "cpu",
            "max_steps": NUM_STEPS,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 1,
            "val_check_interval": 2,
            "check_val_every_n_epoch": None,
            "enable_progress_bar": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(out), "name": "log", "version": ""},
            },
            "callbacks": [
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saving},
                {"class_path": "mmllm.training.ema.EMA", "init_args": {"decay": 0.9}},
            ],
        },
        "model": {
            "class_path": "mmllm.training.decoder_module.DecoderModule",
            "init_args": {
                "tokenizer": f"{folder}/tokenizer",
                "decoder": {"vocab_size": 0, **DECODER, "moe": MOE, "dropout": 0.1},
                "vision": {"open_clip": CLIP_CONFIG},
                "image_projector": {"kind": "mlp"},
                "loss": {"word_dropout": 0.2},
                "optimizer": {"lr": 1e-2, "warmup": 0.2},
                "out": f"{out}/model",
            },
        },
        "data": {
            "class_path": "mmllm.data.loading.datamodules.PackedDataModule",
            "init_args": {
                "recipe": f"{folder}/train.yaml",
                "val_recipe": f"{folder}/val.yaml",
                "batch_size": 2,
                "steps_per_epoch": 4,  # the stop lies within an epoch, the end in the next
                "min_scale": 0.7,
            },
        },
    }
    path = folder / f"{name}.config.yaml"
    path.write_text(yaml.safe_dump(value))
    return path


@pytest.fixture(scope="module")
def whole(run: Path) -> Path:
    """The output of a run that wasn't stopped."""
    assert main(["fit", "-c", str(write_config(run, "whole"))]) == 0
    return run / "whole"


def metrics_of(out: Path) -> list[dict[str, str]]:
    """The rows that the CSV logger wrote."""
    with (out / "log" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def losses_of(out: Path) -> dict[int, str]:
    """Training loss by step."""
    return {int(row["step"]): row["train/loss/text"] for row in metrics_of(out) if row["train/loss/text"]}


def test_resuming_equals_not_stopping(run: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, cut = str(write_config(run, "cut")), run / "cut"
    stops = json.dumps([{"class_path": "tests.test_training_shards.StopsBefore", "init_args": {"step": 3}}])
    assert main(["fit", "-c", config, "--trainer.callbacks+", stops]) == 130
    first = losses_of(cut)
    assert not (cut / "model").exists()
    assert main(["fit", "-c", config, "--ckpt_path", "last"]) == 0, capsys.readouterr().err
    expected, second = losses_of(whole), losses_of(cut)
    assert sorted(expected) == [1, 2, 3, 4, 5, 6]
    assert len(set(expected.values())) == NUM_STEPS
    assert first == {step: expected[step] for step in (1, 2, 3)}
    assert second == expected, "the curve goes on where it stopped"
    validated = [[(row["step"], row["val/loss"]) for row in metrics_of(out) if row["val/loss"]] for out in (whole, cut)]
    assert len(validated[0]) == 3 and validated[0] == validated[1]
    weights, resumed = (load_file(out / "model" / "model.safetensors") for out in (whole, cut))
    assert weights.keys() == resumed.keys()
    assert [name for name in weights if not torch.equal(weights[name], resumed[name])] == []


def test_a_run_that_is_stopped_between_the_batches_of_a_step_resumes_exactly(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Epochs of four batches make steps of three and of one; what is saved on Ctrl-C is in the middle of the fourth."""

    def fit(name: str, *options: str) -> int:
        path = write_config(run, name)
        config = yaml.safe_load(path.read_text())
        config["trainer"]["accumulate_grad_batches"] = 3
        del config["trainer"]["callbacks"][0]["init_args"]["every_n_train_steps"]
        config["trainer"]["callbacks"][0]["init_args"]["save_on_exception"] = True
        path.write_text(yaml.safe_dump(config))
        return main(["fit", "-c", str(path), "--data.init_args.num_workers", "1", *options])

    stops = json.dumps([{"class_path": "tests.test_training_shards.StopsBefore", "init_args": {"batch": 6}}])
    assert fit("unstopped") == 0
    assert fit("between", "--trainer.callbacks+", stops) == 130
    assert fit("between", "--ckpt_path", "last") == 0, capsys.readouterr().err
    whole, cut = (load_file(run / name / "model" / "model.safetensors") for name in ("unstopped", "between"))
    assert [name for name in whole if not torch.equal(whole[name], cut[name])] == []


@pytest.mark.parametrize(("command", "split"), [("validate", "val"), ("test", "test")])
def test_a_checkpoint_scores_as_it_did_in_training(
    run: Path, whole: Path, capsys: pytest.CaptureFixture[str], command: str, split: str
) -> None:
    (last,) = [row for row in metrics_of(whole) if row["val/loss"] and int(row["step"]) == NUM_STEPS - 1]
    before = (whole / "log" / "metrics.csv").read_bytes()
    capsys.readouterr()
    assert main([command, "-c", str(write_config(run, "whole")), "--ckpt_path", "last"]) == 0
    printed = capsys.readouterr().out
    for name in ("loss", "text", "text_accuracy"):
        (value,) = re.findall(rf"{split}/{name}\W+([\d.]+)", printed)
        assert float(value) == pytest.approx(float(last[f"val/{name}"]), rel=1e-5)
    assert (whole / "log" / "metrics.csv").read_bytes() == before


def make_module(run: Path, out: Path | None = None, builds: bool = True) -> DecoderModule:
    module = DecoderModule(
        decoder=DecoderConfig(vocab_size=0, **DECODER, moe=MoEConfig(**MOE)),
        vision=VisionConfig(open_clip=CLIP_CONFIG),
        image_projector=ImageProjectorConfig(kind="mlp"),
        loss=LossConfig(),
        optimizer=OptimizerConfig(lr=1e-2, warmup=0.1),
        tokenizer=str(run / "tokenizer"),
        out=None if out is None else str(out),
    )
    if builds:
        torch.manual_seed(1)
        module.configure_model()  # here, since what fit does before it may draw random numbers
    return module


def make_data(run: Path) -> PackedDataModule:
    return PackedDataModule(str(run / "train.yaml"), batch_size=2, min_scale=0.7)


def fit_shards_rank(rank: int, port: int, out: str, run: str) -> None:
    """One of two ranks that train from the shards."""
    fit_rank(rank, port, out, make_module(Path(run)), make_data(Path(run)), max_steps=4)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_ranks_give_the_losses_of_one(run: Path, tmp_path: Path) -> None:
    alone, recorder = make_module(run), LossRecorder()
    with quiet_lightning():
        quiet_trainer(recorder, max_steps=4).fit(alone, datamodule=make_data(run))
    assert len(recorder.losses) == 4
    for rank in run_two_ranks(fit_shards_rank, tmp_path, str(run)):
        assert rank["losses"] == pytest.approx(recorder.losses, rel=1e-5)
        for name, weight in alone.state_dict().items():
            assert torch.allclose(rank["weights"][name], weight, atol=2e-5), name


class SeedsTheBuild(pl.Callback):
    """A sharded model is built by `fit`, right after this."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        torch.manual_seed(1)


def fit_sharded_rank(rank: int, port: int, out: str, run: str) -> None:
    """One of two ranks that hold a half of the model each."""
    module = make_module(Path(run), Path(out, f"model{rank}"), builds=False)
    module.decoder = dataclasses.replace(module.decoder, gradient_checkpointing=True)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    settings = {"strategy": strategy, "max_steps": 4, "gradient_clip_val": 0.5}
    fit_rank(rank, port, out, module, make_data(Path(run)), SeedsTheBuild(), **settings)
    assert all(isinstance(parameter, DTensor) for parameter in module.parameters())
    assert module.model is not None
    assert (gathered(module.model) is None) == (rank > 0), "only the rank that exports builds the whole model"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_sharded_ranks_give_the_losses_and_the_model_of_one(run: Path, tmp_path: Path) -> None:
    alone, recorder = make_module(run, tmp_path / "alone"), LossRecorder()
    with quiet_lightning():
        quiet_trainer(recorder, max_steps=4, gradient_clip_val=0.5).fit(alone, datamodule=make_data(run))
    for rank in run_two_ranks(fit_sharded_rank, tmp_path, str(run)):
        assert rank["losses"] == pytest.approx(recorder.losses, rel=1e-5)
        for name, weight in alone.state_dict().items():
            assert torch.allclose(rank["weights"][name], weight, atol=2e-5), name
    wanted, written = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "model0"))
    assert wanted.keys() == written.keys()
    assert [name for name in wanted if not torch.allclose(wanted[name], written[name], atol=2e-5)] == []
    assert not (tmp_path / "model1").exists()
