"""`mmllm fit --print_estimate`: what a config needs, before anything runs or is there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mmllm import paths
from mmllm.data.loading.datamodules import PackedDataModule
from mmllm.data.loading.preferences import PreferenceDataModule
from mmllm.data.loading.prompts import PromptDataModule
from mmllm.data.plan.plan import Plan, StepPlan
from mmllm.data.plan.recipe import Recipe, load_recipe
from mmllm.model.flops import Work
from mmllm.model.multimodal import ModelConfig, MultimodalModel
from mmllm.training.decoder_module import DecoderModule
from mmllm.training.estimate_answers import drawing_bytes, preference_load, rollout_load
from mmllm.training.estimate_memory import Load, memory_bytes
from mmllm.training.layout import Layout
from mmllm.training.parts import flops_of
from mmllm.training.planned_prompts import PlannedPrompts

NUM_PLANNED_STEPS = 8
"""Steps of a recipe whose documents are looked at, where its shards are there."""
SECONDS_A_DAY = 24 * 60 * 60


@dataclass(frozen=True)
class Estimate:
    """What a config needs.

    Attributes:
        parameters: in all, those that one token passes, and all by part of the model.
        flops_per_token: forward and backward, each product of the model once.
        memory_bytes: of each device, the most for each purpose, and the most for all together at one moment.
        days: of the training; None: it has no number of steps, or no rate was given.
        assumed: what was not known.
    """

    parameters: dict[str, Any]
    flops_per_token: int
    memory_bytes: dict[str, int]
    days: float | None
    assumed: dict[str, Any] = field(default_factory=dict)


def estimate(
    module: DecoderModule,
    data: PackedDataModule | PreferenceDataModule | PromptDataModule,
    layout: Layout,
    flops_per_second: float | None = None,
    sequence_length: int | None = None,
) -> Estimate:
    """What training a decoder needs. The tokenizer folder and the shards may be missing.

    Args:
        module: not built.
        data: the training's.
        layout: over which devices.
        flops_per_second: what each device reaches of the model's products; for the days, without drawing answers.
        sequence_length: in the place of the recipe's, where that isn't there; of a prompt with its answer.

    Raises:
        ValueError: sizes are left to a tokenizer folder that isn't there, or to a recipe that isn't.
    """
    config = model_config(module)
    flops = flops_of(config, module.optimizer, module.adapter)
    with torch.device("meta"):
        model = MultimodalModel(config)
    match data:
        case PreferenceDataModule():
            load = preference_load(data, model, sequence_length)
        case PromptDataModule():
            load = rollout_load(module, data, model, sequence_length)
        case _:
            load = load_of(data, model, sequence_length)
    memory = memory_bytes(module, config, layout, load)
    if isinstance(data, PromptDataModule):
        cache = drawing_bytes(module, data, config.decoder, layout, load)
        memory |= {"cache": cache, "total": memory.pop("total") + cache}
    per_token = flops.training(load.work) / load.work.num_tokens
    days = None
    if flops_per_second and layout.max_steps:
        steps = layout.max_steps * layout.accumulated
        done = flops.training(load.work) + flops.computed_again(load.work)
        if module.asks_start:  # the reference's forward pass, a third of a pass forward and backward
            done += flops.training(load.work) // 3
        per_step = done * load.batch_size / load.num_sequences
        days = round(steps * per_step / (flops_per_second * layout.num_devices) / SECONDS_A_DAY, 3)
    parameters = {
        "total": model.num_parameters(),
        "active": model.num_active_parameters(),
        "by_part": _by_part(model),
    }
    return Estimate(parameters, round(per_token), memory, days, load.told())


def model_config(module: DecoderModule) -> ModelConfig:
    """The module's, also where its tokenizer or CLIP folder is not there yet but all sizes are given.

    Raises:
        ValueError: a size is left to a folder that isn't there.
    """
    if module.tokenizer is not None and not Path(module.tokenizer).is_dir():
        sizes = {"decoder.vocab_size": module.decoder.vocab_size}
        if module.audio is not None:
            sizes |= {f"audio.{key}": getattr(module.audio, key) for key in ("num_codebooks", "codebook_size")}
            sizes["audio.codebook_dim"] = module.audio.codebook_dim
        unknown = [key for key, size in sizes.items() if not size]
        if unknown:
            raise ValueError(
                f"model.init_args.{unknown[0]} is 0, which leaves it to the tokenizer folder, and none is at "
                f"{module.tokenizer}; make it first, or give the number"
            )
        module.tokenizer = None
    if module.clip is not None and not Path(module.clip).is_dir():
        raise ValueError(f"model.init_args.clip is {module.clip}, but no folder is there; train the tower first")
    return module.resolved_config()


def load_of(data: PackedDataModule, model: MultimodalModel, sequence_length: int | None = None) -> Load:
    """A batch's load: of the recipe's own documents if they are there, else the largest that may be.

    Raises:
        ValueError: neither the recipe nor `sequence_length` is there.
    """
    recipe = _recipe(data)
    if sequence_length is None and recipe is None:
        raise ValueError(f"no recipe is at {data.recipe_path}; make it, or give --sequence_length")
    length = sequence_length or (recipe.sequence_length if recipe is not None else 0)
    slots = model.num_image_tokens
    max_images = 0 if not slots else length // (slots + 2)  # a picture has its marks
    if recipe is not None and recipe.packing.max_images is not None:
        max_images = min(max_images, recipe.packing.max_images)
    if sequence_length is None:
        try:
            planned = _planned(data.plan, model.config.decoder.encoder_layers > 0)
        except (ValueError, OSError):  # the shards or the tokenizer aren't there
            planned = None
        if planned is not None:
            return Load(data.batch_size, length, max_images, *planned, is_planned=True)
    work = Work((length,), length - max_images * slots, num_images=max_images)
    return Load(data.batch_size, length, max_images, work, num_sequences=1, is_planned=False)


def _recipe(data: PackedDataModule) -> Recipe | None:
    """The recipe; where its path names a shipped one that isn't here, that one; None: there is none."""
    path = data.recipe_path
    if path is None or path.is_file():
        return data.recipe
    name = path.as_posix()
    return load_recipe(paths.config_path(name)) if name in paths.list_configs() else None


