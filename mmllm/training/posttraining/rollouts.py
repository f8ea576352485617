"""Rollouts: answers that the model which is trained draws itself, with their rewards, and as documents to train on.

The engine runs on the very weights that are trained, in the same process. What is drawn of a prompt depends on the
weights, the seed and the prompt's number alone.

Shapes: K codebooks, F frames, P positions of frames under the codebook pattern, T tokens or samples, A answers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mmllm.batch import AnswerBatch
from mmllm.checkpoints.settings import Sampling
from mmllm.data.loading.answers import AnswerDocument, pack_answers
from mmllm.data.rows.rows import Row
from mmllm.data.samples.document import Document, DocumentWriter
from mmllm.data.samples.documents import build_prompt
from mmllm.data.samples.pointers import Pointer, spoken_pointer
from mmllm.evaluation.preferences.prompts import document_of, reply_of
from mmllm.evaluation.rewards import Answer, Rewards
from mmllm.inference.api import Model
from mmllm.inference.engine.requests import Request, Result, SpeechRequest, SpokenUnits, TextRequest, TextResult
from mmllm.inference.pacing import Pace
from mmllm.inference.prompts import join
from mmllm.losses.policy import LossType, ScaleRewards

Algorithm = Literal["grpo", "rloo", "ppo"]
_GROUP_SIZE: dict[str, int] = {"grpo": 8, "rloo": 2, "ppo": 1}
_BETA: dict[str, float] = {"grpo": 0.0, "rloo": 0.05, "ppo": 0.05}
_ITERATIONS: dict[str, int] = {"grpo": 1, "rloo": 1, "ppo": 4}
_OF_ONE = (
    ("scale_rewards", "grpo", "group"),
    ("loss_type", "grpo", "dapo"),
    ("normalize_advantages", "rloo", False),
)
"""Settings of one algorithm, and their defaults."""
_PACE = Pace()


@dataclass(frozen=True)
class RolloutConfig:
    """How a model learns from rewards; names and defaults are TRL's where TRL has them.

    Attributes:
        algorithm: "grpo" (arXiv 2402.03300), "rloo" (2402.14740) or "ppo" (1707.06347).
        group_size: answers that are drawn to each prompt (TRL's `num_generations`); None: 8, for RLOO 2, for PPO 1.
        temperature: of drawing, and of the policy that is trained.
        top_p: draw among the fewest of this probability together; 1: among all.
        top_k: draw among so many; 0: among all.
        max_new_tokens: of an answer in text (TRL's `max_completion_length`).
        max_seconds: of an answer in speech; None: as long as its text takes.
        seed: of drawing.
        epsilon: a ratio of policies below 1 − `epsilon` gains nothing more.
        epsilon_high: nor one above 1 + `epsilon_high`; None: `epsilon`.
        beta: what KL to the start costs: in GRPO's loss, in RLOO's rewards, in PPO's rewards of tokens (TRL's
            `kl_coef`). None: 0, for RLOO and PPO 0.05.
        num_iterations: optimizer steps on the same rollouts; None: 1, for PPO 4.
        scale_rewards: of GRPO; see `mmllm.losses.policy.group_advantages`.
        loss_type: of GRPO; see `mmllm.losses.policy.grpo_loss`.
        normalize_advantages: of RLOO: advantages of all answers get mean 0 and spread 1.
        mask_truncated_completions: answers that ran into their bound are left out of the loss.
        missing_eos_penalty: is taken off the reward of an answer that ran into its bound; None: nothing is.
        track_kl: measure the KL to the start also where it costs nothing.
        deterministic: the engine computes answers one by one, and so does the trainer; that both have the same
            log-probabilities, bit for bit, is checked at every step. For text; slow.
        log_every: rollouts of every so many steps are written to `rollouts.jsonl`; 0: none.
        num_logged: prompts whose rollouts are written then.
    """

    algorithm: Algorithm = "grpo"
    group_size: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    max_seconds: float | None = None
    seed: int = 0
    epsilon: float = 0.2
    epsilon_high: float | None = None
    beta: float | None = None
    num_iterations: int | None = None
    scale_rewards: ScaleRewards = "group"
    loss_type: LossType = "dapo"
    normalize_advantages: bool = False
    mask_truncated_completions: bool = False
    missing_eos_penalty: float | None = None
    track_kl: bool = True
    deterministic: bool = False
    log_every: int = 20
    num_logged: int = 2

    def __post_init__(self) -> None:
        if self.algorithm not in _GROUP_SIZE:
            raise ValueError(f"rollout.algorithm is {self.algorithm!r}; choose {', '.join(_GROUP_SIZE)}")
        least = 1 if self.algorithm == "ppo" else 2
        if self.num_answers < least:
            raise ValueError(
                f"rollout.group_size is {self.group_size}; {self.algorithm} needs at least {least} answers a prompt"
            )
        if not self.temperature > 0:
            raise ValueError(f"rollout.temperature is {self.temperature}; what is drawn must be left to chance: give 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"rollout.top_p is {self.top_p}; it must be above 0, and at most 1")
        for name, low in (("max_new_tokens", 1), ("iterations", 1), ("top_k", 0), ("log_every", 0), ("num_logged", 0)):
            if getattr(self, name) < low:
                raise ValueError(
                    f"rollout.{'num_iterations' if name == 'iterations' else name} is {getattr(self, name)}; it must "
                    f"be at least {low}"
                )
        if not 0 < self.epsilon < 1 or self.high <= 0 or self.kl_coef < 0:
            raise ValueError(
                f"rollout.epsilon is {self.epsilon}, epsilon_high {self.epsilon_high} and beta {self.beta}; epsilon is "
                f"between 0 and 1, epsilon_high above 0, beta 0 or more"
            )
        for name in ("max_seconds", "missing_eos_penalty"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"rollout.{name} is {value}; it must be positive, or left out")
        self._check_algorithm()

    def _check_algorithm(self) -> None:
        """Refuses what the algorithm would not look at."""
        for name, choices in (("scale_rewards", get_args(ScaleRewards)), ("loss_type", get_args(LossType))):
            if getattr(self, name) not in choices:
                raise ValueError(f"rollout.{name} is {getattr(self, name)!r}; choose {', '.join(choices)}")
        for name, algorithm, default in _OF_ONE:
            if getattr(self, name) != default and self.algorithm != algorithm:
                raise ValueError(
                    f"rollout.{name} is {getattr(self, name)!r}, which is of {algorithm}, and rollout.algorithm is "
                    f"{self.algorithm!r}; leave it out"
                )

    @property
    def num_answers(self) -> int:
        """Drawn to each prompt."""
        return _GROUP_SIZE[self.algorithm] if self.group_size is None else self.group_size

    @property
    def kl_coef(self) -> float:
        """What KL costs."""
        return _BETA[self.algorithm] if self.beta is None else self.beta

    @property
    def iterations(self) -> int:
        """Optimizer steps on the same rollouts."""
        return _ITERATIONS[self.algorithm] if self.num_iterations is None else self.num_iterations

    @property
    def high(self) -> float:
        """How far above 1 a ratio may go."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def sampling(self) -> Sampling:
        """How the engine draws."""
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k or None,
            top_p=None if self.top_p == 1 else self.top_p,
            seed=self.seed,
        )


