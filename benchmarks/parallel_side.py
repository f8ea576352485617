"""One process of the trainings that parallel.py compares: a small model of all parts, on batches without files.

Shapes: as mmllm/batch.py; a global batch is `NUM_SEQUENCES` rows, which the ranks share in order.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.multiprocessing
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.plugins.precision import DoublePrecision
from torch.distributed.tensor import DTensor

from mmllm.batch import IGNORE, Modality, PackedBatch
from mmllm.model.audio_projectors import AudioProjectorConfig
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.image_projectors import ImageProjectorConfig
from mmllm.model.multimodal import AudioConfig, LossConfig
from mmllm.model.router import MoEConfig
from mmllm.model.vision import VisionConfig
from mmllm.training.decoder_module import DecoderModule
from mmllm.training.ema import EMA
from mmllm.training.lightning_cli import quiet_lightning
from mmllm.training.optimizers import OptimizerConfig
from mmllm.training.strategy import AnyCheckpointIO, MeshStrategy

NUM_SEQUENCES, LENGTH = 4, 32
NUM_TEXT, NUM_CODEBOOKS, CODEBOOK_SIZE = 42, 2, 6
IMAGE_SIZE, IMAGE_SLOTS, CLIP_SLOTS, CLIP_FRAMES = 16, 4, 3, 6
KINDS = (("image", "clip", "units"), (), ("units",), ("image",), ("clip",), ())
"""What sequences hold beside text, in turn: in most batches, some rank has text alone."""
VISION = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": IMAGE_SIZE, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": NUM_TEXT, "width": 16, "heads": 2, "layers": 1},
}
LAYOUTS: dict[str, dict[int, Any]] = {
    "DDP": {2: "ddp", 4: "ddp"},
    "FSDP2": {2: {"fsdp": 2}, 4: {"data": 2, "fsdp": 2}},
    "FSDP2+EP": {2: {"fsdp": 2, "expert": 2}, 4: {"fsdp": 4, "expert": 2}},
    "FSDP2+TP": {2: {"fsdp": 1, "tensor": 2}, 4: {"fsdp": 2, "tensor": 2}},
}
"""For each number of processes, Lightning's name of a strategy or the arguments of `MeshStrategy`."""


@dataclass(frozen=True)
class Training:
    """One training run.

    Attributes:
        num_processes: how many share it.
        layout: a name in `LAYOUTS`; None: a process alone.
        precision: "float64", "float32" or "bfloat16".
        num_steps: at which it ends.
        num_accumulated: batches a step.
        optimizer: rates; Muon.
        decoder: changes to the decoder's config.
        checkpoint: it goes on from; None: it begins.
        save: checkpoint to write.
        save_step: after this step.
        strategy: more arguments of `MeshStrategy`.
        callbacks: more of them.
    """

    num_processes: int = 1
    layout: str | None = None
    precision: str = "float64"
    num_steps: int = 20
    num_accumulated: int = 2
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-3, warmup=0.1, muon=True))
    decoder: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    save: str | None = None
    save_step: int = 2
    strategy: dict[str, Any] = field(default_factory=dict)
    callbacks: tuple[pl.Callback, ...] = ()


def make_module(training: Training) -> DecoderModule:
    """The module that is trained; its weights depend on nothing but this."""
    decoder: dict[str, Any] = {
        "vocab_size": NUM_TEXT + NUM_CODEBOOKS * (CODEBOOK_SIZE + 1),
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 24,
        "moe": MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12),
        "moe_layers": (1, 2),
        "qk_norm": True,
        "tie_word_embeddings": False,
    }
    return DecoderModule(
        decoder=DecoderConfig(**(decoder | training.decoder)),
        vision=VisionConfig(open_clip=VISION),
        image_projector=ImageProjectorConfig(kind="mlp"),
        audio=AudioConfig(
            NUM_CODEBOOKS,
            CODEBOOK_SIZE,
            codebook_dim=8,
            projector=AudioProjectorConfig("conv", pool=2, num_hidden_layers=1),
        ),
        loss=LossConfig(units=0.5, ctc=0.3),
        optimizer=training.optimizer,
    )


