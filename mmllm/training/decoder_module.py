"""Trains the multimodal decoder: `class_path: mmllm.training.decoder_module.DecoderModule`.

Shapes: B sequences, T positions, L layers with experts, M modalities, E experts, K codebooks, V codes, D width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmllm.batch import PackedBatch
from mmllm.checkout import commit
from mmllm.checkpoints.adapter_config import AdapterConfig
from mmllm.checkpoints.adapters import (
    add_adapter,
    base_facts,
    base_state,
    check_name,
    copy_adapters,
    keep_stacks_uncompiled,
    reset_magnitudes,
    save_adapter,
)
from mmllm.checkpoints.card import ModelInfo
from mmllm.checkpoints.files import ADAPTERS, check_replaceable
from mmllm.checkpoints.folder import save_model
from mmllm.checkpoints.settings import GenerationConfig
from mmllm.checkpoints.weights import Checkpoint
from mmllm.data.loading.datamodules import PackedDataModule
from mmllm.data.samples.decode import ImageTransform
from mmllm.losses.batch import TASKS, BatchLosses, LossFunction
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.flops import ModelFlops, Work, peak_flops
from mmllm.model.image_projectors import ImageProjectorConfig
from mmllm.model.multimodal import AudioConfig, LossConfig, ModelConfig, ModelOutput, MultimodalModel
from mmllm.model.routing_stats import RoutingWindow
from mmllm.model.vision import VisionConfig
from mmllm.parallel.deferred import DeferredInit
from mmllm.parallel.distribute import distribute
from mmllm.parallel.mesh import ParallelMesh
from mmllm.parallel.shard import compiles_in_one_graph, free_gathered
from mmllm.parallel.tensor import sum_partial_gradients
from mmllm.training.adapters import (
    KEY,
    adapter_rates,
    base_names,
    check_adapter,
    check_has_no_base,
    check_out,
    check_sharding,
    kept_dtypes,
    leave_out_base,
    put_base_back,
)
from mmllm.training.clip_module import load_clip_config
from mmllm.training.expert_bias import ExpertBias
from mmllm.training.exporting import gathered, generation_after
from mmllm.training.init_from import InitSummary, initialize
from mmllm.training.init_source import InitSource
from mmllm.training.optimizers import OptimizerConfig
from mmllm.training.parts import PARTS, build_model, flops_of, freeze, group_of, part_of, splits_vocabulary
from mmllm.training.posttraining.fisher import start_fisher
from mmllm.training.posttraining.keeping import START, KeepConfig, Keeper, check_kept, check_start, keep_notes
from mmllm.training.posttraining.start_weights import StartWeights
from mmllm.training.quantize import check_quantization, put_trained, quantize_base
from mmllm.training.staged import StagedModule
from mmllm.training.stored_features import check_features
from mmllm.training.strategy import mesh_and_sharding
from mmllm.training.totals import GlobalTotals, router_means
from mmllm.training.vocabulary import check_image_slots, with_tiles, with_vocabulary, word_ids
from mmllm.training.whitening import whiten_tower
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.vocab import ANSWER, SPECIAL_TOKENS

log = logging.getLogger(__name__)

MAX_UNNAMED_SOURCES = 64
"""Sources told apart when the data module doesn't name them."""


