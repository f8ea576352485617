"""Counts the score elements that attention computes: of each backend that is seen to be called.

Shapes: B sequences, T positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


def sum_of_squares(document_ids_BT: Tensor) -> int:
    """Score elements that documents need, all of their square counted."""
    total = 0
    for ids_T in document_ids_BT.cpu():
        total += int((torch.bincount(ids_T[ids_T >= 0]) ** 2).sum())
    return total


class AttentionWork:
    """Score elements (of one head, whole squares) that calls of attention compute, by the backend that is seen."""

    def __init__(self) -> None:
        self.computed: dict[str, int] = {}
        self._modes = (_Scores(self), _VarlenScores(self))

    def add(self, backend: str, count: int) -> None:
        """Counts one call."""
        self.computed[backend] = self.computed.get(backend, 0) + count

    def __enter__(self) -> AttentionWork:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Scores(TorchFunctionMode):
    def __init__(self, work: AttentionWork) -> None:
        super().__init__()
        self.work = work

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            query, key = args[:2]
            self.work.add("buckets", query.shape[0] * query.shape[-2] * key.shape[-2])
        return func(*args, **(kwargs or {}))


class _VarlenScores(TorchDispatchMode):
    def __init__(self, work: AttentionWork) -> None:
        super().__init__()
        self.work = work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "torch_attn" and func.__name__.startswith("_varlen_attn."):
            self.work.add("varlen", int((args[3].diff().long() ** 2).sum()))  # cumulative lengths
        return func(*args, **(kwargs or {}))
