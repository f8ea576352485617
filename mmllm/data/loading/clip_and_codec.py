"""Batches of caption pairs for CLIP, and of sound for the codec, straight from shards: no tokens are planned.

Each batch is a pure function of (seed, step). Shapes: B rows, N samples, H and W pixels, L text tokens, T samples.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmllm.data.expressions import compile_filter
from mmllm.data.loading.augment import NUM_DRAWS, AugmentConfig, augment
from mmllm.data.samples.decode import ImageTransform
from mmllm.data.samples.schema import read_sample
from mmllm.data.shards.tar import read_members, scan_tar
from mmllm_tokenizers.audio import load_audio, resample, to_mono
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.vocab import END, PAD

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class _Place:
    path: Path
    key: str
    offset: int
    size: int
    text: str
    metadata: dict[str, Any]


def _scan(shards: Sequence[Path], expression: str | None) -> list[_Place]:
    """Where each sample of the shards is, with its text and metadata."""
    keeps = compile_filter(expression) if expression is not None else None
    places = []
    for path in shards:
        with path.open("rb") as stream:
            for span in scan_tar(path):
                texts = {}
                for member in span.members:
                    if member.ending in ("txt", "json"):
                        stream.seek(member.offset)
                        texts[member.ending] = stream.read(member.size)
                small = read_sample({"txt": b"", **texts}, span.key, f"{path}:{span.key}")
                if keeps is None or keeps(small.metadata):
                    place = _Place(path, span.key, span.offset, span.size, small.text or "", small.metadata)
                    places.append(place)
    if not places:
        raise ValueError(f"{shards[0]} …: no samples are left; check the shards and the filter {expression!r}")
    return places


def _read(place: _Place) -> dict[str, bytes]:
    with place.path.open("rb") as stream:
        span = os.pread(stream.fileno(), place.size, place.offset)
    return read_members(span, f"{place.path}:{place.key}")[1]


class CaptionPairs(Dataset[tuple[Tensor, Tensor]]):
    """Steps of (images uint8 [B, 3, H, W], token ids int64 [B, L] with `<|end|>` and padding).

    Args:
        shards: Caption shards.
        folder: The text tokenizer.
        transform: Pictures to pixels.
        batch_size: Rows a step, of all ranks.
        context_length: L.
        seed: Of order and crops.
        min_scale: Random crops keep at least this share of a picture's area; 1: no crops.
        flip: Mirror half of the pictures (not where captions say left and right).
        expression: Which rows, as a recipe's `filter`.
        cache_bytes: Memory for decoded pictures; where they don't all fit, each is decoded each time.
        rank: This rank takes rows `rank::world_size`.
        world_size: Number of ranks.
        shuffles: Validation keeps the shards' order and doesn't augment.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        folder: TokenizerFolder,
        transform: ImageTransform,
        batch_size: int,
        context_length: int,
        seed: int = 0,
        min_scale: float = 1.0,
        flip: bool = False,
        expression: str | None = None,
        cache_bytes: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffles: bool = True,
    ) -> None:
        self._places = _scan(shards, expression)
        self._transform, self._seed, self._shuffles = transform, seed, shuffles
        self._batch_size = min(batch_size, len(self._places) - len(self._places) % world_size)
        self._augment = AugmentConfig(min_scale, flip)
        self._mine, self._world_size = slice(rank, None, world_size), world_size
        if self._batch_size < world_size:
            raise ValueError(f"{len(self._places)} caption rows are too few for {world_size} ranks")
        ids = [folder.text.encode(place.text)[: context_length - 1] for place in self._places]
        self._ids_NL = torch.full((len(ids), context_length), folder.id(PAD))
        for row, values in enumerate(ids):
            self._ids_NL[row, : len(values) + 1] = torch.tensor([*values, folder.id(END)])
        captions = {text: number for number, text in enumerate(dict.fromkeys(place.text for place in self._places))}
        self._caption_N = np.array([captions[place.text] for place in self._places])
        shape = (len(ids), 3, transform.size, transform.size)
        fits = int(np.prod(shape)) <= cache_bytes
        self._pixels_N3HW = np.zeros(shape, dtype=np.uint8) if fits else None
        self._has_N = np.zeros(len(ids), dtype=bool)
        self._orders: dict[int, np.ndarray] = {}

    @property
    def num_steps(self) -> int:
        """Steps an epoch; what is left over is shuffled into the next.

        In validation it is a step of its own, or part of the last one where there is no row for every rank.
        """
        num_whole, num_left = divmod(len(self._places), self._batch_size)
        return num_whole + (not self._shuffles and num_left >= self._world_size)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """The rows of this rank at a global step."""
        epoch, place = divmod(step, self.num_steps)
        order_N = self._order(epoch)
        ends = not self._shuffles and place + 1 == self.num_steps
        rows = order_N[place * self._batch_size : None if ends else (place + 1) * self._batch_size]
        numbers = np.arange(len(rows))[self._mine]
        images = torch.from_numpy(np.stack([self._picture(int(row)) for row in rows[self._mine]]))
        return self._augmented(images, step, numbers), self._ids_NL[rows[self._mine]]

    def _order(self, epoch: int) -> np.ndarray:
        """Shuffled so that equal captions lie as far apart as their number allows."""
        if not self._shuffles:
            return np.arange(len(self._places))
        if epoch not in self._orders:
            rng = np.random.default_rng([self._seed, 2, epoch])
            shuffled = rng.permutation(len(self._places))
            captions = self._caption_N[shuffled]
            counts = np.bincount(self._caption_N)
            by_caption = np.argsort(captions, kind="stable")
            starts = np.repeat(np.cumsum(counts) - counts, counts)
            occurrence = np.empty(len(captions))
            occurrence[by_caption] = np.arange(len(captions)) - starts
            spread = (occurrence + rng.random(len(counts))[captions]) / counts[captions]
            self._orders = {epoch: shuffled[np.argsort(spread, kind="stable")]}
        return self._orders[epoch]

    def _picture(self, row: int) -> np.ndarray:
        if self._pixels_N3HW is not None and self._has_N[row]:
            return self._pixels_N3HW[row]
        place = self._places[row]
        sample = read_sample(_read(place), place.key, f"{place.path}:{place.key}")
        if sample.image is None:
            raise ValueError(f"{place.path}:{place.key}: has no picture; CLIP needs caption shards")
        pixels_3HW = self._transform(sample.image, f"{place.path}:{place.key}")
        if self._pixels_N3HW is not None:
            self._pixels_N3HW[row], self._has_N[row] = pixels_3HW, True
        return pixels_3HW

    def _augmented(self, images_B3HW: Tensor, step: int, numbers: np.ndarray) -> Tensor:
        """Crops and flips, drawn for the global batch, so that ranks change nothing."""
        if not self._shuffles:
            return images_B3HW
        draws = np.random.default_rng([self._seed, 3, step]).random((self._batch_size, NUM_DRAWS), dtype=np.float32)
        return augment(images_B3HW, draws[numbers], self._augment)


