"""Learning from rewards: GRPO, RLOO and PPO on answers that the model itself draws.

`class_path: mmllm.training.posttraining.rollout_module.RolloutModule`, with
`mmllm.data.loading.prompts.PromptDataModule`.

Shapes: A answers of this rank, M tokens of all of them, G prompts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from mmllm.batch import AnswerBatch
from mmllm.checkpoints.adapter_config import AdapterConfig
from mmllm.data.loading.prompts import PromptBatch
from mmllm.evaluation.rewards import load_rewards
from mmllm.inference.api import Model
from mmllm.inference.engine.requests import EngineConfig
from mmllm.losses.answers import sum_by_answer
from mmllm.losses.policy import (
    AdaptiveKL,
    PolicyLoss,
    advantage_estimates,
    group_advantages,
    grpo_loss,
    leave_one_out_advantages,
    normalized,
    ppo_loss,
    rloo_loss,
    token_rewards,
    value_loss,
    whiten,
)
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.image_projectors import ImageProjectorConfig
from mmllm.model.multimodal import AudioConfig, LossConfig
from mmllm.model.vision import VisionConfig
from mmllm.training.decoder_module import DecoderModule
from mmllm.training.optimizers import OptimizerConfig
from mmllm.training.parts import PARTS
from mmllm.training.posttraining.keeping import KeepConfig
from mmllm.training.posttraining.rollout_log import RolloutStats, step_means, step_sums, write_rollouts
from mmllm.training.posttraining.rollout_scoring import RolloutScorer, Scored
from mmllm.training.posttraining.rollouts import Rewarded, Rollout, RolloutConfig, Rollouts, packed_rollouts
from mmllm.training.posttraining.value_head import PPOConfig, ValueHead

log = logging.getLogger(__name__)

VALUE_HEAD = "value_head"
KL_KEY = "mmllm_kl_coef"
"""Of a checkpoint: what KL costs, where that adapts."""
_MOST_ROWS = 256
"""Answers that the engine draws at once."""
_LARGE_GAP = 0.05
"""Nats between the trainer's and the engine's log-probability of a token, of which the log warns."""


@dataclass
class _Experience:
    """What a step drew, as it is learnt from."""

    step: int
    parts: list[AnswerBatch]
    counts_M: Tensor
    """bool: the token's answer is part of the loss."""
    advantages: Tensor
    """[A], of PPO [M]."""
    old_M: Tensor
    """Log-probabilities by the policy that drew."""
    reference_M: Tensor | None
    scored: Scored | None
    """By the policy that drew, differentiable: for the first step that learns from it."""
    values_M: Tensor | None = None
    returns_M: Tensor | None = None


