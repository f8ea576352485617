"""Sums and counts of a batch over all ranks, and the loss that each rank makes of them.

Shapes: as mmllm/losses/routing.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mmllm.batch import PackedBatch
from mmllm.losses.batch import BatchLosses
from mmllm.losses.routing import RoutingTotals, router_loss_weights, router_losses
from mmllm.model.multimodal import ModelConfig
from mmllm.model.router import MoEConfig


@dataclasses.dataclass
class GlobalTotals:
    """Detached sums and counts of a batch over all ranks, in one all-reduce; all stay on the device."""

    sums: dict[str, Tensor]
    counts: dict[str, Tensor]
    source_sums: Tensor
    source_counts: Tensor
    routing: RoutingTotals
    num_correct: Tensor
    num_ctc_left_out: Tensor
    num_positions: Tensor
    router_losses: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """Detached, made by `loss`: this rank's part of each router loss, without its weight. The ranks' add up."""

    @property
    def num_targets(self) -> Tensor:
        """Of text and units, at least 1."""
        return self.counts["task"].clamp(min=1)

    @property
    def num_tokens(self) -> Tensor:
        """Without padding."""
        return self.routing.num_tokens

    @property
    def task_loss(self) -> Tensor:
        """The weighted loss over text and unit targets."""
        return self.sums["task"] / self.num_targets

    @classmethod
    def of(cls, losses: BatchLosses, batch: PackedBatch, group: dist.ProcessGroup | None = None) -> GlobalTotals:
        """Gathers a forward pass over the ranks of `group` (None: over all), each of which has other sequences."""
        keys = list(losses.sums)
        like = losses.source_sums.double()
        routing = RoutingTotals.of(losses.routing)
        parts = [
            torch.stack([losses.sums[key].double() for key in keys]),
            torch.stack([losses.counts[key].double() for key in keys]),
            losses.source_sums.double(),
            losses.source_counts.double(),
            torch.stack([losses.num_correct.double(), losses.num_ctc_left_out.double()]),
            like.new_full((1,), batch.document_ids_BT.numel()),
            routing.flat(),
        ]
        totals = torch.cat(parts)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(totals, group=group)
        sums, counts, source_sums, source_counts, seen, sizes, flat = totals.split([len(p) for p in parts])
        return cls(
            sums=dict(zip(keys, sums, strict=True)),
            counts=dict(zip(keys, counts, strict=True)),
            source_sums=source_sums,
            source_counts=source_counts,
            routing=routing.with_flat(flat),
            num_correct=seen[0],
            num_ctc_left_out=seen[1],
            num_positions=sizes[0],
        )

    def reported(self, source_names: Sequence[str], has_ctc: bool) -> tuple[dict[str, Tensor | float], ...]:
        """Sums and counts of what is logged, by name: losses by kind and source, accuracy, padding and tokens.

        Args:
            source_names: of the data's sources; empty: they are told by their numbers.
            has_ctc: whether the CTC loss has a weight.
        """
        sums: dict[str, Tensor | float] = {f"loss/{key}": value for key, value in self.sums.items() if key != "task"}
        counts: dict[str, Tensor | float] = {f"loss/{key}": self.counts[key] for key in self.sums if key != "task"}
        sums["loss"], counts["loss"] = self.sums["task"], self.counts["task"]
        for name, value in self.router_losses.items():
            sums[f"loss/{name}"], counts[f"loss/{name}"] = value * self.num_tokens, self.num_tokens
        for index in range(len(self.source_sums)):
            name = source_names[index] if source_names else str(index)
            sums[f"loss/source/{name}"] = self.source_sums[index]
            counts[f"loss/source/{name}"] = self.source_counts[index]
        sums |= {"text_accuracy": self.num_correct, "padding_share": self.num_positions - self.num_tokens}
        counts |= {"text_accuracy": self.counts["text"], "padding_share": self.num_positions}
        sums["tokens"], counts["tokens"] = self.num_tokens, 1.0
        if has_ctc:
            sums["ctc_left_out"] = self.num_ctc_left_out
            counts["ctc_left_out"] = self.counts["ctc"] + self.num_ctc_left_out
        return sums, counts

    def loss(self, losses: BatchLosses, config: ModelConfig) -> Tensor:
        """This rank's part of the global loss, differentiable; see `DecoderModule`."""
        loss = losses.objective / self.num_targets.to(losses.objective)
        if config.loss.ctc:
            loss = loss + config.loss.ctc * losses.ctc_sum / self.counts["ctc"].clamp(min=1).to(losses.ctc_sum)
        if losses.routing.depth is not None:
            num_tokens = self.num_tokens.to(losses.objective)
            loss = loss + config.decoder.mod_predictor_coef * losses.routing.depth.loss(num_tokens)
        moe = config.decoder.moe
        if moe is not None:
            weights = router_loss_weights(moe)
            for name, value in router_losses(moe, losses.routing, self.routing).items():
                loss = loss + weights[name] * value
                self.router_losses[name] = value.detach()
        return loss


def router_means(
    sums: Mapping[str, Tensor | float],
    counts: Mapping[str, Tensor | float],
    moe: MoEConfig | None,
    group: dist.ProcessGroup | None = None,
) -> dict[str, float]:
    """Means of the router losses over a window, of each of which every rank has kept its part. A collective call.

    Args:
        sums: of this rank, by name.
        counts: of all ranks.
        moe: of the decoder; None: it has no experts.
        group: ranks with sequences of their own; None: all.
    """
    names = [f"loss/{name}" for name in (router_loss_weights(moe) if moe is not None else ())]
    names = [name for name in names if name in sums]
    if not names:
        return {}
    parts = torch.stack([torch.as_tensor(sums[name]) for name in names])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(parts, group=group)
    means = zip(names, parts.tolist(), strict=True)
    return {name: total / float(counts[name]) for name, total in means if counts[name] > 0}
