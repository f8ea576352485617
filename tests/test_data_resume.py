"""The same sequences for any number of ranks and workers, and for runs that are killed and continued by others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml

from mmllm.batch import PackedBatch
from mmllm.data import commands
from mmllm.data.loading.datamodules import PackedDataModule
from mmllm.data.loading.loader import PackedLoader, StepDataset
from mmllm.data.plan.plan import open_plan
from mmllm.data.plan.recipe import load_recipe
from mmllm.data.samples.decode import ImageTransform
from mmllm.model.audio_projectors import AudioProjectorConfig
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.image_projectors import ImageProjectorConfig
from mmllm.model.multimodal import AudioConfig, LossConfig
from mmllm.model.router import MoEConfig
from mmllm.model.vision import VisionConfig
from mmllm.training.decoder_module import DecoderModule
from mmllm.training.optimizers import OptimizerConfig
from mmllm_tokenizers.folder import TokenizerFolder
from tests.data_fixtures import make_folder, mixed_manifest, recipe_dict
from tests.data_ranks import STEP_SECONDS, rows
from tests.real_data import needs_real_data, real_set
from tests.training_fixtures import CLIP_CONFIG

STEPS, BATCH = 16, 4
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # machines of few cores


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("resume")
    make_folder(root / "tok")
    commands.build(mixed_manifest(root / "m"), root / "s", root / "tok")
    commands.index(root / "s", root / "tok")
    recipe = recipe_dict(root / "s", root / "tok", curriculum={"start": 0.3, "steps": 10})
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def loader_of(root: Path, rank: int, world_size: int, workers: int) -> PackedLoader:
    recipe = load_recipe(root / "recipe.yaml")
    folder = TokenizerFolder.load(recipe.tokenizer_folder())
    plan = open_plan(recipe, BATCH, folder)
    dataset = StepDataset(plan, folder, ImageTransform(folder.image_size))
    return PackedLoader(plan, dataset, STEPS, rank, world_size, workers)


@pytest.fixture(scope="module")
def wanted(made):
    """The sequences of each step; which rank takes which is the loader's affair."""
    return [sorted(rows(batch)) for batch in loader_of(made, 0, 1, 0)]


@pytest.mark.parametrize(
    ("world_size", "workers"),
    [
        pytest.param(world_size, workers, marks=[] if world_size + workers in (3, 4) else pytest.mark.proof)
        for world_size in (1, 2, 4)
        for workers in (0, 1, 3)
    ],
)
def test_ranks_and_workers_change_nothing(made, wanted, world_size, workers):
    ranks = [[rows(batch) for batch in loader_of(made, rank, world_size, workers)] for rank in range(world_size)]
    found = [sorted(digest for share in step for digest in share) for step in zip(*ranks, strict=True)]
    assert found == wanted


def environment() -> dict[str, str]:
    """Of a process that imports this checkout and its tests."""
    root = Path(__file__).parent.parent
    paths = [str(root), str(root / "tokenizers"), str(root / "kernels")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


class Run:
    """Processes that read as ranks; what they note is kept from one to the next."""

    def __init__(self, made: Path, out: Path) -> None:
        self.made, self.out, self.num_runs = made, out, 0
        out.mkdir(parents=True, exist_ok=True)

    def start(self, world_size: int, workers: int) -> list[subprocess.Popen]:
        self.num_runs += 1
        self.trim()
        given = {
            "recipe": str(self.made / "recipe.yaml"), "batch_size": BATCH, "world_size": world_size,
            "workers": workers, "steps": STEPS, "out": str(self.out), "meet": str(self.out / f"meet{self.num_runs}"),
        }  # fmt: skip
        command = [sys.executable, "-W", "ignore", str(Path(__file__).parent / "data_ranks.py")]
        return [
            subprocess.Popen([*command, json.dumps({**given, "rank": rank})], env=environment(), start_new_session=True)
            for rank in range(world_size)
        ]

    def num_done(self) -> int:
        path = self.out / "state.json"
        return json.loads(path.read_text())["step"] if path.is_file() else 0

    def trim(self) -> None:
        """Takes off the note of a step whose state was not saved any more: it is done again."""
        path, done = self.out / "log.jsonl", self.num_done()
        lines = path.read_text().splitlines() if path.is_file() else []
        path.write_text(
            "".join(f"{line}\n" for line in lines if line.endswith("}") and json.loads(line)["step"] <= done)
        )

    def hashes(self) -> list[list[str]]:
        return [json.loads(line)["hashes"] for line in (self.out / "log.jsonl").read_text().splitlines()]


def kill_after(run: Run, ranks: list[subprocess.Popen], step: int, delay: float) -> None:
    """SIGKILL for all ranks and their workers, a little after a step was done."""
    deadline = time.monotonic() + 200
    while run.num_done() < step and time.monotonic() < deadline and all(rank.poll() is None for rank in ranks):
        time.sleep(0.005)
    time.sleep(delay)
    for rank in ranks:
        os.killpg(rank.pid, signal.SIGKILL)
        rank.wait()


def finish(ranks: list[subprocess.Popen]) -> None:
    for rank in ranks:
        assert rank.wait(timeout=250) == 0


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.proof if seed else []) for seed in range(20)])
def test_a_killed_run_continues_exactly_with_other_ranks(made, wanted, tmp_path, seed):
    rng = np.random.default_rng(seed)
    run = Run(made, tmp_path / "run")
    before, after = rng.choice([1, 2, 4], size=2, replace=False).tolist() if seed else (2, 1)
    workers = rng.choice([0, 1, 3], size=2).tolist() if seed else (1, 0)
    kill_after(run, run.start(before, workers[0]), int(rng.integers(1, STEPS - 2)), rng.uniform(0, STEP_SECONDS))
    assert 0 < run.num_done() < STEPS
    finish(run.start(after, workers[1]))
    assert run.hashes() == wanted