class RolloutModule(DecoderModule):
    """A `DecoderModule` that learns from what its own answers are worth.

    At each step the engine draws answers to the step's prompts with the very weights that are trained, rewards are
    computed, and the loss is that of GRPO, RLOO or PPO (`mmllm.losses.policy`). Log-probabilities are those of the
    policy that the engine draws from: without dropout, words and frames that are hidden, and other noise, at the
    temperature of drawing, over ids that may be drawn. Sums and counts are those of all ranks: two ranks learn what one
    process with all their prompts does.
    """

    parts = (*PARTS, VALUE_HEAD)

    def __init__(
        self,
        init_from: str,
        rewards: list[dict[str, Any]],
        rollout: RolloutConfig | None = None,
        ppo: PPOConfig | None = None,
        replay_weight: float = 1.0,
        adapter: AdapterConfig | None = None,
        adapter_name: str = "default",
        keep: KeepConfig | None = None,
        wise_ft: float | None = None,
        loss: LossConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        max_seconds: float | None = None,
        out: str | None = None,
        name: str = "mmllm model",
        decoder: DecoderConfig | None = None,
        vision: VisionConfig | None = None,
        image_projector: ImageProjectorConfig | None = None,
        audio: AudioConfig | None = None,
        tokenizer: str | None = None,
    ) -> None:
        """Keeps the settings; `configure_model` builds.

        Args:
            init_from: model folder whose weights the training starts with, and from which KL is measured.
            rewards: of each its `name`, its `weight` (1 unless given) and its settings: see `mmllm.evaluation.rewards`.
            rollout: how answers are drawn and learnt from.
            ppo: what of PPO the other algorithms don't have.
            replay_weight: of the usual loss of the data module's `replay`.
            adapter: as of `DecoderModule`; so are the others.
            adapter_name: what it is called in `out`.
            keep: penalties that keep the training near the start; its `kl` is of the replay's targets.
            wise_ft: what is exported lies between the start and what was trained.
            loss: weights of the replay's losses; None: those of the model in `init_from`.
            optimizer: rates and decay; `parts` may have `value_head`.
            max_seconds: training ends after this long; None: `trainer.max_steps` alone ends it.
            out: model folder to write when training ends.
            name: title of the model card.
            decoder: sizes of the model in `init_from`, for `--print_estimate` before it is there; so are the others.
            vision: likewise.
            image_projector: likewise.
            audio: likewise.
            tokenizer: likewise.

        Raises:
            ValueError: a reward is unknown, or settings contradict each other.
        """
        super().__init__(
            decoder=decoder, vision=vision, image_projector=image_projector, audio=audio, tokenizer=tokenizer,
            loss=loss, init_from=init_from, adapter=adapter, adapter_name=adapter_name, keep=keep, wise_ft=wise_ft,
            optimizer=optimizer, max_seconds=max_seconds, out=out, name=name,
        )  # fmt: skip
        self.rollout = rollout or RolloutConfig()
        self.ppo = ppo or PPOConfig()
        if ppo is not None and self.rollout.algorithm != "ppo":
            raise ValueError(
                f"ppo is given, and rollout.algorithm is {self.rollout.algorithm!r}; leave one of them out"
            )
        if self.ppo.kl_target is not None and not self.rollout.kl_coef:
            raise ValueError(
                f"ppo.kl_target is {self.ppo.kl_target}, and rollout.beta is 0, which no factor raises; give beta a "
                f"positive number to begin with"
            )
        if replay_weight < 0:
            raise ValueError(f"replay_weight is {replay_weight}; it must be 0 or more")
        self.rewards = load_rewards(rewards, self._served_model, lambda: self.device)
        self.replay_weight = replay_weight
        needs_kl = self.rollout.kl_coef > 0 or self.rollout.track_kl
        self.keeps_start, self.asks_start = self.keeps_start or needs_kl, self.asks_start or needs_kl
        self.value_head: ValueHead | None = None
        self.kl = AdaptiveKL(self.rollout.kl_coef, self.ppo.kl_target, self.ppo.kl_horizon)
        self.served: Model | None = None
        self.rollouts: Rollouts | None = None
        self._scorer: RolloutScorer  # on_fit_start makes it
        self._experience: _Experience | None = None
        self._stats = RolloutStats()
        self._has_warned = False

    # --- building ---------------------------------------------------------------------------------------------

    def tower_of(self, name: str) -> str:
        """The value head has a rate of its own, `lr` unless `optimizer.parts` says another."""
        return VALUE_HEAD if name.startswith(f"{VALUE_HEAD}.") else super().tower_of(name)

    def configure_model(self) -> None:
        """Builds the model, and for PPO the value head.

        Raises:
            ValueError: the strategy splits the model over processes, of which each draws with the whole.
        """
        if self.model is not None:
            return
        strategy = None if self._trainer is None else self.trainer.strategy
        if strategy is not None and not isinstance(strategy, DDPStrategy | SingleDeviceStrategy):
            raise ValueError(
                f"trainer.strategy is {type(strategy).__name__}, which splits the model over processes; rollouts are "
                f"drawn by each process with the whole model: use ddp, or one device"
            )
        super().configure_model()
        if self.rollout.algorithm == "ppo":
            self.value_head = ValueHead(self._built().config.decoder.hidden_size)

    def on_fit_start(self) -> None:
        """Makes the engine that draws.

        Raises:
            ValueError: the data gives no prompts, or settings contradict each other.
        """
        data, task = self._data, getattr(self._data, "task", None)
        if task is None:
            raise ValueError(
                f"RolloutModule learns from prompts, and data is {type(data).__name__}; use "
                f"mmllm.data.loading.prompts.PromptDataModule"
            )
        if self.rollout.iterations > 1 and self.trainer.accumulate_grad_batches > 1:
            raise ValueError(
                f"rollout.num_iterations is {self.rollout.iterations} and trainer.accumulate_grad_batches "
                f"{self.trainer.accumulate_grad_batches}; leave one of them at 1"
            )
        if self.keep.kl and data.replay is None:
            raise ValueError(
                "keep.kl is of the targets of data.init_args.replay_recipe, which isn't given; give it, or set "
                "rollout.beta"
            )
        data.take_iterations(self.rollout.iterations)
        super().on_fit_start()
        if data.replay is None:
            self.expert_bias = None  # what balances experts counts the usual data alone
        self._make_engine(task)

    def _make_engine(self, task: str) -> None:
        model, folder, source = self._built(), self.folder, self._source
        if folder is None or source is None or not source.is_model_folder:
            raise ValueError(f"init_from is {self.init_from}, which is no model folder; rollouts need its tokenizer")
        config = EngineConfig(max_rows=_MOST_ROWS, deterministic=self.rollout.deterministic)
        self.served = Model(model, folder, source.image_transform, source.generation, config)
        self.rollouts = Rollouts(self.served, self.rollout, self.rewards, task)
        self._scorer = RolloutScorer(model, folder, self.rollout.temperature, self.value_head)

    def _served_model(self) -> Model:
        assert self.served is not None, "on_fit_start makes it"
        return self.served

    # --- steps ------------------------------------------------------------------------------------------------

    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Draws answers, unless those of the step before are used again, and gives the loss of learning from them."""
        experience = self._experience
        if batch.iteration == 0 or experience is None or experience.step != batch.step:
            if batch.iteration:
                log.warning("rollouts of step %d were lost with the process that drew them: drawn anew", batch.step)
            experience = self._experience = self._gather(batch)
        begun = time.perf_counter()
        scored, experience.scored = experience.scored, None
        if scored is None:
            scored = self._scorer(experience.parts, with_values=self.value_head is not None)
        policy = self._policy_loss(experience, scored)
        count, num_clipped, num_actions = self._sum_over_ranks(
            torch.stack([policy.count, policy.is_clipped.sum().to(policy.count), _size(policy.is_clipped)])
        ).unbind()
        count = count.clamp(min=1)
        loss = policy.total / count + scored.zero
        sums: dict[str, Tensor | float] = {"clip_fraction": num_clipped / num_actions.clamp(min=1)}
        if self.value_head is not None:
            values = self._value_loss(experience, scored)
            mean = values.total / self._sum_over_ranks(values.count).clamp(min=1)
            loss = loss + self.ppo.vf_coef * mean
            sums["loss/value"] = self._sum_over_ranks(mean.detach())
        sums["loss"] = self._sum_over_ranks(loss.detach())
        if batch.replay is not None and self.replay_weight:
            replayed, _, totals = self.loss_of(batch.replay)
            if self.expert_bias is not None:
                self.expert_bias.add(totals.routing.counts_LE)
            loss = loss + self.replay_weight * replayed
            sums["loss/replay"] = totals.task_loss
        self._accumulate(count)
        scale = self.num_batch_ranks * self.trainer.accumulate_grad_batches * count
        sums["seconds/learning"] = time.perf_counter() - begun
        self.window.add(sums)
        self.log("loss", sums["loss"], prog_bar=True, logger=False)
        return {"loss": loss * (scale / self._first_targets)}

    def _policy_loss(self, experience: _Experience, scored: Scored) -> PolicyLoss:
        """Of this rank's answers; those left out have no tokens here."""
        here = experience.counts_M
        logprobs_M, answer_M = scored.logprobs_M[here], scored.answer_M[here]
        old_M, epsilon, high = experience.old_M[here], self.rollout.epsilon, self.rollout.high
        match self.rollout.algorithm:
            case "grpo":
                reference_M = None if experience.reference_M is None else experience.reference_M[here]
                return grpo_loss(
                    logprobs_M, old_M, experience.advantages, answer_M, reference_M=reference_M,
                    beta=self.rollout.kl_coef, epsilon=epsilon, epsilon_high=high, loss_type=self.rollout.loss_type,
                    max_new_tokens=self.rollout.max_new_tokens,
                )  # fmt: skip
            case "rloo":
                return rloo_loss(logprobs_M, old_M, experience.advantages, answer_M, epsilon=epsilon, epsilon_high=high)
        return ppo_loss(logprobs_M, old_M, experience.advantages[here], epsilon=epsilon, epsilon_high=high)

    def _value_loss(self, experience: _Experience, scored: Scored) -> PolicyLoss:
        here = experience.counts_M
        assert scored.values_M is not None and experience.values_M is not None and experience.returns_M is not None
        old_M, returns_M = experience.values_M[here], experience.returns_M[here]
        return value_loss(scored.values_M[here], old_M, returns_M, self.ppo.cliprange_value)

    # --- what was drawn ---------------------------------------------------------------------------------------

    def _gather(self, batch: PromptBatch) -> _Experience:
        """Draws answers to this rank's prompts, and makes of their rewards what is learnt from."""
        assert self.rollouts is not None
        begun = time.perf_counter()
        rewarded = self.rollouts.draw(batch.rows, batch.numbers)
        rollouts = rewarded.rollouts
        parts = [part.to(self.device) for part in packed_rollouts(rollouts, alone=self.rollout.deterministic)]
        reference_M = self._reference(parts)  # before the graph is made of weights that this exchanges
        before = self._scorer(parts, with_values=self.value_head is not None)
        scored, before = before, _detached(before)
        self._compare_with_engine(batch.step, rollouts, parts, before)
        answer_M, num_answers = before.answer_M, len(rollouts)
        is_truncated_A = torch.tensor([one.is_truncated for one in rollouts], device=self.device)
        counts_A = ~is_truncated_A if self.rollout.mask_truncated_completions else torch.ones_like(is_truncated_A)
        experience = _Experience(
            step=batch.step,
            parts=parts,
            counts_M=counts_A[answer_M],
            advantages=torch.zeros(num_answers, device=self.device),
            old_M=before.logprobs_M,
            reference_M=reference_M,
            scored=scored,
        )
        rewards_A = torch.tensor(rewarded.totals, device=self.device)
        group_A = torch.tensor([one.group for one in rollouts], device=self.device)
        is_flat_G = self._set_advantages(experience, before, rewards_A, group_A)
        self._note(batch.step, rewarded, experience, before, is_flat_G)
        seconds = time.perf_counter() - begun - rewarded.draw_seconds - rewarded.reward_seconds
        self.window.note("seconds/scoring", seconds)
        return experience

    def _set_advantages(self, experience: _Experience, before: Scored, rewards_A: Tensor, group_A: Tensor) -> Tensor:
        """Fills in the advantages (of PPO values and returns too); which groups' rewards are all the same, [G]."""
        config, answer_M, reference_M = self.rollout, before.answer_M, experience.reference_M
        grouped_A, std_G = group_advantages(rewards_A, group_A, config.scale_rewards, self._sum_over_ranks)
        match config.algorithm:
            case "grpo":
                experience.advantages = grouped_A
            case "rloo":
                if config.kl_coef:
                    assert reference_M is not None
                    kl_A = sum_by_answer(before.logprobs_M - reference_M, answer_M, len(rewards_A))
                    rewards_A = rewards_A - config.kl_coef * kl_A
                experience.advantages = leave_one_out_advantages(rewards_A, group_A)
                if config.normalize_advantages:
                    experience.advantages = normalized(experience.advantages, self._sum_over_ranks)
            case "ppo":
                self._set_values(experience, before, rewards_A)
        return torch.isclose(std_G, torch.zeros_like(std_G))

    def _set_values(self, experience: _Experience, before: Scored, rewards_A: Tensor) -> None:
        assert before.values_M is not None
        reference_M = before.logprobs_M if experience.reference_M is None else experience.reference_M
        rewards_M = token_rewards(rewards_A, before.logprobs_M, reference_M, before.answer_M, self.kl.coef)
        if self.ppo.whiten_rewards:
            rewards_M = whiten(rewards_M, shift_mean=False, reduce=self._sum_over_ranks)
        advantages_M = advantage_estimates(rewards_M, before.values_M, before.answer_M, self.ppo.gamma, self.ppo.lam)
        experience.values_M, experience.returns_M = before.values_M, advantages_M + before.values_M
        if self.ppo.whiten_advantages:
            advantages_M = whiten(advantages_M, reduce=self._sum_over_ranks)
        experience.advantages = advantages_M

    # --- log-probabilities ------------------------------------------------------------------------------------

    @torch.no_grad()
    def _reference(self, parts: Sequence[AnswerBatch]) -> Tensor | None:
        """Log-probabilities by the model that training started from; None: nobody asks for them."""
        if self.start is None or not (self.rollout.kl_coef or self.rollout.track_kl):
            return None
        with self.start.in_place():
            return self._scorer(parts).logprobs_M

    @torch.no_grad()
    def _compare_with_engine(
        self, step: int, rollouts: Sequence[Rollout], parts: Sequence[AnswerBatch], before: Scored
    ) -> None:
        """Notes how far the trainer's log-probabilities are from those of the engine that drew."""
        if self.rollout.deterministic:
            self._scorer.check_bits(rollouts, parts)
        is_same = self.rollout.temperature == 1
        if not is_same and not self._is_logged(step):
            return
        own_M = before.logprobs_M if is_same else self._scorer.plain(parts)
        theirs_M = torch.tensor([value for one in rollouts for value in one.logprobs], device=own_M.device)
        gap = float((own_M - theirs_M).abs().max())
        self.window.note("engine_gap", gap)
        if gap > _LARGE_GAP and not self._has_warned:
            self._has_warned = True
            log.warning(
                "the trainer's log-probability of a token is %.3f nats from the engine's, which drew it; compute both "
                "in float32 (trainer.precision 32-true)",
                gap,
            )

    # --- what is told -----------------------------------------------------------------------------------------

    def rollout_stats(self) -> dict[str, float]:
        """Means since it was last asked: of `reward`, `kl` (nats a sequence), `entropy` (nats a token), `length`."""
        return self._stats.take()

    def _note(self, step: int, rewarded: Rewarded, experience: _Experience, before: Scored, is_flat_G: Tensor) -> None:
        """Logs what a step drew, and adapts what KL costs."""
        sums = step_sums(rewarded, before, experience.reference_M, is_flat_G, self._sum_over_ranks)
        self._stats.add(sums)
        for name, mean in step_means(sums).items():
            self.window.note(name, mean)
        if "kl" in sums:
            total, num_answers = sums["kl"]
            self.kl.update(total / num_answers, int(num_answers))
        if self.rollout.algorithm == "ppo":
            self.window.note("kl_coef", self.kl.coef)
        self.log("reward", sums["reward"][0] / sums["reward"][1], prog_bar=True, logger=False)
        if self._is_logged(step):
            folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)  # rank 0's, for which all must ask
            if self.trainer.is_global_zero:
                write_rollouts(folder, step, rewarded, self.rollout.num_logged)

    def _is_logged(self, step: int) -> bool:
        return self.rollout.log_every > 0 and step % self.rollout.log_every == 0

    def window_metrics(self) -> dict[str, float]:
        """Means of the window."""
        return self.window.means()

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if dist.is_available() and dist.is_initialized():
            values = values.detach().clone()
            dist.all_reduce(values)
        return values

    # --- state ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what KL costs now."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[KL_KEY] = self.kl.coef

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The inverse of `on_save_checkpoint`."""
        super().on_load_checkpoint(checkpoint)
        self.kl.coef = float(checkpoint.get(KL_KEY, self.kl.coef))


def _detached(scored: Scored) -> Scored:
    return Scored(*(None if each is None else each.detach() for each in scored))  # pyright: ignore


def _size(values: Tensor) -> Tensor:
    return torch.tensor(float(values.numel()), device=values.device)
