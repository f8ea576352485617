"""The Lightning data modules: packed documents for the decoder, pairs for CLIP, crops of sound for the codec.

Shapes: B rows, H and W pixels, L text tokens, T samples.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from itertools import islice
from pathlib import Path
from typing import Generic, Literal

import lightning as L
import numpy as np
from torch.utils.data import Dataset

from mmllm.batch import CaptionBatch, PackedBatch, SoundBatch
from mmllm.data.loading.augment import AugmentConfig
from mmllm.data.loading.captions import CaptionDataset
from mmllm.data.loading.loader import AnyBatch, PackedLoader, StepDataset
from mmllm.data.loading.pictures import PictureTransform
from mmllm.data.loading.sounds import SoundDataset
from mmllm.data.plan.plan import Plan, open_plan
from mmllm.data.plan.recipe import OnErrorConfig, Recipe, load_recipe
from mmllm.data.plan.single import SinglePlan, open_captions, open_indices, open_sounds
from mmllm.data.plan.tasks import TaskConfig, open_task_plan, split_sources
from mmllm.data.samples.decode import ImageTransform
from mmllm_tokenizers.folder import TokenizerFolder


class PackedDataModule(L.LightningDataModule):
    """The batches of a recipe.

    Args:
        recipe: The recipe, or its YAML's path.
        batch_size: Sequences a step, of all ranks together.
        num_workers: Processes that read and decode, a rank; 0: the training process itself.
        val_recipe: The recipe of validation, whose documents are taken once each; by default none.
        num_val_sequences: At most this many of its sequences; `None`: all.
        steps_per_epoch: How many steps Lightning calls an epoch; by default about one pass over the documents.
        image_mode: How pictures become square: squash, pad or crop. By default as the model in `init_from` saw them,
            else squash.
        cache_mb: Memory for built documents, a process: on small sets nothing is decoded twice.
        min_scale: In training, random crops keep at least this share of a picture's area; 1: no crops.
        flip: In training, mirror half of the pictures (not where texts say left and right).
        image_features: Don't decode pictures: take the features that `data build --image_features` stored with them.
            For a frozen image tower, and without `min_scale` and `flip`.
        token_multiple: The tokens that a batch's decoder sees are rounded up to it by padding that is computed: few
            different shapes for `compile`; 1: not at all.
        tasks: Steps of one source at a time, as `ReptileModule` trains; None: all sources are mixed.
    """

    def __init__(
        self,
        recipe: str | Path | Recipe,
        batch_size: int = 8,
        num_workers: int = 0,
        val_recipe: str | Path | Recipe | None = None,
        num_val_sequences: int | None = None,
        steps_per_epoch: int | None = None,
        image_mode: Literal["squash", "pad", "crop"] | None = None,
        cache_mb: int = 512,
        min_scale: float = 1.0,
        flip: bool = False,
        image_features: bool = False,
        token_multiple: int = 1,
        tasks: TaskConfig | None = None,
    ) -> None:
        super().__init__()
        if token_multiple < 1:
            raise ValueError(f"token_multiple is {token_multiple}; it must be at least 1")
        self._token_multiple = token_multiple
        if batch_size < 1 or num_workers < 0:
            raise ValueError(f"batch_size is {batch_size}, num_workers {num_workers}; they must be >= 1 and >= 0")
        if steps_per_epoch is not None and steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch is {steps_per_epoch}; it must be at least 1")
        self._recipe, self._val_recipe = recipe, val_recipe
        self._tasks = tasks
        self._batch_size, self._num_workers = batch_size, num_workers
        self._num_val_sequences, self._steps_per_epoch = num_val_sequences, steps_per_epoch
        self._pictures = PictureTransform(image_mode)
        self._cache_bytes = cache_mb * 2**20
        self._augment, self._image_features = AugmentConfig(min_scale, flip), image_features
        if image_features and self._augment.is_on:
            raise ValueError(
                f"image_features is on with min_scale {min_scale} and flip {flip}, but stored features are neither "
                f"cropped nor mirrored; set min_scale to 1 and flip to false, or image_features to false"
            )
        self._plan: Plan | None = None
        self._val_plan: Plan | None = None
        self._folder: TokenizerFolder | None = None
        self._train_loader: PackedLoader[PackedBatch] | None = None

    @property
    def recipe(self) -> Recipe:
        """The training recipe."""
        return _recipe(self._recipe)

    @property
    def recipe_path(self) -> Path | None:
        """Its file, which may be missing; None: it was given as it is."""
        return None if isinstance(self._recipe, Recipe) else Path(self._recipe)

    @property
    def batch_size(self) -> int:
        """Sequences a step, of all ranks together."""
        return self._batch_size

    @property
    def folder(self) -> TokenizerFolder:
        """The recipe's tokenizer folder."""
        if self._folder is None:
            self._folder = TokenizerFolder.load(self.recipe.tokenizer_folder())
        return self._folder

    @property
    def image_transform(self) -> ImageTransform:
        """How pictures become the tower's squares."""
        return self._pictures.of(self.folder)

    def take_transform(self, transform: ImageTransform) -> None:
        """Pictures are to be made as a pretrained tower saw them; called before any loader is made.

        Raises:
            ValueError: `image_mode` was set to something else, or the tokenizer folder has pictures of another size.
        """
        self._pictures.take(transform, self.folder)

    @property
    def plan(self) -> Plan:
        """The training plan; `plan.hash` is the recipe hash."""
        if self._plan is None and self._tasks is not None:
            recipe = _recipe(self._recipe)
            if self._tasks.column is not None:
                self._recipe = recipe = split_sources(recipe, self.folder, self._tasks.column)
            self._plan = open_task_plan(recipe, self._batch_size, self.folder, self._tasks)
        elif self._plan is None:
            self._plan = open_plan(_recipe(self._recipe), self._batch_size, self.folder)
        return self._plan

    @property
    def tasks(self) -> TaskConfig | None:
        """How many steps of one source come at a time; None: all sources are mixed."""
        return self._tasks

    @property
    def features(self) -> str | None:
        """The hash of what made the image features that stand in for pictures; None: there are none to stand in.

        Raises:
            ValueError: The pictures of the recipes that are open have features of several hashes, or some have none;
                or the tokenizer folder cuts pictures into tiles, and features or altered pictures are asked for.
        """
        self._check_tiling()
        plans = [plan for plan in (self._plan, self._val_plan) if plan is not None and self._image_features]
        found = {
            made_by: plan.describe(item)
            for plan in plans
            for source in plan.sources
            for made_by, item in source.made_features().items()
        }
        if len(found) > 1 or None in found:
            each = [
                f"{'none' if made_by is None else str(made_by)[:12]} in {named['shard']}:{named['key']}"
                for made_by, named in found.items()
            ]
            raise ValueError(
                f"image_features is on, but pictures have features of different makers or none: {', '.join(each)}; "
                f"build all shards with one --image_features, or set image_features to false"
            )
        return next(iter(found), None)

    def _check_tiling(self) -> None:
        """Refuses what is done with whole pictures alone, where the tokenizer folder cuts them."""
        tiling = self.folder.config.tiling
        if tiling is None:
            return
        if self._image_features:
            raise ValueError(
                f"image_features is on, and stored features are of whole pictures, but the tokenizer folder's "
                f"tiling.max_tiles is {tiling.max_tiles}; set image_features to false, or take a folder without tiling"
            )
        if self._augment.is_on:
            raise ValueError(
                f"min_scale is {self._augment.min_scale} and flip {self._augment.flip}, which would alter each tile by "
                f"itself: the tokenizer folder's tiling.max_tiles is {tiling.max_tiles}; set min_scale to 1 and flip "
                f"to false, or take a folder without tiling"
            )

    @property
    def sequence_length(self) -> int:
        """Positions of a sequence."""
        return self.plan.recipe.sequence_length

    @property
    def heard_seconds(self) -> tuple[float, float] | None:
        """The longest sound that training hears, and the usual one; None: it hears none.

        The usual length is the median over time: half of the time is heard in sounds that are no longer. Sources count
        by their weights.
        """
        frames, weights = [np.zeros(0)], [np.zeros(0)]
        for source in self.plan.sources:
            frames_Q = self._frames(source.heard_sounds())
            if len(frames_Q) and source.config.largest_weight > 0:
                frames.append(frames_Q)
                weights.append(source.config.largest_weight * frames_Q / frames_Q.sum())
        frames_Q, weights_Q = np.concatenate(frames), np.concatenate(weights)
        if not len(frames_Q):
            return None
        order_Q = np.argsort(frames_Q, kind="stable")
        shares_Q = weights_Q[order_Q].cumsum() / weights_Q.sum()
        usual = frames_Q[order_Q[int(np.searchsorted(shares_Q, 0.5 - 1e-9))]]
        return round(float(frames_Q.max()) / self.folder.frame_rate, 3), round(float(usual) / self.folder.frame_rate, 3)

    def _frames(self, sounds_Q3: np.ndarray) -> np.ndarray:
        """[Q] how many frames each sound lasts, from its codes; where these have no durations, from its samples.

        There, of a sound that is stored as codes alone, it is the least that it can last.
        """
        samples_Q, rate_Q, codes_Q = sounds_Q3.T
        if self.folder.keeps_durations:
            return codes_Q
        frames_Q = np.ceil(samples_Q * self.folder.frame_rate / np.maximum(rate_Q, 1))
        return np.where(rate_Q > 0, frames_Q, codes_Q)

    @property
    def voices(self) -> tuple[str, ...]:
        """Speakers of the documents that are spoken, by name."""
        names: set[str] = set()
        for source in self.plan.sources:
            if "speak" in source.config.task_names:
                names |= source.values("speaker")
        return tuple(sorted(names))

    @property
    def source_names(self) -> list[str]:
        """The training recipe's sources, in the order of `source_BT`."""
        return [source.name for source in _recipe(self._recipe).sources]

    def setup(self, stage: str | None = None) -> None:
        """Opens the indices.

        Args:
            stage: Lightning's; a stage that doesn't train opens no training data.
        """
        if stage in (None, "fit"):
            _ = self.plan
        if self._val_recipe is not None and self._val_plan is None:
            recipe = _once(_recipe(self._val_recipe))
            folder = TokenizerFolder.load(recipe.tokenizer_folder())
            if stage in (None, "fit") and folder.hash != self.folder.hash:
                raise ValueError(
                    f"val_recipe has tokenizer {folder.hash[:12]}, recipe {self.folder.hash[:12]}; use the same"
                )
            self._folder = self._folder or folder
            self._val_plan = open_plan(recipe, self._batch_size, folder)

    def train_dataloader(self) -> PackedLoader[PackedBatch]:
        """The training batches of this rank; the stream goes on from epoch to epoch."""
        if self._train_loader is None:
            steps = self._steps_per_epoch or default_steps(self.plan)
            self._train_loader = self._loader(self.plan, steps, restarts=False)
        return self._train_loader

    def val_dataloader(self) -> PackedLoader[PackedBatch] | list[PackedLoader[PackedBatch]]:
        """The validation batches of this rank: the same ones each time."""
        if self._val_plan is None:
            return []
        num_steps = sum(1 for _ in self._val_plan.steps())
        if self._num_val_sequences is not None:
            num_steps = min(num_steps, math.ceil(self._num_val_sequences / self._batch_size))
        return self._loader(self._val_plan, num_steps, restarts=True)

    def test_dataloader(self) -> PackedLoader[PackedBatch] | list[PackedLoader[PackedBatch]]:
        """As validation."""
        return self.val_dataloader()

    def _loader(self, plan: Plan, num_steps: int, restarts: bool) -> PackedLoader[PackedBatch]:
        dataset = StepDataset(
            plan, self.folder, self.image_transform, self._cache_bytes, None if restarts else self._augment,
            features=self.features, token_multiple=self._token_multiple,
        )  # fmt: skip
        rank, world_size = rank_of(self)
        return PackedLoader(plan, dataset, num_steps, rank, world_size, self._num_workers, on_gpu(self), restarts)


