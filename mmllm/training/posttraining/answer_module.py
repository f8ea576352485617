"""What trainings on batches of answers share: a loss of whole answers in the place of the tokens', and replayed data.

Shapes: A answers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mmllm.batch import AnswerBatch
from mmllm.losses.batch import BatchLosses
from mmllm.model.flops import Work
from mmllm.model.multimodal import ModelOutput, MultimodalModel
from mmllm.parallel.shard import free_gathered
from mmllm.training.decoder_module import DecoderModule
from mmllm.training.totals import GlobalTotals


class AnswerLosses(NamedTuple):
    """What a batch of answers gives."""

    objective: Tensor
    """Differentiable: the sum over pairs (or answers) of this rank."""
    count: Tensor
    """Pairs, or answers: what the sum over all ranks and accumulated batches is divided by."""
    metrics: Mapping[str, tuple[Tensor, Tensor]]
    """Sums and counts, detached, to be reported."""
    output: ModelOutput


class AnswerModule(DecoderModule):
    """A decoder that is trained on `AnswerBatch`es.

    The loss of a step is the mean over the pairs (or answers) of all ranks and accumulated batches, plus the routers'
    losses, plus `replay_weight` times the usual loss of the replayed sequences, which is normalized by their own
    targets.
    """

    replay_weight: float = 1.0

    @abstractmethod
    def answer_losses(self, batch: AnswerBatch) -> AnswerLosses:
        """The losses of this rank's answers."""

    def loss_of(self, batch: Any) -> tuple[Tensor, BatchLosses, GlobalTotals]:
        """As `DecoderModule.loss_of`, of an `AnswerBatch`."""
        losses, output = self._batch_losses(batch)
        totals = GlobalTotals.of(losses, batch.packed, self.batch_group)
        loss = totals.loss(losses, self._built().config) + self.keeping_loss(batch.packed, output)
        if batch.replay is not None:
            replayed, _, of_replay = super().loss_of(batch.replay)
            loss = loss + self.replay_weight * replayed
            self.window.note("loss/replay", of_replay.task_loss)
        return loss, losses, totals

    def _batch_losses(self, batch: AnswerBatch) -> tuple[BatchLosses, ModelOutput]:
        found = self.answer_losses(batch)
        zero = torch.zeros_like(found.count)
        untouched = self._untouched(found.objective)
        if not batch.num_answers and self.mesh is None:  # all of its rows failed: not even attention has used its keys
            untouched = untouched + _zero_of([p for p in self.parameters() if p.requires_grad], found.objective)
        sums = {"task": found.objective.detach(), "ctc": zero} | {key: one for key, (one, _) in found.metrics.items()}
        counts = {"task": found.count, "ctc": zero} | {key: count for key, (_, count) in found.metrics.items()}
        losses = BatchLosses(
            objective=found.objective + found.output.zero + untouched,
            ctc_sum=zero.to(found.objective),
            sums=sums,
            counts=counts,
            source_sums=found.objective.detach().reshape(1),
            source_counts=found.count.reshape(1),
            num_correct=zero,
            num_ctc_left_out=zero,
            routing=found.output.routing,
        )
        return losses, found.output

    def _untouched(self, like: Tensor) -> Tensor:
        """Zero, by way of heads that answers' losses don't use: DDP waits for the gradients of all parameters."""
        return zero_of_other_heads(self._built(), like)

    def over_ranks(self, values: Tensor) -> Tensor:
        """Their sum over all ranks with batches of their own, detached."""
        values = values.detach().clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(values, group=self.batch_group)
        return values

    # --- metrics ----------------------------------------------------------------------------------------------

    def _record(self, losses: BatchLosses, totals: GlobalTotals, batch: Any) -> None:
        packed = batch.packed
        if self._flops is not None and packed.metadata is not None:
            self.window.flops += self._flops.training(Work.of(packed))
        reported = [key for key in totals.sums if key not in ("task", "ctc")]
        sums: dict[str, Tensor | float] = {key: totals.sums[key] for key in reported}
        counts: dict[str, Tensor | float] = {key: totals.counts[key] for key in reported}
        sums["loss"], counts["loss"] = totals.sums["task"], totals.counts["task"]
        for name, value in totals.router_losses.items():
            sums[f"loss/{name}"], counts[f"loss/{name}"] = value * totals.num_tokens, totals.num_tokens
        sums["padding_share"], counts["padding_share"] = totals.num_positions - totals.num_tokens, totals.num_positions
        sums["tokens"], counts["tokens"] = totals.num_tokens, 1.0
        self.window.add(sums, counts)
        self.routing.add(losses.routing)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Adds up sums and counts."""
        losses, _ = self._batch_losses(batch)
        totals = GlobalTotals.of(losses, batch.packed, self.batch_group)
        for key in totals.sums:
            for name, value in ((f"{key}_sum", totals.sums[key]), (f"{key}_count", totals.counts[key])):
                self._val_sums[name] = self._val_sums.get(name, torch.zeros_like(value)) + value
        free_gathered(self._built())

    def _log_means(self, split: str) -> None:
        """What training logs."""
        sums, self._val_sums = self._val_sums, {}
        means: dict[str, Tensor] = {}
        for name, total in sums.items():
            key = name.removesuffix("_sum")
            if key != name and key != "ctc" and sums[f"{key}_count"] > 0:
                means["loss" if key == "task" else key] = total / sums[f"{key}_count"]
        self.log_dict({f"{split}/{name}": value.float() for name, value in means.items()})


def zero_of_other_heads(model: MultimodalModel, like: Tensor) -> Tensor:
    """0, with a gradient of 0 for the heads that log-probabilities of answers don't use."""
    heads = [model.ctc_head, None if model.pointer is None else model.pointer.advance_head]
    return _zero_of((p for head in heads if head is not None for p in head.parameters() if p.requires_grad), like)


def _zero_of(parameters: Iterable[Tensor], like: Tensor) -> Tensor:
    """0, with a gradient of 0 for each of them."""
    return sum((parameter.sum() * 0.0 for parameter in parameters), start=torch.zeros_like(like))