def sequence(number: int) -> PackedBatch:
    """One row of three documents and padding, with what its kind holds."""
    generator = torch.Generator().manual_seed(number)
    kinds = KINDS[number % len(KINDS)]

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    num_tokens = int(draw(26, LENGTH, 1))
    tokens_T = draw(14, NUM_TEXT, LENGTH)
    labels_T, modality_T = torch.full((LENGTH,), IGNORE), torch.zeros(LENGTH, dtype=torch.long)
    labels_T[5:9], labels_T[13:16], labels_T[22 : num_tokens - 1] = (
        tokens_T[6:10],
        tokens_T[14:17],
        tokens_T[23:num_tokens],
    )
    codes_TK, code_labels_TK = (torch.full((LENGTH, NUM_CODEBOOKS), value) for value in (-1, IGNORE))
    images_NCHW, image_slots_NS = torch.zeros(0, 3, IMAGE_SIZE, IMAGE_SIZE), torch.zeros(0, IMAGE_SLOTS)
    clips_CFK = torch.zeros(0, CLIP_FRAMES, NUM_CODEBOOKS)
    clip_slots_CS, clip_targets_CL = torch.zeros(0, CLIP_SLOTS), torch.zeros(0, 2)
    if "image" in kinds:
        modality_T[1 : 1 + IMAGE_SLOTS] = Modality.IMAGE
        images_NCHW, image_slots_NS = draw(0, 256, 1, 3, IMAGE_SIZE, IMAGE_SIZE), torch.arange(1, 1 + IMAGE_SLOTS)[None]
    if "clip" in kinds:
        modality_T[10 : 10 + CLIP_SLOTS] = Modality.AUDIO
        clips_CFK = draw(0, CODEBOOK_SIZE, 1, CLIP_FRAMES, NUM_CODEBOOKS)
        clip_slots_CS, clip_targets_CL = torch.arange(10, 10 + CLIP_SLOTS)[None], draw(14, NUM_TEXT, 1, 2)
    if "units" in kinds:
        modality_T[17:21] = Modality.UNITS
        codes_TK[17:21] = draw(0, CODEBOOK_SIZE, 4, NUM_CODEBOOKS)
        tokens_T[17:21] = NUM_TEXT + codes_TK[17:21, 0]
        labels_T[16:20], code_labels_TK[16:20] = tokens_T[17:21], codes_TK[17:21]
    documents_T = torch.tensor([0] * 9 + [1] * 8 + [2] * (LENGTH - 17))
    positions_T = torch.cat([torch.arange(9), torch.arange(8), torch.arange(LENGTH - 17)])
    sources_T = documents_T.clone()
    for column, value in ((documents_T, -1), (sources_T, -1), (labels_T, IGNORE), (positions_T, 0)):
        column[num_tokens:] = value
    columns = (tokens_T, labels_T, positions_T, documents_T, modality_T, sources_T, codes_TK, code_labels_TK)
    media = (images_NCHW.to(torch.uint8), image_slots_NS, clips_CFK, clip_slots_CS, clip_targets_CL)
    return PackedBatch(*(column[None] for column in columns), media[0], *(each.long() for each in media[1:]))


def merged(rows: list[PackedBatch]) -> PackedBatch:
    """Rows as one batch."""
    values: dict[str, torch.Tensor] = {}
    for name, first in vars(rows[0]).items():
        if isinstance(first, torch.Tensor):
            offset = LENGTH if name.endswith("slots_NS") or name.endswith("slots_CS") else 0
            values[name] = torch.cat([getattr(row, name) + offset * place for place, row in enumerate(rows)])
    return PackedBatch(**values)


class Rows(pl.LightningDataModule):
    """Each rank's share of each global batch."""

    source_names = ("captions", "clips", "words")

    def __init__(self, num_batches: int) -> None:
        """Keeps how many batches there are."""
        super().__init__()
        self.num_batches = num_batches

    def train_dataloader(self) -> Loader:
        """The batches of this rank."""
        assert self.trainer is not None
        shares = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        size = NUM_SEQUENCES // shares["num_replicas"]
        return Loader(self.num_batches, shares["rank"] * size, size)


