"""Proofs of parallel training: any layout goes on from any other's checkpoint, and a killed rank ends all."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file

from mmllm import paths
from mmllm.cli.main import main
from tests.test_training_shards import losses_of, run, write_config

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # its files import each other, as scripts do

from parallel_side import LAYOUTS, Training
from parallel_side import run as train_all

pytestmark = [
    pytest.mark.proof,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]
ROOT = Path(__file__).parents[1]
MESHES: dict[str, Any] = {
    "DDP": "ddp",
    "FSDP2": {"class_path": "mmllm.training.strategy.MeshStrategy", "init_args": {"fsdp": 2}},
    "FSDP2+EP": {"class_path": "mmllm.training.strategy.MeshStrategy", "init_args": {"fsdp": 2, "expert": 2}},
    "FSDP2+TP": {"class_path": "mmllm.training.strategy.MeshStrategy", "init_args": {"fsdp": 1, "tensor": 2}},
}

__all__ = ["run"]  # a fixture


@pytest.mark.parametrize("number", [2, 4])
def test_many_processes_train_as_one(number: int, tmp_path: Path, record_property: Any) -> None:
    base = Training()
    ((alone,),) = train_all([base], tmp_path / "alone")
    trainings = [dataclasses.replace(base, num_processes=number, layout=layout) for layout in LAYOUTS]
    for training, ranks in zip(trainings, train_all(trainings, tmp_path / "together"), strict=True):
        losses_RS = torch.tensor([rank["losses"] for rank in ranks], dtype=torch.float64)
        difference = float((losses_RS - torch.tensor(alone["losses"], dtype=torch.float64)).abs().max())
        record_property(f"float64 {training.layout} {number} processes", f"{difference:.1e}")
        assert losses_RS.shape[1] == 40 and difference <= 1e-9


def test_any_layout_goes_on_from_any_other(tmp_path: Path) -> None:
    """Of the same run, saved in a folder and in a file, by two ranks, and gone on from by one, two and four."""
    base = Training(num_steps=4)
    ((alone,),) = train_all([dataclasses.replace(base, save=str(tmp_path / "alone.ckpt"))], tmp_path / "alone")
    saving = [
        dataclasses.replace(
            base,
            num_processes=2,
            layout=layout,
            save=str(tmp_path / f"{layout} {kind}.ckpt"),
            strategy={"save_distributed_checkpoint": kind == "folder"},
        )
        for layout in LAYOUTS
        for kind in ("folder", "file")
        if layout != "DDP" or kind == "file"
    ]
    train_all(saving, tmp_path / "saving")
    names = ["alone", *(Path(str(training.save)).stem for training in saving)]
    assert len(names) == 8
    for name in names:
        path = tmp_path / f"{name}.ckpt"
        assert path.is_dir() == name.endswith("folder")
    one = [dataclasses.replace(base, checkpoint=str(tmp_path / f"{name}.ckpt")) for name in names]
    for number in (1, 2, 4):
        if number == 1:
            results = train_all(one, tmp_path / "one")
        else:
            several = [
                dataclasses.replace(training, num_processes=number, layout=layout)
                for training in one
                for layout in LAYOUTS
            ]
            results = train_all(several, tmp_path / f"on {number}")
        for ranks in results:
            for rank in ranks:
                assert rank["losses"] == pytest.approx(alone["losses"][-4:], abs=1e-12)
                for weight, wanted in alone["weights"].items():
                    assert torch.allclose(rank["weights"][weight], wanted, atol=1e-12), weight


class Dies(pl.Callback):
    """A rank kills itself before a step, and notes when."""

    def __init__(self, rank: int, step: int, note: str) -> None:
        self.rank, self.step, self.note = rank, step, note

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            Path(self.note).write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)


def _on_two(config: Path, mesh: Any, *options: str) -> subprocess.CompletedProcess[str]:
    """As a user starts it, on CPUs."""
    environment = {
        **os.environ,
        "GPUS": "2",
        "PORT": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(str(path) for path in (ROOT, ROOT / "tokenizers", ROOT / "kernels")),
    }
    script = paths.configs_dir() / "launch" / "torchrun.sh"
    strategy = mesh if isinstance(mesh, str) else json.dumps(mesh)
    command = ["bash", str(script), str(config), "--trainer.strategy", strategy, *SAME, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


SAME = [
    "--trainer.accelerator", "cpu", "--model.init_args.decoder.dropout", "0", "--model.init_args.loss.word_dropout",
    "0", "--data.init_args.min_scale", "1",
]  # fmt: skip
"""What is drawn by each rank is left out."""


def _assert_as(found: Path, wanted: Path) -> None:
    losses, expected = ({step: float(loss) for step, loss in losses_of(out).items()} for out in (found, wanted))
    assert losses == pytest.approx(expected, rel=1e-4)
    weights, whole = (load_file(out / "model" / "model.safetensors") for out in (found, wanted))
    assert weights.keys() == whole.keys()
    assert [name for name in whole if not torch.allclose(weights[name], whole[name], atol=1e-4)] == []


@pytest.fixture(scope="module")
def alone(run: Path) -> Path:
    assert main(["fit", "-c", str(write_config(run, "parallel-alone")), *SAME]) == 0
    return run / "parallel-alone"


@pytest.mark.parametrize("layout", MESHES)
def test_every_layout_exports_the_same_model_folder(run: Path, alone: Path, layout: str) -> None:
    name = f"parallel-{layout}"
    done = _on_two(write_config(run, name), MESHES[layout])
    assert done.returncode == 0, done.stderr
    _assert_as(run / name, alone)
    files, wanted = (sorted(path.name for path in (out / "model").iterdir()) for out in (run / name, alone))
    assert files == wanted


def test_a_killed_rank_ends_all_within_a_minute_and_the_run_goes_on_elsewhere(
    run: Path, alone: Path, tmp_path: Path, record_property: Any
) -> None:
    note = tmp_path / "died"
    dies = {"class_path": "tests.test_parallel_proofs.Dies", "init_args": {"rank": 1, "step": 3, "note": str(note)}}
    config = write_config(run, "killed")
    done = _on_two(config, MESHES["FSDP2+EP"], "--trainer.callbacks+", json.dumps([dies]))
    assert note.is_file(), done.stderr
    seconds = time.time() - float(note.read_text())
    record_property("seconds from a rank's death to the end of all", f"{seconds:.1f}")
    assert done.returncode != 0 and seconds < 60
    assert not (run / "killed" / "model").exists()
    saved = run / "killed" / "checkpoints" / "last.ckpt"
    assert saved.is_dir()

    kept = shutil.copytree(run / "killed", tmp_path / "kept")
    assert main(["fit", "-c", str(config), *SAME, "--ckpt_path", "last"]) == 0
    _assert_as(run / "killed", alone)
    shutil.rmtree(run / "killed")
    shutil.copytree(kept, run / "killed")
    done = _on_two(config, MESHES["FSDP2+TP"], "--ckpt_path", "last")
    assert done.returncode == 0, done.stderr
    _assert_as(run / "killed", alone)
