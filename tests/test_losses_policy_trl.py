"""GRPO and RLOO against TRL's own trainers on an exported text model: losses, and the gradients of all weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmllm.data.samples.document import DocumentWriter
from mmllm.inference.prompts import join
from mmllm.training.posttraining.rollout_module import RolloutModule, _Experience
from mmllm.training.posttraining.rollouts import Rollout, RolloutConfig, packed_rollouts
from tests.preference_fixtures import RATES, text_model
from tests.test_losses_preferences import gradients_as_exported, theirs, tokenizer

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")
torch.set_num_threads(1)
TOLERANCE = 1e-5
PROMPTS, ANSWERS = (3, 5, 3, 5), (4, 2, 6, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_model(tmp_path_factory.mktemp("trl") / "policy", 1)


def rollouts_of(module: RolloutModule) -> list[Rollout]:
    assert module.folder is not None
    rng = np.random.default_rng(0)
    made = []
    for number, lengths in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        parts = []
        for is_target, length in enumerate(lengths):
            writer = DocumentWriter(module.folder)
            writer.ids(rng.integers(30, 300, length).tolist(), bool(is_target))
            parts.append(writer.finish())
        made.append(Rollout(join(parts), "", {}, number // 2, False, (0.0,) * lengths[1]))
    return made


def padded(rollouts: list[Rollout]) -> dict[str, Tensor]:
    """As TRL has them: prompts padded on the left, completions on the right."""
    prompts = [torch.from_numpy(one.document.token_ids_T[~one.document.targets_T]) for one in rollouts]
    answers = [torch.from_numpy(one.document.token_ids_T[one.document.targets_T]) for one in rollouts]

    def pad(rows: list[Tensor], side: str) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)

    return {
        "prompt_ids": pad(prompts, "left"),
        "prompt_mask": pad([torch.ones_like(each) for each in prompts], "left"),
        "completion_ids": pad(answers, "right"),
        "completion_mask": pad([torch.ones_like(each) for each in answers], "right"),
    }


def by_answer(values_M: Tensor) -> Tensor:
    """[A, L], padded with zeros."""
    return torch.nn.utils.rnn.pad_sequence(list(values_M.split(ANSWERS)), batch_first=True)


def experience_of(module: RolloutModule) -> _Experience:
    """Old and reference log-probabilities that differ from the policy's, and any advantages."""
    parts = packed_rollouts(rollouts_of(module))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        now_M = module._scorer(parts).logprobs_M
    old_M, reference_M = (now_M + 0.3 * torch.randn(len(now_M), generator=generator) for _ in range(2))
    advantages_A = torch.tensor([1.0, -0.7, 0.4, -1.3])
    here_M = torch.ones(len(now_M), dtype=torch.bool)
    return _Experience(0, parts, here_M, advantages_A, old_M, reference_M, None)


def make(folder: Path, config: RolloutConfig) -> RolloutModule:
    module = RolloutModule(str(folder), [{"name": "words"}], config, optimizer=RATES)
    module.configure_model()
    module._make_engine("chat")
    module._scorer = dataclasses.replace(module._scorer, masks_forbidden=False)  # TRL draws any id
    return module


COMMON = {"report_to": [], "use_cpu": True, "bf16": False, "fp16": False, "gradient_checkpointing": False}


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (RolloutConfig(loss_type="dapo", beta=0.0), {"loss_type": "dapo"}),
        (RolloutConfig(loss_type="grpo", beta=0.2), {"loss_type": "grpo", "beta": 0.2}),
        (
            RolloutConfig(
                loss_type="dr_grpo", beta=0.1, epsilon=0.1, epsilon_high=0.3, temperature=0.7, max_new_tokens=9
            ),
            {"loss_type": "dr_grpo", "beta": 0.1, "epsilon": 0.1, "epsilon_high": 0.3, "temperature": 0.7,
             "max_completion_length": 9},
        ),
    ],
    ids=["dapo", "grpo", "dr_grpo"],
)  # fmt: skip
def test_grpo_is_that_of_trl(folder: Path, tmp_path: Path, config: RolloutConfig, settings: dict[str, Any]) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    module = make(folder, config)
    experience = experience_of(module)
    loss = module._policy_loss(experience, module._scorer(experience.parts))
    own = loss.total / loss.count
    own.backward()

    arguments = GRPOConfig(output_dir=str(tmp_path / "trl"), num_generations=2, per_device_train_batch_size=2,
                           **COMMON, **settings)  # fmt: skip
    trainer = GRPOTrainer(
        theirs(folder, tmp_path / "policy"), reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments, train_dataset=Dataset.from_list([{"prompt": "<end>"}] * 2), processing_class=tokenizer(),
    )  # fmt: skip
    assert trainer.model is not None
    trainer.model.eval()
    assert experience.reference_M is not None
    inputs = padded(rollouts_of(module)) | {
        "advantages": experience.advantages,
        "old_per_token_logps": by_answer(experience.old_M),
        "ref_per_token_logps": by_answer(experience.reference_M),
        "num_items_in_batch": torch.tensor(float(sum(ANSWERS))),
    }
    wanted = trainer._compute_loss(trainer.model, inputs)
    wanted.backward()
    assert float(own) == pytest.approx(float(wanted), abs=TOLERANCE)
    gradients_as_exported(module, trainer.model)


def test_rloo_is_that_of_trl(folder: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    module = make(folder, RolloutConfig("rloo", epsilon=0.3))
    experience = experience_of(module)
    loss = module._policy_loss(experience, module._scorer(experience.parts))
    own = loss.total / loss.count
    own.backward()

    arguments = RLOOConfig(output_dir=str(tmp_path / "trl"), num_generations=2, per_device_train_batch_size=2,
                           epsilon=0.3, beta=0.0, **COMMON)  # fmt: skip
    trainer = RLOOTrainer(
        theirs(folder, tmp_path / "policy"), reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments, train_dataset=Dataset.from_list([{"prompt": "<end>"}] * 2), processing_class=tokenizer(),
    )  # fmt: skip
    assert trainer.model is not None
    trainer.model.eval()
    old_A = by_answer(experience.old_M).sum(dim=1)
    inputs = padded(rollouts_of(module)) | {"advantages": experience.advantages, "old_logps": old_A}
    wanted = trainer._compute_loss(trainer.model, inputs)
    wanted.backward()
    assert float(own) == pytest.approx(float(wanted), abs=TOLERANCE)
    gradients_as_exported(module, trainer.model)