def _recipe(recipe: str | Path | Recipe) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def _once(recipe: Recipe) -> Recipe:
    """The recipe with each document once, all sources to their end, in no order of difficulty or of a schedule."""
    sources = [
        dataclasses.replace(
            source,
            max_epochs=1.0,
            task_weights=None,
            weight=source.largest_weight,
            weight_schedule=None,
            balance=None,
            balance_alpha=None,
            masked_spans=None,
        )
        for source in recipe.sources
    ]
    mixture = dataclasses.replace(recipe.mixture, on_exhausted="renormalize")
    return dataclasses.replace(recipe, sources=sources, mixture=mixture, curriculum=None)


def default_steps(plan: Plan) -> int:
    """About one pass over the documents; of a stream that ends sooner, all its steps."""
    tokens = sum(source.num_epoch_tokens for source in plan.sources)
    steps = max(1, math.ceil(tokens / (plan.batch_size * plan.recipe.sequence_length)))
    capped = any(source.config.max_epochs is not None for source in plan.sources)
    if capped and plan.recipe.mixture.on_exhausted != "repeat":
        return sum(1 for _ in islice(plan.steps(), steps))
    return steps


def rank_of(module: L.LightningDataModule) -> tuple[int, int]:
    """(rank, number of ranks) among those of the trainer that read data of their own, or (0, 1) without one.

    Ranks that compute one sequence together, by tensor parallelism, read the same.
    """
    if module.trainer is None:
        return 0, 1
    shares = module.trainer.distributed_sampler_kwargs
    return (0, 1) if shares is None else (shares["rank"], shares["num_replicas"])


