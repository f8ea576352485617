"""How the tensors of a family's checkpoint and those of `Decoder` lie in each other.

One table of pieces serves both ways: reading fills our tensors from theirs, writing theirs from ours.

Shapes: V vocabulary, D width, E experts, S shared experts, I inner width of an expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from mmllm.checkpoints.weights import TensorSpec
from mmllm.model.decoder import Decoder
from mmllm.model.decoder_config import DecoderConfig

Index = tuple[slice | int, ...]
Shape = tuple[int, ...]
_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Names:
    """Where a checkpoint has its decoder.

    Attributes:
        body: what its names begin with, but for the head's.
        head: the head's whole name.
    """

    body: str
    head: str

    @staticmethod
    def of(names: Iterable[str]) -> Names:
        """Finds the decoder among the names of a checkpoint, alone or inside of a model with pictures.

        Raises:
            ValueError: no name, or more than one, is that of an embedding.
        """
        names = list(names)
        bodies = [name.removesuffix(_EMBEDDING) for name in names if name.endswith(_EMBEDDING)]
        if len(bodies) != 1:
            raise ValueError(
                f"the checkpoint has {len(bodies)} tensors {_EMBEDDING}{' at ' + ', '.join(bodies) if bodies else ''}; "
                f"wanted one, as model.{_EMBEDDING} of a decoder; give the folder of one language model"
            )
        heads = [name for name in names if name.endswith(_HEAD)]
        if len(heads) == 1:
            return Names(bodies[0], heads[0])
        return Names(bodies[0], f"language_model.{_HEAD}" if bodies[0].startswith("language_model.") else _HEAD)


DECODER = Names("model.", _HEAD)
"""Of a decoder by itself (`…ForCausalLM`)."""
LLAVA = Names("language_model.model.", f"language_model.{_HEAD}")
"""Of the decoder in a published LLaVA checkpoint."""


@dataclass(frozen=True)
class Piece:
    """A part of one of our tensors that is a part of one of theirs; empty indices mean the whole."""

    ours: str
    ours_at: Index
    theirs: str
    theirs_at: Index


@dataclass
class Layout:
    """All tensors of a decoder, ours and theirs, and how each lies in the other."""

    ours: dict[str, Shape] = field(default_factory=dict)
    theirs: dict[str, Shape] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    zeros: dict[str, TensorSpec] = field(default_factory=dict)
    """Of theirs that we don't have: what changes nothing where it is zero."""

    def add(self, ours: str, theirs: str, shape: Shape, ours_at: Index = (), theirs_at: Index = ()) -> None:
        """Says that a part of ours is a part of theirs, whose shape is `shape`."""
        self.theirs[theirs] = shape
        self.pieces.append(Piece(ours, ours_at, theirs, theirs_at))

    def by_ours(self) -> dict[str, list[Piece]]:
        """The pieces of each of our tensors."""
        found: dict[str, list[Piece]] = {name: [] for name in self.ours}
        for piece in self.pieces:
            found[piece.ours].append(piece)
        return found

    def by_theirs(self) -> dict[str, list[Piece]]:
        """The pieces of each of their tensors."""
        found: dict[str, list[Piece]] = {name: [] for name in self.theirs}
        for piece in self.pieces:
            found[piece.theirs].append(piece)
        return found


def decoder_layout(
    config: DecoderConfig, family: str, names: Names = DECODER, is_stacked: bool = False, num_rows: int | None = None
) -> Layout:
    """The table of a decoder in a family's checkpoint.

    Args:
        config: the decoder.
        family: its `model_type`.
        names: where the checkpoint has it.
        is_stacked: experts are one tensor a layer, as transformers 5 holds them in memory; otherwise each has tensors
            of its own, as published checkpoints have them.
        num_rows: of embedding and head only the first so many are theirs; None: all.
    """
    layout = Layout(ours=decoder_shapes(config))
    for name, shape in layout.ours.items():
        if name in (_EMBEDDING, _HEAD):
            rows = shape[0] if num_rows is None else num_rows
            part: Index = () if rows == shape[0] else (slice(0, rows),)
            layout.add(name, names.head if name == _HEAD else names.body + name, (rows, *shape[1:]), part)
        elif ".mlp.experts." in name and not is_stacked:
            _add_experts(layout, name, shape, names.body, family)
        elif ".mlp.shared_experts." in name:
            _add_shared_experts(layout, name, shape, names.body)
        elif family == "phi3" and name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            _add_fused(layout, name, names.body, ("q_proj", "k_proj", "v_proj"), "qkv_proj")
        elif family == "phi3" and name.endswith((".gate_proj.weight", ".up_proj.weight")):
            _add_fused(layout, name, names.body, ("gate_proj", "up_proj"), "gate_up_proj")
        elif family == "mixtral" and name.endswith(".mlp.gate.weight") and not is_stacked:
            layout.add(name, names.body + name.replace(".mlp.gate.", ".block_sparse_moe.gate."), shape)
        else:
            layout.add(name, names.body + name, shape)
    if family in ("glm4_moe", "dots1") and config.moe is not None and not config.moe.use_expert_bias:
        for layer in filter(config.has_experts, range(config.num_hidden_layers)):
            name = f"{names.body}layers.{layer}.mlp.gate.e_score_correction_bias"
            layout.theirs[name] = (config.moe.num_experts,)
            layout.zeros[name] = TensorSpec(torch.float32, (config.moe.num_experts,))
    return layout