@dataclass(frozen=True, eq=False)
class Spoken:
    """An answer in speech; see `mmllm.evaluation.rewards.SpokenAnswer`."""

    text: str
    codes_KF: Tensor
    wave_T: Tensor
    sample_rate: int


@dataclass(frozen=True, eq=False)
class Rollout:
    """An answer that was drawn.

    Attributes:
        document: the prompt and the answer, whose tokens alone are targets.
        answer: as rewards take it.
        row: of the prompt, with its keys as rewards see them.
        group: the place of its prompt among those of the step.
        is_truncated: it ran into its bound.
        logprobs: of its targets by the engine, in nats, at temperature 1.
    """

    document: Document
    answer: Answer
    row: dict[str, Any]
    group: int
    is_truncated: bool
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Rewarded:
    """What a step drew.

    Attributes:
        rollouts: group by group.
        totals: their rewards.
        by_name: by the name of each reward, without its weight.
        draw_seconds: that drawing took.
        reward_seconds: that rewarding took.
    """

    rollouts: list[Rollout]
    totals: list[float]
    by_name: dict[str, list[float]]
    draw_seconds: float
    reward_seconds: float


class Rollouts:
    """Draws answers with a model as it is now.

    Args:
        served: the model; its engine runs when nothing else of it does.
        config: how.
        rewards: what answers are worth.
        task: what prompts are: see `mmllm.data.loading.prompts.PromptTask`.

    Raises:
        ValueError: speech is asked of a model without a pointer, or bit for bit.
    """

    def __init__(self, served: Model, config: RolloutConfig, rewards: Rewards, task: str) -> None:
        self.served = served
        self.config = config
        self.rewards = rewards
        self.task = task
        if task != "speak":
            return
        served.prompter.need_speech()
        if served.model.pointer is None:
            raise ValueError(
                "rollouts of speech need a model with a pointer into what it says (audio.pointer), which says where a "
                "speech ends; train one with it, or take a task of text"
            )
        if config.deterministic:
            raise ValueError(
                "rollout.deterministic compares log-probabilities of text with the engine's, and data.init_args.task "
                "is speak; leave deterministic out"
            )

    def draw(self, rows: Sequence[Row], numbers: Sequence[int]) -> Rewarded:
        """A group of answers to each row, with their rewards.

        Args:
            rows: prompts.
            numbers: of each how many prompts came before it, in the whole training.

        Raises:
            ValueError: a row can't be asked, or a reward fails; each is named.
        """
        begun = time.perf_counter()
        with self._without_autocast():
            prompts = [self._prompt(row) for row in rows]
        count = self.config.num_answers
        requests = [
            self._request(prompt, number * count + place)
            for prompt, number in zip(prompts, numbers, strict=True)
            for place in range(count)
        ]
        results = self.served.engine.run(requests)
        with self._without_autocast():
            rollouts = [
                self._rollout(result, prompts[place // count], rows[place // count], place // count)
                for place, result in enumerate(results)
            ]
            drawn = time.perf_counter()
            scores = self.rewards.score([one.answer for one in rollouts], [one.row for one in rollouts])
        totals = scores.totals
        if self.config.missing_eos_penalty is not None:
            penalty = self.config.missing_eos_penalty
            totals = [t - penalty * one.is_truncated for t, one in zip(totals, rollouts, strict=True)]
        return Rewarded(rollouts, totals, scores.by_name, drawn - begun, time.perf_counter() - drawn)

    def _without_autocast(self) -> torch.autocast:
        """Codecs, judges and functions of users know nothing of the autocast of training steps."""
        return torch.autocast(self.served.model.decoder.norm.weight.device.type, enabled=False)

    def _prompt(self, row: Row) -> Document:
        try:
            if self.task == "speak":
                voice = row.metadata.get("speaker")
                return build_prompt(
                    "speak", self.served.tokenizer, text=row.text, voice=None if voice is None else str(voice)
                )
            prompt = document_of(row, self.task, self.served)
        except (OSError, ValueError) as error:
            raise ValueError(f"{row.where} ({row.id}): {error}") from error
        return replace(prompt, targets_T=np.zeros_like(prompt.targets_T))  # its earlier answers are not ours

    def _request(self, prompt: Document, number: int) -> Request:
        config = self.config
        if self.task != "speak":
            return TextRequest(prompt, config.sampling, config.max_new_tokens, number=number, num_logprobs=0)
        max_frames = None
        if config.max_seconds is not None:
            max_frames = max(1, round(config.max_seconds * self.served.tokenizer.frame_rate))
        return SpeechRequest(prompt, (config.sampling,), max_frames, number=number, logprobs=True)

    def _rollout(self, result: Result, prompt: Document, row: Row, group: int) -> Rollout:
        tokenizer = self.served.tokenizer
        if isinstance(result, TextResult):
            assert result.logprobs is not None
            writer = DocumentWriter(tokenizer)
            ends = () if result.end_id is None else (result.end_id,)
            writer.ids((*result.ids, *ends), is_target=True)
            document = join([prompt, writer.finish()])
            answer: Answer = result.text
            is_truncated, logprobs = result.finish_reason == "length", result.logprobs
        else:
            assert isinstance(result, SpokenUnits) and result.logprobs is not None
            document = spoken_document(prompt, result, self.served)
            wave = self.served.speaker.waveform(result, row.text, _PACE, None)
            answer = Spoken(row.text, result.codes_KF, torch.from_numpy(wave.samples), wave.sample_rate)
            is_truncated, logprobs = not result.is_whole, result.logprobs
        keys = reward_row(row, self.task, document, tokenizer.hash)
        return Rollout(document, answer, keys, group, is_truncated, tuple(logprobs))


def spoken_document(prompt: Document, said: SpokenUnits, served: Model) -> Document:
    """A prompt to speak with what was said behind it, as training has it up to the last unit.

    Args:
        prompt: to speak.
        said: with a pointer.
        served: whose tokenizer folder wrote them.
    """
    assert said.pointer_F is not None and prompt.pointer is not None, "speech without a pointer is refused"
    writer = DocumentWriter(served.tokenizer)
    writer.units(said.codes_KF.numpy(), is_target=True)
    units = writer.finish()
    pointer = spoken_pointer(prompt.pointer.letters_L, said.pointer_F.numpy(), units.num_tokens)
    whole = join([replace(prompt, pointer=None), units])
    before = Pointer.none(prompt.num_tokens - 1)
    return replace(whole, pointer=Pointer.join([before, pointer, Pointer.none(1)]))


def reward_row(row: Row, task: str, document: Document, tokenizer: str) -> dict[str, Any]:
    """A row's keys as rewards see them; for a reward model the whole `document`, and which `tokenizer` wrote it.

    They are those that `mmllm prefer label` gives rewards: what is unknown has no key, so that nothing is compared
    with it by accident.
    """
    keys: dict[str, Any] = {"id": row.id, "where": row.where, **row.metadata}
    if row.text:
        keys["text"] = row.text
    reply = reply_of(row) if task == "chat" else None
    if reply is not None:
        keys.setdefault("answer", reply)
    return {**keys, "task": task, "document": document, "tokenizer": tokenizer}


def packed_rollouts(rollouts: Sequence[Rollout], alone: bool = False) -> list[AnswerBatch]:
    """Rollouts as batches, documents apart: all in one, or (`alone`) each in its own."""
    answers = [AnswerDocument(one.document, one.group) for one in rollouts]
    parts = [[answer] for answer in answers] if alone else [answers]
    return [pack_answers([part], sum(answer.num_tokens for answer in part)) for part in parts]
