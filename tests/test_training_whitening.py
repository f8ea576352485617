"""The whitened tower in training: its filters come from the first pictures, once, and stay with the weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

import mmllm
from mmllm.cli.main import main
from mmllm.data import commands
from mmllm.data.loading.datamodules import PackedDataModule
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.flops import Work
from mmllm.model.image_projectors import ImageProjectorConfig
from mmllm.model.multimodal import LossConfig
from mmllm.model.vision import VisionConfig, pixel_statistics
from mmllm.model.whitened_vision import WhitenedConfig, patch_covariance, whitening_filters
from mmllm.training import whitening
from mmllm.training.decoder_module import DecoderModule
from mmllm.training.ema import EMA
from mmllm.training.estimate import Load
from mmllm.training.estimate_memory import memory_bytes
from mmllm.training.image_encoder import load_image_encoder
from mmllm.training.layout import Layout
from mmllm.training.lightning_cli import quiet_lightning
from mmllm.training.optimizers import OptimizerConfig
from mmllm.training.strategy import MeshStrategy
from mmllm_tokenizers.folder import TokenizerConfig, TokenizerFolder
from mmllm_tokenizers.text import TextTokenizer
from tests.data_fixtures import WORDS, words, write_manifest, write_picture
from tests.training_fixtures import fit_rank, quiet_trainer, run_two_ranks

SIZE, NUM_PICTURES = 16, 10
FILTERS = "model.vision.visual.filters"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, and recipes of captions, of other captions, and of texts alone."""
    folder = tmp_path_factory.mktemp("whitening")
    text = TextTokenizer.train([" ".join(WORDS)] * 4, vocab_size=300)
    TokenizerFolder(text, None, TokenizerConfig(image_tokens=4, image_size=SIZE)).save(folder / "tokenizer")
    rng = np.random.default_rng(0)
    for name in ("one", "other", "texts"):
        rows: list[dict[str, Any]] = []
        for number in range(24):
            rows.append({"id": f"{name}{number}", "text": words(rng)})
            if name != "texts":
                write_picture(folder / f"{name}{number}.png", rng, SIZE + number)
                rows[-1]["image"] = f"{name}{number}.png"
        commands.build(write_manifest(folder, rows, f"{name}.jsonl"), folder / name)
        commands.index(folder / name, folder / "tokenizer")
        kind = "text" if name == "texts" else "caption"
        sources = [{"name": name, "kind": kind, "shards": f"{folder / name}/{kind}-*.tar"}]
        recipe = {"tokenizer": str(folder / "tokenizer"), "sequence_length": 64, "seed": 3, "sources": sources}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**recipe, "packing": {"window": 8}}))
    return folder


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whitening, "NUM_PICTURES", NUM_PICTURES)
    monkeypatch.setattr(whitening, "MAX_STEPS", 12)


def module_of(run: Path, **settings: Any) -> DecoderModule:
    torch.manual_seed(0)
    return DecoderModule(
        decoder=DecoderConfig(vocab_size=0, hidden_size=16, num_hidden_layers=1, num_attention_heads=2),
        vision=VisionConfig(whitened=WhitenedConfig(SIZE, (8,), 2)),
        image_projector=ImageProjectorConfig("mlp", position_std=0.05),
        loss=LossConfig(),
        tokenizer=str(run / "tokenizer"),
        optimizer=settings.pop("optimizer", OptimizerConfig(lr=1e-2)),
        **settings,
    )


def data_of(run: Path, name: str = "one", **settings: Any) -> PackedDataModule:
    return PackedDataModule(str(run / f"{name}.yaml"), batch_size=2, **settings)


def fit(module: DecoderModule, data: PackedDataModule, steps: int, *callbacks: Any, ckpt: Any = None) -> Tensor:
    """Trains, and gives the filters."""
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    with quiet_lightning():
        trainer = quiet_trainer(*callbacks, max_steps=steps, enable_checkpointing=saves)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return module.state_dict()[FILTERS]


def slow_filters(run: Path, name: str = "one") -> Tensor:
    """Of the first pictures that one process's loader gives."""
    pictures: list[Tensor] = []
    for batch in data_of(run, name).train_dataloader():
        pictures += list(batch.images_NCHW)
        if len(pictures) >= NUM_PICTURES:
            break
    vision = VisionConfig(whitened=WhitenedConfig(SIZE, (8,), 2))
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in pixel_statistics(vision))
    return whitening_filters(patch_covariance((torch.stack(pictures[:NUM_PICTURES]) / 255.0 - mean) / std))


