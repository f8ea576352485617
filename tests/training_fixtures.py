"""Tiny packed batches and a resumable loader, without tokenizer or files. Used by the tests of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.distributed.tensor import DTensor

from mmllm.batch import IGNORE, Modality, PackedBatch
from mmllm.model.audio_projectors import AudioProjectorConfig
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.image_projectors import ImageProjectorConfig
from mmllm.model.multimodal import AudioConfig, LossConfig
from mmllm.model.router import MoEConfig
from mmllm.model.vision import VisionConfig
from mmllm.training.decoder_module import DecoderModule
from mmllm.training.optimizers import OptimizerConfig

torch.set_num_threads(1)  # these models are too small for two, and a busy machine makes the second one wait

NUM_TEXT, NUM_CODEBOOKS, CODEBOOK_SIZE = 40, 2, 6
VOCAB = NUM_TEXT + NUM_CODEBOOKS * (CODEBOOK_SIZE + 1)
IMAGE_SIZE, IMAGE_SLOTS, CLIP_SLOTS, CLIP_FRAMES, LENGTH = 16, 4, 3, 6, 32

CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": IMAGE_SIZE, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": NUM_TEXT, "width": 16, "heads": 2, "layers": 1},
}


def tiny_module(seed: int = 0, **settings: Any) -> DecoderModule:
    torch.manual_seed(seed)
    optimizer = settings.pop("optimizer", OptimizerConfig(lr=1e-2, warmup=0.1))
    loss = settings.pop("loss", LossConfig(units=0.5, ctc=0.3))
    return DecoderModule(
        decoder=DecoderConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            moe=settings.pop("moe", MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)),
            moe_layers=settings.pop("moe_layers", (1,)),
        ),
        vision=settings.pop("vision", VisionConfig(open_clip=CLIP_CONFIG)),
        image_projector=ImageProjectorConfig(kind="mlp"),
        audio=AudioConfig(
            NUM_CODEBOOKS,
            CODEBOOK_SIZE,
            codebook_dim=8,
            projector=AudioProjectorConfig("conv", pool=2, num_hidden_layers=1),
        ),
        loss=loss,
        optimizer=optimizer,
        **settings,
    )


def tiny_batch(seed: int, num_sequences: int = 2, text_only: bool = False) -> PackedBatch:
    """Each sequence: an image and its caption, a clip and its transcript, frames that are spoken, text, padding."""
    generator = torch.Generator().manual_seed(seed)
    rows = [_row(generator, text_only) for _ in range(num_sequences)]
    stacked = {key: torch.stack([row[key] for row in rows]) for key in rows[0] if key.endswith(("BT", "BTK"))}
    has_media = [row for row in range(num_sequences) if not text_only]
    slots = [torch.arange(1, 1 + IMAGE_SLOTS) + row * LENGTH for row in has_media]
    clips = [torch.arange(10, 10 + CLIP_SLOTS) + row * LENGTH for row in has_media]
    codes = torch.randint(0, CODEBOOK_SIZE, (len(has_media), CLIP_FRAMES, NUM_CODEBOOKS), generator=generator)
    images = torch.randint(0, 256, (len(has_media), 3, IMAGE_SIZE, IMAGE_SIZE), generator=generator)
    return PackedBatch(
        **stacked,
        images_NCHW=images.to(torch.uint8),
        image_slots_NS=torch.stack(slots) if slots else torch.zeros(0, IMAGE_SLOTS, dtype=torch.long),
        clip_codes_CFK=codes,
        clip_slots_CS=torch.stack(clips) if clips else torch.zeros(0, CLIP_SLOTS, dtype=torch.long),
        clip_targets_CL=torch.randint(14, NUM_TEXT, (len(has_media), 2), generator=generator),
    )


def _row(generator: torch.Generator, text_only: bool) -> dict[str, torch.Tensor]:
    num_tokens = int(torch.randint(26, LENGTH, (), generator=generator))
    token_ids = torch.randint(14, NUM_TEXT, (LENGTH,), generator=generator)
    labels = torch.full((LENGTH,), IGNORE)
    labels[5:9], labels[13:16] = token_ids[6:10], token_ids[14:17]
    labels[22 : num_tokens - 1] = token_ids[23:num_tokens]
    modality = torch.zeros(LENGTH, dtype=torch.long)
    codes = torch.full((LENGTH, NUM_CODEBOOKS), -1)
    code_labels = torch.full((LENGTH, NUM_CODEBOOKS), IGNORE)
    if not text_only:
        modality[1 : 1 + IMAGE_SLOTS], modality[10 : 10 + CLIP_SLOTS] = Modality.IMAGE, Modality.AUDIO
        modality[17:21] = Modality.UNITS
        codes[17:21] = torch.randint(0, CODEBOOK_SIZE, (4, NUM_CODEBOOKS), generator=generator)
        token_ids[17:21] = NUM_TEXT + codes[17:21, 0]
        labels[16:20], code_labels[16:20] = token_ids[17:21], codes[17:21]
        labels[20] = 9
    documents = torch.tensor([0] * 9 + [1] * 8 + [2] * (LENGTH - 17))
    positions = torch.cat([torch.arange(9), torch.arange(8), torch.arange(LENGTH - 17)])
    source = documents.clone()
    for column, value in ((documents, -1), (source, -1), (labels, IGNORE), (positions, 0)):
        column[num_tokens:] = value
    return {
        "token_ids_BT": token_ids,
        "labels_BT": labels,
        "positions_BT": positions,
        "document_ids_BT": documents,
        "modality_BT": modality,
        "source_BT": source,
        "audio_codes_BTK": codes,
        "audio_labels_BTK": code_labels,
    }


class BatchLoader:
    """Endless numbered batches; its state is the next number."""

    def __init__(self, num_sequences: int = 2, length: int = 1000) -> None:
        self.num_sequences, self.length, self.position = num_sequences, length, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[PackedBatch]:
        while self.position < self.length:
            self.position += 1
            yield tiny_batch(self.position - 1, self.num_sequences, text_only=self.position % 4 == 0)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class TinyData(pl.LightningDataModule):
    source_names = ("captions", "clips", "words")

    def __init__(self, num_sequences: int = 2) -> None:
        super().__init__()
        self.num_sequences = num_sequences

    def train_dataloader(self) -> BatchLoader:
        return BatchLoader(self.num_sequences)


class LossRecorder(pl.Callback):
    """The loss of every step, as logged."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(trainer.callback_metrics["loss"]))


