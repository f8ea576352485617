"""What `mmllm adapter merge` and `mmllm adapter export` do.

vLLM's multi-LoRA wants linear layers alone, under the names of published checkpoints. An adapter of attention or of
dense layers is that already. PEFT has one pair of matrices for a whole stack of experts (its guide "MoE expert
parameters and vLLM"): A [E·R, in], an expert's rows together, and B [out, R·E], in whose columns the expert is the
faster index. They are taken apart into a pair for each expert and projection.

Shapes: E experts, R rank, I inner width of an expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from mmllm.checkpoints.adapters import (
    BASE,
    CONFIG,
    PREFIX,
    WEIGHTS,
    adapter_folder,
    base_facts,
    load_adapter,
    merge_adapter,
    saved_adapters,
)
from mmllm.checkpoints.card import ModelInfo
from mmllm.checkpoints.files import ADAPTERS, SOURCE, read_json, write_json
from mmllm.checkpoints.folder import load_model, read_folder, save_model
from mmllm.checkpoints.weights import Checkpoint
from mmllm.interop.decoder_names import Piece, decoder_layout
from mmllm.interop.families import decoder_config
from mmllm.interop.family_configs import family_for
from mmllm.interop.tokenizer_files import copy_there
from mmllm.model.decoder_config import DecoderConfig
from mmllm_tokenizers.tensor_file import save_tensors

_STACK = re.compile(r"(?P<layer>layers\.\d+\.mlp\.experts)\.(?P<inner>base_layer\.)?lora_(?P<side>[AB])\.weight")
_FUSED = {"phi3": ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")}
"""Families whose checkpoints have some of our layers in one."""


def merge(model_dir: str | Path, name: str, out: str | Path) -> str:
    """Writes a model folder whose weights are those of another with an adapter added.

    Args:
        model_dir: model folder.
        name: of its adapter.
        out: model folder to write.

    Returns:
        A line to print.

    Raises:
        FileNotFoundError: no such model, or no such adapter.
        ValueError: as `mmllm.checkpoints.adapters.load_adapter`, or `out` holds something else.
        ModuleNotFoundError: without PEFT.
    """
    _check_apart(model_dir, out)
    loaded = load_model(model_dir, adapter=name)
    merge_adapter(loaded.model.decoder, name)
    info = ModelInfo(notes=f"Merged with the adapter `{name}`.")
    source = Path(model_dir) / SOURCE
    save_model(out, loaded.model, loaded.tokenizer, info, loaded.image_transform, loaded.generation, source)
    others = [other for other in saved_adapters(model_dir) if other != name]
    behind = f"; {', '.join(others)} stayed behind: adapters of the weights as they were" if others else ""
    dtype = loaded.model.decoder.embed_tokens.weight.dtype
    rounded = f", rounded to {str(dtype).removeprefix('torch.')}" if dtype.itemsize < 4 else ""
    return f"{out}: {model_dir} with {name} in its weights{rounded}{behind}"


def export(model_dir: str | Path, name: str, out: str | Path) -> str:
    """Writes an adapter in the form that vLLM's multi-LoRA takes beside the exported model.

    Args:
        model_dir: model folder.
        name: of its adapter.
        out: folder for `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        A line to print.

    Raises:
        FileNotFoundError: no such model, or no such adapter.
        ValueError: vLLM has no such adapters; the message names the key.
    """
    folder, config = adapter_folder(model_dir, name), read_folder(model_dir).config.decoder
    values = read_json(folder / CONFIG)
    if values.get("peft_type") != "LORA":
        raise ValueError(f"{folder / CONFIG} has peft_type {values.get('peft_type')!r}; vLLM loads LORA alone")
    if values.get("use_dora"):
        raise ValueError(f"{folder / CONFIG} has use_dora, which vLLM doesn't load; merge the adapter instead")
    family = _family(Path(model_dir), config)
    fused = [target for target in _FUSED.get(family, ()) if target in (values.get("target_modules") or ())]
    if fused:
        raise ValueError(
            f"{folder / CONFIG} adapts {fused[0]}, which {family} has in one layer with others; merge the adapter, "
            f"and export the model"
        )
    stored = Checkpoint.open_file(folder / WEIGHTS)
    tensors: dict[str, Tensor] = {}
    pieces = {piece.theirs: piece for piece in decoder_layout(config, family).pieces}
    for key in stored.specs:
        found = _STACK.fullmatch(key.removeprefix(PREFIX))
        if found is None:
            tensors[key] = stored.read(key)
    layers = {found.group("layer") for key in stored.specs if (found := _STACK.fullmatch(key.removeprefix(PREFIX)))}
    for layer in sorted(layers):
        tensors |= dict(_by_expert(stored, layer, values, list(pieces.values()), config))
    if layers:
        modules = {key.rsplit(".lora_", 1)[0].rpartition(".")[2] for key in tensors}
        values |= {"target_modules": sorted(modules), "target_parameters": None}
    out = Path(out)
    if out.is_dir() and any(path.name not in (CONFIG, WEIGHTS) for path in out.iterdir()):
        raise ValueError(f"{out} holds other files than an adapter's; give a new folder")
    out.mkdir(parents=True, exist_ok=True)
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_tensors(contiguous, out / WEIGHTS, metadata={"format": "pt"})
    write_json(out / CONFIG, values)
    return f"{out}: {name}, {len(tensors)} tensors for the model as {family}"


def _by_expert(
    stored: Checkpoint, layer: str, config: dict[str, Any], pieces: list[Piece], decoder: DecoderConfig
) -> Iterator[tuple[str, Tensor]]:
    """A pair of matrices for each expert and projection of a layer."""
    assert decoder.moe is not None
    num_experts = decoder.moe.num_experts
    for inner in ("base_layer.", ""):
        sides = {side: f"{PREFIX}{layer}.{inner}lora_{side}.weight" for side in "AB"}
        if sides["A"] not in stored.specs:
            continue
        a_ERI = stored.read(sides["A"]).unflatten(0, (num_experts, -1))
        b_ORE = stored.read(sides["B"]).unflatten(1, (-1, num_experts))
        for piece in pieces:
            if piece.ours != f"{layer}.{_adapted(layer, inner, config, b_ORE, decoder)}":
                continue
            expert, rows = piece.ours_at[0], piece.ours_at[1] if len(piece.ours_at) > 1 else slice(None)
            path = f"base_model.model.{piece.theirs.removesuffix('.weight')}"
            yield f"{path}.lora_A.weight", a_ERI[expert].clone()
            yield f"{path}.lora_B.weight", b_ORE[rows, :, expert].clone()


def _adapted(layer: str, inner: str, config: dict[str, Any], b_ORE: Tensor, decoder: DecoderConfig) -> str:
    """Which stack PEFT's module around the experts adapts: of two, the inner one the first of the module's."""
    targets = [str(target).rpartition(".")[2] for target in config.get("target_parameters") or ()]
    assert decoder.moe is not None
    wanted = {"gate_up_proj": 2 * decoder.moe.moe_intermediate_size, "down_proj": decoder.hidden_size}
    name = targets[0] if len(targets) == 1 else ("gate_up_proj" if inner else "down_proj")
    if wanted[name] != b_ORE.shape[0]:
        raise ValueError(
            f"{PREFIX}{layer}.{inner}lora_B.weight has {b_ORE.shape[0]} rows, {name} of this model {wanted[name]}; it "
            f"is an adapter of another base"
        )
    return name


def _family(model_dir: Path, config: DecoderConfig) -> str:
    """What the decoder goes out as: what it came in as, else what computes it."""
    path = model_dir / SOURCE / "config.json"
    if path.is_file():
        values = read_json(path)
        text = values.get("text_config") or values
        if (decoder_config(text).moe is None) == (config.moe is None):  # else it was upcycled since
            return str(text["model_type"])
    return family_for(config)


def add(model_dir: str | Path, folder: str | Path, name: str) -> str:
    """Copies an adapter into a model folder, once it has been seen to fit.

    Args:
        model_dir: model folder.
        folder: the adapter's, saved by PEFT or here.
        name: what it is called there.

    Returns:
        A line to print.

    Raises:
        FileNotFoundError: no such model, or no such adapter.
        ValueError: there is one of this name, it doesn't fit the model, or it was trained on another.
        ModuleNotFoundError: without PEFT.
    """
    target = Path(model_dir) / ADAPTERS / name
    if target.exists():
        raise ValueError(f"{target} is there already; give another name")
    decoder = load_model(model_dir).model.decoder
    load_adapter(decoder, folder, name, base_facts(Checkpoint.open(model_dir), decoder.config))
    target.mkdir(parents=True)
    for file in (CONFIG, WEIGHTS, BASE):
        copy_there(Path(folder) / file, target / file)
    return f"{target}: from {folder}"


def listed(model_dir: str | Path) -> list[str]:
    """A line for each adapter of a model folder."""
    lines = []
    for name in saved_adapters(model_dir):
        values = read_json(adapter_folder(model_dir, name) / CONFIG)
        targets = [*(values.get("target_modules") or ()), *(values.get("target_parameters") or ())]
        what = f"rank {values.get('r')}, {' '.join(sorted(map(str, targets)))}"
        if "num_virtual_tokens" in values:
            what = f"{values['num_virtual_tokens']} tokens"
        lines.append(f"{name}: {values.get('peft_type')}, {what}")
    return lines or [f"{model_dir} has no adapters"]


def _check_apart(model_dir: str | Path, out: str | Path) -> None:
    if Path(model_dir).resolve() == Path(out).resolve():
        raise ValueError(f"--out is {out}, the model itself; give another folder")
