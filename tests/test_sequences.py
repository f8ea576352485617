"""What batches carry for the device, and that a training step then asks it nothing."""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmllm.batch import IGNORE, Modality, PackedBatch
from mmllm.model.router import MoEConfig
from mmllm.sequences import BatchMetadata, SequenceMetadata
from mmllm.training.decoder_module import DecoderModule
from mmllm.training.lightning_cli import quiet_lightning
from mmllm.training.optimizers import OptimizerConfig
from mmllm.training.totals import GlobalTotals
from tests.training_fixtures import TinyData, quiet_trainer, tiny_batch, tiny_module

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from host_syncs import HostSyncs


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=1, max_size=3),
    multiple=st.integers(1, 12),
    padding=st.integers(0, 7),
)
def test_metadata_is_what_a_walk_over_the_positions_finds(rows: list[list[int]], multiple: int, padding: int) -> None:
    num_positions = max(max(map(sum, rows)) + padding, 1)
    ids_BT = torch.full((len(rows), num_positions), -1)
    tokens, lengths = [], []
    for row, each in enumerate(rows):
        start = 0
        for number, length in enumerate(each):
            ids_BT[row, start : start + length] = number
            tokens += [row * num_positions + start + place for place in range(length)]
            lengths.append(length)
            start += length
    made = SequenceMetadata.of(ids_BT, multiple)
    num_filler = min(-len(tokens) % multiple, ids_BT.numel() - len(tokens))
    assert made.num_tokens == len(tokens)
    assert made.lengths == (*lengths, *([num_filler] if num_filler else []))
    assert made.tokens_Q[: len(tokens)].tolist() == tokens
    assert made.size == len(tokens) + num_filler
    assert (ids_BT.flatten()[made.tokens_Q[len(tokens) :]] == -1).all()
    assert made.tokens_Q.unique().numel() == made.size
    assert made.cu_seqlens.tolist() == [sum(made.lengths[:n]) for n in range(len(made.lengths) + 1)]
    assert made.max_seqlen == max(made.lengths, default=0)
    assert torch.equal(made.gather_P[made.scatter_Q], torch.arange(made.size))
    assert sum(count for count, _ in made.blocks) == len(made.lengths)
    again = SequenceMetadata.of_lengths(made.lengths, made.tokens_Q)
    for name, value in vars(again).items():
        same = getattr(made, name) if name != "num_tokens" else made.size
        assert torch.equal(value, same) if isinstance(value, torch.Tensor) else value == same, name


def test_filler_changes_neither_hidden_states_nor_counts() -> None:
    module = tiny_module()
    module.configure_model()
    model, batch = module.model, tiny_batch(0)
    assert model is not None
    model.eval()
    plain, filled = batch.with_metadata(), batch.with_metadata(multiple=8)
    assert filled.metadata is not None and plain.metadata is not None
    assert filled.metadata.sequences.size % 8 == 0 and filled.metadata.sequences.size > plain.metadata.sequences.size
    wanted, got = model(plain), model(filled)
    num_tokens = plain.metadata.sequences.num_tokens
    torch.testing.assert_close(got.hidden_QD[:num_tokens], wanted.hidden_QD, rtol=1e-5, atol=1e-6)
    for name in ("counts_LE", "counts_LME", "probability_sums_LE", "z_sums_L", "num_tokens", "tokens_M"):
        torch.testing.assert_close(getattr(got.routing, name), getattr(wanted.routing, name), rtol=1e-5, atol=1e-6)


def test_targets_frames_and_clips_are_found() -> None:
    batch = tiny_batch(3, 3).with_metadata()
    metadata = batch.metadata
    assert metadata is not None
    positions = metadata.sequences.tokens_Q[metadata.targets_M].tolist()
    has_code_BTK = batch.audio_labels_BTK != IGNORE
    wanted = ((batch.labels_BT != IGNORE) | has_code_BTK.any(dim=-1)).flatten().nonzero().flatten().tolist()
    assert positions == wanted
    more = [at for at, place in enumerate(positions) if has_code_BTK.flatten(0, 1)[place, 1:].any()]
    assert metadata.unit_targets_U.tolist() == more
    assert (
        metadata.media.frames_F.tolist() == (batch.modality_BT == Modality.UNITS).flatten().nonzero().flatten().tolist()
    )
    assert metadata.media.clip_frames == (6,) * 3 and metadata.media.clip_slots == (3,) * 3
    assert metadata.media.clip_targets == (2,) * 3