def test_filters_are_of_the_first_pictures_unaltered_and_saved(run: Path, tmp_path: Path) -> None:
    expected = slow_filters(run)
    module = module_of(run, out=str(tmp_path / "model"))
    filters = fit(module, data_of(run, min_scale=0.5, flip=True), 2, EMA(0.5))
    torch.testing.assert_close(filters, expected, rtol=1e-3, atol=1e-4)
    assert int(module.state_dict()["model.vision.visual.num_pictures"]) == NUM_PICTURES
    assert not torch.allclose(expected, slow_filters(run, "other"), atol=1e-3), "so a test can tell them apart"
    loaded = mmllm.load(tmp_path / "model")
    vision: Any = loaded.model.vision
    assert torch.equal(vision.visual.filters, filters)
    images = torch.randint(0, 256, (3, 3, SIZE, SIZE), dtype=torch.uint8)
    trained: Any = module.model
    assert torch.equal(vision(images), trained.eval().vision(images))
    assert len(loaded.caption([str(run / "one0.png")])) == 1
    encoder = load_image_encoder(str(tmp_path / "model"))
    np.testing.assert_allclose(encoder.encode(images.numpy()), vision(images).numpy(), rtol=1e-5, atol=1e-5)
    command = ["export", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "llava"), "--format", "llava"]
    assert main(command) == 2


def test_the_data_goes_on_as_if_nothing_had_been_read(run: Path) -> None:
    data = data_of(run)
    list(whitening.first_pictures(data, NUM_PICTURES))
    first, untouched = (next(iter(each.train_dataloader())) for each in (data, data_of(run)))
    assert torch.equal(first.token_ids_BT, untouched.token_ids_BT)
    assert torch.equal(first.images_NCHW, untouched.images_NCHW)


def test_resumed_and_loaded_filters_are_kept(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving = ModelCheckpoint(dirpath=tmp_path, save_last=True, save_top_k=0, every_n_train_steps=1)
    module = module_of(run, out=str(tmp_path / "model"))
    filters = fit(module, data_of(run), 2, saving)
    monkeypatch.setattr(whitening, "NUM_PICTURES", 3)
    assert torch.equal(fit(module_of(run), data_of(run), 3, saving, ckpt=tmp_path / "last.ckpt"), filters)
    assert not torch.allclose(fit(module_of(run), data_of(run), 1), filters, atol=1e-3), "others would be of 3 pictures"
    monkeypatch.setattr(whitening, "NUM_PICTURES", NUM_PICTURES)
    assert torch.equal(fit(module, data_of(run, "other"), 1), filters), "a second fit of the same module"
    loaded = module_of(run, init_from=str(tmp_path / "model"))
    assert torch.equal(fit(loaded, data_of(run, "other"), 1), filters)
    anew = module_of(run, init_from=str(tmp_path / "model"), init_parts=("attention",))
    torch.testing.assert_close(fit(anew, data_of(run, "other"), 1), slow_filters(run, "other"), rtol=1e-3, atol=1e-4)


def test_a_frozen_tower_gets_its_filters_too(run: Path) -> None:
    frozen = module_of(run, optimizer=OptimizerConfig(lr=1e-2, tower_lr=0.0))
    torch.testing.assert_close(fit(frozen, data_of(run), 1), slow_filters(run), rtol=1e-3, atol=1e-4)


def test_without_pictures_it_says_so(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="mmllm"):
        fit(module_of(run), data_of(run, "texts"), 1)
    assert "filters stay as they are for any pictures: there are none in the first 12 steps" in caplog.text


def _rank(rank: int, port: int, out: str, run: str, is_sharded: bool) -> None:
    whitening.NUM_PICTURES = NUM_PICTURES
    strategy: Any = MeshStrategy(fsdp=2) if is_sharded else "ddp"
    fit_rank(rank, port, out, module_of(Path(run)), data_of(Path(run)), max_steps=2, strategy=strategy)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_two_ranks_compute_the_filters_of_one(run: Path, tmp_path: Path, is_sharded: bool) -> None:
    one, two = run_two_ranks(_rank, tmp_path, str(run), is_sharded)
    assert torch.equal(one["weights"][FILTERS], two["weights"][FILTERS])
    assert torch.equal(one["weights"][FILTERS], fit(module_of(run), data_of(run), 2))


def test_its_memory_can_be_estimated(run: Path) -> None:
    module = module_of(run)
    config = module.resolved_config()
    sizes = Load(2, 64, 3, Work((64,), 50, num_images=3), 1, False)
    estimated = memory_bytes(module, config, Layout(), sizes)
    assert 0 < estimated["pictures"] < estimated["total"]