def merge(batches: list[PackedBatch]) -> PackedBatch:
    """Their sequences, one after the other, as one batch."""
    values: dict[str, torch.Tensor] = {}
    for name in ("images_NCHW", "clip_codes_CFK", "clip_targets_CL"):
        values[name] = torch.cat([getattr(batch, name) for batch in batches])
    first_row = 0
    for batch in batches:
        for name in ("image_slots_NS", "clip_slots_CS"):
            moved = getattr(batch, name) + first_row * LENGTH
            values[name] = torch.cat([values[name], moved]) if name in values else moved
        first_row += batch.token_ids_BT.shape[0]
    for name in vars(batches[0]):
        if name.endswith(("BT", "BTK")):
            values[name] = torch.cat([getattr(batch, name) for batch in batches])
    return PackedBatch(**values)


def quiet_trainer(*callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**{**defaults, **settings}, callbacks=list(callbacks))


class ListData(pl.LightningDataModule):
    """Given batches; with two ranks, each takes its own half of every pair."""

    source_names = ("captions", "clips", "words")

    def __init__(self, batches: list[Any]) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        assert self.trainer is not None
        batches = self.batches
        if self.trainer.world_size > 1:
            batches = [pair[self.trainer.global_rank] for pair in self.batches]
        return torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=_as_it_is)


def _as_it_is(batch: PackedBatch) -> PackedBatch:
    return batch


def mixed_pairs() -> list[tuple[PackedBatch, PackedBatch]]:
    """What two ranks see: both mixed; then one with text alone, then the other; then both."""
    return [_pair(i, *kinds) for i, kinds in enumerate([(False, False), (False, True), (True, False), (True, True)])]


def one_sided_pairs() -> list[tuple[PackedBatch, PackedBatch]]:
    """Fifty steps in which one rank has text alone and the other pictures and sounds."""
    return [_pair(i, True, False) for i in range(50)]


def _pair(number: int, first_has_text_alone: bool, second_has_text_alone: bool) -> tuple[PackedBatch, PackedBatch]:
    return tiny_batch(2 * number, 1, first_has_text_alone), tiny_batch(2 * number + 1, 1, second_has_text_alone)


def train_rank(rank: int, port: int, out: str, pairs: list[tuple[PackedBatch, PackedBatch]]) -> None:
    """One of two gloo processes on pairs of batches; see `fit_rank`."""
    fit_rank(rank, port, out, tiny_module(), ListData(pairs), max_steps=len(pairs))


def fit_rank(
    rank: int,
    port: int,
    out: str,
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    *callbacks: pl.Callback,
    ckpt: Path | None = None,
    num_ranks: int = 2,
    **settings: Any,
) -> None:
    """One of some gloo processes; writes the losses and (whole) weights that it ends with."""
    import os

    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    from mmllm.training.lightning_cli import quiet_lightning

    variables = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
    variables |= {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    os.environ.update({name: str(value) for name, value in variables.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
    torch.set_num_threads(1)
    recorder = LossRecorder()
    with quiet_lightning():
        trainer = quiet_trainer(
            recorder,
            *callbacks,
            devices=num_ranks,
            plugins=[TorchElasticEnvironment()],
            use_distributed_sampler=False,
            **{"strategy": "ddp", **settings},
        )
        trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    weights = {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in module.state_dict().items()}
    torch.save({"losses": recorder.losses, "weights": weights}, f"{out}/rank{rank}.pt")


def run_two_ranks(function: Callable[..., None], out: Path, *args: Any) -> list[dict[str, Any]]:
    """Runs `function(rank, port, out, *args)` in two processes; gives what each saved."""
    return run_ranks(function, out, *args)


def run_ranks(function: Callable[..., None], out: Path, *args: Any, num_ranks: int = 2) -> list[dict[str, Any]]:
    """Runs `function(rank, port, out, *args)` in so many processes; gives what each saved."""
    import socket
    import sys

    import torch.multiprocessing

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    method = "fork" if sys.platform == "linux" else "spawn"  # forking saves two imports of torch and Lightning
    torch.multiprocessing.start_processes(function, args=(port, str(out), *args), nprocs=num_ranks, start_method=method)
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(num_ranks)]