class SoundCrops(Dataset[Any]):
    """Steps of waves float32 [B, 1, T], or with `texts` of (whole clips [B, 1, T], their texts).

    Without `texts`, a clip shorter than T is followed by others until T is full. With them, each row is one clip
    from its start, zeros after it; one that is longer than T is cut, and its text is "".

    Args:
        shards: Audio shards.
        sample_rate: Sounds are resampled to it.
        num_samples: T.
        batch_size: Rows a step, of all ranks.
        seed: Of order and crops.
        texts: Whole clips with their texts.
        gain_db: Each row is made louder or softer by up to this much.
        expression: Which rows, as a recipe's `filter`.
        cache_bytes: Memory for decoded sounds.
        rank: This rank takes rows `rank::world_size`.
        world_size: Number of ranks.
        shuffles: Validation keeps the shards' order, starts and gains.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        sample_rate: int,
        num_samples: int,
        batch_size: int,
        seed: int = 0,
        texts: bool = False,
        gain_db: float = 0.0,
        expression: str | None = None,
        cache_bytes: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffles: bool = True,
    ) -> None:
        self._places = _scan(shards, expression)
        self._rate, self._num_samples, self._batch_size = sample_rate, num_samples, batch_size
        self._seed, self._texts, self._gain_db, self._shuffles = seed, texts, gain_db, shuffles
        self._rows = range(rank, batch_size, world_size)
        self._cache_bytes, self._cached = cache_bytes, 0
        self._cache: dict[int, np.ndarray] = {}
        self._orders: dict[int, np.ndarray] = {}

    @property
    def num_steps(self) -> int:
        """About one pass over the clips."""
        if self._texts or not self._shuffles:
            return -(-len(self._places) // self._batch_size)
        seconds = sum(float(place.metadata.get("duration") or 1.0) for place in self._places)
        return max(1, int(seconds * self._rate / (self._num_samples * self._batch_size)))

    def __getitem__(self, step: int) -> Any:
        """The rows of this rank at a global step."""
        waves, texts = [], []
        for row in self._rows:
            wave_T, text = self._row(step * self._batch_size + row)
            waves.append(wave_T)
            texts.append(text)
        waves_B1T = torch.from_numpy(np.stack(waves))[:, None]
        return (waves_B1T, texts) if self._texts else waves_B1T

    def _row(self, number: int) -> tuple[np.ndarray, str]:
        """Row `number` of the endless stream of rows."""
        rng = np.random.default_rng([self._seed, 4, number if self._shuffles else 0])
        clip = self._clip(number)
        wave_T, text = self._wave(clip), self._places[clip].text
        if self._texts or not self._shuffles:
            if len(wave_T) > self._num_samples:
                wave_T, text = wave_T[: self._num_samples], ""
        else:
            while len(wave_T) < self._num_samples:
                wave_T = np.concatenate([wave_T, self._wave(int(rng.integers(len(self._places))))])
            start = int(rng.integers(len(wave_T) - self._num_samples + 1))
            wave_T = wave_T[start : start + self._num_samples]
        wave_T = np.pad(wave_T, (0, self._num_samples - len(wave_T)))
        gain = 10 ** (rng.uniform(-self._gain_db, self._gain_db) / 20) if self._shuffles else 1.0
        return (wave_T * gain).clip(-1, 1).astype(np.float32), text

    def _clip(self, number: int) -> int:
        epoch, place = divmod(number, len(self._places))
        if not self._shuffles:
            return place
        if epoch not in self._orders:
            kept = {key: self._orders[key] for key in (epoch - 1, epoch + 1) if key in self._orders}
            order = np.random.default_rng([self._seed, 5, epoch]).permutation(len(self._places))
            self._orders = {**kept, epoch: order}
        return int(self._orders[epoch][place])

    def _wave(self, clip: int) -> np.ndarray:
        if clip in self._cache:
            return self._cache[clip].astype(np.float32) / 32767
        place = self._places[clip]
        name = f"{place.path}:{place.key}"
        sample = read_sample(_read(place), place.key, name)
        if sample.audio is None:
            raise ValueError(f"{name}: has no sound; the codec needs audio shards")
        wave_CT, rate = load_audio(sample.audio, name=name)
        wave_T = resample(to_mono(wave_CT), rate, self._rate).numpy()
        small_T = (wave_T.clip(-1, 1) * 32767).round().astype(np.int16)
        if self._cached + small_T.nbytes <= self._cache_bytes:
            self._cache[clip] = small_T
            self._cached += small_T.nbytes
        return small_T.astype(np.float32) / 32767


class StepLoader(Generic[Batch]):
    """The batches of `dataset[step]`, step after step, with a length and a state that Lightning saves.

    Args:
        dataset: A pure function of the step.
        num_steps: Length of an epoch.
        num_workers: Processes that make batches; 0: this one.
        pin_memory: For GPUs.
        restarts: Begin at step 0 each epoch (for validation).
    """

    def __init__(
        self, dataset: Dataset[Batch], num_steps: int, num_workers: int = 0, pin_memory: bool = False,
        restarts: bool = False,
    ) -> None:  # fmt: skip
        self._dataset, self._num_steps, self._num_workers = dataset, num_steps, num_workers
        self._pin_memory, self._restarts = pin_memory, restarts
        self._step = 0

    def __len__(self) -> int:
        """Steps an epoch."""
        return self._num_steps

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the epoch."""
        if self._restarts:
            self._step = 0
        stop = (self._step // self._num_steps + 1) * self._num_steps
        loader = DataLoader(
            self._dataset, batch_size=None, sampler=range(self._step, stop), num_workers=self._num_workers,
            pin_memory=self._pin_memory, collate_fn=_as_it_is,
        )  # fmt: skip
        for batch in loader:
            self._step += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The number of steps taken."""
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self._step = int(state["step"])


def _as_it_is(batch: Batch) -> Batch:
    return batch
