"""What a training's export takes together: the sampling settings that go with the data, and a sharded model as one."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from mmllm.checkpoints.adapters import base_state
from mmllm.checkpoints.settings import GenerationConfig
from mmllm.model.embedding import joined_rows
from mmllm.model.multimodal import MultimodalModel
from mmllm.parallel.distribute import whole_state


def generation_after(before: GenerationConfig, data: Any) -> GenerationConfig:
    """The start's settings, with what the training's data says about lengths and voices.

    Args:
        before: of the start.
        data: the data module; None: there was none.
    """
    # A training without sounds leaves what its start heard.
    heard = getattr(data, "heard_seconds", None)
    longest, usual = heard or (before.max_heard_seconds, before.usual_heard_seconds)
    return dataclasses.replace(
        before,
        max_heard_seconds=longest,
        usual_heard_seconds=usual,
        max_length=_longest(before.max_length, getattr(data, "sequence_length", None)),
        voices=getattr(data, "voices", before.voices),
    )


def gathered(model: MultimodalModel) -> tuple[MultimodalModel, dict[str, Tensor]] | None:
    """A sharded model's whole copy, without adapters, and its whole state with them, on rank 0's CPU; None elsewhere.

    A collective call.
    """
    state = whole_state(model)
    if state is None:
        return None
    full = MultimodalModel(model.config)
    full.load_state_dict(base_state(joined_rows(state)))
    return full, state


def _longest(*lengths: int | None) -> int | None:
    return max((length for length in lengths if length is not None), default=None)
