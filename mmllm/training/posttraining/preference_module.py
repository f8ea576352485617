"""Preferences without rollouts: DPO and its kin, and KTO.

`class_path: mmllm.training.posttraining.preference_module.PreferenceModule`, with `PreferenceDataModule`.

Shapes: A answers, P pairs, M targets, N rows.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from mmllm.batch import AnswerBatch
from mmllm.checkpoints.adapters import is_adapters
from mmllm.checkpoints.folder import load_model
from mmllm.data.loading.preferences import PreferenceDataModule
from mmllm.inference.engine.prepared import eval_mode, trained_modules
from mmllm.losses.answers import UnitLayout, sum_by_answer, target_logprobs
from mmllm.losses.preferences import check_pair_loss, kto_losses, pair_losses
from mmllm.model.multimodal import ModelOutput, MultimodalModel
from mmllm.parallel.shard import free_gathered
from mmllm.training.posttraining.answer_module import AnswerLosses, AnswerModule

log = logging.getLogger(__name__)

ReferenceKind = Literal["auto", "adapter", "copy", "stored", "none"]
"""adapter: the base itself, with the adapter left out. copy: the weights that the training started with, of what is
trained alone, or those of `reference_model`. stored: log-probabilities that were computed before training. none: no
reference. auto: adapter where an adapter alone is trained, else copy."""


@dataclass(frozen=True)
class PreferenceConfig:
    """What is learnt of preferences.

    Attributes:
        loss: "sigmoid", "robust", "hinge" or "ipo" of pairs (see `PairLoss`); "kto" of answers that are liked or not,
            with `form: answers` of the data module.
        beta: how strongly the policy is held to the reference.
        label_smoothing: share of pairs that are expected to be the wrong way round ("sigmoid", "robust").
        length_normalized: scores are divided by the answers' tokens; "ipo" always does so.
        sft_weight: weight of the usual loss of the chosen sides, a mean over their tokens.
        desirable_weight: of answers that are liked ("kto").
        undesirable_weight: of those that are not. The paper keeps desirable_weight · liked to undesirable_weight ·
            not liked between 1 and 4/3.
        reference: see `ReferenceKind`.
        reference_model: folder of another model that is the reference; None: the training's start.
        replay_weight: of the usual loss of replayed sequences (`replay_recipe` of the data module).
    """

    loss: Literal["sigmoid", "robust", "hinge", "ipo", "kto"] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    length_normalized: bool = False
    sft_weight: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reference: ReferenceKind = "auto"
    reference_model: str | None = None
    replay_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.loss == "kto":
            check_pair_loss("sigmoid", self.beta, 0.0)
            for name in ("label_smoothing", "length_normalized", "sft_weight"):
                if getattr(self, name):
                    raise ValueError(f"preference.{name} is {getattr(self, name)}, which is of pairs; leave it out")
        else:
            check_pair_loss(self.loss, self.beta, self.label_smoothing)
        if self.reference not in get_args(ReferenceKind):
            raise ValueError(f"preference.reference is {self.reference!r}; choose {', '.join(get_args(ReferenceKind))}")
        if self.reference_model is not None and self.reference not in ("auto", "copy"):
            raise ValueError(
                f"preference.reference_model is given and reference is {self.reference!r}; set it to copy, or leave "
                f"the model out"
            )
        if self.loss == "kto" and self.reference in ("stored", "none"):
            raise ValueError(
                f"preference.reference is {self.reference!r}, but kto also asks the reference about answers behind "
                f"prompts that aren't theirs, others in each step; choose adapter or copy"
            )
        for name in ("sft_weight", "desirable_weight", "undesirable_weight", "replay_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"preference.{name} is {getattr(self, name)}; a weight is a number of 0 or more")


class _Answers(NamedTuple):
    """Of each answer of a batch."""

    logprobs_A: Tensor
    lengths_A: Tensor
    output: ModelOutput


class PreferenceModule(AnswerModule):
    """A decoder that learns which of two answers is preferred, or which answers are liked.

    Policy and reference are both computed without dropout or masks, so that their difference is what was learnt.
    """

    def __init__(self, preference: PreferenceConfig | None = None, **settings: Any) -> None:
        """Keeps the settings.

        Args:
            preference: what is learnt of preferences; None: the defaults.
            **settings: of `DecoderModule`.

        Raises:
            ValueError: there is no `init_from`, whose answers are to become better ones.
        """
        super().__init__(**settings)
        self.preference = preference or PreferenceConfig()
        self.replay_weight = self.preference.replay_weight
        if self.init_from is None:
            raise ValueError("PreferenceModule needs init_from, the model whose answers are to become better ones")
        kind = self.preference.reference
        self._keeps_reference = kind in ("auto", "adapter", "copy") and self.preference.reference_model is None
        self.keeps_start = self.keeps_start or self._keeps_reference
        self.asks_start = self.asks_start or self._keeps_reference
        self._other_model: tuple[MultimodalModel, ...] = ()  # not registered: it is in no checkpoint
        self._layout: UnitLayout | None = None

    # --- the reference ----------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Builds the model, and the reference where that is another model.

        Raises:
            ValueError: as of `DecoderModule`; or the reference can't be had.
        """
        if self.model is not None:
            return
        super().configure_model()
        self._layout = None if self.folder is None else UnitLayout.of(self.folder)
        if self.preference.reference == "adapter":
            trained = [name for name, parameter in self._built().named_parameters() if parameter.requires_grad]
            others = [name for name in trained if not is_adapters(name)]
            if self.adapter is None or others:
                what = f"{others[0]} is trained beside it" if self.adapter is not None else "there is no adapter"
                raise ValueError(
                    f"preference.reference is 'adapter', but {what}, so that the base isn't what training started "
                    f"with; choose copy"
                )
        if self.preference.reference_model is not None:
            self._other_model = (self._loaded_reference(self.preference.reference_model),)

    def _loaded_reference(self, folder: str) -> MultimodalModel:
        assert self.folder is not None
        if self.mesh is not None:
            raise ValueError(
                "preference.reference_model is given with a strategy that shards the model, but the reference isn't "
                "sharded; leave it out (then it is the start, sharded like the model), or train with ddp"
            )
        loaded = load_model(folder)
        if loaded.tokenizer.hash != self.folder.hash:
            raise ValueError(
                f"the reference {folder} has tokenizer {loaded.tokenizer.hash[:12]}, but the model's is "
                f"{self.folder.hash[:12]}; log-probabilities of other tokens can't be compared: take a reference of "
                f"this tokenizer"
            )
        return loaded.model

    @contextmanager
    def _reference(self) -> Iterator[MultimodalModel]:
        """The reference, without gradients."""
        with torch.no_grad():
            if self._other_model:
                yield self._other_model[0].to(self.device)
            else:
                assert self.start is not None
                with self.start.in_place() as model:
                    yield model
                    free_gathered(model)

    def on_fit_start(self) -> None:
        """Checks that data and loss go together, and computes what is to be stored of the reference."""
        if self.folder is None:
            raise ValueError("model.init_args.tokenizer is left out beside decoder; give it the folder of init_from")
        super().on_fit_start()
        data = self._data
        if not isinstance(data, PreferenceDataModule):
            raise ValueError(f"PreferenceModule trains on PreferenceDataModule, and the data is {type(data).__name__}")
        wanted = "answers" if self.preference.loss == "kto" else "pairs"
        if data.form != wanted:
            raise ValueError(
                f"preference.loss is {self.preference.loss!r} and data.init_args.form {data.form!r}; set form to "
                f"{wanted}"
            )
        if wanted == "answers" and data.num_answers < 2:
            raise ValueError(
                f"data.init_args.batch_size is {data.num_answers}; kto compares each answer with others of its batch: "
                f"give at least 2, better 8"
            )
        if self.preference.reference == "stored":
            for split in ("train", "val"):
                if data.files(split) is not None:
                    data.take_references(split, self._stored_references(data, split))

    def _stored_references(self, data: PreferenceDataModule, split: Literal["train", "val"]) -> np.ndarray:
        """Log-probabilities by the start, [N, 2], from the file beside the data, which is made if it isn't there."""
        files = data.files(split)
        assert files is not None and self._source is not None
        told = [files.digest, self._source.hash, data.folder.hash, data.image_transform.to_dict(), data.sequence_length]
        told.append(str(self.trainer.precision))
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
        path = files.files[0].with_name(f"{files.files[0].name}.reference-{digest}.npz")
        if not self.trainer.strategy.broadcast(path.is_file()):
            if self.trainer.ckpt_path is not None:
                raise ValueError(
                    f"{path} is gone, which has what the reference said of the data, and the weights have moved since; "
                    f"begin anew without --ckpt_path, or set preference.reference to copy from the start"
                )
            references_N2 = self._computed_references(data, split, len(files))
            if self.trainer.is_global_zero:
                new = path.with_suffix(".new.npz")
                np.savez(new, logprobs=references_N2)
                os.replace(new, path)
                log.info("wrote %s", path)
            self.trainer.strategy.barrier()
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["logprobs"]

    @torch.no_grad()
    def _computed_references(
        self, data: PreferenceDataModule, split: Literal["train", "val"], count: int
    ) -> np.ndarray:
        """NaN where a row can't be written: it will fail in training too, and be named there."""
        sums_N2 = torch.zeros(count, 2, dtype=torch.float64, device=self.device)
        seen_N2 = torch.zeros_like(sums_N2)
        for items, batch in data.answers_of(split):
            batch = batch.to(self.device)
            with self.trainer.precision_plugin.forward_context():  # as training computes them
                logprobs_A = self._answers(self._built(), batch).logprobs_A.double()
            rows_A = torch.tensor(items, device=self.device)[batch.group_A]
            sides_A = (~batch.is_chosen_A).long()
            sums_N2[rows_A, sides_A], seen_N2[rows_A, sides_A] = logprobs_A, 1.0
        sums_N2, seen_N2 = self.over_ranks(sums_N2), self.over_ranks(seen_N2)
        return torch.where(seen_N2 > 0, sums_N2, torch.nan).float().cpu().numpy()

    # --- losses -----------------------------------------------------------------------------------------------

    def _answers(self, model: MultimodalModel, batch: AnswerBatch) -> _Answers:
        """Log-probabilities of a batch's answers, by a model without dropout or masks."""
        with eval_mode(trained_modules(model)):
            output = model(batch.packed)
        found = target_logprobs(model, output, batch, layout=self._layout)
        logprobs_A = sum_by_answer(found.logprobs_M, found.answer_M, batch.num_answers)
        lengths_A = sum_by_answer(torch.ones_like(found.logprobs_M), found.answer_M, batch.num_answers)
        return _Answers(logprobs_A, lengths_A, output)

    def _referred(self, batch: AnswerBatch) -> Tensor:
        """Log-probabilities by the reference, [A]; zeros where there is none."""
        kind = self.preference.reference
        if kind == "none":
            return batch.is_chosen_A.new_zeros(batch.num_answers, dtype=torch.float32)
        if kind == "stored":
            return batch.reference_A
        with self._reference() as model:
            return self._answers(model, batch).logprobs_A

    def answer_losses(self, batch: AnswerBatch) -> AnswerLosses:
        """Of pairs, or of answers that are liked or not."""
        return self._of_answers(batch) if self.preference.loss == "kto" else self._of_pairs(batch)

    def _of_pairs(self, batch: AnswerBatch) -> AnswerLosses:
        config = self.preference
        assert config.loss != "kto"
        reference_A = self._referred(batch)  # first: afterwards no weight may move before the backward pass
        logprobs_A, lengths_A, output = self._answers(self._built(), batch)
        ratios_A = logprobs_A - reference_A.to(logprobs_A)
        scores_A = ratios_A
        if config.length_normalized or config.loss == "ipo":
            scores_A = ratios_A / lengths_A.clamp(min=1)
        chosen_P, rejected_P = in_pairs(scores_A, batch)
        losses_P = pair_losses(
            chosen_P, rejected_P, loss=config.loss, beta=config.beta, label_smoothing=config.label_smoothing
        )
        count = losses_P.new_tensor(len(losses_P))
        objective = losses_P.sum()
        metrics = self._reported(batch, logprobs_A, ratios_A)
        if config.sft_weight:
            is_chosen_A = batch.is_chosen_A
            nats, tokens = -logprobs_A[is_chosen_A].sum(), lengths_A[is_chosen_A].sum()
            num_pairs, num_tokens = self.over_ranks(torch.stack([count, tokens]))
            objective = objective + config.sft_weight * nats * num_pairs / num_tokens.clamp(min=1)
            metrics["loss/sft"] = (nats.detach(), tokens)
        return AnswerLosses(objective, count, metrics, output)

    def _reported(self, batch: AnswerBatch, logprobs_A: Tensor, ratios_A: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """What is logged of pairs, by TRL's names."""
        logprobs_A, rewards_A = logprobs_A.detach(), self.preference.beta * ratios_A.detach()
        chosen_P, rejected_P = in_pairs(rewards_A, batch)
        own_P, other_P = in_pairs(logprobs_A, batch)
        values = {
            "rewards/chosen": chosen_P,
            "rewards/rejected": rejected_P,
            "rewards/margins": chosen_P - rejected_P,
            "rewards/accuracies": (chosen_P > rejected_P).to(rewards_A),
            "logps/chosen": own_P,
            "logps/rejected": other_P,
        }
        count = rewards_A.new_tensor(len(chosen_P))
        return {name: (value_P.sum(), count) for name, value_P in values.items()}

    def _of_answers(self, batch: AnswerBatch) -> AnswerLosses:
        config = self.preference
        kl = self._divergence(batch)
        reference_A = self._referred(batch)
        logprobs_A, _, output = self._answers(self._built(), batch)
        scores_A = logprobs_A - reference_A.to(logprobs_A)
        is_liked_A = batch.is_chosen_A
        losses_A = kto_losses(
            scores_A,
            is_liked_A,
            kl.to(scores_A),
            beta=config.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )
        count = losses_A.new_tensor(len(losses_A))
        metrics = {"kl": (kl.to(scores_A) * count, count)}
        for name, is_side_A in (("chosen", is_liked_A), ("rejected", ~is_liked_A)):
            num_side = is_side_A.sum().to(count)
            metrics[f"rewards/{name}"] = (config.beta * scores_A.detach()[is_side_A].sum(), num_side)
            metrics[f"logps/{name}"] = (logprobs_A.detach()[is_side_A].sum(), num_side)
        return AnswerLosses(losses_A.sum(), count, metrics, output)

    @torch.no_grad()
    def _divergence(self, batch: AnswerBatch) -> Tensor:
        """KTO's estimate of KL(policy‖reference): the mean score of mismatched answers of all ranks, not below 0."""
        other = batch.mismatched
        assert other is not None, "the data module gives KTO's batches mismatched answers"
        reference_A = self._referred(other)
        scores_A = self._answers(self._built(), other).logprobs_A - reference_A
        total, count = self.over_ranks(
            torch.stack([scores_A.double().sum(), scores_A.new_tensor(len(scores_A)).double()])
        )
        return (total / count.clamp(min=1)).clamp(min=0)


def in_pairs(values_A: Tensor, batch: AnswerBatch) -> tuple[Tensor, Tensor]:
    """The values of a batch of pairs, [P] of the chosen sides and [P] of the others."""
    num_pairs = batch.num_answers // 2
    places_A = batch.group_A * 2 + (~batch.is_chosen_A).long()
    values_P2 = torch.zeros_like(values_A).index_copy(0, places_A, values_A).view(num_pairs, 2)
    return values_P2[:, 0], values_P2[:, 1]
