from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import pytest
import soundfile
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from mmllm.ticker import ticker
from mmllm.training.callbacks import RoutingLog, Samples, keep_rows
from mmllm.training.ema import EMA
from mmllm.training.lightning_cli import quiet_lightning
from mmllm.training.progress import Progress
from mmllm.training.staged import MetricWindow
from mmllm.training.tokenizer_commands import assemble, train_text
from mmllm_tokenizers.folder import TokenizerConfig, TokenizerFolder
from tests.training_fixtures import TinyData, quiet_trainer, tiny_module


class _KeepWeights(pl.Callback):
    """The trained weights after each step, before anything takes their place."""

    def __init__(self) -> None:
        self.history: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.history.append(pl_module.model.decoder.norm.weight.detach().clone())


def test_ema_is_the_average_that_its_formula_says_and_is_what_is_left_at_the_end() -> None:
    module, kept = tiny_module(), _KeepWeights()
    module.configure_model()
    assert module.model is not None
    average = module.model.decoder.norm.weight.detach().clone()
    with quiet_lightning():
        quiet_trainer(kept, EMA(0.8), max_steps=6).fit(module, datamodule=TinyData())
    for step, weight in enumerate(kept.history, start=1):
        decay = min(0.8, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    assert torch.allclose(module.model.decoder.norm.weight, average, atol=1e-6)
    assert not torch.allclose(kept.history[-1], average, atol=1e-6)


def test_ema_takes_its_place_in_validation_and_gives_it_back() -> None:
    module, ema = tiny_module(), EMA(0.5)
    module.configure_model()
    with torch.no_grad():
        trained = [p.clone() for p in module.parameters()]
        ema._average = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
        trainer: Any = None
        for _ in range(2):
            ema.on_validation_start(trainer, module)
            assert all((p == 0).all() for p in module.parameters())
            ema.on_validation_end(trainer, module)
            assert all(torch.equal(p, old) for p, old in zip(module.parameters(), trained, strict=True))


def test_routing_rows_are_this_runs_alone_and_each_step_is_there_once(tmp_path: Path) -> None:
    def fit(steps: int, name: str, ckpt: Any = None) -> list[dict[str, str]]:
        saving = ModelCheckpoint(tmp_path / name, "{step}", save_top_k=-1, every_n_train_steps=2)
        settings = {"enable_checkpointing": True, "limit_train_batches": 100, "max_steps": steps}
        with quiet_lightning():
            trainer = quiet_trainer(saving, RoutingLog(str(tmp_path), every_steps=1), **settings)
            trainer.fit(tiny_module(), datamodule=TinyData(), ckpt_path=ckpt, weights_only=True)
        with (tmp_path / "routing.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    def steps_of(rows: list[dict[str, str]]) -> list[str]:
        assert len({(row["step"], row["modality"], row["expert"]) for row in rows}) == len(rows)
        return list(dict.fromkeys(row["step"] for row in rows))

    assert steps_of(fit(4, "first")) == ["1", "2", "3", "4"]
    assert steps_of(fit(3, "second")) == ["1", "2", "3"], "another run in the folder starts anew"
    assert steps_of(fit(5, "second", tmp_path / "second" / "step=2.ckpt")) == ["1", "2", "3", "4", "5"], (
        "none is repeated"
    )


def test_rows_are_kept_up_to_a_step(tmp_path: Path) -> None:
    path = tmp_path / "samples.csv"
    keep_rows(path, 5)
    assert not path.exists()
    lines = ["step,text", '2,"a', 'b, c"', "5,d", "6,e", ""]
    path.write_text("\n".join(lines))
    keep_rows(path, 5)
    assert path.read_text().splitlines() == lines[:4]
    keep_rows(path, 0)
    assert not path.exists()


def test_samples_say_that_a_sharded_model_is_not_looked_at(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module, trainer = tiny_module(), quiet_trainer()
    samples = Samples([str(tmp_path / "nowhere.jsonl")], str(tmp_path))
    module._device_mesh = cast(Any, object())
    samples.setup(trainer, module, "fit")
    assert [record.getMessage() for record in caplog.records if "sharded model" in record.getMessage()] != []


def test_a_ticker_tells_what_is_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = 100.0
    monkeypatch.setattr("mmllm.ticker.time", SimpleNamespace(monotonic=lambda: seconds))
    tick = ticker("rows")
    tick(40, 2000)
    seconds = 130.0
    tick(500, 2000)
    assert capsys.readouterr().err == "500 of 2,000 rows  0:30 gone  1:30 left\n"


def test_samples_are_scored_as_evaluation_scores_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions by the scene that they say, whatever their words; transcripts by theirs."""
    objects = [{"size": "small", "colour": "red", "shape": "circle"}]
    scene = {"text": "a small red circle in the centre", "objects": objects, "relations": [[0, "at", "centre"]]}
    said = [
        "in the middle there is a small red circle",  # right in other words
        "a small blue circle in the centre",
        "A photo of cats.",  # of no scene: the same text
    ]
    rows = [{**scene, "id": "0"}, {**scene, "id": "1"}, {"text": "a photo of cats", "id": "2"}]
    for row in rows:
        row["image"] = f"{row['id']}.png"
        Image.new("RGB", (8, 8)).save(tmp_path / row["image"])
    soundfile.write(tmp_path / "a.wav", np.full(800, 0.1), 8000)
    rows.append({"id": "a", "audio": "a.wav", "text": "one two"})
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stub = SimpleNamespace(caption=lambda *_, **__: said, transcribe=lambda *_, **__: ["one too"])
    monkeypatch.setattr("mmllm.training.callbacks.Model", lambda *_: None)
    monkeypatch.setattr("mmllm.training.callbacks.AskedModel", lambda _: stub)
    module, logger = tiny_module(), CSVLogger(tmp_path / "logs")
    module.configure_model()
    module.folder = cast(Any, object())
    samples, trainer = Samples([str(tmp_path / "val.jsonl")], str(tmp_path)), quiet_trainer(logger=logger)
    samples.setup(trainer, module, "fit")
    samples.on_train_end(trainer, module)
    scores = logger.experiment.metrics[-1]
    assert scores["samples/caption_exact_match"] == pytest.approx(2 / 3)
    assert scores["samples/transcript_wer"] == pytest.approx(1 / 2)


def test_progress_writes_plain_lines_to_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    with quiet_lightning():
        trainer = quiet_trainer(Progress(file_seconds=0.0), max_steps=3, enable_progress_bar=True)
        trainer.fit(tiny_module(), datamodule=TinyData())
    lines = capsys.readouterr().err.strip().splitlines()
    assert "step 3" in lines[-1] and "100%" in lines[-1] and "loss" in lines[-1]
    assert "\r" not in "".join(lines)


def test_a_windows_means_are_sums_over_counts() -> None:
    window = MetricWindow()
    window.add({"a": 2.0, "b": torch.tensor(3.0)}, {"a": 1.0, "b": 2.0})
    window.add({"a": 4.0, "b": 5.0, "c": 0.0}, {"a": 1.0, "b": 2.0, "c": 0.0})
    assert window.means() == {"a": 3.0, "b": 2.0}
    window.reset()
    assert window.means() == {} and window.num_batches == 0


def test_train_text_reads_manifests_and_writes_a_folder(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": "a", "text": "one fish"},
        {"id": "b", "segments": [{"text": "two fish"}], "question": "which?", "answer": "red fish"},
    ]
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("\n".join(json.dumps(row) for row in rows))
    config = TokenizerConfig(image_tokens=9, image_size=24)
    counted = train_text([str(manifest)], str(tmp_path / "folder"), vocab_size=280, config=config)
    assert (counted["documents"], counted["characters"]) == (4, 8 + 8 + 6 + 8)
    folder = TokenizerFolder.load(tmp_path / "folder")
    assert (folder.num_image_tokens, folder.image_size, folder.hash) == (9, 24, counted["hash"])
    again = assemble(str(tmp_path / "again"), str(tmp_path / "folder"), config=config)
    assert again["hash"] == counted["hash"]
