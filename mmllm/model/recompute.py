"""Activation checkpointing: what a block keeps for its backward pass, and what it computes again (arXiv 1604.06174)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "selective", "full"]
"""none: keep everything. full: keep a block's input. selective: keep what matrix products, attention, experts and
all-to-alls gave, and compute the cheap rest again (as in Korthikanti et al., arXiv 2205.05198)."""

Result = TypeVar("Result")

_SAVED = (
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm",
    "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_attention_math", "torch_attn::_varlen_attn", "mmllm_kernels::experts",
    "mmllm_kernels::route", "_c10d_functional::all_to_all_single", "_c10d_functional::all_reduce",
)  # fmt: skip
"""Operators, by name, whose results a selective checkpoint keeps."""


def recompute_mode(value: bool | str) -> Recompute:
    """The mode that a config's value means: earlier ones had true (full) and false (none).

    Raises:
        ValueError: there is no such mode.
    """
    mode = {True: "full", False: "none"}.get(value, value) if isinstance(value, bool) else value
    if mode not in get_args(Recompute):
        raise ValueError(
            f"decoder.gradient_checkpointing is {value!r}; choose {', '.join(get_args(Recompute))} (true means full, "
            f"false none)"
        )
    return mode  # pyright: ignore[reportReturnType]


def checkpointed(mode: Recompute, function: Callable[..., Result], *args: Any) -> Result:
    """`function(*args)`, keeping of what its gradient needs as much as the mode says."""
    if mode == "none" or not torch.is_grad_enabled():
        return function(*args)
    if mode == "full":
        return checkpoint(function, *args, use_reentrant=False)
    return checkpoint(function, *args, use_reentrant=False, context_fn=_selective)


_selective = functools.partial(create_selective_checkpoint_contexts, lambda _, op, *args, **kwargs: _policy(op))


def _policy(op: Any) -> CheckpointPolicy:
    name = op.name() if hasattr(op, "name") else str(op)
    return CheckpointPolicy.MUST_SAVE if name.split(".")[0] in _SAVED else CheckpointPolicy.PREFER_RECOMPUTE
