"""Steps of a plan of single captions as batches for CLIP.

Shapes: N rows, H and W pixels, L text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from mmllm.batch import CaptionBatch
from mmllm.data.loading.augment import NUM_DRAWS, AugmentConfig, augment
from mmllm.data.loading.decoded import DecodedSamples
from mmllm.data.plan.plan import StepPlan
from mmllm.data.plan.single import SinglePlan
from mmllm.data.samples.decode import ImageTransform
from mmllm.data.samples.sample import Sample
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.vocab import END, PAD

_DRAWS = 3
"""What random numbers are for; those of the plan have others."""


@dataclass(frozen=True)
class _Pair:
    pixels_3HW: np.ndarray
    ids: np.ndarray

    @property
    def num_bytes(self) -> int:
        return self.pixels_3HW.nbytes + self.ids.nbytes


class CaptionDataset(Dataset[CaptionBatch]):
    """Batches of pictures and token ids: `dataset[step_plan]`. A pair that fails is masked, named and counted.

    Args:
        plan: Where the captions are.
        folder: The text tokenizer.
        transform: Pictures to pixels.
        context_length: L; longer captions are cut.
        augment: How pictures are altered, drawn for the rows of all ranks, so that ranks change nothing.
        cache_bytes: Decoded pairs kept, at most this much memory a process.
    """

    def __init__(
        self,
        plan: SinglePlan,
        folder: TokenizerFolder,
        transform: ImageTransform,
        context_length: int,
        augment: AugmentConfig | None = None,
        cache_bytes: int = 0,
    ) -> None:
        self._seed, self._folder, self._transform = plan.recipe.seed, folder, transform
        self._context_length, self._augment = context_length, augment or AugmentConfig()
        self._end_id, self._pad_id = folder.id(END), folder.id(PAD)
        self._pairs = DecodedSamples(plan, self._pair, cache_bytes)

    def __getitem__(self, step: StepPlan) -> CaptionBatch:
        """The batch of a step. `state["errors"]` names its samples that failed, if any."""
        filled = [row for row, sequence in enumerate(step.sequences) if sequence]
        pairs, errors = self._pairs.get([step.sequences[row][0] for row in filled])
        count, size = len(step.sequences), self._transform.size
        images_N3HW = np.zeros((count, 3, size, size), dtype=np.uint8)
        ids_NL = np.full((count, self._context_length), self._pad_id, dtype=np.int64)
        ids_NL[:, 0] = self._end_id  # a text tower pools at it, also where nothing counts
        is_pair_N = np.zeros(count, dtype=bool)
        for row, pair in zip(filled, pairs, strict=True):
            if pair is not None:
                images_N3HW[row], is_pair_N[row] = pair.pixels_3HW, True
                ids_NL[row, : len(pair.ids)] = pair.ids
        images = torch.from_numpy(images_N3HW)
        if self._augment.is_on:
            rng = np.random.default_rng([self._seed, _DRAWS, step.step])
            draws_ND = rng.random((step.num_global_sequences, NUM_DRAWS), dtype=np.float32)
            numbers = range(count) if step.numbers is None else step.numbers
            images = augment(images, draws_ND[list(numbers)], self._augment)
        state = {**step.state, "errors": errors} if errors else step.state
        return CaptionBatch(images, torch.from_numpy(ids_NL), torch.from_numpy(is_pair_N), state)

    def _pair(self, sample: Sample) -> _Pair:
        if sample.image is None or not sample.text:
            raise ValueError(f"has no {'picture' if sample.image is None else 'text'}; index the shard again")
        ids = self._folder.text.encode(sample.text)[: self._context_length - 1]
        pixels_3HW = self._transform(sample.image, sample.key)
        return _Pair(pixels_3HW, np.array([*ids, self._end_id], dtype=np.int32))
