"""Keeps a training near its start, so that less is lost of what the start could do: `keep` of a `DecoderModule`.

Three penalties, each a weight in the config, each on top of whatever is trained (SFT, DPO, GRPO):

- kl: the predictions at the batch's own targets stay near those of the start.
- ewc: weights stay the nearer the more the loss of earlier data depends on them (arXiv 1612.00796).
- l2: all weights stay near (L2-SP, arXiv 1802.01483).

The penalties of weights are no part of the loss: their gradient, λ·F·(θ − θ₀), is added before the optimizer's step, so
that it is the same over any number of ranks and accumulated batches, and costs no graph.

Shapes: B sequences, T positions, K codebooks, M targets, D width, V vocabulary, S sources.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmllm.batch import PackedBatch
from mmllm.checkpoints.adapter_config import AdapterConfig
from mmllm.losses.batch import LossFunction
from mmllm.losses.divergence import kl_divergence
from mmllm.model.embedding import Rows, joined
from mmllm.model.multimodal import ModelOutput, MultimodalModel
from mmllm.parallel.shard import free_gathered
from mmllm.training.init_source import InitSource
from mmllm.training.matrix_exchange import local
from mmllm.training.posttraining.start_weights import StartWeights

START = "mmllm_start"
"""Of a checkpoint: the folder that the training is kept near, and its hash."""


@dataclass(frozen=True)
class KeepConfig:
    """How a training is kept near its start, which is the model in `init_from`.

    Attributes:
        kl: weight of KL(start‖now), nats a target of the batch, over all that might come next.
        ewc: λ of λ/2 · Σ F (θ − θ₀)², with F the Fisher information's diagonal (see `fisher_diagonal`).
        l2: λ of λ/2 · Σ (θ − θ₀)².
        fisher_recipe: recipe of the data that F is of: what the start was trained on. For `ewc`.
        fisher_documents: how many of its documents.
    """

    kl: float = 0.0
    ewc: float = 0.0
    l2: float = 0.0
    fisher_recipe: str | None = None
    fisher_documents: int = 256

    def __post_init__(self) -> None:
        for name in ("kl", "ewc", "l2"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"keep.{name} is {value}; give a weight of 0 or more")
        if self.ewc and self.fisher_recipe is None:
            raise ValueError("keep.ewc is given without fisher_recipe, the data that is not to be forgotten; name one")
        if self.fisher_recipe is not None and not self.ewc:
            raise ValueError(f"keep.fisher_recipe is {self.fisher_recipe}, which ewc alone reads; give ewc a weight")
        if self.fisher_documents < 1:
            raise ValueError(f"keep.fisher_documents is {self.fisher_documents}; give 1 or more")

    @property
    def is_on(self) -> bool:
        """Whether any weight is above 0."""
        return bool(self.kl or self.ewc or self.l2)


def check_kept(
    keep: KeepConfig | None, wise_ft: float | None, init_from: str | None, adapter: AdapterConfig | None
) -> None:
    """Refuses what is to be kept to a start that there isn't, or mixed with one as it can't be.

    Raises:
        ValueError: see above; the message names the key.
    """
    if wise_ft is not None and not 0 <= wise_ft <= 1:
        raise ValueError(f"wise_ft is {wise_ft}; it is the trained weights' share, from 0 (the start) to 1")
    key = "keep" if keep is not None and keep.is_on else "wise_ft"
    if init_from is None and (key == "keep" or wise_ft is not None):
        raise ValueError(f"{key} is given without init_from, the model to keep to; give the folder of one")
    if wise_ft is None or adapter is None:
        return
    what = "use_dora" if adapter.use_dora else f"kind {adapter.kind}" if adapter.kind != "lora" else None
    if what is not None:
        raise ValueError(
            f"wise_ft is {wise_ft} and the adapter has {what}, of which no share can be taken; leave wise_ft out, or "
            f"train a LoRA"
        )


def check_start(checkpoint: Mapping[str, Any], source: InitSource) -> None:
    """Raises ValueError where a checkpoint was kept to another start than this training's."""
    known = checkpoint.get(START)
    if known is not None and known["hash"] != source.hash:
        raise ValueError(
            f"the checkpoint was kept near {known['folder']} with hash {known['hash'][:12]}…, but init_from, "
            f"{source.path}, has {source.hash[:12]}…: go on with the same start, or begin anew without --ckpt_path"
        )