class Reader(L.LightningModule):
    """Keeps the rows that it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[str]] = []

    def training_step(self, batch: PackedBatch, batch_idx: int) -> torch.Tensor:
        self.seen.append(sorted(rows(batch)))
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(("workers", "stopped_at"), [(1, 3)])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*LeafSpec:FutureWarning")
def test_lightning_resumes_with_prefetch_and_accumulation(made, wanted, tmp_path, workers, stopped_at):
    def fit(max_steps: int, ckpt: Path | None = None) -> Reader:
        module = Reader()
        trainer = L.Trainer(
            accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path, enable_checkpointing=False, max_steps=max_steps, accumulate_grad_batches=2,
        )  # fmt: skip
        data = PackedDataModule(made / "recipe.yaml", batch_size=BATCH, num_workers=workers, steps_per_epoch=10)
        trainer.fit(module, data, ckpt_path=ckpt)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return module

    first = fit(stopped_at)
    assert len(first.seen) == 2 * stopped_at
    assert first.seen + fit(8, tmp_path / "last.ckpt").seen == wanted


@pytest.mark.timeout(600)
def test_lightning_resumes_two_ranks_as_one(made, wanted, tmp_path):
    """Stopped in the middle of an epoch, with prefetched batches and accumulation."""

    def fit(name: str, devices: int, max_steps: int, ckpt: Path | None = None) -> dict[int, list[str]]:
        (tmp_path / name).mkdir()
        given = {
            "recipe": str(made / "recipe.yaml"), "batch_size": BATCH, "devices": devices, "max_steps": max_steps,
            "workers": 1, "ckpt": ckpt and str(ckpt), "out": str(tmp_path / name),
        }  # fmt: skip
        script = str(Path(__file__).parent / "lightning_ranks.py")
        done = subprocess.run(
            [sys.executable, script, json.dumps(given)], env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        seen: dict[int, list[str]] = {}
        for path in (tmp_path / name).glob("rank*.jsonl"):
            for note in map(json.loads, path.read_text().splitlines()):
                seen[note["batch"]] = sorted([*seen.get(note["batch"], []), *note["rows"]])
        return seen

    first = fit("two", 2, 3)
    then = fit("one", 1, 8, tmp_path / "two" / "last.ckpt")
    assert len(first) == 6 and not set(first) & set(then)
    assert [rows for _, rows in sorted((first | then).items())] == wanted


def small_module(tokenizer: Path) -> DecoderModule:
    """Sees, hears, reads and speaks, with experts in one of two layers."""
    torch.manual_seed(0)
    moe = MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    return DecoderModule(
        DecoderConfig(
            0,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            moe=moe,
            moe_layers=(1,),
        ),
        VisionConfig(CLIP_CONFIG),
        ImageProjectorConfig(kind="mlp"),
        AudioConfig(0, 0, codebook_dim=0, projector=AudioProjectorConfig("conv", pool=2, num_hidden_layers=1)),
        LossConfig(units=0.5, ctc=0.3),
        tokenizer=str(tokenizer),
        optimizer=OptimizerConfig(lr=3e-3, warmup=0.1),
    )


@pytest.mark.proof
@pytest.mark.timeout(1800)
@needs_real_data
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*LeafSpec:FutureWarning")
def test_four_real_sets_are_built_shown_trained_on_and_resumed(tmp_path):
    make_folder(tmp_path / "tok")
    sources = []
    for name, kind in (("fsdd", "audio"), ("cifar10", "caption"), ("emoji", "caption"), ("shakespeare", "text")):
        commands.build(real_set(name), tmp_path / name, tmp_path / "tok")
        commands.index(tmp_path / name, tmp_path / "tok")
        sources.append({"name": name, "kind": kind, "shards": str(tmp_path / name / "*.tar")})
    recipe = {"tokenizer": str(tmp_path / "tok"), "sequence_length": 256, "sources": sources}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    shown = [commands.show(path, step=step, batch_size=2, text=True) for step in range(147, 153)]
    sequences = [sequence for told in shown for sequence in told["sequences"]]
    assert {document["source"] for s in sequences for document in s["documents"]} == {
        source["name"] for source in sources
    }

    def fit(stop_at: int, ckpt: Path | None = None) -> tuple[DecoderModule, list[tuple[list[str], float]]]:
        module, seen = small_module(tmp_path / "tok"), []
        step = module.training_step

        def training_step(batch: PackedBatch, batch_idx: int) -> Any:
            losses = step(batch, batch_idx)
            seen.append((sorted(rows(batch)), float(losses["loss"])))
            module.trainer.should_stop = len(seen) == stop_at
            return losses

        module.training_step = training_step
        trainer = L.Trainer(
            accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path, enable_checkpointing=False, max_steps=200,
        )  # fmt: skip
        data = PackedDataModule(path, batch_size=2, num_workers=1, steps_per_epoch=70)
        L.seed_everything(0)
        trainer.fit(module, data, ckpt_path=ckpt)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return module, seen

    module, whole = fit(200)
    losses = [loss for _, loss in whole]
    assert len(losses) == 200 and np.mean(losses[-20:]) < 0.8 * np.mean(losses[:20])
    _, first = fit(123)
    resumed, then = fit(77, tmp_path / "last.ckpt")
    assert first + then == whole, "the same rows and losses"
    weights = module.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in resumed.state_dict().items())
