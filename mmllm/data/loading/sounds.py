"""Steps of a plan of single sounds as batches for the codec.

Shapes: N rows, C channels, T samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch.utils.data import Dataset

from mmllm.batch import SoundBatch
from mmllm.data.loading.decoded import DecodedSamples
from mmllm.data.plan.plan import StepPlan
from mmllm.data.plan.single import SinglePlan
from mmllm.data.samples.sample import Sample
from mmllm_tokenizers.audio import load_audio, resample, to_mono

_CROPS = 10
"""What random numbers are for; those of the plan have others."""


@dataclass(frozen=True)
class _Sound:
    wave_T: np.ndarray
    """int16."""
    text: str

    @property
    def num_bytes(self) -> int:
        return self.wave_T.nbytes


class SoundDataset(Dataset[SoundBatch]):
    """Batches of waves: `dataset[step_plan]`. A row of which a clip fails is left out; the clip is named and counted.

    Args:
        plan: Where the sounds are, and which of them follow each other in a row.
        sample_rate: Sounds are resampled to it.
        num_samples: T.
        crops: T samples from anywhere in a row; else a clip from its start, zeros after it, and cut where it is longer.
        texts: Also what is said in each clip; "" of one that was cut.
        gain_db: Each row is made louder or softer by up to this much.
        cache_bytes: Decoded sounds kept, at most this much memory a process.
    """

    def __init__(
        self,
        plan: SinglePlan,
        sample_rate: int,
        num_samples: int,
        crops: bool = True,
        texts: bool = False,
        gain_db: float = 0.0,
        cache_bytes: int = 0,
    ) -> None:
        self._seed, self._rate, self._num_samples = plan.recipe.seed, sample_rate, num_samples
        self._crops, self._texts, self._gain_db = crops, texts, gain_db
        self._sounds = DecodedSamples(plan, self._sound, cache_bytes)

    def __getitem__(self, step: StepPlan) -> SoundBatch:
        """The batch of a step. `state["errors"]` names its clips that failed, if any."""
        found, errors = self._sounds.get([item for sequence in step.sequences for item in sequence])
        sounds = iter(found)
        numbers = range(len(step.sequences)) if step.numbers is None else step.numbers
        waves, texts = [np.zeros((0, self._num_samples), dtype=np.float32)], []
        for number, sequence in zip(numbers, step.sequences, strict=True):
            clips = [clip for clip in islice(sounds, len(sequence)) if clip is not None]
            if clips and len(clips) == len(sequence):
                wave_T, text = self._row(clips, np.random.default_rng([self._seed, _CROPS, step.step, number]))
                waves.append(wave_T[None])
                texts.append(text)
        waves_N1T = torch.from_numpy(np.concatenate(waves))[:, None]
        state = {**step.state, "errors": errors} if errors else step.state
        return SoundBatch(waves_N1T, texts if self._texts else None, len(found) - len(errors), state)

    def _row(self, clips: Sequence[_Sound], rng: np.random.Generator) -> tuple[np.ndarray, str]:
        wave_T, text = np.concatenate([clip.wave_T for clip in clips]).astype(np.float32) / 32767, clips[0].text
        if self._crops:
            if len(wave_T) < self._num_samples:  # a header promised more
                wave_T = np.resize(wave_T, self._num_samples)
            start = int(rng.integers(len(wave_T) - self._num_samples + 1))
            wave_T = wave_T[start : start + self._num_samples]
        elif len(wave_T) > self._num_samples:
            wave_T, text = wave_T[: self._num_samples], ""
        wave_T = np.pad(wave_T, (0, self._num_samples - len(wave_T)))
        gain = 10 ** (rng.uniform(-self._gain_db, self._gain_db) / 20)
        return (wave_T * gain).clip(-1, 1).astype(np.float32), text

    def _sound(self, sample: Sample) -> _Sound:
        if sample.audio is None:
            raise ValueError("has no sound; the codec needs audio shards with the sounds themselves")
        wave_CT, rate = load_audio(sample.audio, name=sample.key)
        wave_T = resample(to_mono(wave_CT), rate, self._rate).numpy()
        if not len(wave_T):
            raise ValueError("its sound has no samples")
        return _Sound((wave_T.clip(-1, 1) * 32767).round().astype(np.int16), sample.text or "")