def keep_notes(keep: KeepConfig, wise_ft: float | None, source: InitSource | None) -> str:
    """What the model card says of it; empty: nothing was kept."""
    if source is None or not (keep.is_on or wise_ft is not None):
        return ""
    weights = [f"{name} {getattr(keep, name):g}" for name in ("kl", "ewc", "l2") if getattr(keep, name)]
    lines = ["## Kept near its start", "", f"The start is `{source.path.name}`, hash `{source.hash[:12]}`.", ""]
    lines += [f"- penalties: {', '.join(weights)}"] if weights else []
    if wise_ft is not None:
        lines.append(f"- weights: {1 - wise_ft:g} · start + {wise_ft:g} · trained (WiSE-FT, arXiv 2109.01903)")
    return "\n".join(lines)


@dataclass
class Keeper:
    """The penalties of one training.

    Attributes:
        config: their weights.
        start: what the training started with.
        fisher: F by the names of `start`; empty until it was computed.
        is_sharded: whether ranks hold parts of weights.

    Raises:
        ValueError: `keep.ewc` with sharded weights.
    """

    config: KeepConfig
    start: StartWeights
    fisher: Mapping[str, Tensor] = field(default_factory=dict)
    is_sharded: bool = False

    def __post_init__(self) -> None:
        if self.is_sharded and self.config.ewc:
            raise ValueError(
                "keep.ewc is given with a strategy that shards weights, where the gradient of a single document is "
                "nowhere whole; set keep.l2 or keep.kl instead, or train with ddp"
            )

    def divergence(
        self,
        model: MultimodalModel,
        output: ModelOutput,
        batch: PackedBatch,
        losses: LossFunction,
        group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, Tensor]:
        """KL(start‖now) of a batch.

        Args:
            model: as it is now.
            output: what it made of the batch.
            batch: gives the targets.
            losses: of the model, which tell how targets are laid out.
            group: ranks with batches of their own; None: all.

        Returns:
            This rank's part of the mean over all ranks' targets, differentiable (the parts add up to the mean); and
            that mean, detached.
        """
        metadata = output.metadata
        with torch.no_grad(), self.start.in_place():
            before = model(batch)
            start_MD = before.hidden_QD.index_select(0, metadata.targets_M)
            start_VD = model.decoder.lm_head(start_MD, lambda _, rows: joined(rows).detach().clone())
            free_gathered(model)
        targets, layout, codebooks_K = losses.targets(output, batch)

        def reduce(hidden_MD: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
            return kl_divergence(hidden_MD, rows, start_MD, start_VD, targets, layout, codebooks_K)

        hidden_MD = output.hidden_QD.index_select(0, metadata.targets_M)
        total, count = model.decoder.lm_head(hidden_MD, reduce)
        sums = torch.stack([total.detach().double(), count.double()])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums, group=group)
        num_targets = sums[1].clamp(min=1)
        return total / num_targets.to(total), sums[0] / num_targets

    @torch.no_grad()
    def add_gradients(self) -> Tensor | None:
        """Adds the gradient of the penalties of weights to that of the loss; this rank's part of their value.

        None: there are none. Parameters that the loss gave no gradient don't move, and get none.
        """
        if not (self.config.ewc or self.config.l2):
            return None
        value = None
        for name, (weight, start) in self.start.pairs().items():
            if weight.grad is None:
                continue
            change = local(weight) - local(start)
            pull = change * self.config.l2
            if self.config.ewc:
                pull = pull + change * self._fisher_of(name, change) * self.config.ewc
            local(weight.grad).add_(pull.to(weight.grad.dtype))
            part = 0.5 * (change * pull).sum().double()
            value = part if value is None else value + part
        return value

    def _fisher_of(self, name: str, like: Tensor) -> Tensor:
        return self.fisher[name].to(like.device)
