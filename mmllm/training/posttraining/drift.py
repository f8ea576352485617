"""How far a model has moved from its start, where it goes itself: the KL divergence of what it writes.

Answers to fixed prompts are drawn from the model as it is now; the mean over them of Σ log p_now − log p_start is an
estimate of KL(now‖start), in nats a sequence.

Shapes: M tokens of answers, A answers, V ids of text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mmllm.checkpoints.settings import Sampling
from mmllm.data.loading.answers import AnswerDocument, pack_answers
from mmllm.data.samples.document import Document, DocumentWriter
from mmllm.inference.api import Model
from mmllm.inference.engine.engine import Engine
from mmllm.inference.engine.prepared import eval_mode, trained_modules
from mmllm.inference.engine.requests import EngineConfig, TextRequest, TextResult
from mmllm.inference.engine.sampling import TextRules
from mmllm.inference.prompts import join
from mmllm.losses.answers import sum_by_answer, target_logprobs
from mmllm.training.posttraining.start_weights import StartWeights


@dataclass(frozen=True)
class Drift:
    """Of answers that the model draws as it is now."""

    kl: float
    """KL(now‖start), nats a sequence."""
    entropy: float
    """Of the model now, nats a token."""
    length: float
    """Tokens an answer, its end included."""


@torch.no_grad()
def drift(served: Model, start: StartWeights, prompts: Sequence[Document], max_new_tokens: int, seed: int) -> Drift:
    """Draws an answer to each prompt (temperature 1, all ids that text may have), and scores it by both models.

    Args:
        served: the model as it is now.
        start: what it started with.
        prompts: of tasks that are answered in text.
        max_new_tokens: of an answer at most.
        seed: of the draw; the same prompts and seed are drawn alike from the same model.
    """
    model, folder = served.model, served.tokenizer
    with eval_mode(trained_modules(model)):
        answers = _drawn(served, prompts, max_new_tokens, seed)
        device = model.decoder.head_weight_VD.device
        forbidden_V = torch.isinf(TextRules.of(folder, device).mask_V)
        length = sum(answer.num_tokens for answer in answers)
        batch = pack_answers([answers], length).to(device)

        def scored() -> tuple[Tensor, Tensor]:
            targets = target_logprobs(model, model(batch.packed), batch, forbidden_V=forbidden_V, with_entropy=True)
            assert targets.entropy_M is not None
            sums_A = sum_by_answer(targets.logprobs_M.double(), targets.answer_M, batch.num_answers)
            return sums_A, targets.entropy_M[targets.answer_M >= 0]

        now_A, entropy_M = scored()
        with start.in_place():
            start_A, _ = scored()
    return Drift(float((now_A - start_A).mean()), float(entropy_M.mean()), len(entropy_M) / len(answers))


def _drawn(served: Model, prompts: Sequence[Document], max_new_tokens: int, seed: int) -> list[AnswerDocument]:
    """An answer to each prompt, its end included where one was drawn."""
    sampling = Sampling(temperature=1.0, seed=seed)
    prompts = [replace(prompt, targets_T=np.zeros_like(prompt.targets_T)) for prompt in prompts]
    requests = [TextRequest(prompt, sampling, max_new_tokens, number=n) for n, prompt in enumerate(prompts)]
    engine = Engine(served.model, served.tokenizer, EngineConfig(max_rows=served.generation.batch_size))
    answers = []
    for number, (prompt, result) in enumerate(zip(prompts, engine.run(requests), strict=True)):
        assert isinstance(result, TextResult)
        writer = DocumentWriter(served.tokenizer)
        writer.ids((*result.ids, *(() if result.end_id is None else (result.end_id,))), is_target=True)
        answers.append(AnswerDocument(join([prompt, writer.finish()]), number))
    return answers