def test_metadata_moves_with_its_batch() -> None:
    batch = tiny_batch(0).with_metadata()
    moved = batch.to("meta")
    metadata = moved.metadata
    assert isinstance(metadata, BatchMetadata) and batch.metadata is not None
    assert metadata.targets_M.is_meta and metadata.sequences.cu_seqlens.is_meta and metadata.media.frames_F.is_meta
    assert metadata.sequences.lengths == batch.metadata.sequences.lengths
    assert batch.with_metadata() is batch


# --- host syncs ---------------------------------------------------------------------------------------------------

ROUTERS = {
    "plain": {},
    "sigmoid": {
        "scoring_func": "sigmoid",
        "router_z_loss_coef": 0.0,
        "use_expert_bias": True,
        "aux_loss_scope": "sequence",
    },
    "noisy": {"router_jitter_noise": 0.1, "expert_dropout": 0.2, "n_shared_experts": 1, "n_group": 2, "topk_group": 1},
    "modalities": {
        "modality_experts": {"image": (0, 1), "text": (2, 3)},
        "local_entropy_loss_coef": 0.01,
        "global_entropy_loss_coef": 0.01,
        "aux_loss_scope": "global",
    },
}


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("optimizer", [{"muon": False}, {"muon": True}], ids=["adamw", "muon"])
def test_a_training_step_asks_the_host_nothing(router: str, optimizer: dict[str, Any]) -> None:
    """From forward to the optimizer's step; the kernels' path for CPUs alone reads its own counts."""
    module = tiny_module(optimizer=OptimizerConfig(lr=1e-2, **optimizer))
    moe = MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, **ROUTERS[router])
    module.decoder = dataclasses.replace(module.decoder, moe=moe, prefix="media", sliding_window=4, qk_norm=True)
    counting = _Counting()
    trainer = quiet_trainer(counting, max_steps=3, gradient_clip_val=1.0, accumulate_grad_batches=2)
    with quiet_lightning():
        trainer.fit(module, datamodule=_WithMetadata())
    assert counting.num_steps == 6
    assert counting.syncs.count == 0, f"\n{counting.syncs}"
    assert counting.syncs.asked_apart, "the kernels' reads are seen, so others would be"


def test_an_encoder_and_a_decoder_ask_the_host_nothing_either() -> None:
    module = tiny_module()
    module.decoder = dataclasses.replace(module.decoder, encoder_layers=1, conv_size=3, moe_layers="all")
    counting = _Counting()
    with quiet_lightning():
        quiet_trainer(counting, max_steps=2, accumulate_grad_batches=2).fit(module, datamodule=_WithMetadata())
    assert counting.num_steps == 4
    assert counting.syncs.count == 0, f"\n{counting.syncs}"


class _WithMetadata(TinyData):
    def on_before_batch_transfer(self, batch: PackedBatch, dataloader_idx: int) -> PackedBatch:
        return batch.with_metadata()  # as the collator makes it


class _Counting(pl.Callback):
    """Counts between the batch's arrival and the end of the optimizer's step."""

    def __init__(self) -> None:
        self.syncs, self.num_steps = HostSyncs(), 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        training_step, strategy = pl_module.training_step, trainer.strategy
        backward, optimizer_step = strategy.backward, pl_module.optimizer_step

        def counted(function: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                if self.syncs in _ACTIVE:
                    return function(*args, **kwargs)
                _ACTIVE.append(self.syncs)
                try:
                    with self.syncs:
                        return function(*args, **kwargs)
                finally:
                    _ACTIVE.remove(self.syncs)

            return run

        pl_module.training_step = counted(training_step)
        strategy.backward = counted(backward)
        pl_module.optimizer_step = counted(optimizer_step)

    def on_train_batch_end(self, *args: Any) -> None:
        self.num_steps += 1


_ACTIVE: list[HostSyncs] = []


def test_the_count_of_host_syncs_sees_a_planted_one() -> None:
    module = tiny_module()
    module.configure_model()
    batch = tiny_batch(0)
    with HostSyncs() as syncs:
        assert module.model is not None
        module.model(copy.copy(batch))  # without its metadata
    assert any("nonzero" in what for what, _ in syncs.asked)


def test_losses_stay_on_the_device() -> None:
    module = tiny_module()
    module.configure_model()
    assert isinstance(module, DecoderModule)
    batch = tiny_batch(0).with_metadata()
    losses = module._losses_of(batch)
    totals = GlobalTotals.of(losses, batch)
    assert all(
        isinstance(value, torch.Tensor) for value in (*totals.sums.values(), totals.num_targets, totals.task_loss)
    )
