"""Rollouts as the trained model sees them: log-probabilities of the policy that the engine draws from, and values.

Shapes: A answers, M tokens of all of them, V ids of text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmllm.batch import AnswerBatch
from mmllm.inference.engine.engine import Engine
from mmllm.inference.engine.prepared import eval_mode, trained_modules
from mmllm.inference.engine.requests import EngineConfig, TextRequest, TextResult
from mmllm.inference.engine.sampling import TextRules
from mmllm.losses.answers import UnitLayout, target_logprobs
from mmllm.model.multimodal import MultimodalModel
from mmllm.training.posttraining.answer_module import zero_of_other_heads
from mmllm.training.posttraining.rollouts import Rollout
from mmllm.training.posttraining.value_head import ValueHead
from mmllm_tokenizers.folder import TokenizerFolder


class Scored(NamedTuple):
    """Tokens that were drawn, as a model sees them, in the order of their answers."""

    logprobs_M: Tensor
    answer_M: Tensor
    entropy_M: Tensor
    values_M: Tensor | None
    zero: Tensor
    """0, with a gradient of 0 for every parameter: part of any loss."""


@dataclass(frozen=True, eq=False)
class RolloutScorer:
    """Scores rollouts with the noise of training off, at the temperature of drawing, over ids that may be drawn.

    Attributes:
        model: that is trained.
        folder: its tokenizers.
        temperature: of drawing.
        value_head: of PPO.
        masks_forbidden: ids that the engine never draws have no probability.
    """

    model: MultimodalModel
    folder: TokenizerFolder
    temperature: float
    value_head: ValueHead | None = None
    masks_forbidden: bool = True

    def __call__(self, parts: Sequence[AnswerBatch], with_values: bool = False) -> Scored:
        """Differentiable, unless gradients are off."""
        return self._scored(parts, with_values, self.temperature, self._forbidden_V)

    def plain(self, parts: Sequence[AnswerBatch]) -> Tensor:
        """Log-probabilities [M] as the engine tells them of what it draws: at temperature 1."""
        return self._scored(parts, False, 1.0, self._forbidden_V).logprobs_M

    @property
    def _forbidden_V(self) -> Tensor | None:
        if not self.masks_forbidden:
            return None
        return torch.isinf(TextRules.of(self.folder, self.model.decoder.head_weight_VD.device).mask_V)

    def _scored(
        self, parts: Sequence[AnswerBatch], with_values: bool, temperature: float, forbidden_V: Tensor | None
    ) -> Scored:
        pieces, num_before = [], 0
        with eval_mode(trained_modules(self.model)):
            for part in parts:
                pieces.append(self._part(part, num_before, with_values, temperature, forbidden_V))
                num_before += part.num_answers
        logprobs, answers, entropies, values, zeros = zip(*pieces, strict=True)
        return Scored(
            torch.cat(logprobs),
            torch.cat(answers),
            torch.cat(entropies),
            torch.cat(values) if with_values else None,
            torch.stack(zeros).sum(),
        )

    def _part(
        self, part: AnswerBatch, num_before: int, with_values: bool, temperature: float, forbidden_V: Tensor | None
    ) -> Scored:
        output = self.model(part.packed)
        targets = target_logprobs(
            self.model,
            output,
            part,
            layout=UnitLayout.of(self.folder),
            forbidden_V=forbidden_V,
            temperature=temperature,
            with_entropy=True,
        )
        values_M = None
        if with_values:
            assert self.value_head is not None
            values_M = self.value_head(output.hidden_QD.index_select(0, output.metadata.targets_M))
        assert targets.entropy_M is not None
        zero = output.zero + zero_of_other_heads(self.model, output.zero)
        return Scored(targets.logprobs_M, targets.answer_M + num_before, targets.entropy_M, values_M, zero)

    @torch.no_grad()
    def check_bits(self, rollouts: Sequence[Rollout], parts: Sequence[AnswerBatch]) -> None:
        """The engine scores finished answers as prompts, one by one by the model's own layers, as the trainer does.

        Args:
            rollouts: of text.
            parts: each of them alone.

        Raises:
            RuntimeError: a bit differs.
        """
        engine = Engine(self.model, self.folder, EngineConfig(deterministic=True))
        requests = [TextRequest(one.document, max_new_tokens=1, prompt_logprobs=True) for one in rollouts]
        theirs: list[float | None] = []
        for request, result in zip(requests, engine.run(requests), strict=True):
            assert isinstance(result, TextResult) and result.prompt_logprobs is not None
            values = zip(result.prompt_logprobs, request.prompt.targets_T.tolist(), strict=True)
            theirs += [value for value, is_target in values if is_target]
        own_M = self._scored(parts, False, 1.0, None).logprobs_M
        if not torch.equal(own_M, torch.tensor(theirs, dtype=own_M.dtype, device=own_M.device)):
            raise RuntimeError(
                "rollout.deterministic is set, but the trainer's log-probabilities aren't the engine's, bit for bit: "
                "this device or backend adds in another order; leave deterministic out"
            )
