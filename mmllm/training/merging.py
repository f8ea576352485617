"""What `mmllm merge` does, and experts aligned by activations, for which a model must run.

Shapes: N tokens of a layer, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.checkpoints.folder import load_model
from mmllm.data.rows.bad_rows import BadRows
from mmllm.data.rows.forms import read_rows
from mmllm.evaluation.results import KIND_OF_TASK
from mmllm.evaluation.tasks import evaluate
from mmllm.inference.api import Model
from mmllm.interop.merging.adapters import merge_adapters
from mmllm.interop.merging.branches import mix_branches
from mmllm.interop.merging.experts import AlignExperts, align_by_activation
from mmllm.interop.merging.folder import MergeReport, merge_folders
from mmllm.interop.merging.settings import BRANCHES, MergeConfig
from mmllm.training.merging_search import Evolution, candidate_like, evolve, genes_of

_MAX_TOKENS = 256
"""Of a layer, by which experts are aligned."""


def run_merge(config: MergeConfig, out: str | Path, is_check: bool = False) -> Iterator[str | MergeReport]:
    """Does what a merge's YAML asks for.

    Args:
        config: parsed.
        out: folder to write; it is new or empty.
        is_check: write nothing, say what would be done.

    Yields:
        Lines while it runs; last, unless weights were evolved, the report.
    """
    if config.adapter is not None:
        yield merge_adapters(config, out, is_check)
    elif config.method == BRANCHES:
        yield mix_branches(config, out, is_check)
    elif config.evolve is not None and not is_check:
        yield from evolve(config, out, aligner_of(config))
    elif config.evolve is not None:
        evolution = Evolution.parse(config.evolve)
        genes = genes_of(config, evolution)
        yield f"{len(genes)} numbers would be searched: {', '.join(sorted({gene.parameter for gene in genes}))}"
        yield merge_folders(candidate_like(config), out, aligner_of(config), is_check=True)
    else:
        yield merge_folders(config, out, aligner_of(config), is_check=is_check)


def activations(model: Model, manifest: str | Path, limit: int, seed: int = 0) -> dict[int, Tensor]:
    """What arrives at each layer's experts while a model answers a manifest's rows.

    Args:
        model: whose experts the others are aligned with.
        manifest: rows of any kinds that the model has senses for.
        limit: rows of each task at most.
        seed: of the draw of rows and tokens.

    Returns:
        By layer, [N, D], at most 256 tokens drawn from all.

    Raises:
        ValueError: no rows, or the model has no experts.
    """
    rows = read_rows(manifest, BadRows(0.05))
    decoder = model.model.decoder
    seen: dict[int, list[Tensor]] = {
        layer: [] for layer in range(decoder.config.num_hidden_layers) if decoder.config.has_experts(layer)
    }
    hooks = [_listening(decoder.layers[layer], kept) for layer, kept in seen.items()]
    try:
        for task in ("caption", "transcribe", "interleaved", "text"):
            of_task = [row for row in rows if row.kind == KIND_OF_TASK[task]]
            of_task = [row for row in of_task if task != "interleaved" or "question" in row.metadata]
            if of_task:
                evaluate(model, task, of_task, limit=limit, seed=seed)
    finally:
        for hook in hooks:
            hook.remove()
    if not any(seen.values()):
        raise ValueError(f"{manifest} has no captions, sounds, questions or texts; experts are aligned by such rows")
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for layer, kept in seen.items():
        x_ND = torch.cat(kept)
        inputs[layer] = x_ND[torch.randperm(len(x_ND), generator=generator)[:_MAX_TOKENS]]
    return inputs


def _listening(block: nn.Module, kept: list[Tensor]) -> Any:
    def keep(module: nn.Module, given: tuple[Any, ...]) -> None:
        kept.append(given[0].detach().float().cpu())

    return block.get_submodule("mlp").register_forward_pre_hook(keep)


def aligner_of(config: MergeConfig) -> AlignExperts | None:
    """What orders experts by activations, where a merge asks for that; None: it doesn't.

    Raises:
        FileNotFoundError, ValueError: the first parent or the manifest can't be read.
    """
    if config.align.by != "activation":
        return None
    assert config.align.manifest is not None
    folder, _, adapter = config.first.rpartition("+") if not Path(config.first).is_dir() else (config.first, "", "")
    loaded = load_model(folder, adapter=adapter or None)
    model = Model(loaded.model, loaded.tokenizer, loaded.image_transform, loaded.generation)
    return align_by_activation(activations(model, config.align.manifest, config.align.limit, config.seed))