def decoder_shapes(config: DecoderConfig) -> dict[str, Shape]:
    """Names and shapes of `Decoder.state_dict()`, without its memory."""
    with torch.device("meta"):
        decoder = Decoder(config)
    return {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}


def _add_experts(layout: Layout, name: str, shape: Shape, body: str, family: str) -> None:
    """[E, 2I, D] or [E, D, I] of ours, and of theirs [I, D] twice or [D, I] an expert."""
    if family == "mixtral":
        gate, up, down, name_in = "w1", "w3", "w2", name.replace(".mlp.experts.", ".block_sparse_moe.experts.")
    else:
        gate, up, down, name_in = "gate_proj", "up_proj", "down_proj", name
    path, _, kind = name_in.rpartition(".")
    for expert in range(shape[0]):
        start = f"{body}{path}.{expert}"
        if kind == "down_proj":
            layout.add(name, f"{start}.{down}.weight", shape[1:], (expert,))
            continue
        inner = shape[1] // 2
        layout.add(name, f"{start}.{gate}.weight", (inner, shape[2]), (expert, slice(0, inner)))
        layout.add(name, f"{start}.{up}.weight", (inner, shape[2]), (expert, slice(inner, 2 * inner)))


def _add_shared_experts(layout: Layout, name: str, shape: Shape, body: str) -> None:
    """[S, 2I, D] or [S, D, I] of ours, and of theirs one dense layer of inner width S · I."""
    path, _, kind = name.rpartition(".")
    num_shared = shape[0]
    if kind == "down_proj":
        width, inner = shape[1:]
        for expert in range(num_shared):
            part = slice(expert * inner, (expert + 1) * inner)
            theirs = f"{body}{path}.down_proj.weight"
            layout.add(name, theirs, (width, num_shared * inner), (expert,), (slice(None), part))
        return
    inner, width = shape[1] // 2, shape[2]
    for which, start in (("gate_proj", 0), ("up_proj", inner)):
        for expert in range(num_shared):
            part = slice(expert * inner, (expert + 1) * inner)
            place = (expert, slice(start, start + inner))
            layout.add(name, f"{body}{path}.{which}.weight", (num_shared * inner, width), place, (part,))


def _add_fused(layout: Layout, name: str, body: str, parts: tuple[str, ...], fused: str) -> None:
    """One of several matrices whose rows lie in one of theirs, one behind the other."""
    path, which, suffix = name.rsplit(".", 2)
    shapes = [layout.ours[f"{path}.{part}.{suffix}"] for part in parts]
    sizes = [shape[0] for shape in shapes]
    index = parts.index(which)
    start = sum(sizes[:index])
    place = (slice(start, start + sizes[index]),)
    layout.add(name, f"{body}{path}.{fused}.{suffix}", (sum(sizes), *shapes[0][1:]), (), place)


def is_stacked(names: Iterable[str]) -> bool:
    """Whether a checkpoint has the experts of a layer in one tensor."""
    return any(name.endswith(".mlp.experts.gate_up_proj") for name in names)


def check_dtypes(names: Mapping[str, TensorSpec]) -> None:
    """Refuses weights that are not floating-point numbers of a kind that products take.

    Raises:
        ValueError: it names the tensor.
    """
    for name, spec in names.items():
        if spec.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(
                f"tensor {name} has dtype {str(spec.dtype).removeprefix('torch.')}; wanted bfloat16, float16 or "
                f"float32; take the checkpoint that was not quantized"
            )
