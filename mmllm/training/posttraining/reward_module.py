"""Trains a reward model: `class_path: mmllm.training.posttraining.reward_module.RewardModule`.

A scalar head reads the decoder's hidden state at each answer's last token; of a pair the chosen side's reward is to be
the larger one, the more certainly the further they are apart (Bradley and Terry's model).

Shapes: A answers, P pairs, Q tokens, D width, N bins.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmllm.batch import AnswerBatch
from mmllm.checkpoints.files import REWARD_CONFIG, REWARD_HEAD, read_json
from mmllm.data.loading.preferences import PreferenceDataModule
from mmllm.inference.engine.prepared import eval_mode, trained_modules
from mmllm.inference.reward_model import WEIGHT, RewardModel, read_head, reward_settings
from mmllm.losses.calibration import calibration, margin_histogram
from mmllm.losses.preferences import reward_losses
from mmllm.model.multimodal import ModelOutput
from mmllm.model.roles import mark_all
from mmllm.training.posttraining.answer_module import AnswerLosses, AnswerModule
from mmllm.training.posttraining.preference_module import in_pairs
from mmllm_tokenizers.tensor_file import save_tensors

log = logging.getLogger(__name__)

HEAD_STD = 0.02
"""Of the head's first weights, as transformers' heads for classification have them."""


@dataclass(frozen=True)
class RewardConfig:
    """What a reward model learns.

    Attributes:
        margin: by which the sides of a pair should differ; "row": by as much as its row's `margin` says (0 without
            one), as `mmllm prefer export` writes it.
        centering: weight of (r⁺ + r⁻)², which holds rewards around 0; TRL recommends 0.01.
        replay_weight: of the usual loss of replayed sequences.
    """

    margin: float | Literal["row"] = 0.0
    centering: float = 0.0
    replay_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("margin", "centering", "replay_weight"):
            if name == "margin" and self.margin == "row":
                continue
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"reward.{name} is {getattr(self, name)}; give a number of 0 or more")


class RewardModule(AnswerModule):
    """A decoder with a scalar head. The head is trained at `optimizer.lr`, also beside an adapter.

    When training ends, the pairs of validation say how far margins can be believed: `val/ece` is logged, and the
    reliability curve goes into `reward_config.json`.
    """

    def __init__(self, reward: RewardConfig | None = None, **settings: Any) -> None:
        """Keeps the settings.

        Args:
            reward: what is learnt; None: the defaults.
            **settings: of `DecoderModule`.

        Raises:
            ValueError: there is no `init_from`.
        """
        super().__init__(**settings)
        self.reward = reward or RewardConfig()
        self.replay_weight = self.reward.replay_weight
        if self.init_from is None:
            raise ValueError("RewardModule needs init_from, a model that knows what answers mean")
        self.reward_head: nn.Linear | None = None
        self.calibration: dict[str, Any] | None = None
        """On the pairs of validation, when training has ended; None: there are none."""
        self._histogram_N3: Tensor | None = None

    def configure_model(self) -> None:
        """Builds the model and its head.

        Raises:
            ValueError: as of `DecoderModule`; or the strategy shards the model.
        """
        if self.model is not None:
            return
        super().configure_model()
        if self.mesh is not None:
            raise ValueError("RewardModule's head isn't sharded; set trainer.strategy to auto or ddp")
        weight_VD = self._built().decoder.embed_tokens.weight
        self.reward_head = nn.Linear(self.decoder.hidden_size, 1, bias=False).to(weight_VD.device)
        nn.init.normal_(self.reward_head.weight, std=HEAD_STD)
        assert self.init_from is not None
        self._take_head(Path(self.init_from))
        mark_all(self.reward_head, "head")

    def _take_head(self, folder: Path) -> None:
        """The head of a reward model that training starts with; one that was trained with an adapter fits no base."""
        if not (folder / REWARD_HEAD).is_file():
            return
        adapter = read_json(folder / REWARD_CONFIG).get("adapter")
        if adapter is not None:
            log.warning("the head of %s was trained with its adapter %s, and begins anew", folder, adapter)
            return
        assert self.reward_head is not None
        with torch.no_grad():
            self.reward_head.weight.copy_(read_head(folder, self.decoder.hidden_size))
        log.info("the head is that of %s", folder)

    def tower_of(self, name: str) -> str:
        """As `DecoderModule`'s; the head's rate is `optimizer.lr`."""
        return "decoder" if name.startswith("reward_head.") else super().tower_of(name)

    def on_fit_start(self) -> None:
        """Checks that the data has pairs."""
        super().on_fit_start()
        if not isinstance(self._data, PreferenceDataModule) or self._data.form != "pairs":
            what = getattr(self._data, "form", type(self._data).__name__)
            raise ValueError(f"RewardModule trains on PreferenceDataModule with form pairs, and the data is {what}")

    # --- losses -----------------------------------------------------------------------------------------------

    def rewards_of(self, batch: AnswerBatch) -> tuple[Tensor, ModelOutput]:
        """Rewards [A] of a batch's answers, without dropout or masks, as they are given afterwards."""
        model = self._built()
        assert self.reward_head is not None
        with eval_mode(trained_modules(model)):
            output = model(batch.packed)
        tokens_Q = output.metadata.sequences.tokens_Q
        places = torch.zeros(batch.packed.token_ids_BT.numel(), dtype=torch.int64, device=tokens_Q.device)
        places = places.index_copy(0, tokens_Q, torch.arange(len(tokens_Q), device=tokens_Q.device))
        hidden_AD = output.hidden_QD.index_select(0, places[batch.last_A])
        return self.reward_head(hidden_AD).squeeze(1).float(), output

    def answer_losses(self, batch: AnswerBatch) -> AnswerLosses:
        """Of pairs."""
        rewards_A, output = self.rewards_of(batch)
        chosen_P, rejected_P = in_pairs(rewards_A, batch)
        margin = in_pairs(batch.margin_A, batch)[0] if self.reward.margin == "row" else self.reward.margin
        losses_P = reward_losses(chosen_P, rejected_P, margin=margin, centering=self.reward.centering)
        margins_P = (chosen_P - rejected_P).detach()
        if not self.training:
            self._histogram_N3 = margin_histogram(margins_P) + (0 if self._histogram_N3 is None else self._histogram_N3)
        values = {
            "rewards/chosen": chosen_P.detach(),
            "rewards/rejected": rejected_P.detach(),
            "rewards/margins": margins_P,
            "rewards/accuracies": (margins_P > 0).to(margins_P),
        }
        count = losses_P.new_tensor(len(losses_P))
        metrics = {name: (value_P.sum(), count) for name, value_P in values.items()}
        return AnswerLosses(losses_P.sum(), count, metrics, output)

    def _untouched(self, like: Tensor) -> Tensor:
        """Also by way of the decoder's own head, which writes nothing here."""
        own = [p for p in self._built().decoder.lm_head.parameters() if p.requires_grad]
        return super()._untouched(like) + sum((p.sum() * 0.0 for p in own), start=torch.zeros_like(like))

    # --- calibration ------------------------------------------------------------------------------------------

    def _calibrated(self) -> dict[str, Any] | None:
        """Of what was validated since it was last asked, over all ranks; None: nothing was."""
        histogram_N3, self._histogram_N3 = self._histogram_N3, None
        if histogram_N3 is None:
            return None
        histogram_N3 = self.over_ranks(histogram_N3)
        return calibration(histogram_N3) if histogram_N3[:, 0].sum() > 0 else None

    def _log_means(self, split: str) -> None:
        """What training logs, and the calibration error."""
        super()._log_means(split)
        found = self._calibrated()
        if found is not None:
            self.log(f"{split}/ece", found["ece"])

    @torch.no_grad()
    def on_train_end(self) -> None:
        """Looks how far margins can be believed, and exports."""
        data = self._data
        if isinstance(data, PreferenceDataModule) and data.files("val") is not None:
            was_training, self._histogram_N3 = self.training, None
            self.eval()
            for batch in data.loader("val", seed=None):
                self.answer_losses(batch.to(self.device))
            self.train(was_training)
            self.calibration = self._calibrated()
            if self.calibration is not None:
                told = {name: self.calibration[name] for name in ("accuracy", "ece", "num_pairs")}
                log.info("held-out pairs: %s", told)
                for logger in self.trainer.loggers:
                    named = {f"val/final_{name}": float(value) for name, value in told.items()}
                    logger.log_metrics(named, self.trainer.global_step)
        super().on_train_end()

    # --- export -----------------------------------------------------------------------------------------------

    def _export_adapters(self, folder: Path) -> None:
        """Puts the head beside the weights too."""
        super()._export_adapters(folder)
        assert self.reward_head is not None
        save_tensors({WEIGHT: self.reward_head.weight.detach().float().cpu().contiguous()}, folder / REWARD_HEAD)
        adapter = None if self.adapter is None else self.adapter_name
        (folder / REWARD_CONFIG).write_text(reward_settings(adapter, self.calibration), encoding="utf-8")

    def reward_model(self) -> RewardModel:
        """The model as it is now, to score with."""
        assert self.reward_head is not None and self.folder is not None
        head_D = self.reward_head.weight.detach()[0]
        return RewardModel(self._built(), self.folder, head_D, self.image_transform)
