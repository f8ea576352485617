"""Activation checkpointing: what a block keeps for its backward pass, and what it computes again (arXiv 1604.06174)."""

from __future__ import annotations

import functools
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
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


def checkpointed(mode: Recompute, module: nn.Module, function: Callable[..., Result], *args: Any) -> Result:
    """`function(*args)`, keeping of what its gradient needs as much as the mode says.

    Args:
        mode: what is kept.
        module: whose function it is: what is computed again is computed without dropout, too, if it was so at first.
        function: called again in the backward pass.
        *args: of it.
    """
    if mode == "none" or not torch.is_grad_enabled():
        return function(*args)
    if not module.training and not torch.compiler.is_compiling():  # what is compiled doesn't ask again
        function = _in_eval_mode(module, function)
    if mode == "full":
        return checkpoint(function, *args, use_reentrant=False)
    # A compiler takes torch's own contexts alone. Those count every operator, so that hooks within the region, as of
    # weights that FSDP2 gathers for the experts, are taken for operators that were not there in the forward pass.
    contexts = _torch_contexts if torch.compiler.is_compiling() else _contexts
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


def _in_eval_mode(module: nn.Module, function: Callable[..., Result]) -> Callable[..., Result]:
    """The function with the module in eval mode whenever it is called: until then, others may have set it back."""

    def run(*args: Any) -> Result:
        trained = [each for each in module.modules() if each.training]
        for each in trained:
            each.training = False
        try:
            return function(*args)
        finally:
            for each in trained:
                each.training = True

    return run


def _is_saved(op: Any) -> bool:
    name = op.name() if hasattr(op, "name") else str(op)
    return name.split(".")[0] in _SAVED


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_saved(op) else CheckpointPolicy.PREFER_RECOMPUTE


_torch_contexts = functools.partial(create_selective_checkpoint_contexts, _policy)


def _contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    kept: dict[Any, deque[Any]] = defaultdict(deque)
    return _Keep(kept), _Reuse(kept)


class _Keep(TorchDispatchMode):
    """Keeps what the saved operators gave, each with its version."""

    def __init__(self, kept: dict[Any, deque[Any]]):
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if _is_saved(func):
            values = out if isinstance(out, (tuple, list)) else (out,)
            # Detached: the tensor itself will hold the graph that holds this.
            held = [value.detach() if isinstance(value, Tensor) else value for value in values]
            versions = [value._version if isinstance(value, Tensor) else 0 for value in held]
            self._kept[func].append((held, versions, isinstance(out, (tuple, list))))
        return out


class _Reuse(TorchDispatchMode):
    """Gives them back, in the same order, instead of computing them again."""

    def __init__(self, kept: dict[Any, deque[Any]]):
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not _is_saved(func):
            return func(*args, **(kwargs or {}))
        if not self._kept[func]:
            raise RuntimeError(f"{func} was kept once for one backward pass; nothing is left for another")
        held, versions, is_sequence = self._kept[func].popleft()
        for value, version in zip(held, versions, strict=True):
            assert not isinstance(value, Tensor) or value._version == version, f"{func}'s result was changed in place"
        return tuple(held) if is_sequence else held[0]
