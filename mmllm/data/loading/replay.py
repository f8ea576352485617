"""Sequences of the usual data, a few beside each step of another training: what was learnt before is heard again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmllm.batch import PackedBatch
from mmllm.data.loading.balance import shares
from mmllm.data.loading.loader import StepDataset
from mmllm.data.plan.plan import Plan, StepPlan, open_plan
from mmllm.data.plan.recipe import Recipe, load_recipe
from mmllm.data.samples.decode import ImageTransform
from mmllm_tokenizers.folder import TokenizerFolder


class Replay:
    """The steps of a recipe, as sequences that go along with another data module's batches.

    Args:
        recipe: the recipe, or its YAML's path.
        num_sequences: a step, of all ranks together.
        folder: of the training's tokenizer.
        transform: pictures to pixels.
        cache_bytes: documents kept once they are built, at most this much memory a process.

    Raises:
        ValueError: the recipe has another tokenizer.
    """

    def __init__(
        self,
        recipe: str | Path | Recipe,
        num_sequences: int,
        folder: TokenizerFolder,
        transform: ImageTransform,
        cache_bytes: int = 0,
    ) -> None:
        self.recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
        own = TokenizerFolder.load(self.recipe.tokenizer_folder())
        if own.hash != folder.hash:
            raise ValueError(
                f"replay_recipe has tokenizer {own.hash[:12]}, but the data's is {folder.hash[:12]}; replay the recipe "
                f"of this model"
            )
        self.plan: Plan = open_plan(self.recipe, num_sequences, folder)
        self._dataset = StepDataset(self.plan, folder, transform, cache_bytes)

    def steps(self, state: Mapping[str, Any] | None, rank: int, world_size: int) -> Iterator[StepPlan]:
        """This rank's sequences of each step, from a state on.

        Raises:
            ValueError: the ranks can't share the sequences equally.
        """
        if self.plan.batch_size % world_size:
            raise ValueError(
                f"replay_sequences is {self.plan.batch_size}, which {world_size} ranks can't share equally; choose a "
                f"multiple of {world_size}"
            )
        for step in self.plan.steps(state):
            costs = [float(sum(item.num_tokens for item in sequence)) for sequence in step.sequences]
            numbers = tuple(shares(costs, world_size)[rank])
            mine = tuple(step.sequences[number] for number in numbers)
            yield StepPlan(step.step, mine, step.state, step.num_global_sequences, numbers)

    def batch(self, step: StepPlan) -> PackedBatch:
        """The sequences of a step."""
        return self._dataset[step]
