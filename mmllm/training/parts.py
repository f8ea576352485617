"""The parts of a model that are frozen or trained at a rate of their own: `optimizer.parts`.

Each parameter belongs to one part, told by its name. Norms belong to the part that reads them.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from mmllm.checkpoints.adapter_config import AdapterConfig
from mmllm.checkpoints.adapters import add_adapter, is_adapters
from mmllm.model.embedding import ADDED
from mmllm.model.flops import ModelFlops
from mmllm.model.multimodal import ModelConfig, MultimodalModel
from mmllm.training.optimizers import OptimizerConfig

PARTS = (
    "image_tower", "image_projector", "audio_front_end", "unit_embedding", "text_embedding", "attention", "experts",
    "routers", "adapter",
)  # fmt: skip
"""`audio_front_end`: embeddings of codes, the projectors behind them, and the CTC head. `unit_embedding`: of the
embedding and the head the rows behind `decoder.num_base_ids`, special tokens and units, and speech's pointer.
`text_embedding`: their other rows, and the norm before the head. `experts`: dense feed-forward layers too. `adapter`:
what `adapter` adds."""

_BY_MODULE = {
    "vision": "image_tower",
    "image_projector": "image_projector",
    "code_embedding": "audio_front_end",
    "clip_projector": "audio_front_end",
    "unit_projector": "audio_front_end",
    "ctc_head": "audio_front_end",
    "pointer": "unit_embedding",
    "mask_embedding": "unit_embedding",
}
_LAYER = re.compile(r"decoder\.layers\.\d+\.")


def part_of(name: str) -> str:
    """The part that a parameter of a `MultimodalModel` (or of the module that trains it) belongs to."""
    name = name.removeprefix("model.")
    if is_adapters(name):
        return "adapter"
    if name.partition(".")[0] in _BY_MODULE:
        return _BY_MODULE[name.partition(".")[0]]
    in_layer, count = _LAYER.subn("", name)
    if not count:
        return "unit_embedding" if name.rpartition(".")[2] == ADDED else "text_embedding"
    if in_layer.startswith(("mlp.gate.", "depth.")):
        return "routers"
    return "attention" if in_layer.startswith(("self_attn.", "input_layernorm.")) else "experts"


def group_of(name: str, optimizer: OptimizerConfig) -> str:
    """What a parameter's groups in the optimizer are named after: its part where that has a rate of its own.

    Else "tower", "projector" or "decoder", as they are called in checkpoints of trainings without `parts`.
    """
    part = part_of(name)
    if part in (optimizer.parts or {}):
        return part
    if part == "image_tower":
        return "tower"
    module = name.removeprefix("model.").partition(".")[0]
    return "projector" if module in ("image_projector", "clip_projector", "unit_projector") else "decoder"


def splits_vocabulary(config: ModelConfig, optimizer: OptimizerConfig) -> bool:
    """Whether text rows and added rows are parameters of their own: where their rates differ.

    Raises:
        ValueError: they differ, and all rows are one block.
    """
    text, units = (optimizer.rate_of(part) for part in ("text_embedding", "unit_embedding"))
    num_base_ids = config.decoder.num_base_ids
    if text == units or num_base_ids == config.decoder.vocab_size:
        return False
    if not num_base_ids:
        raise ValueError(
            f"optimizer.parts makes the rate of text_embedding {text:g} and that of unit_embedding {units:g}, but "
            f"decoder.num_base_ids is 0: their rows are one block; give both the same rate, or num_base_ids: the ids "
            f"of text, behind which the others lie"
        )
    return True


def freeze(model: nn.Module, optimizer: OptimizerConfig) -> None:
    """Leaves all parameters out of the training whose part has the rate 0; PEFT freezes a whole decoder by itself."""
    for name, parameter in model.named_parameters():
        is_trained = optimizer.rate_of(group_of(name, optimizer)) > 0
        if not is_trained or name.startswith("decoder."):
            parameter.requires_grad_(is_trained)


def build_model(
    config: ModelConfig,
    optimizer: OptimizerConfig,
    decoder_init: AbstractContextManager[Any] | None = None,
    adapter: AdapterConfig | None = None,
    adapter_name: str = "default",
) -> MultimodalModel:
    """A model with the parameters that this optimizer will move, and none of the others trainable.

    Args:
        config: its sizes.
        optimizer: gives the rates.
        decoder_init: as `MultimodalModel`'s.
        adapter: that is put into its decoder.
        adapter_name: what it is called.

    Raises:
        ValueError: as `splits_vocabulary`, or the decoder can't have such an adapter.
    """
    model = MultimodalModel(config, decoder_init, splits_vocabulary(config, optimizer))
    if adapter is not None:
        with decoder_init or nullcontext():
            add_adapter(model.decoder, adapter, adapter_name)
    freeze(model, optimizer)
    return model


def flops_of(config: ModelConfig, optimizer: OptimizerConfig, adapter: AdapterConfig | None = None) -> ModelFlops:
    """Counts a model's operations as it is trained, with its adapters and frozen parts, from shapes alone.

    Args:
        config: its sizes.
        optimizer: as `build_model`'s.
        adapter: likewise.
    """
    with torch.device("meta"):
        return ModelFlops.of_model(build_model(config, optimizer, None, adapter))


def check_parts(optimizer: OptimizerConfig, known: tuple[str, ...], stage: str) -> None:
    """Raises ValueError where `optimizer.parts` names a part that a stage of the training doesn't have."""
    unknown = [name for name in optimizer.parts or {} if name not in known]
    if unknown:
        wanted = f"choose {', '.join(known)}" if known else "leave parts out"
        raise ValueError(f"optimizer.parts names {unknown[0]!r}, which is no part of what {stage} trains; {wanted}")