class _ShardDataModule(L.LightningDataModule, ABC, Generic[AnyBatch]):
    """Shards without a recipe: a shuffled stream to train on, and others in their order to validate."""

    def __init__(
        self,
        shards: str | list[str],
        val_shards: str | list[str] | None,
        num_workers: int,
        on_error: OnErrorConfig | None,
    ) -> None:
        super().__init__()
        if num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}; it must be >= 0")
        self._shards, self._val_shards = shards, val_shards
        self._num_workers, self._on_error = num_workers, on_error or OnErrorConfig()
        self._train_loader: PackedLoader[AnyBatch] | None = None

    def prepare_data(self) -> None:
        """Makes the indices that are missing, in one process of each machine."""
        for shards in (self._shards, self._val_shards):
            if shards is not None:
                open_indices(shards, self._folder())

    def train_dataloader(self) -> PackedLoader[AnyBatch]:
        """What this rank trains on; the same loader whenever it is asked for, since it keeps its place."""
        if self._train_loader is None:
            self._train_loader = self._loader(self._shards, shuffles=True)
        return self._train_loader

    def val_dataloader(self) -> PackedLoader[AnyBatch] | list[PackedLoader[AnyBatch]]:
        """What this rank validates on, in the shards' order."""
        return [] if self._val_shards is None else self._loader(self._val_shards, shuffles=False)

    def _loader(self, shards: str | list[str], shuffles: bool) -> PackedLoader[AnyBatch]:
        rank, world_size = rank_of(self)
        plan = self._plan(shards, shuffles, world_size)
        dataset = self._dataset(plan, shuffles)
        restarts = not shuffles
        return PackedLoader(
            plan, dataset, plan.num_steps, rank, world_size, self._num_workers, on_gpu(self), restarts
        )  # fmt: skip

    @abstractmethod
    def _folder(self) -> TokenizerFolder | None: ...

    @abstractmethod
    def _plan(self, shards: str | list[str], shuffles: bool, num_ranks: int) -> SinglePlan: ...

    @abstractmethod
    def _dataset(self, plan: SinglePlan, shuffles: bool) -> Dataset[AnyBatch]: ...


