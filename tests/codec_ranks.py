"""Two ranks train a codec that ends in its warm-up: `python tests/codec_ranks.py DIR`, by test_training_codec.py."""

from __future__ import annotations

import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy

from tests.test_training_codec import WaveLoader, _voice_module, chords


class RankWaves(WaveLoader):
    """Chords of each rank's own."""

    def __init__(self, rank: int) -> None:
        super().__init__(with_texts=False)
        self.rank = rank

    def __iter__(self) -> Any:
        while True:
            self.position += 1
            yield chords(2 * self.position + self.rank)[:, None]


class RankData(pl.LightningDataModule):
    def train_dataloader(self) -> RankWaves:
        assert self.trainer is not None
        return RankWaves(self.trainer.global_rank)


def run(out: Path) -> None:
    """Two steps of a warm-up of three, each rank's codebooks to `out`/rankN.pt and the codec to `out`/codec."""
    module = _voice_module(out=str(out / "codec"))
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=DDPStrategy(timeout=timedelta(seconds=30)), logger=False, max_steps=2,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=str(out),
    )  # fmt: skip
    trainer.fit(module, datamodule=RankData())
    torch.save(module.codec.codebooks_KVD, out / f"rank{trainer.global_rank}.pt")
    trainer.strategy.barrier()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    run(Path(sys.argv[1]))