def _planned(plan: Plan, has_encoder: bool) -> tuple[Work, int] | None:
    """What the recipe's first steps hold, all sequences together."""
    steps = list(islice(plan.steps(), NUM_PLANNED_STEPS))
    work = planned_work(plan, steps, PlannedPrompts(plan) if has_encoder else None)
    return (work, sum(len(step.sequences) for step in steps)) if work.lengths else None


def planned_work(plan: Plan, steps: Iterable[StepPlan], prompts: PlannedPrompts | None = None) -> Work:
    """What planned steps hold, without reading a document: each of its tokens counts as a target, which is the most.

    Args:
        plan: whose.
        steps: of it.
        prompts: tells what of a document is an encoder's; None: there is no encoder.
    """
    lengths, encoded, num_images, num_heard, num_spoken = [], [], 0, 0, 0
    for step in steps:
        for item in (item for sequence in step.sequences for item in sequence):
            lengths.append(item.num_tokens)
            source = plan.sources[item.source]
            place = source.indices[item.shard].place(item.row)
            if prompts is not None:
                encoded.append(prompts.num_tokens(item, place))
            is_spoken = item.task == "speak"
            num_images += place.num_images
            num_spoken += place.num_frames if is_spoken else 0
            num_heard += 0 if is_spoken else place.num_frames
    return Work(
        tuple(lengths),
        num_targets=sum(lengths),
        num_unit_targets=num_spoken,
        num_images=num_images,
        num_heard_frames=num_heard,
        num_spoken_frames=num_spoken,
        prompts=tuple(encoded),
    )


def _by_part(model: MultimodalModel) -> dict[str, int]:
    decoder = model.decoder
    experts = [layer.experts for layer in decoder.expert_layers().values()]
    parts: dict[str, list[Any]] = {
        "embedding": [decoder.embed_tokens],
        "head": [decoder.lm_head],
        "experts": experts,
        "image_tower": [model.vision],
        "image_projector": [model.image_projector],
        "sound": [model.code_embedding, model.clip_projector, model.unit_projector, model.ctc_head, model.pointer],
    }
    counts = {
        name: sum(p.numel() for module in modules if module is not None for p in module.parameters())
        for name, modules in parts.items()
    }
    counts["rest_of_layers"] = sum(p.numel() for p in decoder.layers.parameters()) - counts["experts"]
    counts["other"] = model.num_parameters() - sum(counts.values())
    return counts