class ClipDataModule(_ShardDataModule[CaptionBatch]):
    """Pairs for CLIP: pictures and token ids (`CaptionBatch`). Shards without an index get one by the tokenizer.

    Args:
        shards: Caption shards: paths, globs, brace ranges or addresses.
        tokenizer: The tokenizer folder.
        batch_size: Pairs a step, of all ranks together; equal captions are kept out of one batch where possible.
        val_shards: Shards of validation; by default none.
        image_size: Side in pixels; by default the tokenizer's.
        context_length: L.
        min_scale: Random crops keep at least this share of a picture's area; 1: no crops.
        flip: Mirror half of the pictures (not where captions say left and right).
        filter: Which rows, as in a recipe, but not by `num_tokens` or `num_frames`.
        image_mode: How pictures become square: squash, pad or crop.
        num_workers: Processes a rank; 0: the training process itself.
        seed: Of order and crops.
        cache_mb: Memory for decoded pictures, a process.
        on_error: What becomes of samples that fail, as in a recipe: by default they are masked, up to 0.1%.
    """

    def __init__(
        self,
        shards: str | list[str],
        tokenizer: str | Path,
        batch_size: int = 64,
        val_shards: str | list[str] | None = None,
        image_size: int | None = None,
        context_length: int = 32,
        min_scale: float = 1.0,
        flip: bool = False,
        filter: str | None = None,
        image_mode: Literal["squash", "pad", "crop"] = "squash",
        num_workers: int = 0,
        seed: int = 0,
        cache_mb: int = 1024,
        on_error: OnErrorConfig | None = None,
    ) -> None:
        super().__init__(shards, val_shards, num_workers, on_error)
        if batch_size < 1 or context_length < 2 or not 0 < min_scale <= 1:
            raise ValueError(
                f"batch_size is {batch_size}, context_length {context_length}, min_scale {min_scale}; they must be "
                f">= 1, >= 2 and in (0, 1]"
            )
        self._tokenizer, self._batch_size = tokenizer, batch_size
        self._context_length, self._image_size = context_length, image_size
        self._augment, self._filter = AugmentConfig(min_scale, flip), filter
        self._image_mode: Literal["squash", "pad", "crop"] = image_mode
        self._seed, self._cache_bytes = seed, cache_mb * 2**20

    def _folder(self) -> TokenizerFolder:
        return TokenizerFolder.load(self._tokenizer)

    def _plan(self, shards: str | list[str], shuffles: bool, num_ranks: int) -> SinglePlan:
        folder = self._folder()
        recipe, source = open_captions(shards, self._filter, self._seed, self._on_error, folder)
        order = "epochs" if shuffles else "once"
        return SinglePlan(recipe, source, self._batch_size, order, num_ranks, tokenizer_hash=folder.hash)

    def _dataset(self, plan: SinglePlan, shuffles: bool) -> CaptionDataset:
        folder = self._folder()
        transform = ImageTransform(self._image_size or folder.image_size, mode=self._image_mode)
        augment = self._augment if shuffles else None
        return CaptionDataset(plan, folder, transform, self._context_length, augment, self._cache_bytes)


