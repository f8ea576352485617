"""The loss of conversations: every answer token weighs the same, however long the answers beside it are.

Two ranks with unequal numbers of targets are compared with one in `test_training_decoder.py`.
"""

import dataclasses

import lightning.pytorch as pl
import pytest
import torch

from mmllm.batch import IGNORE, PackedBatch
from mmllm.model.multimodal import LossConfig
from mmllm.training.lightning_cli import quiet_lightning
from tests.training_fixtures import ListData, LossRecorder, merge, quiet_trainer, tiny_batch, tiny_module

LENGTHS = (1, 10, 2, 7)


def chats() -> list[PackedBatch]:
    """Sequences of text whose answers have one token, ten, two and seven."""
    batches = []
    for seed, count in enumerate(LENGTHS):
        batch = tiny_batch(seed, 1, text_only=True)
        labels_T = batch.labels_BT.reshape(-1)
        places = (labels_T != IGNORE).nonzero()[:, 0]
        labels_T[places[:-count]] = IGNORE
        assert int((batch.labels_BT != IGNORE).sum()) == count
        batches.append(batch)
    return batches


class _Gradients(pl.Callback):
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.found = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}


def trained(batches: list[PackedBatch], accumulate: int) -> tuple[dict[str, torch.Tensor], float]:
    """Gradients of one step, and its loss."""
    module = tiny_module(loss=LossConfig())
    module.decoder = dataclasses.replace(
        module.decoder, moe=dataclasses.replace(module.decoder.moe, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    )
    gradients, losses = _Gradients(), LossRecorder()
    with quiet_lightning():
        trainer = quiet_trainer(gradients, losses, max_steps=1, accumulate_grad_batches=accumulate)
        trainer.fit(module, datamodule=ListData(batches))
    return gradients.found, losses.losses[-1]


def test_a_long_answer_weighs_as_its_tokens_do_however_batches_are_cut() -> None:
    batches = chats()
    accumulated, _ = trained(batches, 4)
    at_once, loss = trained([merge(batches)], 1)
    alone = [trained([batch], 1) for batch in batches]
    by_tokens = sum(count * found for count, (_, found) in zip(LENGTHS, alone, strict=True)) / sum(LENGTHS)
    assert loss == pytest.approx(by_tokens, rel=1e-5)
    off = 0.0
    for name, gradient in at_once.items():
        by_tokens = sum(
            count * found.get(name, torch.zeros(())) for count, (found, _) in zip(LENGTHS, alone, strict=True)
        )
        torch.testing.assert_close(accumulated[name], gradient, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(gradient, by_tokens / sum(LENGTHS), rtol=1e-4, atol=1e-6)
        of_means = sum(found.get(name, torch.zeros(())) for found, _ in alone) / len(alone)
        off += float((of_means - gradient).norm())
    assert off > 0.1 * sum(float(gradient.norm()) for gradient in at_once.values()), "the mean of means is another"
