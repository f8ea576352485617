"""Training an adapter: what else is trained beside it; and what checkpoints leave out of a base that is frozen in part.

A checkpoint names the base folder and its hash in the place of what that holds; a base that changed is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmllm.checkpoints.adapter_config import AdapterConfig
from mmllm.checkpoints.adapters import is_adapters
from mmllm.model.decoder_config import DecoderConfig
from mmllm.parallel.mesh import ParallelConfig
from mmllm.training.init_from import InitSummary
from mmllm.training.init_source import InitSource
from mmllm.training.optimizers import OptimizerConfig
from mmllm.training.parts import PARTS

KEY = "mmllm_base"
"""Of a checkpoint: the base folder and its hash."""


def adapter_rates(optimizer: OptimizerConfig | None) -> OptimizerConfig:
    """The rates of a training with an adapter: parts of the base that are given none are frozen.

    `projector_lr` is that of the whole audio front end, embeddings of codes and CTC head included, which else follow
    `lr`: with an adapter nothing of the base does.
    """
    optimizer = optimizer or OptimizerConfig()
    older = {"image_tower": optimizer.tower_lr, "image_projector": optimizer.projector_lr}
    older["audio_front_end"] = optimizer.projector_lr
    own = {part: older.get(part) or 0.0 for part in PARTS if part != "adapter"}
    return dataclasses.replace(optimizer, tower_lr=None, projector_lr=None, parts={**own, **(optimizer.parts or {})})


def check_adapter(adapter: AdapterConfig | None, optimizer: OptimizerConfig, init_from: str | None) -> None:
    """Refuses what an adapter lacks, or what lacks an adapter.

    Raises:
        ValueError: there is no base, or a rate for an adapter that there isn't.
    """
    if adapter is None and "adapter" in (optimizer.parts or {}):
        raise ValueError("optimizer.parts names 'adapter', but there is none; give model.init_args.adapter too")
    if adapter is not None and init_from is None:
        raise ValueError("adapter is given without init_from, the model that it adapts; give the folder of one")


def check_sharding(adapter: AdapterConfig, decoder: DecoderConfig, axes: ParallelConfig) -> None:
    """Refuses axes that PEFT's modules can't be split over.

    Raises:
        ValueError: such an axis; the message says what to do instead.
    """
    if axes.tensor > 1:
        raise ValueError(
            f"strategy.tensor is {axes.tensor} and an adapter is trained, whose layers it can't split; set tensor to 1 "
            f"(fsdp shards them all the same)"
        )
    has_stacks = bool(adapter.targets(decoder)[1])
    if axes.expert > 1 and has_stacks:
        raise ValueError(
            f"strategy.expert is {axes.expert} and the adapter adapts stacks of experts, which are then on several "
            f"ranks; set expert to 1, or leave experts out of adapter.parts"
        )
    if adapter.use_dora:
        raise ValueError(
            "adapter.use_dora is true under a MeshStrategy: the norms of rows can't be taken from shards; train on one "
            "device or with ddp, or leave use_dora out"
        )


def base_names(module: nn.Module, summary: InitSummary) -> set[str]:
    """Weights that a checkpoint leaves to the base folder: frozen, and wholly loaded from there."""
    loaded = {f"model.{name}" for name in summary.loaded}
    return {
        name
        for name, parameter in module.named_parameters()
        if not parameter.requires_grad and _in_folder(name) in loaded and not is_adapters(name)
    }


def kept_dtypes(module: nn.Module, summary: InitSummary, source: InitSource) -> dict[str, torch.dtype]:
    """In which dtype a model folder gets weights that are frozen: as the base folder has them, which is exact.

    A decoder has one dtype: it keeps its own where nothing of it is trained but the rows of added ids, which are
    rounded to it with the matrix that they lie in.

    Returns:
        By the names of a model folder; other weights are written as they were trained.
    """
    if not source.is_model_folder:
        return {}
    specs = source.checkpoint.specs
    frozen = {_in_folder(name).removeprefix("model.") for name in base_names(module, summary)}
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    of_decoder = [name for name in trained if name.startswith("model.decoder.") and not is_adapters(name)]
    if any(not name.endswith(".added") for name in of_decoder):
        frozen = {name for name in frozen if not name.startswith("decoder.")}
    return {name: specs[name].dtype for name in frozen if name in specs}


def _in_folder(name: str) -> str:
    """A weight's name in a model folder."""
    return name.replace(".base_layer", "").replace(".added", ".weight")


def leave_out_base(checkpoint: dict[str, Any], names: Iterable[str], source: InitSource) -> None:
    """Takes the base's weights out of a checkpoint, and names the base instead."""
    weights, names = checkpoint["state_dict"], set(names)
    if weights:  # where one file is written, only the rank that writes it has them
        checkpoint["state_dict"] = {name: weight for name, weight in weights.items() if not _is_of(name, names)}
    checkpoint[KEY] = {"folder": str(source.path), "hash": source.hash}


def _is_of(name: str, weights: set[str]) -> bool:
    """Whether a tensor is one of these weights, or what a quantized one has beside it (`weight.absmax`)."""
    while name and name not in weights:
        name = name.rpartition(".")[0]
    return bool(name)


def put_base_back(checkpoint: dict[str, Any], module: nn.Module, names: Iterable[str], source: InitSource) -> None:
    """Completes a checkpoint's weights by those of the module, which has loaded the base.

    Raises:
        ValueError: that base isn't the one that the checkpoint was trained on.
    """
    wanted = checkpoint[KEY]
    if wanted["hash"] != source.hash:
        raise ValueError(
            f"the checkpoint was trained on {wanted['folder']} with hash {wanted['hash'][:12]}…, but init_from, "
            f"{source.path}, has {source.hash[:12]}…: the base changed, or is another; give the one of the checkpoint"
        )
    own, weights = module.state_dict(), checkpoint["state_dict"]
    weights |= {name: own[name] for name in names if name not in weights}


def check_has_no_base(checkpoint: dict[str, Any]) -> None:
    """Raises ValueError where a checkpoint holds what was trained alone, and this training has no such base."""
    if KEY in checkpoint:
        raise ValueError(
            f"the checkpoint holds only what was trained, on {checkpoint[KEY]['folder']}; go on with the same "
            f"model.init_args.init_from, adapter and optimizer.parts"
        )


def check_out(out: str | None, init_from: str | None) -> None:
    """Raises ValueError where a training would replace the base of its own checkpoints."""
    if out is not None and init_from is not None and Path(out).resolve() == Path(init_from).resolve():
        raise ValueError(
            f"out is {out}, which is init_from, the base that this training's checkpoints refer to; give another folder"
        )