class AudioDataModule(_ShardDataModule[SoundBatch]):
    """Sound for the codec: crops, or with `texts` whole clips and what is said in them (`SoundBatch`).

    No tokenizer is needed: any tokenizer's index serves, and shards without one get one that counts bytes.

    Args:
        shards: Audio shards: paths, globs, brace ranges or addresses. Clips shorter than T are followed by others.
        sample_rate: Sounds are resampled to it.
        seconds: T in seconds.
        batch_size: Rows a step, of all ranks together.
        val_shards: Shards of validation, read clip by clip from the start; by default none.
        texts: Whole clips with their texts ("" where a clip was cut), for a CTC loss.
        gain_db: Each row is made louder or softer by up to this much.
        filter: Which rows, as in a recipe, but not by `num_tokens` or `num_frames`.
        num_workers: Processes a rank; 0: the training process itself.
        seed: Of order and crops.
        cache_mb: Memory for decoded sounds, a process.
        on_error: What becomes of samples that fail, as in a recipe: by default they are left out, up to 0.1%.
    """

    def __init__(
        self,
        shards: str | list[str],
        sample_rate: int,
        seconds: float = 1.0,
        batch_size: int = 16,
        val_shards: str | list[str] | None = None,
        texts: bool = False,
        gain_db: float = 0.0,
        filter: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
        cache_mb: int = 1024,
        on_error: OnErrorConfig | None = None,
    ) -> None:
        super().__init__(shards, val_shards, num_workers, on_error)
        self._num_samples = round(seconds * sample_rate)
        if batch_size < 1 or self._num_samples < 1 or gain_db < 0:
            raise ValueError(
                f"batch_size is {batch_size}, {seconds} s at {sample_rate} Hz, gain_db {gain_db}; give at least one "
                f"row and one sample, and gain_db >= 0"
            )
        self._sample_rate, self._batch_size, self._texts = sample_rate, batch_size, texts
        self._gain_db, self._filter = gain_db, filter
        self._seed, self._cache_bytes = seed, cache_mb * 2**20

    def _folder(self) -> None:
        return None  # it is the codec that a tokenizer of sound will be made of

    def _plan(self, shards: str | list[str], shuffles: bool, num_ranks: int) -> SinglePlan:
        recipe, source = open_sounds(
            shards, self._filter, self._seed, self._on_error, self._sample_rate, self._num_samples
        )
        fill = self._num_samples if shuffles and not self._texts else 0
        return SinglePlan(recipe, source, self._batch_size, "stream" if shuffles else "once", num_ranks, fill)

    def _dataset(self, plan: SinglePlan, shuffles: bool) -> SoundDataset:
        return SoundDataset(
            plan, self._sample_rate, self._num_samples, crops=shuffles and not self._texts, texts=self._texts,
            gain_db=self._gain_db if shuffles else 0.0, cache_bytes=self._cache_bytes,
        )  # fmt: skip


def on_gpu(module: L.LightningDataModule) -> bool:
    """Whether batches go to a GPU, so that pinning their memory pays."""
    return module.trainer is not None and module.trainer.strategy.root_device.type == "cuda"
