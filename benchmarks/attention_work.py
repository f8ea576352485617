"""Counts the score elements that attention computes in a training step, whichever backend is called.

Shapes: B sequences, T positions.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


def sum_of_squares(document_ids_BT: Tensor) -> int:
    """Score elements that documents need, all of their square counted."""
    total = 0
    for ids_T in document_ids_BT.cpu():
        total += int((torch.bincount(ids_T[ids_T >= 0]) ** 2).sum())
    return total


class AttentionWork:
    """Score elements of one head, summed over layers, as if causality saved nothing: a document's square is the ideal.

    - `F.scaled_dot_product_attention`: rows times columns, padding included.
    - torch's varlen kernel: squares of the lengths it is given.
    - FlexAttention: twice the elements of the blocks that its mask makes it compute, since the mask leaves out what is
      behind the diagonal; one mask serves all layers. It is seen if it is imported while this is active.

    On a CPU, where the latter two cannot train, their results are zeros: the step is worth nothing but for counting.

    Args:
        num_layers: that share a mask.
    """

    def __init__(self, num_layers: int) -> None:
        self.computed = 0
        self._num_layers = num_layers
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> AttentionWork:
        self._stack.enter_context(_Dense(self))
        self._stack.enter_context(_Varlen(self))
        make_mask = flex_attention.create_block_mask

        def counted(*args: Any, **kwargs: Any) -> Any:
            mask = make_mask(*args, **kwargs)
            self.computed += 2 * self._num_layers * _elements(mask)
            return mask

        self._replace("create_block_mask", counted)
        if not torch.cuda.is_available():  # it has no backward on a CPU
            self._replace("flex_attention", lambda query, key, value, **_: query * 0)
        return self

    def _replace(self, name: str, function: Any) -> None:
        self._stack.callback(setattr, flex_attention, name, getattr(flex_attention, name))
        setattr(flex_attention, name, function)

    def __exit__(self, *error: Any) -> None:
        self._stack.close()


def _elements(mask: flex_attention.BlockMask) -> int:
    blocks = mask.kv_num_blocks.sum()
    if mask.full_kv_num_blocks is not None:
        blocks = blocks + mask.full_kv_num_blocks.sum()
    return int(blocks) * mask.BLOCK_SIZE[0] * mask.BLOCK_SIZE[1]


class _Dense(TorchFunctionMode):
    def __init__(self, work: AttentionWork) -> None:
        super().__init__()
        self.work = work

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, key = args[:2]
            self.work.computed += query.shape[0] * query.shape[-2] * key.shape[-2]
        return func(*args, **(kwargs or {}))


class _Varlen(TorchDispatchMode):
    def __init__(self, work: AttentionWork) -> None:
        super().__init__()
        self.work = work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0] if func.namespace == "torch_attn" else ""
        if name == "_varlen_attn":
            self.work.computed += int((args[3].diff().long() ** 2).sum())  # cumulative lengths
        if name and args[0].device.type == "cpu":
            return _zeros(name, args)
        return func(*args, **(kwargs or {}))


def _zeros(name: str, args: Any) -> Any:
    """What the kernel or its backward would give, in shape."""
    if name == "_varlen_attn_backward":  # grad_out, query, key, value, …
        return tuple(torch.zeros_like(tensor) for tensor in args[1:4])
    query = args[0]
    return (
        torch.zeros_like(query),
        query.new_zeros(query.shape[1], query.shape[0], dtype=torch.float32),
        query.new_zeros(2),
    )
