"""A merged model folder: its tensors one after another, its other files those of the first parent, and its card."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm.checkpoints.adapters import saved_adapters
from mmllm.checkpoints.card import ModelInfo, model_card
from mmllm.checkpoints.files import CARD, CONFIG, GENERATION, SOURCE, replaced_folder, write_json
from mmllm.checkpoints.folder import folder_config
from mmllm.checkpoints.weights import TensorSpec, write_weights
from mmllm.interop.merging.experts import AlignExperts, align_by_weight
from mmllm.interop.merging.formulas import merged
from mmllm.interop.merging.parents import Parent, open_parents
from mmllm.interop.merging.settings import MergeConfig
from mmllm.model.multimodal import ModelConfig, MultimodalModel

log = logging.getLogger(__name__)


@dataclass
class MergeReport:
    """What a merge did, or would do."""

    out: str
    method: str
    parents: list[str]
    num_parameters: int = 0
    num_merged: int = 0
    """Tensors in which the parents differ."""
    num_equal: int = 0
    """Tensors that are the same in all: they stay as they are, to the last bit."""
    from_first: list[str] = field(default_factory=list)
    """Whole numbers in which the parents differ (counts, masks): the first parent's are kept."""
    moved_experts: dict[int, int] = field(default_factory=dict)
    """Of each layer, how many experts of how many parents changed their place."""
    left_behind: list[str] = field(default_factory=list)
    """Adapters of the parents."""
    scores: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """To print."""
        yield f"{self.out}: {self.method} of {', '.join(self.parents)}; {self.num_parameters:,} parameters"
        yield f"{self.num_merged} tensors merged, {self.num_equal} are the same in all parents"
        if self.from_first:
            yield f"of {self.parents[0]}, since they are whole numbers: {', '.join(self.from_first)}"
        if self.moved_experts:
            layers = ", ".join(f"{count} in layer {layer}" for layer, count in self.moved_experts.items())
            yield f"experts that changed their place: {layers}"
        if self.left_behind:
            yield f"left behind: {', '.join(self.left_behind)}, adapters of the parents"


def check_new(out: str | Path) -> Path:
    """Raises ValueError where something is in the way of a merged model."""
    out = Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"--out is {out}, which isn't empty; give a new folder")
    return out


def open_merge(config: MergeConfig, align: AlignExperts | None = None) -> list[Parent]:
    """The parents of a merge, the base first, their experts in one order.

    Args:
        config: what is asked for.
        align: orders the experts by activations; needed where the config says so.

    Raises:
        FileNotFoundError, ValueError: as `open_parents`, or the config doesn't fit them.
    """
    parents = open_parents(config.every_parent)
    decoder = parents[0].parts.config.decoder
    config.check_layers(decoder.num_hidden_layers)
    config.check_filters(parents[0].specs)
    for name, spec in parents[0].specs.items():
        if spec.dtype.is_floating_point:
            config.numbers(name, decoder.num_hidden_layers)
    if config.align.by != "none":
        if not any(map(decoder.has_experts, range(decoder.num_hidden_layers))):
            raise ValueError(f"align_experts is {config.align.by}, but {parents[0].path} has no experts; leave it out")
        assert align is not None or config.align.by == "weight"
        for other in parents[1:]:
            (align or align_by_weight)(parents[0], other)
    return parents


def merge_folders(
    config: MergeConfig,
    out: str | Path,
    align: AlignExperts | None = None,
    scores: Mapping[str, Any] | None = None,
    is_check: bool = False,
) -> MergeReport:
    """Merges model folders into one.

    Args:
        config: what is asked for.
        out: model folder to write; it is new or empty.
        align: as of `open_merge`.
        scores: for the card.
        is_check: write nothing, say what would be done.

    Raises:
        FileNotFoundError, ValueError: as `open_merge`, or `out` isn't empty.
        ModuleNotFoundError: `engine: mergekit` without it.
    """
    out = check_new(out)
    parents = open_merge(config, align)
    first = parents[0]
    specs = merged_specs(first.specs, config.dtype)
    report = MergeReport(str(out), config.method, [parent.path for parent in parents], scores=dict(scores or {}))
    report.num_parameters = sum(s.num_elements for s in specs.values() if s.dtype.is_floating_point)
    report.moved_experts = _moved(parents)
    report.left_behind = [f"{p.path}: {name}" for p in parents for name in _idle_adapters(p)]
    if config.engine == "mergekit":
        from mmllm.interop.merging.mergekit import run_mergekit

        make: Make = run_mergekit
    else:
        make = by_formulas
    if is_check:
        for name in specs:
            count(report, name, [parent.read(name) for parent in parents])
        return report
    with replaced_folder(out, sources=[parent.folder for parent in parents]) as folder:
        write_weights(folder, specs, ((name, tensor.to(specs[name].dtype)) for name, tensor in
                                      make(config, parents, report)))  # fmt: skip
        info = ModelInfo(
            name=f"{config.method} of {len(parents)} models",
            recipe_hash=hashlib.sha256(config.text.encode()).hexdigest()[:16] if config.text else None,
            data=tuple(parent.line() for parent in parents),
            scores=report.scores,
            notes=card_notes(config.text),
        )
        write_files(folder, first, first.parts.config, info)
    return report