class Loader:
    """Some rows of each global batch; its state is the next batch's number, whatever the rank."""

    def __init__(self, num_batches: int, first: int, size: int) -> None:
        """Keeps which rows."""
        self.num_batches, self.first, self.size, self.number = num_batches, first, size, 0

    def __len__(self) -> int:
        """Batches of the run."""
        return self.num_batches

    def __iter__(self) -> Iterator[PackedBatch]:
        """From the next one on."""
        while self.number < self.num_batches:
            start = NUM_SEQUENCES * self.number + self.first
            self.number += 1
            yield merged([sequence(start + place) for place in range(self.size)])

    def state_dict(self) -> dict[str, int]:
        """The place."""
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to it."""
        self.number = state["number"]


class Saves(pl.Callback):
    """Saves a checkpoint after a step."""

    def __init__(self, path: str, step: int) -> None:
        """Keeps where and when."""
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Saves, once."""
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            self.step = -1


class Losses(pl.Callback):
    """The loss of each batch, as it is logged; seeds the weights, which are drawn after `setup`."""

    def __init__(self) -> None:
        """Starts empty."""
        self.values: list[float] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The weights' seed."""
        torch.manual_seed(1)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Notes one."""
        self.values.append(float(trainer.callback_metrics["loss"]))


def train(training: Training, rank: int = 0, port: int = 0) -> dict[str, Any]:
    """One process's losses and, whole, the weights it ends with (the average's, where there is one)."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    plugins: list[Any] = [DoublePrecision()] if training.precision == "float64" else []
    settings: dict[str, Any] = {"plugins": plugins}
    if training.precision == "bfloat16":
        settings["precision"] = "bf16-mixed"
    if training.layout is not None:
        settings |= _connected(training, rank, port)
        plugins.append(TorchElasticEnvironment())
    if training.layout in (None, "DDP"):
        plugins.append(AnyCheckpointIO())
    losses, module = Losses(), make_module(training)
    callbacks: list[pl.Callback] = [losses, EMA(decay=0.9), *training.callbacks]
    if training.save is not None:
        callbacks.append(Saves(training.save, training.save_step))
    with quiet_lightning():
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=-1, max_steps=training.num_steps, gradient_clip_val=0.5, logger=False,
            accumulate_grad_batches=training.num_accumulated, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False,
            callbacks=callbacks, **settings,
        )  # fmt: skip
        data = Rows(training.num_steps * training.num_accumulated)
        trainer.fit(module, datamodule=data, ckpt_path=training.checkpoint, weights_only=True)
    state = module.state_dict()
    weights = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}
    return {"losses": losses.values, "weights": weights}


def _connected(training: Training, rank: int, port: int) -> dict[str, Any]:
    """As torchrun would start it."""
    assert training.layout is not None
    number = training.num_processes
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "GROUP_RANK": 0}
    os.environ.update({name: str(value) for name, value in places.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="parallel")
    layout = LAYOUTS[training.layout][number]
    strategy = layout
    if isinstance(layout, dict):
        strategy = MeshStrategy(**(layout | training.strategy), timeout=timedelta(seconds=100))  # a hang fails
    return {"devices": number, "strategy": strategy}


def run(
    trainings: list[Training], work: Path, function: Callable[..., dict[str, Any]] = train
) -> list[list[dict[str, Any]]]:
    """What each process of each training gives. All have as many processes, which do one training after the other.

    They are forked, since the imports are done already.
    """
    work.mkdir(parents=True, exist_ok=True)
    (number,) = {training.num_processes for training in trainings}
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        _run_rank, args=(trainings, str(work), port, function), nprocs=number, start_method="fork"
    )
    return [
        [torch.load(work / f"{turn}_rank{rank}.pt", weights_only=True) for rank in range(number)]
        for turn in range(len(trainings))
    ]


def _run_rank(
    rank: int, trainings: list[Training], work: str, port: int, function: Callable[..., dict[str, Any]]
) -> None:
    for turn, training in enumerate(trainings):
        torch.save(function(training, rank, port), f"{work}/{turn}_rank{rank}.pt")
