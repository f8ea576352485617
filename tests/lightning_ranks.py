"""Reads through Lightning: `python tests/lightning_ranks.py JSON`. Started by test_data_resume.py.

Each rank notes the hashes of each batch's rows, and leaves a checkpoint when it stops.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import lightning as L
import torch

from mmllm.batch import PackedBatch
from mmllm.data.loading.datamodules import PackedDataModule
from tests.data_ranks import rows


class Reader(L.LightningModule):
    """Notes the rows of each batch, by its number in the whole run."""

    def __init__(self, out: Path) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.out = out

    def training_step(self, batch: PackedBatch, batch_idx: int) -> torch.Tensor:
        number = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        with (self.out / f"rank{self.global_rank}.jsonl").open("a") as stream:
            stream.write(json.dumps({"batch": number, "rows": rows(batch)}) + "\n")
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(recipe: str, batch_size: int, devices: int, max_steps: int, workers: int, ckpt: str | None, out: str) -> None:
    """Trains up to `max_steps` optimizer steps of two batches, and saves `out`/last.ckpt."""
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, max_steps=max_steps,
        accumulate_grad_batches=2, default_root_dir=out,
    )  # fmt: skip
    data = PackedDataModule(Path(recipe), batch_size=batch_size, num_workers=workers, steps_per_epoch=10)
    trainer.fit(Reader(Path(out)), data, ckpt_path=ckpt)
    trainer.save_checkpoint(Path(out) / "last.ckpt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    run(**json.loads(sys.argv[1]))