class DecoderModule(StagedModule):
    """One decoder for all modalities, its losses normalized over all ranks and accumulated batches.

    The loss is (Σₘ wₘ Sₘ) / (Σₘ Nₘ) + w·CTC + w·balance + w·z, where Sₘ and Nₘ are the sums and counts of text and
    unit targets over the *global* batch. DDP averages gradients over W ranks, so each rank's part is multiplied by W:
    two ranks give exactly the loss and gradients of one process with both their sequences. Under gradient
    accumulation each batch's part is weighted by its number of targets (the gradient is scaled once, before
    clipping), so accumulated batches give the task losses of one large batch; the auxiliary losses are then averages
    over batches weighted by targets.
    """

    parts = PARTS

    def __init__(
        self,
        decoder: DecoderConfig | None = None,
        vision: VisionConfig | None = None,
        image_projector: ImageProjectorConfig | None = None,
        audio: AudioConfig | None = None,
        loss: LossConfig | None = None,
        tokenizer: str | None = None,
        clip: str | None = None,
        init_from: str | None = None,
        init_parts: tuple[str, ...] | None = None,
        adapter: AdapterConfig | None = None,
        adapter_name: str = "default",
        keep: KeepConfig | None = None,
        wise_ft: float | None = None,
        optimizer: OptimizerConfig | None = None,
        max_seconds: float | None = None,
        compile: bool = False,
        out: str | None = None,
        name: str = "mmllm model",
        peak_flops: float | None = None,
    ) -> None:
        """Keeps the settings; `configure_model` builds.

        Args:
            decoder: its shape; `vocab_size: 0` takes the tokenizer's. None: the model in `init_from`'s, and so are
                `vision`, `image_projector`, `audio`, `loss` and `tokenizer` where they are None.
            vision: the image tower; None: the model doesn't see, unless `clip` is given.
            image_projector: from the tower to the decoder; `max_tiles: 1` takes the tokenizer's.
            audio: sound in and out; `num_codebooks`, `codebook_size` and `codebook_dim` of 0 take the
                tokenizer's. Left out with a tokenizer that has no codec.
            loss: weights of the losses.
            tokenizer: tokenizer folder; None: the model's sizes are all given and nothing is exported.
            clip: folder of a trained `ClipModule`: the tower's config and weights.
            init_from: model folder whose weights the training starts with, or what an earlier `mmllm import` wrote.
                Rows of ids are taken where the ids mean the same. In a config file, keys of `decoder`, `vision`,
                `image_projector`, `audio` and `loss` that aren't given, and `tokenizer`, are those of the folder.
            init_parts: parts of the model (as in `optimizer.parts`) that come from there; others start anew. None: all
                that it has.
            adapter: what is trained in the place of the weights of `init_from`, of which those alone are trained beside
                it whose parts `optimizer.parts` gives a rate (or `tower_lr`, `projector_lr`).
            adapter_name: what it is called in `out`, a model folder with `adapters/NAME`.
            keep: penalties that keep the training near the model in `init_from`; None: none.
            wise_ft: what is exported is start + wise_ft · (trained - start) (WiSE-FT, arXiv 2109.01903), the start
                being the model in `init_from`; None: what was trained.
            optimizer: rates and decay; parts of the model whose rate is 0 are frozen.
            max_seconds: training ends after this long; None: `trainer.max_steps` alone ends it.
            compile: compile each decoder layer; give the data module a `token_multiple` then, so that shapes are few.
            out: model folder to write when training ends.
            name: title of the model card.
            peak_flops: operations a second that the device can do, for `train/mfu`; None: known from its name, or
                else not logged.

        Raises:
            ValueError: `peak_flops` is not positive, `init_parts` names no part, there is neither `decoder` nor
                `init_from`, or nothing to `keep` to.
            FileNotFoundError: `decoder` is left to a folder that isn't there.
        """
        super().__init__(optimizer if adapter is None else adapter_rates(optimizer), max_seconds)
        unknown = [part for part in init_parts or () if part not in PARTS]
        if unknown:
            raise ValueError(f"init_parts names {unknown[0]!r}; choose among {', '.join(PARTS)}")
        if decoder is None:
            if init_from is None:
                raise ValueError("decoder is left out, and so is init_from; give one of them")
            source = InitSource.open(init_from)
            decoder = source.model.decoder
            if source.is_model_folder:
                vision = vision or (source.model.vision if clip is None else None)
                image_projector = image_projector or source.model.image_projector
                audio, loss, tokenizer = audio or source.model.audio, loss or source.model.loss, tokenizer or init_from
        if peak_flops is not None and not peak_flops > 0:
            raise ValueError(f"peak_flops is {peak_flops}; give what the device can do a second, or null")
        self.peak_flops = peak_flops
        self.decoder = decoder
        self.vision = vision
        self.image_projector = image_projector or ImageProjectorConfig()
        self.audio = audio
        self.loss = loss or LossConfig()
        self.tokenizer = tokenizer
        self.clip = clip
        self.init_from = init_from
        self.init_parts = None if init_parts is None else tuple(init_parts)
        self.init_summary: InitSummary | None = None
        self.adapter = adapter
        self.adapter_name = adapter_name
        check_name(adapter_name)
        check_kept(keep, wise_ft, init_from, adapter)
        self.keep, self.wise_ft = keep or KeepConfig(), wise_ft
        self.start: StartWeights | None = None
        self.keeps_start = self.keep.is_on or wise_ft is not None
        self.asks_start = self.keep.kl > 0
        """Whether the start computes each batch as well."""
        self._keeper: Keeper | None = None
        self.compile_layers = compile
        self.out = out
        self.name = name
        self.folder: TokenizerFolder | None = None
        self.model: MultimodalModel | None = None
        self.mesh: ParallelMesh | None = None
        self.routing = RoutingWindow()
        self.expert_bias: ExpertBias | None = None
        self._whole: MultimodalModel | None = None
        self._whole_state: dict[str, Tensor] | None = None
        self._source: InitSource | None = None
        self._quantized: set[str] = set()
        self._source_names: list[str] = []
        self._first_targets = self._accumulated_targets = torch.zeros(())
        self._num_accumulated = 0
        self._loss_function: LossFunction | None = None
        self._val_sums: dict[str, Tensor] = {}
        self._flops: ModelFlops | None = None

    # --- building ---------------------------------------------------------------------------------------------

    @property
    def export_dir(self) -> str | None:
        """Where the model folder goes when training ends."""
        return self.out

    def tower_of(self, name: str) -> str:
        """Its part of the model where that has a rate of its own; else image tower, projectors, or the rest."""
        return group_of(name, self.optimizer)

    def resolved_config(self) -> ModelConfig:
        """The model's config with what the tokenizer and the CLIP folder decide filled in.

        Raises:
            ValueError: the config contradicts the tokenizer folder.
        """
        vision = self.vision if self.clip is None else load_clip_config(self.clip, self.vision)
        if vision is not None and self.optimizer.rate_of("image_tower") == 0:
            vision = dataclasses.replace(vision, trainable=False)
        decoder, audio, image_projector = self.decoder, self.audio, self.image_projector
        if self.tokenizer is not None:
            self.folder = self.folder or TokenizerFolder.load(self.tokenizer)
            decoder, audio = with_vocabulary(decoder, audio, self.folder)
            if vision is not None:
                image_projector = with_tiles(image_projector, self.folder)
        return ModelConfig(decoder, vision, image_projector, audio, self.loss)

    def configure_model(self) -> None:
        """Builds the model, loads CLIP weights and codebooks, and shards it under `MeshStrategy`.

        Raises:
            ValueError: the strategy's axes don't divide the model; the message names both.
        """
        if self.model is not None:
            return
        config = self.resolved_config()
        check_adapter(self.adapter, self.optimizer, self.init_from)
        self.mesh, sharding = mesh_and_sharding(None if self._trainer is None else self.trainer.strategy)
        if self.mesh is not None:
            self.mesh.config.check_model(config)
            if self.mesh.config.tensor > 1 and splits_vocabulary(config, self.optimizer):
                raise ValueError(
                    f"optimizer.parts gives text_embedding and unit_embedding different rates, and strategy.tensor is "
                    f"{self.mesh.config.tensor}, which splits their rows over ranks; give both one rate, or set tensor "
                    f"to 1 (fsdp shards them all the same)"
                )
            if self.adapter is not None:
                check_sharding(self.adapter, config.decoder, self.mesh.config)
        deferred = None if self.mesh is None else DeferredInit()
        init = deferred or contextlib.nullcontext()
        quantization = None if self.adapter is None else self.adapter.quantization
        if quantization is not None:
            rates = {part: self.optimizer.rate_of(part) for part in ("attention", "experts")}
            check_quantization(self.mesh is not None, self.compile_layers, rates)
        # What is quantized has its weights before it gets an adapter.
        adapter = None if quantization is not None else self.adapter
        self.model = build_model(config, self.optimizer, init, adapter, self.adapter_name)
        if self.folder is not None and self.model.vision is not None:
            check_image_slots(self.model, self.folder)
        self.model.load_pretrained()
        if self.folder is not None and config.audio is not None and self.folder.audio is not None:
            self.model.initialize_audio(self.folder.heard_codebooks_KVD)
        if self.compile_layers:
            is_whole = self.mesh is None or compiles_in_one_graph(config, self.mesh.config, sharding)
            is_whole = not keep_stacks_uncompiled(self.model.decoder) and is_whole
            self.model.decoder.compile_layers(fullgraph=is_whole)
        if self.mesh is not None and deferred is not None:
            distribute(self.model, deferred, self.mesh, sharding, self.trainer.strategy.root_device)
        if self.init_from is not None:
            self._source = InitSource.open(self.init_from)
            self._initialize(self.model, self._source)
        if quantization is not None and self.adapter is not None:
            self._quantized = quantize_base(self.model.decoder, quantization)
            add_adapter(self.model.decoder, self.adapter, self.adapter_name)
            freeze(self.model, self.optimizer)
        if self.keeps_start:  # before a checkpoint takes their place
            self.start = StartWeights(self.model)
            self._keeper = Keeper(self.keep, self.start, is_sharded=self.mesh is not None)

    def _initialize(self, model: MultimodalModel, source: InitSource) -> None:
        """Takes the weights of `init_from`, and says which."""
        summary = initialize(model, source, self.folder, self.init_parts, takes_tower=self.clip is None)
        summary.log()
        if self.adapter is not None and self.adapter.use_dora:
            reset_magnitudes(model.decoder, self.adapter_name)
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        for part in sorted({part_of(name) for name in frozen.intersection(summary.new)}):
            log.warning("%s of the model isn't in %s, and its rate is 0: it stays random", part, source.path)
        self.init_summary = summary

    @property
    def num_batch_ranks(self) -> int:
        """Ranks with sequences of their own."""
        return self.trainer.world_size if self.mesh is None else self.mesh.num_batch_ranks

    @property
    def batch_rank(self) -> int:
        """Which of them this one is."""
        return self.trainer.global_rank if self.mesh is None else self.mesh.batch_rank

    @property
    def batch_group(self) -> dist.ProcessGroup | None:
        """Over which they add up their sums and counts; None: over all processes."""
        return None if self.mesh is None else self.mesh.batch_group

    def on_fit_start(self) -> None:
        """Checks that the data was made with this tokenizer and tower, and asks for its sources' names."""
        super().on_fit_start()
        if self.init_summary is not None and self.trainer.loggers:
            folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)  # rank 0's, for which all must ask
            if self.trainer.is_global_zero:
                self.init_summary.write(folder)
        self._num_accumulated = 0  # an earlier fit may have ended before its step
        routers_move = self.optimizer.rate_of("routers") > 0
        self.expert_bias = ExpertBias.of(self._built().decoder) if routers_move else None
        self._name_sources()
        if self._peak_flops is not None:
            self._flops = flops_of(self._built().config, self.optimizer, self.adapter)
        data_folder = getattr(self._data, "folder", None)
        if self.folder is not None and data_folder is not None and data_folder.hash != self.folder.hash:
            raise ValueError(
                f"the recipe's tokenizer folder is {data_folder.hash[:12]} but the model's, {self.tokenizer}, is "
                f"{self.folder.hash[:12]}; name one tokenizer folder in both"
            )
        self._check_pictures()
        vision = self._built().vision
        if vision is not None:
            whiten_tower(vision, self._data if isinstance(self._data, PackedDataModule) else None)
        if self._keeper is not None and self.start is not None and self.keep.ewc:
            ranks = self.trainer.global_rank, self.trainer.world_size
            self._keeper.fisher = start_fisher(self.keep, self.start, self.folder, self.image_transform, ranks)

    def on_validation_start(self) -> None:
        """Checks the data where nothing was fitted before."""
        if self.trainer.validating:
            self._name_sources()
            self._check_pictures()

    def on_test_start(self) -> None:
        """As before validation alone."""
        self._name_sources()
        self._check_pictures()

    def _name_sources(self) -> None:
        self._source_names = list(getattr(self._data, "source_names", None) or [])
        config = self._built().config
        weights = word_ids(config.loss.word_weights, self.folder)
        answer_id = SPECIAL_TOKENS.index(ANSWER) if self.folder is None else self.folder.id(ANSWER)
        self._loss_function = LossFunction(config, self._source_names, MAX_UNNAMED_SOURCES, weights, answer_id)

    def _check_pictures(self) -> None:
        """Pictures are made as the tower of `init_from` saw them; stored features must be what the tower would give."""
        take = getattr(self._data, "take_transform", None)
        if self._source is not None and self.init_summary is not None and take is not None:
            transform = self._source.image_transform
            if transform is not None and any(name.startswith("vision.") for name in self.init_summary.loaded):
                take(transform)
        self._check_features()

    def _check_features(self) -> None:
        """Refuses stored image features that this tower would not give."""
        made_by, vision, transform = getattr(self._data, "features", None), self._built().vision, self.image_transform
        if made_by is not None and vision is not None:
            assert transform is not None
            check_features(made_by, vision, transform)

    @property
    def source_names(self) -> list[str]:
        """Of the recipe's sources."""
        return self._source_names

    # --- steps ------------------------------------------------------------------------------------------------

    def training_step(self, batch: PackedBatch, batch_idx: int) -> dict[str, Any]:
        """The loss of one packed batch; also counts routing by modality."""
        loss, losses, totals = self.loss_of(batch)
        self.watch.note_sources(losses.source_sums)
        if self.expert_bias is not None:
            self.expert_bias.add(totals.routing.counts_LE)
        self._accumulate(totals.num_targets)
        scale = self.num_batch_ranks * self.trainer.accumulate_grad_batches * totals.num_targets
        self._record(losses, totals, batch)
        self.log("loss", totals.task_loss, prog_bar=True, logger=False)
        return {"loss": loss * (scale / self._first_targets)}

    def loss_of(self, batch: PackedBatch) -> tuple[Tensor, BatchLosses, GlobalTotals]:
        """This rank's part of the global loss, differentiable, and what it is made of. Needs no trainer."""
        output = self._built()(batch)
        losses = self.loss_function(self._built(), output, batch)
        totals = GlobalTotals.of(losses, batch, self.batch_group)
        loss = totals.loss(losses, self._built().config) + self.keeping_loss(batch, output)
        return loss, losses, totals

    def keeping_loss(self, batch: PackedBatch, output: ModelOutput) -> Tensor:
        """This rank's part of keep.kl · KL(start‖now) over the targets of all ranks; 0 where `keep` has no kl.

        Whoever makes another loss adds it to this rank's part of that: the parts of all ranks add up. Penalties of
        weights need no such call.

        Args:
            batch: gives the targets.
            output: what the model made of it.
        """
        if self._keeper is None or not self.keep.kl:
            return output.hidden_QD.new_zeros(())
        args = (self._built(), output, batch, self.loss_function, self.batch_group)
        part, mean = self._keeper.divergence(*args)
        self.window.note("keep/kl", mean)
        return self.keep.kl * part

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turns the sum over accumulated batches into a mean over all their targets."""
        if self.mesh is not None:
            sum_partial_gradients(self._built(), self.mesh)
        if self._num_accumulated > 1:
            grads = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in _gradients(optimizer)]
            torch._foreach_mul_(grads, self._first_targets / self._accumulated_targets)
        self._num_accumulated = 0
        penalty = None if self._keeper is None else self._keeper.add_gradients()
        if penalty is not None:
            self.window.note("keep/weights", penalty)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Moves the experts' biases with the weights: before any checkpoint of this step is saved."""
        super().optimizer_step(*args, **kwargs)
        if self.expert_bias is not None:
            self.expert_bias.step()

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Adds up sums and counts."""
        totals = GlobalTotals.of(self._losses_of(batch), batch, self.batch_group)
        for name, value in {
            **{f"{key}_sum": value for key, value in totals.sums.items()},
            **{f"{key}_count": value for key, value in totals.counts.items()},
            "num_correct": totals.num_correct,
        }.items():
            self._val_sums[name] = self._val_sums.get(name, torch.zeros_like(value)) + value
        free_gathered(self._built())

    @property
    def loss_function(self) -> LossFunction:
        """Of the model, with the names of the data's sources."""
        if self._loss_function is None:
            self._name_sources()
        assert self._loss_function is not None
        return self._loss_function

    def _losses_of(self, batch: PackedBatch) -> BatchLosses:
        return self.loss_function(self._built(), self._built()(batch), batch)

    def on_validation_epoch_end(self) -> None:
        """Logs the means over all validation data of all ranks."""
        self._log_means("val")

    def test_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Logs the same means as validation, as `test/…`."""
        self._log_means("test")

    def _log_means(self, split: str) -> None:
        """The losses that training logs, by the same weights."""
        sums, self._val_sums = self._val_sums, {}
        if not sums:
            return
        named = (*TASKS, "advance", "depth_right", "depth_passed")
        keys = {"loss": "task", **{key: key for key in named if f"{key}_sum" in sums}}
        present = {
            name: sums[f"{key}_sum"] / sums[f"{key}_count"] for name, key in keys.items() if sums[f"{key}_count"] > 0
        }
        if sums["text_count"] > 0:
            present["text_accuracy"] = sums["num_correct"] / sums["text_count"]
        self.log_dict({f"{split}/{name}": value.float() for name, value in present.items()})

    def _accumulate(self, num_targets: Tensor) -> None:
        if not self._num_accumulated:
            self._first_targets = num_targets
            self._accumulated_targets = torch.zeros_like(num_targets)
        self._accumulated_targets = self._accumulated_targets + num_targets
        self._num_accumulated += 1

    def _built(self) -> MultimodalModel:
        assert self.model is not None, "configure_model runs before any step"
        return self.model

    # --- metrics ----------------------------------------------------------------------------------------------

    @property
    def _peak_flops(self) -> float | None:
        """What this rank's device can do a second; None: not known."""
        if self.peak_flops is None and self.device.type == "cuda":
            return peak_flops(torch.cuda.get_device_name(self.device))
        return self.peak_flops

    def _record(self, losses: BatchLosses, totals: GlobalTotals, batch: PackedBatch) -> None:
        if self._flops is not None and batch.metadata is not None:
            self.window.flops += self._flops.training(Work.of(batch))
        has_ctc = bool(self._built().config.loss.ctc)
        sums, counts = totals.reported(self._source_names, has_ctc)
        self.window.add(sums, counts)
        self.routing.add(losses.routing)

    def window_metrics(self) -> dict[str, float]:
        """Losses by modality and source, tokens a second, padding, and this rank's share of its device's peak.

        A collective call: of router losses each rank has kept its part.
        """
        num_tokens = float(self.window.sums["tokens"])
        moe = self._built().config.decoder.moe
        metrics = self.window.means() | router_means(self.window.sums, self.window.counts, moe, self.batch_group)
        metrics["tokens_per_second"] = num_tokens / max(self.window.seconds, 1e-9)
        peak = self._peak_flops
        if peak is not None and self.window.flops:
            metrics["mfu"] = self.window.flops / max(self.window.seconds, 1e-9) / peak
        return metrics

    def check_export(self, directory: Path) -> None:
        """A model folder is replaced as a whole, with whatever lies in it."""
        check_replaceable(directory)
        if self.adapter is not None or self._base_names():
            check_out(str(directory), self.init_from)

    def export(self, directory: Path) -> None:
        """Writes the model folder."""
        if self.folder is None:
            raise ValueError("`out` is set but `tokenizer` is not; a model folder needs its tokenizer")
        source = self._source
        model = self._whole or (self._unquantized() if self._quantized else self._built())
        foreign = None if source is None else source.foreign_files
        settings = (self._info(), self.image_transform, self.generation, foreign)
        dtypes = {}
        if source is not None and self.init_summary is not None:
            dtypes = kept_dtypes(self, self.init_summary, source)
        save_model(directory, model, self.folder, *settings, more=self._export_adapters, dtypes=dtypes)

    @property
    def generation(self) -> GenerationConfig:
        """The settings that are exported: the start's, with what the data says."""
        return generation_after(GenerationConfig() if self._source is None else self._source.generation, self._data)

    def _unquantized(self) -> MultimodalModel:
        """The base as its folder has it, with what was trained beside the adapter."""
        assert self._source is not None
        full = MultimodalModel(self._built().config)
        initialize(full, self._source, self.folder, self.init_parts, takes_tower=self.clip is None)
        put_trained(full, base_state(self._built().state_dict()), self._quantized)
        return full

    def _export_adapters(self, folder: Path) -> None:
        """Puts the trained adapter, and those that `init_from` has, beside the weights."""
        if self.adapter is None or self._source is None:
            return
        facts = base_facts(Checkpoint.open(folder), self._built().config.decoder)
        if self._source.is_model_folder:
            before = base_facts(self._source.checkpoint, self._source.model.decoder)
            copy_adapters(self._source.path, folder, before, facts, but=self.adapter_name)
        state = None
        if self._whole_state is not None:
            state = {n.removeprefix("decoder."): t for n, t in self._whole_state.items() if n.startswith("decoder.")}
        save_adapter(folder / ADAPTERS / self.adapter_name, self._built().decoder, self.adapter_name, facts, state)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves to the base folder what is its, and frozen."""
        super().on_save_checkpoint(checkpoint)
        if self.keeps_start and self._source is not None:
            checkpoint[START] = {"folder": str(self._source.path), "hash": self._source.hash}
        if self._source is not None and (names := self._base_names()):
            leave_out_base(checkpoint, names, self._source)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the clock, and takes the base's frozen weights from where they are."""
        super().on_load_checkpoint(checkpoint)
        if self.keeps_start and self._source is not None:
            check_start(checkpoint, self._source)
        if self._source is None or not (names := self._base_names()):
            check_has_no_base(checkpoint)
        elif KEY in checkpoint:
            put_base_back(checkpoint, self, names, self._source)

    def _base_names(self) -> set[str]:
        """Weights that are frozen, and as the folder of `init_from` has them."""
        return set() if self.init_summary is None else base_names(self, self.init_summary)

    @property
    def image_transform(self) -> ImageTransform | None:
        """How pictures are made square, which inference has to do as well; None: the default.

        As the data module makes them; where it has none, as the model in `init_from` saw them.
        """
        if self._built().vision is None:
            return None
        before = None if self._source is None else self._source.image_transform
        return getattr(self._data, "image_transform", None) or before

    @property
    def _data(self) -> Any:
        """The data module; None without one, or without a trainer."""
        return getattr(self._trainer, "datamodule", None)

    def _info(self) -> ModelInfo:
        plan = getattr(self._data, "plan", None)
        recipe_hash = getattr(plan, "hash", None)
        names = tuple(self._source_names)
        return ModelInfo(
            self.name, recipe_hash, commit(), names, notes=keep_notes(self.keep, self.wise_ft, self._source)
        )

    def exported_weights(self) -> contextlib.AbstractContextManager[None]:
        """Inside of it the model has the weights that are exported, which `wise_ft` mixes of start and trained."""
        if self.start is None or self.wise_ft is None:
            return contextlib.nullcontext()
        return self.start.interpolated(self.wise_ft)

    def on_train_end(self) -> None:
        """Exports; all ranks gather a sharded model first."""
        with self.exported_weights():
            if self.export_dir and self.mesh is not None:
                self._whole, self._whole_state = gathered(self._built()) or (None, None)
            super().on_train_end()
        self._whole = self._whole_state = None


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