Make = Callable[[MergeConfig, list[Parent], MergeReport], Iterator[tuple[str, Tensor]]]


def merged_specs(specs: Mapping[str, TensorSpec], dtype: torch.dtype | None) -> dict[str, TensorSpec]:
    """As the first parent's, but for a dtype that was asked for; biases of routers keep theirs."""
    return {
        name: TensorSpec(dtype, spec.shape)
        if dtype is not None and spec.dtype.is_floating_point and not name.endswith("e_score_correction_bias")
        else spec
        for name, spec in specs.items()
    }


def by_formulas(
    config: MergeConfig, parents: list[Parent], report: MergeReport | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of a merged model, in float32 or wider where it was merged; no other is held meanwhile."""
    for name in parents[0].specs:
        tensors = [parent.read(name) for parent in parents]
        if count(report, name, tensors):
            yield name, merged_tensor(config, name, tensors, parents[0].parts.config.decoder.num_hidden_layers)
        else:
            yield name, tensors[0]


def merged_tensor(config: MergeConfig, name: str, tensors: list[Tensor], num_layers: int) -> Tensor:
    """One tensor of a merged model.

    Args:
        config: what is asked for.
        name: of the tensor.
        tensors: of the base, where there is one, and of the other parents.
        num_layers: of the decoder.
    """
    wide = [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
    base, others = (None, wide) if config.base is None else (wide[0], wide[1:])
    numbers = config.numbers(name, num_layers)
    return merged(config.method, base, others, numbers, lambda place: generator_for(config.seed, name, place))


def generator_for(seed: int, name: str, place: int) -> torch.Generator:
    """What is drawn for a tensor of a parent: by seed, name and place alone, whatever is merged before it."""
    digest = hashlib.sha256(f"{seed} {place} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def is_merged(tensors: list[Tensor]) -> bool:
    """Whether parents differ in a tensor, of numbers that can be averaged."""
    return tensors[0].is_floating_point() and not all(torch.equal(tensors[0], other) for other in tensors[1:])


def count(report: MergeReport | None, name: str, tensors: list[Tensor]) -> bool:
    """As `is_merged`, and notes in the report what becomes of the tensor."""
    if report is not None:
        if is_merged(tensors):
            report.num_merged += 1
        elif not tensors[0].is_floating_point() and not all(torch.equal(tensors[0], other) for other in tensors[1:]):
            report.from_first.append(name)
        else:
            report.num_equal += 1
    return is_merged(tensors)


def _moved(parents: list[Parent]) -> dict[int, int]:
    moved: dict[int, int] = {}
    for parent in parents:
        for layer, order in parent.order.items():
            moved[layer] = moved.get(layer, 0) + sum(place != expert for place, expert in enumerate(order))
    return moved


def _idle_adapters(parent: Parent) -> list[str]:
    return [name for name in saved_adapters(parent.folder) if parent.lora is None or name != parent.lora.name]


def write_files(folder: Path, parent: Parent, config: ModelConfig, info: ModelInfo) -> None:
    """Writes what belongs to a model folder beside its weights, as a parent has it."""
    with torch.device("meta"):
        shapes = MultimodalModel(config)
    parent.parts.tokenizer.save(folder)
    write_json(folder / CONFIG, folder_config(config, parent.parts.tokenizer, parent.parts.image_transform))
    shutil.copyfile(parent.folder / GENERATION, folder / GENERATION)
    (folder / CARD).write_text(model_card(shapes, parent.parts.tokenizer, info), encoding="utf-8")
    if (parent.folder / SOURCE).is_dir():
        shutil.copytree(parent.folder / SOURCE, folder / SOURCE)


def card_notes(text: str) -> str:
    """The recipe, as the card shows it."""
    return f"Made by `mmllm merge` of:\n\n```yaml\n{text.strip()}\n```" if text.strip() else "Made by `mmllm merge`."
